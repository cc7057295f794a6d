"""faststream: a stream and a group, pipelined publishing. One task at a time drains faster than its concurrent mode."""

import asyncio
import contextlib
import logging

import shared
from faststream.redis import RedisBroker, StreamSub

PACKAGES = ["faststream", "redis", "hiredis", "uvloop", "anyio"]
UVLOOP = True
BACKLOG = [["GROUP", "bench"]]
SETTINGS = {
    "concurrency": 1,
    "records": None,
    "types": True,
    "chunk": 1000,
    "bulk": {"types": False},
    "sleep": {"concurrency": 1000, "records": 500, "types": False},
}
broker = RedisBroker(shared.WIDE_URL, logger=None, apply_types=shared.SETTINGS.get("types", True))


@contextlib.asynccontextmanager
async def producer():
    await broker.connect()
    client = broker.config.broker_config.connection.client

    async def send(item):
        await broker.publish(item, stream="bench")

    async def send_many(items):
        async with client.pipeline(transaction=False) as pipe:
            for item in items:
                await broker.publish(item, stream="bench", pipeline=pipe)
            await pipe.execute()

    yield send, send_many
    await broker.stop()


def worker():
    logging.disable(logging.CRITICAL)
    source = StreamSub("bench", group="g", consumer="c", last_id="0", max_records=shared.SETTINGS["records"])
    at_once = shared.SETTINGS["concurrency"]

    @broker.subscriber(stream=source, **({"max_workers": at_once} if at_once > 1 else {}))
    async def task(payload: dict):
        await shared.agent(payload)

    async def serve():
        await broker.start()
        await asyncio.Event().wait()

    asyncio.run(serve())
