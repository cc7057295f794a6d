"""What the scheduler's order is made of: the keys, the place of a task, its checks and its counts.

No heap and no waiting: those are ``scheduler``'s. Pure; times are arguments.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from orchestra.errors import InvalidTaskError, InvalidTaskTypeError
from orchestra.tasks import LANES, TaskDict, TaskPriority, require_number

_NORMAL = TaskPriority.NORMAL  # looking it up in the enum costs as much as a push


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatistics:
    """A snapshot; the counters run since construction.

    ``added == taken + expired + cleared + size`` always. ``unfinished`` is what :meth:`PriorityScheduler.join` waits
    for; ``overdue`` counts those of ``taken`` that went before more urgent ones because they had waited ``max_wait``.
    """

    size: int
    max_size: int
    waiting: int
    unfinished: int
    added: int
    taken: int
    cleared: int
    refused: int
    expired: int = 0
    overdue: int = 0


class Entry:
    """A task in the heap; or, when ``of`` is set, a later place of that task.

    ``level``: where it is in the heap; ``own``: where it would be if nobody waited for it; ``sequence``: its number among
    the arrivals; ``deadline``: unix seconds.
    """

    __slots__ = ("added", "deadline", "id", "item", "level", "of", "own", "place", "sequence")

    added: float
    """Monotonic seconds; only with ``max_wait``."""

    def __init__(
        self, item: Any, level: int, sequence: int, deadline: float | None = None, of: Entry | None = None
    ) -> None:
        task_id = item.get("id") if of is None else ""
        self.id = task_id if isinstance(task_id, str) else ""
        self.item = item
        self.own = self.level = level
        self.sequence = sequence
        self.deadline = deadline
        self.of = of
        self.place: Entry | None = None
        """The later place that counts."""

    def moved(self, level: int) -> Entry:
        """Its place at another level, which counts from now on."""
        self.level = level
        self.place = Entry(True, level, self.sequence, of=self)
        return self.place

    def task(self) -> Entry | None:
        """The task that has its place here; None when it has another one by now, or was taken."""
        task = self if self.of is None else self.of
        here = None if self.of is None else self
        return task if task.item is not None and task.place is here else None


def ranks(aging: float | None, now: float) -> tuple[int, ...]:
    """Keys for :meth:`PriorityScheduler.put_nowait`, one for each level, of what arrives at ``now``, monotonic seconds.

    With ``aging`` seconds a level, an item of level *p* goes before all of level *q* < *p* that arrive more than
    ``(p - q) * aging`` later: LOW behind a flood of HIGH, which is taken no slower than it arrives, waits for twice
    ``aging``. None or 0 is strict priority. Keys with and without aging do not belong into one scheduler.

    Raises:
        ConfigurationError: ``aging`` is not a number of 0 to 86,400 seconds.
    """
    if aging is None or aging == 0:
        return _STRICT
    require_number("aging", aging, 0.0, 86_400.0, unit="seconds a priority level")
    at, step = int(now * 1e6), round(aging * 1e6)
    return tuple(at + step * level for level in range(LANES))


_STRICT = tuple(range(LANES))


def places(aging: float | None, now: float) -> tuple[int, ...]:
    """:func:`ranks` for what arrives from the streams of a queue: its lanes, then those before them.

    What comes back goes before all of its lane that arrived less than half of ``aging`` earlier, and always without aging.
    """
    if aging is None or aging == 0:
        return _STRICT_PLACES
    at = int(now * 1e6)
    return tuple([at + offset for offset in _offsets(aging)])


@functools.cache
def _offsets(aging: float) -> tuple[int, ...]:
    keys, half = ranks(aging, 0.0), round(aging * 5e5)
    return (*keys, *[key - half for key in keys])


_STRICT_PLACES = (*range(1, 2 * LANES, 2), *range(0, 2 * LANES, 2))


def priority_of(task_data: TaskDict) -> int:
    """The level of a task.

    Raises:
        InvalidTaskTypeError, InvalidTaskError: it is no dict, or its priority none of 0 to 3.
    """
    if not isinstance(task_data, dict):
        raise InvalidTaskTypeError(f"a task must be a dict, got {type(task_data).__name__}", path="$")
    priority = task_data.get("priority", _NORMAL)
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise InvalidTaskTypeError(
            f"priority must be a TaskPriority or a whole number from 0 to {LANES - 1}, got {priority!r}",
            path="priority",
        )
    if not 0 <= priority < LANES:
        raise InvalidTaskError(
            f"priority must be from 0 (CRITICAL) to {LANES - 1} (LOW), got {priority}", path="priority"
        )
    return priority


def deadline_of(task_data: TaskDict) -> float | None:
    """The deadline of a task in unix seconds, None without one.

    Raises:
        InvalidTaskTypeError: it is not a finite number.
    """
    deadline = task_data.get("deadline")
    if deadline is None:
        return None
    if not isinstance(deadline, int | float) or isinstance(deadline, bool) or not math.isfinite(deadline):
        raise InvalidTaskTypeError(f"deadline must be unix seconds, a finite number, got {deadline!r}", path="deadline")
    return deadline
