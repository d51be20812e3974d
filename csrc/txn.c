/* txn.c: one word that makes several things happen at once.
 *
 * Theory: a transaction word is OPEN, then COMMITTED by one CAS, then free again under the next generation. Whatever
 * takes part names (index, generation): members of a group in their slot's txn word, exports in the aux of an
 * EXPORTING record. What a reference means follows from the word: open: not yet; committed: it happened; moved on:
 * look at the participant, into which the end was written before the word moved (member: txn cleared; export: outcome
 * set; neither: it was aborted). Invariants
 *   - A word moves on only after every participant that must remember the commit has it written down.
 *   - An exporter pins the sessions it exports until it has finished, so a dead one's exports are in slots that carry
 *     its pin bit; sweeps finish transactions before they clear pins.
 *   - Compaction leaves logs alone whose exports have not moved on, so a participant stays where it was found.
 */
#include "layout.h"

#include <stdlib.h>

static inline uint32_t index_of(uint64_t ref) { return (uint32_t)(ref & (AF_TXNS - 1)); }
static inline uint64_t generation_of(uint64_t ref) { return ref >> 12; }
static inline uint64_t load_txn(af_arena *a, uint64_t ref) {
    return atomic_load_explicit(&a->txns[index_of(ref)], memory_order_acquire);
}

int64_t af_txn_begin(af_arena *a) {
    for (uint32_t i = 0; i < AF_TXNS; i++) {
        uint32_t at = (uint32_t)(a->txn_cursor + i) % AF_TXNS;
        uint64_t w = atomic_load_explicit(&a->txns[at], memory_order_relaxed), gen = af_txn_gen(w) + 1;
        if (af_txn_word_state(w) != AF_TXN_WORD_FREE) continue;
        if (!atomic_compare_exchange_strong_explicit(&a->txns[at], &w, af_txn_make(gen, a->proc, AF_TXN_WORD_OPEN),
                                                     memory_order_acq_rel, memory_order_relaxed)) {
            continue;
        }
        a->txn_cursor = at + 1;
        AF_CP(txn_begun);
        return (int64_t)((gen << 12) | at);
    }
    return AF_EBUSY;
}

int af_txn_state(af_arena *a, uint64_t ref) {
    uint64_t w = load_txn(a, ref);
    if (!ref || af_txn_gen(w) != generation_of(ref)) return AF_TXN_GONE;
    switch (af_txn_word_state(w)) {
    case AF_TXN_WORD_OPEN:
        return AF_TXN_OPEN;
    case AF_TXN_WORD_COMMITTED:
        return AF_TXN_COMMITTED;
    default:
        return AF_TXN_GONE;
    }
}

/* Move our word from one state to another. crash (COMMIT POINT where `to` is COMMITTED): before it the sweep aborts,
 * after it the sweep finishes. */
static int step(af_arena *a, uint64_t ref, uint32_t from, uint32_t to) {
    uint64_t w = af_txn_make(generation_of(ref), a->proc, from);
    bool done = atomic_compare_exchange_strong_explicit(&a->txns[index_of(ref)], &w,
                                                        af_txn_make(generation_of(ref), a->proc, to),
                                                        memory_order_acq_rel, memory_order_relaxed);
    return done ? AF_OK : AF_EGONE;
}

static bool is_ours(af_arena *a, uint64_t ref, uint32_t state) {
    return ref && load_txn(a, ref) == af_txn_make(generation_of(ref), a->proc, state);
}

int af_txn_commit(af_arena *a, uint64_t ref) {
    int r = step(a, ref, AF_TXN_WORD_OPEN, AF_TXN_WORD_COMMITTED);
    if (!r) AF_CP(txn_committed);
    return r;
}

void af_txn_release_member(af_arena *a, uint32_t s, uint64_t ref) {
    /* By CAS: the member may have been removed and its slot taken for another session in the meantime. */
    atomic_compare_exchange_strong_explicit(&a->slots[s].txn, &ref, 0, memory_order_acq_rel, memory_order_relaxed);
}

/* Write COMMITTED into the session's EXPORTING records of this transaction; it may export several trajectories. */
bool af_txn_settle_export(af_arena *a, uint32_t s, uint64_t ref) {
    af_chain chain = {0};
    bool remove = false;
    if (!af_chain_read(a, s, 0, &chain)) {
        for (size_t i = 0; i < chain.count; i++) {
            const af_link *link = &chain.links[i];
            if (link->header.type != AF_REC_EXPORTING || link->header.aux != ref) continue;
            atomic_store_explicit(&af_record_at(a, link->offset)->outcome, AF_OUTCOME_COMMITTED,
                                  memory_order_release);
            remove = remove || (link->header.flags & AF_REC_FLAG_REMOVE);
            AF_CP(txn_outcome_set);
        }
    }
    free(chain.links);
    return remove;
}

static int finish_slot(af_arena *a, uint32_t s, uint64_t ref) {
    if (atomic_load_explicit(&a->slots[s].txn, memory_order_acquire) == ref) {
        uint32_t flags = atomic_load_explicit(&a->slots[s].flags, memory_order_acquire);
        if (flags & AF_SLOT_KEY_PENDING) {
            if (af_index_lock(a, AF_IMPATIENT)) return AF_EBUSY;
            int r = af_index_bind_key_locked(a, s, ref);
            af_index_unlock(a);
            if (r) return r;
        }
        af_txn_release_member(a, s, ref);
        return AF_OK;
    }
    uint64_t c = atomic_load_explicit(&a->ctl[s], memory_order_acquire);
    if (!(af_ctl_mask(c) & (1u << a->proc))) return AF_OK; /* not pinned: a member that was removed already */
    if (af_txn_settle_export(a, s, ref)) af_session_close(a, s);
    return AF_OK;
}

int af_txn_finish(af_arena *a, uint64_t ref, const uint32_t *slots, uint32_t count) {
    if (!is_ours(a, ref, AF_TXN_WORD_COMMITTED)) return AF_EGONE;
    for (uint32_t i = 0; i < count; i++) {
        if (!af_slot_ok(a, slots[i])) return AF_EINVAL;
        int r = finish_slot(a, slots[i], ref);
        if (r) return r;
        AF_CP(txn_half_finished);
    }
    int r = step(a, ref, AF_TXN_WORD_COMMITTED, AF_TXN_WORD_FREE);
    AF_CP(txn_finished);
    return r;
}

/* Members go first: while the word is open the sweep finds them by it. */
int af_txn_abort(af_arena *a, uint64_t ref, const uint32_t *slots, uint32_t count) {
    if (!is_ours(a, ref, AF_TXN_WORD_OPEN)) return AF_EGONE;
    for (uint32_t i = 0; i < count; i++) {
        if (!af_slot_ok(a, slots[i])) return AF_EINVAL;
        if (atomic_load_explicit(&a->slots[slots[i]].txn, memory_order_acquire) != ref) continue;
        af_slot_close(a, slots[i]);
        af_slot_reap_closing(a, slots[i]); /* or the cleaner's scan does */
        AF_CP(txn_aborting);
    }
    int r = step(a, ref, AF_TXN_WORD_OPEN, AF_TXN_WORD_FREE);
    AF_CP(txn_aborted);
    return r;
}
