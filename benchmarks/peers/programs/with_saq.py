"""saq: own ids (deduplicated), orjson, jobs removed when done, no timeout. It has no bulk call."""

import asyncio
import contextlib
import logging

import orjson
import redis.asyncio as aioredis
import shared
from saq import Worker
from saq.queue.redis import RedisQueue

PACKAGES = ["saq", "redis", "hiredis", "uvloop", "orjson"]
UVLOOP = True
BACKLOG = [["LLEN", "saq:default:queued"], ["LLEN", "saq:default:active"], ["ZCARD", "saq:default:incomplete"]]
SETTINGS = {"concurrency": 20, "chunk": 1000, "sleep": {"concurrency": 1000}}
JOB = {"ttl": -1, "timeout": 0}


def open_queue():
    """Every slot of a worker blocks on a connection of its own, and redis-py's pool ends at 100 by default."""
    client = aioredis.from_url(shared.URL, max_connections=shared.SETTINGS.get("concurrency", 20) + 100)
    return RedisQueue(client, dump=orjson.dumps, load=orjson.loads)


async def task(ctx, *, payload):
    await shared.agent(payload)


@contextlib.asynccontextmanager
async def producer():
    queue = open_queue()
    logging.disable(logging.CRITICAL)

    async def send(item):
        await queue.enqueue("task", payload=item, key=item["id"], **JOB)

    yield send, shared.all_at_once(send)
    await queue.disconnect()


def worker():
    logging.disable(logging.CRITICAL)

    async def serve():
        await Worker(open_queue(), functions=[("task", task)], concurrency=shared.SETTINGS["concurrency"]).start()

    asyncio.run(serve())
