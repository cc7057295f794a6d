"""``python -m tests.soak --tasks N``: many tasks through one worker process; nothing may grow.

A private redis-server, one producer process, one worker process with an agent that does nothing. Once a second the
worker's resident memory, descriptors and threads, and Redis' memory and keys are sampled. Passes when, after a warm-up,
the memory of both stays flat, the counts stay constant, and all counters add up. Exit status 0 for that, else 1.

M1: worker memory. M2: Redis memory and keys. M3: descriptors and threads. M4: what the worker holds is empty at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.conftest import PrivateServer

ROOT = Path(__file__).parents[1]
BACKLOG = 20_000
"""Tasks that the producer keeps queued at the most."""
CHUNK = 2_000
WARM_UP = 0.25
"""Share of the tasks whose samples are not judged: caches and allocators fill."""
MAX_SLOPE = 0.5
"""KiB of worker memory per 1,000 tasks."""
ONCE = 1024
"""KiB that an allocator may take once: a short run is not judged by its slope alone."""
MAX_REDIS = 4096
"""KiB that Redis' memory may grow: over the run by its slope, and from the emptied server before to that after."""


@dataclass
class Sample:
    """One look. ``rss`` and ``redis`` in KiB."""

    at: float
    done: int
    live: int
    rss: int
    files: int
    threads: int
    redis: int
    keys: int


# --- the two processes


async def produce(url: str, tasks: int) -> None:
    from orchestra.connections import ConnectionManager
    from orchestra.task_queue import RedisStreamTaskQueue

    async with ConnectionManager(url) as manager, RedisStreamTaskQueue("soak", "workers", manager=manager) as queue:
        sent = 0
        while sent < tasks:
            while await queue.get_queue_depth() > BACKLOG - CHUNK:
                await asyncio.sleep(0.002)
            count = min(CHUNK, tasks - sent)
            await queue.produce_many([{"type": "nothing", "input": {"n": sent + n}} for n in range(count)])
            sent += count


async def work(url: str) -> None:
    from orchestra.agents import AgentRegistry
    from orchestra.connections import ConnectionManager
    from orchestra.dispatcher import Dispatcher
    from orchestra.task_queue import RedisStreamTaskQueue

    agents = AgentRegistry()

    async def nothing(task: Any) -> None:
        pass

    agents.register("nothing", nothing)
    async with ConnectionManager(url) as manager, RedisStreamTaskQueue("soak", "workers", manager=manager) as queue:
        dispatcher = Dispatcher(queue, agents=agents)
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, lambda: asyncio.ensure_future(dispatcher.stop()).add_done_callback(lambda _: None)
        )
        await dispatcher.run()
        left = {"held": sum(map(len, queue.held)), "unsettled": dispatcher.held, "tasks": len(asyncio.all_tasks()) - 1}
        print(json.dumps(left), flush=True)


# --- what is measured


def resident(pid: int) -> tuple[int, int, int]:
    """Resident KiB, descriptors and threads of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    kib = pages * (os.sysconf("SC_PAGE_SIZE") // 1024)
    return kib, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def slope(samples: list[Sample], field: str) -> float:
    """Theil and Sen: the median of the slopes between all pairs, in units of ``field`` per 1,000 tasks."""
    slopes = [
        1000 * (getattr(late, field) - getattr(early, field)) / (late.done - early.done)
        for number, early in enumerate(samples)
        for late in samples[number + 1 :]
        if late.done > early.done
    ]
    return sorted(slopes)[len(slopes) // 2] if slopes else 0.0


class Soak:
    """One run on a server of its own."""

    def __init__(self, tasks: int, every: float, say: float) -> None:
        self.tasks, self.every, self.say = tasks, every, say
        self.samples: list[Sample] = []
        self.verdicts: list[tuple[str, str, bool]] = []

    async def run(self) -> bool:
        server = PrivateServer("--save", "").start()
        try:
            return await self._run(server.url)
        finally:
            server.stop()

    async def _run(self, url: str) -> bool:
        from orchestra.connections import ConnectionManager
        from orchestra.task_queue import RedisStreamTaskQueue

        async with ConnectionManager(url) as manager, RedisStreamTaskQueue("soak", "workers", manager=manager) as queue:
            await queue.consume("warm", 1, 0)
            await queue.retire("warm")
            before = await self._redis(manager)
            worker, producer = await self._start("work", url), await self._start("produce", url, str(self.tasks))
            try:
                async with asyncio.timeout(120 + self.tasks / 500):
                    await self._watch(manager, queue, worker, producer)
                worker.terminate()
                async with asyncio.timeout(60):
                    said, _ = await worker.communicate()
            finally:
                for process in (worker, producer):
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
            stats = await queue.stats()
            after = await self._redis(manager)
        self._judge(stats, before, after, json.loads(said or b"{}"), producer.returncode)
        return all(held for _, _, held in self.verdicts)

    async def _start(self, *command: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.soak", *command), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )

    async def _redis(self, manager: Any) -> tuple[int, int]:
        await manager.client.memory_purge()
        return (await manager.client.info("memory"))["used_memory"] // 1024, await manager.client.dbsize()

    async def _watch(self, manager: Any, queue: Any, worker: Any, producer: Any) -> None:
        began = said = time.monotonic()
        while True:
            stats = await queue.stats()
            done = stats.counters.get("completed", 0)
            redis = (await manager.client.info("memory"))["used_memory"] // 1024
            keys = await manager.client.dbsize()
            now = time.monotonic()
            self.samples.append(Sample(now - began, done, stats.live, *resident(worker.pid), redis, keys))
            if done >= self.tasks:
                return
            if worker.returncode is not None or producer.returncode not in (None, 0):
                raise RuntimeError("a process of the soak ended early")
            if now - said >= self.say:
                said = now
                self._tell(self.samples[-1])
            await asyncio.sleep(self.every)

    def _tell(self, s: Sample) -> None:
        print(
            f"{s.at:7.1f} s {s.done:>10} done {s.live:>6} live  worker {s.rss / 1024:6.1f} MiB {s.files} files "
            f"{s.threads} threads  redis {s.redis / 1024:6.1f} MiB {s.keys} keys",
            flush=True,
        )

    # --- the verdict

    def _judge(self, stats: Any, before: tuple[int, int], after: tuple[int, int], left: dict, produced: int) -> None:
        warm = [s for s in self.samples if s.done >= WARM_UP * self.tasks]
        thousands = (1 - WARM_UP) * self.tasks / 1000
        grown = slope(warm, "rss")
        flat = grown <= max(MAX_SLOPE, ONCE / thousands)
        self._row("worker memory, KiB per 1,000 tasks", f"{grown:+.3f} (at most {MAX_SLOPE})", flat)
        for field in ("files", "threads"):
            seen = sorted({getattr(s, field) for s in warm})
            self._row(f"worker {field}", " ".join(map(str, seen)), seen[-1] - seen[0] <= 1)
        self._row("redis memory, emptied, KiB", f"{before[0]} → {after[0]}", after[0] - before[0] <= MAX_REDIS)
        grown = slope(warm, "redis")
        self._row("redis memory, KiB per 1,000 tasks", f"{grown:+.3f}", grown <= MAX_REDIS / thousands)
        keys = sorted({s.keys for s in warm})
        self._row("redis keys", f"{keys} during, {before[1]} → {after[1]}", keys[-1] - keys[0] <= 4)
        highest = max(s.live for s in self.samples)
        self._row("backlog", f"{highest} at the most", highest <= BACKLOG + 3 * CHUNK)
        counters = {name: value for name, value in stats.counters.items() if value}
        self._row("counters", json.dumps(counters), counters == {"produced": self.tasks, "completed": self.tasks})
        self._row("left in the worker", json.dumps(left), left == {"held": 0, "unsettled": 0, "tasks": 0})
        self._row("producer", f"exit status {produced}", produced == 0)

    def _row(self, what: str, value: str, held: bool) -> None:
        self.verdicts.append((what, value, held))

    def report(self) -> str:
        last = self.samples[-1]
        rate = last.done / last.at if last.at else 0.0
        lines = [f"{self.tasks} tasks in {last.at:.1f} s, {rate:,.0f} a second, {len(self.samples)} samples"]
        lines += [f"{'pass' if held else 'FAIL'}  {what:<42} {value}" for what, value, held in self.verdicts]
        return "\n".join(lines)


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ("work", "produce"):
        role, url, *rest = sys.argv[1:]
        asyncio.run(work(url) if role == "work" else produce(url, int(rest[0])))
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000_000)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two samples")
    parser.add_argument("--say", type=float, default=5.0, help="seconds between two lines")
    parser.add_argument("--json", type=Path, help="write the samples there")
    given = parser.parse_args()
    soak = Soak(given.tasks, given.every, given.say)
    held = asyncio.run(soak.run())
    print(soak.report())
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(sample) for sample in soak.samples]))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
