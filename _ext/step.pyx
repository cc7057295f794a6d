# cython: freethreading_compatible=True
# Owner: orchestra/_dispatch/isolation.py. Oracle: tests/reference/step.py.
"""The first step of a coroutine, in a context of its own.

Owns nothing: copies the current context, sets one variable in it, calls, and sends the first None. ``gen_send`` gives the
result of a coroutine that never suspends without raising StopIteration, and entering the context by hand saves two
Python frames: together that is more than half of what handing a task to an agent costs.

Concurrency: runs foreign code, so anything may happen between two lines; it keeps no state, so any number of threads may
be in it, with a GIL or without. The context is a copy that no other thread knows yet, and is left again whatever that
code raises.
"""

from cpython.ref cimport Py_DECREF, PyObject

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT

    PySendResult PyIter_Send(object, object, PyObject **) except PYGEN_ERROR
    object PyContext_CopyCurrent()
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1
    object PyContextVar_Set(object, object)
    object PyObject_CallOneArg(object, object)
    bint PyCoro_CheckExact(object)


def first_step(call, argument, variable):
    """Call ``call(argument)`` with ``variable`` set to ``argument``, and run what it gives up to its first suspension.

    Returns ``(context, coroutine, waiting)``: the context to go on in, and what the coroutine waits for. One that has
    ended: ``(context, None, result)``; an awaitable that is no coroutine: ``(context, it, it)``. O(1) beside the call.
    Raises: what the call raises; TypeError if ``variable`` is no ContextVar.
    """
    cdef PyObject *out = NULL
    cdef PySendResult how
    context = PyContext_CopyCurrent()
    PyContext_Enter(context)
    try:
        PyContextVar_Set(variable, argument)
        coroutine = PyObject_CallOneArg(call, argument)
        if not PyCoro_CheckExact(coroutine) and not hasattr(coroutine, "send"):
            return context, coroutine, coroutine
        how = PyIter_Send(coroutine, None, &out)
    finally:
        PyContext_Exit(context)
    value = <object>out
    Py_DECREF(value)
    if how == PYGEN_RETURN:
        return context, None, value
    return context, coroutine, value
