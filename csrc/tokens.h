/* tokens.h: token ids between an engine's JSON, int32 and decimal text. No arena, no allocation, no I/O.
 *
 * Everything here reads and writes only what it is given, whatever the input is: the input of af_rows_parse comes from
 * a network peer. Contracts are word by word; areal_fast/core/_tokens.pyx is the edge. */
#ifndef AREALFAST_TOKENS_H
#define AREALFAST_TOKENS_H

#include <stddef.h>
#include <stdint.h>

enum {
    AF_ROW_MIN = 6,     /* characters of the shortest row and its comma: [0,0], */
    AF_DIGITS_MAX = 12, /* characters that one id and its comma take at most: -2147483648, */
};

/* Parse `[[log-probability, id, …], …]`, which begins at text[0], into ids and logprobs.
 *
 * Returns the number of rows, and in *end how many characters they took; or -1: this is not for here. That is no
 * verdict: it is said of what is no JSON, and of JSON that this reader leaves to a general one (a row that holds
 * anything but numbers, null and plain ASCII strings behind its id, an id outside [0, 2^31), a number whose float32
 * is not certain from 64 bits of it). What is accepted reads exactly as JSON, doubles rounded to nearest and then to
 * float32.
 * `room`: rows that fit into ids and logprobs; more are -1. (n / AF_ROW_MIN + 1 is always enough.) */
ptrdiff_t af_rows_parse(const char *text, size_t n, int32_t *ids, float *logprobs, size_t room, size_t *end);

/* Write n ids as decimal text, each followed by a comma; returns the characters written. `out` has room for
 * n * AF_DIGITS_MAX, of which all may be written to. */
size_t af_ids_write(const int32_t *ids, size_t n, char *out);

#endif
