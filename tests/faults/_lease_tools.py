"""What the tests of leases, reclaim and clocks share: worker processes that talk, and looks at pending entries."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from orchestra import telemetry
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._checks import until

WORKER = Path(__file__).with_name("_stalling_worker.py")


class TalkingWorker:
    """A worker process; what it says is collected in ``said``."""

    def __init__(self, url, lease_ms, flag, *, consumer="elsewhere", max_stall=60.0):
        command = [sys.executable, str(WORKER), str(lease_ms), consumer, str(max_stall), str(flag)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "ORCHESTRA_REDIS_URL": url})
        self.said: list[dict] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self):
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def heard(self, what, **facts):
        """What it said of this kind and with these facts so far."""
        return [row for row in list(self.said) if row["what"] == what and facts.items() <= row.items()]

    async def says(self, what, count=1, **facts):
        """Until it has said so ``count`` times."""
        return (await until(lambda: len(self.heard(what, **facts)) >= count and self.heard(what, **facts)))[:count]

    def stop(self):
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._thread.join(10)
        self.process.stdout.close()


def queue_for(manager, lease_ms=60_000, **options):
    return RedisStreamTaskQueue("tasks", "workers", lease_ms, manager=manager, **options)


async def pending(client, queue, lane=2):
    """Rows of the pending list of a lane: entry, consumer, idle ms, deliveries."""
    rows = await client.xpending_range(queue.keys.lanes[lane], queue.group, "-", "+", 10_000)
    return [(row["message_id"], row["consumer"], row["time_since_delivered"], row["times_delivered"]) for row in rows]


async def age(client, queue, seconds, lane=2):
    """Let every delivery of a lane look as if it had been handed out so much earlier."""
    for entry, consumer, idle, _ in await pending(client, queue, lane):
        await client.xclaim(
            queue.keys.lanes[lane], queue.group, consumer, 0, [entry], idle=idle + round(seconds * 1000), justid=True
        )


@contextlib.contextmanager
def events(*names):
    """Collects the events ``names`` as (name, facts)."""
    seen = []
    detach = telemetry.attach(lambda name, numbers, facts: seen.append((name, {**numbers, **facts})), *names)
    try:
        yield seen
    finally:
        detach()


async def turns(count=5):
    """A few iterations of the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)
