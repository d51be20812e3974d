/* messages.h: where the messages of a chat lie in its body, what plain ones say, and a digest to know them again by. No
 * arena, no allocation.
 *
 * Everything reads only what it is given, whatever that is: bodies come from clients.
 * areal_fast/core/_messages.pyx is the edge. */
#ifndef AREALFAST_MESSAGES_H
#define AREALFAST_MESSAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    size_t start;
    size_t stop; /* of the character behind */
} af_range;

enum {
    AF_SCAN_NO = -1,   /* not a body of the usual form: read it in another way */
    AF_SCAN_MANY = -2, /* more messages than there is room for */
};

/* Find the elements of the array `messages` of the JSON object in `body`.
 *
 * Returns how many there are, all of them objects, and in *array the whole array with its brackets. This is no
 * parser: what is promised holds if each element, and the body with anything of one element in place of the array, are
 * valid JSON (by the caller's parser, or because the very same bytes were found valid before). Then the body is valid,
 * the elements are what a parser finds in its only member of this name, and the rest is the rest.
 * A body with such a member twice, or with an escape in the name of any member, is AF_SCAN_NO. */
ptrdiff_t af_messages_scan(const char *body, size_t n, af_range *messages, size_t room, af_range *array);

/* What is between the quotes of a message's two strings. */
typedef struct {
    af_range role;
    af_range content;
} af_plain_message;

/* Is `text` an object of the members `role` and `content`, in any order, and nothing else, both strings, the names and
 * the role without escapes? False is no verdict: read it in another way. What is true reads like that as JSON, if the
 * strings are valid (af_json_unescape, and UTF-8). */
bool af_message_read(const char *text, size_t n, af_plain_message *out);

/* The inside of a JSON string without its escapes, `n` bytes at most, into `out`; how many it is. -1: it is not valid
 * (control characters, escapes that there are not, half a surrogate pair). Bytes that are no UTF-8 are passed on. */
ptrdiff_t af_json_unescape(const char *text, size_t n, char *out);

/* Two secrets for af_digest, and their powers. */
typedef struct {
    uint64_t powers[2][4];
} af_digest_key;

void af_digest_key_make(af_digest_key *key, const uint8_t seed[16]);

/* 16 bytes that are the same for the same bytes and key. Who does not know the key cannot make two texts that have the
 * same: for any two of n bytes that is the chance of (n / 7 + 3)^2 / 2^122 over the keys, 2^-87 for a MiB. Who knows it
 * can. */
void af_digest(const af_digest_key *key, const char *data, size_t n, uint8_t out[16]);

/* 16 bytes to tell texts apart that nobody made to be alike: several times faster, and no secret. */
void af_fingerprint(const char *data, size_t n, uint8_t out[16]);

#endif
