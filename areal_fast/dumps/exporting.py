"""From dumps back to what an export gives: JSON, safetensors or npz, from any number of files.

json         {"interactions": {id: {tensor_dict | messages…, reward, interaction_id}}}, the answer of
             /export_trajectories with tensors inline, so that what reads exports reads this
safetensors  tensors named `{interaction id}/{name}`; metadata "rewards" and "sources": JSON by id
npz          arrays of the same names, uncompressed

String-only interactions have no tensors and so are only in JSON. Files are read one at a time, twice where
sizes must be known first; the output is written under a temporary name and then renamed, so that there never
is half of one.

Source of the safetensors layout: huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Final, NamedTuple

import numpy as np

from areal_fast.dumps.reading import Array, Damaged, Unreadable, load, plain, reward_of, tensor, tensors_of

SAFETENSORS: Final = {
    "|b1": "BOOL",
    "|u1": "U8",
    "|i1": "I8",
    "<i2": "I16",
    "<i4": "I32",
    "<i8": "I64",
    "<f2": "F16",
    "<f4": "F32",
    "<f8": "F64",
}


class Done(NamedTuple):
    """What was written. skipped: string-only interactions that the form cannot hold."""

    interactions: int
    skipped: int
    size: int


def export(paths: Sequence[str], out: str, form: str, max_bytes: int, *, replace: bool) -> Done:
    """Write `paths` into `out`. Damaged, Unreadable, OSError (FileExistsError unless `replace`)."""
    write: Callable[[BinaryIO, Sequence[str], int], tuple[int, int]] = {
        "json": _json,
        "safetensors": _safetensors,
        "npz": _npz,
    }[form]
    if not replace and os.path.lexists(out):
        raise FileExistsError(17, "it exists; --force replaces it", out)
    temporary = f"{out}.{os.getpid()}.tmp"
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        try:
            done, skipped = write(file, paths, max_bytes)
            file.flush()
            size = os.fstat(file.fileno()).st_size
            os.replace(temporary, out)
        except BaseException:
            os.unlink(temporary)
            raise
    return Done(done, skipped, size)


def _entries(paths: Sequence[str], max_bytes: int) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(path, interaction id, entry) of all; an id that comes twice is Damaged."""
    seen: dict[str, str] = {}
    for path in paths:
        try:
            dump = load(path, max_bytes)
        except Unreadable as error:
            raise Unreadable(f"{plain(path)}: {error}") from None
        for interaction_id, entry in dump.members.items():
            where = f"{plain(path)}: interaction {plain(interaction_id, 48)}"
            if interaction_id in seen:
                raise Damaged(f"{where} is in {plain(seen[interaction_id])}, too")
            if not isinstance(entry, dict):
                raise Damaged(f"{where} is no object")
            seen[interaction_id] = path
            yield path, interaction_id, entry


def _json(file: BinaryIO, paths: Sequence[str], max_bytes: int) -> tuple[int, int]:
    done = 0
    file.write(b'{"interactions":{')
    for path, interaction_id, entry in _entries(paths, max_bytes):
        file.write((b"," if done else b"") + _text(interaction_id) + b":")
        try:
            text = json.dumps(entry, separators=(",", ":"), allow_nan=False)
        except ValueError:
            raise Damaged(
                f"{plain(path)}: interaction {plain(interaction_id, 48)}: NaN or infinite"
            ) from None
        file.write(text.encode())
        done += 1
    file.write(b"}}")
    return done, 0


def _text(value: str) -> bytes:
    return json.dumps(value).encode()


def _arrays(
    paths: Sequence[str], max_bytes: int
) -> Iterator[tuple[str, str, float | None, dict[str, Array]]]:
    """(path, interaction id, reward, tensors); no tensors for a string-only one."""
    for path, interaction_id, entry in _entries(paths, max_bytes):
        arrays = {}
        for name, value in (tensors_of(entry) or {}).items():
            try:
                arrays[name] = tensor(value)
            except Damaged as error:
                where = f"{plain(path)}: interaction {plain(interaction_id, 48)}: {plain(name, 40)}"
                raise Damaged(f"{where}: {error}") from None
        yield path, interaction_id, reward_of(entry), arrays


def _safetensors(file: BinaryIO, paths: Sequence[str], max_bytes: int) -> tuple[int, int]:
    header: dict[str, object] = {}
    rewards: dict[str, float | None] = {}
    sources: dict[str, str] = {}
    at = skipped = 0
    for path, interaction_id, reward, arrays in _arrays(paths, max_bytes):
        if not arrays:
            skipped += 1
            continue
        rewards[interaction_id], sources[interaction_id] = reward, os.path.basename(path)
        for name, array in arrays.items():
            header[f"{interaction_id}/{name}"] = {
                "dtype": SAFETENSORS[array.dtype.str],
                "shape": list(array.shape),
                "data_offsets": [at, at + array.nbytes],
            }
            at += array.nbytes
    header["__metadata__"] = {"rewards": json.dumps(rewards), "sources": json.dumps(sources)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for _, _, _, arrays in _arrays(paths, max_bytes):
        for array in arrays.values():
            written += file.write(array.tobytes())
    if written != at:
        raise Damaged("a file changed while it was read")
    return len(rewards), skipped


def _npz(file: BinaryIO, paths: Sequence[str], max_bytes: int) -> tuple[int, int]:
    done = skipped = 0
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for _, interaction_id, _, arrays in _arrays(paths, max_bytes):
            done += bool(arrays)
            skipped += not arrays
            for name, array in arrays.items():
                path = f"{interaction_id}/{name}.npy".encode(
                    "utf-8", "backslashreplace"
                ).decode()  # valid text
                with archive.open(path, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
    return done, skipped
