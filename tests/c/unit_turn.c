/* unit_turn.c: what reads a client's or an engine's bytes (messages.c, tokens.c), on buffers of exactly their size, so
 * that a sanitizer sees a byte too many. That it reads rightly is compared with Python's parsers in tests/property. */
#include "messages.h"
#include "tokens.h"
#include "unit.h"

#include <string.h>

static uint32_t next(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static void *sized(size_t n) {
    void *block = malloc(n ? n : 1);
    CHECK(block, "no memory");
    return block;
}

/* A text of the usual form, cut and changed in a few places. */
static char *damaged(const char *text, uint64_t *state, size_t *n) {
    static const char put[] = "[]{},:\"\\0123456789eE+-. nul\n\xff\0m";
    size_t whole = strlen(text);
    *n = next(state) % 4 ? whole : next(state) % (whole + 1);
    char *copy = sized(*n);
    memcpy(copy, text, *n);
    for (uint32_t i = next(state) % 4; i && *n; i--) copy[next(state) % *n] = put[next(state) % (sizeof put - 1)];
    return copy;
}

static int rows(const char *text, size_t n, uint64_t *state) {
    size_t room = next(state) % 3 ? n / AF_ROW_MIN + 1 : next(state) % 3, end = 0;
    int32_t *ids = sized(room * sizeof *ids);
    float *logprobs = sized(room * sizeof *logprobs);
    ptrdiff_t count = af_rows_parse(text, n, ids, logprobs, room, &end);
    if (count >= 0) {
        CHECK((size_t)count <= room && end <= n, "%td rows of %zu, %zu of %zu bytes", count, room, end, n);
        char *out = sized((size_t)count * AF_DIGITS_MAX);
        (void)af_ids_write(ids, (size_t)count, out);
        free(out);
    }
    free(ids);
    free(logprobs);
    return count >= 0;
}

static int messages(const char *text, size_t n, uint64_t *state) {
    size_t room = next(state) % 4;
    af_range *found = sized(room * sizeof *found), array;
    ptrdiff_t count = af_messages_scan(text, n, found, room, &array);
    if (count >= 0) {
        CHECK((size_t)count <= room && array.stop <= n, "%td messages", count);
        for (ptrdiff_t i = 0; i < count; i++) {
            CHECK(found[i].start < found[i].stop && found[i].stop < array.stop, "message %td", i);
            CHECK(text[found[i].start] == '{', "message %td begins otherwise", i);
        }
    }
    free(found);
    return count >= 0;
}

void test_hostile_bytes(uint64_t seed) {
    static const char *texts[] = {
        "[[-0.5,12,null],[-1.25e-3,99999,\"tok\"],[0,1]]",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\\\"b\"},{\"x\":[{}]}],\"n\":1,\"t\":\"\\\\\"}",
    };
    int read = 0, scanned = 0;
    for (int i = 0; i < 60000; i++) {
        size_t n;
        char *text = damaged(texts[i % 2], &seed, &n);
        read += rows(text, n, &seed);
        scanned += messages(text, n, &seed);
        uint8_t secret[16], out[16];
        for (int j = 0; j < 16; j++) secret[j] = (uint8_t)next(&seed);
        af_digest_key key;
        af_digest_key_make(&key, secret);
        af_digest(&key, text, n, out);
        af_fingerprint(text, n, out);
        free(text);
    }
    CHECK(read > 1000 && scanned > 1000, "%d read, %d scanned: the texts were never whole", read, scanned);
}

void test_ids_written(uint64_t seed) {
    static const int32_t edges[] = {0,     1,      9,        10,       99,        100,        999,        1000, 9999,
                                    10000, 99999,  100000,   9999999,  10000000,  99999999,   100000000,  -1,   INT32_MAX,
                                    INT32_MIN};
    for (size_t i = 0; i < 20000; i++) {
        int32_t value = i < sizeof edges / sizeof *edges ? edges[i] : (int32_t)(next(&seed) >> next(&seed) % 31);
        char expected[16], *out = sized(AF_DIGITS_MAX);
        size_t size = (size_t)snprintf(expected, sizeof expected, "%d,", value);
        IS(af_ids_write(&value, 1, out), size);
        CHECK(memcmp(out, expected, size) == 0, "%d is written as %.*s", value, (int)size, out);
        free(out);
    }
}
