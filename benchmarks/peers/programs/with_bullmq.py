"""bullmq for Python: own ids (deduplicated), addBulk, finished jobs removed."""

import asyncio
import contextlib
import logging

import shared
from bullmq import Queue, Worker

PACKAGES = ["bullmq", "redis", "hiredis", "uvloop"]
UVLOOP = True
BACKLOG = [["LLEN", "bull:bench:wait"], ["LLEN", "bull:bench:active"]]
SETTINGS = {"concurrency": 20, "chunk": 1000, "sleep": {"concurrency": 1000}}
OPTIONS = {"removeOnComplete": True}


@contextlib.asynccontextmanager
async def producer():
    queue = Queue("bench", {"connection": shared.WIDE_URL})

    async def send(item):
        await queue.add("task", item, {**OPTIONS, "jobId": item["id"]})

    async def send_many(items):
        await queue.addBulk(
            [{"name": "task", "data": item, "opts": {**OPTIONS, "jobId": item["id"]}} for item in items]
        )

    yield send, send_many
    await queue.close()


def worker():
    logging.disable(logging.CRITICAL)

    async def process(job, token):
        await shared.agent(job.data)

    async def serve():
        serving = Worker(
            "bench", process, {"connection": shared.WIDE_URL, "concurrency": shared.SETTINGS["concurrency"]}
        )
        await asyncio.Event().wait()
        await serving.close()

    asyncio.run(serve())
