/* arealfast.h: the arena, the shared memory in which areal_fast keeps every session and every host shard.
 *
 * One memfd mapping is shared by all processes of one proxy and is addressed by offsets. Each process opens it once
 * and gets a handle, `af_arena`, that belongs to its process number (0..AF_MAX_PROCS-1). A process may be killed
 * between any two instructions; whoever is certain of its death calls af_sweep(), and nothing else needs repair.
 *
 * Conventions
 *   - A function that can fail returns 0 or a negative AF_E* code. One that yields a slot returns int64_t: the slot
 *     (>= 0) or a code. Nothing here prints, exits, allocates shared memory past the arena, or sleeps; "may wait"
 *     is said where it is so, and such a wait is bounded.
 *   - A handle is used by one thread at a time, except where a function says "any thread".
 *   - Slots are small integers. Sessions have [0, session_slots), shards the numbers after them. A slot number means
 *     something only while the caller pins it, or owns it (DETACHED, or the INIT of af_shard_reserve).
 *   - A *head word* names a state of a session's log: offset/16 in the upper 40 bits, log generation in the lower 24.
 *     It is opaque except that AF_LOG_ANY is never one and that two equal words of one slot name the same log.
 *   - Times are nanoseconds of CLOCK_MONOTONIC(_COARSE). Lengths are bytes.
 * What the words look like, and what a kill at each step leaves behind, is in LAYOUT.md.
 */
#ifndef AREALFAST_H
#define AREALFAST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct af_arena af_arena;

enum {
    AF_LAYOUT_VERSION = 1,
    AF_MAX_PROCS = 32,
    AF_PROC_KEEPER = 29,
    AF_PROC_CLEANER = 30,
    AF_PROC_SUPERVISOR = 31,
    AF_WORDS = 64,        /* global words */
    AF_COUNTERS = 128,    /* counters a process */
    AF_TXNS = 4096,       /* transactions open at one time */
    AF_TASK_MAX = 1024,   /* longest task id */
    AF_KEY_MAX = 1024,    /* longest api key */
    AF_ID_MAX = 1088,     /* longest session or shard id */
    AF_META_MAX = 1 << 24 /* longest meta part of a record */
};

/* What can go wrong. AF_EBUSY always means: nothing changed, back off and try again. */
enum {
    AF_OK = 0,
    AF_ENOSPC = -1,    /* no granules, no slot or no index room left (or the system gives no more memory) */
    AF_EBUSY = -2,     /* the index lock, a log writer or an open export is in the way */
    AF_EEXIST = -3,    /* the name is bound to another live slot */
    AF_EMOVED = -4,    /* the head is no longer the one expected: fold again, decide again */
    AF_EGONE = -5,     /* the session, shard or transaction is closing or gone */
    AF_ETRIMMED = -6,  /* the log was compacted since: that record is no longer there */
    AF_ELAYOUT = -7,   /* not an arena, or one of another layout */
    AF_EINVAL = -8,    /* an argument is out of its range */
    AF_ENOENT = -9,    /* no such name */
    AF_ECORRUPT = -10, /* a record fails its checks */
    AF_ESYS = -11      /* a system call failed; errno tells */
};
const char *af_strerror(int code); /* static text */

/* ------------------------------------------------------------------------------------------------ handles ---- */

/* Make a new arena in a memfd (close-on-exec) and a handle on it as process `proc`. `max_bytes` is the room for
 * records and shards (at least 256 KiB); bookkeeping comes on top. Zero slots mean: derive them from max_bytes.
 * Memory is taken from the system as it is needed. Errors: AF_EINVAL, AF_ENOSPC, AF_ESYS. */
int af_create(uint64_t max_bytes, uint32_t session_slots, uint32_t shard_slots, uint32_t proc, af_arena **out);

/* The same in a file the caller made and keeps (the handle dups it): empty, and not limited to less than it needs. */
int af_create_in(int fd, uint64_t max_bytes, uint32_t session_slots, uint32_t shard_slots, uint32_t proc,
                 af_arena **out);

/* A handle on an existing arena; `fd` is dup'ed. AF_ELAYOUT if magic, version, or any size differs. */
int af_attach(int fd, uint32_t proc, af_arena **out);

/* A second handle on the same mapping for another process number: threads that play processes, in tests and tools. */
int af_clone(const af_arena *a, uint32_t proc, af_arena **out);

/* Drop the handle and its mapping. Pins it holds stay set; unpin first (or let af_sweep clear them). NULL is fine. */
void af_close(af_arena *a);

int af_fileno(const af_arena *a); /* the handle's own descriptor */
uint32_t af_proc(const af_arena *a);
uint32_t af_session_slots(const af_arena *a);
uint32_t af_shard_slots(const af_arena *a);
uint64_t af_now_ns(void); /* CLOCK_MONOTONIC_COARSE; any thread */

/* Back up to `bytes` of memory ahead of use, so that no append pays for fresh pages. Returns granules backed, or a
 * code. For the cleaner or the supervisor; takes about 0.3 ms a MiB. */
int64_t af_prefault(af_arena *a, uint64_t bytes);

/* Count memory beside the arena (files that are shards) against its budget, or give it back. AF_ENOSPC: there is not so
 * much left besides the keep reserve; nothing is counted then. For one process, which gives back what it took. */
int af_outside_take(af_arena *a, uint64_t bytes);
void af_outside_give(af_arena *a, uint64_t bytes);

/* ---------------------------------------------------------------------------------------------- processes ---- */

/* Claim the handle's own process number for `pid` and return its incarnation (1, 2, ...). AF_EBUSY if the number is
 * still held by another pid, i.e. that one was neither left nor swept. */
int64_t af_proc_enter(af_arena *a, int64_t pid);
void af_proc_leave(af_arena *a); /* orderly exit; the caller holds no pins any more */
void af_heartbeat(af_arena *a);  /* own tick += 1 */
int af_proc_info(af_arena *a, uint32_t proc, int64_t *pid, uint64_t *incarnation, uint64_t *ticks);
int af_lock_owner(af_arena *a); /* process number inside the index lock now, or -1 */

typedef struct {
    uint64_t pins;      /* pin bits cleared */
    uint64_t freed;     /* granules freed */
    uint64_t committed; /* runs found linked and kept */
    uint64_t inits;     /* half-made slots removed */
    uint64_t txns_aborted;
    uint64_t txns_finished;
    uint64_t reaped;   /* slots freed because the dead process was the last to hold them */
    uint64_t detached; /* slots left DETACHED for its successor (af_owned_slots) */
} af_sweep_result;

/* Take back everything a dead process held. Call only when its death is certain, from one process at a time, never
 * for a live process. Idempotent, and may itself be killed anywhere. May wait up to a second for the index lock; then
 * AF_EBUSY: call again. Sessions DETACHED by the dead stay so: its successor, under the same number, resumes them. */
int af_sweep(af_arena *a, uint32_t proc, af_sweep_result *out);

/* Slots in `state` (AF_STATE_*) owned by `proc`: up to `max` from `cursor` on; *next is 0 after the last. Returns n.
 */
int64_t af_owned_slots(af_arena *a, uint32_t state, uint32_t proc, uint32_t cursor, uint32_t *slots, uint32_t max,
                       uint32_t *next);

/* ---------------------------------------------------------------------------------------- words, counters ---- */

/* Global words: sequentially consistent, any thread. Indexes out of range are AF_EINVAL. */
int af_word_get(af_arena *a, uint32_t i, int64_t *out);
int af_word_set(af_arena *a, uint32_t i, int64_t v);
int af_word_add(af_arena *a, uint32_t i, int64_t v, int64_t *out);   /* *out: the new value */
int af_word_cas(af_arena *a, uint32_t i, int64_t old, int64_t want); /* 1 swapped, 0 not */

void af_count(af_arena *a, uint32_t counter, uint64_t delta); /* own counter; out of range is ignored */
void af_counters(af_arena *a, uint64_t out[AF_COUNTERS]);     /* summed over all processes, dead ones included */

/* ----------------------------------------------------------------------------------------------- sessions ---- */

enum { AF_KIND_SESSION = 0, AF_KIND_SHARD = 1 };
enum {
    AF_STATE_FREE = 0,
    AF_STATE_INIT = 1, /* being made by its owner */
    AF_STATE_ACTIVE = 2,
    AF_STATE_CLOSING = 3,  /* removed; the last pin frees it */
    AF_STATE_DETACHED = 4, /* its owner (the cleaner) alone has it */
    AF_STATE_DUMPED = 5    /* durable elsewhere or worthless; its owner is freeing it */
};

typedef struct {
    uint32_t slot; /* AF_OK: the new slot, not pinned. AF_EEXIST: the slot the key is bound to */
    uint32_t id_len;
    char id[AF_ID_MAX]; /* the session id, not terminated */
} af_started;

/* Start session `{task}-{n}` with the smallest n not in use, bound to `key` (which may be empty: none).
 * With `txn` (from af_txn_begin) the session does not exist for anyone until that transaction commits. AF_EEXIST if
 * the key belongs to a live slot other than `rebind_from` (-1: none); if it is that slot's, the key moves, at
 * af_txn_finish where there is a txn, else now. AF_EBUSY (index lock), AF_ENOSPC, AF_EINVAL. */
int af_session_start(af_arena *a, const char *task, uint32_t task_len, const char *key, uint32_t key_len,
                     uint64_t txn, int64_t rebind_from, af_started *out);

/* Find or make the session with exactly this id (no key); returns its slot, pinned. */
int64_t af_session_open_named(af_arena *a, const char *id, uint32_t len);

/* Find a live session and pin it: its slot, or AF_ENOENT. Lock-free. */
int64_t af_pin_id(af_arena *a, const char *id, uint32_t len);
int64_t af_pin_key(af_arena *a, const char *key, uint32_t len);

/* Pins. A process's pins of a slot are counted in its handle; only the first and the last touch shared memory. While
 * pinned a slot's memory stays. af_pin_slot: 1 pinned, 0 not ACTIVE. af_unpin of the last pin of a CLOSING slot frees
 * it, or leaves that to the cleaner's scan when the index lock is busy. Any thread. */
int af_pin_slot(af_arena *a, uint32_t slot);
void af_unpin(af_arena *a, uint32_t slot);
uint32_t af_pin_count(af_arena *a, uint32_t slot); /* this handle's */

void af_touch(af_arena *a, uint32_t slot); /* last access := now. Caller pins */

typedef struct {
    uint32_t state, owner, seq, pins, kind;
    uint32_t id_len, key_len;
    uint64_t created_ns, touched_ns, nbytes, ordinal, head, txn;
    int64_t deadline_ns;
    char id[AF_ID_MAX];
    char key[AF_KEY_MAX];
} af_slot_info;

/* One consistent look at any slot, pinned or not. nbytes: granule bytes it holds. AF_EBUSY if it will not hold still.
 */
int af_slot_get(af_arena *a, uint32_t slot, af_slot_info *out);

int64_t af_next_ordinal(af_arena *a, uint32_t slot); /* 0, 1, 2, ...; caller pins */
int64_t af_deadline_get(af_arena *a, uint32_t slot); /* caller pins; 0: none */
int af_deadline_set(af_arena *a, uint32_t slot, int64_t ns);

/* Remove a session (caller pins it): ACTIVE -> CLOSING. Lookups and appends fail from now on. Memory goes with the
 * last pin. AF_EGONE if it was not ACTIVE any more. */
int af_session_close(af_arena *a, uint32_t slot);

/* ACTIVE session slots from `cursor`, up to max; *next is 0 after the last. Returns how many. Not pinned: a hint. */
int64_t af_sessions(af_arena *a, uint32_t cursor, uint32_t *slots, uint32_t max, uint32_t *next);

/* ---------------------------------------------------------------------------------------------------- log ---- */

#define AF_LOG_ANY UINT64_MAX                         /* append whatever the head is */
enum { AF_REC_CHECKPOINT = 1, AF_REC_EXPORTING = 5 }; /* the only types the core knows; 1..65535 are allowed */
enum { AF_REC_FLAG_REMOVE = 1 };                      /* on EXPORTING: close the session when it commits */
enum { AF_OUTCOME_PENDING = 0, AF_OUTCOME_COMMITTED = 1, AF_OUTCOME_ABORTED = 2 };
enum { AF_CRITICAL = 1 }; /* append option: may use the keep reserve */

typedef struct {
    const void *base;
    size_t len;
} af_span;

typedef struct {
    uint16_t type, flags;
    uint64_t aux; /* for EXPORTING: the transaction */
    const void *meta;
    uint32_t meta_len;
    const af_span *data; /* parts, stored end to end */
    uint32_t data_parts;
} af_new_record;

/* A record as read: offsets are into the arena and mean something to af_record_* only. */
typedef struct {
    uint64_t offset, aux, data_len;
    size_t meta_at;             /* where its meta begins in af_log_view.meta */
    uint32_t meta_len, outcome; /* outcome is resolved: see af_record_outcome */
    uint16_t type, flags;
} af_record;

/* Filled by af_log_read; the caller zeroes it once, may reuse it, and frees it with af_log_view_free. */
typedef struct {
    uint64_t head; /* the head word this is a picture of */
    bool cut;      /* the log was compacted after `since`: records are the whole log */
    size_t count;
    af_record *records; /* oldest first */
    uint8_t *meta;
    size_t meta_size, records_cap, meta_cap;
} af_log_view;

/* Acquire load of the head word. Caller pins (or owns) the slot, here and below. */
uint64_t af_log_head(af_arena *a, uint32_t slot);

/* Append one record; *head is the new head word. With an `expect` other than AF_LOG_ANY only if the head still is
 * that (else AF_EMOVED, and *head is the one found). `reservation` (0: none) is used up by success and stays the
 * caller's after a failure. AF_EGONE: the session is closing. AF_ENOSPC, AF_EINVAL. Once it returns AF_OK the record
 * survives the death of this process. */
int af_log_append(af_arena *a, uint32_t slot, const af_new_record *rec, uint64_t expect, uint32_t options,
                  uint64_t reservation, uint64_t *head);

/* The records after head word `since` (0: all). Errors: AF_ESYS (heap), AF_ECORRUPT. */
int af_log_read(af_arena *a, uint32_t slot, uint64_t since, af_log_view *view);
void af_log_view_free(af_log_view *view);

/* Copy `length` bytes of a record's data from `start`. `head` is any head word of the same generation (the view's).
 * AF_ETRIMMED if the log has been compacted since. AF_EINVAL if out of range. Any thread. */
int af_record_data(af_arena *a, uint32_t slot, uint64_t head, uint64_t offset, uint64_t start, uint64_t length,
                   void *out);
/* data_len of a record, same rules. */
int af_record_data_len(af_arena *a, uint32_t slot, uint64_t head, uint64_t offset, uint64_t *len);

/* What became of an EXPORTING record: PENDING while its transaction is open, COMMITTED, or ABORTED (its transaction
 * ended without commit, so the export never was). >= 0, or AF_ETRIMMED / AF_EINVAL. */
int af_record_outcome(af_arena *a, uint32_t slot, uint64_t head, uint64_t offset);

/* Replace the log `expect` by a CHECKPOINT record (meta = checkpoint) followed by copies of the records at `keep`
 * (offsets, oldest first), and free the rest. Returns 0 and *head, AF_EMOVED, AF_EBUSY (a writer is at work, or an
 * export of this log is neither finished nor aborted), AF_EGONE, AF_ENOSPC, AF_EINVAL. May use the keep reserve. */
int af_log_compact(af_arena *a, uint32_t slot, uint64_t expect, const void *checkpoint, uint32_t checkpoint_len,
                   const uint64_t *keep, uint32_t keep_count, uint64_t *head);

/* Check every record's checksum. AF_OK or AF_ECORRUPT. For tests and `verify`; O(bytes). */
int af_log_verify(af_arena *a, uint32_t slot);

/* Set aside room for a record of `nbytes` of meta and data together, so that the append cannot fail for space.
 * Returns the reservation (> 0) or AF_ENOSPC / AF_EINVAL. It is this process's and dies with it. */
int64_t af_reserve(af_arena *a, uint32_t slot, uint64_t nbytes);
int af_release(af_arena *a, uint64_t reservation);

/* ----------------------------------------------------------------------------------------- transactions ---- */

enum { AF_TXN_GONE = 0, AF_TXN_OPEN = 1, AF_TXN_COMMITTED = 2 };

/* One word that makes several things happen at once: the members of a group, or an export over several sessions.
 * Owned by this process; its death aborts an open one and finishes a committed one. Returns the reference (> 0). */
int64_t af_txn_begin(af_arena *a);
int af_txn_commit(af_arena *a, uint64_t ref); /* AF_EGONE if it is not ours and open */

/* After commit: group members become plain sessions (and rebound keys move), EXPORTING records get their outcome, and
 * sessions flagged REMOVE are closed. `slots` are the members, or the exported sessions, *which the caller must still
 * pin* (an exporter keeps its pins until here: that is how a sweep finds what a dead one committed). Idempotent;
 * AF_EBUSY (index lock, only where a key moves or a session closes): call again. */
int af_txn_finish(af_arena *a, uint64_t ref, const uint32_t *slots, uint32_t count);
/* Instead of commit: members are removed, exports never were. Same rules. */
int af_txn_abort(af_arena *a, uint64_t ref, const uint32_t *slots, uint32_t count);
int af_txn_state(af_arena *a, uint64_t ref);

/* ------------------------------------------------------------------------------------------------- cleaner ---- */

/* Detach `slot` if it is ACTIVE, unpinned, and was last touched before cutoff_ns: 1 done, 0 not. Then it is this
 * process's alone: no lookup finds it, its log may be read and appended to by this process only. */
int af_detach(af_arena *a, uint32_t slot, uint64_t cutoff_ns);
/* The next such session from `cursor` on; *next is where to go on, 0 after the last (then the result is -1). Frees
 * CLOSING slots without pins, shards too, on its way. */
int64_t af_detach_next(af_arena *a, uint64_t cutoff_ns, uint32_t cursor, uint32_t *next);
int af_set_dumped(af_arena *a, uint32_t slot); /* DETACHED(me) -> DUMPED(me): what was in it is durable. AF_EGONE */
int af_reap(af_arena *a, uint32_t slot);       /* DUMPED(me) -> FREE. AF_EBUSY: again. AF_EGONE: not mine */

/* Give memory that was free for `idle_ns` back to the system: at most `max_granules`, in whole blocks of 512. Returns
 * granules given back. */
int64_t af_punch_idle(af_arena *a, uint64_t idle_ns, uint64_t max_granules);

/* -------------------------------------------------------------------------------------------------- shards ---- */

/* Store an immutable shard under `id`. Replaces one of the same id atomically (its readers keep the old one until
 * they unpin). `bits` (0..AF_BITS_MAX): parts of the shard that are cleared one by one; all are set at first. Returns
 * the slot, not pinned; AF_ENOSPC, AF_EBUSY, AF_EINVAL. */
enum { AF_BITS_MAX = 1 << 20 };
int64_t af_shard_put(af_arena *a, const char *id, uint32_t id_len, const void *meta, uint32_t meta_len,
                     const af_span *data, uint32_t data_parts, uint32_t bits, uint32_t options);
/* The same in steps: room for `size` bytes at *view (64-byte aligned) that the caller fills; then publish or abandon.
 */
int64_t af_shard_reserve(af_arena *a, const char *id, uint32_t id_len, const void *meta, uint32_t meta_len,
                         uint64_t size, uint32_t bits, uint32_t options, void **view);
int af_shard_publish(af_arena *a, uint32_t slot); /* AF_EBUSY: again. AF_EGONE: not ours */
int af_shard_abandon(af_arena *a, uint32_t slot);
/* Publish it in the place of the shard in slot `old`, which the caller pins, and as old as that. AF_EGONE: that is not
 * the shard of this id any more; abandon. AF_EBUSY: again. */
int af_shard_succeed(af_arena *a, uint32_t slot, uint32_t old);

int64_t af_pin_shard(af_arena *a, const char *id, uint32_t len); /* slot, pinned, or AF_ENOENT */
/* Where its bytes lie; valid while pinned. meta and data are read-only by agreement. Any thread. */
int af_shard_get(af_arena *a, uint32_t slot, const void **meta, uint32_t *meta_len, const void **data,
                 uint64_t *data_len, uint32_t *bits);
/* Clear a bit: *was: it was still set; *all: no bit is set now (of two last clears at once both may hear so; closing
 * twice does no harm). Caller pins. */
int af_shard_clear_bit(af_arena *a, uint32_t slot, uint32_t bit, bool *was, bool *all);
int af_shard_bit(af_arena *a, uint32_t slot, uint32_t bit); /* 1, 0 or a code. Caller pins */
int af_shard_close(af_arena *a, uint32_t slot);             /* as af_session_close */
/* ACTIVE shards created before a time, as af_sessions. */
int64_t af_expired_shards(af_arena *a, uint64_t created_before_ns, uint32_t cursor, uint32_t *slots, uint32_t max,
                          uint32_t *next);

/* --------------------------------------------------------------------------------------------- observation ---- */

typedef struct {
    uint64_t granule_bytes, granules, granules_used, granules_ready, granules_keep, granules_outside;
    uint64_t bytes_max, bytes_mapped;
    uint64_t session_slots, session_slots_ready, shard_slots, shard_slots_ready;
    uint64_t sessions_active, sessions_closing, sessions_detached, sessions_dumped, sessions_init;
    uint64_t shards_active, shards_closing, shards_init, shard_bytes;
    uint64_t txns_open, txns_committed;
    uint64_t overflow_buckets, overflow_used;
} af_stats_result;

/* Counts by scanning the control words in use: about 1 ns a slot. shard_bytes is a running sum. */
void af_stats(af_arena *a, af_stats_result *out);

/* Live sessions: `sessions_active` alone, for who asks often. */
uint64_t af_sessions_active(af_arena *a);

/* A full consistency check of a quiet arena: 0, or AF_ECORRUPT with a line of text in `why`. For tests. */
int af_check(af_arena *a, char *why, size_t why_len);

/* ------------------------------------------------------------------------------------------------- base64 ---- */

/* Base64 of tensors (RFC 4648, section 4, padded). Any thread; the arena is not involved: `in` and `out` may lie in a
 * pinned shard or in one being filled, at any alignment, and must not overlap. Not one byte outside them is touched. */
enum { AF_BASE64_SCALAR = 0, AF_BASE64_AVX2 = 1, AF_BASE64_VBMI = 2 };
int af_base64_level(void);              /* the instructions in use; at first the best that the processor has */
int af_base64_set_level(int level);     /* -1: the best. AF_EINVAL if the processor has not got it. For tests */
size_t af_base64_size(size_t n);        /* characters for n bytes */
void af_base64_encode(const void *in, size_t n, char *out);
/* Bytes that n characters stand for, judged by n and the padding alone, or AF_EINVAL. */
int64_t af_base64_decoded_size(const char *in, size_t n);
/* Decode to exactly that many bytes. AF_EINVAL for anything but the canonical alphabet and padding (white space
 * too); `out` then holds some of it. */
int af_base64_decode(const char *in, size_t n, void *out);
/* The same for bfloat16 kept in 2 bytes an element and written as float32: `count` elements widened, or the float32
 * in the text rounded to nearest even (a NaN that was widened as it was, any other 0x7fc0). AF_EINVAL too if they are no whole float32. */
void af_base64_encode_bf16(const void *in, size_t count, char *out);
int af_base64_decode_bf16(const char *in, size_t n, void *out);

/* ------------------------------------------------------------------------------------------------- crash ---- */

/* Crash points: AF_CP("name") in the sources. They cost nothing and kill nothing unless built with AF_CRASH_POINTS.
 */
uint32_t af_crash_count(void); /* points known; 0 in a plain build */
const char *af_crash_name(uint32_t i);
/* SIGKILL self at the nth pass (1..) of the point named, or of any for "*". 0: off. Clears all counts. AF_ENOENT. */
int af_crash_arm(const char *name, uint64_t nth);
uint64_t af_crash_hits(uint32_t i); /* passes so far in this process */
/* Keep the number of the last point passed in this uint32_t, which may be shared with the killer. NULL: stop. */
void af_crash_watch(void *last);
/* Make the nth (1..) memory request to the system from now on fail with ENOSPC; 0: none. AF_EINVAL in a plain build.
 */
int af_fault_arm(uint64_t nth);

#ifdef __cplusplus
}
#endif
#endif
