"""``orchestra._ext.gcra`` against exact rational arithmetic, and the proof obligation of its table."""

from __future__ import annotations

import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orchestra._ext.gcra import LIMIT, NEVER, GcraTable, check
from tests.ext._leaks import growth, needs_resource
from tests.reference import gcra as reference

TIME = st.one_of(st.integers(0, 10**6), st.integers(-LIMIT, LIMIT))
COST = st.one_of(st.integers(1, 50), st.integers(1, LIMIT))
BURST = st.one_of(st.integers(0, 10**4), st.integers(0, LIMIT))


@given(TIME, TIME, COST, COST, BURST)
@settings(max_examples=1000)
def test_check_equals_exact_arithmetic(tat, now, cost, emission, burst):
    assume(now + burst <= LIMIT)
    result = check(tat, now, cost, emission, burst)
    assert result == reference.check(tat, now, cost, emission, burst)
    assert result[0] == reference.formula(tat, now, cost, emission, burst)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 4)), max_size=60), st.integers(1, 40), st.integers(1, 8))
def test_rate_holds_over_every_window(requests, emission, burst):
    """No window of length d admits more than burst + d / T units of cost: the promise of GCRA."""
    tat = now = 0
    admitted = []
    for gap, cost in requests:
        now += gap
        allowed, tat, _, remaining = check(tat, now, cost, emission, burst * emission)
        assert 0 <= remaining <= burst
        if allowed:
            admitted.append((now, cost))
    for start, (opened, _) in enumerate(admitted):
        total = 0
        for closed, cost in admitted[start:]:
            total += cost
            assert total * emission <= burst * emission + closed - opened


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 999), st.integers(0, 9999))
def test_retry_after_is_the_first_moment_that_admits(tat, now, cost, emission, burst):
    allowed, stored, wait, _ = check(tat, now, cost, emission, burst)
    if allowed:
        assert wait == 0
    elif wait == NEVER:
        assert cost * emission > burst
    else:
        assert check(stored, now + wait, cost, emission, burst)[0]
        assert not check(stored, now + wait - 1, cost, emission, burst)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 1, 1), "cost must be from 1 to"),
        ((0, 0, 1, 0, 1), "emission_us must be from 1"),
        ((0, 0, 1, 1, -1), "burst_us must be from 0"),
        ((2**62 + 1, 0, 1, 1, 1), "tat_us must be from -2"),
        ((0, -(2**80), 1, 1, 1), "now_us must be from -2"),
        ((0, 2**62, 1, 1, 1), "now_us [+] burst_us must be at most"),
    ],
)
def test_check_names_what_is_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        check(*arguments)


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("bad", [1.0, "1", None])
def test_check_takes_whole_numbers_only(position, bad):
    arguments = [1, 1, 1, 1, 1]
    arguments[position] = bad
    with pytest.raises(TypeError, match="must be an int"):
        check(*arguments)


class NeverRefusesWhatRedisAdmits(RuleBasedStateMachine):
    """A limiter with a clock of its own that drifts; one process of several asks it and keeps the table.

    ``travel`` before and after the script runs are the halves of a round trip. Whenever the table refuses at the local
    time of a check, the limiter is asked at the same moment whether it would have admitted: it must not.
    """

    EMISSION, BURST, DRIFT = 1_000, 5_000, 100_000

    def __init__(self):
        super().__init__()
        self.table = GcraTable(8, drift_ppm=self.DRIFT, max_age_us=10**7)
        self.limiter = reference.Limiter(self.EMISSION, self.BURST)
        self.true_us = 0.0
        self.redis_us = 1.0e9
        self.speed = 1.0

    @rule(ppm=st.sampled_from([-DRIFT, 0, DRIFT]))
    def drift(self, ppm):
        self.speed = 1 + ppm / 1e6

    @rule(us=st.one_of(st.integers(0, 6_000), st.integers(0, 50_000)))
    def wait(self, us):
        self.true_us += us
        self.redis_us += us * self.speed

    @rule(cost=st.integers(1, 5))
    def others_acquire(self, cost):
        self.limiter.acquire(cost, int(self.redis_us))

    @rule(cost=st.integers(1, 5), there=st.one_of(st.just(0), st.integers(0, 3_000)), back=st.integers(0, 3_000))
    def ask(self, cost, there, back):
        sent = int(self.true_us)
        self.wait(there)
        now = int(self.redis_us)
        self.limiter.acquire(cost, now)
        tat = self.limiter.tat_us
        self.wait(back)
        self.table.observe("limiter", tat, now, sent)

    @rule(step=st.integers(0, 10**6))
    def clock_of_redis_steps_back(self, step):
        self.redis_us -= min(step, self.redis_us)

    @invariant()
    def sound(self):
        for cost in range(1, 7):
            wait = self.table.refused_for("limiter", cost, int(self.true_us), self.EMISSION, self.BURST)
            if wait:
                tat, now = self.limiter.tat_us, int(self.redis_us)
                assert not check(tat, now, cost, self.EMISSION, self.BURST)[0]


NeverRefusesWhatRedisAdmits.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
TestNeverRefusesWhatRedisAdmits = NeverRefusesWhatRedisAdmits.TestCase


def observed(**options):
    """A table that knows: sent at local 100, Redis said a debt of 5_000 µs."""
    table = GcraTable(**options)
    table.observe("key", 1_005_000, 1_000_000, 100)
    return table


def test_refuses_until_the_debt_is_drained():
    table = observed(drift_ppm=0)
    assert table.refused_for("key", 1, 100, 1_000, 5_000) == 998  # two microseconds of rounding
    assert table.refused_for("key", 1, 1_097, 1_000, 5_000) == 1
    assert table.refused_for("key", 1, 1_098, 1_000, 5_000) == 0
    assert table.refused_for("key", 3, 1_098, 1_000, 5_000) == 2_000
    assert table.refused_for("other", 1, 100, 1_000, 5_000) == 0
    assert table.refused_for("other", 6, 100, 1_000, 5_000) == NEVER


def test_margins_make_it_ask_earlier():
    assert observed(drift_ppm=0, lead_us=300).refused_for("key", 1, 798, 1_000, 5_000) == 0
    assert observed(drift_ppm=100_000).refused_for("key", 1, 1_099, 1_000, 5_000) == 0
    table = observed(drift_ppm=0, max_age_us=500)
    assert table.refused_for("key", 1, 600, 1_000, 5_000) == 498
    assert table.refused_for("key", 1, 601, 1_000, 5_000) == 0


def test_newest_question_counts():
    table = observed(drift_ppm=0)
    table.observe("key", 9_000_000, 1_000_000, 99)  # overtaken
    assert table.known("key") == (5_100, 100)
    table.observe("key", 1_000_000, 1_000_200, 200)  # the limiter was reset
    assert table.known("key") == (200, 200)
    assert table.refused_for("key", 5, 200, 1_000, 5_000) == 0


def test_forget_and_clear():
    table = observed()
    assert "key" in table
    assert 7 not in table
    assert table.forget("key") is True
    assert table.forget("key") is False
    assert table.known("key") is None
    table.observe("key", 1, 0, 0)
    table.clear()
    assert len(table) == 0
    table.observe("key", 1, 0, 0)
    assert table.known("key") == (1, 0)


class Bounded(RuleBasedStateMachine):
    """The table as a dict in the order of observation."""

    def __init__(self):
        super().__init__()
        self.table, self.model, self.now = GcraTable(5), {}, 0

    @rule(number=st.integers(0, 12))
    def observe(self, number):
        key = f"key-{number}"
        self.now += 1
        self.table.observe(key, self.now + 7, 0, self.now)
        self.model.pop(key, None)
        self.model[key] = (2 * self.now + 7, self.now)
        if len(self.model) > 5:
            del self.model[next(iter(self.model))]

    @rule(number=st.integers(0, 12))
    def forget(self, number):
        key = f"key-{number}"
        assert self.table.forget(key) == (self.model.pop(key, None) is not None)

    @rule()
    def clear(self):
        self.table.clear()
        self.model.clear()

    @invariant()
    def same(self):
        assert len(self.table) == len(self.model)
        for number in range(13):
            assert self.table.known(f"key-{number}") == self.model.get(f"key-{number}")


Bounded.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestBounded = Bounded.TestCase


@given(TIME, TIME, TIME, TIME, COST, COST, BURST)
def test_extremes_neither_overflow_nor_refuse_without_cause(tat, redis_now, sent, now, cost, emission, burst):
    table = GcraTable(drift_ppm=0, max_age_us=86_400_000_000)
    table.observe("key", tat, redis_now, sent)
    wait = table.refused_for("key", cost, now, emission, burst)
    if cost * emission > burst:
        assert wait == NEVER
    elif wait:
        debt = tat - redis_now - max(now - sent, 0)
        assert debt + cost * emission > burst
        assert 0 < wait <= cost * emission


def test_refuses_bad_arguments():
    table = GcraTable()

    class Name(str):
        __slots__ = ()

    for key in (None, b"key", Name("key")):
        for call in (table.forget, table.known, lambda k: table.observe(k, 0, 0, 0)):
            with pytest.raises(TypeError, match="key must be a str"):
                call(key)
    with pytest.raises(TypeError, match="local_now_us must be an int, got float"):
        table.refused_for("key", 1, 0.5, 1, 1)
    with pytest.raises(ValueError, match="cost must be from 1"):
        table.refused_for("key", 0, 0, 1, 1)
    for options in ({"capacity": 0}, {"lead_us": -1}, {"max_age_us": 0}, {"drift_ppm": 1_000_001}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GcraTable(**options)


def test_keys_are_released():
    table = GcraTable(100)
    key = "".join(["key", "-of-its-own"])
    before = sys.getrefcount(key)
    table.observe(key, 0, 0, 0)
    table.refused_for(key, 1, 0, 1, 1)
    assert sys.getrefcount(key) == before + 1
    for number in range(100):
        table.observe(f"{number}", 0, 0, 1)
    assert sys.getrefcount(key) == before


LEAK = """
from orchestra._ext.gcra import GcraTable, check

def rounds(count):
    for number in range(count):
        table = GcraTable(500)
        for key in range(1000):
            table.observe(f"{number}-{key}", 2**40, 2**39, 2**38)
            table.refused_for(f"{number}-{key}", 1, 2**38, 10**6, 10**9)
            check(2**40, 2**40, 1, 10**6, 10**9)
        try:
            table.observe("x" * 100, 2**70, 0, 0)
        except ValueError:
            pass
"""


@needs_resource
def test_no_leak_in_a_fresh_process():
    assert growth(LEAK) < 1_000
