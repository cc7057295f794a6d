"""The circuit breaker, by a manual clock."""

from __future__ import annotations

import asyncio
import gc
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra import telemetry
from orchestra.circuit_breaker import CircuitBreaker, CircuitBreakerConfig, CircuitState, breaker_registry
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
        *(("failure_threshold", bad) for bad in (0, -1, 1.5, True, 10**6)),
        *(("recovery_timeout", bad) for bad in (0, -1, math.nan, math.inf, True, "30")),
        *(("half_open_max_calls", bad) for bad in (0, 1.0, True, None)),
        *(("success_threshold", bad) for bad in (0, True, None)),
        *(("window", bad) for bad in (0, -1.0, math.nan, True, "60")),
        *(("neutral", bad) for bad in ([OSError], (1,), OSError, (BaseException,))),
        *(("counts", bad) for bad in ([OSError], (), (1,), OSError, (BaseException,), None)),
        *(("failure_rate", bad) for bad in (0, -0.1, 1.01, math.nan, math.inf, True, "0.5")),
        *(("slow_rate", bad) for bad in (0, 50, math.nan, True)),
        *(("slow_call", bad) for bad in (0, -1, math.nan, math.inf, True, "1")),
        *(("rate_window", bad) for bad in (0, 0.001, -1, math.nan, 1e9, True, None)),
        *(("minimum_calls", bad) for bad in (0, 1.5, True, None, 10**9)),
        *(("shared", bad) for bad in (1, None, "yes")),
    ],
)
def test_bad_configuration(field, value):
    with pytest.raises(ConfigurationError) as caught:
        CircuitBreakerConfig(**{field: value})
    assert caught.value.field == f"CircuitBreakerConfig.{field}"
    assert repr(value) in str(caught.value)


def test_the_error_names_unit_and_range():
    with pytest.raises(ConfigurationError, match=r"rate_window must be a number of seconds, 0.01 or more and at most"):
        CircuitBreakerConfig(rate_window=0)
    with pytest.raises(
        ConfigurationError, match=r"minimum_calls must be a whole number of calls from 1 to 1000000, got"
    ):
        CircuitBreakerConfig(minimum_calls=0)


def test_the_count_is_off_where_a_rate_is_configured():
    assert CircuitBreakerConfig().failure_threshold == 5
    assert CircuitBreakerConfig(failure_rate=0.5).failure_threshold is None
    assert CircuitBreakerConfig(slow_call=1.0).failure_threshold is None
    assert CircuitBreakerConfig(slow_call=1.0, failure_threshold=3).failure_threshold == 3


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
        breaker.record_failure(era=era)
        breaker.record_success(era=era)
        breaker.release(era=era)
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


class TestRates:
    def test_failure_rate_from_the_minimum_of_calls_on(self, make):
        breaker = make(failure_rate=0.5, minimum_calls=10)
        for turn in range(9):
            breaker.record_success() if turn % 2 else breaker.record_failure()
        assert breaker.state is CLOSED
        assert breaker.snapshot().failure_rate == pytest.approx(5 / 9)
        breaker.record_success()
        assert breaker.state is OPEN

    def test_a_rate_is_reached_exactly(self, make):
        breaker = make(failure_rate=0.07, minimum_calls=100)
        for turn in range(100):
            assert breaker.state is CLOSED
            breaker.record_failure() if turn < 7 else breaker.record_success()
        assert breaker.state is OPEN

    def test_old_calls_leave_the_window(self, make, clock):
        breaker = make(failure_rate=0.5, minimum_calls=4, rate_window=10.0)
        for _ in range(3):
            breaker.record_failure()
        clock.now += 10.0
        for _ in range(3):
            breaker.record_failure()
        assert (breaker.state, breaker.snapshot().calls) == (CLOSED, 3)
        clock.now += 8.9
        breaker.record_failure()
        assert breaker.state is OPEN

    def test_slow_calls(self, make, clock):
        breaker = make(slow_call=1.0, slow_rate=0.5, minimum_calls=4, recovery_timeout=30.0)
        for seconds in (0.999, 1.0, 0.1):
            breaker.record_success(seconds)
        assert breaker.snapshot().slow_rate == pytest.approx(1 / 3)
        breaker.record_success(5.0)
        assert breaker.state is OPEN
        clock.now += 30.0
        assert breaker.allow_nowait()
        breaker.record_success(1.5)
        assert breaker.state is OPEN, "a slow probe has failed"
        clock.now += 30.0
        assert breaker.allow_nowait()
        breaker.record_success(0.5)
        assert breaker.state is CLOSED
        assert breaker.snapshot().calls == 0

    async def test_call_measures(self, make, clock):
        breaker = make(slow_call=1.0, slow_rate=1.0, minimum_calls=2)

        async def slow():
            clock.now += 1.0

        for _ in range(2):
            await breaker.call(slow)
        assert breaker.state is OPEN

    def test_a_flood_costs_no_memory(self, make, clock):
        breaker = make(failure_rate=1.0, rate_window=1.0)
        for _ in range(2000):
            breaker.record_success()
            clock.now += 0.013
        assert breaker.snapshot().calls <= 78
        assert sum(len(getattr(breaker._rates, name)) for name in ("_calls", "_failures", "_slow")) == 30


class TestWhatCounts:
    @pytest.mark.parametrize(
        ("counts", "error", "failed"),
        [
            ((Exception,), ValueError("x"), True),
            ((OSError,), ConnectionError("x"), True),
            ((OSError,), ValueError("x"), False),
            ((lambda error: error.args == ("x",),), ValueError("x"), True),
            ((lambda error: error.args == ("x",),), ValueError("y"), False),
            ((OSError, lambda error: "503" in str(error)), RuntimeError("503"), True),
            ((lambda error: error.no_such_attribute,), ValueError("a rule that raises"), True),
        ],
    )
    async def test_types_and_functions(self, make, counts, error, failed):
        breaker = make(failure_threshold=2, counts=counts)
        for _ in range(2):
            with pytest.raises(type(error)):
                await breaker.call(fails, error)
        assert breaker.state is (OPEN if failed else CLOSED)

    def test_what_does_not_count_is_an_answer(self, make, clock):
        breaker = make(failure_threshold=2, counts=(OSError,))
        breaker.record_failure(OSError("x"))
        breaker.record_failure(ValueError("bad request"))
        breaker.record_failure(OSError("x"))
        assert (breaker.state, breaker.failures) == (CLOSED, 1)
        breaker.record_failure(OSError("x"))
        clock.now += 31.0
        assert breaker.allow_nowait()
        breaker.record_failure(ValueError("bad request"))
        assert breaker.state is CLOSED

    def test_neutral_goes_first(self, make):
        breaker = make(failure_threshold=1, neutral=(ConnectionError,), counts=(OSError,))
        breaker.record_failure(ConnectionResetError("x"))
        breaker.record_failure(asyncio.CancelledError())
        assert breaker.state is CLOSED


class TestByHand:
    def test_forced_open_lets_nobody_through(self, make, clock):
        breaker = make(recovery_timeout=30.0)
        breaker.force_open()
        clock.now += 1e6
        assert (breaker.state, breaker.available, breaker.allow_nowait()) == (OPEN, False, False)
        assert breaker.retry_after == 30.0
        assert breaker.snapshot().forced
        breaker.reset()
        assert breaker.allow_nowait()
        assert not breaker.snapshot().forced

    def test_forced_closed_lets_everybody_through(self, make):
        breaker = make(failure_threshold=1)
        breaker.force_closed()
        for _ in range(20):
            assert breaker.allow_nowait()
            breaker.record_failure()
        assert (breaker.state, breaker.failures) == (CLOSED, 0)
        breaker.reset()
        breaker.record_failure()
        assert breaker.state is OPEN

    def test_reset_forgets(self, make):
        breaker = make(failure_threshold=3, failure_rate=0.9, minimum_calls=3)
        breaker.record_failure()
        breaker.record_failure()
        breaker.reset()
        breaker.record_failure()
        breaker.record_failure()
        assert (breaker.state, breaker.failures, breaker.snapshot().calls) == (CLOSED, 2, 2)

    def test_reset_while_a_call_runs(self, make):
        breaker = make(failure_threshold=1)
        era = breaker.enter()
        breaker.reset()
        breaker.record_failure(era=era)
        assert breaker.state is CLOSED


class TestSnapshot:
    def test_says_what_a_display_needs(self, make, clock):
        breaker = make(failure_threshold=2, recovery_timeout=30.0)
        assert breaker.snapshot().last_error is None
        clock.now += 7.0
        for _ in range(2):
            breaker.record_failure(OSError("x" * 1000))
        clock.now += 10.0
        seen = breaker.snapshot()
        assert (seen.name, seen.state, seen.failures, seen.shared, seen.forced) == ("unit", OPEN, 2, False, False)
        assert (seen.retry_after, seen.age, seen.since) == (20.0, 10.0, 107.0)
        assert seen.last_error.startswith("OSError: xxx")
        assert len(seen.last_error) == 200
        clock.now += 20.0
        assert breaker.snapshot().state is HALF_OPEN

    def test_an_error_that_cannot_be_told(self, make):
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("no words")

        breaker = make()
        breaker.record_failure(Mute())
        assert (breaker.failures, breaker.snapshot().last_error) == (1, "Mute")

    def test_registry(self):
        breaker = CircuitBreaker("listed")
        assert breaker in breaker_registry()
        names = [each.name for each in breaker_registry()]
        assert names == sorted(names)
        del breaker
        gc.collect()
        assert "listed" not in [each.name for each in breaker_registry()]


class Naive:
    """The breaker told again without a state that is kept in step: everything is worked out from the whole history."""

    def __init__(self, config):
        self.config, self.era, self.state = config, 0, CLOSED
        self.calls = []  # (moment, failed, slow) since it closed
        self.opened = self.probed = 0.0
        self.places = self.good = 0

    def _move(self, state, now):
        self.state, self.era, self.opened = state, self.era + 1, now
        self.places = self.good = 0
        if state is CLOSED:
            self.calls = []

    def enter(self, now):
        if self.state is CLOSED:
            return self.era
        if self.state is OPEN:
            if self.opened + self.config.recovery_timeout - now > 0:
                return None
            self._move(HALF_OPEN, now)
        if self.places >= self.config.half_open_max_calls:
            if self.probed + self.config.recovery_timeout - now > 0:
                return None
            self.places -= 1
        self.places += 1
        self.probed = now
        return self.era

    def leave(self, era, success, duration, now):
        if era != self.era or self.state is OPEN:
            return
        slow = self.config.slow_call is not None and duration >= self.config.slow_call
        if self.state is HALF_OPEN:
            self.places = max(0, self.places - 1)
            if success is None:
                return
            if not success or slow:
                self._move(OPEN, now)
                return
            self.good += 1
            if self.good >= self.config.success_threshold:
                self._move(CLOSED, now)
        elif success is not None:
            self.calls.append((now, not success, slow))
            if self._trips(now, not success):
                self._move(OPEN, now)

    def _trips(self, now, failed):
        config = self.config
        if failed and config.failure_threshold is not None and self._failures(now) >= config.failure_threshold:
            return True
        if config.failure_rate is None and config.slow_call is None:
            return False
        width = config.rate_window / 10
        recent = [call for call in self.calls if call[0] // width > now // width - 10]
        if len(recent) < config.minimum_calls:
            return False
        if config.failure_rate is not None and sum(call[1] for call in recent) / len(recent) >= config.failure_rate:
            return True
        return config.slow_call is not None and sum(call[2] for call in recent) / len(recent) >= config.slow_rate

    def _failures(self, now):
        if self.config.window is not None:
            return sum(failed for at, failed, _ in self.calls if at > now - self.config.window)
        return next((number for number, call in enumerate(reversed(self.calls)) if not call[1]), len(self.calls))


configs = st.fixed_dictionaries(
    {
        "failure_threshold": st.sampled_from([None, 1, 2, 3, 5]),
        "recovery_timeout": st.sampled_from([1.0, 3.0, 10.0]),
        "half_open_max_calls": st.integers(1, 3),
        "success_threshold": st.integers(1, 3),
        "window": st.sampled_from([None, 2.0, 7.0]),
        "failure_rate": st.sampled_from([None, 0.3, 0.5, 1.0]),
        "slow_call": st.sampled_from([None, 1.0]),
        "slow_rate": st.sampled_from([0.5, 1.0]),
        "rate_window": st.sampled_from([1.0, 5.0, 10.0]),
        "minimum_calls": st.integers(1, 8),
    }
)
steps = st.lists(
    st.one_of(
        st.just(("enter",)),
        st.tuples(
            st.just("leave"),
            st.integers(0, 5),
            st.sampled_from([True, True, False, False, None]),
            st.sampled_from([0.1, 2.0]),
        ),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.09, 0.5, 1.0, 2.7, 3.0, 11.0])),
    ),
    max_size=120,
)


@settings(max_examples=400)
@given(configs, steps)
def test_it_agrees_with_a_naive_oracle(chosen, schedule):
    config, clock = CircuitBreakerConfig(**chosen), ManualClock()
    breaker, naive, running = CircuitBreaker("unit", config, clock), Naive(config), []
    for step, *rest in schedule:
        if step == "wait":
            clock.now += rest[0]
        elif step == "enter":
            available, era = breaker.available, breaker.enter()
            assert era == naive.enter(clock.now)
            assert available == (era is not None)
            if era is not None:
                running.append(era)
        elif running:
            which, success, duration = rest
            era = running.pop(which % len(running))
            naive.leave(era, success, duration, clock.now)
            if success is None:
                breaker.release(era=era)
            elif success:
                breaker.record_success(duration, era=era)
            else:
                breaker.record_failure(OSError("x"), duration, era=era)
        assert breaker.era == naive.era
        assert breaker._state is naive.state
        if naive.state is CLOSED:
            assert breaker.available


def test_sixteen_threads(clock):
    """Every outcome is counted once, the breaker opens at exactly the right one, and eras never mix."""
    breaker = CircuitBreaker(
        "unit", CircuitBreakerConfig(failure_rate=1.0, minimum_calls=16 * 200, rate_window=60.0), clock
    )
    barrier, opened_at = threading.Barrier(16), []
    detach = telemetry.attach(lambda name, measured, facts: opened_at.append(measured["failures"]), "breaker.changed")

    def work():
        barrier.wait(10)
        for _ in range(200):
            era = breaker.enter()
            assert era is not None
            breaker.record_failure(None, 0.1, era=era)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    detach()
    assert (breaker.state, opened_at) == (OPEN, [3200])


def test_timing_is_monotonic():
    """I13: the wall clock may jump as it likes: only the monotonic one moves a breaker."""

    class Jumping(ManualClock):
        wall = 1e9

        def time(self):
            return self.wall

    clock = Jumping()
    breaker = CircuitBreaker("unit", CircuitBreakerConfig(failure_threshold=1, recovery_timeout=30.0), clock)
    breaker.record_failure()
    for wall in (0.0, 1e12, -1e9):
        clock.wall = wall
        assert (breaker.state, breaker.retry_after, breaker.allow_nowait()) == (OPEN, 30.0, False)
    clock.now += 30.0
    clock.wall = 0.0
    assert breaker.allow_nowait()
