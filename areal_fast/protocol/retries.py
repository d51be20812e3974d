"""Is this chat a repeat of one whose reply never arrived? The identity of a request, as its record keeps it.

The gateway and the SDKs send a POST again when a connection breaks. A chat is answered from its twin's record
if both carry the same Idempotency-Key, or if the bodies are equal byte for byte (and neither key says
otherwise) and the twin's reply is known to be lost: its client was gone, or the worker that recorded it died
before it noted that the reply was going out. Equal bodies otherwise are two samples.

A record's `body_hash` is: the body's fingerprint, 16 bytes; the recording process (records.courier_word);
and, if a key was given, its fingerprint. They tell apart what nobody made to be alike (csrc/messages.h): a
client that makes two bodies with one fingerprint gets its own earlier answer, if that was lost, and harms
nobody else. A SENT record says afterwards what became of the reply.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

UNKNOWN, LOST, ARRIVED = range(3)
_PROCESS = struct.Struct("<Q")


class Asked(NamedTuple):
    """What a request is told apart by. key: b"" if none was given."""

    body: bytes
    key: bytes = b""

    def pack(self, process: int) -> bytes:
        return self.body + _PROCESS.pack(process) + self.key
