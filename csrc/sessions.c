/* sessions.c: starting, removing and detaching sessions.
 *
 * Theory: a session is made in an INIT slot that nobody else can use, gets its index entries under the index lock,
 * and exists from the store of ACTIVE on. It ends by client removal (ACTIVE -> CLOSING -> DUMPED -> FREE, by whoever
 * drops the last pin) or by the cleaner (ACTIVE -> DETACHED -> DUMPED -> FREE). Starting one in a task that already
 * has twenty thousand costs the same as the first, by the task's hint. Invariants
 *   - No two live sessions have one id, or one key: both are looked up and entered under one hold of the lock.
 *   - A kill anywhere before ACTIVE leaves an INIT slot of the dead, which the sweep empties; after it, a session.
 */
#include "layout.h"

static inline uint64_t load_ctl(af_arena *a, uint32_t s) {
    return atomic_load_explicit(&a->ctl[s], memory_order_acquire);
}

/* Write `{task}-{n}`; returns its length. `out` has room for AF_TASK_MAX + 21. */
static uint32_t id_write(char *out, const char *task, uint32_t task_len, uint64_t n) {
    char digits[20];
    uint32_t k = 0;
    do digits[k++] = (char)('0' + n % 10);
    while (n /= 10);
    memcpy(out, task, task_len);
    out[task_len] = '-';
    for (uint32_t i = 0; i < k; i++) out[task_len + 1 + i] = digits[k - 1 - i];
    return task_len + 1 + k;
}
_Static_assert(AF_TASK_MAX + 21 <= AF_ID_MAX, "an id holds any task and any number");

/* Prepare an INIT slot with nothing indexed yet: where long names go is decided here, before the lock. */
static int64_t slot_prepare(af_arena *a, uint32_t names_len, int64_t *names_run) {
    int64_t s = af_slot_take(a, AF_KIND_SESSION);
    *names_run = -1;
    if (s < 0) return s;
    if (names_len > AF_INLINE_NAMES) {
        *names_run = af_run_take(a, af_granules_for(names_len), (uint32_t)s, 0);
        if (*names_run < 0) {
            af_slot_give_back(a, (uint32_t)s);
            return *names_run;
        }
    }
    uint64_t now = af_now_ns();
    af_slot *slot = &a->slots[s];
    atomic_store_explicit(&slot->created_ns, now, memory_order_relaxed);
    atomic_store_explicit(&a->touch[s], now, memory_order_relaxed);
    return s;
}

/* Undo slot_prepare. Nothing was indexed, names may be written. */
static void slot_unprepare(af_arena *a, uint32_t s, int64_t names_run) {
    af_slot *slot = &a->slots[s];
    if (names_run >= 0) af_run_retake(a, (uint64_t)names_run, a->proc);
    atomic_store_explicit(&slot->id_len, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->key_len, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->txn, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->flags, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->names_off, 0, memory_order_release);
    if (names_run >= 0) af_run_free(a, (uint64_t)names_run);
    af_slot_give_back(a, s);
}

/* Enter the names and publish. Lock held. crash: see the file's theory. */
static int publish_locked(af_arena *a, uint32_t s, const char *id, uint32_t id_len, const char *key, uint32_t key_len,
                          uint64_t txn, bool key_moves, int64_t names_run) {
    af_slot *slot = &a->slots[s];
    int r = af_slot_set_names(a, s, id, id_len, key, key_len, names_run);
    if (r) return r;
    atomic_store_explicit(&slot->txn, txn, memory_order_relaxed);
    atomic_store_explicit(&slot->flags, key_moves ? AF_SLOT_KEY_PENDING : 0, memory_order_relaxed);
    r = af_index_insert_locked(a, AF_SPACE_ID, id, id_len, s);
    if (!r && key_len && !key_moves) r = af_index_insert_locked(a, AF_SPACE_KEY, key, key_len, s);
    if (r) {
        af_index_remove_locked(a, s);
        return r;
    }
    AF_CP(start_indexed);
    /* COMMIT POINT. order: release of names, txn and times; every pin acquires. */
    uint64_t c = load_ctl(a, s);
    atomic_store_explicit(&a->ctl[s], af_ctl_next(c, 0, AF_STATE_ACTIVE, 0), memory_order_release);
    AF_CP(start_active);
    /* A kill here leaves a session nobody was told of, under its id, with the key where it was: it goes stale. */
    return key_moves && !txn ? af_index_bind_key_locked(a, s, 0) : AF_OK;
}

static int start_locked(af_arena *a, uint32_t s, const char *task, uint32_t task_len, const char *key,
                        uint32_t key_len, uint64_t txn, int64_t rebind_from, int64_t names_run, af_started *out) {
    uint32_t bound = 0, other;
    bool key_moves = key_len && af_index_find_locked(a, AF_SPACE_KEY, key, key_len, AF_NONE, &bound);
    if (key_moves && (int64_t)bound != rebind_from) {
        out->slot = bound;
        return AF_EEXIST;
    }
    uint64_t n = af_hint_get_locked(a, task, task_len);
    for (;; n++) {
        out->id_len = id_write(out->id, task, task_len, n);
        AF_CP(start_probed);
        if (!af_index_find_locked(a, AF_SPACE_ID, out->id, out->id_len, AF_NONE, &other)) break;
    }
    out->slot = s;
    int r = publish_locked(a, s, out->id, out->id_len, key, key_len, txn, key_moves, names_run);
    if (af_ctl_state(load_ctl(a, s)) == AF_STATE_ACTIVE) {
        af_hint_raise_locked(a, task, task_len, n + 1);
        AF_CP(start_hinted);
    }
    return r;
}

int af_session_start(af_arena *a, const char *task, uint32_t task_len, const char *key, uint32_t key_len,
                     uint64_t txn, int64_t rebind_from, af_started *out) {
    int64_t names_run;
    out->slot = 0;
    out->id_len = 0;
    if (task_len > AF_TASK_MAX || key_len > AF_KEY_MAX) return AF_EINVAL;
    if (txn && af_txn_state(a, txn) != AF_TXN_OPEN) return AF_EGONE;
    int64_t s = slot_prepare(a, task_len + 21 + key_len, &names_run);
    if (s < 0) return (int)s;
    int r = af_index_lock(a, AF_IMPATIENT);
    if (!r) {
        r = start_locked(a, (uint32_t)s, task, task_len, key, key_len, txn, rebind_from, names_run, out);
        af_index_unlock(a);
    }
    bool exists = af_ctl_state(load_ctl(a, (uint32_t)s)) != AF_STATE_INIT;
    if (r && !exists)
        slot_unprepare(a, (uint32_t)s, names_run);
    else if (r)
        af_session_close(a, (uint32_t)s); /* its key could not be entered */
    if (r && exists) af_slot_reap_closing(a, (uint32_t)s);
    return r;
}

int64_t af_session_open_named(af_arena *a, const char *id, uint32_t len) {
    if (!len || len > AF_ID_MAX) return AF_EINVAL;
    for (;;) { /* another turn only if the session was made or removed by somebody in between */
        int64_t s = af_pin_id(a, id, len), names_run;
        if (s != AF_ENOENT) return s;
        s = slot_prepare(a, len, &names_run);
        if (s < 0) return s;
        uint32_t other;
        int r = af_index_lock(a, AF_IMPATIENT);
        if (!r) {
            bool bound = af_index_find_locked(a, AF_SPACE_ID, id, len, AF_NONE, &other) != NULL;
            r = bound ? AF_EEXIST : publish_locked(a, (uint32_t)s, id, len, "", 0, 0, false, names_run);
            af_index_unlock(a);
        }
        if (r) slot_unprepare(a, (uint32_t)s, names_run);
        if (r && r != AF_EEXIST) return r;
        if (r == AF_EEXIST && !af_slot_visible(a, other))
            return AF_EBUSY; /* a member of an open group: unlikely id */
    }
}

int af_session_close(af_arena *a, uint32_t s) {
    if (!af_slot_ok(a, s)) return AF_EINVAL;
    bool locked = af_index_lock(a, AF_IMPATIENT) == AF_OK; /* else the entries go with the slot */
    bool closed = af_slot_close(a, s);
    if (locked) {
        if (closed) af_index_remove_locked(a, s);
        af_index_unlock(a);
    }
    return closed ? AF_OK : AF_EGONE;
}

/* ------------------------------------------------------------------------------------------------ cleaner ---- */

/* Detach s if nobody pins it and it has not been used since cutoff_ns.
 * order: the CAS compares the word read before the time, so a pin or unpin between the two makes it fail, and a touch
 *        happens under a pin. Never blocks.
 * crash: before the CAS nothing changed; after it the successor finds DETACHED(owner). */
int af_detach(af_arena *a, uint32_t s, uint64_t cutoff_ns) {
    if (!af_slot_ok(a, s) || af_slot_kind(a, s) != AF_KIND_SESSION) return AF_EINVAL;
    uint64_t c = load_ctl(a, s);
    if (af_ctl_state(c) != AF_STATE_ACTIVE || af_ctl_mask(c)) return 0;
    if (atomic_load_explicit(&a->touch[s], memory_order_acquire) >= cutoff_ns) return 0;
    if (!af_slot_visible(a, s)) return 0; /* its group is still being made */
    if (!atomic_compare_exchange_strong_explicit(&a->ctl[s], &c, af_ctl_next(c, a->proc, AF_STATE_DETACHED, 0),
                                                 memory_order_acq_rel, memory_order_relaxed)) {
        return 0;
    }
    AF_CP(detached);
    return 1;
}

int64_t af_detach_next(af_arena *a, uint64_t cutoff_ns, uint32_t cursor, uint32_t *next) {
    for (uint32_t kind = AF_KIND_SESSION; kind <= AF_KIND_SHARD; kind++) {
        uint32_t first = af_slots_first(a, kind), end = af_slots_end(a, kind);
        for (uint32_t s = cursor > first ? cursor : first; s < end; s++) {
            uint64_t c = load_ctl(a, s);
            if (af_ctl_mask(c)) continue;
            if (af_ctl_state(c) == AF_STATE_CLOSING) af_slot_reap_closing(a, s);
            if (kind != AF_KIND_SESSION || af_ctl_state(c) != AF_STATE_ACTIVE) continue;
            if (af_detach(a, s, cutoff_ns) != 1) continue;
            *next = s + 1;
            return s;
        }
    }
    *next = 0;
    return -1;
}

static bool is_mine(af_arena *a, uint32_t s, uint32_t state) {
    if (!af_slot_ok(a, s)) return false;
    uint64_t c = load_ctl(a, s);
    return af_ctl_state(c) == state && af_ctl_owner(c) == a->proc;
}

/* crash: before it the successor writes the dump again, over its own try; after it only memory is left to free. */
int af_set_dumped(af_arena *a, uint32_t s) {
    if (!is_mine(a, s, AF_STATE_DETACHED)) return AF_EGONE;
    atomic_store_explicit(&a->ctl[s], af_ctl_next(load_ctl(a, s), a->proc, AF_STATE_DUMPED, 0), memory_order_release);
    AF_CP(dumped);
    return AF_OK;
}

int af_reap(af_arena *a, uint32_t s) {
    if (!is_mine(a, s, AF_STATE_DUMPED)) return AF_EGONE;
    return af_slot_reap(a, s, false);
}
