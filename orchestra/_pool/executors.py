"""Runs plain functions in threads or processes, and knows which of them go on after they were given up.

A function cannot be cancelled. A caller that is cancelled gets its CancelledError at once; the function is *left*: its
thread or process is busy until it returns, what it returns is dropped. Left functions are counted, and up to ``limit``
of their threads are replaced, so that a function that hangs costs memory, not the work of all others. Beyond that
capacity shrinks, which ``capacity`` says. Neither kind keeps the interpreter from ending, as the standard executors do:
threads are daemons, processes end when :meth:`close` or the death of this process closes their pipe.

Refuses to know agents and tasks. Both classes may be used from several event loops and their threads at once.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection
from queue import SimpleQueue
from typing import Any, Protocol

STRAY_CHILD = 70
"""Exit status (EX_SOFTWARE) of a forked child that came back into its parent's engine."""


class Left(Protocol):
    """A function whose caller was cancelled. ``since``: monotonic seconds."""

    since: float

    @property
    def running(self) -> bool:
        """Whether it goes on."""


def leave_child() -> None:
    """End a forked child that returned from an agent: event loop, sockets and tasks belong to its parent."""
    with suppress(OSError):
        os.write(2, b"orchestra: a forked child returned from its agent; it ends here, its parent goes on\n")
    os._exit(STRAY_CHILD)


# -- threads


class _State(enum.Enum):
    WAITING = 0
    RUNNING = 1
    LEFT = 2
    DONE = 3


class _Job:
    """One call. ``state`` changes under the lock of its threads."""

    __slots__ = ("argument", "context", "error", "function", "future", "loop", "since", "state", "value")

    def __init__(self, function: Callable[[Any], Any], argument: Any) -> None:
        self.function = function
        self.argument = argument
        self.context = contextvars.copy_context()
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.state = _State.WAITING
        self.since = 0.0
        self.value: Any = None
        self.error: BaseException | None = None

    @property
    def running(self) -> bool:
        return self.state is _State.LEFT

    def run(self) -> None:
        try:
            self.value = self.context.run(self.function, self.argument)
        except (StopIteration, KeyboardInterrupt, GeneratorExit) as error:
            # a future refuses the first, and the others would end the event loop, which nobody has interrupted
            self.error = RuntimeError(f"the function raised {error!r}")
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever awaits the call
            self.error = error

    def deliver(self) -> None:
        with suppress(RuntimeError):  # its loop is closed
            self.loop.call_soon_threadsafe(self._resolve)

    def _resolve(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.value)


class _Crew:
    """What the threads share; it must not know :class:`FunctionThreads`, whose end is theirs."""

    def __init__(self, limit: int, name: str) -> None:
        self.limit, self.name = limit, name
        self.lock = threading.Lock()
        self.work: SimpleQueue[_Job | None] = SimpleQueue()
        self.alive = self.idle = self.waiting = self.left = self.made = 0
        self.closed = False

    @property
    def most(self) -> int:
        """Threads there may be now: those of left functions are replaced, up to as many again."""
        return self.limit + min(self.left, self.limit)

    def submit(self, job: _Job) -> None:
        with self.lock:
            if self.closed:
                raise RuntimeError("the threads of plain functions were closed")
            self.waiting += 1
            try:
                self.grow()
            except BaseException:
                self.waiting -= 1
                raise
            self.work.put(job)

    def grow(self) -> None:
        while self.waiting > self.idle and self.alive < self.most:
            self.made += 1
            thread = threading.Thread(target=_work, args=(self,), name=f"{self.name}_{self.made}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more of them
                if not self.alive:
                    raise
                return
            self.alive += 1
            self.idle += 1

    def give_up(self, job: _Job) -> bool:
        """Whether ``job`` goes on without its caller; one that waits for a thread will not run."""
        with self.lock:
            running = job.state is _State.RUNNING
            if job.state is not _State.DONE:
                job.state = _State.LEFT if running else _State.DONE
            if running:
                job.since = time.monotonic()
                self.left += 1
                self.grow()
            return running

    def close(self) -> None:
        with self.lock:
            self.closed = True
            while not self.work.empty():
                job = self.work.get_nowait()
                if job is not None:
                    job.error = asyncio.CancelledError()
                    with suppress(RuntimeError):
                        job.loop.call_soon_threadsafe(job.future.cancel)
            for _ in range(self.idle):
                self.work.put(None)


def _work(crew: _Crew) -> None:
    """A thread's life."""
    pid = os.getpid()
    while (job := crew.work.get()) is not None:
        with crew.lock:
            crew.waiting -= 1
            if job.state is _State.DONE:
                continue
            job.state = _State.RUNNING
            crew.idle -= 1
        job.run()
        if os.getpid() != pid:
            leave_child()
        with crew.lock:
            left, job.state = job.state is _State.LEFT, _State.DONE
            crew.left -= left
            surplus = crew.closed or crew.alive > crew.most
            if surplus:
                crew.alive -= 1
            else:
                crew.idle += 1
        if not left:
            job.deliver()
        del job  # what it holds must not live until the next one comes
        if surplus:
            return


class FunctionThreads:
    """Up to ``limit`` daemon threads, made on demand, called ``<name>_<number>``."""

    def __init__(self, limit: int, name: str) -> None:
        self._crew = _Crew(limit, name)
        self._left: dict[int, _Job] = {}
        weakref.finalize(self, _Crew.close, self._crew).atexit = False

    @property
    def left(self) -> int:
        """Functions that go on after they were given up."""
        return self._crew.left

    @property
    def capacity(self) -> int:
        """Functions that can run for somebody, out of ``limit``."""
        return max(0, self._crew.most - self._crew.left)

    async def run(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """``function(argument)`` in a thread, in a copy of the caller's context. About 25 µs.

        Raises:
            RuntimeError: the threads are closed, or the system has no thread to give.
            asyncio.CancelledError: the caller was cancelled; :meth:`left_by` tells whether the function goes on.
        """
        job = _Job(function, argument)
        self._crew.submit(job)
        try:
            return await job.future
        except asyncio.CancelledError:
            if self._crew.give_up(job):
                self._left = {key: each for key, each in self._left.items() if each.running}
                self._left[id(argument)] = job
            raise

    def left_by(self, argument: Any) -> Left | None:
        """The call of ``argument`` that was given up and goes on."""
        job = self._left.get(id(argument))
        return job if job is not None and job.argument is argument and job.running else None

    def close(self) -> None:
        """End idle threads now and busy ones after their function; functions that have not begun are cancelled."""
        self._crew.close()


# -- processes


class _LeftProcess:
    """A call that was given up, in a process."""

    __slots__ = ("argument", "call", "since")

    def __init__(self, call: Future[Any], argument: Any) -> None:
        self.call, self.argument = call, argument
        self.since = time.monotonic()

    @property
    def running(self) -> bool:
        return not self.call.done()


class _Fleet:
    """One pool of processes and the pipe whose end is theirs."""

    def __init__(self, size: int) -> None:
        # spawn: a forked child would share the parent's sockets and locks held by its threads
        context = multiprocessing.get_context("spawn")
        reader, self._writer = context.Pipe(duplex=False)
        self._reader = reader  # for processes that are started later
        self.pool = ProcessPoolExecutor(size, mp_context=context, initializer=_be_child, initargs=(reader,))
        self.replaced = False

    def end(self) -> None:
        """End its processes now, whatever they do, and fail what waits for them."""
        self._writer.close()
        self.pool.shutdown(wait=False, cancel_futures=True)


class FunctionProcesses:
    """``size`` processes. When functions that were given up fill them all, they are ended and made anew."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._fleet: _Fleet | None = None
        self._left: dict[int, _LeftProcess] = {}
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        """Functions that go on after they were given up."""
        with self._lock:
            self._left = {key: call for key, call in self._left.items() if call.running}
            return len(self._left)

    async def run(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """``function(argument)`` in a process; both, and the result, must be picklable.

        Raises:
            BrokenProcessPool: a process died; what was in the others fails with it.
            asyncio.CancelledError: the caller was cancelled; :meth:`left_by` tells whether the function goes on.
        """
        while True:
            fleet = self._ready()
            try:
                call = fleet.pool.submit(function, argument)
            except RuntimeError as error:
                if fleet.replaced or (isinstance(error, BrokenProcessPool) and self._forget(fleet)):
                    continue
                raise
            try:
                return await asyncio.wrap_future(call)
            except asyncio.CancelledError:
                if not fleet.replaced or _being_cancelled():
                    self._give_up(fleet, call, argument)
                    raise
            except BrokenProcessPool:
                if not fleet.replaced:
                    self._forget(fleet)
                    raise
            # functions that were given up filled its processes, so this one had not begun: once more

    def left_by(self, argument: Any) -> Left | None:
        """The call of ``argument`` that was given up and goes on."""
        left = self._left.get(id(argument))
        return left if left is not None and left.argument is argument and left.running else None

    def close(self) -> None:
        """End the processes now, whatever they do."""
        with self._lock:
            fleet, self._fleet = self._fleet, None
            self._left.clear()
        if fleet is not None:
            fleet.end()

    def _ready(self) -> _Fleet:
        with self._lock:
            if self._fleet is None:
                self._fleet = _Fleet(self._size)
            return self._fleet

    def _forget(self, fleet: _Fleet) -> bool:
        """Let the next call make new processes; whether ``fleet`` was the present one."""
        with self._lock:
            present = self._fleet is fleet
            if present:
                self._fleet = None
        fleet.pool.shutdown(wait=False)
        return present

    def _give_up(self, fleet: _Fleet, call: Future[Any], argument: Any) -> None:
        if call.cancel() or call.done():
            return
        with self._lock:
            self._left[id(argument)] = _LeftProcess(call, argument)
        if self._fleet is fleet and self.left >= self._size:
            fleet.replaced = True
            self._forget(fleet)
            fleet.end()


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _be_child(reader: connection.Connection) -> None:
    """Ctrl-C reaches the whole process group; only the parent decides what it means. Its death ends the child."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    ends = [reader] if parent is None else [reader, parent.sentinel]
    threading.Thread(target=_end_with, args=(ends,), name="parent-watch", daemon=True).start()


def _end_with(ends: list[Any]) -> None:
    connection.wait(ends)
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(1)
