"""Durable workflows: a plan, how far it came, and which changes of state are legal.

Owns the public face of the state machine: creating workflows, driving one by hand, reading, saving and following it.
What workers call to drive one is in :mod:`orchestra._workflow.driving`, the record in :mod:`orchestra._workflow.record`.
Every change is one script, which checks that it is legal and writes the few fields it concerns; of two processes that
drive the same workflow one wins and the other is told. Refuses to own execution: agents, pools and planners are the
orchestrator's.

A step may begin when all it depends on has ended. COMPLETED, FAILED and CANCELLED absorb; a step that was never begun
reads as SKIPPED once its workflow has ended. One event loop; the engine holds no state between calls.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from orchestra._shared import shared
from orchestra._workflow import record as rec
from orchestra._workflow.answers import (
    Begun,
    Moved,
    Progress,
    Ready,
    WorkflowEvent,
    WorkflowSummary,
    read_moved,
    read_row,
)
from orchestra._workflow.making import Making
from orchestra._workflow.plan import refused, validate_plan
from orchestra._workflow.saving import change_faults, encode_saved
from orchestra._workflow.states import (
    DONE,
    FINISHED,
    STATUS_EDGES,
    STEP_EDGES,
    StepState,
    WorkflowState,
    WorkflowStep,
    conflict,
    current_index,
    error_of,
)
from orchestra.errors import ConfigurationError, WorkflowError
from orchestra.memory import DEFAULT, Default, MemoryManager, get_memory_manager, to_ms
from orchestra.serialization import loads
from orchestra.tasks import TaskState

if TYPE_CHECKING:
    from orchestra._workflow.store import Arg

__all__ = [
    "STATUS_EDGES",
    "STEP_EDGES",
    "Begun",
    "Moved",
    "Progress",
    "Ready",
    "StepState",
    "WorkflowEngine",
    "WorkflowEvent",
    "WorkflowState",
    "WorkflowStep",
    "WorkflowSummary",
    "get_workflow_engine",
    "validate_plan",
]

logger = logging.getLogger("orchestra.workflow")

_PAGE: Final = 500


class WorkflowEngine(Making):
    """Creates workflows, hands out their next step and records what became of it.

    Args:
        memory_manager: where the state is kept: under its namespace, each result within its ``max_bytes``.
        retention: seconds an ended workflow is kept; by default the ``ttl`` of the memory manager; None: for ever.
            A workflow that has not ended is never forgotten.

    Raises:
        TypeError: If memory_manager is not an instance of MemoryManager

    Every method raises WorkflowError for an unknown workflow or an illegal change, CorruptEntryError when the record
    was not written by this version (it is left as it is), and what :class:`~orchestra.memory.MemoryManager` raises.
    Times are those of the clock of Redis, or of this process for a ``memory:`` address.
    """

    def __init__(self, memory_manager: MemoryManager, *, retention: float | Default | None = DEFAULT) -> None:
        if not isinstance(memory_manager, MemoryManager):
            raise TypeError(f"memory_manager must be a MemoryManager, got {type(memory_manager).__name__}")
        self.memory_manager = memory_manager
        self._retention_ms = to_ms(memory_manager.ttl if isinstance(retention, Default) else retention)

    # -- by hand

    async def get_next_step(self, task_id: str) -> WorkflowStep | None:
        """The first step in the order of the plan that may begin or runs. Two round trips or a few; changes nothing.

        Returns:
            The step, PENDING or RUNNING (the latter when its process died, or still runs it), or None when every
            step has ended, those that are left wait for one that FAILED, or the workflow has ended.
        """
        head = await self._head(task_id)
        if TaskState(head["status"].decode()) in FINISHED:
            return None
        store, total = await self._store(), int(head["steps"])
        for first in range(int(head["current"]), total, _PAGE):
            page = range(first, min(first + _PAGE, total))
            names = [f"{kind}:{index}" for index in page for kind in "nq"]
            (raw,) = await store.fields([task_id], names)
            for index in page:
                if self._may_begin(task_id, index, raw):
                    (found,) = await store.fields([task_id], [f"{kind}:{index}" for kind in "pnqdrewm"])
                    return rec.decode_step(task_id, index, found)
        return None

    @staticmethod
    def _may_begin(task_id: str, index: int, raw: Mapping[str, bytes]) -> bool:
        try:
            live = rec.Live(raw.get(f"q:{index}"), rec.Static(raw[f"n:{index}"]).waits)
        except rec.BAD as error:
            raise rec.damaged(f"step {index} of workflow {task_id}", error) from error
        return live.state == "R" or (live.state == "P" and live.unmet == 0)

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
        """Move a step along :data:`STEP_EDGES`; returns it as recorded. O(its dependents), one round trip.

        RUNNING starts a new attempt. Repeating any other change with the same result and error changes nothing.
        ``attempt``, when given, must be the attempt that is recorded, before RUNNING counts a new one.

        Raises:
            WorkflowError: no such workflow or step, the workflow has ended or is driven by workers, what the step
                depends on has not ended, the edge is not legal, or another attempt has taken over.
        """
        if not isinstance(new_step_state, StepState):
            raise WorkflowError(f"new_step_state must be a StepState, got {new_step_state!r}")
        if new_step_state is StepState.WAITING:
            raise WorkflowError("only steps that workers drive wait: see park()")
        told = None if error is None else error_of(error)
        index = await self._index(task_id, step_index)
        what = await self._what(task_id, index, result, told)
        args = (index, new_step_state.value, "" if attempt is None else attempt, *what)
        return (await self._by_hand("update", task_id, index, args, new_step_state, attempt))[1]

    async def handle_step_failure(
        self, task_id: str, step_index: int, error: dict[str, Any] | str, *, attempt: int | None = None
    ) -> WorkflowState:
        """Record that a step FAILED and what that means by its ``on_failure``; one commit.

        "fail", the default: the workflow FAILED, and its error is ``error`` with ``step_index`` and ``action`` added;
        "skip": the step counts as SKIPPED; "continue": the steps after it go on. A step that is recorded as FAILED
        keeps its own error. Two round trips, O(workflow) for reading the result.

        Raises:
            WorkflowError: as :meth:`update_step_state`.
        """
        index = await self._index(task_id, step_index)
        problem = (await self._what(task_id, index, None, error_of(error)))[1]
        args: tuple[Arg, ...] = (index, "" if attempt is None else attempt, problem)
        await self._by_hand("fail_step", task_id, index, args, StepState.FAILED, attempt)
        return await self._require(task_id)

    async def complete_workflow(self, task_id: str, final_output: Any) -> WorkflowState:
        """Record that the workflow is COMPLETED, with ``workflow_context["final_output"]``.

        Steps that were never begun count as SKIPPED from then on. Done again, it changes nothing and the first
        output stays. Two round trips, O(workflow) for reading the result.

        Raises:
            WorkflowError: a step is RUNNING, WAITING or FAILED, or the workflow ended otherwise.
        """
        output = self.memory_manager.encode(f"final output of workflow {task_id}", final_output)
        return await self._end(task_id, TaskState.COMPLETED, output)

    async def fail_workflow(self, task_id: str, error: dict[str, Any] | str) -> WorkflowState:
        """Record that the workflow FAILED; steps in flight FAILED with it. Done again, the first error stays.

        One that workers drive begins nothing more and FAILED as soon as nothing runs and what can be is undone.
        Two round trips, O(workflow) for reading the result.

        Raises:
            WorkflowError: the workflow is unknown, or ended otherwise.
        """
        problem = self.memory_manager.encode(f"error of workflow {task_id}", error_of(error))
        return await self._end(task_id, TaskState.FAILED, problem)

    async def _end(self, task_id: str, status: TaskState, told: bytes) -> WorkflowState:
        reply = await self._ask("finalize", task_id, status.value, told)
        moved = await self._taken(task_id, reply, None)
        if moved.why == "over":
            raise WorkflowError(f"workflow {task_id} is {moved.status.value} and cannot become {status.value}")
        if moved.why == "busy":
            step = read_row(task_id, reply[10])
            raise WorkflowError(f"workflow {task_id} cannot complete: step {step.step_index} is {step.state.value}")
        return await self._require(task_id)

    async def _by_hand(
        self, op: str, task_id: str, index: int, args: tuple[Any, ...], wanted: StepState, attempt: int | None
    ) -> tuple[Moved, WorkflowStep]:
        reply = await self._ask(op, task_id, *args, secrets.token_hex(8))
        moved = read_moved(task_id, reply)
        if moved.why == "index":
            raise WorkflowError(f"workflow {task_id} has steps 0 to {moved.total - 1}, not {index!r}")
        if moved.why == "driven":
            raise WorkflowError(f"workflow {task_id} is driven by workers; its steps are not changed by hand")
        step = read_row(task_id, reply[10])
        if not moved.done:
            raise WorkflowError(await self._why_not(task_id, moved, step, wanted, attempt))
        if moved.why != "same":
            self._emit(task_id, moved.status, index, moved.total - moved.left, moved.total)
        return moved, step

    async def _why_not(
        self, task_id: str, moved: Moved, step: WorkflowStep, wanted: StepState, attempt: int | None
    ) -> str:
        what = f"step {step.step_index} ({step.action})"
        if moved.why == "attempt":
            return f"attempt {attempt} of {what} was superseded: attempt {step.attempt} is recorded"
        if moved.why == "other":
            return f"{what} is {step.state.value} already, with another result or error; the first stays"
        if moved.why == "over":
            return f"workflow {task_id} is {moved.status.value}; step {step.step_index} cannot change any more"
        if moved.why == "wait":
            state = await self._require(task_id)
            open_ = [i for i in step.depends_on if state.steps[i].state not in DONE]
            return f"step {step.step_index} of workflow {task_id} must wait for step {open_[0] if open_ else '?'}"
        return f"{what} is {step.state.value} and cannot become {wanted.value}"

    async def _index(self, task_id: str, index: Any) -> int:
        """``index`` if it can be one; which steps there are, the script knows."""
        if type(index) is int and index >= 0:
            return index
        head = await self._head(task_id)
        raise WorkflowError(f"workflow {task_id} has steps 0 to {int(head['steps']) - 1}, not {index!r}")

    async def _what(self, task_id: str, index: int, result: Any, error: dict[str, Any] | None) -> tuple[bytes, bytes]:
        """Result and error as they are recorded; one that does not fit names the step's action."""
        try:
            return self._packed(f"result of step {index}", result), self._packed(f"error of step {index}", error)
        except ConfigurationError:
            raise
        except Exception:
            (raw,) = await (await self._store()).fields([task_id], [f"{kind}:{index}" for kind in "pn"])
            action = loads(raw[f"p:{index}"])["action"] if f"p:{index}" in raw else "?"
            self._packed(f"result of step {index} ({action})", result)
            self._packed(f"error of step {index} ({action})", error)
            raise

    # -- the whole record

    async def save_workflow_state(self, state: WorkflowState) -> WorkflowState:
        """Write what differs between ``state`` and the record; ``state`` then carries its new version.

        For changes the other methods do not offer, mostly of ``workflow_context``, which is all that may change of a
        workflow that workers drive. A ``state`` that was not loaded is created. ``current_step_index`` follows from the
        steps. Two round trips, O(workflow).

        Raises:
            WorkflowError: somebody has written since ``state`` was loaded; or it changes the plan or task, breaks
                the order of the steps, takes an illegal edge, or changes a workflow that has ended. Nothing was
                written; load it again.
        """
        store = await self._store()
        record, context = await store.read(state.task_id)
        if (rec.token_of(record) if self._readable(state.task_id, record) else b"") != state.token:
            raise conflict(state.task_id)
        before = rec.decode_state(state.task_id, record, context) if record else None
        if not state.driven and (before is None or not before.is_finished()):
            state.current_step_index = current_index(state.steps)
        if faults := list(change_faults(before, state)):
            raise refused(f"the new state of workflow {state.task_id}", faults)
        if before is None:
            return await self._create(state)
        encode = self.memory_manager.encode
        fresh = {} if state.driven or before.is_finished() else encode_saved(state, record, encode)
        owned = [] if not fresh else [n for n in record if n[:2] in ("q:", "r:", "e:") or n in ("error", "culprit")]
        changes = [
            ({n: v for n, v in fresh.items() if record.get(n) != v}, [n for n in owned if n not in fresh]),
            _context_changes(context, rec.encode_context(state, encode)),
        ]
        if any(part for change in changes for part in change):
            await self._write(state, before, changes)
        if fresh:
            state.left, state.running, state.phase = int(fresh["left"]), int(fresh["running"]), fresh["phase"].decode()
        return state

    def _readable(self, task_id: str, record: Mapping[str, bytes]) -> bool:
        if record:
            rec.check_format(task_id, record)
        return bool(record)

    async def _create(self, state: WorkflowState) -> WorkflowState:
        """Record a state that was not loaded: its plan and context, then what its steps have become."""
        wanted, store = state, await self._store()
        fields, context, _ = rec.encode_new(state, self.memory_manager.encode)
        if not state.driven:
            fields |= encode_saved(wanted, fields, self.memory_manager.encode)
        if not await store.make(state.task_id, rec.NewRecord(secrets.token_hex(8), (), fields, context)):
            raise conflict(state.task_id)
        made = await self._require(state.task_id)
        state.version, state.token, state.created_at = made.version, made.token, made.created_at
        return state

    async def _write(self, state: WorkflowState, before: WorkflowState, changes: list[Any]) -> None:
        args: list[Arg] = [state.status.value if state.is_finished() and not before.is_finished() else ""]
        for written, removed in changes:
            args.append(len(written))
            for name, value in written.items():
                args += (name, value)
            args += (len(removed), *removed)
        store = await self._store()
        version = await store.save(state.task_id, state.token, secrets.token_hex(8), self._retention_ms, args)
        if not version:
            raise conflict(state.task_id)
        state.version, state.token = version, state.token.rpartition(b":")[0] + b":%d" % version
        ended = sum(step.state in DONE for step in state.steps)
        self._emit(state.task_id, state.status, None, ended, len(state.steps))

    async def set_context(self, workflow_id: str, name: str, value: Any) -> None:
        """Set one entry of ``workflow_context``; the last writer wins. One round trip.

        Raises:
            WorkflowError: the workflow is unknown or has ended.
        """
        packed = self.memory_manager.encode(f"workflow_context[{name!r}]", value)
        moved = await self._do("context", workflow_id, name, packed)
        if not moved.done:
            raise WorkflowError(f"workflow {workflow_id} is {moved.status.value} and cannot change any more")


def _context_changes(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    removed = [name for name in old if name.startswith("c:") and name not in new]
    return {name: value for name, value in new.items() if old.get(name) != value}, removed


def get_workflow_engine(memory_manager: MemoryManager | None = None) -> WorkflowEngine:
    """The shared engine over ``memory_manager`` (by default the shared one) for this loop; awaiting it connects it."""
    memory = get_memory_manager() if memory_manager is None else memory_manager
    # The engine holds the manager, so its id is not given to another while the engine is shared.
    return shared("workflow_engine", str(id(memory)), lambda: WorkflowEngine(memory))
