/* mapping.c: the file under the arena: its geometry, making it, mapping it, and making its memory real.
 *
 * Theory: the file is as large as the arena may ever get (ftruncate) but has no memory. The parts in front (header,
 * index, hints) are backed at creation; slots and granules when first needed, by any process, through fallocate,
 * which is idempotent and says ENOSPC where touching a page would be SIGBUS. Invariants
 *   - The geometry is a pure function of (max_bytes, session_slots, shard_slots): attach computes it again and
 * compares every field, so that two builds that disagree about one offset never share an arena.
 *   - Nothing here keeps a pointer into shared memory.
 */
#include "layout.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static uint64_t clamp(uint64_t v, uint64_t low, uint64_t high) { return v < low ? low : v > high ? high : v; }

static uint64_t power_of_two_from(uint64_t n) {
    uint64_t p = 64;
    while (p < n) p <<= 1;
    return p;
}

/* Place a region of `bytes` at the next page. */
static uint64_t place(uint64_t *end, uint64_t bytes) {
    uint64_t at = *end;
    *end = af_align(at + bytes, AF_PAGE);
    return at;
}

static int geometry_make(af_geometry *g, uint64_t max_bytes, uint64_t session_slots, uint64_t shard_slots) {
    if (max_bytes < 256 * 1024 || max_bytes >> 40 || session_slots > 1 << 22 || shard_slots > 1 << 22)
        return AF_EINVAL;
    if (!session_slots) session_slots = clamp(max_bytes / 8192, 1024, 262144);
    if (!shard_slots) shard_slots = clamp(2 * session_slots, 1024, 1048576);
    memset(g, 0, sizeof *g);
    g->magic = AF_MAGIC;
    g->version = AF_LAYOUT_VERSION;
    g->max_bytes = max_bytes;
    g->session_slots = af_align(session_slots, AF_BLOCK);
    g->shard_slots = af_align(shard_slots, AF_BLOCK);
    g->slots = g->session_slots + g->shard_slots;
    g->granules = max_bytes >> AF_GRANULE_SHIFT;
    g->blocks = (g->granules + AF_BLOCK - 1) / AF_BLOCK;
    g->keep = g->granules / 16 < 64 ? 64 : g->granules / 16;
    if (g->keep > g->granules / 4) g->keep = g->granules / 4;
    uint64_t entries = 2 * g->session_slots + g->shard_slots;
    g->buckets = power_of_two_from(entries / 4);
    g->overflow = g->buckets / 2 + 64;
    g->hints = power_of_two_from(g->session_slots);

    uint64_t end = 0;
    g->header_at = place(&end, sizeof(af_header));
    g->words_at = place(&end, (uint64_t)AF_WORDS * AF_LINE);
    g->txns_at = place(&end, AF_TXNS * sizeof(af_word));
    g->slot_blocks_at = place(&end, g->slots / AF_BLOCK * sizeof(af_word));
    g->blocks_at = place(&end, g->blocks * sizeof(af_word));
    g->buckets_at = place(&end, (g->buckets + g->overflow) * sizeof(af_bucket));
    g->hints_at = place(&end, g->hints * sizeof(af_hint));
    g->ctl_at = place(&end, g->slots * sizeof(af_word));
    g->touch_at = place(&end, g->slots * sizeof(af_word));
    g->slots_at = place(&end, g->slots * sizeof(af_slot));
    g->granule_words_at = place(&end, g->blocks * AF_BLOCK * sizeof(af_word));
    g->heap_at = place(&end, g->granules << AF_GRANULE_SHIFT);
    g->total_bytes = end;
    return AF_OK;
}

/* ------------------------------------------------------------------------------------------------ memory ---- */

int af_back(af_arena *a, uint64_t at, uint64_t bytes) {
    if (AF_FAULT()) return AF_ENOSPC;
    uint64_t from = at & ~(uint64_t)(AF_PAGE - 1);
    int r;
    do { r = fallocate(a->map->fd, 0, (off_t)from, (off_t)(at + bytes - from)); } while (r && errno == EINTR);
    if (!r) return AF_OK;
    return errno == ENOSPC || errno == ENOMEM || errno == EFBIG || errno == EDQUOT ? AF_ENOSPC : AF_ESYS;
}

int af_unback(af_arena *a, uint64_t at, uint64_t bytes) {
    int r;
    do {
        r = fallocate(a->map->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)bytes);
    } while (r && errno == EINTR);
    return r ? AF_ESYS : AF_OK;
}

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize("thread"), noinline)) void af_racy_copy(void *to, const void *from, size_t n) {
    /* Not memcpy: the sanitizer's own would report the race that the caller's validation makes harmless. */
    unsigned char *t = to;
    const volatile unsigned char *f = from;
    for (size_t i = 0; i < n; i++) t[i] = f[i];
}
#else
void af_racy_copy(void *to, const void *from, size_t n) {
    memcpy(to, from, n);
    atomic_signal_fence(memory_order_seq_cst); /* the copy stays before the caller's validation */
}
#endif

/* ----------------------------------------------------------------------------------------------- handles ---- */

static void bind_regions(af_arena *a) {
    af_header *h = (af_header *)(void *)a->base;
    const af_geometry *g = &h->geometry;
    a->h = h;
    a->g = g;
    a->me = &h->process[a->proc];
    a->words = (af_word *)(void *)(a->base + g->words_at);
    a->txns = (af_word *)(void *)(a->base + g->txns_at);
    a->slot_blocks = (af_word *)(void *)(a->base + g->slot_blocks_at);
    a->blocks = (af_word *)(void *)(a->base + g->blocks_at);
    a->buckets = (af_bucket *)(void *)(a->base + g->buckets_at);
    a->hints = (af_hint *)(void *)(a->base + g->hints_at);
    a->ctl = (af_word *)(void *)(a->base + g->ctl_at);
    a->touch = (af_word *)(void *)(a->base + g->touch_at);
    a->slots = (af_slot *)(void *)(a->base + g->slots_at);
    a->granule_words = (af_word *)(void *)(a->base + g->granule_words_at);
    a->txn_cursor = (uint64_t)a->proc * (AF_TXNS / AF_MAX_PROCS);
}

static int pins_make(af_arena *a) {
    a->pins = calloc(a->g->slots, sizeof *a->pins);
    return a->pins ? AF_OK : AF_ESYS;
}

/* A handle on `map`; takes over the mapping's reference also when it fails. */
static int handle_make(af_mapping *map, uint32_t proc, af_arena **out) {
    af_arena *a = calloc(1, sizeof *a);
    if (!a) return AF_ESYS;
    a->map = map;
    a->base = map->base;
    a->proc = proc;
    *out = a;
    return AF_OK;
}

static void mapping_drop(af_mapping *map) {
    if (atomic_fetch_sub(&map->refs, 1) != 1) return;
    if (map->base) munmap(map->base, map->size);
    close(map->fd);
    free(map);
}

/* Map `size` bytes of a duplicate of `fd`. */
static int mapping_make(int fd, size_t size, af_mapping **out) {
    af_mapping *map = calloc(1, sizeof *map);
    if (!map) return AF_ESYS;
    atomic_init(&map->refs, 1);
    map->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (map->fd < 0) {
        free(map);
        return AF_ESYS;
    }
    map->size = size;
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, map->fd, 0);
    if (base == MAP_FAILED) {
        mapping_drop(map);
        return AF_ESYS;
    }
    map->base = base;
    *out = map;
    return AF_OK;
}

/* Write header and free chains into fresh, backed memory. Nobody else has the file yet. */
static int header_make(af_arena *a, const af_geometry *g) {
    af_header *h = (af_header *)(void *)a->base;
    h->geometry = *g;
    if (getrandom(h->seed, sizeof h->seed, 0) != (ssize_t)sizeof h->seed) return AF_ESYS;
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    int r = pthread_mutex_init(&h->index_mutex, &attr);
    pthread_mutexattr_destroy(&attr);
    if (r) return AF_ESYS;
    bind_regions(a);
    for (uint64_t i = 0; i < g->slots / AF_BLOCK; i++) atomic_init(&a->slot_blocks[i], 1);
    for (uint64_t i = 0; i < g->overflow; i++) {
        atomic_init(&a->buckets[g->buckets + i].next, i + 1 < g->overflow ? g->buckets + i + 1 : 0);
    }
    atomic_init(&h->overflow_free, g->buckets);
    return AF_OK;
}

int af_create_in(int fd, uint64_t max_bytes, uint32_t session_slots, uint32_t shard_slots, uint32_t proc,
                 af_arena **out) {
    af_geometry g;
    af_mapping *map;
    af_arena *a = NULL;
    *out = NULL;
    if (proc >= AF_MAX_PROCS) return AF_EINVAL;
    int r = geometry_make(&g, max_bytes, session_slots, shard_slots);
    if (r) return r;
    struct stat st;
    if (fstat(fd, &st)) return AF_ESYS;
    if (st.st_size != 0) return AF_EINVAL;
    if (ftruncate(fd, (off_t)g.total_bytes)) return errno == EFBIG || errno == ENOSPC ? AF_ENOSPC : AF_ESYS;
    r = mapping_make(fd, g.total_bytes, &map);
    if (r) return r;
    r = handle_make(map, proc, &a);
    if (r) {
        mapping_drop(map);
        return r;
    }
    r = af_back(a, 0, g.ctl_at);
    if (!r) r = header_make(a, &g);
    if (!r) r = pins_make(a);
    if (r) {
        af_close(a);
        return r;
    }
    *out = a;
    return AF_OK;
}

int af_create(uint64_t max_bytes, uint32_t session_slots, uint32_t shard_slots, uint32_t proc, af_arena **out) {
    *out = NULL;
    int fd = memfd_create("areal_fast", MFD_CLOEXEC);
    if (fd < 0) return AF_ESYS;
    int r = af_create_in(fd, max_bytes, session_slots, shard_slots, proc, out);
    close(fd);
    return r;
}

int af_attach(int fd, uint32_t proc, af_arena **out) {
    *out = NULL;
    if (proc >= AF_MAX_PROCS) return AF_EINVAL;
    struct stat st;
    if (fstat(fd, &st)) return AF_ESYS;
    if (st.st_size < (off_t)sizeof(af_header)) return AF_ELAYOUT;
    af_geometry found, wanted;
    if (pread(fd, &found, sizeof found, 0) != (ssize_t)sizeof found) return AF_ELAYOUT;
    if (found.magic != AF_MAGIC || found.version != AF_LAYOUT_VERSION) return AF_ELAYOUT;
    if (found.total_bytes != (uint64_t)st.st_size) return AF_ELAYOUT;
    if (geometry_make(&wanted, found.max_bytes, found.session_slots, found.shard_slots) ||
        memcmp(&found, &wanted, sizeof found)) {
        return AF_ELAYOUT;
    }
    af_mapping *map;
    af_arena *a;
    int r = mapping_make(fd, found.total_bytes, &map);
    if (r) return r;
    r = handle_make(map, proc, &a);
    if (r) {
        mapping_drop(map);
        return r;
    }
    bind_regions(a);
    r = pins_make(a);
    if (r) {
        af_close(a);
        return r;
    }
    *out = a;
    return AF_OK;
}

int af_clone(const af_arena *from, uint32_t proc, af_arena **out) {
    *out = NULL;
    if (proc >= AF_MAX_PROCS) return AF_EINVAL;
    af_arena *a;
    int r = handle_make(from->map, proc, &a);
    if (r) return r;
    atomic_fetch_add(&from->map->refs, 1);
    bind_regions(a);
    r = pins_make(a);
    if (r) {
        af_close(a);
        return r;
    }
    *out = a;
    return AF_OK;
}

void af_close(af_arena *a) {
    if (!a) return;
    mapping_drop(a->map);
    free((void *)a->pins);
    free(a);
}

int af_fileno(const af_arena *a) { return a->map->fd; }
uint32_t af_proc(const af_arena *a) { return a->proc; }
uint32_t af_session_slots(const af_arena *a) { return (uint32_t)a->g->session_slots; }
uint32_t af_shard_slots(const af_arena *a) { return (uint32_t)a->g->shard_slots; }

uint64_t af_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

const char *af_strerror(int code) {
    switch (code) {
    case AF_OK:
        return "ok";
    case AF_ENOSPC:
        return "the arena is full";
    case AF_EBUSY:
        return "busy, try again";
    case AF_EEXIST:
        return "the name is bound to another live slot";
    case AF_EMOVED:
        return "the log's head has moved";
    case AF_EGONE:
        return "closing or gone";
    case AF_ETRIMMED:
        return "the log was compacted since";
    case AF_ELAYOUT:
        return "not an arena of this layout";
    case AF_EINVAL:
        return "argument out of range";
    case AF_ENOENT:
        return "no such name";
    case AF_ECORRUPT:
        return "a record fails its checks";
    case AF_ESYS:
        return "a system call failed";
    default:
        return "unknown code";
    }
}
