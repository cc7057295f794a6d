"""Carries a task from plan to final output: plans it, runs its steps through a worker pool, records every result.

Owns the order of things: ask the planner, fall back when it cannot answer, initialise the workflow, run one step after
the other, complete or fail. Refuses to own state (the workflow engine's), concurrency (the pool's) and agents (the
registry's). Steps run in this process, through the pool that was given.

Crash-only: there is no separate recovery. Every call looks at the record and goes on from there, so what a crash can
repeat is planning or the step in flight, never a step whose result is recorded. One event loop; calls for one task in
this process take turns, and of several processes the one that started a step last may record its result.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from orchestra._shared import Connectable, shared
from orchestra.agents import AgentOptions, AgentRegistry, get_agent_registry, unknown_agent
from orchestra.circuit_breaker import CircuitBreaker, CircuitBreakerConfig
from orchestra.errors import (
    CircuitOpenError,
    ConfigurationError,
    InvalidTaskError,
    InvalidTaskTypeError,
    OrchestraError,
    RetryLater,
    Throttled,
    WorkerPoolError,
    WorkflowError,
)
from orchestra.memory import MemoryManager, get_memory_manager
from orchestra.orchestration_worker_pool import QueueWorkerPool
from orchestra.serialization import dumps, loads
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import BaseTask, TaskPriority, check_ident
from orchestra.workflow import StepState, WorkflowEngine, WorkflowState, WorkflowStep, validate_plan

if TYPE_CHECKING:
    from orchestra.task_queue import BaseTaskQueue

Plan: TypeAlias = list[dict[str, Any]]
Template: TypeAlias = Plan | Callable[[BaseTask], Plan]

logger = logging.getLogger("orchestra.orchestrator")

NOT_NOW: Final = (Throttled, RetryLater, CircuitOpenError, WorkerPoolError)
"""What says that a step cannot run at present: it is given back as PENDING and the caller is told."""


class Orchestrator(Connectable):
    """Plans and executes multi-step tasks.

    Args:
        task_queue: the queue that this orchestrator's tasks come from; kept for its user.
        memory_manager: where workflows are recorded.
        worker_pool: runs the steps; at most its concurrency at once, over all workflows. A job of the same pool must not
            call the orchestrator: it would hold the slot that its own steps wait for.
        agents: who plans and executes; by default the process-wide registry. A step runs the agent that is registered
            under its ``action``.
        planner: the type under which the planning agent is registered, if there is one.
        breaker: when the breakers of planner and agents open; there is one for each type.

    Raises:
        TypeError: If memory_manager is not an instance of MemoryManager

    The planner gets a task with ``input`` ``{"task": {"id", "type", "input"}, "agents": [registered types]}`` and
    returns a list of steps (see :func:`~orchestra.workflow.validate_plan`), or a dict with that list as ``"plan"``. If
    there is none, or it fails or returns what is no plan, the template of the task's type is used, else one step that
    hands the task's input to the agent of its own type. ``workflow_context["plan_source"]`` says which it was,
    ``["planner_error"]`` why the planner's was not used.
    """

    def __init__(
        self,
        task_queue: BaseTaskQueue | None,
        memory_manager: MemoryManager,
        worker_pool: QueueWorkerPool,
        *,
        agents: AgentRegistry | None = None,
        planner: str = "planner",
        breaker: CircuitBreakerConfig | None = None,
    ) -> None:
        self.task_queue = task_queue
        self.memory_manager = memory_manager
        self.worker_pool = worker_pool
        self.workflow_engine = WorkflowEngine(memory_manager)
        self.agents = get_agent_registry() if agents is None else agents
        self.planner = check_ident("planner", planner)
        self._breaker_config = breaker
        self._breakers: dict[str, CircuitBreaker] = {}  # only of registered types, so bounded by the registry
        self._templates: dict[str, Template] = {}
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def _connect(self) -> None:
        await self.workflow_engine

    def register_template(self, task_type: str, template: Template) -> None:
        """Use ``template``, a plan or a function from a task to one, for tasks of ``task_type`` without a planner's.

        Raises:
            WorkflowError: the plan has faults; ``.faults`` lists them. A function's are found when it is used.
        """
        check_ident("task_type", task_type)
        self._templates[task_type] = template if callable(template) else validate_plan(template)

    async def process_incoming_task(self, task_id: str, task_data: dict[str, Any]) -> None:
        """Carry a task to its end: its workflow is COMPLETED or FAILED in the record when this returns.

        Called again it goes on where the record says, repeating at most the step in flight, and does nothing for a
        workflow that has ended. ``workflow_context["final_output"]`` is the result of the last step. An agent's
        failure is recorded, not raised. A step costs four round trips, a workflow five more.

        Raises:
            InvalidTaskError: ``task_data`` is no task, or its id is another one. Nothing was recorded.
            WorkflowError: the workflow is recorded with another type or input, or another process has taken it over.
            Throttled, RetryLater, CircuitOpenError, WorkerPoolError: a step cannot run now; the workflow waits for
                the next call. Nothing failed.
            StoreError: Redis failed; call again.
        """
        task = _task(task_id, task_data)
        async with self._turn(task_id):
            state = await self._begin(task)
            if not state.is_finished():
                await self._carry_on(state)

    async def route_and_execute_step(self, task_id: str, step_index: int) -> WorkflowStep:
        """Run one step, which must be the current one, and record what became of it; returns it as recorded.

        The agent is the one registered under the step's ``action``. Its task has ``id`` ``<task_id>:<step_index>``, the
        step's ``args`` as ``input`` (the input of the workflow's task when the step has none), and in ``metadata``, with
        the task's own: ``workflow`` (``task_id``, ``step_index``, ``total``, ``reasoning``) and ``context`` (``task``,
        ``results`` of the steps before it by index, ``shared``: the ``workflow_context``). ``attempt`` and ``fence``
        count how often the step was started. When the agent fails, step and workflow are FAILED.

        Raises:
            WorkflowError: the workflow is unknown or has ended, the step is not the current one or has ended, or
                another process has taken it over.
            Throttled, RetryLater, CircuitOpenError, WorkerPoolError, StoreError: as :meth:`process_incoming_task`.
        """
        async with self._turn(task_id):
            state = await self.workflow_engine.load_workflow_state(task_id)
            if state is None:
                raise WorkflowError(
                    f"there is no workflow for task {task_id}: it was never initialised, or has expired"
                )
            if type(step_index) is not int or not 0 <= step_index < len(state.steps):
                raise WorkflowError(f"workflow {task_id} has steps 0 to {len(state.steps) - 1}, not {step_index!r}")
            return await self._execute(state, state.steps[step_index])

    def _turn(self, task_id: str) -> asyncio.Lock:
        return self._turns.setdefault(task_id, asyncio.Lock())

    # -- planning

    async def _begin(self, task: BaseTask) -> WorkflowState:
        """The recorded workflow of ``task``, planned and recorded now if there is none."""
        state = await self.workflow_engine.load_workflow_state(task.id)
        if state is None:
            plan, context = await self._plan(task)
            state = await self.workflow_engine.initialize_workflow(task, plan, context=context)
        if state is None:  # another process has planned it meanwhile; what was recorded first counts
            state = await self.workflow_engine.load_workflow_state(task.id)
        if state is None:
            raise WorkflowError(f"the workflow of task {task.id} was deleted while it was initialised; call again")
        if state.task.get("type") != task.type or not _same(state.task.get("input"), task.input):
            raise WorkflowError(
                f"task {task.id} is recorded with another type or input; give this one an id of its own"
            )
        return state

    async def _plan(self, task: BaseTask) -> tuple[Plan, dict[str, Any]]:
        """A valid plan, and what ``workflow_context`` says about where it came from."""
        context: dict[str, Any] = {}
        if self.planner in self.agents and task.type != self.planner:
            try:
                return validate_plan(await self._ask_planner(task)), {"plan_source": "planner"}
            except CircuitOpenError as error:
                context["planner_error"] = describe(error)
            except NOT_NOW:
                raise  # a little later there will be a real plan
            except Exception as error:  # noqa: BLE001 - whatever else a planner raises, the fallback answers
                context["planner_error"] = describe(error)
                logger.warning("planning of task %s fell back: %s", task.id, error)
        template = self._templates.get(task.type)
        if template is not None:
            plan = validate_plan(template(task)) if callable(template) else template
            return plan, context | {"plan_source": "template"}
        return validate_plan([{"action": task.type}]), context | {"plan_source": "single_step"}

    async def _ask_planner(self, task: BaseTask) -> Any:
        told = {"task": {"id": task.id, "type": task.type, "input": task.input}, "agents": sorted(self.agents)}
        question = BaseTask(f"{task.id}:plan", self.planner, told, task.priority, metadata=dict(task.metadata))
        answer = await self._through_pool(question)
        return answer.get("plan") if isinstance(answer, Mapping) else answer

    # -- executing

    async def _carry_on(self, state: WorkflowState) -> None:
        """Run what is left of a workflow; ``state`` follows the record, so that no step has to read it again."""
        while state.current_step_index < len(state.steps):
            step = state.steps[state.current_step_index]
            if step.state is StepState.FAILED:  # recorded, but not what it means for the workflow
                await self.workflow_engine.handle_step_failure(state.task_id, step.step_index, step.error or "failed")
                return
            step = await self._execute(state, step)
            if step.state is StepState.FAILED:
                return
            state.steps[step.step_index] = step
            state.current_step_index += 1
        results = [step.result for step in state.steps if step.state is StepState.COMPLETED]
        await self.workflow_engine.complete_workflow(state.task_id, results[-1] if results else None)

    async def _execute(self, state: WorkflowState, step: WorkflowStep) -> WorkflowStep:
        """Start ``step``, run its agent, record its result or its and the workflow's failure."""
        engine, task_id, index = self.workflow_engine, state.task_id, step.step_index
        step = await engine.update_step_state(task_id, index, StepState.RUNNING, attempt=step.attempt)
        try:
            result = await self._through_pool(_step_task(state, step))
        except NOT_NOW:
            await engine.update_step_state(task_id, index, StepState.PENDING, attempt=step.attempt)
            raise
        except Exception as error:  # noqa: BLE001 - whatever an agent raises is the step's failure
            return await self._failed(task_id, step, error)
        try:
            return await engine.update_step_state(task_id, index, StepState.COMPLETED, result, attempt=step.attempt)
        except InvalidTaskError as error:  # what the agent returned cannot be recorded
            return await self._failed(task_id, step, error)

    async def _failed(self, task_id: str, step: WorkflowStep, error: Exception) -> WorkflowStep:
        logger.warning("step %d (%s) of task %s failed: %r", step.step_index, step.action, task_id, error)
        told = describe(error)
        state = await self.workflow_engine.handle_step_failure(task_id, step.step_index, told, attempt=step.attempt)
        return state.steps[step.step_index]

    async def _through_pool(self, task: BaseTask) -> Any:
        """What the agent of ``task.type`` returns. Raises what it raises; UnknownAgentError when there is none."""
        entry = self.agents.get(task.type)
        if entry is None:
            raise unknown_agent(task.type, self.agents)
        breaker = self._breakers.get(task.type)
        if breaker is None:
            breaker = self._breakers[task.type] = CircuitBreaker(f"agent:{task.type}"[:128], self._breaker_config)
        future = await self.worker_pool.submit(
            breaker.call, self._call_agent, task, entry.options, priority=task.priority
        )
        try:
            return await future
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is None or caller.cancelling():
                raise
            raise WorkerPoolError(
                f"the worker pool dropped {task.type!r} for task {task.id}: was it shut down?"
            ) from None

    async def _call_agent(self, task: BaseTask, options: AgentOptions) -> Any:
        """Within the limits of the type: its permits and its timeout."""
        if options.limiter is not None:
            # a limiter's larger number is more urgent, a task's smaller one
            admission = await options.limiter.try_acquire(priority=3 - task.priority, cost=options.cost)
            if not admission.allowed:
                raise Throttled(admission.retry_after, key=task.type)
        try:
            async with asyncio.timeout(options.timeout) as limit:
                return await self.agents.call(task)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"agent {task.type!r} took longer than its timeout of {options.timeout:g} s") from None


def _step_task(state: WorkflowState, step: WorkflowStep) -> BaseTask:
    told, index = state.task, step.step_index
    where = {"task_id": state.task_id, "step_index": index, "total": len(state.steps), "reasoning": step.reasoning}
    context = {
        "task": {"id": state.task_id, "type": told.get("type"), "input": told.get("input")},
        "results": [earlier.result for earlier in state.steps[:index]],
        "shared": dict(state.workflow_context),
    }
    return BaseTask(
        id=f"{state.task_id}:{index}",
        type=step.action,
        input=told.get("input") if step.args is None else step.args,
        priority=told.get("priority", TaskPriority.NORMAL),
        attempt=step.attempt,
        metadata={**told.get("metadata", {}), "workflow": where, "context": context},
        fence=step.attempt,
    )


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


def describe(error: BaseException) -> dict[str, Any]:
    """What is recorded of an exception: ``type``, ``message`` (2,000 characters at most) and, of ours, ``code``."""
    text = str(error).encode("utf-8", "replace").decode()[:2000] or type(error).__name__
    told = {"type": type(error).__name__, "message": text}
    return told | {"code": error.code} if isinstance(error, OrchestraError) else told


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
