"""The circuit breaker, by a manual clock."""

from __future__ import annotations

import asyncio
import gc
import math
import threading

import pytest

from orchestra import telemetry
from orchestra.circuit_breaker import CircuitBreaker, CircuitBreakerConfig, CircuitState
from orchestra.errors import CircuitOpenError, ConfigurationError, OrchestraError, Reject, RetryLater, Throttled

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def make(clock):
    return lambda **settings: CircuitBreaker("unit", CircuitBreakerConfig(**settings), clock)


def opened(breaker: CircuitBreaker) -> CircuitBreaker:
    for _ in range(breaker.config.failure_threshold):
        assert breaker.allow_nowait()
        breaker.record_failure()
    assert breaker.state is OPEN
    return breaker


async def fine(value=1):
    return value


async def fails(error=None):
    raise error or OSError("down")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("failure_threshold", bad) for bad in (0, -1, 1.5, True, None, 10**6)),
        *(("recovery_timeout", bad) for bad in (0, -1, math.nan, math.inf, True, "30")),
        *(("half_open_max_calls", bad) for bad in (0, 1.0, True, None)),
        *(("success_threshold", bad) for bad in (0, True, None)),
        *(("window", bad) for bad in (0, -1.0, math.nan, True, "60")),
        *(("neutral", bad) for bad in ([OSError], (1,), OSError, (BaseException,))),
    ],
)
def test_bad_configuration(field, value):
    with pytest.raises(ConfigurationError) as caught:
        CircuitBreakerConfig(**{field: value})
    assert caught.value.field == f"CircuitBreakerConfig.{field}"
    assert repr(value) in str(caught.value)


def test_bad_name():
    with pytest.raises(ConfigurationError):
        CircuitBreaker("two words")


class TestOpening:
    def test_after_failures_in_a_row(self, make):
        breaker = make(failure_threshold=3)
        for outcome in (False, False, True, False, False):
            assert breaker.allow_nowait()
            breaker.record_success() if outcome else breaker.record_failure()
        assert (breaker.state, breaker.failures) == (CLOSED, 2)
        breaker.record_failure()
        assert (breaker.state, breaker.failures) == (OPEN, 3)
        assert not breaker.allow_nowait()
        assert not breaker.available

    def test_within_a_window(self, make, clock):
        breaker = make(failure_threshold=3, window=10.0)
        for _ in range(5):
            breaker.record_failure()
            breaker.record_success()
            clock.now += 5.0
        assert breaker.state is CLOSED
        breaker.record_failure()
        assert (breaker.state, breaker.failures) == (CLOSED, 2)
        breaker.record_failure()
        assert breaker.state is OPEN

    def test_reports_while_open_change_nothing(self, make, clock):
        breaker = opened(make())
        clock.now += 10.0
        breaker.record_failure()
        breaker.record_success()
        breaker.release()
        assert breaker.retry_after == pytest.approx(20.0)


class TestHalfOpen:
    def test_on_time_and_not_before(self, make, clock):
        breaker = opened(make(recovery_timeout=30.0))
        clock.now += 29.999
        assert breaker.state is OPEN
        assert not breaker.allow_nowait()
        assert breaker.retry_after == pytest.approx(0.001)
        clock.now += 0.002
        assert breaker.state is HALF_OPEN
        assert breaker.available
        assert breaker.allow_nowait()
        assert not breaker.allow_nowait()
        breaker.record_success()
        assert (breaker.state, breaker.failures) == (CLOSED, 0)

    def test_a_failed_probe_opens_for_the_full_time(self, make, clock):
        breaker = opened(make())
        clock.now += 31.0
        assert breaker.allow_nowait()
        clock.now += 5.0
        breaker.record_failure()
        assert breaker.state is OPEN
        assert breaker.retry_after == pytest.approx(30.0)

    def test_several_successes_needed(self, make, clock):
        breaker = opened(make(success_threshold=3, half_open_max_calls=2))
        clock.now += 31.0
        assert [breaker.allow_nowait() for _ in range(3)] == [True, True, False]
        breaker.record_success()
        breaker.record_success()
        assert breaker.state is HALF_OPEN
        assert breaker.allow_nowait()
        breaker.record_success()
        assert breaker.state is CLOSED

    def test_release_gives_the_place_back(self, make, clock):
        breaker = opened(make())
        clock.now += 31.0
        assert breaker.allow_nowait()
        breaker.release()
        assert breaker.state is HALF_OPEN
        assert breaker.allow_nowait()

    def test_a_hung_probe_gives_way_but_may_still_report(self, make, clock):
        breaker = opened(make())
        clock.now += 31.0
        assert breaker.allow_nowait()
        clock.now += 29.0
        assert not breaker.allow_nowait()
        clock.now += 1.5
        assert breaker.allow_nowait()
        assert not breaker.allow_nowait()
        breaker.record_success()
        assert breaker.state is CLOSED

    def test_a_late_report_of_an_earlier_era_is_ignored(self, make, clock):
        breaker = make(failure_threshold=1)
        era = breaker.era
        assert breaker.allow_nowait()
        breaker.record_failure()
        clock.now += 31.0
        assert breaker.allow_nowait()
        breaker.record_failure(era)
        breaker.record_success(era)
        breaker.release(era)
        assert breaker.state is HALF_OPEN
        assert not breaker.allow_nowait()

    def test_no_stampede_across_threads(self, make, clock):
        breaker = opened(make(half_open_max_calls=3))
        clock.now += 31.0
        barrier = threading.Barrier(16)
        let_through = []

        def ask():
            barrier.wait(10)
            let_through.extend(1 for _ in range(60) if breaker.allow_nowait())

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(let_through) == 3

    async def test_no_stampede_on_one_loop(self, make, clock):
        breaker = opened(make(half_open_max_calls=2))
        clock.now += 31.0
        running, most, go = 0, 0, asyncio.Event()

        async def work():
            nonlocal running, most
            running += 1
            most = max(most, running)
            await go.wait()
            running -= 1

        tasks = [asyncio.ensure_future(breaker.call(work)) for _ in range(1000)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 2
        assert sum(isinstance(answer, CircuitOpenError) for answer in answers) == 998


class TestCall:
    async def test_passes_arguments_results_and_errors(self, make):
        breaker = make(failure_threshold=2)
        assert await breaker.call(fine, value=7) == 7
        assert await breaker.call(lambda value: value + 1, 1) == 2
        for _ in range(2):
            with pytest.raises(OSError, match="down"):
                await breaker.call(fails)
        called = []
        with pytest.raises(CircuitOpenError, match="unit") as caught:
            await breaker.call(called.append, 1)
        assert called == []
        assert caught.value.retry_after == pytest.approx(30.0)
        assert (caught.value.breaker, caught.value.code) == ("unit", "circuit_open")
        assert isinstance(caught.value, OrchestraError)

    async def test_an_error_raised_before_the_first_await_counts(self, make):
        breaker = make(failure_threshold=1)
        with pytest.raises(TypeError):
            await breaker.call(fine, 1, 2, 3)
        assert breaker.state is OPEN

    @pytest.mark.parametrize("error", [Throttled(1.0), Reject("no"), RetryLater(2.0)])
    async def test_control_flow_counts_neither_way(self, make, clock, error):
        breaker = make(failure_threshold=2)
        breaker.record_failure()
        with pytest.raises(type(error)):
            await breaker.call(fails, error)
        assert (breaker.state, breaker.failures) == (CLOSED, 1)
        breaker.record_failure()
        clock.now += 31.0
        with pytest.raises(type(error)):
            await breaker.call(fails, error)
        assert breaker.state is HALF_OPEN
        assert breaker.allow_nowait()

    async def test_cancellation_counts_neither_way_and_frees_the_probe(self, make, clock):
        breaker = opened(make())
        clock.now += 31.0
        task = asyncio.ensure_future(breaker.call(asyncio.Event().wait))
        await asyncio.sleep(0)
        assert not breaker.allow_nowait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert breaker.state is HALF_OPEN
        assert await breaker.call(fine) == 1
        assert breaker.state is CLOSED

    async def test_calls_that_began_before_do_not_close_it(self, make, clock):
        breaker = make(failure_threshold=1)
        go = asyncio.Event()
        slow = asyncio.ensure_future(breaker.call(go.wait))
        await asyncio.sleep(0)
        with pytest.raises(OSError, match="down"):
            await breaker.call(fails)
        clock.now += 31.0
        assert breaker.allow_nowait()
        go.set()
        assert await slow
        assert breaker.state is HALF_OPEN

    async def test_keeps_nothing_of_its_calls(self, make):
        breaker = make(failure_threshold=1000)

        class Payload:
            pass

        for _ in range(100):
            with pytest.raises(OSError, match="down"):
                await breaker.call(fails, OSError("down", Payload()))
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing) is Payload]


def test_events(make, clock):
    seen = []
    breaker = make(failure_threshold=2)

    def handler(name, measured, facts):
        seen.append((facts["breaker"], facts["old"], facts["new"], measured["failures"], breaker.state.value))

    detach = telemetry.attach(handler, "breaker.changed")
    try:
        opened(breaker)
        clock.now += 31.0
        breaker.allow_nowait()
        breaker.record_success()
    finally:
        detach()
    assert seen == [
        ("unit", "closed", "open", 2, "open"),
        ("unit", "open", "half_open", 2, "half_open"),
        ("unit", "half_open", "closed", 2, "closed"),
    ]
