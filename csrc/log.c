/* log.c: a session's log: append, read, reservations.
 *
 * Theory: a log is a chain of immutable records hanging from the slot's head word, newest first. An append writes its
 * record where nobody looks and then CASes the head: that store is the mutation. No lock, so none to be orphaned; a
 * fold of the log is the session's state. Small records share a run, the open chunk, in which room is taken by CAS on
 * the `open` word; others get a run of their own. Reading is a seqlock on the head's generation: compaction may free
 * and reuse what a reader is looking at, so every offset and length is checked before use, and all of it is thrown
 * away if the generation moved meanwhile. Invariants
 *   - Callers pin the slot, or own it; so no log is reaped under them.
 *   - A chunk is named by `open` only while it is COM and holds a linked record, and is used only while `open` and
 *     head are of one generation. Inside af_log_append `writing` names the slot, and compaction never cuts a log into
 *     which another process may be writing (compact.c): nobody scribbles into memory that was freed.
 *   - A run of our own stays RES(me) until it is linked: unlinked, the sweep frees it; linked, the sweep keeps it.
 */
#include "layout.h"

#include <stdlib.h>

static inline uint64_t load_head(af_arena *a, uint32_t s) {
    return atomic_load_explicit(&a->slots[s].head, memory_order_acquire);
}

/* ------------------------------------------------------------------------------------------------ records ---- */

static size_t header_crc_from(void) { return offsetof(af_record_header, data_len); }

/* Checksum of a header, to be continued over meta and data. */
static uint32_t crc_header(const af_record_header *header) {
    unsigned char copy[sizeof *header];
    memcpy(copy, header, sizeof copy);
    memset(copy + offsetof(af_record_header, crc), 0, sizeof header->crc);
    return af_crc32c(0, copy + header_crc_from(), offsetof(af_record_header, outcome) - header_crc_from());
}

uint32_t af_record_crc(const af_record_header *header, const void *meta, const void *data) {
    uint32_t crc = af_crc32c(crc_header(header), meta, header->meta_len);
    return af_crc32c(crc, data, header->data_len);
}

bool af_header_read(const af_arena *a, uint64_t offset, af_record_header *out) {
    uint64_t end = a->g->total_bytes;
    if (offset & 15 || offset < a->g->heap_at || offset > end - sizeof *out) return false;
    af_racy_copy(out, a->base + offset, sizeof *out);
    if (out->magic != AF_RECORD_MAGIC || out->meta_len > AF_META_MAX || out->bits > AF_BITS_MAX) return false;
    uint64_t before = sizeof *out + (uint64_t)(out->bits + 63) / 64 * 8 + out->meta_len;
    if (out->data_at < before || out->data_at > before + AF_LINE) return false;
    if (out->data_at > end - offset || out->data_len > end - offset - out->data_at) return false;
    return out->prev == 0 || (!(out->prev & 15) && out->prev >= a->g->heap_at && out->prev < end);
}

static uint64_t meta_at(const af_record_header *header) {
    return sizeof *header + (uint64_t)(header->bits + 63) / 64 * 8;
}

/* While the transaction is open: pending. Once its word moved on the outcome is final: it was stored before. */
uint32_t af_outcome_resolve(af_arena *a, uint64_t offset, uint64_t aux) {
    const uint8_t *at = a->base + offset + offsetof(af_record_header, outcome);
    uint64_t outcome;
    af_racy_copy(&outcome, at, sizeof outcome);
    if (outcome != AF_OUTCOME_PENDING || !aux) return (uint32_t)outcome;
    int state = af_txn_state(a, aux);
    if (state == AF_TXN_OPEN) return AF_OUTCOME_PENDING;
    if (state == AF_TXN_COMMITTED) return AF_OUTCOME_COMMITTED;
    af_racy_copy(&outcome, at, sizeof outcome);
    return outcome == AF_OUTCOME_PENDING ? AF_OUTCOME_ABORTED : (uint32_t)outcome;
}

/* ------------------------------------------------------------------------------------------------ reading ---- */

static bool same_generation(af_arena *a, uint32_t s, uint64_t head) {
    atomic_thread_fence(memory_order_acquire);
    return af_head_gen(atomic_load_explicit(&a->slots[s].head, memory_order_relaxed)) == af_head_gen(head);
}

/* One try from chain->head. 0, AF_ECORRUPT (also: cut under us), AF_ESYS. */
static int chain_walk(af_arena *a, uint32_t s, uint64_t until, af_chain *chain) {
    uint64_t most = (a->g->granules << AF_GRANULE_SHIFT) / sizeof(af_record_header);
    chain->count = 0;
    for (uint64_t off = af_head_offset(chain->head); off && off != until;) {
        if (chain->count == chain->cap) {
            size_t cap = chain->cap ? 2 * chain->cap : 32;
            af_link *grown = realloc(chain->links, cap * sizeof *grown);
            if (!grown) return AF_ESYS;
            chain->links = grown;
            chain->cap = cap;
        }
        af_link *link = &chain->links[chain->count];
        if (chain->count >= most || !af_header_read(a, off, &link->header)) return AF_ECORRUPT;
        link->offset = off;
        off = link->header.prev;
        if ((++chain->count & 63) == 0 && !same_generation(a, s, chain->head)) return AF_ECORRUPT;
    }
    return AF_OK;
}

int af_chain_read(af_arena *a, uint32_t s, uint64_t until, af_chain *chain) {
    for (;;) { /* another turn only after a compaction: each of those did work, so this ends */
        chain->head = load_head(a, s);
        int r = chain_walk(a, s, until, chain);
        if (r == AF_ESYS || same_generation(a, s, chain->head)) return r;
    }
}

bool af_chain_holds(const af_chain *chain, uint64_t offset) {
    for (size_t i = 0; i < chain->count; i++) {
        if (chain->links[i].offset == offset) return true;
    }
    return false;
}

uint64_t af_log_head(af_arena *a, uint32_t s) { return af_slot_ok(a, s) ? load_head(a, s) : 0; }

/* Copy metas and headers of a chain into the view, oldest first. */
static int view_fill(af_arena *a, const af_chain *chain, af_log_view *view) {
    size_t size = 0;
    for (size_t i = 0; i < chain->count; i++) size += chain->links[i].header.meta_len;
    if (chain->count > view->records_cap) {
        af_record *grown = realloc(view->records, chain->count * sizeof *grown);
        if (!grown) return AF_ESYS;
        view->records = grown;
        view->records_cap = chain->count;
    }
    if (size > view->meta_cap) {
        uint8_t *grown = realloc(view->meta, size);
        if (!grown) return AF_ESYS;
        view->meta = grown;
        view->meta_cap = size;
    }
    size_t at = 0;
    for (size_t i = 0; i < chain->count; i++) {
        const af_link *link = &chain->links[chain->count - 1 - i];
        const af_record_header *header = &link->header;
        af_record *record = &view->records[i];
        *record = (af_record){.offset = link->offset,
                              .aux = header->aux,
                              .data_len = header->data_len,
                              .meta_at = at,
                              .meta_len = header->meta_len,
                              .type = header->type,
                              .flags = header->flags};
        if (header->type == AF_REC_EXPORTING) record->outcome = af_outcome_resolve(a, link->offset, header->aux);
        if (header->meta_len)
            af_racy_copy(view->meta + at, a->base + link->offset + meta_at(header), header->meta_len);
        at += header->meta_len;
    }
    view->count = chain->count;
    view->meta_size = at;
    view->head = chain->head;
    return AF_OK;
}

int af_log_read(af_arena *a, uint32_t s, uint64_t since, af_log_view *view) {
    if (!af_slot_ok(a, s)) return AF_EINVAL;
    af_chain chain = {0};
    int r;
    for (;;) {
        uint64_t head = load_head(a, s);
        view->cut = since && af_head_gen(since) != af_head_gen(head);
        r = af_chain_read(a, s, since && !view->cut ? af_head_offset(since) : 0, &chain);
        if (r == AF_ESYS) break;
        if (af_head_gen(chain.head) != af_head_gen(head)) continue; /* cut meanwhile: `until` was of the old log */
        if (!r) r = view_fill(a, &chain, view);
        if (r == AF_ESYS || same_generation(a, s, chain.head)) break;
    }
    free(chain.links);
    return r;
}

void af_log_view_free(af_log_view *view) {
    free(view->records);
    free(view->meta);
    memset(view, 0, sizeof *view);
}

/* Read a record's header under the generation of `head`. */
static int record_header(af_arena *a, uint32_t s, uint64_t head, uint64_t offset, af_record_header *header) {
    if (!af_slot_ok(a, s)) return AF_EINVAL;
    if (af_head_gen(load_head(a, s)) != af_head_gen(head)) return AF_ETRIMMED;
    bool good = af_header_read(a, offset, header);
    if (!same_generation(a, s, head)) return AF_ETRIMMED;
    return good ? AF_OK : AF_EINVAL;
}

int af_record_data(af_arena *a, uint32_t s, uint64_t head, uint64_t offset, uint64_t start, uint64_t length,
                   void *out) {
    af_record_header header;
    int r = record_header(a, s, head, offset, &header);
    if (r) return r;
    if (start > header.data_len || length > header.data_len - start) return AF_EINVAL;
    af_racy_copy(out, a->base + offset + header.data_at + start, length);
    return same_generation(a, s, head) ? AF_OK : AF_ETRIMMED;
}

int af_record_data_len(af_arena *a, uint32_t s, uint64_t head, uint64_t offset, uint64_t *len) {
    af_record_header header;
    int r = record_header(a, s, head, offset, &header);
    *len = r ? 0 : header.data_len;
    return r;
}

int af_record_outcome(af_arena *a, uint32_t s, uint64_t head, uint64_t offset) {
    af_record_header header;
    int r = record_header(a, s, head, offset, &header);
    if (r) return r;
    uint32_t outcome = af_outcome_resolve(a, offset, header.aux);
    return same_generation(a, s, head) ? (int)outcome : AF_ETRIMMED;
}

int af_log_verify(af_arena *a, uint32_t s) {
    if (!af_slot_ok(a, s)) return AF_EINVAL;
    af_chain chain = {0};
    int r;
    do {
        r = af_chain_read(a, s, 0, &chain);
        for (size_t i = 0; !r && i < chain.count && af_slot_kind(a, s) == AF_KIND_SESSION; i++) {
            const af_record_header *header = &chain.links[i].header;
            const uint8_t *at = a->base + chain.links[i].offset;
            if (af_record_crc(header, at + meta_at(header), at + header->data_at) != header->crc) r = AF_ECORRUPT;
        }
    } while (r != AF_ESYS && !same_generation(a, s, chain.head));
    free(chain.links);
    return r;
}

/* ------------------------------------------------------------------------------------------------ append ----- */

typedef struct {
    uint64_t offset, granule; /* where the record goes; its run */
    uint64_t open_before;     /* bumped: the open word before */
    uint64_t gen;             /* bumped: the only generation it may be linked under */
    enum { NO_SPACE, BUMPED, FRESH, RESERVED } how;
} af_space;

/* Take `size16` units from the open chunk, if there is one of this generation and it has them.
 * order: the RMW on `open` comes after `writing` in the single order of seq_cst operations, and compaction does them
 *        the other way round: either it sees us writing, or we see the chunk barred.
 * crash: the room is lost until the chunk is freed. */
static bool bump(af_arena *a, af_slot *slot, uint32_t s, uint64_t size16, uint64_t head, af_space *space) {
    uint64_t o = atomic_load_explicit(&slot->open, memory_order_acquire);
    for (;;) {
        uint64_t used = af_open_used16(o), g = af_open_granule(o);
        if (!used || af_open_gen(o) != (af_head_gen(head) & AF_OPEN_GEN_MASK) || g >= a->g->granules) return false;
        uint64_t x = atomic_load_explicit(&a->granule_words[g], memory_order_acquire);
        if (af_g_kind(x) != AF_G_COM || af_g_tag(x) != s) return false;
        uint64_t room = af_g_len(x) << (AF_GRANULE_SHIFT - 4);
        if (room > 0xffff) room = 0xffff;
        if (used + size16 > room) return false;
        if (atomic_compare_exchange_weak_explicit(&slot->open, &o, af_open_make(g, used + size16, af_open_gen(o)),
                                                  memory_order_seq_cst, memory_order_acquire)) {
            *space = (af_space){af_run_offset(a, g) + (used << 4), g, o, af_head_gen(head), BUMPED};
            AF_CP(append_bumped);
            return true;
        }
    }
}

/* Offer a linked run, in which `used` bytes are taken, as open chunk, if it has more room than the present one. */
static void offer_open(af_arena *a, af_slot *slot, uint64_t g, uint64_t used, uint64_t head) {
    uint64_t len = af_g_len(atomic_load_explicit(&a->granule_words[g], memory_order_relaxed));
    uint64_t used16 = used >> 4, room = (len << (AF_GRANULE_SHIFT - 4)) - used16;
    if (used16 + room > 0xffff || room < 8) return;
    uint64_t o = atomic_load_explicit(&slot->open, memory_order_acquire);
    if (af_open_used16(o) && af_open_gen(o) == (af_head_gen(head) & AF_OPEN_GEN_MASK)) {
        uint64_t x = atomic_load_explicit(&a->granule_words[af_open_granule(o)], memory_order_relaxed);
        uint64_t have = af_g_len(x) << (AF_GRANULE_SHIFT - 4);
        if (have > af_open_used16(o) && have - af_open_used16(o) >= room) return;
    }
    atomic_compare_exchange_strong_explicit(&slot->open, &o, af_open_make(g, used16, af_head_gen(head)),
                                            memory_order_seq_cst, memory_order_relaxed);
    AF_CP(append_opened);
}

static uint64_t reservation_make(uint64_t g, uint32_t s) { return ((s + 1ull) << 28) | g; }

/* The RES(me) run behind a reservation for slot s, or -1. */
static int64_t reservation_run(af_arena *a, uint64_t reservation, uint32_t *s) {
    uint64_t g = reservation & 0xfffffffu;
    *s = (uint32_t)(reservation >> 28) - 1;
    if (!reservation || reservation >> 56 || g >= a->g->granules || !af_slot_ok(a, *s)) return -1;
    if (!(atomic_load_explicit(&a->blocks[g / AF_BLOCK], memory_order_acquire) & AF_B_WORDS)) return -1;
    uint64_t x = atomic_load_explicit(&a->granule_words[g], memory_order_acquire);
    return af_g_kind(x) == AF_G_RES && af_g_owner(x) == a->proc && af_g_tag(x) == *s ? (int64_t)g : -1;
}

static int find_space(af_arena *a, af_slot *slot, uint32_t s, uint64_t size, uint64_t head, uint32_t options,
                      int64_t reserved, af_space *space) {
    if (bump(a, slot, s, size >> 4, head, space)) return AF_OK;
    if (reserved >= 0) {
        uint64_t x = atomic_load_explicit(&a->granule_words[reserved], memory_order_relaxed);
        if (size <= af_g_len(x) << AF_GRANULE_SHIFT) {
            *space = (af_space){af_run_offset(a, (uint64_t)reserved), (uint64_t)reserved, 0, 0, RESERVED};
            return AF_OK;
        }
    }
    int64_t g = af_run_take(a, af_granules_for(size), s, options);
    if (g < 0) return (int)g;
    *space = (af_space){af_run_offset(a, (uint64_t)g), (uint64_t)g, 0, 0, FRESH};
    return AF_OK;
}

/* Put back room that was not used. */
static void drop_space(af_arena *a, af_slot *slot, uint64_t size, af_space *space) {
    if (space->how == FRESH) af_run_free(a, space->granule);
    if (space->how == BUMPED) {
        uint64_t o = space->open_before;
        uint64_t bumped = af_open_make(af_open_granule(o), af_open_used16(o) + (size >> 4), af_open_gen(o));
        atomic_compare_exchange_strong_explicit(&slot->open, &bumped, o, memory_order_acq_rel, memory_order_relaxed);
    }
    space->how = NO_SPACE;
}

/* Everything but `prev`, which the caller sets before each try to link. Checksums go along with the copying. */
static void write_record(af_arena *a, uint64_t offset, const af_new_record *rec, uint64_t data_len) {
    af_record_header *header = af_record_at(a, offset);
    memset(header, 0, sizeof *header);
    header->data_len = data_len;
    header->meta_len = rec->meta_len;
    header->type = rec->type;
    header->flags = rec->flags;
    header->magic = AF_RECORD_MAGIC;
    header->data_at = (uint32_t)(sizeof *header + af_align(rec->meta_len, 8));
    header->aux = rec->aux;
    uint32_t crc = crc_header(header);
    uint8_t *to = (uint8_t *)(header + 1);
    if (rec->meta_len) memcpy(to, rec->meta, rec->meta_len);
    crc = af_crc32c(crc, to, rec->meta_len);
    to = (uint8_t *)header + header->data_at;
    for (uint32_t i = 0; i < rec->data_parts; i++) {
        const uint8_t *from = rec->data[i].base;
        for (size_t left = rec->data[i].len; left;) {
            size_t n = left < 32768 ? left : 32768; /* checksummed while in the cache */
            memcpy(to, from, n);
            crc = af_crc32c(crc, to, n);
            to += n;
            from += n;
            left -= n;
        }
    }
    header->crc = crc;
}

static bool may_append(af_arena *a, uint32_t s) {
    uint64_t c = atomic_load_explicit(&a->ctl[s], memory_order_acquire);
    uint32_t state = af_ctl_state(c);
    return state == AF_STATE_ACTIVE || (state == AF_STATE_DETACHED && af_ctl_owner(c) == a->proc);
}

/* Link the record. crash: before the CAS nothing happened: bumped room is lost, a run of our own is freed by the
 * sweep; after it the record is there for good, and the sweep commits the run. */
static int link_record(af_arena *a, uint32_t s, const af_new_record *rec, uint64_t size, uint64_t data_len,
                       uint64_t expect, uint32_t options, int64_t reserved, af_space *space, uint64_t *head) {
    af_slot *slot = &a->slots[s];
    *head = load_head(a, s);
    for (;;) {
        if (!may_append(a, s)) return AF_EGONE;
        if (expect != AF_LOG_ANY && *head != expect) return AF_EMOVED;
        if (space->how == BUMPED && space->gen != af_head_gen(*head))
            space->how = NO_SPACE; /* of a log that was cut */
        if (space->how == NO_SPACE) {
            int r = find_space(a, slot, s, size, *head, options, reserved, space);
            if (r) return r;
            write_record(a, space->offset, rec, data_len);
        }
        af_record_at(a, space->offset)->prev = af_head_offset(*head);
        AF_CP(append_written);
        uint64_t linked = af_head_make(space->offset, af_head_gen(*head));
        /* COMMIT POINT. order: release, pairs with the acquire of every reader of the head. */
        if (atomic_compare_exchange_strong_explicit(&slot->head, head, linked, memory_order_acq_rel,
                                                    memory_order_acquire)) {
            *head = linked;
            AF_CP(append_linked);
            return AF_OK;
        }
    }
}

/* What is left to do for a linked record: nothing of it is needed for the record to stand. */
static void settle_space(af_arena *a, uint32_t s, uint64_t size, uint64_t head, int64_t reserved, af_space *space) {
    af_slot *slot = &a->slots[s];
    uint64_t granules = af_granules_for(size);
    if (space->how != BUMPED) {
        af_run_trim(a, space->granule, granules);
        AF_CP(append_trimmed);
        af_run_commit(a, space->granule);
        AF_CP(append_committed);
        offer_open(a, slot, space->granule, size, head);
        atomic_fetch_add_explicit(&slot->nbytes, granules << AF_GRANULE_SHIFT, memory_order_relaxed);
    }
    if (reserved >= 0 && space->how != RESERVED) af_run_free(a, (uint64_t)reserved);
}

int af_log_append(af_arena *a, uint32_t s, const af_new_record *rec, uint64_t expect, uint32_t options,
                  uint64_t reservation, uint64_t *head) {
    uint64_t data_len = 0;
    for (uint32_t i = 0; i < rec->data_parts; i++) {
        if (rec->data[i].len > a->g->max_bytes) return AF_ENOSPC;
        data_len += rec->data[i].len;
    }
    if (!af_slot_ok(a, s) || af_slot_kind(a, s) != AF_KIND_SESSION || !rec->type) return AF_EINVAL;
    if (rec->meta_len > AF_META_MAX) return AF_EINVAL;
    int64_t reserved = -1;
    if (reservation) {
        uint32_t of;
        reserved = reservation_run(a, reservation, &of);
        if (reserved < 0 || of != s) return AF_EINVAL;
    }
    uint64_t size = af_align(sizeof(af_record_header) + af_align(rec->meta_len, 8) + data_len, 16);
    af_space space = {.how = NO_SPACE};
    atomic_store_explicit(&a->me->writing, s + 1u, memory_order_seq_cst);
    int r = link_record(a, s, rec, size, data_len, expect, options, reserved, &space, head);
    if (r)
        drop_space(a, &a->slots[s], size, &space);
    else
        settle_space(a, s, size, *head, reserved, &space);
    atomic_store_explicit(&a->me->writing, 0, memory_order_release);
    return r;
}

/* ------------------------------------------------------------------------------------------- reservations ---- */

int64_t af_reserve(af_arena *a, uint32_t s, uint64_t nbytes) {
    if (!af_slot_ok(a, s)) return AF_EINVAL;
    if (nbytes > a->g->max_bytes) return AF_ENOSPC;
    int64_t g = af_run_take(a, af_granules_for(sizeof(af_record_header) + nbytes + 32), s, 0);
    if (g < 0) return g;
    AF_CP(reserved);
    return (int64_t)reservation_make((uint64_t)g, s);
}

int af_release(af_arena *a, uint64_t reservation) {
    uint32_t s;
    int64_t g = reservation_run(a, reservation, &s);
    if (g < 0) return AF_EINVAL;
    af_run_free(a, (uint64_t)g);
    return AF_OK;
}
