"""What an export contains: rewards discounted once, token rows, and the tensors made from them.

A Row is one interaction as its record keeps it (prompt and output length, reference, version runs, reward);
its data are the new ids and the output's log-probs. `Rows` puts rows and data together and makes the wire's
tensors, one at a time, when somebody wants them:

  input_ids int64 [1, T] · loss_mask int64 [1, T], 1 for output · logprobs float32 [1, T], 0 for prompt ·
  versions int64 [1, T], −1 for prompt · attention_mask bool [1, T] · rewards float32 [1]

as one batch over all rows: [B, T] right-padded with 0 (attention_mask False), rewards [B], as the original's
concat_padded_tensors does. Dialect v2 adds

  turn_ids int32 [1, T], −1 but for output: the turn's number in its row · original_rewards float32 [1], the
  rewards before discounting

Style `concat`: only the leaves of the message-prefix tree become rows. What a leaf's ancestors generated is
output within its prompt (`Row.spans`): it inherits their log-probs, mask and versions. A child not longer
than its parent ignores the parent. Source: areal.experimental.openai.types, to_tensor_dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from areal_fast.protocol import records as rec
from areal_fast.protocol.wire import FloatArray, IntArray

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

NAMES = ("input_ids", "loss_mask", "logprobs", "versions", "attention_mask", "rewards")
NAMES_V2 = (*NAMES, "turn_ids", "original_rewards")
ROUTED = "routed_experts"
"""int32 [1, T, width], only where the engine was asked for them; the last token's row is zeros."""
PER_ROW = ("rewards", "original_rewards")
DTYPES = {
    "input_ids": "int64",
    "loss_mask": "int64",
    "logprobs": "float32",
    "versions": "int64",
    "attention_mask": "bool",
    "rewards": "float32",
    "turn_ids": "int32",
    "original_rewards": "float32",
}
ITEMSIZE = {"int64": 8, "int32": 4, "float32": 4, "bool": 1}


def discounted(rewards: Sequence[float | None], discount: float) -> list[float]:
    """r[i] = (r[i] or 0) + discount · r[i+1], from the last backwards, once."""
    out: list[float] = [0.0] * len(rewards)
    following = 0.0
    for i in range(len(rewards) - 1, -1, -1):
        following = following * discount + (rewards[i] or 0.0)
        out[i] = following
    return out


class Row(msgspec.Struct, array_like=True):
    """One interaction. `ref`: index of an earlier row whose first `shared` ids are this one's, or −1.

    spans: (position, length) of inherited outputs within the prompt, in order; the row's log-probs and
    version runs begin with theirs. original: the reward before discounting."""

    prompt_len: int
    output_len: int
    ref: int
    shared: int
    runs: list[tuple[int, int]]
    reward: float
    original: float = 0.0
    spans: list[tuple[int, int]] = []

    @property
    def length(self) -> int:
        return self.prompt_len + self.output_len

    @property
    def outputs(self) -> list[tuple[int, int]]:
        """(position, length) of everything that was generated."""
        return [*self.spans, (self.prompt_len, self.output_len)]

    @property
    def new_ids(self) -> int:
        return self.prompt_len - self.shared + self.output_len

    @property
    def scored(self) -> int:
        """How many log-probs it has."""
        return self.output_len + sum(n for _, n in self.spans)

    @property
    def data_size(self) -> int:
        return 4 * (self.new_ids + self.scored)


def row_of(m: rec.InteractionMeta, ref: int, reward: float, original: float = 0.0) -> Row:
    shared = m.shared if ref >= 0 else 0
    return Row(m.prompt_len, m.output_len, ref, shared, list(m.version_runs), reward, original)


def lineage(members: Mapping[int, rec.InteractionMeta], ordinal: int) -> list[int]:
    """The interaction's ancestors that it inherits from, oldest first. It does so if it is longer than its
    parent, and then from all that its parent inherits from."""
    found: list[int] = []
    while True:
        child = members[ordinal]
        parent = members.get(child.parent) if child.parent != rec.NO_REF else None
        if parent is None or child.prompt_len <= parent.prompt_len + parent.output_len:
            return found[::-1]
        ordinal = child.parent
        found.append(ordinal)


def leaves(members: Mapping[int, rec.InteractionMeta]) -> list[int]:
    """The ordinals that are nobody's parent, in order."""
    parents = {m.parent for m in members.values()}
    return [ordinal for ordinal in sorted(members) if ordinal not in parents]


def split_data(data: Buffer, new_ids: int, scored: int) -> tuple[IntArray, FloatArray]:
    """(new ids, log-probs) of one row's data, without a copy."""
    ids: IntArray = np.frombuffer(memoryview(data), "<i4", new_ids)
    logprobs: FloatArray = np.frombuffer(memoryview(data), "<f4", scored, 4 * new_ids)
    return ids, logprobs


_NUMPY = {"int64": "<i8", "int32": "<i4", "float32": "<f4", "bool": "?"}
_KINDS = {name: _NUMPY[dtype] for name, dtype in DTYPES.items()}
_NO_IDS: IntArray = np.empty(0, np.int32)
_NO_LOGPROBS: FloatArray = np.empty(0, np.float32)


def row_array(row: Row, ids: IntArray, logprobs: FloatArray, name: str) -> npt.NDArray[Any]:
    """Tensor `name` of one row, [T] (rewards [1]), from its full ids [T] and its log-probs [scored]."""
    if name == "rewards":
        return as_float32([row.reward])
    if name == "original_rewards":
        return as_float32([row.original])
    out: npt.NDArray[Any] = np.zeros(row.length, _KINDS[name])
    fill_row(out, row, ids, logprobs, name)
    return out


def fill_row(out: npt.NDArray[Any], row: Row, ids: IntArray, logprobs: FloatArray, name: str) -> None:
    """The same into `out`, [T] zeros of the tensor's dtype. KeyError for what has no place by token."""
    if name == "input_ids":
        out[:] = ids
    elif name == "attention_mask":
        out.fill(True)
    elif name == "logprobs":
        taken = 0
        for at, n in row.outputs:
            out[at : at + n] = logprobs[taken : taken + n]
            taken += n
    elif name == "loss_mask":
        for at, n in row.outputs:
            out[at : at + n] = 1
    elif name == "turn_ids":
        out.fill(-1)
        for turn, (at, n) in enumerate(row.outputs):
            out[at : at + n] = turn
    elif name == "versions":
        out.fill(-1)
        if len(row.runs) == 1:
            for at, n in row.outputs:
                out[at : at + n] = row.runs[0][0]
            return
        given = np.repeat(
            np.array([version for version, _ in row.runs], "<i8"), [count for _, count in row.runs]
        )
        taken = 0
        for at, n in row.outputs:
            out[at : at + n] = given[taken : taken + n]
            taken += n
    else:
        raise KeyError(name)


class Rows:
    """Rows over their data: `data` is the concatenation of the rows' record data, in order."""

    def __init__(self, rows: Sequence[Row], data: Buffer) -> None:
        self.rows = rows
        self._data = memoryview(data)
        self._at: list[int] = []
        at = 0
        for row in rows:
            self._at.append(at)
            at += row.data_size
        self._ids: dict[int, IntArray] = {}

    def _parts(self, i: int) -> tuple[IntArray, FloatArray]:
        row = self.rows[i]
        at = self._at[i]
        return split_data(self._data[at : at + row.data_size], row.new_ids, row.scored)

    def ids(self, i: int) -> IntArray:
        """Full ids [T] int32 of row i; remembered, since later rows refer to them."""
        found = self._ids.get(i)
        if found is not None:
            return found
        chain = [i]
        while (ref := self.rows[chain[-1]].ref) >= 0 and ref not in self._ids:
            chain.append(ref)
        for j in reversed(chain):
            row = self.rows[j]
            new, _ = self._parts(j)
            self._ids[j] = np.concatenate((self._ids[row.ref][: row.shared], new)) if row.ref >= 0 else new
        return self._ids[i]

    def array(self, i: int, name: str) -> npt.NDArray[Any]:
        """Tensor `name` of row i: [T], for rewards [1]."""
        return row_array(self.rows[i], *self._sources(i, name), name)

    def _sources(self, i: int, name: str) -> tuple[IntArray, FloatArray]:
        """The ids and log-probs that tensor `name` of row i is made of; neither if it needs none."""
        ids = self.ids(i) if name == "input_ids" else _NO_IDS
        return ids, self._parts(i)[1] if name == "logprobs" else _NO_LOGPROBS

    def batch(self, name: str) -> npt.NDArray[Any]:
        """Tensor `name` over all rows: [B, T] right-padded with 0, for rewards [B]."""
        if name in PER_ROW:
            return as_float32([row.reward if name == "rewards" else row.original for row in self.rows])
        width = max((row.length for row in self.rows), default=0)
        out: npt.NDArray[Any] = np.zeros((len(self.rows), width), _KINDS[name])
        for i, row in enumerate(self.rows):
            fill_row(out[i, : row.length], row, *self._sources(i, name), name)
        return out


def as_float32(values: Sequence[float]) -> npt.NDArray[Any]:
    """Rewards as they are trained on; beyond float32 they are infinite, as in the original."""
    with np.errstate(over="ignore"):
        return np.array(values, "<f8").astype("<f4")
