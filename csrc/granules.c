/* granules.c: the allocator of 4 KiB granules, in runs.
 *
 * Theory: one word a granule is the truth (layout.h). A run is claimed by CAS on its first word, which names owner
 * and length, then its other words; whoever meets a foreign word on the way undoes the claim. So a process killed in
 * the middle leaves one RES word with its number, from which the sweep frees whatever really belongs to the run.
 * Finding room is guided by a hint a block of 512 granules: an upper bound of its longest free run. Full blocks cost
 * one load, fragmented ones are scanned once per length until something in them is freed, and a run's length is
 * skipped in one step. Memory is backed block by block, lowest first; recently freed low granules are preferred,
 * being warm. Invariants
 *   - A granule word is read only in a block whose AF_B_WORDS bit was seen; granule memory is handed out only after
 *     AF_B_BACKED was seen set *after* the claim (af_punch_idle takes that bit away only while it holds the block).
 *   - A bound is never too low: a free stores its words, then raises the bound and moves the version; a scan lowers
 * it by CAS from the word it read before scanning.
 *   - granules_used counts a run from before it is claimed until after it is freed, so it only errs upwards. Every
 * change moves its version, and whoever is between a change of it and of the words says so in its `allocating` word:
 *     af_granules_recount corrects it only when it saw neither.
 */
#include "layout.h"

#define SMALL 256u /* runs up to this lie within one block */
#define STOCK 512u /* backed granules that ordinary allocations leave for critical ones */

static inline uint64_t block_first(uint64_t b) { return b * AF_BLOCK; }
static inline uint64_t block_end(const af_arena *a, uint64_t b) {
    uint64_t end = (b + 1) * AF_BLOCK;
    return end < a->g->granules ? end : a->g->granules;
}
static inline uint64_t int_word(uint64_t g) { return af_g_make(AF_G_INT, 0, 0, g); }
static inline uint64_t load_word(af_arena *a, uint64_t g) {
    return atomic_load_explicit(&a->granule_words[g], memory_order_acquire);
}
static uint32_t now_s(void) { return (uint32_t)(af_now_ns() / 1000000000u) + 1; }

#define USED_VERSION_ONE (1ull << 32)
uint64_t af_granules_used(const af_arena *a) {
    return (uint32_t)atomic_load_explicit(&a->h->granules_used, memory_order_relaxed);
}
/* Count n more; the sum after it. */
static uint64_t use(af_arena *a, uint64_t n) {
    return (uint32_t)(atomic_fetch_add_explicit(&a->h->granules_used, USED_VERSION_ONE + n, memory_order_seq_cst) +
                      n);
}
/* order: whoever takes adds first, here or in `use`, and then looks at the other's sum, all seq_cst: of two at once at
 *        least one sees both, so the two together never pass the limit.
 * crash: one writer, whose death ends everything; what it had counted and not yet kept is not there any more. */
int af_outside_take(af_arena *a, uint64_t bytes) {
    if (bytes > a->g->max_bytes) return AF_ENOSPC;
    uint64_t n = af_granules_for(bytes), limit = a->g->granules - a->g->keep;
    uint64_t sum = atomic_fetch_add_explicit(&a->h->outside, n, memory_order_seq_cst) + n;
    sum += (uint32_t)atomic_load_explicit(&a->h->granules_used, memory_order_seq_cst);
    if (sum <= limit) return AF_OK;
    atomic_fetch_sub_explicit(&a->h->outside, n, memory_order_seq_cst);
    return AF_ENOSPC;
}
void af_outside_give(af_arena *a, uint64_t bytes) {
    atomic_fetch_sub_explicit(&a->h->outside, af_granules_for(bytes), memory_order_seq_cst);
}
static uint64_t outside(const af_arena *a) { return atomic_load_explicit(&a->h->outside, memory_order_seq_cst); }
void af_granules_unuse(af_arena *a, uint64_t n) {
    atomic_fetch_add_explicit(&a->h->granules_used, USED_VERSION_ONE - n, memory_order_acq_rel);
}
/* A count, since another thread of this process may be unpinning, hence freeing, at the same time. */
static void allocating(af_arena *a, bool on) {
    if (on)
        atomic_fetch_add_explicit(&a->me->allocating, 1, memory_order_seq_cst);
    else
        atomic_fetch_sub_explicit(&a->me->allocating, 1, memory_order_release);
}

/* How far to go on from granule i, whose word x is not FREE. */
static uint64_t step_over(af_arena *a, uint64_t i, uint64_t x) {
    uint64_t first = i;
    if (af_g_kind(x) == AF_G_INT) {
        first = af_g_tag(x);
        if (first >= i) return 1;
        x = load_word(a, first);
        if (af_g_kind(x) != AF_G_RES && af_g_kind(x) != AF_G_COM) return 1;
    }
    uint64_t end = first + af_g_len(x);
    return end > i ? end - i : 1;
}

/* ------------------------------------------------------------------------------------------------ blocks ---- */

void af_block_note_free(af_arena *a, uint64_t b) {
    uint64_t w = atomic_load_explicit(&a->blocks[b], memory_order_relaxed), to;
    do {
        to = ((w & ~(uint64_t)AF_B_BOUND) | AF_BLOCK) + AF_B_VERSION_ONE;
    } while (
        !atomic_compare_exchange_weak_explicit(&a->blocks[b], &w, to, memory_order_acq_rel, memory_order_relaxed));
}

static void note_free_span(af_arena *a, uint64_t g, uint64_t n) {
    for (uint64_t b = g / AF_BLOCK; b <= (g + n - 1) / AF_BLOCK; b++) af_block_note_free(a, b);
}

static void block_lower(af_arena *a, uint64_t b, uint64_t seen, uint64_t bound) {
    if (bound >= (seen & AF_B_BOUND)) return;
    uint64_t to = (seen & ~(uint64_t)AF_B_BOUND) | bound;
    atomic_compare_exchange_strong_explicit(&a->blocks[b], &seen, to, memory_order_acq_rel, memory_order_relaxed);
}

/* crash: memory that was backed without the bit is backed again by whoever comes next; nothing is lost. */
static int block_back(af_arena *a, uint64_t b) {
    uint64_t w = atomic_load_explicit(&a->blocks[b], memory_order_acquire), to;
    if (w & AF_B_BACKED) return AF_OK;
    uint64_t first = block_first(b), n = block_end(a, b) - first;
    int r = AF_OK;
    if (!(w & AF_B_WORDS))
        r = af_back(a, a->g->granule_words_at + first * sizeof(af_word), AF_BLOCK * sizeof(af_word));
    if (!r) r = af_back(a, af_run_offset(a, first), n << AF_GRANULE_SHIFT);
    if (r) return r;
    AF_CP(block_backed);
    do {
        if (w & AF_B_BACKED) return AF_OK;
        to = ((w & ~(uint64_t)AF_B_BOUND) | AF_BLOCK | AF_B_BACKED | AF_B_WORDS) + AF_B_VERSION_ONE;
    } while (
        !atomic_compare_exchange_weak_explicit(&a->blocks[b], &w, to, memory_order_acq_rel, memory_order_acquire));
    atomic_fetch_add_explicit(&a->h->granules_ready, n, memory_order_relaxed);
    return AF_OK;
}

static void block_unmark(af_arena *a, uint64_t b) {
    uint64_t w = atomic_load_explicit(&a->blocks[b], memory_order_acquire), to;
    do {
        if (!(w & AF_B_BACKED)) return;
        to = (w & ~(uint64_t)AF_B_BACKED) + AF_B_VERSION_ONE;
    } while (
        !atomic_compare_exchange_weak_explicit(&a->blocks[b], &w, to, memory_order_acq_rel, memory_order_acquire));
    atomic_fetch_sub_explicit(&a->h->granules_ready, block_end(a, b) - block_first(b), memory_order_relaxed);
}

/* Back the lowest block that is not: its number, or a code. */
static int64_t back_another(af_arena *a) {
    for (uint64_t b = 0; b < a->g->blocks; b++) {
        if (atomic_load_explicit(&a->blocks[b], memory_order_relaxed) & AF_B_BACKED) continue;
        int r = block_back(a, b);
        return r ? r : (int64_t)b;
    }
    return AF_ENOSPC;
}

static int back_span(af_arena *a, uint64_t g, uint64_t n) {
    for (uint64_t b = g / AF_BLOCK; b <= (g + n - 1) / AF_BLOCK; b++) {
        int r = block_back(a, b);
        if (r) return r;
    }
    return AF_OK;
}

/* Granules that are backed and in nobody's run: a hint. */
static uint64_t stock(af_arena *a) {
    uint64_t ready = atomic_load_explicit(&a->h->granules_ready, memory_order_relaxed);
    uint64_t used = af_granules_used(a);
    return ready > used ? ready - used : 0;
}

/* ---------------------------------------------------------------------------------------------- claiming ---- */

/* Free the words of a run, last granule first, so that what is left is always a run with a head.
 * order: each store releases what the owner wrote into the granule to the next owner, which acquires by its CAS.
 * crash: the head still says RES(owner, n); the sweep frees what is still INT of this head, and the head. */
static void free_words(af_arena *a, uint64_t g, uint64_t n) {
    uint64_t word = af_g_make(AF_G_FREE, 0, now_s(), 0);
    for (uint64_t k = n; --k > 0;) {
        if (load_word(a, g + k) == int_word(g))
            atomic_store_explicit(&a->granule_words[g + k], word, memory_order_release);
        if (k == n / 2) AF_CP(run_half_freed);
    }
    AF_CP(run_before_head_freed);
    atomic_store_explicit(&a->granule_words[g], word, memory_order_release);
    note_free_span(a, g, n);
    af_cursor_back(&a->granule_cursor, g);
}

/* Make [g, g+n) a RES(me) run; false if somebody else is in the way. */
static bool claim(af_arena *a, uint64_t g, uint64_t n, uint32_t tag) {
    uint64_t x = load_word(a, g);
    if (af_g_kind(x) != AF_G_FREE) return false;
    if (!atomic_compare_exchange_strong_explicit(&a->granule_words[g], &x, af_g_make(AF_G_RES, a->proc, n, tag),
                                                 memory_order_acq_rel, memory_order_relaxed)) {
        return false;
    }
    AF_CP(run_claimed);
    for (uint64_t k = 1; k < n; k++) {
        uint64_t y = load_word(a, g + k);
        if (af_g_kind(y) != AF_G_FREE ||
            !atomic_compare_exchange_strong_explicit(&a->granule_words[g + k], &y, int_word(g), memory_order_acq_rel,
                                                     memory_order_relaxed)) {
            free_words(a, g, k);
            return false;
        }
        if (k == n / 2) AF_CP(run_half_claimed);
    }
    return true;
}

/* A small run in block b, looking from granule `from` on: its first granule, or -1. */
static int64_t take_in_block(af_arena *a, uint64_t b, uint64_t n, uint64_t from, uint32_t tag) {
    uint64_t seen = atomic_load_explicit(&a->blocks[b], memory_order_acquire);
    if (!(seen & AF_B_BACKED) || (seen & AF_B_BOUND) < n) return -1;
    uint64_t end = block_end(a, b), run = 0, longest = 0;
    bool raced = false;
    for (uint64_t i = from; i < end;) {
        uint64_t x = load_word(a, i);
        if (af_g_kind(x) != AF_G_FREE) {
            i += step_over(a, i, x);
            run = 0;
            continue;
        }
        i++;
        if (++run > longest) longest = run;
        if (run < n) continue;
        if (claim(a, i - n, n, tag)) return (int64_t)(i - n);
        raced = true;
        run = 0;
    }
    if (from == block_first(b) && !raced) block_lower(a, b, seen, longest);
    return -1;
}

static int64_t take_small(af_arena *a, uint64_t n, uint32_t tag) {
    uint64_t from = atomic_load_explicit(&a->granule_cursor, memory_order_relaxed), home = from / AF_BLOCK;
    if (home < a->g->blocks) {
        int64_t g = take_in_block(a, home, n, from, tag);
        if (g >= 0) return g;
    }
    for (uint64_t b = 0; b < a->g->blocks; b++) {
        uint64_t w = atomic_load_explicit(&a->blocks[b], memory_order_relaxed);
        if (!(w & AF_B_BACKED) || (w & AF_B_BOUND) < n) continue;
        int64_t g = take_in_block(a, b, n, block_first(b), tag);
        if (g >= 0) return g;
    }
    for (;;) { /* each turn backs a block, so it ends */
        int64_t b = back_another(a);
        if (b < 0) return b;
        int64_t g = take_in_block(a, (uint64_t)b, n, block_first((uint64_t)b), tag);
        if (g >= 0) return g;
    }
}

/* Can a run of more than SMALL granules have its larger part in block b? Any such run has a part of `part` granules
 * in one block: half of it where it spans two, a whole block where it spans more. */
static bool may_anchor(af_arena *a, uint64_t b, uint64_t part, bool cold) {
    if (b >= a->g->blocks) return false;
    uint64_t w = atomic_load_explicit(&a->blocks[b], memory_order_relaxed);
    return w & AF_B_BACKED ? (w & AF_B_BOUND) >= part : cold;
}

/* Scan block b for the run that began `*run` granules before it. Found: its first granule; else -1 and *run is the
 * free tail of the block. */
static int64_t take_across(af_arena *a, uint64_t b, uint64_t n, uint32_t tag, uint64_t *run) {
    uint64_t seen = atomic_load_explicit(&a->blocks[b], memory_order_acquire), first = block_first(b), longest = 0;
    uint64_t end = block_end(a, b), i = first;
    bool raced = false;
    while (i < end) {
        uint64_t skip = end - i; /* a block without words yet is all free */
        if (seen & AF_B_WORDS) {
            uint64_t x = load_word(a, i);
            if (af_g_kind(x) != AF_G_FREE) {
                i += step_over(a, i, x);
                *run = 0;
                continue;
            }
            skip = 1;
        }
        i += skip;
        *run += skip;
        uint64_t inside = *run < i - first ? *run : i - first;
        if (inside > longest) longest = inside;
        if (*run < n) continue;
        uint64_t g = i - *run;
        int r = back_span(a, g, n);
        if (r) return r == AF_ENOSPC ? AF_ENOSPC : AF_ESYS;
        if (claim(a, g, n, tag)) return (int64_t)g;
        raced = true;
        *run = 0;
    }
    if (seen & AF_B_BACKED && !raced) block_lower(a, b, seen, longest);
    if (i > end) *run = 0; /* a run of somebody reaches into the next block */
    return -1;
}

/* A run of more than SMALL granules; `cold`: blocks that would have to be backed count too. */
static int64_t take_large(af_arena *a, uint64_t n, uint32_t tag, bool cold) {
    uint64_t part = n >= 2 * AF_BLOCK - 1 ? AF_BLOCK : (n + 1) / 2, run = 0;
    for (uint64_t b = 0; b < a->g->blocks; b++) {
        bool backed = atomic_load_explicit(&a->blocks[b], memory_order_relaxed) & AF_B_BACKED;
        if (!backed && !cold) {
            run = 0;
            continue;
        }
        if (!run && !may_anchor(a, b, part, cold) && !may_anchor(a, b + 1, part, cold)) continue;
        int64_t g = take_across(a, b, n, tag, &run);
        if (g != -1) return g;
    }
    return AF_ENOENT;
}

/* ------------------------------------------------------------------------------------------------- runs ----- */

/* The claim is checked against the memory bit afterwards, since a punch may have come and gone between the look at
 * the block and the claim. */
static int64_t take_backed(af_arena *a, uint64_t n, uint32_t tag) {
    int64_t g;
    if (n <= SMALL) {
        g = take_small(a, n, tag);
    } else {
        g = take_large(a, n, tag, false);
        if (g == AF_ENOENT) g = take_large(a, n, tag, true);
        if (g == AF_ENOENT) g = AF_ENOSPC;
    }
    if (g < 0) return g;
    int r = back_span(a, (uint64_t)g, n);
    if (r) {
        free_words(a, (uint64_t)g, n);
        return r;
    }
    atomic_store_explicit(&a->granule_cursor, (uint64_t)g + n, memory_order_relaxed);
    return g;
}

int64_t af_run_take(af_arena *a, uint64_t n, uint32_t tag, uint32_t options) {
    bool critical = options & AF_CRITICAL;
    uint64_t limit = critical ? a->g->granules : a->g->granules - a->g->keep;
    if (n == 0 || n > limit) return AF_ENOSPC;
    allocating(a, true);
    int64_t g = use(a, n) + outside(a) > limit ? AF_ENOSPC : AF_OK;
    uint64_t leave = a->g->keep < STOCK ? a->g->keep : STOCK;
    while (g == AF_OK && !critical && stock(a) < leave) {
        if (atomic_load_explicit(&a->h->granules_ready, memory_order_relaxed) >= a->g->granules) break;
        int64_t b = back_another(a);
        if (b < 0) g = b; /* what is backed is left to critical allocations */
    }
    if (g == AF_OK) g = take_backed(a, n, tag);
    if (g < 0) af_granules_unuse(a, n);
    allocating(a, false);
    return g;
}

void af_run_free(af_arena *a, uint64_t g) {
    uint64_t n = af_g_len(load_word(a, g));
    allocating(a, true);
    free_words(a, g, n);
    af_granules_unuse(a, n);
    allocating(a, false);
}

/* The sweep's: the word is RES of a dead process, which nobody else touches. A block that was being punched has lost
 * its memory, perhaps, so it must be backed before it is used again. */
void af_run_free_dead(af_arena *a, uint64_t g, uint64_t word) {
    if (af_g_tag(word) == AF_TAG_PUNCH) {
        block_unmark(a, g / AF_BLOCK);
        free_words(a, g, af_g_len(word));
        return;
    }
    af_run_free(a, g);
}

void af_run_commit(af_arena *a, uint64_t g) {
    uint64_t x = load_word(a, g);
    if (af_g_kind(x) != AF_G_RES || af_g_owner(x) != a->proc) return;
    atomic_compare_exchange_strong_explicit(&a->granule_words[g], &x,
                                            af_g_make(AF_G_COM, 0, af_g_len(x), af_g_tag(x)), memory_order_acq_rel,
                                            memory_order_relaxed);
}

bool af_run_retake(af_arena *a, uint64_t g, uint32_t as) {
    uint64_t x = load_word(a, g);
    if (af_g_kind(x) == AF_G_RES) return af_g_owner(x) == as;
    if (af_g_kind(x) != AF_G_COM) return false;
    return atomic_compare_exchange_strong_explicit(&a->granule_words[g], &x,
                                                   af_g_make(AF_G_RES, as, af_g_len(x), af_g_tag(x)),
                                                   memory_order_acq_rel, memory_order_relaxed);
}

/* crash: between the first freed tail granule and the head's new length the run claims too much; af_run_repair tells
 * the sweep where it really ends, and a free passes over words that are not its INTs. */
void af_run_trim(af_arena *a, uint64_t g, uint64_t keep) {
    uint64_t x = load_word(a, g), n = af_g_len(x);
    if (keep >= n) return;
    uint64_t word = af_g_make(AF_G_FREE, 0, now_s(), 0);
    allocating(a, true);
    for (uint64_t k = n; --k >= keep;) {
        atomic_store_explicit(&a->granule_words[g + k], word, memory_order_release);
        if (k == (n + keep) / 2) AF_CP(run_half_trimmed);
    }
    atomic_store_explicit(&a->granule_words[g], af_g_make(AF_G_RES, a->proc, keep, af_g_tag(x)),
                          memory_order_release);
    note_free_span(a, g + keep, n - keep);
    af_granules_unuse(a, n - keep);
    allocating(a, false);
    af_cursor_back(&a->granule_cursor, g + keep);
}

uint64_t af_run_repair(af_arena *a, uint64_t g, uint64_t len) {
    uint64_t n = 1;
    while (n < len && load_word(a, g + n) == int_word(g)) n++;
    return n;
}

int64_t af_run_of(af_arena *a, uint64_t offset) {
    if (offset < a->g->heap_at || offset >= a->g->total_bytes) return -1;
    uint64_t g = (offset - a->g->heap_at) >> AF_GRANULE_SHIFT;
    if (g >= a->g->granules) return -1;
    if (!(atomic_load_explicit(&a->blocks[g / AF_BLOCK], memory_order_acquire) & AF_B_WORDS)) return -1;
    uint64_t x = load_word(a, g);
    if (af_g_kind(x) == AF_G_INT) {
        g = af_g_tag(x);
        x = g < a->g->granules ? load_word(a, g) : 0;
    }
    return af_g_kind(x) == AF_G_RES || af_g_kind(x) == AF_G_COM ? (int64_t)g : -1;
}

static bool anyone_allocating(af_arena *a) {
    for (uint32_t p = 0; p < AF_MAX_PROCS; p++) {
        if (atomic_load_explicit(&a->h->process[p].allocating, memory_order_seq_cst)) return true;
    }
    return false;
}

/* Make granules_used what the words say, if nobody was between the two while we counted; else it keeps its error,
 * which is upwards and at most a run a death, until the next sweep. */
void af_granules_recount(af_arena *a) {
    for (int turn = 0; turn < 3; turn++) {
        uint64_t before = atomic_load_explicit(&a->h->granules_used, memory_order_seq_cst), n = 0;
        if (anyone_allocating(a)) continue;
        for (uint64_t b = 0; b < a->g->blocks; b++) {
            if (!(atomic_load_explicit(&a->blocks[b], memory_order_acquire) & AF_B_WORDS)) continue;
            for (uint64_t i = block_first(b), end = block_end(a, b); i < end; i++) {
                uint64_t x = load_word(a, i);
                uint32_t kind = af_g_kind(x);
                if ((kind == AF_G_RES && af_g_tag(x) != AF_TAG_PUNCH) || kind == AF_G_COM) n += af_g_len(x);
            }
        }
        if (anyone_allocating(a)) continue;
        uint64_t right = (before & ~(uint64_t)UINT32_MAX) | n;
        if (atomic_compare_exchange_strong_explicit(&a->h->granules_used, &before, right, memory_order_seq_cst,
                                                    memory_order_relaxed)) {
            return;
        }
    }
}

/* --------------------------------------------------------------------------------------- coming and going ---- */

int64_t af_prefault(af_arena *a, uint64_t bytes) {
    uint64_t want = bytes >> AF_GRANULE_SHIFT;
    int64_t done = 0;
    while (stock(a) < want) {
        int64_t b = back_another(a);
        if (b == AF_ENOSPC) break;
        if (b < 0) return b;
        done += (int64_t)(block_end(a, (uint64_t)b) - block_first((uint64_t)b));
    }
    return done;
}

/* All free, and what was ever used of it free for so long. A block that was backed ahead and never used stays. */
static bool block_idle(af_arena *a, uint64_t b, uint64_t idle_s) {
    uint64_t now = now_s(), used = 0;
    for (uint64_t i = block_first(b), end = block_end(a, b); i < end; i++) {
        uint64_t x = load_word(a, i), freed = af_g_len(x);
        if (af_g_kind(x) != AF_G_FREE || (freed && now - freed < idle_s)) return false;
        used += freed != 0;
    }
    return used > 0;
}

/* crash: a block that died RES(tag PUNCH) is unmarked by the sweep before it is freed, whether or not its memory was
 * already gone: backing memory that is there costs nothing. */
int64_t af_punch_idle(af_arena *a, uint64_t idle_ns, uint64_t max_granules) {
    uint64_t done = 0, leave = a->g->granules / 4 < 2048 ? a->g->granules / 4 : 2048;
    for (uint64_t b = a->g->blocks; b-- > 0;) {
        uint64_t first = block_first(b), n = block_end(a, b) - first;
        if (done + n > max_granules || stock(a) < leave + n) break;
        if (!(atomic_load_explicit(&a->blocks[b], memory_order_acquire) & AF_B_BACKED)) continue;
        if (!block_idle(a, b, idle_ns / 1000000000u) || !claim(a, first, n, AF_TAG_PUNCH)) continue;
        AF_CP(punch_claimed);
        int r = af_unback(a, af_run_offset(a, first), n << AF_GRANULE_SHIFT);
        AF_CP(punch_punched);
        if (!r) block_unmark(a, b);
        AF_CP(punch_cold);
        free_words(a, first, n);
        if (r) return r;
        done += n;
    }
    return (int64_t)done;
}
