"""rq: SimpleWorker (no fork for each job), no results, no timers. One job at a time by design."""

import contextlib
import logging

import shared
from redis import Redis
from rq import Queue, SimpleWorker

PACKAGES = ["rq", "redis", "hiredis"]
UVLOOP = False
BACKLOG = [["LLEN", "rq:queue:default"], ["ZCARD", "rq:wip:default"]]
SETTINGS = {"chunk": 1000}
queue = Queue("default", connection=Redis("127.0.0.1", shared.PORT))
task = shared.plain_agent
NAME, NO_TIMER = "with_rq.task", -1


@contextlib.contextmanager
def producer():
    def send(item):
        queue.enqueue(NAME, args=(item,), result_ttl=0, job_timeout=NO_TIMER)

    def send_many(items):
        queue.enqueue_many([Queue.prepare_data(NAME, (item,), result_ttl=0, timeout=NO_TIMER) for item in items])

    yield send, send_many


def worker():
    logging.disable(logging.CRITICAL)
    SimpleWorker([queue], connection=queue.connection).work(logging_level="CRITICAL")
