"""What tasks do to their worker. An agent writes its start and its end itself; the input says how it behaves."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import time
from typing import Any

from orchestra.agents import AgentRegistry
from orchestra.errors import Reject, RetryLater
from orchestra.tasks import BaseTask, Retry
from tests.faults.chaos.history import History
from tests.faults.chaos.plan import Plan

LATER = 0.3
"""Seconds that a RetryLater asks for."""
MAX_RETRIES = 3
ORDINAL = (1 << 40) - 1
"""The part of a fence that counts the deliveries of a generation."""


class Agents:
    """The agents of one worker."""

    def __init__(self, history: History, plan: Plan) -> None:
        self._history = history
        self._numbers = itertools.count()
        self.registry = AgentRegistry()
        # without jitter the delay before a retry is known, and the checker can hold it
        retry = Retry(max_retries=MAX_RETRIES, base=plan.retry_base, factor=2.0, max_delay=5.0, jitter=False)
        self.registry.register("work", self.work, retry=retry)
        self.registry.register("thread", self.work_in_thread, retry=retry)

    def _begin(self, task: BaseTask) -> dict[str, Any]:
        facts = {"uid": task.input["uid"], "id": task.id, "fence": task.fence, "attempt": task.attempt}
        facts["run"] = next(self._numbers)  # after XGROUP DESTROY a fence may come twice to the same worker
        self._history.write("run", "invoke", **facts)
        return facts

    def _end(self, facts: dict[str, Any]) -> dict[str, Any]:
        self._history.write("run", "ok", **facts)
        return {**facts, "actor": self._history.actor}

    async def work(self, task: BaseTask) -> dict[str, Any]:
        """Behave as the input says."""
        facts = self._begin(task)
        try:
            await _perform(task)
        except asyncio.CancelledError:
            self._history.write("run", "info", **facts)
            raise
        except Exception as error:
            self._history.write("run", "fail", **facts, error=type(error).__name__)
            raise
        return self._end(facts)

    def work_in_thread(self, task: BaseTask) -> dict[str, Any]:
        """A plain function."""
        facts = self._begin(task)
        time.sleep(0.02)
        return self._end(facts)


async def _perform(task: BaseTask) -> None:
    kind, spec = task.input["kind"], task.input
    if kind in {"sleep", "long", "timeout", "cancel"}:
        await asyncio.sleep(spec["s"])
    elif kind == "stubborn":
        await _stubborn(spec["s"])
    elif kind == "block":
        time.sleep(spec["s"])  # on purpose: the event loop stands still
    elif kind in {"flaky", "later"}:
        await asyncio.sleep(0.005)
        if task.attempt <= spec["n"]:
            raise ValueError("flaky") if kind == "flaky" else RetryLater(LATER)
    elif kind == "doomed":
        raise ValueError("doomed")
    elif kind == "reject":
        raise Reject("never")
    elif kind in {"segv", "exit"}:
        await asyncio.sleep(0.01)
        if task.fence & ORDINAL <= spec["n"]:
            ctypes.string_at(0) if kind == "segv" else os._exit(9)


async def _stubborn(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            await asyncio.sleep(left)
        except asyncio.CancelledError:
            continue
