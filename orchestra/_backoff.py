"""Exponential backoff with full jitter, for retries of tasks and for reconnects. Pure arithmetic.

Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: among the variants compared there,
full jitter needs the fewest calls in total and spreads them best.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestra.tasks import Retry

_random = random.Random()  # noqa: S311 - spreads load, guards nothing


def ceiling(retry: Retry, number: int) -> float:
    """The longest delay, in seconds, before retry ``number`` (from 1)."""
    exponent = min(number - 1, 1000)  # beyond it the power overflows a float, and the cap decides anyway
    try:
        return min(retry.max_delay, retry.base * retry.factor**exponent)
    except OverflowError:
        return retry.max_delay


def delay(retry: Retry, number: int, rng: random.Random = _random) -> float:
    """Seconds to wait before retry ``number`` (from 1)."""
    top = ceiling(retry, number)
    return rng.uniform(0.0, top) if retry.jitter else top


class Reconnect:
    """Delays between attempts to reach Redis again: 0.05 s doubling to 5 s, full jitter, reset by success."""

    def __init__(self, base: float = 0.05, cap: float = 5.0, rng: random.Random = _random) -> None:
        self._base, self._cap, self._rng = base, cap, rng
        self.failures = 0

    def next(self) -> float:
        """Seconds to wait now; each call counts one failure."""
        top = min(self._cap, self._base * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return self._rng.uniform(top / 10, top)  # never 0: a refused connect returns at once and would spin

    def reset(self) -> None:
        """The connection works again."""
        self.failures = 0
