# cython: boundscheck=False, wraparound=False, nonecheck=True, auto_pickle=False, autotestdict=False
"""A session's fold in memory, and the steps of it that every turn takes.

Job: keep what a session's records say in as few bytes as can be, and apply the records that turns and rewards append.
The rules, and the records that few sessions have (exports, checkpoints, dump names), are SessionState's, which is a
Folded: protocol/sessions.py. Contracts stand in _fold.pyi.

Theory. One array of interactions in the order their records came, whatever trajectory they belong to; of each what its
meta says, as it says it (`Head` is the meta's own beginning, `text` holds the rest of all of them), and what later
records said of it. A second array, `asked`, has the first eight bytes of each one's body fingerprint, so that looking
for a twin reads eight bytes an interaction. Python objects of interactions are made when somebody asks for them.

Invariants: `items[:count]` have rising `seq`. An interaction is of the active trajectory if its index is `active_index`
and it is not LATE; of a ready one likewise. `active_count` and `newest` are of the active ones. Memory is made before
anything is changed: what fails with MemoryError or ValueError has changed nothing.
"""

from areal_fast.protocol import records, retries

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove

cdef extern from *:
    """
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "records are little-endian, and are read as they lie"
    #endif
    """

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef enum:
    HEAD_BYTES = 36         # sizeof(Head)
    RECORD_HEADER_BYTES = 64
    FINGERPRINT = 16        # of a body, and of a key
    BODY_HASH = 24          # of a body without a key: fingerprint, process
    OBJECT_BYTES = 320      # a Folded, and its place in the cache
    ENTRY_BYTES = 140       # an entry of by_prefix, or of what a checkpoint said
    INTERACTION = 2
    REWARD = 3
    READY = 4
    STRING = 7
    SENT = 10

cdef struct RewardMeta:
    uint32_t trajectory
    uint32_t ordinal
    double value
    uint64_t deadline_ns
    uint64_t courier

cdef struct StringMeta:
    uint32_t ordinal
    uint32_t trajectory
    uint32_t messages_size
    uint16_t id_len

cdef uint32_t NO_REF = records.NO_REF
cdef uint64_t NO_COURIER = records.NO_COURIER
cdef int UNKNOWN = retries.UNKNOWN, LOST = retries.LOST
cdef object InteractionMeta = records.InteractionMeta
cdef object Routed = records.Routed
cdef tuple NOTHING = ()

assert sizeof(Head) == HEAD_BYTES and sizeof(RewardMeta) == 32
assert (records.INTERACTION, records.REWARD, records.READY, records.STRING, records.SENT) == (
    INTERACTION, REWARD, READY, STRING, SENT)


@cython.final
@cython.no_gc
cdef class Interaction:
    """See _fold.pyi."""


@cython.no_gc
cdef class Folded:
    """See _fold.pyi. Holds no cycles: the collector need not look."""

    def __cinit__(self):
        self.member = -1
        self.pending = self.exports = NOTHING
        self.newest = self.reward_ordinal = -1
        self.older = self.newer = -1

    def __dealloc__(self):
        PyMem_Free(self.items)
        PyMem_Free(self.asked)
        PyMem_Free(self.text)
        PyMem_Free(self.closed)

    def begin_anew(self, uint32_t active=0, int64_t reward_ordinal=-1, uint64_t deadline_ns=0, ready=(),
                   dict rewards=None, dict fates=None):
        cdef Closed *closed = <Closed *> PyMem_Realloc(NULL, (len(ready) + 1) * sizeof(Closed))
        cdef uint32_t n = 0
        if closed == NULL:
            raise MemoryError
        try:
            for index, ordinal, courier in ready:
                closed[n].index, closed[n].reward_ordinal, closed[n].courier = index, ordinal, courier
                n += 1
        except BaseException:
            PyMem_Free(closed)
            raise
        PyMem_Free(self.closed)
        self.closed, self.closed_count = closed, n
        self.active_index, self.reward_ordinal, self.deadline_ns = active, reward_ordinal, deadline_ns
        self.active_count, self.newest = 0, -1
        self.count, self.text_used, self.seq = 0, 0, 0
        self.by_prefix = None
        self.kept_rewards = rewards or None
        self.kept_fates = fates or None

    # -- memory ----------------------------------------------------------------------------------------
    cdef int make_room(self, Py_ssize_t text) except -1:
        """For one interaction more, with so much text."""
        cdef uint32_t room
        cdef uint64_t need = <uint64_t> self.text_used + <uint64_t> text
        cdef void *grown
        if self.count == self.room:
            room = self.room + (self.room >> 1) if self.room >= 8 else self.room + 2
            grown = PyMem_Realloc(self.items, room * sizeof(Item))
            if grown == NULL:
                raise MemoryError
            self.items = <Item *> grown
            grown = PyMem_Realloc(self.asked, room * sizeof(uint64_t))
            if grown == NULL:
                raise MemoryError
            self.asked = <uint64_t *> grown
            self.room = room
        if need > self.text_room:
            need = (need + (need >> 3) + 63) & ~(<uint64_t> 63)
            if need > 0xFFFFFFFF:
                raise MemoryError
            grown = PyMem_Realloc(self.text, <size_t> need)
            if grown == NULL:
                raise MemoryError
            self.text, self.text_room = <char *> grown, <uint32_t> need
        return 0

    cdef Py_ssize_t weight(self) noexcept:
        cdef Py_ssize_t n = OBJECT_BYTES + self.room * (sizeof(Item) + sizeof(uint64_t)) + self.text_room
        n += self.closed_count * sizeof(Closed)
        if self.by_prefix is not None:
            n += ENTRY_BYTES * self.active_count
        if self.lost is not None or self.pending or self.exports or self.dump_names is not None:
            n += 8 * ENTRY_BYTES
        return n

    @property
    def size_bytes(self):
        return self.weight()

    # -- fold ------------------------------------------------------------------------------------------
    def apply(self, list taken not None):
        cdef bytes meta
        cdef const char *at
        cdef Py_ssize_t size
        cdef uint64_t nbytes
        cdef int kind
        for record in taken:
            kind, meta = record[1], record[5]
            at, size = PyBytes_AS_STRING(meta), PyBytes_GET_SIZE(meta)
            nbytes = RECORD_HEADER_BYTES + <uint64_t> size + <uint64_t> record[6]
            if kind == INTERACTION:
                self.add(at, size, record[0], nbytes)
            elif kind == STRING:
                self.add_words(at, size, record[0], nbytes)
            else:
                self.dead_bytes += nbytes
                if kind == SENT:
                    self.take_sent(at, size)
                elif kind == REWARD:
                    self.take_reward(at, size)
                elif kind == READY:
                    self.take_ready(at, size)
                else:
                    self.apply_rare(record)

    def apply_rare(self, record):
        raise NotImplementedError

    cdef Item *add(self, const char *meta, Py_ssize_t size, uint64_t offset, uint64_t nbytes) except NULL:
        """The INTERACTION with this meta. `nbytes`: of all of the record."""
        cdef Item *item
        cdef Head head
        cdef Py_ssize_t before
        if size < HEAD_BYTES:
            raise ValueError("the meta of an interaction is cut short")
        memcpy(&head, meta, HEAD_BYTES)
        before = 12 * head.runs + head.id_len + head.stop_len + head.messages_len
        if before + head.body_len + head.routed_len > size - HEAD_BYTES:
            raise ValueError("the meta of an interaction is cut short")
        item = self.put(&head, meta + HEAD_BYTES, size - HEAD_BYTES, offset, nbytes, 0)
        if head.body_len >= BODY_HASH:
            memcpy(&self.asked[self.count - 1], meta + HEAD_BYTES + before, 8)
        if self.by_prefix is not None and head.messages_len and self.is_of(item, self.active_index):
            self.put_prefix(item)
        return item

    cdef int add_words(self, const char *meta, Py_ssize_t size, uint64_t offset, uint64_t nbytes) except -1:
        cdef StringMeta words
        cdef Head head
        if size < 14:
            raise ValueError("the meta of a string interaction is cut short")
        memcpy(&words, meta, 14)
        if words.id_len > 255 or 14 + words.id_len > size:
            raise ValueError("the meta of a string interaction is cut short")
        head.ordinal, head.trajectory, head.prompt_len = words.ordinal, words.trajectory, words.messages_size
        head.ref = head.parent = NO_REF
        head.shared = head.output_len = 0
        head.id_len = <uint8_t> words.id_len
        head.runs = head.stop_len = head.messages_len = head.routed_len = head.body_len = 0
        self.put(&head, meta + 14, words.id_len, offset, nbytes, WORDS)
        return 0

    cdef Item *put(self, Head *head, const char *text, Py_ssize_t size, uint64_t offset, uint64_t nbytes,
                   uint8_t flags) except NULL:
        cdef Item *item
        cdef uint32_t index = head.trajectory
        self.make_room(size)
        item = self.items + self.count
        item.offset, item.nbytes, item.head = offset, nbytes, head[0]
        item.seq, item.text_at, item.text_len = self.seq, self.text_used, <uint32_t> size
        item.fate, item.reward, item.flags = <uint8_t> UNKNOWN, 0.0, flags
        if self.kept_rewards is not None:
            kept = self.kept_rewards.pop(head.ordinal, None)
            if kept is not None:
                item.reward = kept
                item.flags |= REWARDED
        if self.kept_fates is not None:
            item.fate = self.kept_fates.pop(head.ordinal, UNKNOWN)
        memcpy(self.text + self.text_used, text, <size_t> size)
        self.asked[self.count] = 0
        self.text_used += <uint32_t> size
        self.count += 1
        self.seq += 1
        self.live_bytes += nbytes
        if index == self.active_index:
            self.active_count += 1
            if head.ordinal > self.newest:
                self.newest = head.ordinal
        elif self.ready_at(index) < 0:
            item.flags |= LATE
        return item

    cdef int take_reward(self, const char *meta, Py_ssize_t size) except -1:
        """As the REWARD with this meta says."""
        cdef RewardMeta said
        cdef Py_ssize_t i
        if size != sizeof(RewardMeta):
            raise ValueError("the meta of a reward has another size")
        memcpy(&said, meta, sizeof(RewardMeta))
        i = self.at(said.ordinal)
        if said.trajectory != self.active_index or i < 0 or not self.is_of(self.items + i, said.trajectory):
            return 0
        if said.deadline_ns == 0:
            self.room_to_close()
        self.items[i].reward = said.value
        self.items[i].flags |= REWARDED
        self.reward_ordinal, self.deadline_ns = said.ordinal, said.deadline_ns
        if said.deadline_ns == 0:
            self.close_active(said.courier)
        return 0

    cdef int take_ready(self, const char *meta, Py_ssize_t size) except -1:
        cdef uint32_t index
        cdef uint64_t courier
        if size != 12:
            raise ValueError("the meta of a ready record has another size")
        memcpy(&index, meta, 4)
        memcpy(&courier, meta + 4, 8)
        if index == self.active_index:
            self.close_active(courier)
        return 0

    cdef int take_sent(self, const char *meta, Py_ssize_t size) except -1:
        """As the SENT with this meta says."""
        cdef uint32_t index, ordinal
        cdef Py_ssize_t i
        if size != 9:
            raise ValueError("the meta of a note has another size")
        memcpy(&index, meta, 4)
        memcpy(&ordinal, meta + 4, 4)
        i = self.at(ordinal)
        if i >= 0 and self.items[i].head.trajectory == index:  # late or not: when it became so is not in the log
            self.items[i].fate = <uint8_t> meta[8]
        return 0

    cdef int room_to_close(self) except -1:
        cdef void *grown = PyMem_Realloc(self.closed, (self.closed_count + 1) * sizeof(Closed))
        if grown == NULL:
            raise MemoryError
        self.closed = <Closed *> grown
        return 0

    cdef int close_active(self, uint64_t courier) except -1:
        """The active trajectory is ready, the next one active."""
        cdef Closed *closed
        self.room_to_close()
        closed = self.closed + self.closed_count
        closed.index, closed.reward_ordinal, closed.courier = self.active_index, self.reward_ordinal, courier
        self.closed_count += 1
        self.active_index += 1
        self.active_count, self.newest, self.reward_ordinal, self.deadline_ns = 0, -1, -1, 0
        self.by_prefix = None
        return 0

    def append_reward(self, uint64_t head, bytes meta not None):
        self.take_reward(PyBytes_AS_STRING(meta), PyBytes_GET_SIZE(meta))
        self.dead_bytes += RECORD_HEADER_BYTES + PyBytes_GET_SIZE(meta)
        self.head = head

    def set_courier(self, uint32_t index, uint64_t courier):
        cdef Py_ssize_t i = self.ready_at(index)
        if i >= 0:
            self.closed[i].courier = courier

    def exported(self, uint32_t index, uint32_t before):
        cdef Py_ssize_t r = self.ready_at(index)
        cdef uint32_t i, kept = 0, used = 0
        cdef Item *item
        if r < 0:
            return
        for i in range(self.count):
            item = self.items + i
            if self.is_of(item, index):
                if item.seq < before:
                    self.live_bytes -= item.nbytes
                    self.dead_bytes += item.nbytes
                    continue
                item.flags = (item.flags & ~REWARDED) | LATE
            memmove(self.text + used, self.text + item.text_at, item.text_len)
            item.text_at = used
            used += item.text_len
            self.items[kept] = item[0]
            self.asked[kept] = self.asked[i]
            kept += 1
        self.count, self.text_used = kept, used
        memmove(self.closed + r, self.closed + r + 1, (self.closed_count - r - 1) * sizeof(Closed))
        self.closed_count -= 1

    # -- questions -------------------------------------------------------------------------------------
    cdef Py_ssize_t at(self, uint32_t ordinal) noexcept:
        """Where this one is, or -1. Ordinals come nearly in order, so it is looked for from where it would be if
        they did."""
        cdef Py_ssize_t guess, step, n = self.count
        if n == 0:
            return -1
        guess = <Py_ssize_t> ordinal - <Py_ssize_t> self.items[0].head.ordinal
        guess = 0 if guess < 0 else n - 1 if guess >= n else guess
        for step in range(n):
            if guess - step >= 0 and self.items[guess - step].head.ordinal == ordinal:
                return guess - step
            if guess + step < n and self.items[guess + step].head.ordinal == ordinal:
                return guess + step
        return -1

    cdef bint is_of(self, Item *item, uint32_t trajectory) noexcept:
        return item.head.trajectory == trajectory and not item.flags & LATE

    cdef Py_ssize_t ready_at(self, uint32_t index) noexcept:
        cdef uint32_t i
        for i in range(self.closed_count):
            if self.closed[i].index == index:
                return i
        return -1

    cdef Py_ssize_t last_two(self, uint32_t trajectory, Py_ssize_t *two) noexcept:
        """Where the last two of the trajectory are, newest first; how many there are."""
        cdef Py_ssize_t i = self.count, n = 0
        while i > 0 and n < 2:
            i -= 1
            if self.is_of(self.items + i, trajectory):
                two[n] = i
                n += 1
        return n

    @property
    def ready_count(self):
        return self.closed_count

    def interaction_count(self):
        return self.count

    @property
    def has_ready(self):
        return self.closed_count != 0

    @property
    def is_empty(self):
        return self.count == 0 and self.closed_count == 0

    @property
    def has_untold(self):
        cdef uint32_t i
        for i in range(self.closed_count):
            if self.closed[i].courier != NO_COURIER:
                return True
        return False

    def is_due(self, uint64_t now_ns):
        return self.deadline_ns != 0 and now_ns >= self.deadline_ns

    def ready_all(self):
        cdef uint32_t i
        return [(self.closed[i].index, self.closed[i].reward_ordinal, self.closed[i].courier)
                for i in range(self.closed_count)]

    def ordinals(self, uint32_t index):
        cdef uint32_t i
        return sorted([self.items[i].head.ordinal for i in range(self.count) if self.is_of(self.items + i, index)])

    def offsets(self):
        cdef uint32_t i
        return [self.items[i].offset for i in range(self.count)]

    def named(self, str interaction_id not None):
        cdef Py_ssize_t size = 0
        cdef const char *name
        cdef Item *item
        cdef uint32_t i
        try:
            name = PyUnicode_AsUTF8AndSize(interaction_id, &size)
        except UnicodeEncodeError:  # lone surrogates: no id of ours
            return -1
        for i in range(self.count):
            item = self.items + i
            if item.head.id_len == size and self.is_of(item, self.active_index) and memcmp(
                    self.text + item.text_at + 12 * item.head.runs, name, size) == 0:
                return item.head.ordinal
        return -1

    def twin_of(self, bytes body not None, bytes key not None, lives):
        cdef uint64_t wanted
        cdef uint32_t i
        cdef Py_ssize_t key_len = PyBytes_GET_SIZE(key)
        cdef const char *has
        cdef uint64_t process
        cdef uint32_t ordinal
        cdef Item *item
        if key_len:
            for i in range(self.count):
                item = self.items + i
                if item.head.body_len == BODY_HASH + key_len and self.is_of(item, self.active_index) and memcmp(
                        self.body_hash(item) + BODY_HASH, PyBytes_AS_STRING(key), key_len) == 0:
                    return item.head.ordinal
        if PyBytes_GET_SIZE(body) != FINGERPRINT:
            return -1
        memcpy(&wanted, PyBytes_AS_STRING(body), 8)
        for i in range(self.count):
            if self.asked[i] != wanted:
                continue
            item = self.items + i
            if item.head.body_len != BODY_HASH + key_len or not self.is_of(item, self.active_index):
                continue
            has = self.body_hash(item)
            if memcmp(has, PyBytes_AS_STRING(body), FINGERPRINT) != 0 or (
                    key_len and memcmp(has + BODY_HASH, PyBytes_AS_STRING(key), key_len) != 0):
                continue
            memcpy(&process, has + FINGERPRINT, 8)
            ordinal = item.head.ordinal  # `lives` is not ours: nothing is held over it
            if item.fate == LOST or (item.fate == UNKNOWN and not lives(process)):
                return ordinal
        return -1

    cdef bint may_have_twin(self, bytes body, bytes key) noexcept:
        """False: `twin_of` would find none. Nearly always so, and said by eight bytes an interaction."""
        cdef uint64_t wanted
        cdef uint32_t i
        if PyBytes_GET_SIZE(key) or PyBytes_GET_SIZE(body) != FINGERPRINT:
            return PyBytes_GET_SIZE(key) != 0
        memcpy(&wanted, PyBytes_AS_STRING(body), 8)
        for i in range(self.count):
            if self.asked[i] == wanted:
                return True
        return False

    cdef const char *body_hash(self, Item *item) noexcept:
        return (self.text + item.text_at + 12 * item.head.runs + item.head.id_len + item.head.stop_len
                + item.head.messages_len)

    def parent_of(self, uint32_t index, prefixes):
        cdef dict found
        cdef uint32_t i
        if index == self.active_index:
            if self.by_prefix is None:
                self.by_prefix = {}
                for i in range(self.count):
                    if self.is_of(self.items + i, index):
                        self.put_prefix(self.items + i)
            known = self.by_prefix
        else:
            found = {}
            for i in range(self.count):
                if self.is_of(self.items + i, index):
                    note_prefix(found, self.messages_hash(self.items + i), self.items[i].head.ordinal)
            known = found
        if known:
            for prefix in reversed(prefixes):
                ordinal = known.get(prefix)
                if ordinal is not None:
                    return ordinal
        return -1

    cdef int put_prefix(self, Item *item) except -1:
        note_prefix(self.by_prefix, self.messages_hash(item), item.head.ordinal)
        return 0

    cdef bytes messages_hash(self, Item *item):
        return PyBytes_FromStringAndSize(
            self.text + item.text_at + 12 * item.head.runs + item.head.id_len + item.head.stop_len,
            item.head.messages_len)

    def routed(self):
        cdef uint32_t i
        found = set()
        for i in range(self.count):
            if self.items[i].head.routed_len:
                found.add(self.view(self.items + i).meta.routed.name)
        return found

    # -- views -----------------------------------------------------------------------------------------
    def interaction(self, uint32_t ordinal):
        cdef Py_ssize_t i = self.at(ordinal)
        return None if i < 0 else self.view(self.items + i)

    def interactions(self, uint32_t index):
        cdef uint32_t i
        cdef dict found = {}
        for i in range(self.count):
            if self.is_of(self.items + i, index):
                found[self.items[i].head.ordinal] = self.view(self.items + i)
        return found

    def all_interactions(self):
        cdef uint32_t i
        return [self.view(self.items + i) for i in range(self.count)]

    @property
    def late(self):
        cdef uint32_t i
        cdef dict found = {}
        for i in range(self.count):
            if self.items[i].flags & LATE:
                found[self.items[i].head.ordinal] = self.view(self.items + i)
        return found

    cdef str id_of(self, Item *item):
        return PyUnicode_DecodeUTF8(self.text + item.text_at + 12 * item.head.runs, item.head.id_len, NULL)

    cdef Interaction view(self, Item *item):
        cdef Interaction made = Interaction.__new__(Interaction)
        made.ordinal, made.trajectory, made.seq = item.head.ordinal, item.head.trajectory, item.seq
        made.offset, made.nbytes, made.fate = item.offset, item.nbytes, item.fate
        made.reward = item.reward if item.flags & REWARDED else None
        made.interaction_id = self.id_of(item)
        if item.flags & WORDS:
            made.messages_size = item.head.prompt_len
        else:
            made.meta = self.meta_of(item, made.interaction_id)
        return made

    cdef object meta_of(self, Item *item, str interaction_id):
        cdef const char *at = self.text + item.text_at
        cdef const char *end = at + item.text_len
        cdef Head *head = &item.head
        cdef uint32_t i, width, covers
        cdef int64_t version
        cdef list runs = []
        for i in range(head.runs):
            memcpy(&version, at, 8)
            memcpy(&covers, at + 8, 4)
            runs.append((version, covers))
            at += 12
        at += head.id_len
        stop = PyUnicode_DecodeUTF8(at, head.stop_len, NULL)
        at += head.stop_len
        messages_hash = PyBytes_FromStringAndSize(at, head.messages_len)
        at += head.messages_len
        body_hash = PyBytes_FromStringAndSize(at, head.body_len)
        at += head.body_len
        routed = None
        if head.routed_len:
            memcpy(&width, at, 4)
            routed = Routed(PyBytes_FromStringAndSize(at + 4, head.routed_len - 4), width)
            at += head.routed_len
        return InteractionMeta(
            head.ordinal, head.trajectory, head.ref, head.shared, head.prompt_len, head.output_len, interaction_id,
            stop, tuple(runs), messages_hash, body_hash, PyBytes_FromStringAndSize(at, end - at), head.parent, routed)

    # -- packing ---------------------------------------------------------------------------------------
    cdef bytes pack(self, Head *head, version_runs, const char *iid, str stop, bytes messages_hash, bytes body_hash,
                    routed, bytes extra):
        """The meta of an INTERACTION (records.py). `head`: its numbers and id_len, the other lengths are set here.
        ValueError: the runs do not cover exactly the output, or something is too long for its field."""
        cdef Py_ssize_t stop_len = 0, size
        cdef const char *stop_at = PyUnicode_AsUTF8AndSize(stop, &stop_len)
        cdef bytes named = b"" if routed is None else (<uint32_t> routed[1]).to_bytes(4, "little") + routed[0]
        cdef list runs = merged(version_runs, head.output_len)
        cdef bytes out
        cdef char *to
        cdef int64_t version
        cdef uint32_t covers
        if (len(runs) > 0xFFFF or stop_len > 255 or len(messages_hash) > 255 or len(named) > 255
                or len(body_hash) > 0xFFFF):
            raise ValueError("too long for an interaction's record")
        head.runs, head.stop_len = <uint16_t> len(runs), <uint8_t> stop_len
        head.messages_len, head.routed_len = <uint8_t> len(messages_hash), <uint8_t> len(named)
        head.body_len = <uint16_t> len(body_hash)
        size = HEAD_BYTES + 12 * len(runs) + head.id_len + stop_len
        out = PyBytes_FromStringAndSize(
            NULL, size + len(messages_hash) + len(body_hash) + len(named) + len(extra))
        to = PyBytes_AS_STRING(out)
        memcpy(to, head, HEAD_BYTES)
        to += HEAD_BYTES
        for version, covers in runs:
            memcpy(to, &version, 8)
            memcpy(to + 8, &covers, 4)
            to += 12
        memcpy(to, iid, head.id_len)
        to += head.id_len
        memcpy(to, stop_at, <size_t> stop_len)
        to = put_bytes(to + stop_len, messages_hash)
        to = put_bytes(to, body_hash)
        to = put_bytes(to, named)
        put_bytes(to, extra)
        return out


cdef int note_prefix(known, bytes messages_hash, uint32_t ordinal) except -1:
    """The first interaction with a hash is the one that counts."""
    if messages_hash:
        before = known.get(messages_hash)
        if before is None or ordinal < before:
            known[messages_hash] = ordinal
    return 0


cdef char *put_bytes(char *to, bytes what) noexcept:
    memcpy(to, PyBytes_AS_STRING(what), <size_t> PyBytes_GET_SIZE(what))
    return to + PyBytes_GET_SIZE(what)


cdef list merged(version_runs, uint32_t output_len):
    """(version, count) without empty runs, neighbours of one version joined."""
    cdef list out = []
    cdef int64_t version, last = 0
    cdef Py_ssize_t covers, before = 0, covered = 0
    for version, covers in version_runs:
        if covers <= 0:
            continue
        covered += covers
        if out and last == version:
            before += covers
            out[len(out) - 1] = (version, before)
        else:
            last, before = version, covers
            out.append((version, covers))
    if covered != <Py_ssize_t> output_len:
        raise ValueError("log-probs and version runs must cover exactly the output")
    return out
