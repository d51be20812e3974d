/* check.h: what the C tests share: a check that says where and why, an arena of small size, records with a serial. */
#ifndef CHECK_H
#define CHECK_H

#include "layout.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define CHECK(condition, ...)                                                                                        \
    do {                                                                                                             \
        if (!(condition)) {                                                                                          \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                          \
            fprintf(stderr, " " __VA_ARGS__);                                                                        \
            fputc('\n', stderr);                                                                                     \
            abort();                                                                                                 \
        }                                                                                                            \
    } while (0)
#define OK(call)                                                                                                     \
    do {                                                                                                             \
        int64_t r_ = (int64_t)(call);                                                                                \
        CHECK(r_ >= 0, "%s is %d: %s", #call, (int)r_, af_strerror((int)r_));                                        \
    } while (0)
#define IS(call, code)                                                                                               \
    do {                                                                                                             \
        int64_t r_ = (int64_t)(call);                                                                                \
        CHECK(r_ == (int64_t)(code), "%s is %lld, not %lld", #call, (long long)r_, (long long)(code));               \
    } while (0)

static inline af_arena *arena_of(uint64_t bytes, uint32_t proc) {
    af_arena *a = NULL;
    OK(af_create(bytes, 512, 512, proc, &a));
    return a;
}

static inline af_arena *clone_of(af_arena *from, uint32_t proc) {
    af_arena *a = NULL;
    OK(af_clone(from, proc, &a));
    return a;
}

static inline void check_whole(af_arena *a, const char *when) {
    char why[256] = "";
    int r = af_check(a, why, sizeof why);
    CHECK(r == AF_OK, "%s: %s", when, why);
}

static inline uint64_t used(af_arena *a) {
    af_stats_result stats;
    af_stats(a, &stats);
    return stats.granules_used;
}

/* Start a session; its slot. */
static inline uint32_t started(af_arena *a, const char *task, const char *key) {
    af_started out;
    OK(af_session_start(a, task, (uint32_t)strlen(task), key, (uint32_t)strlen(key), 0, -1, &out));
    return out.slot;
}

static inline int64_t pin_id(af_arena *a, const char *id) { return af_pin_id(a, id, (uint32_t)strlen(id)); }
static inline int64_t pin_key(af_arena *a, const char *key) { return af_pin_key(a, key, (uint32_t)strlen(key)); }

/* The bytes that belong to a serial number. */
static inline void fill(uint8_t *out, size_t n, uint64_t serial) {
    for (size_t i = 0; i < n; i++) out[i] = (uint8_t)(serial * 31 + i * 7);
}

/* A record whose meta is the serial and whose data are `n` bytes that follow from it. Returns the code. */
static inline int append_serial(af_arena *a, uint32_t s, uint64_t serial, size_t n, uint64_t expect,
                                uint64_t reservation, uint64_t *head) {
    uint8_t *data = malloc(n + 1);
    fill(data, n, serial);
    af_span parts[2] = {{data, n / 3}, {data + n / 3, n - n / 3}};
    af_new_record rec = {.type = 2, .meta = &serial, .meta_len = sizeof serial, .data = parts, .data_parts = 2};
    int r = af_log_append(a, s, &rec, expect, 0, reservation, head);
    free(data);
    return r;
}

/* How often a serial is in a log, and whether its bytes are right each time. */
static inline int count_serial(af_arena *a, uint32_t s, uint64_t serial) {
    af_log_view view = {0};
    int n = 0;
    OK(af_log_read(a, s, 0, &view));
    for (size_t i = 0; i < view.count; i++) {
        const af_record *record = &view.records[i];
        uint64_t have;
        if (record->type != 2 || record->meta_len != sizeof have) continue;
        memcpy(&have, view.meta + record->meta_at, sizeof have);
        if (have != serial) continue;
        uint8_t *data = malloc(2 * record->data_len + 1);
        OK(af_record_data(a, s, view.head, record->offset, 0, record->data_len, data));
        fill(data + record->data_len, record->data_len, serial);
        CHECK(!memcmp(data, data + record->data_len, record->data_len), "bytes of %llu", (unsigned long long)serial);
        free(data);
        n++;
    }
    af_log_view_free(&view);
    return n;
}

/* Close every session and shard, free what is detached for `procs` processes, and expect nothing to be left. */
static inline void drain(af_arena *a, const char *when) {
    af_stats_result stats;
    for (uint32_t s = 0; s < a->g->slots; s++) {
        if (!af_slot_ok(a, s) || !af_slot_pin_raw(a, s)) continue;
        OK(af_session_close(a, s));
        af_unpin(a, s);
    }
    uint32_t next = 0;
    af_detach_next(a, 0, 0, &next);
    af_stats(a, &stats);
    CHECK(stats.granules_used == 0, "%s: %llu granules are left", when, (unsigned long long)stats.granules_used);
    CHECK(stats.sessions_active + stats.sessions_closing + stats.shards_active + stats.shards_closing == 0, "%s",
          when);
    check_whole(a, when);
}

static inline uint64_t next_random(uint64_t *state) { /* xorshift64* */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull >> 16;
}

#endif
