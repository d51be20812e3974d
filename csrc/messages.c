/* messages.c: see messages.h.
 *
 * Scanning. Only the structure that separates elements is followed: strings are jumped over by memchr to the next
 * quote that an even number of backslashes stands before, brackets are counted without regard to their kind. That is
 * enough because nothing here decides about validity: in a valid text the count is right, and an invalid one is found
 * out by the parser that reads the parts.
 *
 * Digest: the text, 7 bytes a coefficient and its length last, as a polynomial over the integers modulo 2^61 - 1, at two
 * secret points. Two different texts are two different polynomials, which agree at no more points than their degree
 * (Carter, Wegman, "New hash functions and their use in authentication and set equality", 1981). Four steps of Horner's
 * rule at a time, with powers of the point, so that multiplications need not wait for each other.
 *
 * Fingerprint: 32 bytes a step in two chains of 64 x 64 -> 128 bit multiplications whose halves are folded together (the
 * construction of wyhash, github.com/wangyi-fudan/wyhash), each chain taking what the other left.
 */
#include "messages.h"

#include <stdbool.h>
#include <string.h>

#include "json_text.h"

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

/* The next string, which may hold escapes; *inside is what its quotes hold. */
static bool take_string(reader *r, const char *text, af_range *inside) {
    if (r->at >= r->end || *r->at != '"') return false;
    inside->start = (size_t)(r->at + 1 - text);
    if (!skip_string(r)) return false;
    inside->stop = (size_t)(r->at - 1 - text);
    return true;
}

static bool is_name(const char *text, af_range inside, const char *name) {
    size_t n = strlen(name);
    return inside.stop - inside.start == n && memcmp(text + inside.start, name, n) == 0;
}

bool af_message_read(const char *text, size_t n, af_plain_message *out) {
    reader r = {text, text + n};
    bool role = false, content = false;
    if (!take(&r, '{')) return false;
    do {
        af_range name, value;
        skip_blanks(&r);
        if (!take_string(&r, text, &name)) return false;
        skip_blanks(&r);
        if (!take(&r, ':')) return false;
        skip_blanks(&r);
        if (!take_string(&r, text, &value)) return false;
        if (!role && is_name(text, name, "role")) {
            role = true;
            out->role = value;
        } else if (!content && is_name(text, name, "content")) {
            content = true;
            out->content = value;
        } else {
            return false;
        }
        skip_blanks(&r);
    } while (take(&r, ','));
    return take(&r, '}') && r.at == r.end && role && content &&
           !memchr(text + out->role.start, '\\', out->role.stop - out->role.start);
}

/* The value of four hexadecimal digits; -1: they are none. */
static int32_t hex4(const char *text) {
    int32_t value = 0;
    for (int i = 0; i < 4; i++) {
        char c = text[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return -1;
        value = value << 4 | digit;
    }
    return value;
}

static char *write_utf8(char *to, uint32_t c) {
    if (c < 0x80) {
        *to++ = (char)c;
    } else if (c < 0x800) {
        *to++ = (char)(0xc0 | c >> 6);
        *to++ = (char)(0x80 | (c & 63));
    } else if (c < 0x10000) {
        *to++ = (char)(0xe0 | c >> 12);
        *to++ = (char)(0x80 | (c >> 6 & 63));
        *to++ = (char)(0x80 | (c & 63));
    } else {
        *to++ = (char)(0xf0 | c >> 18);
        *to++ = (char)(0x80 | (c >> 12 & 63));
        *to++ = (char)(0x80 | (c >> 6 & 63));
        *to++ = (char)(0x80 | (c & 63));
    }
    return to;
}

/* An escape \\uXXXX, or two that are a surrogate pair, from the first digit on. */
static bool take_unicode(reader *r, char **to) {
    int32_t c, low;
    if (r->end - r->at < 4 || (c = hex4(r->at)) < 0 || (c >= 0xdc00 && c < 0xe000)) return false;
    r->at += 4;
    if (c >= 0xd800 && c < 0xdc00) {
        if (r->end - r->at < 6 || r->at[0] != '\\' || r->at[1] != 'u') return false;
        low = hex4(r->at + 2);
        if (low < 0xdc00 || low >= 0xe000) return false;
        r->at += 6;
        c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
    }
    *to = write_utf8(*to, (uint32_t)c);
    return true;
}

ptrdiff_t af_json_unescape(const char *text, size_t n, char *out) {
    static const char plain[256] = {['"'] = '"',  ['\\'] = '\\', ['/'] = '/',  ['b'] = '\b',
                                    ['f'] = '\f', ['n'] = '\n',  ['r'] = '\r', ['t'] = '\t'};
    reader r = {text, text + n};
    char *to = out;
    unsigned control = 0;
    for (size_t i = 0; i < n; i++) control |= (unsigned char)text[i] < ' ';
    if (control) return -1;
    while (r.at < r.end) {
        const char *escape = memchr(r.at, '\\', (size_t)(r.end - r.at));
        size_t size = (size_t)((escape ? escape : r.end) - r.at);
        memcpy(to, r.at, size);
        to += size;
        r.at += size;
        if (!escape) break;
        if (r.end - r.at < 2) return -1;
        unsigned char c = (unsigned char)r.at[1];
        r.at += 2;
        if (c == 'u') {
            if (!take_unicode(&r, &to)) return -1;
        } else if (plain[c]) {
            *to++ = plain[c];
        } else {
            return -1;
        }
    }
    return to - out;
}

static uint64_t load(const char *p) {
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

enum { CHUNK = 7, BLOCK = 4 * CHUNK };

static const uint64_t prime = ((uint64_t)1 << 61) - 1;

/* Less than 2^61 + 4, and x modulo the prime; x < 2^124. */
static uint64_t reduced(unsigned __int128 x) {
    uint64_t sum = (uint64_t)(x & prime) + (uint64_t)(x >> 61);
    return (sum & prime) + (sum >> 61);
}

static uint64_t power(uint64_t a, uint64_t b) { return reduced((unsigned __int128)a * b); }

void af_digest_key_make(af_digest_key *key, const uint8_t seed[16]) {
    for (int i = 0; i < 2; i++) {
        uint64_t *p = key->powers[i];
        p[0] = load((const char *)seed + 8 * i) & prime;
        for (int n = 1; n < 4; n++) p[n] = power(p[n - 1], p[0]);
    }
}

/* One block more: 28 bytes, and one behind them that may be read. */
static uint64_t horner(const uint64_t p[4], uint64_t h, const char *data) {
    const uint64_t mask = ((uint64_t)1 << 56) - 1;
    return reduced((unsigned __int128)(h + (load(data) & mask)) * p[3] +
                   (unsigned __int128)(load(data + CHUNK) & mask) * p[2] +
                   (unsigned __int128)(load(data + 2 * CHUNK) & mask) * p[1] +
                   (unsigned __int128)(load(data + 3 * CHUNK) & mask) * p[0]);
}

void af_digest(const af_digest_key *key, const char *data, size_t n, uint8_t out[16]) {
    const char *end = data + n;
    uint64_t h[2] = {0, 0};
    for (; end - data > BLOCK; data += BLOCK) {
        h[0] = horner(key->powers[0], h[0], data);
        h[1] = horner(key->powers[1], h[1], data);
    }
    char rest[BLOCK + 1] = {0};
    memcpy(rest, data, (size_t)(end - data));
    for (int i = 0; i < 2; i++) {
        h[i] = horner(key->powers[i], h[i], rest);
        h[i] = power(h[i] + (n & (prime >> 5)), key->powers[i][0]);
        if (h[i] >= prime) h[i] -= prime;
        memcpy(out + 8 * i, h + i, sizeof h[i]);
    }
}

static uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

void af_fingerprint(const char *data, size_t n, uint8_t out[16]) {
    static const uint64_t k[] = {0xa0761d6478bd642fu, 0xe7037ed1a0b428dbu, 0x8ebc6af09c88c6e3u, 0x589965cc75374cc3u};
    const char *end = data + n;
    uint64_t a = k[2] ^ n, b = k[3];
    for (; end - data > 32; data += 32) {
        uint64_t was = a;
        a = fold(load(data) ^ k[0], load(data + 8) ^ b);
        b = fold(load(data + 16) ^ k[1], load(data + 24) ^ was);
    }
    char rest[32] = {0};
    memcpy(rest, data, (size_t)(end - data));
    for (int i = 0; i < 2; i++) { /* twice, so that the last bytes, too, are in both halves */
        uint64_t was = a;
        a = fold(load(rest) ^ k[0], load(rest + 8) ^ b);
        b = fold(load(rest + 16) ^ k[1], load(rest + 24) ^ was);
    }
    memcpy(out, &a, sizeof a);
    memcpy(out + 8, &b, sizeof b);
}
