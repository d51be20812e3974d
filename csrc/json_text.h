/* What reading JSON in place has in common: a place in a text that need not end with NUL. */
#ifndef AF_JSON_TEXT_H
#define AF_JSON_TEXT_H

#include <stdbool.h>

typedef struct {
    const char *at;
    const char *end;
} reader;

static inline void skip_blanks(reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\r' || *r->at == '\t')) r->at++;
}

/* Is the next character c? It is taken if so. */
static inline bool take(reader *r, char c) {
    if (r->at >= r->end || *r->at != c) return false;
    r->at++;
    return true;
}

#endif
