# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""The body of a chat's reply in one buffer: constants around an id, numbers and one JSON string (csrc/json_string.h).

What the constants are is areal_fast.engine.reply's affair: it gives them here. Contracts stand in _replies.pyi.
"""

from areal_fast.core.codes import BadArgument

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef extern from "json_string.h":
    size_t af_json_size(const char *text, size_t n) nogil
    char *af_json_write(char *out, const char *text, size_t n) nogil

cdef enum:
    NUMBER_MAX = 20  # characters of a uint64
    NUMBERS = 4
    PIECES = 9


cdef inline char *put(char *to, bytes piece):
    cdef Py_ssize_t size = PyBytes_GET_SIZE(piece)
    memcpy(to, PyBytes_AS_STRING(piece), <size_t> size)
    return to + size


cdef inline char *put_text(char *to, const char *text, Py_ssize_t size):
    memcpy(to, text, <size_t> size)
    return to + size


cdef Py_ssize_t spell(char *end, uint64_t value):
    """The decimal digits of `value`, the last one just before `end`; how many there are."""
    cdef char *to = end
    while True:
        to -= 1
        to[0] = <char> (48 + value % 10)
        value //= 10
        if value == 0:
            return end - to


@cython.final
cdef class Form:
    """See _replies.pyi."""

    cdef tuple pieces
    cdef Py_ssize_t constant  # bytes of all pieces

    def __cinit__(self, *pieces):
        if len(pieces) != PIECES:
            raise BadArgument(f"a form has {PIECES} pieces")
        self.constant = 0
        for piece in pieces:
            if type(piece) is not bytes:
                raise BadArgument("pieces are bytes")
            self.constant += PyBytes_GET_SIZE(<bytes> piece)
        self.pieces = pieces

    def fill(self, str id not None, str reason not None, str content not None, bytes calls not None,
             uint64_t created, uint64_t prompt_tokens, uint64_t completion_tokens):
        cdef Py_ssize_t id_size, reason_size, content_size, size = self.constant, i
        cdef const char *id_text = PyUnicode_AsUTF8AndSize(id, &id_size)
        cdef const char *reason_text = PyUnicode_AsUTF8AndSize(reason, &reason_size)
        cdef const char *content_text = PyUnicode_AsUTF8AndSize(content, &content_size)
        cdef char[NUMBERS][NUMBER_MAX] digits
        cdef Py_ssize_t[NUMBERS] counts
        cdef uint64_t[NUMBERS] numbers
        cdef char *to
        numbers[0], numbers[1], numbers[2] = created, completion_tokens, prompt_tokens
        numbers[3] = prompt_tokens + completion_tokens
        for i in range(NUMBERS):
            counts[i] = spell(digits[i] + NUMBER_MAX, numbers[i])
            size += counts[i]
        size += id_size + reason_size + PyBytes_GET_SIZE(calls)
        size += <Py_ssize_t> af_json_size(content_text, <size_t> content_size)
        out = PyBytes_FromStringAndSize(NULL, size)
        to = put_text(put(PyBytes_AS_STRING(out), <bytes> self.pieces[0]), id_text, id_size)
        to = put_text(put(to, <bytes> self.pieces[1]), reason_text, reason_size)
        to = af_json_write(put(to, <bytes> self.pieces[2]), content_text, <size_t> content_size)
        to = put(put(put(to, <bytes> self.pieces[3]), calls), <bytes> self.pieces[4])
        for i in range(NUMBERS):
            to = put_text(to, digits[i] + NUMBER_MAX - counts[i], counts[i])
            to = put(to, <bytes> self.pieces[5 + i])
        return out
