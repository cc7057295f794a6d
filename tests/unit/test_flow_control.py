"""Flow control without Redis: configuration, the in-process limit, and the queue in front of any limit."""

from __future__ import annotations

import asyncio
import math

import pytest

from orchestra import _shared, telemetry
from orchestra._clock import SYSTEM_CLOCK
from orchestra._limiting.store import LimitStore
from orchestra.errors import BackpressureRejectedError, ConfigurationError, StoreAuthError, StoreUnavailableError
from orchestra.flow_control import (
    BackpressureConfig,
    BackpressureStrategy,
    RateLimitConfig,
    RedisRateLimiter,
    acquire_all,
    get_flow_controller,
    reset_limit,
    set_limit,
    try_acquire_all,
)
from orchestra.tasks import TaskPriority


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


def config(rate=10.0, burst=5, period=1.0, **more) -> BackpressureConfig:
    return BackpressureConfig(rate_limit=RateLimitConfig(rate=rate, burst=burst, period=period), **more)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
async def limiter(clock):
    _shared.reset()
    return RedisRateLimiter("unit", config(), manager="memory:", clock=clock)


class ScriptedStore(LimitStore):
    """A store that answers when told to: ``grants`` says how many permits each call may give."""

    def __init__(self, *grants: int | Exception, hold: bool = False, wait_us: int = 20_000) -> None:
        super().__init__("all", SYSTEM_CLOCK)
        self.grants = list(grants)
        self.wait_us = wait_us
        self.batches: list[list[int]] = []
        self.orders: list[bool] = []
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        if not hold:
            self.go.set()

    def note(self, name, text):
        pass

    def _send(self, batch, keys, args, limits):
        self._busy = True
        self.calls += 1
        self.batches.append([question.cost for question in batch])
        self.orders.append(all(question.flags & 1 for question in batch))
        self.asked.set()
        self.answering = asyncio.ensure_future(self._later(batch, keys, limits))

    async def _later(self, batch, keys, limits):
        await self.go.wait()
        left = self.grants.pop(0) if self.grants else 10**6
        if isinstance(left, Exception):
            self._failed(batch, left)
            return
        verdicts = []
        for question in batch:
            given = question.cost <= left
            left -= question.cost if given else 0
            verdicts += (0, 0) if given else (self.wait_us, 1)
        limit = limits[0].setting
        # a debt that makes one permit due after wait_us, where something was refused
        debt = limit.burst_us - limit.emission_us + self.wait_us if any(verdicts) else 0
        self._arrived(batch, keys, limits, int(SYSTEM_CLOCK.monotonic() * 1e6), [10**15, 10**15 + debt, *verdicts])


def scripted(store: ScriptedStore, **more) -> RedisRateLimiter:
    limiter = RedisRateLimiter("scripted", config(burst=5, **more), manager="memory:")
    limiter.store = lambda: store
    return limiter


WAIT = {"strategy": BackpressureStrategy.WAIT}


def settled(limiter: RedisRateLimiter) -> bool:
    return limiter.idle and limiter.store().idle


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class TestConstruction:
    def test_name(self):
        for bad in ("", "a b", "ü", "x" * 129, None, 7):
            with pytest.raises(ConfigurationError):
                RedisRateLimiter(bad, manager="memory:")
        assert RedisRateLimiter("openai:acme", manager="memory:").name == "openai:acme"

    def test_config_of_another_type(self):
        with pytest.raises(ConfigurationError, match="BackpressureConfig"):
            RedisRateLimiter("x", RateLimitConfig(rate=1, burst=1), manager="memory:")


class TestInProcess:
    async def test_burst_then_refusal_then_exactly_on_time(self, limiter, clock):
        assert [await limiter.acquire() for _ in range(7)] == [True] * 5 + [False] * 2
        refused = await limiter.try_acquire()
        assert (refused.allowed, refused.remaining) == (False, 0)
        assert refused.retry_after == pytest.approx(0.1, abs=2e-6)
        clock.now += refused.retry_after - 1e-4
        assert not await limiter.acquire()
        clock.now += 1.01e-4
        assert await limiter.acquire()
        assert not await limiter.acquire()

    async def test_refills_to_the_burst_and_no_further(self, limiter, clock):
        assert await limiter.acquire(cost=5)
        clock.now += 3600
        assert (await limiter.try_acquire(cost=1)).remaining == 4
        assert await limiter.acquire(cost=4)
        assert not await limiter.acquire()

    async def test_known_refusals_cost_nothing(self, limiter, clock):
        await limiter.acquire(cost=5)
        calls = limiter.metrics.calls
        assert not any([await limiter.acquire() for _ in range(100)])
        assert limiter.metrics.calls == calls
        assert (limiter.metrics.rejected, limiter.metrics.rejected_locally) == (100, 100)
        assert limiter.refused_for(cost=2) == pytest.approx(0.2, abs=2e-6)
        clock.now += 0.3
        assert limiter.refused_for(cost=2) == 0.0

    async def test_an_old_answer_is_not_believed(self, clock):
        slow = RedisRateLimiter("slow", config(rate=0.01, burst=1), manager="memory:", clock=clock)
        assert await slow.acquire()
        calls = slow.metrics.calls
        assert not await slow.acquire()
        assert slow.metrics.calls == calls
        clock.now += 1.5
        assert not await slow.acquire()
        assert slow.metrics.calls == calls + 1

    @pytest.mark.parametrize("cost", [0, -1, 6, 10**30, 1.0, True, "1", None, math.nan])
    async def test_bad_cost(self, limiter, cost):
        with pytest.raises(ConfigurationError, match="from 1 to 5") as caught:
            await limiter.acquire(cost=cost)
        assert caught.value.field == "cost"
        assert limiter.metrics.calls == 0
        assert await limiter.acquire(cost=5)

    @pytest.mark.parametrize("priority", [1.0, True, "1", None, TaskPriority.HIGH])
    async def test_bad_priority(self, limiter, priority):
        with pytest.raises(ConfigurationError, match="larger is more urgent"):
            await limiter.acquire(priority=priority)
        assert limiter.metrics.calls == 0

    async def test_reserve_by_urgency(self, clock):
        limiter = RedisRateLimiter(
            "reserve", config(rate=1, burst=12, priority_reserve=0.5), manager="memory:", clock=clock
        )
        used = []
        for priority in (-5, 0, 1, 2, 3, 99):
            count = 0
            while await limiter.acquire(priority=priority):
                count += 1
            used.append(count)
        assert used == [6, 0, 2, 2, 2, 0]
        with pytest.raises(ConfigurationError, match="from 1 to 6"):
            await limiter.acquire(priority=0, cost=7)
        waits = [limiter.refused_for(priority=priority) for priority in (0, 1, 2, 3)]
        assert waits == pytest.approx([7, 5, 3, 1], abs=1e-3)
        clock.now += 5.001
        assert await limiter.acquire(priority=1)
        assert not await limiter.acquire(priority=0)

    @pytest.mark.parametrize("wait", [-1, math.nan, -math.inf, "1", True, 1e9])
    async def test_bad_wait(self, limiter, wait):
        for ask in (lambda: limiter.acquire(wait=wait), lambda: acquire_all([(limiter, None, 1)], wait=wait)):
            with pytest.raises(ConfigurationError, match="wait must be a number of seconds") as caught:
                await ask()
            assert caught.value.field == "wait"
        assert limiter.metrics.calls == 0

    async def test_several_and_keys_and_the_line(self, clock):
        wide, narrow = (
            RedisRateLimiter(name, config(rate=10.0, burst=burst), manager="memory:", clock=clock)
            for name, burst in (("wide", 9), ("narrow:{tenant}", 2))
        )
        asked = [await try_acquire_all([(wide, None, 1), (narrow, "a", 1)]) for _ in range(3)]
        assert [admission.allowed for admission in asked] == [True, True, False]
        assert (asked[2].limiter, asked[2].key) == ("narrow:{tenant}", "a")
        assert (await try_acquire_all([(wide, None, 1), (narrow, "b", 1)])).remaining == 1
        turns = [(await narrow.try_acquire(key="a", queue=True)).retry_after for _ in range(3)]
        assert turns == pytest.approx([0.1, 0.2, 0.3], abs=1e-5)

    async def test_set_at_run_time(self, limiter, clock):
        assert await limiter.acquire(cost=5)
        await set_limit("unit", rate=1000, burst=8, manager="memory:")
        clock.now += 2
        assert await limiter.acquire()
        assert limiter.setting.burst_us == 8000
        assert await reset_limit("unit", manager="memory:")
        clock.now += 2
        assert await limiter.acquire()
        assert limiter.interval == 0.1

    async def test_one_state_per_name(self, clock):
        first, second, other = (
            RedisRateLimiter(name, config(), manager="memory:", clock=clock) for name in ("same", "same", "other")
        )
        assert await first.acquire(cost=5)
        assert not await second.acquire()
        assert await other.acquire(cost=5)

    async def test_execute(self, limiter):
        async def double(value, *, plus=0):
            return value * 2 + plus

        assert await limiter.execute(double, 4, plus=1, priority=1, cost=5) == 9
        called = []

        async def never():
            called.append(1)

        with pytest.raises(BackpressureRejectedError) as caught:
            await limiter.execute(never)
        assert caught.value.retry_after == pytest.approx(0.1, abs=1e-5)
        assert caught.value.limiter == "unit"
        assert called == []

    async def test_execute_passes_errors_on(self, limiter):
        async def fails():
            raise LookupError("x")

        with pytest.raises(LookupError):
            await limiter.execute(fails)
        with pytest.raises(TypeError, match="async function"):
            await limiter.execute(42)
        with pytest.raises(TypeError, match="returned int"):
            await limiter.execute(lambda: 42)

    async def test_context_manager(self, limiter):
        for _ in range(5):
            async with limiter as entered:
                assert entered is limiter
        with pytest.raises(BackpressureRejectedError):
            async with limiter:
                pytest.fail("entered while refused")
        assert limiter.release() is None
        assert not await limiter.acquire()

    async def test_events(self, limiter):
        seen = []
        detach = telemetry.attach(lambda *event: seen.append(event), "limiter.acquired", "limiter.rejected")
        try:
            await limiter.acquire(cost=5)
            await limiter.acquire(cost=2)
        finally:
            detach()
        assert seen[0] == ("limiter.acquired", {"cost": 5}, {"limiter": "unit"})
        name, measured, facts = seen[1]
        assert (name, measured["cost"], facts) == ("limiter.rejected", 2, {"limiter": "unit", "local": True})
        assert measured["retry_after_s"] == pytest.approx(0.2, abs=1e-5)


class TestBatching:
    async def test_the_first_goes_at_once_the_rest_of_the_tick_together_most_urgent_first(self):
        store = ScriptedStore(1, 3)
        limiter = scripted(store)
        answers = await asyncio.gather(
            limiter.acquire(),
            limiter.acquire(cost=1),
            limiter.acquire(cost=2, priority=1),
            limiter.acquire(cost=3, priority=9),
        )
        assert store.batches == [[1], [3, 2, 1]]
        assert store.orders == [False, False]
        assert answers == [True, False, False, True]
        assert settled(limiter)

    async def test_what_arrives_during_a_call_travels_together(self):
        store = ScriptedStore(hold=True)
        limiter = scripted(store)
        first = asyncio.ensure_future(limiter.acquire())
        await store.asked.wait()
        others = [asyncio.ensure_future(limiter.acquire()) for _ in range(50)]
        await turns()
        store.go.set()
        assert all(await asyncio.gather(first, *others))
        assert [len(batch) for batch in store.batches] == [1, 50]

    async def test_batches_are_bounded(self):
        store = ScriptedStore()
        limiter = scripted(store)
        assert all(await asyncio.gather(*(limiter.acquire() for _ in range(1200))))
        assert [len(batch) for batch in store.batches] == [1, 512, 512, 175]


class TestWaiting:
    async def test_served_in_order_of_urgency_then_arrival(self):
        store = ScriptedStore(0, 0, 2, 1, 1)
        limiter = scripted(store, **WAIT)
        order = []

        async def take(name, **request):
            assert await limiter.acquire(**request)
            order.append(name)

        await asyncio.gather(take("a"), take("b"), take("urgent", priority=2), take("c"))
        assert order == ["urgent", "a", "b", "c"]
        assert all(store.orders)
        assert settled(limiter)

    async def test_a_try_never_passes_those_who_wait(self):
        limiter = scripted(ScriptedStore(0, hold=True), **WAIT)
        waiting = asyncio.ensure_future(limiter.acquire(cost=5))
        await turns()
        answer = asyncio.ensure_future(limiter.try_acquire())
        await turns()
        limiter.store().go.set()
        admission = await answer
        assert not admission.allowed
        assert admission.retry_after > 0
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    async def test_max_wait(self):
        store = ScriptedStore(*[0] * 6, wait_us=900_000)
        limiter = scripted(store, max_wait=0.01, **WAIT)
        began = asyncio.get_running_loop().time()
        assert not await limiter.acquire()
        assert asyncio.get_running_loop().time() - began >= 0.009
        calls = len(store.batches)
        with pytest.raises(BackpressureRejectedError):  # known to take 0.9 s: refused at once
            async with limiter:
                pytest.fail("entered")
        assert len(store.batches) == calls
        await turns()
        assert settled(limiter)

    async def test_max_wait_zero_asks_once(self):
        store = ScriptedStore(0)
        limiter = scripted(store, max_wait=0.0, **WAIT)
        assert not await limiter.acquire()
        assert store.batches == [[1]]

    async def test_expiry_during_a_call_lets_the_answer_decide(self):
        store = ScriptedStore(1, hold=True)
        limiter = scripted(store, max_wait=0.005, **WAIT)
        request = asyncio.ensure_future(limiter.acquire())
        await asyncio.sleep(0.02)
        assert not request.done()
        store.go.set()
        assert await request


class TestCancellation:
    async def test_before_it_was_asked(self):
        store = ScriptedStore()
        limiter = scripted(store)
        store.go.clear()
        first = asyncio.ensure_future(limiter.acquire())
        task = asyncio.ensure_future(limiter.acquire())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        store.go.set()
        assert await first
        await turns()
        assert store.batches == [[1]]
        assert settled(limiter)
        assert (limiter.metrics.cancelled, limiter.metrics.abandoned) == (1, 0)

    @pytest.mark.parametrize("strategy", list(BackpressureStrategy))
    @pytest.mark.parametrize("grant", [0, 1])
    async def test_while_it_is_asked(self, strategy, grant):
        store = ScriptedStore(grant, hold=True)
        limiter = scripted(store, strategy=strategy)
        task = asyncio.ensure_future(limiter.acquire())
        await store.asked.wait()
        task.cancel()
        await turns()
        store.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await turns()
        assert settled(limiter)
        assert (limiter.metrics.cancelled, limiter.metrics.abandoned) == (1, grant)

    async def test_in_the_tick_of_the_answer(self):
        limiter = scripted(ScriptedStore())
        task = asyncio.ensure_future(limiter.acquire())
        while not limiter.metrics.calls:
            await asyncio.sleep(0)
        task.cancel()  # the answer is in the future already, the task has not run yet
        with pytest.raises(asyncio.CancelledError):
            await task
        await turns()
        assert settled(limiter)
        assert (limiter.metrics.cancelled, limiter.metrics.abandoned) == (1, 1)

    async def test_many_in_the_line_leave_no_leftovers(self):
        limiter = scripted(ScriptedStore(*[0] * 1000), **WAIT)
        tasks = [asyncio.ensure_future(limiter.acquire()) for _ in range(100)]
        await turns()
        for task in tasks[::-1][:98]:
            task.cancel()
        await asyncio.gather(*tasks[2:], return_exceptions=True)
        assert sum(len(line) for line in limiter._lines.values()) <= 6
        for task in tasks[:2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await turns()
        assert settled(limiter)
        assert limiter.metrics.cancelled == 100

    async def test_of_the_first_lets_the_second_go(self):
        store = ScriptedStore(0, 1)
        limiter = scripted(store, **WAIT)
        first, second = (asyncio.ensure_future(limiter.acquire()) for _ in range(2))
        await turns()
        first.cancel()
        assert await second
        assert settled(limiter)


class TestStoreFailures:
    async def test_closed_by_default(self):
        limiter = scripted(ScriptedStore(ConnectionRefusedError("no"), ConnectionRefusedError("no")))
        answers = await asyncio.gather(limiter.acquire(), limiter.acquire(), return_exceptions=True)
        assert [type(answer) for answer in answers] == [StoreUnavailableError] * 2
        assert "rate limits" in str(answers[0])
        assert limiter.metrics.failed == 2
        assert await limiter.acquire()

    async def test_open_if_asked_for_and_said_once(self, caplog):
        limiter = scripted(ScriptedStore(*(TimeoutError("slow") for _ in range(3))), fail_open=True)
        assert [await limiter.acquire() for _ in range(4)] == [True] * 4
        assert (limiter.metrics.failed_open, limiter.metrics.acquired) == (3, 4)
        assert len([record for record in caplog.records if "is open until" in record.message]) == 1

    async def test_a_wrong_password_never_opens(self):
        limiter = scripted(ScriptedStore(StoreAuthError("denied")), fail_open=True)
        with pytest.raises(StoreAuthError):
            await limiter.acquire()

    async def test_nobody_hangs_on_a_broken_answer(self):
        limiter = scripted(ScriptedStore(IndexError("a bug")), **WAIT)
        with pytest.raises(Exception, match="a bug"):
            await limiter.acquire()
        assert settled(limiter)

    async def test_cancelled_and_failed_in_one_tick_logs_nothing(self, caplog):
        store = ScriptedStore(TimeoutError("slow"), hold=True)
        limiter = scripted(store)
        task = asyncio.ensure_future(limiter.acquire())
        await store.asked.wait()
        store.go.set()
        while not limiter.store().idle:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task
        await turns()
        assert not [record for record in caplog.records if "never retrieved" in record.message]


class TestSharing:
    async def test_same_object_both_spellings(self, monkeypatch):
        monkeypatch.setenv("ORCHESTRA_REDIS_URL", "memory:")
        limiter = get_flow_controller("shared", config())
        assert await get_flow_controller("shared") is limiter
        assert get_flow_controller("shared", config()) is limiter
        assert get_flow_controller() is not limiter
        assert await limiter.acquire()

    async def test_another_config_is_refused(self, monkeypatch):
        monkeypatch.setenv("ORCHESTRA_REDIS_URL", "memory:")
        get_flow_controller("conflict", config())
        with pytest.raises(ConfigurationError, match="conflict"):
            get_flow_controller("conflict", config(burst=6))
        with pytest.raises(ConfigurationError):
            get_flow_controller("bad name")
