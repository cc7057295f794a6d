"""Watches a worker pool, recommends a size for it, and resizes it if it is told to.

Owns sampling, the rates that follow from the samples, and the recommendation as a value with its reasons; the arithmetic
is ``_pool.scaling``'s. Acts only with ``autoscale``: else resizing is the decision of whoever reads
``last_recommendation`` or listens to ``manager.recommendation``.
Two background loops (sample, evaluate) belong to the service; what is sampled may fail without ending them.
One event loop only; not thread-safe.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any, NamedTuple, Protocol, runtime_checkable

from orchestra import telemetry
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra._lifecycle import Service
from orchestra._pool.metrics import Histogram
from orchestra._pool.scaling import Demand, Scaler, ScalingPolicy
from orchestra.tasks import require_int, require_number

logger = logging.getLogger("orchestra.worker_manager")


@runtime_checkable
class ObservedPool(Protocol):
    """What is sampled. Of a :class:`~orchestra.orchestration_worker_pool.QueueWorkerPool` also ``concurrency``, how many
    tasks may run at once, and ``run_times`` and ``wait_times``; ``resize`` is called with ``autoscale``.
    """

    def get_active_workers(self) -> int:
        """Worker tasks alive."""

    def get_queue_size(self) -> int:
        """Submitted, not started."""

    def get_running_tasks(self) -> int:
        """Started, not finished."""


@runtime_checkable
class ObservedQueue(Protocol):
    """A task queue, as far as it is sampled. Where it has ``stats()``, that is asked instead: it tells what waits now
    from what is delayed until later.
    """

    async def get_queue_depth(self) -> int:
        """Tasks that are not terminal."""


class PoolSample(NamedTuple):
    """One look at the pool. ``at``: monotonic seconds; ``depth``: live tasks of the queue, None without a queue or when
    it could not be asked; ``size``: how many tasks could run at once; ``waiting``: tasks of the queue that wait in a lane;
    ``ended``: tasks that ended so far. None is unknown.
    """

    at: float
    size: int
    active: int
    queued: int
    running: int
    depth: int | None
    waiting: int | None = None
    ended: int | None = None

    @property
    def utilisation(self) -> float:
        """Share of the pool that is busy, 0.0 to 1.0."""
        return min(1.0, self.running / self.size) if self.size else float(self.running > 0)

    @property
    def backlog(self) -> int:
        """Tasks known to wait: submitted ones, and those of the queue beyond what runs here."""
        if self.waiting is not None:
            return self.queued + self.waiting
        return self.queued + max(0, (self.depth or 0) - self.running - self.queued)


class ScalingRecommendation(NamedTuple):
    """What the pool's size should be, and why. ``utilisation``: mean of the window; ``backlog``: the last seen.

    ``arrival_rate``, ``throughput``: tasks a second that came and that ended; ``run_time``: mean seconds;
    ``wait_p95``: seconds that 95 % of submitted jobs waited at the most. None is unknown.
    """

    at: float
    current: int
    recommended: int
    reason: str
    utilisation: float
    backlog: int
    samples: int
    arrival_rate: float | None = None
    throughput: float | None = None
    run_time: float | None = None
    wait_p95: float | None = None

    @property
    def change(self) -> int:
        """Workers to add, or to take away when negative."""
        return self.recommended - self.current


class WorkerManager(Service):
    """Samples ``worker_pool`` and its ``queue``, and recommends a size between ``min_workers`` and ``max_workers``.

    The size that is needed follows from Little's law: arrival rate times mean run time, over ``target_utilisation``, plus
    what works the backlog off within ``target_wait`` seconds. More is recommended when the mean utilisation since the last
    evaluation is ``scale_up_at`` or above and work always waited, or when the backlog would take longer than
    ``target_wait``; less when the utilisation was ``scale_down_at`` or below, or three quarters are enough. One change is at most by ``max_step`` times,
    and comes no sooner than ``cooldown_up``, ``cooldown_down`` seconds after the last one; a smaller size must have been
    enough during all of ``cooldown_down``. Of a pool that tells no run times only utilisation and backlog are used.

    ``autoscale``: resize the pool as recommended. A dispatcher that was given the pool runs up to its
    ``max_concurrent_dispatch`` at once, whatever the pool's size: give it ``max_workers``.
    ``monitor_interval``, ``scale_check_interval``: seconds between samples and between evaluations, > 0, at most a day.
    ``history``: the last ``history_size`` recommendations, oldest first.
    Cost: one question to the queue a sample, where one is given; 0.2 µs a task while it runs.

    Raises:
        ConfigurationError: a number is out of range.
        TypeError: ``worker_pool`` or ``queue`` cannot be observed, or ``worker_pool`` not resized.
    """

    def __init__(
        self,
        worker_pool: ObservedPool,
        monitor_interval: float = 15,
        scale_check_interval: float = 60,
        *,
        queue: ObservedQueue | None = None,
        autoscale: bool = False,
        min_workers: int = 1,
        max_workers: int = 1000,
        target_utilisation: float = 0.6,
        target_wait: float = 10.0,
        scale_up_at: float = 0.8,
        scale_down_at: float = 0.3,
        max_step: float = 2.0,
        cooldown_up: float = 0.0,
        cooldown_down: float = 300.0,
        history_size: int = 100,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__()
        if not isinstance(worker_pool, ObservedPool):
            raise TypeError(f"worker_pool must have get_active_workers() and its like, got {worker_pool!r}")
        if queue is not None and not isinstance(queue, ObservedQueue):
            raise TypeError(f"queue must have get_queue_depth(), got {queue!r}")
        _check_intervals(monitor_interval, scale_check_interval)
        require_int("history_size", history_size, 1, 100_000, unit="recommendations")
        self.policy = ScalingPolicy(
            min_workers=min_workers,
            max_workers=max_workers,
            target_utilisation=target_utilisation,
            target_wait=target_wait,
            scale_up_at=scale_up_at,
            scale_down_at=scale_down_at,
            max_step=max_step,
            cooldown_up=cooldown_up,
            cooldown_down=cooldown_down,
        )
        self.autoscale = autoscale
        if autoscale:
            _check_resizable(worker_pool, min_workers, max_workers)
        self._pool, self._queue = worker_pool, queue
        self.monitor_interval, self.scale_check_interval = float(monitor_interval), float(scale_check_interval)
        self.history: deque[ScalingRecommendation] = deque(maxlen=history_size)
        self.last_sample: PoolSample | None = None
        self.last_error: Exception | None = None
        """What the last sample or resize ran into; None when it succeeded."""
        self.errors = 0
        """Samples and resizes that ran into an error, since the manager exists."""
        self._window: deque[PoolSample] = deque(maxlen=1000)
        self._before: PoolSample | None = None  # the last one of the window before
        self._runs: Histogram | None = None  # as it was then
        self._waits: Histogram | None = None
        self._run_time: float | None = None
        self._scaler = Scaler(self.policy)
        self._clock = clock

    @property
    def last_recommendation(self) -> ScalingRecommendation | None:
        """The latest recommendation; None before the first evaluation that had a sample."""
        return self.history[-1] if self.history else None

    @property
    def healthy(self) -> bool:
        """Whether the manager runs and its last sample succeeded."""
        return self.running and self._failure is None and self.last_error is None

    async def sample(self) -> PoolSample | None:
        """Look at the pool and the queue now; None, and one log line a streak, when the pool cannot be observed."""
        depth, waiting, error = await self._depth()
        try:
            sample = self._look(depth, waiting)
        except Exception as caught:  # noqa: BLE001 - the pool is foreign code, whatever it raises is a finding
            self._note(caught)
            return None
        self._note(error)
        self.last_sample = sample
        self._window.append(sample)
        return sample

    def evaluate(self) -> ScalingRecommendation | None:
        """Recommend a size from the samples since the last evaluation; None when there are none. Changes nothing."""
        if not self._window:
            return None
        samples = list(self._window)
        self._window.clear()
        demand = self._demand(samples)
        size, reason = self._scaler.decide(demand)
        advice = ScalingRecommendation(
            demand.at,
            demand.size,
            size,
            reason,
            demand.load,
            demand.backlog,
            len(samples),
            demand.arrival_rate,
            demand.throughput,
            demand.run_time,
            self._wait_p95(),
        )
        self._before = samples[-1]
        self.history.append(advice)
        self._announce(advice)
        return advice

    def apply(self, advice: ScalingRecommendation) -> bool:
        """Resize the pool as recommended: it grows at once, and shrinks as its present items end.

        False when there is nothing to change, or the pool refused; that is logged, and in ``last_error``.
        """
        if not advice.change:
            return False
        try:
            self._pool.resize(advice.recommended)  # type: ignore[attr-defined]  # _check_resizable
        except Exception as error:  # noqa: BLE001 - foreign code
            self._note(error, "resize")
            return False
        return True

    # -- inside

    async def _start(self) -> None:
        await self.sample()
        self.spawn("worker_manager.monitor", self._monitor)
        self.spawn("worker_manager.scale", self._scale)

    async def _monitor(self) -> None:
        while True:
            await asyncio.sleep(self.monitor_interval)
            await self.sample()

    async def _scale(self) -> None:
        while True:
            await asyncio.sleep(self.scale_check_interval)
            advice = self.evaluate()
            if advice is not None and self.autoscale:
                self.apply(advice)

    async def _stop(self) -> None:
        if hasattr(self._pool, "measuring"):
            self._pool.measuring = False

    async def _depth(self) -> tuple[int | None, int | None, Exception | None]:
        """The queue's depth and how many of it wait; or why that is unknown: it does not hide the pool."""
        if self._queue is None:
            return None, None, None
        try:
            if (ask := getattr(self._queue, "stats", None)) is not None:
                stats = await ask()
                return int(stats.live), int(sum(stats.waiting)), None
            return int(await self._queue.get_queue_depth()), None, None
        except Exception as error:  # noqa: BLE001 - foreign code
            return None, None, error

    def _look(self, depth: int | None, waiting: int | None) -> PoolSample:
        pool = self._pool
        active = pool.get_active_workers()
        size = getattr(pool, "concurrency", None)
        runs = getattr(pool, "run_times", None)
        if getattr(pool, "measuring", None) is False:
            pool.measuring = True  # type: ignore[attr-defined]
        return PoolSample(
            at=self._clock.monotonic(),
            size=size if type(size) is int else active,
            active=active,
            queued=pool.get_queue_size(),
            running=pool.get_running_tasks(),
            depth=depth,
            waiting=waiting,
            ended=runs.count if isinstance(runs, Histogram) else None,
        )

    def _demand(self, samples: list[PoolSample]) -> Demand:
        last = samples[-1]
        loads = [sample.utilisation for sample in samples]
        backlogs = [sample.backlog for sample in samples]
        arrived, ended = self._rates(self._before or samples[0], last)
        self._measure_runs()
        return Demand(
            at=last.at,
            size=last.size,
            load=sum(loads) / len(loads),
            peak_load=max(loads),
            peak_running=max(sample.running for sample in samples),
            backlog=last.backlog,
            waited=min(backlogs),
            most_waited=max(backlogs),
            arrival_rate=arrived,
            throughput=ended,
            run_time=self._run_time,
        )

    def _rates(self, first: PoolSample, last: PoolSample) -> tuple[float | None, float | None]:
        """Tasks a second that came, and that ended. What came has either ended or is still there."""
        passed = last.at - first.at
        if passed <= 0.0 or first.ended is None or last.ended is None:
            return None, None
        ended = (last.ended - first.ended) / passed
        more = last.backlog + last.running - first.backlog - first.running
        return max(0.0, ended + more / passed), ended

    def _measure_runs(self) -> None:
        runs = getattr(self._pool, "run_times", None)
        if not isinstance(runs, Histogram):
            return
        lately = runs.since(self._runs) if self._runs is not None else runs
        if lately.count:  # else what was known holds on: long tasks end rarely
            self._run_time = lately.mean
        self._runs = runs.copy()

    def _wait_p95(self) -> float | None:
        waits = getattr(self._pool, "wait_times", None)
        if not isinstance(waits, Histogram):
            return None
        lately = waits.since(self._waits) if self._waits is not None else waits
        p95 = lately.percentile(0.95) if lately.count else None
        self._waits = waits.copy()
        return p95

    def _note(self, error: Exception | None, what: str = "observe") -> None:
        if error is not None:
            self.errors += 1
            if self.last_error is None:
                logger.warning("the worker manager cannot %s %s: %r", what, self._name, error)
        self.last_error = error

    def _announce(self, advice: ScalingRecommendation) -> None:
        level = logging.INFO if advice.change else logging.DEBUG
        logger.log(level, "pool %s: %d -> %d: %s", self._name, advice.current, advice.recommended, advice.reason)
        if telemetry.wanted("manager.recommendation"):
            telemetry.emit(
                "manager.recommendation",
                {"current": advice.current, "recommended": advice.recommended},
                {"pool": self._name, "reason": advice.reason},
            )

    @property
    def _name(self) -> Any:
        return getattr(self._pool, "name", type(self._pool).__name__)


def _check_intervals(monitor: float, scale: float) -> None:
    require_number("monitor_interval", monitor, 0.0, 86_400.0, unit="seconds", exclusive=True)
    require_number("scale_check_interval", scale, 0.0, 86_400.0, unit="seconds", exclusive=True)


def _check_resizable(pool: ObservedPool, low: int, high: int) -> None:
    if not callable(getattr(pool, "resize", None)):
        raise TypeError(f"autoscale needs a worker_pool with resize(), got {pool!r}")
    require_int("min_workers", low, 1, 100_000, unit="workers (with autoscale)")
    require_int("max_workers", high, 1, 100_000, unit="workers (with autoscale)")
