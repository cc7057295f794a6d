"""orchestra's front door with its defaults: `App`, arguments checked when sent, results kept an hour. On uvloop."""

import asyncio
import contextlib

import shared

from orchestra import App
from orchestra._process import set_heap_aside

PACKAGES = ["orchestra-engine", "redis", "hiredis", "uvloop"]
UVLOOP = True
BACKLOG = [["GROUP", f"orc:{{bench.0}}:s:{lane}"] for lane in range(4)]
SETTINGS = {"concurrency": 100, "chunk": 50_000, "sleep": {"concurrency": 1000}}
app = App("bench", shared.URL)


@app.agent
async def task(payload: dict) -> None:
    await shared.agent(payload)


@contextlib.asynccontextmanager
async def producer():
    async def send_many(items):
        await task.send_many([(item,) for item in items])

    async with app:
        yield task.send, send_many


def worker():
    async def serve():
        async with app:
            set_heap_aside()
            await app.worker(concurrency=shared.SETTINGS["concurrency"]).run()

    asyncio.run(serve())
