# cython: boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""Text to token ids by a byte-level byte-pair encoder: csrc/bpe.c, and the building of its tables. Contracts stand in
_bpe.pyi and csrc/bpe.h; what to build them from is engine/bpe.py's business.
"""

from areal_fast.core.codes import BadArgument

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE, _PyBytes_Resize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from cpython.unicode cimport PyUnicode_AsUTF8String
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int16_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

cdef extern from "bpe.h":
    enum:
        AF_BPE_CLASSES
        AF_BPE_UNKNOWN
        AF_BPE_INSIDE
        AF_BPE_STEPS
        AF_BPE_WAYS
        AF_BPE_SPELLINGS
        AF_BPE_SPLITS
        AF_BPE_BLOCKS
        AF_BPE_WORDS
        AF_BPE_WORD_IDS
        AF_BPE_NO
        AF_BPE_NORMALIZE
        AF_BPE_MEMORY
    const uint32_t AF_BPE_NONE
    ctypedef struct af_bpe_step:
        uint64_t set
        uint32_t least
        uint32_t most
        uint16_t spelling
        uint16_t spellings
    ctypedef struct af_bpe_way:
        uint64_t barred
        uint16_t step
        uint16_t steps
    ctypedef struct af_bpe_spelling:
        uint64_t sets[4]
        uint32_t size
    ctypedef struct af_bpe_split:
        uint64_t ways[64]
    ctypedef struct af_bpe_pair:
        uint32_t left
        uint32_t right
        uint32_t rank
    ctypedef struct af_bpe_word:
        pass
    ctypedef struct af_bpe:
        uint8_t ascii[128]
        uint8_t block[0x1100]
        const uint8_t *classes
        uint64_t quiet
        af_bpe_split split[4]
        uint32_t splits
        af_bpe_way way[64]
        af_bpe_step step[96]
        af_bpe_spelling spelling[32]
        uint32_t byte_id[256]
        const uint32_t *byte_rank
        const af_bpe_pair *pairs
        uint32_t pair_places
        const uint32_t *merged
        const uint32_t *words
        uint32_t word_places
        const uint32_t *token_start
        const uint8_t *token_bytes
    uint32_t af_bpe_pair_home(uint32_t left, uint32_t right, uint32_t places) nogil
    uint32_t af_bpe_word_home(const uint8_t *word, size_t size, uint32_t places) nogil
    uint32_t af_bpe_whole(const af_bpe *b, const uint8_t *word, size_t n) nogil
    enum:
        AF_BPE_SPELLED_BAD
        AF_BPE_SPELLED_OTHERWISE
    ptrdiff_t af_bpe_spelled(const char **at, const char *end, const int16_t *stands_for, uint8_t *out,
                             size_t room) nogil
    bint af_bpe_unquiet(const af_bpe *b, const uint8_t *text, size_t n, size_t start_from, size_t *start,
                        size_t *stop) nogil
    ptrdiff_t af_bpe_encode(const af_bpe *b, af_bpe_word *met, const uint8_t *text, size_t n, int normal,
                            uint32_t *ids) nogil

cdef extern from "Python.h":
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size)
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef enum:
    SMALL = 2048  # bytes of text whose ids fit into the stack's buffer
    ALONE = 32768  # bytes from which on the GIL is not held
    TOKENS = 1 << 24
    TOKEN_BYTES = 1 << 16  # of the longest token
    LINE = 64


cdef uint8_t all_bytes[256]
cdef int each
for each in range(256):
    all_bytes[each] = <uint8_t> each


# JSON as msgspec has found it to be, so only what was meant is checked

cdef inline bint is_blank(char c) noexcept:
    return c == c" " or c == c"\n" or c == c"\r" or c == c"\t"


cdef inline bint is_digit(char c) noexcept:
    return c"0" <= c <= c"9"


cdef int take(const char **at, const char *end, char what) except -1:
    while at[0] < end and is_blank(at[0][0]):
        at[0] += 1
    if at[0] == end or at[0][0] != what:
        raise BadArgument(f"no {chr(what)} where it should be")
    at[0] += 1
    while at[0] < end and is_blank(at[0][0]):
        at[0] += 1
    return 0


cdef uint32_t number(const char **at, const char *end) noexcept:
    """Digits, TOKENS at most; none are TOKENS."""
    cdef uint32_t value = 0
    if at[0] == end or not is_digit(at[0][0]):
        return TOKENS
    while at[0] < end and is_digit(at[0][0]):
        value = min(<uint32_t> TOKENS, value * 10 + <uint32_t> (at[0][0] - c"0"))
        at[0] += 1
    return value


cdef uint32_t last_number(const char *start, const char *end) noexcept:
    cdef const char *at = end
    while at > start and not is_digit((at - 1)[0]):
        at -= 1
    while at > start and is_digit((at - 1)[0]):
        at -= 1
    return number(&at, end)


cdef uint32_t home(const af_bpe_pair *pairs, uint32_t left, uint32_t right, uint32_t places) noexcept:
    """Where the pair is, or would be."""
    cdef uint32_t i = af_bpe_pair_home(left, right, places)
    while pairs[i].rank != AF_BPE_NONE and (pairs[i].left != left or pairs[i].right != right):
        i = 0 if i + 1 == places else i + 1
    return i


@cython.final
cdef class BytePairs:
    """See _bpe.pyi. Every block that `tables` points into is the object's own."""

    cdef af_bpe tables
    cdef af_bpe_word *met
    cdef int16_t stands_for[0x200]
    cdef object normalize
    cdef Py_ssize_t memory
    cdef list blocks
    cdef tuple spelled      # what take_spelled gives

    def __cinit__(self, str alphabet not None, bytes vocabulary not None, bytes merges not None, bint whole_words,
                  list classes not None, list splits not None, normalize):
        cdef Py_ssize_t kept
        memset(&self.tables, 0, sizeof(af_bpe))
        self.blocks, self.memory = [], 0
        self.normalize = normalize
        self.met = <af_bpe_word *> self.block(AF_BPE_WORDS * sizeof(af_bpe_word))
        self.learn_classes(classes)
        self.learn_splits(splits)
        kept = len(self.blocks)
        self.learn_words(alphabet, vocabulary)
        if whole_words:
            kept = len(self.blocks)
        words, self.blocks = self.blocks[kept:], self.blocks[:kept]
        self.learn_merges(merges)
        if words:
            self.tables.words = self.tables.token_start = NULL
            self.tables.token_bytes = NULL
            self.memory -= sum(map(len, words))

    cdef void *block(self, size_t size) except NULL:
        """Zeros, which live as long as the object and begin on a cache line."""
        cdef size_t place
        memory = bytearray(size + LINE)
        self.blocks.append(memory)
        self.memory += <Py_ssize_t> size
        place = <size_t> <char *> memory
        return <void *> ((place + LINE - 1) & ~(<size_t> LINE - 1))

    cdef int learn_classes(self, list classes) except -1:
        cdef uint8_t *table
        cdef uint32_t point, start, stop
        cdef Py_ssize_t i
        cdef int number
        points = bytearray([AF_BPE_UNKNOWN]) * (AF_BPE_BLOCKS * 256)
        table = <uint8_t *> <char *> points
        self.tables.quiet = <uint64_t> 1 << AF_BPE_INSIDE
        for number, quiet, runs in classes:
            if not 0 <= number < AF_BPE_CLASSES:
                raise BadArgument(f"no class {number}")
            self.tables.quiet |= (<uint64_t> quiet) << number
            for start, stop in runs:
                if not start <= stop <= AF_BPE_BLOCKS * 256:
                    raise BadArgument("a run beyond Unicode")
                for point in range(start, stop):
                    table[point] = <uint8_t> number
        for i in range(128):
            if table[i] == AF_BPE_UNKNOWN:
                raise BadArgument("ASCII without a class")
            self.tables.ascii[i] = table[i]
        known = {}
        for i in range(AF_BPE_BLOCKS):
            number = known.setdefault(bytes(points[i * 256:i * 256 + 256]), len(known))
            if number > 255:
                raise BadArgument("too many blocks of classes")
            self.tables.block[i] = <uint8_t> number
        kept = b"".join(known)
        table = <uint8_t *> self.block(len(kept))
        memcpy(table, PyBytes_AS_STRING(kept), len(kept))
        self.tables.classes = table
        return 0

    cdef int learn_splits(self, list splits) except -1:
        cdef uint32_t ways = 0, steps = 0, spellings = 0, k, first
        cdef uint64_t inside = <uint64_t> 1 << AF_BPE_INSIDE, starts
        cdef af_bpe_step *step
        if not 1 <= len(splits) <= AF_BPE_SPLITS:
            raise BadArgument("one to four splits")
        self.tables.splits = <uint32_t> len(splits)
        for number, alternatives in enumerate(splits):
            for barred, items in alternatives:
                if ways == AF_BPE_WAYS or not items:
                    raise BadArgument("too many ways, or one without steps")
                self.tables.way[ways].barred = barred
                self.tables.way[ways].step = <uint16_t> steps
                self.tables.way[ways].steps = <uint16_t> len(items)
                starts, first = 0, 1
                for members, least, most in items:
                    if steps == AF_BPE_STEPS:
                        raise BadArgument("too many steps")
                    step = &self.tables.step[steps]
                    steps += 1
                    step.least = least
                    step.most = AF_BPE_NONE if most is None else most
                    if isinstance(members, int):
                        step.set = <uint64_t> members | inside
                        starts |= step.set if first else 0
                    else:
                        step.spelling = <uint16_t> spellings
                        step.spellings = <uint16_t> len(members)
                        for spelled in members:
                            if spellings == AF_BPE_SPELLINGS or not 1 <= len(spelled) <= 4:
                                raise BadArgument("too many spellings, or one too long")
                            self.tables.spelling[spellings].size = <uint32_t> len(spelled)
                            for k in range(<uint32_t> len(spelled)):
                                self.tables.spelling[spellings].sets[k] = <uint64_t> spelled[k] | inside
                            starts |= self.tables.spelling[spellings].sets[0] if first else 0
                            spellings += 1
                    if least:
                        first = 0
                if first:
                    raise BadArgument("a way that takes nothing")
                for k in range(64):
                    if starts >> k & 1:
                        self.tables.split[<int> number].ways[k] |= <uint64_t> 1 << ways
                ways += 1
        return 0

    cdef int learn_words(self, str alphabet, bytes vocabulary) except -1:
        """Tokens as JSON, {"spelled": id, ...} with ascending ids."""
        cdef const char *at = PyBytes_AS_STRING(vocabulary)
        cdef const char *end = at + PyBytes_GET_SIZE(vocabulary)
        cdef uint32_t tokens = last_number(at, end) + 1, next_id = 0, id, i, places, used = 0
        cdef uint32_t *words
        cdef uint32_t *starts
        cdef uint8_t *text
        cdef ptrdiff_t size
        if len(alphabet) != 256 or max(alphabet) >= "\u0200":
            raise BadArgument("an alphabet spells 256 bytes by characters below U+0200")
        for i in range(0x200):
            self.stands_for[i] = <int16_t> alphabet.find(chr(i))
        if not tokens <= TOKENS or PyBytes_GET_SIZE(vocabulary) > 1 << 30:
            raise BadArgument("a vocabulary too large")
        places = 2 * tokens + 16
        words = <uint32_t *> self.block(places * sizeof(uint32_t))
        starts = <uint32_t *> self.block((tokens + 1) * sizeof(uint32_t))
        text = <uint8_t *> self.block(PyBytes_GET_SIZE(vocabulary) + TOKEN_BYTES)
        self.tables.words, self.tables.word_places = words, places
        self.tables.token_start, self.tables.token_bytes = starts, text
        take(&at, end, c"{")
        while at < end and at[0] != c"}":
            if next_id:
                take(&at, end, c",")
            size = af_bpe_spelled(&at, end, self.stands_for, text + used, TOKEN_BYTES)
            take(&at, end, c":")
            id = number(&at, end)
            if size == AF_BPE_SPELLED_BAD or not next_id <= id < tokens:
                raise BadArgument("no vocabulary as it should be")
            while next_id <= id:  # ids that no token has are empty
                starts[next_id] = used
                next_id += 1
            if size > 0:  # (what is spelled otherwise is no word)
                i = af_bpe_word_home(text + used, <size_t> size, places)
                while words[i]:
                    i = 0 if i + 1 == places else i + 1
                words[i] = id + 1
                used += <uint32_t> size
            starts[next_id] = used
        take(&at, end, c"}")
        for i in range(256):
            self.tables.byte_id[i] = af_bpe_whole(&self.tables, &all_bytes[i], 1)
            if self.tables.byte_id[i] == AF_BPE_NONE:
                raise BadArgument(f"a vocabulary without byte {i}")
        self.spelled = (
            PyBytes_FromStringAndSize(<const char *> starts, (tokens + 1) * <Py_ssize_t> sizeof(uint32_t)),
            PyBytes_FromStringAndSize(<const char *> text, used),
        )
        return 0

    def take_spelled(self):
        spelled, self.spelled = self.spelled, None
        return spelled

    cdef int learn_merges(self, bytes merges) except -1:
        """Pairs as JSON, [["left", "right"], ...] by rank."""
        cdef const char *at = PyBytes_AS_STRING(merges)
        cdef const char *end = at + PyBytes_GET_SIZE(merges)
        cdef uint32_t room = <uint32_t> (PyBytes_GET_SIZE(merges) // 9 + 1), n = 0, i, a, b, places  # ["a","b"]
        cdef uint8_t *text
        cdef uint32_t *found
        cdef uint32_t *merged
        cdef uint32_t *ranks
        cdef af_bpe_pair *pairs
        cdef ptrdiff_t left, right
        if PyBytes_GET_SIZE(merges) > 1 << 30:
            raise BadArgument("too many merges")
        scratch = bytearray(room * 3 * sizeof(uint32_t) + 2 * TOKEN_BYTES)
        found = <uint32_t *> <char *> scratch
        text = <uint8_t *> <char *> scratch + room * 3 * sizeof(uint32_t)
        take(&at, end, c"[")
        while at < end and at[0] != c"]":
            if n:
                take(&at, end, c",")
            take(&at, end, c"[")
            left = af_bpe_spelled(&at, end, self.stands_for, text, TOKEN_BYTES)
            take(&at, end, c",")
            if left < 0:
                raise BadArgument("merges of what is no bytes")
            right = af_bpe_spelled(&at, end, self.stands_for, text + left, TOKEN_BYTES)
            take(&at, end, c"]")
            if right < 0:
                raise BadArgument("merges of what is no bytes")
            found[3 * n] = af_bpe_whole(&self.tables, text, <size_t> left)
            found[3 * n + 1] = af_bpe_whole(&self.tables, text + left, <size_t> right)
            found[3 * n + 2] = af_bpe_whole(&self.tables, text, <size_t> (left + right))
            for i in range(3):
                if found[3 * n + i] == AF_BPE_NONE:
                    raise BadArgument("merges of what is no token")
            n += 1
        take(&at, end, c"]")
        places = n + n // 2 + 16
        pairs = <af_bpe_pair *> self.block(places * sizeof(af_bpe_pair))
        merged = <uint32_t *> self.block((n + 1) * sizeof(uint32_t))
        ranks = <uint32_t *> self.block(65536 * sizeof(uint32_t))
        for i in range(places):
            pairs[i].rank = AF_BPE_NONE
        for a in range(n):
            i = home(pairs, found[3 * a], found[3 * a + 1], places)
            if pairs[i].rank != AF_BPE_NONE:
                raise BadArgument("a pair that is merged twice")
            pairs[i].left, pairs[i].right, pairs[i].rank = found[3 * a], found[3 * a + 1], a
            merged[a] = found[3 * a + 2]
        for a in range(256):
            for b in range(256):
                ranks[a << 8 | b] = pairs[home(pairs, self.tables.byte_id[a], self.tables.byte_id[b], places)].rank
        self.tables.pairs, self.tables.pair_places, self.tables.merged = pairs, places, merged
        self.tables.byte_rank = ranks
        return 0

    def encode(self, str text not None):
        cdef Py_ssize_t size
        cdef const char *data
        if text.isascii():
            data = PyUnicode_AsUTF8AndSize(text, &size)  # its own memory: nothing is made
            return self.encoded(data, size, text)
        try:
            utf8 = PyUnicode_AsUTF8String(text)
        except UnicodeEncodeError:
            return None
        return self.encoded(PyBytes_AS_STRING(utf8), PyBytes_GET_SIZE(utf8), utf8)

    cdef object encoded(self, const char *data, Py_ssize_t size, object owner, bint normal=False):
        cdef uint32_t small[SMALL + AF_BPE_WORD_IDS]
        cdef ptrdiff_t count
        cdef PyObject *ids
        cdef uint32_t *to
        normal = normal or self.normalize is None
        if size <= SMALL:
            count = af_bpe_encode(&self.tables, self.met, <const uint8_t *> data, <size_t> size, normal, small)
            if count >= 0:
                return PyBytes_FromStringAndSize(<char *> small, count * 4)
            return self.otherwise(count, owner)
        ids = new_bytes(NULL, (size + AF_BPE_WORD_IDS) * 4)
        if ids == NULL:
            raise MemoryError
        to = <uint32_t *> PyBytes_AS_STRING(<object> ids)
        if size < ALONE:
            count = af_bpe_encode(&self.tables, self.met, <const uint8_t *> data, <size_t> size, normal, to)
        else:
            with nogil:
                count = encode_alone(&self.tables, data, size, normal, to)
        _PyBytes_Resize(&ids, max(count, 0) * 4)  # in place: nobody else has it
        try:
            return <object> ids if count >= 0 else self.otherwise(count, owner)
        finally:
            Py_DECREF(<object> ids)

    cdef object otherwise(self, ptrdiff_t verdict, object owner):
        if verdict == AF_BPE_MEMORY:
            raise MemoryError
        # (of long text the library takes care without the GIL)
        if verdict != AF_BPE_NORMALIZE or PyBytes_GET_SIZE(<bytes> owner) >= ALONE:
            return None
        normal = self.normalized(<bytes> owner)
        return self.encoded(PyBytes_AS_STRING(normal), PyBytes_GET_SIZE(normal), normal, True)

    cdef bytes normalized(self, bytes utf8):
        cdef const uint8_t *text = <const uint8_t *> PyBytes_AS_STRING(utf8)
        cdef size_t n = <size_t> PyBytes_GET_SIZE(utf8), at = 0, start = 0, stop = 0
        cdef list parts = []
        while af_bpe_unquiet(&self.tables, text, n, at, &start, &stop):
            parts.append(utf8[at:start])
            parts.append(self.normalize(utf8[start:stop].decode()).encode())
            at = stop
        parts.append(utf8[at:])
        return b"".join(parts)

    @property
    def size_bytes(self):
        return self.memory


cdef ptrdiff_t encode_alone(const af_bpe *tables, const char *data, Py_ssize_t size, bint normal,
                            uint32_t *ids) noexcept nogil:
    """With words met lately of its own, so that other threads may encode meanwhile."""
    cdef af_bpe_word *met = <af_bpe_word *> calloc(AF_BPE_WORDS, sizeof(af_bpe_word))
    cdef ptrdiff_t count = AF_BPE_MEMORY
    if met != NULL:
        count = af_bpe_encode(tables, met, <const uint8_t *> data, <size_t> size, normal, ids)
    free(met)
    return count
