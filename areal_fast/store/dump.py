"""Dump files: how a session's interactions become JSON, and how a file becomes durable under its name.

Layout: that of an export's `interactions` with every tensor inline, spaced as the original's writer spaces
it, so that its deserialize_interactions reads the file. It is made piece by piece: one interaction's tensors
are in memory at a time, and at most the ids of two earlier ones.

A file is written under a temporary name that is this session's own (O_EXCL, mode 0600), synced, and only then
given its name, by a rename that refuses to replace anything. `DumpDir` holds the directory by descriptor, so
no id can name a place outside it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from areal_fast.core import base64_encode
from areal_fast.protocol.export import DTYPES, NAMES, Row, discounted, row_array
from areal_fast.protocol.sessions import Interaction, SessionState
from areal_fast.protocol.wire import FloatArray, IntArray
from areal_fast.shards.outgoing import STEP_BYTES
from areal_fast.shards.routed import view_of
from areal_fast.store.exporting import number_json
from areal_fast.store.folds import FoldCache

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WRITE_BYTES = 1 << 20
FILE_MODE = 0o600
RENAME_NOREPLACE = 1
Step = Callable[[str], None]


class Part(NamedTuple):
    """One file's worth of a session: trajectory −1 is what is active, with what came late before it."""

    trajectory: int
    groups: list[list[Interaction]]


def parts_of(state: SessionState) -> list[Part]:
    """The files a session needs; none if it keeps nothing. Rewards are discounted within each group."""
    ready = state.ready
    parts = [Part(index, [ready[index].in_order()]) for index in sorted(ready)]
    rest: dict[int, list[Interaction]] = {}
    for _, interaction in sorted(state.late.items()):
        rest.setdefault(interaction.trajectory, []).append(interaction)
    groups = [rest[index] for index in sorted(rest)]
    if state.active_count:
        groups.append(state.active.in_order())
    if groups:
        parts.append(Part(-1, groups))
    return parts


def part_json(folds: FoldCache, slot: int, fold: SessionState, part: Part) -> Iterator[bytes]:
    """The file's bytes, in pieces. The same log gives the same bytes."""
    lead = b"{"
    for interactions in part.groups:
        for interaction, reward in zip(
            interactions, discounted([i.reward for i in interactions], 1.0), strict=True
        ):
            iid = json.dumps(interaction.interaction_id).encode()
            yield lead + iid + b": {"
            if interaction.meta is None:
                yield from _messages(folds.data_of(slot, fold, interaction), interaction.messages_size)
            else:
                yield from _tensors(folds, slot, fold, interaction, reward)
            yield b', "reward": ' + number_json(reward) + b', "interaction_id": ' + iid + b"}"
            lead = b", "
    yield b"}"


def _messages(data: bytes, messages_size: int) -> Iterator[bytes]:
    # Parsed and printed again for the original's spacing; such interactions are few and small.
    messages = json.dumps(json.loads(data[:messages_size]))
    response = json.dumps(data[messages_size:].decode("utf-8", "surrogatepass"))
    output = f'[{{"role": "assistant", "content": {response}}}]'
    yield f'"messages": {messages}, "output_message_list": {output}'.encode()


def _tensors(
    folds: FoldCache, slot: int, fold: SessionState, interaction: Interaction, reward: float
) -> Iterator[bytes]:
    m = interaction.meta
    assert m is not None
    ids: IntArray = folds.full_ids(slot, fold, interaction.ordinal)
    logprobs: FloatArray = np.frombuffer(
        folds.data_of(slot, fold, interaction), "<f4", m.output_len, 4 * m.new_ids
    )
    row = Row(m.prompt_len, m.output_len, -1, 0, list(m.version_runs), reward)
    lead = b'"tensor_dict": {"'
    for name in NAMES:
        array = row_array(row, ids, logprobs, name)
        sizes = b"1" if name == "rewards" else b"1, %d" % row.length
        before = b'%b%b": {"type": "tensor", "data": "' % (lead, name.encode())
        after = b'", "shape": [%b], "dtype": "torch.%b"}' % (sizes, DTYPES[name].encode())
        yield base64_encode(array.data, before, after)
        lead = b', "'
    if m.routed is not None and (view := view_of(folds.arena, m.routed, row.length)) is not None:
        with view:
            yield b', "routed_experts": {"type": "tensor", "data": "'
            for at in range(0, len(view), STEP_BYTES):
                yield base64_encode(view[at : at + STEP_BYTES])
            sizes = b"1, %d, %d" % (row.length, m.routed.width)
            yield b'", "shape": [%b], "dtype": "torch.int32"}' % sizes
    yield b"}"


def unusable(path: str) -> str:
    """Why no dump can be written to the folder now, or "". The folder is made if it is missing."""
    try:
        DumpDir(path).close()
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a NUL in it
        return str(error)
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        return "not writable"
    return ""


class DumpDir:
    """An open dump directory, made if it is missing. OSError as the system says."""

    def __init__(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    def exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            return

    def write(self, name: str, pieces: Iterable[bytes], step: Step) -> int:
        """A new file of this content, synced; its size. An older try under the name is replaced. On any
        failure nothing is left of it."""
        self.remove(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, FILE_MODE, dir_fd=self._fd)
        try:
            step("opened")
            size = 0
            for block in blocks(pieces):
                size += _write_all(fd, block)
                step("writing")
            step("written")
            os.fsync(fd)
            step("synced")
        except BaseException:
            os.close(fd)
            self.remove(name)
            raise
        os.close(fd)
        return size

    def publish(self, temporary: str, name: str) -> bool:
        """Give the written file its name; False if the name is taken. COMMIT POINT of one file."""
        if _renameat2 is not None:
            old, new = os.fsencode(temporary), os.fsencode(name)
            if _renameat2(self._fd, old, self._fd, new, RENAME_NOREPLACE) == 0:
                return True
            code = ctypes.get_errno()
            if code == errno.EEXIST:
                return False
            if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise OSError(code, os.strerror(code), name)
        try:
            os.link(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
        except FileExistsError:
            return False
        self.remove(temporary)
        return True

    def holds(self, name: str, pieces: Iterable[bytes]) -> bool:
        """Whether the file exists and has exactly this content."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError:
            return False
        with os.fdopen(fd, "rb") as file:
            for block in blocks(pieces):
                if file.read(len(block)) != block:
                    return False
            return not file.read(1)

    def sync(self) -> None:
        """Make names durable."""
        os.fsync(self._fd)


def blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces joined to blocks of about WRITE_BYTES."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= WRITE_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def _write_all(fd: int, block: ReadableBuffer) -> int:
    view = memoryview(block)
    done = 0
    while done < len(view):
        done += os.write(fd, view[done:])
    return done


def _find_renameat2() -> Any:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    call.restype = ctypes.c_int
    return call


_renameat2 = _find_renameat2()
