/* compact.c: cutting a log behind a checkpoint, so that a session may live for weeks.
 *
 * Theory: the new chain is built in runs of our own, then one CAS of the head makes it the log, under the next
 * generation; the old chain is then ours to free. Because freeing takes more than one step, the two head words are
 * first written into our process slot as an intent: with it the sweep can tell whether the CAS happened (is the new
 * chain's newest record in the log?) and find the old chain, of which nothing is freed before the intent is
 * withdrawn. Who else may be at the log, and why each is safe: readers     see the generation move and start over.
 *   appenders   that link a record make our CAS fail. One that only took room in the open chunk could still be
 * writing there after we freed it: so the chunk is barred (open := 0), then every process's `writing` word is looked
 * at, and if one names this slot we give up. A chunk appears in `open` again only through a linked record, hence a
 * moved head. Appenders do the same two steps in the other order (seq_cst both). sweeps      of others change RES
 * runs of the dead: so a chain that holds any run which is not COM is not cut. exporters   write the outcome into
 * their record: so a log with an export in progress is not cut. Two of these give AF_EBUSY with nothing changed.
 */
#include "layout.h"

#include <sched.h>
#include <stdlib.h>

static int compare_words(const void *x, const void *y) {
    uint64_t a = *(const uint64_t *)x, b = *(const uint64_t *)y;
    return a < b ? -1 : a > b;
}

int af_chain_runs(af_arena *a, const af_chain *chain, uint64_t **runs, size_t *count) {
    uint64_t *list = malloc((chain->count + 1) * sizeof *list);
    size_t n = 0, distinct = 0;
    if (!list) return AF_ESYS;
    for (size_t i = 0; i < chain->count; i++) {
        int64_t g = af_run_of(a, chain->links[i].offset);
        if (g >= 0 && (n == 0 || list[n - 1] != (uint64_t)g)) list[n++] = (uint64_t)g;
    }
    qsort(list, n, sizeof *list, compare_words);
    for (size_t i = 0; i < n; i++) {
        if (distinct == 0 || list[distinct - 1] != list[i]) list[distinct++] = list[i];
    }
    *runs = list;
    *count = distinct;
    return AF_OK;
}

/* ---------------------------------------------------------------------------------------------- new chain ---- */

typedef struct {
    af_arena *a;
    uint32_t slot;
    uint64_t *runs; /* RES(me), in order */
    size_t count, cap;
    uint64_t at, end; /* room left in the last run */
    uint64_t newest;  /* offset of the last record placed */
    uint64_t to_come; /* bytes of the records not placed yet */
} af_builder;

static void builder_drop(af_builder *b) {
    for (size_t i = 0; i < b->count; i++) af_run_free(b->a, b->runs[i]);
    free(b->runs);
}

/* Room for the next record, in the last run or a new one of up to 64 KiB or the record's size. */
static int64_t builder_room(af_builder *b, uint64_t size) {
    if (b->end - b->at < size) {
        if (b->count == b->cap) {
            size_t cap = b->cap ? 2 * b->cap : 16;
            uint64_t *grown = realloc(b->runs, cap * sizeof *grown);
            if (!grown) return AF_ESYS;
            b->runs = grown;
            b->cap = cap;
        }
        uint64_t least = af_granules_for(size), most = af_granules_for(b->to_come);
        uint64_t n = most < 16 ? most : least > 16 ? least : 16;
        int64_t g = af_run_take(b->a, n, b->slot, AF_CRITICAL);
        if (g == AF_ENOSPC && n > least) g = af_run_take(b->a, n = least, b->slot, AF_CRITICAL);
        if (g < 0) return g;
        b->runs[b->count++] = (uint64_t)g;
        b->at = af_run_offset(b->a, (uint64_t)g);
        b->end = b->at + (n << AF_GRANULE_SHIFT);
    }
    uint64_t offset = b->at;
    b->at += size;
    b->to_come -= size;
    return (int64_t)offset;
}

static uint64_t record_size(const af_record_header *header) {
    return af_align(header->data_at + header->data_len, 16);
}

static int build_checkpoint(af_builder *b, const void *meta, uint32_t len) {
    af_record_header header = {.meta_len = len,
                               .type = AF_REC_CHECKPOINT,
                               .magic = AF_RECORD_MAGIC,
                               .data_at = (uint32_t)(sizeof header + af_align(len, 8))};
    int64_t offset = builder_room(b, record_size(&header));
    if (offset < 0) return (int)offset;
    uint8_t *at = b->a->base + offset;
    header.crc = af_record_crc(&header, meta, NULL);
    memcpy(at, &header, sizeof header);
    if (len) memcpy(at + sizeof header, meta, len);
    b->newest = (uint64_t)offset;
    return AF_OK;
}

static int build_copy(af_builder *b, const af_link *link) {
    int64_t offset = builder_room(b, record_size(&link->header));
    if (offset < 0) return (int)offset;
    af_record_header *header = af_record_at(b->a, (uint64_t)offset);
    af_racy_copy(header, b->a->base + link->offset, link->header.data_at + link->header.data_len);
    memcpy(header, &link->header, sizeof *header);
    header->prev = b->newest;
    if (header->type == AF_REC_EXPORTING) {
        atomic_store_explicit(&header->outcome, af_outcome_resolve(b->a, link->offset, header->aux),
                              memory_order_relaxed);
    }
    b->newest = (uint64_t)offset;
    return AF_OK;
}

/* Lay out checkpoint and kept records, in own runs. `keep` must be offsets of the chain, oldest first. */
static int build_chain(af_builder *b, const af_chain *chain, const void *checkpoint, uint32_t checkpoint_len,
                       const uint64_t *keep, uint32_t keep_count) {
    uint32_t found = 0;
    b->to_come = af_align(sizeof(af_record_header) + af_align(checkpoint_len, 8), 16);
    for (size_t i = chain->count; i-- > 0 && found < keep_count;) {
        if (chain->links[i].offset != keep[found]) continue;
        b->to_come += record_size(&chain->links[i].header);
        found++;
    }
    if (found != keep_count) return AF_EINVAL;
    int r = build_checkpoint(b, checkpoint, checkpoint_len);
    found = 0;
    for (size_t i = chain->count; !r && i-- > 0 && found < keep_count;) {
        if (chain->links[i].offset != keep[found]) continue;
        r = build_copy(b, &chain->links[i]);
        found++;
    }
    return r;
}

/* ------------------------------------------------------------------------------------------------ cutting ---- */

/* May this chain be cut at all? 0 or AF_EBUSY. */
static int chain_quiet(af_arena *a, uint32_t s, const af_chain *chain, const uint64_t *runs, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint64_t x = atomic_load_explicit(&a->granule_words[runs[i]], memory_order_acquire);
        if (af_g_kind(x) != AF_G_COM || af_g_tag(x) != s) return AF_EBUSY;
    }
    for (size_t i = 0; i < chain->count; i++) {
        const af_record_header *header = &chain->links[i].header;
        if (header->type == AF_REC_EXPORTING && header->aux && af_txn_state(a, header->aux) != AF_TXN_GONE)
            return AF_EBUSY;
    }
    return AF_OK;
}

/* Keep appenders out of the open chunk, then see whether one is inside. Not waited for: it may have been stopped. */
static int bar_writers(af_arena *a, uint32_t s) {
    atomic_exchange_explicit(&a->slots[s].open, 0, memory_order_seq_cst);
    AF_CP(compact_barred);
    for (int turn = 0; turn < 16; turn++) {
        bool writing = false;
        for (uint32_t p = 0; p < AF_MAX_PROCS && !writing; p++) {
            writing =
                p != a->proc && atomic_load_explicit(&a->h->process[p].writing, memory_order_seq_cst) == s + 1ull;
        }
        if (!writing) return AF_OK;
        sched_yield();
    }
    return AF_EBUSY;
}

static void intent_withdraw(af_arena *a) { atomic_store_explicit(&a->me->compact_slot, 0, memory_order_release); }

/* The CAS and what follows it.
 * crash: before the CAS the intent's new head is not in the log: the sweep drops the intent and frees the new runs.
 *        After it, until the intent is withdrawn, the sweep takes the old chain's runs (none is freed yet) as RES of
 *        the dead, withdraws, and frees what the log does not reach. After that they are such RES runs already. */
static int cut(af_arena *a, uint32_t s, uint64_t expect, af_builder *b, const uint64_t *runs, size_t count,
               uint64_t *head) {
    af_slot *slot = &a->slots[s];
    uint64_t to = af_head_make(b->newest, af_head_gen(expect) + 1);
    atomic_store_explicit(&a->me->compact_old, expect, memory_order_relaxed);
    atomic_store_explicit(&a->me->compact_new, to, memory_order_relaxed);
    atomic_store_explicit(&a->me->compact_slot, s + 1u, memory_order_release);
    AF_CP(compact_intent);
    int r = bar_writers(a, s);
    if (!r) {
        *head = expect;
        /* COMMIT POINT. order: release of the new chain; readers of the head acquire. */
        if (!atomic_compare_exchange_strong_explicit(&slot->head, head, to, memory_order_seq_cst,
                                                     memory_order_acquire))
            r = AF_EMOVED;
    }
    if (r) {
        intent_withdraw(a);
        return r;
    }
    *head = to;
    AF_CP(compact_cut);
    for (size_t i = 0; i < count; i++) {
        af_run_retake(a, runs[i], a->proc);
        if (i == count / 2) AF_CP(compact_half_retaken);
    }
    AF_CP(compact_retaken);
    intent_withdraw(a);
    AF_CP(compact_intent_cleared);
    uint64_t bytes = 0;
    for (size_t i = 0; i < b->count; i++) {
        bytes += af_g_len(atomic_load_explicit(&a->granule_words[b->runs[i]], memory_order_relaxed))
                 << AF_GRANULE_SHIFT;
        af_run_commit(a, b->runs[i]); /* not earlier: a RES run keeps other compactions off while the intent stands */
    }
    for (size_t i = 0; i < count; i++) {
        af_run_free(a, runs[i]);
        if (i == count / 2) AF_CP(compact_half_freed);
    }
    atomic_store_explicit(&slot->nbytes, bytes, memory_order_relaxed);
    return AF_OK;
}

int af_log_compact(af_arena *a, uint32_t s, uint64_t expect, const void *checkpoint, uint32_t checkpoint_len,
                   const uint64_t *keep, uint32_t keep_count, uint64_t *head) {
    if (!af_slot_ok(a, s) || af_slot_kind(a, s) != AF_KIND_SESSION || checkpoint_len > AF_META_MAX) return AF_EINVAL;
    uint64_t c = atomic_load_explicit(&a->ctl[s], memory_order_acquire);
    if (af_ctl_state(c) != AF_STATE_ACTIVE && !(af_ctl_state(c) == AF_STATE_DETACHED && af_ctl_owner(c) == a->proc))
        return AF_EGONE;
    af_chain chain = {0};
    af_builder b = {.a = a, .slot = s};
    uint64_t *runs = NULL;
    size_t count = 0;
    int r = af_chain_read(a, s, 0, &chain);
    *head = chain.head;
    if (!r && chain.head != expect) r = AF_EMOVED;
    if (!r) r = af_chain_runs(a, &chain, &runs, &count);
    if (!r) r = chain_quiet(a, s, &chain, runs, count);
    if (!r) r = build_chain(&b, &chain, checkpoint, checkpoint_len, keep, keep_count);
    if (!r) {
        AF_CP(compact_written);
        r = cut(a, s, expect, &b, runs, count, head);
    }
    if (r)
        builder_drop(&b);
    else
        free(b.runs);
    free(runs);
    free(chain.links);
    return r;
}
