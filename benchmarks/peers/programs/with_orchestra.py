"""orchestra's classes with their defaults: a queue and a dispatcher, tasks under ids of their own (deduplicated).

Concurrency is what a user says in any case: 1,000 where 1,000 agents wait. Event loop (uvloop, as the other asyncio
queues have it) and collector are those of ``orchestra worker``.
"""

import asyncio
import contextlib

import shared

from orchestra import AgentRegistry, ConnectionManager, Dispatcher, RedisStreamTaskQueue
from orchestra._process import set_heap_aside

PACKAGES = ["orchestra-engine", "redis", "hiredis", "uvloop"]
UVLOOP = True
BACKLOG = [["GROUP", f"orc:{{bench.0}}:s:{lane}"] for lane in range(4)]
SETTINGS = {"concurrency": 100, "chunk": 50_000, "sleep": {"concurrency": 1000}}


@contextlib.asynccontextmanager
async def open_queue():
    async with ConnectionManager(shared.URL) as manager:
        queue = RedisStreamTaskQueue("bench", "workers", manager=manager)
        try:
            yield queue
        finally:
            await queue.close()


@contextlib.asynccontextmanager
async def producer():
    async with open_queue() as queue:
        yield queue.produce, queue.produce_many


def worker():
    async def task(delivered):
        await shared.agent(delivered)

    async def serve():
        agents = AgentRegistry()
        agents.register("text_classification", task)
        async with open_queue() as queue:
            set_heap_aside()
            await Dispatcher(queue, agents=agents, max_concurrent_dispatch=shared.SETTINGS["concurrency"]).run()

    asyncio.run(serve())
