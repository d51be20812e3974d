# Buffers across the edge: borrowed ones on the way in (Spans, Names), lent ones on the way out (_Window).
# Included by _core.pyx; the file exists so that the rules about whose memory it is stand in one place.

cdef struct Spans:
    # Borrowed contiguous buffers and where they lie. Filled by spans_take, always undone by spans_drop.
    Py_buffer *views
    af_span *parts
    uint32_t count
    size_t nbytes


cdef int spans_take(Spans *s, object data) except -1:
    """Borrow every buffer of a sequence; a single bytes-like object counts as one part."""
    cdef Py_ssize_t n, i
    s.views, s.parts, s.count, s.nbytes = NULL, NULL, 0, 0
    if isinstance(data, (bytes, bytearray, memoryview)):
        data = (data,)
    elif not isinstance(data, (tuple, list)):
        data = tuple(data)
    n = len(data)
    if n == 0:
        return 0
    s.views = <Py_buffer *> PyMem_Malloc(n * (sizeof(Py_buffer) + sizeof(af_span)))
    if s.views == NULL:
        raise MemoryError
    s.parts = <af_span *> (s.views + n)
    try:
        for i in range(n):
            PyObject_GetBuffer(data[i], s.views + i, PyBUF_SIMPLE)
            s.parts[i].base = s.views[i].buf
            s.parts[i].len = s.views[i].len
            s.nbytes += s.views[i].len
            s.count += 1
    except BaseException:
        spans_drop(s)
        raise
    return 0


cdef void spans_drop(Spans *s) noexcept:
    cdef uint32_t i
    for i in range(s.count):
        PyBuffer_Release(s.views + i)
    PyMem_Free(s.views)
    s.views, s.count = NULL, 0


@cython.final
@cython.no_gc_clear
cdef class _Window:
    """What the memoryviews of shard_view and shard_reserve look through.

    It keeps the mapping alive and, for a published shard, holds one pin; both end when the last buffer taken
    from it is released. A window of a shard being filled is writable and holds no pin: the shard is INIT and
    this process's own; publish is refused while it is open, abandon is put off until it closes."""

    cdef Arena arena
    cdef void *base
    cdef Py_ssize_t nbytes
    cdef Py_ssize_t exports
    cdef uint32_t slot
    cdef bint writable
    cdef bint open
    cdef bint abandoned

    def __getbuffer__(self, Py_buffer *view, int flags):
        if not self.open:
            raise BufferError("the shard's view was released")
        PyBuffer_FillInfo(view, self, self.base, self.nbytes, not self.writable, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1
        if self.exports == 0:
            self.shut()

    def __dealloc__(self):
        self.shut()

    cdef void shut(self) noexcept:
        cdef Arena arena = self.arena
        if not self.open:
            return
        self.open = False
        if not arena.disowned:
            if not self.writable:
                af_unpin(arena.handle, self.slot)
            elif self.abandoned:
                af_shard_abandon(arena.handle, self.slot)
        if self.writable:
            arena.filling.pop(self.slot, None)
        arena.leave()


cdef object open_window(Arena arena, uint32_t slot, const void *base, uint64_t nbytes, bint writable):
    """A memoryview on `nbytes` of the mapping. The caller has taken the pin that the window then owns."""
    cdef _Window w = _Window.__new__(_Window)
    w.arena, w.base, w.nbytes, w.slot, w.writable = arena, <void *> base, <Py_ssize_t> nbytes, slot, writable
    w.open = True
    arena.busy += 1
    if writable:
        arena.filling[slot] = w
    try:
        return PyMemoryView_FromObject(w)
    except BaseException:
        w.shut()
        raise
