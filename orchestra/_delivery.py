"""A delivery, the verdicts that end it, and the terminal record a sender may ask for. No I/O.

A lane is read from two streams: what was there before and comes back stands in the one before it (numbers 4 to 7), and is
read first. An entry of either has the field ``t`` (the task's frame, see :mod:`orchestra.serialization`) and, once it has been
moved, ``n`` (retries consumed), ``d`` (deliveries before this entry) and ``g`` (generation: how often the task was
replayed from the dead letters). The frame never changes, so no script has to understand it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from orchestra import telemetry
from orchestra._ext import wire
from orchestra.errors import CorruptEntryError
from orchestra.serialization import TaskHeader, decode_header, decode_task, dumps, encode_task, loads, make_task
from orchestra.tasks import BaseTask, TaskDict

WANTS_RESULT = 1
"""Bit of a frame's flags: the sender wants the terminal record kept."""
STEP = "orchestra.step"
"""Key of a task's metadata: it is a step of a workflow, ``[namespace, workflow id, step index, series, claim]``."""
RETRY = "orchestra.retry"
"""Key of a step's metadata: the fields of its own :class:`~orchestra.tasks.Retry`."""
arrivals, by_rank, hold = wire.arrivals, wire.by_rank, wire.hold
sift, with_ids = wire.sift, wire.with_ids
"""What is done with a whole batch of deliveries at once: made, ordered, held, sorted by verdict, named in a command."""


@wire.untracked
class Delivery(wire.Arrival):
    """One hand-over of a task to one consumer. Belongs to the event loop that read it.

    ``deliveries`` counts hand-overs of this entry (1 unless it was reclaimed), ``before`` those of the task's earlier
    entries, ``retries`` the attempts consumed so far. ``lane`` is its priority, 0 to 3, ``stream`` where its entry is: the
    lane, or that number and 4 for the stream before it. ``lost`` is set when the lease turned out to be another's,
    ``abandoned`` when its agent is out of control and the lease is no longer to be renewed. ``foreign``: the entry has no
    frame, another program wrote it. ``attempt``: number of this attempt, from 1. ``fence``: strictly increasing over the
    deliveries of a task, for resources that check it. ``header``: the task's, decoded when it is first asked for, which
    raises CorruptEntryError where the entry is not a task that this version understands.
    """

    __slots__ = ()
    if TYPE_CHECKING:

        @property
        def header(self) -> TaskHeader: ...

    def _read_fields(self, fields: Sequence[bytes]) -> None:
        by_name = dict(zip(fields[::2], fields[1::2], strict=False))
        self.frame = by_name.get(b"t", b"")
        self.foreign = b"t" not in by_name
        try:
            self.retries = int(by_name.get(b"n", 0))
            self.before = int(by_name.get(b"d", 0))
            self.generation = int(by_name.get(b"g", 0))
        except (ValueError, OverflowError):
            self.frame = b""

    def _decoded(self) -> TaskHeader:
        """What :attr:`header` is, asked for once.

        Raises:
            CorruptEntryError: the entry is not a task that this version understands.
        """
        return decode_header(self.frame)

    @property
    def message_id(self) -> str:
        """``<stream>:<entry id>``: what ``consume`` hands out and ``acknowledge`` takes."""
        return f"{self.stream}:{self.entry.decode()}"

    @property
    def wants_result(self) -> bool:
        """Whether the sender wants the terminal record kept."""
        return bool((self.header.flags or 0) & WANTS_RESULT)

    def task(self) -> BaseTask:
        """What the agent is handed; decodes the body.

        Raises:
            CorruptEntryError: the entry is not a task that this version understands.
        """
        self._header, task = make_task(self.frame, self._header, self.attempt, self.fence)
        return task

    def task_dict(self) -> TaskDict:
        """The task as it was produced."""
        return decode_task(self.frame)

    @property
    def is_step(self) -> bool:
        """Whether it is a step of a workflow; decodes the body. False for what is no task."""
        try:
            return STEP in self.task().metadata
        except CorruptEntryError:
            return False

    def __repr__(self) -> str:
        return f"<Delivery {self.message_id} deliveries={self.deliveries} attempt={self.attempt}>"


@dataclass(frozen=True, slots=True)
class Complete:
    """The task is done; ``value`` travels to a sender who wants it."""

    value: Any = None


@dataclass(frozen=True, slots=True)
class Again:
    """The task is to run again after ``delay`` seconds.

    ``counter`` says why: ``"retried"`` consumes a retry; ``"throttled"`` and ``"released"`` do not. ``error`` is told to
    those who watch; it does not travel. ``due``: the moment that was meant, monotonic seconds, where it matters that the
    way to the queue takes time: who has an earlier place must not come back later.
    """

    delay: float
    counter: str = "retried"
    error: str | None = field(default=None, compare=False, repr=False)
    due: float | None = field(default=None, compare=False, repr=False)

    def left(self) -> float:
        """Seconds from now on."""
        return self.delay if self.due is None else max(0.001, self.due - time.monotonic())


class Sooner(NamedTuple):
    """A throttled task that was to come back at ``was``, and is to at ``at``; monotonic seconds."""

    task_id: str
    was: float
    at: float


OFF_MS = 1000
"""Milliseconds between when a task was meant to come back and when it is due, at most, by the way of its settling."""


@dataclass(frozen=True, slots=True)
class Bury:
    """The task is dead: ``reason`` is a short word for machines, ``error`` the facts for people."""

    reason: str
    attempts: int
    error: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cancel:
    """The task was cancelled: terminal, neither completed nor dead."""


Verdict: TypeAlias = Complete | Again | Bury | Cancel
DONE = Complete()
"""The verdict of a finished task whose value nobody wants; shared, so that settling it allocates nothing."""


def completed_record(task_id: str, value: Any, max_bytes: int) -> bytes:
    """The terminal record of a completed task.

    Raises:
        InvalidTaskError: ``value`` cannot be encoded, or is too large.
    """
    return dumps({"id": task_id, "outcome": "completed", "value": value}, max_bytes=max_bytes)


def dead_record(task_id: str, verdict: Bury) -> bytes:
    """The terminal record of a dead task."""
    fields = {"id": task_id, "outcome": "dead", "reason": verdict.reason, "attempts": verdict.attempts}
    return dumps({**fields, "error": verdict.error})


def cancelled_record(task_id: str) -> bytes:
    """The terminal record of a cancelled task."""
    return dumps({"id": task_id, "outcome": "cancelled"})


def read_record(record: bytes) -> dict[str, Any]:
    """A terminal record as a dict: ``id``, ``outcome``, and ``value`` or ``reason``, ``attempts`` and ``error``."""
    value = loads(record)
    return value if isinstance(value, dict) else {"outcome": "corrupt"}


_SEVERAL = b"\xc1"
"""The first byte of a publication of several records, each behind its length; no record begins with it."""


def published_records(message: bytes) -> list[dict[str, Any]]:
    """The terminal records in a publication of ``complete_result.lua``; without what is damaged."""
    pieces = [message]
    if message[:1] == _SEVERAL:
        pieces, at = [], 1
        while at < len(message):
            end = at + 4 + int.from_bytes(message[at : at + 4], "big")
            pieces.append(message[at + 4 : end])
            at = end
    records = []
    for piece in pieces:
        with contextlib.suppress(CorruptEntryError):
            records.append(read_record(piece))
    return records


def frame_of(task_data: TaskDict) -> bytes:
    """The frame of a task dict that is already in flight (its ``delay`` has been served)."""
    return encode_task({k: v for k, v in task_data.items() if k != "delay"}).frame


def frame_ident(task_id: str) -> bytes:
    """``task_id`` as it stands in a frame, from its third byte on: behind the header array's own byte and the version."""
    return dumps(task_id)


def corrupt_verdict(queue: str, delivery: Delivery, error: Exception) -> Bury:
    """The end of an entry that is not a task as far as this release knows; its bytes are kept.

    ``foreign``: another program wrote it; ``unknown_version``: a newer release may understand and replay it;
    ``corrupt``: nobody will.
    """
    reason, kind = "corrupt", type(error).__name__
    if delivery.foreign:
        reason, kind = "foreign", "ForeignEntry"
    elif _may_be_newer(delivery.frame):
        reason, kind = "unknown_version", "UnknownVersion"
    facts = {"queue": queue, "message_id": delivery.message_id, "reason": reason, "error": str(error)}
    telemetry.emit("queue.corrupt", {}, facts)
    return Bury(reason, 0, {"error": str(error), "error_type": kind})


def sort_out(
    queue: str, deliveries: Sequence[Delivery], cancelled: Callable[[Delivery], bool]
) -> tuple[list[tuple[str, TaskDict]], list[tuple[Delivery, Verdict]]]:
    """What ``consume`` hands out of ``deliveries`` as ``(message_id, task_data)``, and the verdicts on the others."""
    tasks: list[tuple[str, TaskDict]] = []
    ended: list[tuple[Delivery, Verdict]] = []
    for delivery in deliveries:
        try:
            task = delivery.task_dict()
        except CorruptEntryError as error:
            ended.append((delivery, corrupt_verdict(queue, delivery, error)))
            continue
        if cancelled(delivery):
            ended.append((delivery, Cancel()))
        else:
            tasks.append((delivery.message_id, task))
    return tasks, ended


def _may_be_newer(frame: bytes) -> bool:
    """Whether it begins as a frame does, with a later version than 1 or more header fields than the 9 of version 1."""
    return len(frame) > 1 and 0x94 <= frame[0] <= 0x9F and 1 <= frame[1] < 0x80 and (frame[1] > 1 or frame[0] > 0x99)
