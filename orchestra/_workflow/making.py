"""Making workflows: a task and its plan become a record, once, whoever tries and how often.

Owns who gets the id: a workflow that is there stays, but for one whose plan is still to be made, which its plan takes the
place of, and for what an earlier life of a parent left behind under the id of its child. Refuses to own what a plan may say
(:mod:`orchestra._workflow.plan`) and sending. Large plans are checked and packed in a thread, for which they
must not be changed meanwhile. No state between calls; one event loop.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from orchestra._workflow import record as rec
from orchestra._workflow.answers import Ready
from orchestra._workflow.looking import Looking
from orchestra._workflow.plan import validate_plan
from orchestra._workflow.states import DONE, StepState, WorkflowState
from orchestra._workflow.unblocked import size_of, unblocked
from orchestra.errors import ConfigurationError
from orchestra.serialization import loads
from orchestra.tasks import BaseTask, TaskState, check_ident

if TYPE_CHECKING:
    from collections.abc import Collection

logger = logging.getLogger("orchestra.workflow")

PLAN: Final = "orchestra.plan"
"""Action of the one step of a workflow whose plan is still to be made, and type of its task."""
TIMER: Final = "orchestra.timer"
"""Type of the delayed task that ends a sleep, or the wait for a signal."""
MAX_ID: Final = 128 - len(":99999:12345678.9999:t")
"""Longest id of a workflow that workers drive: the ids of its steps' tasks are made from it."""
_UNPLANNED: Final = [{"action": PLAN, "args": None, "reasoning": ""}]


async def checked_plan(
    plan: Any, *, actions: Collection[str] | None = None, encode: rec.Encode | None = None
) -> list[dict[str, Any]]:
    """:func:`~orchestra.workflow.validate_plan`, in a thread where the plan is large.

    ``encode``: how its steps will be recorded; None: who records it will see.

    Raises:
        WorkflowError: as that. With ``encode`` also what that raises: a step cannot travel, or is too large.
    """
    return await unblocked(size_of(plan), _checked, plan, actions, encode)


def _checked(plan: Any, actions: Collection[str] | None, encode: rec.Encode | None) -> list[dict[str, Any]]:
    steps = validate_plan(plan, actions=actions)
    if encode is not None:
        for index, step in enumerate(steps):
            encode(f"step {index} of the plan", step)
    return steps


class Making(Looking):
    """The part of :class:`~orchestra.workflow.WorkflowEngine` that makes workflows."""

    async def initialize_workflow(
        self,
        task: BaseTask,
        plan: list[dict[str, Any]],
        *,
        context: dict[str, Any] | None = None,
        driven: bool = False,
        parent: tuple[str, int] | tuple[str, int, str] | None = None,
    ) -> WorkflowState | None:
        """Create the workflow of ``task``; called again with the same task and plan it returns what is there.

        ``context`` is the initial ``workflow_context``. ``driven``: workers carry it out, so its steps go through the
        outbox; ``.ready`` of what is returned are those that may be sent. ``parent``: workflow and step that its end is
        told to, and the life of that workflow: what an earlier life has left under this id is replaced once it has
        ended. One round trip, two when the workflow exists.

        Returns:
            The workflow, or None if the task has one already with another plan, type or input: what was recorded
            first stays.

        Raises:
            WorkflowError: the plan has faults; ``.faults`` lists them all. Nothing was written.
            ConfigurationError: the id of a driven one is longer than 106 characters.
        """
        steps = await checked_plan(plan)
        return await self._recorded(_new(task, steps, context, driven, parent), steps)

    async def initialize_planning(
        self, task: BaseTask, *, parent: tuple[str, int] | tuple[str, int, str] | None = None
    ) -> WorkflowState | None:
        """Create the workflow of ``task`` before it has a plan: its one step is to make one, see :meth:`set_plan`.

        As :meth:`initialize_workflow`, but what is there only has to have the same type and input.
        """
        return await self._recorded(_new(task, _UNPLANNED, None, True, parent), ())

    async def _recorded(self, state: WorkflowState, plan: Sequence[Mapping[str, Any]]) -> WorkflowState | None:
        """``state`` as it was recorded by this call or an earlier one; None: there is another workflow."""
        while True:
            made, record, shared = await self._make(state)
            rec.check_format(state.task_id, record)
            found = await unblocked(len(plan), rec.decode_state, state.task_id, record, shared)
            left_behind = not made and "of" in state.task and found.task.get("of") != state.task["of"]
            if left_behind and found.is_finished():
                state.token = found.token
                continue
            if not made and not left_behind and not self._same(state, record, plan):
                logger.warning("workflow %s exists already with another plan or input; that stays", state.task_id)
                return None
            found.ready = _ready(found)
            return found

    async def set_plan(self, task_id: str, plan: list[dict[str, Any]], context: dict[str, Any]) -> WorkflowState | None:
        """Give the workflow that is being planned its plan; it begins then. Two round trips.

        Its signals, events and the time of its start stay, and a paused one holds. Returns it with ``.ready``, or None
        when it has a plan already, or ends.

        Raises:
            WorkflowError: the plan has faults; ``.faults`` lists them all. Nothing was written.
        """
        steps = await checked_plan(plan)
        while (old := await self.load_workflow_state(task_id)) is not None:
            if old.plan != _UNPLANNED or old.is_finished() or old.phase not in ("running", "paused"):
                return None
            task = BaseTask(task_id, old.task["type"], old.task["input"], old.task["priority"])
            task.metadata = old.task.get("metadata") or {}
            state = _new(task, steps, old.workflow_context | context, True, old.parent)
            state.task |= {"of": old.task["of"]} if "of" in old.task else {}
            state.token, state.phase = old.token, old.phase
            made, record, shared = await self._make(state)
            if made:
                found = await unblocked(len(steps), rec.decode_state, task_id, record, shared)
                found.ready = _ready(found)
                return found
        return None

    async def _make(self, state: WorkflowState) -> tuple[bool, dict[str, bytes], dict[str, bytes]]:
        """Record ``state`` if there is nothing, or what its token names; whether that was done, and what is recorded."""
        token = secrets.token_hex(8)
        if state.driven:
            state.task["life"] = token[:8]
        encode = self.memory_manager.encode
        fields, shared, roots = await unblocked(len(state.plan), rec.encode_new, state, encode)
        store = await self._store()
        held = state.phase == "paused"
        if held:
            fields |= {f"q:{index}": rec.HELD for index in roots}
        ready = roots if state.driven and not held else ()
        made = await store.make(state.task_id, rec.NewRecord(token, ready, fields, shared, state.token))
        if not made:
            return False, *(await store.read(state.task_id))
        self._emit(state.task_id, state.status, None, 0, len(state.plan))
        return True, fields | {"token": token.encode(), "created": b"%d" % made}, shared

    def _same(self, state: WorkflowState, record: Mapping[str, bytes], plan: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the record is of the same type and input, and, but for an empty one, the same ``plan``."""
        try:
            if loads(record["task"])["type"] != state.task["type"]:
                return False
        except rec.BAD as error:
            raise rec.damaged(f"the record of workflow {state.task_id}", error) from error
        encode = self.memory_manager.encode
        fixed = {"input": encode("the task's input", state.task.get("input"))}
        if plan:
            fixed["planned"] = b"%d" % len(plan)
        fixed |= {f"p:{index}": encode(f"step {index} of the plan", step) for index, step in enumerate(plan)}
        return all(record.get(name) == value for name, value in fixed.items())


def _new(
    task: BaseTask,
    plan: list[dict[str, Any]],
    context: Mapping[str, Any] | None,
    driven: bool,
    parent: tuple[str, int] | tuple[str, int, str] | None,
) -> WorkflowState:
    """The state of a workflow that is to be recorded."""
    if driven and len(check_ident("task id", task.id)) > MAX_ID:
        text = f"id of a workflow that workers drive must be at most {MAX_ID} characters, got {len(task.id)}"
        raise ConfigurationError(text, field="id", value=task.id)
    told = {"id": task.id, "type": task.type, "input": task.input}
    told |= {"priority": int(task.priority), "metadata": task.metadata}
    if parent is not None and len(parent) == 3:
        told["of"] = parent[2]
    state = WorkflowState(task.id, plan, [], workflow_context=dict(context or {}), task=told)
    state.driven, state.parent = driven, None if parent is None else (parent[0], parent[1])
    if driven:
        state.status, state.phase = TaskState.RUNNING, "running"
    return state


def _ready(state: WorkflowState) -> tuple[Ready, ...]:
    """The steps that may be sent, as far as the record tells."""
    if not state.driven or state.phase != "running":
        return ()
    done = [step.state in DONE or step.state is StepState.FAILED for step in state.steps]
    return tuple(
        Ready(step.step_index, step.series, state.plan[step.step_index])
        for step in state.steps
        if not step.role and step.state is StepState.PENDING and all(done[index] for index in step.depends_on)
    )
