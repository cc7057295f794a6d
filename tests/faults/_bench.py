"""What the cancellation tests share: a queue on a real server, and what must be true of it between two operations."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os

import pytest

from orchestra._redis.wire import pack
from orchestra.connections import ConnectionManager
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._awaits import new_tasks, open_files, our_threads, until

NEEDS_PROC = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
HOW = pytest.mark.parametrize("how", ["running", "now", "soon", "done"])
serial = itertools.count()


class Bench:
    """A queue, and what must be true of it between two operations."""

    def __init__(self, manager: ConnectionManager) -> None:
        self.manager = manager
        self.queue = self.make()

    def make(self, lease_ms: int = 60_000, **options) -> RedisStreamTaskQueue:
        return RedisStreamTaskQueue("tasks", "workers", lease_ms, manager=self.manager, **options)

    async def in_step(self) -> None:
        """The shared connections give everyone the answer to their own question."""
        nonces = [f"nonce-{next(serial)}" for _ in range(3)]
        link = await self.queue._commands()
        packed = pack([("ECHO", nonce) for nonce in nonces])
        assert await link.send(packed, 3) == [nonce.encode() for nonce in nonces]
        assert await self.manager.client.echo(nonces[0]) == nonces[0].encode()
        assert not link._opening.locked()
        assert not self.manager._lock.locked()
        producer = self.queue._producer
        assert not producer._outbox
        assert not producer._sending
        assert not self.queue._background

    async def take(self, *ids: str) -> None:
        """The queue holds exactly these tasks, once each, none of them in flight; complete them."""
        await until(self._nothing_in_flight, "the release of what was in flight")
        got = await self.queue.consume("taker", 5000, 0)
        assert sorted(task["id"] for _, task in got) == sorted(ids)
        assert all(await self.queue.acknowledge_many([message_id for message_id, _ in got]))
        await self.empty()

    async def empty(self) -> None:
        stats = await self.queue.stats()
        assert stats.adds_up, stats
        assert stats.live == 0, stats
        assert all(not held for held in self.queue.held)

    async def _nothing_in_flight(self) -> bool:
        return sum((await self.queue.stats()).in_flight) == 0


@contextlib.asynccontextmanager
async def bench_on(redis_url: str):
    """Everything is closed afterwards, and then no descriptor is left that was not there before."""
    files, tasks = open_files(), asyncio.all_tasks()
    manager = ConnectionManager(redis_url)
    made = Bench(await manager.connect())
    await made.in_step()
    yield made
    await made.queue.close()
    await manager.close()
    await until(lambda: open_files() <= files, "closing every descriptor")
    assert not new_tasks(tasks, all_of_them=True)
    assert our_threads() == []


def some(count: int) -> list[dict]:
    return [{"id": f"t{next(serial)}", "type": "x"} for _ in range(count)]


async def ready(make):
    return make
