"""Large counted bodies, read by the kernel straight into the object that is handed on.

Theory. A transport gives what it reads as new bytes objects; gathering a large body from them costs two more
copies and, worse, fresh pages for each. While a body of known length has much left, the transport's protocol
is therefore a `Fill`, a BufferedProtocol whose buffer is the body itself; when the last byte is in, the owner
is put back. The buffer is an io.BytesIO around fresh bytes that nobody else has: written through getbuffer(),
and given by getvalue() as bytes, which CPython does without a copy when no view is left. The bytes are not
zeroed first, and untouched pages are not memory yet. Measured on uvloop: 0.3 ms instead of 1.7 for 1.4 MB.

Invariants: room is at most _FIRST_STEP or _FACTOR times what has arrived, so that a length alone reserves
little. The buffer never reaches past the body, so that nothing of a following message is read into it. The
owner gets exactly one of `filled` or its own eof_received / connection_lost, unless it abandons the body.
"""

from __future__ import annotations

import asyncio
from io import BytesIO
from typing import Protocol

from areal_fast.http._native import WORTH_FILLING
from areal_fast.http._native import room as fresh_room

__all__ = ["WORTH_FILLING", "Fill", "Owner"]

_FIRST_STEP = 16 << 20
_FACTOR = 16


class Owner(Protocol):
    """The connection. Calls other than these two are passed on to it as they come."""

    def filling(self, nbytes: int) -> None:
        """A piece of `nbytes` has arrived. May `abandon`."""

    def filled(self, body: bytes) -> None:
        """The body is whole, and the owner the transport's protocol again."""

    def eof_received(self) -> bool: ...

    def connection_lost(self, error: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class Fill(asyncio.BufferedProtocol):
    """Reads the rest of one body of `size` bytes that begins with `start`, from now on."""

    def __init__(
        self, owner: Owner, transport: asyncio.Transport, start: bytes | bytearray | memoryview, size: int
    ) -> None:
        self._owner = owner
        self._transport = transport
        self._size = size
        self._have = len(start)
        self._room = 0
        self._body = BytesIO()
        self._view = self._body.getbuffer()
        self._grow(start)
        transport.set_protocol(self)

    def _grow(self, start: bytes | bytearray | memoryview) -> None:
        """Room for what the body needs, or _FACTOR times as much as there is. `start` is what has arrived."""
        room = max(_FIRST_STEP, _FACTOR * len(start))
        self._room = room = self._size if self._size <= room else room
        body = BytesIO(fresh_room(room))
        view = body.getbuffer()
        view[: len(start)] = start
        self._view.release()
        self._body, self._view = body, view

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._have == self._room:
            self._grow(self._view)
        return self._view[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        self._have += nbytes
        if self._have < self._size:
            self._owner.filling(nbytes)
            return
        owner, transport = self._owner, self._transport
        transport.set_protocol(owner)  # type: ignore[arg-type]
        owner.filled(self._take())

    def abandon(self) -> None:
        """The body is not wanted any more: the owner is the transport's protocol again."""
        self._transport.set_protocol(self._owner)  # type: ignore[arg-type]
        self._view.release()
        self._body, self._view = BytesIO(), memoryview(bytearray())

    def _take(self) -> bytes:
        self._view.release()
        return self._body.getvalue()

    def eof_received(self) -> bool:
        return self._owner.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.connection_lost(error)

    def pause_writing(self) -> None:
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        self._owner.resume_writing()
