/* stats.c: numbers for people, and a full check of a quiet arena for tests.
 *
 * af_stats only reads, beside live processes: its numbers are each true at some moment, not all at the same one.
 * af_check assumes that nobody is at work and nothing is reserved. It goes from the slots to everything they reach,
 * and then asks that nothing else is taken: so it finds lost and doubly used granules, stray index entries, pins,
 * intents and transaction words, and damaged records.
 */
#include "layout.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static inline uint64_t load(const af_word *w) { return atomic_load_explicit(w, memory_order_acquire); }

static void count_states(af_arena *a, uint32_t kind, uint64_t counts[8]) {
    memset(counts, 0, 8 * sizeof *counts);
    for (uint32_t s = af_slots_first(a, kind); s < af_slots_end(a, kind); s++) {
        counts[af_ctl_state(atomic_load_explicit(&a->ctl[s], memory_order_relaxed))]++;
    }
}

/* Branch-free, since /health asks it each time: half a nanosecond a slot that was ever used. */
uint64_t af_sessions_active(af_arena *a) {
    uint64_t active = 0;
    uint32_t end = af_slots_end(a, AF_KIND_SESSION);
    for (uint32_t s = af_slots_first(a, AF_KIND_SESSION); s < end; s++) {
        active += af_ctl_state(atomic_load_explicit(&a->ctl[s], memory_order_relaxed)) == AF_STATE_ACTIVE;
    }
    return active;
}

void af_stats(af_arena *a, af_stats_result *out) {
    uint64_t counts[8];
    memset(out, 0, sizeof *out);
    out->granule_bytes = AF_GRANULE;
    out->granules = a->g->granules;
    out->granules_used = af_granules_used(a);
    out->granules_ready = load(&a->h->granules_ready);
    out->granules_keep = a->g->keep;
    out->granules_outside = atomic_load_explicit(&a->h->outside, memory_order_relaxed);
    out->bytes_max = a->g->max_bytes;
    out->bytes_mapped = a->g->total_bytes;
    out->session_slots = a->g->session_slots;
    out->shard_slots = a->g->shard_slots;
    out->session_slots_ready = load(&a->h->slots_ready[AF_KIND_SESSION]);
    out->shard_slots_ready = load(&a->h->slots_ready[AF_KIND_SHARD]);
    count_states(a, AF_KIND_SESSION, counts);
    out->sessions_init = counts[AF_STATE_INIT];
    out->sessions_active = counts[AF_STATE_ACTIVE];
    out->sessions_closing = counts[AF_STATE_CLOSING];
    out->sessions_detached = counts[AF_STATE_DETACHED];
    out->sessions_dumped = counts[AF_STATE_DUMPED];
    count_states(a, AF_KIND_SHARD, counts);
    out->shards_init = counts[AF_STATE_INIT];
    out->shards_active = counts[AF_STATE_ACTIVE];
    out->shards_closing = counts[AF_STATE_CLOSING];
    int64_t bytes = (int64_t)load(&a->h->shard_bytes);
    out->shard_bytes = bytes < 0 ? 0 : (uint64_t)bytes;
    for (uint32_t i = 0; i < AF_TXNS; i++) {
        uint32_t state = af_txn_word_state(atomic_load_explicit(&a->txns[i], memory_order_relaxed));
        out->txns_open += state == AF_TXN_WORD_OPEN;
        out->txns_committed += state == AF_TXN_WORD_COMMITTED;
    }
    out->overflow_buckets = a->g->overflow;
    out->overflow_used = load(&a->h->overflow_used);
}

/* --------------------------------------------------------------------------------------------------- check ---- */

typedef struct {
    af_arena *a;
    uint8_t *reached; /* a granule: 1 if some slot reaches it */
    char *why;
    size_t why_len;
} af_checker;

__attribute__((format(printf, 2, 3))) static int bad(af_checker *k, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(k->why, k->why_len, format, args);
    va_end(args);
    return AF_ECORRUPT;
}

/* The run at g is COM, the slot's, and whole; mark it. */
static int check_run(af_checker *k, uint32_t s, uint64_t g) {
    af_arena *a = k->a;
    uint64_t x = load(&a->granule_words[g]), n = af_g_len(x);
    if (af_g_kind(x) != AF_G_COM || af_g_tag(x) != s) {
        return bad(k, "slot %u reaches run %llu with word %llx", s, (unsigned long long)g, (unsigned long long)x);
    }
    for (uint64_t i = 0; i < n; i++) {
        if (k->reached[g + i]) return bad(k, "granule %llu is in two runs", (unsigned long long)(g + i));
        if (i && load(&a->granule_words[g + i]) != af_g_make(AF_G_INT, 0, 0, g)) {
            return bad(k, "granule %llu is not inside run %llu", (unsigned long long)(g + i), (unsigned long long)g);
        }
        k->reached[g + i] = 1;
    }
    return AF_OK;
}

static int check_empty_slot(af_checker *k, uint32_t s, uint64_t c) {
    const af_slot *slot = &k->a->slots[s];
    if (af_ctl_mask(c)) return bad(k, "free slot %u is pinned", s);
    if (af_head_offset(load(&slot->head)) || load(&slot->names_off) || load(&slot->txn)) {
        return bad(k, "free slot %u is not empty", s);
    }
    if (slot->id_len || slot->key_len) return bad(k, "free slot %u has a name", s);
    return AF_OK;
}

static int check_slot(af_checker *k, uint32_t s) {
    af_arena *a = k->a;
    const af_slot *slot = &a->slots[s];
    uint64_t c = load(&a->ctl[s]);
    uint32_t state = af_ctl_state(c);
    if (state == AF_STATE_FREE) return check_empty_slot(k, s, c);
    if (state == AF_STATE_INIT || state == AF_STATE_CLOSING) return bad(k, "slot %u is stuck in state %u", s, state);
    if (af_ctl_mask(c)) return bad(k, "slot %u is pinned by %x", s, af_ctl_mask(c));
    if (load(&slot->txn))
        return bad(k, "slot %u is still in transaction %llx", s, (unsigned long long)load(&slot->txn));
    if (state != AF_STATE_DUMPED && !af_index_has_locked(a, s) && state == AF_STATE_ACTIVE) {
        return bad(k, "no index entry leads to slot %u", s);
    }
    if (af_log_verify(a, s)) return bad(k, "the log of slot %u is damaged", s);
    af_chain chain = {0};
    uint64_t *runs = NULL;
    size_t count = 0;
    int r = af_chain_read(a, s, 0, &chain);
    if (!r) r = af_chain_runs(a, &chain, &runs, &count);
    for (size_t i = 0; !r && i < count; i++) r = check_run(k, s, runs[i]);
    uint64_t names = load(&slot->names_off);
    int64_t names_run = names ? af_run_of(a, names) : -1;
    if (!r && names) r = names_run < 0 ? bad(k, "slot %u has no names", s) : check_run(k, s, (uint64_t)names_run);
    free(runs);
    free(chain.links);
    return r;
}

static int check_granules(af_checker *k) {
    af_arena *a = k->a;
    uint64_t used = 0;
    for (uint64_t g = 0; g < a->g->granules; g++) {
        used += k->reached[g];
        if (k->reached[g] || !(load(&a->blocks[g / AF_BLOCK]) & AF_B_WORDS)) continue;
        uint64_t x = load(&a->granule_words[g]);
        if (af_g_kind(x) != AF_G_FREE) {
            return bad(k, "granule %llu leaked: %llx", (unsigned long long)g, (unsigned long long)x);
        }
    }
    if (used != af_granules_used(a)) {
        return bad(k, "%llu granules are used, %llu are counted", (unsigned long long)used,
                   (unsigned long long)af_granules_used(a));
    }
    return AF_OK;
}

static int check_index(af_checker *k) {
    af_arena *a = k->a;
    uint64_t overflow = 0;
    for (uint64_t i = 0; i < a->g->buckets; i++) {
        for (uint64_t n = i;; overflow++) {
            for (int w = 0; w < AF_WAYS; w++) {
                uint64_t e = load(&a->buckets[n].entry[w]), s = (e & 0x7fffffffu) - 1;
                if (e && (!af_slot_ok(a, s) || af_ctl_state(load(&a->ctl[s])) == AF_STATE_FREE)) {
                    return bad(k, "index entry %llx leads to a free slot", (unsigned long long)e);
                }
            }
            n = load(&a->buckets[n].next);
            if (!n) break;
        }
    }
    for (uint64_t n = load(&a->h->overflow_free); n; n = load(&a->buckets[n].next)) overflow++;
    if (overflow != a->g->overflow) return bad(k, "%llu overflow buckets in all", (unsigned long long)overflow);
    return AF_OK;
}

static int check_processes(af_checker *k) {
    af_arena *a = k->a;
    for (uint32_t p = 0; p < AF_MAX_PROCS; p++) {
        const af_process *me = &a->h->process[p];
        if (load(&me->writing) || load(&me->allocating)) return bad(k, "process %u is still at work", p);
        if (load(&me->compact_slot) || load(&me->publish_new)) return bad(k, "an intent of process %u stands", p);
    }
    for (uint32_t i = 0; i < AF_TXNS; i++) {
        if (af_txn_word_state(load(&a->txns[i])) != AF_TXN_WORD_FREE) return bad(k, "transaction %u is not free", i);
    }
    return AF_OK;
}

int af_check(af_arena *a, char *why, size_t why_len) {
    af_checker k = {a, calloc(a->g->granules, 1), why, why_len};
    if (!k.reached) return AF_ESYS;
    int r = af_index_lock(a, AF_PATIENT) ? bad(&k, "the index lock is taken") : AF_OK;
    bool locked = !r;
    for (uint32_t kind = AF_KIND_SESSION; kind <= AF_KIND_SHARD; kind++) {
        for (uint32_t s = af_slots_first(a, kind); !r && s < af_slots_end(a, kind); s++) r = check_slot(&k, s);
    }
    if (!r) r = check_granules(&k);
    if (!r) r = check_index(&k);
    if (!r) r = check_processes(&k);
    if (locked) af_index_unlock(a);
    free(k.reached);
    return r;
}
