"""The configuration of flow control: what is refused, and rounding that never exceeds the rate."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.errors import ConfigurationError
from orchestra.flow_control import BackpressureConfig, RateLimitConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rate", bad) for bad in (0, -1, NAN, INF, -INF, True, "10", None, 2e6, 1e-300, 5e-324, 1e308)),
        *(("burst", bad) for bad in (0, -1, 1.5, 2.0, True, "5", None, 10**10, NAN, INF)),
        *(("period", bad) for bad in (0, -1.0, NAN, INF, True, "1", None, 1e300, 5e-324)),
    ],
)
def test_bad_rate_limit(field, value):
    good = {"rate": 10.0, "burst": 5, "period": 1.0}
    with pytest.raises(ConfigurationError) as caught:
        RateLimitConfig(**{**good, field: value})
    assert repr(value) in str(caught.value)
    assert caught.value.field.startswith("RateLimitConfig.")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rate_limit", 10),
        ("rate_limit", None),
        ("strategy", "reject"),
        ("fail_open", 1),
        *(("max_wait", bad) for bad in (-1, NAN, INF, True, "1", 1e9)),
        *(("priority_reserve", bad) for bad in (-0.1, 1.0, NAN, True, None)),
        *(("lease", bad) for bad in (-1, 1001, 1.5, True, "5", None, NAN)),
        *(("lease_ttl", bad) for bad in (0, -1.0, 10.5, NAN, INF, True, "1", None)),
    ],
)
def test_bad_backpressure(field, value):
    with pytest.raises(ConfigurationError) as caught:
        BackpressureConfig(**{field: value})
    assert caught.value.field == f"BackpressureConfig.{field}"
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)


def test_slowest_and_fastest():
    yearly = RateLimitConfig(rate=1, burst=8, period=365 * 86_400)
    assert yearly.burst_us == 8 * 365 * 86_400 * 10**6
    with pytest.raises(ConfigurationError, match="nine years"):
        RateLimitConfig(rate=1, burst=9, period=365 * 86_400)
    assert RateLimitConfig(rate=1e6, burst=1).emission_us == 1


def test_a_tenth_is_a_tenth():
    assert RateLimitConfig(rate=1, burst=1, period=0.1).emission_us == 100_000
    assert RateLimitConfig(rate=0.1, burst=1).emission_us == 10_000_000
    assert RateLimitConfig(rate=3, burst=1).emission_us == 333_334


@given(
    rate=st.one_of(st.integers(1, 10**6), st.floats(1e-3, 1e6)),
    burst=st.integers(1, 10**5),
    period=st.one_of(st.integers(1, 3600), st.floats(0.01, 3600)),
)
def test_rounding_never_exceeds_the_rate(rate, burst, period):
    try:
        limit = RateLimitConfig(rate=rate, burst=burst, period=period)
    except ConfigurationError:
        assert rate / period > 0.9e6 or burst * period / rate > 2**47 / 1e6
        return
    exact = Fraction(str(period)) * 10**6 / Fraction(str(rate))
    assert exact <= limit.emission_us < exact + 1
    assert limit.burst_us == burst * limit.emission_us
