"""One delivery from message to verdict: a pipeline of small steps, for every outcome the same one.

``decode → deadline → agent → gate → replica → attempt → verdict``. Whatever an agent returns or raises becomes one of
the closed set of outcomes; nothing an agent does can raise out of :meth:`Execution.run` except the worker's own
cancellation. Knows what one task means; the dispatcher knows how many there are. One event loop; not thread-safe.

A process that an agent forks, and that comes back here instead of ending, is ended: the event loop, its sockets and its
tasks are the parent's.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import os
import time
import traceback
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, NamedTuple

from orchestra import _backoff, telemetry
from orchestra._delivery import DONE, Again, Bury, Cancel, Complete, Delivery, Verdict, corrupt_verdict
from orchestra._dispatch.admission import BadLimitError, Gate
from orchestra._limiting.use import Limiter
from orchestra._pool.executors import Left, leave_child
from orchestra.agents import AgentOptions, AgentRegistry, AgentType, Replica, unknown_agent
from orchestra.circuit_breaker import CircuitState
from orchestra.errors import CircuitOpenError, CorruptEntryError, Reject, RetryLater, Throttled
from orchestra.load_balancer import BaseLoadBalancerStrategy
from orchestra.orchestration_worker_pool import Slot
from orchestra.tasks import BaseTask, Outcome, Retry

MISSED = "deadline_missed"
"""Why a task is dead whose ``deadline`` has passed."""
BUSY_DELAY = 0.05
"""Seconds a task waits at least when every replica of its agent is full."""
LEAST_STEP = 0.0005
"""Seconds between two tasks that come back because every replica was full, at least."""
PROBED_SHARE = 0.1
"""Of ``recovery_timeout``: what a task waits at most while probes find out whether a replica works again."""
TRACEBACK_LINES = 30

current_task: contextvars.ContextVar[BaseTask] = contextvars.ContextVar("orchestra_task")
"""The task being processed, inside an agent."""


class Ended(NamedTuple):
    """How a delivery ended, and what that means for its task."""

    outcome: Outcome
    verdict: Verdict


class Execution:
    """Runs deliveries of one dispatcher. ``retry`` counts where neither task nor agent says otherwise.

    ``now``: the clock that a task's ``deadline`` is told by. ``hold_back``: asked once a retry for the seconds that it
    has to wait beyond its backoff. ``on_left(left, task)``: a plain function goes on although its task was interrupted.
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
    ) -> None:
        self._queue = queue_name
        self._agents = agents
        self._retry = retry
        self._balancer_for = balancer_for
        self._gate = Gate(queue_name, limiter)
        self._now = now
        self._hold_back = hold_back
        self._on_left = on_left

    async def run(self, delivery: Delivery, slot: Slot) -> Ended:
        """Process one delivery in ``slot``.

        Raises:
            asyncio.CancelledError: the worker is cancelled; interruptions of the slot are outcomes instead.
        """
        try:
            task = delivery.task()
        except CorruptEntryError as error:
            return Ended(Outcome.FAILED, corrupt_verdict(self._queue, delivery, error))
        if task.deadline is not None and self._now() >= task.deadline:
            return Ended(Outcome.CANCELLED, _bury(MISSED, delivery.retries, "the deadline passed before the start"))
        agent = self._agents.get(task.type)
        if agent is None:
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
        except asyncio.CancelledError:
            return self._cancelled(delivery, task, agent.options, slot)
        except SystemExit as error:
            told = RuntimeError(f"the agent called sys.exit({error.code!r})")
            return self._raised(delivery, task, agent.options, told, slot)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever an agent raises is an outcome
            return self._excepted(delivery, task, agent.options, slot, error)

    def abandoned(self, delivery: Delivery, slot: Slot) -> Ended:
        """The end of a delivery whose agent ignores the interruption of ``slot``; its replica has room again."""
        task = delivery.task()
        agent = self._agents.get(task.type)
        error = TimeoutError("the attempt took longer than its timeout") if _timed_out(slot) else None
        slot.replica.running -= 1
        _tell_balancer(slot.replica, slot)
        self._report(slot.replica, slot.era, error, time.monotonic() - slot.interrupted_at)
        return self._interrupted(delivery, task, agent.options if agent is not None else AgentOptions(), slot)

    # -- who runs it

    async def _chosen(self, delivery: Delivery, task: BaseTask, agent: AgentType, slot: Slot) -> Ended:
        """The attempt of a replica that was chosen, watched by its breaker; or the end of a task that none can take."""
        replica = self._choose(agent, task, slot)
        if replica is None:
            return Ended(Outcome.THROTTLED, self._none_free(agent))
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

    def _choose(self, agent: AgentType, task: BaseTask, slot: Slot) -> Replica | None:
        """A replica with room whose breaker lets this task through, which takes a probe's place where there are any."""
        slot.balancer = slot.era = None
        free = [] if agent.full else [replica for replica in agent.replicas if replica.open_to_tasks]
        while free:
            replica = self._balanced(agent, task, free, slot)
            if replica is None:
                break
            if replica.breaker is None:
                return replica
            slot.era = replica.breaker.enter()
            if slot.era is not None:
                return replica
            _tell_balancer(replica, slot)
            free.remove(replica)
        slot.balancer = None
        return None

    def _balanced(self, agent: AgentType, task: BaseTask, free: list[Replica], slot: Slot) -> Replica | None:
        if len(agent.replicas) == 1 and not agent.steered:
            return free[0]
        info = {
            "id": task.id,
            "type": task.type,
            "priority": task.priority,
            "input": task.input,
            "metadata": task.metadata,
        }
        slot.balancer = self._balancer_for(agent)
        chosen = slot.balancer.select_worker(free, info)
        if isinstance(chosen, Replica):
            return chosen
        # a strategy may answer with the id; None says that it finds all of them unhealthy
        return next((replica for replica in free if replica.worker_id == chosen), None)

    def _none_free(self, agent: AgentType) -> Again:
        """When a task comes back that no replica can take."""
        waits = [
            _wait_of(replica)
            for replica in agent.replicas
            if replica.breaker is not None and not replica.breaker.available
        ]
        if len(waits) == len(agent.replicas):
            return self._gate.later(agent.name, max(BUSY_DELAY, min(waits)))
        running = sum([replica.running for replica in agent.replicas])
        return self._gate.later(agent.name, BUSY_DELAY, max(LEAST_STEP, agent.mean_run / max(1, running)))

    # -- the attempt

    async def _attempt(
        self, delivery: Delivery, task: BaseTask, agent: AgentType, replica: Replica, slot: Slot
    ) -> Ended:
        timeout = agent.options.timeout if task.timeout is None else task.timeout
        if telemetry.wanted("task.started"):
            facts = {"queue": self._queue, "task_id": task.id, "type": task.type, "attempt": task.attempt}
            telemetry.emit("task.started", {}, {**facts, "worker_id": replica.worker_id})
        replica.running += 1
        slot.replica = replica
        if timeout is not None or task.deadline is not None:
            self._set_deadline(slot, timeout, task.deadline)
        try:
            value = await _isolated(replica.call, task)
        finally:
            if _astray:
                leave_child()
            slot.deadline = None
            if not slot.abandoned:
                replica.running -= 1
                if slot.balancer is not None:
                    _tell_balancer(replica, slot)
        return Ended(Outcome.COMPLETED, Complete(value)) if delivery.wants_result else _COMPLETED

    def _set_deadline(self, slot: Slot, timeout: float | None, deadline: float | None) -> None:
        """The sooner of the attempt's timeout and the task's deadline, by the monotonic clock."""
        left = math.inf if deadline is None else deadline - self._now()
        slot.final = timeout is None or left <= timeout
        slot.deadline = time.monotonic() + (left if timeout is None else min(left, timeout))

    # -- how it ended

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
        retry = options.retry or self._retry
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


def _tell_balancer(replica: Replica, slot: Slot) -> None:
    """The one who chose ``replica`` learns that its task has left."""
    balancer, slot.balancer = slot.balancer, None
    if balancer is not None:
        balancer.task_done(replica.worker_id)


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
    if isinstance(error, Throttled | Reject | CircuitOpenError | KeyboardInterrupt | GeneratorExit):
        return None
    return error if isinstance(error, Exception) else RuntimeError(f"the agent raised {error!r}")


def _wait_of(replica: Replica) -> float:
    breaker = replica.breaker
    assert breaker is not None, "asked of replicas with a breaker"
    if breaker.state is CircuitState.OPEN:
        return breaker.retry_after
    return min(breaker.retry_after, breaker.config.recovery_timeout * PROBED_SHARE)


_BY_ITSELF = "the agent raised CancelledError by itself"
_ENGINE = f"{Path(__file__).parent}{os.sep}"
_WORDS = (Throttled, Reject, RetryLater, CircuitOpenError)
_COMPLETED = Ended(Outcome.COMPLETED, DONE)
RELEASED = Ended(Outcome.RELEASED, Again(0.0, "released"))
CANCELLED = Ended(Outcome.CANCELLED, Cancel())
_astray = False
"""Whether this process was forked from one that runs deliveries: those belong to the parent."""


def _go_astray() -> None:
    global _astray  # noqa: PLW0603 - one fact about a process
    _astray = True


def begin() -> None:
    """Deliveries are going to be run in this process: it is not the stray child of another that runs some."""
    global _astray  # noqa: PLW0603
    _astray = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_go_astray)


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
                if _astray:
                    leave_child()
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
