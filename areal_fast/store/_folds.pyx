# cython: boundscheck=False, wraparound=False, nonecheck=True, auto_pickle=False, autotestdict=False
"""The folds of a process's sessions, and the way of a turn through them, without the interpreter.

Job: keep folds (protocol/_fold.pyx) up to date, and least recently used ones no longer than there is room; say which
earlier interaction a new one may refer to; append its record and fold on over it. FoldCache (folds.py) is these Folds
with what is rarely done. Contracts stand in _folds.pyi, the theory in folds.py. The arena is called as Python calls it,
so that a model of it does as well.

Invariants: `places[slot]` is the slot's fold or None; those that are there form a list by use, linked by slot numbers
(`older`, `newer`, of which -1 is the end). `fold_bytes` is the sum of what they are charged for, `ids_bytes` of the
lengths in `ids`. A fold that could not be read to the end is forgotten.
"""

from collections import OrderedDict

from areal_fast.core import HeadMoved, Trimmed
from areal_fast.core._core import common_prefix
from areal_fast.protocol import records

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from areal_fast.protocol._fold cimport WORDS, Folded, Head, Item

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef enum:
    MIN_SHARED_BYTES = 64      # 16 ids: fewer are not worth a reference
    RECORD_HEADER_BYTES = 64
    SENT_BYTES = 9

cdef uint32_t NO_REF = records.NO_REF
cdef int INTERACTION = records.INTERACTION
cdef int SENT = records.SENT


cdef class Folds:
    cdef readonly object arena
    cdef readonly Py_ssize_t fold_bytes, fold_count, ids_bytes
    cdef public Py_ssize_t max_bytes, max_ids_bytes
    cdef object make
    cdef list places
    cdef int64_t oldest, newest
    cdef object ids

    def __init__(self, arena, make, Py_ssize_t max_bytes, Py_ssize_t max_ids_bytes):
        self.arena, self.make = arena, make
        self.max_bytes, self.max_ids_bytes = max_bytes, max_ids_bytes
        self.places = []
        self.oldest = self.newest = -1
        self.ids = OrderedDict()

    # -- folds -----------------------------------------------------------------------------------------
    def refresh(self, Py_ssize_t slot):
        return self.fresh(slot)

    cdef Folded fresh(self, Py_ssize_t slot):
        cdef Folded fold = self.held(slot)
        cdef uint64_t head
        if fold is None:
            fold = self.make()
            if len(self.places) <= slot:
                self.places.extend([None] * (slot + 1 - len(self.places)))
            self.places[slot] = fold
            self.fold_count += 1
            self.link(slot, fold)
        elif self.newest != slot:
            self.unlink(fold)
            self.link(slot, fold)
        if fold.head == 0:
            self.read_on(slot, fold)
        else:
            head = self.arena.head(slot)
            if head != fold.head:
                self.read_on(slot, fold)
        if fold.pending:
            self.resolve(slot, fold)
        return fold

    def resolve(self, Py_ssize_t slot, Folded fold):
        raise NotImplementedError

    cdef Folded held(self, Py_ssize_t slot):
        return <Folded> self.places[slot] if 0 <= slot < len(self.places) else None

    cpdef read_on(self, Py_ssize_t slot, Folded fold):
        try:
            head, cut, taken = self.arena.read(slot, fold.head)
            if cut:
                fold.clear()
            fold.apply(taken)
        except BaseException:
            self.forget(slot)
            raise
        fold.head = head
        self.charge(slot, fold)

    cdef int charge(self, Py_ssize_t slot, Folded fold) except -1:
        """A fold that is in use and may have grown: others make room for it."""
        cdef Py_ssize_t weight
        if self.held(slot) is not fold:
            return 0
        weight = fold.weight()
        self.fold_bytes += weight - fold.charged
        fold.charged = weight
        while self.fold_bytes > self.max_bytes and self.oldest != slot:
            self.forget(self.oldest)
        return 0

    cdef int link(self, Py_ssize_t slot, Folded fold) except -1:
        """As the one used last."""
        fold.older, fold.newer = self.newest, -1
        if self.newest >= 0:
            (<Folded> self.places[self.newest]).newer = slot
        else:
            self.oldest = slot
        self.newest = slot
        return 0

    cdef int unlink(self, Folded fold) except -1:
        if fold.older >= 0:
            (<Folded> self.places[fold.older]).newer = fold.newer
        else:
            self.oldest = fold.newer
        if fold.newer >= 0:
            (<Folded> self.places[fold.newer]).older = fold.older
        else:
            self.newest = fold.older
        return 0

    cpdef forget(self, Py_ssize_t slot):
        cdef Folded fold = self.held(slot)
        if fold is None:
            return
        self.unlink(fold)
        self.places[slot] = None
        self.fold_bytes -= fold.charged
        self.fold_count -= 1
        fold.charged = 0

    # -- tokens ----------------------------------------------------------------------------------------
    cdef int remember(self, str interaction_id, bytes ids) except -1:
        """Keep the full ids (int32) of an interaction, for the turns that follow it."""
        old = self.ids.pop(interaction_id, None)
        if old is not None:
            self.ids_bytes -= PyBytes_GET_SIZE(old)
        self.ids_bytes += PyBytes_GET_SIZE(ids)
        self.ids[interaction_id] = ids
        while self.ids_bytes > self.max_ids_bytes and len(self.ids) > 1:
            old = self.ids.popitem(False)[1]
            self.ids_bytes -= PyBytes_GET_SIZE(old)
        return 0

    def full_bytes(self, Py_ssize_t slot, Folded fold not None, uint32_t ordinal):
        cdef Py_ssize_t i = fold.at(ordinal)
        if i < 0:
            raise KeyError(ordinal)
        return self.full(slot, fold, i)

    cdef bytes full(self, Py_ssize_t slot, Folded fold, Py_ssize_t i):
        """The whole sequence of fold.items[i], from the newest part to the oldest: of each record what no later
        one replaces."""
        cdef Item *item = fold.items + i
        cdef str interaction_id
        cdef bytes whole, known
        cdef char *to
        cdef Py_ssize_t need, start, before
        if item.flags & WORDS:
            return b""
        interaction_id = fold.id_of(item)
        whole = self.ids.get(interaction_id)
        if whole is not None:
            self.ids.move_to_end(interaction_id)
            return whole
        need = 4 * (<Py_ssize_t> item.head.prompt_len + item.head.output_len)
        whole = PyBytes_FromStringAndSize(NULL, need)
        to = PyBytes_AS_STRING(whole)
        while need:
            start = 4 * <Py_ssize_t> item.head.shared
            if start < need:
                known = self.arena.record_data(slot, fold.head, item.offset, 0, need - start)
                memcpy(to + start, PyBytes_AS_STRING(known), <size_t> (need - start))
                need = start
                if need == 0:
                    break
            before = fold.at(item.head.ref)
            if before < 0 or before >= i:
                raise ValueError("an interaction refers to one that is not there")
            i = before
            item = fold.items + i
            known = self.ids.get(fold.id_of(item))
            if known is not None and PyBytes_GET_SIZE(known) >= need:
                memcpy(to, PyBytes_AS_STRING(known), <size_t> need)
                break
        self.remember(interaction_id, whole)
        return whole

    cdef int refer(self, Py_ssize_t slot, Folded fold, Head *new, bytes prompt) except -1:
        """Set ref and shared: the best of the parent and the last two interactions of the trajectory, if it is one
        that may be referred to."""
        cdef Py_ssize_t chosen[3]
        cdef Py_ssize_t k, count, parent, n, shared = 0
        cdef bytes ids
        new.ref, new.shared = NO_REF, 0
        if fold.pending and not fold.may_refer(new.trajectory):
            return 0
        count = fold.last_two(new.trajectory, &chosen[1])
        parent = -1 if new.parent == NO_REF else fold.at(new.parent)
        k = 1
        if parent >= 0 and parent != chosen[1] and (count < 2 or parent != chosen[2]):
            k = 0
            chosen[0] = parent
        try:
            for k in range(k, count + 1):
                if fold.items[chosen[k]].flags & WORDS:
                    continue
                ids = self.full(slot, fold, chosen[k])
                n = <Py_ssize_t> common_prefix(ids, prompt) & ~<Py_ssize_t> 3
                if n > shared:
                    new.ref, shared = fold.items[chosen[k]].head.ordinal, n
                if n == PyBytes_GET_SIZE(prompt) or n == PyBytes_GET_SIZE(ids):
                    break
        except Trimmed:  # the log was cut: the append would fail with HeadMoved anyway
            shared = 0
        if shared < MIN_SHARED_BYTES:
            new.ref, shared = NO_REF, 0
        new.shared = <uint32_t> (shared >> 2)
        return 0

    # -- records ---------------------------------------------------------------------------------------
    def commit(self, Py_ssize_t slot, uint32_t ordinal, uint32_t trajectory, uint32_t parent,
               str interaction_id not None, bytes prompt not None, output, logprobs, version_runs,
               str stop_reason not None, bytes messages_hash not None, bytes body_hash not None, bytes extra not None,
               routed, uint64_t reservation):
        cdef Py_buffer out, probs
        cdef Py_ssize_t id_len = 0, prompt_size = PyBytes_GET_SIZE(prompt), size, probs_size
        cdef const char *iid = PyUnicode_AsUTF8AndSize(interaction_id, &id_len)
        cdef bytes whole, meta
        cdef Folded fold
        cdef Head new
        cdef uint64_t head
        PyObject_GetBuffer(logprobs, &probs, PyBUF_SIMPLE)
        probs_size = probs.len
        PyBuffer_Release(&probs)
        PyObject_GetBuffer(output, &out, PyBUF_SIMPLE)
        try:
            if out.len != probs_size or out.len & 3 or prompt_size & 3 or id_len > 255:
                raise ValueError("log-probs and version runs must cover exactly the output")
            size = prompt_size + out.len
            whole = PyBytes_FromStringAndSize(NULL, size)
            memcpy(PyBytes_AS_STRING(whole), PyBytes_AS_STRING(prompt), <size_t> prompt_size)
            memcpy(PyBytes_AS_STRING(whole) + prompt_size, out.buf, <size_t> out.len)
            new.prompt_len, new.output_len = <uint32_t> (prompt_size >> 2), <uint32_t> (out.len >> 2)
        finally:
            PyBuffer_Release(&out)
        new.ordinal, new.trajectory, new.parent, new.id_len = ordinal, trajectory, parent, <uint8_t> id_len
        while True:
            fold = self.fresh(slot)
            self.refer(slot, fold, &new, prompt)
            meta = fold.pack(&new, version_runs, iid, stop_reason, messages_hash, body_hash, routed, extra)
            ids = PyMemoryView_FromObject(whole)[4 * new.shared:] if new.shared else whole
            fold.make_room(PyBytes_GET_SIZE(meta))  # so that nothing can fail behind the append
            try:
                head = self.arena.append(
                    slot, INTERACTION, meta, (ids, logprobs), expect=fold.head, reservation=reservation)
            except HeadMoved:
                continue
            size += PyBytes_GET_SIZE(meta) + probs_size - 4 * new.shared
            fold.add(PyBytes_AS_STRING(meta), PyBytes_GET_SIZE(meta), self.arena.record_of(head),
                     <uint64_t> (RECORD_HEADER_BYTES + size))
            fold.head = head
            self.charge(slot, fold)
            self.remember(interaction_id, whole)
            return

    def note_sent(self, Py_ssize_t slot, uint32_t trajectory, uint32_t ordinal, uint8_t fate):
        cdef Folded fold = self.held(slot)
        cdef bytes meta = PyBytes_FromStringAndSize(NULL, SENT_BYTES)
        cdef char *to = PyBytes_AS_STRING(meta)
        memcpy(to, &trajectory, 4)
        memcpy(to + 4, &ordinal, 4)
        to[8] = <char> fate
        if fold is not None and fold.head:
            try:
                head = self.arena.append(slot, SENT, meta, expect=fold.head)
            except HeadMoved:
                pass
            else:
                fold.dead_bytes += RECORD_HEADER_BYTES + SENT_BYTES
                fold.take_sent(to, SENT_BYTES)
                fold.head = head
                return
        self.arena.append(slot, SENT, meta)
