"""One delivery of a workflow's step: begin, run the agent, commit, send what is ready; then it may be settled.

The order is what makes a crash harmless. Begun: the record has the fence, and an older delivery can no longer commit.
Committed before the delivery is settled: a delivery that comes again after a crash finds its step ended, sends what was
not sent, and runs nothing. What is sent has ids of its own, so that sending twice adds nothing.

Owns what a verdict of :class:`~orchestra._execution.Execution` means for a step. Refuses to own how an agent is run
(retries, limits, breakers, timeouts are those of any task) and what a commit changes (the engine's). One event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from orchestra._agents.services import Services, StepScope, serving
from orchestra._backoff import Reconnect
from orchestra._delivery import DONE, STEP, Again, Bury, Cancel, Complete
from orchestra._execution import CANCELLED, RELEASED, Ended
from orchestra._workflow.driver import OWN, Driver
from orchestra._workflow.local import NOT_NOW, LocalAgents, describe
from orchestra._workflow.making import PLAN, TIMER
from orchestra._workflow.plan import PlannedStep, ready_args
from orchestra._workflow.planning import Planning, Templates, checked_planners
from orchestra._workflow.upkeep import CANCELLED_STEP, Upkeep, end_of_cancelled, error_of, step_told
from orchestra.agents import get_agent_registry
from orchestra.errors import (
    ConfigurationError,
    CorruptEntryError,
    InvalidTaskError,
    QueueFullError,
    StoreError,
    WaitForSignal,
    WorkflowError,
)
from orchestra.memory import MemoryManager
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import BaseTask, Outcome, check_ident, check_name
from orchestra.workflow import StepState, WorkflowEngine

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from orchestra._delivery import Delivery
    from orchestra._execution import Execution
    from orchestra._pool.slots import Slot
    from orchestra._queue.base import BaseTaskQueue
    from orchestra.agents import AgentRegistry
    from orchestra.circuit_breaker import CircuitBreakerConfig
    from orchestra.workflow import Begun, Moved

T = TypeVar("T")
logger = logging.getLogger("orchestra.workflow")

PATIENCE: Final = 30.0
"""Seconds that a result waits for Redis to come back; after that its step is given back, and runs again."""
AWAY: Final = 1.0
"""Seconds until a step comes back that could not begin because Redis was away."""
_OVER: Final = Ended(Outcome.COMPLETED, DONE)


class Where(NamedTuple):
    """Which step a task carries; ``claim``: see :meth:`~orchestra.workflow.WorkflowEngine.begin`."""

    namespace: str
    workflow_id: str
    step: int
    series: int
    claim: str


class StepRunner:
    """Runs the steps of workflows for the dispatchers of one queue.

    Args:
        engine: the workflows that are swept from the start; those of other namespaces are met when their steps come, on
            the Redis of the queue. None: only met.
        queue: where steps come from and go to.
        agents: who plans; by default the process-wide registry.
        templates, planner: see :class:`~orchestra._workflow.driver.Driver`; workflows without a plan are planned here.
        breaker: when the breakers of the planners open.
        sweep: seconds between two looks for what was not sent, 0.05 to 3600.
        guest: the queue is served for the sake of workflows: tasks that nobody here serves are given back, not buried.
        actions: what planners may use at present; None is anything: other workers may have agents that this one has not.
    """

    def __init__(
        self,
        engine: WorkflowEngine | None,
        queue: BaseTaskQueue,
        *,
        agents: AgentRegistry | None = None,
        templates: Templates | dict[str, Any] | None = None,
        planner: str | Sequence[str] = "planner",
        breaker: CircuitBreakerConfig | None = None,
        sweep: float = 5.0,
        guest: bool = False,
        actions: Callable[[], Collection[str] | None] = lambda: None,
    ) -> None:
        self.queue = queue
        self.guest = guest
        self._templates = templates if isinstance(templates, Templates) else Templates(templates)
        self._planners = checked_planners(planner)
        memory = None if engine is None else engine.memory_manager
        services = Services(queue, memory)
        self._agents = get_agent_registry() if agents is None else agents
        local = LocalAgents(self._agents, breaker, services=services)
        encode = (MemoryManager() if memory is None else memory).encode
        self._planning = Planning(local, self._templates, self._planners, actions, encode)
        self._drivers: dict[str, Driver] = {}
        self._upkeep = Upkeep(queue, self._drivers, sweep, self.driver)
        self._open = 0
        if engine is not None:
            self._driver_of(engine)

    async def __aenter__(self) -> Self:
        """A dispatcher starts; with the first one begins the upkeep, if there is something to keep up."""
        self._open += 1
        if self._drivers:
            await self._upkeep.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._open -= 1
        if not self._open:
            await self._upkeep.stop()

    def driver(self, namespace: str) -> Driver:
        """Who drives the workflows of ``namespace``. Raises ConfigurationError for what is no namespace."""
        driver = self._drivers.get(namespace)
        if driver is None:
            check_name("workflow namespace", namespace)
            driver = self._driver_of(WorkflowEngine(_memory_of(self.queue, namespace)))
        return driver

    def _driver_of(self, engine: WorkflowEngine) -> Driver:
        driver = Driver(engine, self.queue, templates=self._templates, planner=self._planners)
        self._drivers[driver.namespace] = driver
        return driver

    # -- one delivery

    async def run(self, execution: Execution, delivery: Delivery, task: BaseTask, slot: Slot) -> Ended:
        """Process the delivery of a step, a timer or a plan that is asked for; see :class:`~orchestra._execution.Steps`."""
        try:
            where = _where(task)
            driver = self.driver(where.namespace)
        except ConfigurationError as error:
            return _corrupt(delivery, task, error)
        try:
            if self._open and not self._upkeep.running:
                await self._upkeep.start()
            if task.type != TIMER and self.queue.cancel_requested(delivery):  # once it runs, its slot is interrupted
                await self._end(driver, where, end_of_cancelled(task.type), delivery, error=CANCELLED_STEP)
                return CANCELLED
            if task.type in OWN:
                return await self._own(driver, where, delivery, task)
            return await self._step(driver, where, execution, delivery, task, slot)
        except asyncio.CancelledError:
            if slot.why is None:
                raise
            return await self._interrupted(driver, where, delivery, slot)
        except (StoreError, QueueFullError) as error:
            logger.warning("step %s has to wait: %s", task.id, error)
            return Ended(Outcome.RELEASED, Again(AWAY, "released"))
        except (CorruptEntryError, ConfigurationError, InvalidTaskError) as error:
            return _corrupt(delivery, task, error)
        except WorkflowError as error:
            logger.warning("step %s is dropped: %s", task.id, error)
            return _OVER
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # it was not made by a driver
            return _corrupt(delivery, task, error)

    async def _interrupted(self, driver: Driver, where: Where, delivery: Delivery, slot: Slot) -> Ended:
        """The slot was interrupted while the record was being changed, before or after the run of the agent."""
        if slot.why is not Outcome.CANCELLED:
            return RELEASED  # whoever gets it next finds out what was recorded
        try:
            await self._end(driver, where, end_of_cancelled(delivery.header.type), delivery, error=CANCELLED_STEP)
        except (StoreError, WorkflowError) as error:
            logger.warning("step %d of workflow %s was cancelled: %s", where.step, where.workflow_id, error)
        return CANCELLED

    async def _own(self, driver: Driver, where: Where, delivery: Delivery, task: BaseTask) -> Ended:
        if task.type == PLAN:
            return await self._plan(driver, where, delivery)
        moved = await driver.engine.fire(where.workflow_id, where.step, where.series)
        await self._send(driver, where, moved)
        return _OVER

    async def _plan(self, driver: Driver, where: Where, delivery: Delivery) -> Ended:
        engine, workflow_id = driver.engine, where.workflow_id
        begun = await engine.begin(*where[1:4], delivery.fence, where.claim)
        if begun.verdict != "go":  # it has its plan; what was not sent then is in the outbox
            return _OVER
        told = begun.task
        task = BaseTask(workflow_id, told["type"], begun.known.input, told["priority"])
        task.metadata = dict(told.get("metadata") or {})
        try:
            planned = await self._planning.plan(task)
        except NOT_NOW as error:
            wait = max(0.05, min(float(getattr(error, "retry_after", getattr(error, "after", AWAY))), 3600.0))
            await engine.retrying(*where[1:4], None, wait, fence=delivery.fence, counted=False, claim=where.claim)
            return Ended(Outcome.THROTTLED, Again(wait, "throttled"))
        if not await driver.planned(
            workflow_id, planned
        ):  # it ends, and waits for this; one with a plan has another life
            return await self._end(driver, where, StepState.FAILED, delivery, error=CANCELLED_STEP)
        return _OVER

    async def _step(
        self, driver: Driver, where: Where, execution: Execution, delivery: Delivery, task: BaseTask, slot: Slot
    ) -> Ended:
        _, workflow_id, index, series, claim = where
        begun = await driver.engine.begin(workflow_id, index, series, delivery.fence, claim)
        if begun.verdict != "go":
            if begun.ready:  # committed by a delivery that did not live to send them
                await driver.send_ready(workflow_id, begun.ready, begun.task)
            return _OVER
        try:
            await _prepare(driver.engine, where, begun, task)
            self._check(task, begun)
        except (WorkflowError, InvalidTaskError) as error:
            return await self._end(driver, where, StepState.FAILED, delivery, error=describe(error))
        if delivery.lost:
            return RELEASED  # while it waited for its turn somebody else has taken it over
        step_id = _id_of(begun)
        scope = StepScope(workflow_id, index, step_id, series, begun.total, begun.known)
        with serving(Services(self.queue, driver.engine.memory_manager, driver.engine, scope)):
            ended = await execution.run(delivery, slot, task)
        if slot.abandoned:
            return ended  # the delivery was settled when its agent was given up
        if (again := _waits_in_vain(begun, ended)) is not None:
            return await self._end(driver, where, StepState.FAILED, delivery, error=again)
        return await self._commit(driver, where, delivery, slot, ended)

    def _check(self, task: BaseTask, begun: Begun) -> None:
        """Raise InvalidTaskError when the agent's signature does not take the args of the step."""
        entry = self._agents.get(task.type)
        if entry is not None and entry.check is not None:
            entry.check(task.input, f"step {_id_of(begun)}: ")

    # -- what became of it

    async def _commit(self, driver: Driver, where: Where, delivery: Delivery, slot: Slot, ended: Ended) -> Ended:
        """Record what the run of the agent has come to. Until that is done the delivery is not settled."""
        verdict = ended.verdict
        if isinstance(verdict, Complete):
            if isinstance(verdict.value, WaitForSignal):
                return await self._park(driver, where, delivery, verdict.value)
            return await self._end(driver, where, StepState.COMPLETED, delivery, result=verdict.value)
        if isinstance(verdict, Bury):
            error = error_of(verdict.reason, verdict.attempts, verdict.error)
            await self._end(driver, where, StepState.FAILED, delivery, error=error)
            return Ended(ended.outcome, DONE)  # the record holds the failure: a dead letter would tell it twice
        if isinstance(verdict, Cancel):
            await self._end(driver, where, StepState.SKIPPED, delivery, error=CANCELLED_STEP)
            return ended
        if verdict.counter != "released":
            counted = verdict.counter == "retried"
            told = {"message": verdict.error} if verdict.error else None
            moved = await _insist(
                lambda: driver.engine.retrying(
                    *where[1:4], told, verdict.left(), fence=delivery.fence, counted=counted, claim=where.claim
                )
            )
            await self._send(driver, where, moved)
        return ended

    async def _end(
        self,
        driver: Driver,
        where: Where,
        state: StepState,
        delivery: Delivery,
        *,
        result: Any = None,
        error: dict[str, Any] | None = None,
    ) -> Ended:
        finish, fence, claim = driver.engine.finish, delivery.fence, where.claim
        try:
            moved = await _insist(lambda: finish(*where[1:4], state, result, error, fence=fence, claim=claim))
        except InvalidTaskError as refused:  # what the agent returned cannot be recorded
            told = describe(refused)
            moved = await _insist(lambda: finish(*where[1:4], StepState.FAILED, None, told, fence=fence, claim=claim))
        await self._send(driver, where, moved)
        return _OVER

    async def _park(self, driver: Driver, where: Where, delivery: Delivery, wish: WaitForSignal) -> Ended:
        """The step waits for a signal, without a worker."""
        moved = await _insist(
            lambda: driver.engine.park(
                *where[1:4],
                signal=wish.name,
                prompt=wish.prompt,
                due=wish.timeout,
                fence=delivery.fence,
                claim=where.claim,
            )
        )
        await self._send(driver, where, moved)
        return _OVER

    async def _send(self, driver: Driver, where: Where, moved: Moved) -> None:
        """What cannot be sent now is in the outbox: the result is safe, and the delivery may be settled."""
        try:
            await driver.send(where.workflow_id, moved)
        except (StoreError, QueueFullError) as error:
            logger.warning("workflow %s: %s; what is ready will be sent later", where.workflow_id, error)


async def _insist(commit: Callable[[], Awaitable[T]]) -> T:
    """``await commit()``, repeated while Redis is away: what an agent has done is worth a wait.

    Raises:
        StoreError: it was away for too long.
    """
    backoff, clock = Reconnect(), asyncio.get_running_loop().time
    deadline = clock() + PATIENCE
    while True:
        try:
            return await commit()
        except StoreError:
            wait = backoff.next()
            if clock() + wait > deadline:
                raise
        await asyncio.sleep(wait)


async def _prepare(engine: WorkflowEngine, where: Where, begun: Begun, task: BaseTask) -> None:
    """Give ``task`` what its agent is to get. Raises WorkflowError: a reference leads nowhere."""
    words = begun.planned
    args = words.get("args")
    planned = PlannedStep(where.step, task.id, task.type, args)  # as far as its args matter; compiled, it costs more
    task.input = begun.known.input if args is None else ready_args(planned, begun.known)
    task.metadata["workflow"] = {
        "task_id": where.workflow_id,
        "step_index": where.step,
        "total": begun.total,
        "reasoning": words.get("reasoning") or "",
    }
    task.metadata["context"] = {
        "task": {"id": where.workflow_id, "type": begun.task.get("type"), "input": begun.known.input},
        "results": await _results(engine, where, begun),
        "shared": dict(begun.known.context),
    }


def _id_of(begun: Begun) -> str:
    return "" if begun.step is None else begun.step.id


async def _results(engine: WorkflowEngine, where: Where, begun: Begun) -> list[Any]:
    """The results of the steps before this one: all of them in a plan that has no other way to say what it needs.

    A plan with ``depends_on`` or references gets those of the steps it names, None for the others.
    """
    found = dict(begun.known.results)
    if begun.reads_all:
        missing = [index for index in range(where.step) if index not in found]
        if missing:
            found.update(await engine.results(where.workflow_id, missing))
    return [found.get(index) for index in range(where.step)]


def _waits_in_vain(begun: Begun, ended: Ended) -> dict[str, Any] | None:
    """The failure of an agent that asks for a signal it was given: it would be run again at once, for ever."""
    wish = ended.verdict.value if isinstance(ended.verdict, Complete) else None
    if not isinstance(wish, WaitForSignal) or wish.name not in begun.known.signals:
        return None
    text = (
        f"the agent waits for signal {wish.name!r}, which it has: wait_signal() gives its value; another needs a name"
    )
    return {"type": "WaitForSignal", "message": text}


def _where(task: BaseTask) -> Where:
    """Which step ``task`` carries. Raises ConfigurationError when that cannot be told."""
    told = step_told(task.metadata)
    if told is None:
        text = f"metadata[{STEP!r}] must be [namespace, workflow id, index, series, claim], got {task.metadata[STEP]!r:.100}"
        raise ConfigurationError(text, field=STEP)
    check_ident("workflow id", told[1])
    return Where(*told)


def _memory_of(queue: BaseTaskQueue, namespace: str) -> MemoryManager:
    """Where the workflows of ``namespace`` are kept: on the Redis of ``queue``."""
    if isinstance(queue, RedisStreamTaskQueue):
        return MemoryManager(queue.manager, namespace=namespace)
    if isinstance(queue, InMemoryTaskQueue):
        return MemoryManager("memory:", namespace=namespace)
    return MemoryManager(namespace=namespace)


def _corrupt(delivery: Delivery, task: BaseTask, error: Exception) -> Ended:
    """The end of what cannot be run, because it or the record of its workflow is not understood; both are kept."""
    logger.warning("step %s cannot be run: %s", task.id, error)
    facts = {"error": str(error), "error_type": type(error).__name__}
    return Ended(Outcome.FAILED, Bury("corrupt_workflow", delivery.retries, facts))
