"""A worker process for the lease tests: ``python _stalling_worker.py LEASE_MS CONSUMER MAX_STALL FLAG``.

Every line on stdout is JSON: what an agent did, or an event of the product. Agents end when the file FLAG exists.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import time

from orchestra import telemetry
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.task_queue import RedisStreamTaskQueue

LEASE_MS, CONSUMER, MAX_STALL, FLAG = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
EVENTS = ("loop.blocked", "lease.let_go", "lease.lost", "task.stale", "queue.quiet", "task.settled")


def say(what, **facts):
    os.write(1, json.dumps({"what": what, "at": time.monotonic(), **facts}, default=str).encode() + b"\n")


def flagged():
    return os.path.exists(FLAG)


async def wait(task):
    say("started", id=task.id, fence=task.fence)
    try:
        while not flagged():
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        say("cancelled", id=task.id)
        raise
    say("done", id=task.id)


async def sleep_in_the_loop(task):
    say("started", id=task.id, fence=task.fence)
    while not flagged():
        time.sleep(0.01)
    say("done", id=task.id)


async def spin_in_the_loop(task):
    say("started", id=task.id, fence=task.fence)
    while not flagged():
        sum(range(1000))
    say("done", id=task.id)


async def hold_the_gil(task):
    say("started", id=task.id, fence=task.fence)
    ctypes.PyDLL(None).usleep(int(task.input * 1e6))
    say("done", id=task.id)


async def main():
    agents = AgentRegistry()
    for agent in (wait, sleep_in_the_loop, spin_in_the_loop, hold_the_gil):
        agents.register(agent.__name__, agent)
    telemetry.attach(lambda name, numbers, facts: say(name, **numbers, **facts), *EVENTS)
    manager = ConnectionManager(os.environ["ORCHESTRA_REDIS_URL"])
    queue = RedisStreamTaskQueue("tasks", "workers", LEASE_MS, manager=manager, max_stall=MAX_STALL)
    await Dispatcher(queue, agents=agents, consumer_name=CONSUMER).run()


asyncio.run(main())
