# What the codec takes from the C API, with raw pointers: reference counts are ours to keep, and nothing here raises by
# itself. A function that returns NULL or -1 has set a Python exception.

cdef extern from *:
    """
    static CYTHON_INLINE int orc_ready(PyObject *s) {
    #if PY_VERSION_HEX < 0x030C0000
        return PyUnicode_READY(s);
    #else
        (void)s; return 0;
    #endif
    }
    static int orc_raised(void) { return -1; }
    static CYTHON_INLINE void *orc_compact(PyObject *s) { return ((PyASCIIObject *)s) + 1; }
    static CYTHON_INLINE PyObject *orc_tuple(PyObject *kind, Py_ssize_t n) {
        if (kind == (PyObject *)&PyTuple_Type) return PyTuple_New(n);
        return ((PyTypeObject *)kind)->tp_alloc((PyTypeObject *)kind, n);
    }
    /* A full tuple of str, int, bytes, bool and float: no cycle can run through it, and a collection need not visit
       it, of which there may be millions. A subclass with a __dict__ could be part of one. */
    static CYTHON_INLINE void orc_atomic(PyObject *tuple) {
        if (Py_TYPE(tuple)->tp_dictoffset == 0) PyObject_GC_UnTrack(tuple);
    }
    /* The next entry of a dict, both references ours; 0 at its end. */
    static CYTHON_INLINE int orc_next(PyObject *dict, Py_ssize_t *at, PyObject **key, PyObject **value) {
        int more;
    #ifdef Py_GIL_DISABLED
        Py_BEGIN_CRITICAL_SECTION(dict);
    #endif
        more = PyDict_Next(dict, at, key, value);
        if (more) {
            Py_INCREF(*key);
            Py_INCREF(*value);
        }
    #ifdef Py_GIL_DISABLED
        Py_END_CRITICAL_SECTION();
    #endif
        return more;
    }
    /* An item of a list as a reference of ours; NULL, without an exception, if the list has become too short. */
    static CYTHON_INLINE PyObject *orc_item(PyObject *list, Py_ssize_t i) {
    #ifdef Py_GIL_DISABLED
        PyObject *item = PyList_GetItemRef(list, i);
        if (item == NULL) PyErr_Clear();
        return item;
    #else
        return Py_NewRef(PyList_GET_ITEM(list, i));
    #endif
    }
    static double orc_double(PyObject *number) { return PyLong_AsDouble(number); }
    """
    int orc_ready(PyObject*) noexcept
    int orc_raised() except -1  # lets an exception that is already set through to Cython's caller
    void* orc_compact(PyObject*) noexcept  # the text of a str made by PyUnicode_New(n, 127): no flags to look at
    int orc_next(PyObject*, Py_ssize_t*, PyObject**, PyObject**) noexcept
    PyObject* orc_item(PyObject*, Py_ssize_t) noexcept  # of a list whose size was just looked at
    double orc_double(PyObject*) noexcept  # of an int that is known to be below 2**64
    PyObject* orc_tuple(PyObject*, Py_ssize_t) noexcept
    void orc_atomic(PyObject*) noexcept

cdef extern from "Python.h":
    PyTypeObject PyUnicode_Type, PyLong_Type, PyDict_Type, PyList_Type, PyFloat_Type
    PyObject* Py_None
    PyObject* Py_True
    PyObject* Py_False
    int PyBUF_SIMPLE
    ctypedef struct Py_buffer:
        void* buf
        Py_ssize_t len

    PyTypeObject* Py_TYPE(PyObject*) noexcept
    void Py_INCREF(PyObject*) noexcept
    void Py_DECREF(PyObject*) noexcept
    void Py_XDECREF(PyObject*) noexcept
    void PyErr_Clear() noexcept
    PyObject* PyErr_Occurred() noexcept
    int PyUnicode_Check(PyObject*) noexcept
    int PyLong_Check(PyObject*) noexcept
    int PyDict_Check(PyObject*) noexcept
    int PyList_Check(PyObject*) noexcept
    int PyFloat_Check(PyObject*) noexcept
    int PyTuple_Check(PyObject*) noexcept
    int PyBytes_Check(PyObject*) noexcept
    int PyByteArray_Check(PyObject*) noexcept
    int PyMemoryView_Check(PyObject*) noexcept
    int PyUnicode_IS_ASCII(PyObject*) noexcept
    void* PyUnicode_DATA(PyObject*) noexcept
    Py_ssize_t PyUnicode_GET_LENGTH(PyObject*) noexcept
    const char* PyUnicode_AsUTF8AndSize(PyObject*, Py_ssize_t*) noexcept
    PyObject* PyUnicode_AsUTF8String(PyObject*) noexcept
    double PyFloat_AS_DOUBLE(PyObject*) noexcept
    long long PyLong_AsLongLongAndOverflow(PyObject*, int*) noexcept
    unsigned long long PyLong_AsUnsignedLongLong(PyObject*) noexcept
    Py_ssize_t PyList_GET_SIZE(PyObject*) noexcept
    Py_ssize_t PyTuple_GET_SIZE(PyObject*) noexcept
    PyObject* PyTuple_GET_ITEM(PyObject*, Py_ssize_t) noexcept
    Py_ssize_t PyDict_Size(PyObject*) noexcept
    int PyDict_Next(PyObject*, Py_ssize_t*, PyObject**, PyObject**) noexcept
    PyObject* PyBytes_FromStringAndSize(const char*, Py_ssize_t) noexcept
    int _PyBytes_Resize(PyObject**, Py_ssize_t) noexcept
    char* PyBytes_AS_STRING(PyObject*) noexcept
    Py_ssize_t PyBytes_GET_SIZE(PyObject*) noexcept
    int PyObject_GetBuffer(PyObject*, Py_buffer*, int) noexcept
    void PyBuffer_Release(Py_buffer*) noexcept
    PyObject* PyObject_CallOneArg(PyObject*, PyObject*) noexcept
    PyObject* Py_NotImplemented
    PyObject* PyLong_FromLongLong(long long) noexcept
    PyObject* PyLong_FromUnsignedLongLong(unsigned long long) noexcept
    PyObject* PyFloat_FromDouble(double) noexcept
    PyObject* PyUnicode_New(Py_ssize_t, Py_UCS4) noexcept
    PyObject* PyUnicode_DecodeUTF8(const char*, Py_ssize_t, const char*) noexcept
    PyObject* PyList_New(Py_ssize_t) noexcept
    void PyList_SET_ITEM(PyObject*, Py_ssize_t, PyObject*) noexcept
    PyObject* PyDict_New() noexcept
    int PyDict_SetItem(PyObject*, PyObject*, PyObject*) noexcept
    void PyObject_GC_Track(PyObject*) noexcept
    void PyObject_GC_UnTrack(PyObject*) noexcept
    int PyErr_ExceptionMatches(object) noexcept
    PyObject* PyMemoryView_FromObject(PyObject*) noexcept
    PyObject* PySequence_GetSlice(PyObject*, Py_ssize_t, Py_ssize_t) noexcept
    PyObject* PyObject_CallFunction(PyObject*, const char*, ...) noexcept
    object PyUnicode_FromObject(PyObject*)
    double PyLong_AsDouble(PyObject*) except? -1.0
    int PyType_FastSubclass(PyTypeObject*, unsigned long) noexcept
    unsigned long Py_TPFLAGS_TUPLE_SUBCLASS
    void PyTuple_SET_ITEM(PyObject*, Py_ssize_t, PyObject*) noexcept
