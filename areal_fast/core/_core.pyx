# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""The arena for Python: one method, one C call.

Job: check and convert arguments, release the GIL where a call may wait or is long, turn codes into exceptions.
No policy, no retries, no state but what keeps memory alive. What each call promises stands in _core.pyi and,
word by word, in csrc/arealfast.h.

Invariants:
- `a` is NULL from close() on, so that a closed handle answers BadArgument; the mapping itself (`handle`) goes
  when `busy` is 0, i.e. after the last call that runs without the GIL and the last open _Window.
- In a child made by fork, handles of the parent are disowned: they answer BadArgument, and neither closing
  them nor dropping a window touches shared memory (the pins are the parent's).
- The GIL is held over calls shorter than giving it away costs; LONG_BYTES decides for copies.
"""

import os
import weakref

from areal_fast.core import codes
from areal_fast.core.codes import BadArgument, CoreError, SlotInfo, raise_code

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.memoryview cimport PyMemoryView_FromObject
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset, strerror

from areal_fast.core._core cimport *

cdef enum:
    MAX_BOUNDS = 32
    LONG_BYTES = 65536
    PAGE_SLOTS = 65536

LAYOUT_VERSION = AF_LAYOUT_VERSION
CRASH_POINTS = af_crash_count() > 0


include "_codes.pxi"
include "_buffers.pxi"
include "_base64.pxi"


cdef class Histogram  # below


@cython.final
cdef class Arena:
    cdef af_arena *a          # NULL once closed
    cdef af_arena *handle     # until unmapped
    cdef Py_ssize_t busy      # windows open and calls running without the GIL
    cdef bint disowned        # we are a forked child
    cdef dict filling         # slot -> _Window of a shard not yet published
    cdef readonly int proc
    cdef object __weakref__

    def __init__(self):
        raise TypeError("Arena.create or Arena.attach makes one")

    def __dealloc__(self):
        self.a = NULL
        if self.handle != NULL:
            af_close(self.handle)

    @staticmethod
    def create(uint64_t max_bytes, *, uint32_t session_slots=0, uint32_t shard_slots=0, uint32_t proc=31):
        cdef af_arena *a = NULL
        cdef int rc
        with nogil:
            rc = af_create(max_bytes, session_slots, shard_slots, proc, &a)
        if rc < 0:
            fail(rc, "create")
        return wrap(a)

    @staticmethod
    def attach(int fd, uint32_t proc):
        cdef af_arena *a = NULL
        cdef int rc = af_attach(fd, proc, &a)
        if rc < 0:
            fail(rc, "attach")
        return wrap(a)

    def fileno(self):
        return af_fileno(self.ready())

    @property
    def closed(self):
        return self.a == NULL

    @property
    def session_slots(self):
        return af_session_slots(self.ready())

    @property
    def shard_slots(self):
        return af_shard_slots(self.ready())

    def close(self):
        self.a = NULL
        self.busy += 1
        self.leave()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    cdef inline af_arena *ready(self) except NULL:
        if self.a == NULL:
            raise BadArgument("the arena is closed, or belongs to the process this one was forked from")
        return self.a

    cdef inline af_arena *enter(self) except NULL:
        """Around calls that release the GIL: close() waits for leave() with unmapping."""
        cdef af_arena *a = self.ready()
        self.busy += 1
        return a

    cdef void leave(self) noexcept:
        self.busy -= 1
        if self.a == NULL and self.busy == 0 and self.handle != NULL:
            af_close(self.handle)
            self.handle = NULL

    # -- processes -------------------------------------------------------------------------------------
    def proc_enter(self, int64_t pid):
        cdef int64_t rc = af_proc_enter(self.ready(), pid)
        if rc < 0:
            fail(rc, "proc_enter")
        return rc

    def proc_leave(self):
        af_proc_leave(self.ready())

    def heartbeat(self):
        af_heartbeat(self.ready())

    def proc_info(self, uint32_t proc):
        cdef int64_t pid = 0
        cdef uint64_t incarnation = 0, ticks = 0
        cdef int rc = af_proc_info(self.ready(), proc, &pid, &incarnation, &ticks)
        if rc < 0:
            fail(rc, "proc_info")
        return pid, incarnation, ticks

    def lock_owner(self):
        return af_lock_owner(self.ready())

    def sweep(self, uint32_t proc):
        cdef af_sweep_result r
        cdef int rc
        cdef af_arena *a = self.enter()
        memset(&r, 0, sizeof(r))
        with nogil:
            rc = af_sweep(a, proc, &r)
        self.leave()
        if rc < 0:
            fail(rc, "sweep")
        return r

    def owned_slots(self, uint32_t state, uint32_t proc):
        cdef uint32_t page[256]
        cdef uint32_t cursor = 0, next = 0
        cdef int64_t n, i
        cdef af_arena *a = self.ready()
        cdef list found = []
        while True:
            n = af_owned_slots(a, state, proc, cursor, page, 256, &next)
            if n < 0:
                fail(n, "owned_slots")
            found.extend([page[i] for i in range(n)])
            if next == 0:
                return found
            cursor = next

    # -- words and counters ----------------------------------------------------------------------------
    def word(self, uint32_t i):
        cdef int64_t v = 0
        if af_word_get(self.ready(), i, &v) < 0:
            fail(AF_EINVAL, "word")
        return v

    def set_word(self, uint32_t i, int64_t v):
        if af_word_set(self.ready(), i, v) < 0:
            fail(AF_EINVAL, "set_word")

    def add_word(self, uint32_t i, int64_t v):
        cdef int64_t new = 0
        if af_word_add(self.ready(), i, v, &new) < 0:
            fail(AF_EINVAL, "add_word")
        return new

    def cas_word(self, uint32_t i, int64_t old, int64_t new):
        cdef int rc = af_word_cas(self.ready(), i, old, new)
        if rc < 0:
            fail(rc, "cas_word")
        return rc == 1

    def count(self, uint32_t counter, int64_t delta=1):
        af_count(self.ready(), counter, <uint64_t> delta)

    def histogram(self, uint32_t first, bounds):
        cdef Histogram found = Histogram.__new__(Histogram)
        cdef Py_ssize_t i
        self.ready()
        if len(bounds) > MAX_BOUNDS or list(bounds) != sorted(bounds):
            raise BadArgument(f"at most {MAX_BOUNDS} bounds, in order")
        if first >= AF_COUNTERS:
            raise BadArgument(f"there are {AF_COUNTERS} counters")
        found.arena = self
        found.first = first
        found.bounds = <uint32_t> len(bounds)
        for i in range(len(bounds)):
            found.bound[i] = bounds[i]
        return found

    def counters(self):
        cdef uint64_t out[AF_COUNTERS]
        cdef int i
        af_counters(self.ready(), out)
        return [out[i] for i in range(AF_COUNTERS)]

    def now_ns(self):
        return af_now_ns()

    # -- sessions --------------------------------------------------------------------------------------
    def start(self, bytes task not None, bytes key not None, *, uint64_t txn=0, int64_t rebind_from=-1):
        cdef af_started s
        cdef int rc = af_session_start(
            self.ready(), PyBytes_AS_STRING(task), <uint32_t> PyBytes_GET_SIZE(task),
            PyBytes_AS_STRING(key), <uint32_t> PyBytes_GET_SIZE(key), txn, rebind_from, &s)
        if rc < 0:
            fail(rc, "start", s.slot if rc == AF_EEXIST else -1)
        return s.slot, PyBytes_FromStringAndSize(s.id, s.id_len)

    def open_named(self, bytes session_id not None):
        cdef int64_t rc = af_session_open_named(
            self.ready(), PyBytes_AS_STRING(session_id), <uint32_t> PyBytes_GET_SIZE(session_id))
        if rc < 0:
            fail(rc, "open_named")
        return rc

    def pin_id(self, bytes session_id not None):
        cdef int64_t rc = af_pin_id(
            self.ready(), PyBytes_AS_STRING(session_id), <uint32_t> PyBytes_GET_SIZE(session_id))
        return rc if rc >= 0 else absent(rc)

    def pin_key(self, bytes key not None):
        cdef int64_t rc = af_pin_key(self.ready(), PyBytes_AS_STRING(key), <uint32_t> PyBytes_GET_SIZE(key))
        return rc if rc >= 0 else absent(rc)

    def pin_slot(self, uint32_t slot):
        cdef int rc = af_pin_slot(self.ready(), slot)
        if rc < 0:
            fail(rc, "pin_slot")
        return rc == 1

    def unpin(self, uint32_t slot):
        cdef af_arena *a = self.ready()
        if af_pin_count(a, slot) == 0:
            raise BadArgument(f"slot {slot} is not pinned by this process")
        af_unpin(a, slot)

    def touch(self, uint32_t slot):
        cdef af_arena *a = self.ready()
        if af_pin_count(a, slot) == 0:
            raise BadArgument(f"slot {slot} is not pinned by this process")
        af_touch(a, slot)

    def slot_info(self, uint32_t slot):
        cdef af_slot_info s
        cdef int rc = af_slot_get(self.ready(), slot, &s)
        if rc < 0:
            fail(rc, "slot_info")
        return SlotInfo(
            s.state, s.owner, s.seq, s.pins, s.kind, PyBytes_FromStringAndSize(s.id, s.id_len),
            PyBytes_FromStringAndSize(s.key, s.key_len), s.created_ns, s.touched_ns, s.nbytes, s.ordinal,
            s.head, s.txn, s.deadline_ns)

    def slot_id(self, uint32_t slot):
        cdef af_slot_info s
        cdef int rc = af_slot_get(self.ready(), slot, &s)
        if rc < 0:
            fail(rc, "slot_id")
        return PyBytes_FromStringAndSize(s.id, s.id_len)

    def slot_created_ns(self, uint32_t slot):
        cdef af_slot_info s
        cdef int rc = af_slot_get(self.ready(), slot, &s)
        if rc < 0:
            fail(rc, "slot_created_ns")
        return s.created_ns

    def next_ordinal(self, uint32_t slot):
        cdef int64_t rc = af_next_ordinal(self.ready(), slot)
        if rc < 0:
            fail(rc, "next_ordinal")
        return rc

    def deadline(self, uint32_t slot):
        cdef int64_t rc = af_deadline_get(self.ready(), slot)
        if rc < 0:
            fail(rc, "deadline")
        return rc

    def set_deadline(self, uint32_t slot, int64_t ns):
        check(af_deadline_set(self.ready(), slot, ns), "set_deadline")

    def close_session(self, uint32_t slot):
        check(af_session_close(self.ready(), slot), "close_session")

    # -- log -------------------------------------------------------------------------------------------
    @staticmethod
    def record_of(uint64_t head):
        return head >> 24 << 4

    def head(self, uint32_t slot):
        return af_log_head(self.ready(), slot)

    def append(self, uint32_t slot, uint16_t type, meta not None, data=(), *, uint64_t expect=AF_LOG_ANY,
               uint64_t aux=0, uint16_t flags=0, bint critical=False, uint64_t reservation=0):
        cdef af_new_record rec
        cdef Spans m, d
        cdef uint64_t head = 0
        cdef uint32_t options = AF_CRITICAL if critical else 0
        cdef int rc
        cdef af_arena *a = self.enter()
        try:
            spans_take(&m, (meta,))
            try:
                if m.nbytes > 0xFFFFFFFF:
                    fail(AF_EINVAL, "append")
                spans_take(&d, data)
                rec.type, rec.flags, rec.aux = type, flags, aux
                rec.meta, rec.meta_len = m.parts[0].base, <uint32_t> m.nbytes
                rec.data, rec.data_parts = d.parts, d.count
                if d.nbytes > LONG_BYTES:
                    with nogil:
                        rc = af_log_append(a, slot, &rec, expect, options, reservation, &head)
                else:
                    rc = af_log_append(a, slot, &rec, expect, options, reservation, &head)
                spans_drop(&d)
            finally:
                spans_drop(&m)
        finally:
            self.leave()
        if rc < 0:
            fail(rc, "append")
        return head

    def read(self, uint32_t slot, uint64_t since=0):
        cdef af_log_view v
        cdef af_record *r
        cdef int rc
        cdef size_t i
        cdef af_arena *a = self.enter()
        memset(&v, 0, sizeof(v))
        if since == 0:
            with nogil:
                rc = af_log_read(a, slot, 0, &v)
        else:
            rc = af_log_read(a, slot, since, &v)
        self.leave()
        try:
            if rc < 0:
                fail(rc, "read")
            records = []
            for i in range(v.count):
                r = v.records + i
                records.append((
                    r.offset, r.type, r.flags, r.aux, r.outcome,
                    PyBytes_FromStringAndSize(<char *> v.meta + r.meta_at, r.meta_len), r.data_len))
            return v.head, v.cut != 0, records
        finally:
            af_log_view_free(&v)

    def record_data(self, uint32_t slot, uint64_t head, uint64_t offset, uint64_t start=0, int64_t length=-1):
        cdef uint64_t size = 0
        cdef int rc
        cdef bytes out
        cdef char *to
        cdef af_arena *a = self.enter()
        try:
            if length < 0:
                check(af_record_data_len(a, slot, head, offset, &size), "record_data")
                if start > size:
                    fail(AF_EINVAL, "record_data")
                size -= start
            else:
                size = length
            out = PyBytes_FromStringAndSize(NULL, size)
            to = PyBytes_AS_STRING(out)
            if size > LONG_BYTES:
                with nogil:
                    rc = af_record_data(a, slot, head, offset, start, size, to)
            else:
                rc = af_record_data(a, slot, head, offset, start, size, to)
        finally:
            self.leave()
        check(rc, "record_data")
        return out

    def record_outcome(self, uint32_t slot, uint64_t head, uint64_t offset):
        cdef int rc = af_record_outcome(self.ready(), slot, head, offset)
        if rc < 0:
            fail(rc, "record_outcome")
        return rc

    def compact(self, uint32_t slot, uint64_t expect, checkpoint not None, keep):
        cdef Spans c
        cdef uint64_t head = 0
        cdef uint64_t *offsets = NULL
        cdef uint32_t n = 0
        cdef int rc
        cdef af_arena *a = self.enter()
        try:
            spans_take(&c, (checkpoint,))
            try:
                n = len(keep)
                offsets = <uint64_t *> PyMem_Malloc((n + 1) * sizeof(uint64_t))
                if offsets == NULL:
                    raise MemoryError
                for i, offset in enumerate(keep):
                    offsets[<size_t> i] = offset
                with nogil:
                    rc = af_log_compact(a, slot, expect, c.parts[0].base, <uint32_t> c.nbytes, offsets, n, &head)
            finally:
                PyMem_Free(offsets)
                spans_drop(&c)
        finally:
            self.leave()
        check(rc, "compact")
        return head

    def verify(self, uint32_t slot):
        cdef int rc
        cdef af_arena *a = self.enter()
        with nogil:
            rc = af_log_verify(a, slot)
        self.leave()
        check(rc, "verify")

    def reserve(self, uint32_t slot, uint64_t nbytes):
        cdef int64_t rc
        cdef af_arena *a = self.enter()
        with nogil:
            rc = af_reserve(a, slot, nbytes)
        self.leave()
        if rc < 0:
            fail(rc, "reserve")
        return rc

    def release(self, uint64_t reservation):
        check(af_release(self.ready(), reservation), "release")

    # -- transactions ----------------------------------------------------------------------------------
    def txn_begin(self):
        cdef int64_t rc = af_txn_begin(self.ready())
        if rc < 0:
            fail(rc, "txn_begin")
        return rc

    def txn_commit(self, uint64_t ref):
        check(af_txn_commit(self.ready(), ref), "txn_commit")

    def txn_finish(self, uint64_t ref, slots):
        self.txn_end(ref, slots, True)

    def txn_abort(self, uint64_t ref, slots):
        self.txn_end(ref, slots, False)

    cdef int txn_end(self, uint64_t ref, object slots, bint finish) except -1:
        cdef uint32_t n = len(slots)
        cdef uint32_t *numbers = <uint32_t *> PyMem_Malloc((n + 1) * sizeof(uint32_t))
        cdef af_arena *a = NULL
        cdef int rc = 0
        if numbers == NULL:
            raise MemoryError
        try:
            for i, slot in enumerate(slots):
                numbers[<size_t> i] = slot
            a = self.enter()
            if finish:
                with nogil:
                    rc = af_txn_finish(a, ref, numbers, n)
            else:
                with nogil:
                    rc = af_txn_abort(a, ref, numbers, n)
            self.leave()
        finally:
            PyMem_Free(numbers)
        return check(rc, "txn_finish" if finish else "txn_abort")

    def txn_state(self, uint64_t ref):
        return af_txn_state(self.ready(), ref)

    # -- cleaner ---------------------------------------------------------------------------------------
    def detach_next(self, uint64_t cutoff_ns, uint32_t cursor):
        cdef uint32_t next = 0
        cdef int64_t slot
        cdef af_arena *a = self.enter()
        with nogil:
            slot = af_detach_next(a, cutoff_ns, cursor, &next)
        self.leave()
        if slot < -1:
            fail(slot, "detach_next")
        return slot, next

    def detach(self, uint32_t slot, uint64_t cutoff_ns):
        cdef int rc = af_detach(self.ready(), slot, cutoff_ns)
        if rc < 0:
            fail(rc, "detach")
        return rc == 1

    def set_dumped(self, uint32_t slot):
        check(af_set_dumped(self.ready(), slot), "set_dumped")

    def reap(self, uint32_t slot):
        cdef int rc
        cdef af_arena *a = self.enter()
        with nogil:
            rc = af_reap(a, slot)
        self.leave()
        check(rc, "reap")

    def punch_idle(self, uint64_t max_granules, *, uint64_t idle_ns=60_000_000_000):
        cdef int64_t rc
        cdef af_arena *a = self.enter()
        with nogil:
            rc = af_punch_idle(a, idle_ns, max_granules)
        self.leave()
        if rc < 0:
            fail(rc, "punch_idle")
        return rc

    def prefault(self, uint64_t nbytes):
        cdef int64_t rc
        cdef af_arena *a = self.enter()
        with nogil:
            rc = af_prefault(a, nbytes)
        self.leave()
        if rc < 0:
            fail(rc, "prefault")
        return rc

    def outside_take(self, uint64_t nbytes):
        check(af_outside_take(self.ready(), nbytes), "outside_take")

    def outside_give(self, uint64_t nbytes):
        af_outside_give(self.ready(), nbytes)

    # -- shards ----------------------------------------------------------------------------------------
    def shard_put(self, bytes shard_id not None, meta not None, data, *, uint32_t bits=0, bint critical=False):
        cdef Spans m, d
        cdef int64_t rc
        cdef uint32_t options = AF_CRITICAL if critical else 0
        cdef const char *name = PyBytes_AS_STRING(shard_id)
        cdef uint32_t name_len = <uint32_t> PyBytes_GET_SIZE(shard_id)
        cdef af_arena *a = self.enter()
        try:
            spans_take(&m, (meta,))
            try:
                spans_take(&d, data)
                with nogil:
                    rc = af_shard_put(a, name, name_len, m.parts[0].base, <uint32_t> m.nbytes, d.parts, d.count,
                                      bits, options)
                spans_drop(&d)
            finally:
                spans_drop(&m)
        finally:
            self.leave()
        if rc < 0:
            fail(rc, "shard_put")
        return rc

    def shard_reserve(self, bytes shard_id not None, meta not None, uint64_t size, *, uint32_t bits=0,
                      bint critical=False):
        cdef Spans m
        cdef void *at = NULL
        cdef int64_t rc
        cdef uint32_t options = AF_CRITICAL if critical else 0
        cdef const char *name = PyBytes_AS_STRING(shard_id)
        cdef uint32_t name_len = <uint32_t> PyBytes_GET_SIZE(shard_id)
        cdef af_arena *a = self.enter()
        try:
            spans_take(&m, (meta,))
            with nogil:
                rc = af_shard_reserve(a, name, name_len, m.parts[0].base, <uint32_t> m.nbytes, size, bits, options, &at)
            spans_drop(&m)
        finally:
            self.leave()
        if rc < 0:
            fail(rc, "shard_reserve")
        return rc, open_window(self, <uint32_t> rc, at, size, True)

    def shard_publish(self, uint32_t slot):
        cdef af_arena *a = self.ready()
        if slot in self.filling:
            raise BadArgument("release the view of the shard before publishing it")
        check(af_shard_publish(a, slot), "shard_publish")

    def shard_succeed(self, uint32_t slot, uint32_t old):
        cdef af_arena *a = self.ready()
        if slot in self.filling:
            raise BadArgument("release the view of the shard before publishing it")
        check(af_shard_succeed(a, slot, old), "shard_succeed")

    def shard_abandon(self, uint32_t slot):
        cdef af_arena *a = self.ready()
        cdef _Window w = self.filling.get(slot)
        if w is not None:
            w.abandoned = True
        else:
            check(af_shard_abandon(a, slot), "shard_abandon")

    def pin_shard(self, bytes shard_id not None):
        cdef int64_t rc = af_pin_shard(
            self.ready(), PyBytes_AS_STRING(shard_id), <uint32_t> PyBytes_GET_SIZE(shard_id))
        return rc if rc >= 0 else absent(rc)

    def shard_view(self, uint32_t slot):
        cdef const void *meta = NULL
        cdef const void *data = NULL
        cdef uint32_t meta_len = 0, bits = 0
        cdef uint64_t data_len = 0
        cdef af_arena *a = self.ready()
        cdef int rc = af_pin_slot(a, slot)
        if rc != 1:
            fail(rc if rc < 0 else AF_EGONE, "shard_view")
        rc = af_shard_get(a, slot, &meta, &meta_len, &data, &data_len, &bits)
        if rc < 0:
            af_unpin(a, slot)
            fail(rc, "shard_view")
        head = PyBytes_FromStringAndSize(<const char *> meta, meta_len)
        return head, open_window(self, slot, data, data_len, False)

    def shard_clear_bit(self, uint32_t slot, uint32_t bit):
        cdef c_bool was = 0, none_left = 0
        check(af_shard_clear_bit(self.ready(), slot, bit, &was, &none_left), "shard_clear_bit")
        return was != 0, none_left != 0

    def shard_bit(self, uint32_t slot, uint32_t bit):
        cdef int rc = af_shard_bit(self.ready(), slot, bit)
        if rc < 0:
            fail(rc, "shard_bit")
        return rc == 1

    def shard_close(self, uint32_t slot):
        check(af_shard_close(self.ready(), slot), "shard_close")

    def expired_shards(self, uint64_t created_before_ns, uint32_t cursor, uint32_t max):
        return self.page(True, created_before_ns, cursor, max)

    # -- observation -----------------------------------------------------------------------------------
    def sessions(self, uint32_t cursor, uint32_t max):
        return self.page(False, 0, cursor, max)

    cdef object page(self, bint shards, uint64_t before, uint32_t cursor, uint32_t max):
        cdef uint32_t next = 0
        cdef uint32_t n = max if max < PAGE_SLOTS else PAGE_SLOTS
        cdef uint32_t *slots = <uint32_t *> PyMem_Malloc((n + 1) * sizeof(uint32_t))
        cdef int64_t rc, i
        cdef af_arena *a
        if slots == NULL:
            raise MemoryError
        try:
            a = self.enter()
            with nogil:
                if shards:
                    rc = af_expired_shards(a, before, cursor, slots, n, &next)
                else:
                    rc = af_sessions(a, cursor, slots, n, &next)
            self.leave()
            if rc < 0:
                fail(rc, "expired_shards" if shards else "sessions")
            return [slots[i] for i in range(rc)], next
        finally:
            PyMem_Free(slots)

    def stats(self):
        cdef af_stats_result r
        cdef af_arena *a = self.enter()
        memset(&r, 0, sizeof(r))
        with nogil:
            af_stats(a, &r)
        self.leave()
        return r

    def sessions_active(self):
        return af_sessions_active(self.ready())

    def consistency(self):
        cdef char why[512]
        cdef int rc
        cdef af_arena *a = self.enter()
        why[0] = 0
        with nogil:
            rc = af_check(a, why, sizeof(why))
        self.leave()
        return why.decode("utf-8", "replace") if rc < 0 else ""


_handles = weakref.WeakSet()


@cython.final
cdef class Histogram:
    cdef Arena arena
    cdef uint32_t first
    cdef uint32_t bounds
    cdef int64_t bound[MAX_BOUNDS]

    def __init__(self):
        raise TypeError("Arena.histogram makes one")

    def observe(self, int64_t value, uint32_t beside):
        cdef af_arena *a
        cdef uint32_t i = 0
        if self.arena is None:
            raise BadArgument("a histogram of no arena")
        a = self.arena.ready()
        while i < self.bounds and value > self.bound[i]:
            i += 1
        af_count(a, self.first + i, 1)
        af_count(a, self.first + self.bounds + 1, <uint64_t> value)
        af_count(a, self.first + self.bounds + 2 + beside, 1)


cdef Arena wrap(af_arena *a):
    cdef Arena self = Arena.__new__(Arena)
    self.a = self.handle = a
    self.proc = af_proc(a)
    self.filling = {}
    _handles.add(self)
    return self


def _disown_all():
    cdef Arena arena
    for arena in list(_handles):
        arena.disowned = True
        arena.a = NULL
    _handles.clear()


os.register_at_fork(after_in_child=_disown_all)


def common_prefix(bytes a not None, bytes b not None):
    cdef const char *x = PyBytes_AS_STRING(a)
    cdef const char *y = PyBytes_AS_STRING(b)
    cdef Py_ssize_t n = min(PyBytes_GET_SIZE(a), PyBytes_GET_SIZE(b))
    cdef Py_ssize_t i = 0
    while i + 256 <= n and memcmp(x + i, y + i, 256) == 0:
        i += 256
    while i < n and x[i] == y[i]:
        i += 1
    return i


def crash_points():
    cdef uint32_t i
    return [af_crash_name(i).decode() for i in range(af_crash_count())]


def crash_arm(str name not None, uint64_t nth):
    check(af_crash_arm(name.encode(), nth), "crash_arm")


def fault_arm(uint64_t nth):
    check(af_fault_arm(nth), "fault_arm")
