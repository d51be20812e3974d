/* unit_sessions.c: names, pins, starting, closing, detaching, groups, exports. */
#include "unit.h"

/* ---------------------------------------------------------------------------------------------- sessions ---- */

static uint64_t probes(void) {
    for (uint32_t i = 0; i < af_crash_count(); i++) {
        if (!strcmp(af_crash_name(i), "start_probed")) return af_crash_hits(i);
    }
    CHECK(false, "built without crash points");
    return 0;
}

void test_start(void) {
    af_arena *a = arena_of(MIB, 1);
    af_started out;
    uint32_t s = started(a, "task", "key");
    IS(pin_id(a, "task-0"), s);
    IS(pin_key(a, "key"), s);
    IS(af_pin_count(a, s), 2);
    IS(pin_key(a, "task-0"), AF_ENOENT);
    IS(pin_id(a, "key"), AF_ENOENT);
    IS(pin_key(a, ""), AF_ENOENT);
    IS(af_session_start(a, "task", 4, "key", 3, 0, -1, &out), AF_EEXIST);
    IS(out.slot, s);
    /* The key moves, the old session stays under its id. */
    OK(af_session_start(a, "task", 4, "key", 3, 0, s, &out));
    CHECK(out.id_len == 6 && !memcmp(out.id, "task-1", 6), "%.*s", (int)out.id_len, out.id);
    IS(pin_key(a, "key"), out.slot);
    IS(pin_id(a, "task-0"), s);
    af_unpin(a, out.slot);
    for (int i = 0; i < 3; i++) af_unpin(a, s);
    IS(af_pin_count(a, s), 0);
    af_unpin(a, s); /* one too many does nothing */
    /* An empty key is none; an empty task is one. */
    started(a, "", "");
    IS(pin_id(a, "-0"), 2);
    af_unpin(a, 2);
    int64_t named = af_session_open_named(a, "__hitl__", 8);
    IS(af_session_open_named(a, "__hitl__", 8), named);
    IS(af_next_ordinal(a, (uint32_t)named), 0);
    IS(af_next_ordinal(a, (uint32_t)named), 1);
    OK(af_deadline_set(a, (uint32_t)named, 77));
    IS(af_deadline_get(a, (uint32_t)named), 77);
    af_unpin(a, (uint32_t)named);
    af_unpin(a, (uint32_t)named);
    IS(af_session_open_named(a, "", 0), AF_EINVAL);
    static char big[AF_TASK_MAX + 1];
    IS(af_session_start(a, big, sizeof big, "", 0, 0, -1, &out), AF_EINVAL);
    check_whole(a, "after starts");
    drain(a, "start");
    af_close(a);
}

void test_close_and_pins(void) {
    af_arena *a = arena_of(MIB, 1), *b = clone_of(a, 2);
    uint32_t s = started(a, "t", "k");
    uint64_t head;
    OK(pin_key(a, "k"));
    OK(pin_key(b, "k"));
    OK(append_serial(a, s, 1, 100, AF_LOG_ANY, 0, &head));
    OK(af_session_close(a, s));
    IS(af_session_close(b, s), AF_EGONE);
    IS(pin_key(b, "k"), AF_ENOENT);
    IS(af_pin_slot(b, s), 0);
    IS(append_serial(b, s, 2, 100, AF_LOG_ANY, 0, &head), AF_EGONE);
    IS(count_serial(b, s, 1), 1);          /* its memory stays while pinned */
    uint32_t again = started(a, "t", "k"); /* and its names are free at once */
    CHECK(again != s, "slot %u is still pinned", s);
    IS(pin_id(a, "t-0"), again);
    af_unpin(a, again);
    af_unpin(a, s);
    IS(af_ctl_state(a->ctl[s]), AF_STATE_CLOSING);
    af_unpin(b, s);
    IS(af_ctl_state(a->ctl[s]), AF_STATE_FREE);
    drain(a, "close");
    /* The last unpin finds the index lock taken: the cleaner's scan frees the slot instead. */
    s = started(a, "t", "k");
    OK(pin_key(a, "k"));
    OK(af_index_lock(b, AF_IMPATIENT));
    IS(af_lock_owner(a), 2);
    OK(af_session_close(a, s));
    af_unpin(a, s);
    af_started out;
    IS(af_session_start(a, "x", 1, "y", 1, 0, -1, &out), AF_EBUSY);
    IS(af_ctl_state(a->ctl[s]), AF_STATE_CLOSING);
    af_index_unlock(b);
    IS(af_lock_owner(a), -1);
    uint32_t next;
    IS(af_detach_next(b, 0, 0, &next), -1);
    IS(af_ctl_state(a->ctl[s]), AF_STATE_FREE);
    drain(a, "late reap");
    af_close(b);
    af_close(a);
}

void test_twenty_thousand(void) {
    af_arena *a = NULL;
    af_started out;
    OK(af_create(MIB, 32768, 512, 1, &a));
    af_crash_arm("*", 0);
    for (int i = 0; i < 20000; i++) {
        OK(af_session_start(a, "the same task", 13, "", 0, 0, -1, &out));
        CHECK(probes() == (uint64_t)i + 1, "start %d took %llu probes", i,
              (unsigned long long)(probes() - (uint64_t)i));
    }
    IS(strncmp(out.id, "the same task-19999", out.id_len), 0);
    /* Freed numbers are given out again, the smallest first, and then the end is found at once. */
    static const char *freed[] = {"the same task-19000", "the same task-7", "the same task-3", "the same task-400"};
    for (int i = 0; i < 4; i++) {
        int64_t s = pin_id(a, freed[i]);
        OK(s);
        OK(af_session_close(a, (uint32_t)s));
        af_unpin(a, (uint32_t)s);
    }
    static const char *order[] = {"the same task-3", "the same task-7", "the same task-400", "the same task-19000",
                                  "the same task-20000"};
    for (int i = 0; i < 5; i++) {
        OK(af_session_start(a, "the same task", 13, "", 0, 0, -1, &out));
        CHECK(out.id_len == strlen(order[i]) && !memcmp(out.id, order[i], out.id_len), "%.*s, not %s",
              (int)out.id_len, out.id, order[i]);
    }
    af_crash_arm("*", 0);
    OK(af_session_start(a, "the same task", 13, "", 0, 0, -1, &out));
    IS(probes(), 1);
    /* All slots: the next start says so, and one freed slot is enough. */
    int r;
    uint32_t last = out.slot;
    while ((r = af_session_start(a, "other", 5, "", 0, 0, -1, &out)) == AF_OK) last = out.slot;
    IS(r, AF_ENOSPC);
    CHECK(af_pin_slot(a, last), "pin");
    OK(af_session_close(a, last));
    af_unpin(a, last);
    OK(af_session_start(a, "other", 5, "", 0, 0, -1, &out));
    IS(out.slot, last);
    drain(a, "twenty thousand");
    af_close(a);
}

void test_long_names(void) {
    af_arena *a = arena_of(MIB, 1);
    static char task[AF_TASK_MAX], key[AF_KEY_MAX];
    memset(task, 't', sizeof task);
    memset(key, 'k', sizeof key);
    af_started out;
    for (uint32_t n = 100; n <= AF_TASK_MAX; n += 77) {
        OK(af_session_start(a, task, n, key, n, 0, -1, &out));
        IS(af_pin_key(a, key, n), out.slot);
        IS(af_pin_id(a, out.id, out.id_len), out.slot);
        af_slot_info info;
        OK(af_slot_get(a, out.slot, &info));
        CHECK(info.id_len == n + 2 && info.key_len == n && !memcmp(info.id, out.id, n + 2), "info");
        CHECK(!memcmp(info.key, key, n), "info");
        af_unpin(a, out.slot);
        af_unpin(a, out.slot);
        IS(af_session_start(a, task, n, key, n, 0, -1, &out), AF_EEXIST);
    }
    check_whole(a, "long names");
    drain(a, "long names");
    af_close(a);
}

void test_detach(void) {
    af_arena *a = arena_of(MIB, 1), *cleaner = clone_of(a, 30);
    uint32_t s = started(a, "t", "k"), next;
    uint64_t head;
    CHECK(af_pin_slot(a, s), "pin");
    IS(af_detach(cleaner, s, UINT64_MAX), 0); /* pinned */
    af_touch(a, s);
    OK(append_serial(a, s, 7, 50, AF_LOG_ANY, 0, &head));
    af_unpin(a, s);
    af_slot_info info;
    OK(af_slot_get(a, s, &info));
    IS(af_detach(cleaner, s, info.touched_ns), 0); /* not before */
    IS(af_detach_next(cleaner, UINT64_MAX, 0, &next), s);
    IS(next, s + 1);
    IS(af_detach_next(cleaner, UINT64_MAX, next, &next), -1);
    IS(next, 0);
    IS(pin_key(a, "k"), AF_ENOENT);
    IS(af_pin_slot(a, s), 0);
    IS(append_serial(a, s, 8, 50, AF_LOG_ANY, 0, &head), AF_EGONE);
    OK(append_serial(cleaner, s, 9, 50, AF_LOG_ANY, 0, &head)); /* its owner may */
    uint32_t owned[4];
    IS(af_owned_slots(a, AF_STATE_DETACHED, 30, 0, owned, 4, &next), 1);
    CHECK(owned[0] == s && next == 0, "owned");
    IS(af_reap(cleaner, s), AF_EGONE); /* not dumped yet */
    IS(af_set_dumped(a, s), AF_EGONE); /* not the owner */
    OK(af_set_dumped(cleaner, s));
    OK(af_reap(cleaner, s));
    drain(a, "detach");
    /* A group that is not committed yet is nobody's to detach. */
    int64_t ref = af_txn_begin(a);
    af_started out;
    OK(af_session_start(a, "g", 1, "", 0, (uint64_t)ref, -1, &out));
    IS(af_detach(cleaner, out.slot, UINT64_MAX), 0);
    OK(af_txn_abort(a, (uint64_t)ref, &out.slot, 1));
    /* Paging over owned slots of both kinds. */
    for (int i = 0; i < 10; i++) started(a, "p", "");
    while (af_detach_next(cleaner, UINT64_MAX, next, &next) >= 0) {}
    uint32_t seen = 0, cursor = 0, page[3];
    do seen += (uint32_t)af_owned_slots(a, AF_STATE_DETACHED, 30, cursor, page, 3, &cursor);
    while (cursor);
    IS(seen, 10);
    af_close(cleaner);
    af_close(a);
}

/* ------------------------------------------------------------------------------------------ transactions ---- */

void test_groups(void) {
    af_arena *a = arena_of(MIB, 1), *b = clone_of(a, 2);
    af_started member[3];
    uint32_t slots[3], old = started(a, "old", "key");
    int64_t ref = af_txn_begin(a);
    OK(ref);
    for (int i = 0; i < 3; i++) {
        OK(af_session_start(a, "g", 1, i ? "" : "key", i ? 0 : 3, (uint64_t)ref, i ? -1 : (int64_t)old, &member[i]));
        slots[i] = member[i].slot;
    }
    IS(pin_id(b, "g-0"), AF_ENOENT);
    IS(af_pin_slot(b, slots[1]), 0);
    IS(pin_key(b, "key"), old);
    af_unpin(b, old);
    IS(af_txn_state(b, (uint64_t)ref), AF_TXN_OPEN);
    IS(af_txn_finish(a, (uint64_t)ref, slots, 3), AF_EGONE);
    IS(af_txn_commit(b, (uint64_t)ref), AF_EGONE);
    OK(af_txn_commit(a, (uint64_t)ref));
    IS(pin_id(b, "g-2"), slots[2]);
    af_unpin(b, slots[2]);
    OK(af_index_lock(b, AF_IMPATIENT));
    IS(af_txn_finish(a, (uint64_t)ref, slots, 3), AF_EBUSY); /* a key must move */
    af_index_unlock(b);
    OK(af_txn_finish(a, (uint64_t)ref, slots, 3));
    IS(af_txn_finish(a, (uint64_t)ref, slots, 3), AF_EGONE);
    IS(af_txn_state(b, (uint64_t)ref), AF_TXN_GONE);
    IS(pin_key(b, "key"), slots[0]);
    af_unpin(b, slots[0]);
    IS(pin_id(b, "old-0"), old);
    af_unpin(b, old);
    check_whole(a, "group");
    /* Aborted: as if it had never been. */
    ref = af_txn_begin(a);
    for (int i = 0; i < 3; i++) {
        OK(af_session_start(a, "h", 1, "", 0, (uint64_t)ref, -1, &member[i]));
        slots[i] = member[i].slot;
    }
    OK(af_txn_abort(a, (uint64_t)ref, slots, 3));
    IS(pin_id(b, "h-0"), AF_ENOENT);
    IS(af_txn_commit(a, (uint64_t)ref), AF_EGONE);
    IS(af_session_start(a, "h", 1, "", 0, (uint64_t)ref, -1, &member[0]), AF_EGONE);
    started(a, "h", "");
    IS(pin_id(b, "h-0"), slots[0]);
    af_unpin(b, slots[0]);
    drain(a, "groups");
    for (int i = 0; i < AF_TXNS; i++) OK(af_txn_begin(a));
    IS(af_txn_begin(b), AF_EBUSY);
    af_sweep_result swept;
    OK(af_sweep(b, 1, &swept));
    IS(swept.txns_aborted, AF_TXNS);
    af_close(b);
    af_close(a);
}

static int outcome_of_last(af_arena *a, uint32_t s) {
    af_log_view view = {0};
    OK(af_log_read(a, s, 0, &view));
    int outcome = -100;
    for (size_t i = 0; i < view.count; i++) {
        if (view.records[i].type != AF_REC_EXPORTING) continue;
        outcome = (int)view.records[i].outcome;
        IS(af_record_outcome(a, s, view.head, view.records[i].offset), outcome);
    }
    af_log_view_free(&view);
    return outcome;
}

void test_exports(void) {
    af_arena *a = arena_of(MIB, 1), *b = clone_of(a, 2);
    uint32_t slots[2] = {started(a, "t", ""), started(a, "t", "")};
    uint64_t head, offset;
    CHECK(af_pin_slot(a, slots[0]) && af_pin_slot(a, slots[1]) && af_pin_slot(b, slots[0]), "pin");
    for (int round = 0; round < 2; round++) {
        int64_t ref = af_txn_begin(a);
        af_new_record rec = {.type = AF_REC_EXPORTING, .aux = (uint64_t)ref};
        OK(af_log_append(a, slots[0], &rec, AF_LOG_ANY, AF_CRITICAL, 0, &head));
        offset = af_head_offset(head);
        rec.flags = AF_REC_FLAG_REMOVE;
        OK(af_log_append(a, slots[1], &rec, AF_LOG_ANY, AF_CRITICAL, 0, &head));
        IS(outcome_of_last(b, slots[0]), AF_OUTCOME_PENDING);
        head = af_log_head(a, slots[0]);
        IS(af_log_compact(b, slots[0], head, "x", 1, &offset, 1, &head), AF_EBUSY);
        if (round == 0) {
            OK(af_txn_abort(a, (uint64_t)ref, slots, 2));
            IS(outcome_of_last(b, slots[0]), AF_OUTCOME_ABORTED);
        } else {
            OK(af_txn_commit(a, (uint64_t)ref));
            IS(outcome_of_last(b, slots[0]), AF_OUTCOME_COMMITTED);
            head = af_log_head(a, slots[0]);
            IS(af_log_compact(b, slots[0], head, "x", 1, &offset, 1, &head), AF_EBUSY);
            OK(af_txn_finish(a, (uint64_t)ref, slots, 2));
            IS(outcome_of_last(b, slots[0]), AF_OUTCOME_COMMITTED);
        }
        head = af_log_head(a, slots[0]);
        OK(af_log_compact(b, slots[0], head, "x", 1, &offset, 1, &head)); /* the outcome goes along */
        IS(outcome_of_last(b, slots[0]), round ? AF_OUTCOME_COMMITTED : AF_OUTCOME_ABORTED);
        CHECK(af_pin_slot(b, slots[1]) == !round, "removed by the export");
        if (!round) af_unpin(b, slots[1]);
    }
    for (int i = 0; i < 2; i++) af_unpin(a, slots[i]);
    af_unpin(b, slots[0]);
    IS(pin_id(a, "t-1"), AF_ENOENT);
    drain(a, "exports");
    af_close(b);
    af_close(a);
}
