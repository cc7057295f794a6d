"""PriorityScheduler: what is waiting in this process, most urgent first (section "Scheduler" of the specification).

Owns the order and the waiting; refuses to run anything and to survive the process: durable order lives in the lanes of
the task queue. The order itself is ``orchestra._ext.heap.TaskHeap``: O(log n), first in, first out within a priority.
A task that changes its place is pushed again, with its old arrival number; what it leaves behind in the heap is dead, is
skipped when its turn comes, and is thrown out when the dead are more than the living.

Concurrency: belongs to one event loop and is not thread-safe. A task leaves the heap in the same step in which its getter
returns, never before: a getter that is cancelled or times out has taken nothing. Waiters are served in order of arrival;
to keep that order a getter that arrives later may take only tasks that no woken waiter is about to fetch. The ``*_nowait``
methods do not queue up: what they take, a woken waiter goes on waiting for, at the head of the line.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from orchestra import telemetry
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra._ext.heap import TaskHeap
from orchestra._inheritance import Inheritance
from orchestra._scheduling import Entry, SchedulerStatistics, deadline_of, places, priority_of, ranks
from orchestra._shared import Connectable, shared
from orchestra.errors import ConfigurationError, InvalidTaskTypeError
from orchestra.tasks import LANES, TaskDict, TaskPriority, require_int, require_number

__all__ = ["PriorityScheduler", "SchedulerStatistics", "TaskPriority", "get_scheduler", "places", "ranks"]

logger = logging.getLogger("orchestra.scheduler")

_Waiter: TypeAlias = tuple[int, "asyncio.Future[None]"]
_MAX_SIZE = 2**40
_MAX_TIMEOUT = 366 * 86_400.0
_MOST_DEAD = 64


class PriorityScheduler(Connectable):
    """Tasks of one process, ordered by priority and, within a priority, by arrival.

    ``max_size``: tasks held at most, 0 for no limit. ``max_wait``: seconds after which a task goes next whatever its
    priority, above 0 to a year; None for strict priority. It takes every other turn at most, so a flood of LOW tasks
    cannot turn the order around: behind any flood a task waits for ``max_wait`` and one turn, or for twice what was
    there before it, whichever is longer. ``on_expired`` is called with each task whose ``deadline`` (unix seconds) has
    passed when its turn comes: it is dropped instead of taken.
    Memory: about 40 bytes a task besides the task; 250 with ``max_wait``, for a task with a deadline, and from the first
    :meth:`inherit` or :meth:`raise_priority` on.

    Raises:
        ConfigurationError: ``max_size`` is not a whole number of 0 or more, or ``max_wait`` out of range.
    """

    def __init__(
        self,
        max_size: int = 0,
        *,
        max_wait: float | None = None,
        on_expired: Callable[[TaskDict], None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        require_int("PriorityScheduler.max_size", max_size, 0, _MAX_SIZE, unit="tasks")
        if max_wait is not None:
            require_number(
                "PriorityScheduler.max_wait", max_wait, 0.0, _MAX_TIMEOUT, unit="seconds (or None)", exclusive=True
            )
        self._max_size = max_size
        self.max_wait = max_wait
        self._on_expired = on_expired
        self._clock = clock
        self._heap = TaskHeap()
        self._waiters: deque[_Waiter] = deque()  # getters that were not woken yet, by ticket
        self._tickets = itertools.count()
        self._promised = 0  # getters that were woken and have not run yet; each is owed a task of the heap
        self._unfinished = 0
        self._joiners: list[asyncio.Future[None]] = []
        self._added = self._taken = self._cleared = self._refused = self._expired = self._overdue = 0
        self._dead = 0  # entries of the heap that stand for nothing
        self._tasks = 0  # entries of the heap that are tasks, not what put_nowait added
        self._by_id: dict[str, Entry] = {}
        self._tracking = max_wait is not None
        """Whether every task has an entry and is found by its id."""
        self._waits = Inheritance()
        self._line: deque[Entry] = deque()  # with max_wait: by arrival; what was taken has no item
        self._was_overdue = False

    # -- adding

    async def add_task(self, task_data: TaskDict) -> None:
        """Add a task; ``priority`` is a :class:`TaskPriority` or 0 to 3, NORMAL if absent. Never waits. O(log n).

        Raises:
            asyncio.QueueFull: ``max_size`` tasks are held already.
            InvalidTaskTypeError: the task is not a dict, its priority not an int, or its deadline not a number.
            InvalidTaskError: its priority is none of 0 to 3.
        """
        self.add_nowait(task_data)

    def add_nowait(self, task_data: TaskDict) -> None:
        """:meth:`add_task` without a coroutine."""
        level, deadline = priority_of(task_data), deadline_of(task_data)
        if deadline is None and not self._tracking:
            self.put_nowait(level, task_data)
            return
        entry = Entry(task_data, level, self._heap.arrivals, deadline)
        if entry.id in self._waits:
            entry.level = self._waits.level(entry.id, level)
        self.put_nowait(entry.level, entry)
        self._tasks += 1
        if entry.id:
            self._by_id[entry.id] = entry
            self._move(self._waits.set_own(entry.id, level))
        if self.max_wait is not None:
            entry.added = self._clock.monotonic()
            self._line.append(entry)

    def put_nowait(self, priority: int, item: Any) -> None:
        """Add any object but None, with any priority that fits 64 signed bits; lower is sooner. O(log n).

        Raises:
            asyncio.QueueFull: ``max_size`` tasks are held already.
            InvalidTaskTypeError: ``item`` is None, which is what an empty scheduler gives.
            TypeError, OverflowError: ``priority`` is not an int, or too large.
        """
        if item is None:
            raise InvalidTaskTypeError("None cannot be scheduled: it is what an empty scheduler returns", path="$")
        if self._max_size and len(self) >= self._max_size:
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
        if len(self) > self._promised and (item := self.pop_nowait()) is not None:
            return item
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
        if self.max_wait is not None:
            entry = self._most_overdue()
            self._was_overdue = entry is not None
            if entry is not None:
                self._dead += 1  # its place in the heap
                self._overdue += 1
                return self._leaves(entry)
        heap = self._heap
        while len(heap):
            item = heap.pop()
            if type(item) is not Entry:
                self._taken += 1
                return item
            if (item := self._open(item)) is not None:
                return item
        return None

    async def get_tasks_by_priority(self, count: int = 10) -> list[Any]:
        """Take up to ``count`` tasks, most urgent first; what there is, without waiting. O(count * log n).

        Raises:
            ConfigurationError: ``count`` is not a whole number of 0 or more.
        """
        require_int("get_tasks_by_priority(count)", count, 0, _MAX_SIZE, unit="tasks")
        return self.pop_many_nowait(count)

    def pop_many_nowait(self, count: int) -> list[Any]:
        """:meth:`get_tasks_by_priority` without a coroutine and without a check of ``count``."""
        if self._tasks or self._dead:
            return list(itertools.islice(iter(self.pop_nowait, None), count))
        items = self._heap.pop_many(count)
        self._taken += len(items)
        return items

    async def peek_next_task(self) -> Any | None:
        """The most urgent task, which stays; None when empty. O(1)."""
        return self.peek_nowait()

    def peek_nowait(self) -> Any | None:
        """:meth:`peek_next_task` without a coroutine."""
        if self.max_wait is not None and (entry := self._most_overdue()) is not None:
            return entry.item
        heap = self._heap
        while len(heap):
            item = heap.peek()
            if type(item) is not Entry:
                return item
            entry = item.task()
            if entry is not None and not self._is_late(entry):
                return entry.item
            heap.pop()
            self._drop(entry)
        return None

    # -- who waits on whom

    def raise_priority(self, item_id: str, priority: int) -> bool:
        """Make a task that waits here more urgent, for good; it goes where it would be, had it arrived so.

        True if it is more urgent now; False if no such task waits here, or it is as urgent already. O(log n), plus the
        tasks that inherit from it, and O(n) for the first call ever. Of several tasks with the same id the last one
        added is meant. For tasks, not for what :meth:`put_nowait` adds with a key that is no priority.

        Raises:
            InvalidTaskTypeError, InvalidTaskError: ``priority`` is none of 0 to 3.
        """
        level = priority_of({"priority": priority})
        self._track()
        entry = self._by_id.get(item_id)
        if entry is None or level >= entry.own:
            return False
        before, entry.own = entry.level, level
        self._move([item_id, *self._waits.set_own(item_id, level)])
        return entry.level < before

    def inherit(self, waiter: str, on: str, priority: int | None = None) -> None:
        """The task ``waiter`` waits for the task ``on``, which is at least as urgent as long as it does.

        So is what ``on`` itself waits for. ``waiter`` may wait here or run already, ``on`` may be added later;
        ``priority`` is the waiter's, and needed only when the scheduler does not know it: the task was taken before its
        first ``inherit``. Ended by :meth:`release`, or :meth:`ended` for either of them. O(waits that are reached),
        and O(log n) for each task that moves; O(n) for the first call ever.

        Raises:
            ConfigurationError: ``on`` waits for ``waiter`` already, directly or not; or the waiter is not known here and
                ``priority`` is None.
            InvalidTaskTypeError, InvalidTaskError: ``priority`` is none of 0 to 3.
        """
        self._track()
        level = self._own_level(waiter) if priority is None else priority_of({"priority": priority})
        if level is None:
            raise ConfigurationError(
                f"inherit(priority) must be given: no task {waiter!r} waits in this scheduler",
                field="priority",
                value=None,
            )
        self._move(self._waits.wait(waiter, level, on, self._own_level(on)))

    def release(self, waiter: str, on: str | None = None) -> None:
        """``waiter`` waits no more for ``on``, or for anything; what it made more urgent falls back to its place."""
        self._move(self._waits.release(waiter, on))

    def ended(self, task_id: str) -> None:
        """A task has ended: it waits for nothing, and nothing waits for it. Needed for ids given to :meth:`inherit`."""
        self._move(self._waits.ended(task_id))

    # -- ending

    def task_done(self) -> None:
        """Say that one task that was taken has been processed, for :meth:`join`.

        Raises:
            ValueError: called more often than tasks were taken.
        """
        if self._unfinished <= len(self):
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
        count = len(self)
        self._heap.clear()
        dropped, self._by_id = self._by_id, {}
        self._line.clear()
        self._dead = self._tasks = 0
        if len(self._waits):
            for task_id in dropped:
                self._waits.ended(task_id)
        self._cleared += count
        self._finish(count)
        return count

    # -- looking

    def get_queue_size(self) -> int:
        """Tasks held. One whose deadline passes is dropped, and no longer counted, when its turn comes."""
        return len(self)

    def is_empty(self) -> bool:
        """True when no task is held."""
        return not len(self)

    def is_full(self) -> bool:
        """True when ``max_size`` tasks are held; never without a limit."""
        return 0 < self._max_size <= len(self)

    def statistics(self) -> SchedulerStatistics:
        """Counts of this moment. O(waiters)."""
        return SchedulerStatistics(
            size=len(self),
            max_size=self._max_size,
            waiting=len(self._waiters) + self._promised,
            unfinished=self._unfinished,
            added=self._added,
            taken=self._taken,
            cleared=self._cleared,
            refused=self._refused,
            expired=self._expired,
            overdue=self._overdue,
        )

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        limit = f"/{self._max_size}" if self._max_size else ""
        return f"<PriorityScheduler {len(self)}{limit} tasks, {self.statistics().waiting} waiting>"

    # -- places

    def _open(self, place: Entry) -> Any | None:
        """The task of a place that was popped; None if it has none any more, or its deadline has passed."""
        entry = place.task()
        if entry is not None and not self._is_late(entry):
            return self._leaves(entry)
        self._drop(entry)
        return None

    def _drop(self, entry: Entry | None) -> None:
        """A place has left the heap, of a task that is too late, or of none."""
        if entry is None:
            self._dead -= 1
        else:
            self._expire(entry)

    def _leaves(self, entry: Entry) -> Any:
        self._taken += 1
        return self._forget(entry)

    def _forget(self, entry: Entry) -> Any:
        item, entry.item = entry.item, None
        entry.place = None
        self._tasks -= 1
        if self._by_id.get(entry.id) is entry:
            del self._by_id[entry.id]
        return item

    def _is_late(self, entry: Entry) -> bool:
        return entry.deadline is not None and self._clock.time() >= entry.deadline

    def _expire(self, entry: Entry) -> None:
        item = self._forget(entry)
        self._expired += 1
        if entry.id:
            self.ended(entry.id)
        self._finish(1)
        if entry.deadline is not None and telemetry.wanted("scheduler.expired"):
            late = self._clock.time() - entry.deadline
            telemetry.emit("scheduler.expired", {"late_s": late}, {"task_id": entry.id, "type": item.get("type")})
        if self._on_expired is not None:
            try:
                self._on_expired(item)
            except Exception:
                logger.exception("on_expired failed for task %s", entry.id)

    def _most_overdue(self) -> Entry | None:
        """What has waited for ``max_wait``, if it is its turn."""
        line = self._line
        while line and (line[0].item is None or self._is_late(line[0])):
            entry = line.popleft()
            if entry.item is not None:
                self._dead += 1
                self._expire(entry)
        if not line or self._was_overdue:
            return None
        if len(line) > 2 * self._tasks + _MOST_DEAD:
            self._line = deque(entry for entry in line if entry.item is not None)
        assert self.max_wait is not None
        return line[0] if line[0].added + self.max_wait <= self._clock.monotonic() else None

    def _track(self) -> None:
        """Give an entry to every task that waits, and from now on to every one that comes."""
        if self._tracking:
            return
        self._tracking, waiting = True, self._heap.entries()
        self._heap.clear()
        for priority, sequence, item in sorted(waiting, key=lambda each: each[1]):
            if isinstance(item, dict) and 0 <= priority < LANES:
                entry = Entry(item, priority, sequence)
                if entry.id:
                    self._by_id[entry.id] = entry
                self._tasks += 1
                item = entry  # noqa: PLW2901
            self._heap.insert(priority, sequence, item)

    def _own_level(self, task_id: str) -> int | None:
        entry = self._by_id.get(task_id)
        return self._waits.own(task_id) if entry is None else entry.own

    def _move(self, task_ids: Iterable[str]) -> None:
        """Put those that wait here, and are more or less urgent than before, where they belong."""
        for task_id in task_ids:
            entry = self._by_id.get(task_id)
            if entry is None:
                continue
            level = self._waits.level(task_id, entry.own)
            if level != entry.level:
                self._heap.insert(level, entry.sequence, entry.moved(level))
                self._dead += 1  # the place it had
        if self._dead > _MOST_DEAD and self._dead > len(self):
            self._bury()

    def _bury(self) -> None:
        """Throw the dead out of the heap. O(n), after as many moves."""
        entries, self._dead = self._heap.entries(), 0
        self._heap.clear()
        for priority, sequence, item in entries:
            if type(item) is not Entry or item.task() is not None:
                self._heap.insert(priority, sequence, item)

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
            if (item := self.pop_nowait()) is not None:  # else a *_nowait call, clear() or a deadline was faster
                return item

    def _leave(self, ticket: int, waiter: asyncio.Future[None]) -> None:
        """Cancelled while waiting; or after being woken, then the promise passes to the next in line."""
        if waiter.done() and not waiter.cancelled():
            self._promised -= 1
            self._wake()
        elif (ticket, waiter) in self._waiters:
            self._waiters.remove((ticket, waiter))

    def _wake(self) -> None:
        """Promise each task that is not promised yet to the longest waiting getter."""
        while self._waiters and len(self) > self._promised:
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
