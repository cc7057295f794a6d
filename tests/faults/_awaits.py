"""Cancels a coroutine at its k-th suspension, for every k, or k loop iterations after it began; and looks what is left.

Four moments at a suspension: ``running`` (in the step that leads to it: the task is to notice when it begins to wait;
what the SIGINT handler of ``asyncio.run`` does), ``now`` (while it begins to wait), ``soon`` (one loop iteration into it)
and ``done`` (in the very iteration in which what it waits for is done, before it wakes). ``asyncio.wait_for`` of
Python 3.11 loses cancellations at the first and the last. A second cancellation may follow at the k2-th suspension after
the first.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

LIMIT = float(os.environ.get("ORCHESTRA_TEST_LIMIT", "30"))
"""Seconds after which an operation, or what it left behind, counts as hanging."""

Make = Callable[[], Coroutine[Any, Any, Any]]


@dataclass
class Run:
    """How one operation ended. ``fired``: its task was cancelled before it was done; ``missed``: in its last step."""

    fired: int = 0
    missed: bool = False
    value: Any = None
    error: BaseException | None = None
    awaits: int = 0

    @property
    def cancelled(self) -> bool:
        return isinstance(self.error, asyncio.CancelledError)


class _Stepped:
    """Awaits ``coroutine``; counts its suspensions, and cancels ``victim`` (or its own task) at the chosen ones."""

    victim: asyncio.Task | None = None

    def __init__(self, coroutine: Coroutine[Any, Any, Any], run: Run, at: int, how: str, again: int) -> None:
        self.coroutine, self.run, self.at, self.how, self.again = coroutine, run, at, how, again
        self.since = 0

    def __await__(self):
        steps = self.coroutine.__await__()
        value: Any = None
        error: BaseException | None = None
        while True:
            fires = self.how == "running" and self.run.awaits == self.at - 1 and not self.run.fired
            if fires:
                self._fire(self.victim or asyncio.current_task())
            try:
                waited = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as end:
                if fires:  # it was the last step: the operation could not notice, and has done its work
                    self.run.fired, self.run.missed, self.run.value = 0, True, end.value
                return end.value
            self._suspended(waited)
            try:
                value, error = (yield waited), None
            except BaseException as raised:
                value, error = None, raised

    def _suspended(self, waited: Any) -> None:
        self.run.awaits += 1
        if self.run.fired:
            self.since += 1
            if self.since == self.again:
                self._fire(self.victim or asyncio.current_task())
        elif self.run.awaits == self.at:
            task = self.victim or asyncio.current_task()
            if self.how == "now":
                self._fire(task)
            elif self.how == "done" and isinstance(waited, asyncio.Future):
                waited.add_done_callback(lambda _: self._fire(task))
            else:
                asyncio.get_running_loop().call_soon(self._fire, task)

    def _fire(self, task: asyncio.Task) -> None:
        self.run.fired += task.cancel()


async def cancelled_at(make: Make, at: int, how: str = "now", again: int = 0) -> Run:
    """Run ``make()`` in a task that is cancelled at its suspension ``at`` (from 1), and ``again`` suspensions later."""
    run = Run()
    stepped = _Stepped(make(), run, at, how, again)

    async def whole() -> Any:
        return await stepped

    return await _outcome(asyncio.create_task(whole()), run)


async def cancelled_inside(
    make: Make, place: Callable[[Callable], None], at: int, how: str = "now", again: int = 0
) -> Run:
    """As :func:`cancelled_at`, by the suspensions of a coroutine that ``make()`` has run in another task.

    ``place(wrap)`` is to put ``wrap`` around that coroutine; the task of ``make()`` is the one that is cancelled.
    """
    run = Run()

    async def wrap(coroutine: Coroutine[Any, Any, Any]) -> Any:
        stepped = _Stepped(coroutine, run, at, how, again)
        stepped.victim = task
        return await stepped

    place(wrap)
    task = asyncio.create_task(make())
    return await _outcome(task, run)


async def cancelled_after(make: Make, ticks: int) -> Run:
    """Run ``make()`` in a task that is cancelled after ``ticks`` iterations of the loop."""
    run = Run()
    loop = asyncio.get_running_loop()
    task = loop.create_task(make())

    def tick(left: int) -> None:
        if task.done():
            return
        if left:
            loop.call_soon(tick, left - 1)
        else:
            run.fired += task.cancel()

    tick(ticks)
    return await _outcome(task, run)


async def _outcome(task: asyncio.Task, run: Run) -> Run:
    await asyncio.wait((task,), timeout=LIMIT)
    assert task.done(), f"hangs after its cancellation: {task.get_stack()}"
    if run.missed:
        return run
    if task.cancelled():
        run.error = asyncio.CancelledError()
    elif task.exception() is not None:
        run.error = task.exception()
    else:
        run.value = task.result()
    return run


async def at_every_await(
    prepare: Callable[[], Any], *, how: str = "now", again: int = 0, most: int = 200
) -> AsyncIterator:
    """For k = 1, 2, … until it completes uncancelled: ``prepare()`` (a coroutine function) gives the operation; yields
    ``(k, run)``. The last run is the one that was not cancelled.
    """
    for k in range(1, most):
        make = await prepare()
        before = asyncio.all_tasks()
        run = await cancelled_at(make, k, how, again)
        judge(run, f"{how} at await {k}")
        await no_new_tasks(before)
        yield k, run
        if not run.fired:
            return
    raise AssertionError(f"not done after {most} suspensions")


async def at_every_tick(prepare: Callable[[], Any], *, most: int = 60, step: int = 1) -> AsyncIterator:
    """The same by loop iterations, ``most`` of them at the most: replies come after an unknown number of them."""
    for ticks in range(0, most, step):
        make = await prepare()
        before = asyncio.all_tasks()
        run = await cancelled_after(make, ticks)
        judge(run, f"after {ticks} iterations")
        await no_new_tasks(before)
        yield ticks, run
        if not run.fired:
            return


def judge(run: Run, when: str) -> None:
    """Whoever is cancelled ends with CancelledError: it is neither swallowed nor turned into something else."""
    if run.fired:
        assert run.cancelled, f"cancelled {when}, but it ended with {run.error!r} or {run.value!r}"
    else:
        assert run.error is None, f"not cancelled, but it ended with {run.error!r}"


async def no_new_tasks(before: set[asyncio.Task]) -> None:
    """What the operation had going in the background ends by itself."""
    try:
        async with asyncio.timeout(LIMIT):
            while new_tasks(before):
                await asyncio.sleep(0.0005)
    except TimeoutError:
        raise AssertionError(f"left running: {new_tasks(before)}") from None


def new_tasks(before: set[asyncio.Task], *, all_of_them: bool = False) -> set[asyncio.Task]:
    """Tasks that were not there ``before``, without those that live as long as a queue, a lock or a pool, and this one."""
    new = asyncio.all_tasks() - before - {asyncio.current_task()}
    if all_of_them:
        return new
    lasting = re.compile("orchestra:(replies|lock:.*|.*:worker)")
    return {task for task in new if not lasting.fullmatch(task.get_name())}


async def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until ``condition()`` (awaited if need be) is true."""
    value = None
    try:
        async with asyncio.timeout(LIMIT):
            while True:
                value = condition()
                if asyncio.iscoroutine(value):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true: {value!r}") from None


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("orchestra")]
