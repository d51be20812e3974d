# base64 of csrc/base64.c over Python's buffers. Included by _core.pyx.

cdef int borrow(object owner, Py_buffer *view, int flags) except -1:
    PyObject_GetBuffer(owner, view, flags)
    return 0


_LEVELS = {"scalar": AF_BASE64_SCALAR, "avx2": AF_BASE64_AVX2, "vbmi": AF_BASE64_VBMI}


def base64_level():
    cdef int level = af_base64_level()
    return [name for name, number in _LEVELS.items() if number == level][0]


def base64_set_level(str name=None):
    cdef int level = -1
    if name is not None:
        level = _LEVELS.get(name, 99)
    check(af_base64_set_level(level), f"base64 level {name}")


def base64_encode(data not None, bytes before not None=b"", bytes after not None=b"", *, bint bf16=False):
    cdef Py_buffer view
    cdef Py_ssize_t head = PyBytes_GET_SIZE(before), tail = PyBytes_GET_SIZE(after), size
    cdef bytes out
    cdef char *to
    borrow(data, &view, PyBUF_SIMPLE)
    try:
        if bf16 and view.len % 2:
            raise BadArgument("bfloat16 has two bytes an element")
        size = <Py_ssize_t> af_base64_size(<size_t> (2 * view.len if bf16 else view.len))
        out = PyBytes_FromStringAndSize(NULL, head + size + tail)
        to = PyBytes_AS_STRING(out)
        memcpy(to, PyBytes_AS_STRING(before), <size_t> head)
        memcpy(to + head + size, PyBytes_AS_STRING(after), <size_t> tail)
        to += head
        if view.len > LONG_BYTES:
            with nogil:
                encode(&view, to, bf16)
        else:
            encode(&view, to, bf16)
    finally:
        PyBuffer_Release(&view)
    return out


cdef void encode(Py_buffer *view, char *to, bint bf16) noexcept nogil:
    if bf16:
        af_base64_encode_bf16(view.buf, <size_t> view.len // 2, to)
    else:
        af_base64_encode(view.buf, <size_t> view.len, to)


def base64_decoded_size(text not None):
    cdef Py_buffer view
    cdef int64_t size
    borrow(text, &view, PyBUF_SIMPLE)
    size = af_base64_decoded_size(<const char *> view.buf, <size_t> view.len)
    PyBuffer_Release(&view)
    return size if size >= 0 else -1


def base64_decode_into(text not None, out not None, *, bint bf16=False):
    cdef Py_buffer source, target
    cdef int64_t size
    cdef int rc
    borrow(text, &source, PyBUF_SIMPLE)
    try:
        borrow(out, &target, PyBUF_WRITABLE)
        try:
            size = af_base64_decoded_size(<const char *> source.buf, <size_t> source.len)
            if size < 0 or (bf16 and size % 4):
                return False
            if target.len != (size // 2 if bf16 else size):
                raise BadArgument(f"the text decodes to {size} bytes, there is room for {target.len}")
            if source.len > LONG_BYTES:
                with nogil:
                    rc = decode(&source, &target, bf16)
            else:
                rc = decode(&source, &target, bf16)
        finally:
            PyBuffer_Release(&target)
    finally:
        PyBuffer_Release(&source)
    return rc == 0


cdef int decode(Py_buffer *source, Py_buffer *target, bint bf16) noexcept nogil:
    if bf16:
        return af_base64_decode_bf16(<const char *> source.buf, <size_t> source.len, target.buf)
    return af_base64_decode(<const char *> source.buf, <size_t> source.len, target.buf)
