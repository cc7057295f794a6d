"""Keeps worker processes alive, and as many of them as the load needs.

Owns their starts, restarts and ends. Refuses to run agents and to speak with Redis: each process reports what it does
and what waits over the socket that also tells it that its supervisor is gone. How many are needed is
``_pool.scaling``'s arithmetic, in processes: what a task keeps busy of one is its slot, or its share of the processor, whichever is more.
One event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from orchestra._backoff import Reconnect
from orchestra._pool.scaling import Demand, Scaler, ScalingPolicy
from orchestra.cli._signals import CLOSING, Stopper
from orchestra.cli._status import FAILURE, USAGE
from orchestra.errors import ConfigurationError
from orchestra.tasks import require_int, require_number

if TYPE_CHECKING:
    from orchestra.dispatcher import Dispatcher

logger = logging.getLogger("orchestra.worker")

STEADY = 60.0
"""A worker process that lived so many seconds was well: the next restart is quick again."""
QUICK_END = 5.0
"""Seconds within which a worker process that ends before it is ready has a cause that will not go away."""
KILL_GRACE = 10.0
"""Seconds beyond the drain timeout after which a worker process that does not end is ended; its supervisor waits a
little longer."""
READY = b"r\n"
"""What a worker process tells its supervisor once it takes tasks."""
REPORTS = 4
"""Reports of each process between two decisions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """How many worker processes: ``low`` to ``high``, 1 to 1024. ``interval``: seconds between decisions, 0.1 to 3600;
    ``cooldown``: seconds after a change before fewer are run, 0 to a day.
    """

    low: int
    high: int
    interval: float = 5.0
    cooldown: float = 60.0

    def __post_init__(self) -> None:
        require_int("--processes", self.low, 1, 1024)
        require_int("--processes", self.high, 1, 1024)
        if self.high < self.low:
            raise ConfigurationError(
                f"--processes must be MIN:MAX with MAX at least MIN, got {self.low}:{self.high}",
                field="--processes",
                value=f"{self.low}:{self.high}",
            )
        require_number("--scale-interval", self.interval, 0.1, 3600.0, unit="seconds")
        require_number("--scale-cooldown", self.cooldown, 0.0, 86_400.0, unit="seconds")

    @classmethod
    def parse(cls, text: str, interval: float, cooldown: float) -> Processes:
        """``N`` or ``MIN:MAX``.

        Raises:
            ConfigurationError: it is neither, or a number is out of range.
        """
        low, colon, high = text.partition(":")
        try:
            bounds = int(low), int(high) if colon else int(low)
        except ValueError:
            raise ConfigurationError(
                f"--processes must be N or MIN:MAX, whole numbers from 1 to 1024, got {text!r}",
                field="--processes",
                value=text,
            ) from None
        return cls(low=bounds[0], high=bounds[1], interval=interval, cooldown=cooldown)

    @property
    def elastic(self) -> bool:
        """Whether the number follows the load."""
        return self.low < self.high


class Report(NamedTuple):
    """What a worker process says of itself. ``at``: its monotonic seconds; ``ended``, ``run_s``, ``cpu_s``: since it
    started; ``waiting``: tasks in the lanes of the queue, None when it could not be asked.
    """

    at: float
    running: int
    size: int
    ended: int
    run_s: float
    cpu_s: float
    waiting: int | None


async def report(dispatcher: Dispatcher, fd: int, every: float) -> None:
    """Tell the supervisor at the other end of ``fd`` every so many seconds, until cancelled. One look at the queue each.

    A report that finds no room is dropped: a supervisor that does not listen holds nothing up.
    """
    os.set_blocking(fd, False)
    dispatcher.pool.measuring = True
    runs = dispatcher.pool.run_times
    while True:
        await asyncio.sleep(every)
        waiting = None
        with contextlib.suppress(Exception):  # Redis is out of reach; the dispatcher has said so
            waiting = sum((await dispatcher.queue.stats()).waiting)
        busy, size = dispatcher.running_tasks, dispatcher.pool.concurrency
        said = Report(time.monotonic(), busy, size, runs.count, runs.total, time.process_time(), waiting)
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps(said).encode() + b"\n")


class Place:
    """One of the processes that should run: its present life, and what it has said in it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.leaving = asyncio.Event()
        """Set when fewer are wanted: it is not replaced when it ends."""
        self.child: asyncio.subprocess.Process | None = None
        self.ready = False
        self.reports: list[Report] = []
        """Since the last decision."""
        self.counted: Report | None = None
        """The last one that was part of a decision."""

    def begin(self) -> None:
        """Another process takes the place."""
        self.ready, self.counted = False, None
        self.reports.clear()

    def hear(self, line: bytes) -> None:
        """A line from the process; what is no report is ignored: it may be a part of one."""
        if line == READY:
            self.ready = True
            return
        with contextlib.suppress(ValueError, TypeError):
            facts = json.loads(line)
            if isinstance(facts, list):
                self.reports.append(Report(*facts))


class Load:
    """Turns reports into a :class:`~orchestra._pool.scaling.Demand`, whose workers are processes."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._held = self._backlog = 0
        self._run_time: float | None = None

    def demand(self, places: list[Place], now: float) -> Demand | None:
        """What the reports since the last call say; None when there are none. Takes them."""
        said = [(place.counted or place.reports[0], place.reports) for place in places if place.reports]
        if not said:
            return None
        lasts = [reports[-1] for _, reports in said]
        busy = [report.running / max(1, report.size) for _, reports in said for report in reports]
        cpu = [(reports[-1].cpu_s - base.cpu_s) / max(0.001, reports[-1].at - base.at) for base, reports in said]
        waits = [report.waiting for _, reports in said for report in reports if report.waiting is not None]
        held = sum(report.running for report in lasts)
        backlog = min((report.waiting for report in lasts if report.waiting is not None), default=self._backlog)
        arrived, ended = self._rates(said, now, held + backlog - self._held - self._backlog)
        self._at, self._held, self._backlog = now, held, backlog
        for place in places:
            if place.reports:
                place.counted, place.reports = place.reports[-1], []
        peak = min(1.0, max(*busy, *cpu))
        return Demand(
            at=now,
            size=len(places),
            load=min(1.0, max(sum(busy) / len(busy), sum(cpu) / len(cpu))),
            peak_load=peak,
            peak_running=math.ceil(peak * len(places)),
            backlog=backlog,
            waited=min(waits, default=0),
            most_waited=max(waits, default=0),
            arrival_rate=arrived,
            throughput=ended,
            run_time=self._run_time,
        )

    def _rates(
        self, said: list[tuple[Report, list[Report]]], now: float, more: int
    ) -> tuple[float | None, float | None]:
        """Tasks a second that came, and that ended; learns how long a task keeps one process busy."""
        ended = sum(reports[-1].ended - base.ended for base, reports in said)
        if ended:
            slots = sum(reports[-1].size for _, reports in said) / len(said)
            run_s = sum(reports[-1].run_s - base.run_s for base, reports in said)
            cpu_s = sum(reports[-1].cpu_s - base.cpu_s for base, reports in said)
            self._run_time = max(run_s / slots, cpu_s) / ended
        if self._at is None:
            return None, None
        passed = max(0.001, now - self._at)
        return max(0.0, (ended + more) / passed), ended / passed


class Supervisor:
    """Keeps ``processes`` alive. They end when it does, whatever ends it: each watches a socket to it."""

    def __init__(self, arguments: list[str], processes: Processes, drain_timeout: float) -> None:
        self._command = [sys.executable, "-m", "orchestra.cli", "worker", *arguments]
        if processes.elastic:
            self._command.append(f"--report={processes.interval / REPORTS}")
        self._processes = processes
        self._drain_timeout = drain_timeout
        self._places: dict[int, Place] = {}
        self._was_ready = False
        self._refused = 0
        self._stopper = Stopper(self._kill_all)

    def run(self) -> int:
        """Until a signal comes, or a child says that its configuration is wrong; the exit status."""
        with self._stopper:
            return asyncio.run(self._run())

    async def _run(self) -> int:
        self._stopper.attach()
        low, high = self._processes.low, self._processes.high
        most = f", up to {high} as the load needs them" if self._processes.elastic else ""
        logger.info("starting %d worker process%s%s", low, "" if low == 1 else "es", most)
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._resize(low)
            scaling = group.create_task(self._scale()) if self._processes.elastic else None
            await self._stopper.event.wait()
            if scaling is not None:
                scaling.cancel()
            self._drain()
        return self._refused or self._stopper.status

    # -- how many

    async def _scale(self) -> None:
        wanted = self._processes
        policy = ScalingPolicy(min_workers=wanted.low, max_workers=wanted.high, cooldown_down=wanted.cooldown)
        scaler, load = Scaler(policy), Load()
        while True:
            await asyncio.sleep(wanted.interval)
            staying = self._staying()
            demand = load.demand(staying, time.monotonic())
            if demand is None:
                continue
            size, why = scaler.decide(demand)
            if size != demand.size:
                logger.info("worker processes %d -> %d: %s", demand.size, size, why)
                self._resize(size)

    def _staying(self) -> list[Place]:
        return [place for _, place in sorted(self._places.items()) if not place.leaving.is_set()]

    def _resize(self, count: int) -> None:
        staying = self._staying()
        for place in staying[count:]:
            place.leaving.set()
            if place.child is not None:
                self._end(place.child)
        free = (number for number in range(1, 10_000) if number not in self._places)
        for _ in range(count - len(staying)):
            place = Place(next(free))
            self._places[place.number] = place
            self._group.create_task(self._keep(place))

    # -- one of them

    async def _keep(self, place: Place) -> None:
        """Run one process, and another when it ends, after a pause that grows while they die soon."""
        backoff = Reconnect(0.5, 30.0)
        try:
            while not self._is_over(place):
                began = time.monotonic()
                try:
                    status, what = await self._live(place)
                except OSError as error:  # no process, no descriptor left: that may pass
                    status, place.ready, what = 0, True, f"could not be started: {error}"
                if self._is_over(place):
                    return
                lived = time.monotonic() - began
                hopeless = status in (USAGE, FAILURE) and not place.ready and lived < QUICK_END and not backoff.failures
                if hopeless and not (self._processes.elastic and self._was_ready):
                    self._give_up(place.number, status)
                    return
                if lived > STEADY:
                    backoff.reset()
                wait = backoff.next()
                logger.error("worker %d %s; another starts in %.1f s", place.number, what, wait)
                await self._pause(place, wait)
        finally:
            del self._places[place.number]

    def _is_over(self, place: Place) -> bool:
        return self._stopper.event.is_set() or place.leaving.is_set()

    async def _pause(self, place: Place, seconds: float) -> None:
        waits = {asyncio.ensure_future(event.wait()) for event in (self._stopper.event, place.leaving)}
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()

    async def _live(self, place: Place) -> tuple[int, str]:
        """One life of a worker process: its exit status, and how to call its end."""
        ours, its = socket.socketpair()
        place.begin()
        with ours:
            with its:
                child = await asyncio.create_subprocess_exec(
                    *self._command,
                    f"--parent-fd={its.fileno()}",
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(its.fileno(),),
                    start_new_session=True,  # a Ctrl-C in the terminal is for the supervisor, which passes it on once
                )
            place.child = child
            listening = asyncio.ensure_future(self._listen(place, ours))
            try:
                if self._is_over(place):
                    self._end(child)
                status = await child.wait()
                await asyncio.wait((listening,), timeout=1.0)  # what it said last; its children may hold its end open
            finally:
                listening.cancel()
                place.child = None
            return status, f"(pid {child.pid}) {_ending(status)}"

    async def _listen(self, place: Place, ours: socket.socket) -> None:
        """Hear the process out."""
        reader, writer = await asyncio.open_connection(sock=ours)
        with contextlib.closing(writer):  # not sooner: a process whose socket is closed takes its supervisor for dead
            while True:
                try:
                    line = await reader.readline()
                except ValueError:  # a line without an end
                    continue
                except OSError:
                    return
                if not line:
                    return
                place.hear(line)
                self._was_ready = self._was_ready or place.ready

    # -- their end

    def _give_up(self, number: int, status: int) -> None:
        """A child that fails at once the first time has said why; its successors would say the same."""
        if not self._refused:
            logger.error("worker %d could not start: stopping", number)
        self._refused = status
        self._stopper.event.set()

    def _end(self, child: asyncio.subprocess.Process) -> None:
        """Let it drain, and kill it when it does not end."""
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        patience = self._drain_timeout + KILL_GRACE + CLOSING
        asyncio.get_running_loop().call_later(patience, _kill, child)

    def _drain(self) -> None:
        children = [place.child for place in self._places.values() if place.child is not None]
        logger.info("draining %d worker processes; a second signal ends them at once", len(children))
        for child in children:
            self._end(child)

    def _kill_all(self, _status: int) -> None:
        for place in list(self._places.values()):
            if place.child is not None:
                _kill(place.child)


def _kill(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


def say_ready(fd: int) -> None:
    """Tell the supervisor at the other end that this process takes tasks."""
    with contextlib.suppress(OSError):
        os.write(fd, READY)
