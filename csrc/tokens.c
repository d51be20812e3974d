/* tokens.c: see tokens.h.
 *
 * Numbers. A log-probability is stored as float32, so its decimal text need not become the nearest double: only the
 * float32 that the nearest double rounds to. With at most 19 digits m (which fit into 64 bits) and powers of ten that a
 * double holds exactly (10^22 at most, so two of them for k up to 44), m / 10^k in double arithmetic is off by three
 * roundings at most, and the nearest double by another half unit: by less than four half units in the last place.
 * Where twice that to either side rounds to one float32, this is it; where it does not, or the number is of another
 * kind, the caller's general reader is asked. Engines print float32 values, whose interval never straddles.
 * Source for the exact powers: Clinger, "How to read floating point numbers accurately", PLDI 1990. */
#include "tokens.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the digits of a word are written lowest byte first"
#endif

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "json_text.h"

static const double powers[23] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                  1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

static bool is_digit(const reader *r) { return r->at < r->end && *r->at >= '0' && *r->at <= '9'; }

/* Digits into *m, counting them in *count; more than 19 in all are refused. */
static bool take_digits(reader *r, uint64_t *m, int *count) {
    if (!is_digit(r)) return false;
    while (is_digit(r)) {
        if (*count == 19) return false;
        *m = *m * 10 + (uint64_t)(*r->at++ - '0');
        if (*m) (*count)++;
    }
    return true;
}

/* An exponent, if there is one, added to *scale. */
static bool take_exponent(reader *r, int *scale) {
    if (!take(r, 'e') && !take(r, 'E')) return true;
    bool negative = take(r, '-');
    if (!negative) (void)take(r, '+');
    uint64_t value = 0;
    int count = 0;
    if (!take_digits(r, &value, &count) || value > 64) return false;
    *scale += negative ? -(int)value : (int)value;
    return true;
}

static bool take_logprob(reader *r, float *out) {
    bool negative = take(r, '-');
    uint64_t m = 0;
    int count = 0, scale = 0;
    bool zero_first = r->at < r->end && *r->at == '0';
    const char *first = r->at;
    if (!take_digits(r, &m, &count)) return false;
    if (zero_first && r->at - first > 1) return false; /* JSON has no leading zeros */
    if (take(r, '.')) {
        const char *point = r->at;
        if (!take_digits(r, &m, &count)) return false;
        if (r->at - point > 64) return false;
        scale = (int)(point - r->at);
    }
    if (!take_exponent(r, &scale)) return false;
    double value = 0.0;
    if (m) {
        if (scale < -44 || scale > 22) return false;
        value = (double)m;
        if (scale > 0) value *= powers[scale];
        if (scale < -22) value /= powers[22], scale += 22;
        if (scale < 0) value /= powers[-scale];
        double below = value * (1.0 - 0x1p-50), above = value * (1.0 + 0x1p-50);
        if (above > 1e30 || (float)below != (float)above) return false;
    }
    *out = (float)(negative ? -value : value);
    return true;
}

static bool take_id(reader *r, int32_t *out) {
    uint64_t m = 0;
    int count = 0;
    const char *first = r->at;
    if (!take_digits(r, &m, &count) || m > INT32_MAX) return false;
    if (*first == '0' && r->at - first > 1) return false;
    *out = (int32_t)m;
    return true;
}

/* One value that nobody reads: null or a string of plain ASCII. */
static bool skip_value(reader *r) {
    if (r->end - r->at >= 4 && memcmp(r->at, "null", 4) == 0) {
        r->at += 4;
        return true;
    }
    if (!take(r, '"')) return false;
    while (r->at < r->end && *r->at != '"') {
        if (*r->at < 0x20 || *r->at > 0x7e || *r->at == '\\') return false;
        r->at++;
    }
    return take(r, '"');
}

static bool take_row(reader *r, int32_t *id, float *logprob) {
    if (!take(r, '[')) return false;
    skip_blanks(r);
    if (!take_logprob(r, logprob)) return false;
    skip_blanks(r);
    if (!take(r, ',')) return false;
    skip_blanks(r);
    if (!take_id(r, id)) return false;
    skip_blanks(r);
    while (take(r, ',')) {
        skip_blanks(r);
        if (!skip_value(r)) return false;
        skip_blanks(r);
    }
    return take(r, ']');
}

ptrdiff_t af_rows_parse(const char *text, size_t n, int32_t *ids, float *logprobs, size_t room, size_t *end) {
    reader r = {text, text + n};
    size_t rows = 0;
    if (!take(&r, '[')) return -1;
    skip_blanks(&r);
    if (!take(&r, ']')) {
        do {
            skip_blanks(&r);
            if (rows == room || !take_row(&r, ids + rows, logprobs + rows)) return -1;
            rows++;
            skip_blanks(&r);
        } while (take(&r, ','));
        if (!take(&r, ']')) return -1;
    }
    *end = (size_t)(r.at - text);
    return (ptrdiff_t)rows;
}

/* A number below 10^8 without leading zeros; writes 8 characters, returns behind the last that counts. Without branches:
 * how many digits an id has is as good as random. Each step divides numbers that lie side by side in one word: by
 * 10^4, then both by 100, then all four by 10 (multiplications that are exact in these ranges). */
static char *write_small(char *to, uint32_t value) {
    uint64_t fours = value / 10000 | (uint64_t)(value % 10000) << 32;
    uint64_t hundreds = fours * 10486 >> 20 & 0x0000007f0000007fu;
    uint64_t twos = hundreds | (fours - 100 * hundreds) << 16;
    uint64_t tens = twos * 103 >> 10 & 0x000f000f000f000fu;
    uint64_t digits = tens | (twos - 10 * tens) << 8;
    int zeros = __builtin_ctzll(digits | (uint64_t)1 << 56) / 8;
    digits = (digits | 0x3030303030303030u) >> 8 * zeros;
    memcpy(to, &digits, sizeof digits);
    return to + (8 - zeros);
}

/* Numbers below 1000 by themselves and at the end of a longer number, each with a comma behind it, and how many
 * digits the former have: 9 kB, of which a prompt's ids touch most of one half and little of the rest. */
#define TENS(M, h, t) \
    M(h, t, 0), M(h, t, 1), M(h, t, 2), M(h, t, 3), M(h, t, 4), M(h, t, 5), M(h, t, 6), M(h, t, 7), M(h, t, 8), M(h, t, 9)
#define HUNDREDS(M, h)                                                                             \
    TENS(M, h, 0), TENS(M, h, 1), TENS(M, h, 2), TENS(M, h, 3), TENS(M, h, 4), TENS(M, h, 5),      \
        TENS(M, h, 6), TENS(M, h, 7), TENS(M, h, 8), TENS(M, h, 9)
#define THOUSAND(M)                                                                                \
    HUNDREDS(M, 0), HUNDREDS(M, 1), HUNDREDS(M, 2), HUNDREDS(M, 3), HUNDREDS(M, 4), HUNDREDS(M, 5), \
        HUNDREDS(M, 6), HUNDREDS(M, 7), HUNDREDS(M, 8), HUNDREDS(M, 9)
#define PADDED(h, t, u) {'0' + (h), '0' + (t), '0' + (u), ','}
#define PLAIN(h, t, u)                                                                                    \
    {'0' + ((h) ? (h) : (t) ? (t) : (u)), (h) ? '0' + (t) : (t) ? '0' + (u) : ',', (h) ? '0' + (u) : ',', ','}
#define LENGTH(h, t, u) (h) ? 4 : (t) ? 3 : 2
#define FOUR(h, t, u) 4
/* [0]: of a number that nothing stands before; [1]: of one that something does. */
static const char threes[2][1000][4] = {{THOUSAND(PLAIN)}, {THOUSAND(PADDED)}};
static const uint8_t lengths[2][1000] = {{THOUSAND(LENGTH)}, {THOUSAND(FOUR)}};

/* An id and its comma; up to AF_DIGITS_MAX characters are written, what counts is returned. */
static size_t write_any(char *out, int32_t id) {
    char *to = out;
    uint32_t value = (uint32_t)id;
    if (id < 0) {
        *to++ = '-';
        value = 0 - value;
    }
    if (value >= 100000000) {
        to = write_small(to, value / 100000000);
        uint32_t rest = value % 100000000;
        for (uint32_t unit = 10000000; unit; unit /= 10) *to++ = (char)('0' + rest / unit % 10);
    } else {
        to = write_small(to, value);
    }
    *to++ = ',';
    return (size_t)(to - out);
}

size_t af_ids_write(const int32_t *ids, size_t n, char *out) {
    char *to = out;
    for (size_t i = 0; i < n; i++) {
        uint32_t value = (uint32_t)ids[i];
        if (value >= 1000000) {
            to += write_any(to, ids[i]);
            continue;
        }
        /* without a branch: how many digits an id has is as good as random */
        uint32_t high = value / 1000, low = value % 1000, longer = high > 0;
        memcpy(to, threes[0][high], 4);
        to += (uint32_t)(lengths[0][high] - 1) & (0 - longer);
        memcpy(to, threes[longer][low], 4);
        to += lengths[longer][low];
    }
    return (size_t)(to - out);
}
