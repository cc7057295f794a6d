"""How many workers a load needs. Pure arithmetic with a memory of its decisions; times are arguments.

Little's law: tasks that arrive at a rate λ and keep a worker busy for S seconds each keep λ·S workers busy on average
(Little, "A Proof for the Queuing Formula L = λW", 1961). Divided by the utilisation that is wanted, and with what drains
the backlog in time on top, that is the size to have. What is measured is noisy, so a change needs a reason of its own
(busy or waiting; or idle), steps are bounded, and a smaller size must have been enough for a whole cooldown: sizes follow
the load instead of its ripple.
Owns no clock, no pool and no process: ``worker_manager`` and the supervisor of ``orchestra worker`` ask it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from orchestra.errors import ConfigurationError
from orchestra.tasks import require_int, require_number

SLACK = 0.75
"""A size is kept while more than this share of it was needed at some time within the cooldown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPolicy:
    """What is wanted of a size.

    ``min_workers``, ``max_workers``: its bounds, 0 to 1,000,000. ``target_utilisation``: share of the workers that should
    be busy, above 0 to 1. ``target_wait``: seconds within which a backlog should be worked off, above 0 to a day.
    ``scale_up_at``, ``scale_down_at``: mean utilisation from which more, and up to which fewer workers are considered;
    fewer, too, when three quarters of them are enough for the target.
    ``max_step``: factor by which one change grows or shrinks at the most, above 1 to 100.
    ``cooldown_up``, ``cooldown_down``: seconds after a change before the next one up, or down, 0 to a day; what is shrunk
    to is the highest need seen within ``cooldown_down``.
    """

    min_workers: int = 1
    max_workers: int = 1000
    target_utilisation: float = 0.6
    target_wait: float = 10.0
    scale_up_at: float = 0.8
    scale_down_at: float = 0.3
    max_step: float = 2.0
    cooldown_up: float = 0.0
    cooldown_down: float = 300.0

    def __post_init__(self) -> None:
        require_int("min_workers", self.min_workers, 0, 1_000_000, unit="workers")
        require_int("max_workers", self.max_workers, 1, 1_000_000, unit="workers")
        if self.max_workers < self.min_workers:
            raise ConfigurationError(
                f"max_workers must be at least min_workers, which is {self.min_workers}, got {self.max_workers}",
                field="max_workers",
                value=self.max_workers,
            )
        require_number("target_utilisation", self.target_utilisation, 0.0, 1.0, unit="of the workers", exclusive=True)
        require_number("target_wait", self.target_wait, 0.0, 86_400.0, unit="seconds", exclusive=True)
        require_number("scale_up_at", self.scale_up_at, 0.0, 1.0, unit="of the workers", exclusive=True)
        require_number("scale_down_at", self.scale_down_at, 0.0, 1.0, unit="of the workers")
        if self.scale_down_at >= self.scale_up_at:
            raise ConfigurationError(
                f"scale_down_at must be below scale_up_at, which is {self.scale_up_at!r}, got {self.scale_down_at!r}",
                field="scale_down_at",
                value=self.scale_down_at,
            )
        require_number("max_step", self.max_step, 1.0, 100.0, unit="times the size", exclusive=True)
        require_number("cooldown_up", self.cooldown_up, 0.0, 86_400.0, unit="seconds")
        require_number("cooldown_down", self.cooldown_down, 0.0, 86_400.0, unit="seconds")


class Demand(NamedTuple):
    """What was seen since the last decision.

    ``at``: monotonic seconds; ``size``: workers now; ``load``, ``peak_load``: mean and highest share of them that was
    busy; ``peak_running``: most workers busy at once; ``backlog``: tasks waiting now; ``waited``, ``most_waited``: fewest
    and most that waited at any look; ``arrival_rate``, ``throughput``: tasks a second that came and that ended, None when
    unknown; ``run_time``: seconds for which a task keeps one worker busy, None when unknown.
    """

    at: float
    size: int
    load: float
    peak_load: float
    peak_running: int
    backlog: int
    waited: int
    most_waited: int
    arrival_rate: float | None = None
    throughput: float | None = None
    run_time: float | None = None


class Scaler:
    """Decides on sizes, one after the other, for what follows ``policy``."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self.policy = policy
        self._needs: deque[tuple[float, int]] = deque()  # of the last cooldown_down
        self._size: int | None = None
        self._changed_at = self._decided_at = -math.inf
        self._decided = 0

    def decide(self, demand: Demand) -> tuple[int, str]:
        """The size to have, and why. The next demand's ``size`` tells whether it was followed. O(needs remembered)."""
        self._note_change(demand)
        self._decided, why = self._decide(demand)
        self._decided_at = demand.at
        return self._decided, why

    def _decide(self, demand: Demand) -> tuple[int, str]:
        need, why = self._need(demand)
        self._remember(demand.at, need)
        most = max(need for _, need in self._needs)
        if need > demand.size and self._is_short(demand):
            return self._grow(demand, need, why)
        if most < demand.size and self._is_idle(demand, most):
            return self._shrink(demand, most, why)
        return self._bound(demand.size, f"{why}: nothing to change")

    # -- what is needed

    def _need(self, demand: Demand) -> tuple[int, str]:
        policy = self.policy
        rate, run = demand.arrival_rate, demand.run_time
        if rate is None or run is None:
            return self._need_by_load(demand)
        busy = rate * run
        drain = demand.backlog / policy.target_wait / self._speed(demand, run)
        why = f"{rate:.3g} tasks/s x {run:.3g} s = {busy:.3g} busy at {policy.target_utilisation:.0%}"
        if demand.backlog:
            why += f", {demand.backlog} waiting to be drained in {policy.target_wait:g} s"
        return math.ceil(busy / policy.target_utilisation + drain - 1e-9), why

    def _speed(self, demand: Demand, run: float) -> float:
        """Tasks a second that one worker ends: as measured while all had enough to do, else what ``run`` promises."""
        if demand.throughput and demand.size and demand.waited and demand.load >= self.policy.scale_up_at:
            return demand.throughput / demand.size
        return 1.0 / max(run, 1e-9)

    def _need_by_load(self, demand: Demand) -> tuple[int, str]:
        """Without rates: one more for each task that always waited, or what the highest load needs."""
        peak = math.ceil(demand.peak_running / self.policy.target_utilisation - 1e-9)
        if demand.waited:
            return demand.size + demand.waited, f"{demand.load:.0%} busy and at least {demand.waited} tasks waited"
        if demand.most_waited:
            return max(demand.size, peak), f"{demand.load:.0%} busy, {demand.backlog} waiting"
        return peak, f"at most {demand.peak_running} of {demand.size} busy and nothing waited"

    def _remember(self, at: float, need: int) -> None:
        needs = self._needs
        while needs and needs[0][0] < at - self.policy.cooldown_down:
            needs.popleft()
        while needs and needs[-1][1] <= need:  # a later one that is no smaller outlives it
            needs.pop()
        needs.append((at, need))

    # -- whether to act

    def _is_short(self, demand: Demand) -> bool:
        if demand.load >= self.policy.scale_up_at and demand.waited:
            return True
        speed = demand.throughput / demand.size if demand.throughput and demand.size else 0.0
        late = speed > 0.0 and demand.backlog / (speed * demand.size) > self.policy.target_wait
        return demand.size == 0 or (demand.waited > 0 and late)

    def _is_idle(self, demand: Demand, most: int) -> bool:
        if demand.arrival_rate is not None and demand.run_time is not None:  # then what waits is part of the need
            return demand.load <= self.policy.scale_down_at or most <= SLACK * demand.size
        return demand.peak_load <= self.policy.scale_down_at and demand.most_waited == 0

    def _note_change(self, demand: Demand) -> None:
        if self._size is not None and demand.size != self._size:
            self._changed_at = self._decided_at if demand.size == self._decided else demand.at
        self._size = demand.size

    def _grow(self, demand: Demand, need: int, why: str) -> tuple[int, str]:
        left = self._changed_at + self.policy.cooldown_up - demand.at
        if left > 0:
            return self._bound(demand.size, f"{why} (held: cooling down for {left:.3g} s)")
        return self._bound(min(need, max(1, math.ceil(demand.size * self.policy.max_step))), why)

    def _shrink(self, demand: Demand, need: int, why: str) -> tuple[int, str]:
        left = self._changed_at + self.policy.cooldown_down - demand.at
        if left > 0:
            return self._bound(demand.size, f"{why} (held: cooling down for {left:.3g} s)")
        return self._bound(max(need, math.ceil(demand.size / self.policy.max_step)), why)

    def _bound(self, wanted: int, why: str) -> tuple[int, str]:
        bounded = min(max(wanted, self.policy.min_workers), self.policy.max_workers)
        if bounded != wanted:
            limit = "min_workers" if bounded > wanted else "max_workers"
            why = f"{why} (held at {limit}={bounded})"
        return bounded, why
