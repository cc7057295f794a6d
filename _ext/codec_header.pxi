# The reading side of a frame: the header, which is looked at for every delivery, and the body, which often is not.

ctypedef struct Head:
    PyObject* id       # owned, as are type and reply; NULL where absent
    PyObject* type
    PyObject* reply
    int lane
    int retries
    int flags
    double timeout
    double deadline


@cython.final
@cython.auto_pickle(False)
@cython.freelist(256)
cdef class TaskHeader:
    """What a queue needs to know of a task before its body is worth decoding. Made by ``decode_header`` only.

    ``lane`` 0..3; ``timeout`` and ``deadline`` in seconds and unix seconds; ``body_at``: offset of the body.
    """

    cdef readonly str id
    cdef readonly str type
    cdef readonly int lane
    cdef readonly str reply
    cdef readonly int flags
    cdef readonly Py_ssize_t body_at
    cdef int _retries
    cdef double _timeout
    cdef double _deadline

    @property
    def max_retries(self):
        return None if self._retries < 0 else self._retries

    @property
    def timeout(self):
        return None if self._timeout != self._timeout else self._timeout

    @property
    def deadline(self):
        return None if self._deadline != self._deadline else self._deadline

    def __repr__(self):
        return f"<TaskHeader {self.id} {self.type} lane={self.lane}>"


cdef PyObject* bad_field(Dec* d, const char* what) noexcept:
    d.what = what
    return dec_fail(d, B_FIELD)


cdef inline PyObject* dec_ident(Dec* d, const char* what, bint common) noexcept:
    """A str that follows the grammar of ids; `common` ones are looked up among those met before."""
    cdef PyObject* s
    cdef Py_ssize_t n
    cdef uint64_t at = 0
    if d.p >= d.end:
        return dec_fail(d, B_SHORT)
    n = d.p[0] & 0x1F
    if d.p[0] & 0xE0 == 0xA0:
        d.p += 1
    elif d.p[0] == 0xD9:
        n = dec_length(d, 1)
        if n < 0:
            return NULL
    else:
        return bad_field(d, what)
    if d.end - d.p < n:
        return dec_fail(d, B_SHORT)
    if common:
        at = mix(d.p, n) & (TYPE_SLOTS - 1)
        s = met(&TYPES[at], &TYPES_BUSY[at], d.p, n)
        if s != NULL:
            d.p += n
            return s
    if not is_ident(d.p, n):
        return bad_field(d, what)
    s = ascii_str(d, d.p, n)
    if s != NULL:
        d.p += n
        if common:
            keep(&TYPES[at], &TYPES_BUSY[at], s)
    return s


cdef int dec_whole(Dec* d, int top, const char* what) noexcept:
    """An unsigned number up to `top`, or -1 for nil; -2 after an error."""
    cdef uint64_t v
    cdef int width
    if d.p >= d.end:
        dec_fail(d, B_SHORT)
        return -2
    v = d.p[0]
    if v == 0xC0:
        d.p += 1
        return -1
    width = 0 if v < 0x80 else 1 << (v - 0xCC) if 0xCC <= v <= 0xCE else -1
    if width < 0:
        bad_field(d, what)
        return -2
    if d.end - d.p < 1 + width:
        dec_fail(d, B_SHORT)
        return -2
    if width:
        v = be(d.p + 1, width)
    if v > <uint64_t>top:
        bad_field(d, what)
        return -2
    d.p += 1 + width
    return <int>v


cdef int dec_seconds(Dec* d, double* out, const char* what) noexcept:
    """A finite number above 0, or nil (left as NaN)."""
    cdef PyObject* number
    cdef uint8_t tag
    if d.p >= d.end:
        dec_fail(d, B_SHORT)
        return -1
    tag = d.p[0]
    if tag == 0xC0:
        d.p += 1
        return 0
    if tag < 0x80 or 0xCA <= tag <= 0xD3:
        number = dec_value(d, 0)
        if number == NULL:
            return -1
        out[0] = PyFloat_AS_DOUBLE(number) if PyFloat_Check(number) else orc_double(number)
        Py_DECREF(number)
        if out[0] > 0.0 and isfinite(out[0]):
            return 0
    bad_field(d, what)
    return -1


cdef int dec_head(Dec* d, Head* h) noexcept:
    """The header. Fills `h` and leaves `p` at the body; on -1 `h` owns what head_free() takes back."""
    cdef int n
    memset(h, 0, sizeof(Head))
    h.retries = -1
    h.timeout = h.deadline = NAN
    if d.end - d.p < 2:
        dec_fail(d, B_SHORT)
        return -1
    n = d.p[0] - 0x90
    if not 4 <= n <= 9:
        bad_field(d, "not a task: a header is an array of 4 to 9 elements")
        return -1
    if d.p[1] != FORMAT:
        bad_field(d, "not a task of format version 1; was it written by a newer release?")
        return -1
    d.p += 2
    h.id = dec_ident(d, "header: id must be 1 to 128 printable ASCII characters without spaces", False)
    if h.id == NULL:
        return -1
    h.type = dec_ident(d, "header: type must be 1 to 128 printable ASCII characters without spaces", True)
    if h.type == NULL:
        return -1
    h.lane = dec_whole(d, 3, "header: lane must be 0 to 3")
    if h.lane < 0:
        if h.lane == -1:
            bad_field(d, "header: lane must be 0 to 3")
        return -1
    return 0 if n == 4 else dec_head_rest(d, h, n)


cdef int dec_head_rest(Dec* d, Head* h, int n) noexcept:
    h.retries = dec_whole(d, MAX_RETRIES, "header: max_retries must be nil or 0 to 1000")
    if h.retries < -1:
        return -1
    if n > 5 and dec_seconds(d, &h.timeout, "header: timeout must be nil or a finite number above 0") < 0:
        return -1
    if n > 6 and dec_seconds(d, &h.deadline, "header: deadline must be nil or a finite number above 0") < 0:
        return -1
    if n > 7:
        if d.p < d.end and d.p[0] == 0xC0:
            d.p += 1
        else:
            h.reply = dec_ident(d, "header: reply must be nil or 1 to 128 printable ASCII characters", False)
            if h.reply == NULL:
                return -1
    if n > 8:
        h.flags = dec_whole(d, 0x7FFFFFFF, "header: flags must be nil or 0 to 2**31 - 1")
        if h.flags < -1:
            return -1
        h.flags = 0 if h.flags < 0 else h.flags
    return 0


cdef void head_free(Head* h) noexcept:
    Py_XDECREF(h.id)
    Py_XDECREF(h.type)
    Py_XDECREF(h.reply)


cdef object take(PyObject* owned):
    """A new reference handed to Cython; NULL is None."""
    if owned == NULL:
        return None
    result = <object>owned
    Py_DECREF(owned)
    return result


def decode_header(bytes frame not None):
    """The header of a frame; O(1). Looks at nothing behind it. Raises: DecodeError."""
    return header_of(frame)


cdef TaskHeader header_of(bytes frame):
    cdef Dec d
    cdef Head h
    cdef TaskHeader header
    dec_open(&d, frame, 0, None, 1)
    if dec_head(&d, &h) < 0:
        head_free(&h)
        dec_raise(&d)
    header = TaskHeader.__new__(TaskHeader)
    header.id = take(h.id)
    header.type = take(h.type)
    header.reply = take(h.reply)
    header.lane = h.lane
    header.flags = h.flags
    header._retries = h.retries
    header._timeout = h.timeout
    header._deadline = h.deadline
    header.body_at = d.p - d.start
    return header


cdef int dec_body(Dec* d, PyObject* out, PyObject** parts) noexcept:
    """The body into the dict `out`: a map with str keys, none of them the header's, and nothing behind it.

    With `parts` its input and metadata go there instead; what they own then is the caller's to drop, also after -1.
    """
    cdef Py_ssize_t i, n
    cdef PyObject* key
    if d.p >= d.end:
        dec_fail(d, B_SHORT)
        return -1
    n = d.p[0] & 0x0F
    if d.p[0] & 0xF0 == 0x80:
        d.p += 1
    elif d.p[0] == 0xDE or d.p[0] == 0xDF:
        n = dec_length(d, 2 if d.p[0] == 0xDE else 4)
        if n < 0:
            return -1
    else:
        dec_fail(d, B_BODY)
        return -1
    if n > (d.end - d.p) >> 1:
        dec_fail(d, B_LENGTH)
        return -1
    for i in range(n):
        key = dec_key(d)
        if key != NULL and (not PyUnicode_Check(key) or which(key) != K_BODY):
            Py_DECREF(key)
            key = dec_fail(d, B_BODY)
        if parts != NULL and key != NULL and (is_input(key) or is_metadata(key)):
            if dec_part(d, key, &parts[0 if is_input(key) else 1]) < 0:
                return -1
        elif dec_entry(d, out, key, 0) < 0:
            return -1
    if d.p != d.end:
        bad_field(d, "bytes follow the body")
        return -1
    return 0


cdef inline int dec_part(Dec* d, PyObject* key, PyObject** part) noexcept:
    """Decode the value of `key` (whose reference is taken) into `part`; of a repeated key the last wins."""
    cdef PyObject* old = part[0]
    Py_DECREF(key)
    part[0] = dec_value(d, 0)
    Py_XDECREF(old)
    return -1 if part[0] == NULL else 0


cdef inline int spread(Head* h, dict task) except -1:
    task[S_ID] = <object>h.id
    task[S_TYPE] = <object>h.type
    task[S_PRIORITY] = h.lane
    if h.retries >= 0:
        task[S_RETRIES] = h.retries
    if h.timeout == h.timeout:
        task[S_TIMEOUT] = h.timeout
    if h.deadline == h.deadline:
        task[S_DEADLINE] = h.deadline
    return 0


cdef int seed() except -1:
    """Put our own interned keys into the cache, so that decoded bodies are looked up by pointer."""
    cdef str name
    cdef uint64_t at
    for name in (S_INPUT, S_METADATA, S_ID, S_TYPE):
        at = mix(<uint8_t*>PyUnicode_DATA(<PyObject*>name), len(name)) & (KEY_SLOTS - 1)
        keep(&KEYS[at], &KEYS_BUSY[at], <PyObject*>name)
    return 0


seed()
