"""What goes wrong between two moves of a workflow: workers that die there, things that cross, letters that lie."""

from __future__ import annotations

import asyncio
import time

import pytest

from orchestra._delivery import STEP, Again, Bury
from orchestra._workflow import runner
from orchestra._workflow.driver import Driver, step_task_id
from orchestra._workflow.making import PLAN
from orchestra._workflow.planning import Planned
from orchestra._workflow.runner import StepRunner
from orchestra._workflow.upkeep import Upkeep, sweep
from orchestra.dispatcher import Dispatcher
from orchestra.errors import QueueFullError, Reject, StoreError, WorkflowError
from orchestra.memory import MemoryManager
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import BaseTask, TaskState
from orchestra.workflow import StepState, WorkflowEngine, validate_plan
from tests.integration.noting import Killed
from tests.waiting import settled

DONE, FAILED, SKIPPED = StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED
PENDING, WAITING = StepState.PENDING, StepState.WAITING
CRASHED = Bury("crashed", 5, {})


@pytest.fixture
def work(agents):
    """The ids of the tasks that the agent ``work`` ran."""
    ran = []

    @agents.agent("work")
    async def run(task):
        ran.append(task.id)
        return {"n": 1}

    return ran


def serving(queue, engine, agents):
    """A worker that looks after its workflows often."""
    return Dispatcher(queue, agents=agents, workflows=StepRunner(engine, queue, agents=agents, sweep=0.05))


def a_task(name="w"):
    return BaseTask(name, "kind")


def child_of(*plan):
    """A step that starts a child with ``plan``."""
    return {"id": "child", "action": "orchestra.workflow", "args": {"plan": list(plan)}, "depends_on": []}


async def make(engine, plan):
    return await engine.initialize_workflow(a_task(), plan, driven=True)


async def run(engine, index, state=DONE, *, name="w", series=1):
    """Begin and end a step."""
    assert (await engine.begin(name, index, series, 1)).verdict == "go"
    error = "no" if state is FAILED else None
    return await engine.finish(name, index, series, state, None if error else index, error, fence=1)


async def begun(engine, queue, name="w"):
    """The delivery of the first step of ``name``, which runs."""
    (delivery,) = await queue.read("c1", 1, 1000)
    assert (await engine.begin(name, 0, 1, delivery.fence, delivery.task().metadata[STEP][4])).verdict == "go"
    return delivery


async def first_id(engine, name="w"):
    """The id of the task of its first step."""
    return step_task_id(name, 0, 1, await engine.life(name))


async def status(engine, name="w"):
    state = await engine.load_workflow_state(name)
    return None if state is None else state.status


async def becomes(ask, seconds=20.0):
    """What the coroutine function ``ask`` answers once that is true."""
    async with asyncio.timeout(seconds):
        while not (answer := await ask()):
            await asyncio.sleep(0.005)
    return answer


async def buried(queue):
    """The only dead letter of ``queue``, once it is there."""
    (letter,) = await becomes(queue.read_dlq)
    return letter


async def followed(engine, queue, letter):
    """Until an upkeep has dealt with ``letter``."""

    async def past():
        return await engine.cursor(queue.name) == letter.message_id

    await becomes(past)


async def swept(driver, wanted, name="w"):
    """Sweep until workflow ``name`` has the status ``wanted``."""

    async def reached():
        await sweep(driver)
        return await status(driver.engine, name) is wanted

    await becomes(reached)


# -- cancelling


@pytest.mark.parametrize("delay", [0.0, 30.0])
async def test_a_step_that_was_given_back_does_not_keep_its_cancelled_workflow(
    queue, engine, driver, agents, work, delay
):
    """It runs by the record, and lies in the queue, where nobody can be interrupted."""
    await driver.start([{"action": "work"}], id="w")
    await queue.settle([(await begun(engine, queue), Again(delay, "released"))])
    await driver.cancel("w")
    async with serving(queue, engine, agents):
        assert (await engine.wait_end("w", 10)).status is TaskState.CANCELLED
        await settled(queue)
    assert work == []


async def test_a_step_that_waits_for_its_retry_does_not_keep_its_cancelled_workflow(queue, engine, driver):
    await driver.start([{"action": "work"}, {"action": "work"}], id="w")
    delivery = await begun(engine, queue)
    await engine.retrying("w", 0, 1, "busy", 5, fence=delivery.fence)
    await queue.settle([(delivery, Again(5.0, "retried"))])
    await driver.cancel("w")
    assert await status(engine) is TaskState.CANCELLED


async def test_a_workflow_whose_step_was_cancelled_in_the_queue_can_be_cancelled(queue, engine, driver, work):
    await driver.start([{"action": "work"}], id="w")
    await queue.cancel(await first_id(engine))
    assert (await engine.load_workflow_state("w")).steps[0].state is PENDING
    await driver.cancel("w")
    assert await status(engine) is TaskState.CANCELLED
    assert work == []


async def test_a_child_that_nobody_has_planned_yet_is_cancelled_with_its_parent(queue, engine, agents, work):
    """It is not planned afterwards, and keeps no other child from being cancelled."""
    driver = Driver(engine, queue, planner="planner")
    unplanned = {"id": "first", "action": "orchestra.workflow", "args": {"type": "work"}, "depends_on": []}
    await driver.begin(a_task(), Planned([unplanned, child_of({"action": "other"})], {}))
    assert (await engine.load_workflow_state("w/0")).plan[0]["action"] == PLAN
    assert await status(engine, "w/1") is TaskState.RUNNING
    await driver.cancel("w")
    async with serving(queue, engine, agents):
        assert (await engine.wait_end("w/1", 10)).status is TaskState.CANCELLED
        await settled(queue)
    assert await status(engine, "w") is TaskState.CANCELLED
    assert await status(engine, "w/0") is TaskState.CANCELLED
    assert work == []


async def test_a_child_that_begins_while_its_parent_is_cancelled_is_cancelled_too(engine, driver, monkeypatch):
    """The cancel comes after the child is recorded, and before its parent waits for it."""
    real = Driver.begin

    async def begin(self, task, planned, parent=None):
        state = await real(self, task, planned, parent)
        if parent is not None:
            await driver.cancel("w")
        return state

    monkeypatch.setattr(Driver, "begin", begin)
    await driver.start([child_of({"action": "slow"})], id="w")
    assert await status(engine, "w") is TaskState.CANCELLED
    assert await status(engine, "w/0") is TaskState.CANCELLED


async def test_the_sweep_cancels_a_child_whose_parent_ended_before_a_crash(engine, driver, monkeypatch):
    await driver.start([child_of({"action": "slow"})], id="w")
    real = WorkflowEngine.cancel

    async def cancel(self, workflow_id, reason=None):
        if workflow_id == "w/0":
            raise Killed
        return await real(self, workflow_id, reason)

    with monkeypatch.context() as crash:
        crash.setattr(WorkflowEngine, "cancel", cancel)
        with pytest.raises(Killed):
            await driver.cancel("w")
    assert await status(engine, "w/0") is TaskState.RUNNING
    await swept(driver, TaskState.CANCELLED, "w/0")
    assert await status(engine, "w") is TaskState.CANCELLED


# -- going on


async def test_a_paused_workflow_starts_no_child_from_the_outbox(engine, driver):
    await make(engine, [child_of({"action": "work"})])
    await driver.pause("w")
    assert await sweep(driver) == 1
    assert await status(engine, "w/0") is None
    await driver.resume("w")
    assert await status(engine, "w/0.2") is TaskState.RUNNING


async def test_the_end_of_an_abandoned_child_is_not_that_of_the_one_after_a_resume(queue, engine, driver):
    await driver.start([child_of({"action": "slow"}), {"id": "y", "action": "y", "depends_on": []}], id="w")
    assert len(await queue.read("c1", 5, 1000)) == 2
    assert (await engine.begin("w/0", 0, 1, 1)).verdict == "go"
    await driver.send("w", await run(engine, 1, FAILED))
    assert await status(engine, "w") is TaskState.FAILED
    assert (await engine.load_workflow_state("w/0")).phase == "cancelling"
    await driver.resume("w")
    assert await status(engine, "w/0.2") is TaskState.RUNNING
    await driver.send("w/0", await engine.finish("w/0", 0, 1, DONE, 1, fence=1))
    assert (await engine.load_workflow_state("w")).steps[0].state is WAITING


def a_map(**args):
    over = {"over": [1, 2, 3], "step": {"action": "x"}, **args}
    return [
        {"id": "m", "action": "orchestra.map", "args": over, "depends_on": []},
        {"id": "y", "action": "y", "depends_on": []},
    ]


def items(count):
    return [{"action": "x", "item": at, "index": at} for at in range(count)]


async def test_a_map_goes_on_after_a_resume_where_it_was(engine):
    """The item that ended while its workflow failed opened no other; the resume does."""
    await make(engine, a_map(max_parallel=1))
    grown = await engine.grow("w", items(3), parent=0, series=1, max_parallel=1)
    assert [ready.index for ready in grown.ready] == [2]
    assert (await engine.begin("w", 2, 1, 1)).verdict == "go"
    await run(engine, 1, FAILED)
    assert (await engine.finish("w", 2, 1, DONE, 1, fence=1)).status is TaskState.FAILED
    assert sorted(ready.index for ready in (await engine.resume("w")).ready) == [1, 3]


async def test_a_map_with_a_failed_item_fails_after_a_resume_and_is_mapped_anew_by_the_next(engine):
    await make(engine, a_map())
    await engine.grow("w", items(2), parent=0, series=1)
    assert (await engine.begin("w", 1, 1, 1)).verdict == "go"
    await run(engine, 2, FAILED)
    assert (await engine.finish("w", 1, 1, FAILED, None, "no", fence=1)).status is TaskState.FAILED
    moved = await engine.resume("w")
    for ready in moved.ready:
        moved = await run(engine, ready.index, series=ready.series)
    assert moved.status is TaskState.FAILED
    assert [(ready.index, ready.series) for ready in (await engine.resume("w")).ready] == [(0, 2)]
    moved = await engine.grow("w", items(2), parent=0, series=2)
    assert len(moved.ready) == 2
    for ready in moved.ready:
        moved = await run(engine, ready.index, series=ready.series)
    assert moved.status is TaskState.COMPLETED


async def test_a_wait_for_a_signal_that_came_is_repeated_without_another_run(engine):
    """The reply to the first was lost: the step is sent under one new series, not two."""
    await make(engine, [{"action": "x"}])
    assert (await engine.begin("w", 0, 1, 1)).verdict == "go"
    await engine.signal("w", "go", 5)
    moved = await engine.park("w", 0, 1, signal="go", fence=1)
    assert (moved.why, [(ready.index, ready.series) for ready in moved.ready]) == ("signalled", [(0, 2)])
    again = await engine.park("w", 0, 1, signal="go", fence=1)
    assert (again.done, again.why) == (False, "stale")
    step = (await engine.load_workflow_state("w")).steps[0]
    assert (step.state, step.series) == (PENDING, 2)


async def test_a_delivery_that_lost_its_step_cannot_end_it_while_it_waits(engine):
    await make(engine, [{"action": "x"}])
    await engine.begin("w", 0, 1, 5)
    await engine.begin("w", 0, 1, 6)
    await engine.park("w", 0, 1, signal="approve", fence=6)
    assert (await engine.finish("w", 0, 1, DONE, "zombie", fence=5)).why == "stale"
    assert (await engine.load_workflow_state("w")).steps[0].state is WAITING


async def test_a_compensation_reads_what_other_steps_made(queue, engine, driver, agents, work):
    undone = []

    @agents.agent("undo")
    async def undo(task):
        undone.append(task.input)

    @agents.agent("bad")
    async def bad(task):
        raise Reject("no")

    args = {"x": {"$ref": "a.n"}, "y": {"$ref": "b.n"}}
    plan = [
        {"id": "a", "action": "work"},
        {"id": "b", "action": "work", "compensate": {"action": "undo", "args": args}},
        {"id": "c", "action": "bad"},
    ]
    await driver.start(plan, id="w")
    async with serving(queue, engine, agents):
        assert (await engine.wait_end("w", 10)).status is TaskState.FAILED
    assert undone == [{"x": 1, "y": 1}]


async def test_a_child_whose_output_is_too_large_for_its_parent_ends_both(queue, place, agents):
    place[1].max_bytes = 2000
    engine = WorkflowEngine(place[1])

    @agents.agent("big")
    async def big(task):
        return "x" * 1500

    ends = [{"id": name, "action": "big", "depends_on": []} for name in "ab"]
    await Driver(engine, queue).start([child_of(*ends)], id="w")
    async with serving(queue, engine, agents):
        state = await engine.wait_end("w", 10)
    assert (state.status, state.error["type"]) == (TaskState.FAILED, "TaskTooLargeError")
    assert await status(engine, "w/0") is TaskState.COMPLETED


# -- planning


async def test_a_plan_that_is_asked_for_again_is_not_made_again(queue, engine, agents, work, monkeypatch):
    """The worker recorded what its planner said, and did not live to settle the plan's task."""
    asked = []
    real, lost = Driver.planned, [StoreError("Redis is away")]
    monkeypatch.setattr(runner, "AWAY", 0.05)

    async def planned(self, workflow_id, plan):
        await real(self, workflow_id, plan)
        if lost:
            raise lost.pop()

    @agents.agent("planner")
    async def planner(task):
        asked.append(task.id)
        return [{"action": "work", "args": {"try": len(asked)}}]

    monkeypatch.setattr(Driver, "planned", planned)
    await Driver(engine, queue, planner="planner").start("report", id="w")
    async with serving(queue, engine, agents):
        state = await engine.wait_end("w", 10)
        stats = await settled(queue)
    assert (state.status, state.steps[0].args) == (TaskState.COMPLETED, {"try": 1})
    assert not lost
    assert asked == ["w:plan"]
    assert work == [await first_id(engine)]
    assert stats.dead == 0


@pytest.mark.parametrize("name", ["w", "w" * 105])
async def test_a_parent_is_told_that_its_child_cannot_be_planned(queue, engine, agents, name):
    """The worker that plans it crashes each time, or the child's id is too long to be recorded."""
    driver = Driver(engine, queue, planner="planner")
    await driver.begin(a_task(name), Planned([{"action": "orchestra.workflow", "args": {"type": "work"}}], {}))
    if name == "w":
        (delivery,) = await queue.read("c1", 1, 1000)
        assert delivery.task().type == PLAN
        await queue.settle([(delivery, CRASHED)])
    async with serving(queue, engine, agents):
        state = await engine.wait_end(name, 10)
    assert (state.status, state.steps[0].state) == (TaskState.FAILED, FAILED)
    if name == "w":
        assert state.error["cause"]["reason"] == "crashed"
    else:
        assert "at most 106 characters" in state.error["message"]


async def test_a_plan_task_that_no_driver_made_is_buried_without_a_traceback(queue, engine, agents, caplog):
    await queue.produce({"id": "odd", "type": PLAN, "metadata": {STEP: ["wf", "w", -1, 1]}})
    async with serving(queue, engine, agents):
        letter = await buried(queue)
        await followed(engine, queue, letter)
    assert letter.reason == "corrupt_workflow"
    assert not [record for record in caplog.records if record.exc_info]


# -- the upkeep


async def test_a_dead_letter_of_a_namespace_that_nobody_met_yet_is_followed(manager, agents, work):
    queue = RedisStreamTaskQueue("wf", "workers", manager=manager)
    met, unmet = (WorkflowEngine(MemoryManager(manager, namespace=name)) for name in ("met", "unmet"))
    await Driver(unmet, queue).start([{"action": "work"}], id="w")
    await queue.settle([(await begun(unmet, queue), CRASHED)])
    async with serving(queue, met, agents):
        await followed(met, queue, await buried(queue))
        assert (await unmet.wait_end("w", 10)).status is TaskState.FAILED
    assert work == []


async def test_a_dead_letter_whose_step_is_no_step_does_not_end_the_upkeep(queue, engine, agents, work, caplog):
    await queue.produce({"id": "odd", "type": "work", "metadata": {STEP: [["x"], "w", 0, 1, ":0"]}})
    async with serving(queue, engine, agents):
        await followed(engine, queue, await buried(queue))
        await make(engine, [{"action": "work"}])  # only the sweep sends it
        assert (await engine.wait_end("w", 10)).status is TaskState.COMPLETED
    assert work == [await first_id(engine)]
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_full_queue_does_not_keep_the_upkeep_from_the_dead_letters(manager):
    queue = RedisStreamTaskQueue("wf", "workers", manager=manager, max_length=1)
    engine = WorkflowEngine(MemoryManager(manager, namespace="wf"))
    driver = Driver(engine, queue)
    await driver.start([{"action": "work"}], id="dies")
    await queue.settle([(await begun(engine, queue, "dies"), CRASHED)])
    await queue.produce({"id": "foreign", "type": "nobody"})
    with pytest.raises(QueueFullError):
        await driver.start([{"action": "work"}], id="unsent")
    upkeep = Upkeep(queue, {"wf": driver}, 0.05)
    await upkeep.start()
    try:
        assert (await engine.wait_end("dies", 10)).status is TaskState.FAILED
    finally:
        await upkeep.stop()
    assert await status(engine, "unsent") is TaskState.RUNNING


async def test_a_step_that_no_queue_takes_fails_its_workflow(manager):
    """Its task is too large with the metadata of the workflow's: no sweep would ever send it."""
    queue = RedisStreamTaskQueue("wf", "workers", manager=manager, max_task_bytes=1000)
    driver = Driver(WorkflowEngine(MemoryManager(manager, namespace="wf")), queue)
    await driver.start([{"action": "work"}], id="w", metadata={"x": "x" * 2000})
    await swept(driver, TaskState.FAILED)


# -- large plans


def test_what_depends_on_a_cycle_is_found_in_linear_time():
    cycle = [{"action": "x", "id": "a", "depends_on": ["b"]}, {"action": "x", "id": "b", "depends_on": ["a"]}]
    plan = cycle + [{"action": "x", "id": f"s{at}", "depends_on": ["a"]} for at in range(9998)]
    before = time.process_time()
    with pytest.raises(WorkflowError, match="circle"):
        validate_plan(plan)
    assert time.process_time() - before < 2


async def test_a_chain_of_ten_thousand_steps_moves_on_and_is_cancelled(engine):
    later = [{"action": "x", "id": f"s{at}", "depends_on": [f"s{at - 1}"]} for at in range(1, 10000)]
    await make(engine, [{"action": "x", "id": "s0"}, *later])
    assert [ready.index for ready in (await run(engine, 0)).ready] == [1]
    assert (await engine.cancel("w")).status is TaskState.CANCELLED
    state = await engine.load_workflow_state("w")
    assert [state.steps[at].state for at in (0, 1, -1)] == [DONE, SKIPPED, SKIPPED]
