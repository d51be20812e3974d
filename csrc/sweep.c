/* sweep.c: taking back what a dead process held.
 *
 * Theory: everything unfinished carries its owner's number: RES runs, INIT, DETACHED and DUMPED slots, transaction
 * words, pin bits, and the intents in its process slot. The sweep finishes or undoes each, acting *under the dead
 * one's number* (a private copy of the handle with that number), so that a sweep that is killed leaves only what the
 * next one looks for. It runs beside live processes and changes words only by CAS, or where the dead one was their
 * only writer. Order, and why:
 *   1. intents      a cut log's old chain is found through one; nothing of it was freed while it stands
 *   2. runs         linked ones are kept (COM), others freed. While its pins stand, no slot the dead one was
 * appending to can be reaped, so "linked" can still be told
 *   3. transactions open ones aborted, committed ones finished: its exports are in slots that carry its pin bit
 *   4. slots        pins cleared, INIT and DUMPED emptied, CLOSING reaped; DETACHED stays for its successor
 *   5. hints        all free-room hints raised, overflow chain rebuilt, running sums recounted
 * It never touches what a live process owns.
 */
#include "layout.h"

#include <stdlib.h>

/* ----------------------------------------------------------------------------------------------- intents ----- */

static bool is_orphan_locked(af_arena *as, uint64_t slot_plus_one) {
    uint32_t s = (uint32_t)slot_plus_one - 1;
    if (!slot_plus_one || !af_slot_ok(as, s)) return false;
    uint64_t c = atomic_load_explicit(&as->ctl[s], memory_order_acquire);
    return af_ctl_state(c) == AF_STATE_ACTIVE && !af_index_has_locked(as, s);
}

/* A replacement that died: of the two, whoever is ACTIVE and not in the index is nobody's. */
static int sweep_publish_intent(af_arena *as) {
    uint64_t made = atomic_load_explicit(&as->me->publish_new, memory_order_acquire);
    uint64_t old = atomic_load_explicit(&as->me->publish_old, memory_order_relaxed);
    if (!made) return AF_OK;
    if (af_index_lock(as, AF_PATIENT)) return AF_EBUSY;
    if (is_orphan_locked(as, made)) af_slot_close(as, (uint32_t)made - 1);
    if (is_orphan_locked(as, old)) af_slot_close(as, (uint32_t)old - 1);
    AF_CP(sweep_shard_intent);
    atomic_store_explicit(&as->me->publish_new, 0, memory_order_release);
    af_index_unlock(as);
    return AF_OK;
}

/* The old chain, of which nothing was freed. */
static int old_chain(af_arena *as, uint64_t head, af_chain *chain) {
    for (uint64_t off = af_head_offset(head); off;) {
        if (chain->count == chain->cap) {
            size_t cap = chain->cap ? 2 * chain->cap : 32;
            af_link *grown = realloc(chain->links, cap * sizeof *grown);
            if (!grown) return AF_ESYS;
            chain->links = grown;
            chain->cap = cap;
        }
        af_link *link = &chain->links[chain->count];
        if (!af_header_read(as, off, &link->header)) return AF_ECORRUPT;
        link->offset = off;
        chain->count++;
        off = link->header.prev;
    }
    return AF_OK;
}

/* A compaction that died: if its CAS happened, the old chain's runs become RES of the dead, to be freed with the
 * rest. crash: the intent stands until all of them are; taking one again changes nothing. */
static int sweep_compact_intent(af_arena *as) {
    uint64_t slot = atomic_load_explicit(&as->me->compact_slot, memory_order_acquire);
    if (!slot) return AF_OK;
    uint64_t old = atomic_load_explicit(&as->me->compact_old, memory_order_relaxed);
    uint64_t made = atomic_load_explicit(&as->me->compact_new, memory_order_relaxed);
    af_chain now = {0}, before = {0};
    uint64_t *runs = NULL;
    size_t count = 0;
    int r = af_chain_read(as, (uint32_t)slot - 1, 0, &now);
    if (!r && af_chain_holds(&now, af_head_offset(made))) {
        r = old_chain(as, old, &before);
        if (!r) r = af_chain_runs(as, &before, &runs, &count);
        for (size_t i = 0; !r && i < count; i++) {
            af_run_retake(as, runs[i], as->proc);
            AF_CP(sweep_compact_intent);
        }
    }
    free(runs);
    free(now.links);
    free(before.links);
    if (r == AF_ESYS) return r;
    atomic_store_explicit(&as->me->compact_slot, 0, memory_order_release);
    return AF_OK;
}

/* -------------------------------------------------------------------------------------------------- runs ----- */

/* The runs one slot reaches, remembered while the next run is of the same slot and its log has not moved. */
typedef struct {
    uint32_t slot;
    bool valid;
    uint64_t head, names;
    uint64_t *runs;
    size_t count;
} af_reach;

static int reach_load(af_arena *as, uint32_t s, af_reach *reach) {
    uint64_t head = atomic_load_explicit(&as->slots[s].head, memory_order_acquire);
    uint64_t names = atomic_load_explicit(&as->slots[s].names_off, memory_order_acquire);
    if (reach->valid && reach->slot == s && reach->head == head && reach->names == names) return AF_OK;
    af_chain chain = {0};
    free(reach->runs);
    *reach = (af_reach){.slot = s, .names = names};
    int r = af_chain_read(as, s, 0, &chain);
    reach->head = chain.head;
    if (!r || r == AF_ECORRUPT) r = af_chain_runs(as, &chain, &reach->runs, &reach->count);
    free(chain.links);
    reach->valid = !r;
    return r;
}

static bool reach_has(af_arena *as, const af_reach *reach, uint64_t g) {
    if (reach->names && af_run_of(as, reach->names) == (int64_t)g) return true;
    size_t low = 0, high = reach->count;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (reach->runs[mid] < g)
            low = mid + 1;
        else
            high = mid;
    }
    return low < reach->count && reach->runs[low] == g;
}

/* Keep or free one run of the dead. A linked one may have been dying while it was trimmed: its length is what is
 * really there. */
static int sweep_run(af_arena *as, uint64_t g, uint64_t x, af_reach *reach, af_sweep_result *out) {
    uint64_t len = af_g_len(x);
    uint32_t s = af_g_tag(x);
    if (s < AF_TAG_PUNCH && af_slot_ok(as, s)) {
        int r = reach_load(as, s, reach);
        if (r) return r;
        if (reach_has(as, reach, g)) {
            uint64_t real = af_run_repair(as, g, len);
            atomic_store_explicit(&as->granule_words[g], af_g_make(AF_G_COM, 0, real, s), memory_order_release);
            af_granules_unuse(as, len - real);
            out->committed++;
            return AF_OK;
        }
    }
    af_run_free_dead(as, g, x);
    out->freed += len;
    return AF_OK;
}

static int sweep_runs(af_arena *as, af_sweep_result *out) {
    af_reach reach = {0};
    int r = AF_OK;
    for (uint64_t b = 0; !r && b < as->g->blocks; b++) {
        if (!(atomic_load_explicit(&as->blocks[b], memory_order_acquire) & AF_B_WORDS)) continue;
        uint64_t end = (b + 1) * AF_BLOCK < as->g->granules ? (b + 1) * AF_BLOCK : as->g->granules;
        for (uint64_t g = b * AF_BLOCK; !r && g < end; g++) {
            uint64_t x = atomic_load_explicit(&as->granule_words[g], memory_order_acquire);
            if (af_g_kind(x) != AF_G_RES || af_g_owner(x) != as->proc) continue;
            r = sweep_run(as, g, x, &reach, out);
            AF_CP(sweep_runs);
        }
    }
    free(reach.runs);
    return r;
}

/* ------------------------------------------------------------------------------------------ transactions ----- */

/* One slot, one transaction of the dead. 0 or AF_EBUSY. */
static int sweep_participant(af_arena *as, uint32_t s, uint64_t ref, bool committed) {
    if (atomic_load_explicit(&as->slots[s].txn, memory_order_acquire) == ref) {
        if (!committed) {
            af_slot_close(as, s);
            AF_CP(sweep_slot_closed);
            return AF_OK;
        }
        if (af_index_lock(as, AF_PATIENT)) return AF_EBUSY;
        int r = af_index_bind_key_locked(as, s, ref);
        af_index_unlock(as);
        af_txn_release_member(as, s, ref); /* a key for which there is no room stays where it was */
        return r == AF_EBUSY ? r : AF_OK;
    }
    uint64_t c = atomic_load_explicit(&as->ctl[s], memory_order_acquire);
    if (!committed || !(af_ctl_mask(c) & (1u << as->proc))) return AF_OK;
    if (af_txn_settle_export(as, s, ref)) af_slot_close(as, s);
    return AF_OK;
}

static int sweep_txns(af_arena *as, af_sweep_result *out) {
    for (uint32_t i = 0; i < AF_TXNS; i++) {
        uint64_t w = atomic_load_explicit(&as->txns[i], memory_order_acquire);
        if (af_txn_word_state(w) == AF_TXN_WORD_FREE || af_txn_owner(w) != as->proc) continue;
        bool committed = af_txn_word_state(w) == AF_TXN_WORD_COMMITTED;
        uint64_t ref = (af_txn_gen(w) << 12) | i;
        for (uint32_t s = 0; s < af_slots_end(as, AF_KIND_SESSION); s++) {
            uint32_t state = af_ctl_state(atomic_load_explicit(&as->ctl[s], memory_order_acquire));
            if (state != AF_STATE_ACTIVE && state != AF_STATE_CLOSING) continue;
            int r = sweep_participant(as, s, ref, committed);
            if (r) return r;
        }
        AF_CP(sweep_txns);
        atomic_store_explicit(&as->txns[i], af_txn_make(af_txn_gen(w), 0, AF_TXN_WORD_FREE), memory_order_release);
        if (committed)
            out->txns_finished++;
        else
            out->txns_aborted++;
    }
    return AF_OK;
}

/* ------------------------------------------------------------------------------------------------- slots ----- */

static int sweep_slot(af_arena *as, uint32_t s, af_sweep_result *out) {
    uint64_t bit = 1ull << as->proc, c = atomic_load_explicit(&as->ctl[s], memory_order_acquire);
    while (c & bit) {
        if (!atomic_compare_exchange_weak_explicit(&as->ctl[s], &c, (c & ~bit) + AF_CTL_SEQ_ONE, memory_order_acq_rel,
                                                   memory_order_acquire)) {
            continue;
        }
        c = (c & ~bit) + AF_CTL_SEQ_ONE;
        out->pins++;
        AF_CP(sweep_pin_cleared);
    }
    uint32_t state = af_ctl_state(c);
    if (state == AF_STATE_CLOSING && !af_ctl_mask(c)) {
        if (af_slot_reap_closing(as, s)) out->reaped++; /* else the cleaner's scan does */
        c = atomic_load_explicit(&as->ctl[s], memory_order_acquire);
        state = af_ctl_state(c);
    }
    bool owned = state == AF_STATE_INIT || state == AF_STATE_DETACHED || state == AF_STATE_DUMPED;
    if (!owned || af_ctl_owner(c) != as->proc) return AF_OK;
    if (state == AF_STATE_DETACHED) {
        out->detached++;
        return AF_OK;
    }
    int r = af_slot_reap(as, s, true);
    if (r) return r;
    if (state == AF_STATE_INIT)
        out->inits++;
    else
        out->reaped++;
    return AF_OK;
}

static int sweep_slots(af_arena *as, af_sweep_result *out) {
    for (uint32_t kind = AF_KIND_SESSION; kind <= AF_KIND_SHARD; kind++) {
        for (uint32_t s = af_slots_first(as, kind); s < af_slots_end(as, kind); s++) {
            int r = sweep_slot(as, s, out);
            if (r) return r;
        }
    }
    return AF_OK;
}

/* ------------------------------------------------------------------------------------------------- hints ----- */

static void raise_hints(af_arena *as) {
    for (uint64_t b = 0; b < as->g->blocks; b++) {
        if (atomic_load_explicit(&as->blocks[b], memory_order_relaxed) & AF_B_BACKED) af_block_note_free(as, b);
    }
    for (uint64_t b = 0; b < as->g->slots / AF_BLOCK; b++) atomic_fetch_or(&as->slot_blocks[b], 1);
}

static uint64_t count_ready(af_arena *as) {
    uint64_t n = 0;
    for (uint64_t b = 0; b < as->g->blocks; b++) {
        uint64_t end = (b + 1) * AF_BLOCK < as->g->granules ? (b + 1) * AF_BLOCK : as->g->granules;
        if (atomic_load_explicit(&as->blocks[b], memory_order_relaxed) & AF_B_BACKED) n += end - b * AF_BLOCK;
    }
    return n;
}

static uint64_t count_shard_bytes(af_arena *as) {
    uint64_t n = 0;
    for (uint32_t s = af_slots_first(as, AF_KIND_SHARD); s < af_slots_end(as, AF_KIND_SHARD); s++) {
        if (af_ctl_state(atomic_load_explicit(&as->ctl[s], memory_order_acquire)) != AF_STATE_ACTIVE) continue;
        n += atomic_load_explicit(&as->slots[s].nbytes, memory_order_relaxed);
    }
    return n;
}

/* Correct a running sum, if nobody changed it while we counted; else it keeps its small error until the next sweep.
 */
static void recount(af_arena *as, af_word *sum, uint64_t (*counter)(af_arena *)) {
    for (int i = 0; i < 3; i++) {
        uint64_t before = atomic_load(sum), n = counter(as);
        if (atomic_compare_exchange_strong(sum, &before, n)) return;
    }
}

int af_sweep(af_arena *a, uint32_t proc, af_sweep_result *out) {
    memset(out, 0, sizeof *out);
    if (proc >= AF_MAX_PROCS || proc == a->proc) return AF_EINVAL;
    af_arena dead = *a, *as = &dead;
    as->proc = proc;
    as->me = &a->h->process[proc];
    AF_CP(sweep_begun);
    atomic_store_explicit(&as->me->writing, 0, memory_order_release);
    atomic_store_explicit(&as->me->allocating, 0, memory_order_release);
    int r = sweep_publish_intent(as);
    if (!r) r = sweep_compact_intent(as);
    if (!r) r = sweep_runs(as, out);
    if (!r) r = sweep_txns(as, out);
    if (!r) r = sweep_slots(as, out);
    if (r) return r;
    AF_CP(sweep_slots);
    raise_hints(as);
    if (atomic_load_explicit(&a->h->index_dirty, memory_order_relaxed) && !af_index_lock(as, AF_PATIENT)) {
        af_index_rebuild_locked(as);
        af_index_unlock(as);
    }
    af_granules_recount(as);
    recount(as, &a->h->granules_ready, count_ready);
    recount(as, &a->h->shard_bytes, count_shard_bytes);
    AF_CP(sweep_counted);
    atomic_store_explicit(&as->me->pid, 0, memory_order_release);
    return AF_OK;
}
