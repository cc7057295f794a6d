"""PriorityScheduler: what is waiting in this process, most urgent first (section "Scheduler" of the specification).

Owns the order and the waiting; refuses to run anything and to survive the process: durable order lives in the lanes of
the task queue. The order itself is ``orchestra._ext.heap.TaskHeap``: O(log n), first in, first out within a priority.

Concurrency: belongs to one event loop and is not thread-safe. A task leaves the heap in the same step in which its getter
returns, never before: a getter that is cancelled or times out has taken nothing. Waiters are served in order of arrival;
to keep that order a getter that arrives later may take only tasks that no woken waiter is about to fetch. The ``*_nowait``
methods do not queue up: what they take, a woken waiter goes on waiting for, at the head of the line.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any, TypeAlias

from orchestra._ext.heap import TaskHeap
from orchestra._shared import Connectable, shared
from orchestra.errors import InvalidTaskError, InvalidTaskTypeError
from orchestra.tasks import LANES, TaskDict, TaskPriority, require_int, require_number

__all__ = ["PriorityScheduler", "SchedulerStatistics", "TaskPriority", "get_scheduler"]

_Waiter: TypeAlias = tuple[int, "asyncio.Future[None]"]
_NORMAL = TaskPriority.NORMAL  # looking it up in the enum costs as much as a push
_MAX_SIZE = 2**40
_MAX_TIMEOUT = 366 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatistics:
    """A snapshot; the counters run since construction.

    ``added == taken + cleared + size`` always. ``unfinished`` is what :meth:`PriorityScheduler.join` waits for.
    """

    size: int
    max_size: int
    waiting: int
    unfinished: int
    added: int
    taken: int
    cleared: int
    refused: int


class PriorityScheduler(Connectable):
    """Tasks of one process, ordered by priority and, within a priority, by arrival.

    ``max_size``: tasks held at most, 0 for no limit. Memory: about 40 bytes a task besides the task.

    Raises:
        ConfigurationError: ``max_size`` is not a whole number of 0 or more.
    """

    def __init__(self, max_size: int = 0) -> None:
        require_int("PriorityScheduler.max_size", max_size, 0, _MAX_SIZE, unit="tasks")
        self._max_size = max_size
        self._heap = TaskHeap()
        self._waiters: deque[_Waiter] = deque()  # getters that were not woken yet, by ticket
        self._tickets = itertools.count()
        self._promised = 0  # getters that were woken and have not run yet; each is owed a task of the heap
        self._unfinished = 0
        self._joiners: list[asyncio.Future[None]] = []
        self._added = self._taken = self._cleared = self._refused = 0

    # -- adding

    async def add_task(self, task_data: TaskDict) -> None:
        """Add a task; ``priority`` is a :class:`TaskPriority` or 0 to 3, NORMAL if absent. Never waits. O(log n).

        Raises:
            asyncio.QueueFull: ``max_size`` tasks are held already.
            InvalidTaskTypeError: the task is not a dict, or its priority not an int.
            InvalidTaskError: its priority is none of 0 to 3.
        """
        self.add_nowait(task_data)

    def add_nowait(self, task_data: TaskDict) -> None:
        """:meth:`add_task` without a coroutine."""
        self.put_nowait(_priority_of(task_data), task_data)

    def put_nowait(self, priority: int, item: Any) -> None:
        """Add any object but None, with any priority that fits 64 signed bits; lower is sooner. O(log n).

        Raises:
            asyncio.QueueFull: ``max_size`` tasks are held already.
            InvalidTaskTypeError: ``item`` is None, which is what an empty scheduler gives.
            TypeError, OverflowError: ``priority`` is not an int, or too large.
        """
        if item is None:
            raise InvalidTaskTypeError("None cannot be scheduled: it is what an empty scheduler returns", path="$")
        if self._max_size and len(self._heap) >= self._max_size:
            self._refused += 1
            raise asyncio.QueueFull(f"the scheduler holds {self._max_size} tasks already (max_size)")
        self._heap.push(priority, item)
        self._added += 1
        self._unfinished += 1
        if self._waiters:
            self._wake()

    # -- taking

    async def get_next_task(self, timeout: float | None = None) -> Any | None:
        """Take the most urgent task.

        Waits ``timeout`` seconds for one, or without end if None; 0 does not wait. None when nothing came in time.
        A task is never lost: cancelled or timed out, this has taken nothing. O(log n).

        Raises:
            ConfigurationError: ``timeout`` is not a number of 0 or more seconds.
        """
        if len(self._heap) > self._promised:
            return self.pop_nowait()
        if timeout is None:
            return await self._wait()
        require_number("get_next_task(timeout)", timeout, 0.0, _MAX_TIMEOUT, unit="seconds")
        if timeout == 0:
            return None
        try:
            async with asyncio.timeout(timeout):
                return await self._wait()
        except TimeoutError:
            return None

    def pop_nowait(self) -> Any | None:
        """Take the most urgent item, or None when empty. O(log n)."""
        if not len(self._heap):
            return None
        self._taken += 1
        return self._heap.pop()

    async def get_tasks_by_priority(self, count: int = 10) -> list[Any]:
        """Take up to ``count`` tasks, most urgent first; what there is, without waiting. O(count * log n).

        Raises:
            ConfigurationError: ``count`` is not a whole number of 0 or more.
        """
        require_int("get_tasks_by_priority(count)", count, 0, _MAX_SIZE, unit="tasks")
        return self.pop_many_nowait(count)

    def pop_many_nowait(self, count: int) -> list[Any]:
        """:meth:`get_tasks_by_priority` without a coroutine and without a check of ``count``."""
        items = self._heap.pop_many(count)
        self._taken += len(items)
        return items

    async def peek_next_task(self) -> Any | None:
        """The most urgent task, which stays; None when empty. O(1)."""
        return self.peek_nowait()

    def peek_nowait(self) -> Any | None:
        """:meth:`peek_next_task` without a coroutine."""
        return self._heap.peek() if len(self._heap) else None

    # -- ending

    def task_done(self) -> None:
        """Say that one task that was taken has been processed, for :meth:`join`.

        Raises:
            ValueError: called more often than tasks were taken.
        """
        if self._unfinished <= len(self._heap):
            raise ValueError("task_done() was called more often than tasks were taken")
        self._finish(1)

    async def join(self) -> None:
        """Wait until every task that was added has been taken and reported by :meth:`task_done`, or cleared.

        The rule of :meth:`asyncio.Queue.join`: taking a task does not finish it.
        """
        while self._unfinished:
            joiner = asyncio.get_running_loop().create_future()
            self._joiners.append(joiner)
            try:
                await joiner
            finally:
                if joiner in self._joiners:
                    self._joiners.remove(joiner)

    async def clear(self) -> None:
        """Drop every task that was not taken. Waiting getters go on waiting. O(n)."""
        self.clear_nowait()

    def clear_nowait(self) -> int:
        """:meth:`clear` without a coroutine; returns how many were dropped."""
        count = self._heap.clear()
        self._cleared += count
        self._finish(count)
        return count

    # -- looking

    def get_queue_size(self) -> int:
        """Tasks held."""
        return len(self._heap)

    def is_empty(self) -> bool:
        """True when no task is held."""
        return not len(self._heap)

    def is_full(self) -> bool:
        """True when ``max_size`` tasks are held; never without a limit."""
        return 0 < self._max_size <= len(self._heap)

    def statistics(self) -> SchedulerStatistics:
        """Counts of this moment. O(waiters)."""
        return SchedulerStatistics(
            size=len(self._heap),
            max_size=self._max_size,
            waiting=len(self._waiters) + self._promised,
            unfinished=self._unfinished,
            added=self._added,
            taken=self._taken,
            cleared=self._cleared,
            refused=self._refused,
        )

    def __len__(self) -> int:
        return len(self._heap)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        limit = f"/{self._max_size}" if self._max_size else ""
        return f"<PriorityScheduler {len(self._heap)}{limit} tasks, {self.statistics().waiting} waiting>"

    # -- waiting

    async def _wait(self) -> Any:
        ticket = next(self._tickets)
        while True:
            waiter = asyncio.get_running_loop().create_future()
            bisect.insort(self._waiters, (ticket, waiter))  # at the end, unless it was woken in vain
            try:
                await waiter
            except BaseException:
                self._leave(ticket, waiter)
                raise
            self._promised -= 1
            if len(self._heap):  # else a *_nowait call or clear() was faster
                return self.pop_nowait()

    def _leave(self, ticket: int, waiter: asyncio.Future[None]) -> None:
        """Cancelled while waiting; or after being woken, then the promise passes to the next in line."""
        if waiter.done() and not waiter.cancelled():
            self._promised -= 1
            self._wake()
        elif (ticket, waiter) in self._waiters:
            self._waiters.remove((ticket, waiter))

    def _wake(self) -> None:
        """Promise each task that is not promised yet to the longest waiting getter."""
        while self._waiters and len(self._heap) > self._promised:
            _, waiter = self._waiters.popleft()
            if not waiter.done():  # cancelled, but its task has not run yet
                waiter.set_result(None)
                self._promised += 1

    def _finish(self, count: int) -> None:
        self._unfinished -= count
        if self._unfinished == 0:
            joiners, self._joiners = self._joiners, []
            for joiner in joiners:
                if not joiner.done():
                    joiner.set_result(None)


def get_scheduler(name: str = "priority") -> PriorityScheduler:
    """The scheduler called ``name`` of the running event loop, made on first use. May be awaited, which gives the same."""
    return shared("scheduler", name, PriorityScheduler)


def _priority_of(task_data: TaskDict) -> int:
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
