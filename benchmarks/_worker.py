"""The other process of a comparison: one worker with one agent, or the raw reader beside which it is measured.

``python -m benchmarks._worker MODE URL [COUNT]``; writes one JSON line when it is done (``drain``, ``sleep``, ``burn`` in
processes, ``load``: also the microseconds since each task's ``sent``), lives until killed (``wake``, ``answer``, ``idle``), or reads raw (``raw-wake``, ``raw-echo``). Says ``ready`` on stderr.
Its heap is set aside from the collector before the first task, as ``orchestra worker`` does it.
Concurrency: one event loop; ``ORCHESTRA_BENCH_UVLOOP=1`` makes it uvloop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from benchmarks import _raw
from benchmarks._burn import burn
from orchestra._process import set_heap_aside
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import BaseTask

ROOT = Path(__file__).absolute().parents[1]
SLEEP = 0.1
UVLOOP = os.environ.get("ORCHESTRA_BENCH_UVLOOP", "") not in ("", "0")


def run_loop(main: Any) -> Any:
    """``asyncio.run`` on the loop that was chosen."""
    if not UVLOOP:
        return asyncio.run(main)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@contextlib.asynccontextmanager
async def queue_at(url: str) -> AsyncIterator[RedisStreamTaskQueue]:
    """The queue of every workload, connected."""
    async with ConnectionManager(url) as manager:
        queue = RedisStreamTaskQueue(_raw.QUEUE, _raw.GROUP, manager=manager)
        try:
            yield queue
        finally:
            await queue.close()


async def serve(url: str, mode: str, count: int) -> None:
    """Run one dispatcher; ends by itself when ``count`` tasks have been handled and the queue is empty."""
    started = handled = first = 0
    cpu = 0.0
    finished = asyncio.Event()

    async def noop(task: BaseTask) -> None:
        nonlocal handled, first, cpu
        if not handled:
            first, cpu = time.monotonic_ns(), time.process_time()
        handled += 1
        if handled == count:
            finished.set()

    async def sleep(task: BaseTask) -> None:
        nonlocal started, handled, first
        if not started:
            first = time.monotonic_ns()
        started += 1
        await asyncio.sleep(SLEEP)
        handled += 1
        if handled == count:
            finished.set()

    async def tell(task: BaseTask) -> None:
        os.write(1, struct.pack("<q", time.monotonic_ns()))

    async def answer(task: BaseTask) -> str:
        return "done"

    waited: list[float] = []

    async def load(task: BaseTask) -> None:
        nonlocal handled, first
        now = time.monotonic_ns()
        if not handled:
            first = now
        waited.append((now - task.input["sent"]) / 1000)
        handled += 1
        if handled == count:
            finished.set()

    modes = {"drain": noop, "sleep": sleep, "wake": tell, "answer": answer, "idle": noop, "load": load, "burn": burn}
    agents = AgentRegistry()
    agents.register("text_classification", modes[mode], **({"executor": "process"} if mode == "burn" else {}))
    async with queue_at(url) as queue:
        dispatcher = Dispatcher(queue, agents=agents, max_concurrent_dispatch=1000 if mode == "sleep" else 100)
        async with dispatcher:
            set_heap_aside()
            sys.stderr.write("ready\n")
            if mode == "burn":
                first = await _completed(dispatcher, 1)
                last = await _completed(dispatcher, count)
            else:
                await finished.wait()
                last = time.monotonic_ns()
            while await queue.get_queue_depth():
                await asyncio.sleep(0.001)
            empty, cpu = time.monotonic_ns(), time.process_time() - cpu
            outcomes = {outcome.value: number for outcome, number in dispatcher.outcomes.items()}
    facts = {"run_s": (last - first) / 1e9, "empty_s": (empty - first) / 1e9, "outcomes": outcomes}
    if waited:
        facts["waited_us"] = waited
    print(json.dumps({**facts, "rss_mib": resident("self", "VmHWM"), "cpu_s": cpu}))


async def _completed(dispatcher: Dispatcher, count: int) -> int:
    """The moment when ``count`` tasks have ended, for agents in processes, which cannot count here."""
    while sum(dispatcher.outcomes.values()) < count:
        await asyncio.sleep(0.002)
    return time.monotonic_ns()


def resident(pid: int | str, field: str = "VmRSS") -> float:
    """MiB of memory of a process, as Linux counts it; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return 0.0


@contextlib.contextmanager
def other_process(mode: str, url: str, count: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Start this module in another process, wait until it is ready, end it afterwards."""
    command = [sys.executable, "-m", "benchmarks._worker", mode, url, str(count)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            if line != b"ready\n":
                raise RuntimeError((line + process.stderr.read()).decode())
            yield process
        finally:
            process.kill()


def main(mode: str, url: str, count: str) -> None:
    """Play the part of ``mode``."""
    if not mode.startswith("raw-"):
        run_loop(serve(url, mode, int(count)))
        return
    host, _, port = url.removeprefix("redis://").partition(":")
    address = url.removeprefix("unix://") if url.startswith("unix://") else (host, int(port))
    sys.stderr.write("ready\n")
    _raw.reader(address, int(count), echo=mode == "raw-echo")


if __name__ == "__main__":
    main(*sys.argv[1:4])
