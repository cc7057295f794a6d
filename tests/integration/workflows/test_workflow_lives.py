"""Workflows that outlive what the queue remembers of them: steps sent twice, ids used again, plans and tasks that vanish."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from orchestra._delivery import STEP, Again, Sooner
from orchestra._workflow import making, record, upkeep
from orchestra._workflow.driver import Driver, step_task_id
from orchestra._workflow.making import PLAN
from orchestra._workflow.planning import Planned
from orchestra._workflow.runner import StepRunner
from orchestra.dispatcher import Dispatcher
from orchestra.errors import RetryLater
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.tasks import BaseTask, Cancellation, Outcome, TaskState
from orchestra.workflow import Ready, StepState, WorkflowEngine
from tests.integration.noting import Killed
from tests.waiting import settled, until

DONE, FAILED, SKIPPED = StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED
PENDING, RUNNING, WAITING = StepState.PENDING, StepState.RUNNING, StepState.WAITING


@pytest.fixture
def forgetful(engine, monkeypatch):
    """Ended workflows are forgotten at once; returns a coroutine function that waits for it."""
    engine._retention_ms = 1

    async def gone(name="w"):
        async with asyncio.timeout(20):
            while await engine.load_workflow_state(name) is not None:
                await asyncio.sleep(0.005)

    return gone


def serving(queue, engine, agents, **options):
    """A worker that looks after its workflows often."""
    return Dispatcher(queue, agents=agents, workflows=StepRunner(engine, queue, agents=agents, sweep=0.05, **options))


async def loaded(engine, name="w"):
    state = await engine.load_workflow_state(name)
    assert state is not None
    return state


# -- one step, two tasks


async def sent_twice(driver, engine, queue):
    """A workflow of one step whose task lies twice in the queue: its dedup window was over when it was swept."""
    await driver.start([{"action": "work"}], id="w")
    state = await loaded(engine)
    second = driver._step_task("w", Ready(0, 1, state.plan[0]), state.task)
    await queue.produce({**second, "id": "forgotten"})
    assert await queue.get_queue_depth() == 2


async def test_of_two_tasks_of_one_step_the_first_to_begin_runs(queue, engine, driver, agents):
    """Both have fence 1, and both are delivered while the step runs."""
    ran, go = [], asyncio.Event()

    @agents.agent("work")
    async def work(task):
        ran.append(task.id)
        await go.wait()
        return len(ran)

    await sent_twice(driver, engine, queue)
    async with serving(queue, engine, agents) as dispatcher:
        await until(lambda: dispatcher.outcomes[Outcome.COMPLETED] or len(ran) > 1)
        assert len(ran) == 1, "the second ended without a run"
        go.set()
        assert (await engine.wait_end("w", 20)).workflow_context["final_output"] == 1
        await settled(queue)


async def test_the_second_task_of_a_step_waits_for_no_retry_of_the_first(queue, engine, driver, agents):
    """The first runs again by itself; what its attempts are counted by is its own."""
    ran = []

    @agents.agent("work")
    async def work(task):
        ran.append((task.id, task.attempt))
        if task.attempt < 3:
            raise RetryLater(0.05)
        return "ok"

    await sent_twice(driver, engine, queue)
    async with serving(queue, engine, agents):
        assert (await engine.wait_end("w", 20)).status is TaskState.COMPLETED
        await settled(queue)
    assert len({name for name, _ in ran}) == 1, ran


async def test_the_death_of_the_second_task_is_not_that_of_the_step(queue, engine, driver):
    await sent_twice(driver, engine, queue)
    first, second = await queue.read("c1", 2, 1000)
    claims = [delivery.task().metadata[STEP][4] for delivery in (first, second)]
    assert (await engine.begin("w", 0, 1, first.fence, claims[0])).verdict == "go"
    assert (await engine.begin("w", 0, 1, first.fence, claims[0])).verdict == "go", "a lost reply"
    for fence in (1, 2, 7):
        assert (await engine.begin("w", 0, 1, fence, claims[1])).verdict == "stale"
    moved = await engine.finish("w", 0, 1, FAILED, error="crashed", claim=claims[1])
    assert (moved.done, moved.why) == (False, "stale")
    assert (await engine.finish("w", 0, 1, DONE, "x", fence=1, claim=claims[0])).status is TaskState.COMPLETED


async def test_a_new_series_is_free_for_any_task(engine, driver):
    await driver.start([{"action": "work"}], id="w")
    life = (await loaded(engine)).task["life"]
    assert (await engine.begin("w", 0, 1, 1, f"{life}:5")).verdict == "go"
    await engine.finish("w", 0, 1, FAILED, fence=1, claim=f"{life}:5")
    assert [(ready.index, ready.series) for ready in (await engine.resume("w")).ready] == [(0, 2)]
    assert (await engine.begin("w", 0, 2, 1, f"{life}:6")).verdict == "go"


# -- one id, two workflows


async def test_an_id_that_is_free_again_can_be_used_at_once(queue, engine, driver, agents, forgetful):
    """The queue still knows the tasks of the earlier life; the steps of the new one have other ids."""
    ran = []

    @agents.agent("work")
    async def work(task):
        ran.append(task.id)
        return len(ran)

    plan = [{"action": "work"}, {"action": "work"}]
    async with serving(queue, engine, agents):
        for life in (1, 2, 3):
            await driver.start(plan, id="w")
            await until(lambda life=life: len(ran) == 2 * life)
            await forgetful()
    assert len(set(ran)) == 6


async def test_what_an_earlier_life_left_in_the_queue_does_not_begin_a_step_of_the_next(
    queue, engine, driver, forgetful
):
    await driver.start([{"action": "work"}], id="w")
    (old,) = await queue.read("c1", 1, 1000)
    await driver.cancel("w")
    await forgetful()
    await driver.start([{"action": "work"}], id="w")
    claim = old.task().metadata[STEP][4]
    assert (await engine.begin("w", 0, 1, old.fence, claim)).verdict == "stale"
    assert (await engine.finish("w", 0, 1, FAILED, error="crashed", claim=claim)).why == "stale"
    assert (await loaded(engine)).steps[0].state is PENDING


async def test_a_workflow_that_workers_plan_can_be_started_again(queue, engine, agents, forgetful):
    asked, ran = [], []

    @agents.agent("planner")
    async def planner(task):
        asked.append(task.id)
        return [{"action": "work"}]

    @agents.agent("work")
    async def work(task):
        ran.append(task.id)

    driver = Driver(engine, queue, planner="planner")
    async with serving(queue, engine, agents):
        for life in (1, 2):
            await driver.start("report", {"q": 1}, id="w")
            await until(lambda life=life: len(ran) == life)
            await forgetful()
    assert len(asked) == 2


def a_child(**args):
    return {"id": "child", "action": "orchestra.workflow", "args": args, "depends_on": []}


async def test_a_child_of_an_earlier_life_is_not_taken_for_that_of_the_next(queue, engine, driver, agents):
    """The child of the first life outlives its parent, which is forgotten; it is waited for, then replaced."""
    plan = [a_child(plan=[{"action": "work"}])]
    await driver.start(plan, id="w")
    (old,) = await queue.read("c1", 1, 1000)
    assert (await engine.begin("w/0", 0, 1, old.fence, old.task().metadata[STEP][4])).verdict == "go"
    engine._retention_ms = 1
    await engine.cancel("w")
    await engine.next_phase("w")
    async with asyncio.timeout(20):
        while await engine.load_workflow_state("w") is not None:
            await asyncio.sleep(0.005)
    engine._retention_ms = 60_000
    await driver.start(plan, id="w")
    assert (await loaded(engine)).steps[0].state is PENDING, "the old child still runs"
    await driver.send("w/0", await engine.finish("w/0", 0, 1, DONE, "old", fence=old.fence))
    assert (await loaded(engine)).steps[0].state is PENDING, "its end is not that of the new one"

    @agents.agent("work")
    async def work(task):
        return "new"

    async with serving(queue, engine, agents):
        state = await engine.wait_end("w", 20)
    assert (state.status, state.workflow_context["final_output"]) == (TaskState.COMPLETED, "new")


# -- planning


async def test_a_workflow_whose_planning_was_not_sent_is_planned_by_the_sweep(queue, engine, agents, monkeypatch):
    """The process dies between the record of the workflow and the task that asks for its plan."""

    async def killed(self, tasks):
        raise Killed

    driver = Driver(engine, queue, planner="planner")
    with monkeypatch.context() as crash:
        crash.setattr(type(queue), "produce_many", killed)
        with pytest.raises(Killed):
            await driver.start("report", {"q": 1}, id="w")
    state = await loaded(engine)
    assert (state.status, state.plan[0]["action"]) == (TaskState.RUNNING, PLAN)
    assert await queue.get_queue_depth() == 0

    @agents.agent("planner")
    async def planner(task):
        return [{"action": "work", "args": {"of": task.input["task"]["type"]}}]

    @agents.agent("work")
    async def work(task):
        return task.input

    async with serving(queue, engine, agents):
        state = await engine.wait_end("w", 20)
    assert (state.workflow_context["final_output"], state.task["input"]) == ({"of": "report"}, {"q": 1})


async def test_a_signal_that_comes_before_the_plan_is_kept(engine, queue):
    driver = Driver(engine, queue, planner="planner")
    await driver.start("report", id="w")
    made = (await loaded(engine)).created_at
    assert await driver.signal("w", "go", 7)
    await driver.planned("w", Planned([{"action": "orchestra.signal", "args": {"name": "go"}}], {"plan_source": "x"}))
    state = await loaded(engine)
    assert (state.status, state.steps[0].result, state.created_at) == (TaskState.COMPLETED, 7, made)
    assert state.workflow_context["plan_source"] == "x"
    kinds = [event.kind async for event in engine.events("w") if event.kind.startswith("workflow.")]
    assert kinds == ["workflow.started", "workflow.planned", "workflow.completed"]
    await driver.planned("w", Planned([{"action": "other"}], {}))  # too late, and it changes nothing
    assert (await loaded(engine)).plan[0]["action"] == "orchestra.signal"


async def test_a_plan_that_is_asked_for_is_cancelled_paused_and_resumed_as_any_step(engine, queue, agents):
    driver = Driver(engine, queue, planner="planner")
    await driver.start("report", id="w")
    await driver.start("report", id="other")
    assert await driver.cancel("w")
    assert (await loaded(engine)).status is TaskState.CANCELLED
    assert await driver.pause("other")
    asked = []

    @agents.agent("planner")
    async def planner(task):
        asked.append(task.id)
        return [{"action": "work"}]

    @agents.agent("work")
    async def work(task):
        return 1

    async with serving(queue, engine, agents):
        await settled(queue)
        assert asked == []
        await driver.resume("other")
        assert (await engine.wait_end("other", 20)).status is TaskState.COMPLETED
    assert asked == ["other:plan"]


async def test_a_planner_that_never_answers_is_told_of_in_the_record(engine, queue, agents):
    """Its process dies each time: what waits for the workflow learns of it, and a resume asks again."""
    driver = Driver(engine, queue, planner="planner")
    await driver.start("report", id="w")
    (found,) = await queue.consume("c1", 1, 1000)
    await queue.add_to_dlq(*found, {"error": "it crashed", "reason": "crashed"})
    async with serving(queue, engine, agents):
        state = await engine.wait_end("w", 20)
    assert (state.status, state.error["message"]) == (TaskState.FAILED, "it crashed")
    await driver.resume("w")
    assert (await loaded(engine)).steps[0].series == 2


async def test_a_child_that_nobody_waits_for_yet_ends_with_its_parent_when_it_is_planned(
    engine, queue, agents, monkeypatch
):
    """Who recorded it died before the parent waited for it; then the parent was cancelled, and knows of no child."""

    async def killed(*args, **kwargs):
        raise Killed

    driver = Driver(engine, queue, planner="planner")
    with monkeypatch.context() as crash:
        crash.setattr(WorkflowEngine, "park", killed)
        with pytest.raises(Killed):
            await driver.begin(BaseTask("w", "kind"), Planned([a_child(type="report")], {}))
    assert (await engine.cancel("w")).status is TaskState.CANCELLED

    @agents.agent("planner")
    async def planner(task):
        return [{"action": "orchestra.signal", "args": {"name": "never"}}]

    async with serving(queue, engine, agents):
        state = await engine.wait_end("w/0", 20)
        await settled(queue)
    assert (state.status, state.plan[0]["action"]) == (TaskState.CANCELLED, "orchestra.signal")


# -- the task of a step, cancelled by its id


@pytest.fixture
def work(agents):
    """The ids of the tasks that the agent ``work`` ran."""
    ran = []

    @agents.agent("work")
    async def run(task):
        ran.append(task.id)
        return len(ran)

    return ran


async def first_id(engine, name="w", series=1):
    return step_task_id(name, 0, series, await engine.life(name))


def was_cancelled(step):
    return step.state is SKIPPED and step.error["code"] == "task_cancelled"


async def untold(queue):
    return await queue.cancelled_steps.steps(10)


async def test_a_step_whose_waiting_task_is_cancelled_is_skipped(queue, engine, driver, agents, work):
    """What comes after it goes on at once, not when the queue has forgotten the id."""
    await driver.start([{"action": "work"}, {"action": "work"}], id="w")
    assert await queue.cancel(await first_id(engine)) is Cancellation.CANCELLED
    async with serving(queue, engine, agents):
        state = await engine.wait_end("w", 20)
        await settled(queue)
    assert was_cancelled(state.steps[0])
    assert (state.status, state.steps[1].state, len(work)) == (TaskState.COMPLETED, DONE, 1)
    assert await untold(queue) == []


async def test_a_step_that_is_cancelled_while_it_waits_for_its_retry_is_skipped(queue, engine, driver, agents, work):
    """It is not in the outbox: no sweep would ever send it."""
    await driver.start([{"action": "work"}], id="w")
    (delivery,) = await queue.read("c1", 1, 1000)
    where = ("w", 0, 1)
    await engine.begin(*where, delivery.fence, delivery.task().metadata[STEP][4])
    await engine.retrying(*where, "busy", 3000, fence=delivery.fence)
    await queue.settle([(delivery, Again(3000.0, "retried"))])
    assert await queue.cancel(await first_id(engine)) is Cancellation.CANCELLED
    async with serving(queue, engine, agents):
        assert was_cancelled((await engine.wait_end("w", 20)).steps[0])
    assert work == []


async def test_a_step_that_is_cancelled_by_its_settling_is_skipped(queue, engine, driver, agents, work):
    """Its holder gives it back, finds the mark, and ends the task; the record says that it is to run again."""
    await driver.start([{"action": "work"}], id="w")
    (delivery,) = await queue.read("c1", 1, 1000)
    assert await queue.cancel(await first_id(engine)) is Cancellation.REQUESTED
    await queue.settle([(delivery, Again(3000.0, "released"))])
    assert (await queue.stats()).live == 0
    async with serving(queue, engine, agents):
        assert was_cancelled((await engine.wait_end("w", 20)).steps[0])
    assert work == []


async def test_a_step_that_is_cancelled_in_the_hands_of_a_busy_worker_does_not_run(queue, engine, driver, agents):
    """It was taken ahead of its turn; the worker hears of the mark before there is a slot for it."""
    ran, go = [], asyncio.Event()

    @agents.agent("work")
    async def work(task):
        ran.append(task.id.partition(":")[0])
        await go.wait()

    await driver.start([{"action": "work"}], id="first")
    await driver.start([{"action": "work"}], id="w")
    runner = StepRunner(engine, queue, agents=agents, sweep=0.05)
    async with Dispatcher(queue, agents=agents, workflows=runner, max_concurrent_dispatch=1) as dispatcher:
        await until(lambda: ran)
        name = await first_id(engine)
        if await queue.cancel(name) is Cancellation.REQUESTED:
            await until(lambda: dispatcher.outcomes is not None and marked(queue, name))
        go.set()
        state = await engine.wait_end("w", 20)
        await settled(queue)
    assert was_cancelled(state.steps[0])
    assert ran == ["first"]


def marked(queue, name):
    marks = queue._store._marks if isinstance(queue, InMemoryTaskQueue) else queue._cancels._marks
    return name in marks


async def test_a_workflow_whose_planning_is_cancelled_fails_and_can_be_resumed(queue, engine, agents, work):
    driver = Driver(engine, queue, planner="planner")

    @agents.agent("planner")
    async def planner(task):
        return [{"action": "work"}]

    await driver.start("report", id="w")
    assert await queue.cancel(await first_id(engine)) is Cancellation.CANCELLED
    async with serving(queue, engine, agents):
        state = await engine.wait_end("w", 20)
        assert (state.status, state.error["code"]) == (TaskState.FAILED, "task_cancelled")
        await driver.resume("w")
        assert (await engine.wait_end("w", 20)).status is TaskState.COMPLETED
    assert len(work) == 1


async def test_a_cancelled_timer_changes_nothing(queue, engine, driver, agents):
    """The outbox ends the sleep, a little later than the timer would have."""
    await driver.start([{"action": "orchestra.sleep", "args": {"seconds": 0.3}}], id="w")
    state = await loaded(engine)
    assert await queue.cancel(f"{await first_id(engine)}:t") is Cancellation.CANCELLED
    async with serving(queue, engine, agents):
        state = await engine.wait_end("w", 20)
        assert (state.status, state.steps[0].state) == (TaskState.COMPLETED, DONE)
        assert await untold(queue) == []


async def test_a_cancelled_task_that_only_speaks_of_steps_is_dropped(queue, engine, driver, agents, work):
    await queue.produce({"id": "odd", "type": "work", "input": STEP})
    await queue.produce({"id": "gone", "type": "work", "metadata": {STEP: ["wf", "gone", 0, 1, ":0"]}})
    for name in ("odd", "gone"):
        assert await queue.cancel(name) is Cancellation.CANCELLED
    assert sorted(name for name, _ in await untold(queue)) == ["gone", "odd"]
    await driver.start([{"action": "work"}], id="w")
    async with serving(queue, engine, agents):
        await engine.wait_end("w", 20)
        async with asyncio.timeout(20):
            while await untold(queue):
                await asyncio.sleep(0.01)


async def test_who_dies_telling_of_a_cancelled_step_tells_again(queue, engine, driver, agents, work, monkeypatch):
    await driver.start([{"action": "work"}], id="w")
    await queue.cancel(await first_id(engine))
    look = upkeep.Upkeep(queue, {"wf": driver}, 0.05)

    async def killed(self, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as crash:
        crash.setattr(WorkflowEngine, "finish", killed)
        with pytest.raises(Killed):
            await look._tell_cancelled()
    assert len(await untold(queue)) == 1
    await look._tell_cancelled()
    assert was_cancelled((await loaded(engine)).steps[0])
    assert await untold(queue) == []


# -- large plans


@pytest.mark.parametrize(("steps", "elsewhere"), [(5, False), (2000, True)])
async def test_a_large_plan_does_not_hold_up_the_event_loop(engine, monkeypatch, steps, elsewhere):
    """What takes long for one is done in a thread: its check, the making of its record, and its reading."""
    threads = {}

    def noting(name, real):
        def call(*args, **kwargs):
            threads[name] = threading.get_ident()
            return real(*args, **kwargs)

        return call

    for module, name in ((making, "validate_plan"), (record, "encode_new"), (record, "decode_state")):
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    plan = [{"action": "x"} for _ in range(steps)]
    assert await engine.initialize_workflow(BaseTask("w", "kind"), plan, driven=True) is not None
    assert [name for name in threads if threads[name] != threading.get_ident()] == (list(threads) if elsewhere else [])
    threads.clear()
    assert len((await loaded(engine)).steps) == steps
    assert (threads["decode_state"] != threading.get_ident()) is elsewhere
    nested = [{"action": "orchestra.workflow", "args": {"plan": plan}}]
    await making.checked_plan(nested)
    assert (threads["validate_plan"] != threading.get_ident()) is elsewhere


# -- a workflow that changes while it is planned


def planner_that_waits(agents):
    """Registers ``planner`` and ``work``; events: it was asked, it may answer; and how often it was asked."""
    entered, go, asked = asyncio.Event(), asyncio.Event(), []

    @agents.agent("planner")
    async def planner(task):
        asked.append(task.id)
        entered.set()
        await go.wait()
        return [{"action": "work"}]

    @agents.agent("work")
    async def work(task):
        return 1

    return entered, go, asked


async def test_a_pause_while_a_planner_thinks_holds_its_plan(queue, engine, agents):
    driver = Driver(engine, queue, planner="planner")
    entered, go, asked = planner_that_waits(agents)
    await driver.start("report", id="w")
    async with serving(queue, engine, agents):
        await entered.wait()
        assert await driver.pause("w")
        go.set()
        await settled(queue)
        state = await loaded(engine)
        assert (state.phase, state.steps[0].action, state.steps[0].state) == ("paused", "work", PENDING)
        assert await driver.resume("w")
        assert (await engine.wait_end("w", 20)).status is TaskState.COMPLETED
    assert len(asked) == 1


async def test_a_cancel_that_nobody_interrupts_the_planner_for_ends_the_workflow(queue, engine, agents):
    """Whoever cancelled it died before the planner's task was interrupted."""
    driver = Driver(engine, queue, planner="planner")
    entered, go, _ = planner_that_waits(agents)
    await driver.start("report", id="w")
    async with serving(queue, engine, agents):
        await entered.wait()
        await engine.cancel("w")
        go.set()
        assert (await engine.wait_end("w", 20)).status is TaskState.CANCELLED


async def test_a_signal_is_known_by_its_call_after_the_plan_too(queue, engine):
    driver = Driver(engine, queue, planner="planner")
    await driver.start("report", id="w")
    store = await engine._store()
    call = ("signal", "w", 60_000, 1 << 20, ("go", b"\x07", "token", b""))
    assert (await store.move(*call))[0] == 1
    await driver.planned("w", Planned([{"action": "work"}], {}))
    assert (await store.move(*call))[:2] == [1, b"repeated"], "its reply was lost"


@pytest.mark.parametrize(("counter", "moved"), [("retried", 0), ("throttled", 1)])
async def test_a_retry_is_not_hastened(queue, counter, moved):
    await queue.produce({"id": "t", "type": "x"})
    (found,) = await queue.read("c1", 1, 1000)
    await queue.settle([(found, Again(30.0, counter))])
    now = time.monotonic()
    assert await queue.delays.hasten([Sooner("t", now + 30, now + 1)]) == moved
