"""tarsk (a supervisor in Rust): one child process with 100 slots. It has no bulk call."""

import contextlib
import os
import sys

import shared
from tarsk import App

PACKAGES = ["tarsk-redis"]
UVLOOP = False
BACKLOG = [["GROUP", "tarsk:default"]]
SETTINGS = {"slots": 100, "sleep": {"slots": 1000}}
app = App(broker=shared.URL)


@app.task(retries=3)
async def task(payload):
    await shared.agent(payload)


@contextlib.contextmanager
def producer():
    yield task.send, shared.each(task.send)


def worker():
    command = os.path.join(os.path.dirname(sys.executable), "tarsk")
    options = ["--broker", shared.URL, "--children", "1", "--slots", str(shared.SETTINGS["slots"])]
    os.execv(command, [command, "worker", "--app", "with_tarsk:app", *options])
