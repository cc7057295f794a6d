"""A system under load: producing and draining at once, latency at half of that, and agents that need a processor.

Owed: p99 of send → start at half of the highest rate at most 3 times that of the idle system. The highest rate is what one
producer and one worker reach at once, in the same round and by the same three processes (producer, server, worker), which
share the cores of this machine. The latency is taken from an open loop: tasks leave when they are due, whether or not
earlier ones have started, and each carries the moment it was due; so a stall is counted for every task that it delays,
the sender's own stalls included. Idle tasks carry the moment of the call, because a timer of asyncio is up to 1 ms late.
"""

from __future__ import annotations

import asyncio
import json
import os
import time

from benchmarks import _burn, _raw
from benchmarks._table import Row
from benchmarks._worker import other_process, queue_at, run_loop

IDLE_RATE = 200
"""Tasks a second of an idle system: the next one leaves long after the last has ended."""


def _report(worker):
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(worker.stderr.read().decode())
    return json.loads(line)


def _timed(due_ns):
    task = _raw.task()
    task["input"] = {**task["input"], "sent": due_ns}
    return task


async def _open_loop(url, rate, count):
    """``count`` tasks at ``rate`` a second: each call sends what has become due during the last one."""
    async with queue_at(url) as queue:
        await queue.get_queue_depth()  # opens the connection
        began, sent = time.monotonic_ns(), 0
        while sent < count:
            now = time.monotonic_ns()
            due = min(count, int((now - began) / 1e9 * rate) + 1)
            if due > sent:
                moments = [began + int(number / rate * 1e9) for number in range(sent, due)]
                await queue.produce_many([_timed(now if rate <= IDLE_RATE else moment) for moment in moments])
                sent = due
            ahead = began / 1e9 + sent / rate - time.monotonic()
            if ahead > 0:
                await asyncio.sleep(ahead)


async def _produce(url, count):
    tasks = [_raw.task() for _ in range(count)]
    async with queue_at(url) as queue:
        await queue.produce(_raw.task())  # opens the connection, loads the script
        began = time.monotonic()
        await queue.produce_many(tasks)
        return began


def _total(server, count):
    """Tasks a second from the first produce until the queue is empty; the worker waits already."""
    server.flush()
    with other_process("drain", server.url, count + 1) as worker:
        began = run_loop(_produce(server.url, count))
        assert _report(worker)["outcomes"] == {"completed": count + 1}
        return count / (time.monotonic() - began)


def _latency(server, rate, count):
    """p50 and p99 in microseconds of an open loop of ``rate`` tasks a second, without its first tenth."""
    server.flush()
    with other_process("load", server.url, count) as worker:
        run_loop(_open_loop(server.url, rate, count))
        waited = sorted(_report(worker)["waited_us"][count // 10 :])
    return {share: waited[min(len(waited) - 1, int(len(waited) * share))] for share in (0.5, 0.99)}


def test_produce_and_drain_at_once(benchmark, comparisons, empty, scale):
    """The ceiling sends XADD with ids known before, XREADGROUP and the settle script on one connection."""
    count = scale(50_000, 20_000, 2_000)
    row = Row("produce and drain at once, one producer and one worker", "tasks/s")

    def raw():
        _raw.load_scripts(empty.raw)
        return {row: _raw.total_rate(empty, count)}

    comparisons.run(benchmark, lambda: {row: _total(empty, count)}, raw)


def test_latency_at_half_load(benchmark, comparisons, empty, scale):
    count, samples = scale(50_000, 20_000, 2_000), scale(500, 200, 50)
    seconds = scale(3.0, 1.5, 0.2)
    p50 = Row("send → start at half of the highest rate, p50 (ceiling: idle)", "µs", less_is_better=True)
    p99 = Row("send → start at half of the highest rate, p99 (ceiling: idle)", "µs", 3.0, less_is_better=True)
    rate = Row("half of the highest rate", "tasks/s")

    def raw():
        found = _latency(empty, IDLE_RATE, samples)
        return {p50: found[0.5], p99: found[0.99]}

    def ours():
        half = _total(empty, count) / 2
        found = _latency(empty, half, max(200, int(half * seconds)))
        return {p50: found[0.5], p99: found[0.99], rate: half}

    comparisons.run(benchmark, ours, raw)


def test_processor_bound(benchmark, comparisons, empty, scale):
    """Plain functions in the worker's processes; the ceiling is as many processes that only call the function."""
    count = scale(2_000, 800, 40)
    cores = os.cpu_count() or 1
    row = Row(f"agents of about 2 ms of CPU, in {cores} processes (ceiling: no queue)", "tasks/s")

    async def fill():
        async with queue_at(empty.url) as queue:
            await queue.produce_many([_raw.task() for _ in range(count)])

    def ours():
        empty.flush()
        run_loop(fill())
        with other_process("burn", empty.url, count) as worker:
            report = _report(worker)
        assert report["outcomes"] == {"completed": count}
        return {row: count / report["run_s"]}

    comparisons.run(benchmark, ours, lambda: {row: _burn.plain_rate(cores, count)})
