# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""The CUDA driver for Python: one method, one call of csrc/cuda.c. No policy; contracts in _cuda.pyi and cuda.h.

Importing this opens nothing: the driver is loaded by Driver(path), and only the keeper and clients do that.

Invariants:
- A pool keeps its device alive, a device its driver, so that C frees them in the only order that works.
- Copies run without the GIL. `busy` counts them; close() puts the freeing off until they are over, and from then on
  the handle is closed for everybody else.
- In a child made by fork the handles are disowned: the driver does not survive a fork, so nothing is called.
"""

import os

from areal_fast.core.codes import BadArgument

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t
from posix.unistd cimport getpid

from areal_fast.core._cuda cimport *

KIND_FD = AF_CUDA_POOL_FD
KIND_HANDLE = AF_CUDA_POOL_HANDLE
OWN_STREAM = AF_CUDA_OWN_STREAM


class CudaError(Exception):
    """See _cuda.pyi."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


cdef int check(int code) except -1:
    if code:
        text = af_cuda_failed().decode("utf-8", "replace")
        if code == AF_CUDA_RANGE:
            raise BadArgument(text)
        raise CudaError(text, code)
    return 0


def is_loaded(str path):
    cdef bytes name = os.fsencode(path)
    return bool(af_cuda_loaded(name))


@cython.final
cdef class Driver:
    cdef af_cuda_driver *d
    cdef int pid
    cdef readonly str path

    def __init__(self, str path):
        cdef bytes name = os.fsencode(path)
        cdef const char *text = name
        cdef int code
        if self.d != NULL:
            raise BadArgument("loaded already")
        self.path = path
        self.pid = getpid()
        with nogil:
            code = af_cuda_load(text, &self.d)
        check(code)

    def __dealloc__(self):
        if self.d != NULL:
            af_cuda_unload(self.d)

    cdef af_cuda_driver *ready(self) except NULL:
        if self.d == NULL or self.pid != getpid():
            raise BadArgument("the driver was loaded by the process that this one was forked from")
        return self.d

    @property
    def version(self):
        cdef int version = 0
        check(af_cuda_version(self.ready(), &version))
        return version

    @property
    def count(self):
        cdef int count = 0
        check(af_cuda_count(self.ready(), &count))
        return count

    def uuid(self, int ordinal):
        cdef uint8_t[AF_CUDA_UUID_BYTES] uuid
        check(af_cuda_uuid(self.ready(), ordinal, uuid))
        return uuid[:AF_CUDA_UUID_BYTES]

    def name(self, int ordinal):
        cdef char[128] name
        check(af_cuda_name(self.ready(), ordinal, name, sizeof(name)))
        return (<bytes>name).decode("utf-8", "replace")

    def is_active(self, int ordinal):
        cdef int yes = 0
        check(af_cuda_active(self.ready(), ordinal, &yes))
        return bool(yes)

    def open(self, int ordinal):
        cdef Device device = Device.__new__(Device)
        cdef af_cuda_driver *d = self.ready()
        cdef int code
        device.driver = self
        device.uuid = self.uuid(ordinal)
        with nogil:
            code = af_cuda_open(d, ordinal, &device.dev)
        check(code)
        return device


@cython.final
cdef class Device:
    cdef af_cuda_device *dev
    cdef readonly Driver driver
    cdef readonly bytes uuid

    def __init__(self):
        raise TypeError("Driver.open makes one")

    def __dealloc__(self):
        if self.dev != NULL and self.driver.pid == getpid():
            af_cuda_close(self.dev)

    cdef af_cuda_device *ready(self) except NULL:
        self.driver.ready()
        if self.dev == NULL:
            raise BadArgument("the device is closed")
        return self.dev

    def memory(self):
        cdef uint64_t unused = 0, total = 0
        check(af_cuda_memory(self.ready(), &unused, &total))
        return unused, total

    def exports_fds(self):
        cdef int yes = 0
        check(af_cuda_exports_fds(self.ready(), &yes))
        return bool(yes)

    def alloc(self, uint64_t nbytes):
        cdef uint64_t address = 0
        check(af_cuda_alloc(self.ready(), nbytes, &address))
        return address

    def free(self, uint64_t address):
        af_cuda_free(self.ready(), address)

    def read(self, uint64_t address, target, uint64_t stream=0):
        cdef af_cuda_device *dev = self.ready()
        cdef Py_buffer view
        cdef int code
        PyObject_GetBuffer(target, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        with nogil:
            code = af_cuda_read(dev, address, view.buf, <uint64_t>view.len, stream)
        PyBuffer_Release(&view)
        check(code)

    def create_pool(self, uint64_t nbytes, int kind):
        cdef af_cuda_device *dev = self.ready()
        cdef af_cuda_pool *pool = NULL
        cdef int code
        with nogil:
            code = af_cuda_pool_create(dev, nbytes, kind, &pool)
        check(code)
        return wrap(self, pool, kind)

    def import_fd(self, int fd, uint64_t nbytes):
        cdef af_cuda_device *dev = self.ready()
        cdef af_cuda_pool *pool = NULL
        cdef int code
        with nogil:
            code = af_cuda_pool_import_fd(dev, fd, nbytes, &pool)
        check(code)
        return wrap(self, pool, AF_CUDA_POOL_FD)

    def import_handle(self, bytes handle, uint64_t nbytes):
        cdef af_cuda_device *dev = self.ready()
        cdef af_cuda_pool *pool = NULL
        cdef const uint8_t *raw = handle
        cdef int code
        if len(handle) != AF_CUDA_HANDLE_BYTES:
            raise BadArgument("an IPC handle has 64 bytes")
        with nogil:
            code = af_cuda_pool_import_handle(dev, raw, nbytes, &pool)
        check(code)
        return wrap(self, pool, AF_CUDA_POOL_HANDLE)


@cython.final
cdef class Pool:
    cdef af_cuda_pool *pool
    cdef readonly Device device
    cdef readonly int kind
    cdef int busy
    cdef bint closing

    def __init__(self):
        raise TypeError("a Device makes one")

    def __dealloc__(self):
        self.finish()

    cdef void finish(self) noexcept:
        if self.pool != NULL and self.device.driver.pid == getpid():
            af_cuda_pool_close(self.pool)
        self.pool = NULL

    cdef af_cuda_pool *ready(self) except NULL:
        self.device.driver.ready()
        if self.pool == NULL or self.closing:
            raise BadArgument("the pool is closed")
        return self.pool

    cdef int leave(self, int code) except -1:
        """The end of a call without the GIL."""
        self.busy -= 1
        if self.closing and self.busy == 0:
            self.finish()
        return check(code)

    def close(self):
        self.closing = True
        if self.busy == 0:
            self.finish()

    @property
    def closed(self):
        return self.pool == NULL or self.closing

    @property
    def address(self):
        return af_cuda_pool_address(self.ready())

    @property
    def nbytes(self):
        return af_cuda_pool_bytes(self.ready())

    def export_fd(self):
        cdef int fd = -1
        check(af_cuda_pool_export_fd(self.ready(), &fd))
        return fd

    def export_handle(self):
        cdef uint8_t[AF_CUDA_HANDLE_BYTES] handle
        check(af_cuda_pool_export_handle(self.ready(), handle))
        return handle[:AF_CUDA_HANDLE_BYTES]

    def copy_in(self, uint64_t offset, uint64_t source, uint64_t nbytes, uint64_t stream=0):
        cdef af_cuda_pool *pool = self.ready()
        cdef int code
        self.busy += 1
        with nogil:
            code = af_cuda_copy_in(pool, offset, source, nbytes, stream)
        self.leave(code)

    def copy_out(self, uint64_t offset, uint64_t target, uint64_t nbytes, uint64_t stream=0):
        cdef af_cuda_pool *pool = self.ready()
        cdef int code
        self.busy += 1
        with nogil:
            code = af_cuda_copy_out(pool, offset, target, nbytes, stream)
        self.leave(code)

    def from_host(self, uint64_t offset, source):
        cdef af_cuda_pool *pool = self.ready()
        cdef Py_buffer view
        cdef int code
        PyObject_GetBuffer(source, &view, PyBUF_SIMPLE)
        self.busy += 1
        with nogil:
            code = af_cuda_from_host(pool, offset, view.buf, <uint64_t>view.len)
        PyBuffer_Release(&view)
        self.leave(code)

    def to_host(self, uint64_t offset, target):
        cdef af_cuda_pool *pool = self.ready()
        cdef Py_buffer view
        cdef int code
        PyObject_GetBuffer(target, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.busy += 1
        with nogil:
            code = af_cuda_to_host(pool, offset, view.buf, <uint64_t>view.len)
        PyBuffer_Release(&view)
        self.leave(code)


cdef Pool wrap(Device device, af_cuda_pool *made, int kind):
    cdef Pool pool = Pool.__new__(Pool)
    pool.device = device
    pool.pool = made
    pool.kind = kind
    return pool
