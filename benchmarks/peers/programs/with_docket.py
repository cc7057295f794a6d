"""pydocket: own ids (deduplicated), no results kept (execution_ttl 0), a short check interval, add_many."""

import asyncio
import contextlib
import logging
from datetime import timedelta

import shared
from docket import Docket, Worker

PACKAGES = ["pydocket", "redis", "hiredis", "uvloop"]
UVLOOP = True
BACKLOG = [["XLEN", "bench:stream"]]
SETTINGS = {"concurrency": 50, "check_ms": 1, "chunk": 1000, "sleep": {"concurrency": 1000, "check_ms": 5}}


def open_docket():
    return Docket(name="bench", url=shared.WIDE_URL, execution_ttl=timedelta(0))


async def task(payload: dict) -> None:
    await shared.agent(payload)


@contextlib.asynccontextmanager
async def producer():
    async with open_docket() as docket:
        docket.register(task)

        async def send(item):
            await docket.add(task, key=item["id"])(item)

        async def send_many(items):
            await docket.add_many([docket.call(task, key=item["id"])(item) for item in items])

        yield send, send_many


def worker():
    logging.disable(logging.CRITICAL)

    async def serve():
        interval = timedelta(milliseconds=shared.SETTINGS["check_ms"])
        async with open_docket() as docket:
            docket.register(task)
            async with Worker(
                docket,
                concurrency=shared.SETTINGS["concurrency"],
                minimum_check_interval=interval,
                schedule_automatic_tasks=False,
            ) as serving:
                await serving.run_forever()

    asyncio.run(serve())
