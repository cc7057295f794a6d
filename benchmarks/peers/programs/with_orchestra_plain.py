"""orchestra's classes with their defaults, tasks under generated ids: beside queues that do not deduplicate.

The id of the payload travels in the input, so that the same bytes are carried. Everything else as in ``with_orchestra``.
"""

import contextlib

import with_orchestra
from with_orchestra import BACKLOG, PACKAGES, SETTINGS, UVLOOP, worker  # noqa: F401  what a program has


def plain(item):
    return {"type": item["type"], "input": {"id": item["id"], **item["input"]}, "priority": item["priority"]}


@contextlib.asynccontextmanager
async def producer():
    async with with_orchestra.open_queue() as queue:

        async def send(item):
            await queue.produce(plain(item))

        async def send_many(items):
            await queue.produce_many([plain(item) for item in items])

        yield send, send_many
