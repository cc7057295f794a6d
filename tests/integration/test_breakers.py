"""Circuit breakers that processes share through Redis, and what ``orchestra breakers`` shows of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import subprocess
import sys
import threading
import time

import pytest

from orchestra import _keys, _scripts
from orchestra._breakers.exchange import TTL_MS, BreakerExchange, ask_reset, shown_breakers
from orchestra.circuit_breaker import CircuitBreaker, CircuitBreakerConfig, CircuitState
from orchestra.connections import ConnectionManager
from orchestra.errors import ConfigurationError

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


async def eventually(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.01)


class Site:
    """One process's breaker and exchange, moved by hand with :meth:`sync`."""

    def __init__(self, manager, **settings):
        self.breaker = CircuitBreaker("shared", CircuitBreakerConfig(**settings))
        self.exchange = BreakerExchange(manager, breakers=list)
        self.exchange.share(self.breaker)
        self.sync = self.exchange.sync

    def fail(self):
        for _ in range(self.breaker.config.failure_threshold):
            assert self.breaker.allow_nowait()
            self.breaker.record_failure(OSError("down"))


@pytest.fixture
def site(manager):
    return lambda **settings: Site(manager, **({"failure_threshold": 2, "recovery_timeout": 60.0} | settings))


async def over(manager, name="shared"):
    """The time open is over, without waiting for it: by the record and by every site that learns it again."""
    await manager.client.hset(_keys.breaker(name), mapping={"until": "0"})


async def half_open(manager, *sites):
    """All are open, and the time is over, at once."""
    for each in sites:
        await each.sync()
    await over(manager)
    for each in sites:
        assert not each.breaker.closed
        each.breaker.adopt(OPEN, 0.0, forced=False, fresh=True, era=each.breaker.era)


async def permitted(*sites):
    """Rounds until one of the sites lets a probe through."""
    for _ in range(400):
        for each in sites:
            if each.breaker.available:
                return each
            await each.sync()
        await asyncio.sleep(0.005)
    raise AssertionError("no permit came")


async def test_what_one_opens_is_open_for_all(site):
    one, other = site(recovery_timeout=30.0), site(recovery_timeout=30.0)
    assert await one.sync()
    assert await other.sync()
    one.fail()
    assert (one.breaker.state, other.breaker.state) == (OPEN, CLOSED)
    await one.sync()
    await other.sync()
    assert other.breaker.state is OPEN
    assert 25.0 < other.breaker.retry_after <= 30.0
    late = site(recovery_timeout=30.0)
    await late.sync()
    assert late.breaker.state is OPEN, "one that comes later knows it too"


async def test_a_round_without_news_changes_nothing(site):
    one = site(recovery_timeout=30.0)
    one.fail()
    await one.sync()
    era, wait = one.breaker.era, one.breaker.retry_after
    for _ in range(5):
        await one.sync()
    assert one.breaker.era == era
    assert one.breaker.retry_after <= wait


async def test_a_probe_needs_a_permit_and_its_success_closes_all(site, manager):
    one, other = site(recovery_timeout=60.0), site(recovery_timeout=60.0)
    one.fail()
    await half_open(manager, one, other)
    assert not other.breaker.available
    prober = await permitted(other, one)
    idle = one if prober is other else other
    assert prober.breaker.allow_nowait()
    await idle.sync()
    assert not idle.breaker.allow_nowait()
    await idle.sync()
    assert not idle.breaker.allow_nowait(), "the only permit is out"
    prober.breaker.record_success()
    assert prober.breaker.state is HALF_OPEN, "Redis closes it"
    await prober.sync()
    await idle.sync()
    assert (prober.breaker.state, idle.breaker.state) == (CLOSED, CLOSED)
    assert idle.breaker.allow_nowait()


async def test_a_failed_probe_opens_it_again_for_all(site, manager):
    one, other = site(recovery_timeout=20.0), site(recovery_timeout=20.0)
    one.fail()
    await one.sync()
    await over(manager)
    fresh = site(recovery_timeout=20.0)
    await fresh.sync()
    assert (await permitted(fresh)) is fresh
    assert fresh.breaker.allow_nowait()
    fresh.breaker.record_failure()
    assert fresh.breaker.state is OPEN
    await fresh.sync()
    await other.sync()
    assert other.breaker.retry_after > 10.0


async def test_successes_are_counted_together(site, manager):
    one, other = (site(recovery_timeout=60.0, success_threshold=2, half_open_max_calls=2) for _ in range(2))
    one.fail()
    await half_open(manager, one, other)
    for each in (one, other):
        assert (await permitted(each)) is each
        assert each.breaker.allow_nowait()
        each.breaker.record_success()
        await each.sync()
    await one.sync()
    assert (one.breaker.state, other.breaker.state) == (CLOSED, CLOSED)


async def test_a_permit_that_nobody_uses_goes_to_another(site, monkeypatch):
    one, other = site(recovery_timeout=60.0), site(recovery_timeout=60.0)
    one.fail()
    await half_open(one.exchange._manager, one, other)
    await permitted(one)
    monkeypatch.setattr("orchestra._breakers.link.UNUSED_S", -1.0)
    await one.sync()
    assert (await permitted(other)) is other


class Forgetful:
    """A client whose replies to scripts get lost for as long as ``lose`` says so; the server has run them."""

    def __init__(self, client):
        self.client, self.lose = client, True

    async def execute_command(self, *args):
        reply = await self.client.execute_command(*args)
        if self.lose:
            raise ConnectionError("the reply was lost")
        return reply


async def test_lost_replies_lose_no_permit_and_count_nothing_twice(site, manager):
    """C8: opening, permit and success, each executed without an answer and told again."""
    one = site(recovery_timeout=60.0, success_threshold=2)
    link, client = one.exchange._links[one.breaker], Forgetful(manager.client)
    await one.sync()

    async def lost_then_told():
        client.lose = True
        with pytest.raises(ConnectionError):
            await link.speak(client)
        client.lose = False
        await link.speak(client)

    one.fail()
    await lost_then_told()
    assert not link.pending
    assert one.breaker.retry_after > 50
    await over(manager)
    for more in range(2):
        one.breaker.adopt(OPEN, 0.0, forced=False, fresh=True, era=one.breaker.era)
        assert not one.breaker.allow_nowait()
        await lost_then_told()
        assert one.breaker.allow_nowait(), "the permit that was given in the lost reply"
        one.breaker.record_success()
        await lost_then_told()
        assert one.breaker.closed is bool(more), "one success each"


async def test_who_only_looks_takes_no_permit(site, manager):
    idle, busy = site(recovery_timeout=60.0), site(recovery_timeout=60.0)
    idle.fail()
    await half_open(manager, idle, busy)
    for _ in range(5):
        assert idle.breaker.snapshot().state is OPEN
        assert idle.breaker.state is OPEN
        await idle.sync()
    assert [field for field in await manager.client.hkeys(_keys.breaker("shared")) if field.startswith(b"p:")] == []
    assert (await permitted(busy)) is busy


async def test_threads_share_the_permits(manager):
    """Eight threads at half-open while the loop fetches permits: never more probes than two at a time, and it closes."""
    config = CircuitBreakerConfig(
        failure_threshold=1, recovery_timeout=60.0, half_open_max_calls=2, success_threshold=25, shared=True
    )
    breaker, lock, running, most, probes = CircuitBreaker("threads", config), threading.Lock(), 0, 0, 0
    breaker.record_failure()
    end = time.monotonic() + 60

    def work():
        nonlocal running, most, probes
        while time.monotonic() < end:
            era = breaker.enter()
            if breaker.closed:
                return True
            if era is None:
                time.sleep(0.0005)
                continue
            with lock:
                running += 1
                probes += 1
                most = max(most, running)
            time.sleep(0.002)
            with lock:
                running -= 1
            breaker.record_success(era=era)
        return False

    async with BreakerExchange(manager, breakers=lambda: [breaker]) as exchange:
        await exchange.sync()
        breaker.reset()
        await exchange.sync()
        breaker.record_failure()
        await exchange.sync()
        await over(manager, "threads")
        breaker.adopt(OPEN, 0.0, forced=False, fresh=True, era=breaker.era)
        assert await asyncio.gather(*(asyncio.to_thread(work) for _ in range(8))) == [True] * 8
    assert most <= 2
    assert probes >= 25


async def test_without_redis_each_is_on_its_own_and_joins_again(site, make_server):
    server = make_server()
    manager = ConnectionManager(server.url, timeout=0.5, connect_timeout=0.5)
    one = Site(manager, failure_threshold=1, recovery_timeout=0.05)
    try:
        assert await one.sync()
        server.kill()
        assert not await one.sync()
        one.fail()
        assert not await one.sync()
        await eventually(lambda: one.breaker.allow_nowait())
        one.breaker.record_success()
        assert one.breaker.state is CLOSED, "it recovers by itself"
        one.fail()
        server.start()
        async with asyncio.timeout(60):
            while not await one.sync():
                await asyncio.sleep(0.02)
        assert await manager.client.hget(_keys.breaker("shared"), "state") == b"open", "it is told now"
        async with asyncio.timeout(60):
            while not one.breaker.closed:
                if one.breaker.allow_nowait():
                    one.breaker.record_success()
                await one.sync()
        assert await manager.client.hget(_keys.breaker("shared"), "state") == b"closed"
    finally:
        await manager.close()


async def test_by_hand_for_all(site):
    one, other = site(recovery_timeout=30.0), site(recovery_timeout=30.0)
    await other.sync()
    for order, state, forced in (("force_open", OPEN, True), ("force_closed", CLOSED, True), ("reset", CLOSED, False)):
        getattr(one.breaker, order)()
        await one.sync()
        await other.sync()
        seen = other.breaker.snapshot()
        assert (seen.state, seen.forced) == (state, forced)
        assert seen.shared
    one.breaker.force_closed()
    await one.sync()
    await other.sync()
    for _ in range(50):
        other.breaker.record_failure()
    assert other.breaker.available


async def test_a_stale_report_of_an_earlier_era_changes_nothing(manager):
    key = _keys.breaker("b")

    async def ask(op, era, token=""):
        state, now_era, wait, forced, granted = await _scripts.call(
            manager.client, "breaker", (key,), (op, era, 60_000, token, 1, 1)
        )
        return state.decode(), now_era.decode(), wait, granted

    state, era, wait, _ = await ask("open", "0")
    assert (state, wait) == ("open", 60_000)
    assert (await ask("open", "0"))[:2] == ("open", era), "repeated after a lost reply"
    assert (await ask("probe", era, "t"))[3] == 0, "not before its time"
    await over(manager, "b")
    assert [(await ask("probe", era, token))[3] for token in ("t", "u", "t")] == [1, 0, 1]
    assert (await ask("success", "7", "t"))[0] == "open", "an era that never was"
    assert (await ask("success", era, "u"))[0] == "open", "no permit of that name"
    closed = await ask("success", era, "t")
    assert closed[0] == "closed"
    assert (await ask("failure", era, "t"))[:2] == closed[:2]
    assert int(closed[1]) > int(era)
    await manager.client.delete(key)
    assert int((await ask("open", closed[1]))[1]) > int(closed[1]), "an era never comes again"
    assert await manager.client.pttl(key) > 60_000


async def test_a_spoilt_key_hurts_no_other_breaker(manager):
    good, bad = CircuitBreaker("good"), CircuitBreaker("bad", CircuitBreakerConfig(failure_threshold=1))
    exchange = BreakerExchange(manager, breakers=list)
    exchange.share(bad)
    exchange.share(good)
    await manager.client.set(_keys.breaker("bad"), "text")
    bad.record_failure()
    good.force_open()
    assert not await exchange.sync()
    assert await manager.client.hget(_keys.breaker("good"), "state") == b"open"
    assert (bad.state, bad.retry_after > 20) == (OPEN, True)


async def test_the_loop_carries_news_by_itself(manager):
    config = CircuitBreakerConfig(failure_threshold=1, recovery_timeout=0.3, shared=True)
    pair = [CircuitBreaker("pair", config) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        for breaker in pair:
            await stack.enter_async_context(BreakerExchange(manager, breakers=lambda breaker=breaker: [breaker]))
        await eventually(lambda: all(breaker.attached for breaker in pair))
        pair[0].record_failure()
        await eventually(lambda: not pair[1].closed)

        def recovered():
            if not pair[1].closed and pair[1].allow_nowait():
                pair[1].record_success()
            return pair[0].closed and pair[1].closed

        await eventually(recovered)
    assert not any(breaker.attached for breaker in pair)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), True, "1", 61])
def test_bad_interval(bad):
    with pytest.raises(ConfigurationError, match=r"BreakerExchange.interval must be a number of seconds"):
        BreakerExchange(object(), interval=bad)


# -- several processes


def probing(url, barrier, log, stop):
    """A process that makes as many probes as it may: each counts itself in while it runs, and fails."""
    asyncio.run(_probing(url, barrier, log, stop))


async def _probing(url, barrier, log, stop):
    config = CircuitBreakerConfig(
        failure_threshold=1, recovery_timeout=60.0, half_open_max_calls=3, success_threshold=1000
    )
    breaker = CircuitBreaker("stampede", config)
    async with ConnectionManager(url) as manager, BreakerExchange(manager, breakers=list) as exchange:
        exchange.share(breaker)
        await exchange.sync()
        assert not breaker.closed
        barrier.wait(60)
        while not stop.is_set():
            tries = [breaker.allow_nowait() for _ in range(250)]
            for _ in range(sum(tries)):
                most = await manager.client.incr("running")
                log.put(most)
                await asyncio.sleep(0.02)
            for _ in range(sum(tries)):
                await manager.client.decr("running")
                breaker.record_success()
            await exchange.sync()
            await asyncio.sleep(0.001)


async def test_no_stampede_of_processes_at_half_open(manager, redis_url):
    """I12: 4 processes with 250 calls a time at half-open: at most 3 probes at one time, all processes taken together."""
    opener = Site(manager, failure_threshold=1, recovery_timeout=60.0)
    opener.breaker.name = "stampede"
    opener.exchange = BreakerExchange(manager, breakers=list)
    opener.breaker.attach(None)
    opener.exchange.share(opener.breaker)
    opener.fail()
    await opener.exchange.sync()
    await over(manager, "stampede")
    context = multiprocessing.get_context("spawn")
    barrier, log, stop = context.Barrier(4), context.Queue(), context.Event()
    processes = [context.Process(target=probing, args=(redis_url, barrier, log, stop)) for _ in range(4)]
    for process in processes:
        process.start()
    try:
        seen = [await asyncio.to_thread(log.get, True, 60) for _ in range(40)]
    finally:
        stop.set()
        for process in processes:
            await asyncio.to_thread(process.join, 60)
    assert max(seen) <= 3
    assert len(seen) == 40
    assert [process.exitcode for process in processes] == [0] * 4


# -- showing


async def test_what_processes_tell(manager):
    down = CircuitBreaker("down/one", CircuitBreakerConfig(failure_rate=0.5, minimum_calls=2, recovery_timeout=40.0))
    well = CircuitBreaker("well/one")
    for _ in range(2):
        down.record_failure(ConnectionError("refused \x1b[31m" + "x" * 500), 0.1)
    exchange = BreakerExchange(manager, "tasks", origin="p1", breakers=lambda: [well, down])
    await exchange.sync()
    rows = await shown_breakers(manager, "tasks")
    assert [(row["name"], row["state"], row["process"]) for row in rows] == [
        ("down/one", "open", "p1"),
        ("well/one", "closed", "p1"),
    ]
    assert rows[0]["failure_rate"] == 1.0
    assert 30 < rows[0]["retry_in"] <= 40
    assert len(rows[0]["last_error"]) <= 200
    assert abs(rows[0]["since"] - time.time()) < 60
    assert 0 < await manager.client.pttl(_keys.QueueKeys("tasks").breakers_of("p1")) <= TTL_MS
    assert await shown_breakers(manager, "other") == []


async def test_only_changes_are_told_and_only_so_many(manager):
    breakers = [CircuitBreaker(f"b{number:03}", CircuitBreakerConfig(failure_threshold=1)) for number in range(300)]
    exchange = BreakerExchange(manager, "tasks", breakers=lambda: breakers)
    breakers[-1].record_failure()
    await exchange.sync()
    rows = await shown_breakers(manager, "tasks")
    assert len(rows) == 256
    assert rows[-1]["name"] == "b299", "those that are not closed come first"
    key = _keys.QueueKeys("tasks").breakers_of(exchange.origin)
    await manager.client.delete(key)
    exchange._next_tell = 0.0
    await exchange.sync()
    assert not await manager.client.exists(key), "nothing has changed"
    breakers[0].record_failure()
    exchange._next_tell = 0.0
    await exchange.sync()
    assert await manager.client.exists(key)


async def test_a_reset_reaches_the_process_once(manager):
    breaker = CircuitBreaker("b", CircuitBreakerConfig(failure_threshold=1))
    exchange = BreakerExchange(manager, "tasks", breakers=lambda: [breaker])
    breaker.record_failure()
    await ask_reset(manager, "tasks", "b")
    await asyncio.sleep(0.005)
    await exchange.sync()
    assert breaker.state is OPEN, "asked for before this process was there"
    await asyncio.sleep(0.005)
    await ask_reset(manager, "tasks", "b")
    exchange._next_tell = 0.0
    await exchange.sync()
    assert breaker.state is CLOSED
    breaker.record_failure()
    exchange._next_tell = 0.0
    await exchange.sync()
    assert breaker.state is OPEN, "not a second time"


async def test_a_process_that_stops_is_shown_no_more(manager):
    breaker = CircuitBreaker("b")
    async with BreakerExchange(manager, "tasks", breakers=lambda: [breaker]) as exchange:
        await exchange.sync()
        assert await shown_breakers(manager, "tasks")
    assert await shown_breakers(manager, "tasks") == []


async def test_nothing_is_told_without_breakers(manager):
    await BreakerExchange(manager, "tasks", breakers=list).sync()
    assert await manager.client.dbsize() == 0


def command(url, *args):
    call = [sys.executable, "-m", "orchestra.cli", "breakers", *args, "--redis", url]
    return subprocess.run(call, capture_output=True, text=True, timeout=120)


async def test_the_commands(manager, redis_url):
    await manager.client.hset(_keys.QueueKeys("tasks").counters, "produced", 0)
    nothing = await asyncio.to_thread(command, redis_url, "ls", "tasks")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert "no process" in nothing.stderr
    breaker = CircuitBreaker("model/eu", CircuitBreakerConfig(failure_threshold=1, recovery_timeout=60.0))
    breaker.record_failure(OSError("down \x1b[31m"))
    async with BreakerExchange(manager, "tasks", origin="p1", breakers=lambda: [breaker]) as exchange:
        await exchange.sync()
        listed = await asyncio.to_thread(command, redis_url, "ls", "tasks")
        assert listed.returncode == 0, listed.stderr
        assert [word in listed.stdout for word in ("model/eu", "open", "p1", "OSError")] == [True] * 4
        assert "\x1b" not in listed.stdout
        (line,) = (await asyncio.to_thread(command, redis_url, "ls", "tasks", "--json")).stdout.splitlines()
        row = json.loads(line)
        assert (row["name"], row["state"], row["failures"], row["process"]) == ("model/eu", "open", 1, "p1")
        assert 0 < row["retry_in"] <= 60
        done = await asyncio.to_thread(command, redis_url, "reset", "tasks", "model/eu")
        assert done.returncode == 0, done.stderr
        await eventually(lambda: breaker.state is CLOSED)
        unknown = await asyncio.to_thread(command, redis_url, "reset", "tasks", "model/us")
        assert unknown.returncode == 2
        assert "model/eu" in unknown.stderr
