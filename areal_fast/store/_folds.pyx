# cython: boundscheck=False, wraparound=False, nonecheck=True, auto_pickle=False, autotestdict=False
"""The folds of a process's sessions, and the way of a turn through them, without the interpreter.

Job: keep folds (protocol/_fold.pyx) up to date, and least recently used ones no longer than there is room; pin a
session and begin a turn; say which earlier interaction a new one may refer to, append its record and fold on over it.
FoldCache (folds.py), Session and Turn (session.py) are these with what is rarely done. Contracts stand in _folds.pyi,
the theory in folds.py. The arena is called as Python calls it, so that a model of it does as well.

Invariants: `places[slot]` is the slot's fold or None; those that are there form a list by use, linked by slot numbers
(`older`, `newer`, of which -1 is the end). `fold_bytes` is the sum of what they are charged for, `ids_bytes` of the
lengths in `ids`. A fold that could not be read to the end is forgotten.
"""

from array import array
from collections import OrderedDict
from os import register_at_fork, urandom

from numpy import ascontiguousarray

from areal_fast.core import ArenaFull, Gone, HeadMoved, Trimmed
from areal_fast.core._core import common_prefix
from areal_fast.errors import ExportBusy
from areal_fast.protocol import records, retries

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from areal_fast.protocol._fold cimport WORDS, Folded, Head, Item

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef enum:
    MIN_SHARED_BYTES = 64      # 16 ids: fewer are not worth a reference
    RECORD_HEADER_BYTES = 64
    SENT_BYTES = 9
    BYTES_PER_TOKEN = 8
    RECORD_SLACK_BYTES = 512
    ID_BYTES = 15              # for 29 digits
    CHANCE_BYTES = 256 * ID_BYTES

cdef uint32_t NO_REF = records.NO_REF
cdef int INTERACTION = records.INTERACTION
cdef int SENT = records.SENT
cdef uint8_t LOST = retries.LOST, ARRIVED = retries.ARRIVED
cdef const char *DIGITS = b"0123456789abcdef"


cdef class Begun  # below


cdef class Folds:
    cdef readonly object arena
    cdef readonly Py_ssize_t fold_bytes, fold_count, ids_bytes
    cdef public Py_ssize_t max_bytes, max_ids_bytes
    cdef object make
    cdef list places
    cdef int64_t oldest, newest
    cdef object ids
    cdef readonly dict turns_open      # slot: turns of its session in flight

    def __init__(self, arena, make, Py_ssize_t max_bytes, Py_ssize_t max_ids_bytes):
        self.arena, self.make = arena, make
        self.max_bytes, self.max_ids_bytes = max_bytes, max_ids_bytes
        self.places = []
        self.oldest = self.newest = -1
        self.ids = OrderedDict()
        self.turns_open = {}

    # -- folds -----------------------------------------------------------------------------------------
    def refresh(self, Py_ssize_t slot):
        return self.fresh(slot)

    cdef Folded fresh(self, Py_ssize_t slot):
        cdef Folded fold = self.held(slot)
        cdef uint64_t head
        if fold is None:
            if slot < 0:
                raise IndexError("no slot")
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
                if PyBytes_GET_SIZE(known) != need - start:
                    raise ValueError("a record has other data than was asked for")
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
        if parent >= 0 and not fold.is_of(fold.items + parent, new.trajectory):
            parent = -1  # exported since: late, as the new one will be
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
    cdef int commit(self, Begun turn, bytes prompt, output, logprobs, version_runs, str stop_reason,
                    bytes messages_hash, bytes body_hash, bytes extra, routed) except -1:
        """Append the turn's INTERACTION and fold on over it."""
        cdef Py_buffer out, probs
        cdef Py_ssize_t id_len = 0, prompt_size = PyBytes_GET_SIZE(prompt), size, probs_size
        cdef const char *iid = PyUnicode_AsUTF8AndSize(turn.interaction_id, &id_len)
        cdef bytes whole, meta
        cdef Py_ssize_t slot = turn.session.slot
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
        new.ordinal, new.trajectory, new.id_len = <uint32_t> turn.ordinal, <uint32_t> turn.trajectory, <uint8_t> id_len
        new.parent = NO_REF if turn.parent is None else turn.parent.ordinal
        while True:
            fold = self.fresh(slot)
            self.refer(slot, fold, &new, prompt)
            meta = fold.pack(&new, version_runs, iid, stop_reason, messages_hash, body_hash, routed, extra)
            ids = PyMemoryView_FromObject(whole)[4 * new.shared:] if new.shared else whole
            fold.make_room(PyBytes_GET_SIZE(meta))  # so that nothing can fail behind the append
            try:
                head = self.arena.append(
                    slot, INTERACTION, meta, (ids, logprobs), expect=fold.head, reservation=turn.reservation)
            except HeadMoved:
                continue
            turn.reservation = 0
            size += PyBytes_GET_SIZE(meta) + probs_size - 4 * new.shared
            fold.add(PyBytes_AS_STRING(meta), PyBytes_GET_SIZE(meta), self.arena.record_of(head),
                     <uint64_t> (RECORD_HEADER_BYTES + size))
            fold.head = head
            self.charge(slot, fold)
            self.remember(turn.interaction_id, whole)
            return 0

    cdef int note_sent(self, Py_ssize_t slot, uint32_t trajectory, uint32_t ordinal, uint8_t fate) except -1:
        """Append a SENT record, and fold on over it where that is known to be all there is new."""
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
                return 0
        self.arena.append(slot, SENT, meta)
        return 0


# -- sessions and turns ------------------------------------------------------------------------------------

cdef class Pinned:
    """See _folds.pyi. `counts`: this use is an access."""

    cdef readonly object _store
    cdef Folds folds
    cdef readonly Py_ssize_t slot
    cdef readonly str session_id
    cdef bint pinned, counts

    def __cinit__(self, store, Py_ssize_t slot, str session_id not None, bint counts=True):
        self._store, self.folds, self.slot, self.session_id = store, store.folds, slot, session_id
        self.pinned, self.counts = True, counts
        if counts:
            self.folds.arena.touch(slot)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.release()

    def release(self):
        if self.pinned:
            self.pinned = False
            if self.counts:
                self.folds.arena.touch(self.slot)
            self.folds.arena.unpin(self.slot)

    cpdef access(self):
        if not self.counts:
            self.counts = True
            self.folds.arena.touch(self.slot)

    @property
    def state(self):
        return self.now()

    def twin_ordinal(self, bytes body not None, bytes key not None):
        cdef Folded fold = self.now()
        if not fold.may_have_twin(body, key):
            return -1
        return fold.twin_of(body, key, self.lives)

    def lives(self, process):
        raise NotImplementedError

    cdef Folded now(self):
        """The fold, a deadline that is due fired."""
        cdef Folded fold = self.folds.fresh(self.slot)
        if fold.deadline_ns:
            return self._store.fold(self.slot, self.session_id)
        return fold


def open_session(Folds folds not None, kind, store, str key not None):
    cdef Pinned session
    try:
        slot = folds.arena.pin_key(key.encode())
    except ValueError:  # no text that could be encoded, or no name of the arena's: so it is nobody's key
        return None
    if slot < 0:
        return None
    session = kind(store, slot, folds.arena.slot_id(slot).decode())
    try:
        if folds.fresh(slot).pending and session.state.leaving:
            raise ExportBusy
    except BaseException:
        session.release()
        raise
    return session


@cython.final
cdef class Fate:
    """See _folds.pyi."""

    cdef Pinned session
    cdef uint32_t trajectory, ordinal
    cdef uint64_t created_ns

    def __init__(self, Pinned session not None, place):
        self.session = session
        self.trajectory, self.ordinal = place
        self.created_ns = session.folds.arena.slot_created_ns(session.slot)

    def __call__(self, bint arrived):
        cdef Pinned session = self.session
        arena = session.folds.arena
        if session.pinned:
            self.note(arrived)
            return
        if not arena.pin_slot(session.slot):
            return
        try:
            info = arena.slot_info(session.slot)
            if info.id.decode() == session.session_id and info.created_ns == self.created_ns:
                self.note(arrived)
        finally:
            arena.unpin(session.slot)

    cdef int note(self, bint arrived) except -1:
        cdef Folds folds = self.session.folds
        try:
            folds.note_sent(self.session.slot, self.trajectory, self.ordinal, ARRIVED if arrived else LOST)
        except (Gone, ArenaFull):
            pass  # nobody will ask, or the worst is one answer told twice
        return 0


cdef class Begun:
    """See _folds.pyi."""

    cdef readonly Pinned session
    cdef readonly int64_t ordinal, trajectory
    cdef public object parent
    cdef public str interaction_id
    cdef public uint64_t reservation
    cdef readonly bint open

    def __cinit__(self, Pinned session not None, Py_ssize_t reserve_tokens, bint store):
        cdef Folds folds = session.folds
        self.session = session
        self.ordinal = self.trajectory = -1
        self.interaction_id = new_id()
        self.open = True
        session.access()
        if not store:
            return
        self.trajectory = session.now().active_index
        if reserve_tokens > 0:
            self.set_aside(reserve_tokens)
        self.ordinal = folds.arena.next_ordinal(session.slot)
        folds.turns_open[session.slot] = folds.turns_open.get(session.slot, 0) + 1

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.abandon()

    @property
    def session_id(self):
        return self.session.session_id

    cdef int set_aside(self, Py_ssize_t tokens) except -1:
        self.reservation = self.session.folds.arena.reserve(
            self.session.slot, tokens * BYTES_PER_TOKEN + RECORD_SLACK_BYTES)
        return 0

    def reserve(self, Py_ssize_t tokens):
        if self.open and self.ordinal >= 0 and not self.reservation:
            self.set_aside(tokens)

    def abandon(self):
        self.end()

    cpdef end(self):
        """It is over, and what is left of its room is given back. Once is enough."""
        cdef Folds folds = self.session.folds
        if not self.open:
            return
        self.open = False
        if self.ordinal < 0:
            return
        if self.reservation:
            folds.arena.release(self.reservation)
            self.reservation = 0
        left = folds.turns_open[self.session.slot] - 1
        if left:
            folds.turns_open[self.session.slot] = left
        else:
            del folds.turns_open[self.session.slot]

    def commit(self, *, prompt_ids, output_ids, logprobs, version_runs, str stop_reason not None,
               bytes messages_hash not None=b"", bytes body_hash not None=b"", bytes extra not None=b"", routed=None):
        if not self.open:
            raise ValueError("the turn has ended")
        if self.ordinal < 0:
            self.open = False
            return
        try:
            self.session.folds.commit(
                self, prompt_ids if type(prompt_ids) is bytes else bytes(packed(prompt_ids, "i", "<i4")),
                packed(output_ids, "i", "<i4"), packed(logprobs, "f", "<f4"), version_runs, stop_reason,
                messages_hash, body_hash, extra, routed)
        finally:
            self.end()


cdef object packed(values, str typecode, str dtype):
    """Numbers of four bytes as little-endian bytes; what are such bytes, or such an array, stays as it is."""
    if type(values) is bytes or (type(values) is array and values.typecode == typecode):
        return values
    return ascontiguousarray(values, dtype).tobytes()


cdef char chance[CHANCE_BYTES]
cdef Py_ssize_t chance_left = 0


cdef str new_id():
    """chatcmpl- and 29 random hexadecimal digits, of random bytes that are fetched many at a time."""
    global chance_left
    cdef char text[38]
    cdef Py_ssize_t i
    cdef uint8_t byte = 0
    if chance_left < ID_BYTES:
        memcpy(chance, PyBytes_AS_STRING(urandom(CHANCE_BYTES)), CHANCE_BYTES)
        chance_left = CHANCE_BYTES
    chance_left -= ID_BYTES
    memcpy(text, b"chatcmpl-", 9)
    for i in range(29):
        if i & 1 == 0:
            byte = <uint8_t> chance[chance_left + (i >> 1)]
        text[9 + i] = DIGITS[(byte >> 4) if i & 1 == 0 else (byte & 15)]
    return PyUnicode_DecodeASCII(text, 38, NULL)


def _forget_chance():
    global chance_left
    chance_left = 0


register_at_fork(after_in_child=_forget_chance)  # or parent and child would give the same ids
