# Encoding. Raw pointers throughout: a function returns 0, or -1 after filling `Enc.err`; a Python exception is set only
# for E_RAISED. So the path to an offending value is gathered while unwinding and costs nothing otherwise.
# Invariant: an item taken out of a list or dict is owned while it is encoded, because a hook may empty its container.

cdef enum:
    ROOM = 1024            # bytes on the C stack; most tasks never leave it
    SLACK = 16             # room is asked for roughly (tags of 9 bytes at most); the end is exact
    MAX_FRAME = 0x7FFFFFFF  # also keeps every length below the 32 bits MessagePack has for it
    MAX_DEPTH = 512        # of the caller's own choice; about 200 bytes of C stack a level
    LONG_TEXT = 256        # above it the UTF-8 form is not left behind in the str object

cdef enum Err:
    E_OK = 0
    E_RAISED       # a Python exception is set
    E_TYPE
    E_KEY
    E_INT
    E_TEXT
    E_DEPTH
    E_CHANGED
    E_BUFFER
    E_SIZE

ctypedef struct Step:
    PyObject* key        # owned; NULL: `index` counts
    Py_ssize_t index
    void* container      # compared, never followed

ctypedef struct Enc:
    char* start
    char* cur
    char* end
    PyObject* heap       # owned bytes that hold the buffer once it has left the stack
    Py_ssize_t limit
    int max_depth
    PyObject* default    # borrowed from the caller's frame
    Err err
    PyObject* culprit    # owned
    Py_ssize_t size
    Step* steps
    int nsteps


cdef inline uint64_t word(const uint8_t* p) noexcept:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline uint32_t half(const uint8_t* p) noexcept:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v


cdef inline void copy(void* to, const void* source, Py_ssize_t n) noexcept:
    """memcpy for names and short texts: gcc makes `rep movsq` of a bounded memcpy, which starts slowly."""
    cdef uint8_t* out = <uint8_t*>to
    cdef const uint8_t* p = <const uint8_t*>source
    cdef Py_ssize_t i = 0
    if n > 64:
        memcpy(to, source, n)
    elif n >= 8:
        while i + 8 < n:
            memcpy(out + i, p + i, 8)
            i += 8
        memcpy(out + n - 8, p + n - 8, 8)
    elif n >= 4:
        memcpy(out, p, 4)
        memcpy(out + n - 4, p + n - 4, 4)
    else:
        while i < n:
            out[i] = p[i]
            i += 1


cdef int enc_open(Enc* e, char* room, Py_ssize_t limit, int max_depth, object default) except -1:
    if not 1 <= limit <= MAX_FRAME:
        raise ValueError(f"max_bytes must be 1 to {MAX_FRAME} bytes, got {limit}")
    if not 1 <= max_depth <= MAX_DEPTH:
        raise ValueError(f"max_depth must be 1 to {MAX_DEPTH} levels, got {max_depth}")
    e.start = e.cur = room
    e.end = room + ROOM
    e.heap = NULL
    e.limit = limit
    e.max_depth = max_depth
    e.default = NULL if default is None else <PyObject*>default
    e.err = E_OK
    e.culprit = NULL
    e.size = 0
    e.steps = NULL
    e.nsteps = 0
    return 0


cdef int enc_fail(Enc* e, Err err, PyObject* culprit) noexcept:
    e.err = err
    if culprit != NULL:
        Py_INCREF(culprit)
    e.culprit = culprit
    return -1


cdef int enc_step(Enc* e, PyObject* container, PyObject* key, Py_ssize_t index) noexcept:
    """Remember one step of the path while unwinding; always -1, for the caller to return."""
    if e.steps == NULL:
        e.steps = <Step*>malloc((MAX_DEPTH + 1) * sizeof(Step))
    if e.steps != NULL and e.nsteps <= MAX_DEPTH:
        if key != NULL:
            Py_INCREF(key)
        e.steps[e.nsteps] = Step(key, index, container)
        e.nsteps += 1
    return -1


cdef int enc_grow(Enc* e, Py_ssize_t extra) noexcept:
    cdef Py_ssize_t used = e.cur - e.start
    cdef Py_ssize_t room = 2 * (e.end - e.start)
    if extra > e.limit + SLACK - used:
        e.size = used + extra
        return enc_fail(e, E_SIZE, NULL)
    room = min(max(room, used + extra), e.limit + SLACK)
    if e.heap == NULL:
        e.heap = PyBytes_FromStringAndSize(NULL, room)
        if e.heap != NULL:
            memcpy(PyBytes_AS_STRING(e.heap), e.start, used)
    else:
        _PyBytes_Resize(&e.heap, room)
    if e.heap == NULL:
        return enc_fail(e, E_RAISED, NULL)
    e.start = PyBytes_AS_STRING(e.heap)
    e.cur = e.start + used
    e.end = e.start + room
    return 0


cdef inline int enc_room(Enc* e, Py_ssize_t extra) noexcept:
    return enc_grow(e, extra) if e.end - e.cur < extra else 0


cdef inline void put(Enc* e, uint8_t byte) noexcept:
    e.cur[0] = <char>byte
    e.cur += 1


cdef inline void put_be(Enc* e, uint8_t tag, uint64_t number, int width) noexcept:
    """A tag and `width` big-endian bytes; the loop unrolls because every caller passes a constant."""
    cdef int i
    e.cur[0] = <char>tag
    for i in range(width):
        e.cur[1 + i] = <char><uint8_t>(number >> (8 * (width - 1 - i)))
    e.cur += 1 + width


cdef inline void put_text(Enc* e, const char* text, Py_ssize_t n) noexcept:
    """A str; the caller made room for n + 5 bytes."""
    if n < 32:
        put(e, <uint8_t>(0xA0 | n))
    elif n < 256:
        put_be(e, 0xD9, n, 1)
    elif n < 65536:
        put_be(e, 0xDA, n, 2)
    else:
        put_be(e, 0xDB, n, 4)
    copy(e.cur, text, n)
    e.cur += n


cdef inline int enc_head(Enc* e, Py_ssize_t n, uint8_t small, uint8_t tag16, int per_entry) noexcept:
    """Head of a list or map. Asks for a byte per value to come, so that what cannot fit is refused at once."""
    if enc_room(e, per_entry * n + 5) < 0:
        return -1
    if n < 16:
        put(e, <uint8_t>(small | n))
    elif n < 65536:
        put_be(e, tag16, n, 2)
    else:
        put_be(e, tag16 + 1, n, 4)
    return 0


cdef inline int enc_text(Enc* e, const char* text, Py_ssize_t n) noexcept:
    if enc_room(e, n + 5) < 0:
        return -1
    put_text(e, text, n)
    return 0


cdef inline int enc_str(Enc* e, PyObject* o) noexcept:
    if orc_ready(o) == 0 and PyUnicode_IS_ASCII(o):
        return enc_text(e, <const char*>PyUnicode_DATA(o), PyUnicode_GET_LENGTH(o))
    return enc_wide(e, o)


cdef int enc_wide(Enc* e, PyObject* o) noexcept:
    cdef Py_ssize_t n = 0
    cdef const char* text = NULL
    cdef PyObject* copy = NULL
    cdef int done
    if PyUnicode_GET_LENGTH(o) > LONG_TEXT:
        copy = PyUnicode_AsUTF8String(o)
        if copy != NULL:
            text = PyBytes_AS_STRING(copy)
            n = PyBytes_GET_SIZE(copy)
    else:
        text = PyUnicode_AsUTF8AndSize(o, &n)
    if text == NULL:
        PyErr_Clear()
        return enc_fail(e, E_TEXT, o)
    done = enc_text(e, text, n)
    Py_XDECREF(copy)
    return done


cdef inline int enc_int(Enc* e, PyObject* o) noexcept:
    cdef int overflow = 0
    cdef long long v = PyLong_AsLongLongAndOverflow(o, &overflow)
    if overflow != 0:
        return enc_wide_int(e, o, overflow)
    return enc_number(e, v)


cdef int enc_number(Enc* e, long long v) noexcept:
    if enc_room(e, 9) < 0:
        return -1
    if v >= 0:
        if v < 128:
            put(e, <uint8_t>v)
        elif v < 256:
            put_be(e, 0xCC, <uint64_t>v, 1)
        elif v < 65536:
            put_be(e, 0xCD, <uint64_t>v, 2)
        elif v < 0x100000000:
            put_be(e, 0xCE, <uint64_t>v, 4)
        else:
            put_be(e, 0xCF, <uint64_t>v, 8)
    elif v >= -32:
        put(e, <uint8_t>v)
    elif v >= -128:
        put_be(e, 0xD0, <uint64_t>v, 1)
    elif v >= -32768:
        put_be(e, 0xD1, <uint64_t>v, 2)
    elif v >= -2147483648:
        put_be(e, 0xD2, <uint64_t>v, 4)
    else:
        put_be(e, 0xD3, <uint64_t>v, 8)
    return 0


cdef int enc_wide_int(Enc* e, PyObject* o, int overflow) noexcept:
    cdef unsigned long long v = PyLong_AsUnsignedLongLong(o) if overflow > 0 else 0
    if overflow < 0 or PyErr_Occurred() != NULL:
        PyErr_Clear()
        return enc_fail(e, E_INT, o)
    if enc_room(e, 9) < 0:
        return -1
    put_be(e, 0xCF, v, 8)
    return 0


cdef inline int enc_double(Enc* e, double v) noexcept:
    cdef uint64_t bits
    if enc_room(e, 9) < 0:
        return -1
    memcpy(&bits, &v, 8)
    put_be(e, 0xCB, bits, 8)
    return 0


cdef int enc_bin(Enc* e, const void* data, Py_ssize_t n) noexcept:
    if enc_room(e, n + 5) < 0:
        return -1
    if n < 256:
        put_be(e, 0xC4, n, 1)
    elif n < 65536:
        put_be(e, 0xC5, n, 2)
    else:
        put_be(e, 0xC6, n, 4)
    memcpy(e.cur, data, n)
    e.cur += n
    return 0


cdef int enc_list(Enc* e, PyObject* o, int depth) noexcept:
    cdef Py_ssize_t i, n = PyList_GET_SIZE(o)
    cdef PyObject* item
    cdef int done
    if depth >= e.max_depth:
        return enc_fail(e, E_DEPTH, o)
    if enc_head(e, n, 0x90, 0xDC, 1) < 0:
        return -1
    for i in range(n):
        item = orc_item(o, i) if PyList_GET_SIZE(o) == n else NULL
        if item == NULL:
            return enc_fail(e, E_CHANGED, o)
        done = enc_value(e, item, depth + 1)
        if done < 0:
            enc_step(e, o, NULL, i)
        Py_DECREF(item)
        if done < 0:
            return -1
    return 0


cdef int enc_tuple(Enc* e, PyObject* o, int depth) noexcept:
    cdef Py_ssize_t i, n = PyTuple_GET_SIZE(o)
    if depth >= e.max_depth:
        return enc_fail(e, E_DEPTH, o)
    if enc_head(e, n, 0x90, 0xDC, 1) < 0:
        return -1
    for i in range(n):
        if enc_value(e, PyTuple_GET_ITEM(o, i), depth + 1) < 0:
            return enc_step(e, o, NULL, i)
    return 0


cdef inline int enc_key(Enc* e, PyObject* key) noexcept:
    if PyUnicode_Check(key):
        return enc_str(e, key)
    if PyLong_Check(key) and key != Py_True and key != Py_False:
        return enc_int(e, key)
    if PyBytes_Check(key):
        return enc_bin(e, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))
    return enc_fail(e, E_KEY, key)


cdef int enc_entry(Enc* e, PyObject* container, PyObject* key, PyObject* value, int depth) noexcept:
    """One entry of a map; the references to key and value are taken."""
    cdef int done = enc_key(e, key)
    if done == 0:
        done = enc_value(e, value, depth)
    if done < 0:
        enc_step(e, container, key, 0)
    Py_DECREF(value)
    Py_DECREF(key)
    return done


cdef int enc_dict(Enc* e, PyObject* o, int depth) noexcept:
    cdef Py_ssize_t n = PyDict_Size(o), left = n, pos = 0
    cdef PyObject* key
    cdef PyObject* value
    if depth >= e.max_depth:
        return enc_fail(e, E_DEPTH, o)
    if enc_head(e, n, 0x80, 0xDE, 2) < 0:
        return -1
    while orc_next(o, &pos, &key, &value):
        left -= 1
        if left < 0:
            Py_DECREF(key)
            Py_DECREF(value)
            break
        if enc_entry(e, o, key, value, depth + 1) < 0:
            return -1
    return 0 if left == 0 else enc_fail(e, E_CHANGED, o)


cdef int enc_value(Enc* e, PyObject* o, int depth) noexcept:
    cdef PyTypeObject* kind = Py_TYPE(o)
    if kind == &PyUnicode_Type:
        return enc_str(e, o)
    if kind == &PyLong_Type:
        return enc_int(e, o)
    if kind == &PyDict_Type:
        return enc_dict(e, o, depth)
    if kind == &PyFloat_Type:
        return enc_double(e, PyFloat_AS_DOUBLE(o))
    if kind == &PyList_Type:
        return enc_list(e, o, depth)
    if o == Py_None or o == Py_True or o == Py_False:
        if enc_room(e, 1) < 0:
            return -1
        put(e, 0xC0 if o == Py_None else 0xC3 if o == Py_True else 0xC2)
        return 0
    return enc_other(e, o, depth)


cdef int enc_other(Enc* e, PyObject* o, int depth) noexcept:
    """Rarer types, and subclasses as their base."""
    if PyTuple_Check(o):
        return enc_tuple(e, o, depth)
    if PyBytes_Check(o):
        return enc_bin(e, PyBytes_AS_STRING(o), PyBytes_GET_SIZE(o))
    if PyUnicode_Check(o):
        return enc_str(e, o)
    if PyLong_Check(o):
        return enc_int(e, o)
    if PyFloat_Check(o):
        return enc_double(e, PyFloat_AS_DOUBLE(o))
    if PyDict_Check(o):
        return enc_dict(e, o, depth)
    if PyList_Check(o):
        return enc_list(e, o, depth)
    if PyByteArray_Check(o) or PyMemoryView_Check(o):
        return enc_buffer(e, o, NULL)
    if isinstance(<object>o, Ext):
        return enc_buffer(e, <PyObject*>(<Ext>o).data, o)
    return enc_hook(e, o, depth)


cdef int enc_buffer(Enc* e, PyObject* o, PyObject* ext) noexcept:
    """A bytes-like object as bin, or as the payload of `ext` behind its head. No Python code runs while it is held."""
    cdef Py_buffer view
    cdef int done
    if PyObject_GetBuffer(o, &view, PyBUF_SIMPLE) < 0:
        PyErr_Clear()
        return enc_fail(e, E_BUFFER, o)
    if ext == NULL:
        done = enc_bin(e, view.buf, view.len)
    else:
        done = enc_ext(e, <Ext>ext, view.buf, view.len)
    PyBuffer_Release(&view)
    return done


cdef int enc_ext(Enc* e, Ext ext, const void* data, Py_ssize_t size) noexcept:
    cdef Py_ssize_t head = PyBytes_GET_SIZE(<PyObject*>ext.head), n = head + size
    if enc_room(e, n + 6) < 0:
        return -1
    if n == 1 or n == 2 or n == 4 or n == 8 or n == 16:
        put(e, 0xD4 if n == 1 else 0xD5 if n == 2 else 0xD6 if n == 4 else 0xD7 if n == 8 else 0xD8)
    elif n < 256:
        put_be(e, 0xC7, n, 1)
    elif n < 65536:
        put_be(e, 0xC8, n, 2)
    else:
        put_be(e, 0xC9, n, 4)
    put(e, <uint8_t>ext.code)
    memcpy(e.cur, PyBytes_AS_STRING(<PyObject*>ext.head), head)
    if size:
        memcpy(e.cur + head, data, size)
    e.cur += n
    return 0


cdef int enc_hook(Enc* e, PyObject* o, int depth) noexcept:
    cdef PyObject* got
    cdef int done
    if e.default == NULL:
        return enc_fail(e, E_TYPE, o)
    if depth >= e.max_depth:  # a hook that answers with another unknown value, for ever
        return enc_fail(e, E_DEPTH, o)
    got = PyObject_CallOneArg(e.default, o)
    if got == NULL:
        return enc_fail(e, E_RAISED, NULL)
    done = enc_fail(e, E_TYPE, o) if got == Py_NotImplemented else enc_value(e, got, depth + 1)
    Py_DECREF(got)
    return done


cdef void enc_free(Enc* e) noexcept:
    cdef int i
    for i in range(e.nsteps):
        Py_XDECREF(e.steps[i].key)
    free(e.steps)
    Py_XDECREF(e.culprit)
    Py_XDECREF(e.heap)
    e.heap = NULL


cdef bytes enc_close(Enc* e, int failed, str root):
    """The bytes written, or the error; releases everything `e` owns either way."""
    cdef Py_ssize_t used = e.cur - e.start
    cdef PyObject* out
    if failed == 0 and used > e.limit:
        e.size = used
        failed = enc_fail(e, E_SIZE, NULL)
    if failed < 0:
        try:
            enc_raise(e, root)
        finally:
            enc_free(e)
    if e.heap == NULL:
        out = PyBytes_FromStringAndSize(e.start, used)
    else:
        _PyBytes_Resize(&e.heap, used)
        out = e.heap
    if out == NULL:
        orc_raised()
    result = <bytes>out
    Py_DECREF(out)
    return result
