"""Rate limits on a real Redis: sequential acquires against a bare EVALSHA loop, a herd, and local refusals.

Owed: a sequential remote acquire at 0.8 of the same script called bare on the same kind of connection, in the same run; 10,000
concurrent ones in at most 100 round trips; 5 million local refusals a second (of the compiled table, as ``bench_gcra.py``
also has it; what ``refused_for`` adds in Python is shown).
Run: ``python -m pytest benchmarks/bench_limits.py --benchmark-enable -s``. Blocks alternate, so that what else the machine
does falls on both sides; the ratio is the median of the pairs.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import timeit

from benchmarks._server import Server, awake_cores
from orchestra import _keys, _scripts
from orchestra.connections import ConnectionManager
from orchestra.flow_control import BackpressureConfig, RateLimitConfig, RedisRateLimiter

OWED_RATIO = 0.8
OWED_ROUND_TRIPS = 100
OWED_REFUSALS = 5e6
BLOCK, PAIRS = 400, 30
HERD = 10_000
ENDLESS = BackpressureConfig(rate_limit=RateLimitConfig(rate=1e6, burst=10**6))
ALMOST_NONE = BackpressureConfig(rate_limit=RateLimitConfig(rate=1, burst=1))


async def sequential(url: str) -> tuple[float, float, float]:
    """Acquires a second, bare calls a second, and the median ratio of the pairs."""
    async with ConnectionManager(url) as manager:
        limiter = RedisRateLimiter("one", ENDLESS, manager=manager)
        await limiter.acquire()
        wire = await manager.open_wire("bare")
        sha, keys = _scripts.script("gcra").sha, (_keys.limit_settings(), _keys.limiter("bare"))
        args = (1, "bare", "0", 1, 10**6, 1, 0, 1, 1, 1, 0)
        ours, bare = [], []
        for _ in range(PAIRS):
            began = time.perf_counter()
            for _ in range(BLOCK):
                await wire.call("EVALSHA", sha, 2, *keys, *args)
            between = time.perf_counter()
            for _ in range(BLOCK):
                await limiter.acquire()
            ours.append(BLOCK / (time.perf_counter() - between))
            bare.append(BLOCK / (between - began))
        assert limiter.metrics.calls == PAIRS * BLOCK + 1
        ratio = statistics.median([a / b for a, b in zip(ours, bare, strict=True)])
        return statistics.median(ours), statistics.median(bare), ratio


async def herd(url: str) -> tuple[int, float]:
    """Round trips and seconds for 10,000 concurrent acquires."""
    async with ConnectionManager(url) as manager:
        limiter = RedisRateLimiter("herd", ENDLESS, manager=manager)
        await limiter.acquire()
        before, began = limiter.metrics.calls, time.perf_counter()
        assert all(await asyncio.gather(*(limiter.acquire() for _ in range(HERD))))
        return limiter.metrics.calls - before, time.perf_counter() - began


async def refusals() -> tuple[float, float]:
    """Refusals a second: of the table, and of ``refused_for``."""
    limiter = RedisRateLimiter("refused", ALMOST_NONE, manager="memory:")
    assert await limiter.acquire()
    cell, now_us = limiter.cell(None), int(time.monotonic() * 1e6)
    names = {"table": limiter._known.refused_for, "refused_for": limiter.refused_for, "cell": cell, "now": now_us}
    count = 50_000
    table = min(timeit.repeat("table(cell, 1, now, 1000000, 1000000)", globals=names, number=count, repeat=5))
    python = min(timeit.repeat("refused_for()", globals=names, number=count, repeat=5))
    return count / table, count / python


def test_sequential(benchmark):
    server = Server()
    try:
        with awake_cores(not benchmark.disabled):
            ours, bare, ratio = benchmark.pedantic(lambda: asyncio.run(sequential(server.url)), rounds=1)
    finally:
        server.stop()
    benchmark.extra_info.update(ratio=round(ratio, 3), acquires=round(ours), bare=round(bare))
    print(f"\nsequential: {ours:,.0f} acquires/s, bare EVALSHA {bare:,.0f}/s, ratio {ratio:.2f}")
    assert benchmark.disabled or ratio >= OWED_RATIO


def test_herd(benchmark):
    server = Server()
    try:
        round_trips, seconds = benchmark.pedantic(lambda: asyncio.run(herd(server.url)), rounds=1)
    finally:
        server.stop()
    benchmark.extra_info.update(round_trips=round_trips)
    print(f"\n{HERD:,} concurrent acquires: {round_trips} round trips, {HERD / seconds:,.0f}/s")
    assert round_trips <= OWED_ROUND_TRIPS


def test_local_refusals(benchmark):
    table, python = benchmark.pedantic(lambda: asyncio.run(refusals()), rounds=1)
    benchmark.extra_info.update(table=round(table), refused_for=round(python))
    print(f"\nlocal refusals: table {table / 1e6:.1f} million/s, refused_for {python / 1e6:.2f} million/s")
    assert benchmark.disabled or table >= OWED_REFUSALS
