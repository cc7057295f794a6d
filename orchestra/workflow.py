"""Durable multi-step workflows: a plan, how far it came, and which changes of state are legal.

Owns the state machine and its record, one hash a workflow: a field for each step of the plan, a field for each step
that was begun, a field for each key of the context. A change of state writes the few fields it concerns and is
committed against the token of what was read (see :mod:`orchestra.memory`), so of two processes that drive the same
workflow one wins and the other is told. Refuses to own execution: agents, pools and planners are the orchestrator's.

Steps run in the order of the plan. The *current* step is the first that has not ended; only it may change, steps
before it are COMPLETED or SKIPPED, steps after it have not begun. COMPLETED, FAILED and CANCELLED absorb; a step that
was never begun reads as SKIPPED once its workflow has ended. One event loop; the engine holds no state between calls.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from orchestra import _keys, telemetry
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra._documents import ABSENT, TOKEN, VERSION, pause_after_conflict
from orchestra._shared import Connectable, shared
from orchestra._workflow_state import (
    DONE,
    FINISHED,
    HEAD,
    STATUS_EDGES,
    STEP_EDGES,
    Change,
    StepState,
    WorkflowState,
    WorkflowStep,
    after,
    change_faults,
    check_format,
    conflict,
    current_index,
    decode_state,
    decode_step,
    encode_state,
    encode_step,
    error_of,
    is_fixed,
    refused,
    steps_of,
    validate_plan,
)
from orchestra.errors import WorkflowError
from orchestra.memory import DEFAULT, Default, MemoryManager, get_memory_manager, to_ms
from orchestra.serialization import dumps
from orchestra.tasks import BaseTask, TaskState

__all__ = [
    "STATUS_EDGES",
    "STEP_EDGES",
    "StepState",
    "WorkflowEngine",
    "WorkflowState",
    "WorkflowStep",
    "get_workflow_engine",
    "validate_plan",
]

logger = logging.getLogger("orchestra.workflow")

_MAX_TRIES: Final = 16


class WorkflowEngine(Connectable):
    """Creates workflows, hands out their next step and records what became of it.

    Args:
        memory_manager: where the state is kept: under its namespace, each step within its ``max_bytes``.
        retention: seconds an ended workflow is kept; by default the ``ttl`` of the memory manager; None: for ever.
            A workflow that has not ended is never forgotten.
        clock: for the times in the record, which are for people and decide nothing.

    Raises:
        TypeError: If memory_manager is not an instance of MemoryManager

    Every method raises WorkflowError for an unknown workflow or an illegal change, CorruptEntryError when the record
    was not written by this version (it is left as it is), and what :class:`~orchestra.memory.MemoryManager` raises.
    """

    def __init__(
        self, memory_manager: MemoryManager, *, retention: float | Default | None = DEFAULT, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        if not isinstance(memory_manager, MemoryManager):
            raise TypeError(f"memory_manager must be a MemoryManager, got {type(memory_manager).__name__}")
        self.memory_manager = memory_manager
        self._retention_ms = to_ms(memory_manager.ttl if isinstance(retention, Default) else retention)
        self._clock = clock

    async def _connect(self) -> None:
        await self.memory_manager

    async def initialize_workflow(
        self, task: BaseTask, plan: list[dict[str, Any]], *, context: dict[str, Any] | None = None
    ) -> WorkflowState | None:
        """Create the workflow of ``task``; called again with the same task and plan it returns what is there.

        ``context`` is the initial ``workflow_context``. One round trip, two when the workflow exists.

        Returns:
            The workflow, or None if the task has one already with another plan, type or input: what was recorded
            first stays.

        Raises:
            WorkflowError: the plan has faults; ``.faults`` lists them all. Nothing was written.
        """
        steps = validate_plan(plan)
        told = {"id": task.id, "type": task.type, "input": task.input}
        told |= {"priority": int(task.priority), "metadata": task.metadata}
        state = WorkflowState(task.id, steps, steps_of(steps), workflow_context=dict(context or {}), task=told)
        state.created_at = self._clock.time()
        fields = encode_state(state, self.memory_manager.encode)
        key, store = self._key(task.id), await self.memory_manager.store()
        commit = await store.commit(key, ABSENT, fields, ttl_ms=0)
        if commit.done:
            state.version, state.token = commit.version, commit.token
            self._emit(task.id, state.status, None, 0, len(steps))
            return state
        (raw,) = await store.read([key])
        if all(raw.get(name) == value for name, value in fields.items() if is_fixed(name)):
            return decode_state(task.id, raw)
        logger.warning("workflow %s exists already with another plan or input; the recorded one stays", task.id)
        return None

    async def get_next_step(self, task_id: str) -> WorkflowStep | None:
        """The current step: the first that has not ended. O(1), two round trips; changes nothing.

        Returns:
            The step, PENDING or RUNNING (the latter when its process died, or still runs it), or None when every
            step has ended, the current one FAILED and waits for a decision, or the workflow has ended.
        """
        head, step = await self._current(task_id)
        ended = TaskState(head["st"].decode()) in FINISHED
        return None if ended or step is None or step.state is StepState.FAILED else step

    async def update_step_state(
        self,
        task_id: str,
        step_index: int,
        new_step_state: StepState,
        result: Any = None,
        error: dict[str, Any] | str | None = None,
        *,
        attempt: int | None = None,
    ) -> WorkflowStep:
        """Move the current step along :data:`STEP_EDGES`; returns it as recorded. O(1), two round trips.

        RUNNING starts a new attempt. Repeating any other change with the same result and error changes nothing.
        ``attempt``, when given, must be the attempt that is recorded, before RUNNING counts a new one.

        Raises:
            WorkflowError: no such workflow or step, the workflow has ended, the step is not the current one, the
                edge is not legal, or another attempt has taken over.
        """
        if not isinstance(new_step_state, StepState):
            raise WorkflowError(f"new_step_state must be a StepState, got {new_step_state!r}")
        told = None if error is None else error_of(error)
        return await self._move(task_id, step_index, Change(new_step_state, result, told, attempt))

    async def handle_step_failure(
        self, task_id: str, step_index: int, error: dict[str, Any] | str, *, attempt: int | None = None
    ) -> WorkflowState:
        """Record that the current step FAILED and, since later steps build on it, that the workflow did; one commit.

        The workflow's error is ``error`` with ``step_index`` and ``action`` added. A step that is recorded as FAILED
        keeps its own error. Three round trips, O(workflow) for reading the result.

        Raises:
            WorkflowError: as :meth:`update_step_state`.
        """
        change = Change(StepState.FAILED, None, error_of(error), attempt)
        await self._move(task_id, step_index, change, ends=True)
        return await self._require(task_id)

    async def complete_workflow(self, task_id: str, final_output: Any) -> WorkflowState:
        """Record that the workflow is COMPLETED, with ``workflow_context["final_output"]``.

        Steps that were never begun count as SKIPPED from then on. Done again, it changes nothing and the first
        output stays. Four round trips, O(workflow) for reading the result.

        Raises:
            WorkflowError: a step is RUNNING or FAILED, or the workflow ended otherwise.
        """
        output = self.memory_manager.encode(f"final output of workflow {task_id}", final_output)
        return await self._end(task_id, TaskState.COMPLETED, {"c:final_output": output}, None)

    async def fail_workflow(self, task_id: str, error: dict[str, Any] | str) -> WorkflowState:
        """Record that the workflow FAILED; a step in flight FAILED with it. Done again, the first error stays.

        Four round trips, O(workflow) for reading the result.

        Raises:
            WorkflowError: the workflow is unknown, or ended otherwise.
        """
        told = error_of(error)
        return await self._end(task_id, TaskState.FAILED, {"e": self._error_bytes(task_id, told)}, told)

    async def load_workflow_state(self, task_id: str) -> WorkflowState | None:
        """The whole workflow, or None if there is none. One round trip, O(workflow)."""
        key = self._key(task_id)
        (raw,) = await (await self.memory_manager.store()).read([key])
        return decode_state(task_id, raw) if raw else None

    async def save_workflow_state(self, state: WorkflowState) -> WorkflowState:
        """Write what differs between ``state`` and the record; ``state`` then carries its new version.

        For changes the other methods do not offer, mostly of ``workflow_context``. A ``state`` that was not loaded is
        created. ``current_step_index`` follows from the steps. Two round trips, O(workflow).

        Raises:
            WorkflowError: somebody has written since ``state`` was loaded; or it changes the plan or task, breaks
                the order of the steps, takes an illegal edge, or changes a workflow that has ended. Nothing was
                written; load it again.
        """
        key, store = self._key(state.task_id), await self.memory_manager.store()
        (raw,) = await store.read([key])
        if raw.get(TOKEN, ABSENT) != state.token:
            raise conflict(state.task_id)
        before = decode_state(state.task_id, raw) if raw else None
        if before is None or not before.is_finished():
            state.current_step_index = current_index(state.steps)
        fresh = encode_state(state, self.memory_manager.encode)
        changed = {name: value for name, value in fresh.items() if raw.get(name) != value}
        removed = sorted(raw.keys() - fresh.keys() - {TOKEN, VERSION})
        if faults := list(change_faults(before, state, {*changed, *removed})):
            raise refused(f"the new state of workflow {state.task_id}", faults)
        if changed or removed:
            ttl_ms = self._retention_ms if state.is_finished() else -1
            commit = await store.commit(key, state.token, changed, removed=removed, ttl_ms=ttl_ms)
            if not commit.done:
                raise conflict(state.task_id)
            state.version, state.token = commit.version, commit.token
            self._emit(state.task_id, state.status, None, state.current_step_index, len(state.steps))
        return state

    async def _move(self, task_id: str, index: int, change: Change, *, ends: bool = False) -> WorkflowStep:
        """Take one edge of one step; with ``ends`` the workflow FAILED by it, in the same commit."""
        key, store = self._key(task_id), await self.memory_manager.store()
        for again in range(_MAX_TRIES):
            head = await self._head(task_id, f"p:{index}", f"s:{index}")
            status = TaskState(head["st"].decode())
            if f"p:{index}" not in head:
                raise WorkflowError(f"workflow {task_id} has steps 0 to {int(head['n']) - 1}, not {index!r}")
            old = decode_step(task_id, index, head)
            new = old if ends and old.state is StepState.FAILED else after(old, change, self._clock.time())
            if new is old and (not ends or status in FINISHED):
                return new
            if status in FINISHED:
                raise WorkflowError(f"workflow {task_id} is {status.value}; step {index} cannot change any more")
            if index != int(head["i"]):
                raise WorkflowError(f"step {index} of workflow {task_id} must wait for step {int(head['i'])}")
            fields = {"i": b"%d" % (index + (new.state in DONE)), "st": b"running", f"s:{index}": self._record(new)}
            if ends:
                told = {**(change.error or {}), "step_index": index, "action": new.action}
                fields |= self._ended(TaskState.FAILED) | {"e": self._error_bytes(task_id, told)}
            if (await store.commit(key, head[TOKEN], fields, ttl_ms=self._retention_ms if ends else -1)).done:
                self._emit(task_id, TaskState(fields["st"].decode()), index, int(fields["i"]), int(head["n"]))
                return new
            await pause_after_conflict(again)
        raise conflict(task_id)

    async def _end(
        self, task_id: str, status: TaskState, fields: dict[str, bytes], error: dict[str, Any] | None
    ) -> WorkflowState:
        key, store = self._key(task_id), await self.memory_manager.store()
        for again in range(_MAX_TRIES):
            head, step = await self._current(task_id)
            before = TaskState(head["st"].decode())
            if before is status:
                return await self._require(task_id)
            if before in FINISHED:
                raise WorkflowError(f"workflow {task_id} is {before.value} and cannot become {status.value}")
            changed = {**fields, **self._ended(status)}
            if status is TaskState.COMPLETED:
                changed["i"] = head["n"]
            if step is not None and status is TaskState.COMPLETED and step.state is not StepState.PENDING:
                raise WorkflowError(f"workflow {task_id} cannot complete: step {step.step_index} is {step.state.value}")
            if step is not None and step.state is StepState.RUNNING:
                failed = after(step, Change(StepState.FAILED, None, error), self._clock.time())
                changed[f"s:{step.step_index}"] = self._record(failed)
            if (await store.commit(key, head[TOKEN], changed, ttl_ms=self._retention_ms)).done:
                self._emit(task_id, status, None, int(head["i"]), int(head["n"]))
                return await self._require(task_id)
            await pause_after_conflict(again)
        raise conflict(task_id)

    async def _head(self, task_id: str, *more: str) -> dict[str, bytes]:
        """The few fields that every change looks at, of one moment."""
        key = self._key(task_id)
        (raw,) = await (await self.memory_manager.store()).read([key], (*HEAD, *more))
        if not raw:
            raise WorkflowError(f"there is no workflow for task {task_id}: it was never initialised, or has expired")
        check_format(task_id, raw)
        return raw

    async def _current(self, task_id: str) -> tuple[dict[str, bytes], WorkflowStep | None]:
        """Head and current step. Of two moments: who commits against the head's token finds out."""
        head = await self._head(task_id)
        index = int(head["i"])
        if index >= int(head["n"]):
            return head, None
        (raw,) = await (await self.memory_manager.store()).read([self._key(task_id)], (f"p:{index}", f"s:{index}"))
        return head, decode_step(task_id, index, raw)

    async def _require(self, task_id: str) -> WorkflowState:
        state = await self.load_workflow_state(task_id)
        if state is None:
            raise WorkflowError(f"there is no workflow for task {task_id}: it was never initialised, or has expired")
        return state

    def _key(self, task_id: str) -> str:
        return _keys.workflow(self.memory_manager.namespace, task_id)

    def _ended(self, status: TaskState) -> dict[str, bytes]:
        return {"st": status.value.encode(), "et": dumps(self._clock.time())}

    def _record(self, step: WorkflowStep) -> bytes:
        return encode_step(step, self.memory_manager.encode)

    def _error_bytes(self, task_id: str, error: dict[str, Any]) -> bytes:
        return self.memory_manager.encode(f"error of workflow {task_id}", error)

    @staticmethod
    def _emit(task_id: str, status: TaskState, step: int | None, completed: int, total: int) -> None:
        telemetry.emit(
            "workflow.changed",
            {"completed": completed, "total": total},
            {"workflow_id": task_id, "status": status.value, "step": step},
        )


def get_workflow_engine(memory_manager: MemoryManager | None = None) -> WorkflowEngine:
    """The shared engine over ``memory_manager`` (by default the shared one) for this loop; awaiting it connects it."""
    memory = get_memory_manager() if memory_manager is None else memory_manager
    # The engine holds the manager, so its id is not given to another while the engine is shared.
    return shared("workflow_engine", str(id(memory)), lambda: WorkflowEngine(memory))
