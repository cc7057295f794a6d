"""A worker process: ``python -m tests.faults.chaos.worker PLAN ACTOR URL DIRECTORY``. SIGTERM drains it.

Its last line says what it left behind: asyncio tasks, threads, descriptors.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import logging
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from orchestra import telemetry
from orchestra._queue import upkeep
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults.chaos import mutants
from tests.faults.chaos.agents import Agents
from tests.faults.chaos.history import Heartbeat, History
from tests.faults.chaos.plan import Plan

QUEUE, GROUP = "chaos", "workers"
PR_SET_PDEATHSIG = 1


def make_queue(plan: Plan, manager: ConnectionManager) -> RedisStreamTaskQueue:
    """The queue as every actor uses it."""
    return RedisStreamTaskQueue(
        QUEUE,
        GROUP,
        round(plan.lease * 1000),
        manager=manager,
        max_deliveries=plan.max_deliveries,
        patience=4.0,
    )


def make_manager(plan: Plan, url: str) -> ConnectionManager:
    """Connections that give up a silent server soon."""
    return ConnectionManager(url, timeout=plan.timeout, connect_timeout=plan.timeout)


def descriptors() -> dict[str, str]:
    """What is open: descriptor → what it is."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the listing's own
    return found


def leaks(before: dict[str, str]) -> dict[str, list[str]]:
    """What this process has that it did not have ``before``; empty lists when it is clean."""
    me = asyncio.current_task()
    tasks = [f"{task.get_name()} {task.get_coro()}" for task in asyncio.all_tasks() if task is not me]
    threads = [t.name for t in threading.enumerate() if t.name.startswith("orchestra") and not t.name.endswith("agent")]
    threads = [name for name in threads if not name.startswith("orchestra-agent")]  # the registry's own pool
    after = descriptors()
    return {"tasks": tasks, "threads": threads, "fds": [after[fd] for fd in after if fd not in before]}


async def clean(before: dict[str, str]) -> dict[str, list[str]]:
    """:func:`leaks`, after what is closing has had a moment."""
    for _ in range(100):
        left = leaks(before)
        if not any(left.values()):
            break
        await asyncio.sleep(0.02)
    return left


def observe(history: History) -> None:
    """Write what the engine tells about deliveries."""

    def on_settled(name: str, numbers: Any, facts: Any) -> None:
        history.write(
            "settled",
            "ok",
            id=facts["task_id"],
            outcome=facts["outcome"],
            dead=facts["dead_reason"],
            retry_in_s=facts["retry_in_s"],
        )

    def on_other(name: str, numbers: Any, facts: Any) -> None:
        history.write("event", "ok", name=name, **{**numbers, **{k: str(v)[:4000] for k, v in facts.items()}})

    telemetry.attach(on_settled, "task.settled")
    quiet = {"task.settled", "task.started", "queue.produced", "lease.renewed", "queue.promoted"}
    telemetry.attach(on_other, *(name for name in telemetry.EVENTS if name not in quiet))


async def main(plan: Plan, actor: str, url: str, history: History) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    before = descriptors()
    agents = Agents(history, plan)
    manager = make_manager(plan, url)
    queue = make_queue(plan, manager)
    slot = int(actor[1:].partition(".")[0])
    while not stop.is_set():
        dispatcher = Dispatcher(
            queue,
            agents=agents.registry,
            max_concurrent_dispatch=plan.concurrency,
            consumer_name=actor if slot in plan.named else None,
            drain_timeout=plan.drain,
            block_timeout_ms=1000,
        )
        try:
            await dispatcher.start()
            break
        except Exception as error:  # noqa: BLE001 - Redis may be down just now
            history.write("event", "ok", name="start failed", error=repr(error))
            await asyncio.sleep(0.1)
    history.write("actor", "ready")
    stopping = asyncio.ensure_future(stop.wait())
    ended = asyncio.ensure_future(dispatcher._stopped.wait())
    await asyncio.wait((stopping, ended), return_when=asyncio.FIRST_COMPLETED)
    history.write("actor", "stop", asked=stop.is_set())
    await dispatcher.stop()
    for waiting in (stopping, ended):
        waiting.cancel()
    await asyncio.gather(stopping, ended, return_exceptions=True)
    await queue.close()
    await manager.close()
    agents.registry.close()
    history.write("actor", "end", leaked=await clean(before))


def start(argv: list[str], run: Any) -> None:
    """What worker and producer have in common."""
    plan_path, actor, url, directory = argv
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no actor outlives the driver, even a stopped one
    faulthandler.register(signal.SIGUSR1)
    plan = Plan.load(Path(plan_path))
    if plan.scan_rows is not None:
        upkeep.SCAN_ROWS = plan.scan_rows
    if plan.mutant is not None:
        mutants.apply(plan.mutant)
    history = History(Path(directory) / f"{actor}.jsonl", actor)
    history.write("actor", "start", pid=os.getpid())
    observe(history)
    with Heartbeat(history, plan.lease * 0.15):
        asyncio.run(run(plan, actor, url, history))
    history.close()


if __name__ == "__main__":
    start(sys.argv[1:], main)
