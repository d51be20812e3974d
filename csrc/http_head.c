/* See http_head.h. One pass, one byte at a time over names and values by a table of classes; no look-ahead beyond the
 * byte in hand, so that a head cut anywhere is "not whole" and nothing else.
 */
#include "http_head.h"

#include <string.h>

enum { TOKEN = 1, TARGET = 2, VALUE = 4 };

/* Classes of bytes. TOKEN: RFC 9110 5.6.2. TARGET: unreserved, sub-delims but the quote, and / : @ of RFC 3986; no
 * escape, no fragment. VALUE: visible ASCII, space and tab. */
static const uint8_t CLASS[256] = {
    ['\t'] = VALUE,
    [' '] = VALUE,
    ['!'] = TOKEN | TARGET | VALUE,
    ['"'] = VALUE,
    ['#'] = TOKEN | VALUE,
    ['$'] = TOKEN | TARGET | VALUE,
    ['%'] = TOKEN | VALUE,
    ['&'] = TOKEN | TARGET | VALUE,
    ['\''] = TOKEN | VALUE,
    ['('] = TARGET | VALUE,
    [')'] = TARGET | VALUE,
    ['*'] = TOKEN | TARGET | VALUE,
    ['+'] = TOKEN | TARGET | VALUE,
    [','] = TARGET | VALUE,
    ['-'] = TOKEN | TARGET | VALUE,
    ['.'] = TOKEN | TARGET | VALUE,
    ['/'] = TARGET | VALUE,
    ['0' ... '9'] = TOKEN | TARGET | VALUE,
    [':'] = TARGET | VALUE,
    [';'] = TARGET | VALUE,
    ['<'] = VALUE,
    ['='] = TARGET | VALUE,
    ['>'] = VALUE,
    ['?'] = VALUE,
    ['@'] = TARGET | VALUE,
    ['A' ... 'Z'] = TOKEN | TARGET | VALUE,
    ['['] = VALUE,
    ['\\'] = VALUE,
    [']'] = VALUE,
    ['^'] = TOKEN | VALUE,
    ['_'] = TOKEN | TARGET | VALUE,
    ['`'] = TOKEN | VALUE,
    ['a' ... 'z'] = TOKEN | TARGET | VALUE,
    ['{'] = VALUE,
    ['|'] = TOKEN | VALUE,
    ['}'] = VALUE,
    ['~'] = TOKEN | TARGET | VALUE,
};

static const struct {
    const char *text;
    uint32_t len;
} METHODS[] = {
    [AF_HTTP_GET] = {"GET ", 4},       [AF_HTTP_POST] = {"POST ", 5}, [AF_HTTP_PUT] = {"PUT ", 4},
    [AF_HTTP_DELETE] = {"DELETE ", 7}, [AF_HTTP_HEAD] = {"HEAD ", 5},
};

static const char *const NAMES[AF_HTTP_KNOWN_NAMES] = {
    [AF_HTTP_HOST] = "host",
    [AF_HTTP_ACCEPT] = "accept",
    [AF_HTTP_USER_AGENT] = "user-agent",
    [AF_HTTP_CONNECTION] = "connection",
    [AF_HTTP_CONTENT_TYPE] = "content-type",
    [AF_HTTP_AUTHORIZATION] = "authorization",
    [AF_HTTP_CONTENT_LENGTH] = "content-length",
    [AF_HTTP_ACCEPT_ENCODING] = "accept-encoding",
};

static const char VERSION[] = " HTTP/1.1\r\n";

enum { FRAMING = AF_HTTP_KNOWN_NAMES }; /* a name whose field is never read here */

static bool is(uint8_t byte, uint8_t class) { return (CLASS[byte] & class) != 0; }

/* Whether the `len` bytes at `text` are `lower`, whatever their case. `lower` is letters and hyphens. */
static bool same(const char *text, const char *lower, uint32_t len) {
    for (uint32_t i = 0; i < len; i++) {
        char byte = text[i];
        if (byte >= 'A' && byte <= 'Z') byte = (char)(byte | 0x20);
        if (byte != lower[i]) return false;
    }
    return true;
}

/* Which name this is. Lengths tell all known ones apart but one pair. */
static uint32_t name_of(const char *text, uint32_t len) {
    switch (len) {
    case 4: return same(text, NAMES[AF_HTTP_HOST], len) ? AF_HTTP_HOST : AF_HTTP_OTHER;
    case 6:
        if (same(text, NAMES[AF_HTTP_ACCEPT], len)) return AF_HTTP_ACCEPT;
        return same(text, "expect", len) ? FRAMING : AF_HTTP_OTHER;
    case 7: return same(text, "upgrade", len) ? FRAMING : AF_HTTP_OTHER;
    case 10:
        if (same(text, NAMES[AF_HTTP_USER_AGENT], len)) return AF_HTTP_USER_AGENT;
        return same(text, NAMES[AF_HTTP_CONNECTION], len) ? AF_HTTP_CONNECTION : AF_HTTP_OTHER;
    case 12: return same(text, NAMES[AF_HTTP_CONTENT_TYPE], len) ? AF_HTTP_CONTENT_TYPE : AF_HTTP_OTHER;
    case 13: return same(text, NAMES[AF_HTTP_AUTHORIZATION], len) ? AF_HTTP_AUTHORIZATION : AF_HTTP_OTHER;
    case 14: return same(text, NAMES[AF_HTTP_CONTENT_LENGTH], len) ? AF_HTTP_CONTENT_LENGTH : AF_HTTP_OTHER;
    case 15: return same(text, NAMES[AF_HTTP_ACCEPT_ENCODING], len) ? AF_HTTP_ACCEPT_ENCODING : AF_HTTP_OTHER;
    case 16: return same(text, "proxy-connection", len) ? FRAMING : AF_HTTP_OTHER;
    case 17: return same(text, "transfer-encoding", len) ? FRAMING : AF_HTTP_OTHER;
    default: return AF_HTTP_OTHER;
    }
}

/* The request line. Returns where the first field begins, or 0. */
static size_t read_line(const char *text, size_t size, af_http_head *out) {
    size_t at = 0;
    for (uint32_t m = 0; m < sizeof(METHODS) / sizeof(METHODS[0]); m++) {
        if (size > METHODS[m].len && memcmp(text, METHODS[m].text, METHODS[m].len) == 0) {
            out->method = m;
            at = METHODS[m].len;
            break;
        }
    }
    if (at == 0 || text[at] != '/') return 0;
    size_t from = at, query = 0;
    while (at < size && (is((uint8_t)text[at], TARGET) || text[at] == '?')) {
        if (text[at] == '?' && query == 0) query = at;
        at++;
    }
    if (size - at < sizeof(VERSION) - 1 || memcmp(text + at, VERSION, sizeof(VERSION) - 1) != 0) return 0;
    out->target = (uint32_t)from;
    out->target_len = (uint32_t)(at - from);
    out->path_len = query ? (uint32_t)(query - from) : out->target_len;
    at += sizeof(VERSION) - 1;
    out->line = (uint32_t)(at - 2);
    return at;
}

/* One field, from the first byte of its name to behind its CRLF. Returns where the next one begins, or 0. */
static size_t read_field(const char *text, size_t size, size_t at, af_http_field *f) {
    size_t name = at;
    while (at < size && is((uint8_t)text[at], TOKEN)) at++;
    if (at == name || at == size || text[at] != ':') return 0;
    f->name = (uint32_t)name;
    f->name_len = (uint32_t)(at - name);
    at++;
    while (at < size && (text[at] == ' ' || text[at] == '\t')) at++;
    size_t value = at;
    while (at < size && is((uint8_t)text[at], VALUE)) at++;
    if (size - at < 2 || text[at] != '\r' || text[at + 1] != '\n') return 0;
    if (at == value || text[at - 1] == ' ' || text[at - 1] == '\t') return 0;
    f->value = (uint32_t)value;
    f->value_len = (uint32_t)(at - value);
    f->known = name_of(text + name, f->name_len);
    return at + 2;
}

static bool read_length(const char *text, uint32_t len, int64_t *out) {
    int64_t n = 0;
    if (len > 15) return false;
    for (uint32_t i = 0; i < len; i++) {
        if (text[i] < '0' || text[i] > '9') return false;
        n = 10 * n + (text[i] - '0');
    }
    *out = n;
    return true;
}

/* The fields, from `at` to behind the empty line. Returns whether they are of the form; `seen` gets a bit a name. */
static bool read_fields(const char *text, size_t size, size_t at, unsigned *seen, af_http_head *out) {
    *seen = 0;
    out->fields = 0;
    out->body = 0;
    out->keep_alive = true;
    while (at < size && text[at] != '\r') {
        if (out->fields == AF_HTTP_FIELDS) return false;
        af_http_field *f = &out->field[out->fields++];
        at = read_field(text, size, at, f);
        if (at == 0 || f->known == FRAMING) return false;
        bool once = f->known == AF_HTTP_HOST || f->known == AF_HTTP_CONTENT_LENGTH || f->known == AF_HTTP_CONNECTION;
        if (once && (*seen & (1U << f->known))) return false;
        *seen |= 1U << f->known;
        const char *value = text + f->value;
        if (f->known == AF_HTTP_CONTENT_LENGTH) {
            if (!read_length(value, f->value_len, &out->body)) return false;
        } else if (f->known == AF_HTTP_CONNECTION) {
            if (f->value_len == 5 && same(value, "close", 5)) out->keep_alive = false;
            else if (f->value_len != 10 || !same(value, "keep-alive", 10)) return false;
        }
    }
    if (size - at < 2 || text[at + 1] != '\n') return false;
    out->size = (uint32_t)(at + 2);
    return true;
}

static size_t bounded(size_t size, size_t most) {
    if (size > most) size = most;
    return size > UINT32_MAX ? UINT32_MAX : size;
}

bool af_http_read_head(const char *text, size_t size, size_t most, af_http_head *out) {
    unsigned seen;
    size = bounded(size, most);
    size_t at = read_line(text, size, out);
    return at != 0 && read_fields(text, size, at, &seen, out) && (seen & (1U << AF_HTTP_HOST));
}

bool af_http_read_reply(const char *text, size_t size, size_t most, af_http_head *out) {
    static const char START[] = "HTTP/1.1 ";
    unsigned seen;
    size = bounded(size, most);
    size_t at = sizeof(START) - 1;
    if (size < at + 4 || memcmp(text, START, at) != 0) return false;
    out->status = 0;
    for (int i = 0; i < 3; i++, at++) {
        if (text[at] < '0' || text[at] > '9') return false;
        out->status = 10 * out->status + (uint32_t)(text[at] - '0');
    }
    if (out->status < 200 || out->status > 599 || out->status == 204 || out->status == 304) return false;
    if (text[at] != ' ') return false;
    while (at < size && is((uint8_t)text[at], VALUE)) at++;
    if (size - at < 2 || text[at] != '\r' || text[at + 1] != '\n') return false;
    out->line = (uint32_t)at;
    return read_fields(text, size, at + 2, &seen, out) && (seen & (1U << AF_HTTP_CONTENT_LENGTH));
}

size_t af_http_write_length(char *to, int64_t size) {
    static const char name[] = "content-length: ";
    char digits[20];
    size_t count = 0, at = sizeof name - 1;
    memcpy(to, name, at);
    do {
        digits[count++] = (char)('0' + size % 10);
        size /= 10;
    } while (size);
    while (count) to[at++] = digits[--count];
    to[at++] = '\r';
    to[at++] = '\n';
    return at;
}
