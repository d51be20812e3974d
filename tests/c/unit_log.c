/* unit_log.c: append, read, reservations, compaction, garbage. */
#include "unit.h"

/* --------------------------------------------------------------------------------------------------- log ---- */

void test_append_and_read(void) {
    af_arena *a = arena_of(4 * MIB, 1);
    uint32_t s = started(a, "t", "k");
    CHECK(af_pin_slot(a, s), "pin");
    uint64_t head = af_log_head(a, s), middle = 0, first = head;
    static const size_t sizes[] = {0, 1, 15, 100, 3000, 4096, 5000, 10, 70000, 300000, 12};
    for (uint64_t i = 0; i < 11; i++) {
        IS(append_serial(a, s, i, sizes[i], first, 0, &head), i ? AF_EMOVED : AF_OK);
        if (i) OK(append_serial(a, s, i, sizes[i], head, 0, &head));
        if (i == 5) middle = head;
        if (i == 0) CHECK(head != first, "moved");
    }
    for (uint64_t i = 0; i < 11; i++) IS(count_serial(a, s, i), 1);
    af_log_view view = {0};
    OK(af_log_read(a, s, middle, &view));
    CHECK(view.count == 5 && !view.cut && view.head == head, "%zu records", view.count);
    uint64_t serial;
    memcpy(&serial, view.meta + view.records[0].meta_at, 8);
    IS(serial, 6);
    const af_record *large = &view.records[3];
    uint8_t part[100], whole[100];
    uint64_t len;
    OK(af_record_data_len(a, s, head, large->offset, &len));
    IS(len, 300000);
    OK(af_record_data(a, s, head, large->offset, 299900, 100, part));
    fill(whole, 100, 0);
    for (size_t i = 0; i < 100; i++) whole[i] = (uint8_t)(9 * 31 + (299900 + i) * 7);
    CHECK(!memcmp(part, whole, 100), "tail");
    IS(af_record_data(a, s, head, large->offset, 299901, 100, part), AF_EINVAL);
    IS(af_record_data(a, s, head, 12345, 0, 1, part), AF_EINVAL);
    IS(af_record_data(a, s, head, UINT64_MAX - 15, 0, 1, part), AF_EINVAL);
    OK(af_log_read(a, s, head, &view));
    IS(view.count, 0);
    af_log_view_free(&view);
    af_new_record none = {.type = 0};
    IS(af_log_append(a, s, &none, AF_LOG_ANY, 0, 0, &head), AF_EINVAL);
    OK(af_log_verify(a, s));
    af_unpin(a, s);
    drain(a, "append");
    af_close(a);
}

void test_small_records_share(void) {
    af_arena *a = arena_of(MIB, 1);
    uint32_t s = started(a, "t", "k");
    uint64_t head;
    CHECK(af_pin_slot(a, s), "pin");
    for (uint64_t i = 0; i < 100; i++) OK(append_serial(a, s, i, 40, AF_LOG_ANY, 0, &head));
    IS(used(a), (100 * 112 + 4095) / 4096); /* 64 + 8 + 40 bytes each */
    /* A run with more room left than the open chunk replaces it. */
    OK(append_serial(a, s, 100, 4096 + 100, AF_LOG_ANY, 0, &head));
    uint64_t before = used(a);
    for (uint64_t i = 101; i < 130; i++) OK(append_serial(a, s, i, 40, AF_LOG_ANY, 0, &head));
    IS(used(a), before);
    af_unpin(a, s);
    drain(a, "small records");
    af_close(a);
}

void test_reservations(void) {
    af_arena *a = arena_of(4 * MIB, 1);
    uint32_t s = started(a, "t", "k"), other = started(a, "t", "");
    uint64_t head;
    CHECK(af_pin_slot(a, s) && af_pin_slot(a, other), "pin");
    int64_t r = af_reserve(a, s, 100000);
    OK(r);
    IS(used(a), 25);
    IS(append_serial(a, other, 1, 10, AF_LOG_ANY, (uint64_t)r, &head), AF_EINVAL);
    OK(append_serial(a, s, 1, 5000, AF_LOG_ANY, (uint64_t)r, &head)); /* trimmed to what it needs */
    IS(used(a), 2);
    IS(af_release(a, (uint64_t)r), AF_EINVAL);
    r = af_reserve(a, s, 100000);
    OK(append_serial(a, s, 2, 100, AF_LOG_ANY, (uint64_t)r, &head)); /* the open chunk is enough: all given back */
    IS(used(a), 2);
    r = af_reserve(a, s, 100000);
    IS(append_serial(a, s, 3, 100, 0, (uint64_t)r, &head), AF_EMOVED); /* still ours */
    IS(used(a), 27);
    OK(af_release(a, (uint64_t)r));
    IS(af_release(a, (uint64_t)r), AF_EINVAL);
    IS(af_release(a, 0), AF_EINVAL);
    IS(af_release(a, UINT64_MAX), AF_EINVAL);
    r = af_reserve(a, s, 10); /* too small: the record gets a run of its own */
    OK(append_serial(a, s, 4, 50000, AF_LOG_ANY, (uint64_t)r, &head));
    r = af_reserve(a, s, 20000 + 8);
    OK(append_serial(a, s, 5, 20000, head, (uint64_t)r, &head)); /* exactly what was said fits */
    for (uint64_t i = 1; i < 6; i++) IS(count_serial(a, s, i), i != 3);
    IS(af_reserve(a, s, 1ull << 50), AF_ENOSPC);
    af_unpin(a, s);
    af_unpin(a, other);
    drain(a, "reservations");
    af_close(a);
}

void test_compaction(void) {
    af_arena *a = arena_of(4 * MIB, 1), *b = clone_of(a, 2);
    uint32_t s = started(a, "t", "k");
    uint64_t head, offsets[40], old;
    CHECK(af_pin_slot(a, s) && af_pin_slot(b, s), "pin");
    for (uint64_t i = 0; i < 40; i++) {
        OK(append_serial(a, s, i, i % 7 == 0 ? 9000 : 100 + i, AF_LOG_ANY, 0, &head));
        offsets[i] = af_head_offset(head);
    }
    uint64_t before = used(a), keep[3] = {offsets[5], offsets[7], offsets[39]}, wrong[2] = {offsets[7], offsets[5]};
    old = head;
    IS(af_log_compact(a, s, head, "x", 1, wrong, 2, &head), AF_EINVAL);
    IS(af_log_compact(a, s, head - 1, "x", 1, keep, 3, &head), AF_EMOVED);
    /* Somebody is writing into the log: given up, nothing changed. */
    atomic_store(&b->me->writing, s + 1u);
    IS(af_log_compact(a, s, old, "x", 1, keep, 3, &head), AF_EBUSY);
    atomic_store(&b->me->writing, 0);
    IS(used(a), before);
    IS(count_serial(a, s, 39), 1);
    OK(af_log_compact(a, s, old, "x", 1, keep, 3, &head));
    for (uint64_t i = 0; i < 40; i++) IS(count_serial(b, s, i), i == 5 || i == 7 || i == 39);
    CHECK(used(a) < before, "%llu granules", (unsigned long long)used(a));
    uint8_t byte;
    IS(af_record_data(b, s, old, offsets[5], 0, 1, &byte), AF_ETRIMMED);
    IS(af_record_outcome(b, s, old, offsets[5]), AF_ETRIMMED);
    IS(append_serial(b, s, 50, 10, old, 0, &head), AF_EMOVED);
    af_log_view view = {0};
    OK(af_log_read(b, s, old, &view));
    CHECK(view.cut && view.count == 4 && view.records[0].type == AF_REC_CHECKPOINT, "the whole log, from the cut");
    OK(af_log_verify(a, s));
    OK(append_serial(b, s, 51, 10, view.head, 0, &head));
    af_log_view_free(&view);
    /* For weeks: memory does not grow. */
    for (uint64_t i = 0; i < 2000; i++) {
        OK(append_serial(a, s, 1000 + i, 700, AF_LOG_ANY, 0, &head));
        uint64_t last = af_head_offset(head);
        if (i % 10 == 0) OK(af_log_compact(a, s, head, "x", 1, &last, 1, &head));
    }
    CHECK(used(a) <= 6, "%llu granules", (unsigned long long)used(a));
    af_unpin(a, s);
    af_unpin(b, s);
    drain(a, "compaction");
    af_close(b);
    af_close(a);
}

/* A log of garbage is told as such, or at least read without harm. */
void test_garbage(uint64_t seed) {
    af_arena *a = arena_of(MIB, 1);
    uint32_t s = started(a, "t", "k");
    uint64_t head;
    CHECK(af_pin_slot(a, s), "pin");
    for (uint64_t i = 0; i < 20; i++) OK(append_serial(a, s, i, 600, AF_LOG_ANY, 0, &head));
    OK(af_log_verify(a, s));
    uint8_t *heap = a->base + a->g->heap_at, *saved = malloc(6 * 4096);
    memcpy(saved, heap, 6 * 4096);
    af_log_view view = {0};
    for (int i = 0; i < 20000; i++) {
        for (uint64_t flips = 1 + next_random(&seed) % 4; flips; flips--) {
            heap[next_random(&seed) % (6 * 4096)] = (uint8_t)next_random(&seed);
        }
        uint8_t data[64];
        int r = af_log_read(a, s, 0, &view);
        CHECK(r == AF_OK || r == AF_ECORRUPT, "%d", r);
        af_record_data(a, s, head, af_head_offset(head), 0, 64, data);
        r = af_log_verify(a, s);
        CHECK(r == AF_OK || r == AF_ECORRUPT, "%d", r);
        memcpy(heap, saved, 6 * 4096);
    }
    /* A flipped bit anywhere in the data, and a chain that bites its tail. */
    heap[200] ^= 1;
    IS(af_log_verify(a, s), AF_ECORRUPT);
    heap[200] ^= 1;
    OK(af_log_verify(a, s));
    af_record_at(a, a->g->heap_at)->prev = af_head_offset(head);
    IS(af_log_read(a, s, 0, &view), AF_ECORRUPT);
    memcpy(heap, saved, 6 * 4096);
    af_log_view_free(&view);
    free(saved);
    af_unpin(a, s);
    drain(a, "garbage");
    af_close(a);
}
