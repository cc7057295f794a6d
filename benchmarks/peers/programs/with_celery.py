"""celery: no results, no events, no gossip; the solo pool for no-op tasks, gevent for waiting ones. It has no bulk call."""

import contextlib
import os
import sys

import shared
from celery import Celery

PACKAGES = ["celery", "kombu", "redis", "hiredis", "gevent"]
UVLOOP = False
BACKLOG = [["LLEN", "celery"], ["HLEN", "unacked"]]
SETTINGS = {
    "pool": "solo",
    "concurrency": 1,
    "prefetch": 500,
    "sleep": {"pool": "gevent", "concurrency": 1000, "prefetch": 2},
}
app = Celery("bench", broker=shared.URL)
app.conf.update(
    task_ignore_result=True,
    worker_send_task_events=False,
    task_send_sent_event=False,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=shared.SETTINGS.get("prefetch", 4),
)
task = app.task(name="task", ignore_result=True)(shared.plain_agent)


@contextlib.contextmanager
def producer():
    with app.producer_pool.acquire(block=True) as connection:  # one held connection, no work for a pool each call

        def send(item):
            task.apply_async((item,), producer=connection)

        yield send, shared.each(send)


def worker():
    here = os.path.dirname(os.path.abspath(__file__))
    lean = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    pool = ["-P", shared.SETTINGS["pool"], "-c", str(shared.SETTINGS["concurrency"])]
    command = [sys.executable, "-m", "celery", "--workdir", here, "-A", "with_celery:app", "worker", "-l", "CRITICAL"]
    os.execv(command[0], [*command, *pool, *lean])
