"""Holds back the retries of one dispatcher that its budget does not allow yet, and tells how many.

Arithmetic is :class:`~orchestra._backoff.RetryBucket`'s. One event loop; not thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from orchestra import telemetry
from orchestra._backoff import RetryBucket
from orchestra.errors import ConfigurationError
from orchestra.tasks import Outcome, RetryBudget

_ATTEMPTS = (Outcome.COMPLETED, Outcome.FAILED, Outcome.TIMED_OUT)


class RetryGate:
    """``outcomes``: the dispatcher's counts, of which the attempts fill the budget.

    Raises:
        ConfigurationError: ``budget`` is neither a RetryBudget nor None, which means no limit.
    """

    def __init__(self, queue: str, budget: RetryBudget | None, outcomes: Mapping[Outcome, int]) -> None:
        if not isinstance(budget, RetryBudget | None):
            raise ConfigurationError(
                f"retry_budget must be a RetryBudget or None, got {budget!r}", field="retry_budget", value=budget
            )
        self._queue = queue
        self._bucket = None if budget is None else RetryBucket(budget, time.monotonic())
        self._outcomes = outcomes
        self._count, self._longest = 0, 0.0

    def hold_back(self) -> float:
        """Seconds that a retry has to wait beyond its backoff; each call is one retry."""
        if self._bucket is None:
            return 0.0
        wait = self._bucket.reserve(time.monotonic(), sum(self._outcomes.get(outcome, 0) for outcome in _ATTEMPTS))
        if wait > 0.0:
            self._count += 1
            self._longest = max(self._longest, wait)
        return wait

    def tell(self) -> None:
        """Emit ``retry.throttled`` if any was held back since the last time."""
        if self._count:
            facts = {"count": self._count, "delay_s": self._longest}
            self._count, self._longest = 0, 0.0
            telemetry.emit("retry.throttled", facts, {"queue": self._queue})
