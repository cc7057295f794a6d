"""The context of a running agent: what it may know and do beside its task.

An agent that wants one has a parameter annotated :class:`AgentContext`, or calls :func:`current_context`; for others
nothing is made. Owns what a context offers. Refuses to own queues, memory and workflows, which it reaches through the
:class:`~orchestra._agents.services.Services` of whoever called the agent.

Coroutines of a context belong to the event loop of its worker. A plain function runs in a thread: it waits for them by
:meth:`AgentContext.wait`. In a process of ``executor="process"`` a context has its data only.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import time
import types
import typing
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, MutableMapping
from contextlib import aclosing
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from orchestra._agents.children import Child, child_id, living_name
from orchestra._agents.services import Services, StepScope, current_services, current_slot, current_task, services_here
from orchestra._workflow.refs import Facts
from orchestra.errors import ConfigurationError, WaitForSignal, WorkflowError
from orchestra.memory import MemoryManager, get_memory_manager
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.tasks import BaseTask, check_ident, require_number

if TYPE_CHECKING:
    from orchestra._queue.base import BaseTaskQueue

T = TypeVar("T")

EVENT_TTL: Final = 86_400.0
"""Seconds after its last event at which what a task outside of workflows has told is forgotten."""
_logger = logging.getLogger("orchestra.agent")
_made: contextvars.ContextVar[AgentContext] = contextvars.ContextVar("orchestra_context")


class TaskEvent(NamedTuple):
    """Something a task outside of workflows has told. ``at``: unix seconds of the queue's clock."""

    position: int
    at: float
    kind: str
    data: Any
    attempt: int


class WorkflowView:
    """The workflow that an agent runs a step of, as it was when the step began."""

    def __init__(self, scope: StepScope, engine: Any) -> None:
        self.id = scope.workflow_id
        self.index = scope.index
        self.step_id = scope.step_id or str(scope.index)
        self.series = scope.series
        self.total = scope.total
        self.context: Mapping[str, Any] = scope.facts.context
        """The workflow's shared context."""
        self._known = scope.facts
        self._engine = engine

    @property
    def input(self) -> Any:
        """The input of the workflow's task."""
        return self._known.input

    @property
    def item(self) -> Any:
        """Of the step of a map, its item; else :data:`~orchestra._workflow.refs.UNSET`."""
        return self._known.item

    @property
    def results(self) -> dict[str, Any]:
        """By id, the results of the steps that this one waits for or refers to; None for those that did not complete."""
        return {step: fact.result if fact.state == "completed" else None for step, fact in self._known.steps.items()}

    def result(self, step: str) -> Any:
        """The result of the step with this id, None unless it completed.

        Known are the steps that this one waits for or refers to.

        Raises:
            WorkflowError: it is none of these.
        """
        fact = self._known.step(step)
        if fact is None:
            raise WorkflowError(
                f"step {self.step_id} of workflow {self.id} knows nothing of step {step!r}: name it in depends_on or a $ref"
            )
        return fact.result if fact.state == "completed" else None

    async def set(self, key: str, value: Any) -> None:
        """Set ``key`` of the workflow's shared context; steps that begin later see it. One round trip.

        Raises:
            ConfigurationError: the agent runs in a process of its own.
            WorkflowError: the workflow has ended. StoreError: Redis failed.
        """
        if self._engine is None:
            raise _out_of_reach(f"the context of workflow {self.id}")
        await self._engine.set_context(self.id, key, value)


class AgentContext:
    """What a running agent may know and do.

    ``task`` is what it was given. Each attempt has a context of its own. Made for an agent that asks for it; in tests
    by hand: ``AgentContext(task, Services(InMemoryTaskQueue("q", "g")))``.
    """

    def __init__(self, task: BaseTask, services: Services | None = None) -> None:
        self.task = task
        self._services = services
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends: float | None = None
        self._sent = 0

    # -- what it knows

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self.task.attempt

    @property
    def fence(self) -> int:
        """A number that grows with every delivery of the task, for resources that refuse a smaller one."""
        return self.task.fence

    @cached_property
    def workflow(self) -> WorkflowView | None:
        """The workflow that this is a step of; None outside of workflows."""
        services = self._services
        if services is not None and services.step is not None:
            return WorkflowView(services.step, services.engine)
        scope = _told(self.task)
        return None if scope is None else WorkflowView(scope, None)

    @property
    def signals(self) -> Mapping[str, Any]:
        """The values of signals that this step has waited for, by name."""
        step = None if self._services is None else self._services.step
        return {} if step is None else getattr(step.facts, "signals", None) or {}

    def wait_signal(self, name: str, *, prompt: str | None = None, timeout: float | None = None) -> Any:
        """The value of signal ``name``; where it has not come, the step is parked and holds no worker.

        To park is to raise: let it pass. The agent is then called again from its beginning, so what was done before is
        done again; children that were submitted, are not. ``prompt`` is for who sends the signal; ``timeout``: seconds
        after which the step fails, None for never.

        Raises:
            WaitForSignal: it has not come.
            WorkflowError: this is no step of a workflow.
        """
        check_ident("signal name", name)
        if name in self.signals:
            return self.signals[name]
        if self.workflow is None:
            raise WorkflowError(f"task {self.task.id} is no step of a workflow, so no signal {name!r} can reach it")
        raise WaitForSignal(name, prompt=prompt, timeout=timeout)

    @property
    def deadline(self) -> float | None:
        """Unix seconds of the queue's clock at which this attempt is interrupted; None for never.

        The sooner of the attempt's timeout and the task's deadline, as far as the worker has told.
        """
        left = self.time_left()
        return None if left is None else self._now() + left

    def time_left(self) -> float | None:
        """Seconds until this attempt is interrupted, 0 when that is due; None for never."""
        if self._ends is not None:
            return max(0.0, self._ends - time.monotonic())
        return None if self.task.deadline is None else max(0.0, self.task.deadline - self._now())

    def _now(self) -> float:
        queue = None if self._services is None else self._services.queue
        return time.time() if queue is None else float(queue.now())

    @cached_property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """The logger ``orchestra.agent``. Its records carry ``task_id``, ``task_type`` and ``attempt``; in workflows
        ``workflow_id`` and ``step`` too.
        """
        task, workflow = self.task, self.workflow
        extra: dict[str, object] = {"task_id": task.id, "task_type": task.type, "attempt": task.attempt}
        if workflow is not None:
            extra |= {"workflow_id": workflow.id, "step": workflow.step_id}
        return _Log(_logger, extra)

    # -- what it may use

    @cached_property
    def memory(self) -> MemoryManager:
        """Memory of this workflow, which its steps share; outside of workflows, of this task. Kept for a day by default.

        Raises:
            ConfigurationError: nobody has told where: the agent runs in a process, or was called by hand.
        """
        workflow = self.workflow
        if workflow is not None:
            return self.shared_memory.scoped("workflow").scoped(workflow.id)
        return self.shared_memory.scoped("task").scoped(self.task.id)

    @cached_property
    def shared_memory(self) -> MemoryManager:
        """Memory of all tasks of this queue: namespace and Redis are the queue's. Raises as :attr:`memory`."""
        return memory_around(self._around("the memory"))

    async def progress(self, fraction: float, message: str = "") -> None:
        """Tell how far this task is, 0 to 1. One round trip. Raises as :meth:`emit`."""
        require_number("progress", fraction, 0.0, 1.0)
        await self._tell("progress", {"fraction": float(fraction), "message": str(message)})

    async def emit(self, kind: str, data: Any = None) -> None:
        """Tell of something, as ``agent.<kind>``: in the workflow's event log, or in one of this task alone.

        The latter holds 10,000 events and is followed by :func:`follow_events`. One round trip.

        Raises:
            ConfigurationError: as :attr:`memory`, or ``kind`` is no name.
            InvalidTaskError: ``data`` cannot travel.
            StoreFullError: the task has told too much. StoreError: Redis failed.
        """
        await self._tell(f"agent.{check_ident('event kind', kind)}"[:128], data)

    async def _tell(self, kind: str, data: Any) -> None:
        services = self._around("the event log")
        if services.step is not None and services.engine is not None:
            await services.engine.emit(services.step.workflow_id, kind, data, step=services.step.index)
            return
        event = {"at": self._now(), "kind": kind, "data": data, "attempt": self.task.attempt}
        await _events(memory_around(services)).append(self.task.id, event)

    async def submit(
        self,
        task_type: str,
        input: Any = None,  # noqa: A002 - the task's key
        *,
        key: str | None = None,
        want_result: bool = True,
        **options: Any,
    ) -> Child:
        """Send a task that this one stands for. An attempt that is repeated sends none of them twice.

        Its id is made of this task's and of ``key``, or else of how many were sent before it: without ``key``, submit in
        the same order in every attempt. A step that is sent anew (it was parked, or resumed) submits anew only what has
        died meanwhile. It has this task's priority, and
        ``metadata["parent"]``. ``options``: ``priority``, ``delay``, ``timeout``, ``max_retries``, ``deadline``,
        ``metadata``, as in a task. That it is known lasts as long as the queue's ``dedup_window``, an hour by default.

        Raises: as :meth:`~orchestra.task_queue.RedisStreamTaskQueue.produce`; ConfigurationError: an option is unknown,
            or as :attr:`memory`.
        Cost: one round trip; of a step that was sent anew, one or two more for each time.
        """
        if unknown := sorted(options.keys() - _SENT):
            raise ConfigurationError(
                f"submit has no option {unknown[0]!r}; options are key, want_result, {', '.join(sorted(_SENT))}",
                field=unknown[0],
            )
        queue: BaseTaskQueue = self._around("the queue", "queue").queue
        if key is None:
            self._sent += 1
        workflow = self.workflow
        parent = self.task.id if workflow is None else f"{workflow.id}:{workflow.index}"
        name = child_id(parent, str(self._sent) if key is None else f"={key}")
        if workflow is not None and workflow.series > 1 and want_result:
            name = await living_name(queue, name, workflow.series)
        metadata = {**(options.pop("metadata", None) or {}), "parent": self.task.id}
        child = {"id": name, "type": task_type, "input": input, "priority": self.task.priority, "metadata": metadata}
        child |= {option: value for option, value in options.items() if value is not None}
        (sent,) = await queue.submit([child], want_results=want_result)
        return Child(queue, name, task_type, sent.message_id, wanted=want_result)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of this context, from a plain agent in its thread: ``ctx.wait(ctx.progress(0.5))``.

        The event loop runs it, the thread waits for it and gets what it returns or raises.

        Raises:
            ConfigurationError: called in the event loop, where ``await`` does it; or nobody told which loop.
        """
        loop = self._loop
        if loop is None or _running() is loop:
            coroutine.close()
            what = "runs in the event loop: await instead" if loop is not None else "has no event loop around it"
            raise ConfigurationError(f"task {self.task.id} {what}", field="wait")
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    def _around(self, what: str, *needed: str) -> Services:
        services = self._services
        if services is None or all(getattr(services, name) is None for name in needed or ("queue", "memory")):
            raise _out_of_reach(f"{what} of task {self.task.id}")
        return services

    def __repr__(self) -> str:
        return f"<AgentContext of {self.task.id} ({self.task.type}), attempt {self.task.attempt}>"


_SENT: Final = frozenset({"priority", "delay", "timeout", "max_retries", "deadline", "metadata"})


class _Log(logging.LoggerAdapter[logging.Logger]):
    """Adds to what a record carries instead of replacing it."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


def current_context() -> AgentContext:
    """The context of the agent that runs here: in its coroutine, what that has started, or its thread.

    The same object whenever it is asked for during one attempt.

    Raises:
        ConfigurationError: no agent runs here.
    """
    task = current_task.get(None)
    if task is None:
        raise ConfigurationError("no agent runs here: current_context() is for what an agent calls", field="context")
    return context_of(task)


def context_of(task: BaseTask) -> AgentContext:
    """The context of ``task``, whose agent runs here. O(1), no round trip."""
    made = _made.get(None)
    if made is not None and made.task is task:
        return made
    told, slot = current_services.get(None), current_slot.get(None)
    holder = told if told is not None else slot
    found = getattr(holder, "context", None)
    if found is None or found.task is not task:
        # a plain function that was given up may ask long after its slot has gone on to another task
        replaces = found is None or _running() is not None
        found = _make(task, slot)
        if holder is not None and replaces:
            holder.context = found
    _made.set(found)
    return found


def context_parameter(agent: Any) -> str | None:
    """The parameter of ``agent`` beside its task that gets the context: annotated so, or called ``ctx``; or None."""
    try:
        parameters = list(inspect.signature(agent).parameters.values())[1:]
    except (TypeError, ValueError):  # it has no signature that can be read
        return None
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        if parameter.annotation is parameter.empty:
            if parameter.name == "ctx" and parameter.default is parameter.empty:
                return parameter.name
        elif is_context(_hint(agent, parameter.annotation)):
            return parameter.name
    return None


def _hint(agent: Any, annotation: Any) -> Any:
    """``annotation`` as a class where it can be resolved, else as it is written."""
    if not isinstance(annotation, str):
        return annotation
    inner = inspect.unwrap(agent.func if isinstance(agent, functools.partial) else agent)
    inner = getattr(inner, "__func__", inner) if hasattr(inner, "__globals__") else type(inner).__call__
    try:
        holder = types.SimpleNamespace(__annotations__={"it": annotation})
        return typing.get_type_hints(holder, getattr(inner, "__globals__", {}))["it"]
    except Exception:  # noqa: BLE001 - a name that only a type checker sees
        return annotation


def is_context(hint: Any) -> bool:
    """Whether an annotation means :class:`AgentContext`, or that or something else."""
    if isinstance(hint, str):  # imported for type checkers only
        return any(part.strip().rpartition(".")[2] == "AgentContext" for part in hint.split("|"))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(is_context(part) for part in typing.get_args(hint))
    return inspect.isclass(hint) and issubclass(hint, AgentContext)


class InProcess:
    """A plain function that another process runs, where its context holds what its task tells."""

    __slots__ = ("_function", "_wanted")

    def __init__(self, function: Callable[..., Any], wanted: str | None = None) -> None:
        self._function = function
        self._wanted = wanted

    def __call__(self, task: BaseTask) -> Any:
        current_task.set(task)
        if self._wanted is None:
            return self._function(task)
        return self._function(task, **{self._wanted: context_of(task)})


def _make(task: BaseTask, slot: Any) -> AgentContext:
    context = AgentContext(task, services_here())
    if slot is not None and slot.task is not None:
        context._loop, context._ends = slot.task.get_loop(), slot.deadline
    else:
        context._loop = _running()
    return context


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _told(task: BaseTask) -> StepScope | None:
    """The step that the metadata of ``task`` tell of, for a process that knows nothing else."""
    where, around = task.metadata.get("workflow"), task.metadata.get("context")
    if not isinstance(where, Mapping) or not isinstance(where.get("task_id"), str):
        return None
    around = around if isinstance(around, Mapping) else {}
    known = Facts((around.get("task") or {}).get("input"), around.get("shared") or {})
    index, total = where.get("step_index", 0), where.get("total", 1)
    return StepScope(where["task_id"], index, where.get("step_id", ""), where.get("series", 1), total, known)


def _out_of_reach(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} is out of reach here: an agent in a process of its own, or called without a worker, has its task only",
        field="context",
    )


def memory_around(services: Services) -> MemoryManager:
    """The memory of ``services``: as given, else in the namespace of its queue's name, on the queue's own Redis."""
    if services.memory is None:
        queue = services.queue
        manager = getattr(queue, "manager", None)
        if manager is not None:
            services.memory = MemoryManager(manager, namespace=queue.name)
        elif isinstance(queue, InMemoryTaskQueue):
            services.memory = MemoryManager("memory:", namespace=queue.name)
        else:
            services.memory = get_memory_manager(queue.name)
    memory: MemoryManager = services.memory
    return memory


def _events(memory: MemoryManager) -> MemoryManager:
    return memory.scoped("events", ttl=EVENT_TTL, index=False)


async def read_events(
    memory: MemoryManager, task_id: str, after: int = -1, count: int | None = None
) -> list[TaskEvent]:
    """What a task outside of workflows has told since position ``after``. ``memory``: that of its queue. One round trip."""
    rows = await _events(memory).read_log(task_id, after + 1, count)
    return [_event(position, row) for position, row in enumerate(rows, after + 1)]


async def follow_events(memory: MemoryManager, task_id: str, after: int = -1) -> AsyncGenerator[TaskEvent, None]:
    """As :func:`read_events`, and for ever what comes; how often it asks is :meth:`MemoryManager.follow_log`'s matter."""
    async with aclosing(_events(memory).follow_log(task_id, after + 1)) as rows:
        async for position, row in rows:
            yield _event(position, row)


def _event(position: int, row: Any) -> TaskEvent:
    return TaskEvent(position, row["at"], row["kind"], row["data"], row["attempt"])
