/* cuda.h: the CUDA driver API as far as the device pool needs it, opened at run time.
 *
 * Job: find libcuda, one device of it by UUID, one pool of device memory on it that other processes map, and copies
 * that are finished when they return. No CUDA header or library is needed to build, no driver to load this module:
 * everything waits for af_cuda_load. Policy (who may have which bytes, and until when) is not here.
 *
 * A pool is one allocation in one of two forms:
 *   AF_CUDA_POOL_FD      virtual memory management: a handle exported as a file descriptor. The memory lives as long as
 *                        anybody has the descriptor, a handle made from it, or a mapping: it outlives who made it.
 *   AF_CUDA_POOL_HANDLE  cuMemAlloc and a 64-byte IPC handle, where descriptors cannot be had. It dies with its maker;
 *                        what an importer that still maps it then reads is the driver's secret, so don't.
 * Whoever imports maps the whole pool once; a handle is never opened twice by one importer.
 *
 * Contexts. A device uses the primary context, as torch does, so a process has one context a GPU whoever asked first.
 * Every call pushes it and pops it again: the caller's thread keeps the context that it had. Copies run on the stream
 * given (0: the legacy default stream), so they come after what the caller has queued there, and the call returns
 * after that stream has been synchronised: what is acknowledged afterwards has happened.
 *
 * Errors. 0 is success; a positive number is the driver's CUresult; a negative one is ours. In each case
 * af_cuda_failed() names the call and the reason, for this thread, until its next failure. A function that fails has
 * undone what it did. Any thread; not after a fork of a process that has loaded the driver.
 */
#ifndef AREALFAST_CUDA_H
#define AREALFAST_CUDA_H

#include <stddef.h>
#include <stdint.h>

typedef struct af_cuda_driver af_cuda_driver;
typedef struct af_cuda_device af_cuda_device;
typedef struct af_cuda_pool af_cuda_pool;

enum { AF_CUDA_NODRIVER = -1, AF_CUDA_TOO_OLD = -2, AF_CUDA_NOMEM = -3, AF_CUDA_NODEVICE = -4, AF_CUDA_RANGE = -5 };
enum { AF_CUDA_POOL_FD = 1, AF_CUDA_POOL_HANDLE = 2 };
enum { AF_CUDA_UUID_BYTES = 16, AF_CUDA_HANDLE_BYTES = 64, AF_CUDA_WHY_BYTES = 256 };

/* "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (out of memory)": why this thread's last failing call failed. */
const char *af_cuda_failed(void);

/* Whether this process has the library already: loads and initialises nothing. */
int af_cuda_loaded(const char *path);
/* dlopen `path` and initialise. The library stays loaded for the life of the process (it does not bear unloading);
 * af_cuda_unload frees only what we allocated, after all devices are closed. */
int af_cuda_load(const char *path, af_cuda_driver **out);
void af_cuda_unload(af_cuda_driver *d);
int af_cuda_version(af_cuda_driver *d, int *version); /* 12040 is 12.4 */
int af_cuda_count(af_cuda_driver *d, int *count);
int af_cuda_uuid(af_cuda_driver *d, int ordinal, uint8_t uuid[AF_CUDA_UUID_BYTES]);
int af_cuda_name(af_cuda_driver *d, int ordinal, char *name, size_t size);
/* 1 if this process has a primary context on that device, whoever made it. Makes none. */
int af_cuda_active(af_cuda_driver *d, int ordinal, int *yes);

/* Retain the primary context of the device `ordinal`, as this process counts them. */
int af_cuda_open(af_cuda_driver *d, int ordinal, af_cuda_device **out);
/* Give it back. Its pools must be closed before. */
void af_cuda_close(af_cuda_device *dev);
int af_cuda_memory(af_cuda_device *dev, uint64_t *free_bytes, uint64_t *total_bytes);
/* 1 if pools of this device can be exported as descriptors, 0 if not, or a failure (< 0, or > 1). */
int af_cuda_exports_fds(af_cuda_device *dev, int *yes);

/* A new pool of at least `bytes`, mapped here. kind: AF_CUDA_POOL_*. */
int af_cuda_pool_create(af_cuda_device *dev, uint64_t bytes, int kind, af_cuda_pool **out);
/* Map another process's pool. `fd` stays the caller's. `bytes` must be the pool's size as its maker told it. */
int af_cuda_pool_import_fd(af_cuda_device *dev, int fd, uint64_t bytes, af_cuda_pool **out);
int af_cuda_pool_import_handle(af_cuda_device *dev, const uint8_t handle[AF_CUDA_HANDLE_BYTES], uint64_t bytes,
                               af_cuda_pool **out);
/* A new descriptor (close-on-exec), the caller's to close. Pools of kind FD, imported ones too. */
int af_cuda_pool_export_fd(af_cuda_pool *pool, int *fd);
/* Pools of kind HANDLE, in their maker. */
int af_cuda_pool_export_handle(af_cuda_pool *pool, uint8_t handle[AF_CUDA_HANDLE_BYTES]);
void af_cuda_pool_close(af_cuda_pool *pool);
uint64_t af_cuda_pool_address(const af_cuda_pool *pool); /* where it is mapped here */
uint64_t af_cuda_pool_bytes(const af_cuda_pool *pool);

/* Copies between the pool at `offset` and memory of this process. Done when they return. AF_CUDA_RANGE if they would
 * leave the pool. `stream`: see above; AF_CUDA_OWN_STREAM is one of ours that waits for nobody. */
#define AF_CUDA_OWN_STREAM UINT64_MAX
int af_cuda_copy_in(af_cuda_pool *pool, uint64_t offset, uint64_t device_source, uint64_t bytes, uint64_t stream);
int af_cuda_copy_out(af_cuda_pool *pool, uint64_t offset, uint64_t device_target, uint64_t bytes, uint64_t stream);
int af_cuda_from_host(af_cuda_pool *pool, uint64_t offset, const void *source, uint64_t bytes);
int af_cuda_to_host(af_cuda_pool *pool, uint64_t offset, void *target, uint64_t bytes);

/* Plain device memory: what a client without torch copies shards into, tests, measurements. */
int af_cuda_alloc(af_cuda_device *dev, uint64_t bytes, uint64_t *address);
void af_cuda_free(af_cuda_device *dev, uint64_t address);
/* Device memory at `address`, of whoever in this process, to the host, after what is queued on `stream`. Done when it
 * returns. */
int af_cuda_read(af_cuda_device *dev, uint64_t address, void *target, uint64_t bytes, uint64_t stream);

#endif
