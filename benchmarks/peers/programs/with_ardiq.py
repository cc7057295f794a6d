"""ardiQ (a core in Rust): results dropped, own ids (deduplicated), prefetch of two batches, enqueue_many of 1,000."""

import asyncio
import contextlib
import logging

import shared
from ardiq import Ardiq

PACKAGES = ["ardiq", "uvloop"]
UVLOOP = True
BACKLOG = [["GROUP", "ardiq:bench:queues:default"]]
SETTINGS = {"concurrency": 100, "prefetch": 200, "chunk": 1000, "sleep": {"concurrency": 1000, "prefetch": 2000}}
app = Ardiq(
    f"redis://127.0.0.1:{shared.PORT}",
    queue_name="bench",
    concurrency=shared.SETTINGS.get("concurrency", 100),
    prefetch=shared.SETTINGS.get("prefetch", 200),
    result_ttl_ms=0,
)


@app.task(name="task")
async def task(payload: dict):
    await shared.agent(payload)


@contextlib.asynccontextmanager
async def producer():
    async def send(item):
        await task.options(task_id=item["id"]).enqueue(item)

    async def send_many(items):
        await app.enqueue_many([task.options(task_id=item["id"]).prepare(item) for item in items])

    yield send, send_many


def worker():
    logging.disable(logging.CRITICAL)
    asyncio.run(app.run())
