/* fakecuda.c: a libcuda.so.1 for machines without a GPU, as far as csrc/cuda.c uses it.
 *
 * Theory: device memory is a memfd mapped into the process, so a device pointer is a host pointer and the tests can
 * look at it. A VMM handle is a descriptor of that memfd; exporting and importing dup it, so the memory lives as long
 * as anybody has one, as the driver documents. A legacy IPC handle names the maker's pid and descriptor, so it stops
 * working when the maker is gone. What the real driver refuses is refused here: calls without a current context,
 * sizes off the granularity, access before cuMemSetAccess, opening an IPC handle in its maker or twice in one process.
 * Copies happen in cuStreamSynchronize, not before: who acknowledges a copy without waiting for it is caught.
 *
 * Failures. FAKECUDA_STATE names a file of struct state, mapped by every process that loads this: `calls` counts
 * entry points passed, and the call with that number `fail_at` fails with CUDA_ERROR_UNKNOWN. `live` counts what has
 * been acquired and not given back (handles, ranges, mappings, allocations, imports, streams, contexts). With
 * `kill_at` the process dies by SIGKILL there instead.
 *
 * Devices. FAKECUDA_DEVICES (1) of them; CUDA_VISIBLE_DEVICES says which a process may use and in which order, as
 * numbers. Memory belongs to one: what touches it through another device's context is refused, and a VMM allocation
 * says in its memfd's name whose it is. FAKECUDA_NO_FDS=1: they cannot export descriptors; FAKECUDA_TOTAL (bytes of
 * each, 1 GiB).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    MAP_FAILURE = 205,
    ALREADY_MAPPED = 208,
    INVALID_HANDLE = 400,
    NOT_SUPPORTED = 801,
    ILLEGAL_ADDRESS = 700,
    UNKNOWN = 999
};

typedef int R;
typedef unsigned long long U;

struct state {
    _Atomic uint64_t calls, fail_at, kill_at;
    _Atomic int64_t live;
    char failed[48];
};

enum { MAX = 1024, MAX_DEVICES = 16, GRANULARITY = 2 << 20, LEGACY_MAGIC = 0xC0DA };

struct range {
    U at;
    size_t bytes;
    int fd;     /* -1: reserved only */
    int access; /* cuMemSetAccess was called, or plain memory */
    int legacy; /* opened from a handle of this pid, 0 otherwise */
    int device; /* physical number */
};

struct copy {
    void *to;
    const void *from;
    size_t bytes;
};

static struct state alone, *state = &alone;
static struct range ranges[MAX];
static struct copy queued[64];
static int queue_length, initialised;
static int retained[MAX_DEVICES]; /* primary contexts, by physical number */
static _Thread_local void *contexts[16];
static _Thread_local int depth;

__attribute__((constructor)) static void attach(void) {
    const char *path = getenv("FAKECUDA_STATE");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *p = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p != MAP_FAILED) state = p;
}

static int refused(const char *name, int needs_context, R *why) {
    uint64_t n = atomic_fetch_add(&state->calls, 1) + 1;
    if (n == atomic_load(&state->kill_at)) raise(SIGKILL);
    if (n == atomic_load(&state->fail_at)) {
        snprintf(state->failed, sizeof state->failed, "%s", name);
        *why = UNKNOWN;
        return 1;
    }
    if (needs_context && initialised != getpid()) {
        *why = NOT_INITIALIZED;
        return 1;
    }
    if (needs_context > 1 && !depth) {
        *why = INVALID_CONTEXT;
        return 1;
    }
    return 0;
}
#define ENTER(needs)                                                                                                  \
    R why;                                                                                                            \
    if (refused(__func__, needs, &why)) return why
#define GLOBAL 0
#define DEVICE 1
#define CONTEXT 2

static void live(int by) { atomic_fetch_add(&state->live, by); }

static uint64_t setting(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

static int device_count(void) {
    uint64_t all = setting("FAKECUDA_DEVICES", 1);
    return all < MAX_DEVICES ? (int)all : MAX_DEVICES;
}

/* The physical number of this process's device `ordinal`; -1: there is none. As the real driver reads the variable,
 * the list ends at the first number that is no device's. */
static int physical(int ordinal) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (ordinal < 0) return -1;
    if (!visible) return ordinal < device_count() ? ordinal : -1;
    for (int i = 0; *visible; i++) {
        char *end;
        long n = strtol(visible, &end, 10);
        if (end == visible || n < 0 || n >= device_count()) return -1;
        if (i == ordinal) return (int)n;
        visible = *end == ',' ? end + 1 : end;
        if (end[0] && end[0] != ',') return -1;
    }
    return -1;
}

/* The physical number of the current context's device. */
static int here(void) { return depth ? (int)(intptr_t)contexts[depth - 1] - 1 : -1; }

/* Of a VMM allocation's descriptor, or of one to it. */
static int device_of(int fd) {
    char link[64], name[128];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof name - 1);
    if (n < 0) return -1;
    name[n] = 0;
    int found;
    return sscanf(name, "/memfd:fakecuda-pool-%d", &found) == 1 ? found : -1;
}

static struct range *range_at(U p) {
    for (int i = 0; i < MAX; i++)
        if (ranges[i].bytes && p >= ranges[i].at && p < ranges[i].at + ranges[i].bytes) return &ranges[i];
    return NULL;
}

static struct range *range_new(U at, size_t bytes, int fd, int access, int device) {
    for (int i = 0; i < MAX; i++)
        if (!ranges[i].bytes) {
            ranges[i] = (struct range){at, bytes, fd, access, 0, device};
            live(1);
            return &ranges[i];
        }
    return NULL;
}

static void range_drop(struct range *r) {
    munmap((void *)(uintptr_t)r->at, r->bytes);
    if (r->fd >= 0) close(r->fd);
    r->bytes = 0;
    live(-1);
}

R cuGetErrorName(R e, const char **s) {
    static const struct {
        R code;
        const char *name;
    } names[] = {{OK, "CUDA_SUCCESS"},
                 {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
                 {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
                 {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
                 {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
                 {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
                 {MAP_FAILURE, "CUDA_ERROR_MAP_FAILED"},
                 {ALREADY_MAPPED, "CUDA_ERROR_ALREADY_MAPPED"},
                 {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
                 {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
                 {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                 {UNKNOWN, "CUDA_ERROR_UNKNOWN"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == e) {
            *s = names[i].name;
            return OK;
        }
    return INVALID_VALUE;
}

R cuGetErrorString(R e, const char **s) {
    *s = e ? "the fake driver says no" : "no error";
    return OK;
}

R cuInit(unsigned flags) {
    ENTER(GLOBAL);
    if (flags) return INVALID_VALUE;
    if (physical(0) < 0) return 100; /* CUDA_ERROR_NO_DEVICE */
    if (initialised && initialised != getpid()) return NOT_INITIALIZED; /* made by fork: there the driver is dead */
    initialised = getpid();
    return OK;
}

R cuDriverGetVersion(int *v) {
    ENTER(GLOBAL);
    *v = 12040;
    return OK;
}

R cuDeviceGetCount(int *n) {
    ENTER(DEVICE);
    *n = 0;
    while (physical(*n) >= 0) ++*n;
    return OK;
}

static int no_device(int d) { return physical(d) < 0; }

R cuDeviceGet(int *d, int i) {
    ENTER(DEVICE);
    if (no_device(i)) return INVALID_DEVICE;
    *d = i;
    return OK;
}

R cuDeviceGetUuid_v2(unsigned char uuid[16], int d) {
    ENTER(DEVICE);
    if (no_device(d)) return INVALID_DEVICE;
    memset(uuid, 0xA0 + physical(d), 16);
    return OK;
}

R cuDeviceGetName(char *name, int size, int d) {
    ENTER(DEVICE);
    snprintf(name, (size_t)size, "Fake GPU %d", physical(d));
    return OK;
}

R cuDeviceGetAttribute(int *value, int attribute, int d) {
    ENTER(DEVICE);
    if (no_device(d)) return INVALID_DEVICE;
    if (attribute != 102 && attribute != 103) return INVALID_VALUE;
    *value = !setting("FAKECUDA_NO_FDS", 0);
    return OK;
}

R cuDevicePrimaryCtxRetain(void **c, int d) {
    ENTER(DEVICE);
    if (no_device(d)) return INVALID_DEVICE;
    *c = (void *)(intptr_t)(physical(d) + 1);
    retained[physical(d)]++;
    live(1);
    return OK;
}

R cuDevicePrimaryCtxRelease_v2(int d) {
    ENTER(DEVICE);
    if (no_device(d)) return INVALID_DEVICE;
    retained[physical(d)]--;
    live(-1);
    return OK;
}

R cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) {
    ENTER(DEVICE);
    if (no_device(d)) return INVALID_DEVICE;
    *flags = 0;
    *active = retained[physical(d)] > 0;
    return OK;
}

R cuCtxPushCurrent_v2(void *c) {
    ENTER(DEVICE);
    if (!c || depth == 16) return INVALID_CONTEXT;
    contexts[depth++] = c;
    return OK;
}

R cuCtxPopCurrent_v2(void **c) {
    if (!depth) return INVALID_CONTEXT; /* never made to fail: a pop that follows a push does not */
    *c = contexts[--depth];
    return OK;
}

R cuStreamCreate(void **s, unsigned flags) {
    ENTER(CONTEXT);
    if (flags > 1) return INVALID_VALUE;
    *s = (void *)(intptr_t)0x57;
    live(1);
    return OK;
}

R cuStreamDestroy_v2(void *s) {
    ENTER(CONTEXT);
    if (!s) return INVALID_HANDLE;
    live(-1);
    return OK;
}

static R queue(void *to, const void *from, size_t bytes) {
    if (queue_length == (int)(sizeof queued / sizeof *queued)) return OUT_OF_MEMORY;
    queued[queue_length++] = (struct copy){to, from, bytes};
    return OK;
}

R cuStreamSynchronize(void *s) {
    (void)s; /* one queue for all streams: the order in which they were given is an order that CUDA allows */
    R why;
    if (refused(__func__, CONTEXT, &why)) {
        queue_length = 0; /* a copy that failed; its buffers may be gone before the next */
        return why;
    }
    for (int i = 0; i < queue_length; i++) memmove(queued[i].to, queued[i].from, queued[i].bytes);
    queue_length = 0;
    return OK;
}

static int on_device(U p, size_t bytes) {
    struct range *r = range_at(p);
    return r && r->access && r->device == here() && bytes <= r->bytes - (size_t)(p - r->at);
}

R cuMemcpyDtoDAsync_v2(U to, U from, size_t bytes, void *s) {
    (void)s;
    ENTER(CONTEXT);
    if (!on_device(to, bytes) || !on_device(from, bytes)) return ILLEGAL_ADDRESS;
    return queue((void *)(uintptr_t)to, (const void *)(uintptr_t)from, bytes);
}

R cuMemcpyHtoDAsync_v2(U to, const void *from, size_t bytes, void *s) {
    (void)s;
    ENTER(CONTEXT);
    if (!on_device(to, bytes)) return ILLEGAL_ADDRESS;
    return queue((void *)(uintptr_t)to, from, bytes);
}

R cuMemcpyDtoHAsync_v2(void *to, U from, size_t bytes, void *s) {
    (void)s;
    ENTER(CONTEXT);
    if (!on_device(from, bytes)) return ILLEGAL_ADDRESS;
    return queue(to, (const void *)(uintptr_t)from, bytes);
}

R cuMemGetInfo_v2(size_t *unused, size_t *total) {
    ENTER(CONTEXT);
    *total = setting("FAKECUDA_TOTAL", 1ull << 30);
    *unused = *total / 2;
    return OK;
}

/* ---------------------------------------------------------------------------------------- plain allocations ---- */

R cuMemAlloc_v2(U *p, size_t bytes) {
    ENTER(CONTEXT);
    if (!bytes) return INVALID_VALUE;
    if (bytes > setting("FAKECUDA_TOTAL", 1ull << 30)) return OUT_OF_MEMORY;
    int fd = memfd_create("fakecuda-plain", MFD_CLOEXEC);
    if (fd < 0) return OUT_OF_MEMORY;
    void *m = ftruncate(fd, (off_t)bytes) ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (m == MAP_FAILED || !range_new((U)(uintptr_t)m, bytes, fd, 1, here())) {
        close(fd);
        return OUT_OF_MEMORY;
    }
    *p = (U)(uintptr_t)m;
    return OK;
}

R cuMemFree_v2(U p) {
    ENTER(CONTEXT);
    struct range *r = range_at(p);
    if (!r || r->at != p) return INVALID_VALUE;
    range_drop(r);
    return OK;
}

typedef struct {
    uint32_t magic, pid;
    int32_t fd, device;
    uint64_t bytes;
    char rest[40];
} legacy_handle;
_Static_assert(sizeof(legacy_handle) == 64, "as the driver's");

R cuIpcGetMemHandle(legacy_handle *h, U p) {
    ENTER(CONTEXT);
    struct range *r = range_at(p);
    if (!r || r->fd < 0 || r->legacy) return INVALID_VALUE;
    memset(h, 0, sizeof *h);
    h->magic = LEGACY_MAGIC;
    h->pid = (uint32_t)getpid();
    h->fd = r->fd;
    h->device = r->device;
    h->bytes = r->bytes;
    return OK;
}

R cuIpcOpenMemHandle_v2(U *p, legacy_handle h, unsigned flags) {
    ENTER(CONTEXT);
    if (h.magic != LEGACY_MAGIC || flags != 1) return INVALID_VALUE;
    if ((pid_t)h.pid == getpid() || h.device != here()) return INVALID_CONTEXT;
    for (int i = 0; i < MAX; i++)
        if (ranges[i].bytes && ranges[i].legacy == (int)h.pid && ranges[i].device == h.device) return ALREADY_MAPPED;
    char path[64];
    snprintf(path, sizeof path, "/proc/%u/fd/%d", h.pid, h.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return INVALID_HANDLE;
    void *m = mmap(NULL, h.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    struct range *r = m == MAP_FAILED ? NULL : range_new((U)(uintptr_t)m, h.bytes, fd, 1, h.device);
    if (!r) {
        close(fd);
        return MAP_FAILURE;
    }
    r->legacy = (int)h.pid;
    *p = r->at;
    return OK;
}

R cuIpcCloseMemHandle(U p) {
    ENTER(CONTEXT);
    struct range *r = range_at(p);
    if (!r || r->at != p || !r->legacy) return INVALID_VALUE;
    range_drop(r);
    return OK;
}

/* ---------------------------------------------------------------------------------------- virtual memory ---- */

typedef struct {
    int type, handle_types, location_type, location_id;
} prop_head;

static int bad_prop(const void *prop) {
    const prop_head *p = prop;
    return p->type != 1 || p->handle_types != 1 || p->location_type != 1 || no_device(p->location_id);
}

R cuMemGetAllocationGranularity(size_t *g, const void *prop, int option) {
    ENTER(DEVICE);
    if (bad_prop(prop) || option > 1) return INVALID_VALUE;
    *g = GRANULARITY;
    return OK;
}

R cuMemCreate(U *h, size_t bytes, const void *prop, U flags) {
    ENTER(DEVICE);
    if (bad_prop(prop) || flags || !bytes || bytes % GRANULARITY) return INVALID_VALUE;
    if (setting("FAKECUDA_NO_FDS", 0)) return NOT_SUPPORTED;
    if (bytes > setting("FAKECUDA_TOTAL", 1ull << 30)) return OUT_OF_MEMORY;
    char name[32];
    snprintf(name, sizeof name, "fakecuda-pool-%d", physical(((const prop_head *)prop)->location_id));
    int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd < 0) return OUT_OF_MEMORY;
    if (ftruncate(fd, (off_t)bytes)) {
        close(fd);
        return OUT_OF_MEMORY;
    }
    *h = (U)fd;
    live(1);
    return OK;
}

R cuMemRelease(U h) {
    ENTER(DEVICE);
    if (close((int)h)) return INVALID_HANDLE;
    live(-1);
    return OK;
}

R cuMemExportToShareableHandle(void *out, U h, int type, U flags) {
    ENTER(DEVICE);
    if (type != 1 || flags) return INVALID_VALUE;
    int fd = fcntl((int)h, F_DUPFD_CLOEXEC, 3);
    if (fd < 0) return INVALID_HANDLE;
    memcpy(out, &fd, sizeof fd);
    return OK;
}

R cuMemImportFromShareableHandle(U *h, void *os, int type) {
    ENTER(DEVICE);
    struct stat st;
    if (type != 1) return INVALID_VALUE;
    int fd = fcntl((int)(intptr_t)os, F_DUPFD_CLOEXEC, 3);
    if (fd < 0) return INVALID_HANDLE;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || device_of(fd) < 0) {
        close(fd);
        return INVALID_HANDLE;
    }
    *h = (U)fd;
    live(1);
    return OK;
}

R cuMemAddressReserve(U *p, size_t bytes, size_t alignment, U at, U flags) {
    ENTER(DEVICE);
    if (!bytes || bytes % GRANULARITY || alignment || at || flags) return INVALID_VALUE;
    void *m = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) return OUT_OF_MEMORY;
    if (!range_new((U)(uintptr_t)m, bytes, -1, 0, -1)) {
        munmap(m, bytes);
        return OUT_OF_MEMORY;
    }
    *p = (U)(uintptr_t)m;
    return OK;
}

R cuMemAddressFree(U p, size_t bytes) {
    ENTER(DEVICE);
    struct range *r = range_at(p);
    if (!r || r->at != p || r->bytes != bytes || r->fd >= 0) return INVALID_VALUE;
    range_drop(r);
    return OK;
}

R cuMemMap(U p, size_t bytes, size_t offset, U h, U flags) {
    ENTER(DEVICE);
    struct range *r = range_at(p);
    struct stat st;
    if (!r || r->at != p || r->bytes != bytes || offset || flags) return INVALID_VALUE;
    if (r->fd >= 0) return ALREADY_MAPPED;
    if (fstat((int)h, &st) || (size_t)st.st_size < bytes) return INVALID_HANDLE;
    int fd = fcntl((int)h, F_DUPFD_CLOEXEC, 3);
    if (fd < 0) return INVALID_HANDLE;
    if (mmap((void *)(uintptr_t)p, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        close(fd);
        return MAP_FAILURE;
    }
    r->fd = fd;
    r->device = device_of(fd);
    live(1);
    return OK;
}

R cuMemSetAccess(U p, size_t bytes, const void *desc, size_t count) {
    ENTER(DEVICE);
    struct range *r = range_at(p);
    const int *d = desc; /* location type, location, flags */
    if (!r || r->fd < 0 || r->bytes != bytes || count != 1 || d[2] != 3) return INVALID_VALUE;
    if (physical(d[1]) != r->device) return INVALID_DEVICE; /* another GPU's memory: what peer access would be for */
    if (mprotect((void *)(uintptr_t)p, bytes, PROT_READ | PROT_WRITE)) return MAP_FAILURE;
    r->access = 1;
    return OK;
}

R cuMemUnmap(U p, size_t bytes) {
    ENTER(DEVICE);
    struct range *r = range_at(p);
    if (!r || r->at != p || r->bytes != bytes || r->fd < 0) return INVALID_VALUE;
    mmap((void *)(uintptr_t)p, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    close(r->fd);
    r->fd = -1;
    r->access = 0;
    live(-1);
    return OK;
}
