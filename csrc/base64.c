/* base64.c: base64 (RFC 4648, section 4) between shared memory and JSON, bf16 widened and narrowed on the way.
 *
 * Theory: each level (scalar, AVX2, AVX-512 VBMI) is two inner loops that do as many whole groups as they can and say
 * how far they came; one scalar routine does the rest, and alone decides about padding and errors. So a level cannot
 * differ from another in what it accepts, and no loop reads or writes a byte outside what it was given: the output of
 * a decode is a shard's exact bytes in shared memory, with another's behind it.
 *   encode  3 bytes -> 4 characters. AVX2: bytes are spread by a shuffle, 6-bit fields moved by two multiplications,
 *           characters made by adding an offset chosen by a shuffle (Mula, Lemire: "Faster Base64 Encoding and Decoding
 *           using AVX2 Instructions", ACM TWEB 12(3), 2018). VBMI: one permute, one multishift, one table look-up
 *           (the same, "Base64 encoding and decoding at almost the speed of a memory copy", 2020).
 *   decode  4 characters -> 3 bytes, validated in the same pass: two nibble tables whose AND is 0 for exactly the 64
 *           characters (AVX2); a 128-entry table whose other entries have the top bit set (VBMI).
 * bfloat16 travels as float32: blocks of it are widened, or narrowed, in a buffer that stays in the first-level cache.
 *
 * Accepted is what pybase64's validate=True accepts: whole groups of four, '=' only as the last one or two characters,
 * nothing else in between; bits that a padded group has left over are not looked at.
 *
 * The level is chosen by the processor at first use, and can be lowered for tests. Nothing here knows the arena.
 */
#include "arealfast.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { BLOCK = 768 }; /* bf16 elements widened or narrowed at a time: 3 KiB of float32, 4 KiB of characters */

static const char alphabet[65] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/* Value of a character; INVALID of all but the 64. */
#define INVALID 0x80
static uint8_t values[256];

/* Runs before main, in a single thread. */
__attribute__((constructor)) static void values_make(void) {
    memset(values, INVALID, sizeof values);
    for (unsigned i = 0; i < 64; i++) values[(unsigned char)alphabet[i]] = (uint8_t)i;
}

/* ------------------------------------------------------------------------------------------------- levels ---- */

/* Encode whole groups of 3 of `n` bytes; returns how many bytes were used (any multiple of 3 up to n).
 * Decode whole groups of 4 of `n` characters (none of them padding) to 3n/4 bytes; how many characters were used: it
 * stops early before an invalid one. */
typedef struct {
    size_t (*encode)(const uint8_t *in, size_t n, char *out);
    size_t (*decode)(const char *in, size_t n, uint8_t *out);
} level_ops;

static size_t encode_scalar(const uint8_t *in, size_t n, char *out) {
    size_t i = 0;
    for (; i + 3 <= n; i += 3, out += 4) {
        uint32_t v = (uint32_t)in[i] << 16 | (uint32_t)in[i + 1] << 8 | in[i + 2];
        out[0] = alphabet[v >> 18];
        out[1] = alphabet[v >> 12 & 63];
        out[2] = alphabet[v >> 6 & 63];
        out[3] = alphabet[v & 63];
    }
    return i;
}

static size_t decode_scalar(const char *in, size_t n, uint8_t *out) {
    const uint8_t *s = (const uint8_t *)in;
    size_t i = 0;
    for (; i + 4 <= n; i += 4, out += 3) {
        uint32_t a = values[s[i]], b = values[s[i + 1]], c = values[s[i + 2]], d = values[s[i + 3]];
        if ((a | b | c | d) & INVALID) break;
        uint32_t v = a << 18 | b << 12 | c << 6 | d;
        out[0] = (uint8_t)(v >> 16);
        out[1] = (uint8_t)(v >> 8);
        out[2] = (uint8_t)v;
    }
    return i;
}

#if defined(__x86_64__)

#define TARGET_AVX2 __attribute__((target("avx2")))
/* The same 16 bytes in both lanes. */
#define BOTH(...) _mm256_setr_epi8(__VA_ARGS__, __VA_ARGS__)

TARGET_AVX2 static size_t encode_avx2(const uint8_t *in, size_t n, char *out) {
    const __m256i spread = BOTH(1, 0, 2, 1, 4, 3, 5, 4, 7, 6, 8, 7, 10, 9, 11, 10);
    const __m256i offsets = BOTH(65, 71, -4, -4, -4, -4, -4, -4, -4, -4, -4, -4, -19, -16, 0, 0);
    size_t i = 0;
    for (; i + 28 <= n; i += 24, out += 32) { /* reads 28, uses 24 */
        __m128i low = _mm_loadu_si128((const __m128i *)(const void *)(in + i));
        __m128i high = _mm_loadu_si128((const __m128i *)(const void *)(in + i + 12));
        __m256i v = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), spread);
        __m256i odd = _mm256_mulhi_epu16(_mm256_and_si256(v, _mm256_set1_epi32(0x0fc0fc00)),
                                         _mm256_set1_epi32(0x04000040));
        __m256i even = _mm256_mullo_epi16(_mm256_and_si256(v, _mm256_set1_epi32(0x003f03f0)),
                                          _mm256_set1_epi32(0x01000010));
        v = _mm256_or_si256(odd, even); /* 32 values 0..63 */
        __m256i range = _mm256_subs_epu8(v, _mm256_set1_epi8(51));
        range = _mm256_sub_epi8(range, _mm256_cmpgt_epi8(v, _mm256_set1_epi8(25)));
        v = _mm256_add_epi8(v, _mm256_shuffle_epi8(offsets, range));
        _mm256_storeu_si256((__m256i *)(void *)out, v);
    }
    return i;
}

TARGET_AVX2 static size_t decode_avx2(const char *in, size_t n, uint8_t *out) {
    const __m256i by_low = BOTH(0x15, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x13, 0x1a, 0x1b, 0x1b,
                                0x1b, 0x1a);
    const __m256i by_high = BOTH(0x10, 0x10, 0x01, 0x02, 0x04, 0x08, 0x04, 0x08, 0x10, 0x10, 0x10, 0x10, 0x10, 0x10,
                                 0x10, 0x10);
    const __m256i offsets = BOTH(0, 16, 19, 4, -65, -65, -71, -71, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i pack = BOTH(2, 1, 0, 6, 5, 4, 10, 9, 8, 14, 13, 12, -1, -1, -1, -1);
    const __m256i slash = _mm256_set1_epi8('/');
    size_t i = 0;
    for (; i + 44 <= n; i += 32, out += 24) { /* writes 32 bytes of which 24 count: 44 characters make 33 */
        __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(in + i));
        __m256i high = _mm256_and_si256(_mm256_srli_epi32(v, 4), slash); /* 0x2f: a nibble, and a bit that is ignored */
        __m256i low = _mm256_and_si256(v, slash);
        if (!_mm256_testz_si256(_mm256_shuffle_epi8(by_low, low), _mm256_shuffle_epi8(by_high, high))) break;
        __m256i is_slash = _mm256_cmpeq_epi8(v, slash);
        v = _mm256_add_epi8(v, _mm256_shuffle_epi8(offsets, _mm256_add_epi8(is_slash, high)));
        v = _mm256_maddubs_epi16(v, _mm256_set1_epi32(0x01400140));
        v = _mm256_madd_epi16(v, _mm256_set1_epi32(0x00011000)); /* 24 bits a word */
        v = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(v, pack), _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(void *)out, v);
    }
    return i;
}

#ifndef TARGET_VBMI /* tests compile these two against a model of the instructions, for processors without them */
#define TARGET_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi")))
#endif

/* Reads and writes are masked, so these go to the very end. */
TARGET_VBMI static size_t encode_vbmi(const uint8_t *in, size_t n, char *out) {
    static const uint8_t spread[64] = {
        1,  0,  2,  1,  4,  3,  5,  4,  7,  6,  8,  7,  10, 9,  11, 10, 13, 12, 14, 13, 16, 15,
        17, 16, 19, 18, 20, 19, 22, 21, 23, 22, 25, 24, 26, 25, 28, 27, 29, 28, 31, 30, 32, 31,
        34, 33, 35, 34, 37, 36, 38, 37, 40, 39, 41, 40, 43, 42, 44, 43, 46, 45, 47, 46,
    };
    const __m512i order = _mm512_loadu_si512(spread), table = _mm512_loadu_si512(alphabet);
    const __m512i shifts = _mm512_set1_epi64(0x3036242a1016040a);
    size_t i = 0;
    for (; i + 48 <= n; i += 48, out += 64) {
        __m512i v = _mm512_maskz_loadu_epi8(0xffffffffffffull, in + i);
        v = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(order, v));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi8(v, table)); /* a permute looks at 6 bits of an index */
    }
    return i;
}

TARGET_VBMI static size_t decode_vbmi(const char *in, size_t n, uint8_t *out) {
    static const uint8_t packed[64] = {
        2,  1,  0,  6,  5,  4,  10, 9,  8,  14, 13, 12, 18, 17, 16, 22, 21, 20, 26, 25, 24, 30, 29, 28,
        34, 33, 32, 38, 37, 36, 42, 41, 40, 46, 45, 44, 50, 49, 48, 54, 53, 52, 58, 57, 56, 62, 61, 60,
    };
    const __m512i order = _mm512_loadu_si512(packed);
    const __m512i first = _mm512_loadu_si512(values), second = _mm512_loadu_si512(values + 64);
    size_t i = 0;
    for (; i + 64 <= n; i += 64, out += 48) {
        __m512i text = _mm512_loadu_si512(in + i);
        __m512i v = _mm512_permutex2var_epi8(first, text, second); /* looks at 7 bits; the 8th is tested here */
        if (_mm512_movepi8_mask(_mm512_or_si512(v, text))) break;
        v = _mm512_maddubs_epi16(v, _mm512_set1_epi32(0x01400140));
        v = _mm512_madd_epi16(v, _mm512_set1_epi32(0x00011000));
        _mm512_mask_storeu_epi8(out, 0xffffffffffffull, _mm512_permutexvar_epi8(order, v));
    }
    return i;
}

static int best_level(void) {
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        return AF_BASE64_VBMI;
    }
    return __builtin_cpu_supports("avx2") ? AF_BASE64_AVX2 : AF_BASE64_SCALAR;
}

static const level_ops levels[] = {
    [AF_BASE64_SCALAR] = {encode_scalar, decode_scalar},
    [AF_BASE64_AVX2] = {encode_avx2, decode_avx2},
    [AF_BASE64_VBMI] = {encode_vbmi, decode_vbmi},
};

#else

static int best_level(void) { return AF_BASE64_SCALAR; }

static const level_ops levels[] = {[AF_BASE64_SCALAR] = {encode_scalar, decode_scalar}};

#endif

/* -1: not chosen yet. Racing threads choose the same. */
static _Atomic int chosen = -1;

int af_base64_level(void) {
    int level = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (level < 0) atomic_store_explicit(&chosen, level = best_level(), memory_order_relaxed);
    return level;
}

int af_base64_set_level(int level) {
    if (level > best_level() || level < -1) return AF_EINVAL;
    atomic_store_explicit(&chosen, level < 0 ? best_level() : level, memory_order_relaxed);
    return AF_OK;
}

/* -------------------------------------------------------------------------------------------------- edges ---- */

size_t af_base64_size(size_t n) { return (n + 2) / 3 * 4; }

int64_t af_base64_decoded_size(const char *in, size_t n) {
    if (n % 4) return AF_EINVAL;
    if (!n) return 0;
    size_t padding = in[n - 1] != '=' ? 0 : in[n - 2] != '=' ? 1 : 2;
    return (int64_t)(n / 4 * 3 - padding);
}

void af_base64_encode(const void *in, size_t n, char *out) {
    const uint8_t *s = in;
    size_t done = levels[af_base64_level()].encode(s, n, out);
    done += encode_scalar(s + done, n - done, out + done / 3 * 4);
    if (done == n) return;
    char *last = out + done / 3 * 4;
    uint32_t v = (uint32_t)s[done] << 16 | (n - done > 1 ? (uint32_t)s[done + 1] << 8 : 0);
    last[0] = alphabet[v >> 18];
    last[1] = alphabet[v >> 12 & 63];
    last[2] = n - done > 1 ? alphabet[v >> 6 & 63] : '=';
    last[3] = '=';
}

int af_base64_decode(const char *in, size_t n, void *out) {
    int64_t size = af_base64_decoded_size(in, n);
    if (size < 0) return AF_EINVAL;
    size_t whole = (size_t)size / 3 * 4, rest = (size_t)size % 3; /* characters of groups without padding */
    uint8_t *d = out;
    size_t done = levels[af_base64_level()].decode(in, whole, d);
    done += decode_scalar(in + done, whole - done, d + done / 4 * 3);
    if (done < whole) return AF_EINVAL;
    if (!rest) return AF_OK;
    char group[4] = {in[whole], in[whole + 1], rest == 2 ? in[whole + 2] : 'A', 'A'};
    uint8_t bytes[3];
    if (!decode_scalar(group, 4, bytes)) return AF_EINVAL;
    memcpy(d + whole / 4 * 3, bytes, rest);
    return AF_OK;
}

/* ------------------------------------------------------------------------------------------------ bfloat16 ---- */

/* Constant counts let the compiler use vectors for whole blocks. */
static inline void widen(const uint8_t *in, size_t count, uint32_t *out) {
    for (size_t i = 0; i < count; i++) {
        uint16_t v;
        memcpy(&v, in + 2 * i, 2);
        out[i] = (uint32_t)v << 16;
    }
}

/* To nearest even. A NaN that a bfloat16 was widened to becomes that again, bit for bit; any other 0x7fc0, as torch
 * rounds (cut off or rounded, its upper half could be an infinity's). */
static inline void narrow(const uint32_t *in, size_t count, uint8_t *out) {
    for (size_t i = 0; i < count; i++) {
        uint32_t v = in[i], rounded = (v + 0x7fffu + (v >> 16 & 1)) >> 16;
        bool lost = (v & 0x7fffffffu) > 0x7f800000u && (v & 0xffffu);
        uint16_t kept = (uint16_t)(lost ? 0x7fc0u : rounded);
        memcpy(out + 2 * i, &kept, 2);
    }
}

void af_base64_encode_bf16(const void *in, size_t count, char *out) {
    const uint8_t *s = in;
    uint32_t block[BLOCK];
    for (; count >= BLOCK; count -= BLOCK, s += 2 * BLOCK, out += 4 * BLOCK / 3 * 4) {
        widen(s, BLOCK, block);
        af_base64_encode(block, sizeof block, out);
    }
    widen(s, count, block);
    af_base64_encode(block, 4 * count, out);
}

int af_base64_decode_bf16(const char *in, size_t n, void *out) {
    int64_t size = af_base64_decoded_size(in, n);
    if (size < 0 || size % 4) return AF_EINVAL;
    size_t count = (size_t)size / 4;
    uint8_t *d = out;
    uint32_t block[BLOCK];
    for (; count > BLOCK; count -= BLOCK, d += 2 * BLOCK, in += 4 * BLOCK / 3 * 4, n -= 4 * BLOCK / 3 * 4) {
        if (in[4 * BLOCK / 3 * 4 - 1] == '=') return AF_EINVAL; /* else the block would be taken for a whole text */
        if (af_base64_decode(in, 4 * BLOCK / 3 * 4, block)) return AF_EINVAL;
        narrow(block, BLOCK, d);
    }
    if (af_base64_decode(in, n, block)) return AF_EINVAL;
    narrow(block, count, d);
    return AF_OK;
}
