"""The words of a workflow: the states of its steps, which changes are legal, and what people get to see of it.

Pure dataclasses and tables; how they are kept is for :mod:`orchestra._workflow.record` to say.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from orchestra.errors import WorkflowError
from orchestra.tasks import TaskState


class StepState(enum.Enum):
    """Where a step is. COMPLETED and SKIPPED absorb."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    """For a signal, a timer, a child workflow or the items of a map; it holds no worker."""
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"


DONE: Final = frozenset({StepState.COMPLETED, StepState.SKIPPED})
FINISHED: Final = frozenset({TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED})

STEP_EDGES: Final[Mapping[StepState, frozenset[StepState]]] = {
    StepState.PENDING: frozenset(StepState) - {StepState.PENDING},
    # RUNNING again: its process died and another has taken it over; PENDING: it was given back unfinished.
    StepState.RUNNING: frozenset(StepState),
    StepState.WAITING: frozenset({StepState.PENDING, StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED}),
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
"""From each state of a workflow, the states it may go to. Only ``resume`` opens one again that FAILED."""


@dataclass(slots=True)
class WorkflowStep:
    """One step of a workflow and what became of it.

    ``args`` is what its agent gets as input, None: the input of the workflow's task. ``attempt`` counts how often it
    was started and is its fence when driven by hand: what an earlier attempt reports is refused. ``series`` counts the
    task ids under which it was sent. ``role`` is "item" or "compensation" for steps that grew, and ``parent`` then the
    step they belong to. ``waiting`` says what a WAITING step waits for: ``for`` ("signal", "timer", "child", "items",
    or "resume" of a PENDING one that is held), ``name``, ``due`` and ``prompt``. Times are unix seconds.
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
    id: str = ""
    depends_on: tuple[int, ...] = ()
    on_failure: str = "fail"
    kind: str = "agent"
    role: str = ""
    parent: int | None = None
    series: int = 1
    waiting: dict[str, Any] | None = None
    timeout: float | None = None
    retry: int | dict[str, Any] | None = None
    compensate: dict[str, Any] | None = None
    when: Any = None


@dataclass(slots=True)
class WorkflowState:
    """A workflow as it was at ``version``, which counts its changes.

    ``task`` holds ``id``, ``type``, ``input``, ``priority`` and ``metadata`` of the task it is for; of a driven one also
    ``life``, which tells it from other workflows of its id, and of a child ``of``, the life of its parent. ``steps`` has those
    of the plan first, then those that grew. ``phase`` says more of a RUNNING one that is ``driven`` by workers: running,
    paused, failing, cancelling or compensating. ``parent`` is the workflow and the index of the step that it is a child
    of. ``token`` ties the object to what was read: :meth:`WorkflowEngine.save_workflow_state` refuses it once somebody
    else has written. ``ready`` is set by initialize_workflow only: the steps that may begin.
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
    token: bytes = field(default=b"", repr=False)
    phase: str = ""
    driven: bool = False
    parent: tuple[str, int] | None = None
    signals: dict[str, Any] = field(default_factory=dict)
    left: int = 0
    running: int = 0
    ready: tuple[Any, ...] = field(default=(), compare=False)

    def is_finished(self) -> bool:
        """Whether the workflow is COMPLETED, FAILED or CANCELLED."""
        return self.status in FINISHED


def error_of(error: Mapping[str, Any] | str) -> dict[str, Any]:
    """An error as it is recorded: a dict; text becomes its ``message``."""
    return dict(error) if isinstance(error, Mapping) else {"message": str(error)}


def conflict(task_id: str) -> WorkflowError:
    """The error of who lost a race for a workflow."""
    return WorkflowError(f"workflow {task_id} was changed by somebody else meanwhile; load it and decide again")


def current_index(steps: Sequence[WorkflowStep]) -> int:
    """Index of the first step that has not ended; their number when all have."""
    return next((index for index, step in enumerate(steps) if step.state not in DONE), len(steps))
