"""The engine under faults: retries, order, pressure.

Every test ends with the same check: each task is terminal exactly once and the counters add up.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from orchestra import _execution
from orchestra.dispatcher import Dispatcher
from orchestra.errors import (
    QueueFullError,
    RetryLater,
    Throttled,
    WorkerPoolError,
)
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.scheduler import PriorityScheduler
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Outcome, Retry, RetryBudget, TaskPriority
from orchestra.testing import Recorder
from tests.faults._engine import letters_of
from tests.waiting import settled, until

# -- H: retries, order, pressure


async def test_no_retry_starts_before_its_backoff_has_passed_by_redis_clock(queue, agents, manager):
    """H6: start − fail ≥ backoff(n), for backoff, ``RetryLater`` and ``Throttled``; both moments told by Redis."""
    failed, early = {}, []

    async def redis_ms():
        seconds, micros = await manager.client.time()
        return seconds * 1000 + micros / 1000

    async def agent(task):
        now = await redis_ms()
        if task.id in failed:
            at, wait = failed.pop(task.id)
            if now - at < wait * 1000:
                early.append((task.id, now - at, wait))
        kind, tries = task.input, task.attempt
        if kind == "throttled" and task.fence < 3:
            failed[task.id] = (await redis_ms(), 0.0333)
            raise Throttled(0.0333)
        if tries < 3 and kind != "throttled":
            wait = 0.0217 * 2 ** (tries - 1) if kind == "backoff" else 0.0451
            failed[task.id] = (await redis_ms(), wait)
            raise ValueError if kind == "backoff" else RetryLater(wait)

    agents.register("work", agent, retry=Retry(base=0.0217, jitter=False))
    kinds = ("backoff", "asked", "throttled")
    await queue.produce_many([{"id": f"t{n}", "type": "work", "input": kinds[n % 3]} for n in range(60)])
    async with Dispatcher(queue, agents=agents, retry_budget=None):
        stats = await settled(queue)
    assert early == []
    assert stats.counters["completed"] == 60
    assert stats.counters["retried"] == 80


async def test_attempts_are_counted_whatever_crashes_between_them(queue, agents, manager):
    """H7: attempts ≤ max_retries + 1, and executions ≤ that plus the hand-overs that were lost to crashes."""
    runs = []

    async def agent(task):
        runs.append((task.attempt, task.fence))
        raise ValueError

    agents.register("work", agent, retry=Retry(max_retries=2, base=0.01, jitter=False))
    await queue.produce({"id": "t", "type": "work"})
    crashes, lost = 0, queue
    for _ in range(3):
        for consumer in ("ghost-a", "ghost-b"):  # read it, and never come back
            if await lost.read(consumer, 1, 100) or await lost.reclaim(consumer, 1, 0):
                crashes += 1
        (delivery,) = await lost.reclaim("survivor", 1, 0)
        crashes += 1
        await lost.settle([(delivery, _execution.RELEASED.verdict)])
    async with Dispatcher(queue, agents=agents):
        stats = await settled(queue)
    letter = (await letters_of(queue))["t"]
    assert crashes == 9
    assert [attempt for attempt, _ in runs] == [1, 2, 3]
    assert [fence for _, fence in runs] == sorted({fence for _, fence in runs})
    assert runs[0][1] > crashes, "each hand-over has its own fence"
    assert (letter.reason, letter.attempts, stats.dead) == ("failed", 3, 1)


async def test_urgent_work_goes_first_and_the_lowest_lane_gets_its_share(queue, agents):
    """H8: with the HIGH lane full all the time, LOW tasks are served too; among what is held HIGH goes first.

    Aging within the worker is shortened from seconds to milliseconds, so that its steady state comes at once.
    """
    order, stop = [], asyncio.Event()

    async def agent(task):
        order.append(task.priority)
        await asyncio.sleep(0.0005)

    async def flood():
        while not stop.is_set():
            if sum((await queue.stats()).waiting[:2]) < 100:
                await queue.produce_many([{"type": "work", "priority": TaskPriority.HIGH} for _ in range(100)])
            await asyncio.sleep(0.005)

    agents.register("work", agent)
    await queue.produce_many([{"type": "work", "priority": TaskPriority.LOW} for _ in range(20)])
    flooding = asyncio.create_task(flood())
    async with asyncio.timeout(30):
        while not sum((await queue.stats()).waiting[:2]):
            await asyncio.sleep(0.002)
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=2, aging=0.02):
        await until(lambda: order.count(TaskPriority.LOW) >= 8, 60)
        stop.set()
        await flooding
        share = order.count(TaskPriority.LOW) / len(order)
        await settled(queue)
    assert order[0] == TaskPriority.HIGH
    assert share > 1 / 600, share


@pytest.mark.parametrize("concurrency", [1, 8])
async def test_a_lane_is_served_in_order(queue, agents, concurrency):
    """H9: one consumer, no retries: tasks start in the order of their stream ids."""
    started = []

    async def agent(task):
        started.append(task.id)
        if concurrency > 1 and len(started) % 7 == 0:
            await asyncio.sleep(0)

    agents.register("work", agent)
    ids = await queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(500)])
    assert ids == sorted(ids, key=lambda text: tuple(map(int, text.partition(":")[2].split("-"))))
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=concurrency):
        await settled(queue)
    assert started == [f"t{n}" for n in range(500)]


async def test_no_worker_is_needed_for_delayed_tasks_to_become_due(queue, agents, manager):
    """H10: the worker that promoted dies for good; every other one promotes, and no task is lost or doubled."""
    other, done = RedisStreamTaskQueue("tasks", "workers", 5_000, manager=manager), []

    async def agent(task):
        done.append(task.id)

    agents.register("work", agent)
    first = await Dispatcher(other, agents=agents).start()
    await queue.produce_many([{"id": f"t{n}", "type": "work", "delay": 0.05 + n / 100} for n in range(50)])
    await until(lambda: len(done) >= 3)
    for loop in list(first._loops):
        loop.cancel()  # as dead as a process: it reads, promotes and settles no more
    async with Dispatcher(queue, agents=agents):
        assert await queue.produce({"id": "last", "type": "work", "delay": 0.2})
        await until(lambda: "last" in done)
        async with asyncio.timeout(30):
            while (await queue.stats()).delayed:
                await asyncio.sleep(0.01)
        for delivery in [each for lane in other.held for each in lane.values()]:  # as if its lease had run out
            delivery.abandoned = True
            lane, entry = other.keys.streams[delivery.stream], delivery.entry
            await manager.client.xclaim(lane, "workers", first.consumer, 0, [entry], idle=60_000, justid=True)
        first._draining = True
        stats = await settled(queue)
    await first.stop()
    await other.close()
    assert stats.counters["completed"] == 51
    assert set(done) == {f"t{n}" for n in range(50)} | {"last"}


async def test_a_full_queue_pushes_back_and_loses_nothing(queue, agents, manager):
    """H13: a producer faster than its workers is refused with a time to wait; the bound holds, nothing is trimmed."""
    small, done, refused = RedisStreamTaskQueue("tasks", "workers", manager=manager, max_length=50), set(), []

    async def agent(task):
        done.add(task.id)
        await asyncio.sleep(0.001)

    agents.register("work", agent)
    longest = 0
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=5):
        for start in range(0, 400, 20):
            while True:
                try:
                    await small.produce_many([{"id": f"t{n}", "type": "work"} for n in range(start, start + 20)])
                    break
                except QueueFullError as full:
                    refused.append(full.retry_after)
                    await asyncio.sleep(min(full.retry_after, 0.02))
            longest = max(longest, await small.get_queue_depth())
        stats = await settled(queue)
    await small.close()
    assert refused
    assert all(seconds > 0 for seconds in refused)
    assert longest <= 50
    assert (len(done), stats.counters["completed"]) == (400, 400)


async def test_a_scheduler_with_a_limit_bounds_what_is_read(queue, agents):
    """H14: a local queue smaller than the worker's room is no reason to lose a delivery, nor to stop reading."""
    done = []

    async def agent(task):
        done.append(task.id)
        await asyncio.sleep(0.001)

    agents.register("work", agent)
    await queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(200)])
    scheduler = PriorityScheduler(max_size=3)
    with Recorder("service.loop_failed") as recorder:
        async with Dispatcher(queue, scheduler, agents=agents, max_concurrent_dispatch=50):
            await settled(queue)
    assert recorder.events == []
    assert sorted(done) == sorted(f"t{n}" for n in range(200))


async def test_a_shared_pool_that_is_full_or_shut_down_loses_no_task(queue, agents):
    """H14: submit to a full pool, during and after shutdown is a typed error; the queue's tasks are not lost."""
    limits = OrchestrationWorkerPoolConfig(workers=2, max_concurrent_tasks=2, max_queue_size=1)
    pool, gate, done = QueueWorkerPool("shared", limits), asyncio.Event(), []

    async def agent(task):
        done.append(task.id)
        await gate.wait()

    agents.register("work", agent)
    await queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(6)])
    dispatcher = await Dispatcher(queue, worker_pool=pool, agents=agents, drain_timeout=0.1).start()
    await until(lambda: len(done) == 2)
    waiting = await pool.submit(asyncio.sleep, 0)
    with pytest.raises(WorkerPoolError, match="max_queue_size"):
        await pool.submit(asyncio.sleep, 0)
    ending = asyncio.ensure_future(pool.shutdown(wait=True, timeout=0.2))
    await asyncio.sleep(0)
    with pytest.raises(WorkerPoolError, match="shut down"):
        await pool.submit(asyncio.sleep, 0)
    await ending
    await dispatcher.stop()
    assert waiting.done()
    gate.set()
    async with Dispatcher(queue, agents=agents):
        stats = await settled(queue)
    assert stats.counters["completed"] == 6
    assert stats.counters.get("retried", 0) == stats.dead == 0


async def test_submitting_in_a_loop_settles_each_message_with_its_own_task(queue):
    """H15: the specification's loop over messages, with two of them in flight: each job gets its own arguments."""
    await queue.produce_many([{"id": f"t{n}", "type": "x", "input": n} for n in range(2)])
    pool, acked = QueueWorkerPool("spec", OrchestrationWorkerPoolConfig(workers=2)), {}

    async def process(message_id, task_data):
        await asyncio.sleep(0.001)
        acked[task_data["id"]] = (message_id, await queue.acknowledge(message_id))

    messages = await queue.consume("c", 2, 1000)
    futures = [await pool.submit(process, message_id, task_data) for message_id, task_data in messages]
    await asyncio.gather(*futures)
    await pool.shutdown()
    assert acked == {task_data["id"]: (message_id, True) for message_id, task_data in messages}
    await settled(queue)


async def test_a_task_that_waits_for_its_retry_holds_nothing(queue, agents):
    """H16: retries wait in the delayed set: no slot, no delivery, no lease; others run meanwhile."""
    done = []

    async def agent(task):
        if task.input == "fails" and task.attempt == 1:
            raise RetryLater(1.0)
        done.append(task.id)

    agents.register("work", agent)
    await queue.produce({"id": "fails", "type": "work", "input": "fails"})
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
        await until(lambda: dispatcher.outcomes[Outcome.FAILED] == 1)
        async with asyncio.timeout(20):
            while not (stats := await queue.stats()).delayed:
                await asyncio.sleep(0.001)
        assert (sum(stats.in_flight), dispatcher.held, any(queue.held)) == (0, 0, False)
        await queue.produce({"id": "other", "type": "work"})
        await until(lambda: done == ["other"])
        await settled(queue)
    assert done == ["other", "fails"]


async def test_a_storm_of_retries_is_spread_and_none_is_lost(queue, agents):
    """H5: 60 tasks fail at one moment with a budget of 20 a second: they come back at that rate, and all complete."""
    starts = []

    async def agent(task):
        if task.attempt == 1:
            raise ValueError
        starts.append(time.monotonic())

    agents.register("work", agent, retry=Retry(base=0.001, jitter=False))
    await queue.produce_many([{"type": "work"} for _ in range(60)])
    budget = RetryBudget(ratio=0.0, floor=20.0)
    with Recorder("retry.throttled") as recorder:
        async with Dispatcher(queue, agents=agents, retry_budget=budget):
            stats = await settled(queue)
    assert stats.counters["completed"] == 60
    assert starts[-1] - starts[0] >= 1.8, "20 at once, 40 more at 20 a second"
    assert sum(event.measurements["count"] for event in recorder.events) >= 35
    assert all(event.measurements["delay_s"] <= 3.0 for event in recorder.events)
