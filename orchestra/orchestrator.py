"""Carries a task from plan to final output: plans it, has its steps run, and waits for the end.

Owns the order of things: ask the planners, fall back when none can answer, record the workflow, send what is ready,
wait. Steps travel through the queue, so any worker may run them; while it waits, an orchestrator is such a worker
itself. Without a queue they run here, through the pool. Refuses to own state (the workflow engine's), concurrency (the
pool's) and agents (the registry's).

Crash-only: there is no separate recovery, and no coordinator that could be lost. Whoever ends a step sends what it made
ready; what a crash can repeat is planning or the steps in flight, never a step whose result is recorded. One event
loop; calls for one task in this process take turns.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from orchestra._agents.services import Services
from orchestra._shared import Connectable, shared
from orchestra._workflow.driver import Driver
from orchestra._workflow.inline import Inline, refuse_built_in
from orchestra._workflow.local import NOT_NOW, LocalAgents, describe
from orchestra._workflow.making import checked_plan
from orchestra._workflow.plan import compile_plan
from orchestra._workflow.planning import Plan, Planned, Planning, Template, Templates
from orchestra._workflow.runner import StepRunner
from orchestra._workflow.upkeep import sweep
from orchestra.agents import AgentRegistry, get_agent_registry
from orchestra.dispatcher import Dispatcher
from orchestra.errors import (
    ConfigurationError,
    InvalidTaskError,
    InvalidTaskTypeError,
    WorkerPoolError,
    WorkflowError,
)
from orchestra.memory import MemoryManager, get_memory_manager
from orchestra.orchestration_worker_pool import QueueWorkerPool
from orchestra.serialization import dumps, loads, new_task_id
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import BaseTask, TaskPriority, check_ident
from orchestra.workflow import StepState, WorkflowEngine, WorkflowState, WorkflowStep

if TYPE_CHECKING:
    from orchestra.circuit_breaker import CircuitBreakerConfig
    from orchestra.task_queue import BaseTaskQueue

__all__ = ["NOT_NOW", "Orchestrator", "Plan", "Template", "describe", "get_orchestrator"]

LOOK: Final = 1.0
"""Seconds between two looks whether the pool, on which a wait relies, has been shut down."""
_ENDED: Final = frozenset({StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED})


class Orchestrator(Connectable):
    """Plans and executes multi-step tasks.

    Args:
        task_queue: what steps travel through; None: they run in this process, one workflow's steps in the caller's own
            order, and what needs somebody to come back later (signals, sleeps, maps, children, compensation) is refused.
        memory_manager: where workflows are recorded.
        worker_pool: runs the steps; at most its concurrency at once, over all workflows. A job of the same pool must not
            call the orchestrator: it would hold the slot that its own steps wait for.
        agents: who plans and executes; by default the process-wide registry. A step runs the agent that is registered
            under its ``action``.
        planner: the type under which the planning agent is registered, if there is one; or several, asked in order.
        breaker: when the breakers of the planners open, and without a queue those of all agents; one for each type.
        actions: what planners may use; by default what is registered in ``agents``, and anything with ``serve=False``.
        serve: whether it runs steps itself while it waits. It then is a worker of the queue, which gives back tasks
            that it has no agent for. False: other workers do.
        sweep: seconds between two looks for steps that were not sent, 0.05 to 3600.

    Raises:
        TypeError: If memory_manager is not an instance of MemoryManager

    A planner gets a task with ``input`` ``{"task": {"id", "type", "input"}, "agents": [registered types]}`` and
    returns a list of steps (see :func:`~orchestra.workflow.validate_plan`), or a dict with that list as ``"plan"``. If
    there is none, or it fails, or returns what is no plan or names unknown actions, the next one is asked, then the
    template of the task's type, else one step that hands the task's input to the agent of its own type.
    ``workflow_context["plan_source"]`` says which it was, ``["planner_error"]`` why the first planner's was not used.
    """

    def __init__(
        self,
        task_queue: BaseTaskQueue | None,
        memory_manager: MemoryManager,
        worker_pool: QueueWorkerPool,
        *,
        agents: AgentRegistry | None = None,
        planner: str | Sequence[str] = "planner",
        breaker: CircuitBreakerConfig | None = None,
        actions: Collection[str] | None = None,
        serve: bool = True,
        sweep: float = 5.0,
    ) -> None:
        self.task_queue = task_queue
        self.memory_manager = memory_manager
        self.worker_pool = worker_pool
        self.workflow_engine = WorkflowEngine(memory_manager)
        self.agents = get_agent_registry() if agents is None else agents
        self.planner = planner
        self._actions = actions
        self._serve = serve
        self._templates = Templates()
        services = Services(task_queue, memory_manager, self.workflow_engine)
        self._local = LocalAgents(self.agents, breaker, worker_pool, services)
        self._planning = Planning(self._local, self._templates, planner, self._known_actions, memory_manager.encode)
        self._inline = Inline(self.workflow_engine, self._local)
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._driver: Driver | None = None
        if task_queue is not None:
            self._driver = Driver(self.workflow_engine, task_queue, templates=self._templates, planning=self._planning)
            self._runner = StepRunner(
                self.workflow_engine,
                task_queue,
                agents=self.agents,
                templates=self._templates,
                planner=planner,
                breaker=breaker,
                sweep=sweep,
                guest=True,
            )
        self._serving = asyncio.Lock()
        self._waiting = 0
        self._dispatcher: Dispatcher | None = None

    async def _connect(self) -> None:
        await self.workflow_engine

    def _known_actions(self) -> Collection[str] | None:
        if self._actions is not None:
            return self._actions
        return set(self.agents) if self._serve or self.task_queue is None else None

    def register_template(self, task_type: str, template: Template) -> None:
        """Use ``template``, a plan or a function from a task to one, for tasks of ``task_type`` without a planner's.

        Raises:
            WorkflowError: the plan has faults; ``.faults`` lists them. A function's are found when it is used, and then
                the single step is used instead.
        """
        self._templates.add(task_type, template)

    # -- the whole way

    async def process_incoming_task(self, task_id: str, task_data: dict[str, Any]) -> None:
        """Carry a task to its end: its workflow has ended in the record when this returns.

        Called again it goes on where the record says, repeating at most the steps in flight, and does nothing for a
        workflow that has ended. ``workflow_context["final_output"]`` is the result of the last step, or of all steps
        that nothing follows, by id. An agent's failure is recorded, not raised. A step costs four round trips, shared
        with those of other workflows; a workflow five more.

        Cancelled, it stops waiting, and what it runs is interrupted and given back; the workflow goes on elsewhere, or
        with the next call.

        Raises:
            InvalidTaskError: ``task_data`` is no task, or its id is another one. Nothing was recorded.
            WorkflowError: the workflow is recorded with another type or input, or another process has taken it over.
            Throttled, RetryLater, WorkerPoolError: the planner, or without a queue a step, cannot run now (a step also
                with CircuitOpenError); the workflow waits for the next call. Nothing failed.
            StoreError: Redis failed; call again.
        """
        task = _task(task_id, task_data)
        async with self._turn(task_id):
            state = await self._begin(task, None)
            if state.is_finished():
                return
            if self._driver is None or not state.driven:
                await self._inline.carry_on(state)
                return
            await self.wait(task_id)

    async def start(self, task: BaseTask | dict[str, Any], plan: Plan | None = None) -> str:
        """Plan a task, unless ``plan`` is given, record its workflow and send what is ready; returns its id.

        Raises: as :meth:`process_incoming_task`; WorkflowError with ``.faults`` for a plan that has some.
        """
        if isinstance(task, dict):
            task = _task(task.get("id") or new_task_id(), task)
        if plan is not None:
            plan = await checked_plan(plan, actions=self._known_actions())
        async with self._turn(task.id):
            await self._begin(task, plan)
        return task.id

    async def wait(self, workflow_id: str, timeout: float | None = None) -> WorkflowState:
        """The workflow when it has ended, running steps meanwhile if this orchestrator serves.

        Of an id that nobody has started yet, it waits for that too.

        Raises:
            TimeoutError: it has not after ``timeout`` seconds.
            WorkerPoolError: the pool was shut down; the workflow stays as it is.
        """
        if self._driver is None:
            async with self._turn(workflow_id):
                state = await self._loaded(workflow_id)
                if not state.is_finished():
                    await self._inline.carry_on(state)
                return await self._loaded(workflow_id)
        async with asyncio.timeout(timeout), self._served():
            while True:
                try:
                    return await self.workflow_engine.wait_end(workflow_id, LOOK)
                except TimeoutError:
                    if self._serve:
                        require_open(self.worker_pool)

    async def signal(self, workflow_id: str, name: str, value: Any = None, *, by: str | None = None) -> bool:
        """Give signal ``name`` its value; whether this call did: the first one wins."""
        return await self._steered().signal(workflow_id, name, value, by=by)

    async def cancel(self, workflow_id: str, reason: str | None = None) -> bool:
        """Cancel a workflow and its children: what runs is interrupted, what is done is compensated."""
        return await self._steered().cancel(workflow_id, reason)

    async def pause(self, workflow_id: str) -> bool:
        """Let running steps end, and hold those that are ready."""
        return await self._steered().pause(workflow_id)

    async def resume(self, workflow_id: str) -> bool:
        """Go on after a pause, or after a failure: failed steps are sent again."""
        return await self._steered().resume(workflow_id)

    def _steered(self) -> Driver:
        if self._driver is None:
            raise ConfigurationError(
                "an Orchestrator without a task_queue runs workflows only while it is called: there is nothing to steer",
                field="task_queue",
            )
        return self._driver

    # -- one step

    async def route_and_execute_step(self, task_id: str, step_index: int) -> WorkflowStep:
        """Run one step, which must be the current one, and return it as recorded.

        The agent is the one registered under the step's ``action``. Its task has ``id`` ``<task_id>:<step_index>``, the
        step's ``args`` as ``input`` (the input of the workflow's task when the step has none), and in ``metadata``, with
        the task's own: ``workflow`` (``task_id``, ``step_index``, ``total``, ``reasoning``) and ``context`` (``task``,
        ``results`` of the steps before it by index, ``shared``: the ``workflow_context``). ``attempt`` and ``fence``
        count how often the step was started. When the agent fails for good, step and workflow are FAILED.

        A workflow whose steps travel through the queue goes on by itself: of such a one, this waits for the step.

        Raises:
            WorkflowError: the workflow is unknown or has ended, the step is not the current one or has ended, or
                another process has taken it over.
            Throttled, RetryLater, CircuitOpenError, WorkerPoolError, StoreError: as :meth:`process_incoming_task`.
        """
        async with self._turn(task_id):
            state = await self._loaded(task_id)
            if type(step_index) is not int or not 0 <= step_index < len(state.steps):
                raise WorkflowError(f"workflow {task_id} has steps 0 to {len(state.steps) - 1}, not {step_index!r}")
            if self._driver is not None and state.driven:
                return await self._awaited(state, step_index)
            planned = compile_plan(state.plan)
            refuse_built_in(task_id, (planned[step_index],))
            return await self._inline.execute(state, planned[step_index])

    async def _awaited(self, state: WorkflowState, index: int) -> WorkflowStep:
        step, pause = state.steps[index], 0.01
        if state.is_finished() or step.state in _ENDED:
            what = f"step {index} ({step.action}) is {step.state.value}"
            raise WorkflowError(f"workflow {state.task_id} is {state.status.value} and {what}: it cannot run again")
        await self._send_left()
        async with self._served():
            while step.state not in _ENDED and not state.is_finished():
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.5)
                state = await self._loaded(state.task_id)
                step = state.steps[index]
        return step

    async def _loaded(self, task_id: str) -> WorkflowState:
        state = await self.workflow_engine.load_workflow_state(task_id)
        if state is None:
            raise WorkflowError(f"there is no workflow for task {task_id}: it was never initialised, or has expired")
        return state

    def _turn(self, task_id: str) -> asyncio.Lock:
        return self._turns.setdefault(task_id, asyncio.Lock())

    # -- beginning

    async def _begin(self, task: BaseTask, plan: Plan | None) -> WorkflowState:
        """The recorded workflow of ``task``, planned and recorded now if there is none; what is ready was sent."""
        engine = self.workflow_engine
        state = await engine.load_workflow_state(task.id)
        if state is None:
            planned = Planned(plan, {"plan_source": "given"}) if plan is not None else await self._planning.plan(task)
            driven = self._driver is not None
            if not driven:
                refuse_built_in(task.id, compile_plan(planned.plan))
            state = await engine.initialize_workflow(task, planned.plan, context=planned.context, driven=driven)
            if state is not None and self._driver is not None:
                await self._driver.send_ready(task.id, state.ready, state.task)
        elif state.driven and not state.is_finished():
            await self._send_left()
        if state is None:  # another process has planned it meanwhile; what was recorded first counts
            state = await engine.load_workflow_state(task.id)
        if state is None:
            raise WorkflowError(f"the workflow of task {task.id} was deleted while it was initialised; call again")
        if state.task.get("type") != task.type or not _same(state.task.get("input"), task.input):
            raise WorkflowError(
                f"task {task.id} is recorded with another type or input; give this one an id of its own"
            )
        return state

    async def _send_left(self) -> None:
        """Send what a process that died had not sent, as far as it is overdue."""
        if self._driver is not None:
            await sweep(self._driver)

    # -- being a worker

    @asynccontextmanager
    async def _served(self) -> AsyncIterator[None]:
        """Run steps meanwhile, together with all other calls that wait."""
        if not self._serve or self.task_queue is None:
            yield
            return
        require_open(self.worker_pool)
        self._waiting += 1
        hurry = True
        try:
            async with self._serving:
                if self._dispatcher is None:
                    self._dispatcher = await self._worker(self.task_queue).start()
            yield
            hurry = False
        finally:
            self._waiting -= 1
            if not self._waiting:
                await self._rest(hurry=hurry)

    def _worker(self, queue: BaseTaskQueue) -> Dispatcher:
        return Dispatcher(
            queue,
            worker_pool=self.worker_pool,
            max_concurrent_dispatch=self.worker_pool.concurrency,
            default_max_retries=0,
            agents=self.agents,
            workflows=self._runner,
        )

    async def _rest(self, *, hurry: bool) -> None:
        """Nobody waits any more. ``hurry``: what runs is given back at once instead of let finish."""
        async with self._serving:
            if self._waiting or self._dispatcher is None:
                return
            dispatcher, self._dispatcher = self._dispatcher, None
            if hurry:
                dispatcher._drain_timeout = 0.0
            await dispatcher.stop()


def require_open(pool: QueueWorkerPool) -> None:
    """Raise WorkerPoolError when ``pool`` was shut down: nothing that waits for it would ever end."""
    if pool.closed:
        raise WorkerPoolError(f"worker pool {pool.name!r} is shut down; make a new one")


def _task(task_id: str, task_data: Any) -> BaseTask:
    """The task that ``task_data`` describes; InvalidTaskError naming the key that is wrong."""
    if not isinstance(task_data, dict):
        raise InvalidTaskTypeError(f"task_data must be a dict, got {type(task_data).__name__}")
    try:
        check_ident("task_id", task_id)
        check_ident("type", task_data.get("type"))
    except ConfigurationError as error:
        raise InvalidTaskError(str(error), path=error.field) from None
    if task_data.get("id", task_id) != task_id:
        raise InvalidTaskError(f"task_data has the id {task_data['id']!r}, but task_id is {task_id!r}", path="id")
    priority = task_data.get("priority")
    priority = TaskPriority.NORMAL if priority is None else priority
    if isinstance(priority, bool) or priority not in tuple(TaskPriority):
        raise InvalidTaskError(f"priority must be 0 (critical) to 3 (low), got {priority!r}", path="priority")
    metadata = task_data.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InvalidTaskTypeError(f"metadata must be a dict, got {type(metadata).__name__}", path="metadata")
    return BaseTask(task_id, task_data["type"], task_data.get("input"), int(priority), metadata=metadata)


def _same(recorded: Any, given: Any) -> bool:
    """Whether ``given`` would be recorded as ``recorded`` is, whatever the order of its keys."""
    wire = dumps(given)
    if dumps(recorded) == wire:
        return True
    try:
        return bool(recorded == loads(wire))
    except ValueError:  # arrays have no single truth; equal ones have equal bytes
        return False


def get_orchestrator(
    task_queue: BaseTaskQueue | None = None,
    memory_manager: MemoryManager | None = None,
    worker_pool: QueueWorkerPool | None = None,
) -> Orchestrator:
    """The shared orchestrator of this event loop; awaiting it connects its memory.

    The first call makes it, from what is given and for the rest the queue ``"orchestrator"`` (group ``"orchestrator"``),
    the shared memory manager and a pool ``"orchestrator"`` of its own.

    Raises:
        ConfigurationError: it exists with another queue, memory manager or pool than the one given.
    """
    made = shared("orchestrator", "default", lambda: _make(task_queue, memory_manager, worker_pool))
    given = {"task_queue": task_queue, "memory_manager": memory_manager, "worker_pool": worker_pool}
    for name, wanted in given.items():
        if wanted is not None and getattr(made, name) is not wanted:
            raise ConfigurationError(
                f"the shared orchestrator exists with another {name}: make an Orchestrator of your own", field=name
            )
    return made


def _make(
    task_queue: BaseTaskQueue | None, memory_manager: MemoryManager | None, worker_pool: QueueWorkerPool | None
) -> Orchestrator:
    return Orchestrator(
        RedisStreamTaskQueue("orchestrator", "orchestrator") if task_queue is None else task_queue,
        get_memory_manager() if memory_manager is None else memory_manager,
        QueueWorkerPool("orchestrator") if worker_pool is None else worker_pool,
    )
