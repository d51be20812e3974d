/* slots.c: the table of slots: taking and freeing them, their names, and pins.
 *
 * Theory: the control word (layout.h) says who may do what with a slot; its states and edges are in LAYOUT.md. A pin
 * is one bit a process, so what a dead process pinned is exactly its bits; how many of its requests use the slot is
 * counted in its own heap. Everything a slot holds is freed by one owner, in an order that can be repeated from any
 * point. Invariants
 *   - Only ACTIVE slots are pinned, and a slot leaves {ACTIVE, CLOSING} only with an empty mask: whoever pins may
 * read names and log without further checks (of the log: by generation).
 *   - INIT, DETACHED and DUMPED words are changed by their owner alone (or, it being dead, by the sweep).
 *   - A FREE slot is empty: head offset, names, lengths and txn are zero, and no index entry leads to it.
 */
#include "layout.h"

#include <sched.h>
#include <stdlib.h>

static inline uint64_t load_ctl(af_arena *a, uint64_t s) {
    return atomic_load_explicit(&a->ctl[s], memory_order_acquire);
}

/* ------------------------------------------------------------------------------------------ take and free ---- */

static void note_free_slot(af_arena *a, uint64_t b) {
    uint64_t w = atomic_load_explicit(&a->slot_blocks[b], memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&a->slot_blocks[b], &w, (w | 1) + 2, memory_order_acq_rel,
                                                  memory_order_relaxed)) {}
}

/* A FREE slot of slot block b, from slot `from` on, becomes INIT(me). -1: none. */
static int64_t take_slot_in_block(af_arena *a, uint64_t b, uint64_t from) {
    uint64_t seen = atomic_load_explicit(&a->slot_blocks[b], memory_order_acquire);
    if (!(seen & 1)) return -1;
    for (uint64_t s = from; s < (b + 1) * AF_BLOCK; s++) {
        uint64_t c = load_ctl(a, s);
        if (af_ctl_state(c) == AF_STATE_FREE &&
            atomic_compare_exchange_strong_explicit(&a->ctl[s], &c, af_ctl_next(c, a->proc, AF_STATE_INIT, 0),
                                                    memory_order_acq_rel, memory_order_relaxed)) {
            return (int64_t)s;
        }
    }
    if (from == b * AF_BLOCK) {
        atomic_compare_exchange_strong_explicit(&a->slot_blocks[b], &seen, seen & ~1ull, memory_order_acq_rel,
                                                memory_order_relaxed);
    }
    return -1;
}

/* Back 512 more slots of a kind. crash: backed but not counted; the next caller backs them again. */
static int slots_extend(af_arena *a, uint32_t kind, uint64_t ready) {
    uint64_t limit = kind == AF_KIND_SESSION ? a->g->session_slots : a->g->shard_slots;
    if (ready >= limit) return AF_ENOSPC;
    uint64_t s = af_slots_first(a, kind) + ready;
    int r = af_back(a, a->g->ctl_at + s * sizeof(af_word), AF_BLOCK * sizeof(af_word));
    if (!r) r = af_back(a, a->g->touch_at + s * sizeof(af_word), AF_BLOCK * sizeof(af_word));
    if (!r) r = af_back(a, a->g->slots_at + s * sizeof(af_slot), AF_BLOCK * sizeof(af_slot));
    if (r) return r;
    AF_CP(slots_backed);
    uint64_t now = ready;
    while (now < ready + AF_BLOCK &&
           !atomic_compare_exchange_weak_explicit(&a->h->slots_ready[kind], &now, ready + AF_BLOCK,
                                                  memory_order_acq_rel, memory_order_acquire)) {}
    return AF_OK;
}

int64_t af_slot_take(af_arena *a, uint32_t kind) {
    uint64_t first = af_slots_first(a, kind);
    for (;;) {
        uint64_t ready = atomic_load_explicit(&a->h->slots_ready[kind], memory_order_acquire);
        int64_t s = -1;
        uint64_t from = first + atomic_load_explicit(&a->slot_cursor[kind], memory_order_relaxed);
        if (from < first + ready) { s = take_slot_in_block(a, from / AF_BLOCK, from); }
        for (uint64_t b = first / AF_BLOCK; s < 0 && b < (first + ready) / AF_BLOCK; b++) {
            s = take_slot_in_block(a, b, b * AF_BLOCK);
        }
        if (s >= 0) {
            atomic_store_explicit(&a->slot_cursor[kind], (uint64_t)s - first + 1, memory_order_relaxed);
            AF_CP(slot_taken);
            return s;
        }
        int r = slots_extend(a, kind, ready);
        if (r) return r;
    }
}

/* order: the store releases the emptied slot to the next owner's CAS. crash: FREE but perhaps not noted in its slot
 * block: the sweep notes them all. */
void af_slot_give_back(af_arena *a, uint32_t s) {
    uint64_t c = load_ctl(a, s);
    atomic_store_explicit(&a->ctl[s], af_ctl_next(c, 0, AF_STATE_FREE, 0), memory_order_release);
    AF_CP(slot_freed);
    note_free_slot(a, s / AF_BLOCK);
    uint32_t kind = af_slot_kind(a, s);
    uint64_t at = s - af_slots_first(a, kind);
    af_cursor_back(&a->slot_cursor[kind], at);
}

/* -------------------------------------------------------------------------------------------------- names ---- */

/* Where id and key lie. Caller pins the slot, owns it, or holds the index lock and saw it ACTIVE. */
void af_slot_names(const af_arena *a, const af_slot *slot, const char **id, const char **key) {
    uint64_t off = atomic_load_explicit(&slot->names_off, memory_order_relaxed);
    *id = off ? (const char *)(a->base + off) : slot->names;
    *key = *id + atomic_load_explicit(&slot->id_len, memory_order_relaxed);
}

/* Write the names of an INIT slot; into `names_run` (RES(me), large enough) if that is not negative.
 * crash: a run reached by names_off is kept by the sweep and freed with the INIT slot; one not yet reached is freed.
 */
int af_slot_set_names(af_arena *a, uint32_t s, const char *id, uint32_t id_len, const char *key, uint32_t key_len,
                      int64_t names_run) {
    af_slot *slot = &a->slots[s];
    char *at = slot->names;
    if (names_run >= 0)
        at = (char *)(a->base + af_run_offset(a, (uint64_t)names_run));
    else if (id_len + key_len > AF_INLINE_NAMES)
        return AF_EINVAL;
    memcpy(at, id, id_len);
    if (key_len) memcpy(at + id_len, key, key_len);
    AF_CP(names_written);
    if (names_run >= 0) {
        atomic_store_explicit(&slot->names_off, af_run_offset(a, (uint64_t)names_run), memory_order_release);
        AF_CP(names_linked);
        af_run_commit(a, (uint64_t)names_run);
    }
    atomic_store_explicit(&slot->id_len, id_len, memory_order_relaxed);
    atomic_store_explicit(&slot->key_len, key_len, memory_order_release);
    return AF_OK;
}

/* --------------------------------------------------------------------------------------------------- pins ---- */

bool af_slot_visible(af_arena *a, uint32_t s) {
    uint64_t ref = atomic_load_explicit(&a->slots[s].txn, memory_order_acquire);
    if (!ref) return true;
    int state = af_txn_state(a, ref);
    if (state == AF_TXN_COMMITTED) return true;
    if (state == AF_TXN_OPEN) return false;
    /* The word moved on: finished (then txn was cleared before) or aborted (then it is still there). */
    return atomic_load_explicit(&a->slots[s].txn, memory_order_acquire) == 0;
}

/* order: the CAS acquires the slot's contents from whoever published ACTIVE, and its bit keeps everybody from freeing
 *        them. The counter's BUSY state keeps this process's other threads out while the bit changes.
 * crash: the bit is set; the sweep clears it. */
bool af_slot_pin_raw(af_arena *a, uint32_t s) {
    uint32_t n = atomic_load_explicit(&a->pins[s], memory_order_relaxed);
    for (;;) {
        if (n == AF_PIN_BUSY) {
            sched_yield();
            n = atomic_load_explicit(&a->pins[s], memory_order_relaxed);
        } else if (n > 0) {
            if (af_ctl_state(load_ctl(a, s)) != AF_STATE_ACTIVE) return false;
            if (atomic_compare_exchange_weak_explicit(&a->pins[s], &n, n + 1, memory_order_acquire,
                                                      memory_order_relaxed))
                return true;
        } else if (atomic_compare_exchange_weak_explicit(&a->pins[s], &n, AF_PIN_BUSY, memory_order_acquire,
                                                         memory_order_relaxed)) {
            break;
        }
    }
    uint64_t c = load_ctl(a, s);
    bool done = false;
    while (!done && af_ctl_state(c) == AF_STATE_ACTIVE) {
        done = atomic_compare_exchange_weak_explicit(&a->ctl[s], &c, c | (1ull << a->proc), memory_order_acq_rel,
                                                     memory_order_acquire);
    }
    if (done) AF_CP(pinned);
    atomic_store_explicit(&a->pins[s], done ? 1 : 0, memory_order_release);
    return done;
}

int af_pin_slot(af_arena *a, uint32_t s) {
    if (!af_slot_ok(a, s) || !af_slot_pin_raw(a, s)) return 0;
    if (af_slot_visible(a, s)) return 1;
    af_unpin(a, s);
    return 0;
}

/* order: the CAS releases everything done under the pin to whoever detaches or reaps. crash: before it the bit stands
 *        and the sweep clears it; after it a CLOSING slot waits for the cleaner's scan. */
void af_unpin(af_arena *a, uint32_t s) {
    uint32_t n = atomic_load_explicit(&a->pins[s], memory_order_relaxed);
    for (;;) {
        if (n == AF_PIN_BUSY) {
            sched_yield();
            n = atomic_load_explicit(&a->pins[s], memory_order_relaxed);
        } else if (n == 0) {
            return; /* not pinned: a caller's mistake that must not clear a bit twice */
        } else if (atomic_compare_exchange_weak_explicit(&a->pins[s], &n, n == 1 ? AF_PIN_BUSY : n - 1,
                                                         memory_order_acq_rel, memory_order_relaxed)) {
            if (n > 1) return;
            break;
        }
    }
    uint64_t c = atomic_load_explicit(&a->ctl[s], memory_order_relaxed), to;
    do {
        to = (c & ~(1ull << a->proc)) + AF_CTL_SEQ_ONE;
    } while (!atomic_compare_exchange_weak_explicit(&a->ctl[s], &c, to, memory_order_acq_rel, memory_order_relaxed));
    AF_CP(unpinned);
    atomic_store_explicit(&a->pins[s], 0, memory_order_release);
    if (af_ctl_state(to) == AF_STATE_CLOSING && !af_ctl_mask(to)) af_slot_reap_closing(a, s);
}

uint32_t af_pin_count(af_arena *a, uint32_t s) {
    if (s >= a->g->slots) return 0;
    uint32_t n = atomic_load_explicit(&a->pins[s], memory_order_relaxed);
    return n == AF_PIN_BUSY ? 0 : n;
}

void af_touch(af_arena *a, uint32_t s) { atomic_store_explicit(&a->touch[s], af_now_ns(), memory_order_relaxed); }

/* -------------------------------------------------------------------------------------------- close, reap ---- */

/* COMMIT POINT of removal. order: acq_rel, pairs with the acquire of every later pin attempt.
 * crash: before it nothing happened; after it the last unpin, the sweep of the last holder or the cleaner's scan
 * reaps. */
bool af_slot_close(af_arena *a, uint32_t s) {
    uint64_t c = load_ctl(a, s);
    do {
        if (af_ctl_state(c) != AF_STATE_ACTIVE) return false;
    } while (!atomic_compare_exchange_weak_explicit(&a->ctl[s], &c,
                                                    af_ctl_next(c, 0, AF_STATE_CLOSING, af_ctl_mask(c)),
                                                    memory_order_acq_rel, memory_order_acquire));
    AF_CP(closed);
    if (af_slot_kind(a, s) == AF_KIND_SHARD) {
        uint64_t bytes = atomic_load_explicit(&a->slots[s].nbytes, memory_order_relaxed);
        atomic_fetch_sub_explicit(&a->h->shard_bytes, bytes, memory_order_relaxed);
    }
    return true;
}

/* Free what an unindexed DUMPED(me) or INIT(me) slot holds, then the slot.
 * crash: runs are COM or RES(me) until head and names_off no longer reach them, then RES(me). The sweep turns reached
 *        ones back into COM and frees the others, then does all of this again. */
int af_slot_empty(af_arena *a, uint32_t s) {
    af_slot *slot = &a->slots[s];
    af_chain chain = {0};
    uint64_t *runs = NULL;
    size_t count = 0;
    int r = af_chain_read(a, s, 0, &chain);
    if (!r || r == AF_ECORRUPT) r = af_chain_runs(a, &chain, &runs, &count);
    free(chain.links);
    if (r) return r;
    for (size_t i = 0; i < count; i++) af_run_retake(a, runs[i], a->proc);
    AF_CP(reap_retaken);
    uint64_t head = atomic_load_explicit(&slot->head, memory_order_relaxed);
    atomic_store_explicit(&slot->head, af_head_make(0, af_head_gen(head) + 1), memory_order_release);
    atomic_store_explicit(&slot->open, 0, memory_order_relaxed);
    AF_CP(reap_unlinked);
    uint64_t names = atomic_load_explicit(&slot->names_off, memory_order_relaxed);
    int64_t names_run = names ? af_run_of(a, names) : -1;
    if (names_run >= 0) af_run_retake(a, (uint64_t)names_run, a->proc);
    atomic_store_explicit(&slot->id_len, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->key_len, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->names_off, 0, memory_order_release);
    AF_CP(reap_unnamed);
    for (size_t i = 0; i < count; i++) {
        af_run_free(a, runs[i]);
        if (i == count / 2) AF_CP(reap_half_freed);
    }
    if (names_run >= 0) af_run_free(a, (uint64_t)names_run);
    free(runs);
    AF_CP(reap_freed);
    atomic_store_explicit(&slot->txn, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->flags, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->nbytes, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->ordinal, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->deadline_ns, 0, memory_order_relaxed);
    af_slot_give_back(a, s);
    return AF_OK;
}

int af_slot_reap(af_arena *a, uint32_t s, bool patient) {
    if (af_index_lock(a, patient ? AF_PATIENT : AF_IMPATIENT)) return AF_EBUSY;
    af_index_remove_locked(a, s);
    af_index_unlock(a);
    AF_CP(reap_unindexed);
    return af_slot_empty(a, s);
}

/* The lock is taken before the state changes, so that a slot is DUMPED only while somebody is really freeing it. */
bool af_slot_reap_closing(af_arena *a, uint32_t s) {
    if (af_index_lock(a, AF_IMPATIENT)) return false;
    uint64_t c = load_ctl(a, s);
    bool mine = af_ctl_state(c) == AF_STATE_CLOSING && !af_ctl_mask(c) &&
                atomic_compare_exchange_strong_explicit(&a->ctl[s], &c, af_ctl_next(c, a->proc, AF_STATE_DUMPED, 0),
                                                        memory_order_acq_rel, memory_order_relaxed);
    if (mine) {
        AF_CP(reap_taken);
        af_index_remove_locked(a, s);
    }
    af_index_unlock(a);
    return mine && af_slot_empty(a, s) == AF_OK;
}

/* --------------------------------------------------------------------------------------------------- look ---- */

static void info_copy(af_arena *a, uint32_t s, uint64_t c, af_slot_info *out) {
    af_slot *slot = &a->slots[s];
    memset(out, 0, offsetof(af_slot_info, id));
    out->state = af_ctl_state(c);
    out->owner = af_ctl_owner(c);
    out->seq = af_ctl_seq(c);
    out->pins = af_ctl_mask(c);
    out->kind = af_slot_kind(a, s);
    out->created_ns = atomic_load_explicit(&slot->created_ns, memory_order_relaxed);
    out->touched_ns = atomic_load_explicit(&a->touch[s], memory_order_relaxed);
    out->nbytes = atomic_load_explicit(&slot->nbytes, memory_order_relaxed);
    out->ordinal = atomic_load_explicit(&slot->ordinal, memory_order_relaxed);
    out->head = atomic_load_explicit(&slot->head, memory_order_relaxed);
    out->txn = atomic_load_explicit(&slot->txn, memory_order_relaxed);
    out->deadline_ns = (int64_t)atomic_load_explicit(&slot->deadline_ns, memory_order_relaxed);
    out->id_len = atomic_load_explicit(&slot->id_len, memory_order_relaxed);
    out->key_len = atomic_load_explicit(&slot->key_len, memory_order_relaxed);
    if (out->id_len > AF_ID_MAX || out->key_len > AF_KEY_MAX) out->id_len = out->key_len = 0;
    uint64_t off = atomic_load_explicit(&slot->names_off, memory_order_relaxed);
    const uint8_t *names = (const uint8_t *)slot->names;
    size_t room = AF_INLINE_NAMES;
    if (off >= a->g->heap_at && off < a->g->total_bytes) {
        names = a->base + off;
        room = a->g->total_bytes - off;
    }
    if ((size_t)out->id_len + out->key_len > room) out->id_len = out->key_len = 0;
    af_racy_copy(out->id, names, out->id_len);
    af_racy_copy(out->key, names + out->id_len, out->key_len);
}

int af_slot_get(af_arena *a, uint32_t s, af_slot_info *out) {
    if (s >= a->g->slots) return AF_EINVAL;
    memset(out, 0, offsetof(af_slot_info, id));
    if (!af_slot_ok(a, s)) {
        out->kind = af_slot_kind(a, s);
        return AF_OK; /* never used: FREE */
    }
    for (int i = 0; i < 64; i++) {
        uint64_t c = load_ctl(a, s);
        if (af_ctl_state(c) == AF_STATE_ACTIVE) {
            if (!af_slot_pin_raw(a, s)) continue;
            info_copy(a, s, c, out);
            af_unpin(a, s);
            return AF_OK;
        }
        info_copy(a, s, c, out);
        atomic_thread_fence(memory_order_acquire);
        uint64_t again = atomic_load_explicit(&a->ctl[s], memory_order_relaxed);
        if ((c ^ again) >> 32 == 0) return AF_OK;
    }
    return AF_EBUSY;
}

int64_t af_next_ordinal(af_arena *a, uint32_t s) {
    if (!af_slot_ok(a, s)) return AF_EINVAL;
    return (int64_t)atomic_fetch_add_explicit(&a->slots[s].ordinal, 1, memory_order_acq_rel);
}

int64_t af_deadline_get(af_arena *a, uint32_t s) {
    if (!af_slot_ok(a, s)) return AF_EINVAL;
    return (int64_t)atomic_load_explicit(&a->slots[s].deadline_ns, memory_order_acquire);
}

int af_deadline_set(af_arena *a, uint32_t s, int64_t ns) {
    if (!af_slot_ok(a, s)) return AF_EINVAL;
    atomic_store_explicit(&a->slots[s].deadline_ns, (uint64_t)ns, memory_order_release);
    return AF_OK;
}

/* Up to `max` slots of [first, end) from `cursor` on whose control word has `state` (and `owner`, unless that is
 * AF_MAX_PROCS), and which were created before a time. */
static int64_t list_slots(af_arena *a, uint32_t cursor, uint32_t end, uint32_t state, uint32_t owner, uint64_t before,
                          uint32_t *slots, uint32_t max, uint32_t *next) {
    uint32_t n = 0, s = cursor;
    for (; s < end && n < max; s++) {
        uint64_t c = load_ctl(a, s);
        if (af_ctl_state(c) != state || (owner < AF_MAX_PROCS && af_ctl_owner(c) != owner)) continue;
        if (before != AF_NONE && atomic_load_explicit(&a->slots[s].created_ns, memory_order_relaxed) >= before)
            continue;
        slots[n++] = s;
    }
    *next = s < end ? s : 0;
    return n;
}

int64_t af_sessions(af_arena *a, uint32_t cursor, uint32_t *slots, uint32_t max, uint32_t *next) {
    return list_slots(a, cursor, af_slots_end(a, AF_KIND_SESSION), AF_STATE_ACTIVE, AF_MAX_PROCS, AF_NONE, slots, max,
                      next);
}

int64_t af_expired_shards(af_arena *a, uint64_t before, uint32_t cursor, uint32_t *slots, uint32_t max,
                          uint32_t *next) {
    uint32_t first = af_slots_first(a, AF_KIND_SHARD);
    if (cursor < first) cursor = first;
    return list_slots(a, cursor, af_slots_end(a, AF_KIND_SHARD), AF_STATE_ACTIVE, AF_MAX_PROCS, before, slots, max,
                      next);
}

int64_t af_owned_slots(af_arena *a, uint32_t state, uint32_t proc, uint32_t cursor, uint32_t *slots, uint32_t max,
                       uint32_t *next) {
    uint32_t first = af_slots_first(a, AF_KIND_SHARD), end = af_slots_end(a, AF_KIND_SESSION), n = 0;
    *next = 0;
    if (max == 0 || proc >= AF_MAX_PROCS) return AF_EINVAL;
    if (cursor < first) {
        n = (uint32_t)list_slots(a, cursor, end, state, proc, AF_NONE, slots, max, next);
        if (*next) return n;
        if (n == max) {
            *next = first;
            return n;
        }
        cursor = first;
    }
    return n + list_slots(a, cursor, af_slots_end(a, AF_KIND_SHARD), state, proc, AF_NONE, slots + n, max - n, next);
}
