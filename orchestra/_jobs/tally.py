"""What the workers of a job have been doing, counted for the display: tasks, run times, limits, replicas, breakers.

Owns the events that dispatchers tell of (:func:`watch`; they travel between processes as JSON lists) and their counts.
Refuses to decide anything from them, and to show them. A :class:`Tally` belongs to one event loop; handlers are called
in the thread of the dispatcher.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from orchestra import telemetry

RUN_TIMES = 20_000
"""Run times kept of each kind; beyond it every new one replaces an old one."""
OUTAGES = 1000
"""Outages kept per breaker."""

Started: TypeAlias = tuple[str, str, str, str]
"""``started``, task id, type, worker id."""
Settled: TypeAlias = tuple[str, str, str, str, float, str]
"""``settled``, task id, type, outcome, seconds, worker id; the last is empty for a task that had not started."""
Changed: TypeAlias = tuple[str, str, str, str, float, int]
"""``breaker``, its name, old state, new state, monotonic seconds, process id."""
Event: TypeAlias = Started | Settled | Changed


@dataclass(slots=True)
class Outage:
    """A breaker was not closed: from ``began`` to ``ended``, monotonic seconds; None while it lasts."""

    began: float
    ended: float | None = None


class RunTimes:
    """The last run times, in seconds, exactly. O(1) to add, O(n log n) to ask."""

    __slots__ = ("_kept", "count")

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[float] = []

    def add(self, seconds: float) -> None:
        """Note a run time."""
        if len(self._kept) < RUN_TIMES:
            self._kept.append(seconds)
        else:
            self._kept[self.count % RUN_TIMES] = seconds
        self.count += 1

    @property
    def mean(self) -> float | None:
        """Mean run time, None while unknown."""
        return sum(self._kept) / len(self._kept) if self._kept else None

    def percentile(self, share: float) -> float | None:
        """What a ``share`` of the run times, 0 to 1, does not exceed; None while unknown."""
        kept = sorted(self._kept)
        return kept[min(len(kept) - 1, int(share * len(kept)))] if kept else None


@dataclass(slots=True)
class ReplicaTally:
    """What one replica of an agent has done. ``times``: of attempts that completed."""

    failed: int = 0
    times: RunTimes = field(default_factory=RunTimes)


@dataclass(slots=True)
class TypeTally:
    """What is known of one task type. ``times``: of attempts that completed.

    ``throttled``: times that a task was told to come back; no attempt is charged for it.
    """

    running: int = 0
    retries: int = 0
    throttled: int = 0
    times: RunTimes = field(default_factory=RunTimes)
    replicas: dict[str, ReplicaTally] = field(default_factory=dict)


class Tally:
    """What the workers of this run have been doing: running, retrying, how long, and how they were steered."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.types: dict[str, TypeTally] = {}
        self.retrying: set[str] = set()
        """Ids of tasks that failed and wait for their next attempt."""
        self.throttled: set[str] = set()
        """Ids of tasks that a limit holds back."""
        self.restarts = 0
        self._outages: dict[tuple[str, int], list[Outage]] = {}

    def of(self, task_type: str) -> TypeTally:
        """The numbers of ``task_type``."""
        return self.types.setdefault(task_type, TypeTally())

    def running_of(self, task_type: str) -> int:
        """Agents of ``task_type`` that run now."""
        tally = self.types.get(task_type)
        return 0 if tally is None else tally.running

    @property
    def running(self) -> int:
        """Agents that run now."""
        return sum(tally.running for tally in self.types.values())

    def outages(self, breaker: str) -> list[Outage]:
        """When ``breaker`` was not closed, in any process, by when that began."""
        found = [outage for (name, _), each in self._outages.items() if name == breaker for outage in each]
        return sorted(found, key=lambda outage: outage.began)

    def take(self, event: Event) -> None:
        """Count one event."""
        if event[0] == "breaker":
            self._changed(*event[1:])
        elif event[0] == "started":
            self.of(event[2]).running += 1
            self.forget(event[1])
        else:
            self._settled(*event[1:])

    def _settled(self, task_id: str, task_type: str, outcome: str, run_s: float, worker_id: str) -> None:
        tally = self.of(task_type)
        if worker_id:
            tally.running = max(0, tally.running - 1)
            replica = tally.replicas.setdefault(worker_id, ReplicaTally())
            if outcome == "completed":
                replica.times.add(run_s)
            elif outcome in ("retry", "dead"):
                replica.failed += 1
        if outcome == "completed":
            tally.times.add(run_s)
        elif outcome == "retry":
            tally.retries += 1
            self.retrying.add(task_id)
        elif outcome == "throttled":
            tally.throttled += 1
            self.throttled.add(task_id)

    def _changed(self, name: str, _old: str, new: str, at: float, pid: int) -> None:
        outages = self._outages.setdefault((name, pid), [])
        lasts = bool(outages) and outages[-1].ended is None
        if new == "closed" and lasts:
            outages[-1].ended = at
        elif new == "open" and not lasts and len(outages) < OUTAGES:
            outages.append(Outage(at))

    def forget(self, task_id: str) -> None:
        """``task_id`` runs again, or has ended."""
        self.retrying.discard(task_id)
        self.throttled.discard(task_id)


def watch(tell: Callable[[Event], None]) -> Callable[[], None]:
    """Tell what the dispatchers and breakers of this process do; returns what ends it."""
    running: dict[str, list[str]] = {}

    def started(_name: str, _numbers: Mapping[str, float], facts: Mapping[str, Any]) -> None:
        running.setdefault(facts["task_id"], []).append(facts["worker_id"])
        tell(("started", facts["task_id"], facts["type"], facts["worker_id"]))

    def settled(_name: str, numbers: Mapping[str, float], facts: Mapping[str, Any]) -> None:
        task_id, outcome = facts["task_id"], facts["outcome"]
        by = running.get(task_id)  # a task that was throttled or released has not started
        worker_id = by.pop(0) if by else ""
        if not by:
            running.pop(task_id, None)
        if outcome in ("failed", "timed_out"):
            outcome = "retry" if facts["retry_in_s"] is not None else "dead"
        tell(("settled", task_id, facts["type"], outcome, numbers["run_s"], worker_id))

    def changed(_name: str, _numbers: Mapping[str, float], facts: Mapping[str, Any]) -> None:
        # The monotonic clock of a machine is the same in all of its processes.
        tell(("breaker", facts["breaker"], facts["old"], facts["new"], time.monotonic(), os.getpid()))

    heard = ((started, "task.started"), (settled, "task.settled"), (changed, "breaker.changed"))
    ends = [telemetry.attach(handler, name) for handler, name in heard]

    def detach() -> None:
        for end in ends:
            end()

    return detach
