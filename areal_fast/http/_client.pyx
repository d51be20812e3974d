# cython: boundscheck=False, wraparound=False, nonecheck=True, auto_pickle=False, autotestdict=False
"""The way of an ordinary request to the engine and of its reply, without the interpreter.

Job: what nearly every request to the engine meets: an idle connection in the pool, one write, one whole ordinary
reply in one piece, a call of `done`. Contracts stand in _client.pyi.

Theory. client.py and client_connection.py are the whole client; their classes inherit `Pool` and `Link` and get
everything that is not of this form: no idle connection, a reply in pieces or of another form, every failure. A `Link`
is `_clean` from the sending of a `Request` until a byte of its reply has come: its parser has seen nothing of the
reply, and need not, if csrc/http_head.h knows the whole of it; else the parser gets it from its first byte.

A request's time is one store in the pool's wheel; its head is made anew for its length only. The reply stays as it
came: its head becomes objects only when somebody asks for them.

Invariants: a request ends once, in `finish`, `fail` or `cancel`; `_done` is None from then on. `done` is called when
the connection is in the pool again, or closed. Exceptions of `done` are its caller's fault, and go to the loop.
"""

from areal_fast.http._native import read_reply
from areal_fast.http.errors import BrokenReply, Timeout
from areal_fast.http.head import ReplyHead, parse_reply_head

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from areal_fast.http._native cimport af_http_head, af_http_read_reply, af_http_write_length

cdef enum:
    JOIN_BELOW = 65536      # a body up to here is copied behind its head rather than sent as a second buffer
    FRAMING_BYTES = 48      # what content-length and the head's end take at most

cdef class Pool
cdef class Link


cdef double now_s() noexcept:
    """As time.monotonic()."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef class Request:
    cdef Pool pool
    cdef object _done           # None: it has ended
    cdef readonly str method
    cdef readonly str path
    cdef object message         # bytes, or a list of them
    cdef readonly double began
    cdef readonly double ends
    cdef readonly double sent
    cdef readonly double ended
    cdef readonly Link connection
    cdef public object way      # the task that finds it a connection
    cdef bint reused            # the connection had been used before
    cdef bint retried
    cdef readonly bint touched
    cdef readonly object error
    cdef object _head
    cdef object _body           # bytes or bytearray; with `size`, behind a head of so many bytes
    cdef Py_ssize_t size
    cdef int _status

    # for who asks

    @property
    def status(self):
        return self._status if self._head is None else self._head.status

    @property
    def head(self):
        if self._head is None and self.size:
            whole = read_reply(self._body, self.size)
            if whole is None:
                self._head = parse_reply_head(self._body[:self.size], "GET")
            else:
                self._head = ReplyHead(whole[0], whole[1], whole[2], len(whole[3]))
        return self._head

    def take_body(self):
        cdef Py_ssize_t size = self.size
        cdef bytes whole
        body, self._body = self._body, b""
        if size:
            self.size = 0
            whole = <bytes?> body
            return PyBytes_FromStringAndSize(PyBytes_AS_STRING(whole) + size, PyBytes_GET_SIZE(whole) - size)
        return body if type(body) is bytes else bytes(body)

    def cancel(self):
        if self._done is None:
            return
        self._done = None
        self.pool.failed += 1
        if self.way is not None:
            self.way.cancel()
        elif self.connection is not None:
            self.connection.abandon(self)

    # for the connection

    def begin(self, head not None):
        self._head = head

    def piece(self, data):
        body = self._body
        if not body:
            self._body = data
        elif isinstance(body, bytearray):
            body += data
        else:
            self._body = joined = bytearray(body)
            joined += data

    def take_start(self):
        start, self._body = self._body, b""
        return start

    def finish(self):
        self.whole(now_s())

    cdef int whole(self, double now) except -1:
        done, self._done = self._done, None
        if done is not None:
            self.ended = now
            self.pool.waited_s += self.sent - self.began
            self.pool.engine_s += now - self.sent
            done(self)
        return 0

    def late(self):
        return Timeout(f"{self.method} {self.path}: no whole reply in time")

    def fail(self, error not None):
        if self._done is None:
            return
        if isinstance(error, BrokenReply) and not self.retried and self.pool.may_retry(self, self.reused):
            self.retried = True
            self.pool.retries += 1
            self.pool._find_way(self, True)
        else:
            self.settle(error)

    def settle(self, error not None):
        done, self._done = self._done, None
        if done is not None:
            self.pool.failed += 1
            self.error = error
            done(self)


cdef class Pool:
    cdef public object _wheel
    cdef public dict _idle
    cdef public object _waiting
    cdef public bint _closed
    cdef public object _reaper
    cdef public dict _starts
    cdef public int64_t requests
    cdef public int64_t failed
    cdef public int64_t connects
    cdef public int64_t reused
    cdef public int64_t retries
    cdef public double waited_s
    cdef public double engine_s
    cdef double timeout_s       # of the last request, and
    cdef int64_t ticks          # the ticks that it is

    def begin(self, str method not None, str path not None, bytes body not None=b"", *, double timeout_s, headers=(),
              done not None):
        cdef Request request = Request.__new__(Request)
        request.pool = self
        request.method = method
        request.path = path
        request.message = self._encode(method, path, body, headers)
        request.began = request.sent = now_s()
        request.ends = request.began + timeout_s
        request._body = b""
        request._done = done
        self.requests += 1
        if not self._idle or self._waiting or self._closed:
            self._find_way(request, False)
            return request
        if timeout_s != self.timeout_s:
            self.ticks = self._wheel.ticks(timeout_s)
            self.timeout_s = timeout_s
        self.send(self._take_idle(), request, self.ticks)
        return request

    def _take_idle(self):
        cdef Link connection = self._idle.popitem()[0]
        self.reused += 1
        return connection

    def _send(self, Link connection not None, Request request not None):
        request.sent = now_s()
        self.send(connection, request, self._wheel.ticks(request.ends - request.sent))

    cdef int send(self, Link connection, Request request, int64_t ticks) except -1:
        cdef int64_t due = <int64_t> self._wheel.now + ticks
        request.connection = connection
        request.reused = connection.used > 0
        connection.due = due
        if not 0 < connection.filed <= due:
            self._wheel.set(connection, ticks)
        connection.put(request, request.message)
        connection._clean = request.method != "HEAD"
        if not connection._clean:
            connection.parser.expect("HEAD")
        return 0

    cdef int give_back(self, Link connection, double now) except -1:
        """After a whole reply."""
        if self._waiting or self._closed or self._reaper is None:
            self._released(connection, True)
        else:
            self._idle[connection] = now
        return 0

    def _encode(self, str method not None, str path not None, bytes body not None, headers):
        cdef bint has_body = PyBytes_GET_SIZE(body) > 0 or method in ("POST", "PUT", "PATCH")
        start = None
        if not headers:
            start = self._starts.get((method, path, has_body))
        if start is None:
            start = self._start(method, path, has_body, headers)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
        if size < JOIN_BELOW:
            return message_of(start, has_body, size, body)
        return [message_of(start, has_body, size, b""), body]


cdef bytes message_of(bytes start, bint has_body, int64_t size, bytes body):
    """A request: its head up to the length, the length (of a body of `size` bytes), the head's end, `body`."""
    cdef char framing[FRAMING_BYTES]
    cdef Py_ssize_t framing_len = 0, start_len = PyBytes_GET_SIZE(start), body_len = PyBytes_GET_SIZE(body)
    if has_body:
        framing_len = <Py_ssize_t> af_http_write_length(framing, size)
    memcpy(framing + framing_len, b"\r\n", 2)
    framing_len += 2
    cdef bytes whole = PyBytes_FromStringAndSize(NULL, start_len + framing_len + body_len)
    cdef char *to = PyBytes_AS_STRING(whole)
    memcpy(to, PyBytes_AS_STRING(start), start_len)
    memcpy(to + start_len, framing, framing_len)
    memcpy(to + start_len + framing_len, PyBytes_AS_STRING(body), body_len)
    return whole


cdef class Link:
    cdef public int64_t due
    cdef public int64_t filed
    cdef readonly int64_t used
    cdef public object parser
    cdef public object _call    # a Request, or what has its methods
    cdef public bint _clean
    cdef readonly bint closed
    cdef object transport
    cdef object write           # the transport's
    cdef Pool pool
    cdef Py_ssize_t max_body
    cdef size_t max_header

    def __init__(self, Pool pool not None, parser not None, Py_ssize_t max_body, size_t max_header):
        self.pool = pool
        self.parser = parser
        self.max_body = max_body
        self.max_header = max_header

    @property
    def _transport(self):
        return self.transport

    def connection_made(self, transport):
        self.transport = transport
        self.write = transport.write

    def send(self, call not None, str method not None, message not None):
        self.parser.expect(method)
        self._clean = False
        self.put(call, message)

    cdef int put(self, call, message) except -1:
        """`call` is on the idle connection from now on."""
        self._call = call
        self.used += 1
        if type(message) is list:
            self.transport.writelines(message)
        else:
            self.write(message)
        return 0

    def data_received(self, bytes data not None):
        cdef Request request
        cdef af_http_head h
        cdef Py_ssize_t have = PyBytes_GET_SIZE(data)
        if self._clean and self._call is not None:
            self._clean = False
            request = <Request?> self._call
            request.touched = True
            if (af_http_read_reply(PyBytes_AS_STRING(data), have, self.max_header, &h)
                    and h.body == have - <Py_ssize_t> h.size and h.body <= self.max_body):
                request._body = data
                request.size = h.size
                request._status = h.status
                self.ended(request, h.keep_alive)
                return
            self.parser.expect(request.method)
        elif type(self._call) is Request:
            (<Request> self._call).touched = True
        self._received(data)

    cdef int ended(self, Request request, bint keep_alive) except -1:
        """Its reply is whole, and nothing of it is in the parser."""
        cdef double now = now_s()
        self._call = None
        self.due = 0
        if (keep_alive and not self.closed and not self.transport.is_closing()
                and not self.transport.get_write_buffer_size()):
            self.pool.give_back(self, now)
        else:
            self.close()
        request.whole(now)
        return 0

    def close(self):
        if not self.closed:
            self.closed = True
            self._call = None
            if self.transport is not None:
                self.transport.abort()
            self.pool._released(self, False)
