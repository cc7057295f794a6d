"""taskito (a core in Rust) on its Redis backend: batches of 100, the shortest poll, enqueue_many of 1,000."""

import contextlib
import logging

import shared
from taskito import Queue

PACKAGES = ["taskito"]
UVLOOP = False
BACKLOG = [["ZCARD", "taskito:queue:default:pending"], ["SCARD", "taskito:jobs:status:1"]]
SETTINGS = {"workers": 2, "concurrency": 100, "batch": 100, "chunk": 1000, "sleep": {"concurrency": 1000}}
queue = Queue(
    backend="redis",
    db_url=shared.URL,
    workers=shared.SETTINGS.get("workers", 2),
    async_concurrency=shared.SETTINGS.get("concurrency", 100),
    scheduler_poll_interval_ms=1,
    scheduler_batch_size=shared.SETTINGS.get("batch", 100),
    push_dispatch=True,
    result_ttl=1,
)


@queue.task(name="task")
async def task(payload):
    await shared.agent(payload)


@contextlib.contextmanager
def producer():
    def send_many(items):
        queue.enqueue_many("task", [(item,) for item in items])

    yield task.delay, send_many


def worker():
    logging.disable(logging.CRITICAL)
    queue.run_worker()
