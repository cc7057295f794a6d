# cython: freethreading_compatible=True
# Owner: orchestra/_delivery.py. Oracle: tests/reference/wire.py.
"""Entries of a stream as deliveries, and deliveries as arguments of a command.

Owns the plain facts of a delivery and the bytes that name many of them; refuses to know what a frame means, which
commands there are and what Redis answered to them.

An ``Arrival`` is invisible to the garbage collector: it holds bytes, str, numbers and a header made of the same, so that
no cycle can run through it, and tens of thousands of them must not make each collection longer.
Concurrency: an ``Arrival`` belongs to the event loop that read it, and its lease thread reads it: what both need is
written once, before anybody else knows of it. Every function is one C call that keeps the GIL; code of others can run inside
it only where an allocation starts a garbage collection. Without a GIL a second thread sees each number as it was at some
moment; ``frame`` and the header, which may be replaced, are taken and put under the arrival's own lock, a reply is read
under the locks of its lists, and a list of entries or deliveries that is gone through is a copy of the caller's.
Source: the Redis serialization protocol, https://redis.io/docs/latest/develop/reference/protocol-spec/.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy

cdef extern from *:
    """
    /* The list, or without a GIL a copy, which no other thread can change between two looks at it. */
    static CYTHON_INLINE PyObject *orc_snapshot(PyObject *list) {
    #ifdef Py_GIL_DISABLED
        return PyList_GetSlice(list, 0, PyList_GET_SIZE(list));
    #else
        return Py_NewRef(list);
    #endif
    }
    static PyObject *orc_untracked(const char *name, PyObject *base) {
        PyType_Slot slots[] = {{0, NULL}};
        PyType_Spec spec = {name, (int)((PyTypeObject *)base)->tp_basicsize, 0, Py_TPFLAGS_DEFAULT, slots};
        return PyType_FromSpecWithBases(&spec, base);
    }
    """
    object orc_untracked(const char*, object base)
    list orc_snapshot(list)

cdef enum:
    LANES = 4
    STREAMS = 8
    DIGITS = 20  # of a 64-bit number


@cython.no_gc
@cython.auto_pickle(False)
cdef class Arrival:
    """An entry of a stream that was handed to a consumer. ``stream`` 0 to 7, ``rank``: its place among all read."""

    cdef readonly int stream
    cdef public long long deliveries
    cdef readonly long long rank
    cdef public long long retries
    cdef public long long before
    cdef public long long generation
    cdef public bint lost
    cdef public bint abandoned
    cdef public bint foreign
    cdef readonly bytes entry
    cdef readonly str consumer
    cdef bytes _frame
    cdef object _known

    def __init__(self, int stream, bytes entry not None, fields, str consumer not None, long long deliveries=1,
                 long long rank=0):
        if self.entry is not None:
            raise TypeError("an arrival is initialised once")
        self.stream = stream
        self.entry = entry
        self.consumer = consumer
        self.deliveries = deliveries
        self.rank = rank
        self.retries = 0
        self.before = self.generation = 0
        self.lost = self.abandoned = self.foreign = False
        self._frame = frame_of(fields)
        if self._frame is None:
            self._read_fields(fields)

    @property
    def lane(self):
        return self.stream % LANES

    @property
    def attempt(self):
        return 1 if self.retries == 0 else <object>self.retries + 1

    @property
    def fence(self):
        if self.generation == 0 and self.before == 0:
            return self.deliveries
        return <object>self.generation << 40 | (<object>self.before + self.deliveries)

    @property
    def frame(self):
        with cython.critical_section(self):
            return self._frame

    @frame.setter
    def frame(self, bytes frame not None):
        with cython.critical_section(self):
            self._frame = frame

    @property
    def header(self):
        with cython.critical_section(self):
            header = self._known
        if header is None:
            header = self._decoded()
            with cython.critical_section(self):
                self._known = header
        return header

    @property
    def _header(self):
        with cython.critical_section(self):
            return self._known

    @_header.setter
    def _header(self, header):
        with cython.critical_section(self):
            self._known = header


def untracked(type kind not None):
    """Class decorator: ``kind``, whose only base is Arrival, as a final class that the garbage collector does not track.

    A class statement makes classes that it tracks, whatever their base. Raises: TypeError for another base, or slots.
    """
    if kind.__bases__ != (Arrival,) or kind.__dict__.get("__slots__") != ():
        raise TypeError(f"{kind.__name__} must have Arrival as its only base, and no slots")
    made = orc_untracked(f"{kind.__module__}.{kind.__qualname__}".encode(), Arrival)
    for name, value in kind.__dict__.items():
        if name not in ("__dict__", "__weakref__", "__slots__", "__module__", "__qualname__"):
            setattr(made, name, value)
    return made


cdef inline bytes frame_of(object fields):
    """The frame of an entry that has no other field; else None."""
    name = frame = None
    if type(fields) is list:
        with cython.critical_section(fields):
            if len(<list>fields) == 2:
                name, frame = (<list>fields)[0], (<list>fields)[1]
    elif type(fields) is tuple and len(<tuple>fields) == 2:
        name, frame = (<tuple>fields)[0], (<tuple>fields)[1]
    return <bytes>frame if is_frame(name) and type(frame) is bytes else None


cdef inline bint is_frame(object name):
    return type(name) is bytes and PyBytes_GET_SIZE(name) == 1 and PyBytes_AS_STRING(name)[0] == c"t"


def arrivals(type kind not None, int stream, list entries not None, str consumer not None, long long rank):
    """Deliveries, of the subclass ``kind`` of Arrival, of the entries ``[id, [field, value, ...]]`` of one stream.

    They are handed out for the first time; their ranks count from ``rank``. O(entries).
    Raises: TypeError, ValueError if the shape is another; what reading unusual fields raises.
    """
    cdef Arrival one
    cdef list found = []
    if not issubclass(kind, Arrival):
        raise TypeError(f"kind must be a subclass of Arrival, got {kind.__name__}")
    if not 0 <= stream < STREAMS:
        raise ValueError(f"stream must be 0 to {STREAMS - 1}, got {stream}")
    for item in orc_snapshot(entries):
        name = fields = None
        if type(item) is list:
            with cython.critical_section(item):
                if len(<list>item) == 2:
                    name, fields = (<list>item)[0], (<list>item)[1]
        if type(name) is not bytes:
            raise TypeError("an entry must be a list of its id and its fields")
        one = <Arrival>Arrival.__new__(kind)
        one.stream = stream
        one.entry = <bytes>name
        one.consumer = consumer
        one.deliveries = 1
        one.rank = rank
        one._frame = frame_of(fields)
        if one._frame is None:
            one._read_fields(fields)
        rank += 1
        found.append(one)
    return found


def hold(held not None, list found not None):
    """Enter each delivery of ``found`` into the dict that ``held`` has for its stream, by its entry id. O(found)."""
    cdef Arrival one
    cdef dict here = None
    cdef int stream = -1
    for item in orc_snapshot(found):
        one = <Arrival?>item
        if one.stream != stream:
            stream = one.stream
            here = held[stream]
        here[one.entry] = one


def sift(batch not None, object done):
    """Sort the verdicts of a batch: ``(groups, rest)``. O(batch), and a sort where something came out of order.

    ``groups``: ``(stream, consumer)`` → ``(first, again)``, the deliveries whose verdict is ``done``: those handed out
    once, by rank, and the others. ``rest``: the pairs with another verdict.
    """
    cdef Arrival one
    cdef dict groups = {}
    cdef list rest = [], first = None, again = None
    cdef int stream = -1
    cdef str consumer = None
    cdef long long last = -1
    cdef set unsorted = set()
    for pair in batch:
        delivery, verdict = pair
        if verdict is not done:
            rest.append(pair)
            continue
        one = <Arrival?>delivery
        if one.stream != stream or one.consumer is not consumer:
            stream, consumer = one.stream, one.consumer
            key = (stream, consumer)
            if key not in groups:
                groups[key] = ([], [])
            first, again = groups[key]
            last = (<Arrival>first[len(first) - 1]).rank if first else -1
        if one.deliveries != 1:
            again.append(one)
            continue
        if one.rank < last:
            unsorted.add((stream, consumer))
        last = one.rank
        first.append(one)
    for key in unsorted:
        groups[key][0].sort(key=by_rank)
    return groups, rest


def by_rank(Arrival one not None):
    return one.rank


def with_ids(bytes command not None, list deliveries not None):
    """``command``, a packed array of bulk strings, with the entry ids of ``deliveries`` as further arguments. O(size).

    Raises: ValueError if it is not packed.
    """
    cdef Arrival one
    cdef const char* given = PyBytes_AS_STRING(command)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(command), at = 1, room, n
    cdef long long count = 0
    cdef char* out
    cdef bytes packed
    cdef list named = orc_snapshot(deliveries)
    if size < 4 or given[0] != c"*":
        raise ValueError("a packed command begins with its number of arguments")
    while at < size and c"0" <= given[at] <= c"9" and at < DIGITS - 1:  # so that no count overflows
        count = count * 10 + given[at] - c"0"
        at += 1
    if at == 1 or at + 1 >= size or given[at] != c"\r":
        raise ValueError("a packed command begins with its number of arguments")
    room = DIGITS + size
    for item in named:
        one = <Arrival?>item
        if one.entry is None:
            raise ValueError("a delivery must have an entry id")
        room += PyBytes_GET_SIZE(one.entry) + DIGITS + 5
    packed = PyBytes_FromStringAndSize(NULL, room)
    out = PyBytes_AS_STRING(packed)
    out[0] = c"*"
    n = 1 + put_number(out + 1, count + len(named))
    memcpy(out + n, given + at, size - at)
    n += size - at
    for item in named:
        n += put_bulk(out + n, (<Arrival>item).entry)
    return packed[:n]


cdef inline Py_ssize_t put_bulk(char* out, bytes value):
    cdef Py_ssize_t size = PyBytes_GET_SIZE(value), n
    out[0] = c"$"
    n = 1 + put_number(out + 1, size)
    out[n] = c"\r"
    out[n + 1] = c"\n"
    memcpy(out + n + 2, PyBytes_AS_STRING(value), size)
    n += 2 + size
    out[n] = c"\r"
    out[n + 1] = c"\n"
    return n + 2


cdef inline Py_ssize_t put_number(char* out, long long number):
    """The digits of a number of 0 or more; how many there are."""
    cdef char[DIGITS] digits
    cdef Py_ssize_t n = 0, i
    while True:
        digits[n] = <char>(c"0" + number % 10)
        number //= 10
        n += 1
        if number == 0:
            break
    for i in range(n):
        out[i] = digits[n - 1 - i]
    return n
