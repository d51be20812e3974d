/* crash.c: killing oneself on request. Only test builds (-DAF_CRASH_POINTS) count and kill; see crash_points.h.
 *
 * Counters are this process's own and not atomic across threads: crash tests run one thread a process.
 */
#include "layout.h"

#ifdef AF_CRASH_POINTS
#include <signal.h>

#define AF_CRASH_NAME(name) #name,
static const char *const names[] = {AF_CRASH_LIST(AF_CRASH_NAME)};
static uint64_t hits[af_cp_count], kill_at[af_cp_count], passes, kill_at_any, faults_left;

static _Atomic uint32_t *watcher;

void af_crash_pass(unsigned i) {
    if (watcher) atomic_store_explicit(watcher, i, memory_order_relaxed);
    if (++hits[i] == kill_at[i] || ++passes == kill_at_any) raise(SIGKILL);
}

int af_fault_pass(void) { return faults_left && --faults_left == 0; }

uint32_t af_crash_count(void) { return af_cp_count; }
const char *af_crash_name(uint32_t i) { return i < af_cp_count ? names[i] : ""; }
uint64_t af_crash_hits(uint32_t i) { return i < af_cp_count ? hits[i] : 0; }

int af_crash_arm(const char *name, uint64_t nth) {
    memset(hits, 0, sizeof hits);
    memset(kill_at, 0, sizeof kill_at);
    passes = kill_at_any = 0;
    if (!nth) return AF_OK;
    if (strcmp(name, "*") == 0) {
        kill_at_any = nth;
        return AF_OK;
    }
    for (uint32_t i = 0; i < af_cp_count; i++) {
        if (strcmp(names[i], name) == 0) {
            kill_at[i] = nth;
            return AF_OK;
        }
    }
    return AF_ENOENT;
}

void af_crash_watch(void *last) { watcher = last; }

int af_fault_arm(uint64_t nth) {
    faults_left = nth;
    return AF_OK;
}
#else
uint32_t af_crash_count(void) { return 0; }
const char *af_crash_name(uint32_t i) {
    (void)i;
    return "";
}
uint64_t af_crash_hits(uint32_t i) {
    (void)i;
    return 0;
}
int af_crash_arm(const char *name, uint64_t nth) {
    (void)name;
    (void)nth;
    return AF_EINVAL;
}
void af_crash_watch(void *last) { (void)last; }
int af_fault_arm(uint64_t nth) {
    (void)nth;
    return AF_EINVAL;
}
#endif
