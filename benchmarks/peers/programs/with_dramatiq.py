"""dramatiq: no middleware, two worker threads (1,000 for waiting agents), a large prefetch. It has no bulk call."""

import contextlib
import logging
import signal

import dramatiq
import dramatiq.worker
import shared
from dramatiq.brokers.redis import RedisBroker

PACKAGES = ["dramatiq", "redis", "hiredis"]
UVLOOP = False
BACKLOG = [["LLEN", "dramatiq:default"], ["HLEN", "dramatiq:default.msgs"]]
SETTINGS = {"threads": 2, "prefetch": 1000, "sleep": {"threads": 1000}}
dramatiq.worker.QUEUE_PREFETCH = shared.SETTINGS.get("prefetch", 1000)  # what its environment variable sets
broker = RedisBroker(url=shared.WIDE_URL, middleware=[])
dramatiq.set_broker(broker)
task = dramatiq.actor(actor_name="task")(shared.plain_agent)


@contextlib.contextmanager
def producer():
    logging.disable(logging.CRITICAL)
    yield task.send, shared.each(task.send)


def worker():
    logging.disable(logging.CRITICAL)
    dramatiq.Worker(broker, worker_threads=shared.SETTINGS["threads"], worker_timeout=1000).start()
    signal.pause()
