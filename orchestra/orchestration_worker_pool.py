"""Runs jobs concurrently in long-lived worker coroutines that pull from sources.

A worker takes an item from a source and awaits its run inline: no asyncio.Task per item. Before it runs one it *passes
the baton*, waking one more idle worker if there is more to do; that worker only gets its turn when the first one
suspends, so a burst of items that never suspend is run by one worker, and items that do suspend spread over all.
All workers of a pool share a time budget per turn of the event loop, after which they let the loop breathe.

``submit`` feeds the pool's own prioritised queue, itself a source; a dispatcher attaches another. Limits concurrency,
counts, measures; knows nothing of queues or agents. One event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from orchestra import telemetry
from orchestra._agents.services import current_slot
from orchestra._pool.beginning import awaken, begin
from orchestra._pool.jobs import Job, JobQueue, check_job, checked_limits
from orchestra._pool.metrics import Histogram, OrchestrationWorkerPoolMetrics
from orchestra._pool.slots import MORE, More, Slot, Source
from orchestra.errors import WorkerPoolError
from orchestra.tasks import Outcome, TaskPriority, check_name, require_int, require_number

__all__ = [
    "Histogram",
    "OrchestrationWorkerPoolConfig",
    "OrchestrationWorkerPoolMetrics",
    "QueueWorkerPool",
    "Slot",
    "Source",
]

T = TypeVar("T")
logger = logging.getLogger("orchestra.pool")

TURN = 0.002
"""Seconds of work per turn of the event loop before I/O and timers get theirs."""
REPLACE_AFTER = 0.01
"""Seconds after which somebody follows a worker that has ended: a loop that cancels all its tasks is closed by then."""
AT_ONCE = 64
"""Workers that begin a turn together, at the most, after one that was too short for all: about what fills it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestrationWorkerPoolConfig:
    """How much a pool does at once.

    ``workers``: worker coroutines, 1 to 100,000, made on demand. ``max_concurrent_tasks``: jobs running at once; the
    smaller of the two counts. ``max_queue_size``: jobs waiting in the pool's own queue, 0 for no limit.
    ``shutdown_timeout``: seconds that ``shutdown(wait=True)`` waits for running jobs before it cancels them.
    ``per_type``: kind of job → how many of that kind run at once, 1 to 100,000 each; other kinds have no limit but those
    of the pool. A full kind blocks no other.
    """

    workers: int = 100
    max_queue_size: int = 10_000
    max_concurrent_tasks: int = 100
    shutdown_timeout: float = 30.0
    per_type: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_int("OrchestrationWorkerPoolConfig.workers", self.workers, 1, 100_000, unit="workers")
        require_int("OrchestrationWorkerPoolConfig.max_queue_size", self.max_queue_size, 0, 1 << 31, unit="jobs")
        require_int(
            "OrchestrationWorkerPoolConfig.max_concurrent_tasks", self.max_concurrent_tasks, 1, 100_000, unit="tasks"
        )
        require_number(
            "OrchestrationWorkerPoolConfig.shutdown_timeout", self.shutdown_timeout, 0.0, 86_400.0, unit="seconds"
        )
        object.__setattr__(self, "per_type", checked_limits("OrchestrationWorkerPoolConfig.per_type", self.per_type))


class QueueWorkerPool:
    """Runs submitted coroutines and attached sources with bounded concurrency.

    The example of the specification::

        pool = QueueWorkerPool("processing_pool", OrchestrationWorkerPoolConfig(workers=4))
        future = await pool.submit(process_item, "item-1")
        result = await future
        await pool.shutdown(wait=True, timeout=30.0)
    """

    def __init__(self, name: str, config: OrchestrationWorkerPoolConfig | None = None) -> None:
        self.name = check_name("pool name", name)
        self.config = config or OrchestrationWorkerPoolConfig()
        self.concurrency = min(self.config.workers, self.config.max_concurrent_tasks)
        self.capacity = self.concurrency
        """Items that can run at once now: the concurrency, less what stuck slots beyond as many again take away."""
        self.metrics = OrchestrationWorkerPoolMetrics()
        self.wait_times, self.run_times = self.metrics.wait_times, self.metrics.run_times
        self.measuring = False
        """Whether somebody wants the run times of what other sources run, too; set by a worker manager."""
        self._jobs = JobQueue(self.config.per_type, self._dropped)
        self._sources: list[Source] = [self]
        self.slots: set[Slot] = set()
        self.stuck: set[Slot] = set()
        """Slots whose item ignores its cancellation; others have taken their places."""
        self._idle: deque[Slot] = deque()
        self._changed: asyncio.Event | None = None
        self.closed = False
        self._turn_ends, self._turning, self._looped = 0.0, False, True
        self._parked = 0
        """Workers among the idle ones that only wait for the next turn of the event loop."""

    # -- submitting

    async def submit(
        self,
        func: Callable[..., Coroutine[Any, Any, T]],
        *args: Any,
        priority: int = TaskPriority.NORMAL,
        timeout: float | None = 0.0,
        kind: str | None = None,
        **kwargs: Any,
    ) -> asyncio.Future[T]:
        """Queue ``func(*args, **kwargs)`` and return the future of its result. O(log n).

        ``timeout``: seconds to wait for room in a full queue; 0 refuses at once, None waits as long as it takes.
        ``kind``: what sort of job it is, for the limits of ``OrchestrationWorkerPoolConfig.per_type``.

        Raises:
            WorkerPoolError: the pool is shut down, or its queue stayed full.
            ConfigurationError: ``timeout`` is negative or no number, ``priority`` no int, or ``kind`` no str.
        """
        if timeout is not None:
            require_number("submit(timeout)", timeout, 0.0, 366 * 86_400.0, unit="seconds (or None)")
        if len(self._jobs) >= (self.config.max_queue_size or len(self._jobs) + 1) and not self.closed:
            await self._wait_for_room(timeout)
        if kind is not None:
            kwargs["kind"] = kind  # only where it is used: a subclass may know nothing of it
        return self.submit_nowait(func, *args, priority=priority, **kwargs)

    def submit_nowait(
        self,
        func: Callable[..., Coroutine[Any, Any, T]],
        *args: Any,
        priority: int = TaskPriority.NORMAL,
        kind: str | None = None,
        **kwargs: Any,
    ) -> asyncio.Future[T]:
        """:meth:`submit` without waiting for room."""
        check_job(priority, kind)
        if self.closed:
            self.metrics.rejected += 1
            raise WorkerPoolError(f"worker pool {self.name!r} is shut down; make a new one")
        limit = self.config.max_queue_size
        if limit and len(self._jobs) >= limit:
            self.metrics.rejected += 1
            raise WorkerPoolError(
                f"worker pool {self.name!r} has {limit} jobs queued, its max_queue_size; submit later"
            )
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.push(priority, Job(func, args, kwargs, future, kind))
        self.metrics.submitted += 1
        self.metrics.queued_tasks = len(self._jobs)
        self.wake()
        return future

    async def _wait_for_room(self, timeout: float | None) -> None:
        if timeout == 0.0:
            return
        try:
            async with asyncio.timeout(timeout):
                while not self.closed and len(self._jobs) >= self.config.max_queue_size:
                    await self._next_change()
        except TimeoutError:
            return

    # -- the pool's own queue, as a source

    def start_nowait(self, slot: Slot, until: float) -> Awaitable[None] | None:
        """The most urgent job that is still wanted and whose kind has room."""
        if not len(self._jobs):
            return None
        job = self._jobs.pop()
        self.metrics.queued_tasks = len(self._jobs)
        self._note_change()
        if job is None:
            return None
        slot.source, slot.item = self, job
        return self._run_job(job, slot)

    def _dropped(self) -> None:
        self.metrics.cancelled += 1

    async def _run_job(self, item: Job[Any], slot: Slot) -> None:
        """Run a job and resolve its future. Cancelling the future cancels the job."""
        began = time.monotonic()
        self.wait_times.add(began - item.queued_at)
        future = item.future
        task = slot.task
        assert task is not None

        def cancelled(done: asyncio.Future[Any]) -> None:
            if done.cancelled() and slot.item is item:  # called a turn later, when another item may run here
                slot.interrupt(Outcome.CANCELLED)

        future.add_done_callback(cancelled)
        try:
            result = await item.func(*item.args, **item.kwargs)
        except asyncio.CancelledError:
            self.metrics.cancelled += 1
            future.cancel()
            if slot.why is None and task.cancelling():
                raise  # the worker itself is being cancelled
        except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the future
            self.metrics.failed += 1
            if not future.done():
                future.set_exception(error)
        except BaseException as error:
            if not future.done():
                future.set_exception(WorkerPoolError(f"job raised {error!r}"))
            raise
        else:
            self.metrics.completed += 1
            if not future.done():
                future.set_result(result)
        finally:
            self.run_times.add(time.monotonic() - began)
            if item.kind is not None and self._jobs.ended(item):
                self.wake()

    # -- workers

    def attach(self, source: Source) -> None:
        """Let the workers pull from ``source`` too, before the pool's own queue."""
        self._sources.insert(0, source)

    def detach(self, source: Source) -> None:
        """Stop pulling from ``source``."""
        if source in self._sources:
            self._sources.remove(source)

    def wake(self, count: int = 1) -> None:
        """Tell ``count`` workers that a source has something; they wake one another as far as needed. O(count)."""
        while self._idle and count > 0:
            waiter = self._idle.popleft().waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
                count -= 1
        while count > 0 and len(self.slots) < self.capacity:
            self._spawn()
            count -= 1

    def _waiting(self) -> int:
        """Items that could start, about; at least one where a source does not tell."""
        told = [getattr(source, "waiting", None) for source in self._sources if source is not self]
        return sum([1 if ask is None else ask() for ask in told], len(self._jobs))

    def begin(self) -> None:
        """:meth:`wake` for a callback of the event loop: an idle worker begins now (:mod:`orchestra._pool.beginning`).

        Not from a task. It takes no more time of this turn of the loop than workers do.
        """
        now, slot = time.monotonic(), self._idle[0] if self._idle else None
        in_time = now < self._turn_ends or self._looped
        waiting = slot is not None and slot.waiter is not None and not slot.waiter.done()
        if not (in_time and waiting) or self.closed or len(self.slots) > self.capacity:
            self.wake()
            return
        if now >= self._turn_ends:
            self._begin_turn(now)
        slot = self._idle.popleft()
        if not begin(slot, self._start_nowait):
            self._idle.append(slot)
            self._note_change()

    def _spawn(self) -> None:
        slot = Slot()
        self.slots.add(slot)
        self.metrics.active_workers = len(self.slots)
        slot.home = contextvars.copy_context()
        slot.task = asyncio.Task(  # by no task factory: an eager one would run it here and now
            self._work(slot), loop=asyncio.get_running_loop(), name=f"orchestra:{self.name}:worker", context=slot.home
        )
        slot.task.add_done_callback(lambda task: self._ended(slot, task))

    def _ended(self, slot: Slot, task: asyncio.Task[None]) -> None:
        self.slots.discard(slot)
        self.metrics.active_workers = len(self.slots)
        self._note_change()
        if not task.cancelled() and task.exception() is not None:
            logger.error("a worker of pool %s ended", self.name, exc_info=task.exception())
        if self._waiting():  # its agent may have cancelled it; somebody is to do what it was to do
            asyncio.get_running_loop().call_later(REPLACE_AFTER, self._replace)

    def _replace(self) -> None:
        if not self.closed:
            self.wake()

    def _start_nowait(self, slot: Slot) -> Awaitable[None] | More | None:
        metrics = self.metrics
        if metrics.running_tasks >= self.capacity:
            return None
        metrics.running_tasks += 1
        rest: Awaitable[None] | More | None = None
        try:
            for source in self._sources:
                rest = source.start_nowait(slot, self._turn_ends)
                if rest is not None:
                    break
        finally:  # what an agent raises to end the process, or its worker, comes out of here
            if rest is None or rest is MORE:
                metrics.running_tasks -= 1
        return rest

    async def _work(self, slot: Slot) -> None:
        clock, task = time.monotonic, slot.task
        assert task is not None
        current_slot.set(slot)
        woken = True
        while len(self.slots) <= self.capacity and not task.cancelling():
            rest: Awaitable[None] | None = None
            if clock() < self._turn_ends or await self._breathe():
                started = self._start_nowait(slot)
                if started is MORE:
                    continue
                if started is None and self.closed:
                    break
                rest = started
            else:
                self._parked += 1
            if rest is None:
                await self._rest(slot)
                woken = True
                rest, slot.rest = slot.rest, None
                if rest is None:
                    continue
            if woken:
                self.wake(min(1, self._waiting()))  # the baton: the next has its turn while this one waits
                woken = False
            try:
                await rest
            finally:
                if slot.abandoned:
                    self._recovered(slot)
                else:
                    self.metrics.running_tasks -= 1
                if slot.why is not None:
                    task.uncancel()  # an interruption is one cancellation; whatever the item made of it, it is over
                slot.item = slot.source = slot.why = slot.deadline = slot.context = None
            if slot.abandoned:
                return  # another has its place
        surplus = len(self.slots) > self.capacity
        self.slots.discard(slot)  # now, not when the task is done: the next worker to look counts those that stay
        if surplus and not task.cancelling():
            self.wake()  # a surplus worker was woken instead of one that stays

    # -- items that do not end

    def abandon(self, slot: Slot) -> bool:
        """Give up the interrupted item of ``slot``, which does not end, and let another worker take its place.

        What it does from now on is not counted. True while capacity is kept: that is so for as many stuck
        slots as the pool has places; each one beyond takes a place away until its item ends.
        """
        slot.abandoned = True
        self.slots.discard(slot)
        self.stuck.add(slot)
        self.metrics.running_tasks -= 1
        self._count_stuck()
        self.wake()
        return self.capacity == self.concurrency

    def _recovered(self, slot: Slot) -> None:
        self.stuck.discard(slot)
        self._count_stuck()
        if not self.closed:
            self.wake()

    def _count_stuck(self) -> None:
        self.metrics.stuck_tasks = len(self.stuck)
        self.metrics.active_workers = len(self.slots)
        self.capacity = max(0, self.concurrency - max(0, len(self.stuck) - self.concurrency))
        for source in self._sources:
            if (told := getattr(source, "capacity_changed", None)) is not None:
                told()
        self._note_change()

    async def _breathe(self) -> bool:
        """Begin a new turn; False for a worker that is to rest, because another is about to begin it.

        However many are too late for a turn, one of them waits for the next, which wakes as many as may fill it: if all
        looked whether it has come, each turn would cost as much as there are workers.
        """
        now = time.monotonic()
        if self._looped and now - self._turn_ends > TURN:  # nothing ran lately, and the loop has had its chance
            self._begin_turn(now)
            return True
        if self._turning:
            return False
        self._turning = True
        try:
            await asyncio.sleep(0)
        finally:
            self._turning = False
            self._begin_turn(time.monotonic())
            parked, self._parked = self._parked, 0
            if parked:
                self.wake(min(parked, AT_ONCE, self._waiting()))
        return True

    def _begin_turn(self, now: float) -> None:
        self._turn_ends, self._looped = now + TURN, False
        asyncio.get_running_loop().call_soon(self._loop_ran)

    def _loop_ran(self) -> None:
        """The loop has had a turn since the last one began: agents that take longer than TURN do not hide that it has not."""
        self._looped = True

    async def _rest(self, slot: Slot) -> None:
        slot.waiter = asyncio.get_running_loop().create_future()
        self._idle.append(slot)
        self._note_change()
        await awaken(slot)

    # -- size and end

    def resize(self, concurrency: int) -> None:
        """Run up to ``concurrency`` items at once from now on; surplus workers end after their present item."""
        require_int("concurrency", concurrency, 1, 100_000, unit="tasks")
        old, self.concurrency = self.concurrency, concurrency
        self._count_stuck()
        telemetry.emit("pool.resized", {"old": old, "new": concurrency}, {"pool": self.name})
        self.wake()

    def get_active_workers(self) -> int:
        """Worker coroutines that exist."""
        return len(self.slots)

    def get_queue_size(self) -> int:
        """Jobs waiting in the pool's own queue."""
        return len(self._jobs)

    def get_running_tasks(self) -> int:
        """Jobs being run, of all sources."""
        return self.metrics.running_tasks

    async def join(self) -> None:
        """Wait until the pool's own queue is empty and nothing runs."""
        while len(self._jobs) or self.metrics.running_tasks:
            await self._next_change()

    async def shutdown(self, wait: bool = True, timeout: float | None = None) -> None:
        """Take no more jobs and end the workers.

        ``wait``: let queued and running jobs finish, up to ``timeout`` seconds (default: ``shutdown_timeout``); what is
        left then, or all when not waiting, is cancelled, and its futures too: awaiting them never hangs.
        """
        self.closed = True
        if wait:
            try:
                async with asyncio.timeout(self.config.shutdown_timeout if timeout is None else timeout):
                    await self.join()
            except TimeoutError:
                logger.warning("pool %s: %d jobs did not finish in time", self.name, self.metrics.running_tasks)
        for job in self._jobs.clear():
            job.future.cancel()
        self.metrics.queued_tasks = 0
        self._note_change()
        tasks = [slot.task for slot in self.slots if slot.task is not None and slot.task is not asyncio.current_task()]
        for slot in self.stuck:  # they have been waited for already
            if slot.task is not None and slot.task is not asyncio.current_task():
                slot.task.cancel()
        for task in tasks:
            task.cancel()
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=1.0)
            for slot in self.slots:
                if slot.task in stuck and isinstance(slot.item, Job):
                    slot.item.future.cancel()
            if stuck:
                logger.error("pool %s: %d jobs ignore their cancellation and are left behind", self.name, len(stuck))

    def _note_change(self) -> None:
        if self._changed is not None:
            self._changed.set()

    async def _next_change(self) -> None:
        self._changed = self._changed or asyncio.Event()
        self._changed.clear()
        await self._changed.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    def __repr__(self) -> str:
        return f"<QueueWorkerPool {self.name} {self.metrics.running_tasks}/{self.concurrency} running, {len(self._jobs)} queued>"
