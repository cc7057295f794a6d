"""What runs of chaos have found, each reduced to the least that shows it."""

from __future__ import annotations

import asyncio

from orchestra._delivery import DONE, Again
from orchestra.connections import ConnectionManager
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults.proxy import Proxy


async def test_closing_a_queue_ends_what_a_cancelled_read_had_begun(redis_url):
    """G5, seed 2026: the read was given up while the group was being made; that went on and opened a connection again."""
    async with Proxy(redis_url) as proxy:
        manager = await ConnectionManager(proxy.url, timeout=1.0, connect_timeout=1.0)
        queue = RedisStreamTaskQueue("tasks", "workers", 1500, manager=manager, patience=4.0)
        before = asyncio.all_tasks()
        held = proxy.hold_reply("XGROUP")
        reading = asyncio.create_task(queue.read("c", 1, 1000))
        await held.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        accepted = proxy.accepted
        await queue.close()
        await manager.close()
        mine = {task for task in asyncio.all_tasks() - before if "StreamGroup" in repr(task.get_coro())}
        assert mine == set()
        assert proxy.accepted == accepted


async def test_a_settle_leaves_alone_what_the_same_consumer_was_handed_again(manager):
    """E, B14, seed 101: after XGROUP DESTROY an old delivery's release acknowledged the new one, which nobody then had."""
    queue = RedisStreamTaskQueue("tasks", "workers", 60_000, manager=manager)
    await queue.produce({"id": "t", "type": "x"})
    for _ in range(2):
        (old,) = await queue.read("c", 1, 100) or await queue.reclaim("c", 1, 0)
    assert old.deliveries == 2
    await manager.client.xgroup_destroy(queue.keys.lanes[2], "workers")
    new = []
    async with asyncio.timeout(10):
        while not new:
            new = await queue.read("c", 1, 100)
    assert (new[0].entry, new[0].deliveries) == (old.entry, 1)
    assert await queue.settle([(old, Again(0.0, "released"))]) == [old]
    stats = await queue.stats()
    assert sum(stats.in_flight) == 1
    assert not stats.counters.get("lost")
    assert await queue.settle([(new[0], DONE)]) == []
    assert (await queue.stats()).adds_up
    await queue.close()
