# C codes against codes.py, and into exceptions. Included by _core.pyx; the only place that looks at a code's number.

cdef object _same_as_header():
    """The numbers of codes.py against the header's; a build in which they differ must not load."""
    pairs = {
        "MAX_PROCS": AF_MAX_PROCS, "PROC_KEEPER": AF_PROC_KEEPER, "PROC_CLEANER": AF_PROC_CLEANER,
        "PROC_SUPERVISOR": AF_PROC_SUPERVISOR, "NUM_WORDS": AF_WORDS, "NUM_COUNTERS": AF_COUNTERS,
        "MAX_NAME_BYTES": AF_KEY_MAX, "SESSION": AF_KIND_SESSION, "SHARD": AF_KIND_SHARD,
        "STATE_FREE": AF_STATE_FREE, "STATE_INIT": AF_STATE_INIT, "STATE_ACTIVE": AF_STATE_ACTIVE,
        "STATE_CLOSING": AF_STATE_CLOSING, "STATE_DETACHED": AF_STATE_DETACHED,
        "STATE_DUMPED": AF_STATE_DUMPED, "REC_CHECKPOINT": AF_REC_CHECKPOINT,
        "REC_EXPORTING": AF_REC_EXPORTING, "REC_FLAG_REMOVE": AF_REC_FLAG_REMOVE,
        "OUTCOME_PENDING": AF_OUTCOME_PENDING, "OUTCOME_COMMITTED": AF_OUTCOME_COMMITTED,
        "OUTCOME_ABORTED": AF_OUTCOME_ABORTED, "TXN_GONE": AF_TXN_GONE, "TXN_OPEN": AF_TXN_OPEN,
        "TXN_COMMITTED": AF_TXN_COMMITTED, "LOG_ANY": AF_LOG_ANY,
        "E_NOSPC": AF_ENOSPC, "E_BUSY": AF_EBUSY, "E_EXISTS": AF_EEXIST, "E_MOVED": AF_EMOVED,
        "E_GONE": AF_EGONE, "E_TRIMMED": AF_ETRIMMED, "E_LAYOUT": AF_ELAYOUT, "E_INVAL": AF_EINVAL,
        "E_NOENT": AF_ENOENT, "E_CORRUPT": AF_ECORRUPT, "E_SYS": AF_ESYS,
    }
    for name, value in pairs.items():
        if getattr(codes, name) != value:
            raise ImportError(f"areal_fast.core.codes.{name} is not what csrc/arealfast.h says: {value}")


_same_as_header()


cdef int fail(int64_t code, object what, int64_t slot=-1) except -1:
    """Raise for a negative code. Never returns normally."""
    if code == AF_ESYS:
        raise CoreError(f"{what}: {strerror(errno).decode()}", code=AF_ESYS)
    raise_code(code, what, slot=slot)


cdef int check(int rc, object what) except -1:
    if rc < 0:
        fail(rc, what)
    return 0


cdef int64_t absent(int64_t rc) except -2:
    """-1 for "no such name"; anything else raises."""
    if rc != AF_ENOENT:
        fail(rc, "pin")
    return -1
