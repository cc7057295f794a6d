"""The words of a workflow: legal edges, and the record that decodes to what was encoded."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra._workflow import record as rec
from orchestra._workflow.answers import read_begun, read_moved, read_row, trouble
from orchestra._workflow.saving import change_faults, encode_saved
from orchestra._workflow.twin import LocalWorkflows
from orchestra.errors import CorruptEntryError, TaskTooLargeError, WorkflowError
from orchestra.memory import MemoryManager
from orchestra.tasks import BaseTask, TaskState
from orchestra.testing import ManualClock
from orchestra.workflow import STATUS_EDGES, STEP_EDGES, StepState, WorkflowEngine, WorkflowState, validate_plan

encode = MemoryManager("memory:").encode
BY_HAND = [state for state in StepState if state is not StepState.WAITING]


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


@pytest.mark.parametrize(("old", "new"), list(itertools.product(BY_HAND, BY_HAND)))
async def test_only_legal_edges_of_a_step(old, new):
    engine = WorkflowEngine(MemoryManager("memory:", namespace="edges"))
    await engine.initialize_workflow(BaseTask("w", "t"), [{"action": "a"}, {"action": "b"}])
    if old is not StepState.PENDING:
        await engine.update_step_state("w", 0, StepState.RUNNING)
        await engine.update_step_state("w", 0, old, "old") if old is not StepState.RUNNING else None
    before = await engine.load_workflow_state("w")
    assert before.steps[0].state is old
    if (old.value, new.value) in LEGAL:
        moved = await engine.update_step_state("w", 0, new, "new")
        assert moved.state is new
        assert (await engine.load_workflow_state("w")).version == before.version + 1
    elif old is new is StepState.PENDING:
        assert (await engine.update_step_state("w", 0, new)).state is new
    else:
        with pytest.raises(WorkflowError):
            await engine.update_step_state("w", 0, new, "new")
        assert await engine.load_workflow_state("w") == before
    assert ((old.value, new.value) in LEGAL) == (new in STEP_EDGES[old])


@pytest.mark.parametrize(("old", "new"), list(itertools.product(TaskState, [TaskState.COMPLETED, TaskState.FAILED])))
async def test_only_legal_edges_of_a_workflow(old, new):
    engine = WorkflowEngine(MemoryManager("memory:", namespace="statuses"))
    await engine.initialize_workflow(BaseTask("w", "t"), [{"action": "a"}, {"action": "b"}])
    if old is TaskState.RUNNING:
        await engine.update_step_state("w", 0, StepState.COMPLETED)
    elif old is TaskState.COMPLETED:
        await engine.complete_workflow("w", 1)
    elif old is TaskState.FAILED:
        await engine.fail_workflow("w", "no")
    elif old is TaskState.CANCELLED:
        await engine.cancel("w")
    before = await engine.load_workflow_state("w")
    assert before.status is old
    end = {
        TaskState.COMPLETED: lambda: engine.complete_workflow("w", 2),
        TaskState.FAILED: lambda: engine.fail_workflow("w", "x"),
    }
    if new in STATUS_EDGES[old]:
        assert (await end[new]()).status is new
    elif new is old:
        assert await end[new]() == before
    else:
        with pytest.raises(WorkflowError, match=f"is {old.value} and cannot become {new.value}"):
            await end[new]()
        assert await engine.load_workflow_state("w") == before


async def test_starting_counts_attempts_and_clears_what_an_earlier_one_left():
    engine = WorkflowEngine(MemoryManager("memory:", namespace="attempts"))
    await engine.initialize_workflow(BaseTask("w", "t"), [{"action": "a"}])
    await engine.update_step_state("w", 0, StepState.RUNNING)
    await engine.update_step_state("w", 0, StepState.FAILED, error="no")
    started = await engine.update_step_state("w", 0, StepState.RUNNING, attempt=1)
    assert (started.attempt, started.error, started.finished_at) == (2, None, None)
    with pytest.raises(WorkflowError, match=r"attempt 1 of step 0 \(a\) was superseded: attempt 2"):
        await engine.update_step_state("w", 0, StepState.COMPLETED, "late", attempt=1)
    done = await engine.update_step_state("w", 0, StepState.COMPLETED, {"x": (1, 2)})
    assert await engine.update_step_state("w", 0, StepState.COMPLETED, {"x": [1, 2]}) == done
    with pytest.raises(WorkflowError, match="with another result"):
        await engine.update_step_state("w", 0, StepState.COMPLETED, "other")
    with pytest.raises(WorkflowError, match="only steps that workers drive wait"):
        await engine.update_step_state("w", 0, StepState.WAITING)


async def test_by_hand_on_failure_decides_too():
    engine = WorkflowEngine(MemoryManager("memory:", namespace="policies"))
    plan = [{"action": "a", "on_failure": "skip"}, {"action": "b", "on_failure": "continue"}, {"action": "c"}]
    await engine.initialize_workflow(BaseTask("w", "t"), plan)
    state = await engine.handle_step_failure("w", 0, "one")
    assert (state.status, state.steps[0].state, state.steps[0].error) == (
        TaskState.RUNNING,
        StepState.SKIPPED,
        {"message": "one"},
    )
    state = await engine.handle_step_failure("w", 1, "two")
    assert (state.steps[1].state, (await engine.get_next_step("w")).step_index) == (StepState.FAILED, 2)
    assert await engine.handle_step_failure("w", 1, "again") == state
    state = await engine.handle_step_failure("w", 2, "three")
    assert (state.status, state.error["step_index"]) == (TaskState.FAILED, 2)


async def test_by_hand_a_graph_offers_what_may_begin():
    engine = WorkflowEngine(MemoryManager("memory:", namespace="graphs"))
    plan = [
        {"action": "a", "id": "a"},
        {"action": "b", "depends_on": ["d"]},
        {"action": "c", "depends_on": ["a"]},
        {"action": "d", "id": "d"},
    ]
    await engine.initialize_workflow(BaseTask("w", "t"), plan)
    with pytest.raises(WorkflowError, match="step 1 of workflow w must wait for step 3"):
        await engine.update_step_state("w", 1, StepState.RUNNING)
    order = []
    while (step := await engine.get_next_step("w")) is not None:
        order.append(step.step_index)
        await engine.update_step_state("w", step.step_index, StepState.COMPLETED)
    assert order == [0, 2, 3, 1]


async def test_an_ended_workflow_is_forgotten_after_its_retention():
    clock = ManualClock()
    engine = WorkflowEngine(MemoryManager("memory:", namespace="retention"), retention=100)
    store = LocalWorkflows(clock.time)

    async def ours():
        return store

    engine._store = ours
    for name in ("ended", "live"):
        await engine.initialize_workflow(BaseTask(name, "t"), [{"action": "a"}])
    await engine.complete_workflow("ended", 1)
    clock.advance(99)
    assert (await engine.load_workflow_state("ended")).is_finished()
    clock.advance(2)
    assert await engine.load_workflow_state("ended") is None
    assert [each.id for each in await engine.list_workflows()] == ["live"]
    assert [event async for event in engine.events("ended")] == []


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
texts = st.dictionaries(st.text(max_size=5), values, max_size=3)


@st.composite
def states(draw):
    """Any state of a sequential workflow that could have been recorded by hand."""
    total, current = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    plan = validate_plan([{"action": "a", "args": {"given": draw(texts) and {}}, "x": n} for n in range(total)])
    steps = rec.steps_of(plan)
    for step in steps[:current]:
        step.state, step.result = draw(st.sampled_from([StepState.COMPLETED, StepState.SKIPPED])), draw(values)
        step.attempt, step.started_at, step.finished_at = draw(st.integers(0, 9)), 1.0, 2.0
    status = draw(st.sampled_from([TaskState.PENDING, TaskState.RUNNING, TaskState.FAILED]))
    for step in steps[current:]:
        step.state = StepState.SKIPPED if status is TaskState.FAILED else StepState.PENDING
    told = {"id": "id", "type": "t", "input": draw(values), "priority": 2, "metadata": draw(texts)}
    state = WorkflowState(
        "id", plan, steps, min(current, total), status, draw(texts), draw(st.none() | texts), task=told
    )
    return state


@given(states())
def test_the_record_decodes_to_what_was_encoded(state):
    fields, context, _ = rec.encode_new(state, encode)
    fields |= {"token": b"t", "created": b"1500"}
    fields |= encode_saved(state, fields, encode)
    back = rec.decode_state("id", fields, context)
    state.created_at, state.version, state.token = 1.5, 1, b"t:1"
    state.phase = "running" if state.status is TaskState.RUNNING else ""
    state.left, state.running = back.left, back.running
    assert back == state
    assert encode_saved(back, fields, encode).items() <= fields.items()
    assert not list(change_faults(state, back))


def _raw():
    task = {"id": "id", "type": "t", "input": None, "priority": 2, "metadata": {}}
    plan = validate_plan([{"action": "a"}, {"action": "b"}])
    fields, _, _ = rec.encode_new(WorkflowState("id", plan, [], task=task), encode)
    return fields | {"token": b"t", "created": b"1", "q:0": b"W 1 1 5 0 0 1 0 0 0", "w:0": b"signal again 0 s"}


@pytest.mark.parametrize("name", sorted(_raw().keys() - {"q:0", "d:1", "sinks", "plain"}))
def test_a_record_that_lacks_a_field_is_damaged(name):
    raw = _raw()
    del raw[name]
    with pytest.raises(CorruptEntryError, match="left as it is"):
        rec.decode_state("id", raw, {})


@pytest.mark.parametrize("name", sorted(_raw().keys() - {"token", "sinks", "plain", "driven"}))
@pytest.mark.parametrize("damage", [b"\xc1", b"\x93\x01", b"\xff fe", b"P 1 1", b"-."])
def test_a_damaged_field_is_a_typed_error(name, damage):
    with pytest.raises(CorruptEntryError, match="left as it is"):
        rec.decode_state("id", _raw() | {name: damage}, {})


def test_a_record_of_another_format_says_so():
    with pytest.raises(CorruptEntryError, match="format b'1', this version reads b'3'"):
        rec.decode_state("id", _raw() | {"format": b"1"}, {})
    assert "format b'1'" in str(trouble("id", "format 1"))
    assert isinstance(trouble("id", "unknown"), WorkflowError)


@pytest.mark.parametrize("damage", [b"", b"fl-- x 1 id", b"zz-- -1 0 id", b"f-- -1 0 id", b"f--- -1 0", b"\xff"])
def test_a_damaged_answer_is_a_typed_error(damage):
    good = [1, b"go", b"running", b"running", 1, 1, 2, 1, b"", [], [], b"", 0]
    planned, live = encode("p", {"action": "a"}), b"R 1 1 1 0 0 0 0 0 0"
    more = [planned, b"f--- -1 0 id", live, b"\xc0", b"\x80", [], [], b"", b"0", 0]
    assert read_begun("w", [*good[:10], more, b"", 0]).step.id == "id"
    with pytest.raises(CorruptEntryError, match="left as it is"):
        read_begun("w", [*good[:10], [planned, damage, *more[2:]], b"", 0])
    with pytest.raises(CorruptEntryError, match="left as it is"):
        read_row("w", [0, planned, damage, live, b"", b"", b""])
    with pytest.raises(CorruptEntryError, match="left as it is"):
        read_moved("w", [*good[:9], [0, 1, b"\xc1"], [], b"", 0])


async def test_too_large_a_result_names_the_step():
    engine = WorkflowEngine(MemoryManager("memory:", namespace="large", max_bytes=200))
    await engine.initialize_workflow(BaseTask("w", "t"), [{"action": "fetch"}])
    with pytest.raises(TaskTooLargeError, match=r"result of step 0 \(fetch\)"):
        await engine.update_step_state("w", 0, StepState.COMPLETED, "x" * 300)


@pytest.mark.parametrize("status", list(TaskState))
def test_is_finished(status):
    state = WorkflowState("id", [], [], status=status)
    assert state.is_finished() == (status.value in {"completed", "failed", "cancelled"})
