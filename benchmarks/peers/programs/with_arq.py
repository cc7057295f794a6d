"""arq: own ids (deduplicated), results off, a short poll (0.5 s by default), large reads. It has no bulk call."""

import asyncio
import contextlib
import logging

import shared
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker, func

PACKAGES = ["arq", "redis", "hiredis", "uvloop"]
UVLOOP = True
BACKLOG = [["ZCARD", "arq:queue"]]
SETTINGS = {"concurrency": 100, "poll": 0.005, "read": 500, "chunk": 50, "sleep": {"concurrency": 1000, "read": 1000}}
ADDRESS = RedisSettings(host="127.0.0.1", port=shared.PORT)


async def task(ctx, payload):
    await shared.agent(payload)


@contextlib.asynccontextmanager
async def producer():
    pool = await create_pool(ADDRESS)

    async def send(item):
        await pool.enqueue_job("task", item, _job_id=item["id"])

    yield send, shared.all_at_once(send)
    await pool.aclose()


def worker():
    logging.disable(logging.CRITICAL)
    asyncio.set_event_loop(asyncio.new_event_loop())
    Worker(
        functions=[func(task, name="task", keep_result=0)],
        redis_settings=ADDRESS,
        max_jobs=shared.SETTINGS["concurrency"],
        poll_delay=shared.SETTINGS["poll"],
        queue_read_limit=shared.SETTINGS["read"],
        keep_result=0,
        log_results=False,
    ).run()
