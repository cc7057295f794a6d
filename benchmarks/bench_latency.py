"""Latency of one task through an idle system, beside the wake-up of a blocked raw reader in another process.

Owed: from before ``produce`` to the start of the agent at most 2.5 times (p50) and 4 times (p99) the raw XADD to blocked
XREADGROUP. One task at a time with a gap of 5 ms; both clocks are this machine's monotonic one.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time

from benchmarks import _raw
from benchmarks._table import Row
from benchmarks._worker import other_process, queue_at, run_loop

GAP = 0.005
WARM = 20


def _rows(what, p50=None, p99=None):
    return Row(f"{what}, p50", "µs", p50, less_is_better=True), Row(f"{what}, p99", "µs", p99, less_is_better=True)


def _percentiles(rows, times):
    ordered = sorted(times[WARM:])
    return {
        row: ordered[min(len(ordered) - 1, int(len(ordered) * share))]
        for row, share in zip(rows, (0.5, 0.99), strict=True)
    }


async def _send(url, pipe, samples):
    times = []
    async with queue_at(url) as queue:
        for _ in range(samples):
            began = time.monotonic_ns()
            await queue.produce(_raw.task())
            times.append((struct.unpack("<q", os.read(pipe, 8))[0] - began) / 1000)
            await asyncio.sleep(GAP)
    return times


def send_times(server, samples):
    """Microseconds from before ``produce`` here to the agent's first line in a worker process."""
    server.flush()
    with other_process("wake", server.url) as worker:
        return run_loop(_send(server.url, worker.stdout.fileno(), samples))


def wake_times(server, samples):
    """Microseconds from before XADD here until a blocked reader in another process has the bytes."""
    server.flush()
    _raw.make_groups(server.raw)
    with other_process("raw-wake", server.url, samples) as reader:
        assert os.read(reader.stdout.fileno(), 8) == bytes(8)
        return _raw.wake_times(server, reader.stdout.fileno(), samples, GAP)


def test_send_to_start(benchmark, comparisons, empty, scale):
    samples = WARM + scale(500, 200, 20)
    rows = _rows("send → agent starts, idle system", 2.5, 4.0)
    comparisons.run(
        benchmark,
        lambda: _percentiles(rows, send_times(empty, samples)),
        lambda: _percentiles(rows, wake_times(empty, samples)),
    )


def test_send_to_result(benchmark, comparisons, empty, scale):
    """There and back; the ceiling publishes from the reader to a subscriber here."""
    samples = WARM + scale(300, 150, 20)
    rows = _rows("send → result, idle system")

    async def ask():
        times = []
        async with queue_at(empty.url) as queue:
            for number in range(samples):
                began = time.monotonic_ns()
                await queue.produce_many([_raw.task(number)], want_results=True)
                record = await queue.wait_result(f"task-{number:06d}", 10)
                times.append((time.monotonic_ns() - began) / 1000)
                assert record["value"] == "done"
                await asyncio.sleep(GAP)
        return times

    def ours():
        empty.flush()
        with other_process("answer", empty.url):
            return _percentiles(rows, run_loop(ask()))

    def raw():
        empty.flush()
        _raw.make_groups(empty.raw)
        with other_process("raw-echo", empty.url, samples) as reader:
            assert os.read(reader.stdout.fileno(), 8) == bytes(8)
            return _percentiles(rows, _raw.echo_times(empty, samples, GAP))

    comparisons.run(benchmark, ours, raw)


def test_many_results(benchmark, comparisons, empty, scale):
    """Sent in one call and all awaited at once, sending included; no ceiling, as no single command does this."""
    count = scale(10_000, 5_000, 200)
    row = Row("send, and await the results of 10,000 tasks at once", "results/s")

    async def ask():
        async with queue_at(empty.url) as queue:
            await queue.produce_many([_raw.task(count)], want_results=True)
            await queue.wait_result(f"task-{count:06d}", 10)  # subscribed
            began = time.monotonic()
            await queue.produce_many([_raw.task(number) for number in range(count)], want_results=True)
            records = await asyncio.gather(*(queue.wait_result(f"task-{number:06d}", 60) for number in range(count)))
            took = time.monotonic() - began
        assert {record["value"] for record in records} == {"done"}
        return {row: count / took}

    def ours():
        empty.flush()
        with other_process("answer", empty.url):
            return run_loop(ask())

    comparisons.run(benchmark, ours, dict)
