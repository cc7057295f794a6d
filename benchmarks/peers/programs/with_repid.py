"""repid: streams, reads of 100, 30 agents at once (fewer connections are faster). It has no bulk call."""

import asyncio
import contextlib
import logging

import shared
from repid import RedisServer, Repid, Router

PACKAGES = ["repid", "redis", "hiredis", "uvloop"]
UVLOOP = True
BACKLOG = [["GROUP", "repid:default"]]
SETTINGS = {"concurrency": 30, "batch": 100, "chunk": 50, "sleep": {"concurrency": 1000, "batch": 1000}}
app = Repid()
app.servers.register_server(
    "default", RedisServer(shared.WIDE_URL, batch_size=shared.SETTINGS.get("batch", 10)), is_default=True
)
router = Router()


@router.actor(name="task", channel="default")
async def task(payload: dict) -> None:
    await shared.agent(payload)


app.include_router(router)


@contextlib.asynccontextmanager
async def producer():
    async with app.servers.default.connection():
        headers = {"topic": "task"}

        async def send(item):
            await app.send_message_json(channel="default", payload={"payload": item}, headers=headers)

        yield send, shared.all_at_once(send)


def worker():
    logging.disable(logging.CRITICAL)

    async def serve():
        async with app.servers.default.connection():
            await app.run_worker(tasks_limit=shared.SETTINGS["concurrency"])

    asyncio.run(serve())
