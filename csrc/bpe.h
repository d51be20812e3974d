/* bpe.h: text to token ids, for byte-level byte-pair encoders. No arena, no I/O, no Python.
 *
 * Text is cut into words by splits, as tokenizer files describe them by regular expressions: a split is a list of ways,
 * of which the first that fits at a place takes a word; a way is a list of steps, each so many characters of a set,
 * greedy, with backtracking, and perhaps a set that may not follow. What no way takes is a word too. Each split cuts
 * what the one before it left, as if that were all the text. A word's bytes are then merged in the order of the merges' ranks,
 * leftmost first.
 *
 * A set is 64 bits over classes of characters: who builds an af_bpe divides all code points into classes, so that each
 * set of the pattern holds a class whole or not at all. So nothing here knows Unicode.
 *
 * The tables are never written to once built: any thread may encode. Of af_bpe_word, the words met lately, each thread
 * needs its own. */
#ifndef AREALFAST_BPE_H
#define AREALFAST_BPE_H

#include <stddef.h>
#include <stdint.h>

enum {
    AF_BPE_CLASSES = 61, /* that a builder may use: 0 to 60 */
    AF_BPE_UNKNOWN = 61, /* of code points that nobody asked about: such text is not for here */
    AF_BPE_END = 62,     /* stands behind the text; in no set */
    AF_BPE_INSIDE = 63,  /* of bytes that continue a character; in every set */
    AF_BPE_STEPS = 96,
    AF_BPE_WAYS = 64, /* as many as a word has bits */
    AF_BPE_SPELLINGS = 32,
    AF_BPE_SPLITS = 4,
    AF_BPE_BLOCKS = 0x1100, /* of 256 code points */
    AF_BPE_WORDS = 8192,    /* af_bpe_word a cache has; a power of two */
    AF_BPE_WORD_IDS = 9,
    AF_BPE_WORD_MAX = 1 << 20, /* bytes of a word; a longer one is not for here (each takes 32 bytes of memory) */
};

/* Verdicts of af_bpe_encode. */
enum {
    AF_BPE_NO = -1,        /* not for here: ask the library */
    AF_BPE_NORMALIZE = -2, /* the text may not be in normal form */
    AF_BPE_MEMORY = -3,
};

typedef struct {
    uint64_t set;
    uint32_t least, most;              /* characters of the set; 0 and 1 if it is spelled */
    uint16_t spelling, spellings;      /* instead of a set: one of these (none of them too, if least is 0) */
} af_bpe_step;

typedef struct {
    uint64_t barred; /* what may not follow */
    uint16_t step, steps;
} af_bpe_way;

typedef struct {
    uint64_t sets[4];
    uint32_t size;
} af_bpe_spelling;

typedef struct {
    uint64_t ways[64]; /* by class of the first character: which ways (bits, in their order) may fit */
} af_bpe_split;

typedef struct {
    uint32_t left, right, rank; /* rank AF_BPE_NONE: a free place */
} af_bpe_pair;

#define AF_BPE_NONE UINT32_MAX

typedef struct {
    /* characters */
    uint8_t ascii[128];
    uint8_t block[AF_BPE_BLOCKS];
    const uint8_t *classes; /* 256 a block */
    uint64_t quiet;         /* classes of which no text is changed by the normalizer */
    /* words */
    af_bpe_split split[AF_BPE_SPLITS];
    uint32_t splits;
    af_bpe_way way[AF_BPE_WAYS];
    af_bpe_step step[AF_BPE_STEPS];
    af_bpe_spelling spelling[AF_BPE_SPELLINGS];
    /* merges */
    uint32_t byte_id[256];
    const uint32_t *byte_rank; /* [256][256]: of two bytes */
    const af_bpe_pair *pairs;  /* open-addressed */
    uint32_t pair_places;
    const uint32_t *merged; /* by rank */
    /* tokens whole, where they come before merges; else NULL. Ids ascend. */
    const uint32_t *words; /* open-addressed: token ids + 1, 0 a free place */
    uint32_t word_places;
    const uint32_t *token_start; /* of token id's bytes; [id + 1] is their end */
    const uint8_t *token_bytes;
} af_bpe;

/* A word met lately. 64 bytes. */
typedef struct {
    uint64_t key[3]; /* its bytes, then zeros */
    uint8_t size;    /* 0: nothing here */
    uint8_t count;
    uint32_t ids[AF_BPE_WORD_IDS];
} af_bpe_word;

/* Where an open-addressed table's search begins. */
uint32_t af_bpe_pair_home(uint32_t left, uint32_t right, uint32_t places);
uint32_t af_bpe_word_home(const uint8_t *word, size_t size, uint32_t places);

/* The id of a word that is a token whole, or AF_BPE_NONE. */
uint32_t af_bpe_whole(const af_bpe *b, const uint8_t *word, size_t n);

enum { AF_BPE_SPELLED_BAD = -1, AF_BPE_SPELLED_OTHERWISE = -2 };

/* Read a JSON string in which characters stand for bytes: `stands_for` has those of code points below 0x200, or -1.
 * *at, at the opening quote, moves behind the closing one. Returns the bytes written to out, at most room; or
 * AF_BPE_SPELLED_OTHERWISE: it holds something else (out is spoilt); or AF_BPE_SPELLED_BAD: it is no such string, or
 * too long. */
ptrdiff_t af_bpe_spelled(const char **at, const char *end, const int16_t *stands_for, uint8_t *out, size_t room);

/* Where the first part of the text from `from` on is that the normalizer may change, as [*start, *stop): it begins with the
 * character before that one, and stops before ASCII that more ASCII follows, so that it is normalized by itself as within
 * the text. False: there is none. n bytes of UTF-8, as af_bpe_encode has found them to be. */
int af_bpe_unquiet(const af_bpe *b, const uint8_t *text, size_t n, size_t from, size_t *start, size_t *stop);

/* The ids of n bytes of UTF-8 into ids, which has room for n + AF_BPE_WORD_IDS; returns how many, or a verdict from
 * above. `normal`: the text is in normal form. `met`: AF_BPE_WORDS of them, zeros at first. Text that is not UTF-8 is
 * AF_BPE_NO. Takes n log n at worst for the tables of any pattern whose words are found in linear time. */
ptrdiff_t af_bpe_encode(const af_bpe *b, af_bpe_word *met, const uint8_t *text, size_t n, int normal, uint32_t *ids);

#endif
