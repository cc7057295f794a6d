"""taskiq on taskiq-redis' stream broker (with acknowledgements): orjson, no validation. It has no bulk call."""

import asyncio
import contextlib
import logging

import shared
from taskiq.api import run_receiver_task
from taskiq.serializers import ORJSONSerializer
from taskiq_redis import RedisStreamBroker

PACKAGES = ["taskiq", "taskiq-redis", "redis", "hiredis", "uvloop", "orjson"]
UVLOOP = True
BACKLOG = [["GROUP", "taskiq"]]
SETTINGS = {"concurrency": 100, "prefetch": 100, "read": 100, "pool": 100, "chunk": 100, "sleep": {"concurrency": 1000}}
broker = RedisStreamBroker(
    shared.URL,
    max_connection_pool_size=shared.SETTINGS.get("pool", 100),
    consumer_id="0",
    xread_count=shared.SETTINGS.get("read", 100),
).with_serializer(ORJSONSerializer())
task = broker.register_task(shared.agent, task_name="task")


@contextlib.asynccontextmanager
async def producer():
    await broker.startup()

    async def send(item):
        await task.kiq(item)

    yield send, shared.all_at_once(send)
    await broker.shutdown()


def worker():
    logging.disable(logging.CRITICAL)
    asyncio.run(
        run_receiver_task(
            broker,
            run_startup=True,
            validate_params=False,
            max_async_tasks=shared.SETTINGS["concurrency"],
            max_prefetch=shared.SETTINGS["prefetch"],
        )
    )
