"""The words of a workflow and its record: states, legal edges, plans, and how all that lies in one hash.

Pure functions and dataclasses; no I/O, no clock. The record of a workflow (``p:``, ``s:``, ``c:`` repeat)::

    k v        token and count of its changes (orchestra._documents)
    f          format of the record, 1
    n i st     number of steps, index of the current step, status
    t m        the task's type and input; its id, priority and metadata
    at et e    when it was made, when it ended, its error
    p:<index>  a step as planned, never written again
    s:<index>  what became of a step: [state, attempt, started_at, finished_at, result, error]; absent until it begins
    c:<name>   one entry of workflow_context

So a change of state writes a few small fields, whatever the size of the workflow.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from orchestra._documents import ABSENT, TOKEN, VERSION
from orchestra.errors import CorruptEntryError, WorkflowError
from orchestra.serialization import dumps, loads
from orchestra.tasks import TaskState

if TYPE_CHECKING:
    from collections.abc import Iterator

Encode: TypeAlias = Callable[[str, Any], bytes]
"""``encode(what, value)``: MessagePack within the size limit; errors name ``what`` it is."""

MAX_STEPS: Final = 10_000
"""Most steps of one plan."""
FORMAT: Final = b"1"
HEAD: Final = (TOKEN, VERSION, "f", "n", "i", "st")
"""The small fields that every change of state looks at."""


class StepState(enum.Enum):
    """Where a step is. COMPLETED and SKIPPED absorb."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"


DONE: Final = frozenset({StepState.COMPLETED, StepState.SKIPPED})
_NOT_BEGUN: Final = frozenset({StepState.PENDING, StepState.SKIPPED})
FINISHED: Final = frozenset({TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED})

STEP_EDGES: Final[Mapping[StepState, frozenset[StepState]]] = {
    StepState.PENDING: frozenset({StepState.RUNNING, StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED}),
    # RUNNING again: its process died and another has taken it over; PENDING: it was given back unfinished.
    StepState.RUNNING: frozenset(StepState),
    StepState.FAILED: frozenset({StepState.PENDING, StepState.RUNNING, StepState.SKIPPED}),
    StepState.COMPLETED: frozenset(),
    StepState.SKIPPED: frozenset(),
}
"""From each state of a step, the states it may go to."""

STATUS_EDGES: Final[Mapping[TaskState, frozenset[TaskState]]] = {
    TaskState.PENDING: FINISHED | {TaskState.RUNNING},
    TaskState.RUNNING: FINISHED,
    **dict.fromkeys(FINISHED, frozenset[TaskState]()),
}
"""From each state of a workflow, the states it may go to."""


@dataclass(slots=True)
class WorkflowStep:
    """One step of a plan and what became of it.

    ``args`` is what its agent gets as input, None: the input of the workflow's task. ``attempt`` counts how often it
    was started and is its fence: what an earlier attempt reports is refused. Times are unix seconds.
    """

    step_index: int
    action: str
    args: dict[str, Any] | None = None
    reasoning: str = ""
    state: StepState = StepState.PENDING
    result: Any = None
    error: dict[str, Any] | None = None
    attempt: int = 0
    started_at: float | None = None
    finished_at: float | None = None


@dataclass(slots=True)
class WorkflowState:
    """A workflow as it was at ``version``, which counts its changes.

    ``task`` holds ``id``, ``type``, ``input``, ``priority`` and ``metadata`` of the task it is for. ``token`` ties the
    object to what was read: :meth:`WorkflowEngine.save_workflow_state` refuses it once somebody else has written.
    """

    task_id: str
    plan: list[dict[str, Any]]
    steps: list[WorkflowStep]
    current_step_index: int = 0
    status: TaskState = TaskState.PENDING
    workflow_context: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    version: int = 0
    task: dict[str, Any] = field(default_factory=dict)
    created_at: float | None = None
    finished_at: float | None = None
    token: bytes = field(default=ABSENT, repr=False)

    def is_finished(self) -> bool:
        """Whether the workflow is COMPLETED, FAILED or CANCELLED."""
        return self.status in FINISHED


def validate_plan(plan: Any) -> list[dict[str, Any]]:
    """``plan`` with ``action``, ``args`` and ``reasoning`` in each step; other keys travel along.

    Raises:
        WorkflowError: it is not a list of 1 to 10,000 steps that each have an ``action``; ``.faults`` lists
            everything that is wrong with it, not only the first.
    """
    if not isinstance(plan, list | tuple) or not 1 <= len(plan) <= MAX_STEPS:
        came = f"{len(plan)} steps" if isinstance(plan, list | tuple) else type(plan).__name__
        raise refused("a plan", [f"expected a list of 1 to {MAX_STEPS} steps, got {came}"])
    faults = [f"step {index}: {fault}" for index, step in enumerate(plan) for fault in _step_faults(step)]
    if faults:
        raise refused("the plan", faults)
    return [{**step, "args": step.get("args"), "reasoning": step.get("reasoning") or ""} for step in plan]


def _step_faults(step: Any) -> Iterator[str]:
    if not isinstance(step, Mapping):
        yield f"expected a dict, got {type(step).__name__}"
        return
    if not all(isinstance(key, str) for key in step):
        yield "its keys must be strings"
    action = step.get("action")
    if not isinstance(action, str) or not 1 <= len(action) <= 128 or not all("!" <= ch <= "~" for ch in action):
        yield f"action must be 1 to 128 printable ASCII characters without spaces, got {action!r}"
    args = step.get("args")
    if args is not None and not (isinstance(args, dict) and all(isinstance(key, str) for key in args)):
        yield f"args must be a dict with string keys, got {args!r:.100}"
    if not isinstance(step.get("reasoning") or "", str):
        yield f"reasoning must be text, got {type(step['reasoning']).__name__}"


@dataclass(frozen=True, slots=True)
class Change:
    """A wish to move a step to ``state``; ``attempt`` is the one that must be recorded, None: any."""

    state: StepState
    result: Any = None
    error: dict[str, Any] | None = None
    attempt: int | None = None


def after(step: WorkflowStep, change: Change, now: float) -> WorkflowStep:
    """``step`` after ``change``, or ``step`` itself when that is recorded already."""
    what = f"step {step.step_index} ({step.action})"
    if change.attempt is not None and change.attempt != step.attempt:
        raise WorkflowError(f"attempt {change.attempt} of {what} was superseded: attempt {step.attempt} is recorded")
    if change.state is step.state and change.state is not StepState.RUNNING:
        if dumps([change.result, change.error]) == dumps([step.result, step.error]):
            return step
        raise WorkflowError(f"{what} is {step.state.value} already, with another result or error; the first stays")
    if change.state not in STEP_EDGES[step.state]:
        raise WorkflowError(f"{what} is {step.state.value} and cannot become {change.state.value}")
    if change.state in (StepState.RUNNING, StepState.PENDING):
        begun = change.state is StepState.RUNNING
        fresh = WorkflowStep(step.step_index, step.action, step.args, step.reasoning, change.state)
        return replace(fresh, attempt=step.attempt + begun, started_at=now if begun else None)
    return replace(step, state=change.state, finished_at=now, result=change.result, error=change.error)


def steps_of(plan: list[dict[str, Any]]) -> list[WorkflowStep]:
    """The steps of a validated plan, none of them begun."""
    return [WorkflowStep(index, p["action"], p["args"], p["reasoning"]) for index, p in enumerate(plan)]


def encode_step(step: WorkflowStep, encode: Encode) -> bytes:
    """What became of ``step``, for field ``s:<index>``."""
    row = [step.state.value, step.attempt, step.started_at, step.finished_at, step.result, step.error]
    return encode(f"result of step {step.step_index} ({step.action})", row)


def encode_state(state: WorkflowState, encode: Encode) -> dict[str, bytes]:
    """Every field of the record of ``state`` but ``k`` and ``v``."""
    told = dict(state.task)
    fields = {"f": FORMAT, "n": b"%d" % len(state.steps), "i": b"%d" % state.current_step_index}
    fields |= {"st": state.status.value.encode(), "at": dumps(state.created_at), "et": dumps(state.finished_at)}
    fields["t"] = encode("the task's input", {"type": told.pop("type", ""), "input": told.pop("input", None)})
    fields["m"] = encode("the task's metadata", told)
    if state.error is not None:
        fields["e"] = encode(f"error of workflow {state.task_id}", state.error)
    for index, planned in enumerate(state.plan):
        fields[f"p:{index}"] = encode(f"step {index} of the plan", planned)
    for step in state.steps:
        skipped = step.state is StepState.SKIPPED and not state.is_finished()
        if skipped or step.attempt or step.finished_at is not None or step.state not in _NOT_BEGUN:
            fields[f"s:{step.step_index}"] = encode_step(step, encode)
    for name, value in state.workflow_context.items():
        fields[f"c:{name}"] = encode(f"workflow_context[{name!r}]", value)
    return fields


def decode_state(task_id: str, raw: Mapping[str, bytes]) -> WorkflowState:
    """The workflow whose record is ``raw``. Raises CorruptEntryError when that is not a record of this version."""
    check_format(task_id, raw)
    try:
        status, total = TaskState(raw["st"].decode()), int(raw["n"])
        steps = [decode_step(task_id, index, raw) for index in range(total)]
        if status in FINISHED:
            steps = [replace(s, state=StepState.SKIPPED) if s.state is StepState.PENDING else s for s in steps]
        return WorkflowState(
            task_id=task_id,
            plan=[loads(raw[f"p:{index}"]) for index in range(total)],
            steps=steps,
            current_step_index=int(raw["i"]),
            status=status,
            workflow_context={name[2:]: loads(raw[name]) for name in raw if name.startswith("c:")},
            error=loads(raw["e"]) if "e" in raw else None,
            version=int(raw[VERSION]),
            task={**loads(raw["m"]), **loads(raw["t"])},
            created_at=loads(raw["at"]),
            finished_at=loads(raw["et"]),
            token=raw[TOKEN],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptEntryError(
            f"the record of workflow {task_id} is damaged ({error!r}); it is left as it is"
        ) from error


def decode_step(task_id: str, index: int, raw: Mapping[str, bytes]) -> WorkflowStep:
    """Step ``index`` from its fields ``p:`` and ``s:``. Raises CorruptEntryError when they are damaged."""
    try:
        planned = loads(raw[f"p:{index}"])
        step = WorkflowStep(index, planned["action"], planned["args"], planned["reasoning"])
        if f"s:{index}" in raw:
            state, step.attempt, step.started_at, step.finished_at, step.result, step.error = loads(raw[f"s:{index}"])
            step.state = StepState(state)
    except (KeyError, ValueError, TypeError) as error:
        text = f"step {index} of workflow {task_id} is damaged ({error!r}); it is left as it is"
        raise CorruptEntryError(text) from error
    return step


def check_format(task_id: str, raw: Mapping[str, bytes]) -> None:
    """Raise CorruptEntryError unless the fields :data:`HEAD` are there and of this version."""
    try:
        found = raw["f"]
        TaskState(raw["st"].decode()), int(raw["i"]), int(raw["n"]), int(raw[VERSION]), raw[TOKEN]
    except (KeyError, ValueError) as error:
        raise CorruptEntryError(
            f"the record of workflow {task_id} is damaged ({error!r}); it is left as it is"
        ) from error
    if found != FORMAT:
        raise CorruptEntryError(
            f"the record of workflow {task_id} has format {found!r}, this version reads {FORMAT!r}; it is left as it is"
        )


def is_fixed(name: str) -> bool:
    """Whether field ``name`` is written once and never again."""
    return name in ("f", "n", "t") or name.startswith("p:")


def current_index(steps: list[WorkflowStep]) -> int:
    """Index of the first step that has not ended; their number when all have."""
    return next((index for index, step in enumerate(steps) if step.state not in DONE), len(steps))


def change_faults(before: WorkflowState | None, state: WorkflowState, touched: set[str]) -> Iterator[str]:
    """What :meth:`WorkflowEngine.save_workflow_state` refuses; ``touched`` names the fields that differ."""
    if [(s.step_index, s.action, s.args) for s in state.steps] != [
        (s.step_index, s.action, s.args) for s in steps_of(validate_plan(state.plan))
    ]:
        yield "its steps are not those of its plan"
    if before is not None:
        if any(map(is_fixed, touched)):
            yield "the plan, the task's type and its input cannot change"
        if before.is_finished() and touched:
            yield f"it is {before.status.value} and cannot change any more"
        elif state.status is not before.status and state.status not in STATUS_EDGES[before.status]:
            yield f"it is {before.status.value} and cannot become {state.status.value}"
        for old, new in zip(before.steps, state.steps, strict=False):
            if new.state is not old.state and new.state not in STEP_EDGES[old.state]:
                yield f"step {old.step_index} is {old.state.value} and cannot become {new.state.value}"
    yield from _order_faults(state)


def _order_faults(state: WorkflowState) -> Iterator[str]:
    current = state.current_step_index
    for step in state.steps[current + 1 :]:
        if step.state not in _NOT_BEGUN or step.attempt:
            yield f"step {step.step_index} must wait for step {current}"
    if state.is_finished() and current < len(state.steps):
        found = state.steps[current].state
        if found is StepState.RUNNING or (found is StepState.FAILED and state.status is TaskState.COMPLETED):
            yield f"it cannot be {state.status.value} while step {current} is {found.value}"


def error_of(error: dict[str, Any] | str) -> dict[str, Any]:
    """An error as it is recorded: a dict; text becomes its ``message``."""
    return dict(error) if isinstance(error, dict) else {"message": str(error)}


def refused(what: str, faults: list[str]) -> WorkflowError:
    """The error that lists ``faults`` of ``what``."""
    return WorkflowError(f"{what} is refused: {'; '.join(faults[:10])}", faults=tuple(faults))


def conflict(task_id: str) -> WorkflowError:
    """The error of who lost a race for a workflow."""
    return WorkflowError(f"workflow {task_id} was changed by somebody else meanwhile; load it and decide again")
