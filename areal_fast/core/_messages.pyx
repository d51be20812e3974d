# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""Messages that were seen before, found in a chat's body without reading it: csrc/messages.c, and the prompt put
together from what is known of them. Contracts stand in _messages.pyi. One thread, the loop's.

`KnownMessages.take` is one pass: find, look up, read what is new, look for the plan, encode what has no ids in this
plan's surroundings, join. Whatever has to be thought about is asked of a Maker, once for each new thing.
"""

import os

from areal_fast.core.codes import BadArgument

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

cdef extern from "Python.h":
    Py_ssize_t PyUnicode_FindChar(object text, Py_UCS4 c, Py_ssize_t start, Py_ssize_t stop, int direction) except -2

cdef extern from "messages.h":
    ctypedef struct af_range:
        size_t start
        size_t stop
    ctypedef struct af_plain_message:
        af_range role
        af_range content
    ctypedef struct af_digest_key:
        pass
    ptrdiff_t af_messages_scan(const char *body, size_t n, af_range *messages, size_t room, af_range *array) nogil
    bint af_message_read(const char *text, size_t n, af_plain_message *out) nogil
    ptrdiff_t af_json_unescape(const char *text, size_t n, char *out) nogil
    void af_digest_key_make(af_digest_key *key, const uint8_t *seed) nogil
    void af_digest(const af_digest_key *key, const char *data, size_t n, uint8_t *out) nogil
    void af_fingerprint(const char *data, size_t n, uint8_t *out) nogil

cdef enum:
    # a message beside its ids: the object, headers of ids and digest, a place in a dictionary
    MESSAGE_BYTES = 280
    # a rest beside its objects, and what JSON takes as objects, a byte
    REST_BYTES = 900
    REST_BYTES_A_BYTE = 12
    MAX_MESSAGES = 512      # of a chat that is taken
    MAX_FORMS = 128
    MAX_FORM = 512          # characters
    MAX_STARTS = 8          # characters that are looked for one by one
    MAX_REST = 1 << 16      # a longer one is not kept


@cython.final
cdef class Context:
    cdef readonly str before
    cdef readonly str after
    cdef readonly str until
    cdef readonly bint trim
    cdef readonly object inner

    def __cinit__(self, str before not None, str after not None, str until not None, bint trim, inner=None):
        self.before, self.after, self.until, self.trim, self.inner = before, after, until, trim, inner


@cython.final
cdef class Message:
    cdef readonly int form
    cdef readonly Context context
    cdef readonly bytes ids
    cdef bytes digest
    cdef public uint64_t asked
    cdef public uint64_t answers

    def __cinit__(self, int form):
        if not 0 <= form < 256:
            raise BadArgument("a form is a number from 0 to 255")
        self.form, self.context, self.ids, self.digest = form, None, b"", None


cdef struct guard:
    Py_ssize_t place
    uint64_t asked
    uint64_t answers


cdef enum:
    ERROR = -3
    MET = -2
    UNMET = -1


@cython.final
cdef class Plan:
    cdef readonly tuple contexts
    cdef readonly tuple literals
    cdef guard *guards
    cdef Py_ssize_t guard_count

    def __cinit__(self, tuple contexts not None, tuple literals not None, tuple guards not None=()):
        cdef Py_ssize_t i = 0
        if len(literals) != len(contexts) + 1:
            raise BadArgument("a plan has one more literal than messages")
        for each in contexts:
            if type(each) is not Context:
                raise BadArgument("contexts are Contexts")
        for each in literals:
            if type(each) is not bytes:
                raise BadArgument("literals are bytes")
        self.contexts, self.literals = contexts, literals
        self.guards = <guard *> PyMem_Malloc((len(guards) + 1) * sizeof(guard))
        if self.guards == NULL:
            raise MemoryError
        self.guard_count = len(guards)
        for place, asked, answers in guards:
            if not 0 <= place < len(contexts) or answers & ~asked:
                raise BadArgument("a guard of no message, or without a question")
            self.guards[i].place, self.guards[i].asked, self.guards[i].answers = place, asked, answers
            i += 1

    def __dealloc__(self):
        PyMem_Free(self.guards)

    cdef Py_ssize_t unmet(self, list messages) except ERROR:
        """MET, UNMET, or the place of a message that lacks an answer."""
        cdef Py_ssize_t i
        cdef Message m
        if len(messages) != len(self.contexts):
            raise BadArgument("a plan for another number of messages")
        for i in range(self.guard_count):
            m = messages[self.guards[i].place]
            if self.guards[i].asked & ~m.asked:
                return self.guards[i].place
            if (m.answers & self.guards[i].asked) != self.guards[i].answers:
                return UNMET
        return MET

    cdef bytes join(self, list ids):
        """Literals and the messages' ids in turn."""
        cdef Py_ssize_t n = len(self.contexts), i, size = PyBytes_GET_SIZE(<bytes> self.literals[n])
        cdef char *to
        for i in range(n):
            size += PyBytes_GET_SIZE(<bytes> ids[i]) + PyBytes_GET_SIZE(<bytes> self.literals[i])
        out = PyBytes_FromStringAndSize(NULL, size)
        to = put(PyBytes_AS_STRING(out), <bytes> self.literals[0])
        for i in range(n):
            to = put(put(to, <bytes> ids[i]), <bytes> self.literals[i + 1])
        return out


cdef inline char *put(char *to, bytes piece):
    cdef Py_ssize_t size = PyBytes_GET_SIZE(piece)
    memcpy(to, PyBytes_AS_STRING(piece), <size_t> size)
    return to + size


@cython.final
cdef class Rest:
    cdef readonly object chat
    cdef readonly dict plans

    def __cinit__(self, chat, dict plans not None):
        self.chat, self.plans = chat, plans


@cython.final
cdef class KnownMessages:
    """See _messages.pyi. `young` and `old` map digests to messages, `rests` the digests of what stands before and behind
    the messages; `ranges` are the messages of the body that is being taken."""

    cdef dict young
    cdef dict old
    cdef Py_ssize_t young_bytes
    cdef Py_ssize_t half_bytes
    cdef dict rests
    cdef Py_ssize_t rest_bytes
    cdef dict forms
    cdef object maker
    cdef str starts     # of the texts that cut
    cdef af_digest_key key
    cdef af_range *ranges

    def __cinit__(self, Py_ssize_t limit_bytes, maker, str starts not None):
        cdef bytes seed = os.urandom(16)
        self.young, self.old, self.rests, self.forms = {}, {}, {}, {}
        self.half_bytes = limit_bytes // 2
        self.maker, self.starts = maker, starts
        af_digest_key_make(&self.key, <const uint8_t *> PyBytes_AS_STRING(seed))
        self.ranges = <af_range *> PyMem_Malloc(MAX_MESSAGES * sizeof(af_range))
        if self.ranges == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self.ranges)

    def take(self, bytes body not None, Py_ssize_t work):
        cdef const char *text = PyBytes_AS_STRING(body)
        cdef size_t size = <size_t> PyBytes_GET_SIZE(body)
        cdef af_range array
        cdef ptrdiff_t n, i
        cdef list messages = [], ids = []
        cdef dict contents = {}  # of new messages, by place
        cdef Message m
        cdef Context context
        cdef Rest rest
        cdef Plan plan
        cdef Py_ssize_t left = work, cost
        n = af_messages_scan(text, size, self.ranges, MAX_MESSAGES, &array)
        if n < 0:
            return None
        for i in range(n):
            m = self.find(text, i)
            if m is None:
                m = self.read_new(text, i, contents)
                if m is None:
                    return None
            messages.append(m)
        rest = self.rest_of(text, size, &array)
        if rest is None:
            return None
        plan = self.plan_of(text, rest, messages, contents)
        if plan is None:
            return None
        for i in range(n):
            m, context = messages[i], plan.contexts[i]
            if m.context is context:
                ids.append(m.ids)
                continue
            encoded = self.encoded(context, self.content(text, i, contents), left)
            if encoded is None:
                return None
            new, cost = encoded
            if type(new) is not bytes:
                raise BadArgument("ids are bytes")
            left -= cost
            self.add(m, context, <bytes> new)
            ids.append(new)
        return rest.chat, plan.join(ids)

    # -- messages

    cdef bytes digest(self, const char *text, Py_ssize_t i):
        out = PyBytes_FromStringAndSize(NULL, 16)
        af_digest(&self.key, text + self.ranges[i].start, self.ranges[i].stop - self.ranges[i].start,
                  <uint8_t *> PyBytes_AS_STRING(out))
        return out

    cdef Message find(self, const char *text, Py_ssize_t i):
        cdef bytes digest = self.digest(text, i)
        m = self.young.get(digest)
        if m is None:
            m = self.old.get(digest)
            if m is not None:
                self.keep(<Message> m)
        return <Message> m

    cdef int keep(self, Message m) except -1:
        self.young[m.digest] = m
        self.young_bytes += MESSAGE_BYTES + PyBytes_GET_SIZE(m.ids)
        if self.young_bytes > self.half_bytes:
            self.old, self.young, self.young_bytes = self.young, {}, 0
        return 0

    cdef int add(self, Message m, Context context, bytes ids) except -1:
        m.context, m.ids = context, ids
        return self.keep(m)

    cdef Message read_new(self, const char *text, Py_ssize_t i, dict contents):
        """A message that is not known; its content goes into `contents`. None: it is of another kind."""
        cdef Message m
        fields = self.read(text, i)
        if fields is None:
            return None
        form, content = fields
        number = self.forms.get(form)
        if number is None:
            if len(self.forms) == MAX_FORMS or len(form) > MAX_FORM:
                return None
            number = self.forms[form] = len(self.forms)
        m = Message(number)
        m.digest = self.digest(text, i)
        self.maker.answer(m, content)
        contents[i] = content
        return m

    cdef object read(self, const char *text, Py_ssize_t i):
        """Form and content, or None."""
        cdef af_plain_message plain
        cdef const char *first = text + self.ranges[i].start
        cdef Py_ssize_t size = <Py_ssize_t> (self.ranges[i].stop - self.ranges[i].start)
        if af_message_read(first, <size_t> size, &plain) and plain.role.start < plain.content.start:
            try:
                return unescaped(first, plain.role), unescaped(first, plain.content)
            except UnicodeDecodeError:
                return None
        return self.maker.read(PyBytes_FromStringAndSize(first, size))

    cdef object content(self, const char *text, Py_ssize_t i, dict contents):
        content = contents.get(i)
        if content is None:
            _, content = self.read(text, i)  # that was possible before
        return content

    cdef tuple encoded(self, Context context, content, Py_ssize_t work):
        """(ids, work it was), or None: more than `work`, or the content is not cut off as it should be."""
        cdef str segment
        cdef Py_UCS4 c
        cdef bint maybe = len(self.starts) > MAX_STARTS
        if context.inner is not None or type(content) is not str:
            return self.maker.encode_parts(context, content, work)
        segment = context.before + ((<str> content).strip() if context.trim else <str> content) + context.after
        if not maybe:
            for c in self.starts:
                if PyUnicode_FindChar(segment, c, 0, len(segment), 1) >= 0:
                    maybe = True
                    break
        if maybe and not self.maker.is_cut(segment, context.until):
            return None
        return self.maker.encode(segment, work)

    # -- what is not messages

    cdef Rest rest_of(self, const char *text, size_t size, const af_range *array):
        cdef Rest rest
        cdef size_t behind = size - array.stop
        cdef Py_ssize_t cost
        key = PyBytes_FromStringAndSize(NULL, 32)
        af_digest(&self.key, text, array.start, <uint8_t *> PyBytes_AS_STRING(key))
        af_digest(&self.key, text + array.stop, behind, <uint8_t *> PyBytes_AS_STRING(key) + 16)
        rest = self.rests.get(key)
        if rest is not None:
            return rest
        rest = self.maker.rest(PyBytes_FromStringAndSize(text, <Py_ssize_t> array.start),
                               PyBytes_FromStringAndSize(text + array.stop, <Py_ssize_t> behind))
        if rest is None or array.start + behind > MAX_REST:
            return rest
        cost = REST_BYTES + REST_BYTES_A_BYTE * <Py_ssize_t> (array.start + behind)
        if self.rest_bytes + cost > self.half_bytes // 4:
            self.forget_rests()
        self.rest_bytes += cost
        self.rests[key] = rest
        return rest

    def forget_rests(self):
        self.rests.clear()
        self.rest_bytes = 0

    cdef Plan plan_of(self, const char *text, Rest rest, list messages, dict contents):
        """The plan for these forms whose guards these messages meet, or None."""
        cdef Py_ssize_t n = len(messages), i, place
        cdef Plan plan
        cdef bytes forms = PyBytes_FromStringAndSize(NULL, n)
        for i in range(n):
            PyBytes_AS_STRING(forms)[i] = <char> (<Message> messages[i]).form
        plans = rest.plans.get(forms, ())
        if plans is None:
            return None
        for plan in plans:
            place = plan.unmet(messages)
            while place >= 0:
                self.maker.answer(messages[place], self.content(text, place, contents))
                place = plan.unmet(messages)
            if place == MET:
                return plan
        names = list(self.forms)
        plan = self.maker.plan(rest, forms, [names[form] for form in forms],
                               [self.content(text, i, contents) for i in range(n)])
        if plan is not None and len(plan.contexts) != n:
            raise BadArgument("a plan for another number of messages")
        return plan

    @property
    def size_bytes(self):
        return self.young_bytes


cdef str unescaped(const char *text, af_range inside):
    """Of the inside of a JSON string. UnicodeDecodeError: it is not valid."""
    cdef const char *first = text + inside.start
    cdef size_t n = inside.stop - inside.start
    cdef ptrdiff_t size
    cdef char[1024] near
    cdef char *out
    if n <= sizeof(near):
        size = af_json_unescape(first, n, near)
        return PyUnicode_DecodeUTF8(near, valid(size), NULL)
    out = <char *> PyMem_Malloc(n)
    if out == NULL:
        raise MemoryError
    try:
        size = af_json_unescape(first, n, out)
        return PyUnicode_DecodeUTF8(out, valid(size), NULL)
    finally:
        PyMem_Free(out)


cdef Py_ssize_t valid(ptrdiff_t size) except -1:
    if size < 0:
        raise UnicodeDecodeError("json", b"", 0, 0, "no valid string")
    return size


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
