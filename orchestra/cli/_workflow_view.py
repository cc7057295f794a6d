"""What ``orchestra workflow`` shows: a workflow as a picture, as JSON facts, as one row, and its events as lines.

Pure functions of a workflow's state and the time; what comes from tasks is cleaned before it is shown. The JSON keys
are documented in docs/workflows.md and stay. Refuses to own where the steps stand: :mod:`orchestra.cli._workflow_tree`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from orchestra.cli._output import ago, clean, plain_value, span
from orchestra.cli._workflow_tree import Line, lay_out
from orchestra.tasks import TaskState
from orchestra.workflow import StepState, WorkflowEvent, WorkflowState, WorkflowStep, WorkflowSummary

_MARKS = {
    StepState.COMPLETED: ("✓", "+", "green"),
    StepState.FAILED: ("✗", "x", "bold red"),
    StepState.RUNNING: ("▶", ">", "cyan"),
    StepState.WAITING: ("◷", "?", "yellow"),
    StepState.PENDING: ("○", ".", "dim"),
    StepState.SKIPPED: ("\u2013", "-", "dim"),
}
_STATUS_STYLE = {
    TaskState.COMPLETED: "bold green",
    TaskState.FAILED: "bold red",
    TaskState.CANCELLED: "bold yellow",
    TaskState.RUNNING: "bold cyan",
    TaskState.PENDING: "bold",
}
_NAME_WIDE = 30
_ACTION_WIDE = 18
_RESULT_LINES = 12
_VALUE_WIDE = 160
_ASCII = str.maketrans({"│": "|", "├": "|", "└": "`", "┌": ",", "─": "-", "·": "*", "…": "~", "→": ">"})


class Picture:
    """Draws workflows on ``console``, in plain ASCII where that can do no more."""

    def __init__(self, console: Console, *, now: float | None = None, every: bool = False) -> None:
        self._console = console
        self._now = time.time() if now is None else now
        self._every = every
        encoding = (getattr(console.file, "encoding", None) or console.encoding or "utf-8").lower()
        self._ascii = not encoding.startswith(("utf", "cp65001"))

    def show(self, state: WorkflowState, queue: str) -> None:
        """The whole workflow: what it is, its steps, what it waits for, its result."""
        for text in (*self._heading(state, queue), Text(), *self._steps(state)):
            self._print(text)
        for text in self._ending(state):
            self._print(text, whole=True)

    def _print(self, text: Text, *, whole: bool = False) -> None:
        if self._ascii:
            plain = Text(text.plain.translate(_ASCII).encode("ascii", "replace").decode())
            plain.spans = text.spans
            text = plain
        cut: Literal["crop", "ellipsis"] = "crop" if self._ascii else "ellipsis"
        self._console.print(text, no_wrap=not whole, overflow="fold" if whole else cut)

    # -- around the steps

    def _heading(self, state: WorkflowState, queue: str) -> Iterator[Text]:
        status = word_of(state)
        took = "" if state.created_at is None else f" {self._span(state.created_at, state.finished_at)}"
        joint = " after" if state.is_finished() else " for"
        head = Text.assemble(
            ("workflow ", "bold"), clean(state.task_id), "  ", clean(state.task.get("type") or ""), "  "
        )
        yield head.append(status, _STATUS_STYLE[state.status]).append(f"{joint}{took}" if took else "")
        done, total = progress_of(state)
        facts = [f"queue {queue}", f"{done} of {total} steps"]
        if state.created_at is not None:
            facts.append(f"begun {ago_at(self._now, state.created_at)}")
        if state.parent is not None:
            facts.append(f"child of {clean(state.parent[0])}")
        yield Text(" · ".join(facts), "dim")

    def _ending(self, state: WorkflowState) -> Iterator[Text]:
        for step in state.steps:
            if name := signal_of(step):
                prompt = clean((step.waiting or {}).get("prompt") or "", 400)
                yield Text.assemble("\n", (f"waits for {clean(name, 60)}", "yellow"), f": {prompt}" if prompt else "")
                yield Text(f"  orchestra workflow approve {clean(state.task_id)} {clean(name)}")
        if state.error is not None:
            yield Text.assemble("\n", ("error  ", "bold red"), error_text(state.error))
        output = state.workflow_context.get("final_output")
        if state.status is TaskState.COMPLETED and output is not None:
            yield Text("\nresult", "bold")
            lines = clean(readable(output)).splitlines()
            shown = lines if self._every or len(lines) <= _RESULT_LINES else lines[: _RESULT_LINES - 1]
            yield from (Text(f"  {line}") for line in shown)
            if len(shown) < len(lines):
                yield Text(f"  … {len(lines) - len(shown)} more lines: --all shows them", "dim")

    # -- the steps

    def _steps(self, state: WorkflowState) -> Iterator[Text]:
        lines = lay_out(state.steps, every=self._every)
        undone = [Line("", step) for step in state.steps if step.role == "compensation"]
        named = [(line, name_of(line.step, state), _action_of(line.step)) for line in (*lines, *undone) if line.step]
        wide = _Widths(
            min(_NAME_WIDE, max((len(line.gutter) + 2 + len(name) for line, name, _ in named), default=0)),
            min(_ACTION_WIDE, max((len(action) for *_, action in named), default=0)),
        )
        yield from (self._row(line, wide, state) for line in lines)
        if undone:
            yield Text("\nundone, newest first", "bold")
            yield from (self._row(line, wide, state) for line in undone)

    def _row(self, line: Line, wide: _Widths, state: WorkflowState) -> Text:
        row, step = Text().append(line.gutter, "dim"), line.step
        if step is None:
            return row.append(f"{':' if self._ascii else '⋮'} {line.words}", "dim")
        mark, plain, style = _MARKS[step.state]
        dim = "dim" if step.state is StepState.SKIPPED else ""
        row.append(plain if self._ascii else mark, style).append(" ")
        name = clean(name_of(step, state), max(6, wide.name - len(row.plain)))
        row.append(f"{name}{' ' * (wide.name - len(row.plain) - len(name))}  ", dim)
        if wide.action:
            row.append(f"{clean(_action_of(step), wide.action):<{wide.action}}  ", "dim")
        row.append(f"{self._duration(step):>7}  ", "dim")
        row.append(self._words(line, state))
        row.rstrip()
        return row

    def _duration(self, step: WorkflowStep) -> str:
        if step.started_at is None or step.state in (StepState.PENDING, StepState.SKIPPED):
            return ""
        return self._span(step.started_at, step.finished_at)

    def _span(self, since: float, until: float | None) -> str:
        seconds = max(0.0, (self._now if until is None else until) - since)
        return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else span(seconds)

    def _words(self, line: Line, state: WorkflowState) -> Text:
        assert line.step is not None
        step = line.step
        words, style = _told(step, state, self._now)
        text = Text()
        if step.attempt > 1:
            text.append(f"attempt {step.attempt}{': ' if words else ''}", "yellow")
        text.append(words, style)
        if line.after:
            names = [clean(state.steps[i].id, 20) for i in line.after[:3]]
            more = f" and {len(line.after) - 3} more" if len(line.after) > 3 else ""
            text.append(f"{'  ' if text.plain else ''}after {', '.join(names)}{more}", "dim")
        return text


class _Widths(NamedTuple):
    """Columns of what is drawn and named, and of the actions."""

    name: int
    action: int


def name_of(step: WorkflowStep, state: WorkflowState) -> str:
    """What a step is called in the picture: its id; of an item its place, of a compensation what it undoes."""
    if step.role == "compensation" and step.parent is not None:
        return clean(state.steps[step.parent].id, _NAME_WIDE)
    if step.parent is not None:
        return step.id[step.id.rfind("[") :] if step.id.endswith("]") else clean(step.id, _NAME_WIDE)
    return clean(step.id, _NAME_WIDE)


def _action_of(step: WorkflowStep) -> str:
    return "" if step.action == step.id else clean(step.action.removeprefix("orchestra."), _ACTION_WIDE)


def _told(step: WorkflowStep, state: WorkflowState, now: float) -> tuple[str, str]:
    """What is said of a step beside its mark, and in which style."""
    if step.state is StepState.COMPLETED:
        if step.kind == "map" and isinstance(step.result, list):
            return f"{len(step.result)} items", ""
        return ("" if step.result is None else short(step.result)), ""
    if step.state is StepState.FAILED:
        goes_on = "failed, goes on: " if step.on_failure == "continue" and not state.error else "failed: "
        return goes_on + error_text(step.error), "red"
    if step.state is StepState.SKIPPED:
        return ("skipped" if step.error is None else f"skipped: {error_text(step.error)}"), "dim"
    if step.state is StepState.WAITING:
        return _waits(step, state, now), "yellow"
    if step.state is StepState.RUNNING:
        return "running", "cyan"
    if (step.waiting or {}).get("for") == "resume":
        return "held until the workflow is resumed", "yellow"
    return ("" if step.error is None else f"tries again: {error_text(step.error)}"), "dim"


def _waits(step: WorkflowStep, state: WorkflowState, now: float) -> str:
    waiting = step.waiting or {}
    what, name, due = waiting.get("for"), clean(waiting.get("name") or "", 60), waiting.get("due")
    left = "" if due is None else f" ({span(max(0.0, due - now))} left)"
    if what == "signal":
        prompt = f": {clean(waiting['prompt'], _VALUE_WIDE)}" if waiting.get("prompt") else ""
        return f"waits for signal {name}{left}{prompt}"
    if what == "items":
        items = [one for one in state.steps if one.parent == step.step_index and one.role == "item"]
        return f"{sum(one.state in _ENDED for one in items)} of {len(items)} items"
    return {"child": f"workflow {name}", "timer": f"sleeps{left}"}.get(what or "", f"waits{left}")


def signal_of(step: WorkflowStep) -> str | None:
    """The signal that ``step`` waits for now."""
    waiting = step.waiting or {}
    return str(waiting["name"]) if step.state is StepState.WAITING and waiting.get("for") == "signal" else None


_ENDED = (StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED)


def word_of(state: WorkflowState | WorkflowSummary) -> str:
    """The status in one word: that of an ended workflow, else its phase."""
    ended = state.status in (TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED)
    return str(state.status.value) if ended or not state.phase else state.phase


def progress_of(state: WorkflowState) -> tuple[int, int]:
    """How many steps have ended, and how many there are by now: items and compensations are steps, too."""
    return sum(step.state in _ENDED for step in state.steps), len(state.steps)


def short(value: Any, limit: int = _VALUE_WIDE) -> str:
    """``value`` in one line: text as it is, anything else as JSON."""
    return clean(_text(value)[: 4 * limit], limit)


def readable(value: Any) -> str:
    """``value`` for people: text as it is, anything else as indented JSON."""
    return _text(value, indent=2)


def _text(value: Any, indent: int | None = None) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, default=plain_value, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError):  # keys that JSON has not
        return repr(value)


def error_text(error: Any) -> str:
    """An error as recorded, in one line."""
    if not isinstance(error, Mapping):
        return short(error)
    kind, message = clean(error.get("type") or "", 60), clean(error.get("message") or "", _VALUE_WIDE)
    return f"{kind}: {message}" if kind and message else kind or message or short(dict(error))


def ago_at(now: float, then: float) -> str:
    """How long before ``now``."""
    return ago(time.time() - (now - then))


# -- JSON


def facts_of(state: WorkflowState, queue: str) -> dict[str, Any]:
    """What ``orchestra workflow show --json`` prints."""
    done, total = progress_of(state)
    return {
        "id": state.task_id,
        "queue": queue,
        "type": state.task.get("type"),
        "status": state.status.value,
        "phase": state.phase,
        "input": state.task.get("input"),
        "completed": done,
        "total": total,
        "created_at": state.created_at,
        "finished_at": state.finished_at,
        "output": state.workflow_context.get("final_output"),
        "error": state.error,
        "context": {name: value for name, value in state.workflow_context.items() if name != "final_output"},
        "parent": None if state.parent is None else {"id": state.parent[0], "step": state.parent[1]},
        "version": state.version,
        "steps": [_step_facts(step, state.steps) for step in state.steps],
    }


def _step_facts(step: WorkflowStep, steps: Sequence[WorkflowStep]) -> dict[str, Any]:
    return {
        "index": step.step_index,
        "id": step.id,
        "action": step.action,
        "kind": step.kind,
        "state": step.state.value,
        "role": step.role or "planned",
        "parent": None if step.parent is None else steps[step.parent].id,
        "depends_on": [steps[index].id for index in step.depends_on],
        "args": step.args,
        "reasoning": step.reasoning,
        "on_failure": step.on_failure,
        "attempt": step.attempt,
        "series": step.series,
        "started_at": step.started_at,
        "finished_at": step.finished_at,
        "waiting": step.waiting,
        "result": step.result,
        "error": step.error,
    }


def event_facts(event: WorkflowEvent) -> dict[str, Any]:
    """What ``orchestra workflow follow --json`` prints a line of."""
    return {"id": event.id, "at": event.at, "kind": event.kind, "step": event.step, "data": event.data}


_EVENT_STYLE = {"completed": "green", "failed": "bold red", "waiting": "yellow", "retrying": "yellow", "skipped": "dim"}


def event_line(event: WorkflowEvent, names: Mapping[int, str]) -> Text:
    """An event for people: when, what, which step, and what was said."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.at))
    style = _EVENT_STYLE.get(event.kind.rpartition(".")[2], "")
    line = Text.assemble((f"{clock}  ", "dim"), (f"{clean(event.kind):<19}", style))
    if event.step is not None:
        line.append(f"  {clean(names.get(event.step, str(event.step)), _NAME_WIDE)}")
    said = _said(event.data)
    return line.append(f"  {said}") if said else line


def _said(data: Any) -> str:
    if not data:
        return ""
    if isinstance(data, Mapping):
        if data.get("error"):
            return error_text(data["error"])
        if set(data) == {"result"}:
            return short(data["result"])
        return ", ".join(f"{clean(name)} {short(value, 80)}" for name, value in data.items() if value is not None)
    return short(data)
