"""One delivery from message to verdict: a pipeline of small steps, for every outcome the same one.

``decode → deadline → agent → gate → replica → attempt → verdict``. Whatever an agent returns or raises becomes one of
the closed set of outcomes; nothing an agent does can raise out of :meth:`Execution.run` except the worker's own
cancellation. Knows what one task means; the dispatcher knows how many there are. One event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from orchestra import _backoff, telemetry
from orchestra._agents.services import current_task
from orchestra._delivery import (
    DONE,
    RETRY,
    STEP,
    WANTS_RESULT,
    Again,
    Bury,
    Cancel,
    Complete,
    Delivery,
    Sooner,
    Verdict,
    corrupt_verdict,
)
from orchestra._dispatch import isolation
from orchestra._dispatch.admission import BadLimitError, Gate
from orchestra._dispatch.isolation import Rest, first_step
from orchestra._dispatch.replicas import BUSY_DELAY, ReplicaChoice, tell_balancer
from orchestra._limiting.use import Limiter
from orchestra._pool.executors import Left, leave_child
from orchestra._pool.slots import Slot
from orchestra.agents import AgentOptions, AgentRegistry, AgentType, Replica, unknown_agent
from orchestra.errors import CircuitOpenError, CorruptEntryError, Reject, RetryLater, Throttled, WaitForSignal
from orchestra.load_balancer import BaseLoadBalancerStrategy
from orchestra.tasks import BaseTask, Outcome, Retry

NOT_MINE = 1.0
"""Seconds that a task waits which was given back for want of an agent."""
MISSED = "deadline_missed"
"""Why a task is dead whose ``deadline`` has passed."""
TRACEBACK_LINES = 30


class Ended(NamedTuple):
    """How a delivery ended, and what that means for its task."""

    outcome: Outcome
    verdict: Verdict


class Steps(Protocol):
    """Who knows what a delivery that is a step of a workflow means. ``guest``: nothing else is his."""

    guest: bool

    async def run(self, execution: Execution, delivery: Delivery, task: BaseTask, slot: Slot) -> Ended:
        """Process it; ``execution.run(delivery, slot, task)`` runs the agent, with ``task`` as it is by then."""


class Execution:
    """Runs deliveries of one dispatcher. ``retry`` counts where neither task nor agent says otherwise.

    ``now``: the clock that a task's ``deadline`` is told by. ``hold_back``: asked once a retry for the seconds that it
    has to wait beyond its backoff. ``on_left(left, task)``: a plain function goes on although its task was interrupted.
    ``steps``: who runs the steps of workflows; without him they are tasks like any other.
    """

    def __init__(
        self,
        queue_name: str,
        agents: AgentRegistry,
        retry: Retry,
        balancer_for: Callable[[AgentType], BaseLoadBalancerStrategy],
        limiter: Limiter | None = None,
        *,
        now: Callable[[], float] = time.time,
        hold_back: Callable[[], float] | None = None,
        on_left: Callable[[Left, BaseTask], None] | None = None,
        steps: Steps | None = None,
    ) -> None:
        self._queue = queue_name
        self._agents = agents
        self._retry = retry
        self._gate = Gate(queue_name, limiter)
        self._choice = ReplicaChoice(self._gate, balancer_for)
        self._now = now
        self._hold_back = hold_back
        self._on_left = on_left
        self._steps = steps

    def take_sooner(self) -> list[Sooner]:
        """The tasks whose limit was raised since they were told when to come back; they are told once."""
        sooner = self._gate.sooner
        if sooner:
            self._gate.sooner = []
        return sooner

    def start_nowait(self, delivery: Delivery, slot: Slot) -> Ended | Coroutine[Any, Any, Ended]:
        """Begin to process one delivery in ``slot``: how it ended, if its agent never waits, else what is left to await.

        Raises:
            asyncio.CancelledError: the worker is cancelled; interruptions of the slot are outcomes instead. What is
                left to await raises it, too.
        """
        try:
            task = delivery.task()
        except CorruptEntryError as error:
            return Ended(Outcome.FAILED, corrupt_verdict(self._queue, delivery, error))
        if task.metadata and STEP in task.metadata and self._steps is not None:
            return self._steps.run(self, delivery, task, slot)
        agent = self._agents.get(task.type)
        if agent is None or agent.only is None or agent.options.uses or self._gate.always or task.deadline is not None:
            return self.run(delivery, slot, task)
        replica = agent.only
        self._enter(task, agent.options, replica, slot)
        try:
            context, coroutine, value = first_step(replica.call, task, current_task)
        except BaseException as error:  # noqa: BLE001 - whatever an agent raises is an outcome
            self._leave(slot)
            return self._ended_by(error, delivery, task, agent.options, slot)
        if coroutine is not None:
            if isolation.astray:
                leave_child()
            return self._go_on(delivery, task, agent, slot, Rest(context, coroutine, value))
        if isolation.astray:
            leave_child()
        slot.deadline = None  # as _leave(), of a slot that nobody can have abandoned and a replica that nobody chose
        replica.running -= 1
        if delivery.header.flags & WANTS_RESULT or task.metadata:
            return self._completed(delivery, task, value)
        return COMPLETED

    async def _go_on(self, delivery: Delivery, task: BaseTask, agent: AgentType, slot: Slot, rest: Rest) -> Ended:
        """The rest of :meth:`start_nowait`."""
        try:
            try:
                value = await rest
            finally:
                self._leave(slot)
        except BaseException as error:  # noqa: BLE001
            return self._ended_by(error, delivery, task, agent.options, slot)
        return self._completed(delivery, task, value)

    async def run(self, delivery: Delivery, slot: Slot, task: BaseTask) -> Ended:
        """Process one delivery in ``slot``, of which ``task`` was made. Raises as :meth:`start_nowait`."""
        if task.deadline is not None and self._now() >= task.deadline:
            return Ended(Outcome.CANCELLED, _bury(MISSED, delivery.retries, "the deadline passed before the start"))
        agent = self._agents.get(task.type)
        if agent is None:
            if self._steps is not None and self._steps.guest and STEP not in task.metadata:
                return Ended(Outcome.RELEASED, Again(NOT_MINE, "released"))
            text = str(unknown_agent(task.type, self._agents))
            return Ended(Outcome.FAILED, _bury("unknown_agent", delivery.retries, text))
        try:
            if agent.options.uses or self._gate.always:
                refused = await self._gate.refusal(delivery, task, agent.options)
                if refused is not None:
                    return Ended(Outcome.THROTTLED, refused)
            if agent.only is not None:
                return await self._attempt(delivery, task, agent, agent.only, slot)
            return await self._chosen(delivery, task, agent, slot)
        except BadLimitError as error:
            return Ended(Outcome.FAILED, Bury("bad_limit", delivery.retries, _describe(error.__cause__ or error)))
        except BaseException as error:  # noqa: BLE001
            return self._ended_by(error, delivery, task, agent.options, slot)

    def abandoned(self, delivery: Delivery, slot: Slot) -> Ended:
        """The end of a delivery whose agent ignores the interruption of ``slot``; its replica has room again."""
        task = delivery.task()
        agent = self._agents.get(task.type)
        error = TimeoutError("the attempt took longer than its timeout") if _timed_out(slot) else None
        slot.replica.running -= 1
        tell_balancer(slot.replica, slot)
        self._report(slot.replica, slot.era, error, time.monotonic() - slot.interrupted_at)
        ended = self._interrupted(delivery, task, agent.options if agent is not None else AgentOptions(), slot)
        if ended is CANCELLED and STEP in task.metadata:  # whoever follows the dead letters tells its workflow
            return Ended(Outcome.CANCELLED, _bury("cancelled", delivery.attempt, "it ignores that it was cancelled"))
        return ended

    # -- who runs it

    async def _chosen(self, delivery: Delivery, task: BaseTask, agent: AgentType, slot: Slot) -> Ended:
        """The attempt of a replica that was chosen, watched by its breaker; or the end of a task that none can take."""
        replica = self._choice.now(agent, task, slot)
        if replica is None:
            return Ended(Outcome.THROTTLED, self._choice.none_free(agent))
        if replica.uses:
            given = await self._choice.admitted(agent, task, slot, replica)
            if isinstance(given, Again):
                return Ended(Outcome.THROTTLED, given)
            replica = given
        self._gate.started(agent.name)
        era, began = slot.era, time.monotonic()
        try:
            ended = await self._attempt(delivery, task, agent, replica, slot)
        except BaseException as error:
            if not slot.abandoned:
                self._report(replica, era, _meaning(error, slot), time.monotonic() - began)
            raise
        took = time.monotonic() - began
        agent.mean_run += (took - agent.mean_run) / 8
        if replica.breaker is not None and not slot.abandoned:
            replica.breaker.record_success(took, era=era)
        return ended

    def _report(self, replica: Replica, era: int | None, error: BaseException | None, took: float) -> None:
        """Tell the breaker of ``replica`` of an attempt that did not succeed; without an ``error`` that says nothing."""
        if replica.breaker is None:
            return
        if error is None:
            replica.breaker.release(era=era)
        else:
            replica.breaker.record_failure(error, took, era=era)

    # -- the attempt

    async def _attempt(
        self, delivery: Delivery, task: BaseTask, agent: AgentType, replica: Replica, slot: Slot
    ) -> Ended:
        self._enter(task, agent.options, replica, slot)
        try:
            context, coroutine, value = first_step(replica.call, task, current_task)
            if coroutine is not None:
                value = await Rest(context, coroutine, value)
        finally:
            self._leave(slot)
        return self._completed(delivery, task, value)

    def _enter(self, task: BaseTask, options: AgentOptions, replica: Replica, slot: Slot) -> None:
        """``replica`` is going to run ``task``."""
        if "task.started" in telemetry.listened:
            facts = {"queue": self._queue, "task_id": task.id, "type": task.type, "attempt": task.attempt}
            telemetry.emit("task.started", {}, {**facts, "worker_id": replica.worker_id})
        replica.running += 1
        slot.replica = replica
        timeout = options.timeout if task.timeout is None else task.timeout
        if timeout is not None or task.deadline is not None:
            self._set_deadline(slot, timeout, task.deadline)

    @staticmethod
    def _leave(slot: Slot) -> None:
        """The agent has ended, in whatever way."""
        if isolation.astray:
            leave_child()
        slot.deadline = None
        if not slot.abandoned:
            slot.replica.running -= 1
            if slot.balancer is not None:
                tell_balancer(slot.replica, slot)

    @staticmethod
    def _completed(delivery: Delivery, task: BaseTask, value: Any) -> Ended:
        if delivery.wants_result or (task.metadata and STEP in task.metadata):
            return Ended(Outcome.COMPLETED, Complete(value))
        return COMPLETED

    def _set_deadline(self, slot: Slot, timeout: float | None, deadline: float | None) -> None:
        """The sooner of the attempt's timeout and the task's deadline, by the monotonic clock."""
        left = math.inf if deadline is None else deadline - self._now()
        slot.final = timeout is None or left <= timeout
        slot.deadline = time.monotonic() + (left if timeout is None else min(left, timeout))

    # -- how it ended

    def _ended_by(
        self, error: BaseException, delivery: Delivery, task: BaseTask, options: AgentOptions, slot: Slot
    ) -> Ended:
        """What it means that ``error`` came out of an attempt. Called by its handler; raises what is the worker's own."""
        if isinstance(error, asyncio.CancelledError):
            return self._cancelled(delivery, task, options, slot)
        if isinstance(error, SystemExit):
            told = RuntimeError(f"the agent called sys.exit({error.code!r})")
            return self._raised(delivery, task, options, told, slot)
        if isinstance(error, KeyboardInterrupt) or isolation.closing(error, slot.task):
            raise error
        return self._excepted(delivery, task, options, slot, error)

    def _cancelled(self, delivery: Delivery, task: BaseTask, options: AgentOptions, slot: Slot) -> Ended:
        """A CancelledError came out: by the slot's interruption, by the agent itself, or the worker is cancelled."""
        worker = asyncio.current_task()
        if slot.why is not None:
            return self._interrupted(delivery, task, options, slot)
        if worker is not None and worker.cancelling():
            raise  # noqa: PLE0704 - called from the handler
        return self._raised(delivery, task, options, RuntimeError(_BY_ITSELF), slot)

    def _excepted(
        self, delivery: Delivery, task: BaseTask, options: AgentOptions, slot: Slot, error: BaseException
    ) -> Ended:
        error = _unwrapped(error)
        why = slot.why
        if why is not None and (why is Outcome.CANCELLED or not isinstance(error, _WORDS)):
            return self._interrupted(delivery, task, options, slot)  # the clean-up of an interrupted agent failed
        if not isinstance(error, Exception):
            error = RuntimeError(f"the agent raised {error!r}, which is no Exception")
        return self._raised(delivery, task, options, error, slot)

    def _interrupted(self, delivery: Delivery, task: BaseTask, options: AgentOptions, slot: Slot) -> Ended:
        """What the interruption of ``slot`` means."""
        left = None if self._on_left is None else self._agents.left_by(task)
        if left is not None and self._on_left is not None:
            self._on_left(left, task)
        if slot.why is Outcome.CANCELLED:
            return CANCELLED
        if slot.why is not Outcome.TIMED_OUT:
            return RELEASED
        if slot.final:
            text = "the deadline passed while the agent ran"
            return Ended(Outcome.TIMED_OUT, _bury(MISSED, delivery.attempt, text))
        timeout = options.timeout if task.timeout is None else task.timeout
        limit = "" if timeout is None else f" of {timeout:g} s"
        error = TimeoutError(f"the attempt took longer than its timeout{limit}")
        return self._failed(Outcome.TIMED_OUT, delivery, task, options, error, slot)

    def _raised(self, delivery: Delivery, task: BaseTask, options: AgentOptions, error: Exception, slot: Slot) -> Ended:
        if isinstance(error, Throttled):
            return Ended(Outcome.THROTTLED, self._gate.throttled(task, error))
        if isinstance(error, CircuitOpenError):
            wait = max(BUSY_DELAY, _backoff.wanted(error.retry_after))
            return Ended(Outcome.THROTTLED, self._gate.later(f"breaker {error.breaker or task.type}", wait))
        if isinstance(error, Reject):
            return Ended(Outcome.FAILED, Bury("rejected", delivery.attempt, _describe(error)))
        if isinstance(error, WaitForSignal) and STEP in task.metadata:
            return Ended(Outcome.COMPLETED, Complete(error))
        return self._failed(Outcome.FAILED, delivery, task, options, error, slot)

    def _failed(
        self,
        outcome: Outcome,
        delivery: Delivery,
        task: BaseTask,
        options: AgentOptions,
        error: Exception,
        slot: Slot,
    ) -> Ended:
        retry = _own_retry(task) or options.retry or self._retry
        most = retry.max_retries if task.max_retries is None else task.max_retries
        if delivery.retries >= most:
            return Ended(outcome, Bury(outcome.value, delivery.attempt, _describe(error)))
        if isinstance(error, RetryLater):
            wait = _backoff.wanted(error.after)
        elif options.failover and self._fails_over(task, slot):
            wait = 0.0
        else:
            wait = _backoff.delay(retry, delivery.attempt)
        if self._hold_back is not None:
            wait += self._hold_back()
        if task.deadline is not None and self._now() + wait >= task.deadline:
            facts = _describe(error)
            facts["error"] = f"no retry can start before the deadline; the last attempt: {facts['error']}"
            return Ended(outcome, Bury(MISSED, delivery.attempt, facts))
        told = f"{type(error).__name__}: {error}"[:500]
        return Ended(outcome, Again(max(0.001, _backoff.whole_ms(wait)), "retried", told))

    def _fails_over(self, task: BaseTask, slot: Slot) -> bool:
        """Whether the replica that failed takes no more tasks, and another one can take this one."""
        agent, failed = self._agents.get(task.type), slot.replica
        if agent is None or failed is None or failed.breaker is None or failed.breaker.available:
            return False
        return any(replica.open_to_tasks for replica in agent.replicas)


def _own_retry(task: BaseTask) -> Retry | None:
    """How a step of a workflow wants to be repeated, which goes before what its agent says."""
    fields = task.metadata.get(RETRY) if STEP in task.metadata else None
    return Retry(**fields) if isinstance(fields, dict) else None


def _timed_out(slot: Slot) -> bool:
    """Whether ``slot`` was interrupted by the timeout of the attempt: the task's own deadline accuses nobody."""
    return slot.why is Outcome.TIMED_OUT and not slot.final


def _meaning(error: BaseException, slot: Slot) -> BaseException | None:
    """What the end of an attempt by ``error`` says about the replica that ran it; None: nothing."""
    if slot.why is not None:
        return TimeoutError("the attempt took longer than its timeout") if _timed_out(slot) else None
    error = _unwrapped(error)
    if isinstance(error, asyncio.CancelledError):
        worker = asyncio.current_task()
        return None if worker is not None and worker.cancelling() else RuntimeError(_BY_ITSELF)
    if isinstance(error, Throttled | Reject | CircuitOpenError | WaitForSignal | KeyboardInterrupt):
        return None
    if isolation.closing(error, slot.task):
        return None
    return error if isinstance(error, Exception) else RuntimeError(f"the agent raised {error!r}")


_BY_ITSELF = "the agent raised CancelledError by itself"
_ENGINE = f"{Path(__file__).parent}{os.sep}"
_WORDS = (Throttled, Reject, RetryLater, CircuitOpenError, WaitForSignal)
COMPLETED = Ended(Outcome.COMPLETED, DONE)
"""The end of a task whose value nobody wants; shared, so that the end of most tasks costs nothing."""
RELEASED = Ended(Outcome.RELEASED, Again(0.0, "released"))
CANCELLED = Ended(Outcome.CANCELLED, Cancel())


def _unwrapped(error: BaseException) -> BaseException:
    """What a group of exceptions comes to: its only one; or, where all of them are words of an agent, the hardest.

    A TaskGroup wraps what its tasks raise, and ``raise Throttled`` in one of them must mean the same as outside.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_unwrapped(leaf) for leaf in error.exceptions]
    if len(leaves) == 1:
        return leaves[0]
    if not all(isinstance(leaf, _WORDS) for leaf in leaves):
        return error
    return max(leaves, key=_hardness)


def _hardness(word: BaseException) -> tuple[int, float]:
    if isinstance(word, Reject):
        return 2, 0.0
    if isinstance(word, RetryLater):
        return 1, _backoff.wanted(word.after)
    return 0, _backoff.wanted(getattr(word, "retry_after", 0.0))


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
