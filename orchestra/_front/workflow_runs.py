"""An App's workflows: how they are started, planned and steered, and the caller's handle on one.

Owns what an App knows of workflows (templates, planners) and the :class:`WorkflowRun`. Refuses to own plans, states
and the driving of steps, which are :mod:`orchestra.workflow`'s and the driver's: an App's workflows live in the
namespace of its queue, so that whatever worker serves that queue drives them. A run belongs to the event loop that
uses it.
"""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from orchestra._agents.planner import PlannerAgent
from orchestra._front.signature import Signature, make_call
from orchestra._workflow.driver import Driver
from orchestra._workflow.runner import StepRunner
from orchestra.errors import ConfigurationError, InvalidTaskError, TaskCancelledError, TaskFailedError, WorkflowError
from orchestra.memory import MemoryManager
from orchestra.tasks import BaseTask, TaskPriority, TaskState, check_ident
from orchestra.workflow import WorkflowEngine, WorkflowEvent, WorkflowState, validate_plan

if TYPE_CHECKING:
    from orchestra._front.handles import AgentHandle
    from orchestra.agents import AgentRegistry
    from orchestra.connections import ConnectionManager
    from orchestra.task_queue import BaseTaskQueue

T = TypeVar("T")
Plan = list[dict[str, Any]]


class WorkflowRun:
    """A workflow: its ``id``, its ``type`` where that is known. ``await run`` is its result."""

    __slots__ = ("_driver", "_type", "id")

    def __init__(self, driver: Driver, workflow_id: str, workflow_type: str = "") -> None:
        self.id = workflow_id
        self._type = workflow_type
        self._driver = driver

    async def state(self) -> WorkflowState:
        """The whole workflow as it is now.

        Raises:
            WorkflowError: there is none under this id: not yet (it is still being planned), never, or no longer.
        Cost: one round trip, O(workflow).
        """
        state = await self._driver.engine.load_workflow_state(self.id)
        if state is None:
            raise WorkflowError(
                f"there is no workflow {self.id}: it is not planned yet, was never started, or has expired"
            )
        return state

    async def result(self, timeout: float | None = None) -> Any:
        """The final output; waits up to ``timeout`` seconds for the end, None for as long as it takes.

        A workflow that is not there is waited for, too: it may still have to be planned.
        The final output is the result of the last step; of a plan with several ends a dict of theirs, by step id.

        Raises:
            TaskFailedError: the workflow FAILED; ``.error_type`` and the text say which step and why.
            TaskCancelledError: it was cancelled.
            TimeoutError: it has not ended yet. It goes on, and may be asked again.
        Cost: two round trips, and one every few seconds while waiting.
        """
        state = await self._driver.engine.wait_end(self.id, timeout)
        if state.status is TaskState.COMPLETED:
            return state.workflow_context.get("final_output")
        if state.status is TaskState.CANCELLED:
            raise TaskCancelledError(f"workflow {self.id} was cancelled{_reason(state)}")
        raise _failed(state)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.result().__await__()

    def events(self, after: str = "0", *, follow: bool = True) -> AsyncIterator[WorkflowEvent]:
        """What happened, in order, from behind the position ``after`` (the ``id`` of an event; ``"0"``: the start).

        With ``follow`` it waits for more until the workflow has ended; without it ends with what there is now.
        Cost: one round trip a page of events, and one every few seconds while waiting.
        """
        return self._driver.engine.events(self.id, after, follow=follow)

    async def signal(self, name: str, value: Any = True) -> bool:
        """Give the signal ``name`` its value, once: a step that waits for it goes on, or will not have to wait.

        Returns:
            Whether this call's value counts; False when the signal was given before.

        Raises:
            WorkflowError: there is no such workflow, or it has ended.
        """
        return await self._driver.signal(self.id, name, value)

    async def approve(self, name: str, value: Any = True) -> bool:
        """:meth:`signal`, by the word for what people do; ``value=False`` denies."""
        return await self.signal(name, value)

    async def cancel(self, reason: str | None = None) -> bool:
        """Cancel it: nothing new begins, running steps are cancelled, completed ones are compensated where the plan says so.

        Returns:
            Whether it is cancelled now, or will be; False when it had ended otherwise.

        Raises:
            WorkflowError: there is no such workflow.
        """
        return await self._driver.cancel(self.id, reason)

    async def pause(self) -> bool:
        """Let what runs go on, but begin nothing new until :meth:`resume`; whether it is paused now, False when it has ended.

        Raises:
            WorkflowError: there is no such workflow.
        """
        return await self._driver.pause(self.id)

    async def resume(self) -> bool:
        """Go on after :meth:`pause`, or after a failure, whose steps are tried again; whether it goes on. Raises as :meth:`pause`."""
        return await self._driver.resume(self.id)

    def __repr__(self) -> str:
        return f"<WorkflowRun {self.id}{f' of {self._type}' if self._type else ''}>"


def _reason(state: WorkflowState) -> str:
    text = (state.error or {}).get("message")
    return f": {text}" if text else ""


def _failed(state: WorkflowState) -> TaskFailedError:
    error = state.error or {}
    kind, text = str(error.get("type", "")), str(error.get("message", ""))
    index = error.get("step_index")
    step = state.steps[index] if isinstance(index, int) and 0 <= index < len(state.steps) else None
    where = "" if step is None else f" in step {step.id} ({step.action})"
    return TaskFailedError(
        f"workflow {state.task_id} failed{where}: {f'{kind}: ' if kind else ''}{text or 'no reason is recorded'}",
        task_id=state.task_id,
        error_type=kind,
        reason="failed",
        attempts=0 if step is None else step.attempt,
    )


def _repairing(function: Callable[..., Any], name: str) -> Callable[[BaseTask], Any]:
    """``function`` as an agent of the task alone, which asks it again with the faults of its plan."""
    call, names = make_call(function, Signature(function, name)), inspect.signature(function).parameters

    def in_thread(asked: BaseTask) -> Any:
        try:
            return call(asked)
        except (StopIteration, KeyboardInterrupt, GeneratorExit) as error:  # no future takes them
            raise RuntimeError(f"the function raised {error!r}") from error

    async def once(task: BaseTask) -> Any:
        asked = replace(task, input={key: value for key, value in task.input.items() if key in names})
        return await (call(asked) if inspect.iscoroutinefunction(function) else asyncio.to_thread(in_thread, asked))

    agent = PlannerAgent(once)

    async def plan(task: BaseTask) -> Any:
        return await agent.process(task)

    for field in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(plan, field, getattr(function, field, None))
    return plan


def _require_askable(function: Any, name: str, *, repairs: bool) -> None:
    """Refuse a function that no question to a planner fits: it would never have a plan. Raises ConfigurationError."""
    signature = Signature(function, name)
    if not signature.takes_input:
        return  # it reads the input of its task itself
    told: dict[str, Any] = {"task": {}, "agents": []}
    if repairs:
        told = {key: value for key, value in told.items() if key in inspect.signature(function).parameters}
    try:
        signature.check_names(told)
    except InvalidTaskError as error:
        raise ConfigurationError(
            f"{error}: a planner is called with task and agents, make it plan(task: dict, agents: list[str]), or let it "
            "take the task alone, plan(task: BaseTask)",
            field="planner",
            value=function,
        ) from None


class WorkflowDoor:
    """The methods of an :class:`~orchestra.app.App` that concern workflows."""

    agents: AgentRegistry
    queue_name: str

    if TYPE_CHECKING:

        @property
        def queue(self) -> BaseTaskQueue: ...
        @property
        def manager(self) -> ConnectionManager | None: ...
        @property
        def max_task_bytes(self) -> int: ...
        def _decorate(self, function: Any, name: str | None, options: dict[str, Any]) -> AgentHandle[..., Any]: ...

    def __init__(self) -> None:
        self.templates: dict[str, Plan | Callable[[BaseTask], Plan]] = {}
        """Plans by workflow type, or functions from the task to one."""
        self.planners: list[str] = []
        """Agents that plan, in the order in which they are asked."""
        self._drivers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Driver] = weakref.WeakKeyDictionary()

    async def start_workflow(
        self,
        type_or_plan: str | Plan,
        input: Any = None,  # noqa: A002 - the task's key
        *,
        plan: Plan | None = None,
        id: str | None = None,  # noqa: A002 - the task's key
        priority: int = TaskPriority.NORMAL,
        metadata: Mapping[str, Any] | None = None,
    ) -> WorkflowRun:
        """Start a workflow: of a type that is planned (by a planner, a template, or one step), or of a ready plan.

        ``plan`` gives a type its plan. ``id``: sent twice with one id, input and plan it is one workflow. ``priority``
        and ``metadata`` go to every step. Returns once it is recorded, or once its planning is queued; a worker of
        this queue carries it on: :meth:`~orchestra.app.App.worker`, ``orchestra worker``.

        Raises:
            WorkflowError: the plan has faults, all of them in ``.faults``: also steps for agents that this App does not
                have, unless it has none at all; or the id is taken by another workflow. Nothing was started.
            ConfigurationError: type, id or priority is none.
            InvalidTaskError: the input cannot travel.
            StoreError: Redis failed; whether it was started is unknown, calling again with the same ``id`` is safe.
        Cost: two round trips.
        """
        name, steps = (type_or_plan, plan) if isinstance(type_or_plan, str) else ("workflow", type_or_plan)
        if id is not None:
            check_ident("workflow id", id)
        if isinstance(priority, bool) or priority not in tuple(TaskPriority):
            raise ConfigurationError(
                f"workflow priority must be a TaskPriority, 0 (critical) to 3 (low), got {priority!r}",
                field="priority",
                value=priority,
            )
        driver = self._driver()
        begun = await driver.start(
            name,
            input,
            plan=steps,
            id=id,
            priority=priority,
            metadata=None if metadata is None else dict(metadata),
            actions=self._actions(),
        )
        return WorkflowRun(driver, begun, name)

    def workflow(self, workflow_id: str) -> WorkflowRun:
        """The handle on a workflow of this App's queue; no round trip, no check that it exists."""
        return WorkflowRun(self._driver(), check_ident("workflow id", workflow_id))

    def template(self, workflow_type: str) -> Callable[[T], T]:
        """What workflows of ``workflow_type`` do where no planner says otherwise: ``app.template("report")(plan)``.

        The plan is a list of steps, or a function from the :class:`~orchestra.tasks.BaseTask` to one; also as a
        decorator. It must be known to the workers and to who starts such workflows.

        Raises:
            WorkflowError: the plan has faults; ``.faults`` lists them. A function's are found when it is used.
            ConfigurationError: it is neither, or the type is no name.
        """
        check_ident("workflow type", workflow_type)

        def register(plan: T) -> T:
            if callable(plan):
                self.templates[workflow_type] = plan
            elif isinstance(plan, list | tuple):
                self.templates[workflow_type] = validate_plan(list(plan))
            else:
                raise ConfigurationError(
                    f"the template of {workflow_type!r} must be a list of steps or a function from a task to one, got "
                    f"{type(plan).__name__}",
                    field="template",
                )
            return plan

        return register

    def planner(self, function: Any = None, /, **options: Any) -> Any:
        """Make the decorated function a planner: ``@app.planner``, or with the options of an agent, ``@app.planner(timeout=60)``.

        It is given ``task`` (``id``, ``type``, ``input``) and ``agents`` (names) and returns a plan. One with a parameter
        ``faults``, which needs a default, is asked once more when its plan has some. A second planner is asked when the
        first fails or its breaker is open, and so on; then the type's template counts, then one step.

        Raises:
            ConfigurationError: as :meth:`~orchestra.app.App.agent`; or the function does not take ``task`` and ``agents``.
        """

        def register(wrapped: Any) -> Any:
            name = options.get("name") or ("planner" if not self.planners else f"planner-{len(self.planners) + 1}")
            rest = {key: value for key, value in options.items() if key != "name"}
            repairs = "faults" in inspect.signature(wrapped).parameters and rest.get("executor") != "process"
            _require_askable(getattr(wrapped, "function", wrapped), name, repairs=repairs)
            handle = self._decorate(_repairing(wrapped, name) if repairs else wrapped, name, rest)
            handle.function = wrapped
            if name not in self.planners:
                self.planners.append(name)
            return handle

        return register if function is None else register(function)

    def _actions(self) -> list[str] | None:
        """The actions that a plan may use: those this App knows; None, anything, for an App that only plans and starts."""
        return sorted(self.agents) if set(self.agents) - set(self.planners) else None

    def _driver(self) -> Driver:
        """What drives workflows on the queue of the running event loop."""
        queue, loop = (
            self.queue,
            asyncio.get_running_loop(),
        )  # in this order: the queue says what is wrong without a loop
        driver = self._drivers.get(loop)
        if driver is None or driver.queue is not queue or list(driver.planners) != self.planners:
            where = self.manager or "memory:"
            memory = MemoryManager(where, namespace=self.queue_name, max_bytes=self.max_task_bytes)
            driver = Driver(WorkflowEngine(memory), queue, templates=self.templates, planner=self.planners)
            self._drivers[loop] = driver
        return driver

    def _step_runner(self) -> StepRunner:
        """What a worker of this App runs steps with."""
        driver = self._driver()
        return StepRunner(
            driver.engine,
            driver.queue,
            agents=self.agents,
            templates=self.templates,
            planner=self.planners,
            actions=self._actions,
        )
