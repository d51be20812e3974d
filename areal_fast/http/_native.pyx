# cython: boundscheck=False, wraparound=False, nonecheck=True, auto_pickle=False, autotestdict=False
"""The way of an ordinary request through the server, without the interpreter: bytes in, handler, bytes out.

Job: what every request meets. An `Exchange` and its reply; heads of the usual form (csrc/http_head.h); and, for a
connection at rest to which one whole ordinary request comes in one piece, the whole way from `data_received` to the
transport's `write`. Of one that begins like that and has a large body, the head and no more: what is here of the body
goes on as it is (`_begun`), not by way of the parser's copies. On the engine's side, the same for one whole ordinary
reply. Contracts stand in _native.pyi.

Theory. connection.py is the whole state machine, and this a shortcut through it that starts and ends in the same
state: at rest, nothing half read, nothing being answered. `_clean` says that the parser holds nothing and has seen
nothing of a message, so that passing it by is no difference. Whatever is not plainly of that form (in pieces,
pipelined, chunked, large while bodies are many, escaped, malformed, over a limit) is handed to connection.py from
its first byte, and answered or refused there. So limits and refusals have one home, and this file none.

Invariants: `_take` changes nothing unless it takes the request. While `_clean`, `parser` is fresh, no head or body is
being gathered and reading is not paused. body_bytes of the server is as connection.py says. No exception leaves
`data_received`.
"""

import asyncio

from areal_fast.http import headers as sent

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcmp, memcpy
from posix.time cimport clock_gettime, timespec

from areal_fast.http._native cimport *


cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_REALTIME_COARSE

cdef enum:
    NEW = 0
    STREAMING = 1
    DONE = 2
    OPEN = 0                # of a connection, as connection.py has it
    JOIN_BELOW = 65536      # a body up to here is copied behind its head rather than sent as a second buffer
    CHUNK_JOIN_BELOW = 16384
    KEPT_HEAD_BYTES = 1024  # a longer head is not kept for comparison with the next one
    FILLED_BYTES = 131072
    FRAMING_BYTES = 64      # what content-length takes at most

WORTH_FILLING = FILLED_BYTES

cdef tuple METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD")
cdef tuple NAMES = (
    b"", b"host", b"accept", b"user-agent", b"connection", b"content-type", b"authorization", b"content-length",
    b"accept-encoding",
)
assert len(NAMES) == AF_HTTP_KNOWN_NAMES

cdef bytes JSON = sent.JSON
cdef object encode_headers = sent.encode_headers
cdef bytes KEEP = b"\r\n"
cdef bytes KEEP_10 = b"connection: keep-alive\r\n\r\n"
cdef bytes CLOSE = b"connection: close\r\n\r\n"
cdef bytes CHUNKED = b"transfer-encoding: chunked\r\n"


cdef class Exchange  # below


# -- heads -------------------------------------------------------------------------------------------------

@cython.final
cdef class Headers:
    cdef dict first     # of each name the first value
    cdef list pairs     # None: every name stands once, so that `first` is all there is, in order

    def __init__(self, list pairs not None):
        cdef dict first = dict(pairs)
        if len(first) != len(pairs):
            first = dict(reversed(pairs))
            self.pairs = pairs
        self.first = first

    cdef list all_pairs(self):
        return list(self.first.items()) if self.pairs is None else self.pairs

    @property
    def repeats(self):
        return self.pairs is not None

    def get(self, name, default=None):
        return self.first.get(name, default)

    def all(self, name):
        if self.pairs is None:
            return [self.first[name]] if name in self.first else []
        return [value for key, value in self.pairs if key == name]

    def has_token(self, name, token):
        for value in self.all(name):
            for part in value.split(b","):
                if part.strip(b" \t").lower() == token:
                    return True
        return False

    def __contains__(self, name):
        return name in self.first

    def __iter__(self):
        return iter(self.all_pairs())

    def __len__(self):
        return len(self.first) if self.pairs is None else len(self.pairs)

    def __eq__(self, other):
        return isinstance(other, Headers) and self.all_pairs() == (<Headers> other).all_pairs()

    __hash__ = None

    def __repr__(self):
        return f"Headers({self.all_pairs()!r})"


@cython.final
cdef class RequestHead:
    cdef readonly str method
    cdef readonly str path
    cdef readonly str query
    cdef readonly Headers headers
    cdef readonly bint http11
    cdef readonly bint keep_alive
    cdef readonly int64_t body_size
    cdef readonly bint expects_continue

    def __init__(self, str method not None, str path not None, str query not None, Headers headers not None, bint http11,
                 bint keep_alive, int64_t body_size, bint expects_continue):
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.http11 = http11
        self.keep_alive = keep_alive
        self.body_size = body_size
        self.expects_continue = expects_continue

    cdef tuple parts(self):
        return (self.method, self.path, self.query, self.headers, self.http11, self.keep_alive, self.body_size,
                self.expects_continue)

    def __eq__(self, other):
        return isinstance(other, RequestHead) and self.parts() == (<RequestHead> other).parts()

    def __repr__(self):
        return f"RequestHead{self.parts()!r}"


cdef Headers headers_of(const char *text, af_http_head *h):
    """What was read, as objects. None if a name stands twice, so that order matters: not for here."""
    cdef Headers headers
    cdef af_http_field *f
    cdef uint32_t i
    cdef dict first = {}
    cdef bytes name
    for i in range(h.fields):
        f = &h.field[i]
        if f.known != AF_HTTP_OTHER:
            name = <bytes> NAMES[f.known]
        else:
            name = PyBytes_FromStringAndSize(text + f.name, f.name_len).lower()
        first[name] = PyBytes_FromStringAndSize(text + f.value, f.value_len)
    if len(first) != <Py_ssize_t> h.fields:
        return None
    headers = Headers.__new__(Headers)
    headers.first = first
    return headers


cdef RequestHead head_of(const char *text, af_http_head *h):
    """The same for the whole head of a request."""
    cdef RequestHead head = RequestHead.__new__(RequestHead)
    cdef Headers headers = headers_of(text, h)
    if headers is None:
        return None
    head.method = <str> METHODS[h.method]
    head.path = PyUnicode_DecodeASCII(text + h.target, h.path_len, NULL)
    if h.target_len > h.path_len:
        head.query = PyUnicode_DecodeASCII(text + h.target + h.path_len + 1, h.target_len - h.path_len - 1, NULL)
    else:
        head.query = ""
    head.headers = headers
    head.http11 = True
    head.keep_alive = h.keep_alive
    head.body_size = h.body
    head.expects_continue = False
    return head


def room(Py_ssize_t size):
    if size < 0:
        raise ValueError("less than no room")
    return PyBytes_FromStringAndSize(NULL, size)


def read_head(bytes block not None):
    cdef af_http_head h
    cdef size_t size = PyBytes_GET_SIZE(block)
    if not af_http_read_head(PyBytes_AS_STRING(block), size, size, &h) or h.size != size:
        return None
    return head_of(PyBytes_AS_STRING(block), &h)


def read_reply(bytes data not None, size_t most):
    cdef af_http_head h
    cdef const char *text = PyBytes_AS_STRING(data)
    cdef Py_ssize_t have = PyBytes_GET_SIZE(data)
    cdef Headers headers
    if not af_http_read_reply(text, have, most, &h) or h.body != have - <Py_ssize_t> h.size:
        return None
    headers = headers_of(text, &h)
    if headers is None:
        return None
    return h.status, headers, h.keep_alive != 0, PyBytes_FromStringAndSize(text + h.size, have - h.size)


# -- what the connections of a server share ------------------------------------------------------------------

cdef class Common:
    cdef public object handler
    cdef public object heads
    cdef public object wheel
    cdef public object sinks
    cdef public bint draining
    cdef public Py_ssize_t refused
    cdef public int64_t body_bytes
    cdef public int64_t max_bodies
    cdef int64_t idle_ticks, max_body, small_body
    cdef size_t max_header
    cdef uint32_t max_line, max_fields
    cdef dict prefixes      # status -> start of a JSON reply's head, of this second
    cdef int64_t second

    def bind(self, limits, int64_t idle_ticks):
        self.prefixes = {}
        self.idle_ticks = idle_ticks
        self.max_body = limits.max_body_bytes
        self.small_body = limits.small_body_bytes
        self.max_header = limits.max_header_bytes
        self.max_line = min(limits.max_request_line_bytes, 1 << 30)
        self.max_fields = min(limits.max_headers, 1 << 30)

    cdef bytes prefix(self, object status, object content_type):
        cdef timespec now
        if content_type is not JSON:
            return self.heads.prefix(status, content_type)
        clock_gettime(CLOCK_REALTIME_COARSE, &now)
        if now.tv_sec != self.second:
            self.second = now.tv_sec
            self.prefixes.clear()
        found = self.prefixes.get(status)
        if found is None:
            found = self.heads.prefix(status, JSON)
            self.prefixes[status] = found
        return <bytes> found


# -- a connection on the short way -----------------------------------------------------------------------------

cdef class Shortcut:
    cdef public int64_t due
    cdef public int64_t filed
    cdef readonly object peer
    cdef public object parser
    cdef readonly Common _server
    cdef public object _transport
    cdef object write           # the transport's
    cdef public Exchange _exchange
    cdef public Exchange _sending
    cdef public int _state
    cdef public bint _clean
    cdef public bint _write_paused
    cdef public bint _input_ended
    cdef bytes last             # the last short head taken here, and
    cdef RequestHead last_head  # what it says

    def __init__(self, Common server not None, peer):
        self._server = server
        self.peer = peer

    def _bind(self, transport):
        self._transport = transport
        self.write = transport.write
        self._clean = True

    def data_received(self, bytes data not None):
        if (self._clean and self._exchange is None and self._state == OPEN and self._sending is None
                and not self._write_paused and self.take(data)):
            return
        self._clean = False
        self._received(data)

    cdef int take(self, bytes data) except -1:
        """Answer `data` if it is one whole ordinary request. 0: it is not, and nothing has happened."""
        cdef const char *text = PyBytes_AS_STRING(data)
        cdef Py_ssize_t have = PyBytes_GET_SIZE(data)
        cdef Common server = self._server
        cdef RequestHead head
        cdef af_http_head h
        cdef Py_ssize_t size = 0
        cdef int64_t body
        cdef bytes last = self.last
        if last is not None:
            size = PyBytes_GET_SIZE(last)
            if have < size or memcmp(text, PyBytes_AS_STRING(last), size) != 0:
                size = 0
        if size:
            head = self.last_head
        else:
            if not af_http_read_head(text, have, server.max_header, &h):
                return 0
            size = h.size
            if h.line > server.max_line or h.fields > server.max_fields:
                return 0
            if h.body != have - size and h.body - (have - size) <= FILLED_BYTES:
                return 0
            head = head_of(text, &h)
            if head is None:
                return 0
            if size <= KEPT_HEAD_BYTES:
                self.last = data if size == have else PyBytes_FromStringAndSize(text, size)
                self.last_head = head
        body = head.body_size
        if body > server.max_body:
            return 0
        if body != have - size:
            if body - (have - size) <= FILLED_BYTES:
                return 0
            self._clean = False
            self._begun(head, memoryview(data)[size:])
            return 1
        if body > server.small_body and (server.sinks is not None or server.body_bytes + body > server.max_bodies):
            return 0
        server.body_bytes += body
        self.serve(head, PyBytes_FromStringAndSize(text + size, body), body, None)
        return 1

    cdef int serve(self, RequestHead head, bytes body, int64_t held, sink) except -1:
        cdef Exchange exchange = Exchange.__new__(Exchange)
        exchange.connection = self
        exchange.head = head
        exchange.body = body
        exchange.held = held
        exchange.sink = sink
        exchange._keep_alive = head.keep_alive
        exchange.owed = -1
        exchange.input_ended = self._input_ended
        self._exchange = exchange
        try:
            pending = self._server.handler(exchange)
        except Exception as error:
            self._failed(exchange, error)
            return 0
        if pending is not None:
            self.due = 0
            self._later(exchange, pending)
        elif exchange.state == DONE:
            pass
        elif exchange.deferred:
            self.due = 0
        else:
            self._failed(exchange, RuntimeError("the handler returned without an answer"))
        return 0

    def _serve(self, RequestHead head not None, bytes body not None, int64_t held, sink):
        self.serve(head, body, held, sink)

    cdef int rest(self) except -1:
        """Nothing is here any more: from now on the connection is idle."""
        cdef int64_t due = <int64_t> self._server.wheel.now + self._server.idle_ticks
        self.due = due
        if not 0 < self.filed <= due:
            self._server.wheel.set(self, self._server.idle_ticks)
        return 0

    cdef int done(self, Exchange exchange) except -1:
        """The reply is complete, as far as the handler goes."""
        self.release(exchange)
        if (self._exchange is exchange and self._clean and exchange._keep_alive and self._state == OPEN
                and not self._write_paused and not self._input_ended and not self._server.draining):
            if exchange._on_sent is None:
                self._exchange = None
                return self.rest()
            if not self._transport.is_closing() and not self._transport.get_write_buffer_size():
                self._exchange = None
                self._arrived(exchange)
                return self.rest()
        self._exchange_done(exchange)
        return 0

    cdef int release(self, Exchange exchange) except -1:
        """The request is answered: its body does not count any more."""
        self._server.body_bytes -= exchange.held
        exchange.held = 0
        sink, exchange.sink = exchange.sink, None
        if sink is not None:
            sink.drop()
        done, exchange._on_done = exchange._on_done, None
        if done is not None:
            self._call(done)
        return 0

    cdef int send(self, data) except -1:
        if self._state == OPEN:
            self.write(data)
        return 0

    cdef int send_all(self, list pieces) except -1:
        if self._state == OPEN:
            self._transport.writelines(pieces)
        return 0

    cdef bint keeps_alive(self) except -1:
        if self._server.draining:
            return False
        return not self._input_ended or (not self._clean and self.parser.buffered > 0)


# -- a request and its reply -------------------------------------------------------------------------------------

@cython.final
@cython.freelist(32)
cdef class Exchange:
    cdef Shortcut connection
    cdef RequestHead head
    cdef readonly bytes body
    cdef readonly object sink   # who took the body (which is empty here), or None
    cdef int64_t held           # bytes of body that the server counts until the reply is complete
    cdef readonly int status
    cdef readonly bint gone
    cdef public bint input_ended
    cdef bint _keep_alive
    cdef bint deferred
    cdef int state
    cdef bint chunked
    cdef bint bare
    cdef int64_t owed           # bytes still to be written of a streamed reply of known size; -1: not known
    cdef object _on_gone
    cdef object _on_sent
    cdef object _on_done

    @property
    def method(self):
        return self.head.method

    @property
    def path(self):
        return self.head.path

    @property
    def query(self):
        return self.head.query

    @property
    def headers(self):
        return self.head.headers

    @property
    def http11(self):
        return self.head.http11

    @property
    def peer(self):
        return self.connection.peer

    @property
    def keep_alive(self):
        return self._keep_alive

    @property
    def started(self):
        return self.state != NEW

    @property
    def finished(self):
        return self.state == DONE

    @property
    def _connection(self):
        return self.connection

    def respond(self, status, body, content_type=JSON, headers=()):
        if self.state != NEW:
            raise RuntimeError("this request has been answered")
        cdef Shortcut connection = self.connection
        cdef bytes start = connection._server.prefix(status, content_type)
        cdef list pieces = None
        cdef int64_t size
        if headers:
            start += encode_headers(headers)
        if type(body) is bytes:
            size = PyBytes_GET_SIZE(<bytes> body)
            if size >= JOIN_BELOW:
                pieces = [body]
        else:
            pieces = []
            for piece in body if isinstance(body, (list, tuple)) else (body,):
                pieces.append(piece if type(piece) is bytes else memoryview(piece).cast("B"))
            size = sum(map(len, pieces))
        cdef bint bodiless = status == 204 or status == 304
        cdef bytes end = self.persistence()
        self.state = DONE
        self.status = status
        if self._on_sent is not None:
            connection._send_at_once()
        if bodiless or self.head.method == "HEAD":
            connection.send(joined(start, -1 if bodiless else size, end, None))
        elif pieces is None:
            connection.send(joined(start, size, end, <bytes> body))
        else:
            connection.send_all([joined(start, size, end, None), *pieces])
        connection.done(self)

    def start(self, status, content_type, headers=(), *, size=None):
        if self.state != NEW:
            raise RuntimeError("this request has been answered")
        cdef bytes start = self.connection._server.prefix(status, content_type)
        cdef int64_t length = -1
        if headers:
            start += encode_headers(headers)
        cdef bint bodiless = status == 204 or status == 304
        self.bare = bodiless or self.head.method == "HEAD"
        self.owed = -1 if size is None else size
        if size is not None and not bodiless:
            length = size
        if self.bare or size is not None:
            pass
        elif self.head.http11:
            self.chunked = True
            start += CHUNKED
        else:
            self._keep_alive = False
        cdef bytes end = self.persistence()
        self.state = STREAMING
        self.status = status
        self.connection.send(joined(start, length, end, None))

    def write(self, data):
        if self.state != STREAMING:
            raise RuntimeError("no reply is being streamed")
        if self.bare or not data:
            return
        cdef Shortcut connection = self.connection
        connection._bound_unsent()
        if self.owed >= 0:
            if len(data) > self.owed:
                raise RuntimeError("the reply is longer than was announced")
            self.owed -= len(data)
        if not self.chunked:
            connection.send(data)
        elif len(data) < CHUNK_JOIN_BELOW:
            connection.send(b"%x\r\n%b\r\n" % (len(data), bytes(data)))
        else:
            view = memoryview(data).cast("B")
            connection.send_all([b"%x\r\n" % len(view), view, b"\r\n"])

    def write_all(self, pieces):
        if self.chunked or self.bare or self.state != STREAMING:
            for piece in pieces:
                self.write(piece)
            return
        cdef Shortcut connection = self.connection
        cdef int64_t size
        connection._bound_unsent()
        if self.owed >= 0:
            size = sum(map(len, pieces))
            if size > self.owed:
                raise RuntimeError("the reply is longer than was announced")
            self.owed -= size
        connection.send_all(list(pieces))

    async def drain(self):
        waiter = self.connection._writable()
        if waiter is not None:
            await asyncio.shield(waiter)

    def finish(self):
        if self.state != STREAMING:
            raise RuntimeError("no reply is being streamed")
        if self.owed > 0 and not self.bare:
            raise RuntimeError("the reply is shorter than was announced")
        self.state = DONE
        if self.chunked:
            self.connection.send(b"0\r\n\r\n")
        self.connection.done(self)

    def fail(self):
        if self.state == DONE:
            return
        cdef bint framed = self.chunked or self.owed >= 0 or self.state == NEW
        self.state = DONE
        self.connection.release(self)
        self.connection._break_off(self, not framed)

    def defer(self):
        self.deferred = True

    def go_on(self, pending):
        self.connection._later(self, pending)

    def fault(self, error):
        self.connection._failed(self, error)

    def on_done(self, callback):
        self._on_done = callback

    def on_gone(self, callback):
        if self.gone:
            callback()
        else:
            self._on_gone = callback

    def on_sent(self, callback):
        if self.state == DONE:
            raise RuntimeError("the reply is already on its way")
        self._on_sent = callback

    cdef bytes persistence(self):
        if self._keep_alive and self.connection.keeps_alive():
            return KEEP if self.head.http11 else KEEP_10
        self._keep_alive = False
        return CLOSE

    @property
    def wants_sent(self):
        return self._on_sent is not None

    def take_on_sent(self):
        callback, self._on_sent = self._on_sent, None
        return callback

    def note_gone(self):
        self.gone = True
        callback, self._on_gone = self._on_gone, None
        return callback


cdef bytes joined(bytes start, int64_t size, bytes end, bytes body):
    """A reply's head, from its start and its end with the length between them (−1: no length), and its body."""
    cdef char length[FRAMING_BYTES]
    cdef Py_ssize_t length_len = 0
    cdef Py_ssize_t start_len = PyBytes_GET_SIZE(start), end_len = PyBytes_GET_SIZE(end)
    cdef Py_ssize_t body_len = 0 if body is None else PyBytes_GET_SIZE(body)
    if size >= 0:
        length_len = <Py_ssize_t> af_http_write_length(length, size)
    cdef bytes whole = PyBytes_FromStringAndSize(NULL, start_len + length_len + end_len + body_len)
    cdef char *to = PyBytes_AS_STRING(whole)
    memcpy(to, PyBytes_AS_STRING(start), start_len)
    to += start_len
    memcpy(to, length, length_len)
    to += length_len
    memcpy(to, PyBytes_AS_STRING(end), end_len)
    if body_len:
        memcpy(to + end_len, PyBytes_AS_STRING(body), body_len)
    return whole
