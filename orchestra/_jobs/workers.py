"""Who runs the tasks of a job: a dispatcher in this process, or some in processes of their own.

Owns starting, draining and replacing them, and telling :class:`Tally` what they do. A child gets its orders as one JSON
line on standard input, which stays open: ``drain`` asks it to end well, its end means that the parent died, and then
the child interrupts what it runs, releases it and ends. On standard output it tells, as JSON lines, what its
dispatcher does; what agents print goes to standard error. What is told is counted by :mod:`orchestra._jobs.tally`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from orchestra import _process
from orchestra._front.loading import load_app
from orchestra._jobs.tally import Event, Tally, watch
from orchestra.app import App
from orchestra.dispatcher import Dispatcher
from orchestra.errors import ConfigurationError, OrchestraError

DRAIN = 10.0
"""Seconds that running agents get to finish."""
LAST_RESORT = 5.0
"""Seconds after which an orphan whose loop does not react ends itself."""
TELL_EVERY = 0.2
QUICK_DEATH = 5.0
"""A worker process that lives shorter counts towards giving up."""
GIVE_UP = 5
"""Quick deaths in a row after which the job is given up."""


class Workers(Protocol):
    """What runs the tasks of a job."""

    async def start(self) -> None:
        """Begin; returns when tasks are being taken."""

    async def failed(self) -> None:
        """Wait for as long as all is well. Raises: OrchestraError when it cannot go on."""

    async def stop(self) -> None:
        """Drain: finish what runs within :data:`DRAIN` seconds, release the rest."""


class LocalWorkers:
    """A dispatcher in this process."""

    def __init__(self, app: App, concurrency: int | None, tally: Tally) -> None:
        self._dispatcher: Dispatcher = app.worker(concurrency=concurrency, drain_timeout=DRAIN)
        self._tally = tally
        self._detach: Callable[[], None] | None = None

    async def start(self) -> None:
        """Begin."""
        self._detach = watch(self._tally.take)
        await self._dispatcher.start()

    async def failed(self) -> None:
        """Wait for the dispatcher to fail."""
        await _ended(self._dispatcher)

    async def stop(self) -> None:
        """Drain."""
        await self._dispatcher.stop()
        if self._detach is not None:
            self._detach()
            self._detach = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a worker process is to do. ``redis`` may hold a password, so it does not travel on a command line."""

    target: str
    redis: str | None
    queue: str
    settings: dict[str, Any]
    concurrency: int | None
    processors: int


async def _ended(dispatcher: Dispatcher) -> None:
    """Wait until ``dispatcher`` has stopped; unlike its ``run()``, being cancelled leaves it as it is."""
    await dispatcher._stopped.wait()
    if dispatcher._failure is not None:
        raise dispatcher._failure


class ProcessWorkers:
    """Worker processes; one that dies is replaced."""

    def __init__(self, orders: Orders, count: int, tally: Tally) -> None:
        self._orders = orders
        self._count = count
        self._tally = tally
        self._stopping = False
        self._failure: asyncio.Future[None] | None = None
        self._children: set[asyncio.subprocess.Process] = set()
        self._keepers: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the processes; returns when each of them takes tasks."""
        loop = asyncio.get_running_loop()
        self._failure = loop.create_future()
        ready = [loop.create_future() for _ in range(self._count)]
        self._keepers = {loop.create_task(self._keep(one)) for one in ready}
        await asyncio.wait((self._failure, asyncio.gather(*ready)), return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            await self.stop()
            self._failure.result()

    async def failed(self) -> None:
        """Wait for a process that cannot be kept alive."""
        assert self._failure is not None, "start() comes first"
        await asyncio.shield(self._failure)

    async def _keep(self, ready: asyncio.Future[None]) -> None:
        """Run one process, and another when it dies."""
        quick = 0
        while True:
            began = time.monotonic()
            fault = await self._run_one(ready)
            if self._stopping:
                return
            self._tally.restarts += 1
            quick = quick + 1 if time.monotonic() - began < QUICK_DEATH else 0
            if fault or quick >= GIVE_UP:
                self._fail(fault or f"worker processes die at once ({quick} times in a row)")
                return
            await asyncio.sleep(0.1 * 2**quick)

    async def _run_one(self, ready: asyncio.Future[None]) -> str:
        """One life of a process; returns what it says is wrong, if it says so."""
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            __name__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the parent, which decides what it means
            limit=1 << 24,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        self._children.add(child)
        running: Counter[str] = Counter()
        fault = ""
        try:
            child.stdin.write(json.dumps(asdict(self._orders)).encode() + b"\n")
            async for line in child.stdout:
                said = json.loads(line)
                fault = said.get("fault", fault)
                for event in said.get("events", ()):
                    self._count_one(tuple(event), running)
                if "ready" in said and not ready.done():
                    ready.set_result(None)
            await child.wait()
        finally:
            self._children.discard(child)
            for task_type, count in running.items():  # what a dead process was running does not run any more
                self._tally.of(task_type).running -= count
        return fault

    def _count_one(self, event: Any, running: Counter[str]) -> None:
        if event[0] == "breaker":
            self._tally.take(event)
            return
        task_type = event[2]
        before = self._tally.running_of(task_type)
        self._tally.take(event)
        running[task_type] += self._tally.running_of(task_type) - before

    def _fail(self, why: str) -> None:
        assert self._failure is not None
        if not self._failure.done():
            self._failure.set_exception(
                ConfigurationError(f"the worker processes cannot run: {why}", field="processes")
            )

    async def stop(self) -> None:
        """Let every process drain; end those that do not within :data:`DRAIN` seconds and a little."""
        self._stopping = True
        for child in self._children:
            with contextlib.suppress(OSError, RuntimeError):
                assert child.stdin is not None
                child.stdin.write(b"drain\n")
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=DRAIN + LAST_RESORT)
            for child in list(self._children) if late else ():
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
            await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._failure is not None:
            self._failure.cancel()


def kill_processes(app: App) -> None:
    """End the processes of plain functions now: an interpreter that exits waits for what they are doing."""
    app.agents.close()


# -- the child


class _Voice:
    """Tells the parent. The pipe is the child's real standard output; what agents print goes to standard error."""

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.dup2(2, 1)
        self._events: list[Event] = []

    def take(self, event: Event) -> None:
        self._events.append(event)

    def say(self, **facts: Any) -> None:
        with contextlib.suppress(OSError):  # a dead parent is noticed at the other pipe
            data = memoryview(json.dumps(facts).encode() + b"\n")
            while data:
                data = data[os.write(self._fd, data) :]

    def flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self.say(events=events)


class _Parent(threading.Thread):
    """Hears the parent: ``drain``, or its death."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(name="job-parent", daemon=True)
        self._loop = loop
        self.heard: asyncio.Future[bool] = loop.create_future()
        """Whether to drain; False: the parent is dead."""

    def run(self) -> None:
        line = sys.stdin.readline()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._tell, line.strip() == "drain")
        if line:
            sys.stdin.readline()
        time.sleep(LAST_RESORT)  # after the parent's death only
        os._exit(1)

    def _tell(self, drain: bool) -> None:
        if not self.heard.done():
            self.heard.set_result(drain)


async def _work(orders: Orders, voice: _Voice) -> None:
    parent = _Parent(asyncio.get_running_loop())
    parent.start()
    app = load_app(orders.target).bind(redis=orders.redis, queue=orders.queue, **orders.settings)
    app.agents.processors = orders.processors
    dispatcher = app.worker(concurrency=orders.concurrency, drain_timeout=DRAIN)
    detach = watch(voice.take)
    try:
        async with app:
            _process.set_heap_aside()
            await dispatcher.start()
            ended = asyncio.ensure_future(_ended(dispatcher))
            voice.say(ready=True)
            while not parent.heard.done() and not ended.done():
                await asyncio.wait((parent.heard, ended), timeout=TELL_EVERY)
                voice.flush()
            if parent.heard.done() and not parent.heard.result():
                dispatcher._drain_timeout = 0.0  # an orphan gives everything back at once
            await dispatcher.stop()
            kill_processes(app)
            await ended
    finally:
        detach()
        voice.flush()


def main() -> int:
    """A worker process: orders on standard input."""
    voice = _Voice()
    orders = Orders(**json.loads(sys.stdin.readline()))
    try:
        _process.run(_work(orders, voice))
    except OrchestraError as error:
        voice.say(fault=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
