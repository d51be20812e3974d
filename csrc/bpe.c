/* bpe.c: see bpe.h.
 *
 * Classes. One byte of scratch a byte of text says what class its character has; bytes within a character have a class
 * that every set holds, so runs need not be decoded again. Behind the text stands a class that no set holds, so nothing
 * looks for the end.
 *
 * Merging. While a word is short, the pair of least rank is found by looking at all; beyond MERGE_SHORT bytes by a heap of
 * (rank, place). An entry is out of date if the pair at its place has another rank by now, and is then passed over: a
 * rank names its pair. Both take the leftmost pair of least rank, as the library's queue does: there, too, an entry out
 * of date never passes, since a pair's text at a place only grows.
 *
 * Words met lately are kept by their bytes in a table without probing: what falls on a place that is taken replaces it,
 * so it is bounded, and texts made to collide only miss. */
#include "bpe.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a word's first bytes are the low ones of its key"
#endif

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { MERGE_SHORT = 48, KEY_BYTES = 24 };

_Static_assert(sizeof(af_bpe_word) == 64, "a cache line");

static const uint64_t k0 = 0xa0761d6478bd642fu, k1 = 0xe7037ed1a0b428dbu;

static uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint32_t within(uint64_t hash, uint32_t places) { return (uint32_t)((hash >> 32) * places >> 32); }

uint32_t af_bpe_pair_home(uint32_t left, uint32_t right, uint32_t places) {
    return within(((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u ^ (uint64_t)right * 0xd6e8feb86659fd93u, places);
}

uint32_t af_bpe_word_home(const uint8_t *word, size_t size, uint32_t places) {
    uint64_t h = k0 ^ size, part;
    for (; size > 8; word += 8, size -= 8) {
        memcpy(&part, word, 8);
        h = fold(h ^ part, k1);
    }
    part = 0;
    memcpy(&part, word, size);
    return within(fold(h ^ part, k1), places);
}

/* ---- characters ---------------------------------------------------------------------------------------------------- */

static bool holds(uint64_t set, uint8_t class) { return set >> class & 1; }

static bool continues(uint8_t byte) { return (byte & 0xc0) == 0x80; }

/* The code point of n bytes or more; its size, or 0: no UTF-8. */
static size_t decode(const uint8_t *text, size_t n, uint32_t *point) {
    uint32_t lead = text[0];
    size_t size = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4 || size > n) return 0;
    uint32_t value = lead & (0x7fu >> size);
    for (size_t i = 1; i < size; i++) {
        if (!continues(text[i])) return 0;
        value = value << 6 | (text[i] & 0x3fu);
    }
    if ((size == 3 && (value < 0x800 || value >> 11 == 0x1b)) || (size == 4 && (value < 0x10000 || value > 0x10ffff)))
        return 0;
    *point = value;
    return size;
}

/* Each byte's class, and AF_BPE_END behind them. Returns the set of all. */
static uint64_t classify(const af_bpe *b, const uint8_t *text, size_t n, uint8_t *classes) {
    uint64_t seen = 0;
    for (size_t i = 0; i < n;) {
        if (text[i] < 0x80) { /* ASCII is quiet, and asked about */
            classes[i] = b->ascii[text[i]];
            i++;
            continue;
        }
        uint32_t point;
        size_t size = decode(text + i, n - i, &point);
        if (!size) return (uint64_t)1 << AF_BPE_UNKNOWN;
        classes[i] = b->classes[(size_t)b->block[point >> 8] << 8 | (point & 0xff)];
        seen |= (uint64_t)1 << classes[i];
        for (size_t k = 1; k < size; k++) classes[i + k] = AF_BPE_INSIDE;
        i += size;
    }
    classes[n] = AF_BPE_END;
    return seen;
}

int af_bpe_unquiet(const af_bpe *b, const uint8_t *text, size_t n, size_t from, size_t *start, size_t *stop) {
    size_t before = from;
    for (size_t i = from, size; i < n; before = i, i += size) {
        uint32_t point = text[i];
        size = 1;
        if (point < 0x80) continue;
        size = decode(text + i, n - i, &point);
        if (!size) return false;
        if (holds(b->quiet, b->classes[(size_t)b->block[point >> 8] << 8 | (point & 0xff)])) continue;
        *start = before;
        for (i += size; i < n && (text[i] >= 0x80 || (i + 1 < n && text[i + 1] >= 0x80)); i++) {
        }
        *stop = i;
        return true;
    }
    return false;
}

ptrdiff_t af_bpe_spelled(const char **at, const char *end, const int16_t *stands_for, uint8_t *out, size_t room) {
    const uint8_t *text = (const uint8_t *)*at, *last = (const uint8_t *)end;
    size_t count = 0;
    bool otherwise = false;
    if (text == last || *text++ != '"') return AF_BPE_SPELLED_BAD;
    while (text < last && *text != '"') {
        uint32_t point = *text;
        size_t size = 1;
        if (point == '\\') { /* of escapes, only these are needed for printable characters */
            if (last - text < 2) return AF_BPE_SPELLED_BAD;
            point = *++text;
            if (point != '"' && point != '\\') otherwise = true;
        } else if (point >= 0x80) {
            size = decode(text, (size_t)(last - text), &point);
            if (!size) return AF_BPE_SPELLED_BAD;
        }
        text += size;
        if (point >= 0x200 || stands_for[point] < 0) {
            otherwise = true;
        } else {
            if (count == room) return AF_BPE_SPELLED_BAD;
            out[count++] = (uint8_t)stands_for[point];
        }
    }
    if (text == last) return AF_BPE_SPELLED_BAD;
    *at = (const char *)text + 1;
    return otherwise ? AF_BPE_SPELLED_OTHERWISE : (ptrdiff_t)count;
}

/* ---- splits -------------------------------------------------------------------------------------------------------- */

static size_t match(const af_bpe *b, const af_bpe_way *way, uint32_t i, const uint8_t *classes, size_t at);

/* Behind one of a step's spellings and what must follow, or 0. */
static size_t match_spelled(const af_bpe *b, const af_bpe_way *way, uint32_t i, const uint8_t *classes, size_t at) {
    const af_bpe_step *step = &b->step[way->step + i];
    for (uint32_t s = 0; s < step->spellings; s++) {
        const af_bpe_spelling *spelling = &b->spelling[step->spelling + s];
        size_t to = at;
        uint32_t k = 0;
        for (; k < spelling->size && holds(spelling->sets[k], classes[to]); k++) {
            to++;
            while (classes[to] == AF_BPE_INSIDE) to++;
        }
        if (k < spelling->size) continue;
        size_t end = match(b, way, i + 1, classes, to);
        if (end) return end;
    }
    return step->least ? 0 : match(b, way, i + 1, classes, at);
}

/* Where a way's steps from the i-th on end, taken from `at`, which is the start of a character; 0: they do not fit. (A
 * word that ends at 0 is empty, and no way takes one.) */
static size_t match(const af_bpe *b, const af_bpe_way *way, uint32_t i, const uint8_t *classes, size_t at) {
    if (i == way->steps) return holds(way->barred, classes[at]) ? 0 : at;
    const af_bpe_step *step = &b->step[way->step + i];
    if (step->spellings) return match_spelled(b, way, i, classes, at);
    size_t end = at;
    uint32_t count = 0; /* of characters, as far as it matters */
    if (step->most == AF_BPE_NONE && step->least <= 1) {
        while (holds(step->set, classes[end])) end++;
        count = end > at ? AF_BPE_NONE : 0;
    } else {
        for (; count < step->most && holds(step->set, classes[end]); count++) {
            end++;
            while (classes[end] == AF_BPE_INSIDE) end++;
        }
    }
    if (count < step->least) return 0;
    bool last = i + 1 == way->steps && !way->barred;
    size_t least = at;
    for (uint32_t k = 0; k < step->least; k++) {
        least++;
        while (classes[least] == AF_BPE_INSIDE) least++;
    }
    for (;;) {
        size_t found = last ? end : match(b, way, i + 1, classes, end);
        if (found || end <= least) return found;
        do end--;
        while (classes[end] == AF_BPE_INSIDE);
    }
}

static size_t match_split(const af_bpe *b, const af_bpe_split *split, const uint8_t *classes, size_t at) {
    for (uint64_t ways = split->ways[classes[at]]; ways; ways &= ways - 1) {
        size_t end = match(b, &b->way[__builtin_ctzll(ways)], 0, classes, at);
        if (end) return end;
    }
    return 0;
}

/* ---- merges -------------------------------------------------------------------------------------------------------- */

static uint32_t rank_of(const af_bpe *b, uint32_t left, uint32_t right) {
    for (uint32_t i = af_bpe_pair_home(left, right, b->pair_places);; i = i + 1 == b->pair_places ? 0 : i + 1) {
        const af_bpe_pair *pair = &b->pairs[i];
        if ((pair->left == left && pair->right == right) || pair->rank == AF_BPE_NONE) return pair->rank;
    }
}

static size_t merge_short(const af_bpe *b, const uint8_t *word, size_t n, uint32_t *ids) {
    uint32_t ranks[MERGE_SHORT]; /* of each with the next */
    for (size_t i = 0; i < n; i++) ids[i] = b->byte_id[word[i]];
    for (size_t i = 0; i + 1 < n; i++) ranks[i] = b->byte_rank[(size_t)word[i] << 8 | word[i + 1]];
    while (n > 1) {
        size_t at = 0;
        uint32_t least = ranks[0];
        for (size_t i = 1; i + 1 < n; i++) {
            if (ranks[i] < least) least = ranks[i], at = i;
        }
        if (least == AF_BPE_NONE) break;
        ids[at] = b->merged[least];
        n--;
        for (size_t i = at + 1; i < n; i++) ids[i] = ids[i + 1];
        for (size_t i = at; i + 1 < n; i++) ranks[i] = ranks[i + 1];
        if (at + 1 < n) ranks[at] = rank_of(b, ids[at], ids[at + 1]);
        if (at) ranks[at - 1] = rank_of(b, ids[at - 1], ids[at]);
    }
    return n;
}

typedef struct {
    uint64_t *entries; /* rank << 32 | place; the least first */
    size_t size;
} heap;

static void heap_push(heap *h, uint32_t rank, uint32_t place) {
    uint64_t entry = (uint64_t)rank << 32 | place;
    size_t i = h->size++;
    for (; i && h->entries[(i - 1) / 2] > entry; i = (i - 1) / 2) h->entries[i] = h->entries[(i - 1) / 2];
    h->entries[i] = entry;
}

static uint64_t heap_pop(heap *h) {
    uint64_t top = h->entries[0], entry = h->entries[--h->size];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < h->size; i = child) {
        if (child + 1 < h->size && h->entries[child + 1] < h->entries[child]) child++;
        if (h->entries[child] >= entry) break;
        h->entries[i] = h->entries[child];
    }
    h->entries[i] = entry;
    return top;
}

/* One symbol of a long word; `next` n: none. */
typedef struct {
    uint32_t id, rank, before, next;
} symbol;

static void rank_anew(const af_bpe *b, symbol *symbols, heap *h, uint32_t at, size_t n) {
    symbol *s = &symbols[at];
    s->rank = s->next == n ? AF_BPE_NONE : rank_of(b, s->id, symbols[s->next].id);
    if (s->rank != AF_BPE_NONE) heap_push(h, s->rank, at);
}

/* Each merge takes an entry away and brings two at most, and there are fewer than n merges: 2 n entries are enough. */
static ptrdiff_t merge_long(const af_bpe *b, const uint8_t *word, size_t n, uint32_t *ids) {
    symbol *symbols = malloc(n * (sizeof *symbols + 2 * sizeof(uint64_t)));
    if (!symbols) return AF_BPE_MEMORY;
    heap h = {(uint64_t *)(void *)(symbols + n), 0};
    for (uint32_t i = 0; i < n; i++)
        symbols[i] = (symbol){b->byte_id[word[i]], AF_BPE_NONE, i ? i - 1 : AF_BPE_NONE, i + 1};
    for (uint32_t i = 0; i < n; i++) rank_anew(b, symbols, &h, i, n);
    while (h.size) {
        uint64_t entry = heap_pop(&h);
        uint32_t at = (uint32_t)entry, rank = (uint32_t)(entry >> 32);
        symbol *s = &symbols[at];
        if (s->rank != rank) continue;
        symbol *gone = &symbols[s->next];
        s->id = b->merged[rank];
        s->next = gone->next;
        gone->rank = AF_BPE_NONE;
        if (s->next < n) symbols[s->next].before = at;
        rank_anew(b, symbols, &h, at, n);
        if (s->before != AF_BPE_NONE) rank_anew(b, symbols, &h, s->before, n);
    }
    size_t count = 0;
    for (uint32_t i = 0; i < n; i = symbols[i].next) ids[count++] = symbols[i].id;
    free(symbols);
    return (ptrdiff_t)count;
}

uint32_t af_bpe_whole(const af_bpe *b, const uint8_t *word, size_t n) {
    for (uint32_t i = af_bpe_word_home(word, n, b->word_places); b->words[i]; i = i + 1 == b->word_places ? 0 : i + 1) {
        uint32_t id = b->words[i] - 1, start = b->token_start[id];
        if (b->token_start[id + 1] - start == n && memcmp(b->token_bytes + start, word, n) == 0) return id;
    }
    return AF_BPE_NONE;
}

static ptrdiff_t encode_word(const af_bpe *b, const uint8_t *word, size_t n, uint32_t *ids) {
    if (b->words) {
        ids[0] = af_bpe_whole(b, word, n);
        if (ids[0] != AF_BPE_NONE) return 1;
    }
    if (n <= MERGE_SHORT) return (ptrdiff_t)merge_short(b, word, n, ids);
    return n <= AF_BPE_WORD_MAX ? merge_long(b, word, n, ids) : AF_BPE_NO;
}

/* ---- texts --------------------------------------------------------------------------------------------------------- */

typedef struct {
    const af_bpe *b;
    af_bpe_word *met;
    const uint8_t *text;
    size_t n;
    uint8_t *classes;
    uint32_t *ids;
    size_t count;
} encoding;

/* The word's bytes and zeros behind them. */
static void read_key(const encoding *e, size_t at, size_t size, uint64_t key[3]) {
    key[0] = key[1] = key[2] = 0;
    if (e->n - at < KEY_BYTES) {
        memcpy(key, e->text + at, size);
        return;
    }
    memcpy(key, e->text + at, 8);
    if (size <= 8) {
        key[0] &= UINT64_MAX >> (64 - 8 * size);
        return;
    }
    memcpy(key + 1, e->text + at + 8, 8);
    if (size <= 16) {
        key[1] &= UINT64_MAX >> (128 - 8 * size);
        return;
    }
    memcpy(key + 2, e->text + at + 16, 8);
    key[2] &= UINT64_MAX >> (192 - 8 * size);
}

/* The word's ids behind those before. Returns 0 or a verdict. */
static ptrdiff_t take_word(encoding *e, size_t at, size_t size) {
    uint32_t *ids = e->ids + e->count;
    af_bpe_word *met = NULL;
    uint64_t key[3];
    if (size <= KEY_BYTES) {
        read_key(e, at, size, key);
        met = &e->met[fold(fold(key[0] ^ k0, key[1] ^ k1) ^ key[2], k1 ^ size) >> 32 & (AF_BPE_WORDS - 1)];
        if (met->size == size && met->key[0] == key[0] && met->key[1] == key[1] && met->key[2] == key[2]) {
            memcpy(ids, met->ids, sizeof met->ids); /* all, for its size is known then; there is room */
            e->count += met->count;
            return 0;
        }
    }
    ptrdiff_t count = encode_word(e->b, e->text + at, size, ids);
    if (count < 0) return count;
    e->count += (size_t)count;
    if (met && count <= AF_BPE_WORD_IDS) {
        memcpy(met->key, key, sizeof key);
        met->size = (uint8_t)size;
        met->count = (uint8_t)count;
        memset(met->ids, 0, sizeof met->ids);
        memcpy(met->ids, ids, (size_t)count * sizeof *ids);
    }
    return 0;
}

/* The words of a part of the text, which splits before the k-th have cut. */
static ptrdiff_t take_words(encoding *e, uint32_t k, size_t from, size_t to) {
    if (k == e->b->splits) return take_word(e, from, to - from);
    const af_bpe_split *split = &e->b->split[k];
    uint8_t behind = e->classes[to];
    ptrdiff_t verdict = 0;
    size_t gap = from, at = from;
    e->classes[to] = AF_BPE_END;
    while (at < to && !verdict) {
        size_t end = match_split(e->b, split, e->classes, at);
        if (!end) {
            do at++;
            while (e->classes[at] == AF_BPE_INSIDE);
            continue;
        }
        if (gap < at) verdict = take_words(e, k + 1, gap, at);
        if (!verdict) verdict = take_words(e, k + 1, at, end);
        gap = at = end;
    }
    if (!verdict && gap < to) verdict = take_words(e, k + 1, gap, to);
    e->classes[to] = behind;
    return verdict;
}

ptrdiff_t af_bpe_encode(const af_bpe *b, af_bpe_word *met, const uint8_t *text, size_t n, int normal, uint32_t *ids) {
    uint8_t small[1024];
    uint8_t *classes = n < sizeof small ? small : malloc(n + 1);
    if (!classes) return AF_BPE_MEMORY;
    encoding e = {b, met, text, n, classes, ids, 0};
    uint64_t seen = classify(b, text, n, classes);
    ptrdiff_t verdict = 0;
    if (seen >> AF_BPE_UNKNOWN & 1) verdict = AF_BPE_NO;
    else if (!normal && seen & ~b->quiet) verdict = AF_BPE_NORMALIZE;
    else if (n) verdict = take_words(&e, 0, 0, n);
    if (classes != small) free(classes);
    return verdict ? verdict : (ptrdiff_t)e.count;
}
