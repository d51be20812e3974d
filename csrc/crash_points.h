/* crash_points.h (private): AF_CP(name) marks a place where a test kills the process; AF_FAULT() a memory request
 * that a test makes fail. Both are nothing in a plain build.
 *
 * The list below is the registry. A name that is not on it does not compile, and one on it that no scenario
 * of tests/c/crash.c reaches fails that test. Each is explained in LAYOUT.md's crash table.
 */
#ifndef AF_CRASH_POINTS_H
#define AF_CRASH_POINTS_H

/* clang-format off */
#define AF_CRASH_LIST(X)                                                                                           \
    X(run_claimed) X(run_half_claimed) X(run_half_freed) X(run_half_trimmed) X(run_before_head_freed)              \
    X(block_backed) X(punch_claimed) X(punch_punched) X(punch_cold)                                                \
    X(slot_taken) X(slots_backed) X(names_written) X(names_linked)                                                 \
    X(lock_taken) X(index_before_store) X(index_overflow_taken) X(index_inserted) X(index_swapped)                 \
    X(index_removed_one) X(index_overflow_unlinked) X(index_rebuild)                                               \
    X(start_probed) X(start_indexed) X(start_active) X(start_hinted) X(key_bound)                                  \
    X(pinned) X(unpinned) X(closed)                                                                                \
    X(reap_taken) X(reap_unindexed) X(reap_retaken) X(reap_unlinked)                                               \
    X(reap_unnamed) X(reap_half_freed) X(reap_freed) X(slot_freed)                                                 \
    X(append_bumped) X(append_written) X(append_linked)                                                            \
    X(append_trimmed) X(append_committed) X(append_opened) X(reserved)                                             \
    X(compact_written) X(compact_intent) X(compact_barred)                                                         \
    X(compact_cut) X(compact_half_retaken) X(compact_retaken)                                                      \
    X(compact_intent_cleared) X(compact_half_freed)                                                                \
    X(txn_begun) X(txn_committed) X(txn_half_finished)                                                             \
    X(txn_outcome_set) X(txn_finished) X(txn_aborting) X(txn_aborted)                                              \
    X(detached) X(dumped)                                                                                          \
    X(shard_written) X(shard_headed) X(shard_intent)                                                               \
    X(shard_active) X(shard_swapped) X(shard_intent_cleared) X(shard_bit_cleared)                                  \
    X(sweep_begun) X(sweep_shard_intent) X(sweep_compact_intent)                                                   \
    X(sweep_runs) X(sweep_txns) X(sweep_slot_closed)                                                               \
    X(sweep_pin_cleared) X(sweep_slots) X(sweep_counted)
/* clang-format on */

#ifdef AF_CRASH_POINTS
#define AF_CRASH_ENUM(name) af_cp_##name,
enum { AF_CRASH_LIST(AF_CRASH_ENUM) af_cp_count };
void af_crash_pass(unsigned i);
int af_fault_pass(void);
#define AF_CP(name) af_crash_pass(af_cp_##name)
#define AF_FAULT()  af_fault_pass()
#else
#define AF_CP(name) ((void)0)
#define AF_FAULT()  0
#endif

#endif
