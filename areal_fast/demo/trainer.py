"""The trainer: takes finished trajectories, fetches their tensors, frees them. And the reading of dumps.

Both forms of export are used: one session interaction by interaction, and the sessions of a group merged
into one padded batch. Either way the tensors stay with the proxy as shards until they are fetched and
cleared.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import msgspec

from areal_fast.client import ClientError, Reference, ShardsNotFound, Trajectory
from areal_fast.client.shards import decode_json
from areal_fast.demo.agents import World
from areal_fast.demo.ledger import Check, Session
from areal_fast.demo.tensors import BadTensor, Row, rows

DISCOUNT = 0.9
BACKLOG = 8
"""Finished episodes that may wait for the trainer; then agents wait, so that none goes stale in the queue."""
_DUMP_NAME = re.compile(r"(?P<session>.+)-(?:trajectory-\d+|active)\.json(?:\.\d+)?")


@dataclass(slots=True)
class Learned:
    """What the trainer got."""

    trajectories: int = 0
    groups: int = 0
    tensors: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Trainer:
    """Consumes `queue`: a session, or a group (group id, sessions); None ends it."""

    world: World
    queue: asyncio.Queue[tuple[str, list[Session]] | None] = field(
        default_factory=lambda: asyncio.Queue(BACKLOG)
    )
    learned: Learned = field(default_factory=Learned)
    shards: Check = field(
        default_factory=lambda: Check("tensors arrive as announced, and cleared ones are gone")
    )

    async def run(self) -> None:
        while (job := await self.queue.get()) is not None:
            group_id, sessions = job
            try:
                await (self._group(group_id, sessions) if group_id else self._single(sessions[0]))
            except (ClientError, BadTensor) as error:  # the day goes on, the verdict will say it
                self.shards.that(False, f"{[session.id for session in sessions]}: {error!r}")

    async def _single(self, session: Session) -> None:
        """One session, interaction by interaction (pull request 1268's form)."""
        remove = self.world.random.random() < 0.7
        exported = await self._fetch(
            await self.world.client.export(
                session.id, form="interactions", discount=DISCOUNT, remove_session=remove, fetch=False
            )
        )
        found: list[Row] = []
        for name, interaction in exported.interactions.items():
            found += rows(interaction.tensors, name)
        self._learn(found)
        self.world.ledger.found([session.id], found, "export (one session)", DISCOUNT)

    async def _group(self, group_id: str, sessions: list[Session]) -> None:
        """One batch over all interactions of the group (1.0's form)."""
        names = [session.id for session in sessions]
        exported = await self._fetch(
            await self.world.client.export(names, group_id=group_id, discount=DISCOUNT, fetch=False)
        )
        found = rows(exported.batch)
        self._learn(found, groups=1, trajectories=len(sessions))
        self.world.ledger.found(names, found, "export (group)", DISCOUNT)

    async def _fetch(self, exported: Trajectory) -> Trajectory:
        """The same with its tensors; afterwards their shards are cleared."""
        client, announced = self.world.client, exported.all_references()
        tensors = [shard.tensor for shard in await client.get_many(announced)]
        for tensor, one in zip(tensors, announced, strict=True):
            same = tuple(tensor.shape) == one.shape and str(tensor.dtype) == f"torch.{one.dtype}"
            self.shards.that(same, f"{one} came as {tuple(tensor.shape)} {tensor.dtype}")
        cleared = await client.delete(announced)
        self.shards.that(
            cleared == len(announced) or bool(self.world.failures), f"cleared {cleared} of {len(announced)}"
        )
        await self._expect_gone(announced[0])
        self.learned.tensors += len(tensors)
        self.learned.bytes += sum(tensor.nbytes for tensor in tensors)
        exported.fill(dict(zip(announced, tensors, strict=True)))
        return exported

    async def _expect_gone(self, reference: Reference) -> None:
        try:
            await self.world.client.get(reference)
        except ShardsNotFound:
            self.shards.that(True, "")
        else:
            self.shards.that(False, "a cleared shard is still there")

    def _learn(self, found: list[Row], groups: int = 0, trajectories: int = 1) -> None:
        self.learned.groups += groups
        self.learned.trajectories += trajectories
        self.learned.tokens += sum(len(row.output) for row in found)


def session_of(name: str) -> str | None:
    """The session whose dump has this file name; None if it is no dump's (one still being written, say)."""
    match = None if name.startswith(".") else _DUMP_NAME.fullmatch(name)
    return None if match is None else unquote(match["session"])


class _Dumped(msgspec.Struct):
    """One interaction of a dump."""

    interaction_id: str
    tensor_dict: dict[str, msgspec.Raw]


_dump_decoder = msgspec.json.Decoder(dict[str, _Dumped])


class Dumps:
    """The dump folder, read as AReaL would read it. Each file is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int] = {}
        """Name: size in bytes, of every file read."""
        self.check = Check("dump files are whole, private and readable as tensors")

    def read_new(self, world: World) -> None:
        """Tell the ledger what new files hold."""
        for path in sorted(self.folder.iterdir()):
            session_id = session_of(path.name)
            if path.name in self.files or session_id is None:
                continue
            self.files[path.name] = path.stat().st_size
            mode = path.stat().st_mode & 0o777
            self.check.that(mode == 0o600, f"{path.name} has mode {mode:o}")
            try:
                found = self._rows(path)
            except (BadTensor, ClientError, msgspec.DecodeError, ValueError) as error:
                self.check.that(False, f"{path.name}: {error!r}")
                continue
            world.ledger.found([session_id], found, "dump", 1.0)

    @staticmethod
    def _rows(path: Path) -> list[Row]:
        found: list[Row] = []
        for name, entry in _dump_decoder.decode(path.read_bytes()).items():
            if entry.interaction_id != name:
                raise ValueError(f"{entry.interaction_id} stands under {name}")
            tensors = {key: decode_json(key, path.name, raw).tensor for key, raw in entry.tensor_dict.items()}
            found += rows(tensors, name)
        return found

    def expect_no_leftovers(self) -> None:
        """At the end there is nothing in the folder but dumps."""
        strangers = [path.name for path in self.folder.iterdir() if path.name not in self.files]
        self.check.that(not strangers, f"also in the folder: {', '.join(strangers[:5])}")
