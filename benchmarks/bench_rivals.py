"""The compiled modules beside the libraries a user would reach for, without Redis: one table at the end of the run.

Nothing is owed here; ``bench_heap.py``, ``bench_codec.py``, ``bench_gcra.py`` and ``bench_wrr.py`` hold what is. Limiters
do different things: what is compared is one decision about one key, in memory, in the process that asks.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import random

import pytest

from benchmarks import bench_gcra
from benchmarks._beside import Rival, beside
from orchestra import serialization
from orchestra._ext import codec
from orchestra._ext.gcra import GcraTable, check
from orchestra._ext.heap import TaskHeap
from orchestra._ext.wrr import SmoothRing

TASK = {
    "id": "task-000123",
    "type": "text_classification",
    "input": {"text": "Classify this text please: lorem ipsum dolor"},
    "priority": 2,
}
CODEC = codec.TaskCodec(serialization.new_task_id)


def _heapq(size):
    def make(module):
        held, numbers = [(number % 4, number, None) for number in range(size)], itertools.count(size)
        module.heapify(held)

        def call():
            module.heappush(held, (2, next(numbers), None))
            module.heappop(held)

        return call

    return make


def _priority_queue(size):
    def make(module):
        queue, numbers = module.PriorityQueue(), itertools.count(size)
        for number in range(size):
            queue.put_nowait((number % 4, number, None))

        def call():
            queue.put_nowait((2, next(numbers), None))
            queue.get_nowait()

        return call

    return make


@pytest.mark.parametrize("size", [1_000, 100_000])
def test_push_and_pop(benchmark, size):
    heap = TaskHeap()
    for number in range(size):
        heap.push(number % 4, None)

    def ours():
        heap.push(2, None)
        heap.pop()

    rivals = [
        Rival("heapq", "heapq", "Python", _heapq(size)),
        Rival("asyncio.PriorityQueue", "asyncio", "Python", _priority_queue(size)),
        Rival("queue.PriorityQueue", "queue", "Python", _queue_queue(size)),
    ]
    beside(benchmark, f"heap: push and pop, {size:,} held", ours, rivals)


def _queue_queue(size):
    def make(module):
        queue, numbers = module.PriorityQueue(), itertools.count(size)
        for number in range(size):
            queue.put((number % 4, number, None))

        def call():
            queue.put((2, next(numbers), None))
            queue.get()

        return call

    return make


def test_encode(benchmark):
    rivals = [
        Rival("msgspec.msgpack", "msgspec", "msgspec", lambda m: _of(m.msgpack.Encoder().encode, TASK)),
        Rival("ormsgpack", "ormsgpack", "ormsgpack", lambda m: _of(m.packb, TASK)),
        Rival("orjson (JSON)", "orjson", "orjson", lambda m: _of(m.dumps, TASK)),
        Rival("json", "json", "Python", lambda m: _of(m.dumps, TASK)),
    ]
    beside(benchmark, "codec: encode a task, checked, with header", _of(CODEC.encode, TASK), rivals)


def test_decode(benchmark):
    rivals = [
        Rival(
            "msgspec.msgpack", "msgspec", "msgspec", lambda m: _of(m.msgpack.Decoder().decode, m.msgpack.encode(TASK))
        ),
        Rival("ormsgpack", "ormsgpack", "ormsgpack", lambda m: _of(m.unpackb, m.packb(TASK))),
        Rival("orjson (JSON)", "orjson", "orjson", lambda m: _of(m.loads, m.dumps(TASK))),
        Rival("json", "json", "Python", lambda m: _of(m.loads, m.dumps(TASK))),
    ]
    beside(benchmark, "codec: decode a task", _of(CODEC.decode, CODEC.encode(TASK)[2]), rivals)


def test_header(benchmark):
    """What a worker reads before it decides; the libraries have to decode all of it."""
    rivals = [
        Rival(
            "msgspec.msgpack", "msgspec", "msgspec", lambda m: _of(m.msgpack.Decoder().decode, m.msgpack.encode(TASK))
        ),
        Rival("ormsgpack", "ormsgpack", "ormsgpack", lambda m: _of(m.unpackb, m.packb(TASK))),
    ]
    beside(benchmark, "codec: header of a task", _of(codec.decode_header, CODEC.encode(TASK)[2]), rivals)


def _of(function, argument):
    return lambda: function(argument)


def _limits(strategy, rate):
    def make(module):
        storage, strategies = _parts(module, "storage", "strategies")
        limiter = getattr(strategies, strategy)(storage.MemoryStorage())
        item = module.parse(rate)
        return lambda: limiter.hit(item, "tenant-7")

    return make


def _parts(module, *names):
    return [importlib.import_module(f"{module.__name__}.{name}") for name in names]


def _throttled(refuse):
    def make(module):
        quota = module.per_min(1, burst=1) if refuse else module.per_sec(10_000_000, burst=10_000_000)
        kind = module.RateLimiterType.GCRA.value
        return module.Throttled(key="tenant-7", using=kind, quota=quota, store=module.MemoryStore()).limit

    return make


def _aiolimiter(module):
    """A thousand acquires in one run of a loop, so that starting the loop does not count."""

    async def acquire():
        limiter = module.AsyncLimiter(10_000_000, 1)
        for _ in range(1_000):
            await limiter.acquire()

    return lambda: asyncio.run(acquire())


def test_allowed(benchmark):
    epoch = bench_gcra.EPOCH_US
    rivals = [
        Rival("limits, moving window", "limits", "limits", _limits("MovingWindowRateLimiter", "1000000/second")),
        Rival(
            "limits, sliding counter", "limits", "limits", _limits("SlidingWindowCounterRateLimiter", "1000000/second")
        ),
        Rival("throttled-py, GCRA", "throttled", "throttled-py", _throttled(refuse=False)),
        Rival("aiolimiter", "aiolimiter", "aiolimiter", _aiolimiter, 1_000),
    ]
    beside(benchmark, "limits: allowed", lambda: check(epoch + 100, epoch, 1, 10_000, 200_000), rivals)


def test_refused(benchmark):
    refused = bench_gcra.known(GcraTable())["refused_for"]
    now = bench_gcra.LOCAL_US + 500
    rivals = [
        Rival("limits, moving window", "limits", "limits", _limits("MovingWindowRateLimiter", "1/hour")),
        Rival("limits, sliding counter", "limits", "limits", _limits("SlidingWindowCounterRateLimiter", "1/hour")),
        Rival("throttled-py, GCRA", "throttled", "throttled-py", _throttled(refuse=True)),
    ]
    beside(benchmark, "limits: refused", lambda: refused("tenant-7", 1, now, 10_000, 200_000), rivals)


def test_select_by_weight(benchmark):
    ring, names, weights = SmoothRing(), [f"worker-{number}" for number in range(10)], list(range(1, 11))
    for name, weight in zip(names, weights, strict=True):
        ring.set_weight(name, weight)
    picker = random.Random(1)
    rivals = [
        Rival("random.choices", "random", "Python", lambda _: lambda: picker.choices(names, weights)[0]),
        Rival("itertools.cycle (no weights)", "itertools", "Python", lambda m: m.cycle(names).__next__),
    ]
    beside(benchmark, "balancer: one of 10 by weight", ring.select, rivals)
