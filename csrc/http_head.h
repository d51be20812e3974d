/* http_head.h: the heads of ordinary requests and replies, read in one pass over the bytes.
 *
 * Job: say where the parts of a message's head are, if it is of the form that nearly all are of; else say no more
 * than "not one of those". A reader of the whole of HTTP (llhttp) decides about the rest, right and wrong alike.
 * Nothing is copied or allocated, there is no state, and nothing behind `size` is read.
 *
 * Theory. What is taken here must mean the same to llhttp in its strict mode and to the rules of RFC 9112 section 6
 * that stand behind it (areal_fast/http/head.py); a property test holds the two against each other. So the form is
 * narrow: HTTP/1.1, one of five methods, a path without escapes, one Host, lines that end with CRLF, names of token
 * characters, values of visible ASCII that neither are empty nor end with a blank, a Content-Length of plain digits at
 * most once, Connection at most once and of one known word. Transfer-Encoding, Expect and Upgrade never are: where
 * framing is not a plain count, the other one decides. Of replies: HTTP/1.1, a final status that allows a body, and a
 * Content-Length.
 */
#ifndef AREALFAST_HTTP_HEAD_H
#define AREALFAST_HTTP_HEAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { AF_HTTP_FIELDS = 32 };

enum { AF_HTTP_GET, AF_HTTP_POST, AF_HTTP_PUT, AF_HTTP_DELETE, AF_HTTP_HEAD };

/* Names that the proxy's clients send, so that a reader need not make new objects of them. */
enum {
    AF_HTTP_OTHER,
    AF_HTTP_HOST,
    AF_HTTP_ACCEPT,
    AF_HTTP_USER_AGENT,
    AF_HTTP_CONNECTION,
    AF_HTTP_CONTENT_TYPE,
    AF_HTTP_AUTHORIZATION,
    AF_HTTP_CONTENT_LENGTH,
    AF_HTTP_ACCEPT_ENCODING,
    AF_HTTP_KNOWN_NAMES,
};

/* Positions are bytes from the head's first. `known` is one of the names above. */
typedef struct {
    uint32_t name, name_len;
    uint32_t value, value_len;
    uint32_t known;
} af_http_field;

typedef struct {
    uint32_t size;              /* of the head, its empty line included */
    uint32_t line;              /* of the first line, without its CRLF */
    uint32_t status;            /* of a reply; */
    uint32_t method;            /* of a request, as the three that follow */
    uint32_t target;            /* where path and query begin */
    uint32_t path_len;          /* up to the question mark, */
    uint32_t target_len;        /* and with everything behind it */
    bool keep_alive;            /* of both, as the rest */
    uint32_t fields;
    int64_t body;               /* Content-Length; 0 without one */
    af_http_field field[AF_HTTP_FIELDS];
} af_http_head;

/* Read the head that begins at `text`. True: `out` says what it is. False: it is not whole within `size`, or not of
 * the form above; `out` then means nothing. A head of more than `most` bytes is not taken. */
bool af_http_read_head(const char *text, size_t size, size_t most, af_http_head *out);

/* As af_http_read_head, for the head of a reply to a request that was no HEAD. */
bool af_http_read_reply(const char *text, size_t size, size_t most, af_http_head *out);

/* Write "content-length: SIZE\r\n", at most 37 bytes; how many it were. `size` is not negative. */
size_t af_http_write_length(char *to, int64_t size);

#endif
