"""streaq: own ids (deduplicated), no results (ttl 0), silent, a large prefetch, enqueue_many."""

import contextlib
import logging

import shared
from streaq import Worker

PACKAGES = ["streaq", "coredis", "anyio", "uvloop"]
UVLOOP = True
BACKLOG = [["XLEN", "streaq:default:queues:normal"]]
SETTINGS = {"concurrency": 100, "prefetch": 100, "chunk": 1000, "sleep": {"concurrency": 1000, "prefetch": 1000}}
logging.disable(logging.CRITICAL)
streaq = Worker(
    redis_url=shared.URL,
    concurrency=shared.SETTINGS.get("concurrency", 16),
    prefetch=shared.SETTINGS.get("prefetch"),
    anyio_kwargs={"use_uvloop": True},
)
task = streaq.task(name="task", ttl=0, silent=True)(shared.agent)


@contextlib.asynccontextmanager
async def producer():
    def named(item):
        made = task.enqueue(item)
        made.id = item["id"]
        return made

    async def send(item):
        await named(item)

    async def send_many(items):
        await streaq.enqueue_many([named(item) for item in items])

    async with streaq:
        yield send, send_many


def worker():
    streaq.run_sync()
