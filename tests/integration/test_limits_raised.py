"""A limit that is raised at run time: who was told to come back at the old rate comes back at the new one."""

from __future__ import annotations

import asyncio
import time

import pytest

from orchestra._delivery import Again, Sooner
from orchestra.agents import LimitUse
from orchestra.dispatcher import Dispatcher
from orchestra.flow_control import BackpressureConfig, RateLimitConfig, RedisRateLimiter, set_limit
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.task_queue import RedisStreamTaskQueue
from tests.waiting import settled, until

HOUR = 3600.0


@pytest.fixture(params=["redis", "memory"])
def queue(request):
    if request.param == "memory":
        return InMemoryTaskQueue("tasks", "workers")
    return RedisStreamTaskQueue("tasks", "workers", manager=request.getfixturevalue("manager"))


async def put_off(queue, count, delay, counter="throttled"):
    """``count`` tasks that wait for ``delay`` seconds; when they are due, monotonic seconds."""
    await queue.produce_many([{"id": f"t{n}", "type": "call"} for n in range(count)])
    found = await queue.read("c1", count, 1000)
    await queue.settle([(delivery, Again(delay, counter)) for delivery in found])
    return time.monotonic() + delay


async def due_in(queue):
    """Seconds until the first delayed task is due, by what maintaining the queue says; at most a tick."""
    return (await queue.maintain("c1", 0)).next_in


async def test_who_was_put_off_comes_back_sooner(queue):
    was = await put_off(queue, 5, HOUR)
    moves = [Sooner(f"t{n}", was, time.monotonic()) for n in range(5)] + [Sooner("unknown", was, was - 1)]
    assert await queue.delays.hasten(moves) == 5
    await due_in(queue)
    assert len(await queue.read("c1", 10, 1000)) == 5
    assert (await queue.stats()).delayed == 0


async def test_nobody_comes_later_or_from_another_wait(queue):
    was = await put_off(queue, 3, HOUR)
    moves = [Sooner("t0", was, was + 60), Sooner("t1", was - 60, was - 1800), Sooner("t2", was + 60, was - 1800)]
    assert await queue.delays.hasten(moves) == 0
    assert (await queue.stats()).delayed == 3


async def test_a_retry_keeps_its_backoff(manager):
    queue = RedisStreamTaskQueue("tasks", "workers", manager=manager)
    was = await put_off(queue, 2, HOUR, "retried")
    assert await queue.delays.hasten([Sooner("t0", was, time.monotonic())]) == 0
    assert (await queue.stats()).delayed == 2


async def test_a_backlog_drains_at_the_new_rate(manager, agents):
    """Thirty tasks at one an hour; after the change one more task tells the worker of it, and none of them waits."""
    queue = RedisStreamTaskQueue("tasks", "workers", manager=manager)
    config = BackpressureConfig(rate_limit=RateLimitConfig(rate=1, burst=1, period=HOUR))
    limiter = RedisRateLimiter("slow", config, manager=manager)
    ran = []

    @agents.agent("call", limits=[LimitUse(limiter)])
    async def call(task):
        ran.append(task.input)

    async with Dispatcher(queue, agents=agents):
        await queue.produce_many([{"type": "call", "input": n} for n in range(30)])
        async with asyncio.timeout(60):
            while (await queue.stats()).delayed < 29:
                await asyncio.sleep(0.01)
        assert len(ran) == 1
        await set_limit("slow", rate=2000, burst=200, manager=manager)
        await queue.produce({"type": "call", "input": 30})
        await until(lambda: len(ran) == 31)
        await settled(queue)
    assert sorted(ran) == list(range(31))
