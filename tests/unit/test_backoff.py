"""Retry delays and reconnect delays: pure arithmetic, checked against its formula."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra._backoff import Reconnect, ceiling, delay
from orchestra.tasks import Retry


@pytest.mark.parametrize(
    ("number", "seconds"), [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 5.0), (50, 5.0), (5000, 5.0)]
)
def test_the_ceiling_doubles_up_to_the_cap(number, seconds):
    assert ceiling(Retry(base=0.5, factor=2.0, max_delay=5.0), number) == seconds


def test_an_overflow_is_the_cap():
    assert ceiling(Retry(base=86_400.0, factor=100.0, max_delay=7.0), 1000) == 7.0


@given(st.integers(1, 1000), st.integers(0, 2**32))
def test_the_delay_lies_below_the_ceiling(number, seed):
    retry = Retry(base=0.1, max_delay=60.0)
    assert 0.0 <= delay(retry, number, random.Random(seed)) <= ceiling(retry, number)


def test_full_jitter_spreads_over_the_whole_range():
    retry, rng = Retry(base=1.0, max_delay=10.0), random.Random(1)
    drawn = [delay(retry, 4, rng) for _ in range(2000)]
    assert min(drawn) < 0.1
    assert max(drawn) > 7.9
    assert 3.8 < sum(drawn) / len(drawn) < 4.2


def test_without_jitter_the_delay_is_the_ceiling():
    retry = Retry(base=0.5, jitter=False)
    assert [delay(retry, n) for n in (1, 2, 3)] == [0.5, 1.0, 2.0]


def test_a_seeded_generator_repeats():
    retry = Retry()
    assert delay(retry, 3, random.Random(7)) == delay(retry, 3, random.Random(7))


def test_reconnects_start_quickly_slow_down_and_never_spin():
    backoff = Reconnect(base=0.05, cap=5.0, rng=random.Random(3))
    for failures in range(40):
        top = min(5.0, 0.05 * 2**failures)
        assert backoff.failures == failures
        assert top / 10 <= backoff.next() <= top
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.next() <= 0.05
