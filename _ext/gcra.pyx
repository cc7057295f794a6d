# cython: freethreading_compatible=True
# Owner: orchestra/flow_control.py (RedisRateLimiter). Oracle: tests/reference/gcra.py.
"""The Generic Cell Rate Algorithm in whole microseconds, and what is known of limiters that live in Redis.

Owns arithmetic and a bounded table; refuses to read a clock, to decide what a refusal means and to talk to Redis.

The rule (ITU-T I.371, in the virtual scheduling form): with ``T`` the emission interval, ``burst`` the tolerance and
``tat`` the theoretical arrival time of the next conforming cell,
``tat = min(max(tat, now), now + burst)``; a cell of ``cost`` conforms iff ``tat + cost*T - burst <= now``; then ``tat += cost*T``.
The upper clamp never changes a decision (a debt above the tolerance refuses every cell either way); it keeps what is
stored and the wait that is told finite after a clock ran backwards or a tolerance shrank. Whole numbers below 2**53 give
the same results in Lua.

Concurrency: any thread may call anything; every method is atomic. Under a GIL it is one C call that keeps it; keys are
exact strings, so no lookup runs Python code. Without a GIL a method holds the table's mutex from its lookup to its last
use of the cell; the arguments are converted before. ``len()`` reads one word without it.
"""

cimport cython
from cpython.dict cimport PyDict_GetItemWithError
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_AsSsize_t, PyLong_Check
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.ref cimport PyObject
from cpython.unicode cimport PyUnicode_CheckExact
from libc.stdint cimport int64_t, uint64_t

include "threads.pxi"

cdef int64_t _LIMIT = <int64_t> 1 << 62
LIMIT = _LIMIT
NEVER = _LIMIT

cdef enum:
    NOWHERE = -1
    FIRST_ROOM = 64
    ROUNDING = 2  # µs: both clocks are cut to whole ones, so either may have advanced by one more than it shows


cdef struct Cell:
    int64_t tat     # µs of the local clock: a lower bound of the limiter's TAT
    int64_t seen    # µs of the local clock: when the question was sent whose answer this is
    Py_ssize_t older, newer  # neighbours in the order of observation
    PyObject *key   # borrowed: the index owns it for as long as the cell is in use


cdef inline int64_t _need(int64_t cost, int64_t emission) noexcept nogil:
    # cost * emission, saturating above every burst. The first test spares the common case the division.
    if (cost | emission) < <int64_t> 1 << 31 or cost <= _LIMIT // emission:
        return cost * emission
    return _LIMIT + 1


cdef inline int64_t _debt(int64_t tat, int64_t now) noexcept nogil:
    # max(tat - now, 0), saturating at LIMIT; the difference of two values within the limits fits an unsigned word.
    cdef uint64_t difference
    if tat <= now:
        return 0
    difference = <uint64_t> tat - <uint64_t> now
    return _LIMIT if difference > <uint64_t> _LIMIT else <int64_t> difference


cdef int64_t _whole(str name, value, int64_t low) except? -1:
    # `value` as a machine word in [low, LIMIT]; floats are refused rather than cut.
    cdef int overflow = 0
    cdef long long number
    if not PyLong_Check(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow or not low <= number <= _LIMIT:
        raise ValueError(f"{name} must be from {_BOUNDS.get(low, low)} to 2**62, got {value}")
    return number


cdef dict _BOUNDS = {-_LIMIT: "-2**62"}


def check(tat_us, now_us, cost, emission_us, burst_us):
    cdef int64_t tat = _whole("tat_us", tat_us, -_LIMIT)
    cdef int64_t now = _whole("now_us", now_us, -_LIMIT)
    cdef int64_t emission = _whole("emission_us", emission_us, 1)
    cdef int64_t burst = _whole("burst_us", burst_us, 0)
    cdef int64_t need = _need(_whole("cost", cost, 1), emission)
    cdef int64_t debt = min(_debt(tat, now), burst)
    if now > _LIMIT - burst:
        raise ValueError(f"now_us + burst_us must be at most 2**62, got {now_us} + {burst_us}")
    if need <= burst - debt:
        debt += need
        return True, now + debt, 0, (burst - debt) // emission
    return False, now + debt, NEVER if need > burst else debt - (burst - need), (burst - debt) // emission


@cython.final
cdef class GcraTable:
    # Invariant: _index maps each key to its place in _cells; _oldest.._newest links exactly those places;
    # _free links the places below _room that are not in use, by `newer`.
    cdef readonly Py_ssize_t capacity
    cdef readonly int64_t lead_us
    cdef readonly int64_t max_age_us
    cdef readonly int64_t drift_ppm
    cdef dict _index
    cdef Cell *_cells
    cdef Py_ssize_t _room
    cdef Py_ssize_t _oldest, _newest, _free
    cdef orc_mutex _lock

    def __cinit__(
        self,
        Py_ssize_t capacity=4096,
        *,
        int64_t lead_us=0,
        int64_t max_age_us=60_000_000,
        int64_t drift_ppm=1000,
    ):
        if not 1 <= capacity <= 1 << 24:
            raise ValueError(f"capacity must be from 1 to 2**24 keys, got {capacity}")
        if not 0 <= lead_us <= 60_000_000:
            raise ValueError(f"lead_us must be from 0 to 60_000_000 microseconds, got {lead_us}")
        if not 1 <= max_age_us <= 86_400_000_000:
            raise ValueError(f"max_age_us must be from 1 to 86_400_000_000 microseconds, got {max_age_us}")
        if not 0 <= drift_ppm <= 1_000_000:
            raise ValueError(f"drift_ppm must be from 0 to 1_000_000, got {drift_ppm}")
        self.capacity = capacity
        self.lead_us = lead_us
        self.max_age_us = max_age_us
        self.drift_ppm = drift_ppm
        self._index = {}
        self._oldest = self._newest = self._free = NOWHERE

    def __dealloc__(self):
        PyMem_Free(self._cells)

    def __len__(self):
        return len(self._index)

    def __contains__(self, key):
        cdef bint found
        if not PyUnicode_CheckExact(key):
            return False
        orc_lock(&self._lock)
        try:
            found = self._find(key) != NOWHERE
        finally:
            orc_unlock(&self._lock)
        return found

    def observe(self, key, tat_us, redis_now_us, local_now_us):
        cdef int64_t debt = _debt(
            _whole("tat_us", tat_us, -_LIMIT), _whole("redis_now_us", redis_now_us, -_LIMIT)
        )
        cdef int64_t now = _whole("local_now_us", local_now_us, -_LIMIT)
        _require_key(key)
        orc_lock(&self._lock)
        try:
            self._observe(key, now, debt)
        finally:
            orc_unlock(&self._lock)

    def refused_for(self, key, cost, local_now_us, emission_us, burst_us):
        cdef int64_t now = _whole("local_now_us", local_now_us, -_LIMIT)
        cdef int64_t burst = _whole("burst_us", burst_us, 0)
        cdef int64_t need = _need(_whole("cost", cost, 1), _whole("emission_us", emission_us, 1))
        cdef int64_t age, debt  # microseconds
        cdef int64_t tat, seen
        cdef Py_ssize_t place
        _require_key(key)
        if need > burst:
            return NEVER
        orc_lock(&self._lock)
        try:
            place = self._find(key)
            if place != NOWHERE:
                tat = self._cells[place].tat
                seen = self._cells[place].seen
        finally:
            orc_unlock(&self._lock)
        if place == NOWHERE:
            return 0
        age = _debt(now, seen)
        if age > self.max_age_us:
            return 0
        # What is left of the debt when the clock of Redis stands at the latest that it can stand at.
        age = self.lead_us + age * self.drift_ppm // 1_000_000 + ROUNDING
        debt = _debt(tat, _advance(max(now, seen), age))
        debt = min(debt, burst)
        return 0 if need <= burst - debt else debt - (burst - need)

    def known(self, key):
        cdef int64_t tat, seen
        cdef Py_ssize_t place
        _require_key(key)
        orc_lock(&self._lock)
        try:
            place = self._find(key)
            if place != NOWHERE:
                tat = self._cells[place].tat
                seen = self._cells[place].seen
        finally:
            orc_unlock(&self._lock)
        return None if place == NOWHERE else (tat, seen)

    def forget(self, key):
        cdef Py_ssize_t place
        _require_key(key)
        orc_lock(&self._lock)
        try:
            place = self._find(key)
            if place != NOWHERE:
                self._release(place)
        finally:
            orc_unlock(&self._lock)
        return place != NOWHERE

    def clear(self):
        orc_lock(&self._lock)
        try:
            self._index.clear()
            PyMem_Free(self._cells)
            self._cells = NULL
            self._room = 0
            self._oldest = self._newest = self._free = NOWHERE
        finally:
            orc_unlock(&self._lock)

    def __sizeof__(self):
        return object.__sizeof__(self) + self._room * sizeof(Cell)

    cdef inline Py_ssize_t _find(self, key) except -2:
        cdef PyObject *place = PyDict_GetItemWithError(self._index, key)
        return NOWHERE if place is NULL else PyLong_AsSsize_t(<object> place)

    cdef int _observe(self, key, int64_t now, int64_t debt) except -1:
        cdef Py_ssize_t place = self._find(key)
        if place == NOWHERE:
            place = self._claim(key)
        elif now < self._cells[place].seen:  # an answer that was overtaken by a newer one
            return 0
        else:
            self._unlink(place)
        self._link_newest(place)
        self._cells[place].seen = now
        self._cells[place].tat = _advance(now, debt)
        return 0

    cdef Py_ssize_t _claim(self, key) except -2:
        # A place for a new key, the oldest observation's if the table is full. Nothing changes if memory runs out.
        cdef Py_ssize_t place
        if self._free == NOWHERE and self._room < self.capacity:
            self._grow()
        if self._free == NOWHERE:
            self._release(self._oldest)
        place = self._free
        self._index[key] = place
        self._free = self._cells[place].newer
        self._cells[place].key = <PyObject *> key
        return place

    cdef int _grow(self) except -1:
        cdef Py_ssize_t room = min(self.capacity, max(<Py_ssize_t> FIRST_ROOM, self._room * 2))
        cdef Py_ssize_t place
        cdef Cell *cells = <Cell *> PyMem_Realloc(self._cells, room * sizeof(Cell))
        if cells is NULL:
            raise MemoryError
        self._cells = cells
        for place in range(self._room, room):
            cells[place].newer = self._free
            self._free = place
        self._room = room
        return 0

    cdef int _release(self, Py_ssize_t place) except -1:
        del self._index[<object> self._cells[place].key]
        self._unlink(place)
        self._cells[place].newer = self._free
        self._free = place
        return 0

    cdef void _unlink(self, Py_ssize_t place) noexcept:
        cdef Py_ssize_t older = self._cells[place].older
        cdef Py_ssize_t newer = self._cells[place].newer
        if older == NOWHERE:
            self._oldest = newer
        else:
            self._cells[older].newer = newer
        if newer == NOWHERE:
            self._newest = older
        else:
            self._cells[newer].older = older

    cdef void _link_newest(self, Py_ssize_t place) noexcept:
        self._cells[place].older = self._newest
        self._cells[place].newer = NOWHERE
        if self._newest == NOWHERE:
            self._oldest = place
        else:
            self._cells[self._newest].newer = place
        self._newest = place


cdef inline int _require_key(key) except -1:
    if not PyUnicode_CheckExact(key):
        raise TypeError(f"key must be a str, got {type(key).__name__}")
    return 0


cdef inline int64_t _advance(int64_t time, int64_t duration) noexcept nogil:
    return _LIMIT if time > 0 and duration > _LIMIT - time else time + duration
