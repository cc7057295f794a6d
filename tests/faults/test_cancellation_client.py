"""J1 for what goes through redis-py's client: whoever is cancelled ends, at whatever moment the cancellation comes.

redis-py sends under ``asyncio.wait_for``, which loses cancellations on Python 3.11 (``orchestra/_redis/client_connections.py``);
a loop that reads on and on would then never end. See ``test_cancellation.py`` for the queue, whose connections are its own.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest
import pytest_asyncio

from orchestra.cli.stats import _Source
from orchestra.connections import ConnectionManager
from orchestra.memory import MemoryManager
from orchestra.task_queue import RedisStreamTaskQueue
from tests.conftest import free_port
from tests.faults._awaits import at_every_await, at_every_tick, cancelled_at, judge, until
from tests.faults._bench import HOW

serial = itertools.count()


async def _ping(manager):
    await manager.client.ping()


async def _pipeline(manager):
    async with manager.client.pipeline(transaction=False) as pipe:
        pipe.time().exists("nothing")
        assert (await pipe.execute())[1] == 0


async def _scan(manager):
    assert [key async for key in manager.client.scan_iter(match="none:*")] == []


async def _info(manager):
    assert (await manager.server_info()).kind


async def _document(manager):
    memory, key = MemoryManager(manager, namespace="cancelled"), f"k{next(serial)}"
    await memory.set(key, 1)
    assert await memory.get(key) == 1
    assert await memory.update(key, lambda value: value + 1, default=0)
    await memory.append(f"{key}:log", "entry", ttl=60)
    assert await memory.delete(key)


async def _channel(manager):
    async with manager.client.pubsub() as pubsub:
        await pubsub.subscribe("news")
        while await pubsub.get_message(timeout=0.01) is not None:
            pass


OPERATIONS = [_ping, _pipeline, _scan, _info, _document, _channel]


@pytest_asyncio.fixture(params=["unix", "tcp"])
async def manager(request, redis_url, make_server):
    url = redis_url
    if request.param == "tcp":
        port = free_port()
        make_server("--port", str(port), "--bind", "127.0.0.1")
        url = f"redis://127.0.0.1:{port}"
    async with ConnectionManager(url, max_connections=4) as made:
        yield made


async def _answers(manager) -> None:
    """Every connection of the pool gives the answer to the question that was asked on it."""
    words = [f"w{next(serial)}".encode() for _ in range(manager.max_connections)]
    assert await asyncio.gather(*(manager.client.echo(word) for word in words)) == words


@HOW
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_call(manager, operation, how):
    """The cancellation is raised, and no connection is left with somebody else's reply."""

    async def prepare():
        await _answers(manager)
        return lambda: operation(manager)

    async for _, _run in at_every_await(prepare, how=how):
        await _answers(manager)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_call_by_iterations_of_the_loop(manager, operation):
    async def prepare():
        return lambda: operation(manager)

    async for _, _run in at_every_tick(prepare):
        await _answers(manager)


@HOW
async def test_reading_statistics_on_and_on(manager, how):
    """``orchestra stats --watch``, cancelled at every step of three rounds: it ends, and does not go on reading."""
    queue = RedisStreamTaskQueue("jobs", "workers", manager=manager)
    await queue.produce({"type": "x", "input": 1})
    source, rounds = _Source(manager, None), 0

    async def watch():
        nonlocal rounds
        while True:
            (one,) = await source.read()
            assert one.live == 1
            rounds += 1
            await asyncio.sleep(0)

    for step in itertools.count(1):
        rounds = 0
        judge(await cancelled_at(watch, step, how), f"{how} at await {step}")
        await _answers(manager)
        if rounds >= 3:
            break
    await source.close()
    await queue.close()


async def test_a_task_that_was_cancelled_before_may_still_call(manager):
    """What cleans up after a cancellation talks to Redis; a second cancellation interrupts that, too."""
    cleaning, cleaned = asyncio.Event(), []

    async def clean() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(await manager.client.echo("still here"))
            cleaning.set()
            while True:
                await manager.client.ping()

    task = asyncio.create_task(clean())
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(30):
        await cleaning.wait()
    assert cleaned == [b"still here"]
    task.cancel()
    await until(task.done, "the end of the task")
    assert task.cancelled()
    await _answers(manager)
