/* layout.h (private): every byte of the arena, and the words that are its truth.
 *
 * Theory: truth is single 64-bit words, changed by one atomic store or CAS; a block of bytes is written in private
 * and then published by such a word. Everything else is a hint that can be rebuilt. Because of that a process may die
 * between any two instructions, and af_sweep() has only to undo what carries the dead one's number.
 * Invariants
 *   - No pointers in shared memory, only offsets, slot and granule numbers. An offset read from a record is checked
 *     before use: a reader may be looking at memory that was freed and reused under it.
 *   - Words of different regions, and words that every process writes, do not share a cache line.
 *   - Memory is read or written only after it was backed (fallocate): running out is AF_ENOSPC, never SIGBUS.
 * LAYOUT.md has the byte map, the state diagrams and the crash table. Any change here bumps AF_LAYOUT_VERSION.
 */
#ifndef AF_LAYOUT_H
#define AF_LAYOUT_H

#include "arealfast.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "crash_points.h"

#ifdef __SANITIZE_THREAD__
#pragma GCC diagnostic ignored                                                                                       \
    "-Wtsan" /* it does not model fences; what they order is only checked, never used unchecked */
#endif

typedef _Atomic uint64_t af_word;
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "shared words need address-free, lock-free 64-bit atomics");
_Static_assert(sizeof(af_word) == 8, "an atomic word is 8 bytes");

#define AF_MAGIC         0x4146414c4c4f5731ull
#define AF_PAGE          4096u
#define AF_LINE          64
#define AF_GRANULE_SHIFT 12
#define AF_GRANULE       (1u << AF_GRANULE_SHIFT)
#define AF_BLOCK         512u /* granules, or slots, under one hint word; granule words of a block fill one page */
#define AF_NONE          UINT64_MAX

/* ------------------------------------------------------------------------------------------- control word ----
 * One a slot: seq:24 | owner:5 | state:3 | pin mask:32. Written by CAS only. seq moves on every state change and
 * every unpin, so that a CAS from a word read earlier proves that nothing happened in between (24 bits: a sleeper
 * would have to miss exactly 16,777,216 changes). Pin bit w: process w uses the slot. owner: of INIT, DETACHED,
 * DUMPED. */
#define AF_CTL_SEQ_ONE (1ull << 40)
static inline uint32_t af_ctl_state(uint64_t c) { return (uint32_t)(c >> 32) & 7u; }
static inline uint32_t af_ctl_owner(uint64_t c) { return (uint32_t)(c >> 35) & 31u; }
static inline uint32_t af_ctl_mask(uint64_t c) { return (uint32_t)c; }
static inline uint32_t af_ctl_seq(uint64_t c) { return (uint32_t)(c >> 40); }
/* The word that follows `from`: seq + 1. */
static inline uint64_t af_ctl_next(uint64_t from, uint32_t owner, uint32_t state, uint32_t mask) {
    return (((from >> 40) + 1) << 40) | ((uint64_t)owner << 35) | ((uint64_t)state << 32) | mask;
}

/* ------------------------------------------------------------------------------------------- granule word ----
 * One a 4 KiB granule: kind:2 | owner:5 | length:29 | tag:28. The first granule of a run holds RES or COM, the run's
 * length and the slot it was taken for; the others hold INT and the first one's number.
 *   FREE  length = second in which it was freed (0: never used), tag 0
 *   RES   reserved by `owner`: linked to a slot's log or not, only the owner's death needs to find out
 *   COM   linked from a slot's log or names                                                                  */
enum { AF_G_FREE = 0, AF_G_RES = 1, AF_G_COM = 2, AF_G_INT = 3 };
#define AF_TAG_NONE  0xfffffffu /* belongs to no slot yet */
#define AF_TAG_PUNCH 0xffffffeu /* a whole block, being given back to the system */
static inline uint64_t af_g_make(uint32_t kind, uint32_t owner, uint64_t len, uint64_t tag) {
    return ((uint64_t)kind << 62) | ((uint64_t)owner << 57) | (len << 28) | tag;
}
static inline uint32_t af_g_kind(uint64_t x) { return (uint32_t)(x >> 62); }
static inline uint32_t af_g_owner(uint64_t x) { return (uint32_t)(x >> 57) & 31u; }
static inline uint64_t af_g_len(uint64_t x) { return (x >> 28) & 0x1fffffffu; }
static inline uint32_t af_g_tag(uint64_t x) { return (uint32_t)x & 0xfffffffu; }

/* Block word, a hint over 512 granules, except its two memory bits: version:52 | words:1 | backed:1 | bound:10.
 * bound: no free run in the block is longer (may be too high, never too low: freeing raises it and moves version, a
 * scan lowers it by CAS from the word it read before). words: the page of granule words is backed (for ever). backed:
 * the granules' memory is. */
#define AF_B_BOUND       0x3ffu
#define AF_B_BACKED      (1u << 10)
#define AF_B_WORDS       (1u << 11)
#define AF_B_VERSION_ONE (1ull << 12)

/* Slot block word, a hint over 512 slots: version:63 | maybe:1 (0: no FREE slot in it). Same rule. */

/* ----------------------------------------------------------------------------------- head and open words ----
 * head: record offset/16 : 40 | generation : 24. Generation moves when the log is cut (compaction, reap), never back.
 * open: granule:28 | used/16 : 16 | generation:20. A hint: the run in which the next small record may be put. used
 * 0 means none. Valid only while its generation is the head's. */
#define AF_GEN_MASK      0xffffffu
#define AF_OPEN_GEN_MASK 0xfffffu
static inline uint64_t af_head_make(uint64_t offset, uint64_t gen) {
    return (offset >> 4 << 24) | (gen & AF_GEN_MASK);
}
static inline uint64_t af_head_offset(uint64_t h) { return h >> 24 << 4; }
static inline uint64_t af_head_gen(uint64_t h) { return h & AF_GEN_MASK; }
static inline uint64_t af_open_make(uint64_t g, uint64_t used16, uint64_t gen) {
    return (g << 36) | (used16 << 20) | (gen & AF_OPEN_GEN_MASK);
}
static inline uint64_t af_open_granule(uint64_t o) { return o >> 36; }
static inline uint64_t af_open_used16(uint64_t o) { return (o >> 20) & 0xffffu; }
static inline uint64_t af_open_gen(uint64_t o) { return o & AF_OPEN_GEN_MASK; }

/* ------------------------------------------------------------------------------------------------ records ----
 * Immutable once linked, but for `outcome`. 16-byte aligned. Followed by the bit words (shards), the meta, padding to
 * `data_at`, the data. crc: CRC-32C of the header from `data_len` to `aux` (crc taken as 0), then meta, then data;
 * shards carry none. */
typedef struct {
    uint64_t prev; /* offset of the next older record, 0: none. Not in the crc: it changes until the head CAS */
    uint64_t data_len;
    uint32_t meta_len, bits;
    uint16_t type, flags;
    uint32_t magic;        /* AF_RECORD_MAGIC: garbage rarely looks like this */
    uint32_t crc, data_at; /* data_at: from the header's start */
    uint64_t aux;
    af_word outcome; /* AF_OUTCOME_*: PENDING until af_txn_finish or the sweep caches the transaction's end */
    uint64_t reserved;
} af_record_header;
_Static_assert(sizeof(af_record_header) == 64, "record header is one cache line");
#define AF_RECORD_MAGIC 0x52434641u

/* --------------------------------------------------------------------------------------------------- slot ----
 * 256 bytes. Names are written by the INIT owner before ACTIVE is published and do not change until the slot is FREE.
 * A FREE slot has: head offset 0, names_off 0, lengths 0, txn 0. */
#define AF_INLINE_NAMES 176
typedef struct {
    af_word head;    /* COMMIT word of the log; CAS, release */
    af_word open;    /* hint, see above */
    af_word ordinal; /* fetch_add by pinners */
    af_word nbytes;  /* granule bytes held; statistic */
    af_word created_ns;
    af_word names_off;   /* offset of a granule run with id and key, or 0: they are inline */
    af_word txn;         /* member of this transaction, or 0 */
    af_word deadline_ns; /* set by pinners */
    _Atomic uint32_t id_len, key_len;
    _Atomic uint32_t flags; /* AF_SLOT_* */
    uint32_t pad;
    char names[AF_INLINE_NAMES]; /* id, then key */
} af_slot;
_Static_assert(sizeof(af_slot) == 256, "slot is four cache lines");
enum { AF_SLOT_KEY_PENDING = 1 }; /* the key moves here when the transaction finishes */

/* -------------------------------------------------------------------------------------------------- index ---- */
#define AF_WAYS 7
typedef struct {
    af_word entry[AF_WAYS]; /* fingerprint:32 | is key:1 | slot+1 : 31; 0: empty. One store a change */
    af_word next;           /* overflow bucket number (absolute), 0: none */
} af_bucket;
_Static_assert(sizeof(af_bucket) == AF_LINE, "bucket is one cache line");
#define AF_ENTRY_KEY (1ull << 31)

/* Task hint (plain memory, index lock): every id {task}-{m} with m < n is in use. */
#define AF_HINT_WAYS 4
typedef struct {
    uint64_t hash; /* of the task id; 0: empty */
    uint64_t n;
} af_hint;

/* Transaction word: generation:48 | owner:8 | state:8. Reference: generation << 12 | index. */
enum { AF_TXN_WORD_FREE = 0, AF_TXN_WORD_OPEN = 1, AF_TXN_WORD_COMMITTED = 2 };
static inline uint64_t af_txn_make(uint64_t gen, uint32_t owner, uint32_t state) {
    return (gen << 16) | ((uint64_t)owner << 8) | state;
}
static inline uint64_t af_txn_gen(uint64_t w) { return w >> 16; }
static inline uint32_t af_txn_owner(uint64_t w) { return (uint32_t)(w >> 8) & 255u; }
static inline uint32_t af_txn_word_state(uint64_t w) { return (uint32_t)w & 255u; }
_Static_assert(AF_TXNS == 1 << 12, "a reference has 12 bits for the index");

/* ----------------------------------------------------------------------------------------------- processes ----
 * Written by its own process, except that the supervisor's sweep clears it after death. */
typedef struct {
    _Alignas(AF_LINE) af_word pid; /* 0: number not in use */
    af_word incarnation, ticks;
    _Alignas(AF_LINE) af_word writing; /* slot + 1 while inside af_log_append: compaction keeps off (see compact.c) */
    af_word allocating;                /* > 0 while granules_used and the granule words may differ by what we do */
    af_word compact_slot;              /* slot + 1: the intent below stands */
    af_word compact_old, compact_new;  /* head words before and after */
    af_word publish_new, publish_old;  /* slot + 1 each: a shard is being replaced (see shards.c) */
    _Alignas(AF_LINE) af_word counter[AF_COUNTERS];
} af_process;
_Static_assert(sizeof(af_process) % AF_LINE == 0, "no two processes share a line");

/* ------------------------------------------------------------------------------------------------- header ----
 * `af_geometry` is written once, at creation, and compared in full on attach. */
typedef struct {
    uint64_t magic;
    uint64_t version;
    uint64_t total_bytes;                           /* the file's size */
    uint64_t max_bytes, session_slots, shard_slots; /* what it was made for */
    uint64_t slots, granules, blocks, keep, buckets, overflow, hints;
    uint64_t header_at, words_at, txns_at, slot_blocks_at, blocks_at, buckets_at, hints_at; /* backed at creation */
    uint64_t ctl_at, touch_at, slots_at, granule_words_at, heap_at;                         /* backed step by step */
} af_geometry;

typedef struct {
    af_geometry geometry;
    uint64_t seed[3]; /* of the hashes: nobody outside can make names collide. Written once */
    _Alignas(AF_LINE) af_word
        granules_used; /* version:32 | granules:32; may stay too high after a death, see recount */
    af_word outside;   /* granules' worth of memory beside the arena that counts with it; the supervisor's */
    _Alignas(AF_LINE) af_word granules_ready;      /* hint: backed */
    _Alignas(AF_LINE) af_word shard_bytes;         /* hint: granule bytes of ACTIVE shards */
    _Alignas(AF_LINE) af_word slots_ready[2];      /* a kind: slots below are backed. Only grows (atomic max) */
    _Alignas(AF_LINE) pthread_mutex_t index_mutex; /* robust, process-shared: all writers of buckets and hints */
    _Alignas(AF_LINE) af_word lock_owner;          /* process + 1 inside the mutex; for the supervisor to look at */
    af_word overflow_free;                         /* head of the chain of free overflow buckets; index lock */
    af_word overflow_used;                         /* how many are in use; index lock */
    af_word index_dirty;                           /* a holder died: the sweep rebuilds the chain above */
    _Alignas(AF_LINE) af_process process[AF_MAX_PROCS];
} af_header;

/* ------------------------------------------------------------------------------------------------- handle ---- */
typedef struct {
    _Atomic uint32_t refs; /* handles on this mapping (af_clone) */
    uint8_t *base;
    size_t size;
    int fd;
} af_mapping;

struct af_arena {
    af_mapping *map;
    uint8_t *base;
    af_header *h;
    const af_geometry *g;
    af_process *me;
    uint32_t proc;
    af_word *words, *txns, *slot_blocks, *blocks, *ctl, *touch, *granule_words;
    af_slot *slots;
    af_bucket *buckets;
    af_hint *hints;
    _Atomic uint32_t *pins; /* a slot: how many users this process has; AF_PIN_BUSY while first or last one acts */
    _Atomic uint64_t granule_cursor,
        slot_cursor[2]; /* where to look first: hints, for af_unpin may run in any thread */
    uint64_t txn_cursor;
};
#define AF_PIN_BUSY UINT32_MAX

/* Copies shared memory that another process may be overwriting; the caller validates afterwards (seqlock). Such a
 * copy races by intent, so it is hidden from the thread sanitizer. */
void af_racy_copy(void *to, const void *from, size_t n);

/* mapping.c */
int af_back(af_arena *a, uint64_t at, uint64_t bytes); /* make memory real: 0, AF_ENOSPC, AF_ESYS */
int af_unback(af_arena *a, uint64_t at, uint64_t bytes);
/* checksum.c */
uint32_t af_crc32c(uint32_t crc, const void *p, size_t n);
uint64_t af_hash(const af_arena *a, uint32_t space, const void *p, size_t n);
/* granules.c: runs. A run is RES(me) from take to commit or free. */
int64_t af_run_take(af_arena *a, uint64_t n, uint32_t tag, uint32_t options); /* first granule, or a code */
void af_run_free(af_arena *a, uint64_t g);                                    /* RES(me) -> FREE */
void af_run_commit(af_arena *a, uint64_t g);                   /* RES(me) -> COM; nothing if it is no longer that */
bool af_run_retake(af_arena *a, uint64_t g, uint32_t as);      /* COM or RES(as) -> RES(as) */
void af_run_trim(af_arena *a, uint64_t g, uint64_t keep);      /* RES(me): free its tail */
uint64_t af_run_repair(af_arena *a, uint64_t g, uint64_t len); /* granules that are really the run's (dead owner) */
void af_run_free_dead(af_arena *a, uint64_t g, uint64_t word);
int64_t af_run_of(af_arena *a, uint64_t offset); /* the run an offset lies in, or -1 */
void af_block_note_free(af_arena *a, uint64_t block);
uint64_t af_granules_used(const af_arena *a);
void af_granules_unuse(af_arena *a, uint64_t n);
void af_granules_recount(af_arena *a);
static inline uint64_t af_run_offset(const af_arena *a, uint64_t g) {
    return a->g->heap_at + (g << AF_GRANULE_SHIFT);
}
static inline uint64_t af_granules_for(uint64_t bytes) { return (bytes + AF_GRANULE - 1) >> AF_GRANULE_SHIFT; }
/* Let the next search begin no later than here. */
static inline void af_cursor_back(_Atomic uint64_t *cursor, uint64_t at) {
    if (at < atomic_load_explicit(cursor, memory_order_relaxed))
        atomic_store_explicit(cursor, at, memory_order_relaxed);
}
/* slots.c */
int64_t af_slot_take(af_arena *a, uint32_t kind); /* FREE -> INIT(me) */
void af_slot_give_back(af_arena *a, uint32_t s);  /* INIT(me) or DUMPED(me), emptied -> FREE */
int af_slot_set_names(af_arena *a, uint32_t s, const char *id, uint32_t id_len, const char *key, uint32_t key_len,
                      int64_t names_run);
void af_slot_names(const af_arena *a, const af_slot *slot, const char **id, const char **key);
bool af_slot_close(af_arena *a, uint32_t s);             /* ACTIVE -> CLOSING: false if it was not ACTIVE */
bool af_slot_reap_closing(af_arena *a, uint32_t s);      /* CLOSING, no pins -> FREE: false if it must wait */
int af_slot_reap(af_arena *a, uint32_t s, bool patient); /* DUMPED(me) -> FREE: 0 or AF_EBUSY */
int af_slot_empty(af_arena *a, uint32_t s);              /* INIT(me) or DUMPED(me), not indexed -> FREE */
bool af_slot_pin_raw(af_arena *a, uint32_t s);           /* pin whatever is ACTIVE, members of open groups too */
bool af_slot_visible(af_arena *a, uint32_t s);           /* not a member of an open or aborted transaction */
static inline uint32_t af_slot_kind(const af_arena *a, uint32_t s) {
    return s < a->g->session_slots ? AF_KIND_SESSION : AF_KIND_SHARD;
}
/* Slots [first, end) of a kind that are backed. */
static inline uint32_t af_slots_first(const af_arena *a, uint32_t kind) {
    return kind == AF_KIND_SESSION ? 0 : (uint32_t)a->g->session_slots;
}
static inline uint32_t af_slots_end(const af_arena *a, uint32_t kind) {
    return af_slots_first(a, kind) + (uint32_t)atomic_load_explicit(&a->h->slots_ready[kind], memory_order_acquire);
}
static inline bool af_slot_ok(const af_arena *a, uint64_t s) {
    return s < a->g->session_slots ? s < af_slots_end(a, AF_KIND_SESSION)
                                   : s < a->g->slots && s < af_slots_end(a, AF_KIND_SHARD);
}
/* index.c */
enum { AF_SPACE_ID = 0, AF_SPACE_KEY = 1, AF_SPACE_SHARD = 2, AF_SPACE_TASK = 3 };
enum { AF_IMPATIENT = 0, AF_PATIENT = 1 };
int af_index_lock(af_arena *a, int patience); /* 0 or AF_EBUSY */
void af_index_unlock(af_arena *a);
int64_t af_index_pin(af_arena *a, uint32_t space, const char *name, uint32_t len); /* slot, pinned, or AF_ENOENT */
/* The entry of the live slot of that name, its slot in *s; NULL if none. `not_slot`: ignore that one (or AF_NONE). */
af_word *af_index_find_locked(af_arena *a, uint32_t space, const char *name, uint32_t len, uint64_t not_slot,
                              uint32_t *s);
int af_index_insert_locked(af_arena *a, uint32_t space, const char *name, uint32_t len, uint32_t s);
void af_index_swap_locked(af_arena *a, af_word *entry, uint32_t s);  /* same name, other slot: one store */
int af_index_bind_key_locked(af_arena *a, uint32_t s, uint64_t txn); /* a KEY_PENDING slot's key moves to it */
bool af_index_has_locked(af_arena *a, uint32_t s);                   /* is there an id entry that leads to the slot */
void af_index_remove_locked(af_arena *a, uint32_t s); /* all entries of the slot; lowers its task's hint first */
void af_index_rebuild_locked(af_arena *a);            /* free chain of overflow buckets, after a holder's death */
uint64_t af_hint_get_locked(af_arena *a, const char *task, uint32_t len);
void af_hint_raise_locked(af_arena *a, const char *task, uint32_t len, uint64_t n);
/* log.c */
typedef struct {
    uint64_t offset;
    af_record_header header;
} af_link;
typedef struct {
    uint64_t head;
    size_t count, cap;
    af_link *links; /* newest first */
} af_chain;
/* Walk a log by seqlock. 0, AF_ECORRUPT, AF_ESYS. Stops at offset `until` (0: the end). Free links with free(). */
int af_chain_read(af_arena *a, uint32_t s, uint64_t until, af_chain *chain);
bool af_header_read(const af_arena *a, uint64_t offset, af_record_header *out); /* false: cannot be a record */
uint32_t af_record_crc(const af_record_header *header, const void *meta, const void *data);
uint32_t af_outcome_resolve(af_arena *a, uint64_t offset, uint64_t aux);
static inline af_record_header *af_record_at(const af_arena *a, uint64_t offset) {
    return (af_record_header *)(void *)(a->base + offset);
}
static inline uint64_t af_align(uint64_t n, uint64_t to) { return (n + to - 1) & ~(to - 1); }
/* compact.c */
int af_chain_runs(af_arena *a, const af_chain *chain, uint64_t **runs, size_t *count); /* distinct, sorted */
bool af_chain_holds(const af_chain *chain, uint64_t offset);
/* txn.c */
void af_txn_release_member(af_arena *a, uint32_t s, uint64_t ref);
bool af_txn_settle_export(af_arena *a, uint32_t s, uint64_t ref); /* outcome := COMMITTED; true: asks for removal */

#endif
