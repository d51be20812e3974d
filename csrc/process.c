/* process.c: the process table, the global words and the counters.
 *
 * Each process writes its own entry only; the supervisor reads them and, after a death, sweeps (sweep.c). Heartbeats
 * are ticks, not times: whoever judges them counts its own ticks too, so that a pause of the whole tree kills nobody.
 * Counters survive the death of their process: they only grow, and a successor goes on counting in the same place.
 */
#include "layout.h"

int64_t af_proc_enter(af_arena *a, int64_t pid) {
    uint64_t none = 0;
    if (pid <= 0) return AF_EINVAL;
    if (!atomic_compare_exchange_strong_explicit(&a->me->pid, &none, (uint64_t)pid, memory_order_acq_rel,
                                                 memory_order_relaxed) &&
        none != (uint64_t)pid) {
        return AF_EBUSY;
    }
    return (int64_t)atomic_fetch_add_explicit(&a->me->incarnation, 1, memory_order_acq_rel) + 1;
}

void af_proc_leave(af_arena *a) { atomic_store_explicit(&a->me->pid, 0, memory_order_release); }

void af_heartbeat(af_arena *a) { atomic_fetch_add_explicit(&a->me->ticks, 1, memory_order_relaxed); }

int af_proc_info(af_arena *a, uint32_t proc, int64_t *pid, uint64_t *incarnation, uint64_t *ticks) {
    if (proc >= AF_MAX_PROCS) return AF_EINVAL;
    af_process *p = &a->h->process[proc];
    *pid = (int64_t)atomic_load_explicit(&p->pid, memory_order_acquire);
    *incarnation = atomic_load_explicit(&p->incarnation, memory_order_relaxed);
    *ticks = atomic_load_explicit(&p->ticks, memory_order_relaxed);
    return AF_OK;
}

/* Words lie a cache line apart. */
static af_word *word_at(af_arena *a, uint32_t i) {
    return i < AF_WORDS ? &a->words[(uint64_t)i * (AF_LINE / 8)] : NULL;
}

int af_word_get(af_arena *a, uint32_t i, int64_t *out) {
    af_word *w = word_at(a, i);
    if (!w) return AF_EINVAL;
    *out = (int64_t)atomic_load(w);
    return AF_OK;
}

int af_word_set(af_arena *a, uint32_t i, int64_t v) {
    af_word *w = word_at(a, i);
    if (!w) return AF_EINVAL;
    atomic_store(w, (uint64_t)v);
    return AF_OK;
}

int af_word_add(af_arena *a, uint32_t i, int64_t v, int64_t *out) {
    af_word *w = word_at(a, i);
    if (!w) return AF_EINVAL;
    *out = (int64_t)(atomic_fetch_add(w, (uint64_t)v) + (uint64_t)v);
    return AF_OK;
}

int af_word_cas(af_arena *a, uint32_t i, int64_t old, int64_t want) {
    af_word *w = word_at(a, i);
    uint64_t expected = (uint64_t)old;
    if (!w) return AF_EINVAL;
    return atomic_compare_exchange_strong(w, &expected, (uint64_t)want) ? 1 : 0;
}

void af_count(af_arena *a, uint32_t counter, uint64_t delta) {
    if (counter >= AF_COUNTERS) return;
    af_word *w = &a->me->counter[counter];
    /* Written by this process alone, so no locked instruction is needed. */
    atomic_store_explicit(w, atomic_load_explicit(w, memory_order_relaxed) + delta, memory_order_relaxed);
}

void af_counters(af_arena *a, uint64_t out[AF_COUNTERS]) {
    memset(out, 0, AF_COUNTERS * sizeof *out);
    for (uint32_t p = 0; p < AF_MAX_PROCS; p++) {
        for (uint32_t i = 0; i < AF_COUNTERS; i++) {
            out[i] += atomic_load_explicit(&a->h->process[p].counter[i], memory_order_relaxed);
        }
    }
}
