"""What the engine answers, and how that is read from what a store answers. Pure functions and dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orchestra._workflow.record import BAD, FORMAT, LETTERS, Live, Static, damaged, step_of
from orchestra._workflow.refs import UNSET, Facts, StepFact
from orchestra._workflow.states import StepState, WorkflowStep
from orchestra.errors import CorruptEntryError, WorkflowError
from orchestra.serialization import loads
from orchestra.tasks import TaskState


class Ready(NamedTuple):
    """A step that may be sent: under series ``series``, ``planned`` being its words."""

    index: int  # type: ignore[assignment]  # a word of the design; nobody looks for elements of this tuple
    series: int
    planned: dict[str, Any]


class Moved(NamedTuple):
    """What a change did.

    ``done``: whether it applies, now or before; ``why`` says in a word why not, or "repeated". ``ready``: the steps
    that may be sent because of it. ``task``: id, type, priority and metadata of the workflow's task, where ``ready`` is
    not empty. ``attention``: :meth:`WorkflowEngine.next_phase` is to be called. ``children``: child workflows that are
    to be cancelled; ``in_flight``: (index, series) of the steps that run, where it was asked to stop. ``due``: those
    that wait and are due. ``parent``: the workflow of which this was a child, and what its end moved there.
    """

    done: bool
    why: str
    ready: tuple[Ready, ...]
    status: TaskState
    phase: str
    left: int
    running: int
    version: int = 0
    total: int = 0
    task: dict[str, Any] = {}  # noqa: RUF012 - never changed
    attention: bool = False
    children: tuple[str, ...] = ()
    in_flight: tuple[tuple[int, int], ...] = ()
    due: tuple[tuple[int, int], ...] = ()
    parent: tuple[str, Moved] | None = None


class Begun(NamedTuple):
    """Whether a delivery of a step may run: ``verdict`` is

    - "go": it may; ``step``, ``known`` and ``task`` are what its agent needs;
    - "stale": a later delivery, or another series, has it, or its turn has not come;
    - "done": it has ended or waits; ``ready`` are steps after it that were never sent;
    - "held": the workflow is paused, resume will send it again;
    - "stop": the workflow ends.

    ``planned`` are the words of the step. ``reads_all``: the plan is sequential and names no results, so its agents may
    look at all earlier ones.
    """

    verdict: str
    step: WorkflowStep | None
    planned: dict[str, Any]
    known: StepFacts
    task: dict[str, Any]
    total: int
    ready: tuple[Ready, ...]
    phase: str
    reads_all: bool
    moved: Moved


@dataclass(slots=True)
class StepFacts(Facts):
    """What the args of one step may refer to; ``ids`` gives the index of each step in ``steps``."""

    ids: Mapping[str, int] = field(default_factory=dict)
    results: Mapping[int, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a workflow is: ``completed`` of ``total`` steps have ended; ``current`` is the first that has not."""

    completed: int
    total: int
    current: int | None
    status: TaskState
    phase: str


@dataclass(frozen=True, slots=True)
class WorkflowSummary:
    """One workflow in a list. Times in unix seconds."""

    id: str
    type: str
    status: TaskState
    phase: str
    completed: int
    total: int
    created_at: float
    finished_at: float | None
    parent: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class WorkflowEvent:
    """Something that happened to a workflow: ``id`` is its position in the log, ``at`` unix seconds."""

    id: str
    at: float
    kind: str
    step: int | None
    data: Any


def read_moved(task_id: str, reply: Sequence[Any]) -> Moved:
    """What a change answered; raises for an unknown or damaged workflow."""
    why = reply[1].decode("utf-8", "replace")
    if len(reply) == 2:
        raise trouble(task_id, why)
    done, _, status, phase, left, running, version, steps, task, rows, _, _, attention = reply
    try:
        ready = tuple(
            Ready(int(i), int(n), loads(p)) for i, n, p in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
        )
        return Moved(
            bool(done),
            why,
            ready,
            TaskState(status.decode()),
            phase.decode(),
            int(left),
            int(running),
            int(version),
            int(steps),
            loads(task) if task else {},
            bool(attention),
        )
    except BAD as error:
        raise damaged(f"the record of workflow {task_id}", error) from error


def trouble(task_id: str, why: str) -> Exception:
    """The error for a workflow that cannot be read: unknown, or of another format."""
    if why == "unknown":
        return WorkflowError(f"there is no workflow for task {task_id}: it was never initialised, or has expired")
    if why.startswith("format "):
        found = why.removeprefix("format ").encode()
        return CorruptEntryError(
            f"the record of workflow {task_id} has format {found!r}, this version reads {FORMAT!r}; it is left as it is"
        )
    return damaged(f"the record of workflow {task_id}", why)


def read_begun(task_id: str, reply: Sequence[Any]) -> Begun:
    """What ``begin`` or ``look`` answered."""
    moved = read_moved(task_id, reply)
    if not reply[10]:
        verdict = "stale" if moved.why == "early" else moved.why
        return Begun(verdict, None, {}, StepFacts(), moved.task, moved.total, moved.ready, moved.phase, False, moved)
    planned, static, live, given, task, shared, rows, reads, plain, index = reply[10]
    try:
        words = loads(planned)
        fixed = Static(static)
        step = step_of(int(index), words, fixed, Live(live, fixed.waits), reads)
        known = _facts(words, given, shared, rows)
        told = loads(task)
    except BAD as error:
        raise damaged(f"the record of workflow {task_id}", error) from error
    return Begun(moved.why, step, words, known, told, moved.total, moved.ready, moved.phase, plain == b"1", moved)


def _facts(words: Mapping[str, Any], given: bytes, shared: Sequence[bytes], rows: Sequence[Any]) -> StepFacts:
    context: dict[str, Any] = {}
    signals: dict[str, Any] = {}
    for name, value in zip(shared[::2], shared[1::2], strict=True):
        (context if name.startswith(b"c:") else signals)[name[2:].decode()] = loads(value)
    steps: dict[str, StepFact] = {}
    ids: dict[str, int] = {}
    results: dict[int, Any] = {}
    for index, static, live, result, error in rows:
        fixed = Static(static)
        state = LETTERS[Live(live or None, fixed.waits).state]
        ids[fixed.id] = int(index)
        found = loads(result) if result else None
        steps[fixed.id] = StepFact(state.value, found, loads(error) if error else None)
        if state is StepState.COMPLETED:
            results[int(index)] = found
    return StepFacts(
        input=loads(given),
        context=context,
        steps=steps,
        item=words.get("item", UNSET),
        index=words.get("index"),
        signals=signals,
        ids=ids,
        results=results,
    )


def read_row(task_id: str, row: Sequence[Any]) -> WorkflowStep:
    """The step that a change by hand answered."""
    index, planned, static, live, result, error, reads = row
    try:
        fixed = Static(static)
        step = step_of(int(index), loads(planned), fixed, Live(live, fixed.waits), reads)
        step.result = loads(result) if result else None
        step.error = loads(error) if error else None
    except BAD as problem:
        raise damaged(f"step {index!r} of workflow {task_id}", problem) from problem
    return step
