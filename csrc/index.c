/* index.c: names to slots, the lock of those who change that, and the hints for the next free number of a task.
 *
 * Theory: fixed buckets of seven entries and an overflow link, one cache line each. An entry is a fingerprint and a
 * slot number; names are compared in the slot itself, under a pin. Readers take no lock. Writers hold a robust mutex,
 * so that the kernel tells the next one of a holder's death; every change is one store of one entry, so there is
 * nothing to repair then but overflow buckets that were in nobody's chain for a moment (af_index_rebuild_locked, by
 * the sweep). Invariants
 *   - At most one live (ACTIVE) slot has an entry under a name; entries of slots that are not live are passed over.
 *   - An entry is stored after its slot's names, and removed before the slot is FREE.
 *   - Nobody waits for the lock for long: impatient callers get AF_EBUSY after some microseconds, and back off.
 *   - A hint {task, n} says that every {task}-{m}, m < n, is in use; it is lowered before one of those is removed,
 * and raised after the one it counts was published. Too low costs a probe, too high would skip a number.
 */
#include "layout.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

static inline uint64_t fingerprint(uint64_t hash) { return hash >> 32; }
static inline uint64_t bucket_of(const af_arena *a, uint64_t hash) { return hash & (a->g->buckets - 1); }
static inline uint64_t load_entry(af_word *e) { return atomic_load_explicit(e, memory_order_acquire); }
static inline uint64_t entry_make(uint64_t hash, uint32_t space, uint32_t s) {
    return (fingerprint(hash) << 32) | (space == AF_SPACE_KEY ? AF_ENTRY_KEY : 0) | (s + 1u);
}
static inline uint32_t entry_slot(uint64_t e) { return ((uint32_t)e & ~(uint32_t)AF_ENTRY_KEY) - 1; }

/* Can entry e be of this name? Its slot is then a valid number. */
static bool entry_may_be(const af_arena *a, uint64_t e, uint64_t hash, uint32_t space) {
    if (!e || e >> 32 != fingerprint(hash)) return false;
    if (((e & AF_ENTRY_KEY) != 0) != (space == AF_SPACE_KEY)) return false;
    uint32_t s = entry_slot(e);
    return af_slot_ok(a, s) && (af_slot_kind(a, s) == AF_KIND_SHARD) == (space == AF_SPACE_SHARD);
}

static bool name_is(af_arena *a, uint32_t s, uint32_t space, const char *name, uint32_t len) {
    const af_slot *slot = &a->slots[s];
    const char *id, *key;
    af_slot_names(a, slot, &id, &key);
    bool by_key = space == AF_SPACE_KEY;
    uint32_t have = atomic_load_explicit(by_key ? &slot->key_len : &slot->id_len, memory_order_relaxed);
    return have == len && memcmp(by_key ? key : id, name, len) == 0;
}

/* --------------------------------------------------------------------------------------------------- lock ---- */

static void lock_acquired(af_arena *a, int r) {
    if (r == EOWNERDEAD) {
        /* Its change is one store: done or not. Only overflow buckets may be in no chain. */
        pthread_mutex_consistent(&a->h->index_mutex);
        atomic_store_explicit(&a->h->index_dirty, 1, memory_order_relaxed);
    }
    atomic_store_explicit(&a->h->lock_owner, a->proc + 1u, memory_order_relaxed);
    AF_CP(lock_taken);
}

int af_index_lock(af_arena *a, int patience) {
    for (int i = 0; i < 96; i++) {
        int r = pthread_mutex_trylock(&a->h->index_mutex);
        if (r == 0 || r == EOWNERDEAD) {
            lock_acquired(a, r);
            return AF_OK;
        }
        if (i >= 80) sched_yield();
#if defined(__x86_64__)
        else
            __builtin_ia32_pause();
#endif
    }
    for (int i = 0; patience == AF_PATIENT && i < 20000; i++) { /* one second */
        struct timespec t = {0, 50000};
        nanosleep(&t, NULL);
        int r = pthread_mutex_trylock(&a->h->index_mutex);
        if (r == 0 || r == EOWNERDEAD) {
            lock_acquired(a, r);
            return AF_OK;
        }
    }
    return AF_EBUSY;
}

void af_index_unlock(af_arena *a) {
    atomic_store_explicit(&a->h->lock_owner, 0, memory_order_relaxed);
    pthread_mutex_unlock(&a->h->index_mutex);
}

int af_lock_owner(af_arena *a) { return (int)atomic_load_explicit(&a->h->lock_owner, memory_order_relaxed) - 1; }

/* ------------------------------------------------------------------------------------------------- lookup ---- */

/* An entry that did not lead to the name is read again: if it was swapped to another slot in the meantime (a shard
 * being replaced, a key that moves), the new one counts, so a name that is always bound is always found. */
int64_t af_index_pin(af_arena *a, uint32_t space, const char *name, uint32_t len) {
    uint64_t hash = af_hash(a, space, name, len);
    af_bucket *b = &a->buckets[bucket_of(a, hash)];
    for (;;) {
        for (int i = 0; i < AF_WAYS; i++) {
            uint64_t e = load_entry(&b->entry[i]);
            while (entry_may_be(a, e, hash, space)) {
                uint32_t s = entry_slot(e);
                if (af_slot_pin_raw(a, s)) {
                    if (name_is(a, s, space, name, len) && af_slot_visible(a, s)) return s;
                    af_unpin(a, s);
                }
                uint64_t again = load_entry(&b->entry[i]);
                if (again == e) break;
                e = again;
            }
        }
        uint64_t next = load_entry(&b->next);
        if (!next) return AF_ENOENT;
        b = &a->buckets[next];
    }
}

int64_t af_pin_id(af_arena *a, const char *id, uint32_t len) { return af_index_pin(a, AF_SPACE_ID, id, len); }
int64_t af_pin_key(af_arena *a, const char *key, uint32_t len) {
    return len ? af_index_pin(a, AF_SPACE_KEY, key, len) : AF_ENOENT;
}
int64_t af_pin_shard(af_arena *a, const char *id, uint32_t len) { return af_index_pin(a, AF_SPACE_SHARD, id, len); }

/* A slot seen ACTIVE under the lock keeps its names until the lock is released: its reaper needs the lock first. */
af_word *af_index_find_locked(af_arena *a, uint32_t space, const char *name, uint32_t len, uint64_t not_slot,
                              uint32_t *found) {
    uint64_t hash = af_hash(a, space, name, len);
    for (af_bucket *b = &a->buckets[bucket_of(a, hash)];;) {
        for (int i = 0; i < AF_WAYS; i++) {
            uint64_t e = load_entry(&b->entry[i]);
            if (!entry_may_be(a, e, hash, space)) continue;
            uint32_t s = entry_slot(e);
            uint64_t c = atomic_load_explicit(&a->ctl[s], memory_order_acquire);
            if (s == not_slot || af_ctl_state(c) != AF_STATE_ACTIVE || !name_is(a, s, space, name, len)) continue;
            *found = s;
            return &b->entry[i];
        }
        uint64_t next = load_entry(&b->next);
        if (!next) return NULL;
        b = &a->buckets[next];
    }
}

/* ------------------------------------------------------------------------------------------------- change ---- */

/* A free overflow bucket, linked behind `last`. crash: in between it is in no chain; index_dirty tells. */
static af_bucket *overflow_add(af_arena *a, af_bucket *last) {
    uint64_t n = load_entry(&a->h->overflow_free);
    if (!n) return NULL;
    af_bucket *b = &a->buckets[n];
    atomic_store_explicit(&a->h->overflow_free, load_entry(&b->next), memory_order_relaxed);
    AF_CP(index_overflow_taken);
    atomic_store_explicit(&b->next, 0, memory_order_relaxed);
    atomic_store_explicit(&last->next, n, memory_order_release);
    atomic_fetch_add_explicit(&a->h->overflow_used, 1, memory_order_relaxed);
    return b;
}

/* Unlink the last overflow bucket of b's chain if it is empty; false if there was none such. Readers standing on it
 * see another chain's entries, which do not match, and an end. */
static bool overflow_drop(af_arena *a, af_bucket *b) {
    af_bucket *before = NULL;
    for (uint64_t next; (next = load_entry(&b->next)) != 0; b = &a->buckets[next]) before = b;
    if (!before) return false;
    for (int i = 0; i < AF_WAYS; i++) {
        if (load_entry(&b->entry[i])) return false;
    }
    atomic_store_explicit(&before->next, 0, memory_order_release);
    AF_CP(index_overflow_unlinked);
    atomic_store_explicit(&b->next, load_entry(&a->h->overflow_free), memory_order_relaxed);
    atomic_store_explicit(&a->h->overflow_free, (uint64_t)(b - a->buckets), memory_order_release);
    atomic_fetch_sub_explicit(&a->h->overflow_used, 1, memory_order_relaxed);
    return true;
}

int af_index_insert_locked(af_arena *a, uint32_t space, const char *name, uint32_t len, uint32_t s) {
    uint64_t hash = af_hash(a, space, name, len);
    af_word *hole = NULL;
    af_bucket *b = &a->buckets[bucket_of(a, hash)];
    for (;;) {
        for (int i = 0; i < AF_WAYS && !hole; i++) {
            if (!load_entry(&b->entry[i])) hole = &b->entry[i];
        }
        uint64_t next = hole ? 0 : load_entry(&b->next);
        if (!next) break;
        b = &a->buckets[next];
    }
    if (!hole) {
        b = overflow_add(a, b);
        if (!b) return AF_ENOSPC;
        hole = &b->entry[0];
    }
    AF_CP(index_before_store);
    /* COMMIT POINT of the entry. order: release of the names; readers acquire. crash: the entry stands and its slot
     * is INIT: nobody can pin that, and the sweep of its owner removes both. */
    atomic_store_explicit(hole, entry_make(hash, space, s), memory_order_release);
    AF_CP(index_inserted);
    return AF_OK;
}

void af_index_swap_locked(af_arena *a, af_word *entry, uint32_t s) {
    uint64_t e = load_entry(entry);
    (void)a;
    /* COMMIT POINT of a replacement: whoever reads the entry from now on gets the new slot. */
    atomic_store_explicit(entry, (e & ~0x7fffffffull) | (s + 1u), memory_order_release);
    AF_CP(index_swapped);
}

/* Idempotent, so that a sweep can do it again for a dead owner. `txn`: only while the slot is still its member. */
int af_index_bind_key_locked(af_arena *a, uint32_t s, uint64_t txn) {
    af_slot *slot = &a->slots[s];
    const char *id, *key;
    uint32_t other;
    if (af_ctl_state(atomic_load_explicit(&a->ctl[s], memory_order_acquire)) != AF_STATE_ACTIVE) return AF_OK;
    if (atomic_load_explicit(&slot->txn, memory_order_relaxed) != txn) return AF_OK;
    if (!(atomic_load_explicit(&slot->flags, memory_order_relaxed) & AF_SLOT_KEY_PENDING)) return AF_OK;
    af_slot_names(a, slot, &id, &key);
    uint32_t len = atomic_load_explicit(&slot->key_len, memory_order_relaxed);
    af_word *entry = af_index_find_locked(a, AF_SPACE_KEY, key, len, AF_NONE, &other);
    int r = entry ? AF_OK : af_index_insert_locked(a, AF_SPACE_KEY, key, len, s);
    if (r) return r;
    if (entry && other != s) af_index_swap_locked(a, entry, s);
    AF_CP(key_bound);
    atomic_store_explicit(&slot->flags, 0, memory_order_release);
    return AF_OK;
}

static void remove_name(af_arena *a, uint32_t space, const char *name, uint32_t len, uint32_t s) {
    uint64_t hash = af_hash(a, space, name, len), wanted = entry_make(hash, space, s);
    af_bucket *first = &a->buckets[bucket_of(a, hash)];
    for (af_bucket *b = first;;) {
        for (int i = 0; i < AF_WAYS; i++) {
            if (load_entry(&b->entry[i]) != wanted) continue;
            atomic_store_explicit(&b->entry[i], 0, memory_order_release);
            AF_CP(index_removed_one);
        }
        uint64_t next = load_entry(&b->next);
        if (!next) break;
        b = &a->buckets[next];
    }
    while (overflow_drop(a, first)) {}
}

bool af_index_has_locked(af_arena *a, uint32_t s) {
    const char *id, *key;
    uint32_t space = af_slot_kind(a, s) == AF_KIND_SHARD ? AF_SPACE_SHARD : AF_SPACE_ID, found;
    af_slot_names(a, &a->slots[s], &id, &key);
    uint32_t len = atomic_load_explicit(&a->slots[s].id_len, memory_order_relaxed);
    return af_index_find_locked(a, space, id, len, AF_NONE, &found) && found == s;
}

static void hint_lower_for_id(af_arena *a, const char *id, uint32_t len);

void af_index_remove_locked(af_arena *a, uint32_t s) {
    const af_slot *slot = &a->slots[s];
    const char *id, *key;
    af_slot_names(a, slot, &id, &key);
    uint32_t id_len = atomic_load_explicit(&slot->id_len, memory_order_relaxed);
    uint32_t key_len = atomic_load_explicit(&slot->key_len, memory_order_relaxed);
    bool session = af_slot_kind(a, s) == AF_KIND_SESSION;
    if (!id_len && !key_len) return;
    if (session) hint_lower_for_id(a, id, id_len);
    remove_name(a, session ? AF_SPACE_ID : AF_SPACE_SHARD, id, id_len, s);
    if (session && key_len) remove_name(a, AF_SPACE_KEY, key, key_len, s);
}

/* Every overflow bucket that no chain reaches is free (and empty: only empty ones are ever between chains).
 * crash: index_dirty stands until the end, so the next sweep starts over. */
void af_index_rebuild_locked(af_arena *a) {
    if (!atomic_load_explicit(&a->h->index_dirty, memory_order_relaxed)) return;
    bool *reached = calloc(a->g->overflow, sizeof *reached);
    if (!reached) return; /* the next sweep tries again */
    uint64_t used = 0;
    for (uint64_t i = 0; i < a->g->buckets; i++) {
        for (uint64_t n = load_entry(&a->buckets[i].next); n; n = load_entry(&a->buckets[n].next)) {
            reached[n - a->g->buckets] = true;
            used++;
        }
    }
    atomic_store_explicit(&a->h->overflow_free, 0, memory_order_relaxed);
    AF_CP(index_rebuild);
    for (uint64_t i = a->g->overflow; i-- > 0;) {
        if (reached[i]) continue;
        uint64_t n = a->g->buckets + i;
        atomic_store_explicit(&a->buckets[n].next, load_entry(&a->h->overflow_free), memory_order_relaxed);
        atomic_store_explicit(&a->h->overflow_free, n, memory_order_relaxed);
    }
    free(reached);
    atomic_store_explicit(&a->h->overflow_used, used, memory_order_relaxed);
    atomic_store_explicit(&a->h->index_dirty, 0, memory_order_release);
}

/* -------------------------------------------------------------------------------------------------- hints ---- */

static af_hint *hint_set(af_arena *a, const char *task, uint32_t len, uint64_t *hash) {
    *hash = af_hash(a, AF_SPACE_TASK, task, len) | 1; /* never 0 */
    return &a->hints[(*hash >> 8) & (a->g->hints - 1) & ~(uint64_t)(AF_HINT_WAYS - 1)];
}

uint64_t af_hint_get_locked(af_arena *a, const char *task, uint32_t len) {
    uint64_t hash;
    const af_hint *set = hint_set(a, task, len, &hash);
    for (int i = 0; i < AF_HINT_WAYS; i++) {
        if (set[i].hash == hash) return set[i].n;
    }
    return 0;
}

/* crash: a new entry is written n := 0 first, then hash, then n, and 0 is always true. */
void af_hint_raise_locked(af_arena *a, const char *task, uint32_t len, uint64_t n) {
    uint64_t hash;
    af_hint *set = hint_set(a, task, len, &hash), *at = &set[0];
    for (int i = 0; i < AF_HINT_WAYS; i++) {
        if (set[i].hash == hash) {
            set[i].n = n;
            return;
        }
        if (set[i].n < at->n) at = &set[i]; /* the cheapest one to find again */
    }
    at->n = 0;
    atomic_signal_fence(memory_order_seq_cst);
    at->hash = hash;
    atomic_signal_fence(memory_order_seq_cst);
    at->n = n;
}

/* If the id reads {task}-{m} with m written the plain way, no hint of that task may stay above m. */
static void hint_lower_for_id(af_arena *a, const char *id, uint32_t len) {
    uint32_t digits = 0;
    uint64_t m = 0, scale = 1, hash;
    while (digits < len && digits < 18 && id[len - 1 - digits] >= '0' && id[len - 1 - digits] <= '9') {
        m += (uint64_t)(id[len - 1 - digits] - '0') * scale;
        scale *= 10;
        digits++;
    }
    if (!digits || digits == len || id[len - 1 - digits] != '-' || (digits > 1 && id[len - digits] == '0')) return;
    af_hint *set = hint_set(a, id, len - 1 - digits, &hash);
    for (int i = 0; i < AF_HINT_WAYS; i++) {
        if (set[i].hash == hash && set[i].n > m) set[i].n = m;
    }
}
