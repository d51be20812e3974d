"""What a server on a network must bound, in one place.

Every number here is a promise to the operator: no request, connection or reader may cost more than this.
Sizes are bytes, times seconds. Nothing here is read from the environment; the service fills it from its
settings.
"""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one server.

    max_request_line_bytes  method, target and version; beyond: 414.
    max_header_bytes        request line and headers together, and a chunked body's trailers; beyond: 431.
    max_headers             number of header lines; beyond: 431.
    max_body_bytes          decoded body; beyond: 413, before it is read when Content-Length says so.
    max_bodies_bytes        bodies of all connections together, until each is answered, those up to
                            small_body_bytes apart; who goes beyond gets 503. Never less than max_body_bytes.
    max_pipelined_bytes     what may wait behind a running request before reading pauses.
    header_timeout_s        from a request's first byte to the end of its head (408).
    body_timeout_s          between two pieces of a body (408), and
    min_body_bytes_s        what must come a second on average, after body_timeout_s (408).
    min_stream_bytes_s      the same of a body that a sink takes (intake.py): it holds more than its bytes.
    idle_timeout_s          between requests (closed silently).
    write_high_water        bytes of a reply that may wait in this process before `drain` waits.
    max_unsent_bytes        of a streamed reply whose handler does not wait; beyond: cut.
    write_timeout_s         a reader that takes nothing for so long is cut.
    linger_timeout_s        how long, and
    linger_bytes            how much is still read and dropped after the last reply, so that the client
                            sees it.
    max_connections         more are left in the listening socket's backlog.
    accept_batch            connections accepted at first before others that share the socket come
                            (server.py).
    """

    max_request_line_bytes: int = 16384
    max_header_bytes: int = 65536
    max_headers: int = 100
    max_body_bytes: int = 256 << 20
    max_bodies_bytes: int = 512 << 20
    small_body_bytes: int = 16384
    max_pipelined_bytes: int = 65536
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    min_body_bytes_s: int = 1024
    min_stream_bytes_s: int = 131072
    idle_timeout_s: float = 75.0
    write_high_water: int = 262144
    max_unsent_bytes: int = 16 << 20
    write_timeout_s: float = 60.0
    linger_timeout_s: float = 2.0
    linger_bytes: int = 4 << 20
    max_connections: int = 16384
    accept_batch: int = 2
