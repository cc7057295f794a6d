"""Watches a worker pool and recommends a size for it.

Owns sampling and the recommendation; refuses to act on it: resizing is the decision of whoever reads
``last_recommendation`` or listens to ``manager.recommendation``.
Two background loops (sample, evaluate) belong to the service; what is sampled may fail without ending them.
One event loop only; not thread-safe.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from typing import Any, NamedTuple, Protocol, runtime_checkable

from orchestra import telemetry
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra._lifecycle import Service
from orchestra.errors import ConfigurationError
from orchestra.tasks import require_int, require_number

logger = logging.getLogger("orchestra.worker_manager")

MAX_STEP = 2.0
"""A recommendation at most doubles or halves the pool: one window says little about what lies beyond."""

TARGET = 0.6
"""Utilisation that a smaller pool would have at the highest load seen: between the two thresholds, so sizes settle."""


@runtime_checkable
class ObservedPool(Protocol):
    """What is sampled. ``concurrency``, how many tasks may run at once, is used too where the pool has it."""

    def get_active_workers(self) -> int:
        """Worker tasks alive."""

    def get_queue_size(self) -> int:
        """Submitted, not started."""

    def get_running_tasks(self) -> int:
        """Started, not finished."""


@runtime_checkable
class ObservedQueue(Protocol):
    """A task queue, as far as it is sampled."""

    async def get_queue_depth(self) -> int:
        """Tasks that are not terminal."""


class PoolSample(NamedTuple):
    """One look at the pool. ``at``: monotonic seconds; ``depth``: live tasks of the queue, None without a queue or when
    it could not be asked; ``size``: how many tasks could run at once.
    """

    at: float
    size: int
    active: int
    queued: int
    running: int
    depth: int | None

    @property
    def utilisation(self) -> float:
        """Share of the pool that is busy, 0.0 to 1.0."""
        return min(1.0, self.running / self.size) if self.size else float(self.running > 0)

    @property
    def backlog(self) -> int:
        """Tasks known to wait: submitted ones, and those of the queue beyond what runs here."""
        return self.queued + max(0, (self.depth or 0) - self.running - self.queued)


class ScalingRecommendation(NamedTuple):
    """What the pool's size should be, and why. ``utilisation``: mean of the window; ``backlog``: the last seen."""

    at: float
    current: int
    recommended: int
    reason: str
    utilisation: float
    backlog: int
    samples: int

    @property
    def change(self) -> int:
        """Workers to add, or to take away when negative."""
        return self.recommended - self.current


class WorkerManager(Service):
    """Samples ``worker_pool`` and its ``queue``, and recommends a size between ``min_workers`` and ``max_workers``.

    More is recommended when the mean utilisation since the last evaluation is ``scale_up_at`` or above and work waited
    in every sample; less when even the highest stayed at ``scale_down_at`` or below and none waited. Between the two
    nothing changes. ``monitor_interval``, ``scale_check_interval``: seconds between samples and between evaluations,
    > 0, at most a day. ``history``: the last ``history_size`` recommendations, oldest first.
    Cost: one ``get_queue_depth`` a sample where a queue is given.

    Raises:
        ConfigurationError: a number is out of range.
        TypeError: ``worker_pool`` or ``queue`` cannot be observed.
    """

    def __init__(
        self,
        worker_pool: ObservedPool,
        monitor_interval: float = 15,
        scale_check_interval: float = 60,
        *,
        queue: ObservedQueue | None = None,
        min_workers: int = 1,
        max_workers: int = 1000,
        scale_up_at: float = 0.8,
        scale_down_at: float = 0.3,
        history_size: int = 100,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__()
        if not isinstance(worker_pool, ObservedPool):
            raise TypeError(f"worker_pool must have get_active_workers() and its like, got {worker_pool!r}")
        if queue is not None and not isinstance(queue, ObservedQueue):
            raise TypeError(f"queue must have get_queue_depth(), got {queue!r}")
        _check_intervals(monitor_interval, scale_check_interval)
        _check_bounds(min_workers, max_workers, scale_up_at, scale_down_at)
        require_int("history_size", history_size, 1, 100_000, unit="recommendations")
        self._pool, self._queue = worker_pool, queue
        self.monitor_interval, self.scale_check_interval = float(monitor_interval), float(scale_check_interval)
        self.min_workers, self.max_workers = min_workers, max_workers
        self.scale_up_at, self.scale_down_at = scale_up_at, scale_down_at
        self.history: deque[ScalingRecommendation] = deque(maxlen=history_size)
        self.last_sample: PoolSample | None = None
        self.last_error: Exception | None = None
        """What the last sample ran into; None when it succeeded."""
        self.errors = 0
        """Samples that ran into an error, since the manager exists."""
        self._window: deque[PoolSample] = deque(maxlen=1000)
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
        depth, error = await self._depth()
        try:
            sample = self._look(depth)
        except Exception as caught:  # noqa: BLE001 - the pool is foreign code, whatever it raises is a finding
            self._note(caught)
            return None
        self._note(error)
        self.last_sample = sample
        self._window.append(sample)
        return sample

    def evaluate(self) -> ScalingRecommendation | None:
        """Recommend a size from the samples since the last evaluation; None when there are none."""
        if not self._window:
            return None
        samples = list(self._window)
        self._window.clear()
        last = samples[-1]
        load = sum(sample.utilisation for sample in samples) / len(samples)
        size, reason = self._decide(samples, load)
        advice = ScalingRecommendation(
            self._clock.monotonic(), last.size, size, reason, load, last.backlog, len(samples)
        )
        self.history.append(advice)
        self._announce(advice)
        return advice

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
            self.evaluate()

    async def _depth(self) -> tuple[int | None, Exception | None]:
        """The queue's depth, or why it is unknown: a queue that cannot be asked does not hide the pool."""
        if self._queue is None:
            return None, None
        try:
            return int(await self._queue.get_queue_depth()), None
        except Exception as error:  # noqa: BLE001 - foreign code
            return None, error

    def _look(self, depth: int | None) -> PoolSample:
        pool = self._pool
        active = pool.get_active_workers()
        size = getattr(pool, "concurrency", None)
        return PoolSample(
            at=self._clock.monotonic(),
            size=size if type(size) is int else active,
            active=active,
            queued=pool.get_queue_size(),
            running=pool.get_running_tasks(),
            depth=depth,
        )

    def _note(self, error: Exception | None) -> None:
        if error is not None:
            self.errors += 1
            if self.last_error is None:
                logger.warning("the worker manager cannot observe %s: %r", self._name, error)
        self.last_error = error

    def _decide(self, samples: list[PoolSample], load: float) -> tuple[int, str]:
        size = samples[-1].size
        peak = max(sample.running for sample in samples)
        waited = min(sample.backlog for sample in samples)
        idle = max(sample.backlog for sample in samples) == 0
        if load >= self.scale_up_at and waited > 0:
            wanted = min(math.ceil(size * MAX_STEP), size + waited)
            return self._bound(wanted, f"{load:.0%} busy and at least {waited} tasks waited")
        if idle and max(sample.utilisation for sample in samples) <= self.scale_down_at:
            wanted = max(math.ceil(size / MAX_STEP), math.ceil(peak / TARGET))
            return self._bound(min(wanted, size), f"at most {peak} of {size} busy and nothing waited")
        return self._bound(size, f"{load:.0%} busy, {samples[-1].backlog} waiting: nothing to change")

    def _bound(self, wanted: int, reason: str) -> tuple[int, str]:
        bounded = min(max(wanted, self.min_workers), self.max_workers)
        if bounded != wanted:
            limit = "min_workers" if bounded > wanted else "max_workers"
            reason = f"{reason} (held at {limit}={bounded})"
        return bounded, reason

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


def _check_bounds(low: int, high: int, up: float, down: float) -> None:
    require_int("min_workers", low, 0, 1_000_000, unit="workers")
    require_int("max_workers", high, 1, 1_000_000, unit="workers")
    if high < low:
        raise ConfigurationError(
            f"max_workers must be at least min_workers, which is {low}, got {high}", field="max_workers", value=high
        )
    require_number("scale_up_at", up, 0.0, 1.0, exclusive=True)
    require_number("scale_down_at", down, 0.0, 1.0)
    if down >= up:
        raise ConfigurationError(
            f"scale_down_at must be below scale_up_at, which is {up!r}, got {down!r}",
            field="scale_down_at",
            value=down,
        )
