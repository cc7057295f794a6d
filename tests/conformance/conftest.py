"""One suite, every queue: a backend makes queues and does to them what a test cannot do through their API."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio

from orchestra._keys import lock as lock_keys
from orchestra._queue.twin_store import Entry
from orchestra.testing import InMemoryTaskQueue, ManualClock, MockTaskQueue


class MemoryBackend:
    """Queues in memory, on a clock that only :meth:`age` and its like move."""

    def __init__(self, kind=InMemoryTaskQueue) -> None:
        self.clock = ManualClock()
        self.kind = kind
        self.queues = []

    def make(self, **options):
        self.queues.append(self.kind("tasks", "workers", clock=self.clock, **options))
        return self.queues[-1]

    def twin(self, queue):
        self.queues.append(queue.twin())
        return self.queues[-1]

    async def age(self, queue, seconds):
        self.clock.advance(seconds)

    hasten = age

    def let_pass(self, seconds):
        asyncio.get_running_loop().call_later(seconds, self.clock.advance, seconds)

    async def expire_lock(self, queue, name):
        self.clock.advance(86_400)

    async def forget_ids(self, queue):
        """As if the dedup window had passed."""
        queue._store._known.clear()

    async def put_garbage(self, queue, frame, lane=2):
        queue._store.add(lane, Entry(frame))
        queue._store.counters["produced"] += 1
        queue._bells.ring("tasks", 1)


class RedisBackend:
    """Queues on a real server; what is in Redis is aged instead of waiting."""

    def __init__(self, manager) -> None:
        self.manager = manager
        self.options = {}
        self.queues = []

    def make(self, **options):
        from orchestra.task_queue import RedisStreamTaskQueue

        self.options = options
        self.queues.append(RedisStreamTaskQueue("tasks", "workers", manager=self.manager, **options))
        return self.queues[-1]

    def twin(self, queue):
        return self.make(**self.options)

    async def age(self, queue, seconds):
        """Let every delivery look as if it had been handed out so much earlier, and the queue as if it had noticed."""
        client = self.manager.client
        for lane in queue.keys.lanes:
            for row in await client.xpending_range(lane, queue.group, "-", "+", 10_000):
                idle = row["time_since_delivered"] + round(seconds * 1000)
                who, entry = row["consumer"], row["message_id"]
                await client.xclaim(lane, queue.group, who, 0, [entry], idle=idle, justid=True)
        for made in self.queues:
            made._upkeep._quiet_until = made._upkeep._reclaim_at = 0.0

    async def hasten(self, queue, seconds):
        """Let every delayed task be due so much earlier."""
        client = self.manager.client
        for member in await client.zrange(queue.keys.delayed, 0, -1):
            await client.zincrby(queue.keys.delayed, -round(seconds * 1000), member)

    def let_pass(self, seconds):
        """Time passes by itself."""

    async def expire_lock(self, queue, name):
        await self.manager.client.delete(lock_keys(name)[0])

    async def forget_ids(self, queue):
        await self.manager.client.delete(*queue.keys.dedup)

    async def put_garbage(self, queue, frame, lane=2):
        await self.manager.client.xadd(queue.keys.lanes[lane], {"t": frame})
        await self.manager.client.hincrby(queue.keys.counters, "produced", 1)


@pytest.fixture(params=["memory", "mock", "redis"])
def backend(request):
    if request.param != "redis":
        return MemoryBackend(MockTaskQueue if request.param == "mock" else InMemoryTaskQueue)
    return RedisBackend(request.getfixturevalue("manager"))


@pytest.fixture
def queue(backend):
    return backend.make()


@pytest_asyncio.fixture(autouse=True)
async def everything_adds_up(backend):
    """After every test, whatever it did, each task is in exactly one place and has been counted."""
    yield
    for queue in backend.queues:
        stats = await queue.stats()
        assert stats.adds_up, stats
        assert stats.live == await queue.get_queue_depth()
        await queue.close()
