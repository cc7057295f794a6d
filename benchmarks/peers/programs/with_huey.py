"""huey: results off, two threads (1,000 greenlets for waiting agents). It has no bulk call."""

import contextlib
import logging

import shared

if shared.SETTINGS.get("kind") == "greenlet":
    from gevent import monkey

    monkey.patch_all()

from huey import RedisHuey

PACKAGES = ["huey", "redis", "hiredis", "gevent"]
UVLOOP = False
BACKLOG = [["LLEN", "huey.redis.bench"]]
SETTINGS = {"kind": "thread", "workers": 2, "sleep": {"kind": "greenlet", "workers": 1000}}
huey = RedisHuey("bench", url=shared.WIDE_URL, results=False)
task = huey.task(name="task")(shared.plain_agent)


@contextlib.contextmanager
def producer():
    yield task, shared.each(task)


def worker():
    logging.disable(logging.CRITICAL)
    huey.create_consumer(workers=shared.SETTINGS["workers"], worker_type=shared.SETTINGS["kind"], periodic=False).run()
