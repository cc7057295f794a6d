# What the compiled modules need on an interpreter without a GIL; where there is one, everything here is empty or plain.
#
# Three kinds of guard, by what may happen while it is held:
# * `orc_mutex` for state whose critical part runs no foreign code and drops no reference to a foreign object. It is not
#   given up half way, and taking it twice in one thread is a deadlock: nothing below it may call back.
# * a critical section of the object (Cython's) where the key's own __hash__ and __eq__ run inside: CPython gives it up
#   while that code waits, so whatever such a call may have changed is looked at again behind it.
# * `orc_try` for a cache, which is skipped when another thread is at the same slot: nobody ever waits.

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    typedef PyMutex orc_mutex;  /* zeroed memory is an open one */
    #define orc_lock(m) PyMutex_Lock(m)
    #define orc_unlock(m) PyMutex_Unlock(m)
    #define orc_try(flag) (!__atomic_exchange_n((flag), 1, __ATOMIC_ACQUIRE))
    #define orc_leave(flag) __atomic_store_n((flag), 0, __ATOMIC_RELEASE)
    #define orc_own(o) Py_XINCREF(o)
    #define orc_disown(o) Py_XDECREF(o)
    #else
    typedef char orc_mutex;
    #define orc_lock(m) ((void)(m))
    #define orc_unlock(m) ((void)(m))
    #define orc_try(flag) ((void)(flag), 1)
    #define orc_leave(flag) ((void)(flag))
    #define orc_own(o) ((void)(o))
    #define orc_disown(o) ((void)(o))
    #endif
    """
    ctypedef struct orc_mutex:
        pass
    void orc_lock(orc_mutex*) noexcept
    void orc_unlock(orc_mutex*) noexcept
    bint orc_try(unsigned char*) noexcept
    void orc_leave(unsigned char*) noexcept
    # A reference that is borrowed under a GIL, because nothing can drop the other one meanwhile.
    void orc_own(void*) noexcept
    void orc_disown(void*) noexcept
