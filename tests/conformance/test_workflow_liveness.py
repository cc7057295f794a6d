"""Whatever a driver forgets, the outbox remembers: every workflow ends although no answer is ever used but the sweep's.

A queue is played that keeps what was sent until it is settled, hands it out again when its worker dies, and never takes an
id twice. All that a commit answers about what may be sent next is thrown away.
"""

from __future__ import annotations

import random

import pytest

from orchestra._workflow.plan import compile_plan, item_step
from orchestra._workflow.twin import LocalWorkflows
from orchestra.memory import MemoryManager
from orchestra.tasks import BaseTask, TaskState
from orchestra.testing import ManualClock
from orchestra.workflow import StepState, WorkflowEngine, validate_plan

ID = "w"


@pytest.fixture(autouse=True)
def everything_adds_up():
    """That of the queues; here each test checks the record."""


class Forgetful:
    """A driver that only sweeps."""

    def __init__(self, engine, hasten, rng, plan):
        self.engine, self.hasten, self.rng, self.plan = engine, hasten, rng, compile_plan(plan)
        self.queue, self.known, self.fence = set(), set(), 0
        self.committed = []

    async def run(self):
        for _ in range(400):
            await self.control()
            await self.hasten()
            for _, moved in await self.engine.overdue():
                await self.swept(moved)
            for task in sorted(self.queue):
                if self.rng.random() < 0.7:
                    await self.deliver(*task)
            state = await self.engine.load_workflow_state(ID)
            if state.is_finished():
                return state
        raise AssertionError(f"it does not end: {state}")

    async def swept(self, moved):
        for index, series in moved.due:
            await self.engine.fire(ID, index, series)
        if moved.attention:
            await self.engine.next_phase(ID)
        for ready in moved.ready:
            await self.send(ready)

    async def send(self, ready):
        kind = ready.planned["action"]
        if kind == "orchestra.map":
            step = self.plan[ready.index]
            items = [{**item_step(step, k), "item": k, "index": k} for k in range(3)]
            most = self.rng.choice([None, 1, 2])
            await self.engine.grow(ID, items, parent=ready.index, series=ready.series, max_parallel=most)
        elif kind == "orchestra.signal":
            await self.engine.park(ID, ready.index, ready.series, signal=ready.planned["args"]["name"], due=5.0)
        elif kind == "orchestra.sleep":
            await self.engine.park(ID, ready.index, ready.series, timer=True, due=0.001)
        elif (ready.index, ready.series) not in self.known:  # the queue takes an id once
            self.known.add((ready.index, ready.series))
            self.queue.add((ready.index, ready.series))

    async def control(self):
        kind = self.rng.random()
        if kind < 0.05:
            await self.engine.pause(ID)
        elif kind < 0.35:
            state = await self.engine.load_workflow_state(ID)
            if state.phase == "paused":
                await self.engine.resume(ID)
        elif kind < 0.5:
            await self.engine.signal(ID, f"n{self.rng.randint(0, 1)}", 1)
        elif kind < 0.51:
            await self.engine.cancel(ID)

    async def deliver(self, index, series):
        rng, engine = self.rng, self.engine
        self.fence += 1
        fence = self.fence
        begun = await engine.begin(ID, index, series, fence)
        if begun.verdict != "go":
            self.queue.discard((index, series))
            return
        assert index not in self.committed, "a step whose result is recorded runs again"
        kind = rng.random()
        if kind < 0.15:
            return  # its worker dies; the queue hands it out again
        if kind < 0.3:
            await engine.retrying(ID, index, series, "later", 0.1, fence=fence)
            return
        if kind < 0.4:
            await engine.park(ID, index, series, signal=f"n{rng.randint(0, 1)}", due=5.0, fence=fence)
        else:
            end = StepState.FAILED if rng.random() < 0.15 else StepState.COMPLETED
            moved = await engine.finish(ID, index, series, end, index, fence=fence)
            if moved.done and moved.why == "":
                self.committed.append(index)
            if rng.random() < 0.2:
                return  # it dies between commit and settle
        self.queue.discard((index, series))


def a_plan(rng):
    plan = []
    for index in range(rng.randint(1, 9)):
        step = {"action": f"a{index}", "id": f"s{index}", "on_failure": rng.choice(["fail", "skip", "continue"])}
        kind = rng.random()
        if kind < 0.15:
            step |= {"action": "orchestra.map", "args": {"over": [1, 2, 3], "step": {"action": "each"}}}
        elif kind < 0.25:
            step |= {"action": "orchestra.signal", "args": {"name": f"n{rng.randint(0, 1)}"}}
        elif kind < 0.35:
            step |= {"action": "orchestra.sleep", "args": {"seconds": 0.001}}
        if index and rng.random() < 0.8:
            step["depends_on"] = sorted(rng.sample(range(index), rng.randint(1, min(index, 3))))
        if rng.random() < 0.5:
            step["compensate"] = {"action": "undo"}
        plan.append(step)
    return validate_plan(plan)


async def live(engine, hasten, seed):
    rng = random.Random(seed)
    plan = a_plan(rng)
    await engine.initialize_workflow(BaseTask(ID, "t"), plan, driven=True)
    driver = Forgetful(engine, hasten, rng, plan)
    state = await driver.run()
    assert len(driver.committed) == len(set(driver.committed))
    assert all(step.state in (StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED) for step in state.steps)
    if state.status is TaskState.COMPLETED:
        assert all(step.state is not StepState.FAILED or step.on_failure != "fail" or step.role for step in state.steps)
    undone = [step.parent for step in state.steps if step.role == "compensation"]
    if undone:
        order = {step.step_index: step.finished_at for step in state.steps}
        assert [order[index] for index in undone] == sorted((order[index] for index in undone), reverse=True)
        assert {i for i in undone} == {
            s.step_index for s in state.steps if s.compensate and s.state is StepState.COMPLETED and not s.role
        }
    return state.status


async def test_no_workflow_is_forgotten_in_this_process():
    ends = []
    for seed in range(150):
        clock = ManualClock()
        store = LocalWorkflows(clock.time)
        engine = WorkflowEngine(MemoryManager("memory:", namespace="live"))

        async def ours(store=store):
            return store

        async def hasten(clock=clock):
            clock.advance(8)

        engine._store = ours
        ends.append(await live(engine, hasten, seed))
    assert len(set(ends)) == 3, "completed, failed and cancelled"


@pytest.mark.parametrize("seed", range(6))
async def test_no_workflow_is_forgotten_on_redis(manager, seed):
    engine = WorkflowEngine(MemoryManager(manager, namespace="live"))
    store = await engine._store()

    async def hasten():
        state = await engine.load_workflow_state(ID)
        for step in state.steps:  # what waits with a time is due
            words = await manager.client.hget(store.keys.state(ID), f"w:{step.step_index}")
            if words and words.split(b" ")[2] != b"0":
                kind, mode, _, *name = words.split(b" ")
                past = b" ".join([kind, mode, b"1", *name])
                await manager.client.hset(store.keys.state(ID), f"w:{step.step_index}", past)
        for member in await manager.client.zrange(store.keys.outbox, 0, -1):
            await manager.client.zadd(store.keys.outbox, {member: 1})

    assert (await live(engine, hasten, 1_000 + seed)) in (TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED)
