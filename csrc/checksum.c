/* checksum.c: CRC-32C of records, and the seeded hash of names.
 *
 * CRC-32C (Castagnoli, RFC 3720 appendix B.4) uses the SSE4.2 instruction where the processor has it, else a table of
 * 4 KiB (slicing by four). Both give the same value; af_crc32c(0, "123456789", 9) is 0xE3069283.
 * The hash is for buckets, fingerprints and task hints. It is keyed by a secret drawn at creation, so that ids chosen
 * by clients cannot be made to collide.
 */
#include "layout.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

static uint32_t table[4][256];

/* Runs before main, in a single thread. */
__attribute__((constructor)) static void table_make(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? (c >> 1) ^ 0x82f63b78u : c >> 1;
        table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++) {
        for (int t = 1; t < 4; t++) table[t][i] = (table[t - 1][i] >> 8) ^ table[0][table[t - 1][i] & 255];
    }
}

static uint32_t crc_table(uint32_t c, const unsigned char *p, size_t n) {
    for (; n >= 4; p += 4, n -= 4) {
        uint32_t v;
        memcpy(&v, p, 4);
        c ^= v;
        c = table[3][c & 255] ^ table[2][(c >> 8) & 255] ^ table[1][(c >> 16) & 255] ^ table[0][c >> 24];
    }
    while (n--) c = (c >> 8) ^ table[0][(c ^ *p++) & 255];
    return c;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_sse42(uint32_t crc, const unsigned char *p, size_t n) {
    uint64_t c = crc;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t v;
        memcpy(&v, p, 8);
        c = _mm_crc32_u64(c, v);
    }
    uint32_t r = (uint32_t)c;
    while (n--) r = _mm_crc32_u8(r, *p++);
    return r;
}
#endif

uint32_t af_crc32c(uint32_t crc, const void *p, size_t n) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2")) return ~crc_sse42(~crc, p, n);
#endif
    return ~crc_table(~crc, p, n);
}

uint64_t af_hash(const af_arena *a, uint32_t space, const void *p, size_t n) {
    const unsigned char *s = p;
    uint64_t h = a->h->seed[0] ^ ((uint64_t)space << 32) ^ n, v;
    for (; n >= 8; s += 8, n -= 8) {
        memcpy(&v, s, 8);
        h = (h ^ v ^ a->h->seed[1]) * 0xff51afd7ed558ccdull;
        h ^= h >> 32;
    }
    v = 0;
    memcpy(&v, s, n);
    h = (h ^ v ^ a->h->seed[2]) * 0xff51afd7ed558ccdull;
    h ^= h >> 29;
    h *= 0xc4ceb9fe1a85ec53ull;
    return h ^ (h >> 32);
}
