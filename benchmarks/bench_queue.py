"""Producing tasks, and what a queued task costs in memory, beside the same scripts sent as precomputed bytes.

Owed: produce_many without ids at least 0.7 of its ceiling, with ids 0.5; at most 120 B of Redis memory a queued task
beyond its frame. The dicts are made before the clock starts; encoding them is part of what is measured.
"""

from __future__ import annotations

import asyncio
import gc
import time

import pytest

from benchmarks import _raw
from benchmarks._table import Row
from benchmarks._worker import queue_at, run_loop
from orchestra.serialization import encode_task

CONCURRENT = 1000


async def _warm(queue):
    """The connection, and one call through each path."""
    await queue.produce(_raw.task())
    await queue.produce_many([_raw.task()])


async def _produce_many(url, tasks):
    async with queue_at(url) as queue:
        await _warm(queue)
        began = time.perf_counter()
        ids = await queue.produce_many(tasks)
        took = time.perf_counter() - began
    assert len(set(ids)) == len(tasks)
    return len(tasks) / took


@pytest.mark.parametrize("ids", [False, True], ids=["generated ids", "own ids"])
def test_produce_many(benchmark, comparisons, empty, scale, ids):
    count = scale(50_000, 20_000, 1_000)
    row = Row(f"produce_many, {'own ids (deduplicated)' if ids else 'generated ids'}", "tasks/s", 0.5 if ids else 0.7)

    def raw():
        empty.flush()
        _raw.load_scripts(empty.raw)
        return {row: _raw.rate_of_calls(empty.raw, _raw.produce_calls(count, ids=ids), count, strings=_raw.RECORD)}

    def ours():
        empty.flush()
        tasks = [_raw.task(number if ids else None) for number in range(count)]
        gc.collect()  # these dicts are the benchmark's own: looking through all of them once is not the queue's work
        return {row: run_loop(_produce_many(empty.url, tasks))}

    comparisons.run(benchmark, ours, raw)


def test_produce_many_beside_plain_xadd(benchmark, comparisons, empty, scale):
    """What the promises of the produce script cost: the ceiling here is XADD without any."""
    count = scale(50_000, 20_000, 1_000)
    row = Row("produce_many, generated ids, beside plain XADD", "tasks/s")

    def raw():
        empty.flush()
        return {row: _raw.xadd_rate(empty.raw, count)}

    def ours():
        empty.flush()
        return {row: run_loop(_produce_many(empty.url, [_raw.task() for _ in range(count)]))}

    comparisons.run(benchmark, ours, raw)


def test_produce_one_at_a_time(benchmark, comparisons, empty, scale):
    """One task, wait for its id, next: bound by round trips, so the ceiling is one call under way."""
    count = scale(5_000, 2_000, 200)
    row = Row("produce, one at a time", "tasks/s")

    async def loop():
        async with queue_at(empty.url) as queue:
            await _warm(queue)
            began = time.perf_counter()
            for _ in range(count):
                await queue.produce(_raw.task())
            return count / (time.perf_counter() - began)

    def raw():
        _raw.load_scripts(empty.raw)
        return {row: _raw.rate_of_calls(empty.raw, _raw.produce_one_calls(count), count, in_flight=1)}

    comparisons.run(benchmark, lambda: {row: run_loop(loop())}, raw)


def test_produce_concurrently(benchmark, comparisons, empty, scale):
    """A thousand coroutines that each produce one task: what a busy service does."""
    times = scale(20, 10, 1)
    row = Row("1,000 concurrent produce()", "tasks/s")

    async def gather():
        async with queue_at(empty.url) as queue:
            await _warm(queue)
            began = time.perf_counter()
            for _ in range(times):
                await asyncio.gather(*(queue.produce(_raw.task()) for _ in range(CONCURRENT)))
            return times * CONCURRENT / (time.perf_counter() - began)

    def raw():
        _raw.load_scripts(empty.raw)
        count = times * CONCURRENT
        calls = _raw.produce_calls(count, ids=False)
        return {row: _raw.rate_of_calls(empty.raw, calls, count, strings=_raw.RECORD)}

    comparisons.run(benchmark, lambda: {row: run_loop(gather())}, raw)


@pytest.mark.parametrize("ids", [False, True], ids=["generated ids", "own ids"])
def test_memory_per_queued_task(benchmark, comparisons, empty, scale, ids):
    """Redis memory a queued task takes beyond the bytes of its frame; own ids add their dedup record."""
    count = scale(50_000, 20_000, 2_000)
    tasks = [_raw.task(number if ids else None) for number in range(count)]
    size = len(encode_task(tasks[0]).frame)
    name = "own ids" if ids else "generated ids"
    row = Row(f"Redis memory a queued task beyond its {size} B, {name}", "B", 120, less_is_better=True)

    def ours():
        empty.flush()
        run_loop(_warm_only(empty.url))
        before = int(empty.info("memory")["used_memory_dataset"])
        run_loop(_fill(empty.url, tasks))
        return {row: (int(empty.info("memory")["used_memory_dataset"]) - before) / count - size}

    comparisons.run(benchmark, ours, dict)


async def _warm_only(url):
    async with queue_at(url) as queue:
        await _warm(queue)


async def _fill(url, tasks):
    async with queue_at(url) as queue:
        await queue.produce_many(tasks)
