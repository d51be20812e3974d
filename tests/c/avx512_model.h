/* avx512_model.h: what base64.c uses of AVX-512, in plain C, so that its VBMI level is tested on any processor.
 *
 * Included after <immintrin.h>: the macros then stand for the intrinsics. Each function follows the "Operation" part
 * of its entry in Intel's intrinsics guide. A masked load or store touches only the bytes of its mask, as the
 * instruction does, so that the address sanitizer sees what the real one would.
 */
#ifndef AVX512_MODEL_H
#define AVX512_MODEL_H

#include <stdint.h>
#include <string.h>

typedef struct {
    uint8_t b[64];
} model512;

static inline model512 model_loadu(const void *p) {
    model512 r;
    memcpy(r.b, p, 64);
    return r;
}

static inline void model_storeu(void *p, model512 v) { memcpy(p, v.b, 64); }

static inline model512 model_maskz_loadu(uint64_t mask, const void *p) {
    model512 r = {{0}};
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1) r.b[i] = ((const uint8_t *)p)[i];
    return r;
}

static inline void model_mask_storeu(void *p, uint64_t mask, model512 v) {
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1) ((uint8_t *)p)[i] = v.b[i];
}

static inline model512 model_set1_epi64(int64_t v) {
    model512 r;
    for (int i = 0; i < 8; i++) memcpy(r.b + 8 * i, &v, 8);
    return r;
}

static inline model512 model_set1_epi32(int32_t v) {
    model512 r;
    for (int i = 0; i < 16; i++) memcpy(r.b + 4 * i, &v, 4);
    return r;
}

static inline model512 model_or(model512 x, model512 y) {
    for (int i = 0; i < 64; i++) x.b[i] |= y.b[i];
    return x;
}

static inline model512 model_permutexvar(model512 index, model512 v) {
    model512 r;
    for (int i = 0; i < 64; i++) r.b[i] = v.b[index.b[i] & 63];
    return r;
}

static inline model512 model_permutex2var(model512 x, model512 index, model512 y) {
    model512 r;
    for (int i = 0; i < 64; i++) r.b[i] = (index.b[i] & 64 ? y : x).b[index.b[i] & 63];
    return r;
}

static inline model512 model_multishift(model512 shifts, model512 v) {
    model512 r;
    for (int q = 0; q < 8; q++) {
        uint64_t word;
        memcpy(&word, v.b + 8 * q, 8);
        for (int i = 0; i < 8; i++) {
            unsigned by = shifts.b[8 * q + i] & 63u;
            r.b[8 * q + i] = (uint8_t)(by ? word >> by | word << (64 - by) : word);
        }
    }
    return r;
}

static inline uint64_t model_movepi8_mask(model512 v) {
    uint64_t r = 0;
    for (int i = 0; i < 64; i++) r |= (uint64_t)(v.b[i] >> 7) << i;
    return r;
}

static inline model512 model_maddubs(model512 x, model512 y) { /* unsigned x, signed y, sums saturated */
    model512 r;
    for (int i = 0; i < 32; i++) {
        int sum = x.b[2 * i] * (int8_t)y.b[2 * i] + x.b[2 * i + 1] * (int8_t)y.b[2 * i + 1];
        int16_t v = (int16_t)(sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum);
        memcpy(r.b + 2 * i, &v, 2);
    }
    return r;
}

static inline model512 model_madd(model512 x, model512 y) {
    model512 r;
    for (int i = 0; i < 16; i++) {
        int16_t p[2], q[2];
        memcpy(p, x.b + 4 * i, 4);
        memcpy(q, y.b + 4 * i, 4);
        int32_t v = p[0] * q[0] + p[1] * q[1];
        memcpy(r.b + 4 * i, &v, 4);
    }
    return r;
}

#define __m512i model512
#define _mm512_loadu_si512 model_loadu
#define _mm512_storeu_si512 model_storeu
#define _mm512_maskz_loadu_epi8 model_maskz_loadu
#define _mm512_mask_storeu_epi8 model_mask_storeu
#define _mm512_set1_epi64 model_set1_epi64
#define _mm512_set1_epi32 model_set1_epi32
#define _mm512_or_si512 model_or
#define _mm512_permutexvar_epi8 model_permutexvar
#define _mm512_permutex2var_epi8 model_permutex2var
#define _mm512_multishift_epi64_epi8 model_multishift
#define _mm512_movepi8_mask model_movepi8_mask
#define _mm512_maddubs_epi16 model_maddubs
#define _mm512_madd_epi16 model_madd

#endif
