"""Time as a dependency: durations by the monotonic clock, never by the wall clock.

Due times, leases and limits are decided by the Redis clock inside scripts; a process only ever measures durations. The
wall clock is for people (log lines, reports). Tests pass a :class:`orchestra.testing.ManualClock` instead.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where a component reads time."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back."""

    def time(self) -> float:
        """Unix seconds; may jump."""


class SystemClock:
    """The clocks of this machine."""

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)


SYSTEM_CLOCK: Clock = SystemClock()
