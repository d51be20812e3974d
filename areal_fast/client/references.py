"""What names a shard, and what an export hands out: references, interactions, trajectories.

A reference is what AReaL calls an RTensor: a shard's id, the node that keeps it, and the shape and dtype of
its tensor. On the wire it is `{"type":"dataclass","class_path":"….RTensor","data":{…}}`; the class path is
compared as text and never becomes a class. Source: the wire page, "Export".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from areal_fast.client.errors import BadReply
from areal_fast.protocol.wire import TORCH_ITEMSIZE

if TYPE_CHECKING:
    import torch

_RTENSOR = ".rtensor.RTensor"


@dataclass(frozen=True, slots=True)
class Reference:
    """A shard somewhere. node: HOST:PORT, or "" for the proxy that is asked. dtype: "float32", shape; both
    None where nobody said (a plain id). way: how a put went; why: what kept cheaper ways from serving."""

    shard_id: str
    node: str = ""
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    way: str = field(default="", compare=False)
    why: str = field(default="", compare=False)

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the tensor; None if unknown."""
        if self.shape is None or self.dtype not in TORCH_ITEMSIZE:
            return None
        return prod(self.shape) * TORCH_ITEMSIZE[self.dtype]


def reference(wire: Any) -> Reference:
    """The reference in an RTensor's JSON. BadReply."""
    try:
        if wire["type"] != "dataclass" or not wire["class_path"].endswith(_RTENSOR):
            raise KeyError("class_path")
        shard, meta = wire["data"]["shard"]["data"], wire["data"]["data"]
        shard_id, node, dtype, shape = shard["shard_id"], shard["node_addr"], meta["dtype"], meta["shape"]
        if not (isinstance(shard_id, str) and isinstance(node, str) and dtype.startswith("torch.")):
            raise KeyError("shard_id")
        return Reference(shard_id, node, dtype.removeprefix("torch."), tuple(map(int, shape)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadReply(f"not a reference to a tensor ({error!r}): {str(wire)[:200]}") from None


@dataclass(slots=True)
class Interaction:
    """One request and its answer. Recorded with token ids: `references`, and once fetched `tensors`, each
    [1, T] (rewards [1]). From an external model: `messages` and `output`, no tensors."""

    id: str
    """"" in AReaL 1.0's list of string-only interactions, which has none."""
    reward: float | None
    """Discounted, as exported."""
    references: dict[str, Reference] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    messages: list[Any] = field(default_factory=list)
    output: Any = None


@dataclass(slots=True)
class Trajectory:
    """What an export gave: a `batch`, or `interactions`; neither if there was nothing to give."""

    session_ids: list[str]
    batch: dict[str, torch.Tensor] = field(default_factory=dict)
    """AReaL 1.0's form: one right-padded batch over all interactions, [B, T] a name, rewards [B]."""
    references: dict[str, Reference] = field(default_factory=dict)
    """Of the batch."""
    interactions: dict[str, Interaction] = field(default_factory=dict)
    """By id, in the order in which their requests started; "0", "1"… where they have no ids."""
    ways: dict[str, int] = field(default_factory=dict)
    """How many of its tensors came which way."""

    def __bool__(self) -> bool:
        return bool(self.references or self.interactions)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor of the batch."""
        return self.batch[name]

    def all_references(self) -> list[Reference]:
        """Every reference, the batch's first, then interaction by interaction."""
        found = list(self.references.values())
        for interaction in self.interactions.values():
            found += interaction.references.values()
        return found

    def fill(self, tensors: Mapping[Reference, torch.Tensor]) -> None:
        """Put fetched tensors where their references stand."""
        self.batch = {name: tensors[one] for name, one in self.references.items()}
        for interaction in self.interactions.values():
            interaction.tensors = {name: tensors[one] for name, one in interaction.references.items()}


def trajectory(reply: Any, session_ids: list[str]) -> Trajectory:
    """The trajectory in an export's reply, whichever of the two forms it has. BadReply."""
    found = Trajectory(session_ids)
    try:
        if "traj" in reply:
            batch = reply["traj"]
            if "interactions" in batch:
                for number, entry in enumerate(batch["interactions"]):
                    found.interactions[str(number)] = Interaction(
                        "", entry["reward"], messages=entry["request"], output=entry["response"]
                    )
            else:
                found.references = {name: reference(one) for name, one in batch.items()}
            return found
        for name, entry in reply["interactions"].items():
            found.interactions[name] = Interaction(
                entry["interaction_id"],
                entry["reward"],
                {key: reference(one) for key, one in entry.get("tensor_dict", {}).items()},
                messages=entry.get("messages", []),
                output=entry.get("output_message_list"),
            )
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise BadReply(f"not an export ({error!r}): {str(reply)[:200]}") from None
