/* crash.c: kill a process at every crash point, at every pass of it, then sweep, and see that nothing acknowledged is
 * missing and nothing is left over.
 *
 * A child plays one scenario that touches every mechanism, as process 1, writing down in shared memory (the story)
 * what it was told had happened. It is killed at pass k of any crash point, for k = 1, 2, ... until it gets through.
 * Each time the parent sweeps process 1 twice (also: with a sweeper that is itself killed at its pass j), lets a
 * successor finish what was DETACHED, and compares the arena with the story. A registered point that no run ever
 * reached fails the test.
 *
 * crash [full]: full tries every j for every k; else one random j for each k. SEED=n as printed.
 */
#include "check.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { SESSIONS = 40, APPENDS = 80, ACTOR = 1, OTHER = 2, SWEEPER = 31, JUDGE = 3 };

typedef struct {
    uint32_t id_len, slot;
    char id[AF_ID_MAX];
    bool started;  /* we were told so */
    bool removing; /* its removal was asked for: from now on it may be gone */
    bool gone;     /* we were told that it is */
    bool dumped;   /* its dump is complete: the "rename" */
    uint32_t dump_count;
    uint64_t dump[APPENDS];
} story_session;

typedef struct {
    _Atomic uint32_t last; /* crash point passed last */
    uint64_t hits[256];
    uint32_t sessions, appends;
    story_session session[SESSIONS];
    struct {
        uint32_t session;
        uint64_t serial;
        bool acked;
    } append[APPENDS];
    int exporting[2]; /* the sessions exported together, the second with REMOVE; -1 */
    bool export_committed;
    bool group_committed, group_tried;
    int key_from, key_to; /* "moving": which sessions it may be bound to */
    bool key_moved;
    uint64_t shard_version; /* of "image": acknowledged */
    bool shard_trying, shard_closing, shard_closed, bit_cleared;
} story;

static story *told;

/* ----------------------------------------------------------------------------------------------- scenario ---- */

static uint32_t tell_started(const af_started *out) {
    story_session *s = &told->session[told->sessions];
    s->id_len = out->id_len;
    s->slot = out->slot;
    memcpy(s->id, out->id, out->id_len);
    s->started = true;
    return told->sessions++;
}

static uint32_t start(af_arena *a, const char *task, const char *key) {
    af_started out;
    OK(af_session_start(a, task, (uint32_t)strlen(task), key, (uint32_t)strlen(key), 0, -1, &out));
    return tell_started(&out);
}

static uint64_t append(af_arena *a, uint32_t session, size_t n, uint64_t expect, uint64_t reservation) {
    uint64_t head;
    uint32_t i = told->appends++;
    told->append[i].session = session;
    told->append[i].serial = 1000 + i;
    OK(append_serial(a, told->session[session].slot, told->append[i].serial, n, expect, reservation, &head));
    told->append[i].acked = true;
    return head;
}

static void logs(af_arena *a) {
    uint32_t s = start(a, "log", "log key"), slot = told->session[s].slot;
    CHECK(af_pin_slot(a, slot), "pin");
    af_touch(a, slot);
    append(a, s, 100, AF_LOG_ANY, 0);
    append(a, s, 50, AF_LOG_ANY, 0);
    append(a, s, 10000, AF_LOG_ANY, 0);
    append(a, s, 40, AF_LOG_ANY, (uint64_t)af_reserve(a, slot, 20000));   /* the reservation is not needed */
    append(a, s, 9000, AF_LOG_ANY, (uint64_t)af_reserve(a, slot, 30000)); /* its tail is not */
    append(a, s, 200, af_log_head(a, slot), 0);
    OK(af_release(a, (uint64_t)af_reserve(a, slot, 5000)));
    /* Compaction keeps every record but the first two marks. */
    af_log_view view = {0};
    uint64_t head, keep[APPENDS];
    for (int turn = 0; turn < 2; turn++) {
        uint32_t n = 0;
        OK(af_log_read(a, slot, 0, &view));
        for (size_t i = 0; i < view.count; i++) {
            if (view.records[i].type == 2) keep[n++] = view.records[i].offset;
        }
        OK(af_log_compact(a, slot, view.head, "cut", 3, keep, n, &head));
        append(a, s, 60, head, 0);
    }
    af_log_view_free(&view);
    af_unpin(a, slot);
}

static void long_names_and_close(af_arena *a) {
    static char task[AF_TASK_MAX], key[AF_KEY_MAX];
    memset(task, 'T', sizeof task);
    memset(key, 'K', sizeof key);
    af_started out;
    OK(af_session_start(a, task, sizeof task, key, sizeof key, 0, -1, &out));
    uint32_t s = tell_started(&out);
    IS(af_pin_key(a, key, sizeof key), out.slot);
    IS(af_pin_id(a, out.id, out.id_len), out.slot);
    append(a, s, 3000, AF_LOG_ANY, 0);
    append(a, s, 6000, AF_LOG_ANY, 0);
    told->session[s].removing = true;
    OK(af_session_close(a, out.slot));
    told->session[s].gone = true;
    af_unpin(a, out.slot);
    af_unpin(a, out.slot);
}

static void groups(af_arena *a) {
    uint32_t slots[3];
    af_started out[3];
    told->key_from = told->key_to = (int)start(a, "first", "moving");
    OK(af_session_start(a, "second", 6, "moving", 6, 0, told->session[told->key_from].slot, out));
    told->key_to = (int)tell_started(out);
    told->key_moved = true;
    int64_t ref = af_txn_begin(a);
    for (int i = 0; i < 2; i++) {
        OK(af_session_start(a, "aborted", 7, "", 0, (uint64_t)ref, -1, &out[i]));
        slots[i] = out[i].slot;
    }
    OK(af_txn_abort(a, (uint64_t)ref, slots, 2));
    uint32_t now_bound = told->session[told->key_to].slot;
    told->key_from = told->key_to;
    ref = af_txn_begin(a);
    for (int i = 0; i < 3; i++) {
        OK(af_session_start(a, "group", 5, i ? "" : "moving", i ? 0 : 6, (uint64_t)ref, i ? -1 : (int64_t)now_bound,
                            &out[i]));
        slots[i] = out[i].slot;
    }
    /* From the commit on the key may be bound to the new one; that session is told of before it is certain. */
    told->key_moved = false;
    told->key_to = (int)told->sessions;
    memcpy(told->session[told->sessions].id, out[0].id, out[0].id_len);
    told->session[told->sessions].id_len = out[0].id_len;
    told->group_tried = true;
    OK(af_txn_commit(a, (uint64_t)ref));
    told->group_committed = true;
    for (int i = 0; i < 3; i++) tell_started(&out[i]);
    OK(af_txn_finish(a, (uint64_t)ref, slots, 3));
    told->key_moved = true;
}

static void mark(af_arena *a, uint32_t slot, uint64_t ref, uint16_t flags) {
    uint64_t head;
    af_new_record rec = {.type = AF_REC_EXPORTING, .flags = flags, .aux = ref};
    OK(af_log_append(a, slot, &rec, AF_LOG_ANY, AF_CRITICAL, 0, &head));
}

static void exports(af_arena *a) {
    uint32_t slots[2];
    for (int i = 0; i < 2; i++) {
        uint32_t s = start(a, "export", "");
        slots[i] = told->session[s].slot;
        CHECK(af_pin_slot(a, slots[i]), "pin");
        append(a, s, 500, AF_LOG_ANY, 0);
        told->exporting[i] = (int)s;
    }
    int64_t ref = af_txn_begin(a);
    for (int i = 0; i < 2; i++) mark(a, slots[i], (uint64_t)ref, 0);
    OK(af_txn_abort(a, (uint64_t)ref, slots, 2));
    ref = af_txn_begin(a);
    for (int i = 0; i < 2; i++) mark(a, slots[i], (uint64_t)ref, i ? AF_REC_FLAG_REMOVE : 0);
    told->session[told->exporting[1]].removing = true;
    OK(af_txn_commit(a, (uint64_t)ref));
    told->export_committed = true;
    OK(af_txn_finish(a, (uint64_t)ref, slots, 2));
    told->session[told->exporting[1]].gone = true;
    for (int i = 0; i < 2; i++) af_unpin(a, slots[i]);
}

/* Write the dump of a DETACHED session: the story's `dumped` is the rename. */
static void dump(af_arena *a, story_session *s) {
    af_log_view view = {0};
    OK(af_log_read(a, s->slot, 0, &view));
    s->dump_count = 0;
    for (size_t i = 0; i < view.count; i++) {
        if (view.records[i].type != 2) continue;
        memcpy(&s->dump[s->dump_count++], view.meta + view.records[i].meta_at, 8);
    }
    af_log_view_free(&view);
    s->dumped = true;
}

static void stale(af_arena *a) {
    uint32_t s = start(a, "stale", "stale key"), slot = told->session[s].slot;
    uint64_t head;
    CHECK(af_pin_slot(a, slot), "pin");
    append(a, s, 700, AF_LOG_ANY, 0);
    append(a, s, 9000, AF_LOG_ANY, 0);
    af_unpin(a, slot);
    told->session[s].removing = true;
    IS(af_detach(a, slot, UINT64_MAX), 1);
    af_new_record names = {.type = 6, .meta = "stale.json", .meta_len = 10};
    OK(af_log_append(a, slot, &names, AF_LOG_ANY, AF_CRITICAL, 0, &head));
    dump(a, &told->session[s]);
    OK(af_set_dumped(a, slot));
    OK(af_reap(a, slot));
    told->session[s].gone = true;
}

static int64_t put_image(af_arena *a, uint64_t version) {
    uint64_t body[700];
    for (int i = 0; i < 700; i++) body[i] = version;
    return af_shard_put(a, "image", 5, &version, 8, &(af_span){body, sizeof body}, 1, 130, 0);
}

static void shards(af_arena *a) {
    bool was, all;
    void *view;
    for (uint64_t version = 1; version < 4; version++) {
        int64_t reading = af_pin_shard(a, "image", 5);
        told->shard_trying = true;
        OK(put_image(a, version));
        told->shard_version = version;
        told->shard_trying = false;
        if (reading >= 0) af_unpin(a, (uint32_t)reading);
    }
    int64_t s = af_pin_shard(a, "image", 5);
    OK(af_shard_clear_bit(a, (uint32_t)s, 129, &was, &all));
    told->bit_cleared = true;
    af_unpin(a, (uint32_t)s);
    /* More of them than a bucket holds, all in one. */
    char id[10][24];
    uint32_t n = 0;
    for (uint32_t i = 0; n < 10; i++) {
        snprintf(id[n], sizeof id[n], "crowd-%u", i);
        if (af_hash(a, AF_SPACE_SHARD, id[n], strlen(id[n])) % a->g->buckets == 5) n++;
    }
    for (n = 0; n < 10; n++) OK(af_shard_put(a, id[n], (uint32_t)strlen(id[n]), NULL, 0, NULL, 0, 1, 0));
    while (n--) {
        s = af_pin_shard(a, id[n], (uint32_t)strlen(id[n]));
        OK(af_shard_close(a, (uint32_t)s));
        af_unpin(a, (uint32_t)s);
    }
    static char name[AF_ID_MAX];
    memset(name, 'n', sizeof name);
    s = af_shard_reserve(a, name, sizeof name, NULL, 0, 700 * 4096, 0, 0, &view);
    OK(s);
    OK(af_shard_abandon(a, (uint32_t)s));
    OK(af_prefault(a, 900 * 4096));
    CHECK(af_punch_idle(a, 0, 4096) > 0, "a block was free");
}

static void gone_shard(af_arena *a) {
    told->shard_closing = true;
    int64_t s = af_pin_shard(a, "image", 5);
    OK(af_shard_close(a, (uint32_t)s));
    told->shard_closed = true;
    af_unpin(a, (uint32_t)s);
}

/* What process 2 does until it is killed at a named point; then we sweep it. */
static void other_process(af_arena *a, int part) {
    uint32_t s = started(a, "other", "");
    uint64_t head;
    CHECK(af_pin_slot(a, s), "pin");
    OK(af_reserve(a, s, 50000));
    for (uint64_t i = 0; i < 6; i++) OK(append_serial(a, s, i, 3000, AF_LOG_ANY, 0, &head));
    if (part == 0) OK(af_log_compact(a, s, head, "x", 1, NULL, 0, &head));
    if (part == 1) {
        OK(put_image(a, 100));
        OK(put_image(a, 101));
    }
    int64_t open = af_txn_begin(a), done = af_txn_begin(a);
    af_started out;
    for (int i = 0; i < 2; i++) {
        OK(af_session_start(a, "others", 6, "", 0, (uint64_t)(i ? done : open), -1, &out));
    }
    mark(a, s, (uint64_t)done, AF_REC_FLAG_REMOVE);
    OK(af_txn_commit(a, (uint64_t)done));
    _exit(1); /* not reached: killed before */
}

static void sweep_others(af_arena *a) {
    static const char *until[] = {"compact_half_retaken", "shard_swapped", "txn_committed"};
    for (int part = 0; part < 3; part++) {
        pid_t pid = fork();
        if (!pid) {
            af_crash_watch(NULL);
            af_crash_arm(until[part], 1);
            other_process(clone_of(a, OTHER), part);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
              "part %d: status %x", part, status);
        af_sweep_result swept;
        OK(af_sweep(a, OTHER, &swept));
    }
    /* What the other one put is of no interest any more. */
    int64_t s = af_pin_shard(a, "image", 5);
    if (s >= 0) {
        OK(af_shard_close(a, (uint32_t)s));
        af_unpin(a, (uint32_t)s);
    }
}

static void play(af_arena *a) {
    int64_t hitl = af_session_open_named(a, "__hitl__", 8);
    OK(hitl);
    logs(a);
    long_names_and_close(a);
    groups(a);
    exports(a);
    stale(a);
    shards(a);
    gone_shard(a);
    sweep_others(a);
    for (uint32_t i = 0; i < af_crash_count(); i++) told->hits[i] += af_crash_hits(i);
    _exit(0); /* with a pin still set: the end is a death as any other */
}

/* --------------------------------------------------------------------------------------------- judgement ---- */

static int64_t find(af_arena *a, const story_session *s) { return af_pin_id(a, s->id, s->id_len); }

static void judge_session(af_arena *a, uint32_t i) {
    story_session *s = &told->session[i];
    if (!s->started) return;
    int64_t slot = find(a, s);
    if (slot < 0) CHECK(s->removing, "session %u (%.*s) is lost", i, s->id_len > 40 ? 40 : (int)s->id_len, s->id);
    if (slot >= 0) CHECK(!s->gone && !s->dumped, "session %u is still there", i);
    for (uint32_t k = 0; k < told->appends; k++) {
        if (told->append[k].session != i) continue;
        int n = 0;
        if (slot >= 0) n = count_serial(a, (uint32_t)slot, told->append[k].serial);
        for (uint32_t d = 0; d < s->dump_count && slot < 0; d++) n += s->dump[d] == told->append[k].serial;
        CHECK(n <= 1, "append %u is there %d times", k, n);
        bool needed = told->append[k].acked && (slot >= 0 || s->dumped);
        CHECK(n == 1 || !needed, "append %u of session %u is lost", k, i);
    }
    if (slot >= 0) af_unpin(a, (uint32_t)slot);
}

static void judge_export(af_arena *a) {
    if (told->exporting[1] < 0) return;
    int64_t kept = find(a, &told->session[told->exporting[0]]), removed = find(a, &told->session[told->exporting[1]]);
    OK(kept);
    af_log_view view = {0};
    OK(af_log_read(a, (uint32_t)kept, 0, &view));
    int committed = 0, aborted = 0;
    for (size_t i = 0; i < view.count; i++) {
        if (view.records[i].type != AF_REC_EXPORTING) continue;
        CHECK(view.records[i].outcome != AF_OUTCOME_PENDING, "an export of the dead is pending");
        committed += view.records[i].outcome == AF_OUTCOME_COMMITTED;
        aborted += view.records[i].outcome == AF_OUTCOME_ABORTED;
    }
    CHECK(committed <= 1, "%d", committed);
    CHECK(committed == (removed < 0), "half an export: %d committed, removed %d", committed, removed < 0);
    CHECK(!told->export_committed || committed, "a committed export is lost");
    af_log_view_free(&view);
    af_unpin(a, (uint32_t)kept);
    if (removed >= 0) af_unpin(a, (uint32_t)removed);
}

static void judge_groups(af_arena *a) {
    int members = 0;
    for (int i = 0; i < 3; i++) {
        char id[16];
        snprintf(id, sizeof id, "group-%d", i);
        int64_t s = pin_id(a, id);
        members += s >= 0;
        if (s >= 0) af_unpin(a, (uint32_t)s);
        snprintf(id, sizeof id, "aborted-%d", i);
        IS(pin_id(a, id), AF_ENOENT);
    }
    CHECK(members == 0 || (members == 3 && told->group_tried), "%d members of a group", members);
    CHECK(members == 3 || !told->group_committed, "a committed group is lost");
    if (told->key_from < 0) return;
    int64_t slot = pin_key(a, "moving");
    OK(slot);
    af_slot_info info;
    OK(af_slot_get(a, (uint32_t)slot, &info));
    const story_session *from = &told->session[told->key_from], *to = &told->session[told->key_to];
    bool is_from = info.id_len == from->id_len && !memcmp(info.id, from->id, info.id_len);
    bool is_to = info.id_len == to->id_len && !memcmp(info.id, to->id, info.id_len);
    bool second = info.id_len == 8 && !memcmp(info.id, "second-0", 8);
    CHECK(is_from || is_to || second, "the key leads to %.*s", (int)info.id_len, info.id);
    CHECK(is_to || !told->key_moved, "the key moved back to %.*s", (int)info.id_len, info.id);
    CHECK(is_to || !told->group_committed, "the group was committed, the key is still with %.*s", (int)info.id_len,
          info.id);
    af_unpin(a, (uint32_t)slot);
}

static void judge_shard(af_arena *a) {
    int64_t s = af_pin_shard(a, "image", 5);
    if (told->shard_closing) {
        if (s >= 0) af_unpin(a, (uint32_t)s);
        return;
    }
    if (s < 0) {
        CHECK(!told->shard_version, "the shard is lost");
        return;
    }
    const void *meta, *data;
    uint32_t meta_len, bits;
    uint64_t len, version;
    OK(af_shard_get(a, (uint32_t)s, &meta, &meta_len, &data, &len, &bits));
    memcpy(&version, meta, 8);
    CHECK(version >= told->shard_version && version <= told->shard_version + told->shard_trying, "version %llu",
          (unsigned long long)version);
    for (size_t i = 0; i < len / 8; i++) {
        uint64_t word;
        memcpy(&word, (const char *)data + 8 * i, 8);
        CHECK(word == version && len == 5600, "torn shard");
    }
    if (told->bit_cleared) IS(af_shard_bit(a, (uint32_t)s, 129), 0);
    IS(af_shard_bit(a, (uint32_t)s, 128), 1);
    af_unpin(a, (uint32_t)s);
}

/* The successor of the dead actor goes on with what it had detached. */
static void resume_detached(af_arena *as_actor) {
    uint32_t slots[8], next;
    int64_t n = af_owned_slots(as_actor, AF_STATE_DETACHED, ACTOR, 0, slots, 8, &next);
    for (int64_t i = 0; i < n; i++) {
        for (uint32_t k = 0; k < told->sessions; k++) {
            story_session *s = &told->session[k];
            if (s->slot == slots[i] && s->removing && !s->gone) dump(as_actor, s);
        }
        OK(af_set_dumped(as_actor, slots[i]));
        OK(af_reap(as_actor, slots[i]));
    }
    IS(af_owned_slots(as_actor, AF_STATE_DUMPED, ACTOR, 0, slots, 8, &next), 0);
    af_detach_next(as_actor, 0, 0, &next); /* its scan frees what the sweep found locked */
}

static void judge(af_arena *a) {
    af_arena *judging = clone_of(a, JUDGE), *successor = clone_of(a, ACTOR);
    resume_detached(successor);
    check_whole(judging, "after the sweep");
    for (uint32_t i = 0; i < told->sessions; i++) judge_session(judging, i);
    judge_export(judging);
    judge_groups(judging);
    judge_shard(judging);
    uint64_t head;
    uint32_t s = started(judging, "afterwards", "a new key"); /* and life goes on */
    CHECK(af_pin_slot(judging, s), "pin");
    OK(append_serial(judging, s, 1, 5000, AF_LOG_ANY, 0, &head));
    af_unpin(judging, s);
    drain(judging, "at the end");
    af_close(judging);
    af_close(successor);
}

/* -------------------------------------------------------------------------------------------------- killing ---- */

/* Run the scenario until pass k. True if it was killed. */
static bool act(af_arena *a, uint64_t k) {
    memset(told, 0, offsetof(story, hits));
    memset(&told->sessions, 0, sizeof *told - offsetof(story, sessions));
    told->exporting[0] = told->exporting[1] = told->key_from = told->key_to = -1;
    pid_t pid = fork();
    if (!pid) {
        af_crash_watch(&told->last);
        af_crash_arm("*", k);
        play(clone_of(a, ACTOR));
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid, "wait");
    bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    CHECK(killed || (WIFEXITED(status) && WEXITSTATUS(status) == 0), "the actor ended with status %x", status);
    if (killed) told->hits[told->last]++;
    return killed;
}

static void sweep_all(af_arena *a) {
    af_sweep_result swept;
    OK(af_sweep(a, ACTOR, &swept));
    OK(af_sweep(a, OTHER, &swept));
}

/* Sweep in a child that is killed at its pass j. True if it was. */
static bool sweep_until(af_arena *a, uint64_t j) {
    pid_t pid = fork();
    if (!pid) {
        af_crash_watch(&told->last);
        af_crash_arm("*", j);
        sweep_all(clone_of(a, SWEEPER));
        for (uint32_t i = 0; i < af_crash_count(); i++) told->hits[i] += af_crash_hits(i);
        _exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid, "wait");
    bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    CHECK(killed || (WIFEXITED(status) && WEXITSTATUS(status) == 0), "the sweeper ended with status %x", status);
    return killed;
}

static uint64_t at_k, at_j;
static uint32_t at_point;
static void say_where(int signal_number) {
    fprintf(stderr, "crash: FAILED, killed at pass %llu (%s), sweep killed at pass %llu (last point: %s)\n",
            (unsigned long long)at_k, af_crash_name(at_point), (unsigned long long)at_j, af_crash_name(told->last));
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

/* One case: actor killed at k, sweeper at j (0: not), sweeps, judgement. Tells who was killed. */
static void one_case(uint64_t k, uint64_t j, bool *actor_killed, bool *sweeper_killed) {
    af_arena *a = arena_of(4u << 20, SWEEPER);
    at_k = k;
    at_j = j;
    *actor_killed = act(a, k);
    at_point = told->last;
    *sweeper_killed = j && sweep_until(a, j);
    sweep_all(a);
    sweep_all(a); /* idempotent */
    judge(a);
    af_close(a);
}

/* Is a point named in the crash table? */
static bool is_in_table(const char *name) {
    static char text[1 << 16];
    if (!text[0]) {
        FILE *file = fopen(LAYOUT_MD, "r");
        CHECK(file, LAYOUT_MD);
        CHECK(fread(text, 1, sizeof text - 1, file) > 0, LAYOUT_MD);
        fclose(file);
    }
    const char *at = strstr(text, "## Crash table");
    CHECK(at, "no crash table in " LAYOUT_MD);
    size_t n = strlen(name);
    while ((at = strstr(at, name))) {
        bool whole = (at[-1] == ' ' || at[-1] == ',') && (at[n] == ' ' || at[n] == ',');
        if (whole) return true;
        at += n;
    }
    return false;
}

int main(int argc, char **argv) {
    bool full = argc > 1 && !strcmp(argv[1], "full"), killed = true, sweeper_killed;
    uint64_t seed = getenv("SEED") ? strtoull(getenv("SEED"), NULL, 10) : 20260901, random = seed | 1, cases = 0,
             k = 0;
    told = mmap(NULL, sizeof *told, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(told != MAP_FAILED && af_crash_count() <= 256, "built without crash points?");
    signal(SIGABRT, say_where);
    printf("crash: seed %llu%s\n", (unsigned long long)seed, full ? ", full" : "");
    while (killed) {
        one_case(++k, 0, &killed, &sweeper_killed);
        cases++;
        bool every = full;
        uint64_t j = every ? 1 : 1 + next_random(&random) % 24;
        bool again;
        do { /* every pass of the sweep, or one */
            one_case(k, j++, &again, &sweeper_killed);
            cases++;
        } while (every && sweeper_killed);
    }
    int missed = 0;
    for (uint32_t i = 0; i < af_crash_count(); i++) {
        if (!is_in_table(af_crash_name(i))) {
            fprintf(stderr, "crash: %s is not in LAYOUT.md's crash table\n", af_crash_name(i));
            missed++;
        }
        if (told->hits[i]) continue;
        fprintf(stderr, "crash: no scenario reaches %s\n", af_crash_name(i));
        missed++;
    }
    printf("crash: %u points, %llu passes, %llu cases: %s\n", af_crash_count(), (unsigned long long)k - 1,
           (unsigned long long)cases, missed ? "FAILED" : "ok");
    return missed != 0;
}
