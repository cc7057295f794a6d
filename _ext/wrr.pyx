# cython: freethreading_compatible=True
# Owner: orchestra/load_balancer.py (WeightedRoundRobinStrategy). Oracle: tests/reference/wrr.py.
"""Smooth weighted round robin over hashable ids.

Owns weights and the state of the rotation; refuses to know what an id stands for and whether it is well.

The algorithm is nginx's (ngx_http_upstream_round_robin.c, since 1.3.1): each candidate's current value grows by its
weight, the greatest is chosen (the oldest of equals) and pays the sum of the candidates' weights. A current value
divided by that sum is the id's lag: how many turns it is owed. Ids that are not available neither gain nor pay.

When weights change, every lag keeps its size in turns (current values are scaled with the sum of weights), is centred on
zero and bounded to one turn; a newcomer starts at zero. So neither a change nor a newcomer brings a burst.

Lags alone would make the first sum-of-weights selections after a change inexact. So selections are kept in books: a book
opens when the candidates or a weight have changed, and when the one before is full; in it nobody is chosen more often than
its weight says, so when it is full it is exact, and its candidates owe each other nothing: their lags become zero. Without
changes this never differs from nginx's algorithm, which comes back to zero by itself.

Current values are kept in 2**-16 parts of a weight, so that scaling back and forth does not round a lag away.

Concurrency: any thread may call anything; every method is atomic but for the hashing and comparing of ids, which may run
Python code: all lookups come first, nothing runs between a lookup and its use, and a selection whose lookups let the
ring change starts again. Under a GIL a method is one C call that keeps it. Without one it holds the ring's critical
section, which CPython gives up while such code waits; it may also be given up between the end of a lookup and its
answer, so a handle counts only if it still has a place and, where it is written to, if no member came or went meanwhile.
"""

cimport cython
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memmove

include "lists.pxi"

cdef extern from *:
    """
    /* The number under `key`; -1 if there is none, -2 after an error. */
    static Py_ssize_t orc_find(PyObject *index, PyObject *key) {
        PyObject *found;
        Py_ssize_t number;
    #ifdef Py_GIL_DISABLED
        if (PyDict_GetItemRef(index, key, &found) < 0) return -2;
        if (found == NULL) return -1;
        number = PyLong_AsSsize_t(found);
        Py_DECREF(found);
    #else
        found = PyDict_GetItemWithError(index, key);
        if (found == NULL) return PyErr_Occurred() ? -2 : -1;
        number = PyLong_AsSsize_t(found);
    #endif
        return number;
    }
    /* The number under `key`, which is `mine` if there was none; -2 after an error. */
    static Py_ssize_t orc_find_or_add(PyObject *index, PyObject *key, PyObject *mine) {
        PyObject *found;
        Py_ssize_t number;
    #ifdef Py_GIL_DISABLED
        if (PyDict_SetDefaultRef(index, key, mine, &found) < 0) return -2;
        number = PyLong_AsSsize_t(found);
        Py_DECREF(found);
    #else
        found = PyDict_SetDefault(index, key, mine);
        if (found == NULL) return -2;
        number = PyLong_AsSsize_t(found);
    #endif
        return number;
    }
    /* What is in the first `count` places of one list goes to the same places of the other, and back. */
    static void orc_swap(PyObject *one, PyObject *other, Py_ssize_t count) {
        for (Py_ssize_t i = 0; i < count; i++)
            PyList_SET_ITEM(one, i, orc_exchange(other, i, PyList_GET_ITEM(one, i)));
    }
    """
    Py_ssize_t orc_find(object, object) except -2
    Py_ssize_t orc_find_or_add(object, object, object) except -2
    void orc_swap(object, object, Py_ssize_t) noexcept

MAX_WEIGHT = 10_000
MAX_IDS = 65_536

cdef enum:
    UNIT = 1 << 16
    TOP_WEIGHT = 10_000
    TOP_IDS = 65_536
    FIRST_ROOM = 16
    ON_STACK = 64
    ATTEMPTS = 100
    NOWHERE = -1  # the place of a handle that is free, or whose id is being admitted
    REVOKED = -2  # of one whose id was removed meanwhile


cdef struct Member:
    int64_t weight   # UNIT parts, > 0
    int64_t current  # UNIT parts; the sum over all members stays near 0
    int64_t left     # turns that it may still have in the present book, UNIT parts
    uint64_t mark    # number of the selection that has counted this member
    Py_ssize_t handle


@cython.final
@cython.no_gc_clear  # the dict and the list break any cycle; cleared attributes would let a late call crash
cdef class SmoothRing:
    # A handle names a member for as long as it stays; its place moves when an older member leaves.
    # Invariants: _members[:_size] is in order of arrival; _places[m.handle] is m's place; _ids[handle] is its id;
    # _index maps that id to the handle; _free[:_room - _size - reserved] holds the other handles, whose place is negative.
    cdef dict _index
    cdef list _ids
    cdef Member *_members
    cdef Py_ssize_t *_places
    cdef Py_ssize_t *_free
    cdef Py_ssize_t _size, _room, _free_count
    cdef int64_t _total        # sum of weights, UNIT parts
    cdef bint _moved           # False while every current value is 0
    cdef uint64_t _version     # grows when a member comes or goes
    cdef uint64_t _selections
    cdef bint _whole           # whether the present book is that of select() without a list
    cdef Py_ssize_t _candidates  # else: how many it has; they are those whose mark is _selections
    cdef int64_t _pages          # selections until the book is full, UNIT parts; 0: none is open
    cdef readonly int default_weight

    def __cinit__(self, *, int default_weight=0):
        if not 0 <= default_weight <= TOP_WEIGHT:
            raise ValueError(f"default_weight must be from 0 to {TOP_WEIGHT}, got {default_weight}")
        self.default_weight = default_weight
        self._index = {}
        self._ids = []

    def __dealloc__(self):
        PyMem_Free(self._members)
        PyMem_Free(self._places)
        PyMem_Free(self._free)

    def __len__(self):
        return self._size

    def __contains__(self, ident):
        with cython.critical_section(self):
            return self._handle(ident) >= 0

    def ids(self):
        cdef Py_ssize_t i
        cdef list out
        with cython.critical_section(self):
            out = [None] * self._size
            self._check()
            for i in range(min(len(out), self._size)):
                orc_store(out, i, <object> PyList_GET_ITEM(self._ids, self._members[i].handle))
        return out

    def weight(self, ident):
        cdef Py_ssize_t handle
        with cython.critical_section(self):
            handle = self._sure_handle(ident)
            return 0 if handle < 0 else self._members[self._places[handle]].weight // UNIT

    def set_weight(self, ident, weight):
        cdef Py_ssize_t handle
        if type(weight) is not int or not 0 <= weight <= TOP_WEIGHT:
            raise ValueError(f"weight must be a whole number from 0 to {TOP_WEIGHT}, got {weight!r}")
        if weight == 0:
            self.remove(ident)
            return
        with cython.critical_section(self):
            handle = self._sure_handle(ident)
            if handle < 0:
                handle = self._admit(ident, <int64_t> weight * UNIT)
            if handle >= 0:  # it was a member before, or became one while its hash was computed
                self._reweigh(&self._members[self._places[handle]], <int64_t> weight * UNIT)

    def remove(self, ident):
        cdef Py_ssize_t place
        with cython.critical_section(self):
            handle = self._index.pop(ident, None)
            if handle is None:
                return False
            self._check()
            place = self._places[<Py_ssize_t> handle]
            if place < 0:
                self._places[<Py_ssize_t> handle] = REVOKED  # whoever admits it gives the handle back
                return True
            gone = self._expel(<Py_ssize_t> handle)
        return True  # only now may the id's __del__ run

    def select(self, available=None):
        cdef Py_ssize_t best
        cdef tuple ids
        if available is None:
            with cython.critical_section(self):
                self._check()
                best = self._turn_of_all()
                return None if best < 0 else <object> PyList_GET_ITEM(self._ids, self._members[best].handle)
        ids = tuple(available)
        with cython.critical_section(self):
            best = self._choose(ids)
        return None if best < 0 else ids[best]

    def select_index(self, available):
        cdef tuple ids = tuple(available)
        with cython.critical_section(self):
            return self._choose(ids)

    cdef inline Py_ssize_t _handle(self, ident) except -2:
        cdef Py_ssize_t handle = orc_find(self._index, ident)
        return NOWHERE if handle < 0 or self._places[handle] < 0 else handle

    cdef Py_ssize_t _sure_handle(self, ident) except -2:
        cdef Py_ssize_t handle
        cdef uint64_t version
        for _ in range(ATTEMPTS):
            version = self._version
            handle = self._handle(ident)
            if version == self._version:
                return handle
        raise RuntimeError("SmoothRing changes whenever an id is hashed or compared")

    cdef Py_ssize_t _turn_of_all(self) noexcept:
        cdef Member *members = self._members
        cdef Py_ssize_t i, best = -1
        cdef int64_t top = 0
        if self._size == 0:
            return -1
        for i in range(self._size):
            members[i].current += members[i].weight
            if members[i].left > 0 and (best < 0 or members[i].current > top):
                best = i
                top = members[i].current
        if not self._whole or self._pages == 0:
            self._whole = True
            self._open_book(NULL, self._size, self._total)
            best = self._greatest(NULL, self._size)
        self._pay(NULL, self._size, best, self._total)
        return best

    # In the next four, `handles` names `count` members, -1 for none; or is NULL, for all members by their place.

    cdef inline Member *_member(self, const Py_ssize_t *handles, Py_ssize_t i) noexcept:
        if handles is NULL:
            return &self._members[i]
        return NULL if handles[i] < 0 else &self._members[self._places[handles[i]]]

    cdef Py_ssize_t _greatest(self, const Py_ssize_t *handles, Py_ssize_t count) noexcept:
        # The index of the greatest current value that the book still lets be chosen; of equals, the oldest.
        cdef Py_ssize_t i, best = -1
        cdef Member *member
        cdef Member *top = NULL
        for i in range(count):
            member = self._member(handles, i)
            if member is NULL or member.left <= 0:
                continue
            if top is NULL or member.current > top.current or (member.current == top.current and member < top):
                best, top = i, member
        return best

    cdef void _pay(self, const Py_ssize_t *handles, Py_ssize_t count, Py_ssize_t best, int64_t total) noexcept:
        cdef Py_ssize_t i
        cdef Member *member = self._member(handles, best)
        member.current -= total
        member.left -= UNIT
        self._moved = True
        self._pages -= UNIT
        if self._pages == 0:  # exact: nobody is owed anything
            for i in range(count):
                member = self._member(handles, i)
                if member is not NULL:
                    member.current = 0

    cdef void _open_book(self, const Py_ssize_t *handles, Py_ssize_t count, int64_t total) noexcept:
        cdef Py_ssize_t i
        cdef Member *member
        self._pages = total
        for i in range(count):
            member = self._member(handles, i)
            if member is not NULL:
                member.left = member.weight

    cdef Py_ssize_t _choose(self, tuple ids) except -2:
        # The index of the chosen id in `ids`, or -1.
        cdef Py_ssize_t stack[ON_STACK]
        cdef Py_ssize_t *handles = stack
        cdef Py_ssize_t count = len(ids)
        if count > ON_STACK:
            handles = <Py_ssize_t *> PyMem_Malloc(count * sizeof(Py_ssize_t))
            if handles is NULL:
                raise MemoryError
        try:
            self._look_up(ids, handles)
            return self._turn_of_some(handles, count)
        finally:
            if handles is not stack:
                PyMem_Free(handles)

    cdef int _look_up(self, tuple ids, Py_ssize_t *handles) except -1:
        cdef Py_ssize_t i
        cdef uint64_t version
        for _ in range(ATTEMPTS):
            version = self._version
            for i in range(len(ids)):
                handles[i] = self._handle(ids[i])
                if handles[i] < 0 and self.default_weight:
                    self._admit(ids[i], <int64_t> self.default_weight * UNIT)
            if version == self._version:
                return 0
        raise RuntimeError("SmoothRing changes whenever the ids of a selection are hashed or compared")

    cdef Py_ssize_t _turn_of_some(self, const Py_ssize_t *handles, Py_ssize_t count) noexcept:
        cdef Py_ssize_t i, best, distinct = 0
        cdef uint64_t before = self._selections
        cdef int64_t total = 0
        cdef bint same = self._pages > 0 and not self._whole
        cdef Member *member
        self._selections += 1
        for i in range(count):
            member = self._member(handles, i)
            if member is NULL or member.mark == self._selections:  # unknown, or named twice
                continue
            same = same and member.mark == before
            member.mark = self._selections
            member.current += member.weight
            total += member.weight
            distinct += 1
        if distinct == 0:
            self._selections = before
            return -1
        if not same or distinct != self._candidates:
            self._whole = False
            self._candidates = distinct
            self._open_book(handles, count, total)
        best = self._greatest(handles, count)
        self._pay(handles, count, best, total)
        return best

    cdef Py_ssize_t _admit(self, ident, int64_t weight) except -2:
        # -1 when the id was admitted with this weight, its handle when it turned out to be a member.
        cdef Py_ssize_t handle, found
        cdef uint64_t version = self._version
        if self._free_count == 0:
            self._grow()
        self._check()
        self._free_count -= 1
        handle = self._free[self._free_count]  # reserved: code that runs inside the lookup takes another one
        self._places[handle] = NOWHERE
        try:
            found = orc_find_or_add(self._index, ident, handle)
        except:  # noqa: E722 - whatever __hash__ or __eq__ raised
            self._give_back(handle)
            raise
        if found != handle:
            self._give_back(handle)
            return self._sure_handle(ident) if version != self._version or self._places[found] < 0 else found
        if self._places[handle] == REVOKED:
            self._give_back(handle)
            return NOWHERE
        orc_store(self._ids, handle, ident)
        self._rebase(self._total + weight)
        self._places[handle] = self._size
        self._members[self._size] = Member(weight=weight, current=0, left=0, mark=0, handle=handle)
        self._size += 1
        self._version += 1
        return NOWHERE

    cdef void _give_back(self, Py_ssize_t handle) noexcept:
        self._places[handle] = NOWHERE
        self._free[self._free_count] = handle
        self._free_count += 1

    cdef int _grow(self) except -1:
        cdef Py_ssize_t room = 0, handle
        cdef list fresh
        while room <= self._room:  # a collection during the allocation may run code that grows the ring
            if self._room >= TOP_IDS:
                raise ValueError(f"a SmoothRing holds at most {TOP_IDS} ids")
            room = self._room + max(<Py_ssize_t> FIRST_ROOM, self._room)
            fresh = [None] * room
            if self._free_count:  # or removes an id
                return 0
        self._members = <Member *> _resized(self._members, room * sizeof(Member))
        self._places = <Py_ssize_t *> _resized(self._places, room * sizeof(Py_ssize_t))
        self._free = <Py_ssize_t *> _resized(self._free, room * sizeof(Py_ssize_t))
        self._check()
        orc_swap(fresh, self._ids, self._room)
        self._ids = fresh
        for handle in range(room - 1, self._room - 1, -1):
            self._give_back(handle)
        self._room = room
        return 0

    cdef inline int _check(self) except -1:
        # Only code that reached the list through gc.get_referents, or runs while a dead cycle is torn down, fails this.
        if PyList_GET_SIZE(self._ids) != self._room:
            raise RuntimeError("SmoothRing is no longer usable: its ids were taken away by the garbage collector")
        return 0

    cdef object _expel(self, Py_ssize_t handle):
        cdef Py_ssize_t place = self._places[handle]
        cdef Py_ssize_t i
        cdef int64_t weight = self._members[place].weight
        ident = orc_remove(self._ids, handle)
        self._size -= 1
        memmove(&self._members[place], &self._members[place + 1], (self._size - place) * sizeof(Member))
        for i in range(place, self._size):
            self._places[self._members[i].handle] = i
        self._give_back(handle)
        self._rebase(self._total - weight)
        self._version += 1
        return ident

    cdef void _reweigh(self, Member *member, int64_t weight) noexcept:
        if member.weight != weight:
            self._rebase(self._total - member.weight + weight)
            member.weight = weight

    cdef void _rebase(self, int64_t total) noexcept:
        # Scale, centre, bound: see the module's docstring.
        cdef Py_ssize_t i
        cdef int64_t mean = 0
        cdef double ratio
        self._pages = 0
        if self._moved and self._size:
            ratio = <double> total / <double> self._total
            for i in range(self._size):
                self._members[i].current = <int64_t> (<double> self._members[i].current * ratio)
                mean += self._members[i].current
            mean = mean // self._size  # towards zero, as C divides
            for i in range(self._size):
                self._members[i].current = max(-total, min(total, self._members[i].current - mean))
        self._total = total


cdef void *_resized(void *block, size_t size) except NULL:
    # The block, longer. When there is no memory the old one stays as it is and where it is.
    block = PyMem_Realloc(block, size)
    if block is NULL:
        raise MemoryError
    return block
