# The task that an agent is handed, made of a frame: no dict in between, no call of its constructor.

cdef extern from *:
    """
    #include <structmember.h>
    static CYTHON_INLINE PyObject *orc_blank(PyObject *kind) {
        return ((PyTypeObject *)kind)->tp_alloc((PyTypeObject *)kind, 0);
    }
    """
    ctypedef struct PyMemberDef:
        pass
    ctypedef struct PyMemberDescrObject:
        PyMemberDef* d_member
    PyTypeObject PyMemberDescr_Type
    object orc_blank(PyObject*)  # an instance whose slots are all empty
    int PyMember_SetOne(char*, PyMemberDef*, object) except -1

cdef enum:
    FIELDS = 11

cdef tuple FIELD_NAMES = ("id", "type", "input", "priority", "attempt", "metadata", "max_retries", "timeout", "deadline",
                          "fence", "extra")


@cython.final
@cython.auto_pickle(False)
cdef class TaskMaker:
    """Makes instances of ``kind``, a class whose slots are the fields of a task, of frames of ``codec``.

    Slots: ``id type input priority attempt metadata max_retries timeout deadline fence extra``. The constructor of
    ``kind`` is not called: it may check nothing and add nothing.
    """

    cdef readonly TaskCodec codec
    cdef readonly type kind
    cdef tuple slots  # keeps alive what `fields` points to
    cdef PyMemberDef* fields[FIELDS]

    def __cinit__(self, TaskCodec codec not None, type kind not None):
        cdef int i
        if kind.__base__ is not object:
            raise TypeError(f"{kind.__name__} must have no base but object")
        self.codec = codec
        self.kind = kind
        self.slots = tuple([kind.__dict__.get(name) for name in FIELD_NAMES])
        for i in range(FIELDS):
            slot = self.slots[i]
            if Py_TYPE(<PyObject*>slot) != &PyMemberDescr_Type or slot.__objclass__ is not kind:  # another's lies elsewhere
                raise TypeError(f"{kind.__name__}.{FIELD_NAMES[i]} must be a slot of its own, got {show(slot)}")
            self.fields[i] = (<PyMemberDescrObject*><PyObject*>slot).d_member

    def make(self, bytes frame not None, TaskHeader header, object attempt, object fence):
        """``(header, task)`` of a frame; ``header``: its own if it was decoded before, else None. O(len(frame)).

        ``metadata`` is a dict, empty where there is none; ``extra`` holds the keys of the body that are no field.
        Raises: DecodeError; what the hook raises.
        """
        cdef Dec d
        cdef PyObject* parts[2]
        cdef dict extra = {}
        if header is None:
            header = header_of(frame)
        parts[0] = parts[1] = NULL
        if header.body_at > len(frame):
            raise DecodeError("the header is not of this frame", 0)
        dec_open(&d, frame, header.body_at, self.codec.ext_hook, self.codec.max_depth)
        try:
            if dec_body(&d, <PyObject*>extra, parts) < 0:
                dec_raise(&d)
            given = None if parts[0] == NULL else <object>parts[0]
            metadata = None if parts[1] == NULL else <object>parts[1]
        finally:
            Py_XDECREF(parts[0])
            Py_XDECREF(parts[1])
        if type(metadata) is not dict:
            metadata = as_map(metadata)
        return header, self.fill(header, given, metadata, extra, attempt, fence)

    cdef inline object fill(self, TaskHeader header, object given, dict metadata, dict extra, object attempt,
                            object fence):
        task = orc_blank(<PyObject*>self.kind)
        cdef char* at = <char*><PyObject*>task
        PyMember_SetOne(at, self.fields[0], header.id)
        PyMember_SetOne(at, self.fields[1], header.type)
        PyMember_SetOne(at, self.fields[2], given)
        PyMember_SetOne(at, self.fields[3], header.lane)
        PyMember_SetOne(at, self.fields[4], attempt)
        PyMember_SetOne(at, self.fields[5], metadata)
        PyMember_SetOne(at, self.fields[6], None if header._retries < 0 else header._retries)
        PyMember_SetOne(at, self.fields[7], None if header._timeout != header._timeout else header._timeout)
        PyMember_SetOne(at, self.fields[8], None if header._deadline != header._deadline else header._deadline)
        PyMember_SetOne(at, self.fields[9], fence)
        PyMember_SetOne(at, self.fields[10], extra)
        return task


cdef dict as_map(object metadata):
    """Metadata that is no dict: none at all, or a mistake."""
    try:
        empty = not metadata
    except Exception:  # what a hook has made need not be true or false
        empty = False
    if not empty:
        raise DecodeError(f"metadata must be a map, not {type(metadata).__name__}")
    return {}
