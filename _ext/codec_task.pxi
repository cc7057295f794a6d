# The writing side of a frame: which keys of a task belong to the header, what they may be, and the layout.

cdef enum:
    FORMAT = 1
    MAX_RETRIES = 1000
    FEW = 8  # body entries that need no allocation

cdef enum Key:
    K_ID = 0
    K_TYPE
    K_PRIORITY
    K_RETRIES
    K_TIMEOUT
    K_DELAY
    K_DEADLINE
    K_BODY  # everything else; not an index of Fields.given

cdef double MAX_DELAY = 10 * 365.25 * 86400.0
cdef double FOREVER = 1.7976931348623157e308
cdef object ZERO = 0.0

# Interned by Cython, as are the keys of a dict display: most comparisons are of two pointers.
cdef str S_INPUT = "input", S_METADATA = "metadata", S_ID = "id", S_TYPE = "type", S_PRIORITY = "priority"
cdef str S_RETRIES = "max_retries", S_TIMEOUT = "timeout", S_DELAY = "delay", S_DEADLINE = "deadline"

IDENT = "1 to 128 printable ASCII characters without spaces"

ctypedef struct Entry:
    PyObject* key
    PyObject* value

ctypedef struct Fields:
    PyObject* given[K_BODY]  # borrowed from the task (owned without a GIL); NULL where absent or None
    Entry* body              # owned keys and values that go into the body, so that no hook can pull them away
    Py_ssize_t n
    Entry few[FEW]
    int lane
    int retries              # -1: not given
    double timeout           # NaN: not given
    double delay
    double deadline          # NaN: not given


cdef inline Key which(PyObject* key) noexcept:
    if key == <PyObject*>S_INPUT or key == <PyObject*>S_METADATA:
        return K_BODY
    if key == <PyObject*>S_ID:
        return K_ID
    if key == <PyObject*>S_TYPE:
        return K_TYPE
    if key == <PyObject*>S_PRIORITY:
        return K_PRIORITY
    return which_by_text(key)


cdef Key which_by_text(PyObject* key) noexcept:
    cdef Py_ssize_t n
    if orc_ready(key) != 0 or not PyUnicode_IS_ASCII(key):
        return K_BODY
    n = PyUnicode_GET_LENGTH(key)
    if n == 2:
        return K_ID if reads(key, S_ID, n) else K_BODY
    if n == 4:
        return K_TYPE if reads(key, S_TYPE, n) else K_BODY
    if n == 5:
        return K_DELAY if reads(key, S_DELAY, n) else K_BODY
    if n == 7:
        return K_TIMEOUT if reads(key, S_TIMEOUT, n) else K_BODY
    if n == 8:
        return K_PRIORITY if reads(key, S_PRIORITY, n) else K_DEADLINE if reads(key, S_DEADLINE, n) else K_BODY
    return K_RETRIES if n == 11 and reads(key, S_RETRIES, n) else K_BODY


cdef inline bint is_input(PyObject* key) noexcept:
    if key == <PyObject*>S_INPUT:
        return True
    return PyUnicode_IS_ASCII(key) and PyUnicode_GET_LENGTH(key) == 5 and reads(key, S_INPUT, 5)


cdef inline bint is_metadata(PyObject* key) noexcept:
    if key == <PyObject*>S_METADATA:
        return True
    return PyUnicode_IS_ASCII(key) and PyUnicode_GET_LENGTH(key) == 8 and reads(key, S_METADATA, 8)


cdef inline bint reads(PyObject* key, str name, Py_ssize_t n) noexcept:
    return memcmp(PyUnicode_DATA(key), PyUnicode_DATA(<PyObject*>name), n) == 0


cdef int gather(PyObject* task, Fields* f) except -1:
    """Sort the keys of the task, as they are at one moment, and check those of the header."""
    with cython.critical_section(<object>task):
        sort(task, f)
    return check_fields(f)


cdef int sort(PyObject* task, Fields* f) except -1:
    """Runs no foreign code, so under a GIL the borrowed values stay alive until a hook is called."""
    cdef PyObject* key
    cdef PyObject* value
    cdef Py_ssize_t pos = 0
    cdef Key k
    memset(f.given, 0, sizeof(f.given))
    f.n = 0
    f.body = f.few
    if PyDict_Size(task) > FEW:
        f.body = <Entry*>malloc(PyDict_Size(task) * sizeof(Entry))
        if f.body == NULL:
            raise MemoryError
    while PyDict_Next(task, &pos, &key, &value):
        if not PyUnicode_Check(key):
            raise EncodeTypeError(f"the keys of a task must be str, got {show(<object>key)}")
        k = which(key)
        if k == K_BODY:
            if key != <PyObject*>S_INPUT and value != Py_None and not PyDict_Check(value) and is_metadata(key):
                raise EncodeTypeError(f"metadata must be a dict, got {show(<object>value)}", "metadata")
            Py_INCREF(key)
            Py_INCREF(value)
            f.body[f.n] = Entry(key, value)
            f.n += 1
        elif value != Py_None:
            orc_own(value)
            orc_disown(f.given[<int>k])  # subclasses of str can be in a dict twice; the dict keeps it alive
            f.given[<int>k] = value
    return 0


cdef void fields_free(Fields* f) noexcept:
    cdef Py_ssize_t i
    for i in range(K_BODY):
        orc_disown(f.given[i])
    for i in range(f.n):
        Py_DECREF(f.body[i].key)
        Py_DECREF(f.body[i].value)
    if f.body != f.few:
        free(f.body)


cdef inline int check_fields(Fields* f) except -1:
    f.lane = 2 if f.given[<int>K_PRIORITY] == NULL else whole(f.given[<int>K_PRIORITY], "priority", 3)
    f.retries = -1 if f.given[<int>K_RETRIES] == NULL else whole(f.given[<int>K_RETRIES], "max_retries", MAX_RETRIES)
    f.timeout = seconds(f.given[<int>K_TIMEOUT], "timeout", FOREVER, "a finite number of seconds above 0", NAN)
    f.delay = seconds(f.given[<int>K_DELAY], "delay", MAX_DELAY, "a number of seconds from 0 to ten years", 0.0)
    f.deadline = seconds(f.given[<int>K_DEADLINE], "deadline", FOREVER, "a time in unix seconds above 0", NAN)
    return 0


cdef int whole(PyObject* value, str field, int top) except -1:
    cdef int overflow = 0
    cdef long long v
    cdef str wanted = "0 (critical), 1 (high), 2 (normal) or 3 (low)" if top == 3 else f"a whole number from 0 to {top}"
    if not PyLong_Check(value) or value == Py_True or value == Py_False:
        raise EncodeTypeError(f"{field} must be {wanted}, got {show(<object>value)}", field)
    v = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow or not 0 <= v <= top:
        raise EncodeError(f"{field} must be {wanted}, got {show(<object>value)}", field)
    return <int>v


cdef double seconds(PyObject* value, str field, double top, str wanted, double absent) except? -1.0:
    """A number in (0, top]; 0 itself only where absence means 0."""
    cdef double v
    if value == NULL:
        return absent
    if PyFloat_Check(value):
        v = PyFloat_AS_DOUBLE(value)
    elif PyLong_Check(value) and value != Py_True and value != Py_False:
        v = clip(value)
    else:
        raise EncodeTypeError(f"{field} must be {wanted}, got {show(<object>value)}", field)
    if not (0.0 <= v <= top) or (v == 0.0 and absent != 0.0):
        raise EncodeError(f"{field} must be {wanted}, got {show(<object>value)}", field)
    return v


cdef double clip(PyObject* value) except? -1.0:
    """An int as a float; infinite where it does not fit, for the range check to refuse."""
    try:
        return PyLong_AsDouble(value)
    except OverflowError:
        return FOREVER * 2


cdef object ident(object value, str field):
    """`value` as an exact str if it follows the grammar of ids and types."""
    if not isinstance(value, str):
        raise EncodeTypeError(f"{field} must be a str of {IDENT}, got {show(value)}", field)
    if not well_named(<PyObject*>value):
        raise EncodeError(f"{field} must be {IDENT}, got {show(value)}", field)
    return value if type(value) is str else PyUnicode_FromObject(<PyObject*>value)


cdef inline bint well_named(PyObject* s) noexcept:
    if orc_ready(s) != 0 or not PyUnicode_IS_ASCII(s):
        return False
    return is_ident(<uint8_t*>PyUnicode_DATA(s), PyUnicode_GET_LENGTH(s))


cdef object choose_id(PyObject* own, object task_id, object new_id, bint* given):
    """The id out of the argument, the task, or `new_id()`; `given` tells whether the caller chose it."""
    given[0] = True
    if task_id is None:
        if own != NULL:
            return ident(<object>own, "id")
        if new_id is None:
            raise EncodeError(f"id is missing: a task needs one, {IDENT}", "id")
        given[0] = False
        return ident(new_id(), "id")
    chosen = ident(task_id, "task_id")
    if own != NULL and ident(<object>own, "id") != chosen:
        raise EncodeError(f"task_id {show(chosen)} contradicts the id in the task, {show(<object>own)}", "id")
    return chosen


cdef inline void put_name(Enc* e, object name) noexcept:
    put_text(e, <const char*>PyUnicode_DATA(<PyObject*>name), PyUnicode_GET_LENGTH(<PyObject*>name))


cdef inline void put_seconds(Enc* e, double v) noexcept:
    if v != v:
        put(e, 0xC0)
    else:
        enc_double(e, v)


cdef void put_header(Enc* e, Fields* f, object task_id, object kind, object reply, int flags) noexcept:
    """At most 420 bytes at the start of ROOM: nothing here can fail."""
    cdef int n = 4
    if flags:
        n = 9
    elif reply is not None:
        n = 8
    elif f.deadline == f.deadline:
        n = 7
    elif f.timeout == f.timeout:
        n = 6
    elif f.retries >= 0:
        n = 5
    put(e, <uint8_t>(0x90 | n))
    put(e, FORMAT)
    put_name(e, task_id)
    put_name(e, kind)
    put(e, <uint8_t>f.lane)
    if n > 4:
        if f.retries < 0:
            put(e, 0xC0)
        else:
            enc_number(e, f.retries)
    if n > 5:
        put_seconds(e, f.timeout)
    if n > 6:
        put_seconds(e, f.deadline)
    if n > 7:
        if reply is None:
            put(e, 0xC0)
        else:
            put_name(e, reply)
    if n > 8:
        enc_number(e, flags)


cdef int enc_body(Enc* e, PyObject* task, Fields* f) noexcept:
    cdef Py_ssize_t i
    if enc_head(e, f.n, 0x80, 0xDE, 2) < 0:
        return -1
    for i in range(f.n):
        if enc_str(e, f.body[i].key) < 0 or enc_value(e, f.body[i].value, 0) < 0:
            return enc_step(e, task, f.body[i].key, 0)
    return 0


cdef object make(type record, object task_id, int lane, object frame, bint own_id, double delay):
    """Fill a tuple of the caller's class without running its Python constructor."""
    cdef object number = lane, wait = ZERO if delay == 0.0 else delay
    cdef PyObject* out
    out = orc_tuple(<PyObject*>record, 5)
    if out == NULL:
        orc_raised()
    PyTuple_SET_ITEM(out, 0, constant(<PyObject*>task_id))
    PyTuple_SET_ITEM(out, 1, constant(<PyObject*>number))
    PyTuple_SET_ITEM(out, 2, constant(<PyObject*>frame))
    PyTuple_SET_ITEM(out, 3, constant(Py_True if own_id else Py_False))
    PyTuple_SET_ITEM(out, 4, constant(<PyObject*>wait))
    orc_atomic(out)
    result = <object>out
    Py_DECREF(out)
    return result
