# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""Token ids between an engine's JSON, int32 and text: csrc/tokens.c over Python's buffers, and a vocabulary's bytes.

No arena and no policy; contracts stand in _tokens.pyi and csrc/tokens.h. The GIL is held: a turn's worth is microseconds.
"""

from areal_fast.core.codes import BadArgument

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE, _PyBytes_Resize
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int32_t, uint32_t
from libc.string cimport memcpy, memset

cdef extern from "tokens.h":
    enum:
        AF_ROW_MIN
        AF_DIGITS_MAX
    ptrdiff_t af_rows_parse(const char *text, size_t n, int32_t *ids, float *logprobs, size_t room, size_t *end) nogil
    size_t af_ids_write(const int32_t *ids, size_t n, char *out) nogil

cdef extern from "<string.h>" nogil:
    void *memmem(const void *text, size_t n, const void *part, size_t size)

cdef extern from "Python.h":
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size)


def cut_rows(bytes text not None, bytes name not None, bytes stand_in not None):
    cdef const char *first = PyBytes_AS_STRING(text)
    cdef const char *end = first + PyBytes_GET_SIZE(text)
    cdef size_t name_size = <size_t> PyBytes_GET_SIZE(name), n, room, used = 0
    cdef const char *at
    cdef int32_t *ids
    cdef float *logprobs
    cdef ptrdiff_t rows
    at = <const char *> memmem(first, <size_t> (end - first), PyBytes_AS_STRING(name), name_size)
    if at == NULL or at == first or (at - 1)[0] == c'\\':
        return None
    at += name_size
    if at == end or at[0] != c':':
        return None
    at += 1
    first = at  # the name and its colon stay
    if at < end and at[0] == c' ':
        at += 1
    n = <size_t> (end - at)
    room = n // AF_ROW_MIN + 1
    ids = <int32_t *> PyMem_Malloc(room * (sizeof(int32_t) + sizeof(float)))
    if ids == NULL:
        raise MemoryError
    try:
        logprobs = <float *> (ids + room)
        rows = af_rows_parse(at, n, ids, logprobs, room, &used)
        if rows < 0 or memmem(at + used, n - used, PyBytes_AS_STRING(name), name_size) != NULL:
            return None
        return (PyBytes_FromStringAndSize(<char *> ids, rows * 4),
                PyBytes_FromStringAndSize(<char *> logprobs, rows * 4),
                replaced(text, first - PyBytes_AS_STRING(text), at + used - PyBytes_AS_STRING(text), stand_in))
    finally:
        PyMem_Free(ids)


cdef bytes replaced(bytes text, Py_ssize_t start, Py_ssize_t stop, bytes by):
    """`text` with `by` in place of text[start:stop]."""
    cdef Py_ssize_t rest = PyBytes_GET_SIZE(text) - stop
    cdef Py_ssize_t size = PyBytes_GET_SIZE(by)
    out = PyBytes_FromStringAndSize(NULL, start + size + rest)
    cdef char *to = PyBytes_AS_STRING(out)
    memcpy(to, PyBytes_AS_STRING(text), <size_t> start)
    memcpy(to + start, PyBytes_AS_STRING(by), <size_t> size)
    memcpy(to + start + size, PyBytes_AS_STRING(text) + stop, <size_t> rest)
    return out


def ids_json(ids not None, bytes before not None=b"", bytes after not None=b""):
    cdef Py_buffer view
    cdef Py_ssize_t n
    cdef size_t size = <size_t> PyBytes_GET_SIZE(before), digits
    cdef PyObject *text
    cdef char *to
    PyObject_GetBuffer(ids, &view, PyBUF_SIMPLE)
    try:
        if view.len % 4:
            raise BadArgument("ids are int32: four bytes each")
        n = view.len // 4
        text = new_bytes(NULL, <Py_ssize_t> size + n * AF_DIGITS_MAX + PyBytes_GET_SIZE(after))
        if text == NULL:
            raise MemoryError
        to = PyBytes_AS_STRING(<object> text)
        memcpy(to, PyBytes_AS_STRING(before), size)
        digits = af_ids_write(<const int32_t *> view.buf, <size_t> n, to + size)
        size += digits - (digits > 0)  # the last comma goes
        memcpy(to + size, PyBytes_AS_STRING(after), <size_t> PyBytes_GET_SIZE(after))
        size += <size_t> PyBytes_GET_SIZE(after)
    finally:
        PyBuffer_Release(&view)
    _PyBytes_Resize(&text, <Py_ssize_t> size)  # in place: nobody else has it
    try:
        return <object> text
    finally:
        Py_DECREF(<object> text)


@cython.final
cdef class TokenBytes:
    """See _tokens.pyi. `place[id]` is where the token's bytes begin in `blob`, its length before them (4 bytes); 0: not
    known yet. The blob begins with 4 unused bytes, so that 0 is no place."""

    cdef object spell
    cdef uint32_t *place
    cdef Py_ssize_t tokens
    cdef char *blob
    cdef size_t used
    cdef size_t room

    def __cinit__(self, Py_ssize_t tokens, spell, tuple spelled=None):
        if not 0 <= tokens <= 1 << 24:
            raise BadArgument(f"{tokens} tokens")
        self.spell = spell
        self.tokens = tokens
        self.place = <uint32_t *> PyMem_Malloc((tokens + 1) * sizeof(uint32_t))
        self.room = 4096
        self.blob = <char *> PyMem_Malloc(self.room)
        if self.place == NULL or self.blob == NULL:
            raise MemoryError
        memset(self.place, 0, (tokens + 1) * sizeof(uint32_t))
        self.used = 4
        if spelled is not None:
            self.learn_all(spelled[0], spelled[1])

    def __dealloc__(self):
        PyMem_Free(self.place)
        PyMem_Free(self.blob)

    cdef int learn_all(self, bytes starts, bytes text) except -1:
        cdef const uint32_t *start = <const uint32_t *> PyBytes_AS_STRING(starts)
        cdef Py_ssize_t ids = PyBytes_GET_SIZE(starts) // 4 - 1, i
        self.make_room(self.used + 4 * <size_t> max(ids, 0) + <size_t> PyBytes_GET_SIZE(text))
        for i in range(min(ids, self.tokens)):
            if not start[i] <= start[i + 1] <= <uint32_t> PyBytes_GET_SIZE(text):
                raise BadArgument("where tokens begin must rise, up to the end of their bytes")
            if start[i] < start[i + 1]:
                self.put(i, PyBytes_AS_STRING(text) + start[i], start[i + 1] - start[i])
        return 0

    cdef int learn(self, int32_t token) except -1:
        cdef bytes value = self.spell(token)
        return self.put(token, PyBytes_AS_STRING(value), <uint32_t> PyBytes_GET_SIZE(value))

    cdef int put(self, Py_ssize_t token, const char *value, uint32_t size) except -1:
        if self.used + 4 + size > self.room:
            self.make_room(self.used + 4 + size + self.used // 4)
        memcpy(self.blob + self.used, &size, 4)
        memcpy(self.blob + self.used + 4, value, size)
        self.place[token] = <uint32_t> self.used
        self.used += 4 + size
        return 0

    cdef int make_room(self, size_t size) except -1:
        cdef char *blob = NULL
        if size <= 0xFFFFFFFF:
            blob = <char *> PyMem_Realloc(self.blob, size)
        if blob == NULL:
            raise MemoryError
        self.blob, self.room = blob, size
        return 0

    def join(self, ids not None):
        cdef Py_buffer view
        cdef Py_ssize_t n, i
        cdef size_t total = 0
        cdef uint32_t size
        cdef const int32_t *id
        cdef char *to
        PyObject_GetBuffer(ids, &view, PyBUF_SIMPLE)
        try:
            if view.len % 4:
                raise BadArgument("ids are int32: four bytes each")
            n, id = view.len // 4, <const int32_t *> view.buf
            for i in range(n):
                if not 0 <= id[i] < self.tokens:
                    return b"".join([self.spell(id[i]) for i in range(n)])
                if self.place[id[i]] == 0:
                    self.learn(id[i])
                memcpy(&size, self.blob + self.place[id[i]], 4)
                total += size
            out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> total)
            to = PyBytes_AS_STRING(out)
            for i in range(n):
                memcpy(&size, self.blob + self.place[id[i]], 4)
                memcpy(to, self.blob + self.place[id[i]] + 4, size)
                to += size
            return out
        finally:
            PyBuffer_Release(&view)

    @property
    def size_bytes(self):
        return <Py_ssize_t> self.room + (self.tokens + 1) * <Py_ssize_t> sizeof(uint32_t)
