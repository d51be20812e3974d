"""The fold's memory, for the store's native part. Contracts stand in _fold.pyi, the theory in _fold.pyx."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef enum:
    WORDS = 1      # a STRING record: no tokens; `prompt_len` is the size of its messages, in bytes
    LATE = 2       # came when its trajectory was gone
    REWARDED = 4   # `reward` means something

cdef struct Head:  # as an INTERACTION's meta begins (records.py), little-endian
    uint32_t ordinal
    uint32_t trajectory
    uint32_t ref
    uint32_t shared
    uint32_t prompt_len
    uint32_t output_len
    uint32_t parent
    uint16_t runs
    uint8_t id_len
    uint8_t stop_len
    uint8_t messages_len
    uint8_t routed_len
    uint16_t body_len

cdef struct Item:  # one interaction
    uint64_t offset
    uint64_t nbytes
    double reward
    Head head
    uint32_t seq
    uint32_t text_at   # what follows the head in the meta, in Folded.text
    uint32_t text_len
    uint8_t fate
    uint8_t flags

cdef struct Closed:  # a ready trajectory
    uint64_t courier
    int64_t reward_ordinal
    uint32_t index

cdef class Interaction:
    cdef readonly uint32_t ordinal, trajectory, seq, messages_size
    cdef readonly uint64_t offset, nbytes
    cdef readonly str interaction_id
    cdef readonly object meta, reward
    cdef readonly int fate

cdef class Folded:
    cdef public uint64_t head
    cdef public int64_t live_bytes, dead_bytes
    cdef readonly uint64_t deadline_ns
    cdef readonly int64_t reward_ordinal
    cdef readonly int64_t newest       # ordinal, of the active trajectory; -1
    cdef readonly uint32_t active_index, active_count, seq
    cdef uint32_t count, room, text_used, text_room, closed_count
    cdef Item *items
    cdef uint64_t *asked
    cdef char *text
    cdef Closed *closed
    cdef public object member, pending, exports, lost, dump_names, by_prefix
    cdef dict kept_rewards, kept_fates
    cdef Py_ssize_t charged            # these three are the cache's
    cdef int64_t older, newer

    cdef int make_room(self, Py_ssize_t text) except -1
    cdef Py_ssize_t at(self, uint32_t ordinal) noexcept
    cdef bint is_of(self, Item *item, uint32_t trajectory) noexcept
    cdef Item *add(self, const char *meta, Py_ssize_t size, uint64_t offset, uint64_t nbytes) except NULL
    cdef int take_reward(self, const char *meta, Py_ssize_t size) except -1
    cdef int take_sent(self, const char *meta, Py_ssize_t size) except -1
    cdef int close_active(self, uint64_t courier) except -1
    cdef Py_ssize_t ready_at(self, uint32_t index) noexcept
    cdef Py_ssize_t last_two(self, uint32_t trajectory, Py_ssize_t *two) noexcept
    cdef Py_ssize_t weight(self) noexcept
    cdef str id_of(self, Item *item)
    cdef bytes pack(self, Head *head, version_runs, const char *iid, str stop, bytes messages_hash, bytes body_hash,
                    routed, bytes extra)

    cdef int add_words(self, const char *meta, Py_ssize_t size, uint64_t offset, uint64_t nbytes) except -1
    cdef Item *put(self, Head *head, const char *text, Py_ssize_t size, uint64_t offset, uint64_t nbytes,
                   uint8_t flags) except NULL
    cdef int take_ready(self, const char *meta, Py_ssize_t size) except -1
    cdef int room_to_close(self) except -1
    cdef const char *body_hash(self, Item *item) noexcept
    cdef bint may_have_twin(self, bytes body, bytes key) noexcept
    cdef bytes messages_hash(self, Item *item)
    cdef int put_prefix(self, Item *item) except -1
    cdef Interaction view(self, Item *item)
    cdef object meta_of(self, Item *item, str interaction_id)
