"""The records of a session's log: their types, and how each is packed.

A record is `meta` (small, read with the log) and `data` (bulk, read when tensors are wanted). Records are
immutable; a session's state is the fold of its log (sessions.py). Numbers are little-endian.

  type          meta                                                   data
  CHECKPOINT    msgpack Checkpoint                                     -
  INTERACTION   header ‖ runs ‖ id ‖ stop ‖ hashes ‖ routed ‖ extra   new ids int32 ‖ log-probs float32
                (packed, and read, by _fold.pyx: `Head` is the header)
  REWARD        trajectory, ordinal, value, deadline, courier          -
  READY         trajectory, courier                                    -
  EXPORTING     msgpack Exporting (aux: txn word, flag REMOVE)         -
  DUMP_NAMES    msgpack DumpNames                                      -
  STRING        ordinal, trajectory, id                                messages JSON ‖ response text
  CALLBACK      trajectory, courier                                    -
  SENT          trajectory, ordinal, what became of the reply          -
  MEMBER        place in the group                                     -

An INTERACTION stores what is not derivable, once: `shared` of its prompt ids are the first ones of an earlier
interaction of the same trajectory (`ref`, an ordinal); only the rest and the output are in its data. Masks
and lengths follow from prompt and output length; the prompt's log-probs are zero and its versions −1.
Interactions of other trajectories are never referenced, so a trajectory's memory goes with its export.

`courier` says which process tells the callback server that the trajectory is ready: `courier_word` of its
number and incarnation, so that anybody can see whether it still lives; UNCLAIMED if it is nobody yet,
NO_COURIER if there is nothing to tell, or nothing any more. A CALLBACK record changes it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec

CHECKPOINT = 1
INTERACTION = 2
REWARD = 3
READY = 4
EXPORTING = 5
DUMP_NAMES = 6
STRING = 7
CALLBACK = 8
SENT = 10
MEMBER = 9

NO_REF = 0xFFFFFFFF
UNCLAIMED = 0
NO_COURIER = (1 << 64) - 1

_REWARD = struct.Struct("<IIdQQ")
_READY = struct.Struct("<IQ")
_SENT = struct.Struct("<IIB")
_MEMBER = struct.Struct("<I")
_STRING = struct.Struct("<IIIH")


class Routed(NamedTuple):
    """Routed experts of an interaction: int32 [prompt + output tokens, width] in the shard of this name."""

    name: bytes
    width: int


class InteractionMeta(NamedTuple):
    """What an INTERACTION record says about itself. Token counts; `version_runs` cover the output."""

    ordinal: int
    trajectory: int
    ref: int
    shared: int
    prompt_len: int
    output_len: int
    interaction_id: str
    stop_reason: str
    version_runs: tuple[tuple[int, int], ...]
    messages_hash: bytes
    body_hash: bytes
    extra: bytes
    parent: int = NO_REF
    """Ordinal of the interaction that this one goes on from (template concat). Of the same trajectory."""
    routed: Routed | None = None

    @property
    def new_ids(self) -> int:
        return self.prompt_len - self.shared + self.output_len


def courier_word(proc: int, incarnation: int) -> int:
    """A process in one life of its, as a number that is neither UNCLAIMED nor NO_COURIER."""
    return (proc + 1) << 56 | (incarnation & ((1 << 56) - 1))


def courier_process(courier: int) -> tuple[int, int]:
    """Inverse of courier_word: (process number, incarnation)."""
    return (courier >> 56) - 1, courier & ((1 << 56) - 1)


def pack_reward(
    trajectory: int, ordinal: int, value: float, deadline_ns: int, courier: int = NO_COURIER
) -> bytes:
    """deadline_ns 0: reward and ready in one record; else the trajectory becomes ready then (monotonic
    ns)."""
    return _REWARD.pack(trajectory, ordinal, value, deadline_ns, courier)


def pack_ready(trajectory: int, courier: int = NO_COURIER) -> bytes:
    return _READY.pack(trajectory, courier)


def unpack_ready(meta: bytes) -> tuple[int, int]:
    trajectory, courier = _READY.unpack(meta)
    return trajectory, courier


pack_callback, unpack_callback = pack_ready, unpack_ready
"""(trajectory, courier) from here on; NO_COURIER: delivered."""


def pack_member(place: int) -> bytes:
    """Meta of a MEMBER record: which of its group the session is, from 0."""
    return _MEMBER.pack(place)


def unpack_member(meta: bytes) -> int:
    place: int = _MEMBER.unpack(meta)[0]
    return place


def pack_words(messages_json: bytes, text: str) -> bytes:
    """An INTERACTION's `extra`: the chat as text, for exports beside string interactions."""
    return _encoder.encode((messages_json, text))


def unpack_words(extra: bytes) -> tuple[bytes, str]:
    """(messages JSON, answer); an empty list and nothing if the text was not kept."""
    return _words.decode(extra) if extra else (b"[]", "")


def pack_sent(trajectory: int, ordinal: int, fate: int) -> bytes:
    """`fate`: retries.LOST or ARRIVED."""
    return _SENT.pack(trajectory, ordinal, fate)


def pack_string(ordinal: int, trajectory: int, interaction_id: str, messages_size: int) -> bytes:
    """Meta of a STRING record; `messages_size` bytes of its data are the messages, the rest the response."""
    iid = interaction_id.encode()
    return _STRING.pack(ordinal, trajectory, messages_size, len(iid)) + iid


class Exporting(msgspec.Struct, array_like=True):
    """trajectory −1: nothing is exported, the record only says that the session goes (flag REMOVE).
    `request_hash`, `at_ns`: who asked, and when; should the reply not arrive, an identical request within
    REPLAY_NS means this trajectory, whatever has become ready since."""

    trajectory: int
    request_hash: bytes = b""
    at_ns: int = 0


class DumpNames(msgspec.Struct, array_like=True):
    """Chosen before any file is renamed. `names`: (trajectory or −1 for active, file name). `token` makes the
    temporary names of this session's tries its own."""

    token: str
    names: list[tuple[int, str]]


class Checkpoint(msgspec.Struct, array_like=True):
    """Everything a fold knows that the kept records do not say.

    active: index of the active trajectory · ready: (index, ordinal of the interaction the reward fell on) ·
    rewards: (ordinal, value) of kept interactions · pending: (ordinal, deadline ns) of a reward not yet
    final · couriers: (index, courier) of ready trajectories that have one · member: its place in the group
    or −1.
    """

    active: int
    ready: list[tuple[int, int]]
    rewards: list[tuple[int, float]]
    pending: tuple[int, int] | None = None
    couriers: list[tuple[int, int]] = []
    member: int = -1
    fates: list[tuple[int, int]] = []
    """(ordinal, fate) of kept interactions whose reply has one."""
    lost: list[tuple[bytes, int, int]] = []
    """(request hash, index, time ns) of ready trajectories whose export did not arrive."""


_exporting = msgspec.msgpack.Decoder(Exporting)
_dump_names = msgspec.msgpack.Decoder(DumpNames)
_checkpoint = msgspec.msgpack.Decoder(Checkpoint)
_words = msgspec.msgpack.Decoder(tuple[bytes, str])
_encoder = msgspec.msgpack.Encoder()


def pack(m: msgspec.Struct) -> bytes:
    return _encoder.encode(m)


def unpack_exporting(meta: bytes) -> Exporting:
    return _exporting.decode(meta)


def unpack_dump_names(meta: bytes) -> DumpNames:
    return _dump_names.decode(meta)


def unpack_checkpoint(meta: bytes) -> Checkpoint:
    return _checkpoint.decode(meta)
