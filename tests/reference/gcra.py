"""Oracle of ``orchestra._ext.gcra``: the algorithm in exact rational seconds, and a limiter as Redis would keep it."""

from __future__ import annotations

from fractions import Fraction

MICRO = Fraction(1, 1_000_000)
NEVER = 2**62


def check(tat_us: int, now_us: int, cost: int, emission_us: int, burst_us: int) -> tuple[bool, int, int, int]:
    """Leaky bucket of ``burst`` seconds, drained at one second a second; a request pours in ``cost * T``."""
    now, interval, burst = now_us * MICRO, emission_us * MICRO, burst_us * MICRO
    level = min(max(tat_us * MICRO - now, Fraction(0)), burst)
    poured = level + cost * interval
    if poured <= burst:
        return True, _micros(now + poured), 0, int((burst - poured) / interval)
    wait = NEVER if cost * interval > burst else _micros(poured - burst)
    return False, _micros(now + level), wait, int((burst - level) / interval)


def formula(tat: int, now: int, cost: int, emission: int, burst: int) -> bool:
    """The decision as the Lua script words it, without the clamp above."""
    return max(tat, now) + cost * emission - burst <= now


def _micros(seconds: Fraction) -> int:
    value = seconds / MICRO
    assert value.denominator == 1
    return value.numerator


class Limiter:
    """A limiter in Redis: stores the TAT, forgets it when it has passed."""

    def __init__(self, emission_us: int, burst_us: int) -> None:
        self.emission_us = emission_us
        self.burst_us = burst_us
        self.tat_us = 0

    def acquire(self, cost: int, now_us: int) -> bool:
        allowed, tat_us, _, _ = check(self.tat_us, now_us, cost, self.emission_us, self.burst_us)
        if allowed:
            self.tat_us = tat_us
        return allowed
