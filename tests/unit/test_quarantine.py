"""A8: who is on a last hand-over runs alone, so that a crash convicts nobody else."""

from __future__ import annotations

import asyncio

import pytest

from orchestra._delivery import Delivery
from orchestra._dispatch.quarantine import Quarantine
from orchestra.agents import AgentRegistry
from orchestra.dispatcher import Dispatcher
from orchestra.memory_queue import InMemoryTaskQueue


def delivery(deliveries):
    return Delivery(2, b"1-1", (b"t", b""), "c", deliveries)


def test_only_the_last_hand_over_is_isolated():
    quarantine = Quarantine(3)
    free, last = [delivery(1), delivery(2)], delivery(3)
    assert quarantine.sift([*free, last], 0) == free
    assert quarantine.next_nowait(running=1) is None
    assert quarantine.next_nowait(running=0) is last
    assert quarantine.next_nowait(running=0) is None
    assert quarantine.shut


@pytest.mark.parametrize("most", [0, 1])
def test_without_a_budget_nothing_is_isolated(most):
    quarantine = Quarantine(most)
    assert len(quarantine.sift([delivery(1), delivery(2)], 0)) == 2
    assert not quarantine.shut


def test_a_worker_that_knows_of_suspects_becomes_empty_and_takes_one():
    quarantine = Quarantine(2)
    assert not quarantine.alone(running=0)
    quarantine.sift([], 5)
    assert quarantine.shut
    assert not quarantine.alone(running=3)
    assert quarantine.alone(running=0)
    quarantine.sift([delivery(2)], 4)
    assert not quarantine.alone(running=0), "one at a time"
    assert quarantine.next_nowait(running=0)
    quarantine.ended()
    quarantine.sift([], 0)
    assert not quarantine.shut, "others have taken the rest"


def test_what_waits_can_be_given_back():
    quarantine = Quarantine(2)
    quarantine.sift([delivery(2)], 0)
    assert quarantine.drop_nowait().deliveries == 2
    assert quarantine.drop_nowait() is None
    assert not quarantine.shut


async def handed_out_twice(ids):
    """A queue whose tasks were handed out once to somebody who died."""
    queue = InMemoryTaskQueue("tasks", "workers", 100, max_deliveries=2)
    await queue.produce_many([{"id": task_id, "type": "work"} for task_id in ids])
    taken = []
    while len(taken) < len(ids):
        taken += await queue.read("dead", len(ids), 1000)
    return queue


async def test_suspects_run_one_at_a_time_and_beside_nothing():
    queue = await handed_out_twice([f"suspect-{n}" for n in range(4)])
    running, crowd, seen = set(), [], []
    agents = AgentRegistry()

    async def work(task):
        running.add(task.id)
        await asyncio.sleep(0.02)
        crowd.append(frozenset(running))
        running.discard(task.id)
        seen.append(task.id)

    agents.register("work", work)
    async with Dispatcher(queue, agents=agents), asyncio.timeout(20):
        for n in range(6):
            await queue.produce({"id": f"other-{n}", "type": "work"})
        while len(seen) < 10:
            await asyncio.sleep(0.01)
    assert sorted(seen) == sorted([f"suspect-{n}" for n in range(4)] + [f"other-{n}" for n in range(6)])
    assert all(len(beside) == 1 for beside in crowd if any(name.startswith("suspect") for name in beside))
    assert (await queue.stats()).counters["completed"] == 10


async def test_a_suspect_that_waits_goes_back_when_the_worker_stops():
    queue = await handed_out_twice(["suspect"])
    await queue.produce({"id": "slow", "type": "work"})
    started, go = asyncio.Event(), asyncio.Event()
    agents = AgentRegistry()

    async def work(task):
        assert task.id == "slow"
        started.set()
        await go.wait()

    agents.register("work", work)
    dispatcher = Dispatcher(queue, agents=agents, drain_timeout=5.0)
    async with dispatcher, asyncio.timeout(20):
        await started.wait()
        while not dispatcher._quarantine.waiting:
            await asyncio.sleep(0.01)
        assert dispatcher.held == 2
        asyncio.get_running_loop().call_later(0.05, go.set)
    stats = await queue.stats()
    assert stats.live == 1
    assert stats.counters["released"] == 1
