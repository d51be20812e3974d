# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""Messages that were seen before, found in a chat's body without reading it: csrc/messages.c, and the prompt put
together from what is known of them. Contracts stand in _messages.pyi. One thread, the loop's.
"""

import os

from areal_fast.core.codes import BadArgument

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

cdef extern from "messages.h":
    ctypedef struct af_range:
        size_t start
        size_t stop
    ctypedef struct af_digest_key:
        pass
    enum:
        AF_SCAN_MANY
    ptrdiff_t af_messages_scan(const char *body, size_t n, af_range *messages, size_t room, af_range *array) nogil
    void af_digest_key_make(af_digest_key *key, const uint8_t *seed) nogil
    void af_digest(const af_digest_key *key, const char *data, size_t n, uint8_t *out) nogil
    void af_fingerprint(const char *data, size_t n, uint8_t *out) nogil

cdef enum:
    # a message beside its ids: the object, headers of ids and digest, a place in a dictionary
    MESSAGE_BYTES = 280


@cython.final
cdef class Message:
    cdef readonly int role
    cdef readonly object context
    cdef readonly bytes ids
    cdef bytes digest
    cdef public uint64_t asked
    cdef public uint64_t answers

    def __cinit__(self, int role):
        self.role, self.context, self.ids, self.digest = role, None, b"", None


@cython.final
cdef class Plan:
    cdef readonly tuple contexts
    cdef readonly tuple literals
    cdef tuple guards  # (place, bits that are asked, bits that are set)

    def __cinit__(self, tuple contexts not None, tuple literals not None, tuple guards=()):
        if len(literals) != len(contexts) + 1:
            raise BadArgument("a plan has one more literal than messages")
        for each in literals:
            if type(each) is not bytes:
                raise BadArgument("literals are bytes")
        for place, asked, answers in guards:
            if not 0 <= place < len(contexts) or answers & ~asked:
                raise BadArgument("a guard of no message, or without a question")
        self.contexts, self.literals, self.guards = contexts, literals, guards

    def fits(self, list messages not None):
        cdef uint64_t asked, answers
        cdef Message m
        if len(messages) != len(self.contexts):
            raise BadArgument("not the plan's number of messages")
        for place, asked, answers in self.guards:
            m = messages[place]
            if asked & ~m.asked:
                return place
            if (m.answers & asked) != answers:
                return -1
        return None

    def prompt(self, list messages not None):
        cdef Py_ssize_t n = len(self.contexts), i, size = 0
        cdef Message m
        cdef char *to
        if len(messages) != n:
            raise BadArgument("not the plan's number of messages")
        for i in range(n):
            m = messages[i]
            if m.context is not self.contexts[i]:
                return i
            size += PyBytes_GET_SIZE(m.ids) + PyBytes_GET_SIZE(<bytes> self.literals[i])
        size += PyBytes_GET_SIZE(<bytes> self.literals[n])
        ids = PyBytes_FromStringAndSize(NULL, size)
        to = put(PyBytes_AS_STRING(ids), <bytes> self.literals[0])
        for i in range(n):
            to = put(put(to, (<Message> messages[i]).ids), <bytes> self.literals[i + 1])
        return ids


cdef inline char *put(char *to, bytes piece):
    cdef Py_ssize_t size = PyBytes_GET_SIZE(piece)
    memcpy(to, PyBytes_AS_STRING(piece), <size_t> size)
    return to + size


@cython.final
cdef class KnownMessages:
    """See _messages.pyi. `young` and `old` map digests to messages; `ranges` are the last body's."""

    cdef dict young
    cdef dict old
    cdef Py_ssize_t young_bytes
    cdef Py_ssize_t half_bytes
    cdef af_digest_key key
    cdef af_range *ranges
    cdef size_t room
    cdef Py_ssize_t found

    def __cinit__(self, Py_ssize_t limit_bytes):
        cdef bytes seed = os.urandom(16)
        self.young, self.old = {}, {}
        self.half_bytes = limit_bytes // 2
        af_digest_key_make(&self.key, <const uint8_t *> PyBytes_AS_STRING(seed))
        self.grow(256)

    def __dealloc__(self):
        PyMem_Free(self.ranges)

    cdef int grow(self, size_t room) except -1:
        PyMem_Free(self.ranges)
        self.room = 0
        self.ranges = <af_range *> PyMem_Malloc(room * sizeof(af_range))
        if self.ranges == NULL:
            raise MemoryError
        self.room = room
        return 0

    def find(self, bytes body not None):
        cdef const char *text = PyBytes_AS_STRING(body)
        cdef size_t size = <size_t> PyBytes_GET_SIZE(body)
        cdef af_range array
        cdef ptrdiff_t n, i
        cdef list messages, unknown
        cdef bytes digest
        self.found = 0
        n = af_messages_scan(text, size, self.ranges, self.room, &array)
        while n == AF_SCAN_MANY:
            self.grow(self.room * 4)
            n = af_messages_scan(text, size, self.ranges, self.room, &array)
        if n < 0:
            return None
        self.found = n
        messages, unknown = [], []
        for i in range(n):
            digest = self.digest(text, i)
            m = self.young.get(digest)
            if m is None:
                m = self.old.get(digest)
                if m is None:
                    unknown.append(i)
                else:
                    self.keep(<Message> m)
            messages.append(m)
        return messages, unknown, array.start, array.stop

    cdef bytes digest(self, const char *text, Py_ssize_t i):
        out = PyBytes_FromStringAndSize(NULL, 16)
        af_digest(&self.key, text + self.ranges[i].start, self.ranges[i].stop - self.ranges[i].start,
                  <uint8_t *> PyBytes_AS_STRING(out))
        return out

    def place(self, Py_ssize_t i):
        if not 0 <= i < self.found:
            raise BadArgument(f"no message {i} in the body that was looked at last")
        return self.ranges[i].start, self.ranges[i].stop

    cdef int keep(self, Message m) except -1:
        self.young[m.digest] = m
        self.young_bytes += MESSAGE_BYTES + PyBytes_GET_SIZE(m.ids)
        if self.young_bytes > self.half_bytes:
            self.old, self.young, self.young_bytes = self.young, {}, 0
        return 0

    def add(self, bytes body not None, Py_ssize_t i, Message message not None, context, bytes ids not None):
        if not 0 <= i < self.found or self.ranges[i].stop > <size_t> PyBytes_GET_SIZE(body):
            raise BadArgument(f"no message {i} in the body that was looked at last")
        message.context, message.ids = context, ids
        if message.digest is None:
            message.digest = self.digest(PyBytes_AS_STRING(body), i)
        self.keep(message)

    @staticmethod
    def roles(list messages not None):
        cdef Py_ssize_t n = len(messages), i
        cdef Message m
        out = PyBytes_FromStringAndSize(NULL, n)
        for i in range(n):
            m = messages[i]
            if not 0 <= m.role < 256:
                raise BadArgument("a role is a number from 0 to 255")
            PyBytes_AS_STRING(out)[i] = <char> m.role
        return out

    @property
    def size_bytes(self):
        return self.young_bytes


def fingerprint(bytes data not None):
    out = PyBytes_FromStringAndSize(NULL, 16)
    af_fingerprint(PyBytes_AS_STRING(data), <size_t> PyBytes_GET_SIZE(data), <uint8_t *> PyBytes_AS_STRING(out))
    return out


def digest(bytes seed not None, bytes data not None):
    cdef af_digest_key key
    if PyBytes_GET_SIZE(seed) != 16:
        raise BadArgument("a seed has 16 bytes")
    out = PyBytes_FromStringAndSize(NULL, 16)
    af_digest_key_make(&key, <const uint8_t *> PyBytes_AS_STRING(seed))
    af_digest(&key, PyBytes_AS_STRING(data), <size_t> PyBytes_GET_SIZE(data), <uint8_t *> PyBytes_AS_STRING(out))
    return out
