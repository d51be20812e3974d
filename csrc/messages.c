/* messages.c: see messages.h.
 *
 * Scanning. Only the structure that separates elements is followed: strings are jumped over by memchr to the next
 * quote that an even number of backslashes stands before, brackets are counted without regard to their kind. That is
 * enough because nothing here decides about validity: in a valid text the count is right, and an invalid one is found
 * out by the parser that reads the parts.
 *
 * Hash: 32 bytes a step in two chains of 64 x 64 -> 128 bit multiplications whose halves are folded together, the
 * multiplicands mixed with the seed (the construction of wyhash; github.com/wangyi-fudan/wyhash). */
#include "messages.h"

#include <stdbool.h>
#include <string.h>

typedef struct {
    const char *at;
    const char *end;
} reader;

static void skip_blanks(reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\r' || *r->at == '\t')) r->at++;
}

static bool take(reader *r, char c) {
    if (r->at >= r->end || *r->at != c) return false;
    r->at++;
    return true;
}

/* From an opening quote to behind the closing one. */
static bool skip_string(reader *r) {
    const char *first = r->at + 1;
    const char *from = first;
    while (from < r->end) {
        const char *quote = memchr(from, '"', (size_t)(r->end - from));
        if (!quote) return false;
        const char *before = quote;
        while (before > first && before[-1] == '\\') before--;
        from = quote + 1;
        if ((quote - before) % 2 == 0) {
            r->at = from;
            return true;
        }
    }
    return false;
}

/* From an opening bracket to behind the one that closes it. */
static bool skip_nested(reader *r) {
    size_t depth = 0;
    while (r->at < r->end) {
        char c = *r->at;
        if (c == '"') {
            if (!skip_string(r)) return false;
            continue;
        }
        r->at++;
        if (c == '{' || c == '[') {
            depth++;
        } else if ((c == '}' || c == ']') && --depth == 0) {
            return true;
        }
    }
    return false;
}

static bool skip_value(reader *r) {
    if (r->at >= r->end) return false;
    if (*r->at == '"') return skip_string(r);
    if (*r->at == '{' || *r->at == '[') return skip_nested(r);
    const char *first = r->at;
    while (r->at < r->end && *r->at != ',' && *r->at != '}' && *r->at != ']' && (unsigned char)*r->at > ' ') r->at++;
    return r->at > first;
}

/* The array's elements, from its bracket on. */
static ptrdiff_t scan_array(reader *r, const char *body, af_range *messages, size_t room) {
    size_t count = 0;
    if (!take(r, '[')) return AF_SCAN_NO;
    do {
        skip_blanks(r);
        if (r->at >= r->end || *r->at != '{') return AF_SCAN_NO;
        if (count == room) return AF_SCAN_MANY;
        messages[count].start = (size_t)(r->at - body);
        if (!skip_nested(r)) return AF_SCAN_NO;
        messages[count++].stop = (size_t)(r->at - body);
        skip_blanks(r);
    } while (take(r, ','));
    return take(r, ']') ? (ptrdiff_t)count : AF_SCAN_NO;
}

ptrdiff_t af_messages_scan(const char *body, size_t n, af_range *messages, size_t room, af_range *array) {
    static const char name[] = "\"messages\"";
    reader r = {body, body + n};
    ptrdiff_t found = AF_SCAN_NO;
    skip_blanks(&r);
    if (!take(&r, '{')) return AF_SCAN_NO;
    do {
        skip_blanks(&r);
        if (r.at >= r.end || *r.at != '"') return AF_SCAN_NO;
        const char *member = r.at;
        if (!skip_string(&r)) return AF_SCAN_NO;
        size_t size = (size_t)(r.at - member);
        if (memchr(member, '\\', size)) return AF_SCAN_NO;
        skip_blanks(&r);
        if (!take(&r, ':')) return AF_SCAN_NO;
        skip_blanks(&r);
        if (size == sizeof name - 1 && memcmp(member, name, size) == 0) {
            if (found != AF_SCAN_NO) return AF_SCAN_NO;
            array->start = (size_t)(r.at - body);
            found = scan_array(&r, body, messages, room);
            if (found < 0) return found;
            array->stop = (size_t)(r.at - body);
        } else if (!skip_value(&r)) {
            return AF_SCAN_NO;
        }
        skip_blanks(&r);
    } while (take(&r, ','));
    return take(&r, '}') ? found : AF_SCAN_NO;
}

static uint64_t load(const char *p) {
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

static uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

uint64_t af_messages_hash(const char *data, size_t n, uint64_t seed) {
    const uint64_t k0 = 0x9e3779b97f4a7c15u ^ seed, k1 = 0xc2b2ae3d27d4eb4fu + (seed << 1 | 1);
    uint64_t h0 = seed ^ n, h1 = ~seed;
    const char *end = data + n;
    for (; end - data >= 32; data += 32) {
        h0 = fold(load(data) ^ k0, load(data + 8) ^ h0);
        h1 = fold(load(data + 16) ^ k1, load(data + 24) ^ h1);
    }
    char rest[32] = {0};
    memcpy(rest, data, (size_t)(end - data));
    h0 = fold(load(rest) ^ k0, load(rest + 8) ^ h0);
    h1 = fold(load(rest + 16) ^ k1, load(rest + 24) ^ h1);
    return fold(h0 ^ k1, h1 ^ k0);
}
