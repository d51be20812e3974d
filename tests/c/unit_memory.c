/* unit_memory.c: shards, granules, a full arena, a system that gives no memory. */
#include "unit.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

/* ------------------------------------------------------------------------------------------------ shards ---- */

void test_shards(void) {
    af_arena *a = arena_of(4 * MIB, 1), *b = clone_of(a, 2);
    const void *meta, *data;
    uint32_t meta_len, bits, next;
    uint64_t data_len;
    af_span parts[2] = {{"hel", 3}, {"lo", 2}};
    int64_t one = af_shard_put(a, "id", 2, "M", 1, parts, 2, 70, 0);
    OK(one);
    IS(af_pin_id(a, "id", 2), AF_ENOENT); /* another name space */
    IS(af_pin_shard(b, "id", 2), one);
    OK(af_shard_get(b, (uint32_t)one, &meta, &meta_len, &data, &data_len, &bits));
    CHECK(meta_len == 1 && data_len == 5 && bits == 70 && !memcmp(data, "hello", 5) && !memcmp(meta, "M", 1),
          "content");
    CHECK((uintptr_t)data % 64 == 0, "alignment");
    bool was, all;
    for (uint32_t i = 0; i < 70; i++) {
        IS(af_shard_bit(b, (uint32_t)one, i), 1);
        OK(af_shard_clear_bit(b, (uint32_t)one, i, &was, &all));
        CHECK(was && all == (i == 69), "bit %u", i);
        OK(af_shard_clear_bit(b, (uint32_t)one, i, &was, &all));
        CHECK(!was && all == (i == 69), "bit %u", i);
        IS(af_shard_bit(b, (uint32_t)one, i), 0);
    }
    IS(af_shard_clear_bit(b, (uint32_t)one, 70, &was, &all), AF_EINVAL);
    /* Overwritten while somebody reads it. */
    int64_t two = af_shard_put(a, "id", 2, NULL, 0, NULL, 0, 0, 0);
    OK(two);
    CHECK(two != one, "slot %d is in use", (int)one);
    CHECK(!memcmp(data, "hello", 5), "readers keep the old one");
    IS(af_pin_shard(a, "id", 2), two);
    OK(af_shard_get(a, (uint32_t)two, &meta, &meta_len, &data, &data_len, &bits));
    CHECK(meta_len == 0 && data_len == 0 && bits == 0, "empty");
    af_unpin(b, (uint32_t)one);
    IS(af_ctl_state(a->ctl[one]), AF_STATE_FREE);
    OK(af_shard_close(a, (uint32_t)two));
    af_unpin(a, (uint32_t)two);
    IS(af_pin_shard(a, "id", 2), AF_ENOENT);
    /* In steps. */
    void *view;
    static char id[AF_ID_MAX];
    memset(id, 's', sizeof id);
    int64_t s = af_shard_reserve(a, id, sizeof id, "m", 1, 100000, 0, 0, &view);
    OK(s);
    memset(view, 9, 100000);
    IS(af_pin_shard(a, id, sizeof id), AF_ENOENT);
    IS(af_shard_publish(b, (uint32_t)s), AF_EGONE); /* not its */
    OK(af_shard_publish(a, (uint32_t)s));
    IS(af_shard_publish(a, (uint32_t)s), AF_EGONE);
    IS(af_pin_shard(a, id, sizeof id), s);
    af_unpin(a, (uint32_t)s);
    uint32_t found[4];
    IS(af_expired_shards(a, UINT64_MAX, 0, found, 4, &next), 1);
    IS(found[0], s);
    IS(af_expired_shards(a, 0, 0, found, 4, &next), 0);
    check_whole(a, "shards");
    s = af_shard_reserve(a, "no", 2, NULL, 0, 5000, 0, 0, &view);
    OK(s);
    OK(af_shard_abandon(a, (uint32_t)s));
    IS(af_shard_put(a, "", 0, NULL, 0, NULL, 0, 0, 0), AF_EINVAL);
    IS(af_shard_reserve(a, "big", 3, NULL, 0, 1ull << 60, 0, 0, &view), AF_ENOSPC);
    drain(a, "shards");
    af_stats_result stats;
    af_stats(a, &stats);
    IS(stats.shard_bytes, 0);
    af_close(b);
    af_close(a);
}

/* Many shards in few buckets: overflow buckets come and go, and none is lost. */
void test_index_overflow(uint64_t seed) {
    af_arena *a = arena_of(MIB, 1);
    static char live[512][16];
    uint32_t n = 0;
    for (int turn = 0; turn < 6000; turn++) {
        if (n < 400 && (n == 0 || next_random(&seed) % 5 < 3)) {
            do snprintf(live[n], 16, "shard-%u", (unsigned)(next_random(&seed) % 100000));
            while (af_hash(a, AF_SPACE_SHARD, live[n], strlen(live[n])) % a->g->buckets >= 8);
            int64_t s = af_pin_shard(a, live[n], (uint32_t)strlen(live[n]));
            if (s >= 0) {
                af_unpin(a, (uint32_t)s);
                continue;
            }
            int64_t made = af_shard_put(a, live[n], (uint32_t)strlen(live[n]), NULL, 0, NULL, 0, 0, AF_CRITICAL);
            if (made == AF_ENOSPC) continue; /* of granules */
            OK(made);
            n++;
        } else {
            uint32_t i = (uint32_t)next_random(&seed) % n;
            int64_t s = af_pin_shard(a, live[i], (uint32_t)strlen(live[i]));
            OK(s);
            OK(af_shard_close(a, (uint32_t)s));
            af_unpin(a, (uint32_t)s);
            memcpy(live[i], live[--n], 16);
        }
        if (turn % 500 == 0) check_whole(a, "overflow");
    }
    for (uint32_t i = 0; i < n; i++) {
        int64_t s = af_pin_shard(a, live[i], (uint32_t)strlen(live[i]));
        OK(s);
        af_unpin(a, (uint32_t)s);
    }
    drain(a, "overflow");
    IS(atomic_load(&a->h->overflow_used), 0);
    af_close(a);
}

/* ------------------------------------------------------------------------------------------------ memory ---- */

/* Fill an arena with sessions until it says so; then the reserve still serves what is critical. */
static void fill_up(af_arena *a) {
    uint64_t head, serial = 0;
    int r = AF_OK;
    uint32_t s = started(a, "fill", "");
    CHECK(af_pin_slot(a, s), "pin");
    while ((r = append_serial(a, s, serial, 30000, AF_LOG_ANY, 0, &head)) == AF_OK) serial++;
    IS(r, AF_ENOSPC);
    while ((r = append_serial(a, s, serial, 3000, AF_LOG_ANY, 0, &head)) == AF_OK) serial++;
    IS(r, AF_ENOSPC);
    IS(af_reserve(a, s, 4096), AF_ENOSPC);
    IS(af_shard_put(a, "s", 1, NULL, 0, &(af_span){&serial, 8}, 1, 0, 0), AF_ENOSPC);
    /* More small records may still fit the open chunk; then only critical ones do. */
    while ((r = append_serial(a, s, serial, 10, AF_LOG_ANY, 0, &head)) == AF_OK) serial++;
    IS(r, AF_ENOSPC);
    af_new_record rec = {.type = 3, .meta = "reward", .meta_len = 6};
    OK(af_log_append(a, s, &rec, AF_LOG_ANY, AF_CRITICAL, 0, &head));
    OK(af_log_compact(a, s, head, "x", 1, NULL, 0, &head));
    OK(append_serial(a, s, serial, 30000, AF_LOG_ANY, 0, &head)); /* and there is room again */
    af_unpin(a, s);
    drain(a, "full");
}

void test_full(void) {
    af_arena *a = arena_of(MIB, 1);
    for (int i = 0; i < 3; i++) fill_up(a);
    af_close(a);
    a = arena_of(9 * MIB, 1);
    fill_up(a);
    af_close(a);
}

/* The system refuses memory at the nth request, for every n: always AF_ENOSPC, nothing lost, and it works afterwards.
 */
void test_refused_memory(void) {
    af_arena *none;
    OK(af_fault_arm(1));
    IS(af_create(MIB, 512, 512, 1, &none), AF_ENOSPC);
    for (uint64_t n = 1;; n++) {
        af_arena *a = arena_of(5 * MIB, 1);
        af_started out = {0};
        uint64_t head;
        OK(af_fault_arm(n));
        int refused = 0;
        int r = af_session_start(a, "t", 1, "k", 1, 0, -1, &out);
        refused += r == AF_ENOSPC;
        if (r == AF_OK) {
            CHECK(af_pin_slot(a, out.slot), "pin");
            for (uint64_t i = 0; i < 3; i++) {
                r = append_serial(a, out.slot, i, 900000, AF_LOG_ANY, 0, &head);
                CHECK(r == AF_OK || r == AF_ENOSPC, "%d", r);
                refused += r == AF_ENOSPC;
            }
            af_unpin(a, out.slot);
        }
        int64_t s = af_shard_put(a, "s", 1, NULL, 0, NULL, 0, 0, 0);
        CHECK(s >= 0 || s == AF_ENOSPC, "%d", (int)s);
        refused += s == AF_ENOSPC;
        OK(af_fault_arm(0));
        check_whole(a, "refused");
        OK(af_shard_put(a, "s", 1, NULL, 0, NULL, 0, 0, 0));
        drain(a, "refused");
        af_close(a);
        CHECK(refused <= 1, "one refusal, %d errors", refused);
        if (!refused) break;
        CHECK(n < 100, "endless");
    }
}

void test_file_size_limit(void) {
    pid_t pid = fork();
    if (!pid) {
        struct rlimit limit = {2 * MIB, 2 * MIB};
        af_arena *a;
        signal(SIGXFSZ, SIG_IGN);
        CHECK(!setrlimit(RLIMIT_FSIZE, &limit), "setrlimit");
        IS(af_create(16 * MIB, 512, 512, 1, &a), AF_ENOSPC);
        _exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %x", status);
}

/* A file system with less room than the arena may want. Needs a mount, so a namespace; skipped where there is none.
 */
void test_small_file_system(void) {
    pid_t pid = fork();
    if (!pid) {
        if (unshare(CLONE_NEWNS) && unshare(CLONE_NEWUSER | CLONE_NEWNS)) _exit(77);
        if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) _exit(77);
        char dir[] = "./areal_fast_unit_XXXXXX", path[64];
        if (!mkdtemp(dir)) _exit(77);
        if (mount("tmpfs", dir, "tmpfs", 0, "size=6m")) {
            rmdir(dir);
            _exit(77);
        }
        snprintf(path, sizeof path, "%s/arena", dir);
        int fd = open(path, O_RDWR | O_CREAT, 0600);
        af_arena *a;
        OK(af_create_in(fd, 64 * MIB, 512, 512, 1, &a));
        close(fd);
        fill_up(a);
        af_close(a);
        umount2(dir, MNT_DETACH);
        rmdir(dir);
        _exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid, "wait");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        printf("  (small file system: SKIPPED, no mount namespace here)\n");
        return;
    }
    CHECK(status == 0, "status %x", status);
}

/* Random runs of every size against a plain array: never two owners, and all comes back. */
void test_granules(uint64_t seed) {
    af_arena *a = arena_of(24 * MIB, 1), *b = clone_of(a, 2);
    static uint32_t owner[24 * 256];
    static struct {
        uint64_t g, n;
        af_arena *who;
    } runs[400];
    memset(owner, 0, sizeof owner);
    uint32_t count = 0, full = 0;
    for (uint32_t turn = 1; turn < 40000; turn++) {
        af_arena *who = next_random(&seed) % 2 ? a : b;
        uint64_t kind = next_random(&seed) % 100, n = 1 + next_random(&seed) % 4;
        if (kind < 10) n = 1 + next_random(&seed) % 300;
        if (kind < 2) n = 1 + next_random(&seed) % 2000;
        if (count < 400 && next_random(&seed) % 100 < 52) {
            int64_t g = af_run_take(who, n, AF_TAG_NONE, 0);
            if (g < 0) {
                IS(g, AF_ENOSPC);
                full++;
                continue;
            }
            for (uint64_t i = 0; i < n; i++) {
                CHECK(owner[(uint64_t)g + i] == 0, "granule %llu taken twice", (unsigned long long)g + i);
                owner[(uint64_t)g + i] = turn;
            }
            memset(a->base + af_run_offset(a, (uint64_t)g), 1, n << AF_GRANULE_SHIFT);
            runs[count].g = (uint64_t)g;
            runs[count].who = who;
            runs[count++].n = n;
        } else if (count) {
            uint32_t i = (uint32_t)next_random(&seed) % count;
            uint64_t keep = next_random(&seed) % 4 == 0 ? 1 + next_random(&seed) % runs[i].n : 0;
            for (uint64_t k = keep; k < runs[i].n; k++) owner[runs[i].g + k] = 0;
            if (keep)
                af_run_trim(runs[i].who, runs[i].g, keep);
            else
                af_run_free(runs[i].who, runs[i].g);
            runs[i].n = keep;
            if (!keep) runs[i] = runs[--count];
        }
        if (turn % 3000 == 0) OK(af_punch_idle(a, 0, 100000));
    }
    CHECK(full, "the arena was never full");
    af_arena *fresh = arena_of(8 * MIB, 1); /* a large critical run backs what it needs */
    OK(af_run_take(fresh, 1500, AF_TAG_NONE, AF_CRITICAL));
    af_close(fresh);
    uint64_t total = 0;
    for (uint32_t i = 0; i < count; i++) total += runs[i].n;
    IS(used(a), total);
    while (count--) af_run_free(runs[count].who, runs[count].g);
    check_whole(a, "granules");
    int64_t all = af_run_take(a, a->g->granules - a->g->keep, AF_TAG_NONE, 0); /* in one piece again */
    OK(all);
    af_run_free(a, (uint64_t)all);
    af_close(b);
    af_close(a);
}

void test_punch(void) {
    af_arena *a = arena_of(24 * MIB, 1);
    struct stat before, after;
    uint64_t head;
    OK(af_prefault(a, 24 * MIB));
    uint32_t s = started(a, "t", "");
    CHECK(af_pin_slot(a, s), "pin");
    OK(append_serial(a, s, 1, 100, AF_LOG_ANY, 0, &head));
    IS(af_punch_idle(a, 0, 100000), 0); /* backed ahead and never used: stays */
    int64_t all = af_run_take(a, 5000, AF_TAG_NONE, 0);
    OK(all);
    af_run_free(a, (uint64_t)all);
    IS(af_punch_idle(a, 1000ull * 1000000000u, 100000), 0); /* not idle for so long */
    fstat(af_fileno(a), &before);
    int64_t n = af_punch_idle(a, 0, 1024);
    IS(n, 1024);
    fstat(af_fileno(a), &after);
    CHECK(before.st_blocks - after.st_blocks >= n * 8, "the system has it back");
    CHECK(af_punch_idle(a, 0, 100000) > 0, "and more");
    IS(af_punch_idle(a, 0, 100000), 0); /* some stays at hand */
    IS(count_serial(a, s, 1), 1);
    for (uint64_t i = 2; i < 20; i++) OK(append_serial(a, s, i, 1000000, AF_LOG_ANY, 0, &head));
    for (uint64_t i = 2; i < 20; i++) IS(count_serial(a, s, i), 1);
    af_unpin(a, s);
    drain(a, "punch");
    af_close(a);
}

/* Every other granule is free: runs of two cannot be found, and looking for them is not a scan each time. */
void test_fragmented(void) {
    af_arena *a = arena_of(16 * MIB, 1);
    static uint64_t runs[4096];
    uint64_t n = a->g->granules - a->g->keep;
    for (uint64_t i = 0; i < n; i++) runs[i] = (uint64_t)af_run_take(a, 1, AF_TAG_NONE, 0);
    IS(af_run_take(a, 1, AF_TAG_NONE, 0), AF_ENOSPC);
    for (uint64_t i = 0; i < n; i++) {
        if (runs[i] % 2) af_run_free(a, runs[i]);
    }
    for (uint64_t b = 0; b < n / AF_BLOCK; b++) IS(a->blocks[b] & AF_B_BOUND, AF_BLOCK); /* not yet known */
    IS(af_run_take(a, n / 2, AF_TAG_NONE, AF_CRITICAL), AF_ENOSPC);
    while (af_run_take(a, 2, AF_TAG_NONE, AF_CRITICAL) >= 0) { /* what the reserve holds */
    }
    for (uint64_t b = 0; b < a->g->blocks; b++)
        CHECK((a->blocks[b] & AF_B_BOUND) <= 1, "block %llu", (unsigned long long)b);
    OK(af_run_take(a, 1, AF_TAG_NONE, AF_CRITICAL));
    af_run_free(a, runs[0]);
    CHECK((a->blocks[runs[0] / AF_BLOCK] & AF_B_BOUND) == AF_BLOCK, "freeing raises the bound");
    af_close(a);
}
