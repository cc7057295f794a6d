"""Sends what a workflow is ready for: steps as tasks of a queue, built-in steps carried out on the spot.

Everybody who changes a record gets told what that made ready (:class:`~orchestra.workflow.Moved`) and hands it to a
driver. A step travels as a task with the id ``<workflow>:<index>:<life>`` (``.<series>`` behind it, when it is sent anew),
whose type is its action; what it is given is read from the record when it begins, so nothing is sent twice. The life tells
a workflow from an earlier one of its id, whose tasks the queue may still know. A workflow whose plan a worker is to make
is recorded with that as its only step, and is sent like any other. What could not be sent stays in the record's outbox, and is sent by the sweep of :mod:`orchestra._workflow.upkeep`.

Owns ids and shape of what is sent. Refuses to own states (the engine's) and the run of an agent
(:mod:`orchestra._workflow.runner`). Holds no state between calls; one event loop.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from orchestra._delivery import RETRY, STEP
from orchestra._workflow.conditions import holds
from orchestra._workflow.local import describe
from orchestra._workflow.making import PLAN, TIMER, checked_plan
from orchestra._workflow.plan import PlannedStep, compile_step, item_step, ready_args
from orchestra._workflow.planning import Planned, Planning, Templates, checked_planners, template_or_step
from orchestra.errors import ConfigurationError, InvalidTaskError, WorkflowError
from orchestra.serialization import new_task_id
from orchestra.tasks import BaseTask, Cancellation, Retry, TaskPriority, check_ident
from orchestra.workflow import StepState, WorkflowEngine

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from orchestra._queue.base import BaseTaskQueue
    from orchestra.tasks import TaskDict
    from orchestra.workflow import Moved, Ready, WorkflowState

logger = logging.getLogger("orchestra.workflow")

OWN: Final = frozenset({TIMER, PLAN})


_random = random.Random()  # noqa: S311 - tells sendings apart, guards nothing


def step_task_id(workflow_id: str, index: int, series: int, life: str) -> str:
    """The id of the task that carries a step."""
    return f"{workflow_id}:{index}:{life}" if series == 1 else f"{workflow_id}:{index}:{life}.{series}"


def child_id(workflow_id: str, index: int, series: int) -> str:
    """The id of the workflow that a step starts; the slash keeps its steps apart from those of its parent."""
    return f"{workflow_id}/{index}" if series == 1 else f"{workflow_id}/{index}.{series}"


class Driver:
    """Starts and steers the workflows of ``engine`` whose steps travel through ``queue``.

    ``templates``: plans by task type. ``planner``: types of planning agents, in order; a workflow without a plan is then
    planned by a worker that has them. ``planning``: plans here instead.
    """

    def __init__(
        self,
        engine: WorkflowEngine,
        queue: BaseTaskQueue,
        *,
        templates: Templates | Mapping[str, Any] | None = None,
        planner: str | Sequence[str] = (),
        planning: Planning | None = None,
    ) -> None:
        self.engine = engine
        self.queue = queue
        self.namespace = engine.memory_manager.namespace
        self.templates = templates if isinstance(templates, Templates) else Templates(templates)
        self.planners = checked_planners(planner)
        self.planning = planning

    # -- starting

    async def start(
        self,
        what: str | list[dict[str, Any]],
        input: Any = None,  # noqa: A002 - the task's key
        *,
        plan: list[dict[str, Any]] | None = None,
        id: str | None = None,  # noqa: A002
        priority: int = TaskPriority.NORMAL,
        metadata: dict[str, Any] | None = None,
        actions: Collection[str] | None = None,
    ) -> str:
        """Start a workflow; ``what`` is its type, or its plan. Returns its id.

        Without a plan: a worker's planner, else the type's template, else one step of the type itself. Started again
        under its own ``id`` with the same plan it goes on; it never runs twice.

        Raises:
            WorkflowError: the plan has faults, or the id is taken by a workflow with another plan or input.
            InvalidTaskError, StoreError: as :meth:`~orchestra.task_queue.BaseTaskQueue.produce`.
        Cost: three round trips.
        """
        name, plan = ("workflow", what) if isinstance(what, list) else (what, plan)
        check_ident("workflow type", name)
        task = BaseTask(id or new_task_id(), name, input, priority, metadata=dict(metadata or {}))
        if plan is not None:
            checked = plan if actions is None else await checked_plan(plan, actions=actions)  # the engine does the rest
            await self.begin(task, Planned(checked, {"plan_source": "given"}))
        elif self.planning is not None:
            await self.begin(task, await self.planning.plan(task))
        elif self.planners:
            await self._begun(task, await self.engine.initialize_planning(task))
        else:
            await self.begin(task, await template_or_step(self.templates, task, {}))
        return task.id

    async def begin(
        self, task: BaseTask, planned: Planned, parent: tuple[str, int] | tuple[str, int, str] | None = None
    ) -> WorkflowState:
        """Record ``task`` with its plan, and send what is ready. Idempotent.

        Raises:
            WorkflowError: it is recorded with another plan, type or input.
        """
        state = await self.engine.initialize_workflow(
            task, planned.plan, context=planned.context, driven=True, parent=parent
        )
        return await self._begun(task, state)

    async def planned(self, workflow_id: str, planned: Planned) -> bool:
        """Give a workflow that was to be planned its plan, and send what is ready; one that has it keeps it.

        False: it took none, because it has one, or ends.

        Raises:
            WorkflowError: the plan has faults.
        """
        state = await self.engine.set_plan(workflow_id, planned.plan, planned.context)
        if state is None:
            return False
        await self.send_ready(workflow_id, state.ready, state.task)
        if state.parent is not None and await self.engine.is_ending(state.parent[0]):
            # Its parent ended before it waited for this child, and whoever was to make it wait died: nobody else knows.
            await self.cancel(workflow_id, f"its parent {state.parent[0]} ended")
        return True

    async def _begun(self, task: BaseTask, state: WorkflowState | None) -> WorkflowState:
        if state is None:
            raise WorkflowError(
                f"workflow {task.id} exists with another plan, type or input; give this one an id of its own"
            )
        await self.send_ready(task.id, state.ready, state.task)
        return state

    # -- steering

    async def signal(self, workflow_id: str, name: str, value: Any = None, *, by: str | None = None) -> bool:
        """Give signal ``name`` its value; whether this call did: the first one wins. Sends what that makes ready."""
        moved = await self.engine.signal(workflow_id, name, value, by=by)
        await self.send(workflow_id, moved)
        return moved.done

    async def pause(self, workflow_id: str) -> bool:
        """Let what runs go on, and hold what is ready."""
        return (await self.engine.pause(workflow_id)).done

    async def resume(self, workflow_id: str) -> bool:
        """Go on after a pause, or after a failure; sends what was held."""
        moved = await self.engine.resume(workflow_id)
        await self.send(workflow_id, moved)
        return moved.done

    async def cancel(self, workflow_id: str, reason: str | None = None) -> bool:
        """Cancel a workflow and its children; its running steps are interrupted, what is done is compensated.

        To cancel the task of a step in the queue ends that step alone, as SKIPPED with the error that says so.
        """
        moved = await self.engine.cancel(workflow_id, reason)
        await self.send(workflow_id, moved)
        return moved.done

    # -- sending

    async def send(self, workflow_id: str, moved: Moved) -> None:
        """Do what a change of the record asks for: send steps, carry out built-in ones, begin the next phase.

        Raises:
            StoreError, QueueFullError: not everything was sent; the outbox still has it.
        Cost: one round trip for all agents' steps; two or three for each built-in step.
        """
        left = deque([(workflow_id, moved)])
        while left:
            workflow_id, moved = left.popleft()
            if moved.parent is not None:
                left.append(moved.parent)
            if moved.ready:
                left.extend([(workflow_id, each) for each in await self._sent(workflow_id, moved.ready, moved.task)])
            for index, series in moved.due:
                left.append((workflow_id, await self.engine.fire(workflow_id, index, series)))
            if moved.attention:
                left.append((workflow_id, await self.engine.next_phase(workflow_id)))
            for child in moved.children:
                left.extend(await self._cancelled(child, workflow_id))
            if moved.in_flight:
                left.extend([(workflow_id, each) for each in await self._interrupt(workflow_id, moved)])

    async def send_ready(self, workflow_id: str, ready: Sequence[Ready], task: Mapping[str, Any]) -> None:
        """:meth:`send` for what was read from a record."""
        for moved in await self._sent(workflow_id, ready, task):
            await self.send(workflow_id, moved)

    async def _sent(self, workflow_id: str, ready: Sequence[Ready], task: Mapping[str, Any]) -> list[Moved]:
        """Send agents' steps, carry out the others; what the latter moved."""
        tasks, here = [], []
        for each in ready:
            action = each.planned["action"]
            built_in = action.startswith("orchestra.") and action != PLAN
            if not built_in and each.planned.get("when") in (None, True):
                tasks.append(self._step_task(workflow_id, each, task))
            else:
                here.append(each)
        moved: list[Moved | None] = []
        try:
            if tasks:
                await self.queue.produce_many(tasks)
        except InvalidTaskError:  # none was sent: those that no queue takes fail, the others go
            for made in tasks:
                try:
                    await self.queue.produce(made)
                except InvalidTaskError as error:
                    _, _, index, series, _ = made["metadata"][STEP]
                    told = describe(error)
                    moved.append(await self.engine.finish(workflow_id, index, series, StepState.FAILED, error=told))
        moved += [await self._decide(workflow_id, each, task) for each in here]
        return [each for each in moved if each is not None]

    def _step_task(self, workflow_id: str, ready: Ready, task: Mapping[str, Any]) -> TaskDict:
        planned, index, series = ready.planned, ready.index, ready.series
        life = task.get("life", "")
        where = [self.namespace, workflow_id, index, series, f"{life}:{1 + _random.getrandbits(31)}"]
        metadata = {**(task.get("metadata") or {}), STEP: where}
        made: TaskDict = {
            "id": step_task_id(workflow_id, index, series, life),
            "type": planned["action"],
            "priority": task.get("priority", TaskPriority.NORMAL),
            "metadata": metadata,
        }
        retry = planned.get("retry")
        if retry is not None:
            fields = {"max_retries": retry} if isinstance(retry, int) else retry
            made["max_retries"] = Retry(**fields).max_retries
            if isinstance(retry, dict):
                metadata[RETRY] = retry
        if planned.get("timeout") is not None:
            made["timeout"] = planned["timeout"]
        return made

    async def _cancelled(self, child: str, parent: str) -> list[tuple[str, Moved]]:
        with contextlib.suppress(WorkflowError):  # it is gone
            return [(child, await self.engine.cancel(child, f"its parent {parent} ended"))]
        return []

    async def _interrupt(self, workflow_id: str, moved: Moved) -> list[Moved]:
        """End the tasks of steps that run while their workflow is being cancelled; what that moved.

        One that was given back, and lies in the queue, is removed from there: no delivery will tell its workflow.
        """
        ended = []
        life = await self.engine.life(workflow_id)
        for index, series in moved.in_flight:
            try:
                answer = await self.queue.cancel(step_task_id(workflow_id, index, series, life))
            except TypeError:  # a queue of somebody's own that cannot cancel: they end by themselves
                break
            if answer is not Cancellation.REQUESTED:
                ended.append(await self.engine.finish(workflow_id, index, series, StepState.SKIPPED))
        return ended

    # -- what is not an agent's

    async def _decide(self, workflow_id: str, ready: Ready, task: Mapping[str, Any]) -> Moved | None:
        """A step that has a condition, or is built in; what that moved. What is wrong with it is the step's failure."""
        engine, index, series = self.engine, ready.index, ready.series
        step = compile_step(ready.planned, index, {})
        try:
            known = await engine.facts(workflow_id, index)
            if not holds(step.when, known):
                return await engine.finish(workflow_id, index, series, StepState.SKIPPED)
            if step.kind == "agent":
                await self.queue.produce_many([self._step_task(workflow_id, ready, task)])
                return None
            args = ready_args(step, known) or {}
            return await self._carry_out(workflow_id, ready, step, args, task)
        except (WorkflowError, InvalidTaskError, ConfigurationError) as error:
            return await engine.finish(workflow_id, index, series, StepState.FAILED, error=describe(error))

    async def _carry_out(
        self, workflow_id: str, ready: Ready, step: PlannedStep, args: dict[str, Any], task: Mapping[str, Any]
    ) -> Moved | None:
        engine, where = self.engine, (workflow_id, ready.index, ready.series)
        if step.kind == "sleep":
            moved = await engine.park(*where, timer=True, due=float(args["seconds"]))
            return await self._timed(where, moved, args["seconds"], task)
        if step.kind == "signal":
            timeout = args.get("timeout")
            moved = await engine.park(*where, signal=args["name"], prompt=args.get("prompt"), due=timeout)
            return await self._timed(where, moved, timeout, task)
        if step.kind == "map":
            items = [{**item_step(step, at), "item": item, "index": at} for at, item in enumerate(args["over"])]
            most = args.get("max_parallel")
            return await engine.grow(workflow_id, items, parent=ready.index, series=ready.series, max_parallel=most)
        return await self._start_child(where, step, args, task)

    async def _timed(
        self, where: tuple[str, int, int], moved: Moved, seconds: float | None, task: Mapping[str, Any]
    ) -> Moved:
        """Send the timer of a step that was parked; a lost one is made up for by the outbox, a little later."""
        if seconds is not None and moved.done and not moved.ready:
            life = task.get("life", "")
            await self.queue.produce(
                {
                    "id": f"{step_task_id(*where, life)}:t",
                    "type": TIMER,
                    "priority": task.get("priority", TaskPriority.NORMAL),
                    "delay": float(seconds),
                    "metadata": {STEP: [self.namespace, *where, f"{life}:0"]},
                }
            )
        return moved

    async def _start_child(
        self, where: tuple[str, int, int], step: PlannedStep, args: dict[str, Any], task: Mapping[str, Any]
    ) -> Moved | None:
        """First the child, then the wait for it: a crash between them is repeated, and begins nothing twice.

        None: the child of an earlier life of the workflow has not ended yet; the outbox keeps the step.
        """
        workflow_id, index, _ = where
        child, life = child_id(*where), task.get("life", "")
        parent = (workflow_id, index, life)
        name = check_ident("workflow type", args.get("type") or "workflow")
        told = BaseTask(child, name, args.get("input"), task.get("priority", TaskPriority.NORMAL))
        told.metadata = dict(task.get("metadata") or {})
        if args.get("plan") is not None:
            state = await self.begin(told, Planned(args["plan"], {"plan_source": "given"}), parent)
        elif self.planners and self.planning is None:
            state = await self._begun(told, await self.engine.initialize_planning(told, parent=parent))
        elif self.planning is not None:
            state = await self.begin(told, await self.planning.plan(told), parent)
        else:
            state = await self.begin(told, await template_or_step(self.templates, told, {}), parent)
        return await self._wait_for(where, child) if state.task.get("of") == life else None

    async def _wait_for(self, where: tuple[str, int, int], child: str) -> Moved:
        moved = await self.engine.park(*where, child=child)
        if moved.why in ("stop", "stale"):  # the parent began to end meanwhile, and does not know of the child
            return moved._replace(children=(*moved.children, child))
        return moved
