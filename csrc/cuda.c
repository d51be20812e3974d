/* cuda.c: see cuda.h. The declarations below are the driver's ABI, written from its public documentation (CUDA Driver
 * API, "Virtual Memory Management" and "Memory Management"); the names with _v2 are the ABI since CUDA 4 or 11.
 *
 * Theory: every resource is acquired in one function and given back in its twin, in reverse order, each step guarded
 * by whether it was taken; so a failure at any call undoes exactly what was done. Undoing ignores errors: there is
 * nothing left to do about them, and the first one is the one to report.
 */
#include "cuda.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int result;
typedef int device;
typedef void *context;
typedef void *stream_handle;
typedef unsigned long long pointer, handle;

typedef struct {
    int type, id;
} location;

typedef struct {
    int type, handle_types;
    location where;
    void *win32;
    struct {
        unsigned char compression, rdma;
        unsigned short usage;
        unsigned char reserved[4];
    } flags;
} allocation_prop;

typedef struct {
    location where;
    int flags;
} access_desc;

typedef struct {
    unsigned char bytes[AF_CUDA_HANDLE_BYTES];
} ipc_handle;

enum { PINNED = 1, ON_DEVICE = 1, POSIX_FD = 1, READ_WRITE = 3, NON_BLOCKING = 1, LAZY_PEER = 1, GRANULARITY_MINIMUM = 0 };
enum { ATTRIBUTE_VMM = 102, ATTRIBUTE_POSIX_FD = 103 };

#define CALLS(X)                                                                                                      \
    X(cuInit, (unsigned))                                                                                             \
    X(cuDriverGetVersion, (int *))                                                                                    \
    X(cuGetErrorName, (result, const char **))                                                                        \
    X(cuGetErrorString, (result, const char **))                                                                      \
    X(cuDeviceGetCount, (int *))                                                                                      \
    X(cuDeviceGet, (device *, int))                                                                                   \
    X(cuDeviceGetName, (char *, int, device))                                                                         \
    X(cuDeviceGetAttribute, (int *, int, device))                                                                     \
    X(cuDevicePrimaryCtxGetState, (device, unsigned *, int *))                                                        \
    X(cuDevicePrimaryCtxRetain, (context *, device))                                                                  \
    X(cuDevicePrimaryCtxRelease_v2, (device))                                                                         \
    X(cuCtxPushCurrent_v2, (context))                                                                                 \
    X(cuCtxPopCurrent_v2, (context *))                                                                                \
    X(cuStreamCreate, (stream_handle *, unsigned))                                                                    \
    X(cuStreamDestroy_v2, (stream_handle))                                                                            \
    X(cuStreamSynchronize, (stream_handle))                                                                           \
    X(cuMemGetInfo_v2, (size_t *, size_t *))                                                                          \
    X(cuMemAlloc_v2, (pointer *, size_t))                                                                             \
    X(cuMemFree_v2, (pointer))                                                                                        \
    X(cuMemcpyDtoDAsync_v2, (pointer, pointer, size_t, stream_handle))                                                \
    X(cuMemcpyHtoDAsync_v2, (pointer, const void *, size_t, stream_handle))                                           \
    X(cuMemcpyDtoHAsync_v2, (void *, pointer, size_t, stream_handle))                                                 \
    X(cuMemGetAllocationGranularity, (size_t *, const allocation_prop *, int))                                        \
    X(cuMemCreate, (handle *, size_t, const allocation_prop *, unsigned long long))                                   \
    X(cuMemRelease, (handle))                                                                                         \
    X(cuMemExportToShareableHandle, (void *, handle, int, unsigned long long))                                        \
    X(cuMemImportFromShareableHandle, (handle *, void *, int))                                                        \
    X(cuMemAddressReserve, (pointer *, size_t, size_t, pointer, unsigned long long))                                  \
    X(cuMemAddressFree, (pointer, size_t))                                                                            \
    X(cuMemMap, (pointer, size_t, size_t, handle, unsigned long long))                                                \
    X(cuMemUnmap, (pointer, size_t))                                                                                  \
    X(cuMemSetAccess, (pointer, size_t, const access_desc *, size_t))                                                 \
    X(cuIpcGetMemHandle, (ipc_handle *, pointer))                                                                     \
    X(cuIpcOpenMemHandle_v2, (pointer *, ipc_handle, unsigned))                                                       \
    X(cuIpcCloseMemHandle, (pointer))

struct af_cuda_driver {
    result (*cuDeviceGetUuid)(void *, device); /* _v2, which tells the parts of a split GPU apart, where there is one */
#define X(name, arguments) result(*name) arguments;
    CALLS(X)
#undef X
};

struct af_cuda_device {
    af_cuda_driver *d;
    device number;
    context ctx;
    stream_handle stream;
};

struct af_cuda_pool {
    af_cuda_device *dev;
    int kind;
    int imported;
    handle memory;     /* FD; valid if has_memory */
    int has_memory;    /* 0 is a handle that a driver may give */
    pointer address;   /* FD: reserved range; HANDLE: allocation or mapping */
    int mapped;
    size_t bytes;
};

/* ------------------------------------------------------------------------------------------------ failures ---- */

static _Thread_local char failure[AF_CUDA_WHY_BYTES];

const char *af_cuda_failed(void) { return failure; }

static int ours(int code, const char *why) {
    snprintf(failure, sizeof failure, "%s", why);
    return code;
}

static int check(af_cuda_driver *d, const char *call, result r) {
    if (!r) return 0;
    const char *name = NULL, *text = NULL;
    if (d->cuGetErrorName(r, &name) || !name) name = "unknown error";
    if (d->cuGetErrorString(r, &text) || !text) text = "no description";
    snprintf(failure, sizeof failure, "%s: %s (%d, %s)", call, name, r, text);
    return r;
}

#define CALL(driver, name, ...) check(driver, #name, (driver)->name(__VA_ARGS__))

/* ------------------------------------------------------------------------------------------------ the driver ---- */

static int resolve(void *library, const char *path, const char *name, void *target) {
    void *found = dlsym(library, name);
    if (!found) {
        snprintf(failure, sizeof failure, "%s has no %s: the driver is too old", path, name);
        return AF_CUDA_TOO_OLD;
    }
    memcpy(target, &found, sizeof found); /* a data pointer to a function pointer, as POSIX allows and C does not */
    return 0;
}

/* Stops at the library that `data` names: by its path, or by its name alone where no path was given; then also under
 * the name without a version ("libcuda.so" for "libcuda.so.1"), by which others may have opened it. */
static int is_called(struct dl_phdr_info *info, size_t size, void *data) {
    (void)size;
    const char *wanted = data, *name = info->dlpi_name, *slash = strrchr(name, '/');
    if (strchr(wanted, '/')) return !strcmp(name, wanted);
    if (slash) name = slash + 1;
    size_t length = strlen(name);
    int bare = length > 3 && !strcmp(name + length - 3, ".so");
    return !strcmp(name, wanted) || (bare && !strncmp(name, wanted, length) && wanted[length] == '.');
}

/* Not dlopen with RTLD_NOLOAD, which searches the disk for what is not loaded: 90 microseconds. */
int af_cuda_loaded(const char *path) { return *path && dl_iterate_phdr(is_called, (void *)(uintptr_t)path); }

int af_cuda_load(const char *path, af_cuda_driver **out) {
    *out = NULL;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *why = dlerror();
        return ours(AF_CUDA_NODRIVER, why ? why : path);
    }
    af_cuda_driver *d = calloc(1, sizeof *d);
    if (!d) return ours(AF_CUDA_NOMEM, "out of memory");
    int r = 0;
#define X(name, arguments)                                                                                            \
    if (!r) r = resolve(library, path, #name, &d->name);
    CALLS(X)
#undef X
    if (!r && resolve(library, path, "cuDeviceGetUuid_v2", &d->cuDeviceGetUuid)) {
        r = resolve(library, path, "cuDeviceGetUuid", &d->cuDeviceGetUuid);
    }
    if (!r) r = CALL(d, cuInit, 0);
    if (r) {
        free(d);
        return r;
    }
    *out = d;
    return 0;
}

void af_cuda_unload(af_cuda_driver *d) { free(d); }

int af_cuda_version(af_cuda_driver *d, int *version) { return CALL(d, cuDriverGetVersion, version); }

int af_cuda_count(af_cuda_driver *d, int *count) { return CALL(d, cuDeviceGetCount, count); }

int af_cuda_uuid(af_cuda_driver *d, int ordinal, uint8_t uuid[AF_CUDA_UUID_BYTES]) {
    device number;
    int r = CALL(d, cuDeviceGet, &number, ordinal);
    return r ? r : CALL(d, cuDeviceGetUuid, uuid, number);
}

int af_cuda_name(af_cuda_driver *d, int ordinal, char *name, size_t size) {
    device number;
    int r = CALL(d, cuDeviceGet, &number, ordinal);
    return r ? r : CALL(d, cuDeviceGetName, name, (int)size, number);
}

int af_cuda_active(af_cuda_driver *d, int ordinal, int *yes) {
    device number;
    unsigned flags = 0;
    int r = CALL(d, cuDeviceGet, &number, ordinal);
    return r ? r : CALL(d, cuDevicePrimaryCtxGetState, number, &flags, yes);
}

/* ------------------------------------------------------------------------------------------------ the device ---- */

static int enter(af_cuda_device *dev) { return CALL(dev->d, cuCtxPushCurrent_v2, dev->ctx); }

static void leave(af_cuda_device *dev) {
    context was;
    dev->d->cuCtxPopCurrent_v2(&was);
}

int af_cuda_open(af_cuda_driver *d, int ordinal, af_cuda_device **out) {
    *out = NULL;
    int count = 0, r = af_cuda_count(d, &count);
    if (r) return r;
    if (ordinal < 0 || ordinal >= count) return ours(AF_CUDA_NODEVICE, "no such device");
    af_cuda_device *dev = calloc(1, sizeof *dev);
    if (!dev) return ours(AF_CUDA_NOMEM, "out of memory");
    dev->d = d;
    r = CALL(d, cuDeviceGet, &dev->number, ordinal);
    if (r) goto no_device;
    r = CALL(d, cuDevicePrimaryCtxRetain, &dev->ctx, dev->number);
    if (r) goto no_device;
    r = enter(dev);
    if (r) goto no_stream;
    r = CALL(d, cuStreamCreate, &dev->stream, NON_BLOCKING);
    leave(dev);
    if (r) goto no_stream;
    *out = dev;
    return 0;
no_stream:
    d->cuDevicePrimaryCtxRelease_v2(dev->number);
no_device:
    free(dev);
    return r;
}

void af_cuda_close(af_cuda_device *dev) {
    if (!dev) return;
    if (!enter(dev)) {
        dev->d->cuStreamDestroy_v2(dev->stream);
        leave(dev);
    }
    dev->d->cuDevicePrimaryCtxRelease_v2(dev->number);
    free(dev);
}

int af_cuda_memory(af_cuda_device *dev, uint64_t *free_bytes, uint64_t *total_bytes) {
    size_t unused = 0, all = 0;
    int r = enter(dev);
    if (r) return r;
    r = CALL(dev->d, cuMemGetInfo_v2, &unused, &all);
    leave(dev);
    *free_bytes = unused;
    *total_bytes = all;
    return r;
}

int af_cuda_exports_fds(af_cuda_device *dev, int *yes) {
    int vmm = 0, fds = 0;
    *yes = 0;
    int r = CALL(dev->d, cuDeviceGetAttribute, &vmm, ATTRIBUTE_VMM, dev->number);
    if (!r) r = CALL(dev->d, cuDeviceGetAttribute, &fds, ATTRIBUTE_POSIX_FD, dev->number);
    if (!r) *yes = vmm && fds;
    return r;
}

int af_cuda_alloc(af_cuda_device *dev, uint64_t bytes, uint64_t *address) {
    pointer p = 0;
    int r = enter(dev);
    if (r) return r;
    r = CALL(dev->d, cuMemAlloc_v2, &p, (size_t)bytes);
    leave(dev);
    *address = p;
    return r;
}

void af_cuda_free(af_cuda_device *dev, uint64_t address) {
    if (enter(dev)) return;
    dev->d->cuMemFree_v2(address);
    leave(dev);
}

int af_cuda_read(af_cuda_device *dev, uint64_t address, void *target, uint64_t bytes, uint64_t stream) {
    if (!bytes) return 0;
    stream_handle s = stream == AF_CUDA_OWN_STREAM ? dev->stream : (stream_handle)(uintptr_t)stream;
    int r = enter(dev);
    if (r) return r;
    r = CALL(dev->d, cuMemcpyDtoHAsync_v2, target, address, (size_t)bytes, s);
    if (!r) r = CALL(dev->d, cuStreamSynchronize, s);
    leave(dev);
    return r;
}

/* ------------------------------------------------------------------------------------------------ the pool ---- */

static void give_back(af_cuda_pool *pool) {
    af_cuda_driver *d = pool->dev->d;
    if (pool->kind == AF_CUDA_POOL_FD) {
        if (pool->mapped) d->cuMemUnmap(pool->address, pool->bytes);
        if (pool->address) d->cuMemAddressFree(pool->address, pool->bytes);
        if (pool->has_memory) d->cuMemRelease(pool->memory);
    } else if (pool->address) {
        if (pool->imported) {
            d->cuIpcCloseMemHandle(pool->address);
        } else {
            d->cuMemFree_v2(pool->address);
        }
    }
}

static allocation_prop shareable(af_cuda_device *dev) {
    allocation_prop prop;
    memset(&prop, 0, sizeof prop);
    prop.type = PINNED;
    prop.handle_types = POSIX_FD;
    prop.where = (location){ON_DEVICE, dev->number};
    return prop;
}

/* pool->memory at an address of its own, readable and writable by this device. */
static int map_memory(af_cuda_pool *pool) {
    af_cuda_driver *d = pool->dev->d;
    access_desc access = {{ON_DEVICE, pool->dev->number}, READ_WRITE};
    int r = CALL(d, cuMemAddressReserve, &pool->address, pool->bytes, 0, 0, 0);
    if (r) return r;
    r = CALL(d, cuMemMap, pool->address, pool->bytes, 0, pool->memory, 0);
    if (r) return r;
    pool->mapped = 1;
    return CALL(d, cuMemSetAccess, pool->address, pool->bytes, &access, 1);
}

static int create_shareable(af_cuda_pool *pool) {
    af_cuda_driver *d = pool->dev->d;
    allocation_prop prop = shareable(pool->dev);
    size_t granularity = 0;
    int r = CALL(d, cuMemGetAllocationGranularity, &granularity, &prop, GRANULARITY_MINIMUM);
    if (r) return r;
    if (granularity) pool->bytes = (pool->bytes + granularity - 1) / granularity * granularity;
    r = CALL(d, cuMemCreate, &pool->memory, pool->bytes, &prop, 0);
    if (r) return r;
    pool->has_memory = 1;
    return map_memory(pool);
}

static int import_shareable(af_cuda_pool *pool, int fd) {
    int r = CALL(pool->dev->d, cuMemImportFromShareableHandle, &pool->memory, (void *)(intptr_t)fd, POSIX_FD);
    if (r) return r;
    pool->has_memory = 1;
    return map_memory(pool);
}

static int import_legacy(af_cuda_pool *pool, const uint8_t from[AF_CUDA_HANDLE_BYTES]) {
    ipc_handle h;
    memcpy(h.bytes, from, sizeof h.bytes);
    return CALL(pool->dev->d, cuIpcOpenMemHandle_v2, &pool->address, h, LAZY_PEER);
}

/* How one pool comes to be: made (neither), imported from a descriptor, or from a handle. */
static int make(af_cuda_device *dev, uint64_t bytes, int kind, int fd, const uint8_t *from, af_cuda_pool **out) {
    *out = NULL;
    if (!bytes || bytes > SIZE_MAX / 2) return ours(AF_CUDA_RANGE, "a pool of no possible size");
    af_cuda_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return ours(AF_CUDA_NOMEM, "out of memory");
    pool->dev = dev;
    pool->kind = kind;
    pool->bytes = (size_t)bytes;
    pool->imported = fd >= 0 || from;
    int r = enter(dev);
    if (!r) {
        if (fd >= 0) {
            r = import_shareable(pool, fd);
        } else if (from) {
            r = import_legacy(pool, from);
        } else if (kind == AF_CUDA_POOL_FD) {
            r = create_shareable(pool);
        } else {
            r = CALL(dev->d, cuMemAlloc_v2, &pool->address, pool->bytes);
        }
        if (r) give_back(pool);
        leave(dev);
    }
    if (r) {
        free(pool);
        return r;
    }
    *out = pool;
    return 0;
}

int af_cuda_pool_create(af_cuda_device *dev, uint64_t bytes, int kind, af_cuda_pool **out) {
    return make(dev, bytes, kind, -1, NULL, out);
}

int af_cuda_pool_import_fd(af_cuda_device *dev, int fd, uint64_t bytes, af_cuda_pool **out) {
    *out = NULL;
    if (fd < 0) return ours(AF_CUDA_RANGE, "no descriptor");
    return make(dev, bytes, AF_CUDA_POOL_FD, fd, NULL, out);
}

int af_cuda_pool_import_handle(af_cuda_device *dev, const uint8_t from[AF_CUDA_HANDLE_BYTES], uint64_t bytes,
                               af_cuda_pool **out) {
    return make(dev, bytes, AF_CUDA_POOL_HANDLE, -1, from, out);
}

int af_cuda_pool_export_fd(af_cuda_pool *pool, int *fd) {
    *fd = -1;
    if (pool->kind != AF_CUDA_POOL_FD) return ours(AF_CUDA_RANGE, "this pool has no descriptor");
    int r = enter(pool->dev);
    if (r) return r;
    r = CALL(pool->dev->d, cuMemExportToShareableHandle, fd, pool->memory, POSIX_FD, 0);
    leave(pool->dev);
    return r;
}

int af_cuda_pool_export_handle(af_cuda_pool *pool, uint8_t to[AF_CUDA_HANDLE_BYTES]) {
    ipc_handle h;
    if (pool->kind != AF_CUDA_POOL_HANDLE || pool->imported) return ours(AF_CUDA_RANGE, "this pool has no handle");
    int r = enter(pool->dev);
    if (r) return r;
    memset(&h, 0, sizeof h);
    r = CALL(pool->dev->d, cuIpcGetMemHandle, &h, pool->address);
    leave(pool->dev);
    memcpy(to, h.bytes, sizeof h.bytes);
    return r;
}

void af_cuda_pool_close(af_cuda_pool *pool) {
    if (!pool) return;
    int inside = !enter(pool->dev);
    give_back(pool); /* virtual memory needs no context */
    if (inside) leave(pool->dev);
    free(pool);
}

uint64_t af_cuda_pool_address(const af_cuda_pool *pool) { return pool->address; }
uint64_t af_cuda_pool_bytes(const af_cuda_pool *pool) { return pool->bytes; }

/* ------------------------------------------------------------------------------------------------ copies ---- */

static int outside(af_cuda_pool *pool, uint64_t offset, uint64_t bytes) {
    if (offset > pool->bytes || bytes > pool->bytes - offset) return ours(AF_CUDA_RANGE, "outside the pool");
    return 0;
}

static stream_handle stream_of(af_cuda_pool *pool, uint64_t stream) {
    return stream == AF_CUDA_OWN_STREAM ? pool->dev->stream : (stream_handle)(uintptr_t)stream;
}

/* What was queued is over when this returns 0: only then may anybody be told that the bytes are there. */
static int finish(af_cuda_pool *pool, stream_handle s) { return CALL(pool->dev->d, cuStreamSynchronize, s); }

static int within_device(af_cuda_pool *pool, uint64_t to, uint64_t from, uint64_t bytes, uint64_t stream) {
    stream_handle s = stream_of(pool, stream);
    int r = enter(pool->dev);
    if (r) return r;
    r = CALL(pool->dev->d, cuMemcpyDtoDAsync_v2, to, from, (size_t)bytes, s);
    if (!r) r = finish(pool, s);
    leave(pool->dev);
    return r;
}

int af_cuda_copy_in(af_cuda_pool *pool, uint64_t offset, uint64_t source, uint64_t bytes, uint64_t stream) {
    int r = outside(pool, offset, bytes);
    return r || !bytes ? r : within_device(pool, pool->address + offset, source, bytes, stream);
}

int af_cuda_copy_out(af_cuda_pool *pool, uint64_t offset, uint64_t target, uint64_t bytes, uint64_t stream) {
    int r = outside(pool, offset, bytes);
    return r || !bytes ? r : within_device(pool, target, pool->address + offset, bytes, stream);
}

int af_cuda_from_host(af_cuda_pool *pool, uint64_t offset, const void *source, uint64_t bytes) {
    int r = outside(pool, offset, bytes);
    if (r || !bytes) return r;
    r = enter(pool->dev);
    if (r) return r;
    r = CALL(pool->dev->d, cuMemcpyHtoDAsync_v2, pool->address + offset, source, (size_t)bytes, pool->dev->stream);
    if (!r) r = finish(pool, pool->dev->stream);
    leave(pool->dev);
    return r;
}

int af_cuda_to_host(af_cuda_pool *pool, uint64_t offset, void *target, uint64_t bytes) {
    int r = outside(pool, offset, bytes);
    if (r || !bytes) return r;
    r = enter(pool->dev);
    if (r) return r;
    r = CALL(pool->dev->d, cuMemcpyDtoHAsync_v2, target, pool->address + offset, (size_t)bytes, pool->dev->stream);
    if (!r) r = finish(pool, pool->dev->stream);
    leave(pool->dev);
    return r;
}
