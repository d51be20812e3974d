/* fuzz.c: processes at work on one arena are killed at random for some seconds: from outside, at a random pass of a
 * crash point, in the middle of a sweep; or stopped for a while. Then everything they were told is looked for.
 *
 * Workers start sessions and groups, append, reserve, compact (keeping every record), export pairs of sessions,
 * remove sessions, store, read and clear shards. A cleaner detaches idle sessions, dumps them (into shared memory;
 * one store is the rename), frees them, gives memory back. What was acknowledged is noted by each process in shared
 * memory. Expected in the end: every acknowledged append is exactly once in a live log or a dump, unless its session
 * was removed on purpose; every export that was acknowledged is COMMITTED, none is pending; no granule, pin, slot,
 * transaction or index entry is left over.
 *
 * fuzz [seconds]; SEED=n as printed (the schedule of a busy machine is never quite the same again).
 */
#include "check.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

enum {
    WORKERS = 3,
    PLACES = 24,
    UIDS = 1 << 22,
    ACKS = 1 << 23,
    DUMP_WORDS = 1 << 25,
    EXPORTS = 1 << 22,
    SHARDS = 6
};

typedef struct {
    uint64_t serial;
    uint32_t uid;
} ack;

typedef struct {
    _Atomic uint64_t acked[WORKERS]; /* how many of `acks` count */
    ack acks[WORKERS][ACKS];
    _Atomic uint32_t uids, exports;
    _Atomic uint32_t at[PLACES];       /* the uid of the session last started in a place: a hint */
    _Atomic uint8_t removed[UIDS];     /* its removal was asked for */
    _Atomic uint64_t dumped[UIDS];     /* first word << 24 | words: the "rename" */
    _Atomic uint8_t exported[EXPORTS]; /* 1 committed, 2 aborted, as acknowledged */
    _Atomic uint64_t dump_used;
    uint64_t dump[DUMP_WORDS];
} ledger;

static ledger *book;
static af_arena *arena;

static uint32_t key_of(char key[32], uint32_t place, uint32_t uid) {
    return (uint32_t)snprintf(key, 32, "key %u %u", place, uid);
}

/* ------------------------------------------------------------------------------------------------ worker ----- */

static void start_group(af_arena *a) {
    uint32_t slots[3], n = 0;
    int64_t ref = af_txn_begin(a);
    if (ref < 0) return;
    while (n < 3) {
        af_started out;
        if (af_session_start(a, "group", 5, "", 0, (uint64_t)ref, -1, &out)) break;
        slots[n++] = out.slot;
    }
    if (n < 3 || ref % 3 == 0) {
        OK(af_txn_abort(a, (uint64_t)ref, slots, n));
        return;
    }
    OK(af_txn_commit(a, (uint64_t)ref));
    int r;
    while ((r = af_txn_finish(a, (uint64_t)ref, slots, n)) == AF_EBUSY) sched_yield();
    OK(r);
}

static int64_t pin_place(af_arena *a, uint32_t place, uint32_t *uid) {
    char key[32];
    *uid = atomic_load(&book->at[place]);
    uint32_t n = key_of(key, place, *uid);
    int64_t s = *uid ? af_pin_key(a, key, n) : AF_ENOENT;
    if (s >= 0) return s;
    *uid = atomic_fetch_add(&book->uids, 1) + 1;
    while (*uid >= UIDS) pause();
    af_started out;
    n = key_of(key, place, *uid);
    int r = af_session_start(a, "task", 4, key, n, 0, -1, &out);
    if (r == AF_ENOSPC) nanosleep(&(struct timespec){0, 2000000}, NULL); /* let the cleaner free some */
    if (r) return AF_ENOENT;
    atomic_store(&book->at[place], *uid);
    return af_pin_key(a, key, n);
}

static void compact(af_arena *a, uint32_t s) {
    af_log_view view = {0};
    uint64_t head;
    OK(af_log_read(a, s, 0, &view));
    uint64_t *keep = malloc((view.count + 1) * sizeof *keep);
    uint32_t n = 0;
    for (size_t i = 0; i < view.count; i++) {
        if (view.records[i].type == 2) keep[n++] = view.records[i].offset;
    }
    int r = af_log_compact(a, s, view.head, "cut", 3, keep, n, &head);
    CHECK(r == AF_OK || r == AF_EMOVED || r == AF_EBUSY || r == AF_EGONE || r == AF_ENOSPC, "%d", r);
    free(keep);
    af_log_view_free(&view);
}

static void export_pair(af_arena *a, uint32_t s, uint64_t random) {
    uint32_t uid, slots[2] = {s, 0}, n = 1;
    int64_t second = pin_place(a, (uint32_t)(random % PLACES), &uid);
    if (second >= 0) slots[n++] = (uint32_t)second;
    uint32_t id = atomic_fetch_add(&book->exports, 1) + 1;
    int64_t ref = af_txn_begin(a);
    bool good = ref >= 0 && id < EXPORTS;
    for (uint32_t i = 0; i < n && good; i++) {
        uint64_t head;
        af_new_record rec = {.type = AF_REC_EXPORTING, .aux = (uint64_t)ref, .meta = &id, .meta_len = sizeof id};
        good = af_log_append(a, slots[i], &rec, AF_LOG_ANY, AF_CRITICAL, 0, &head) == AF_OK;
    }
    if (good && random % 4) {
        OK(af_txn_commit(a, (uint64_t)ref));
        atomic_store(&book->exported[id], 1);
        int r;
        while ((r = af_txn_finish(a, (uint64_t)ref, slots, n)) == AF_EBUSY) sched_yield();
        OK(r);
    } else if (ref >= 0) {
        OK(af_txn_abort(a, (uint64_t)ref, slots, n));
        if (id < EXPORTS) atomic_store(&book->exported[id], 2);
    }
    if (second >= 0) af_unpin(a, (uint32_t)second);
}

static void shard_work(af_arena *a, uint64_t random) {
    char id[16];
    uint8_t body[3000], want[3000];
    const void *meta, *data;
    uint32_t meta_len, bits, len = (uint32_t)snprintf(id, sizeof id, "shard-%d", (int)(random % SHARDS));
    uint64_t size, serial = random;
    if (random % 7 == 0) {
        fill(body, sizeof body, serial);
        int64_t s = af_shard_put(a, id, len, &serial, 8, &(af_span){body, sizeof body}, 1, 2, 0);
        CHECK(s >= 0 || s == AF_EBUSY || s == AF_ENOSPC, "%d", (int)s);
        return;
    }
    int64_t s = af_pin_shard(a, id, len);
    if (s < 0) return;
    OK(af_shard_get(a, (uint32_t)s, &meta, &meta_len, &data, &size, &bits));
    memcpy(&serial, meta, 8);
    fill(want, sizeof want, serial);
    CHECK(size == sizeof want && !memcmp(want, data, size), "torn shard");
    bool was, all = false;
    if (random % 5 == 0) OK(af_shard_clear_bit(a, (uint32_t)s, random % 2, &was, &all));
    if (all) af_shard_close(a, (uint32_t)s);
    af_unpin(a, (uint32_t)s);
}

_Noreturn static void work(af_arena *a, uint64_t random) {
    uint64_t count = atomic_load(&book->acked[a->proc]), serial = ((uint64_t)a->proc << 56) | (random << 20 >> 8);
    for (;;) {
        uint32_t uid, place = (uint32_t)(next_random(&random) % PLACES);
        uint64_t what = next_random(&random) % 64, head;
        while (count == ACKS) pause(); /* the ledger is full: enough was done */
        if (what < 10) shard_work(a, next_random(&random));
        if (what == 10 && next_random(&random) % 8 == 0) start_group(a);
        int64_t s = pin_place(a, place, &uid);
        if (s < 0) continue;
        af_touch(a, (uint32_t)s);
        size_t n = next_random(&random) % (what % 4 ? 300 : 12000);
        int64_t reserved = what % 5 == 0 ? af_reserve(a, (uint32_t)s, 8192) : 0;
        uint64_t expect = what % 2 ? AF_LOG_ANY : af_log_head(a, (uint32_t)s);
        int r = append_serial(a, (uint32_t)s, ++serial, n, expect, reserved > 0 ? (uint64_t)reserved : 0, &head);
        CHECK(r == AF_OK || r == AF_EMOVED || r == AF_EGONE || r == AF_ENOSPC, "%d", r);
        if (r == AF_OK) {
            book->acks[a->proc][count] = (ack){serial, uid};
            atomic_store(&book->acked[a->proc], ++count);
        } else if (reserved > 0) {
            OK(af_release(a, (uint64_t)reserved));
        }
        if (what == 20 || what == 21) compact(a, (uint32_t)s);
        if (what == 22 || what == 23) export_pair(a, (uint32_t)s, next_random(&random));
        if (what == 24 && next_random(&random) % 8 == 0) {
            atomic_store(&book->removed[uid], 1);
            r = af_session_close(a, (uint32_t)s);
            CHECK(r == AF_OK || r == AF_EGONE, "%d", r);
        }
        if (what == 25 && next_random(&random) % 4 == 0)
            atomic_store(&book->at[place], 0); /* left alone, it goes stale */
        af_unpin(a, (uint32_t)s);
    }
}

/* ------------------------------------------------------------------------------------------------ cleaner ---- */

static uint32_t uid_of(const af_slot_info *info) {
    char key[32];
    unsigned place, uid = 0;
    snprintf(key, sizeof key, "%.*s", (int)info->key_len, info->key);
    return sscanf(key, "key %u %u", &place, &uid) == 2 ? uid : 0; /* members of groups have none */
}

static void check_exports(const af_log_view *view) {
    for (size_t i = 0; i < view->count; i++) {
        const af_record *record = &view->records[i];
        if (record->type != AF_REC_EXPORTING) continue;
        uint32_t id;
        memcpy(&id, view->meta + record->meta_at, sizeof id);
        uint8_t said = atomic_load(&book->exported[id]);
        CHECK(record->outcome != AF_OUTCOME_PENDING, "export %u is pending", id);
        CHECK(said != 1 || record->outcome == AF_OUTCOME_COMMITTED, "export %u was committed", id);
        CHECK(said != 2 || record->outcome == AF_OUTCOME_ABORTED, "export %u was aborted", id);
    }
}

static void finish_detached(af_arena *a, uint32_t s) {
    af_slot_info info;
    af_log_view view = {0};
    OK(af_slot_get(a, s, &info));
    uint32_t uid = uid_of(&info);
    OK(af_log_verify(a, s));
    OK(af_log_read(a, s, 0, &view));
    check_exports(&view);
    uint64_t first = atomic_fetch_add(&book->dump_used, view.count), n = 0;
    while (first + view.count > DUMP_WORDS) pause();
    for (size_t i = 0; i < view.count; i++) {
        if (view.records[i].type == 2) memcpy(&book->dump[first + n++], view.meta + view.records[i].meta_at, 8);
    }
    if (uid) atomic_store(&book->dumped[uid], (first << 24) | n);
    af_log_view_free(&view);
    OK(af_set_dumped(a, s));
    int r;
    while ((r = af_reap(a, s)) == AF_EBUSY) sched_yield();
    OK(r);
}

static void resume(af_arena *a) {
    uint32_t slots[16], next = 0;
    do {
        int64_t n = af_owned_slots(a, AF_STATE_DETACHED, a->proc, next, slots, 16, &next);
        for (int64_t i = 0; i < n; i++) finish_detached(a, slots[i]);
    } while (next);
}

_Noreturn static void clean(af_arena *a) {
    uint32_t next = 0;
    resume(a);
    for (;;) {
        int64_t s = af_detach_next(a, af_now_ns() - 6000000u, next, &next);
        if (s >= 0) {
            finish_detached(a, (uint32_t)s);
            continue;
        }
        OK(af_punch_idle(a, 0, 2048));
        struct timespec tick = {0, 2000000};
        nanosleep(&tick, NULL);
    }
}

/* --------------------------------------------------------------------------------------------- supervisor ---- */

static uint32_t proc_of(int i) { return i < WORKERS ? (uint32_t)i : AF_PROC_CLEANER; }

static pid_t spawn(uint32_t proc, uint64_t random) {
    pid_t pid = fork();
    if (pid) return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    af_crash_arm("*",
                 next_random(&random) % 3 ? 1 + next_random(&random) % (proc == AF_PROC_CLEANER ? 500 : 8000) : 0);
    if (proc == AF_PROC_CLEANER) clean(clone_of(arena, proc));
    work(clone_of(arena, proc), random);
}

/* Sweep, sometimes only after a sweeper was killed in it. */
static void sweep(uint32_t proc, uint64_t *random, uint64_t *swept_deaths) {
    af_sweep_result out;
    while (next_random(random) % 3 == 0) {
        pid_t pid = fork();
        if (!pid) {
            af_crash_arm("*", 1 + next_random(random) % 40);
            af_sweep(arena, proc, &out);
            _exit(0);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid, "wait");
        *swept_deaths += WIFSIGNALED(status);
        CHECK(!WIFSIGNALED(status) || WTERMSIG(status) == SIGKILL, "the sweeper died of %d", WTERMSIG(status));
    }
    int r;
    while ((r = af_sweep(arena, proc, &out)) == AF_EBUSY) {}
    OK(r);
}

static int compare_acks(const void *x, const void *y) {
    const ack *a = x, *b = y;
    if (a->serial != b->serial) return a->serial < b->serial ? -1 : 1;
    return (a->uid > b->uid) - (a->uid < b->uid);
}

/* Everything found in live logs and in dumps, sorted. */
static ack *collect(size_t *count, uint64_t *live) {
    size_t cap = 1 << 16, n = 0;
    ack *all = malloc(cap * sizeof *all);
    for (uint32_t uid = 0; uid < UIDS; uid++) {
        uint64_t d = atomic_load(&book->dumped[uid]);
        for (uint64_t i = 0; i < (d & 0xffffff); i++) {
            if (n == cap) all = realloc(all, (cap *= 2) * sizeof *all);
            all[n++] = (ack){book->dump[(d >> 24) + i], uid};
        }
    }
    uint32_t end = af_slots_end(arena, AF_KIND_SESSION);
    for (uint32_t s = 0; s < end; s++) {
        af_slot_info info;
        af_log_view view = {0};
        if (!af_pin_slot(arena, s)) continue;
        OK(af_slot_get(arena, s, &info));
        OK(af_log_verify(arena, s));
        OK(af_log_read(arena, s, 0, &view));
        check_exports(&view);
        uint32_t uid = uid_of(&info);
        if (uid) CHECK(!atomic_load(&book->dumped[uid]), "session %u is alive and dumped", uid);
        for (size_t i = 0; i < view.count; i++) {
            if (view.records[i].type != 2) continue;
            if (n == cap) all = realloc(all, (cap *= 2) * sizeof *all);
            memcpy(&all[n].serial, view.meta + view.records[i].meta_at, 8);
            all[n++].uid = uid;
        }
        *live += 1;
        af_log_view_free(&view);
        af_unpin(arena, s);
    }
    qsort(all, n, sizeof *all, compare_acks);
    *count = n;
    return all;
}

static void judge(uint64_t deaths, uint64_t sweep_deaths, uint64_t stops) {
    size_t count = 0;
    uint64_t live = 0, acked = 0, lost = 0, doubled = 0, removed = 0;
    af_arena *successor = clone_of(arena, AF_PROC_CLEANER);
    resume(successor);
    uint32_t next;
    af_detach_next(successor, 0, 0, &next);
    check_whole(arena, "after all sweeps");
    ack *all = collect(&count, &live);
    for (size_t i = 1; i < count; i++) doubled += all[i].serial == all[i - 1].serial;
    for (int w = 0; w < WORKERS; w++) {
        uint64_t n = atomic_load(&book->acked[w]);
        acked += n;
        for (uint64_t i = 0; i < n; i++) {
            ack *a = &book->acks[w][i];
            if (bsearch(a, all, count, sizeof *all, compare_acks)) continue;
            if (atomic_load(&book->removed[a->uid]))
                removed++;
            else
                lost++;
        }
    }
    printf("fuzz: %llu deaths, %llu in a sweep, %llu stops; %llu appends acknowledged, %llu removed on purpose, %llu "
           "sessions, %llu exports, %llu alive in the end: %llu lost, %llu doubled\n",
           (unsigned long long)deaths, (unsigned long long)sweep_deaths, (unsigned long long)stops,
           (unsigned long long)acked, (unsigned long long)removed, (unsigned long long)book->uids,
           (unsigned long long)book->exports, (unsigned long long)live, (unsigned long long)lost,
           (unsigned long long)doubled);
    fflush(stdout);
    CHECK(!lost && !doubled, "lost or doubled");
    CHECK(deaths && acked && book->exports && removed, "nothing happened");
    drain(arena, "at the end");
    free(all);
    af_close(successor);
}

int main(int argc, char **argv) {
    double seconds = argc > 1 ? atof(argv[1]) : 10;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t seed =
        getenv("SEED") ? strtoull(getenv("SEED"), NULL, 10) : (uint64_t)now.tv_nsec ^ (uint64_t)now.tv_sec;
    uint64_t random = seed | 1, deaths = 0, sweep_deaths = 0, stops = 0;
    printf("fuzz: seed %llu, %g s\n", (unsigned long long)seed, seconds);
    fflush(stdout);
    book = mmap(NULL, sizeof *book, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(book != MAP_FAILED, "mmap");
    arena = arena_of(16u << 20, AF_PROC_SUPERVISOR);
    pid_t pid[WORKERS + 1] = {0};
    struct timespec began;
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (double passed = 0; passed < seconds;) {
        for (int i = 0; i <= WORKERS; i++) {
            int status;
            if (pid[i] && waitpid(pid[i], &status, WNOHANG) == pid[i]) {
                CHECK(!WIFSIGNALED(status) || WTERMSIG(status) == SIGKILL, "process %d died of %d", i,
                      WTERMSIG(status));
                deaths += WIFSIGNALED(status);
                sweep(proc_of(i), &random, &sweep_deaths);
                pid[i] = 0;
            }
            if (!pid[i]) pid[i] = spawn(proc_of(i), next_random(&random) | 1);
        }
        struct timespec tick = {0, (long)(next_random(&random) % 4000000)};
        nanosleep(&tick, NULL);
        int victim = (int)(next_random(&random) % (WORKERS + 1));
        if (next_random(&random) % 6 == 0) kill(pid[victim], SIGKILL);
        if (next_random(&random) % 12 == 0) { /* asleep with whatever it holds, and back */
            kill(pid[victim], SIGSTOP);
            nanosleep(&tick, NULL);
            kill(pid[victim], SIGCONT);
            stops++;
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
        passed = (double)(now.tv_sec - began.tv_sec) + (double)(now.tv_nsec - began.tv_nsec) / 1e9;
    }
    for (int i = 0; i <= WORKERS; i++) {
        if (pid[i]) kill(pid[i], SIGKILL);
        if (pid[i]) waitpid(pid[i], NULL, 0);
    }
    for (int i = 0; i <= WORKERS; i++) sweep(proc_of(i), &random, &sweep_deaths);
    judge(deaths, sweep_deaths, stops);
    return 0;
}
