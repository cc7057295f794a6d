"""The shared limit on a real Redis: the bound over every window, the script, waiting, outages."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra import _keys, _scripts, flow_control
from orchestra._limiting import twin as limit_twin
from orchestra.connections import ConnectionManager
from orchestra.errors import ConfigurationError, StoreUnavailableError
from orchestra.flow_control import (
    BackpressureConfig,
    BackpressureStrategy,
    RateLimitConfig,
    RedisRateLimiter,
    acquire_all,
    get_flow_controller,
    list_limits,
    reset_limit,
    set_limit,
    try_acquire_all,
)
from tests.faults._limit_log import Log, worst_window

WAIT = BackpressureStrategy.WAIT


def config(rate=100.0, burst=10, period=1.0, **more) -> BackpressureConfig:
    return BackpressureConfig(rate_limit=RateLimitConfig(rate=rate, burst=burst, period=period), **more)


@pytest.fixture
def log():
    """Every call that decided something."""
    with Log() as recorded:
        yield recorded


def test_the_checker_finds_a_violation():
    assert worst_window([(0, 1), (0, 1), (10, 1)], 10) == 20
    assert worst_window([(0, 1), (0, 1), (0, 1), (50, 1)], 10) == 30
    assert worst_window([(0, 5), (100, 1), (100, 5), (110, 1)], 10) == 60


@pytest.mark.parametrize("strategy", list(BackpressureStrategy))
async def test_bound_over_every_window(redis_url, log, strategy):
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

    admitted = log.admitted()
    limit = settings.rate_limit
    assert worst_window(admitted, limit.emission_us) <= limit.burst_us
    spent = sum(cost for _, cost in admitted)
    # and the limit is used, not merely kept: most of what could be admitted was
    assert spent >= 0.7 * (limit.burst_us + admitted[-1][0] - admitted[0][0]) / limit.emission_us
    assert sum(limiter.metrics.acquired for limiter in limiters) == len(admitted)
    assert sum(limiter.metrics.calls for limiter in limiters) == len(log.calls)


async def test_a_thousand_at_once_take_few_round_trips(manager, log):
    limiter = RedisRateLimiter("herd", config(rate=1.0, burst=100), manager=manager)
    answers = await asyncio.gather(*(limiter.acquire() for _ in range(1000)))
    assert sum(answers) == 100
    assert answers[:100] == [True] * 100
    assert len(log.calls) <= 2
    assert limiter.metrics.calls == len(log.calls)
    generous = RedisRateLimiter("herd2", config(rate=1.0, burst=1000), manager=manager)
    assert all(await asyncio.gather(*(generous.acquire() for _ in range(1000))))
    assert generous.metrics.calls == 3


@pytest.mark.parametrize("strategy", list(BackpressureStrategy))
async def test_ten_thousand_at_once_take_at_most_a_hundred_round_trips(manager, log, strategy):
    limiter = RedisRateLimiter("crowd", config(rate=1000.0, burst=10_000, strategy=strategy), manager=manager)
    assert all(await asyncio.gather(*(limiter.acquire() for _ in range(10_000))))
    assert len(log.calls) == limiter.metrics.calls <= 100
    assert limiter.idle


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
        slow = end + 60  # a busy machine takes longer to see as much
        while loop.time() < end or (checked <= 50 and loop.time() < slow):
            cost = rng.randint(1, 4)
            before = loop.time()
            cell, now_us = local.cell(None), int(before * 1e6)
            wait = local._known.refused_for(cell, cost, now_us, limit.emission_us, limit.burst_us)
            assert (local.refused_for(cost=cost) > 0) <= (wait > 0)
            if wait == 0:
                await local.acquire(cost=cost)
            else:
                args = [1, "local", 0, limit.emission_us, limit.burst_us, 1, 0, 1, 1, cost, 0]
                keys = [_keys.limit_settings(), _keys.limiter("local")]
                verdict = (await _scripts.call(manager.client, "gcra", keys, args))[2]
                assert verdict > 0 or (loop.time() - before) * 1e6 >= wait
                checked += 1
            if rng.random() < 0.2:
                await other.acquire()
    assert checked > 50


async def test_script_and_twin_decide_the_same(manager):
    """The in-process limit replays what Redis did, at the times of Redis, in whole microseconds."""
    rng = random.Random(11)
    names = [f"twin{number}" for number in range(3)]
    shapes = [(333, 333 * 16), (1000, 5000), (50_000, 50_000)]
    keys = [_keys.limit_settings(), *map(_keys.limiter, names)]
    cells: dict[str, str] = {}
    seen = set()

    def store(key, text, ttl_ms):
        cells[key] = text

    for _ in range(600):
        args = [3]
        pace = rng.choice((1, 1, 3))  # the limits are raised and lowered meanwhile
        for name, (emission, burst) in zip(names, shapes, strict=True):
            args += (name, 0, emission * pace, burst * pace)
        args += (1, 2, 3)
        for _ in range(rng.randint(1, 5)):
            uses = rng.sample((1, 2, 3), rng.randint(1, 3))
            args += (rng.randint(0, 7), len(uses))
            for cell in uses:
                args += (cell, rng.randint(1, 4), rng.choice((0, 0, shapes[cell - 1][1] // 3)))
        stored = await manager.client.mget(keys[1:])
        cells = {key: text.decode() for key, text in zip(keys[1:], stored, strict=True) if text is not None}
        reply = await _scripts.call(manager.client, "gcra", keys, args)
        before = dict(cells)
        twin = limit_twin.gcra(reply[0], keys, args, cells.get, store, lambda name: None)
        assert twin == reply
        after = await manager.client.mget(keys[1:])
        for key, text in zip(keys[1:], after, strict=True):
            if text is not None and cells.get(key) != before.get(key):
                assert text.decode() == cells[key]
                seen.add(len(text.split()))
        seen.update(("wait" if wait else "pass") for wait in reply[4::2])
    assert {"wait", "pass", 1, 4} <= seen


async def test_the_line_of_a_limit_that_is_raised_moves_on_faster(manager):
    """Whoever joins it afterwards is not told to wait as long as the line was at the old rate."""
    key = _keys.limiter("line")

    async def join(emission, burst, reserve):
        args = [1, "line", 0, emission, burst, 1, 2, 1, 1, 1, reserve]
        return (await _scripts.call(manager.client, "gcra", [_keys.limit_settings(), key], args))[2]

    waits = [await join(60_000_000, 60_000_000, 0) for _ in range(12)]
    assert waits[0] == 0
    assert waits[-1] > 10 * 60_000_000
    assert 0 < await join(600_000, 120_000_000, 119_000_000) < 2 * 60_000_000
    assert 0 < await join(600_000, 120_000_000, 119_000_000) < 2 * 60_000_000


class TestScript:
    KEY = _keys.limiter("script")
    KEYS = (_keys.limit_settings(), KEY)

    async def gcra(self, manager, emission, burst, ordered, *pairs):
        """One cell; now, TAT, and a wait for each pair of cost and reserve."""
        args = [1, "script", 0, emission, burst, 1]
        for cost, reserve in zip(pairs[::2], pairs[1::2], strict=True):
            args += (ordered, 1, 1, cost, reserve)
        now, tat, *verdicts = await _scripts.call(manager.client, "gcra", self.KEYS, args)
        return [now, tat, *verdicts[::2]]

    async def test_key_lives_until_the_limit_is_full(self, manager):
        """I8: it expires no earlier than it is full."""
        now, tat, wait = await self.gcra(manager, 50_000, 500_000, 0, 4, 0)
        assert (tat - now, wait) == (200_000, 0)
        left = await manager.client.pttl(self.KEY)
        seconds, micros = await manager.client.time()
        assert tat - (seconds * 1_000_000 + micros) <= (left + 1) * 1000 <= 203_000
        stored = await manager.client.get(self.KEY)
        assert (stored, len(stored)) == (str(tat).encode(), 16)

    async def test_a_refusal_writes_nothing(self, manager):
        """I1: a cost above the burst is refused, and the state is as it was."""
        _, _, wait = await self.gcra(manager, 1000, 10_000, 0, 11, 0)
        assert wait == 1000
        assert await manager.client.exists(self.KEY) == 0

    async def test_a_clock_that_went_back_locks_out_for_one_burst_at_most(self, manager):
        """I6: neither the TAT nor the line of a clock that went back counts."""
        seconds, micros = await manager.client.time()
        ahead = (seconds + 3600) * 1_000_000 + micros
        for stored in (f"{ahead}", f"{ahead} {ahead + 10**9} 0"):
            await manager.client.set(self.KEY, stored)
            now, tat, wait = await self.gcra(manager, 1000, 2_000_000, 2, 1, 0)
            assert (tat - now, wait) == (2_000_000, 1000)
            assert int((await manager.client.get(self.KEY)).split()[0]) == tat
            assert await manager.client.pttl(self.KEY) <= 2004
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
            (1, "n", 0, 1000, 10_000, 1),
            (1, "n", 0, 1000, 10_000, 1, 0, 1, 1, 1),
            (1, "n", 0, 0, 10_000, 1, 0, 1, 1, 1, 0),
            (1, "n", 0, 1000, 999, 1, 0, 1, 1, 1, 0),
            (1, "n", 0, "nan", 10_000, 1, 0, 1, 1, 1, 0),
            (1, "n", 0, 1000, 2**49, 1, 0, 1, 1, 1, 0),
            (1, "n", 0, 1000, 10_000, 2, 0, 1, 1, 1, 0),
            (1, "n", 0, 1000, 10_000, 1, 8, 1, 1, 1, 0),
            (1, "n", 0, 1000, 10_000, 1, 0, 1, 1, 0, 0),
            (1, "n", 0, 1000, 10_000, 1, 0, 1, 1, -5, 0),
            (1, "n", 0, 1000, 10_000, 1, 0, 1, 1, "nan", 0),
            (1, "n", 0, 1000, 10_000, 1, 0, 1, 1, 1, -1),
            (1, "n", 0, 1000, 10_000, 1, 0, 1, 2, 1, 0),
            (1, "n", 0, 1000, 10_000, 1, 0, 2, 1, 1, 0, 1, 1, 0),
            (0, 1, 0, 1, 1, 1, 0),
            ("x", "n", 0, 1000, 10_000, 1, 0, 1, 1, 1, 0),
        ],
    )
    async def test_bad_arguments_change_nothing(self, manager, args):
        """I2, I3: the script itself refuses what configuration cannot produce; a negative cost gives nothing back."""
        with pytest.raises(Exception, match="gcra"):
            await _scripts.call(manager.client, "gcra", self.KEYS, args)
        assert await manager.client.exists(self.KEY) == 0

    async def test_absurd_cost_is_refused(self, manager):
        """I4: no overflow."""
        wait = (await self.gcra(manager, 2**40, 2**48, 0, 10**30, 0))[2]
        assert wait == 2**53

    async def test_longest_horizon_is_exact(self, manager):
        """I4: at the largest burst every microsecond is still counted."""
        burst_us = 2**48
        now, tat, wait = await self.gcra(manager, burst_us, burst_us, 0, 1, 0)
        assert (tat - now, wait) == (burst_us, 0)
        now, tat, wait = await self.gcra(manager, burst_us, burst_us, 0, 1, 0)
        assert wait == tat - now
        assert int(await manager.client.get(self.KEY)) == tat

    async def test_survives_a_server_that_forgot_it(self, manager):
        limiter = RedisRateLimiter("forgot", config(), manager=manager)
        for _ in range(2):
            assert await limiter.acquire()
            await manager.client.script_flush()
        assert await limiter.acquire()
        assert limiter.metrics.acquired == 3


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
        assert limiter.idle

    async def test_two_processes_share_the_limit(self, redis_url, manager, log):
        settings = config(rate=200.0, burst=2, strategy=WAIT)
        async with ConnectionManager(redis_url) as second:
            both = [RedisRateLimiter("both", settings, manager=each) for each in (manager, second)]
            await asyncio.gather(*(limiter.acquire() for limiter in both for _ in range(20)))
        admitted = log.admitted()
        assert len(admitted) == 40
        assert worst_window(admitted, settings.rate_limit.emission_us) <= settings.rate_limit.burst_us


async def back(limiter) -> bool:
    try:
        return await limiter.acquire()
    except StoreUnavailableError:
        return False


async def test_outage_and_return(make_server):
    """I9: Redis is killed; closed refuses by an error, open admits, and both go on when it is back."""
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
        async with asyncio.timeout(20):
            while not await back(closed):
                await asyncio.sleep(0.05)


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


class TestKeys:
    async def test_each_key_has_a_limit_of_its_own(self, manager):
        limiter = RedisRateLimiter("openai:{tenant}", config(rate=1.0, burst=2), manager=manager)
        for key in ("a", "b", "ü", "x y", "a" * 500):
            assert [await limiter.acquire(key=key) for _ in range(3)] == [True, True, False], key
        refused = await limiter.try_acquire(key="x y")
        assert (refused.limiter, refused.key) == ("openai:{tenant}", "x y")

    @pytest.mark.parametrize("key", [None, "", 7, b"a", True])
    async def test_bad_key(self, manager, key):
        limiter = RedisRateLimiter("openai:{tenant}", config(), manager=manager)
        with pytest.raises(ConfigurationError) as caught:
            await limiter.acquire(key=key)
        assert caught.value.field == "key"
        assert limiter.metrics.calls == 0

    @given(
        st.lists(
            st.tuples(st.text("a:1k", min_size=1, max_size=6), st.none() | st.text(min_size=1, max_size=6)), max_size=40
        )
    )
    def test_two_inputs_never_share_a_cell(self, pairs):
        cells = {pair: _keys.limiter(*pair) for pair in pairs}
        assert len(set(cells.values())) == len(cells)
        digest = _keys.limiter("n", "ü").rpartition(":")[2]
        assert _keys.limiter("n", digest) != _keys.limiter("n", "ü")

    async def test_what_is_known_of_keys_is_bounded(self, manager, monkeypatch):
        monkeypatch.setattr(flow_control, "KEYS_KNOWN", 50)
        limiter = RedisRateLimiter("many", config(rate=0.1, burst=1), manager=manager)
        assert all(await asyncio.gather(*(limiter.acquire(key=f"k{number}") for number in range(300))))
        assert len(limiter._answers) <= 50
        assert len(limiter._cells) <= 100
        assert not await limiter.acquire(key="k0")  # forgotten here, known to Redis


class TestSeveral:
    async def test_all_or_none(self, manager, log):
        wide = RedisRateLimiter("wide", config(rate=1.0, burst=10), manager=manager)
        narrow = RedisRateLimiter("narrow", config(rate=1.0, burst=3), manager=manager)
        admissions = [await try_acquire_all([(wide, None, 2), (narrow, "t", 1)]) for _ in range(5)]
        assert [admission.allowed for admission in admissions] == [True] * 3 + [False] * 2
        assert admissions[3].limiter == "narrow"
        assert admissions[3].key == "t"
        assert 0.5 < admissions[3].retry_after <= 1.0
        assert (await wide.try_acquire(cost=4)).allowed  # 6 of 10 were taken, none by what was refused
        assert not (await wide.try_acquire()).allowed
        assert (wide.metrics.acquired, narrow.metrics.acquired, narrow.metrics.rejected) == (4, 3, 2)
        assert wide.metrics.rejected == 1
        assert len(log.calls) <= 5  # known refusals of any of them cost nothing

    async def test_one_tick_is_one_call_across_different_sets(self, manager, log):
        limiters = [RedisRateLimiter(f"set{number}", config(rate=1.0, burst=5), manager=manager) for number in range(4)]
        await limiters[0]
        asks = [
            try_acquire_all([(one, "k", 1), (two, None, 1)]) for one in limiters for two in limiters if one is not two
        ]
        admissions = await asyncio.gather(*asks, limiters[0].try_acquire(key="other"))
        assert len(log.calls) <= 2
        assert all(admission.allowed for admission in admissions)

    async def test_the_same_cell_twice_counts_twice(self, manager):
        limiter = RedisRateLimiter("twice", config(rate=1.0, burst=5), manager=manager)
        assert (await try_acquire_all([(limiter, "k", 2), (limiter, "k", 2)])).remaining == 1
        with pytest.raises(ConfigurationError, match="from 1 to 5"):
            await try_acquire_all([(limiter, "k", 3), (limiter, "k", 3)])

    async def test_waiting_for_all(self, manager):
        one = RedisRateLimiter("one", config(rate=100.0, burst=1), manager=manager)
        two = RedisRateLimiter("two", config(rate=50.0, burst=1), manager=manager)
        asks = [acquire_all([(one, None, 1), (two, None, 1)], wait=30) for _ in range(8)]
        assert all(admission.allowed for admission in await asyncio.gather(*asks))
        assert not (await acquire_all([(one, None, 1), (two, None, 1)])).allowed  # REJECT: does not wait

    async def test_what_cannot_be_asked_together(self, manager):
        limiter = RedisRateLimiter("here", config(), manager=manager)
        other = RedisRateLimiter("there", config(), manager=manager, scope="other")
        local = RedisRateLimiter("local", config(), manager="memory:")
        for uses in (
            [],
            [(limiter, None, 1)] * 17,
            [(limiter, None, 1), (other, None, 1)],
            [(limiter, None, 1), (local, None, 1)],
        ):
            with pytest.raises(ConfigurationError) as caught:
                await try_acquire_all(uses)
            assert caught.value.field == "uses"
        with pytest.raises(ConfigurationError, match="RedisRateLimiter"):
            await try_acquire_all([("openai", None, 1)])


class TestSharedLine:
    async def test_refused_ones_are_spread_over_all_processes_at_the_rate(self, redis_url, manager):
        settings = config(rate=1.0, burst=4)
        async with ConnectionManager(redis_url) as second:
            both = [RedisRateLimiter("line", settings, manager=each) for each in (manager, second)]
            answers = [await both[number % 2].try_acquire(queue=True) for number in range(24)]
        assert [answer.allowed for answer in answers] == [True] * 4 + [False] * 20
        turns = [answer.retry_after for answer in answers[4:]]
        gaps = [later - earlier for earlier, later in itertools.pairwise(turns)]
        assert all(0.0 < gap <= 1.0 for gap in gaps)  # one permit's time, less what passed between the questions
        assert 15.0 < turns[-1] <= 20.0

    async def test_those_who_come_back_at_their_turn_are_admitted_in_order(self, manager):
        limiter = RedisRateLimiter("back", config(rate=100.0, burst=10), manager=manager)
        order, tries = [], 0

        async def task(number):
            nonlocal tries
            while True:
                tries += 1
                admission = await limiter.try_acquire(queue=True)
                if admission.allowed:
                    order.append(number)
                    return
                await asyncio.sleep(admission.retry_after)

        await asyncio.gather(*(task(number) for number in range(60)))
        assert order == sorted(order)
        assert tries <= 60 * 3  # one refusal and one admission each, and a few more on a slow machine

    async def test_the_line_does_not_keep_urgent_work_out(self, manager):
        limiter = RedisRateLimiter("urgent", config(rate=1.0, burst=10, priority_reserve=0.5), manager=manager)
        while (await limiter.try_acquire(queue=True)).allowed:
            pass
        for _ in range(50):
            await limiter.try_acquire(queue=True)
        assert (await limiter.try_acquire(priority=3)).allowed


class TestSettings:
    async def test_set_and_reset_reach_every_process(self, redis_url, manager):
        async with ConnectionManager(redis_url) as second:
            both = [RedisRateLimiter("set", config(rate=1.0, burst=2), manager=each) for each in (manager, second)]
            assert [await both[0].acquire(), await both[1].acquire(), await both[0].acquire()] == [True, True, False]
            await set_limit("set", rate=1000, burst=50, manager=manager)
            for limiter in both:
                async with asyncio.timeout(10):  # believed for a second at most
                    while not await limiter.acquire():
                        await asyncio.sleep(0.01)
                assert limiter.interval == 0.001
                assert limiter.setting.burst_us == 50_000
            assert await reset_limit("set", manager=manager)
            assert not await reset_limit("set", manager=manager)
            async with asyncio.timeout(10):
                while both[1].interval != 1.0:
                    await both[1].acquire()
                    await asyncio.sleep(0.01)

    async def test_a_waiter_notices(self, manager):
        limiter = RedisRateLimiter("slow", config(rate=0.01, burst=1, strategy=WAIT), manager=manager)
        assert await limiter.acquire()
        waiting = asyncio.ensure_future(limiter.acquire())
        await asyncio.sleep(0.01)
        await set_limit("slow", rate=1000, burst=5, manager=manager)
        async with asyncio.timeout(10):
            assert await waiting

    async def test_a_burst_below_a_cost_throttles_and_is_not_an_error(self, manager):
        limiter = RedisRateLimiter("small", config(rate=10.0, burst=20), manager=manager)
        await set_limit("small", rate=10, burst=5, manager=manager)
        admission = await limiter.try_acquire(cost=20)
        assert (admission.allowed, admission.retry_after > 0) == (False, True)
        await reset_limit("small", manager=manager)
        assert await limiter.acquire(cost=20)

    async def test_listed(self, manager):
        limiter = RedisRateLimiter("api:{tenant}", config(rate=0.5, burst=10), manager=manager)
        await limiter.acquire(key="a", cost=4)
        await limiter.acquire(key="ü", cost=7)
        await set_limit("other", rate=7, burst=3, period=60.0, scope="own", manager=manager)
        listed = {status.name: status for status in await list_limits(manager=manager)}
        api, other = listed["api:{tenant}"], listed["other"]
        assert (api.rate, api.burst, api.period, api.keys, api.available, api.version) == (0.5, 10, 1.0, 2, 3, 0)
        assert (other.scope, other.rate, other.burst, other.period, other.keys) == ("own", 7.0, 3, 60.0, 0)
        assert other.version > 10**15

    @pytest.mark.parametrize(
        ("field", "bad"),
        [
            ("rate", {"rate": 0}),
            ("rate", {"rate": math.nan}),
            ("rate", {"rate": -5}),
            ("rate", {"rate": math.inf}),
            ("rate", {"rate": True}),
            ("rate", {"rate": "10"}),
            ("burst", {"burst": 0}),
            ("burst", {"burst": 1.5}),
            ("burst", {"burst": 10**12}),
            ("period", {"period": 0}),
            ("period", {"period": math.inf}),
            ("limiter name", {"name": "a b"}),
            ("limit scope", {"scope": "}"}),
        ],
    )
    async def test_bad_settings_never_reach_redis(self, manager, field, bad):
        good = {"name": "n", "rate": 1.0, "burst": 1, "period": 1.0, "scope": "all"}
        with pytest.raises(ValueError, match=field) as caught:
            await set_limit(**{**good, **bad}, manager=manager)
        assert caught.value.field.endswith(field)
        assert await manager.client.dbsize() == 0


class TestLeases:
    async def test_permits_are_spent_without_asking(self, manager, log):
        limiter = RedisRateLimiter("leased", config(rate=1.0, burst=100, lease=50, lease_ttl=10.0), manager=manager)
        answers = [await limiter.acquire() for _ in range(130)]
        assert sum(answers) == 100
        assert len(log.calls) <= 4
        assert sum(cost for _, cost in log.admitted()) == 100

    async def test_concurrent_ones_share_a_lease(self, manager, log):
        limiter = RedisRateLimiter("herded", config(rate=1.0, burst=100, lease=40, lease_ttl=10.0), manager=manager)
        assert sum(await asyncio.gather(*(limiter.acquire() for _ in range(60)))) == 60
        assert len(log.calls) == 2
        assert limiter.leased == 20

    async def test_the_rest_is_given_back(self, redis_url, manager):
        settings = config(rate=0.1, burst=100, lease=50, lease_ttl=10.0)
        limiter = RedisRateLimiter("returned", settings, manager=manager)
        assert await limiter.acquire(cost=10)
        await limiter.close()
        assert (limiter.leased, limiter._leases.lost) == (0, 0)
        async with ConnectionManager(redis_url) as second:
            assert await RedisRateLimiter("returned", config(rate=0.1, burst=100), manager=second).acquire(cost=90)

    async def test_and_so_it_is_when_its_time_is_over(self, manager):
        limiter = RedisRateLimiter("late", config(rate=0.1, burst=100, lease=50, lease_ttl=0.05), manager=manager)
        assert await limiter.acquire(cost=10)
        async with asyncio.timeout(10):
            while limiter.leased or limiter._leases._returns:
                await asyncio.sleep(0.01)
        assert (await limiter.try_acquire(cost=50)).remaining >= 0
        assert await limiter.acquire(cost=40)

    async def test_only_the_first_of_overlapping_leases_gives_back(self, redis_url, manager):
        settings = config(rate=0.1, burst=100, lease=30, lease_ttl=10.0)
        async with ConnectionManager(redis_url) as second:
            both = [RedisRateLimiter("overlap", settings, manager=each) for each in (manager, second)]
            assert await both[0].acquire()
            assert await both[1].acquire()
            await both[0].close()
            await both[1].close()
        assert [limiter._leases.lost for limiter in both] == [0, 29]
