"""Accounts for agents that go on after they were interrupted: coroutines that swallow it, functions that cannot see it.

Says so once (``task.stuck``), rarely again, and when it costs capacity (``dispatcher.exhausted``). Refuses to decide
what becomes of their deliveries: those are settled before an agent comes here. One event loop; not thread-safe.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from orchestra import telemetry
from orchestra._delivery import Delivery
from orchestra._pool.executors import Left
from orchestra._pool.slots import Slot
from orchestra.agents import THREADS, AgentRegistry
from orchestra.orchestration_worker_pool import QueueWorkerPool
from orchestra.tasks import BaseTask

STUCK_AFTER = 5.0
"""Seconds after which an agent that goes on in spite of its interruption counts as stuck."""
SAY_AGAIN = 300.0
"""Seconds until a stuck agent is reported again."""


class _Report(NamedTuple):
    task_id: str
    task_type: str
    since: float
    say_at: float


class StuckAgents:
    """The stuck agents of one dispatcher of ``queue``."""

    def __init__(self, queue: str, agents: AgentRegistry) -> None:
        self._queue = queue
        self._agents = agents
        self._slots: dict[Slot, _Report] = {}
        self._functions: dict[Left, _Report] = {}
        self._told: dict[str, int] = {}

    def __len__(self) -> int:
        """Coroutines that ignore their interruption, and functions that go on without their task."""
        return len(self._slots) + sum(left.running for left in self._functions)

    def add(self, slot: Slot, delivery: Delivery) -> None:
        """The agent of ``delivery`` has ignored the interruption of ``slot`` for too long."""
        header = delivery.header
        self._slots[slot] = self._tell(_Report(header.id, header.type, slot.interrupted_at, 0.0), time.monotonic())

    def add_function(self, left: Left, task: BaseTask) -> None:
        """A plain function goes on; most end soon, so it is told only when it still runs later."""
        self._functions[left] = _Report(task.id, task.type, left.since, left.since + STUCK_AFTER)

    def ended(self, slot: Slot) -> None:
        """The agent of ``slot`` has ended after all."""
        self._slots.pop(slot, None)

    def look(self, pool: QueueWorkerPool) -> None:
        """Forget functions that have ended, report what is due. Cheap while nothing is stuck; call it now and then."""
        if not self._slots and not self._functions and not self._told:
            return
        now = time.monotonic()
        self._functions = {left: report for left, report in self._functions.items() if left.running}
        for left, report in self._functions.items():
            if now >= report.say_at:
                self._functions[left] = self._tell(report, now)
        for slot, report in self._slots.items():
            if now >= report.say_at:
                self._slots[slot] = self._tell(report, now)
        self._tell_missing(pool)

    def _tell(self, report: _Report, now: float) -> _Report:
        facts = {"queue": self._queue, "task_id": report.task_id, "type": report.task_type}
        telemetry.emit("task.stuck", {"over_s": now - report.since}, facts)
        return report._replace(say_at=now + SAY_AGAIN)

    def _tell_missing(self, pool: QueueWorkerPool) -> None:
        """Say that capacity has shrunk, once for each place less."""
        capacity = {"slots": (pool.capacity, pool.concurrency), "threads": (self._agents.thread_capacity, THREADS)}
        for what, (left, full) in capacity.items():
            if left < min(full, self._told.get(what, full)):
                facts = {"queue": self._queue, "what": what}
                telemetry.emit("dispatcher.exhausted", {"stuck": len(self), "capacity": left}, facts)
            self._told[what] = left
        if all(left == full for left, full in capacity.values()):
            self._told.clear()
