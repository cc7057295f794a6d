"""How many deliveries beyond its free slots a worker holds: by time, not by number. Pure: the clock is an argument.

An urgent task then waits for a slot, not for a backlog, and a fast drain is not starved by round trips.
"""

from __future__ import annotations

import math

SECONDS, MOST = 0.02, 1000
"""What ends in so many seconds at the present rate is held, and never more tasks than that."""
SMALL = 16
"""A read of fewer deliveries is a matter of latency, not of throughput."""
RATE_MEMORY = 0.25
"""Seconds over which the present rate is averaged: agents that wait alike end in waves."""


class Prefetch:
    """``size``: deliveries to hold beyond free slots; at least one, little when idle, much under load."""

    __slots__ = ("_at", "_ended", "_rate", "size")

    def __init__(self) -> None:
        self.size = 1
        self._at = self._rate = 0.0
        self._ended = 0

    def adapt(self, now: float, ended: int) -> None:
        """``now``: monotonic seconds; ``ended``: deliveries that have ended so far. O(1)."""
        passed = now - self._at
        if passed >= SECONDS:
            weight = 1.0 - math.exp(-passed / RATE_MEMORY)
            self._rate += weight * ((ended - self._ended) / passed - self._rate)
            self.size = max(1, min(MOST, int(self._rate * SECONDS)))
            self._at, self._ended = now, ended
