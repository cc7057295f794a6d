# Places of a list that one object owns and guards: plain stores, without the lock that CPython's list would take. The
# list is there for the garbage collector, which looks at it while every thread stands still.

cdef extern from *:
    """
    /* Puts `item` there and gives back what was there; both references change hands. */
    static CYTHON_INLINE PyObject *orc_exchange(PyObject *list, Py_ssize_t i, PyObject *item) {
        PyObject *old = PyList_GET_ITEM(list, i);
        PyList_SET_ITEM(list, i, item);
        return old;
    }
    static CYTHON_INLINE void orc_store(PyObject *list, Py_ssize_t i, PyObject *item) {
        Py_INCREF(item);
        Py_DECREF(orc_exchange(list, i, item));  /* the caller knows that None was there */
    }
    static CYTHON_INLINE PyObject *orc_remove(PyObject *list, Py_ssize_t i) {
        Py_INCREF(Py_None);
        return orc_exchange(list, i, Py_None);
    }
    """
    void orc_store(object, Py_ssize_t, object) noexcept
    object orc_remove(object, Py_ssize_t)
