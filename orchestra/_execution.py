"""One delivery from message to verdict: a pipeline of small steps, for every outcome the same one.

``decode → deadline → agent → permits → replica → attempt → verdict``. Whatever an agent returns or raises becomes one of
the closed set of outcomes; nothing an agent does can raise out of :meth:`Execution.run` except the worker's own
cancellation. Knows what one task means; the dispatcher knows how many there are.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import time
import traceback
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, NamedTuple

from orchestra import _backoff, telemetry
from orchestra._delivery import DONE, Again, Bury, Complete, Delivery, Verdict, corrupt_verdict
from orchestra.agents import AgentOptions, AgentRegistry, AgentType, Limiter, Replica, unknown_agent
from orchestra.errors import CorruptEntryError, Reject, RetryLater, Throttled
from orchestra.load_balancer import BaseLoadBalancerStrategy
from orchestra.orchestration_worker_pool import Slot
from orchestra.tasks import BaseTask, Outcome, Retry

BUSY_DELAY = 0.05
"""Seconds a task waits when every replica of its agent is full."""
TRACEBACK_LINES = 30

current_task: contextvars.ContextVar[BaseTask] = contextvars.ContextVar("orchestra_task")
"""The task being processed, inside an agent."""


class Ended(NamedTuple):
    """How a delivery ended, and what that means for its task."""

    outcome: Outcome
    verdict: Verdict


class Execution:
    """Runs deliveries of one dispatcher. ``retry`` counts where neither task nor agent says otherwise."""

    def __init__(
        self,
        queue_name: str,
        agents: AgentRegistry,
        retry: Retry,
        balancer_for: Callable[[AgentType], BaseLoadBalancerStrategy],
        limiter: Limiter | None = None,
    ) -> None:
        self._queue = queue_name
        self._agents = agents
        self._retry = retry
        self._balancer_for = balancer_for
        self._limiter = limiter
        self._parked: dict[int, float] = {}

    async def run(self, delivery: Delivery, slot: Slot) -> Ended:
        """Process one delivery in ``slot``.

        Raises:
            asyncio.CancelledError: the worker is cancelled; interruptions of the slot are outcomes instead.
        """
        try:
            task = delivery.task()
        except CorruptEntryError as error:
            return Ended(Outcome.FAILED, corrupt_verdict(self._queue, delivery, error))
        if task.deadline is not None and time.time() > task.deadline:
            return Ended(
                Outcome.CANCELLED, _bury("deadline_missed", delivery.retries, "the deadline passed before the start")
            )
        agent = self._agents.get(task.type)
        if agent is None:
            text = str(unknown_agent(task.type, self._agents))
            return Ended(Outcome.FAILED, _bury("unknown_agent", delivery.retries, text))
        try:
            if self._limiter is not None or agent.options.limiter is not None:
                refused = await self._refused(task, agent.options)
                if refused is not None:
                    return Ended(Outcome.THROTTLED, refused)
            replica = self._choose(agent, task)
            if replica is None:
                return Ended(Outcome.THROTTLED, Again(BUSY_DELAY, "throttled"))
            return await self._attempt(delivery, task, agent, replica, slot)
        except asyncio.CancelledError:
            return self._interrupted(delivery, task, agent.options, slot)
        except SystemExit as error:
            return self._raised(
                delivery, task, agent.options, RuntimeError(f"the agent called sys.exit({error.code!r})")
            )
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever an agent raises is an outcome
            if slot.why is not None and not isinstance(error, _WORDS):  # the clean-up of an interrupted agent failed
                return self._interrupted(delivery, task, agent.options, slot)
            if not isinstance(error, Exception):
                error = RuntimeError(f"the agent raised {error!r}, which is no Exception")
            return self._raised(delivery, task, agent.options, error)

    async def _refused(self, task: BaseTask, options: AgentOptions) -> Verdict | None:
        for limiter, cost in ((self._limiter, 1), (options.limiter, options.cost)):
            if limiter is not None:
                # a limiter's larger number is more urgent, a task's smaller one
                admission = await limiter.try_acquire(priority=3 - task.priority, cost=cost)
                if not admission.allowed:
                    return Again(self._park(limiter, admission.retry_after, cost), "throttled")
        return None

    def _park(self, limiter: Limiter, retry_after: float, cost: int) -> float:
        """Delays that fan out at the limiter's rate, so that parked tasks do not all come back at once."""
        now = time.monotonic()
        at = max(now + retry_after, self._parked.get(id(limiter), 0.0) + limiter.interval * cost)
        self._parked[id(limiter)] = at
        return at - now

    def _choose(self, agent: AgentType, task: BaseTask) -> Replica | None:
        replicas = agent.replicas
        if len(replicas) == 1:
            return replicas[0] if replicas[0].has_room else None
        free = [replica for replica in replicas if replica.has_room]
        if not free:
            return None
        info = {"id": task.id, "type": task.type, "priority": task.priority, "input": task.input}
        chosen = self._balancer_for(agent).select_worker(free, info)
        if isinstance(chosen, Replica):
            return chosen
        # a strategy may answer with the id; None says that it finds all of them unhealthy
        return next((replica for replica in free if replica.worker_id == chosen), None)

    async def _attempt(
        self, delivery: Delivery, task: BaseTask, agent: AgentType, replica: Replica, slot: Slot
    ) -> Ended:
        timeout = agent.options.timeout if task.timeout is None else task.timeout
        if telemetry.wanted("task.started"):
            facts = {"queue": self._queue, "task_id": task.id, "type": task.type, "attempt": task.attempt}
            telemetry.emit("task.started", {}, facts)
        replica.running += 1
        if timeout is not None:
            slot.deadline = time.monotonic() + timeout
        try:
            value = await _isolated(replica.call, task)
        finally:
            slot.deadline = None
            replica.running -= 1
            if len(agent.replicas) > 1:
                self._balancer_for(agent).task_done(replica.worker_id)
        return Ended(Outcome.COMPLETED, Complete(value)) if delivery.wants_result else _COMPLETED

    def _interrupted(self, delivery: Delivery, task: BaseTask, options: AgentOptions, slot: Slot) -> Ended:
        """A CancelledError came out: by the slot's interruption, by the agent itself, or the worker is cancelled."""
        worker = asyncio.current_task()
        if slot.why is None:
            if worker is not None and worker.cancelling():
                raise  # noqa: PLE0704 - called from the handler
            return self._raised(delivery, task, options, RuntimeError("the agent raised CancelledError by itself"))
        if slot.why is Outcome.TIMED_OUT:
            timeout = options.timeout if task.timeout is None else task.timeout
            error = TimeoutError(f"the attempt took longer than its timeout of {timeout:g} s")
            return self._failed(Outcome.TIMED_OUT, delivery, task, options, error)
        return Ended(Outcome.RELEASED, Again(0.0, "released"))

    def _raised(self, delivery: Delivery, task: BaseTask, options: AgentOptions, error: Exception) -> Ended:
        if isinstance(error, Throttled):
            return Ended(Outcome.THROTTLED, Again(max(0.0, error.retry_after), "throttled"))
        if isinstance(error, Reject):
            return Ended(Outcome.FAILED, Bury("rejected", delivery.attempt, _describe(error)))
        return self._failed(Outcome.FAILED, delivery, task, options, error)

    def _failed(
        self, outcome: Outcome, delivery: Delivery, task: BaseTask, options: AgentOptions, error: Exception
    ) -> Ended:
        retry = options.retry or self._retry
        most = retry.max_retries if task.max_retries is None else task.max_retries
        if delivery.retries >= most:
            return Ended(outcome, Bury(outcome.value, delivery.attempt, _describe(error)))
        wait = error.after if isinstance(error, RetryLater) else _backoff.delay(retry, delivery.attempt)
        return Ended(outcome, Again(max(0.001, wait), "retried", f"{type(error).__name__}: {error}"[:500]))


_ENGINE = f"{Path(__file__).parent}{os.sep}"
_WORDS = (Throttled, Reject, RetryLater)
_COMPLETED = Ended(Outcome.COMPLETED, DONE)


async def _isolated(call: Callable[[BaseTask], Any], task: BaseTask) -> Any:
    """Await ``call(task)`` in a context of its own: what one task sets in context variables, the next must not see."""
    context = contextvars.copy_context()
    coroutine, value = context.run(_first_step, call, task)
    if coroutine is None:
        return value
    return await (value if coroutine is value else _Resumed(context, coroutine, value))


def _first_step(call: Callable[[BaseTask], Any], task: BaseTask) -> tuple[Any, Any]:
    """Run up to the first suspension: ``(None, result)``, ``(coroutine, what it waits for)`` or twice an awaitable."""
    current_task.set(task)
    coroutine = call(task)
    try:
        return coroutine, coroutine.send(None)
    except StopIteration as stop:
        return None, stop.value
    except AttributeError:
        if hasattr(coroutine, "send"):
            raise  # the agent's own
        return coroutine, coroutine


class _Resumed:
    """Goes on with a coroutine that has suspended on ``waiting``, every step of it in ``context``."""

    __slots__ = ("_context", "_coroutine", "_waiting")

    def __init__(self, context: contextvars.Context, coroutine: Coroutine[Any, Any, Any], waiting: Any) -> None:
        self._context = context
        self._coroutine = coroutine
        self._waiting = waiting

    def __await__(self) -> Generator[Any, Any, Any]:
        run, coroutine, waiting = self._context.run, self._coroutine, self._waiting
        try:
            while True:
                try:
                    sent = yield waiting
                except GeneratorExit:
                    coroutine.close()
                    raise
                except BaseException as error:  # noqa: BLE001 - handed on to the coroutine, which decides
                    waiting = run(coroutine.throw, error)
                else:
                    waiting = run(coroutine.send, sent)
        except StopIteration as stop:
            return stop.value


def _bury(reason: str, attempts: int, text: str) -> Bury:
    return Bury(reason, attempts, {"error": text, "error_type": reason})


def _describe(error: BaseException) -> dict[str, Any]:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_ENGINE):
        frames = frames.tb_next  # how the engine called the agent says nothing about the failure
    lines = traceback.format_exception(type(error), error, frames or error.__traceback__)
    text = "".join(lines).splitlines()[-TRACEBACK_LINES:]
    name = type(error).__qualname__
    module = type(error).__module__
    return {
        "error": str(error)[:2000] or name,
        "error_type": name if module == "builtins" else f"{module}.{name}",
        "traceback": "\n".join(line[:500] for line in text),
    }
