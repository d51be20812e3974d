/* threads.c: the processes as threads of one process, each with its own handle, for ThreadSanitizer: it finds a
 * missing acquire or release that the processor's memory order hides. The seqlock's copies, racy by intent, are made
 * in af_racy_copy, which is hidden from it; what is read that way is checked here by its content.
 *
 * threads [seconds]
 */
#include "check.h"

#include <pthread.h>
#include <time.h>

enum { WORKERS = 3, NAMES = 12, SHARDS = 4, STALE_NS = 20000000, REST_NS = 80000000, WATCHDOG_S = 120 };

static af_arena *arena;
static _Atomic bool stop;
static _Atomic uint64_t appends, compactions, reads, exported, closed, detached, stored, views, extra_views;

static void shard_use(af_arena *a, uint64_t *random) {
    char id[16];
    const void *meta, *data;
    uint32_t meta_len, bits, len = (uint32_t)snprintf(id, sizeof id, "shard-%d", (int)(next_random(random) % SHARDS));
    uint64_t size;
    if (next_random(random) % 3 == 0) {
        uint8_t body[6000];
        uint64_t serial = next_random(random);
        fill(body, sizeof body, serial);
        int64_t s = af_shard_put(a, id, len, &serial, 8, &(af_span){body, sizeof body}, 1, 3, 0);
        CHECK(s >= 0 || s == AF_EBUSY || s == AF_ENOSPC, "%d", (int)s);
        stored += s >= 0;
        return;
    }
    int64_t s = af_pin_shard(a, id, len);
    if (s < 0) return;
    uint64_t serial;
    OK(af_shard_get(a, (uint32_t)s, &meta, &meta_len, &data, &size, &bits));
    memcpy(&serial, meta, 8);
    uint8_t want[6000];
    fill(want, sizeof want, serial);
    CHECK(size == sizeof want && !memcmp(want, data, size), "shard");
    bool was, all;
    if (next_random(random) % 8 == 0) {
        OK(af_shard_clear_bit(a, (uint32_t)s, (uint32_t)(next_random(random) % 3), &was, &all));
        if (all) af_shard_close(a, (uint32_t)s);
    }
    af_unpin(a, (uint32_t)s);
    views++;
}

static void export_one(af_arena *a, uint32_t s, bool remove) {
    uint64_t head;
    int64_t ref = af_txn_begin(a);
    if (ref < 0) return;
    af_new_record rec = {.type = AF_REC_EXPORTING, .flags = remove ? AF_REC_FLAG_REMOVE : 0, .aux = (uint64_t)ref};
    if (af_log_append(a, s, &rec, AF_LOG_ANY, AF_CRITICAL, 0, &head) || remove == (ref % 2 == 0)) {
        OK(af_txn_abort(a, (uint64_t)ref, &s, 1));
        return;
    }
    OK(af_txn_commit(a, (uint64_t)ref));
    while (af_txn_finish(a, (uint64_t)ref, &s, 1) == AF_EBUSY) sched_yield();
    exported++;
}

static void compact(af_arena *a, uint32_t s) {
    af_log_view view = {0};
    uint64_t head;
    OK(af_log_read(a, s, 0, &view));
    if (view.count > 3) {
        uint64_t keep[2] = {view.records[view.count - 2].offset, view.records[view.count - 1].offset};
        int r = af_log_compact(a, s, view.head, "x", 1, keep, 2, &head);
        CHECK(r == AF_OK || r == AF_EMOVED || r == AF_EBUSY || r == AF_EGONE || r == AF_ENOSPC, "%d", r);
        compactions += r == AF_OK;
    }
    af_log_view_free(&view);
}

/* Read the newest record's bytes, as a reader in another thread of the process would. */
static void read_newest(af_arena *a, uint32_t s) {
    af_log_view view = {0};
    OK(af_log_read(a, s, 0, &view));
    for (size_t i = view.count; i-- > 0;) {
        const af_record *record = &view.records[i];
        if (record->type != 2) continue;
        uint64_t serial;
        memcpy(&serial, view.meta + record->meta_at, 8);
        uint8_t *data = malloc(2 * record->data_len + 1);
        int r = af_record_data(a, s, view.head, record->offset, 0, record->data_len, data);
        CHECK(r == AF_OK || r == AF_ETRIMMED, "%d", r);
        fill(data + record->data_len, record->data_len, serial);
        CHECK(r || !memcmp(data, data + record->data_len, record->data_len), "torn record");
        free(data);
        reads++;
        break;
    }
    af_log_view_free(&view);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool every_mechanism_used(void) {
    return appends && compactions && reads && exported && closed && detached && stored && views && extra_views;
}

static void *worker(void *arg) {
    af_arena *a = clone_of(arena, (uint32_t)(uintptr_t)arg);
    uint64_t random = 88172645463325252ull * (a->proc + 1);
    while (!stop) {
        char key[32];
        /* One name after the other is left alone for several times STALE_NS, so that the cleaner finds work however
         * fast or slow the workers are. */
        uint64_t name = next_random(&random) % NAMES, resting = now_ns() / REST_NS % NAMES;
        uint32_t n = (uint32_t)snprintf(key, sizeof key, "key-%d", (int)name);
        shard_use(a, &random);
        if (name == resting) continue;
        int64_t found = af_pin_key(a, key, n);
        if (found < 0) {
            af_started out;
            int r = af_session_start(a, "task", 4, key, n, 0, -1, &out);
            CHECK(r == AF_OK || r == AF_EEXIST || r == AF_EBUSY || r == AF_ENOSPC, "%d", r);
            continue;
        }
        uint32_t s = (uint32_t)found;
        uint64_t head, what = next_random(&random) % 32;
        af_touch(a, s);
        int64_t reserved = what % 3 == 0 ? af_reserve(a, s, 3000) : 0;
        int r = append_serial(a, s, next_random(&random), 50 + next_random(&random) % (what % 5 ? 200 : 9000),
                              AF_LOG_ANY, reserved > 0 ? (uint64_t)reserved : 0, &head);
        CHECK(r == AF_OK || r == AF_EGONE || r == AF_ENOSPC, "%d", r);
        if (r && reserved > 0) af_release(a, (uint64_t)reserved);
        appends += r == AF_OK;
        if (what < 8) read_newest(a, s);
        if (what == 8 || what == 9) compact(a, s);
        if (what == 10) export_one(a, s, next_random(&random) % 4 == 0);
        if (what == 11 && af_session_close(a, s) == AF_OK) closed++;
        af_unpin(a, s);
    }
    af_close(a);
    return NULL;
}

/* Replace one shard for ever; it is always to be found (viewer). */
static void *replacer(void *arg) {
    af_arena *a = clone_of(arena, 20);
    (void)arg;
    while (!stop) {
        int64_t s = af_shard_put(a, "always", 6, NULL, 0, NULL, 0, 0, AF_CRITICAL);
        CHECK(s >= 0 || s == AF_EBUSY || s == AF_ENOSPC, "%d", (int)s);
    }
    af_close(a);
    return NULL;
}

/* Two threads of one process: they share one handle's pins, as holders of shard views do. */
static void *viewer(void *arg) {
    af_arena *a = arg;
    while (!stop) {
        int64_t always = af_pin_shard(a, "always", 6);
        CHECK(always >= 0, "a shard that is only ever replaced was not found");
        af_unpin(a, (uint32_t)always);
        for (uint32_t i = 0; i < SHARDS; i++) {
            char id[16];
            int64_t s = af_pin_shard(a, id, (uint32_t)snprintf(id, sizeof id, "shard-%d", (int)i));
            if (s < 0) continue;
            const void *meta, *data;
            uint32_t meta_len, bits;
            uint64_t size, serial;
            OK(af_shard_get(a, (uint32_t)s, &meta, &meta_len, &data, &size, &bits));
            memcpy(&serial, meta, 8);
            uint8_t want[6000];
            fill(want, sizeof want, serial);
            CHECK(!memcmp(want, data, size), "shard");
            af_unpin(a, (uint32_t)s);
            extra_views++;
        }
    }
    return NULL;
}

static void *cleaner(void *arg) {
    af_arena *a = clone_of(arena, AF_PROC_CLEANER);
    uint32_t next = 0;
    (void)arg;
    while (!stop) {
        int64_t s = af_detach_next(a, af_now_ns() - STALE_NS, next, &next);
        if (s < 0) {
            af_stats_result stats;
            af_stats(a, &stats);
            OK(af_punch_idle(a, 0, 4096));
            sched_yield();
            continue;
        }
        OK(af_log_verify(a, (uint32_t)s));
        OK(af_set_dumped(a, (uint32_t)s));
        while (af_reap(a, (uint32_t)s) == AF_EBUSY) sched_yield();
        detached++;
    }
    af_close(a);
    return NULL;
}

int main(int argc, char **argv) {
    unsigned seconds = argc > 1 ? (unsigned)atoi(argv[1]) : 5;
    pthread_t threads[WORKERS + 4];
    arena = arena_of(8u << 20, 31);
    af_arena *shared = clone_of(arena, WORKERS);
    OK(af_shard_put(arena, "always", 6, NULL, 0, NULL, 0, 0, 0));
    for (uintptr_t i = 0; i < WORKERS; i++) pthread_create(&threads[i], NULL, worker, (void *)i);
    pthread_create(&threads[WORKERS], NULL, cleaner, NULL);
    pthread_create(&threads[WORKERS + 1], NULL, viewer, shared); /* two threads, one handle */
    pthread_create(&threads[WORKERS + 2], NULL, viewer, shared);
    pthread_create(&threads[WORKERS + 3], NULL, replacer, NULL);
    /* For that long, and on until each mechanism had its turn: a slow machine takes longer, it does not fail. */
    uint64_t began = now_ns(), least = seconds * 1000000000ull, most = least + WATCHDOG_S * 1000000000ull;
    do {
        struct timespec tick = {0, 50000000};
        nanosleep(&tick, NULL);
    } while (now_ns() - began < least || (!every_mechanism_used() && now_ns() - began < most));
    stop = true;
    for (int i = 0; i < WORKERS + 4; i++) pthread_join(threads[i], NULL);
    uint32_t next;
    af_detach_next(arena, 0, 0, &next);
    check_whole(arena, "afterwards");
    printf(
        "threads: %llu appends, %llu compactions, %llu reads, %llu exports, %llu closed, %llu detached, %llu puts, "
        "%llu views\n",
        (unsigned long long)appends, (unsigned long long)compactions, (unsigned long long)reads,
        (unsigned long long)exported, (unsigned long long)closed, (unsigned long long)detached,
        (unsigned long long)stored, (unsigned long long)(views + extra_views));
    CHECK(every_mechanism_used(), "some mechanism was never used");
    drain(arena, "at the end");
    af_close(shared);
    af_close(arena);
    return 0;
}
