/* json_string.h: text as a JSON string. No arena, no allocation, no I/O. areal_fast/core/_replies.pyx is the edge. */
#ifndef AREALFAST_JSON_STRING_H
#define AREALFAST_JSON_STRING_H

#include <stddef.h>
#include <stdint.h>

/* Which bytes of UTF-8 are not written as they are: 0 as it is, 1 as \u00XX, else the letter behind the backslash.
 * Quote, backslash and everything below a blank (RFC 8259 section 7); nothing more, as msgspec writes. */
static const uint8_t af_json_escapes[256] = {
    ['"'] = '"', ['\\'] = '\\', ['\b'] = 'b', ['\t'] = 't', ['\n'] = 'n', ['\f'] = 'f', ['\r'] = 'r',
    [0] = 1,     [1] = 1,       [2] = 1,      [3] = 1,      [4] = 1,      [5] = 1,      [6] = 1,
    [7] = 1,     [11] = 1,      [14] = 1,     [15] = 1,     [16] = 1,     [17] = 1,     [18] = 1,
    [19] = 1,    [20] = 1,      [21] = 1,     [22] = 1,     [23] = 1,     [24] = 1,     [25] = 1,
    [26] = 1,    [27] = 1,      [28] = 1,     [29] = 1,     [30] = 1,     [31] = 1,
};

/* How many bytes `n` bytes of text take as a JSON string, without its quotes. */
static inline size_t af_json_size(const char *text, size_t n) {
    size_t size = n;
    for (size_t i = 0; i < n; i++) {
        uint8_t escape = af_json_escapes[(uint8_t)text[i]];
        size += (escape > 0) + 4u * (escape == 1);
    }
    return size;
}

/* Write them to `out`; returns behind the last one. */
static inline char *af_json_write(char *out, const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint8_t c = (uint8_t)text[i], escape = af_json_escapes[c];
        if (!escape) {
            *out++ = text[i];
            continue;
        }
        *out++ = '\\';
        if (escape > 1) {
            *out++ = (char)escape;
            continue;
        }
        *out++ = 'u';
        *out++ = '0';
        *out++ = '0';
        *out++ = (char)('0' + (c >> 4));
        *out++ = "0123456789abcdef"[c & 15];
    }
    return out;
}

#endif
