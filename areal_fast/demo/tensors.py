"""Tensors as exported, turned into rows: one per interaction.

A row is what a trainer would learn from: prompt and output ids, log-probs and weight versions of the
output, a reward. `rows` also checks what must hold for any batch: dtypes, equal shapes, padding on the
right, a mask that is 0 for the prompt and 1 for the output, log-probs 0 and versions -1 where the mask is
0.
Source: the wire page, "Export".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

DTYPES = {
    "input_ids": torch.int64,
    "loss_mask": torch.int64,
    "logprobs": torch.float32,
    "versions": torch.int64,
    "attention_mask": torch.bool,
    "rewards": torch.float32,
}


class BadTensor(Exception):
    """What came is not what the wire promises. The text says how."""


@dataclass(slots=True)
class Row:
    """One interaction as exported or dumped."""

    interaction_id: str | None
    """None where the export's form does not tell (AReaL 1.0's batches)."""
    prompt: list[int]
    output: list[int]
    logprobs: list[float]
    versions: list[int]
    reward: float


def rows(tensors: Mapping[str, torch.Tensor], interaction_id: str | None = None) -> list[Row]:
    """The rows of a batch of tensors [B, T] (rewards [B]). Raises BadTensor."""
    if set(tensors) != set(DTYPES):
        raise BadTensor(f"names are {sorted(tensors)}")
    wrong = {name: str(tensors[name].dtype) for name in DTYPES if tensors[name].dtype != DTYPES[name]}
    if wrong:
        raise BadTensor(f"dtypes {wrong}")
    shape = tensors["input_ids"].shape
    if len(shape) != 2 or any(tensors[name].shape != shape for name in DTYPES if name != "rewards"):
        raise BadTensor(f"shapes { ({name: tuple(tensor.shape) for name, tensor in tensors.items()}) }")
    if tensors["rewards"].shape != shape[:1]:
        raise BadTensor(f"rewards have shape {tuple(tensors['rewards'].shape)} for {shape[0]} rows")
    return [_row(tensors, i, interaction_id) for i in range(shape[0])]


def _row(tensors: Mapping[str, torch.Tensor], i: int, interaction_id: str | None) -> Row:
    length = int(tensors["attention_mask"][i].sum())
    if not bool(tensors["attention_mask"][i, :length].all()):
        raise BadTensor("padding is not on the right")
    mask = tensors["loss_mask"][i, :length]
    prompt_length = length - int(mask.sum())
    if bool(mask[:prompt_length].any()) or not bool((mask[prompt_length:] == 1).all()):
        raise BadTensor("loss_mask is not 0 for the prompt and 1 for the output")
    logprobs, versions = tensors["logprobs"][i, :length], tensors["versions"][i, :length]
    if bool(logprobs[:prompt_length].any()) or not bool((versions[:prompt_length] == -1).all()):
        raise BadTensor("log-probs or versions of the prompt are not 0 and -1")
    ids: list[int] = tensors["input_ids"][i, :length].tolist()
    return Row(
        interaction_id,
        ids[:prompt_length],
        ids[prompt_length:],
        logprobs[prompt_length:].tolist(),
        versions[prompt_length:].tolist(),
        float(tensors["rewards"][i]),
    )
