"""A worker process that waits for a line before it begins, so that several begin together: the other side of scaling.py.

``python -m benchmarks._gated '{"url": …}'``: says ``ready``, waits, drains until the queue is empty or ``window`` tasks are
handled, prints one JSON line. With ``burst`` the window comes in backlogs of that many tasks; only the time from the first
to the last task of each counts. Concurrency: one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import _raw
from benchmarks._worker import ROOT, resident, run_loop
from orchestra._process import set_heap_aside
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import BaseTask

MAX_TASK_BYTES = 4 << 20
POLL = 0.005


@contextlib.asynccontextmanager
async def queue_at(url: str) -> Any:
    """The queue of every table, with room for large bodies."""
    async with ConnectionManager(url) as manager:
        queue = RedisStreamTaskQueue(_raw.QUEUE, _raw.GROUP, manager=manager, max_task_bytes=MAX_TASK_BYTES)
        try:
            yield queue
        finally:
            await queue.close()


async def serve(url: str, concurrency: int, window: int, sleep: float, burst: int = 0) -> dict[str, Any]:
    """One dispatcher; see the module."""
    handled = first = last = busy = 0
    busy_cpu = began_cpu = 0.0
    enough = asyncio.Event()

    async def agent(task: BaseTask) -> None:
        nonlocal handled, first, last, busy, busy_cpu, began_cpu
        first = first or time.monotonic_ns()
        if burst and handled % burst == 0:
            first, began_cpu = time.monotonic_ns(), time.process_time()
        if sleep:
            await asyncio.sleep(sleep)
        handled += 1
        last = time.monotonic_ns()
        if burst and handled % burst == 0:
            busy, busy_cpu = busy + last - first, busy_cpu + time.process_time() - began_cpu
        if handled == window:
            enough.set()

    agents = AgentRegistry()
    agents.register("text_classification", agent)
    async with queue_at(url) as queue:
        set_heap_aside()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)
        cpu = time.process_time()
        async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=concurrency):
            if window:
                await enough.wait()
                handled, last = window, time.monotonic_ns()
            else:
                while await queue.get_queue_depth():
                    await asyncio.sleep(POLL)
            cpu = time.process_time() - cpu
            if burst:
                first, last, cpu = 0, busy, busy_cpu
            report = {"handled": handled, "first": first, "last": last, "cpu_s": cpu}
            print(json.dumps({**report, "rss_mib": resident("self", "VmHWM")}), flush=True)
    return report


@contextlib.contextmanager
def gated(settings: Sequence[dict[str, Any]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Workers that are connected and wait; ended with the block."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks._gated", json.dumps(one)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for one in settings
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != b"ready\n":
                raise RuntimeError("a worker does not start")
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    stream.close()


def reports(workers: Sequence[subprocess.Popen[bytes]]) -> list[dict[str, Any]]:
    """Open the gate, and what each worker reports."""
    open_gates(workers)
    return answers(workers)


def open_gates(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let the workers begin."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"\n")
        worker.stdin.flush()


def answers(workers: Sequence[subprocess.Popen[bytes]]) -> list[dict[str, Any]]:
    """What each worker reports when it has ended."""
    found = []
    for worker in workers:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {worker.wait()}")
        found.append(json.loads(line))
    return found


if __name__ == "__main__":
    run_loop(serve(**json.loads(sys.argv[1])))
