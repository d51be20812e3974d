/* unit_base64.c: base64.c at every level against a plain bit-by-bit coder written here.
 *
 * The levels that this processor has are tested as linked; the VBMI level is tested besides as compiled below over
 * avx512_model.h, on every x86-64 processor. Buffers are exact allocations at odd addresses with a canary on both
 * sides (and the address sanitizer's red zones, under `make asan`): one byte too many anywhere is seen. */
#include "unit.h"

typedef struct {
    const char *name;
    int level;
    int (*set_level)(int);
    void (*encode)(const void *, size_t, char *);
    int (*decode)(const char *, size_t, void *);
    void (*encode_bf16)(const void *, size_t, char *);
    int (*decode_bf16)(const char *, size_t, void *);
} codec;

#if defined(__x86_64__)
#include <immintrin.h>
#include "avx512_model.h"
#define TARGET_VBMI
#define __builtin_cpu_supports(feature) 1
#define af_base64_level model_level
#define af_base64_set_level model_set_level
#define af_base64_size model_size
#define af_base64_decoded_size model_decoded_size
#define af_base64_encode model_encode
#define af_base64_decode model_decode
#define af_base64_encode_bf16 model_encode_bf16
#define af_base64_decode_bf16 model_decode_bf16
#include "../../csrc/base64.c"
#undef __builtin_cpu_supports
#undef af_base64_level
#undef af_base64_set_level
#undef af_base64_size
#undef af_base64_decoded_size
#undef af_base64_encode
#undef af_base64_decode
#undef af_base64_encode_bf16
#undef af_base64_decode_bf16
static const codec model = {"model of VBMI",   AF_BASE64_VBMI,    model_set_level,  model_encode,
                            model_decode,      model_encode_bf16, model_decode_bf16};
#endif

/* -------------------------------------------------------------------------------------------- a reference ---- */

static int value_of(int c) {
    const char *letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = c > 0 && c < 128 ? strchr(letters, c) : NULL;
    return at ? (int)(at - letters) : -1;
}

static void plain_encode(const uint8_t *in, size_t n, char *out) {
    for (size_t i = 0; i < (n + 2) / 3 * 4; i++) {
        int v = 0;
        for (size_t bit = 6 * i; bit < 6 * i + 6; bit++) {
            v = 2 * v + (bit / 8 < n ? in[bit / 8] >> (7 - bit % 8) & 1 : 0);
        }
        out[i] = 6 * i >= 8 * n ? '=' : "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[v];
    }
}

/* Bytes, or -1. */
static int64_t plain_decode(const char *in, size_t n, uint8_t *out) {
    size_t padding = 0;
    if (n % 4) return -1;
    while (padding < 2 && padding < n && in[n - 1 - padding] == '=') padding++;
    size_t size = n / 4 * 3 - padding;
    memset(out, 0, size);
    for (size_t i = 0; i < n - padding; i++) {
        int v = value_of(in[i]);
        if (v < 0) return -1;
        for (size_t bit = 6 * i; bit < 6 * i + 6 && bit / 8 < size; bit++) {
            out[bit / 8] = (uint8_t)(out[bit / 8] | (v >> (6 * i + 5 - bit) & 1) << (7 - bit % 8));
        }
    }
    return (int64_t)size;
}

/* ------------------------------------------------------------------------------------------------- guarded ---- */

enum { GUARD = 16 };

/* n bytes at an address that is `odd` beyond alignment, between canaries. */
static uint8_t *guarded(size_t n, size_t odd) {
    uint8_t *p = malloc(n + odd + 2 * GUARD);
    CHECK(p, "memory");
    memset(p, 0xa5, n + odd + 2 * GUARD);
    return p + GUARD + odd;
}

static void unguard(uint8_t *p, size_t n, size_t odd, const char *what) {
    for (size_t i = 0; i < GUARD; i++) CHECK(p[-1 - (int)i] == 0xa5 && p[n + i] == 0xa5, "%s wrote outside", what);
    free(p - GUARD - odd);
}

static void check_bytes(const codec *c, const uint8_t *bytes, size_t n, size_t odd) {
    size_t chars = af_base64_size(n);
    char *want = malloc(chars + 1);
    uint8_t *text = guarded(chars, odd), *back = guarded(n, (odd + 3) % 8);
    plain_encode(bytes, n, want);
    c->encode(bytes, n, (char *)text);
    CHECK(!memcmp(text, want, chars), "%s: encoding %zu bytes", c->name, n);
    IS(af_base64_decoded_size((char *)text, chars), n);
    char *exact = malloc(chars ? chars : 1); /* reads past the text are the sanitizer's */
    memcpy(exact, text, chars);
    OK(c->decode(exact, chars, back));
    CHECK(!memcmp(back, bytes, n), "%s: decoding to %zu bytes", c->name, n);
    free(exact);
    free(want);
    unguard(text, chars, odd, c->name);
    unguard(back, n, (odd + 3) % 8, c->name);
}

/* Every byte at every position of a text: accepted or refused as by the reference. */
static void check_errors(const codec *c, const uint8_t *bytes, size_t n) {
    size_t chars = af_base64_size(n);
    char *text = malloc(chars);
    uint8_t *want = malloc(chars), *got = malloc(chars);
    plain_encode(bytes, n, text);
    for (size_t at = 0; at < chars; at++) {
        char was = text[at];
        for (int v = 0; v < 256; v++) {
            text[at] = (char)v;
            int64_t size = plain_decode(text, chars, want);
            int64_t room = af_base64_decoded_size(text, chars);
            CHECK(room >= size, "room");
            int r = c->decode(text, chars, got);
            CHECK((r == AF_OK) == (size >= 0) && (r == AF_OK || r == AF_EINVAL), "%s: byte %d at %zu of %zu: %d",
                  c->name, v, at, chars, r);
            CHECK(r || !memcmp(got, want, (size_t)size), "%s: byte %d at %zu of %zu", c->name, v, at, chars);
        }
        text[at] = was;
    }
    free(text);
    free(want);
    free(got);
}

static uint16_t rounded(uint32_t v) { /* the nearer of the two neighbours; of two as near the even one */
    if ((v & 0x7fffffffu) > 0x7f800000u) return v & 0xffffu ? 0x7fc0 : (uint16_t)(v >> 16);
    uint32_t low = v & 0xffff, kept = v >> 16;
    return (uint16_t)(kept + (low > 0x8000 || (low == 0x8000 && (kept & 1))));
}

static void check_bf16(const codec *c, const uint32_t *wide, size_t count, size_t odd) {
    size_t chars = af_base64_size(4 * count);
    char *text = malloc(chars + 1), *again = malloc(chars + 1);
    uint32_t *widened = malloc(4 * count + 1);
    plain_encode((const uint8_t *)wide, 4 * count, text);
    uint8_t *kept = guarded(2 * count, odd);
    OK(c->decode_bf16(text, chars, kept));
    for (size_t i = 0; i < count; i++) {
        uint16_t v;
        memcpy(&v, kept + 2 * i, 2);
        CHECK(v == rounded(wide[i]), "%s: %08x became %04x", c->name, wide[i], v);
        widened[i] = (uint32_t)v << 16;
    }
    plain_encode((const uint8_t *)widened, 4 * count, again);
    uint8_t *sent = guarded(chars, odd);
    c->encode_bf16(kept, count, (char *)sent);
    CHECK(!memcmp(sent, again, chars), "%s: widening %zu elements", c->name, count);
    unguard(sent, chars, odd, c->name);
    unguard(kept, 2 * count, odd, c->name);
    free(text);
    free(again);
    free(widened);
}

static void check_codec(const codec *c, uint64_t seed) {
    uint8_t bytes[5000];
    OK(c->set_level(c->level));
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)next_random(&seed);
    for (size_t n = 0; n <= 300; n++) check_bytes(c, bytes + n % 9, n, n % 8);
    for (size_t n = 301; n < 4900; n += 97) check_bytes(c, bytes + n % 7, n, n % 5);
    for (size_t n = 1; n <= 200; n += n < 60 ? 1 : 23) check_errors(c, bytes, n);

    uint32_t *wide = malloc(4 * 70000);
    for (uint32_t i = 0; i < 70000; i++) { /* every upper half; lower halves around the middle, and random ones */
        const uint32_t low[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, (uint32_t)next_random(&seed) & 0xffff};
        wide[i] = (i & 0xffff) << 16 | low[(i + i / 7) % 7];
    }
    check_bf16(c, wide, 70000, 1);
    for (size_t count = 0; count <= 40; count++) check_bf16(c, wide + 61 * count, count, count % 4);
    for (size_t count = 760; count <= 780; count++) check_bf16(c, wide + 61 * count, count, count % 4);
    free(wide);
    char text[4101];
    uint8_t out[2051];
    memset(text, 'A', sizeof text);
    IS(c->decode_bf16(text, 4, out), AF_EINVAL); /* 3 bytes: no whole float32 */
    IS(c->decode_bf16(text, 5, out), AF_EINVAL);
    text[4095] = '='; /* padding where the first block ends */
    memcpy(text + 4096, "AA==", 4);
    IS(c->decode_bf16(text, 4100, out), AF_EINVAL);
}

void test_base64(uint64_t seed) {
    int best = af_base64_level();
    for (int level = 0; level <= best; level++) {
        const char *names[] = {"scalar", "AVX2", "VBMI"};
        codec c = {names[level], level, af_base64_set_level, af_base64_encode, af_base64_decode,
                   af_base64_encode_bf16, af_base64_decode_bf16};
        check_codec(&c, seed);
    }
    IS(af_base64_set_level(AF_BASE64_VBMI + 1), AF_EINVAL);
    IS(af_base64_set_level(-2), AF_EINVAL);
    OK(af_base64_set_level(-1));
    IS(af_base64_level(), best);
#if defined(__x86_64__)
    check_codec(&model, seed);
#endif
}
