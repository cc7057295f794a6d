"""Saving a workflow by hand: what of it is written, and what is refused. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from orchestra._workflow.record import ENDED, LETTERS, Encode, Fields, Live, steps_of
from orchestra._workflow.states import DONE, STATUS_EDGES, STEP_EDGES, StepState, WorkflowState, WorkflowStep
from orchestra.serialization import dumps
from orchestra.tasks import TaskState

if TYPE_CHECKING:
    from collections.abc import Iterator

_LETTER_OF: Final = {state: letter for letter, state in LETTERS.items() if letter not in "HF"}


def encode_saved(state: WorkflowState, raw: Mapping[str, bytes], encode: Encode) -> Fields:
    """Every field of the record ``raw`` that a save by hand may change, as ``state`` has it. O(workflow)."""
    fields = {"status": state.status.value.encode(), "current": b"%d" % state.current_step_index}
    fields["phase"] = b"running" if state.status is TaskState.RUNNING else b""
    if state.error is not None:
        kept = state.error
        if "culprit" in raw and kept.get("step_index") == int(raw["culprit"]):
            kept = {name: value for name, value in kept.items() if name not in ("step_index", "action")}
            fields["culprit"] = raw["culprit"]
        fields["error"] = encode(f"error of workflow {state.task_id}", kept)
    letters = [_letter(step, raw, state) for step in state.steps]
    for step, letter in zip(state.steps, letters, strict=True):
        ends = [letters[index] for index in step.depends_on if letters[index] in ENDED]
        old = Live(raw.get(f"q:{step.step_index}"), len(step.depends_on))
        live = Live(None, len(step.depends_on))
        live.state, live.attempt, live.series, live.fence = letter, step.attempt, old.series, old.fence
        live.unmet, live.alive, live.order = len(step.depends_on) - len(ends), len(ends) - ends.count("S"), old.order
        live.started, live.finished = round((step.started_at or 0) * 1000), round((step.finished_at or 0) * 1000)
        if live.packed() != Live(None, len(step.depends_on)).packed() or f"q:{step.step_index}" in raw:
            fields[f"q:{step.step_index}"] = live.packed()
        what = f"result of step {step.step_index} ({step.action})"
        if step.result is not None:
            fields[f"r:{step.step_index}"] = encode(what, step.result)
        if step.error is not None:
            fields[f"e:{step.step_index}"] = encode(f"error of step {step.step_index} ({step.action})", step.error)
    fields["left"] = b"%d" % sum(letter not in ENDED for letter in letters)
    fields["running"] = b"%d" % letters.count("R")
    return fields


def _letter(step: WorkflowStep, raw: Mapping[str, bytes], state: WorkflowState) -> str:
    old = raw.get(f"q:{step.step_index}", b"P")[:1].decode()
    if LETTERS[old] is step.state or (state.is_finished() and step.state is StepState.SKIPPED and old == "P"):
        return old
    return _LETTER_OF[step.state]


def change_faults(before: WorkflowState | None, state: WorkflowState) -> Iterator[str]:
    """What :meth:`WorkflowEngine.save_workflow_state` refuses; ``before`` is what is recorded."""
    if [(s.step_index, s.action, s.args) for s in state.steps if not s.role] != [
        (s.step_index, s.action, s.args) for s in steps_of(state.plan)
    ]:
        yield "its steps are not those of its plan"
    if before is not None:
        yield from _edge_faults(before, state)
    if not state.driven:
        yield from _order_faults(state)


def _edge_faults(before: WorkflowState, state: WorkflowState) -> Iterator[str]:
    fixed = [(each.plan, each.task.get("type"), dumps(each.task.get("input"))) for each in (before, state)]
    if fixed[0] != fixed[1]:
        yield "the plan, the task's type and its input cannot change"
    moved = (before.status, before.error, before.steps) != (state.status, state.error, state.steps)
    if before.is_finished() and (moved or before.workflow_context != state.workflow_context):
        yield f"it is {before.status.value} and cannot change any more"
    elif before.driven and moved:
        yield "it is driven by workers, so only its workflow_context may be changed by hand"
    elif state.status is not before.status and state.status not in STATUS_EDGES[before.status]:
        yield f"it is {before.status.value} and cannot become {state.status.value}"
    for old, new in zip(before.steps, state.steps, strict=False):
        if new.state is not old.state and new.state not in STEP_EDGES[old.state]:
            yield f"step {old.step_index} is {old.state.value} and cannot become {new.state.value}"


def _order_faults(state: WorkflowState) -> Iterator[str]:
    begun = {StepState.RUNNING, StepState.COMPLETED, StepState.FAILED, StepState.WAITING}
    for step in state.steps:
        open_ = [index for index in step.depends_on if state.steps[index].state not in DONE]
        if open_ and (step.state in begun or step.attempt or (step.state in DONE and not state.is_finished())):
            first = state.steps[open_[0]]
            if first.state is not StepState.FAILED or first.on_failure == "fail":
                yield f"step {step.step_index} must wait for step {open_[0]}"
        if state.is_finished() and (
            step.state is StepState.RUNNING
            or (step.state is StepState.FAILED and state.status is TaskState.COMPLETED and step.on_failure == "fail")
        ):
            yield f"it cannot be {state.status.value} while step {step.step_index} is {step.state.value}"
