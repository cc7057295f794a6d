"""Agents called in this process, without a queue: planners, and the steps of an orchestrator that has no queue.

Owns that such a call honours what the agent was registered with: its limits (all of them, asked together where they live
in one place), a breaker for each type, the breakers and room of its replicas, its timeout, and for planners its retries.
Refuses to own what a refusal means: whoever calls is told (:data:`NOT_NOW`). One event loop.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from orchestra import _backoff
from orchestra._agents.services import Services, StepScope, current_task, serving
from orchestra._dispatch.admission import ask_once
from orchestra._dispatch.isolation import closing
from orchestra.agents import AgentType, unknown_agent
from orchestra.circuit_breaker import CircuitBreaker
from orchestra.errors import (
    BackpressureRejectedError,
    CircuitOpenError,
    OrchestraError,
    Reject,
    RetryLater,
    Throttled,
    WorkerPoolError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orchestra.agents import AgentOptions, AgentRegistry
    from orchestra.circuit_breaker import CircuitBreakerConfig
    from orchestra.orchestration_worker_pool import QueueWorkerPool
    from orchestra.tasks import BaseTask

NOT_NOW: Final = (Throttled, RetryLater, CircuitOpenError, WorkerPoolError)
"""What says that an agent cannot run at present: nothing has failed."""
ROOM_PAUSE: Final = 0.05
"""Seconds between two looks for room where ``type_concurrency`` tasks of a type run."""


class LocalAgents:
    """Calls ``agents`` in ``pool``, or, without one, in the caller's own asyncio.Task.

    ``breaker``: when the breaker of a type opens; it is asked before the pool has a place. ``services``: what the agents
    find around them.
    """

    def __init__(
        self,
        agents: AgentRegistry,
        breaker: CircuitBreakerConfig | None = None,
        pool: QueueWorkerPool | None = None,
        services: Services | None = None,
    ) -> None:
        self.agents = agents
        self._services = services or Services()
        self._config = breaker
        self._pool = pool
        self._breakers: dict[str, CircuitBreaker] = {}  # only of registered types, so bounded by the registry

    async def call(self, task: BaseTask, scope: StepScope | None = None) -> Any:
        """What the agent of ``task.type`` returns; one attempt. ``scope``: the step of a workflow that it is.

        Raises:
            UnknownAgentError: there is none.
            Throttled, RetryLater, CircuitOpenError, WorkerPoolError: it cannot run now.
            Exception: whatever else the agent raises; TimeoutError beyond its ``timeout``; RuntimeError for what is no
                Exception.
        """
        entry = self._entry(task)
        breaker = self._breakers.get(task.type)
        if breaker is None:
            breaker = self._breakers[task.type] = CircuitBreaker(f"agent:{task.type}"[:128], self._config)
        if self._pool is None:
            return await breaker.call(self._limited, task, entry, scope)
        future = await self._pool.submit(breaker.call, self._limited, task, entry, scope, priority=task.priority)
        try:
            return await future
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is None or caller.cancelling():
                raise
            raise WorkerPoolError(
                f"the worker pool dropped {task.type!r} for task {task.id}: was it shut down?"
            ) from None

    async def call_patiently(self, task: BaseTask) -> Any:
        """:meth:`call`, repeated as the agent's ``retry`` says; raises what the last attempt did."""
        retry = self._entry(task).options.retry
        while True:
            try:
                return await self.call(task)
            except Exception as error:
                wait = wait_before_retry(error, retry, task.attempt)
                if wait is None:
                    raise
            await asyncio.sleep(wait)
            task.attempt += 1

    def _entry(self, task: BaseTask) -> AgentType:
        entry = self.agents.get(task.type)
        if entry is None:
            raise unknown_agent(task.type, self.agents)
        return entry

    async def _limited(self, task: BaseTask, entry: AgentType, scope: StepScope | None) -> Any:
        options = entry.options
        if options.uses:
            await _admitted(task, options)
        while entry.full:
            await asyncio.sleep(ROOM_PAUSE)
        timeout = options.timeout if task.timeout is None else task.timeout
        caller = asyncio.current_task()
        try:
            async with asyncio.timeout(timeout) as limit:
                with serving(replace(self._services, step=scope)), _current(task):
                    return await self.agents.call(task)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"agent {task.type!r} took longer than its timeout of {timeout:g} s") from None
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and (caller is None or caller.cancelling()):
                raise
            if closing(error, caller):
                raise
            # As in a worker: an agent ends neither the process nor, by a word that is meant for the event loop, its caller.
            raise RuntimeError(f"agent {task.type!r} raised {error!r}, which is no Exception") from error


@contextmanager
def _current(task: BaseTask) -> Iterator[None]:
    token = current_task.set(task)
    try:
        yield
    finally:
        current_task.reset(token)


async def _admitted(task: BaseTask, options: AgentOptions) -> None:
    """Take the permits of one attempt. Raises Throttled where a limit refuses, what a key function raises else."""
    try:
        wait = await ask_once(task, options)
    except BackpressureRejectedError as error:
        raise Reject(str(error)) from error  # no limit ever gives so much
    if wait is not None:
        raise Throttled(wait, key=task.type)


def wait_before_retry(error: Exception, retry: Any, attempt: int) -> float | None:
    """Seconds until attempt ``attempt + 1`` after ``error``; None: there is none."""
    if retry is None or attempt > retry.max_retries or isinstance(error, Reject):
        return None
    if isinstance(error, RetryLater):
        return _backoff.wanted(error.after)
    return None if isinstance(error, NOT_NOW) else _backoff.delay(retry, attempt)


def describe(error: BaseException) -> dict[str, Any]:
    """What is recorded of an exception: ``type``, ``message`` (2,000 characters at most) and, of ours, ``code``."""
    text = str(error).encode("utf-8", "replace").decode()[:2000] or type(error).__name__
    told = {"type": type(error).__name__, "message": text}
    return told | {"code": error.code} if isinstance(error, OrchestraError) else told
