"""The words of a workflow: plans, legal edges, and the record that decodes to what was encoded."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra import _workflow_state as ws
from orchestra.errors import CorruptEntryError, TaskTooLargeError, WorkflowError
from orchestra.memory import MemoryManager
from orchestra.tasks import TaskState
from orchestra.workflow import STEP_EDGES, StepState, WorkflowEngine, WorkflowState, WorkflowStep, validate_plan

encode = MemoryManager("memory:").encode


def test_a_plan_gets_its_defaults_and_keeps_unknown_keys():
    plan = [{"action": "fetch"}, {"action": "send", "args": {"to": 1}, "reasoning": "because", "model": "small"}]
    assert validate_plan(plan) == [
        {"action": "fetch", "args": None, "reasoning": ""},
        {"action": "send", "args": {"to": 1}, "reasoning": "because", "model": "small"},
    ]
    assert plan[0] == {"action": "fetch"}


def test_every_fault_of_a_plan_is_listed():
    with pytest.raises(WorkflowError) as caught:
        validate_plan(
            [{"action": "ok"}, "text", {"args": [1]}, {"action": "a b", "reasoning": 5}, {"action": "x", 1: 2}]
        )
    assert caught.value.faults == (
        "step 1: expected a dict, got str",
        "step 2: action must be 1 to 128 printable ASCII characters without spaces, got None",
        "step 2: args must be a dict with string keys, got [1]",
        "step 3: action must be 1 to 128 printable ASCII characters without spaces, got 'a b'",
        "step 3: reasoning must be text, got int",
        "step 4: its keys must be strings",
    )
    assert all(fault in str(caught.value) for fault in caught.value.faults)


@pytest.mark.parametrize("plan", [None, [], {}, "plan", 5, [{"action": "a"}] * 10_001])
def test_what_is_no_list_of_1_to_10000_steps_is_no_plan(plan):
    with pytest.raises(WorkflowError, match="1 to 10000 steps"):
        validate_plan(plan)


@pytest.mark.parametrize("wrong", [None, object(), {}, "memory"])
def test_the_engine_takes_a_memory_manager_only(wrong):
    with pytest.raises(TypeError, match="must be a MemoryManager"):
        WorkflowEngine(wrong)


LEGAL = {
    ("pending", "running"),
    ("pending", "completed"),
    ("pending", "failed"),
    ("pending", "skipped"),
    ("running", "pending"),
    ("running", "running"),
    ("running", "completed"),
    ("running", "failed"),
    ("running", "skipped"),
    ("failed", "pending"),
    ("failed", "running"),
    ("failed", "skipped"),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(StepState, StepState)))
def test_only_legal_edges_of_a_step(old, new):
    step = WorkflowStep(0, "a", state=old, result="old", attempt=3)
    change = ws.Change(new, "new")
    if (old.value, new.value) in LEGAL:
        moved = ws.after(step, change, 5.0)
        assert moved.state is new
        assert moved is not step
    else:
        with pytest.raises(WorkflowError):
            ws.after(step, change, 5.0)
    assert ((old.value, new.value) in LEGAL) == (new in STEP_EDGES[old])


def test_starting_counts_attempts_and_clears_what_an_earlier_one_left():
    failed = WorkflowStep(0, "a", state=StepState.FAILED, error={"message": "no"}, attempt=1, finished_at=2.0)
    started = ws.after(failed, ws.Change(StepState.RUNNING, attempt=1), 5.0)
    assert (started.attempt, started.error, started.started_at, started.finished_at) == (2, None, 5.0, None)


def test_a_superseded_attempt_is_refused():
    step = WorkflowStep(0, "a", state=StepState.RUNNING, attempt=2)
    with pytest.raises(WorkflowError, match="attempt 1 of step 0 .* superseded: attempt 2"):
        ws.after(step, ws.Change(StepState.COMPLETED, "late", attempt=1), 5.0)


def test_repeating_a_change_is_no_change_and_contradicting_it_is_an_error():
    done = ws.after(WorkflowStep(0, "a"), ws.Change(StepState.COMPLETED, {"x": (1, 2)}), 5.0)
    assert ws.after(done, ws.Change(StepState.COMPLETED, {"x": [1, 2]}), 9.0) is done
    with pytest.raises(WorkflowError, match="with another result"):
        ws.after(done, ws.Change(StepState.COMPLETED, "other"), 9.0)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
texts = st.dictionaries(st.text(max_size=5), values, max_size=3)


@st.composite
def states(draw):
    """Any workflow the engine could have recorded."""
    total, current = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    plan = validate_plan([{"action": "a", "args": draw(st.none() | texts), "x": n} for n in range(total)])
    steps = ws.steps_of(plan)
    status = draw(st.sampled_from([TaskState.PENDING, TaskState.RUNNING, TaskState.FAILED]))
    for step in steps[:current]:
        step.state, step.result = draw(st.sampled_from([StepState.COMPLETED, StepState.SKIPPED])), draw(values)
        step.attempt, step.started_at, step.finished_at = draw(st.integers(0, 9)), 1.0, 2.0
    for step in steps[current:]:
        step.state = StepState.SKIPPED if status in ws.FINISHED else StepState.PENDING
    return WorkflowState(
        "id",
        plan,
        steps,
        min(current, total),
        status,
        draw(texts),
        draw(st.none() | texts),
        3,
        {"id": "id", "type": "t", "input": draw(values), "priority": 2, "metadata": draw(texts)},
        1.5,
        draw(st.none() | st.just(2.5)),
        b"token",
    )


@given(states())
def test_the_record_decodes_to_what_was_encoded(state):
    raw = ws.encode_state(state, encode) | {"k": b"token", "v": b"3"}
    assert ws.decode_state("id", raw) == state
    assert ws.encode_state(ws.decode_state("id", raw), encode) | {"k": b"token", "v": b"3"} == raw
    assert not list(ws.change_faults(state, state, set()))


def _raw():
    task = {"id": "id", "type": "t", "input": None, "priority": 2, "metadata": {}}
    plan = validate_plan([{"action": "a"}, {"action": "b"}])
    state = WorkflowState("id", plan, ws.steps_of(plan), task=task)
    state.steps[0].state, state.steps[0].attempt = StepState.RUNNING, 1
    return ws.encode_state(state, encode) | {"k": b"token", "v": b"1"}


@pytest.mark.parametrize("name", sorted(_raw().keys() - {"s:0"}))
def test_a_record_that_lacks_a_field_is_damaged(name):
    raw = _raw()
    del raw[name]
    with pytest.raises(CorruptEntryError, match="left as it is"):
        ws.decode_state("id", raw)


@pytest.mark.parametrize("name", sorted(_raw().keys() - {"k"}))
@pytest.mark.parametrize("damage", [b"", b"\xc1", b"\x93\x01", b"\xa3abc"])
def test_a_damaged_field_is_a_typed_error(name, damage):
    try:
        ws.decode_state("id", _raw() | {name: damage})
    except CorruptEntryError:
        return
    assert (name, damage) in {("at", b"\xa3abc"), ("et", b"\xa3abc")}


def test_a_record_of_another_format_says_so():
    with pytest.raises(CorruptEntryError, match="format b'2', this version reads b'1'"):
        ws.decode_state("id", _raw() | {"f": b"2"})


def test_too_large_a_result_names_the_step():
    small = MemoryManager("memory:", max_bytes=64).encode
    with pytest.raises(TaskTooLargeError, match=r"result of step 3 \(fetch\)"):
        ws.encode_step(WorkflowStep(3, "fetch", result="x" * 100), small)


@pytest.mark.parametrize("status", list(TaskState))
def test_is_finished(status):
    state = WorkflowState("id", [], [], status=status)
    assert state.is_finished() == (status.value in {"completed", "failed", "cancelled"})
