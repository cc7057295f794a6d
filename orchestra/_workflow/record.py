"""The record of a workflow: how it lies in two hashes.

Pure functions; no I/O, no clock. The record (what repeats has its index or name behind the colon)::

    format token created   "3"; of the call that made it; when, milliseconds
    status phase driven    of the workflow; "1": workers carry it out, "0": by hand
    steps planned sinks    number of steps with those that grew; of the plan; those that nothing waits for
    plain                  "1": steps come one after the other and refer to no results
    left running undo children order current version      counters, see lua/workflow_move.lua
    input task parent      the task's input; its id, type, priority, metadata, and lives; "<workflow> <index>" of a child
    error culprit ended    why it failed, by which step, when it ended
    p:                     a step as planned, never written again
    n:                     "<on_failure><linked><undo><grown> <parent> <waits> <id> <dependents>", never written again
    d:                     "<dependencies>|<other steps that its args refer to>", never written again
    q:                     "<state> <attempt> <series> <fence> <unmet> <alive> <started> <finished> <order> <copy>";
                           absent until something happens to the step
    r: e:                  its result, its error
    w: m:                  what it waits for, "<kind> <mode> <due> <name>", and the prompt of that
    x:                     items of a map: "<first> <last> <next> <left> <first that failed>"
    a: b:                  steps that wait for a signal; token of the call that brought it
    last saved             tokens of the last change and the last save by hand

The second hash holds ``c:<name>``, an entry of workflow_context, and ``g:<name>``, the value of a signal. So a change of
state writes a few small fields, whatever the size of the workflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from orchestra._workflow.plan import PlannedStep, compile_plan
from orchestra._workflow.rules import kind_of
from orchestra._workflow.states import StepState, WorkflowState, WorkflowStep
from orchestra.errors import CorruptEntryError
from orchestra.serialization import loads
from orchestra.tasks import TaskState

if TYPE_CHECKING:
    from collections.abc import Sequence

Encode: TypeAlias = Callable[[str, Any], bytes]
"""``encode(what, value)``: MessagePack within the size limit; errors name ``what`` it is."""
Fields: TypeAlias = dict[str, bytes]

FORMAT: Final = b"3"
GRACE_MS: Final = 5_000
"""After so long the outbox is swept for what was committed and has not begun."""
COUNTS: Final = ("steps", "planned", "left", "running", "undo", "children", "order", "current", "version")
BAD: Final = (KeyError, ValueError, TypeError, IndexError, AttributeError, CorruptEntryError)
"""What reading a damaged field may raise."""


LETTERS: Final[Mapping[str, StepState]] = {
    "P": StepState.PENDING,
    "H": StepState.PENDING,  # held: the workflow is paused
    "R": StepState.RUNNING,
    "W": StepState.WAITING,
    "C": StepState.COMPLETED,
    "F": StepState.FAILED,
    "B": StepState.FAILED,  # by hand, and somebody has to decide what that means
    "S": StepState.SKIPPED,
}
PHASES: Final = frozenset([b"", b"running", b"paused", b"failing", b"cancelling", b"compensating"])
ENDED: Final = frozenset("CFS")
HELD: Final = b"H 0 1 0 0 0 0 0 0 0"
"""``q:`` of a step that waits for nothing but the end of a pause."""
_ROLES: Final = {"-": "", "i": "item", "c": "compensation"}


# -- a new record


class NewRecord(NamedTuple):
    """What a store is to record, all at once."""

    token: str
    """Of the call: a repeat succeeds."""
    ready: Sequence[int]
    """Indexes of the steps that may begin."""
    record: Mapping[str, bytes]
    context: Mapping[str, bytes]
    instead: bytes = b""
    """Of which record it takes the place, by what :func:`token_of` says; empty: of none."""


def encode_new(state: WorkflowState, encode: Encode) -> tuple[Fields, Fields, list[int]]:
    """Record and context of ``state``, none of whose steps has begun, and the indexes of those that may. O(plan)."""
    compiled = compile_plan(state.plan)
    dependents: list[list[str]] = [[] for _ in compiled]
    for step in compiled:
        for needed in step.depends_on:
            dependents[needed].append(str(step.index))
    fields = encode_head(state, len(compiled))
    fields["sinks"] = " ".join(str(i) for i, after in enumerate(dependents) if not after).encode()
    fields["input"] = encode("the task's input", state.task.get("input"))
    fields["task"] = encode("the task's metadata", {k: v for k, v in state.task.items() if k != "input"})
    if not any(step.linked or step.reads for step in compiled):
        fields["plain"] = b"1"
    if state.parent is not None:
        fields["parent"] = f"{state.parent[0]} {state.parent[1]}".encode()
    for step, planned, after in zip(compiled, state.plan, dependents, strict=True):
        fields[f"p:{step.index}"] = encode(f"step {step.index} of the plan", planned)
        fields[f"n:{step.index}"] = " ".join((_flags(step), "-1", str(len(step.depends_on)), step.id, *after)).encode()
        if reads := reads_of(step):
            fields[f"d:{step.index}"] = reads
    return fields, encode_context(state, encode), [step.index for step in compiled if not step.depends_on]


def encode_head(state: WorkflowState, planned: int) -> Fields:
    """The head of a record none of whose steps has begun."""
    counts = dict.fromkeys(COUNTS, 0) | {"steps": planned, "planned": planned, "left": planned, "version": 1}
    head = {"format": FORMAT, "status": state.status.value.encode(), "phase": state.phase.encode()}
    head |= {name: b"%d" % value for name, value in counts.items()}
    return head | {"driven": b"%d" % state.driven}


def encode_context(state: WorkflowState, encode: Encode) -> Fields:
    """``workflow_context`` of ``state``."""
    return {f"c:{name}": encode(f"workflow_context[{name!r}]", v) for name, v in state.workflow_context.items()}


def _flags(step: PlannedStep) -> str:
    return f"{step.on_failure[0]}{'l' if step.linked else '-'}{'-' if step.compensate is None else 'u'}-"


def reads_of(step: PlannedStep) -> bytes:
    """What ``d:`` says of ``step``."""
    others = sorted(step.reads - set(step.depends_on))
    if not step.depends_on and not others:
        return b""
    return f"{' '.join(map(str, step.depends_on))}|{' '.join(map(str, others))}".encode()


# -- reading


class Static:
    """What ``n:`` says of a step; raises ValueError when that is no such text."""

    __slots__ = ("grown", "id", "linked", "next", "parent", "policy", "undo", "waits")

    def __init__(self, raw: bytes) -> None:
        flags, parent, waits, self.id, *after = raw.decode().split(" ")
        self.policy, linked, undo, self.grown = tuple(flags)
        if self.policy not in "fsc" or linked not in "l-" or undo not in "u-" or self.grown not in "ic-":
            raise ValueError(f"no flags of a step: {flags!r}")
        self.linked, self.undo = linked == "l", undo == "u"
        self.parent, self.waits = int(parent), int(waits)
        self.next = [int(index) for index in after]


class Live:
    """What ``q:`` says of a step; raises ValueError when that is no such text."""

    NUMBERS = ("attempt", "series", "fence", "unmet", "alive", "started", "finished", "order", "copy")
    __slots__ = ("state", *NUMBERS)
    attempt: int
    series: int
    fence: int
    unmet: int
    alive: int
    started: int
    finished: int
    order: int
    copy: int

    def __init__(self, raw: bytes | None, waits: int) -> None:
        text = raw.decode() if raw else f"P 0 1 0 {waits} 0 0 0 0 0"
        self.state, *numbers = text.split(" ")
        if self.state not in LETTERS:
            raise ValueError(f"no state of a step: {self.state!r}")
        for name, number in zip(self.NUMBERS, numbers, strict=True):
            setattr(self, name, int(number))

    def packed(self) -> bytes:
        """The text again."""
        return " ".join((self.state, *(str(getattr(self, name)) for name in self.NUMBERS))).encode()


def seconds(ms: int) -> float | None:
    """A time of the record; 0 is none."""
    return ms / 1000 if ms else None


def decode_state(task_id: str, raw: Mapping[str, bytes], context: Mapping[str, bytes]) -> WorkflowState:
    """The workflow whose record is ``raw``. Raises CorruptEntryError when that is not a record of this version."""
    check_format(task_id, raw)
    try:
        counts = {name: int(raw[name]) for name in COUNTS}
        status, ended = TaskState(raw["status"].decode()), int(raw.get("ended", b"0"))
        steps = [decode_step(task_id, index, raw) for index in range(counts["steps"])]
        parent = raw["parent"].decode().rsplit(" ", 1) if "parent" in raw else None
        state = WorkflowState(
            task_id=task_id,
            plan=[loads(raw[f"p:{index}"]) for index in range(counts["planned"])],
            steps=steps,
            current_step_index=counts["current"],
            status=status,
            workflow_context={name[2:]: loads(context[name]) for name in context if name.startswith("c:")},
            version=counts["version"],
            task={**loads(raw["task"]), "input": loads(raw["input"])},
            created_at=seconds(int(raw["created"])),
            finished_at=seconds(ended),
            token=token_of(raw),
            phase=raw["phase"].decode(),
            driven=raw["driven"] == b"1",
            parent=None if parent is None else (parent[0], int(parent[1])),
            signals={name[2:]: loads(context[name]) for name in context if name.startswith("g:")},
            left=counts["left"],
            running=counts["running"],
        )
        state.error = _error(raw, steps)
    except BAD as error:
        raise damaged(f"the record of workflow {task_id}", error) from error
    if state.is_finished():
        for step in steps:
            if step.state in (StepState.PENDING, StepState.WAITING):
                step.state, step.waiting = StepState.SKIPPED, None
    return state


def _error(raw: Mapping[str, bytes], steps: Sequence[WorkflowStep]) -> dict[str, Any] | None:
    if "error" not in raw:
        return None
    error: dict[str, Any] = loads(raw["error"])
    if "culprit" not in raw:
        return error
    step = steps[int(raw["culprit"])]
    return {**error, "step_index": step.step_index, "action": step.action}


def decode_step(task_id: str, index: int, raw: Mapping[str, bytes]) -> WorkflowStep:
    """Step ``index`` from its fields. Raises CorruptEntryError when they are damaged."""
    try:
        static = Static(raw[f"n:{index}"])
        live = Live(raw.get(f"q:{index}"), static.waits)
        step = step_of(index, loads(raw[f"p:{index}"]), static, live, raw.get(f"d:{index}", b""))
        step.result = loads(raw[f"r:{index}"]) if f"r:{index}" in raw else None
        step.error = loads(raw[f"e:{index}"]) if f"e:{index}" in raw else None
        step.waiting = _waiting(index, raw, live)
    except BAD as error:
        raise damaged(f"step {index} of workflow {task_id}", error) from error
    return step


def step_of(index: int, planned: dict[str, Any], static: Static, live: Live, reads: bytes) -> WorkflowStep:
    """The step, without result and error."""
    needed = reads.decode().split("|")[0]
    return WorkflowStep(
        index,
        planned["action"],
        planned.get("args"),
        planned.get("reasoning") or "",
        LETTERS[live.state],
        attempt=live.attempt,
        started_at=seconds(live.started),
        finished_at=seconds(live.finished),
        id=static.id,
        depends_on=tuple(map(int, needed.split(" "))) if needed else (),
        on_failure={"f": "fail", "s": "skip", "c": "continue"}[static.policy],
        kind=kind_of(planned),
        role=_ROLES[static.grown],
        parent=static.parent if static.parent >= 0 else None,
        series=live.series,
        timeout=planned.get("timeout"),
        retry=planned.get("retry"),
        compensate=planned.get("compensate"),
        when=planned.get("when"),
    )


def _waiting(index: int, raw: Mapping[str, bytes], live: Live) -> dict[str, Any] | None:
    if live.state == "H":
        return {"for": "resume"}
    if live.state != "W":
        return None
    kind, _, due, name = raw[f"w:{index}"].decode().split(" ", 3)
    told: dict[str, Any] = {"for": kind, "name": name, "due": seconds(int(due))}
    return told | {"prompt": loads(raw[f"m:{index}"]) if f"m:{index}" in raw else None}


def check_format(task_id: str, raw: Mapping[str, bytes]) -> None:
    """Raise CorruptEntryError unless the head is there and of this version."""
    what = f"the record of workflow {task_id}"
    try:
        found = raw["format"]
        TaskState(raw["status"].decode()), raw["token"], [int(raw[name]) for name in COUNTS]
        if raw["phase"] not in PHASES:
            raise ValueError(f"no phase: {raw['phase']!r}")
    except BAD as error:
        raise damaged(what, error) from error
    if found != FORMAT:
        raise CorruptEntryError(f"{what} has format {found!r}, this version reads {FORMAT!r}; it is left as it is")


def token_of(raw: Mapping[str, bytes]) -> bytes:
    """What a later save of this record has to find."""
    return raw["token"] + b":" + raw["version"]


def damaged(what: str, error: object) -> CorruptEntryError:
    """The error for a record that cannot be read; one that says so already stays."""
    if isinstance(error, CorruptEntryError) and "left as it is" in str(error):
        return error
    return CorruptEntryError(f"{what} is damaged ({error!r}); it is left as it is")


def steps_of(plan: Sequence[Mapping[str, Any]]) -> list[WorkflowStep]:
    """The steps of a validated plan, none of them begun."""
    return [
        WorkflowStep(
            step.index,
            step.action,
            step.args,
            step.reasoning,
            id=step.id,
            depends_on=step.depends_on,
            on_failure=step.on_failure,
            kind=step.kind,
            timeout=planned.get("timeout"),
            retry=planned.get("retry"),
            compensate=step.compensate,
            when=planned.get("when"),
        )
        for step, planned in zip(compile_plan(plan), plan, strict=True)
    ]
