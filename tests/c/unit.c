/* unit.c: each noun of the core by itself, in one process: what it promises in arealfast.h, also when the arena is
 * full, the system gives no memory, or a log holds garbage. Run with a name to run one test. */
#include "unit.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

void test_checksum(void) { CHECK(af_crc32c(0, "123456789", 9) == 0xe3069283u, "RFC 3720"); }

/* ------------------------------------------------------------------------------------------------ layout ---- */

void test_attach(void) {
    af_arena *a = arena_of(MIB, 31), *b;
    uint32_t s = started(a, "task", "key");
    OK(af_attach(af_fileno(a), 3, &b));
    IS(pin_key(b, "key"), s);
    af_unpin(b, s);
    af_close(b);
    /* Every field of the geometry matters. */
    uint64_t *field = (uint64_t *)(void *)a->base;
    for (size_t i = 0; i < sizeof(af_geometry) / 8; i++) {
        field[i] += 4096;
        IS(af_attach(af_fileno(a), 3, &b), AF_ELAYOUT);
        CHECK(b == NULL, "no handle");
        field[i] -= 4096;
    }
    IS(af_attach(af_fileno(a), AF_MAX_PROCS, &b), AF_EINVAL);
    CHECK(!ftruncate(af_fileno(a), (off_t)a->g->total_bytes + 4096), "longer");
    IS(af_attach(af_fileno(a), 3, &b), AF_ELAYOUT);
    af_close(a);
    int fd = memfd_create("short", 0);
    IS(af_attach(fd, 3, &b), AF_ELAYOUT);
    CHECK(!ftruncate(fd, 100000), "zeros");
    IS(af_attach(fd, 3, &b), AF_ELAYOUT);
    close(fd);
    IS(af_attach(-1, 3, &b), AF_ESYS);
    IS(af_create(1000, 0, 0, 3, &b), AF_EINVAL);
    af_close(NULL);
}

void test_words_and_processes(void) {
    af_arena *a = arena_of(MIB, 1), *b = clone_of(a, 2);
    int64_t v, pid;
    uint64_t incarnation, ticks, sums[AF_COUNTERS];
    OK(af_word_set(a, 63, -5));
    OK(af_word_add(b, 63, 7, &v));
    IS(v, 2);
    IS(af_word_cas(a, 63, 1, 9), 0);
    IS(af_word_cas(a, 63, 2, 9), 1);
    OK(af_word_get(b, 63, &v));
    IS(v, 9);
    IS(af_word_get(b, AF_WORDS, &v), AF_EINVAL);
    IS(af_proc_enter(a, 100), 1);
    af_arena *again = clone_of(a, 1);
    IS(af_proc_enter(again, 101), AF_EBUSY);
    af_heartbeat(a);
    OK(af_proc_info(b, 1, &pid, &incarnation, &ticks));
    CHECK(pid == 100 && incarnation == 1 && ticks == 1, "process entry");
    af_count(a, 5, 2);
    af_count(b, 5, 3);
    af_count(b, AF_COUNTERS, 1);
    af_sweep_result swept;
    OK(af_sweep(b, 1, &swept));
    IS(af_proc_enter(again, 101), 2);
    af_counters(b, sums);
    IS(sums[5], 5); /* the dead one's too */
    IS(af_sweep(a, 1, &swept), AF_EINVAL);
    af_close(again);
    af_close(b);
    af_close(a);
}

/* ------------------------------------------------------------------------------------------------- lock ----- */

void test_lock_after_death(void) {
    af_arena *a = arena_of(MIB, 1);
    for (int i = 0; i < 3; i++) {
        pid_t pid = fork();
        if (!pid) {
            af_arena *b = clone_of(a, 2);
            OK(af_index_lock(b, AF_IMPATIENT));
            raise(SIGKILL);
        }
        CHECK(waitpid(pid, NULL, 0) == pid, "wait");
        IS(af_lock_owner(a), 2);
        started(a, "t", ""); /* the lock works on */
        IS(af_lock_owner(a), -1);
        IS(atomic_load(&a->h->index_dirty), 1);
        af_sweep_result swept;
        OK(af_sweep(a, 2, &swept));
        IS(atomic_load(&a->h->index_dirty), 0);
    }
    check_whole(a, "lock");
    drain(a, "lock");
    af_close(a);
}

int main(int argc, char **argv) {
    uint64_t seed = getenv("SEED") ? strtoull(getenv("SEED"), NULL, 10) : 20260901;
    struct {
        const char *name;
        void (*plain)(void);
        void (*seeded)(uint64_t);
    } tests[] = {
        {"checksum", test_checksum, NULL},
        {"base64", NULL, test_base64},
        {"hostile_bytes", NULL, test_hostile_bytes},
        {"ids_written", NULL, test_ids_written},
        {"attach", test_attach, NULL},
        {"words_and_processes", test_words_and_processes, NULL},
        {"start", test_start, NULL},
        {"close_and_pins", test_close_and_pins, NULL},
        {"twenty_thousand", test_twenty_thousand, NULL},
        {"long_names", test_long_names, NULL},
        {"detach", test_detach, NULL},
        {"append_and_read", test_append_and_read, NULL},
        {"small_records_share", test_small_records_share, NULL},
        {"reservations", test_reservations, NULL},
        {"compaction", test_compaction, NULL},
        {"garbage", NULL, test_garbage},
        {"groups", test_groups, NULL},
        {"exports", test_exports, NULL},
        {"shards", test_shards, NULL},
        {"index_overflow", NULL, test_index_overflow},
        {"full", test_full, NULL},
        {"refused_memory", test_refused_memory, NULL},
        {"file_size_limit", test_file_size_limit, NULL},
        {"small_file_system", test_small_file_system, NULL},
        {"granules", NULL, test_granules},
        {"punch", test_punch, NULL},
        {"fragmented", test_fragmented, NULL},
        {"lock_after_death", test_lock_after_death, NULL},
    };
    int ran = 0;
    alarm(300); /* a watchdog, not an assertion */
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (argc > 1 && strcmp(argv[1], tests[i].name)) continue;
        if (tests[i].plain)
            tests[i].plain();
        else
            tests[i].seeded(seed | 1);
        ran++;
    }
    printf("unit: %d tests passed (seed %llu)\n", ran, (unsigned long long)seed);
    return ran == 0;
}
