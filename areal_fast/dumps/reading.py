"""From a file to interactions: what can be said about a dump, and what is wrong with it.

A dump is `{interaction id: {tensor_dict | messages + output_message_list, reward, interaction_id}}` with
every tensor inline (store/dump.py writes it; the wire page, "Dumps"). `load` gives a Dump or raises
Unreadable; a Dump's entries are then plain JSON values, whatever they may be. `problems` says what a correct
writer could not have written. `tensor` makes one numpy array, or raises Damaged.

Bounds: one file is in memory at a time, at most `max_bytes` of it; only regular files are opened; decoding
makes nothing larger than the file. Duplicate members of an object are noticed (`Members.twice`): JSON allows
them, and a reader that takes the last one would hide the others.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from areal_fast.protocol.export import DTYPES, NAMES

Array = npt.NDArray[Any]

DEFAULT_MAX_BYTES: Final = 4 << 30
NAME: Final = re.compile(
    r"(?P<session>.+)-(?:trajectory-(?P<number>\d{1,18})|active)\.json(?:\.(?P<n>\d{1,9}))?", re.S
)
TEMPORARY: Final = re.compile(r"\.[0-9a-f]+-\d+\.tmp")
_ENCODED: Final = re.compile(r"(?:%[0-9A-F]{2})+")
ACTIVE: Final = -1

NUMPY: Final = {
    "bool": "?",
    "uint8": "u1",
    "int8": "i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
}
"""dtypes that numpy has and a dump can hold."""


class Unreadable(Exception):
    """The whole file is none. str() is the reason, in one line."""


class Damaged(Exception):
    """One value in it is none. str() is the reason, in one line."""


class Members(dict[str, Any]):
    """A JSON object. `twice`: names that came more than once (the last one counts)."""

    twice: tuple[str, ...] = ()


class Named(NamedTuple):
    """What a file's name says. trajectory: ACTIVE for what was not ready."""

    session_id: str
    trajectory: int
    n: int


class Dump(msgspec.Struct):
    """A file that is a JSON object. size in bytes, mtime in Unix seconds."""

    path: str
    named: Named | None
    size: int
    mtime: float
    members: Members


class Facts(NamedTuple):
    """What a list shows of a dump. tokens: prompt and output of every interaction; output: of those,
    generated; reward: of the first interaction, so everything that followed is in it."""

    interactions: int
    tokens: int
    output: int
    reward: float | None


def name_of(path: str) -> Named | None:
    """What the name says, or None if it is no dump's. The session id is as good as the name tells it: a
    percent sign of its own cannot be told from an encoded byte, and a long one is shortened."""
    found = NAME.fullmatch(os.path.basename(path))
    if found is None:
        return None
    session = _ENCODED.sub(_decoded, found["session"])
    number = ACTIVE if found["number"] is None else int(found["number"])
    return Named(session, number, int(found["n"] or 0))


def _decoded(found: re.Match[str]) -> str:
    raw = bytes.fromhex(found[0].replace("%", ""))
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return found[0]


def load(path: str, max_bytes: int = DEFAULT_MAX_BYTES) -> Dump:
    """The file's content. Unreadable says why not."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("not a regular file")
            if status.st_size > max_bytes:
                raise Unreadable(f"{status.st_size} bytes are more than --max-file-bytes {max_bytes}")
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise Unreadable(f"it grew beyond --max-file-bytes {max_bytes} while being read")
        members = _parse(data)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    except MemoryError:
        raise Unreadable("not enough memory to read it") from None
    return Dump(path, name_of(path), status.st_size, status.st_mtime, members)


def _parse(data: bytes) -> Members:
    if not data:
        raise Unreadable("empty file")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_members)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8: byte {error.start} of {len(data)}") from None
    except json.JSONDecodeError as error:
        whole = "truncated or no JSON" if error.pos >= len(error.doc) - 1 else "no JSON"
        raise Unreadable(f"{whole}: {error.msg} at character {error.pos} of {len(error.doc)}") from None
    except RecursionError:
        raise Unreadable("no JSON of ours: nested too deeply") from None
    except ValueError as error:
        raise Unreadable(f"no JSON of ours: {str(error).splitlines()[0]}") from None
    if not isinstance(value, Members):
        raise Unreadable(f"a JSON object is expected, not {kind(value)}")
    return value


def _members(pairs: list[tuple[str, Any]]) -> Members:
    made = Members(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        made.twice = tuple(dict.fromkeys(k for k, _ in pairs if k in seen or seen.add(k)))  # type: ignore[func-returns-value]
    return made


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", Members: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def tensor(value: Any) -> Array:
    """A wire tensor as a numpy array (read-only, little-endian). Damaged."""
    if not isinstance(value, Mapping) or value.get("type") != "tensor":
        raise Damaged("no tensor: {type, data, shape, dtype} with type 'tensor' is expected")
    dtype, shape, data = value.get("dtype"), value.get("shape"), value.get("data")
    code = NUMPY.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else None
    if code is None:
        raise Damaged(f"dtype {plain(json.dumps(dtype), 40)} is none that a dump can hold")
    if (
        not isinstance(shape, list)
        or len(shape) > 8
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
    ):
        raise Damaged(f"shape {plain(json.dumps(shape), 40)} is no list of sizes")
    if not isinstance(data, str):
        raise Damaged(f"data is {kind(data)}, not base64 text")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Damaged("data is no valid base64") from None
    expected = math.prod(shape) * np.dtype(code).itemsize
    if len(raw) != expected:
        raise Damaged(f"{len(raw)} bytes of data, but shape {shape} of {dtype} needs {expected}")
    if code == "?" and raw.strip(b"\0\1"):
        raise Damaged("a bool that is neither 0 nor 1")
    return np.frombuffer(raw, code).reshape(shape)


def tensors_of(entry: Any) -> dict[str, Any] | None:
    """The raw tensors of an interaction; None if it is string-only, or no interaction at all."""
    found = entry.get("tensor_dict") if isinstance(entry, dict) else None
    return found if isinstance(found, dict) else None


def reward_of(entry: Any) -> float | None:
    """An interaction's reward, if it has one that is a number."""
    reward = entry.get("reward") if isinstance(entry, dict) else None
    if isinstance(reward, bool) or not isinstance(reward, (int, float)):
        return None
    try:
        return float(reward)
    except OverflowError:
        return math.inf


def facts(dump: Dump) -> Facts:
    """What a list shows. Damaged, if that cannot be made out."""
    tokens = output = 0
    for interaction_id, entry in dump.members.items():
        tensors = tensors_of(entry)
        if tensors is None:
            continue
        try:
            mask = tensor(tensors.get("loss_mask"))
        except Damaged as error:
            raise Damaged(f"interaction {plain(interaction_id, 48)}: loss_mask: {error}") from None
        tokens += mask.size
        output += int(np.count_nonzero(mask))
    first = next(iter(dump.members.values()), None)
    return Facts(len(dump.members), tokens, output, reward_of(first))


def problems(dump: Dump) -> Iterator[str]:
    """What is wrong with a dump; nothing if it is as it was written."""
    if not dump.members:
        yield "no interactions: such a file is never written"
    for interaction_id in dump.members.twice:
        yield f"interaction {plain(interaction_id, 48)} is there more than once"
    for interaction_id, entry in dump.members.items():
        for what in _entry_problems(interaction_id, entry):
            yield f"interaction {plain(interaction_id, 48)}: {what}"


def _entry_problems(interaction_id: str, entry: Any) -> Iterator[str]:
    if not isinstance(entry, Members):
        yield f"an object is expected, not {kind(entry)}"
        return
    for name in entry.twice:
        yield f"member {plain(name, 40)} is there more than once"
    if entry.get("interaction_id") != interaction_id:
        yield "its interaction_id differs from its name"
    reward = reward_of(entry)
    if entry.get("reward") is not None and reward is None:
        yield f"reward is {kind(entry['reward'])}"
    elif reward is not None and not math.isfinite(reward):
        yield "reward is not finite"
    if "tensor_dict" in entry:
        yield from _tensor_problems(entry["tensor_dict"], reward)
    else:
        for name in ("messages", "output_message_list"):
            value = entry.get(name)
            if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
                yield f"neither a tensor_dict nor a list of messages in {name}"


def _tensor_problems(tensors: Any, reward: float | None) -> Iterator[str]:
    if not isinstance(tensors, Members):
        yield f"tensor_dict is {kind(tensors)}"
        return
    for name in tensors.twice:
        yield f"tensor {plain(name, 40)} is there more than once"
    arrays: dict[str, Array] = {}
    for name in dict.fromkeys((*NAMES, *tensors)):
        if name not in tensors:
            yield f"{name} is missing"
            continue
        try:
            arrays[name] = array = tensor(tensors[name])
        except Damaged as error:
            yield f"{plain(name, 40)}: {error}"
            continue
        if name in DTYPES and array.dtype != np.dtype(NUMPY[DTYPES[name]]):
            yield f"{name}: dtype {array.dtype}, but {DTYPES[name]} is expected"
            del arrays[name]
    yield from _shape_problems(arrays)
    yield from _value_problems(arrays, reward)


def _shape_problems(arrays: dict[str, Array]) -> Iterator[str]:
    lengths = {}
    for name, array in list(arrays.items()):
        if name in ("rewards", "original_rewards"):
            if array.shape != (1,):
                yield f"{plain(name, 40)}: shape {list(array.shape)}, but [1] is expected"
                del arrays[name]
        elif array.ndim != 2 or array.shape[0] != 1:
            yield f"{plain(name, 40)}: shape {list(array.shape)}, but [1, tokens] is expected"
            del arrays[name]
        else:
            lengths[name] = array.shape[1]
    if len(set(lengths.values())) > 1:
        yield "lengths differ: " + ", ".join(f"{plain(name, 40)} {n}" for name, n in lengths.items())
        for name in lengths:
            del arrays[name]


def _value_problems(arrays: dict[str, Array], reward: float | None) -> Iterator[str]:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            yield f"{plain(name, 40)}: not finite everywhere"
    ids, mask = arrays.get("input_ids"), arrays.get("loss_mask")
    if ids is not None and (ids < 0).any():
        yield "input_ids: negative ids"
    if "attention_mask" in arrays and not arrays["attention_mask"].all():
        yield "attention_mask: something is masked out, but a dump has no padding"
    rewards = arrays.get("rewards")
    with np.errstate(over="ignore"):
        same = rewards is None or reward is None or rewards[0] == np.float32(reward)
    if not same and reward is not None and math.isfinite(reward):
        yield "rewards: not the interaction's reward"
    if mask is None:
        return
    if not np.isin(mask, (0, 1)).all():
        yield "loss_mask: neither 0 nor 1"
        return
    prompt = mask == 0
    if "versions" in arrays and (arrays["versions"][prompt] != -1).any():
        yield "versions: not -1 for every prompt token"
    if "logprobs" in arrays and (arrays["logprobs"][prompt] != 0).any():
        yield "logprobs: not 0 for every prompt token"


def plain(text: str, width: int = 0) -> str:
    """`text` safe for a terminal and for one line of output, cut to `width` characters (0: whole)."""
    if width and len(text) > width:
        text = text[: width - 1] + "…"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
