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

cdef extern from "Python.h":
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size)


def parse_rows(bytes text not None, Py_ssize_t start):
    cdef size_t n, room, end = 0
    cdef int32_t *ids
    cdef float *logprobs
    cdef ptrdiff_t rows
    if not 0 <= start <= PyBytes_GET_SIZE(text):
        raise BadArgument(f"start {start} is outside the text")
    n = <size_t> (PyBytes_GET_SIZE(text) - start)
    room = n // AF_ROW_MIN + 1
    ids = <int32_t *> PyMem_Malloc(room * (sizeof(int32_t) + sizeof(float)))
    if ids == NULL:
        raise MemoryError
    try:
        logprobs = <float *> (ids + room)
        rows = af_rows_parse(PyBytes_AS_STRING(text) + start, n, ids, logprobs, room, &end)
        if rows < 0:
            return None
        return (PyBytes_FromStringAndSize(<char *> ids, rows * 4),
                PyBytes_FromStringAndSize(<char *> logprobs, rows * 4), start + <Py_ssize_t> end)
    finally:
        PyMem_Free(ids)


def ids_text(ids not None):
    cdef Py_buffer view
    cdef Py_ssize_t n
    cdef size_t size
    cdef PyObject *text
    PyObject_GetBuffer(ids, &view, PyBUF_SIMPLE)
    try:
        if view.len % 4:
            raise BadArgument("ids are int32: four bytes each")
        n = view.len // 4
        text = new_bytes(NULL, n * AF_DIGITS_MAX)
        if text == NULL:
            raise MemoryError
        size = af_ids_write(<const int32_t *> view.buf, <size_t> n, PyBytes_AS_STRING(<object> text))
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

    def __cinit__(self, Py_ssize_t tokens, spell):
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

    def __dealloc__(self):
        PyMem_Free(self.place)
        PyMem_Free(self.blob)

    cdef int learn(self, int32_t token) except -1:
        cdef bytes value = self.spell(token)
        cdef uint32_t size = <uint32_t> PyBytes_GET_SIZE(value)
        cdef size_t needed = self.used + 4 + size
        cdef char *blob
        if needed > 0xFFFFFFFF:
            raise MemoryError
        if needed > self.room:
            blob = <char *> PyMem_Realloc(self.blob, needed + needed // 4)
            if blob == NULL:
                raise MemoryError
            self.blob, self.room = blob, needed + needed // 4
        memcpy(self.blob + self.used, &size, 4)
        memcpy(self.blob + self.used + 4, PyBytes_AS_STRING(value), size)
        self.place[token] = <uint32_t> self.used
        self.used = needed
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
