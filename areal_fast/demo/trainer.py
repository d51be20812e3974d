"""The trainer: takes finished trajectories, fetches their tensors, frees them. And the reading of dumps.

Two forms of export are used, told apart by the request: pull request 1268's (one session, an RTensor for
each tensor of each interaction) and AReaL 1.0's (the sessions of a group merged into one padded batch).
Either way the tensors stay with the proxy as shards until they are fetched and cleared.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import openai
import torch

from areal_fast.demo.agents import World
from areal_fast.demo.ledger import Check, Session
from areal_fast.demo.tensors import BadTensor, Row, rows, to_torch

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
            except (
                openai.APIError,
                BadTensor,
                KeyError,
            ) as error:  # the day goes on, the verdict will say it
                self.shards.that(False, f"{[session.id for session in sessions]}: {error!r}")

    async def _single(self, session: Session) -> None:
        """pull request 1268's form: {interactions: {id: {tensor_dict: {name: RTensor}, …}}}."""
        body = {
            "session_id": session.id,
            "discount": DISCOUNT,
            "remove_session": self.world.random.random() < 0.7,
        }
        reply = await self.world.call("/export_trajectories", body)
        found: list[Row] = []
        announced = {name: entry["tensor_dict"] for name, entry in reply["interactions"].items()}
        tensors = await self._fetch([tensor for entry in announced.values() for tensor in entry.values()])
        for name, entry in announced.items():
            found += rows(dict(zip(entry, tensors, strict=False)), name)
            del tensors[: len(entry)]
        self._learn(found)
        self.world.ledger.found([session.id], found, "export (one session)", DISCOUNT)

    async def _group(self, group_id: str, sessions: list[Session]) -> None:
        """1.0's form: {traj: {name: RTensor}}, one batch over all interactions of the group."""
        names = [session.id for session in sessions]
        body = {"session_ids": names, "group_id": group_id, "discount": DISCOUNT, "style": "individual"}
        announced = (await self.world.call("/export_trajectories", body))["traj"]
        tensors = await self._fetch(list(announced.values()))
        found = rows(dict(zip(announced, tensors, strict=True)))
        self._learn(found, groups=1, trajectories=len(sessions))
        self.world.ledger.found(names, found, "export (group)", DISCOUNT)

    async def _fetch(self, announced: list[dict[str, Any]]) -> list[torch.Tensor]:
        """The tensors behind RTensors, in order; afterwards their shards are cleared."""
        ids = [tensor["data"]["shard"]["data"]["shard_id"] for tensor in announced]
        wire = await self.world.call("/data/batch", {"shard_ids": ids})
        tensors = [to_torch(tensor) for tensor in wire]
        for tensor, one in zip(tensors, announced, strict=True):
            meta = one["data"]["data"]
            same = list(tensor.shape) == meta["shape"] and str(tensor.dtype) == meta["dtype"]
            self.shards.that(same, f"{meta} came as {tuple(tensor.shape)} {tensor.dtype}")
        cleared = (await self.world.call("/data/clear", {"shard_ids": ids}, method="DELETE"))["cleared_count"]
        self.shards.that(cleared == len(ids) or bool(self.world.failures), f"cleared {cleared} of {len(ids)}")
        await self._expect_gone(ids[0])
        self.learned.tensors += len(tensors)
        self.learned.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return tensors

    async def _expect_gone(self, shard_id: str) -> None:
        try:
            await self.world.call(f"/data/{shard_id}", None, method="GET")
        except openai.APIStatusError as error:
            status = error.status_code
        else:
            status = 200
        self.shards.that(status == 404, f"a cleared shard answers {status}")

    def _learn(self, found: list[Row], groups: int = 0, trajectories: int = 1) -> None:
        self.learned.groups += groups
        self.learned.trajectories += trajectories
        self.learned.tokens += sum(len(row.output) for row in found)


def session_of(name: str) -> str | None:
    """The session whose dump has this file name; None if it is no dump's (one still being written, say)."""
    match = None if name.startswith(".") else _DUMP_NAME.fullmatch(name)
    return None if match is None else unquote(match["session"])


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
            except (BadTensor, ValueError, KeyError, TypeError, AttributeError) as error:
                self.check.that(False, f"{path.name}: {error!r}")
                continue
            world.ledger.found([session_id], found, "dump", 1.0)

    @staticmethod
    def _rows(path: Path) -> list[Row]:
        found: list[Row] = []
        for name, entry in json.loads(path.read_bytes()).items():
            if entry["interaction_id"] != name:
                raise ValueError(f"{entry['interaction_id']} stands under {name}")
            found += rows({key: to_torch(tensor) for key, tensor in entry["tensor_dict"].items()}, name)
        return found

    def expect_no_leftovers(self) -> None:
        """At the end there is nothing in the folder but dumps."""
        strangers = [path.name for path in self.folder.iterdir() if path.name not in self.files]
        self.check.that(not strangers, f"also in the folder: {', '.join(strangers[:5])}")
