"""What each durability mode costs: ``python -m benchmarks.durability`` prints the table of docs/durability.md.

One server with one replica, both started here; the modes take turns, rows show medians. Not a guarded benchmark: the disk
decides, and compares with nothing but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time

from benchmarks._server import Server
from orchestra.connections import ConnectionManager
from orchestra.errors import ConfigurationError
from orchestra.task_queue import RedisStreamTaskQueue

MODES = ("accepted", "replicated(1)", "fsynced")
ROUNDS, CALLS, SLOW_CALLS, BATCH = 5, 200, 2, 10_000


async def measure(server: Server, mode: str, calls: int) -> tuple[float, float]:
    """Median seconds of one call at a time, and tasks a second of one large ``produce_many``."""
    async with ConnectionManager(server.url, production=False) as manager:
        queue = RedisStreamTaskQueue("cost", "workers", manager=manager, durability=mode)
        await queue.produce({"type": "x"})
        single = []
        for _ in range(calls):
            began = time.perf_counter()
            await queue.produce({"type": "x"})
            single.append(time.perf_counter() - began)
        began = time.perf_counter()
        await queue.produce_many([{"type": "x"} for _ in range(BATCH)])
        rate = BATCH / (time.perf_counter() - began)
        await queue.close()
    server.flush()
    return statistics.median(single), rate


async def main() -> None:
    """Measure and print."""
    with contextlib.ExitStack() as stack:
        master, replica = Server("tcp"), Server("tcp")
        stack.callback(master.stop)
        stack.callback(replica.stop)
        host, port = master.address
        replica.raw.ask("REPLICAOF", host, port)
        while "online" not in master.info("replication").get("slave0", ""):
            await asyncio.sleep(0.1)
        master.raw.ask("CONFIG", "SET", "appendonly", "yes")
        while master.info("persistence")["aof_rewrite_in_progress"] != "0":
            await asyncio.sleep(0.1)
        print(f"server {master.version}\n| `appendfsync` | mode | one call, p50 | `produce_many` of {BATCH:,} |")
        for fsync in ("everysec", "always"):
            master.raw.ask("CONFIG", "SET", "appendfsync", fsync)
            await compare(master, fsync)


async def compare(master: Server, fsync: str) -> None:
    """The rows of one setting."""
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(ROUNDS):
        for mode in MODES:
            slow = mode == "fsynced" and fsync == "everysec"
            if slow and number:
                continue
            try:
                found.setdefault(mode, []).append(await measure(master, mode, SLOW_CALLS if slow else CALLS))
            except ConfigurationError as error:
                print(f"| `{fsync}` | {mode} | {error} |")
    for mode, rows in found.items():
        if rows:
            single, rate = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"| `{fsync}` | {mode} | {single * 1000:.2g} ms | {rate:,.0f}/s |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
