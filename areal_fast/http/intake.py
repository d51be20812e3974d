"""Bodies taken as they arrive, by a sink that knows where their bytes belong: no body is held in memory.

Theory. A server may be given `sinks`: for the head of a request with a counted body it says who takes that
body (a Sink), or None, and then the body is gathered as any other. The protocol of the transport becomes an
`Intake`, a BufferedProtocol whose buffer is what the sink offers next: the kernel writes into the memory
where the bytes will stay, and nothing is copied again. A sink may need time (memory has to be found): it says
`waiting`, the connection stops reading, and the kernel's window stops the client.

What is wrong with a body is the sink's to remember; it goes on taking bytes, into memory that it throws away,
so that the client hears its answer instead of a broken connection. The answer is the handler's, which finds
the sink as `exchange.sink` once the last byte has come.

Invariants: a sink gets exactly one `drop`, whatever happens, and after the handler's answer at the latest;
buffers are never longer than what the body has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from areal_fast.http._native import RequestHead


class Sink(Protocol):
    """Takes one body. No method raises."""

    waiting: bool
    """Nothing can be taken now. `when_ready` is called once that has changed, and not before it was set."""
    when_ready: Callable[[], None]

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes that came before the buffer was asked for; also while it waits."""

    def buffer(self) -> memoryview:
        """Where the next bytes go, at least one of them; not asked for while it waits."""

    def took(self, nbytes: int) -> None:
        """So many were put there."""

    def drop(self) -> None:
        """The body is done with: stored, refused, or never to be whole. What was not stored is let go."""


Sinks: TypeAlias = "Callable[[RequestHead], Sink | None]"


class Owner(Protocol):
    """The connection. Calls other than these are passed on to it as they come."""

    def taken(self, nbytes: int) -> None:
        """A piece of `nbytes` has arrived, not the last."""

    def taken_whole(self, nbytes: int) -> None:
        """The last piece has, and the owner is the transport's protocol again."""

    def eof_received(self) -> bool: ...

    def connection_lost(self, error: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class Intake(asyncio.BufferedProtocol):
    """Reads the `left` bytes of a body into the sink, from now on."""

    def __init__(self, owner: Owner, transport: asyncio.Transport, sink: Sink, left: int) -> None:
        self._owner = owner
        self._transport = transport
        self._sink = sink
        self._left = left
        transport.set_protocol(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._sink.buffer()[: self._left]

    def buffer_updated(self, nbytes: int) -> None:
        self._left -= nbytes
        self._sink.took(nbytes)
        if self._left:
            self._owner.taken(nbytes)
        else:
            self.leave()
            self._owner.taken_whole(nbytes)

    def leave(self) -> None:
        """The owner is the transport's protocol again."""
        self._transport.set_protocol(self._owner)  # type: ignore[arg-type]

    def eof_received(self) -> bool:
        return self._owner.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.connection_lost(error)

    def pause_writing(self) -> None:
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        self._owner.resume_writing()
