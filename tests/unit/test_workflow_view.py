"""What `orchestra workflow show` draws, from states made by hand: exact pictures, folding, width, colours, ASCII."""

from __future__ import annotations

import io
import json
import re

import pytest

pytest.importorskip("rich")
from rich.console import Console

from orchestra.cli._workflow_tree import lay_out
from orchestra.cli._workflow_view import Picture, error_text, event_line, facts_of, short, word_of
from orchestra.tasks import TaskState
from orchestra.workflow import StepState, WorkflowEvent, WorkflowState, WorkflowStep

S = StepState
NOW = 1_000_100.0


def step(
    index: int, step_id: str, needs: tuple[int, ...] = (), state: StepState = S.COMPLETED, **facts
) -> WorkflowStep:
    begun = None if state in (S.PENDING, S.SKIPPED) else 1_000_000.0 + index
    ended = begun + 0.5 if begun is not None and state in (S.COMPLETED, S.FAILED) else None
    facts = {"action": step_id, "started_at": begun, "finished_at": ended, **facts}
    return WorkflowStep(step_index=index, id=step_id, depends_on=needs, state=state, **facts)


def workflow(steps: list[WorkflowStep], status: TaskState = TaskState.RUNNING, **facts) -> WorkflowState:
    facts = {"phase": "running", "task": {"type": "report", "input": {"month": "May"}}, **facts}
    return WorkflowState("may-1", [], steps, status=status, created_at=1_000_000.0, **facts)


def plan(*edges: tuple[str, str], state: StepState = S.COMPLETED) -> list[WorkflowStep]:
    """Steps from pairs of an id and the ids it needs."""
    index = {name: at for at, (name, _) in enumerate(edges)}
    return [
        step(at, name, tuple(index[need] for need in needs.split()), state) for at, (name, needs) in enumerate(edges)
    ]


def drawn(
    state: WorkflowState, width: int = 80, *, every: bool = False, encoding: str = "utf-8", **console
) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    made = Console(file=file, width=width, markup=False, highlight=False, emoji=False, **console)
    Picture(made, now=NOW, every=every).show(state, "reports")
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()


def tree(steps: list[WorkflowStep], *, every: bool = False) -> list[str]:
    """The picture of the steps alone, by their ids."""
    lines = lay_out(steps, every=every)
    return [f"{line.gutter}{line.words if line.step is None else line.step.id}" for line in lines]


RICH = [
    step(0, "plan", result={"topics": ["locks", "leases"]}),
    step(
        1,
        "read",
        (0,),
        S.WAITING,
        action="orchestra.map",
        kind="map",
        waiting={"for": "items", "name": "", "due": None},
    ),
    step(2, "fetch", (0,), action="http.get", result="plain text", attempt=3),
    step(
        3, "parse", (2,), S.FAILED, on_failure="continue", error={"type": "ValueError", "message": "no column 'price'"}
    ),
    step(4, "note", (2,), S.SKIPPED),
    step(5, "join", (1, 3, 4), S.RUNNING, attempt=2),
    step(
        6,
        "approve",
        (5,),
        S.WAITING,
        action="orchestra.signal",
        kind="signal",
        waiting={"for": "signal", "name": "publish", "due": NOW + 3600, "prompt": "Publish it?"},
    ),
    step(7, "nap", (6,), S.WAITING, action="orchestra.sleep", waiting={"for": "timer", "name": "", "due": NOW + 30}),
    step(
        8, "sub", (6,), S.WAITING, action="orchestra.workflow", waiting={"for": "child", "name": "may-1/8", "due": None}
    ),
    step(9, "held", (7, 8), S.PENDING, waiting={"for": "resume"}),
    step(10, "mail", (9,), S.PENDING, error={"type": "OSError", "message": "refused"}),
    step(11, "read[0]", action="sum_up", role="item", parent=1, result="short"),
    step(12, "read[1]", (), S.RUNNING, action="sum_up", role="item", parent=1),
    step(13, "fetch~undo", action="unfetch", role="compensation", parent=2, result="gone"),
]

PICTURE = """\
workflow may-1  report  running for 100 s
queue reports · 6 of 14 steps · begun 100 s ago

✓ plan                    500 ms  {"topics": ["locks", "leases"]}
├─ ◷ read      map          99 s  1 of 2 items
│  · ✓ [0]     sum_up     500 ms  short
│  · ▶ [1]     sum_up       88 s  running
├─ ✓ fetch     http.get   500 ms  attempt 3: plain text
│  ├─ ✗ parse             500 ms  failed, goes on: ValueError: no column 'price'
│  └─ – note                      skipped
▶ join                      95 s  attempt 2: running  after read, parse, note
◷ approve      signal       94 s  waits for signal publish (60 min left): Publi…
├─ ◷ nap       sleep        93 s  sleeps (30 s left)
├─ ◷ sub       workflow     92 s  workflow may-1/8
○ held                            held until the workflow is resumed  after nap…
○ mail                            tries again: OSError: refused

undone, newest first
✓ fetch        unfetch    500 ms  gone

waits for publish: Publish it?
  orchestra workflow approve may-1 publish
"""


def test_every_state_has_its_words_in_80_columns():
    assert drawn(workflow(RICH)) == PICTURE.splitlines()


def test_colour_changes_nothing_but_colour():
    coloured = drawn(workflow(RICH), force_terminal=True, color_system="standard")
    assert "\x1b[" in "".join(coloured)
    assert [re.sub(r"\x1b\[[\d;]*m", "", line) for line in coloured] == PICTURE.splitlines()
    assert any("\x1b[1;31m✗" in line or "\x1b[31;1m✗" in line for line in coloured)
    assert not any("\x1b[2m✓" in line for line in coloured)


def test_a_terminal_without_unicode_gets_ascii():
    lines = drawn(workflow(RICH), encoding="ascii")
    assert lines[3].startswith("+ plan")
    assert lines[4].startswith("|- ? read")
    assert lines[8].startswith("|  |- x parse")
    assert lines[9].startswith("|  `- - note")
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_none_is_broken(width):
    lines = drawn(workflow(RICH), width)
    assert max(map(len, lines)) <= width
    steps = [line for line in lines if re.search("[✓✗▶◷○–]", line)]
    assert len(steps) == len(RICH)


def test_an_ended_workflow_says_how_long_and_what_came_of_it():
    done = workflow(
        [step(0, "a", result=7)],
        TaskState.COMPLETED,
        workflow_context={"final_output": {"n": 7}},
        finished_at=1_000_004.0,
    )
    assert drawn(done) == [
        "workflow may-1  report  completed after 4.0 s",
        "queue reports · 1 of 1 steps · begun 100 s ago",
        "",
        "✓ a   500 ms  7",
        "",
        "result",
        "  {",
        '    "n": 7',
        "  }",
    ]
    broken = workflow(
        [step(0, "a", state=S.FAILED, error={"type": "E", "message": "m"})],
        TaskState.FAILED,
        error={"type": "E", "message": "m", "step_index": 0, "action": "a"},
        finished_at=1_000_004.0,
        parent=("boss", 3),
    )
    assert drawn(broken)[1].endswith("· child of boss")
    assert drawn(broken)[-1] == "error  E: m"


def test_a_long_result_is_cut_unless_all_is_asked_for():
    done = workflow([step(0, "a")], TaskState.COMPLETED, workflow_context={"final_output": list(range(50))})
    assert drawn(done)[-1] == "  … 41 more lines: --all shows them"
    assert drawn(done, every=True)[-2:] == ["    49", "  ]"]


def test_nothing_from_a_task_reaches_the_terminal_as_a_command():
    evil = "\x1b]0;title\x07\x1b[2J\u202egnp"
    steps = [
        step(0, "a", result=evil),
        step(1, "b", state=S.FAILED, error={"type": evil, "message": evil}),
        step(2, "c", (), S.WAITING, waiting={"for": "signal", "name": "x", "due": None, "prompt": evil}),
    ]
    state = workflow(steps, TaskState.COMPLETED, workflow_context={"final_output": evil}, error={"message": evil})
    shown = "\n".join(drawn(state))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    event = WorkflowEvent("1-0", NOW, f"agent.{evil}", 0, {"text": evil})
    assert "\x1b" not in event_line(event, {0: evil}).plain


# -- the tree


def test_a_sequence_is_not_indented():
    assert tree(plan(("a", ""), ("b", "a"), ("c", "b"))) == ["a", "b", "c"]


def test_a_fork_is_indented_and_a_join_is_not():
    assert tree(plan(("a", ""), ("b", "a"), ("c", "a"), ("d", "b c"))) == ["a", "├─ b", "├─ c", "d"]
    assert tree(plan(("a", ""), ("b", "a"), ("c", "a"))) == ["a", "├─ b", "└─ c"]


def test_branches_are_chains_of_their_own_and_may_fork_again():
    edges = (("a", ""), ("b", "a"), ("b2", "b"), ("c", "a"), ("d", "c"), ("e", "c"), ("f", "d e"), ("z", "f b2"))
    assert tree(plan(*edges)) == ["a", "├─ b", "│  b2", "├─ c", "│  ├─ d", "│  ├─ e", "│  f", "z"]


def test_several_beginnings_have_no_root():
    assert tree(plan(("a", ""), ("b", ""), ("c", ""))) == ["┌─ a", "├─ b", "└─ c"]
    assert tree(plan(("a", ""), ("b", ""), ("c", "a b"))) == ["┌─ a", "├─ b", "c"]


def test_what_joins_only_some_branches_stays_among_them():
    assert tree(plan(("a", ""), ("b", "a"), ("c", "a"), ("d", "a"), ("e", "b c"))) == [
        "a",
        "├─ b",
        "├─ c",
        "├─ d",
        "└─ e",
    ]


def test_a_step_may_depend_on_a_later_one():
    assert tree(plan(("write", "read"), ("read", ""))) == ["read", "write"]


def test_only_joins_say_what_they_come_after():
    lines = lay_out(plan(("a", ""), ("b", "a"), ("c", "a"), ("d", "b c")))
    assert [line.after for line in lines] == [(), (), (), (1, 2)]
    many = workflow(plan(("a", ""), *((f"b{n}", "a") for n in range(6)), ("z", " ".join(f"b{n}" for n in range(6)))))
    assert drawn(many)[-1].endswith("after b0, b1, b2 and 3 more")


def test_ten_thousand_steps_in_a_row_or_side_by_side_are_a_few_lines():
    row = plan(("0", ""), *((str(n), str(n - 1)) for n in range(1, 10_000)))
    assert tree(row) == ["0", "1", "2", "9996 more completed", "9999"]
    assert len(tree(row, every=True)) == 10_000
    wide = plan(("a", ""), *((f"b{n}", "a") for n in range(9_998)), ("z", " ".join(f"b{n}" for n in range(9_998))))
    assert tree(wide) == ["a", "├─ b0", "├─ b1", "├─ b2", "│  9994 more completed", "├─ b9997", "z"]


def test_depth_is_bounded():
    edges = [("a", "")]
    for level in range(40):
        edges += [(f"l{level}", edges[-1][0]), (f"r{level}", edges[-1][0])]
    assert max(map(len, tree(plan(*edges), every=True))) < 40


def test_many_branches_in_many_states_are_folded_by_what_matters():
    states = [S.COMPLETED, S.RUNNING] * 30
    states[41] = S.FAILED
    steps = [step(0, "a"), *(step(n + 1, f"b{n}", (0,), state) for n, state in enumerate(states))]
    lines = tree(steps)
    assert len(lines) < 16
    assert "├─ b41" in lines
    assert sum(int(number) for line in lines for number in re.findall(r"(\d+) more", line)) == 60 - sum(
        "─ " in x for x in lines
    )


def test_a_few_items_are_shown_many_are_counted():
    few = [step(0, "m", kind="map"), *(step(n + 1, f"m[{n}]", role="item", parent=0) for n in range(3))]
    assert tree(few) == ["m", "· m[0]", "· m[1]", "· m[2]"]
    many = [step(0, "m", (), S.WAITING, kind="map", waiting={"for": "items"})]
    for n in range(1000):
        state = S.FAILED if n == 7 else S.RUNNING if n > 995 else S.COMPLETED if n < 900 else S.PENDING
        many.append(step(n + 1, f"m[{n}]", (), state, role="item", parent=0))
    assert tree(many) == [
        "m",
        "· m[7]",
        "· m[996]",
        "· m[997]",
        "· m[998]",
        "· and 96 pending, 1 running, 899 completed",
    ]
    assert len(tree(many, every=True)) == 1001


# -- words and JSON


def test_the_status_is_one_word():
    assert word_of(workflow([], TaskState.RUNNING, phase="compensating")) == "compensating"
    assert word_of(workflow([], TaskState.FAILED, phase="running")) == "failed"
    assert word_of(workflow([], TaskState.PENDING, phase="")) == "pending"


def test_values_and_errors_are_one_line():
    assert short("two\nlines") == "two lines"
    assert short({"a": [1, 2]}) == '{"a": [1, 2]}'
    assert len(short("x" * 10_000)) == 160
    assert short({(1, 2): b"x"}) == "{(1, 2): b'x'}"
    assert error_text({"type": "E", "message": "a\nb"}) == "E: a b"
    assert error_text({"message": "m"}) == "m"
    assert error_text({"odd": 1}) == '{"odd": 1}'
    assert error_text("text") == "text"


def test_the_json_keys_stay():
    facts = facts_of(workflow(RICH, workflow_context={"final_output": 1, "plan_source": "given"}), "reports")
    assert list(facts) == [
        *("id", "queue", "type", "status", "phase", "input", "completed", "total", "created_at", "finished_at"),
        *("output", "error", "context", "parent", "version", "steps"),
    ]
    assert (facts["completed"], facts["total"], facts["output"]) == (6, 14, 1)
    assert facts["context"] == {"plan_source": "given"}
    assert list(facts["steps"][0]) == [
        *("index", "id", "action", "kind", "state", "role", "parent", "depends_on", "args", "reasoning", "on_failure"),
        *("attempt", "series", "started_at", "finished_at", "waiting", "result", "error"),
    ]
    by_id = {one["id"]: one for one in facts["steps"]}
    assert by_id["join"]["depends_on"] == ["read", "parse", "note"]
    assert (by_id["read[0]"]["role"], by_id["read[0]"]["parent"]) == ("item", "read")
    assert by_id["fetch~undo"]["role"] == "compensation"
    json.dumps(facts)


def test_an_event_is_a_line():
    event = WorkflowEvent("5-0", NOW, "step.failed", 3, {"error": {"type": "E", "message": "m"}})
    assert event_line(event, {3: "parse"}).plain[10:] == "step.failed          parse  E: m"
    assert event_line(WorkflowEvent("6-0", NOW, "workflow.completed", None, {}), {}).plain[10:] == "workflow.completed "
    told = WorkflowEvent("7-0", NOW, "progress", 3, {"fraction": 0.5, "message": "half"})
    assert event_line(told, {}).plain[10:] == "progress             3  fraction 0.5, message half"
