"""csrc/http_head.h for Cython."""

from libc.stdint cimport int64_t, uint32_t


cdef extern from "http_head.h" nogil:
    ctypedef unsigned char c_bool "bool"

    enum:
        AF_HTTP_FIELDS
        AF_HTTP_OTHER
        AF_HTTP_KNOWN_NAMES

    ctypedef struct af_http_field:
        uint32_t name, name_len
        uint32_t value, value_len
        uint32_t known

    ctypedef struct af_http_head:
        uint32_t size
        uint32_t line
        uint32_t status
        uint32_t method
        uint32_t target
        uint32_t path_len
        uint32_t target_len
        uint32_t fields
        c_bool keep_alive
        int64_t body
        af_http_field field[AF_HTTP_FIELDS]

    c_bool af_http_read_head(const char *text, size_t size, size_t most, af_http_head *out)
    c_bool af_http_read_reply(const char *text, size_t size, size_t most, af_http_head *out)
    size_t af_http_write_length(char *to, int64_t size)
