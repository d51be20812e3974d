# What the edge uses of csrc/arealfast.h, word for word. Contracts are there.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "arealfast.h" nogil:
    ctypedef struct af_arena:
        pass
    ctypedef unsigned char c_bool "bool"

    enum:
        AF_LAYOUT_VERSION
        AF_MAX_PROCS
        AF_PROC_KEEPER
        AF_PROC_CLEANER
        AF_PROC_SUPERVISOR
        AF_WORDS
        AF_COUNTERS
        AF_TASK_MAX
        AF_KEY_MAX
        AF_ID_MAX
        AF_OK
        AF_ENOSPC
        AF_EBUSY
        AF_EEXIST
        AF_EMOVED
        AF_EGONE
        AF_ETRIMMED
        AF_ELAYOUT
        AF_EINVAL
        AF_ENOENT
        AF_ECORRUPT
        AF_ESYS
        AF_KIND_SESSION
        AF_KIND_SHARD
        AF_STATE_FREE
        AF_STATE_INIT
        AF_STATE_ACTIVE
        AF_STATE_CLOSING
        AF_STATE_DETACHED
        AF_STATE_DUMPED
        AF_REC_CHECKPOINT
        AF_REC_EXPORTING
        AF_REC_FLAG_REMOVE
        AF_OUTCOME_PENDING
        AF_OUTCOME_COMMITTED
        AF_OUTCOME_ABORTED
        AF_CRITICAL
        AF_TXN_GONE
        AF_TXN_OPEN
        AF_TXN_COMMITTED
    uint64_t AF_LOG_ANY

    const char *af_strerror(int code)

    int af_create(uint64_t max_bytes, uint32_t session_slots, uint32_t shard_slots, uint32_t proc, af_arena **out)
    int af_attach(int fd, uint32_t proc, af_arena **out)
    void af_close(af_arena *a)
    int af_fileno(const af_arena *a)
    uint32_t af_proc(const af_arena *a)
    uint32_t af_session_slots(const af_arena *a)
    uint32_t af_shard_slots(const af_arena *a)
    uint64_t af_now_ns()
    int64_t af_prefault(af_arena *a, uint64_t nbytes)
    int af_outside_take(af_arena *a, uint64_t nbytes)
    void af_outside_give(af_arena *a, uint64_t nbytes)

    int64_t af_proc_enter(af_arena *a, int64_t pid)
    void af_proc_leave(af_arena *a)
    void af_heartbeat(af_arena *a)
    int af_proc_info(af_arena *a, uint32_t proc, int64_t *pid, uint64_t *incarnation, uint64_t *ticks)
    int af_lock_owner(af_arena *a)
    ctypedef struct af_sweep_result:
        uint64_t pins
        uint64_t freed
        uint64_t committed
        uint64_t inits
        uint64_t txns_aborted
        uint64_t txns_finished
        uint64_t reaped
        uint64_t detached
    int af_sweep(af_arena *a, uint32_t proc, af_sweep_result *out)
    int64_t af_owned_slots(af_arena *a, uint32_t state, uint32_t proc, uint32_t cursor, uint32_t *slots,
                           uint32_t max, uint32_t *next)

    int af_word_get(af_arena *a, uint32_t i, int64_t *out)
    int af_word_set(af_arena *a, uint32_t i, int64_t v)
    int af_word_add(af_arena *a, uint32_t i, int64_t v, int64_t *out)
    int af_word_cas(af_arena *a, uint32_t i, int64_t old, int64_t want)
    void af_count(af_arena *a, uint32_t counter, uint64_t delta)
    void af_counters(af_arena *a, uint64_t *out)

    ctypedef struct af_started:
        uint32_t slot
        uint32_t id_len
        char *id
    int af_session_start(af_arena *a, const char *task, uint32_t task_len, const char *key, uint32_t key_len,
                         uint64_t txn, int64_t rebind_from, af_started *out)
    int64_t af_session_open_named(af_arena *a, const char *id, uint32_t len)
    int64_t af_pin_id(af_arena *a, const char *id, uint32_t len)
    int64_t af_pin_key(af_arena *a, const char *key, uint32_t len)
    int af_pin_slot(af_arena *a, uint32_t slot)
    void af_unpin(af_arena *a, uint32_t slot)
    uint32_t af_pin_count(af_arena *a, uint32_t slot)
    void af_touch(af_arena *a, uint32_t slot)
    ctypedef struct af_slot_info:
        uint32_t state
        uint32_t owner
        uint32_t seq
        uint32_t pins
        uint32_t kind
        uint32_t id_len
        uint32_t key_len
        uint64_t created_ns
        uint64_t touched_ns
        uint64_t nbytes
        uint64_t ordinal
        uint64_t head
        uint64_t txn
        int64_t deadline_ns
        char *id
        char *key
    int af_slot_get(af_arena *a, uint32_t slot, af_slot_info *out)
    int64_t af_next_ordinal(af_arena *a, uint32_t slot)
    int64_t af_deadline_get(af_arena *a, uint32_t slot)
    int af_deadline_set(af_arena *a, uint32_t slot, int64_t ns)
    int af_session_close(af_arena *a, uint32_t slot)
    int64_t af_sessions(af_arena *a, uint32_t cursor, uint32_t *slots, uint32_t max, uint32_t *next)

    ctypedef struct af_span:
        const void *base
        size_t len
    ctypedef struct af_new_record:
        uint16_t type
        uint16_t flags
        uint64_t aux
        const void *meta
        uint32_t meta_len
        const af_span *data
        uint32_t data_parts
    ctypedef struct af_record:
        uint64_t offset
        uint64_t aux
        uint64_t data_len
        size_t meta_at
        uint32_t meta_len
        uint32_t outcome
        uint16_t type
        uint16_t flags
    ctypedef struct af_log_view:
        uint64_t head
        c_bool cut
        size_t count
        af_record *records
        uint8_t *meta
    uint64_t af_log_head(af_arena *a, uint32_t slot)
    int af_log_append(af_arena *a, uint32_t slot, const af_new_record *rec, uint64_t expect, uint32_t options,
                      uint64_t reservation, uint64_t *head)
    int af_log_read(af_arena *a, uint32_t slot, uint64_t since, af_log_view *view)
    void af_log_view_free(af_log_view *view)
    int af_record_data(af_arena *a, uint32_t slot, uint64_t head, uint64_t offset, uint64_t start,
                       uint64_t length, void *out)
    int af_record_data_len(af_arena *a, uint32_t slot, uint64_t head, uint64_t offset, uint64_t *len)
    int af_record_outcome(af_arena *a, uint32_t slot, uint64_t head, uint64_t offset)
    int af_log_compact(af_arena *a, uint32_t slot, uint64_t expect, const void *checkpoint,
                       uint32_t checkpoint_len, const uint64_t *keep, uint32_t keep_count, uint64_t *head)
    int af_log_verify(af_arena *a, uint32_t slot)
    int64_t af_reserve(af_arena *a, uint32_t slot, uint64_t nbytes)
    int af_release(af_arena *a, uint64_t reservation)

    int64_t af_txn_begin(af_arena *a)
    int af_txn_commit(af_arena *a, uint64_t ref)
    int af_txn_finish(af_arena *a, uint64_t ref, const uint32_t *slots, uint32_t count)
    int af_txn_abort(af_arena *a, uint64_t ref, const uint32_t *slots, uint32_t count)
    int af_txn_state(af_arena *a, uint64_t ref)

    int af_detach(af_arena *a, uint32_t slot, uint64_t cutoff_ns)
    int64_t af_detach_next(af_arena *a, uint64_t cutoff_ns, uint32_t cursor, uint32_t *next)
    int af_set_dumped(af_arena *a, uint32_t slot)
    int af_reap(af_arena *a, uint32_t slot)
    int64_t af_punch_idle(af_arena *a, uint64_t idle_ns, uint64_t max_granules)

    int64_t af_shard_put(af_arena *a, const char *id, uint32_t id_len, const void *meta, uint32_t meta_len,
                         const af_span *data, uint32_t data_parts, uint32_t bits, uint32_t options)
    int64_t af_shard_reserve(af_arena *a, const char *id, uint32_t id_len, const void *meta, uint32_t meta_len,
                             uint64_t size, uint32_t bits, uint32_t options, void **view)
    int af_shard_publish(af_arena *a, uint32_t slot)
    int af_shard_abandon(af_arena *a, uint32_t slot)
    int af_shard_succeed(af_arena *a, uint32_t slot, uint32_t old)
    int64_t af_pin_shard(af_arena *a, const char *id, uint32_t len)
    int af_shard_get(af_arena *a, uint32_t slot, const void **meta, uint32_t *meta_len, const void **data,
                     uint64_t *data_len, uint32_t *bits)
    int af_shard_clear_bit(af_arena *a, uint32_t slot, uint32_t bit, c_bool *was, c_bool *all)
    int af_shard_bit(af_arena *a, uint32_t slot, uint32_t bit)
    int af_shard_close(af_arena *a, uint32_t slot)
    int64_t af_expired_shards(af_arena *a, uint64_t created_before_ns, uint32_t cursor, uint32_t *slots,
                              uint32_t max, uint32_t *next)

    ctypedef struct af_stats_result:
        uint64_t granule_bytes
        uint64_t granules
        uint64_t granules_used
        uint64_t granules_ready
        uint64_t granules_keep
        uint64_t granules_outside
        uint64_t bytes_max
        uint64_t bytes_mapped
        uint64_t session_slots
        uint64_t session_slots_ready
        uint64_t shard_slots
        uint64_t shard_slots_ready
        uint64_t sessions_active
        uint64_t sessions_closing
        uint64_t sessions_detached
        uint64_t sessions_dumped
        uint64_t sessions_init
        uint64_t shards_active
        uint64_t shards_closing
        uint64_t shards_init
        uint64_t shard_bytes
        uint64_t txns_open
        uint64_t txns_committed
        uint64_t overflow_buckets
        uint64_t overflow_used
    void af_stats(af_arena *a, af_stats_result *out)
    uint64_t af_sessions_active(af_arena *a)
    int af_check(af_arena *a, char *why, size_t why_len)

    enum:
        AF_BASE64_SCALAR
        AF_BASE64_AVX2
        AF_BASE64_VBMI
    int af_base64_level()
    int af_base64_set_level(int level)
    size_t af_base64_size(size_t n)
    void af_base64_encode(const void *data, size_t n, char *out)
    int64_t af_base64_decoded_size(const char *text, size_t n)
    int af_base64_decode(const char *text, size_t n, void *out)
    void af_base64_encode_bf16(const void *data, size_t count, char *out)
    int af_base64_decode_bf16(const char *text, size_t n, void *out)

    uint32_t af_crash_count()
    const char *af_crash_name(uint32_t i)
    int af_crash_arm(const char *name, uint64_t nth)
    uint64_t af_crash_hits(uint32_t i)
    int af_fault_arm(uint64_t nth)
