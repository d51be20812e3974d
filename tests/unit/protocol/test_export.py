"""Rows to tensors, discounting, batching: compared with doing it the plain way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_fast.protocol import export


@given(st.lists(st.none() | st.floats(-10, 10), max_size=8), st.floats(-1.5, 1.5))
def test_rewards_are_discounted_backwards_once(rewards: list[float | None], discount: float) -> None:
    want: list[float] = []
    for i in range(len(rewards)):
        total = 0.0
        for k in range(len(rewards) - 1, i - 1, -1):
            total = total * discount + (rewards[k] or 0.0)
        want.append(total)
    assert export.discounted(rewards, discount) == want


def rows_of(seqs: list[tuple[list[int], list[int]]], refs: list[tuple[int, int]]) -> export.Rows:
    rows, data = [], b""
    for (prompt, output), (ref, shared) in zip(seqs, refs, strict=True):
        rows.append(export.Row(len(prompt), len(output), ref, shared, [(3, len(output))], 0.5))
        data += np.array(prompt[shared:] + output, "<i4").tobytes()
        data += np.full(len(output), -0.25, "<f4").tobytes()
    return export.Rows(rows, data)


def test_a_row_becomes_the_six_tensors() -> None:
    rows = rows_of([([1, 2, 3], [4, 5])], [(-1, 0)])
    assert rows.array(0, "input_ids").tolist() == [1, 2, 3, 4, 5]
    assert rows.array(0, "loss_mask").tolist() == [0, 0, 0, 1, 1]
    assert rows.array(0, "logprobs").tolist() == [0, 0, 0, -0.25, -0.25]
    assert rows.array(0, "versions").tolist() == [-1, -1, -1, 3, 3]
    assert rows.array(0, "attention_mask").tolist() == [True] * 5
    assert rows.array(0, "rewards").tolist() == [0.5]
    for name in export.NAMES:
        assert str(rows.array(0, name).dtype) == export.DTYPES[name]
    with pytest.raises(KeyError):
        export.row_array(rows.rows[0], rows.ids(0), np.empty(2, "<f4"), "nonsense")


def test_references_may_point_backwards_and_forwards() -> None:
    a, b, c = ([1, 2], [3]), ([1, 2, 3, 4], [5]), ([1, 2, 9], [7])
    rows = rows_of([a, b, c], [(1, 2), (-1, 0), (0, 2)])
    for i, (prompt, output) in enumerate((a, b, c)):
        assert rows.ids(i).tolist() == prompt + output


def test_long_chains_need_no_recursion() -> None:
    n = 5000
    seqs = [([1] * 1, [2])] + [([1], [2])] * (n - 1)
    rows = rows_of(seqs, [(-1, 0)] + [(i, 1) for i in range(n - 1)])
    assert rows.ids(n - 1).tolist() == [1, 2]


def test_batch_is_right_padded() -> None:
    rows = rows_of([([1, 2], [3]), ([4], [5, 6, 7])], [(-1, 0), (-1, 0)])
    assert rows.batch("input_ids").tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert rows.batch("attention_mask").tolist() == [[True, True, True, False], [True] * 4]
    assert rows.batch("versions").tolist() == [[-1, -1, 3, 0], [-1, 3, 3, 3]]
    assert rows.batch("rewards").tolist() == [0.5, 0.5]


def test_rewards_beyond_float32_are_infinite_without_a_warning() -> None:
    assert export.as_float32([1e300, -1e300, 0.5]).tolist() == [float("inf"), float("-inf"), 0.5]
