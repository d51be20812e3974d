# What the edge uses of csrc/cuda.h, word for word. Contracts are there.

from libc.stdint cimport uint8_t, uint64_t


cdef extern from "cuda.h" nogil:
    ctypedef struct af_cuda_driver:
        pass
    ctypedef struct af_cuda_device:
        pass
    ctypedef struct af_cuda_pool:
        pass

    enum:
        AF_CUDA_POOL_FD
        AF_CUDA_POOL_HANDLE
        AF_CUDA_UUID_BYTES
        AF_CUDA_HANDLE_BYTES
        AF_CUDA_NODRIVER
        AF_CUDA_TOO_OLD
        AF_CUDA_NODEVICE
        AF_CUDA_RANGE
    uint64_t AF_CUDA_OWN_STREAM

    const char *af_cuda_failed()
    int af_cuda_loaded(const char *path)
    int af_cuda_load(const char *path, af_cuda_driver **out)
    void af_cuda_unload(af_cuda_driver *d)
    int af_cuda_version(af_cuda_driver *d, int *version)
    int af_cuda_count(af_cuda_driver *d, int *count)
    int af_cuda_uuid(af_cuda_driver *d, int ordinal, uint8_t *uuid)
    int af_cuda_name(af_cuda_driver *d, int ordinal, char *name, size_t size)
    int af_cuda_active(af_cuda_driver *d, int ordinal, int *yes)
    int af_cuda_open(af_cuda_driver *d, int ordinal, af_cuda_device **out)
    void af_cuda_close(af_cuda_device *dev)
    int af_cuda_memory(af_cuda_device *dev, uint64_t *free_bytes, uint64_t *total_bytes)
    int af_cuda_exports_fds(af_cuda_device *dev, int *yes)
    int af_cuda_alloc(af_cuda_device *dev, uint64_t nbytes, uint64_t *address)
    void af_cuda_free(af_cuda_device *dev, uint64_t address)
    int af_cuda_read(af_cuda_device *dev, uint64_t address, void *target, uint64_t nbytes, uint64_t stream)
    int af_cuda_pool_create(af_cuda_device *dev, uint64_t nbytes, int kind, af_cuda_pool **out)
    int af_cuda_pool_import_fd(af_cuda_device *dev, int fd, uint64_t nbytes, af_cuda_pool **out)
    int af_cuda_pool_import_handle(af_cuda_device *dev, const uint8_t *handle, uint64_t nbytes, af_cuda_pool **out)
    int af_cuda_pool_export_fd(af_cuda_pool *pool, int *fd)
    int af_cuda_pool_export_handle(af_cuda_pool *pool, uint8_t *handle)
    void af_cuda_pool_close(af_cuda_pool *pool)
    uint64_t af_cuda_pool_address(const af_cuda_pool *pool)
    uint64_t af_cuda_pool_bytes(const af_cuda_pool *pool)
    int af_cuda_copy_in(af_cuda_pool *pool, uint64_t offset, uint64_t source, uint64_t nbytes, uint64_t stream)
    int af_cuda_copy_out(af_cuda_pool *pool, uint64_t offset, uint64_t target, uint64_t nbytes, uint64_t stream)
    int af_cuda_from_host(af_cuda_pool *pool, uint64_t offset, const void *source, uint64_t nbytes)
    int af_cuda_to_host(af_cuda_pool *pool, uint64_t offset, void *target, uint64_t nbytes)
