# cython: freethreading_compatible=True
# Owner: orchestra/serialization.py. Oracle: tests/reference/codec.py.
"""MessagePack for values, and the frame of a task. Owns bytes and their checks; no clock, no randomness, no numpy.

A frame is two MessagePack values, one after the other, so that any streaming unpacker reads it:

* header: ``[1, id, type, lane, max_retries, timeout, deadline, reply, flags]``, trailing nils cut off;
* body: a map with every other key of the task (``input``, ``metadata``, whatever else), as given.

Depth counts containers around a value: a scalar is at depth 0, and the value of a task's key starts anew at 0.
Concurrency: any thread may call anything. Every function is atomic under the GIL except while a hook runs; hooks may
mutate what is being encoded, which is noticed and refused. Without a GIL other threads may do so at any time: each entry
is then taken out of its container under that container's own lock, so what is encoded is alive, and what was added or
removed meanwhile is refused or left out; the keys of a task are sorted under one lock. (Buffers are read as they are: a
bytearray that another thread fills gives the bytes of several moments.) ``TaskCodec``, ``TaskMaker``, ``Ext`` and
``TaskHeader`` never change. The only state shared between calls are two bounded caches of decoded strings, whose slots
are skipped while another thread is at them, and the counter of an ``IdMaker``, which has a mutex.
Sources: the MessagePack specification (spec.md, 2.0); Hacker's Delight 6-1 for the test of eight bytes at once.
"""

cimport cython
from cpython.object cimport PyObject, PyTypeObject
from libc.math cimport isfinite, NAN
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset


@cython.final
@cython.auto_pickle(False)
cdef class Ext:
    """A MessagePack extension value: ``code`` -128..127, payload = ``head`` followed by the bytes of ``data``.

    ``data`` is any C-contiguous buffer and is copied once, into the result. Only meaningful as the return value of a
    ``default`` hook or inside a value to encode; decoding calls ``ext_hook(code, payload)`` instead of building one.
    """

    cdef readonly int code
    cdef readonly object data
    cdef readonly bytes head

    def __cinit__(self, int code, object data, bytes head=b""):
        if not -128 <= code <= 127:
            raise ValueError(f"Ext.code must be -128 to 127, got {code}")
        if head is None:
            raise TypeError("Ext.head must be bytes, got None")
        self.code = code
        self.data = data
        self.head = head


include "threads.pxi"
include "codec_capi.pxi"
include "codec_pack.pxi"
include "codec_unpack.pxi"
include "codec_task.pxi"
include "codec_header.pxi"
include "codec_errors.pxi"


def packb(object value, object default=None, Py_ssize_t max_bytes=MAX_FRAME, int max_depth=64, str root="value"):
    """``value`` as MessagePack bytes; O(size of the result), no copy of large buffers beyond one.

    Travels: None, bool, int in [-2**63, 2**64), float (NaN and infinities too), str, bytes-like, list, tuple, dict with
    keys of type str, int or bytes, ``Ext``; subclasses travel as their base. ``default(value)`` is called for anything
    else and returns a value that travels, or NotImplemented; ``root`` is how paths in error messages begin.

    Raises: EncodeTypeError, EncodeError, TooLargeError; whatever ``default`` raises.
    """
    cdef Enc e
    cdef char[ROOM] room
    enc_open(&e, room, max_bytes, max_depth, default)
    return enc_close(&e, enc_value(&e, <PyObject*>value, 0), root)


def unpackb(object data, object ext_hook=None, int max_depth=64):
    """The one value in ``data`` (bytes, or a buffer that is copied first); O(len(data)).

    A repeated map key: the last wins. Memory stays linear in ``len(data)``, whatever lengths it claims.
    ``ext_hook(code, payload)`` gets a memoryview over the input. Raises: DecodeError; whatever ``ext_hook`` raises.
    """
    value, end = _unpack(data, ext_hook, max_depth)
    if end != len(data):
        raise DecodeError(f"{len(data) - end} bytes follow the value at byte {end}", end)
    return value


def unpack_first(object data, object ext_hook=None, int max_depth=64):
    """``(value, end)``: the first value in ``data`` and the offset behind it. As ``unpackb``, but more may follow."""
    return _unpack(data, ext_hook, max_depth)


cdef tuple _unpack(object data, object ext_hook, int max_depth):
    cdef Dec d
    cdef PyObject* got
    cdef bytes frame = data if type(data) is bytes else _as_bytes(data)
    dec_open(&d, frame, 0, ext_hook, max_depth)
    got = dec_value(&d, 0)
    if got == NULL:
        dec_raise(&d)
    value = <object>got
    Py_DECREF(got)
    return value, d.p - d.start


cdef bytes _as_bytes(object data):
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise TypeError(f"MessagePack data must be bytes, bytearray or memoryview, got {type(data).__name__}")


cdef class IdMaker


@cython.final
@cython.auto_pickle(False)
cdef class TaskCodec:
    """Frames of tasks, with the hooks of one owner.

    ``new_id()`` gives an id to a task without one; None: a task needs one of its own.
    ``default`` and ``ext_hook`` are as in ``packb`` and ``unpackb``.
    ``record`` is ``tuple`` or a subclass of it, such as a NamedTuple of the five fields that ``encode`` returns; its
    constructor is not called. ``max_depth`` (1..512 containers) bounds each value of a task, both ways.
    """

    cdef readonly object new_id
    cdef readonly object default
    cdef readonly object ext_hook
    cdef readonly type record
    cdef readonly int max_depth

    def __cinit__(self, object new_id, object default=None, object ext_hook=None, type record=tuple, int max_depth=64):
        if not PyType_FastSubclass(<PyTypeObject*>record, Py_TPFLAGS_TUPLE_SUBCLASS):
            raise TypeError(f"record must be tuple or a subclass of it, got {record.__name__}")
        if not 1 <= max_depth <= MAX_DEPTH:
            raise ValueError(f"max_depth must be 1 to {MAX_DEPTH} levels, got {max_depth}")
        self.new_id = new_id
        self.default = default
        self.ext_hook = ext_hook
        self.record = record
        self.max_depth = max_depth

    def encode(self, object task, object task_id=None, Py_ssize_t max_bytes=1 << 20, object reply=None, int flags=0):
        """``record`` of ``(id, lane, frame, own_id, delay)`` for a task dict; O(size of the frame).

        ``own_id``: the id came from the caller, by ``task_id`` or in the task. ``delay`` (seconds) is not stored in
        the frame. ``reply`` names a channel that wants the result; ``flags`` 0..2**31-1 (bit 0: keep the result).

        Raises: EncodeTypeError, EncodeError, TooLargeError (``max_bytes`` bounds the frame); what the hooks raise.
        """
        cdef Fields f
        if not PyDict_Check(<PyObject*>task):
            raise EncodeTypeError(f"a task must be a dict, got {show(task)}")
        f.n = 0
        f.body = f.few
        try:
            gather(<PyObject*>task, &f)
            return self.frame(&f, task, task_id, max_bytes, reply, flags, None, 0.0)
        finally:
            fields_free(&f)

    def encode_many(self, list tasks not None, IdMaker ids not None, double now, Py_ssize_t max_bytes=1 << 20,
                    object reply=None, int flags=0):
        """A list of what ``encode`` gives for each of ``tasks``; those without an id get one of ``ids``, made at ``now``.

        As many calls of Python as tasks are saved. O(size of the frames). Raises: as ``encode``, for the first task that
        cannot be encoded; ValueError for a ``now`` that ``ids`` refuses.
        """
        cdef Fields f
        cdef list out = []
        for task in tasks:
            if not PyDict_Check(<PyObject*>task):
                raise EncodeTypeError(f"a task must be a dict, got {show(task)}")
            f.n = 0
            f.body = f.few
            try:
                gather(<PyObject*>task, &f)
                out.append(self.frame(&f, task, None, max_bytes, reply, flags, ids, now))
            finally:
                fields_free(&f)
        return out

    cdef inline object frame(self, Fields* f, object task, object task_id, Py_ssize_t max_bytes, object reply,
                             int flags, IdMaker ids, double now):
        cdef Enc e
        cdef char[ROOM] room
        cdef bint own_id = False
        if f.given[<int>K_TYPE] == NULL:
            raise EncodeError(f"type is missing: a task needs one, {IDENT}", "type")
        kind = ident(<object>f.given[<int>K_TYPE], "type")
        if reply is not None:
            reply = ident(reply, "reply")
        if flags < 0:
            raise EncodeError(f"flags must be 0 to 2**31 - 1, got {flags}", "flags")
        if ids is not None and f.given[<int>K_ID] == NULL:
            chosen = ids.make(now)
        else:
            chosen = choose_id(f.given[<int>K_ID], task_id, self.new_id, &own_id)  # a hook: now `f.given` may dangle
        enc_open(&e, room, max_bytes, self.max_depth, self.default)
        put_header(&e, f, chosen, kind, reply, flags)
        frame = enc_close(&e, enc_body(&e, <PyObject*>task, f), "")
        return make(self.record, chosen, f.lane, frame, own_id, f.delay)

    def decode_body(self, bytes frame not None, TaskHeader header not None):
        """The body of a frame as a dict, given its header; O(len(frame)). Raises: DecodeError; what the hook raises."""
        cdef Dec d
        cdef dict body = {}
        if header.body_at > len(frame):
            raise DecodeError("the header is not of this frame", 0)
        dec_open(&d, frame, header.body_at, self.ext_hook, self.max_depth)
        if dec_body(&d, <PyObject*>body, NULL) < 0:
            dec_raise(&d)
        return body

    def decode(self, bytes frame not None):
        """The task as a dict: id, type, priority, the optional keys that were set, and the body; O(len(frame)).

        ``reply`` and ``flags`` are not keys of a task: see ``decode_header``. Raises: DecodeError; what a hook raises.
        """
        cdef Dec d
        cdef Head h
        cdef dict task = {}
        dec_open(&d, frame, 0, self.ext_hook, self.max_depth)
        try:
            if dec_head(&d, &h) < 0:
                dec_raise(&d)
            spread(&h, task)
            if dec_body(&d, <PyObject*>task, NULL) < 0:
                dec_raise(&d)
        finally:
            head_free(&h)
        return task


@cython.final
@cython.auto_pickle(False)
cdef class IdMaker:
    """Ids of 31 hexadecimal digits: 11 of unix milliseconds, the 12 of ``seed``, 8 of a counter.

    Unique as far as ``seed`` is: one maker per process, and a new one after a fork. In order of making, also when the
    clock steps back; the counter wraps after 2**32 ids, by when the milliseconds have moved on.
    """

    cdef readonly str seed
    cdef uint64_t last
    cdef uint32_t count
    cdef orc_mutex lock

    def __cinit__(self, str seed not None):
        if len(seed) != 12 or not well_named(<PyObject*>seed):
            raise ValueError(f"seed must be 12 printable ASCII characters without spaces, got {show(seed)}")
        self.seed = seed

    cpdef str make(self, double now):
        """The next id; ``now`` in unix seconds, 0 to 2**44 milliseconds. O(1). Raises: ValueError outside that."""
        cdef char* out
        cdef PyObject* s
        cdef uint64_t moment
        cdef uint32_t number
        if not 0.0 <= now < 17592186044.0:
            raise ValueError(f"now must be unix seconds, 0 or more, got {now}")
        s = PyUnicode_New(31, 127)
        if s == NULL:
            orc_raised()
        orc_lock(&self.lock)
        self.last = moment = max(self.last, <uint64_t>(now * 1000.0))
        number = self.count
        self.count += 1
        orc_unlock(&self.lock)
        out = <char*>orc_compact(s)
        put_hex(out, moment, 11)
        memcpy(out + 11, PyUnicode_DATA(<PyObject*>self.seed), 12)
        put_hex(out + 23, number, 8)
        return <str>take(s)


cdef inline void put_hex(char* out, uint64_t number, int digits) noexcept:
    cdef int i
    for i in range(digits - 1, -1, -1):
        out[i] = b"0123456789abcdef"[number & 15]
        number >>= 4


include "codec_make.pxi"
