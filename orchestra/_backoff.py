"""Exponential backoff with full jitter, for retries of tasks and for reconnects, and the budget of retries. Pure
arithmetic: time and randomness are arguments. Not thread-safe: a bucket belongs to one event loop.

Sources: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: among the variants compared there,
full jitter needs the fewest calls in total and spreads them best. Retry budgets as a share of the throughput plus a
floor: Finagle's ``RetryBudget``; "Handling Overload" in Site Reliability Engineering, O'Reilly, 2016.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestra.tasks import Retry, RetryBudget

_random = random.Random()  # noqa: S311 - spreads load, guards nothing

LONGEST = 366 * 86_400.0
"""Seconds; no delay that an agent or a limiter asks for is taken for longer."""
BURST = 1.0
"""Seconds of budget that may be saved up and then spent at once."""
MEMORY = 5.0
"""Seconds over which a bucket averages the throughput, to tell when a promised retry can leave."""


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


def wanted(seconds: object) -> float:
    """A delay that somebody else's code asks for, as 0 to :data:`LONGEST` seconds; nonsense is 0."""
    if not isinstance(seconds, int | float) or seconds != seconds:  # noqa: PLR0124 - not a number
        return 0.0
    return min(max(0.0, seconds), LONGEST)


def whole_ms(seconds: float) -> float:
    """``seconds`` rounded up to whole milliseconds, the unit of due times: rounding down would start a task early."""
    return math.ceil(seconds * 1000) / 1000


class RetryBucket:
    """The token bucket of one :class:`RetryBudget`. A retry takes a token, or runs into debt and waits for its turn.

    Time and attempts fill it; debt is turned into seconds at the present rate of filling.
    """

    def __init__(self, budget: RetryBudget, now: float, ended: int = 0) -> None:
        self.budget = budget
        self._at, self._ended = now, ended
        self._throughput = 0.0
        self._tokens = self._rate * BURST

    @property
    def _rate(self) -> float:
        return self.budget.floor + self.budget.ratio * self._throughput

    def reserve(self, now: float, ended: int) -> float:
        """Take one retry from the budget; the seconds it has to wait beyond its backoff.

        ``now``: monotonic seconds. ``ended``: attempts that have ended so far, of any outcome. O(1).
        """
        budget = self.budget
        passed, attempts = max(0.0, now - self._at), max(0, ended - self._ended)
        self._at, self._ended = max(now, self._at), max(ended, self._ended)
        if passed > 0.0:
            self._throughput += (1.0 - math.exp(-passed / MEMORY)) * (attempts / passed - self._throughput)
        filled = self._tokens + budget.floor * passed + budget.ratio * attempts
        self._tokens = min(filled, max(1.0, self._rate * BURST)) - 1.0
        wait = -self._tokens / self._rate
        if wait > budget.max_delay:
            self._tokens += 1.0  # more debt would only delay those that come after it
            return budget.max_delay
        return max(0.0, wait)


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
