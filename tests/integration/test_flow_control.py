"""The shared limit on a real Redis: the bound over every window, the script, waiting, outages."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

import pytest

from orchestra import _keys, _scripts, flow_control
from orchestra.connections import ConnectionManager
from orchestra.errors import StoreUnavailableError
from orchestra.flow_control import (
    BackpressureConfig,
    BackpressureStrategy,
    RateLimitConfig,
    RedisRateLimiter,
    get_flow_controller,
)

WAIT = BackpressureStrategy.WAIT


def config(rate=100.0, burst=10, period=1.0, **more) -> BackpressureConfig:
    return BackpressureConfig(rate_limit=RateLimitConfig(rate=rate, burst=burst, period=period), **more)


@pytest.fixture
def calls(monkeypatch):
    """Every call of the script: (arguments, reply)."""
    seen = []
    real = _scripts.call

    async def call(client, name, keys, args):
        reply = await real(client, name, keys, args)
        seen.append((list(args), reply))
        return reply

    monkeypatch.setattr(flow_control._scripts, "call", call)
    return seen


def admitted(calls) -> list[tuple[int, int]]:
    """(microseconds of the Redis clock, cost) of everything that was admitted."""
    log = []
    for args, (now, _, *waits) in calls:
        log += [(now, cost) for cost, wait in zip(args[3::2], waits, strict=True) if wait == 0]
    return sorted(log)


def worst_window(log: list[tuple[int, int]], emission_us: int) -> int:
    """The largest, over all windows, of cost * T - length: whole numbers, so exact. At most burst * T is right."""
    worst, total, least = 0, 0, None
    for at, cost in log:
        start = total * emission_us - at
        least = start if least is None else min(least, start)
        total += cost
        worst = max(worst, total * emission_us - at - least)
    return worst


def test_the_checker_finds_a_violation():
    assert worst_window([(0, 1), (0, 1), (10, 1)], 10) == 20
    assert worst_window([(0, 1), (0, 1), (0, 1), (50, 1)], 10) == 30
    assert worst_window([(0, 5), (100, 1), (100, 5), (110, 1)], 10) == 60


@pytest.mark.parametrize("strategy", list(BackpressureStrategy))
async def test_bound_over_every_window(redis_url, calls, strategy):
    """Several clients, random costs and priorities, for a while: no window ever holds more than it may."""
    settings = config(
        rate=500.0, burst=20, strategy=strategy, max_wait=0.05 if strategy is WAIT else None, priority_reserve=0.5
    )
    rng = random.Random(7)
    end = asyncio.get_running_loop().time() + 0.8

    async def client(limiter):
        while asyncio.get_running_loop().time() < end:
            await limiter.acquire(priority=rng.randint(-1, 4), cost=rng.randint(1, 8))
            await asyncio.sleep(rng.random() * 0.004)

    async with AsyncExitStack() as stack:
        managers = [await stack.enter_async_context(ConnectionManager(redis_url)) for _ in range(4)]
        limiters = [RedisRateLimiter("bound", settings, manager=manager) for manager in managers]
        await asyncio.gather(*(client(limiter) for limiter in limiters for _ in range(6)))

    log = admitted(calls)
    limit = settings.rate_limit
    assert worst_window(log, limit.emission_us) <= limit.burst_us
    spent = sum(cost for _, cost in log)
    # and the limit is used, not merely kept: most of what could be admitted was
    assert spent >= 0.7 * (limit.burst_us + log[-1][0] - log[0][0]) / limit.emission_us
    assert sum(limiter.metrics.acquired for limiter in limiters) == len(log)
    assert sum(limiter.metrics.calls for limiter in limiters) == len(calls)


async def test_a_thousand_at_once_take_few_round_trips(manager, calls):
    limiter = RedisRateLimiter("herd", config(rate=1.0, burst=100), manager=manager)
    answers = await asyncio.gather(*(limiter.acquire() for _ in range(1000)))
    assert sum(answers) == 100
    assert answers[:100] == [True] * 100
    assert len(calls) <= 2
    assert limiter.metrics.calls == len(calls)
    generous = RedisRateLimiter("herd2", config(rate=1.0, burst=1000), manager=manager)
    assert all(await asyncio.gather(*(generous.acquire() for _ in range(1000))))
    assert generous.metrics.calls == 2


async def test_local_refusals_are_never_wrong(redis_url, manager):
    """Whenever one client refuses without asking, Redis would have refused at that moment too."""
    settings = config(rate=400.0, burst=4)
    local = RedisRateLimiter("local", settings, manager=manager)
    limit = settings.rate_limit
    checked = 0
    async with ConnectionManager(redis_url) as second:
        other = RedisRateLimiter("local", settings, manager=second)
        rng = random.Random(3)
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.6
        while loop.time() < end:
            cost = rng.randint(1, 4)
            before = loop.time()
            wait = local._known.refused_for("local", cost, int(before * 1e6), limit.emission_us, limit.burst_us)
            if wait == 0:
                await local.acquire(cost=cost)
            else:
                args = [limit.emission_us, limit.burst_us, 0, cost, 0]
                _, _, verdict = await _scripts.call(manager.client, "gcra", [_keys.limiter("local")], args)
                assert verdict > 0 or (loop.time() - before) * 1e6 >= wait
                checked += 1
            if rng.random() < 0.2:
                await other.acquire()
    assert checked > 50


async def test_script_and_twin_decide_the_same(manager):
    """The in-process limit replays what Redis did, at the times of Redis, in whole microseconds."""
    rng = random.Random(11)
    settings = config(rate=3000.0, burst=16, priority_reserve=0.4)
    limit = settings.rate_limit
    twin = flow_control._MemoryStore({}, "twin", flow_control.SYSTEM_CLOCK)
    key = _keys.limiter("twin")
    outcomes, stores = set(), 0
    for _ in range(400):
        batch = []
        for number in range(rng.randint(1, 6)):
            urgency, tolerance_us = settings.weigh(rng.randint(0, 3), rng.randint(1, 5))
            batch.append(flow_control._Request(urgency, rng.randint(1, 9), tolerance_us, False, number))
        ordered = rng.random() < 0.5
        args = [limit.emission_us, limit.burst_us, int(ordered)]
        for request in batch:
            args += [request.cost, limit.burst_us - request.tolerance_us]
        now, tat, *waits = await _scripts.call(manager.client, "gcra", [key], args)
        assert twin.decide(now, limit, batch, ordered) == (now, tat, waits)
        outcomes.update(wait > 0 for wait in waits)
        stored = await manager.client.get(key)
        if stored is not None:  # it lives for a millisecond or two only
            assert int(stored) <= tat
            assert int(stored) == tat or 0 not in waits
            stores += 1
    assert stores > 200
    assert outcomes == {True, False}


class TestScript:
    KEY = _keys.limiter("script")

    async def gcra(self, manager, *args):
        return await _scripts.call(manager.client, "gcra", [self.KEY], args)

    async def test_key_lives_until_the_limit_is_full(self, manager):
        now, tat, wait = await self.gcra(manager, 50_000, 500_000, 0, 4, 0)
        assert (tat - now, wait) == (200_000, 0)
        left = await manager.client.pttl(self.KEY)
        seconds, micros = await manager.client.time()
        assert tat - (seconds * 1_000_000 + micros) <= (left + 1) * 1000 <= 203_000
        stored = await manager.client.get(self.KEY)
        assert (stored, len(stored)) == (str(tat).encode(), 16)

    async def test_a_refusal_writes_nothing(self, manager):
        _, _, wait = await self.gcra(manager, 1000, 10_000, 0, 11, 0)
        assert wait == 1000
        assert await manager.client.exists(self.KEY) == 0

    async def test_a_clock_that_went_back_locks_out_for_one_burst_at_most(self, manager):
        seconds, micros = await manager.client.time()
        await manager.client.set(self.KEY, (seconds + 3600) * 1_000_000 + micros)
        now, tat, wait = await self.gcra(manager, 1000, 2_000_000, 0, 1, 0)
        assert (tat - now, wait) == (2_000_000, 1000)
        assert int(await manager.client.get(self.KEY)) == tat
        assert await manager.client.pttl(self.KEY) <= 2002
        await asyncio.sleep(0.005)
        assert (await self.gcra(manager, 1000, 2_000_000, 0, 1, 0))[2] == 0

    async def test_order(self, manager):
        waits = (await self.gcra(manager, 1_000_000, 5_000_000, 1, 3, 0, 4, 0, 1, 0))[2:]
        assert waits == [0, 2_000_000, 3_000_000]
        await manager.client.delete(self.KEY)
        waits = (await self.gcra(manager, 1_000_000, 5_000_000, 0, 3, 0, 4, 0, 1, 0))[2:]
        assert waits == [0, 2_000_000, 0]

    @pytest.mark.parametrize(
        "args",
        [
            (),
            (1000, 10_000, 0),
            (1000, 10_000, 0, 1),
            (0, 10_000, 0, 1, 0),
            (1000, 999, 0, 1, 0),
            ("nan", 10_000, 0, 1, 0),
            (1000, 10_000, 0, 0, 0),
            (1000, 10_000, 0, -5, 0),
            (1000, 10_000, 0, "nan", 0),
            (1000, 10_000, 0, 1, -1),
            (1000, 10_000, 0, 1, 0, "x", 0),
        ],
    )
    async def test_bad_arguments_change_nothing(self, manager, args):
        with pytest.raises(Exception, match="gcra"):
            await self.gcra(manager, *args)
        assert await manager.client.exists(self.KEY) == 0

    async def test_absurd_cost_is_refused(self, manager):
        wait = (await self.gcra(manager, 2**40, 2**48, 0, 10**30, 0))[2]
        assert wait == 2**53

    async def test_longest_horizon_is_exact(self, manager):
        burst_us = 2**48
        now, tat, wait = await self.gcra(manager, burst_us, burst_us, 0, 1, 0)
        assert (tat - now, wait) == (burst_us, 0)
        now, tat, wait = await self.gcra(manager, burst_us, burst_us, 0, 1, 0)
        assert wait == tat - now
        assert int(await manager.client.get(self.KEY)) == tat

    async def test_survives_a_server_that_forgot_it(self, manager):
        limiter = RedisRateLimiter("forgot", config(), manager=manager)
        assert await limiter.acquire()
        await manager.client.script_flush()
        assert await limiter.acquire()


class TestWaiting:
    async def test_everybody_is_served_in_order_and_on_time(self, manager):
        limiter = RedisRateLimiter("line", config(rate=200.0, burst=5, strategy=WAIT), manager=manager)
        order = []

        async def take(number):
            assert await limiter.acquire()
            order.append(number)

        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(take(number) for number in range(65)))
        took = loop.time() - began
        assert order == list(range(65))
        assert 0.3 <= took + 0.002  # 60 beyond the burst at 200 a second
        # exact wake-ups: one call per permit at most, none spent on asking too early
        assert limiter.metrics.calls <= 66

    async def test_cancelled_ones_leave_their_place(self, manager):
        limiter = RedisRateLimiter("cancel", config(rate=100.0, burst=1, strategy=WAIT), manager=manager)
        assert await limiter.acquire()
        tasks = [asyncio.ensure_future(limiter.acquire()) for _ in range(20)]
        await asyncio.sleep(0.002)
        for task in tasks[:18]:
            task.cancel()
        assert await asyncio.gather(*tasks[18:]) == [True, True]
        assert limiter.metrics.acquired == 3
        assert limiter.metrics.cancelled == 18
        assert limiter._pump is None
        assert not limiter._line

    async def test_two_processes_share_the_limit(self, redis_url, manager, calls):
        settings = config(rate=200.0, burst=2, strategy=WAIT)
        async with ConnectionManager(redis_url) as second:
            both = [RedisRateLimiter("both", settings, manager=each) for each in (manager, second)]
            await asyncio.gather(*(limiter.acquire() for limiter in both for _ in range(20)))
        log = admitted(calls)
        assert len(log) == 40
        assert worst_window(log, settings.rate_limit.emission_us) <= settings.rate_limit.burst_us


async def test_outage_and_return(make_server):
    server = make_server()
    async with ConnectionManager(server.url, timeout=1.0) as manager:
        closed = RedisRateLimiter("outage", config(), manager=manager)
        opened = RedisRateLimiter("outage", config(fail_open=True), manager=manager)
        assert await closed.acquire()
        server.kill()
        with pytest.raises(StoreUnavailableError):
            await closed.acquire()
        assert await opened.acquire()
        assert (closed.metrics.failed, opened.metrics.failed_open) == (1, 1)
        server.start()
        assert await closed.acquire()


async def test_never_reached(tmp_path):
    limiter = RedisRateLimiter("never", config(), manager=f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(StoreUnavailableError):
        await limiter.acquire()


async def test_shared_and_awaited(redis_url):
    limiter = await get_flow_controller("integration", config())
    assert await limiter.acquire(priority=1, cost=2)
    from orchestra.connections import get_connection_manager

    manager = get_connection_manager()
    assert manager.connected
    await manager.close()
    assert await limiter.acquire()  # by the manager that took its place
    await get_connection_manager().close()
