"""H5: the arithmetic of retries: backoff with full jitter, what agents ask for, and the budget against storms."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra import _backoff
from orchestra._backoff import BURST, RetryBucket, ceiling, delay, wanted, whole_ms
from orchestra._delivery import Again, Bury, Delivery
from orchestra._dispatch.retry_gate import RetryGate
from orchestra._execution import Execution
from orchestra._pool.slots import Slot
from orchestra.agents import AgentRegistry
from orchestra.cli.worker import parse_retry_budget
from orchestra.errors import ConfigurationError, RetryLater
from orchestra.load_balancer import RoundRobinStrategy
from orchestra.serialization import encode_task
from orchestra.tasks import Outcome, Retry, RetryBudget
from orchestra.testing import Recorder

BUDGET = RetryBudget(ratio=0.2, floor=10.0, max_delay=1e4)


def departures(bucket, arrivals):
    """When retries leave that fail at the moments ``arrivals`` (time, attempts ended so far), without backoff."""
    return [now + bucket.reserve(now, ended) for now, ended in arrivals]


# -- the bucket


def test_retries_within_the_budget_do_not_wait():
    bucket = RetryBucket(BUDGET, 0.0)
    assert departures(bucket, [(n / 10, 0) for n in range(1, 100)]) == [n / 10 for n in range(1, 100)]


def test_a_share_of_the_throughput_may_be_retries():
    """100 attempts a second, every fifth of them a retry: that is the ratio."""
    bucket = RetryBucket(RetryBudget(ratio=0.2, floor=0.001), 0.0)
    waits = [bucket.reserve(n / 20, 5 * n) for n in range(1, 2000)]
    assert max(waits) < 1.0
    assert waits[-100:] == [0.0] * 100


def test_a_storm_leaves_at_the_budgeted_rate():
    """H5: 1,000 tasks fail at one moment; nothing is lost, and no second sees more than the floor and the burst."""
    bucket = RetryBucket(BUDGET, 0.0)
    leave = departures(bucket, [(1.0, 0)] * 1000)
    assert len(leave) == 1000
    assert leave[-1] == pytest.approx(1.0 + 990 / 10, rel=0.01)
    for start in range(2, 90):
        assert sum(start <= at < start + 1 for at in leave) <= 11


def test_no_retry_waits_for_ever_and_debt_does_not_grow_beyond_that():
    bucket = RetryBucket(RetryBudget(ratio=0.0, floor=10.0, max_delay=5.0), 0.0)
    waits = [bucket.reserve(1.0, 0) for _ in range(1000)]
    assert max(waits) == 5.0
    assert bucket.reserve(7.0, 0) == 0.0, "six seconds later the debt is paid"


def test_a_clock_that_stands_still_or_goes_back_does_no_harm():
    bucket = RetryBucket(BUDGET, 100.0, 50)
    waits = [bucket.reserve(at, ended) for at, ended in ((100.0, 50), (99.0, 40), (100.0, 50), (100.0, 60))]
    assert waits == [0.0] * 4


@settings(max_examples=60)
@given(
    ratio=st.floats(0.0, 10.0),
    floor=st.floats(0.1, 1000.0),
    longest=st.floats(0.0, 1000.0),
    steps=st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 200), st.integers(0, 20)), max_size=40),
)
def test_the_wait_is_never_negative_never_above_its_limit_and_repeats(ratio, floor, longest, steps):
    def run():
        bucket, now, ended, waits = RetryBucket(budget, 0.0), 0.0, 0, []
        for passed, attempts, retries in steps:
            now, ended = now + passed, ended + attempts
            waits += [bucket.reserve(now, ended) for _ in range(retries)]
        return waits

    budget = RetryBudget(ratio=ratio, floor=floor, max_delay=longest)
    waits = run()
    assert all(0.0 <= wait <= longest for wait in waits)
    assert waits == run()


@settings(max_examples=25)
@given(
    floor=st.floats(1.0, 100.0),
    steps=st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 50)), min_size=1, max_size=30),
)
def test_what_leaves_in_any_window_is_bounded_by_the_budget(floor, steps):
    """Without throughput the rate is known beforehand, so the bound of a token bucket is exact in every window."""
    bucket, now, leave = RetryBucket(RetryBudget(ratio=0.0, floor=floor, max_delay=86_400.0), 0.0), 0.0, []
    for passed, retries in steps:
        now += passed
        leave += [now + bucket.reserve(now, 0) for _ in range(retries)]
    leave.sort()
    for first, start in enumerate(leave):
        for last in range(first, len(leave)):
            allowed = max(1.0, floor * BURST) + floor * (leave[last] - start)
            assert last - first + 1 <= allowed + 1 + 1e-6


def test_an_outage_of_a_minute_recovers_in_bounded_time():
    """H5: 10,000 tasks, 500 attempts a second, the dependency is down for 60 s: simulated second by second.

    While it is down retries stay within the budget; after it every task is done within the longest delays.
    """
    budget, rng = RetryBudget(ratio=0.2, floor=10.0, max_delay=60.0), random.Random(5)
    retry, bucket = Retry(max_retries=1000, base=1.0, max_delay=30.0), RetryBucket(budget, 0.0)
    due = [(0.0, 0, n) for n in range(10_000)]  # time, tries so far, task
    second, ended, done, per_second = 0, 0, 0, []
    while due and second < 1000:
        due.sort()
        retries = 0
        for _ in range(500):
            if not due or due[0][0] > second:
                break
            _, tries, number = due.pop(0)
            ended += 1
            retries += tries > 0
            if second >= 60:
                done += 1
                continue
            wait = delay(retry, tries + 1, rng) + bucket.reserve(float(second), ended)
            due.append((second + wait, tries + 1, number))
        per_second.append(retries)
        second += 1
    assert done == 10_000
    assert second <= 60 + 60 + 30 + 10_000 / 500
    assert sum(per_second[:60]) <= 0.2 * 500 * 60 + 10 * 60 + 1.3 * (0.2 * 500 + 10)


# -- what a retry waits for


@given(st.integers(1, 1000), st.integers(0, 2**32), st.floats(0.001, 1000.0), st.floats(1.0, 10.0))
def test_the_backoff_is_never_negative_and_never_above_its_ceiling(number, seed, base, factor):
    retry = Retry(base=base, factor=factor, max_delay=3600.0)
    assert 0.0 <= delay(retry, number, random.Random(seed)) <= ceiling(retry, number) <= 3600.0


@given(st.floats(0.0, 1e6))
def test_due_times_are_rounded_up_to_milliseconds_never_down(seconds):
    """H6: the queue counts in whole milliseconds; half of one too early is too early."""
    assert whole_ms(seconds) >= seconds
    assert round(whole_ms(seconds) * 1000) >= seconds * 1000


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [(3, 3), (0.25, 0.25), (-1.0, 0.0), (math.nan, 0.0), (math.inf, _backoff.LONGEST), ("soon", 0.0), (None, 0.0)],
)
def test_what_agents_ask_for_becomes_a_delay_that_can_be_kept(asked, seconds):
    """F6: NaN, infinity and nonsense in ``RetryLater`` must not break the loop that settles."""
    assert wanted(asked) == seconds


class Failing:
    """An Execution whose agent raises ``error``; no queue, no loop of its own."""

    def __init__(self, error, *, agents_retry=None, default=None, hold_back=None):
        agents = AgentRegistry()

        async def agent(task):
            raise error

        agents.register("work", agent, **({"retry": agents_retry} if agents_retry else {}))
        default = default or Retry(max_retries=2, base=1.0, jitter=False)
        self._execution = Execution("q", agents, default, lambda _: RoundRobinStrategy(), hold_back=hold_back)

    async def verdict(self, retries=0, **fields):
        encoded = encode_task({"id": "t", "type": "work", **fields})
        extra = (b"n", str(retries).encode()) if retries else ()
        delivery = Delivery(2, b"1-1", (b"t", encoded.frame, *extra), "c")
        return (await self._execution.run(delivery, Slot(), delivery.task())).verdict


@pytest.mark.parametrize("after", [0.0, 0.0004, 0.25, 7.5, 3600.0])
@pytest.mark.parametrize("held", [0.0, 2.5])
async def test_retry_later_is_a_lower_bound(after, held):
    verdict = await Failing(RetryLater(after), hold_back=lambda: held).verdict()
    assert after + held <= verdict.delay <= after + held + 0.0011


async def test_retry_later_of_infinity_is_kept_within_what_redis_can_count():
    verdict = await Failing(RetryLater(math.inf)).verdict()
    assert verdict.delay == _backoff.LONGEST


@pytest.mark.parametrize(
    ("task", "agent", "dispatcher", "most"),
    [(None, None, 2, 2), (None, 3, 2, 3), (None, 0, 2, 0), (1, 3, 2, 1), (4, None, 2, 4), (0, 3, 2, 0)],
)
async def test_max_retries_of_the_task_goes_before_the_agents_before_the_dispatchers(task, agent, dispatcher, most):
    failing = Failing(
        ValueError(),
        agents_retry=None if agent is None else Retry(max_retries=agent),
        default=Retry(max_retries=dispatcher),
    )
    fields = {} if task is None else {"max_retries": task}
    for retries in range(most):
        assert isinstance(await failing.verdict(retries, **fields), Again)
    assert isinstance(await failing.verdict(most, **fields), Bury)


# -- the gate of a dispatcher


def test_the_gate_tells_what_it_held_back_once():
    gate = RetryGate("q", RetryBudget(ratio=0.0, floor=1.0, max_delay=50.0), {Outcome.FAILED: 0})
    waits = [gate.hold_back() for _ in range(5)]
    with Recorder("retry.throttled") as recorder:
        gate.tell()
        gate.tell()
    (event,) = recorder.events
    assert event.measurements["count"] == sum(wait > 0 for wait in waits) >= 3
    assert event.measurements["delay_s"] == max(waits)
    assert event.metadata == {"queue": "q"}


def test_without_a_budget_nothing_is_held_back():
    gate = RetryGate("q", None, {})
    assert [gate.hold_back() for _ in range(1000)] == [0.0] * 1000


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ratio", -0.1),
        ("ratio", 11.0),
        ("ratio", math.nan),
        ("ratio", True),
        ("floor", 0.0),
        ("floor", -1.0),
        ("floor", math.inf),
        ("floor", "10"),
        ("max_delay", -1.0),
        ("max_delay", 86_401.0),
    ],
)
def test_a_bad_setting_is_named(setting, value):
    with pytest.raises(ConfigurationError) as caught:
        RetryBudget(**{setting: value})
    assert caught.value.field == f"RetryBudget.{setting}"


def test_only_a_budget_is_a_budget():
    with pytest.raises(ConfigurationError, match="retry_budget must be a RetryBudget or None, got 0.2"):
        RetryGate("q", 0.2, {})


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("off", None),
        ("0.5", RetryBudget(ratio=0.5)),
        ("0.2+10", RetryBudget()),
        ("0+2.5", RetryBudget(ratio=0.0, floor=2.5)),
    ],
)
def test_the_command_line_says_it_in_a_word(text, budget):
    assert parse_retry_budget(text) == budget


@pytest.mark.parametrize("text", ["", "on", "0.2+", "+10", "0.2-10", "0.2+x", "nan", "-1", "0.2+0", "1e9+1"])
def test_the_command_line_refuses_what_is_no_budget(text):
    with pytest.raises(ConfigurationError):
        parse_retry_budget(text)
