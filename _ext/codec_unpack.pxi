# Decoding. A function returns a new reference, or NULL after filling `Dec.err` (or with an exception set: E_RAISED).
# Invariant: no length is believed before it is compared with the bytes that are left. `owed` counts the values that the
# containers around still wait for (a byte each at least), so all allocations together stay linear in the input.

cdef enum Bad:
    B_RAISED = 0  # a Python exception is set
    B_SHORT       # the input ends inside a value
    B_LENGTH      # a container claims more values than bytes are left
    B_TEXT
    B_DEPTH
    B_KEY
    B_TAG         # 0xC1, the one byte that MessagePack never uses
    B_EXT         # an extension without a hook
    B_BODY
    B_FIELD       # a field of the header; `what` says which

ctypedef struct Dec:
    const uint8_t* start
    const uint8_t* p
    const uint8_t* end
    Py_ssize_t owed
    int max_depth
    PyObject* hook     # borrowed from the caller's frame, as is `frame`
    PyObject* frame
    Bad err
    Py_ssize_t at
    const char* what

cdef enum:
    KEY_SLOTS = 512    # powers of two
    TYPE_SLOTS = 128
    KEY_MAX = 32       # longer keys are not worth a comparison

# Strings met before, by a hash of their bytes; a slot owns what it holds and is overwritten by the next of its hash.
# Bounded, never interned: keys come from the wire. Entries of TYPES have passed is_ident().
cdef PyObject* KEYS[KEY_SLOTS]
cdef PyObject* TYPES[TYPE_SLOTS]
cdef unsigned char KEYS_BUSY[KEY_SLOTS]  # which slots a thread is at; without a GIL
cdef unsigned char TYPES_BUSY[TYPE_SLOTS]


cdef int dec_open(Dec* d, bytes frame, Py_ssize_t at, object hook, int max_depth) except -1:
    if not 1 <= max_depth <= MAX_DEPTH:
        raise ValueError(f"max_depth must be 1 to {MAX_DEPTH} levels, got {max_depth}")
    d.start = <const uint8_t*>PyBytes_AS_STRING(<PyObject*>frame)
    d.p = d.start + at
    d.end = d.start + PyBytes_GET_SIZE(<PyObject*>frame)
    d.owed = 0
    d.max_depth = max_depth
    d.hook = NULL if hook is None else <PyObject*>hook
    d.frame = <PyObject*>frame
    d.err = B_RAISED
    d.at = 0
    d.what = NULL
    return 0


cdef PyObject* dec_fail(Dec* d, Bad err) noexcept:
    d.err = err
    d.at = d.p - d.start
    return NULL


cdef int dec_raise(Dec* d) except -1:
    cdef Py_ssize_t size = d.end - d.start
    cdef str text
    if d.err == B_RAISED:
        orc_raised()
    if d.err == B_SHORT:
        text = f"cut short: {size} bytes end inside a value"
    elif d.err == B_LENGTH:
        text = "a length exceeds the bytes that are left"
    elif d.err == B_TEXT:
        text = "a str is not valid UTF-8"
    elif d.err == B_DEPTH:
        text = f"nested deeper than {d.max_depth} levels"
    elif d.err == B_KEY:
        text = "a map key is not a str, an int or bytes"
    elif d.err == B_TAG:
        text = "0xc1 is not a MessagePack type"
    elif d.err == B_EXT:
        text = "an extension type that nothing here understands"
    elif d.err == B_BODY:
        text = "the body of a task must be a map with str keys that do not belong to the header"
    else:
        text = (<bytes>d.what).decode()
    raise DecodeError(f"{text} (at byte {d.at} of {size})", d.at)


cdef inline uint64_t be(const uint8_t* p, int width) noexcept:
    cdef uint64_t v = 0
    cdef int i
    for i in range(width):
        v = v << 8 | p[i]
    return v


cdef inline bint is_ascii(const uint8_t* p, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i = 0
    cdef uint64_t seen = 0
    while i + 8 <= n:
        seen |= word(p + i)
        i += 8
    while i < n:
        seen |= p[i]
        i += 1
    return seen & 0x8080808080808080ULL == 0


cdef inline uint64_t outside(uint64_t x) noexcept:
    """Bit 7 of each byte tells whether that byte of `x` is outside ``[!-~]``; no carry leaves a byte."""
    cdef uint64_t above = (x & 0x7F7F7F7F7F7F7F7FULL) + 0x0101010101010101ULL
    cdef uint64_t not_below = (x | 0x8080808080808080ULL) - 0x2121212121212121ULL
    return x | above | ~not_below


cdef inline bint is_ident(const uint8_t* p, Py_ssize_t n) noexcept:
    """1 to 128 bytes of ``[!-~]``."""
    cdef Py_ssize_t i = 0
    cdef uint64_t bad = 0
    if not 1 <= n <= 128:
        return False
    while i + 8 <= n:
        bad |= outside(word(p + i))
        i += 8
    if i < n and n >= 8:  # the rest, together with bytes seen before
        bad |= outside(word(p + n - 8))
        i = n
    while i < n:
        bad |= outside(0x2121212121212100ULL | p[i])
        i += 1
    return bad & 0x8080808080808080ULL == 0


cdef inline uint64_t mix(const uint8_t* p, Py_ssize_t n) noexcept:
    """A hash of both ends and the length: enough to tell names apart; a collision only overwrites a slot."""
    cdef uint64_t a, b
    if n >= 8:
        a = word(p)
        b = word(p + n - 8)
    elif n >= 4:
        a = half(p)
        b = half(p + n - 4)
    elif n > 0:
        a = <uint64_t>p[0] << 8 | p[n >> 1]
        b = p[n - 1]
    else:
        a = b = 0
    return ((a ^ <uint64_t>n) * 0x9E3779B97F4A7C15ULL + b * 0xD6E8FEB86659FD93ULL) >> 40


cdef inline bint equal(const uint8_t* a, const uint8_t* b, Py_ssize_t n) noexcept:
    """memcmp for names: no call, and no order to find."""
    cdef Py_ssize_t i = 0
    cdef uint64_t other = 0
    if n >= 8:
        while i + 8 < n:
            other |= word(a + i) ^ word(b + i)
            i += 8
        return (other | (word(a + n - 8) ^ word(b + n - 8))) == 0
    if n >= 4:
        return (half(a) ^ half(b) | half(a + n - 4) ^ half(b + n - 4)) == 0
    while i < n:
        other |= a[i] ^ b[i]
        i += 1
    return other == 0


cdef inline bint same(PyObject* s, const uint8_t* p, Py_ssize_t n) noexcept:
    """`s` is one of our ASCII strings; are these its bytes?"""
    return s != NULL and PyUnicode_GET_LENGTH(s) == n and equal(<const uint8_t*>orc_compact(s), p, n)


cdef inline PyObject* ascii_str(Dec* d, const uint8_t* p, Py_ssize_t n) noexcept:
    cdef PyObject* s = PyUnicode_New(n, 127)
    if s == NULL:
        return dec_fail(d, B_RAISED)
    copy(orc_compact(s), p, n)
    return s


cdef inline PyObject* met(PyObject** slot, unsigned char* busy, const uint8_t* p, Py_ssize_t n) noexcept:
    """A reference to the slot's string if these are its bytes, else NULL."""
    cdef PyObject* s = NULL
    if orc_try(busy):
        if same(slot[0], p, n):
            s = constant(slot[0])
        orc_leave(busy)
    return s


cdef inline void keep(PyObject** slot, unsigned char* busy, PyObject* s) noexcept:
    cdef PyObject* old
    if orc_try(busy):
        old = slot[0]
        slot[0] = constant(s)
        orc_leave(busy)
        Py_XDECREF(old)


cdef PyObject* dec_text(Dec* d, Py_ssize_t n) noexcept:
    """`n` bytes at `p` as a str."""
    cdef PyObject* s
    if d.end - d.p < n:
        return dec_fail(d, B_SHORT)
    if is_ascii(d.p, n):
        s = ascii_str(d, d.p, n)
    else:
        s = PyUnicode_DecodeUTF8(<const char*>d.p, n, NULL)
        if s == NULL:
            if not PyErr_ExceptionMatches(UnicodeDecodeError):
                return dec_fail(d, B_RAISED)
            PyErr_Clear()
            return dec_fail(d, B_TEXT)
    d.p += n
    return s


cdef inline PyObject* dec_name(Dec* d, Py_ssize_t n) noexcept:
    """`n` bytes at `p` as a str that is likely to have been met before: a key."""
    cdef PyObject* s
    cdef uint64_t at
    if n > KEY_MAX or d.end - d.p < n:
        return dec_text(d, n)
    at = mix(d.p, n) & (KEY_SLOTS - 1)
    s = met(&KEYS[at], &KEYS_BUSY[at], d.p, n)
    if s != NULL:
        d.p += n
        return s
    s = dec_text(d, n)
    if s != NULL and PyUnicode_GET_LENGTH(s) == n:  # else not ASCII
        keep(&KEYS[at], &KEYS_BUSY[at], s)
    return s


cdef inline Py_ssize_t dec_length(Dec* d, int width) noexcept:
    """A length of `width` bytes behind the tag at `p`; -1 if the input ends inside it."""
    cdef uint64_t n
    if d.end - d.p < 1 + width:
        dec_fail(d, B_SHORT)
        return -1
    n = be(d.p + 1, width)
    d.p += 1 + width
    return <Py_ssize_t>n


cdef PyObject* dec_key(Dec* d) noexcept:
    """Map keys: what the encoder lets through and nothing else."""
    cdef uint8_t tag
    cdef Py_ssize_t n
    if d.p >= d.end:
        return dec_fail(d, B_SHORT)
    tag = d.p[0]
    if tag & 0xE0 == 0xA0:
        d.p += 1
        return dec_name(d, tag & 0x1F)
    if tag < 0x80 or tag >= 0xE0 or 0xCC <= tag <= 0xD3 or 0xC4 <= tag <= 0xC6:
        return dec_value(d, 0)
    if 0xD9 <= tag <= 0xDB:
        n = dec_length(d, 1 << (tag - 0xD9))
        return NULL if n < 0 else dec_name(d, n)
    return dec_fail(d, B_KEY)


cdef PyObject* dec_list(Dec* d, Py_ssize_t n, int depth) noexcept:
    cdef PyObject* out
    cdef PyObject* item
    cdef Py_ssize_t i
    if depth >= d.max_depth:
        return dec_fail(d, B_DEPTH)
    if n > d.end - d.p - d.owed:
        return dec_fail(d, B_LENGTH)
    out = PyList_New(n)
    if out == NULL:
        return dec_fail(d, B_RAISED)
    PyObject_GC_UnTrack(out)  # until it is whole: a hook must not find its empty slots through gc.get_objects()
    d.owed += n
    for i in range(n):
        d.owed -= 1
        item = dec_value(d, depth + 1)
        if item == NULL:
            Py_DECREF(out)
            return NULL
        PyList_SET_ITEM(out, i, item)
    PyObject_GC_Track(out)
    return out


cdef PyObject* dec_map(Dec* d, Py_ssize_t n, int depth) noexcept:
    cdef PyObject* out
    cdef Py_ssize_t i
    if depth >= d.max_depth:
        return dec_fail(d, B_DEPTH)
    if n > (d.end - d.p - d.owed) >> 1:
        return dec_fail(d, B_LENGTH)
    out = PyDict_New()
    if out == NULL:
        return dec_fail(d, B_RAISED)
    d.owed += 2 * n
    for i in range(n):
        d.owed -= 2
        if dec_entry(d, out, dec_key(d), depth + 1) < 0:
            Py_DECREF(out)
            return NULL
    return out


cdef inline int dec_entry(Dec* d, PyObject* out, PyObject* key, int depth) noexcept:
    """Decode the value of `key` (whose reference is taken) and store both."""
    cdef PyObject* value
    cdef int done
    if key == NULL:
        return -1
    value = dec_value(d, depth)
    if value == NULL:
        Py_DECREF(key)
        return -1
    done = PyDict_SetItem(out, key, value)
    Py_DECREF(key)
    Py_DECREF(value)
    if done < 0:
        dec_fail(d, B_RAISED)
    return done


cdef PyObject* dec_value(Dec* d, int depth) noexcept:
    cdef uint8_t tag
    if d.p >= d.end:
        return dec_fail(d, B_SHORT)
    tag = d.p[0]
    if tag & 0xE0 == 0xA0:
        d.p += 1
        return dec_text(d, tag & 0x1F)
    if tag < 0x80:
        d.p += 1
        return PyLong_FromLongLong(tag)
    if tag >= 0xE0:
        d.p += 1
        return PyLong_FromLongLong(<int>tag - 256)
    if tag < 0x90:
        d.p += 1
        return dec_map(d, tag & 0x0F, depth)
    if tag < 0xA0:
        d.p += 1
        return dec_list(d, tag & 0x0F, depth)
    return dec_tagged(d, tag, depth)


cdef PyObject* dec_tagged(Dec* d, uint8_t tag, int depth) noexcept:
    cdef Py_ssize_t n
    if tag <= 0xC3:
        if tag == 0xC1:
            return dec_fail(d, B_TAG)
        d.p += 1
        return constant(Py_None if tag == 0xC0 else Py_True if tag == 0xC3 else Py_False)
    if 0xCA <= tag <= 0xD3:
        return dec_number(d, tag)
    if 0xD4 <= tag <= 0xD8:
        return dec_ext(d, 1 << (tag - 0xD4), 1)
    # What is left carries a length of 1, 2 or 4 bytes, and comes in such families.
    n = dec_length(d, 2 << (tag & 1) if tag >= 0xDC else 1 << (tag - 0xD9) if tag >= 0xD9 else
                   1 << (tag - 0xC7) if tag >= 0xC7 else 1 << (tag - 0xC4))
    if n < 0:
        return NULL
    if tag >= 0xDE:
        return dec_map(d, n, depth)
    if tag >= 0xDC:
        return dec_list(d, n, depth)
    if tag >= 0xD9:
        return dec_text(d, n)
    if tag >= 0xC7:
        return dec_ext(d, n, 0)
    return dec_bin(d, n)


cdef inline PyObject* constant(PyObject* o) noexcept:
    Py_INCREF(o)
    return o


cdef PyObject* dec_number(Dec* d, uint8_t tag) noexcept:
    cdef int width = 4 if tag == 0xCA else 8 if tag == 0xCB else 1 << (tag & 3)
    cdef uint64_t bits
    cdef uint32_t bits32
    cdef double real
    cdef float real32
    if d.end - d.p < 1 + width:
        return dec_fail(d, B_SHORT)
    bits = be(d.p + 1, width)
    d.p += 1 + width
    if tag == 0xCB:
        memcpy(&real, &bits, 8)
        return PyFloat_FromDouble(real)
    if tag == 0xCA:
        bits32 = <uint32_t>bits
        memcpy(&real32, &bits32, 4)
        return PyFloat_FromDouble(real32)
    if tag <= 0xCF:
        return PyLong_FromUnsignedLongLong(bits)
    bits <<= 64 - 8 * width  # sign extension by an arithmetic shift back
    return PyLong_FromLongLong(<int64_t>bits >> (64 - 8 * width))


cdef PyObject* dec_bin(Dec* d, Py_ssize_t n) noexcept:
    cdef PyObject* out
    if d.end - d.p < n:
        return dec_fail(d, B_SHORT)
    out = PyBytes_FromStringAndSize(<const char*>d.p, n)
    if out == NULL:
        return dec_fail(d, B_RAISED)
    d.p += n
    return out


cdef PyObject* dec_ext(Dec* d, Py_ssize_t n, int tag_width) noexcept:
    """An extension: at `p` (behind a tag still to be skipped, for the fixed sizes) are the code and `n` bytes."""
    cdef int code
    if d.end - d.p - tag_width - 1 < n:
        return dec_fail(d, B_SHORT)
    if d.hook == NULL:
        return dec_fail(d, B_EXT)
    code = d.p[tag_width]
    d.p += tag_width + 1 + n
    return dec_hook(d, code - 256 if code > 127 else code, d.p - d.start - n, n)


cdef PyObject* dec_hook(Dec* d, int code, Py_ssize_t at, Py_ssize_t n) noexcept:
    cdef PyObject* out = NULL
    cdef PyObject* whole = PyMemoryView_FromObject(d.frame)
    cdef PyObject* payload = NULL if whole == NULL else PySequence_GetSlice(whole, at, at + n)
    if payload != NULL:
        out = PyObject_CallFunction(d.hook, "iO", code, payload)
    Py_XDECREF(payload)
    Py_XDECREF(whole)
    return out if out != NULL else dec_fail(d, B_RAISED)
