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
from libc.stdint cimport uint64_t
from libc.string cimport memcmp, memcpy

cdef extern from "messages.h":
    ctypedef struct af_range:
        size_t start
        size_t stop
    enum:
        AF_SCAN_MANY
    ptrdiff_t af_messages_scan(const char *body, size_t n, af_range *messages, size_t room, af_range *array) nogil
    uint64_t af_messages_hash(const char *data, size_t n, uint64_t seed) nogil

cdef enum:
    # beside the bytes objects' own contents: the object, three headers, a key, a place in a dictionary
    MESSAGE_BYTES = 360


@cython.final
cdef class Message:
    cdef readonly bytes raw
    cdef readonly int role
    cdef readonly object context
    cdef readonly bytes ids
    cdef readonly bytes text
    cdef public uint64_t asked
    cdef public uint64_t answers

    def __cinit__(self, bytes raw not None, int role):
        self.raw, self.role, self.context, self.ids, self.text = raw, role, None, b"", b""

    cdef Py_ssize_t cost(self):
        return (MESSAGE_BYTES + PyBytes_GET_SIZE(self.raw) + PyBytes_GET_SIZE(self.ids)
                + PyBytes_GET_SIZE(self.text))


@cython.final
cdef class Plan:
    cdef readonly tuple contexts
    cdef readonly tuple ids
    cdef readonly tuple text
    cdef tuple guards  # (place, bits that are asked, bits that are set)

    def __cinit__(self, tuple contexts not None, tuple ids not None, tuple text not None, tuple guards=()):
        if len(ids) != len(contexts) + 1 or len(text) != len(ids):
            raise BadArgument("a plan has one more literal than messages")
        for each in (*ids, *text):
            if type(each) is not bytes:
                raise BadArgument("literals are bytes")
        for place, asked, answers in guards:
            if not 0 <= place < len(contexts) or answers & ~asked:
                raise BadArgument("a guard of no message, or without a question")
        self.contexts, self.ids, self.text, self.guards = contexts, ids, text, guards

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
        cdef Py_ssize_t n = len(self.contexts), i, ids = 0, text = 0
        cdef Message m
        cdef char *to_ids
        cdef char *to_text
        if len(messages) != n:
            raise BadArgument("not the plan's number of messages")
        for i in range(n):
            m = messages[i]
            if m.context is not self.contexts[i]:
                return i
            ids += PyBytes_GET_SIZE(m.ids) + PyBytes_GET_SIZE(<bytes> self.ids[i])
            text += PyBytes_GET_SIZE(m.text) + PyBytes_GET_SIZE(<bytes> self.text[i])
        ids += PyBytes_GET_SIZE(<bytes> self.ids[n])
        text += PyBytes_GET_SIZE(<bytes> self.text[n])
        all_ids = PyBytes_FromStringAndSize(NULL, ids)
        all_text = PyBytes_FromStringAndSize(NULL, text)
        to_ids, to_text = PyBytes_AS_STRING(all_ids), PyBytes_AS_STRING(all_text)
        for i in range(n + 1):
            to_ids, to_text = put(to_ids, <bytes> self.ids[i]), put(to_text, <bytes> self.text[i])
            if i < n:
                m = <Message> messages[i]
                to_ids, to_text = put(to_ids, m.ids), put(to_text, m.text)
        return all_ids, all_text


cdef inline char *put(char *to, bytes piece):
    cdef Py_ssize_t size = PyBytes_GET_SIZE(piece)
    memcpy(to, PyBytes_AS_STRING(piece), <size_t> size)
    return to + size


@cython.final
cdef class KnownMessages:
    """See _messages.pyi. `young` and `old` map hashes to messages."""

    cdef dict young
    cdef dict old
    cdef Py_ssize_t young_bytes
    cdef Py_ssize_t half_bytes
    cdef uint64_t seed
    cdef af_range *ranges
    cdef size_t room

    def __cinit__(self, Py_ssize_t limit_bytes):
        cdef bytes seed = os.urandom(8)
        self.young, self.old = {}, {}
        self.half_bytes = limit_bytes // 2
        memcpy(&self.seed, PyBytes_AS_STRING(seed), 8)
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
        cdef ptrdiff_t n = af_messages_scan(text, size, self.ranges, self.room, &array), i
        cdef list messages, unknown
        cdef Message m
        while n == AF_SCAN_MANY:
            self.grow(self.room * 4)
            n = af_messages_scan(text, size, self.ranges, self.room, &array)
        if n < 0:
            return None
        messages, unknown = [], []
        for i in range(n):
            m = self.known(text + self.ranges[i].start, self.ranges[i].stop - self.ranges[i].start)
            messages.append(m)
            if m is None:
                unknown.append((i, self.ranges[i].start, self.ranges[i].stop))
        return messages, unknown, array.start, array.stop

    cdef Message known(self, const char *raw, size_t size):
        cdef object key = af_messages_hash(raw, size, self.seed)
        cdef object found = self.young.get(key)
        cdef Message m
        if found is None:
            found = self.old.get(key)
            if found is None:
                return None
            self.keep(key, <Message> found)
        m = <Message> found
        if <size_t> PyBytes_GET_SIZE(m.raw) != size or memcmp(PyBytes_AS_STRING(m.raw), raw, size) != 0:
            return None
        return m

    cdef int keep(self, object key, Message m) except -1:
        self.young[key] = m
        self.young_bytes += m.cost()
        if self.young_bytes > self.half_bytes:
            self.old, self.young, self.young_bytes = self.young, {}, 0
        return 0

    def add(self, Message message not None, context, bytes ids not None, bytes text not None):
        message.context, message.ids, message.text = context, ids, text
        self.keep(
            af_messages_hash(PyBytes_AS_STRING(message.raw), <size_t> PyBytes_GET_SIZE(message.raw), self.seed), message)

    @staticmethod
    def roles(list messages not None):
        cdef Py_ssize_t n = len(messages), i
        cdef Message m
        out = PyBytes_FromStringAndSize(NULL, n)
        for i in range(n):
            m = messages[i]
            if not 0 <= m.role < 256:
                return None
            PyBytes_AS_STRING(out)[i] = <char> m.role
        return out

    @property
    def size_bytes(self):
        return self.young_bytes
