"""Tasks and results as bytes. Owns the choice of hooks and limits, task ids, and the errors that users see.

The bytes themselves belong to ``orchestra._ext.codec``, of which this is the only importer: a task is a *frame*, two
MessagePack values (header array, body map) that any language can read. NumPy arrays travel as extension type 1: a
MessagePack array ``[dtype.str, shape]`` followed by the raw C-order bytes. NumPy itself is imported only when an array
arrives. Refuses to own: where bytes are stored, and what a lane, reply channel or flag means.

Concurrency: every function may be called from any thread; ids are unique across threads, processes and forks.
"""

from __future__ import annotations

import os
import re
import sys
from math import prod
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestra._ext import codec
from orchestra._ext.codec import TaskHeader
from orchestra.errors import CorruptEntryError, InvalidTaskError, InvalidTaskTypeError, TaskTooLargeError
from orchestra.tasks import BaseTask

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "MAX_DEPTH",
    "MAX_TASK_BYTES",
    "EncodedTask",
    "TaskHeader",
    "decode_body",
    "decode_header",
    "decode_task",
    "dumps",
    "encode_task",
    "encode_tasks",
    "loads",
    "make_task",
    "new_task_id",
]

MAX_TASK_BYTES = 1 << 20
"""Default limit of an encoded task or result, in bytes."""

MAX_DEPTH = 64
"""Containers around the innermost value of a task's key or of a result."""

_EXT_ARRAY = 1
# Fixed-width kinds whose bytes mean the same everywhere: no objects, no structs, no platform-sized long doubles.
_DTYPE = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c8|c16|[mM]8(\[\d{0,9}[a-zA-Z]{1,7}\])?|[SU][1-9]\d{0,8})")
_ARRAY_HEAD_MAX = 1024
_MAX_DIMENSIONS = 32
_MAX_EXTENT = 1 << 62
_FLOAT_BYTES = 8


class EncodedTask(NamedTuple):
    """A task ready to be sent. Unpacks as ``id, lane, frame, own_id, delay``."""

    id: str
    lane: int
    """0 (critical) to 3 (low), from the task's priority."""
    frame: bytes
    own_id: bool
    """The caller chose the id, so a second task with it is a duplicate."""
    delay: float
    """Seconds to wait before the task is due; not part of the frame."""


_ids = codec.IdMaker(os.urandom(6).hex())


def _reseed() -> None:
    global _ids  # noqa: PLW0603 - a forked child must not go on counting under its parent's seed
    _ids = codec.IdMaker(os.urandom(6).hex())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reseed)


def new_task_id() -> str:
    """A new id of 31 hexadecimal digits: 11 of unix milliseconds, 12 random ones of the process, 8 of a counter.

    Unique across threads, processes and forks; sorts by time, to the millisecond of this machine's clock. O(1).
    """
    return _ids.make(time())


def _to_wire(value: Any) -> Any:
    """The codec's ``default`` hook: NumPy scalars and arrays; NotImplemented for everything else."""
    numpy = sys.modules.get("numpy")  # without it, no value can be of its types
    if numpy is None:
        return NotImplemented
    if isinstance(value, numpy.generic):
        # Dates would turn into bare ints by their unit, long doubles do not fit, structures would lose their names.
        return value.item() if value.dtype.kind in "biuf" and value.itemsize <= _FLOAT_BYTES else NotImplemented
    if isinstance(value, numpy.ndarray):
        return _array_to_wire(numpy, value)
    return NotImplemented


def _array_to_wire(numpy: ModuleType, array: Any) -> codec.Ext:
    if isinstance(array, numpy.ma.MaskedArray):
        raise codec.EncodeTypeError("a masked array does not travel; send array.filled(value)")
    if not _DTYPE.fullmatch(array.dtype.str):
        raise codec.EncodeTypeError(
            f"a NumPy array of dtype {array.dtype} does not travel; send one of bool, int, float, complex, str or "
            "datetime64, or array.tolist()"
        )
    if array.ndim > _MAX_DIMENSIONS:
        raise codec.EncodeError(f"a NumPy array may have {_MAX_DIMENSIONS} dimensions, got {array.ndim}")
    raw = numpy.ascontiguousarray(array).reshape(-1)
    # datetime64 has no buffer protocol, and an empty array no bytes to look at.
    data = raw.view(numpy.uint8) if raw.nbytes else b""
    return codec.Ext(_EXT_ARRAY, data, codec.packb([array.dtype.str, list(array.shape)]))


def _from_wire(code: int, payload: memoryview) -> Any:
    """The codec's ``ext_hook``. The array returned is writable and owns its memory."""
    if code != _EXT_ARRAY:
        raise codec.DecodeError(f"extension type {code} is not known; only 1, a NumPy array, is")
    head, start = codec.unpack_first(bytes(payload[:_ARRAY_HEAD_MAX]))
    name, shape = _check_array_head(head)
    import numpy as np  # noqa: PLC0415 - 60 ms and 20 MiB that most workers never need

    try:
        dtype = np.dtype(name)
        if prod(shape) * dtype.itemsize == len(payload) - start:
            return np.ndarray(shape, dtype, payload[start:]).copy()
    except (TypeError, ValueError, OverflowError):  # a unit that numpy does not know, extents that overflow
        pass
    raise codec.DecodeError(f"{len(payload) - start} bytes are no array of dtype {name} and shape {shape}")


def _check_array_head(head: Any) -> tuple[str, list[int]]:
    match head:
        case [str(dtype), list(shape)] if (
            len(shape) <= _MAX_DIMENSIONS
            and _DTYPE.fullmatch(dtype)
            and all(type(n) is int and 0 <= n < _MAX_EXTENT for n in shape)
        ):
            return dtype, shape
    raise codec.DecodeError("the head of a NumPy array must be [dtype, shape] with a plain dtype")


_CODEC = codec.TaskCodec(new_task_id, _to_wire, _from_wire, EncodedTask, MAX_DEPTH)
_encode = _CODEC.encode
_decode_header = codec.decode_header
_decode_body = _CODEC.decode_body
_decode = _CODEC.decode
_make = codec.TaskMaker(_CODEC, BaseTask).make


def _refusal(error: codec.EncodeError | codec.EncodeTypeError) -> InvalidTaskError:
    message = str(error)
    if isinstance(error, codec.TooLargeError):
        too_large = TaskTooLargeError(message, size=error.size, limit=error.limit)
        too_large.path = error.path
        return too_large
    kind = InvalidTaskTypeError if isinstance(error, codec.EncodeTypeError) else InvalidTaskError
    return kind(message, path=error.path)


def encode_task(
    task: Any, *, task_id: str | None = None, max_bytes: int = MAX_TASK_BYTES, reply: str | None = None, flags: int = 0
) -> EncodedTask:
    """Check ``task`` and turn it into a frame; the task itself is not changed. O(size), no round trip.

    ``task_id`` is the id unless the task has one of its own; without either, :func:`new_task_id` gives one. ``reply``
    names a channel that wants the result; ``flags`` (bit 0: keep the result) travels as it is. ``max_bytes``: 1 to
    2**31 - 1 bytes of the whole frame.

    Raises: InvalidTaskTypeError for a value or field of a wrong type, TaskTooLargeError above ``max_bytes``,
    InvalidTaskError for anything else that cannot travel (cycles, more than 64 levels, ints beyond 64 bits, lone
    surrogates, fields out of range); all carry ``path``.
    """
    try:
        return _encode(task, task_id, max_bytes, reply, flags)
    except (codec.EncodeError, codec.EncodeTypeError) as error:
        raise _refusal(error) from None


def encode_tasks(
    tasks: list[Any], *, max_bytes: int = MAX_TASK_BYTES, reply: str | None = None, flags: int = 0
) -> list[EncodedTask]:
    """:func:`encode_task` for each of ``tasks``; those without an id get one of the same moment. Raises for the first that cannot travel."""
    try:
        return _CODEC.encode_many(tasks, _ids, time(), max_bytes, reply, flags)
    except (codec.EncodeError, codec.EncodeTypeError) as error:
        raise _refusal(error) from None


def decode_header(frame: bytes) -> TaskHeader:
    """Id, type, lane and limits of a frame, without looking at its body. O(1).

    Raises: CorruptEntryError if the bytes do not begin with the header of a task.
    """
    try:
        return _decode_header(frame)
    except codec.DecodeError as error:
        raise CorruptEntryError(f"not a task: {error}") from error


def decode_body(frame: bytes, header: TaskHeader) -> dict[str, Any]:
    """``input``, ``metadata`` and the unknown keys of the frame that ``header`` was decoded from. O(size).

    Raises: CorruptEntryError if the body is not a map, is cut short, or is followed by other bytes.
    """
    try:
        return _decode_body(frame, header)
    except codec.DecodeError as error:
        raise CorruptEntryError(f"task {header.id}: {error}") from error


def make_task(frame: bytes, header: TaskHeader | None, attempt: int, fence: int) -> tuple[TaskHeader, BaseTask]:
    """Header and task of a frame, as an agent is handed it; ``header``: if it was decoded before. O(size).

    Raises: CorruptEntryError as :func:`decode_header` and :func:`decode_body`, and if the metadata are no map.
    """
    try:
        return _make(frame, header, attempt, fence)
    except codec.DecodeError as error:
        header = header or decode_header(frame)  # if it is the header that cannot be read, this says so
        raise CorruptEntryError(f"task {header.id}: {error}") from error


def decode_task(frame: bytes) -> dict[str, Any]:
    """The task dict of a frame: ``id``, ``type``, ``priority``, the options that were set, and the body. O(size).

    Raises: CorruptEntryError if the bytes are not one task.
    """
    try:
        return _decode(frame)
    except codec.DecodeError as error:
        raise CorruptEntryError(f"not a task: {error}") from error


def dumps(value: Any, *, max_bytes: int = MAX_TASK_BYTES, name: str = "value") -> bytes:
    """``value`` (a result, the facts of a dead letter) as MessagePack bytes. O(size).

    ``name`` begins the path in errors: ``result[0].score``. ``max_bytes``: 1 to 2**31 - 1. Raises: as ``encode_task``.
    """
    try:
        return codec.packb(value, _to_wire, max_bytes, MAX_DEPTH, name)
    except (codec.EncodeError, codec.EncodeTypeError) as error:
        raise _refusal(error) from None


def loads(data: bytes | bytearray | memoryview) -> Any:
    """The value of ``dumps``. Tuples come back as lists; a repeated map key: the last wins. O(size).

    Raises: CorruptEntryError if ``data`` is not one MessagePack value of at most 64 levels.
    """
    try:
        return codec.unpackb(data, _from_wire, MAX_DEPTH)
    except codec.DecodeError as error:
        raise CorruptEntryError(str(error)) from error
