"""Agents that do as they are told: succeed, fail a number of times, hang, block the event loop, crash.

Each is an object with ``async process(task)``, so that it can be registered like any other agent, and remembers the
tasks it was handed. One event loop; what it was handed can be waited for, without sleeping.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from orchestra.testing._watch import Watch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestra.tasks import BaseTask


class SimulatedCrash(BaseException):
    """What :func:`crash` raises: no ``Exception``, so nothing that handles failures of agents may handle it as one."""


class ScriptedAgent:
    """An agent that runs ``await script(task, number)``, where ``number`` counts the calls from 1."""

    def __init__(self, script: Callable[[BaseTask, int], Awaitable[Any]]) -> None:
        self._script = script
        self._watch = Watch()
        self.calls: list[BaseTask] = []
        """What it was handed, in order."""
        self.running = 0
        self.most_running = 0
        self.cancelled = 0

    async def process(self, task: BaseTask) -> Any:
        """Follow the script."""
        self.calls.append(task)
        number = len(self.calls)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self._watch.notify()
        try:
            return await self._script(task, number)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            self._watch.notify()

    async def wait_for_calls(self, count: int = 1, timeout: float = 5.0) -> list[BaseTask]:
        """Wait until it was called ``count`` times; returns what it was handed.

        Raises:
            TimeoutError: it was called less often after ``timeout`` seconds.
        """
        await self._watch.until(
            lambda: len(self.calls) >= count,
            timeout,
            lambda: f"{len(self.calls)} of {count} calls after {timeout:g} s",
        )
        return self.calls

    async def wait_until_idle(self, timeout: float = 5.0) -> None:
        """Wait until no call runs.

        Raises:
            TimeoutError: one still does after ``timeout`` seconds.
        """
        await self._watch.until(
            lambda: not self.running, timeout, lambda: f"{self.running} calls still run after {timeout:g} s"
        )


def succeed(value: Any = None) -> ScriptedAgent:
    """Returns ``value`` at once."""

    async def script(_task: BaseTask, _number: int) -> Any:
        return value

    return ScriptedAgent(script)


def fail_times(times: int, error: Exception | None = None, then: Any = None) -> ScriptedAgent:
    """Raises ``error`` (default: a RuntimeError) for the first ``times`` calls, then returns ``then``."""

    async def script(_task: BaseTask, number: int) -> Any:
        if number <= times:
            raise error or RuntimeError(f"scripted failure {number} of {times}")
        return then

    return ScriptedAgent(script)


def fail(error: Exception | None = None) -> ScriptedAgent:
    """Raises ``error`` (default: a RuntimeError) whenever it is called."""

    async def script(_task: BaseTask, number: int) -> Any:
        raise error or RuntimeError(f"scripted failure {number}")

    return ScriptedAgent(script)


class HangingAgent(ScriptedAgent):
    """Does not return until it is released or cancelled."""

    def __init__(self, value: Any = None) -> None:
        super().__init__(self._hang)
        self._value = value
        self._released = asyncio.Event()

    async def _hang(self, _task: BaseTask, _number: int) -> Any:
        await self._released.wait()
        return self._value

    def release(self) -> None:
        """Let present and later calls return."""
        self._released.set()


def hang(value: Any = None) -> HangingAgent:
    """Does not return until ``release()``, then returns ``value``."""
    return HangingAgent(value)


class StubbornAgent(HangingAgent):
    """Ignores its cancellation as often as it comes; ends only when released."""

    async def _hang(self, _task: BaseTask, _number: int) -> Any:
        while not self._released.is_set():
            try:
                await self._released.wait()
            except asyncio.CancelledError:  # the very misbehaviour that this agent is for
                self.cancelled += 1
        return self._value


def ignore_cancellation(value: Any = None) -> StubbornAgent:
    """Like :func:`hang`, but cannot be cancelled."""
    return StubbornAgent(value)


def block(seconds: float, value: Any = None) -> ScriptedAgent:
    """Blocks the whole event loop for ``seconds``, as a synchronous call in an async agent does."""

    async def script(_task: BaseTask, _number: int) -> Any:
        time.sleep(seconds)  # noqa: ASYNC251 - that is what it is for
        return value

    return ScriptedAgent(script)


def crash(error: BaseException | None = None) -> ScriptedAgent:
    """Raises ``error``, by default a :class:`SimulatedCrash`: the end of a worker, not of an attempt."""

    async def script(_task: BaseTask, _number: int) -> Any:
        raise error or SimulatedCrash("scripted crash")

    return ScriptedAgent(script)
