"""WorkflowEngine: the same durable state machine on Redis and in this process."""

from __future__ import annotations

import asyncio
import random

import pytest

from orchestra import _keys, telemetry
from orchestra.errors import ConfigurationError, CorruptEntryError, InvalidTaskError, TaskTooLargeError, WorkflowError
from orchestra.memory import MemoryManager
from orchestra.tasks import BaseTask, TaskState
from orchestra.workflow import StepState, WorkflowEngine, WorkflowState, get_workflow_engine

PLAN = [
    {"action": "fetch_data", "args": {"source": "database"}, "reasoning": "Need to retrieve raw data first"},
    {"action": "transform_data", "args": {"format": "json"}, "reasoning": "Transform data into required format"},
    {"action": "analyze_data", "args": {"method": "statistical"}, "reasoning": "Perform statistical analysis"},
]
TASK = BaseTask(id="workflow-task-123", type="data_processing", input={"data": "example"})
DONE, RUNNING, FAILED = StepState.COMPLETED, StepState.RUNNING, StepState.FAILED


@pytest.fixture(params=["redis", "memory"])
def memory(request):
    place = request.getfixturevalue("manager") if request.param == "redis" else "memory:"
    return MemoryManager(place, namespace="t")


@pytest.fixture
def engine(memory):
    return WorkflowEngine(memory)


async def test_the_example_of_the_specification(engine):
    state = await engine.initialize_workflow(TASK, PLAN)
    assert (state.status, state.version, state.current_step_index) == (TaskState.PENDING, 1, 0)
    step = await engine.get_next_step(TASK.id)
    assert (step.step_index, step.action, step.args) == (0, "fetch_data", {"source": "database"})
    assert step.reasoning == "Need to retrieve raw data first"
    await engine.update_step_state(task_id=TASK.id, step_index=0, new_step_state=DONE, result={"rows": 3})
    final = {"result": "analysis_complete", "findings": [1]}
    await engine.complete_workflow(TASK.id, final)
    state = await engine.load_workflow_state(TASK.id)
    assert state.is_finished()
    assert state.status is TaskState.COMPLETED
    assert state.workflow_context.get("final_output") == final
    assert [s.state for s in state.steps] == [DONE, StepState.SKIPPED, StepState.SKIPPED]
    assert state.steps[0].result == {"rows": 3}
    assert await engine.get_next_step(TASK.id) is None


async def test_the_failure_of_the_specification(engine):
    await engine.initialize_workflow(TASK, PLAN)
    step = await engine.get_next_step(TASK.id)
    error = {"message": "Step execution failed", "reason": "Data validation error"}
    state = await engine.handle_step_failure(TASK.id, step.step_index, error)
    assert state.status is TaskState.FAILED
    assert state.error == {**error, "step_index": 0, "action": "fetch_data"}
    assert state.steps[0].error == error
    assert [s.state for s in state.steps] == [FAILED, StepState.SKIPPED, StepState.SKIPPED]
    assert await engine.get_next_step(TASK.id) is None
    assert await engine.load_workflow_state(TASK.id) == state


async def test_steps_run_in_order_and_every_change_counts(engine):
    await engine.initialize_workflow(TASK, PLAN)
    for index in range(3):
        assert (await engine.get_next_step(TASK.id)).step_index == index
        started = await engine.update_step_state(TASK.id, index, RUNNING)
        assert (started.attempt, started.state) == (1, RUNNING)
        assert (await engine.get_next_step(TASK.id)).state is RUNNING
        await engine.update_step_state(TASK.id, index, DONE, result=index, attempt=1)
    state = await engine.load_workflow_state(TASK.id)
    assert (state.version, state.current_step_index, state.status) == (7, 3, TaskState.RUNNING)
    assert await engine.get_next_step(TASK.id) is None
    state = await engine.complete_workflow(TASK.id, "out")
    assert (state.version, state.status) == (8, TaskState.COMPLETED)
    assert [s.result for s in state.steps] == [0, 1, 2]


async def test_a_step_must_wait_for_those_before_it(engine):
    await engine.initialize_workflow(TASK, PLAN)
    for target in set(StepState) - {StepState.WAITING}:
        if target is not StepState.PENDING:
            with pytest.raises(WorkflowError, match="step 1 .* must wait for step 0"):
                await engine.update_step_state(TASK.id, 1, target)
    assert (await engine.load_workflow_state(TASK.id)).version == 1


async def test_unknown_workflows_and_steps(engine):
    assert await engine.load_workflow_state("nobody") is None
    calls = [
        lambda: engine.get_next_step("nobody"),
        lambda: engine.update_step_state("nobody", 0, DONE),
        lambda: engine.handle_step_failure("nobody", 0, "x"),
        lambda: engine.complete_workflow("nobody", 1),
        lambda: engine.fail_workflow("nobody", "x"),
    ]
    for call in calls:
        with pytest.raises(WorkflowError, match="no workflow for task nobody"):
            await call()
    await engine.initialize_workflow(TASK, PLAN)
    for index in (-1, 3, "x", None):
        with pytest.raises(WorkflowError, match="steps 0 to 2"):
            await engine.update_step_state(TASK.id, index, DONE)
    with pytest.raises(WorkflowError, match="must be a StepState"):
        await engine.update_step_state(TASK.id, 0, "completed")
    with pytest.raises(ConfigurationError):
        await engine.load_workflow_state("bad id")


async def test_initialising_again_keeps_what_is_recorded(engine, caplog):
    first = await engine.initialize_workflow(TASK, PLAN)
    await engine.update_step_state(TASK.id, 0, DONE, "r")
    again = await engine.initialize_workflow(TASK, PLAN)
    assert (again.version, again.steps[0].result) == (first.version + 1, "r")
    assert await engine.initialize_workflow(TASK, PLAN[:2]) is None
    assert await engine.initialize_workflow(BaseTask(TASK.id, TASK.type, input="other"), PLAN) is None
    assert "another plan or input" in caplog.text
    assert len((await engine.load_workflow_state(TASK.id)).plan) == 3


async def test_a_bad_plan_writes_nothing(engine):
    with pytest.raises(WorkflowError) as caught:
        await engine.initialize_workflow(TASK, [{"action": ""}, {"args": 5}])
    assert len(caught.value.faults) == 3
    assert await engine.load_workflow_state(TASK.id) is None


async def test_of_two_initialisers_one_wins(engine, memory):
    other = WorkflowEngine(memory)
    plans = [[{"action": f"a{n}"}] for n in range(10)]
    states = await asyncio.gather(*((engine, other)[n % 2].initialize_workflow(TASK, p) for n, p in enumerate(plans)))
    (winner,) = [state for state in states if state is not None]
    assert (await engine.load_workflow_state(TASK.id)).plan == winner.plan


async def test_repeating_a_change_changes_nothing(engine):
    await engine.initialize_workflow(TASK, PLAN)
    first = await engine.update_step_state(TASK.id, 0, DONE, {"a": 1})
    assert await engine.update_step_state(TASK.id, 0, DONE, {"a": 1}) == first
    with pytest.raises(WorkflowError, match="another result"):
        await engine.update_step_state(TASK.id, 0, DONE, {"a": 2})
    ended = await engine.complete_workflow(TASK.id, "first")
    assert (await engine.complete_workflow(TASK.id, "second")) == ended
    assert ended.workflow_context["final_output"] == "first"
    assert (await engine.update_step_state(TASK.id, 0, DONE, {"a": 1})) == first


async def test_handling_a_failure_twice_keeps_the_first(engine):
    await engine.initialize_workflow(TASK, PLAN)
    await engine.update_step_state(TASK.id, 0, FAILED, error="told first")
    assert await engine.get_next_step(TASK.id) is None
    state = await engine.handle_step_failure(TASK.id, 0, "told second")
    assert state.steps[0].error == {"message": "told first"}
    assert state.error == {"message": "told second", "step_index": 0, "action": "fetch_data"}
    assert await engine.handle_step_failure(TASK.id, 0, "told third") == state
    assert await engine.fail_workflow(TASK.id, "told fourth") == state


async def test_a_failed_step_may_be_tried_again_or_passed_over(engine):
    await engine.initialize_workflow(TASK, PLAN)
    await engine.update_step_state(TASK.id, 0, RUNNING)
    await engine.update_step_state(TASK.id, 0, FAILED, error="x")
    assert (await engine.update_step_state(TASK.id, 0, RUNNING)).attempt == 2
    await engine.update_step_state(TASK.id, 0, FAILED, error="y")
    await engine.update_step_state(TASK.id, 0, StepState.SKIPPED)
    assert (await engine.get_next_step(TASK.id)).step_index == 1
    assert (await engine.load_workflow_state(TASK.id)).steps[0].state is StepState.SKIPPED


async def test_a_terminal_workflow_absorbs(engine):
    await engine.initialize_workflow(TASK, PLAN)
    await engine.update_step_state(TASK.id, 0, RUNNING)
    failed = await engine.fail_workflow(TASK.id, "stop")
    assert failed.steps[0].state is FAILED
    assert failed.steps[0].error == failed.error == {"message": "stop"}
    for call in (
        lambda: engine.complete_workflow(TASK.id, 1),
        lambda: engine.update_step_state(TASK.id, 0, RUNNING),
        lambda: engine.update_step_state(TASK.id, 1, DONE),
    ):
        with pytest.raises(WorkflowError, match="is failed"):
            await call()
    assert await engine.load_workflow_state(TASK.id) == failed


@pytest.mark.parametrize("state", [RUNNING, FAILED])
async def test_a_workflow_does_not_complete_over_an_unfinished_step(engine, state):
    await engine.initialize_workflow(TASK, PLAN)
    await engine.update_step_state(TASK.id, 0, state)
    with pytest.raises(WorkflowError, match=f"step 0 is {state.value}"):
        await engine.complete_workflow(TASK.id, 1)
    assert not (await engine.load_workflow_state(TASK.id)).is_finished()


async def test_a_zombie_cannot_commit_its_result(engine, memory):
    await engine.initialize_workflow(TASK, PLAN)
    zombie = await engine.update_step_state(TASK.id, 0, RUNNING, attempt=0)
    heir = await WorkflowEngine(memory).update_step_state(TASK.id, 0, RUNNING, attempt=zombie.attempt)
    for call in (
        lambda: engine.update_step_state(TASK.id, 0, DONE, "zombie", attempt=zombie.attempt),
        lambda: engine.handle_step_failure(TASK.id, 0, "zombie", attempt=zombie.attempt),
        lambda: engine.update_step_state(TASK.id, 0, RUNNING, attempt=zombie.attempt),
    ):
        with pytest.raises(WorkflowError, match="superseded: attempt 2"):
            await call()
    await engine.update_step_state(TASK.id, 0, DONE, "heir", attempt=heir.attempt)
    assert (await engine.load_workflow_state(TASK.id)).steps[0].result == "heir"


async def test_of_many_that_end_one_workflow_one_does(memory):
    engines = [WorkflowEngine(memory) for _ in range(6)]
    await engines[0].initialize_workflow(TASK, PLAN)
    ends = [
        e.complete_workflow(TASK.id, n) if n % 2 else e.fail_workflow(TASK.id, f"{n}") for n, e in enumerate(engines)
    ]
    outcomes = await asyncio.gather(*ends, return_exceptions=True)
    state = await engines[0].load_workflow_state(TASK.id)
    assert state.version == 2
    agreed = [outcome for outcome in outcomes if isinstance(outcome, WorkflowState)]
    assert agreed == [state] * 3
    assert all(isinstance(outcome, WorkflowError) for outcome in outcomes if outcome not in agreed)


async def test_of_two_engines_that_start_one_step_one_wins_and_the_other_is_told(memory):
    engines = [WorkflowEngine(memory) for _ in range(6)]
    await engines[0].initialize_workflow(TASK, PLAN)
    outcomes = await asyncio.gather(
        *(e.update_step_state(TASK.id, 0, RUNNING, attempt=0) for e in engines), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes].count(WorkflowError) == 5
    assert all("superseded: attempt 1" in str(o) for o in outcomes if isinstance(o, WorkflowError))
    state = await engines[0].load_workflow_state(TASK.id)
    assert (state.version, state.steps[0].attempt, state.running) == (2, 1, 1)


async def test_a_change_beside_another_loses_neither(engine):
    await engine.initialize_workflow(TASK, PLAN)
    await asyncio.gather(
        engine.set_context(TASK.id, "note", "rival"), engine.update_step_state(TASK.id, 0, DONE, "mine")
    )
    state = await engine.load_workflow_state(TASK.id)
    assert (state.version, state.steps[0].result, state.workflow_context) == (3, "mine", {"note": "rival"})


async def test_save_writes_what_differs(engine):
    state = await engine.initialize_workflow(TASK, PLAN)
    state.workflow_context["note"] = "n"
    state.steps[0].state = StepState.SKIPPED
    saved = await engine.save_workflow_state(state)
    assert saved is state
    assert (state.version, state.current_step_index) == (2, 1)
    assert await engine.load_workflow_state(TASK.id) == state
    assert (await engine.save_workflow_state(state)).version == 2
    del state.workflow_context["note"]
    state.status, state.error = TaskState.CANCELLED, {"message": "not wanted"}
    await engine.save_workflow_state(state)
    loaded = await engine.load_workflow_state(TASK.id)
    assert (loaded.status, loaded.workflow_context, loaded.error) == (state.status, {}, state.error)
    assert [s.state for s in loaded.steps] == [StepState.SKIPPED] * 3
    assert (await engine.save_workflow_state(loaded)).version == 3


async def test_save_of_a_stale_state_is_a_conflict(engine):
    mine = await engine.initialize_workflow(TASK, PLAN)
    await engine.update_step_state(TASK.id, 0, RUNNING)
    mine.workflow_context["note"] = "late"
    with pytest.raises(WorkflowError, match="changed by somebody else"):
        await engine.save_workflow_state(mine)
    assert (await engine.load_workflow_state(TASK.id)).workflow_context == {}


def _edit_plan(state):
    state.plan[0]["action"] = state.steps[0].action = "other"


def _edit_input(state):
    state.task["input"] = "other"


def _unlike_plan(state):
    state.steps[1].args = {}


def _out_of_order(state):
    state.steps[2].state = DONE


def _backwards(state):
    state.steps[0].state = StepState.PENDING


def _back_to_pending(state):
    state.status = TaskState.PENDING


def _complete_while_running(state):
    state.steps[1].state, state.status = RUNNING, TaskState.COMPLETED


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (_edit_plan, "plan, the task's type and its input cannot change"),
        (_edit_input, "plan, the task's type and its input cannot change"),
        (_unlike_plan, "steps are not those of its plan"),
        (_out_of_order, "step 2 must wait for step 1"),
        (_backwards, "step 0 is completed and cannot become pending"),
        (_back_to_pending, "it is running and cannot become pending"),
        (_complete_while_running, "cannot be completed while step 1 is running"),
    ],
)
async def test_save_refuses_what_is_illegal(engine, edit, fault):
    await engine.initialize_workflow(TASK, PLAN)
    await engine.update_step_state(TASK.id, 0, DONE)
    state = await engine.load_workflow_state(TASK.id)
    edit(state)
    with pytest.raises(WorkflowError) as caught:
        await engine.save_workflow_state(state)
    assert any(fault in found for found in caught.value.faults)
    assert (await engine.load_workflow_state(TASK.id)).version == 2


async def test_save_refuses_to_change_what_has_ended(engine):
    await engine.initialize_workflow(TASK, PLAN)
    state = await engine.complete_workflow(TASK.id, 1)
    state.workflow_context["final_output"] = 2
    with pytest.raises(WorkflowError, match="is completed and cannot change"):
        await engine.save_workflow_state(state)


async def test_a_state_that_was_not_loaded_is_created_once(engine, memory):
    made = await WorkflowEngine(MemoryManager("memory:", namespace="elsewhere")).initialize_workflow(TASK, PLAN)
    made.version, made.token = 0, b""
    await engine.save_workflow_state(made)
    assert await engine.load_workflow_state(TASK.id) == made
    made.token = b""
    with pytest.raises(WorkflowError, match="changed by somebody else"):
        await engine.save_workflow_state(made)


async def test_a_result_beyond_the_limit_or_unfit_to_travel_changes_nothing(memory, request):
    engine = WorkflowEngine(MemoryManager(memory._manager, namespace="t", max_bytes=500))
    await engine.initialize_workflow(TASK, PLAN)
    with pytest.raises(TaskTooLargeError, match=r"result of step 0 \(fetch_data\)"):
        await engine.update_step_state(TASK.id, 0, DONE, "x" * 1000)
    with pytest.raises(InvalidTaskError):
        await engine.update_step_state(TASK.id, 0, DONE, object())
    assert (await engine.load_workflow_state(TASK.id)).version == 1


async def test_random_histories_keep_the_invariants(memory):
    """Every state that is read has legal order, and no change contradicts an earlier one."""
    rng, edges, refusals = random.Random(7), 0, 0
    for number in range(12):
        task = BaseTask(f"random-{number}", "t")
        before = await WorkflowEngine(memory).initialize_workflow(task, PLAN)
        for _ in range(25):
            engine = WorkflowEngine(memory)
            index = rng.choice([before.current_step_index, rng.randrange(3)])
            kind = rng.choices(["update", "failure", "complete", "fail"], [30, 1, 3, 1])[0]
            calls = {
                "update": lambda: engine.update_step_state(
                    task.id, index, rng.choice([s for s in StepState if s is not StepState.WAITING]), index
                ),
                "failure": lambda: engine.handle_step_failure(task.id, index, "x"),
                "complete": lambda: engine.complete_workflow(task.id, "out"),
                "fail": lambda: engine.fail_workflow(task.id, "x"),
            }
            try:
                await calls[kind]()
            except WorkflowError:
                refusals += 1
                assert await engine.load_workflow_state(task.id) == before
                continue
            state = await engine.load_workflow_state(task.id)
            edges += state.version - before.version
            assert state.version - before.version in (0, 1)
            assert state.status is before.status or not before.is_finished()
            for old, new in zip(before.steps, state.steps, strict=True):
                if old.state in (DONE, StepState.SKIPPED):
                    assert new == old
            await engine.save_workflow_state(state)  # raises if the engine itself broke the order of the steps
            before = state
    assert edges > 50
    assert refusals > 50


async def test_a_workflow_of_10000_steps_commits_a_few_fields_a_step(engine):
    state = await engine.initialize_workflow(
        BaseTask("big", "t"), [{"action": "a", "args": {"n": n}} for n in range(10_000)]
    )
    assert len(state.steps) == 10_000
    store = await engine._store()
    before, written = (await store.read("big"))[0], []
    for change in (
        lambda: engine.update_step_state("big", 0, RUNNING),
        lambda: engine.update_step_state("big", 0, DONE, "r"),
        lambda: engine.complete_workflow("big", "out"),
    ):
        await change()
        after = (await store.read("big"))[0]
        written.append({name for name in after if after[name] != before.get(name)})
        before = after
    assert written == [
        {"q:0", "status", "phase", "running", "version", "last"},
        {"q:0", "q:1", "r:0", "current", "left", "order", "running", "version", "last"},
        {"current", "ended", "phase", "status", "version"},
    ]
    assert (await engine.load_workflow_state("big")).steps[9_999].state is StepState.SKIPPED


async def test_changes_are_told(engine):
    told = []
    detach = telemetry.attach(lambda *event: told.append(event), "workflow.changed")
    await engine.initialize_workflow(TASK, PLAN[:1])
    await engine.update_step_state(TASK.id, 0, DONE)
    await engine.complete_workflow(TASK.id, 1)
    detach()
    assert [(m["completed"], m["total"], d["status"], d["step"]) for _, m, d in told] == [
        (0, 1, "pending", None),
        (1, 1, "running", 0),
        (1, 1, "completed", None),
    ]


async def test_a_live_workflow_never_expires_and_an_ended_one_does(manager):
    engine = WorkflowEngine(MemoryManager(manager, namespace="t", ttl=10), retention=100)
    state, context, events, *_ = _keys.WorkflowKeys("t").scripted(TASK.id)
    await engine.initialize_workflow(TASK, PLAN, context={"a": 1})
    await engine.update_step_state(TASK.id, 0, RUNNING)
    assert [await manager.client.pttl(key) for key in (state, context, events)] == [-1] * 3
    await engine.handle_step_failure(TASK.id, 0, "x")
    assert all([99_000 < await manager.client.pttl(key) <= 100_000 for key in (state, context, events)])
    default, forever = WorkflowEngine(MemoryManager(manager, ttl=10)), WorkflowEngine(MemoryManager(manager, ttl=None))
    for n, (other, low, high) in enumerate([(default, 9_000, 10_000), (forever, -1, -1)]):
        await other.initialize_workflow(BaseTask(f"n{n}", "t"), PLAN)
        await other.complete_workflow(f"n{n}", 1)
        assert low <= await manager.client.pttl(_keys.WorkflowKeys("default").state(f"n{n}")) <= high


@pytest.mark.parametrize("field", ["format", "status", "current", "steps", "left", "n:0", "q:0"])
async def test_a_damaged_record_is_a_typed_error_and_is_left_alone(manager, field):
    engine = WorkflowEngine(MemoryManager(manager, namespace="t"))
    key = _keys.WorkflowKeys("t").state(TASK.id)
    state = await engine.initialize_workflow(TASK, PLAN)
    await manager.client.hset(key, field, b"?")
    before = await manager.client.hgetall(key)
    for call in (
        lambda: engine.load_workflow_state(TASK.id),
        lambda: engine.get_next_step(TASK.id),
        lambda: engine.update_step_state(TASK.id, 0, DONE),
        lambda: engine.complete_workflow(TASK.id, 1),
        lambda: engine.save_workflow_state(state),
    ):
        with pytest.raises(CorruptEntryError, match="left as it is"):
            await call()
    assert await manager.client.hgetall(key) == before


async def test_the_shared_engine_is_one_for_each_memory_manager():
    first, second = MemoryManager("memory:"), MemoryManager("memory:")
    engine = get_workflow_engine(first)
    assert await get_workflow_engine(first) is engine
    assert get_workflow_engine(second) is not engine
    assert get_workflow_engine() is get_workflow_engine()
