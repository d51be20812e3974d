/* shards.c: immutable blobs under an id, each one record in a slot of kind SHARD.
 *
 * Theory: a shard is built in an INIT slot (run, header, names), then published. A new id is entered in the index and
 * becomes findable by the store of ACTIVE. An id that exists is replaced: new slot ACTIVE, then one store swaps the
 * index entry, then the old slot is closed; a reader finds the old one or the new one, never neither. Readers use the
 * bytes in place, under a pin, which keeps them after a replacement or a close. Between those three steps a kill
 * would leave an ACTIVE shard that no entry leads to. So both slot numbers stand in our process slot meanwhile
 * (publish_new, publish_old), and the sweep closes those of the two that are ACTIVE and unindexed. Bits: one word for
 * 64, in the record behind its header, all set at first; clearing is one fetch_and.
 */
#include "layout.h"

static inline af_word *bit_words(af_record_header *header) { return (af_word *)(void *)(header + 1); }

static af_record_header *shard_record(af_arena *a, uint32_t s) {
    uint64_t offset = af_head_offset(atomic_load_explicit(&a->slots[s].head, memory_order_acquire));
    return offset ? af_record_at(a, offset) : NULL;
}

static bool is_shard(af_arena *a, uint32_t s) { return af_slot_ok(a, s) && af_slot_kind(a, s) == AF_KIND_SHARD; }

static bool is_my_init(af_arena *a, uint32_t s) {
    uint64_t c = atomic_load_explicit(&a->ctl[s], memory_order_acquire);
    return af_ctl_state(c) == AF_STATE_INIT && af_ctl_owner(c) == a->proc;
}

static void write_header(af_arena *a, uint64_t offset, const void *meta, uint32_t meta_len, uint64_t size,
                         uint32_t bits, uint64_t data_at) {
    af_record_header *header = af_record_at(a, offset);
    memset(header, 0, sizeof *header);
    header->data_len = size;
    header->meta_len = meta_len;
    header->bits = bits;
    header->type = 1;
    header->magic = AF_RECORD_MAGIC;
    header->data_at = (uint32_t)data_at;
    uint32_t words = (bits + 63) / 64;
    for (uint32_t i = 0; i < words; i++) {
        bool last = i == words - 1 && bits % 64;
        atomic_init(&bit_words(header)[i], last ? (1ull << bits % 64) - 1 : UINT64_MAX);
    }
    if (meta_len) memcpy(bit_words(header) + words, meta, meta_len);
}

/* crash: INIT of the dead: the sweep keeps what head and names reach just long enough to free it with the slot. */
int64_t af_shard_reserve(af_arena *a, const char *id, uint32_t id_len, const void *meta, uint32_t meta_len,
                         uint64_t size, uint32_t bits, uint32_t options, void **view) {
    *view = NULL;
    if (!id_len || id_len > AF_ID_MAX || meta_len > AF_META_MAX || bits > AF_BITS_MAX) return AF_EINVAL;
    if (size > a->g->max_bytes) return AF_ENOSPC;
    uint64_t before = sizeof(af_record_header) + (uint64_t)(bits + 63) / 64 * 8 + meta_len;
    uint64_t data_at = af_align(before, AF_LINE), granules = af_granules_for(data_at + size);
    int64_t s = af_slot_take(a, AF_KIND_SHARD);
    if (s < 0) return s;
    int64_t g = af_run_take(a, granules, (uint32_t)s, options), names_run = -1;
    if (g >= 0 && id_len > AF_INLINE_NAMES) {
        names_run = af_run_take(a, af_granules_for(id_len), (uint32_t)s, options);
        if (names_run < 0) {
            af_run_free(a, (uint64_t)g);
            g = names_run;
        }
    }
    if (g < 0) {
        af_slot_give_back(a, (uint32_t)s);
        return g;
    }
    af_slot *slot = &a->slots[s];
    uint64_t offset = af_run_offset(a, (uint64_t)g), now = af_now_ns();
    write_header(a, offset, meta, meta_len, size, bits, data_at);
    AF_CP(shard_written);
    uint64_t gen = af_head_gen(atomic_load_explicit(&slot->head, memory_order_relaxed));
    atomic_store_explicit(&slot->head, af_head_make(offset, gen), memory_order_release);
    AF_CP(shard_headed);
    af_run_commit(a, (uint64_t)g);
    af_slot_set_names(a, (uint32_t)s, id, id_len, "", 0, names_run);
    atomic_store_explicit(&slot->nbytes, granules << AF_GRANULE_SHIFT, memory_order_relaxed);
    atomic_store_explicit(&slot->created_ns, now, memory_order_relaxed);
    atomic_store_explicit(&a->touch[s], now, memory_order_relaxed);
    *view = a->base + offset + data_at;
    return s;
}

/* COMMIT POINT (a new id). order: release of the shard's bytes; every pin acquires. */
static void activate(af_arena *a, uint32_t s) {
    uint64_t c = atomic_load_explicit(&a->ctl[s], memory_order_relaxed);
    uint64_t bytes = atomic_load_explicit(&a->slots[s].nbytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&a->h->shard_bytes, bytes, memory_order_relaxed);
    atomic_store_explicit(&a->ctl[s], af_ctl_next(c, 0, AF_STATE_ACTIVE, 0), memory_order_release);
    AF_CP(shard_active);
}

static void replace_locked(af_arena *a, af_word *entry, uint32_t old, uint32_t s) {
    atomic_store_explicit(&a->me->publish_old, old + 1u, memory_order_relaxed);
    atomic_store_explicit(&a->me->publish_new, s + 1u, memory_order_release);
    AF_CP(shard_intent);
    activate(a, s);
    af_index_swap_locked(a, entry, s); /* COMMIT POINT of a replacement */
    AF_CP(shard_swapped);
    af_slot_close(a, old);
    atomic_store_explicit(&a->me->publish_new, 0, memory_order_release);
    AF_CP(shard_intent_cleared);
}

/* `only`: the slot that must be in the way, AF_NONE for any or none. */
static int publish(af_arena *a, uint32_t s, uint64_t only) {
    if (!is_shard(a, s)) return AF_EINVAL;
    if (!is_my_init(a, s)) return AF_EGONE;
    if (af_index_lock(a, AF_IMPATIENT)) return AF_EBUSY;
    const char *id, *key;
    uint32_t id_len = atomic_load_explicit(&a->slots[s].id_len, memory_order_relaxed), old = 0;
    af_slot_names(a, &a->slots[s], &id, &key);
    af_word *entry = af_index_find_locked(a, AF_SPACE_SHARD, id, id_len, AF_NONE, &old);
    int r = AF_OK;
    if (only != AF_NONE && (!entry || old != only)) {
        r = AF_EGONE;
        entry = NULL;
    } else if (entry) {
        replace_locked(a, entry, old, s);
    } else {
        r = af_index_insert_locked(a, AF_SPACE_SHARD, id, id_len, s);
        if (!r) activate(a, s);
    }
    af_index_unlock(a);
    if (entry) af_slot_reap_closing(a, old); /* unless readers hold it */
    return r;
}

int af_shard_publish(af_arena *a, uint32_t s) { return publish(a, s, AF_NONE); }

int af_shard_succeed(af_arena *a, uint32_t s, uint32_t old) {
    if (!is_shard(a, s) || !is_shard(a, old)) return AF_EINVAL;
    if (!is_my_init(a, s)) return AF_EGONE;
    uint64_t created_ns = atomic_load_explicit(&a->slots[old].created_ns, memory_order_relaxed);
    atomic_store_explicit(&a->slots[s].created_ns, created_ns, memory_order_relaxed);
    return publish(a, s, old);
}

int af_shard_abandon(af_arena *a, uint32_t s) {
    if (!is_shard(a, s)) return AF_EINVAL;
    if (!is_my_init(a, s)) return AF_EGONE;
    return af_slot_empty(a, s); /* never indexed, so no lock is needed */
}

int64_t af_shard_put(af_arena *a, const char *id, uint32_t id_len, const void *meta, uint32_t meta_len,
                     const af_span *data, uint32_t data_parts, uint32_t bits, uint32_t options) {
    uint64_t size = 0;
    void *view;
    for (uint32_t i = 0; i < data_parts; i++) {
        if (data[i].len > a->g->max_bytes) return AF_ENOSPC;
        size += data[i].len;
    }
    int64_t s = af_shard_reserve(a, id, id_len, meta, meta_len, size, bits, options, &view);
    if (s < 0) return s;
    uint8_t *to = view;
    for (uint32_t i = 0; i < data_parts; i++) {
        if (data[i].len) memcpy(to, data[i].base, data[i].len);
        to += data[i].len;
    }
    int r = af_shard_publish(a, (uint32_t)s);
    if (r) af_shard_abandon(a, (uint32_t)s);
    return r ? r : s;
}

/* ------------------------------------------------------------------------------------------------ reading ---- */

int af_shard_get(af_arena *a, uint32_t s, const void **meta, uint32_t *meta_len, const void **data,
                 uint64_t *data_len, uint32_t *bits) {
    af_record_header *header = is_shard(a, s) ? shard_record(a, s) : NULL;
    if (!header) return AF_EINVAL;
    *meta = bit_words(header) + (header->bits + 63) / 64;
    *meta_len = header->meta_len;
    *data = (const uint8_t *)header + header->data_at;
    *data_len = header->data_len;
    *bits = header->bits;
    return AF_OK;
}

/* crash: the bit is cleared and nobody was told; the next one to clear it hears that it was not set. */
int af_shard_clear_bit(af_arena *a, uint32_t s, uint32_t bit, bool *was, bool *all) {
    af_record_header *header = is_shard(a, s) ? shard_record(a, s) : NULL;
    if (!header || bit >= header->bits) return AF_EINVAL;
    af_word *words = bit_words(header);
    uint64_t one = 1ull << bit % 64;
    *was = atomic_fetch_and_explicit(&words[bit / 64], ~one, memory_order_acq_rel) & one;
    AF_CP(shard_bit_cleared);
    *all = true;
    for (uint32_t i = 0; i < (header->bits + 63) / 64 && *all; i++) {
        *all = atomic_load_explicit(&words[i], memory_order_acquire) == 0;
    }
    return AF_OK;
}

int af_shard_bit(af_arena *a, uint32_t s, uint32_t bit) {
    af_record_header *header = is_shard(a, s) ? shard_record(a, s) : NULL;
    if (!header || bit >= header->bits) return AF_EINVAL;
    return (int)(atomic_load_explicit(&bit_words(header)[bit / 64], memory_order_acquire) >> bit % 64 & 1);
}

int af_shard_close(af_arena *a, uint32_t s) { return is_shard(a, s) ? af_session_close(a, s) : AF_EINVAL; }
