# cython: freethreading_compatible=True
# Owner: orchestra/scheduler.py (PriorityScheduler). Oracle: tests/reference/heap.py.
"""A heap of objects ordered by (priority, order of arrival).

Owns the objects it holds and their order; refuses to know what they are, to wait and to tell time.

Layout: a 4-ary heap of plain C entries that name a place in one Python list, which holds the objects. The list makes
the objects visible to the garbage collector without a traverse function of our own; the entries make every comparison
two machine words. Entries behind the heap keep the free places, so there is no second free list.
Four children to a node: half the levels of a binary heap, siblings side by side (LaMarca and Ladner, "The Influence of
Caches on the Performance of Heaps", 1996).

Concurrency: any thread may call anything; every method is atomic. Under a GIL it is one C call that keeps it. Python
code can run inside a method only where an allocation triggers a garbage collection (CPython 3.11) or a released object
has a ``__del__``; both happen while the heap is whole. Without a GIL a method holds the heap's mutex, and nothing that
could run Python code happens meanwhile: there a collection waits for the next bytecode, and objects are released outside.
``len()``, ``arrivals`` and ``__sizeof__`` read one word without it, so they may be a moment old.
"""

cimport cython
from cpython.exc cimport PyErr_Clear
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_Check
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint64_t

cdef extern from "Python.h":
    # Cython's declaration takes an object for the last argument; deleting a slice wants NULL there.
    int PyList_SetSlice(PyObject *items, Py_ssize_t low, Py_ssize_t high, PyObject *values)

include "threads.pxi"
include "lists.pxi"

cdef enum:
    ARITY = 4
    FIRST_CAPACITY = 64  # 1.5 kB; also what a drained heap shrinks to


cdef struct Entry:
    int64_t priority
    uint64_t sequence
    Py_ssize_t place  # index in the list of objects


cdef inline bint _before(const Entry *a, const Entry *b) noexcept nogil:
    return a.priority < b.priority or (a.priority == b.priority and a.sequence < b.sequence)


@cython.final
@cython.no_gc_clear  # the list breaks any cycle; a cleared attribute would let a late __del__ crash the interpreter
cdef class TaskHeap:
    # Invariant: _entries[:_capacity].place is a permutation of range(_capacity);
    # the list holds an object at the places of _entries[:_size] and None at all others.
    cdef Entry *_entries
    cdef Py_ssize_t _size
    cdef Py_ssize_t _capacity
    cdef uint64_t _sequence  # of the next arrival; 2**64 arrivals are out of reach
    cdef list _objects
    cdef orc_mutex _lock

    def __cinit__(self):
        self._objects = []

    def __dealloc__(self):
        PyMem_Free(self._entries)

    def __len__(self):
        return self._size

    def push(self, priority, obj):
        cdef Py_ssize_t place
        cdef int64_t rank
        if not PyLong_Check(priority):  # a float would be cut without a word
            raise TypeError(f"priority must be an int, got {type(priority).__name__}")
        rank = priority
        orc_lock(&self._lock)
        try:
            if self._size == self._capacity:
                self._grow()
            self._check()
            place = self._entries[self._size].place
            orc_store(self._objects, place, obj)
            self._sift_up(rank, place)
        finally:
            orc_unlock(&self._lock)

    @property
    def arrivals(self):
        return self._sequence

    def insert(self, priority, uint64_t sequence, obj):
        cdef Entry entry
        if not PyLong_Check(priority):
            raise TypeError(f"priority must be an int, got {type(priority).__name__}")
        entry.priority = priority
        entry.sequence = sequence
        orc_lock(&self._lock)
        try:
            if sequence >= self._sequence:  # a later arrival would get the same one
                raise ValueError(f"insert: sequence must be one of the {self._sequence} arrivals so far, got {sequence}")
            if self._size == self._capacity:
                self._grow()
            self._check()
            entry.place = self._entries[self._size].place
            orc_store(self._objects, entry.place, obj)
            self._rise(entry)
        finally:
            orc_unlock(&self._lock)

    def pop(self):
        orc_lock(&self._lock)
        try:
            if self._size == 0:
                raise IndexError("pop from an empty TaskHeap")
            self._check()
            obj = self._take()
            self._shrink()
        finally:
            orc_unlock(&self._lock)
        return obj

    def pop_item(self):
        cdef int64_t priority
        orc_lock(&self._lock)
        try:
            if self._size == 0:
                raise IndexError("pop from an empty TaskHeap")
            self._check()
            priority = self._entries[0].priority
            obj = self._take()
            self._shrink()
        finally:
            orc_unlock(&self._lock)
        return priority, obj

    def peek(self):
        orc_lock(&self._lock)
        try:
            if self._size == 0:
                raise IndexError("peek at an empty TaskHeap")
            self._check()
            obj = <object> PyList_GET_ITEM(self._objects, self._entries[0].place)
        finally:
            orc_unlock(&self._lock)
        return obj

    def pop_many(self, Py_ssize_t count):
        cdef Py_ssize_t taken = 0
        cdef list out
        if count < 0:
            raise ValueError(f"pop_many: count must be 0 or more, got {count}")
        orc_lock(&self._lock)
        try:
            # Allocated in full before anything leaves the heap: nothing below can fail and lose an object.
            out = [None] * min(count, self._size)
            self._check()
            while taken < PyList_GET_SIZE(out) and self._size:
                orc_store(out, taken, self._take())
                taken += 1
            self._shrink()
        finally:
            orc_unlock(&self._lock)
        if taken < PyList_GET_SIZE(out):  # a collection during the allocation ran code that popped
            del out[taken:]
        return out

    def entries(self):
        cdef Py_ssize_t i
        cdef Entry *entry
        cdef list out = []
        orc_lock(&self._lock)
        try:
            for i in range(self._size):
                self._check()
                if i >= self._size:  # a collection during an allocation ran code that popped
                    break
                entry = &self._entries[i]
                out.append((entry.priority, entry.sequence, <object> PyList_GET_ITEM(self._objects, entry.place)))
        finally:
            orc_unlock(&self._lock)
        return out

    def clear(self):
        cdef list fresh = []
        cdef Py_ssize_t count
        orc_lock(&self._lock)
        count = self._size
        old = self._objects
        self._objects = fresh
        PyMem_Free(self._entries)
        self._entries = NULL
        self._size = self._capacity = 0
        orc_unlock(&self._lock)
        del old  # runs the objects' __del__, which finds a whole and empty heap
        return count

    def __sizeof__(self):
        return object.__sizeof__(self) + self._capacity * sizeof(Entry)

    cdef inline int _check(self) except -1:
        # Only code that reached the list through gc.get_referents, or runs while a dead cycle is torn down, fails this.
        if PyList_GET_SIZE(self._objects) != self._capacity:
            raise RuntimeError("TaskHeap is no longer usable: its objects were taken away by the garbage collector")
        return 0

    cdef int _grow(self) except -1:
        cdef Py_ssize_t wanted = self._capacity * 2 if self._capacity else FIRST_CAPACITY
        cdef list padding = [None] * (wanted - self._capacity)
        cdef Entry *entries
        if self._size < self._capacity:  # a collection during that allocation ran code that popped or grew
            return 0
        wanted = self._capacity + PyList_GET_SIZE(padding)
        entries = <Entry *> PyMem_Realloc(self._entries, wanted * sizeof(Entry))
        if entries is NULL:
            raise MemoryError
        self._entries = entries
        self._objects.extend(padding)
        self._adopt(wanted)
        return 0

    cdef void _adopt(self, Py_ssize_t wanted) noexcept:
        cdef Py_ssize_t i
        for i in range(self._capacity, wanted):
            self._entries[i].place = i
        self._capacity = wanted

    cdef void _shrink(self) noexcept:
        # Only an empty heap shrinks, and emptying it took as many pops as this costs: amortised O(1).
        # Not shrinking for want of memory is no error: the caller already holds an object that must not be lost.
        cdef Entry *entries
        if self._size or self._capacity <= 16 * FIRST_CAPACITY:
            return
        if PyList_SetSlice(<PyObject *> self._objects, FIRST_CAPACITY, self._capacity, NULL) < 0:
            PyErr_Clear()
            return
        self._capacity = 0
        entries = <Entry *> PyMem_Realloc(self._entries, FIRST_CAPACITY * sizeof(Entry))
        if entries is not NULL:
            self._entries = entries
        self._adopt(FIRST_CAPACITY)

    cdef void _sift_up(self, int64_t priority, Py_ssize_t place) noexcept:
        cdef Entry *entries = self._entries
        cdef Py_ssize_t hole = self._size
        cdef Py_ssize_t parent
        # An arrival has the greatest sequence: it rises only past a strictly greater priority.
        while hole > 0:
            parent = (hole - 1) // ARITY
            if entries[parent].priority <= priority:
                break
            entries[hole] = entries[parent]
            hole = parent
        entries[hole].priority = priority
        entries[hole].sequence = self._sequence
        entries[hole].place = place
        self._sequence += 1
        self._size += 1

    cdef void _rise(self, Entry entry) noexcept:
        # As _sift_up, for an entry that may be older than those it passes.
        cdef Entry *entries = self._entries
        cdef Py_ssize_t hole = self._size
        cdef Py_ssize_t parent
        while hole > 0:
            parent = (hole - 1) // ARITY
            if not _before(&entry, &entries[parent]):
                break
            entries[hole] = entries[parent]
            hole = parent
        entries[hole] = entry
        self._size += 1

    cdef object _take(self):
        # The caller has made sure that there is one.
        cdef Entry *entries = self._entries
        cdef Py_ssize_t place = entries[0].place
        cdef Py_ssize_t size = self._size - 1
        cdef Py_ssize_t hole = 0
        cdef Py_ssize_t child, best, end
        cdef Entry last = entries[size]
        obj = orc_remove(self._objects, place)
        self._size = size
        while True:
            child = hole * ARITY + 1
            if child >= size:
                break
            best = child
            end = min(child + ARITY, size)
            child += 1
            while child < end:
                if _before(&entries[child], &entries[best]):
                    best = child
                child += 1
            if not _before(&entries[best], &last):
                break
            entries[hole] = entries[best]
            hole = best
        entries[hole] = last
        entries[size].place = place
        return obj
