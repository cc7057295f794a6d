"""What a rate limit is, and what can be answered at it: configuration, answers and counts of flow control.

Owns validation and the rounding to whole microseconds; refuses to admit anything, which is
:mod:`orchestra.flow_control`'s business. Values only: safe to share. Everything here is imported from there.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from orchestra.errors import ConfigurationError
from orchestra.tasks import require_int, require_number

URGENCIES = 4
"""Priorities 0 (and below), 1, 2, 3 (and above) each have a share of the reserve."""

HORIZON_US = 2**48
"""Nine years: with it, all sums stay below 2**53, up to which Lua counts whole numbers exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimitConfig:
    """``rate`` permits per ``period`` seconds, and up to ``burst`` of them at once after a pause.

    The time between two permits is rounded up to whole microseconds, so a limit is never exceeded but may be undercut:
    by less than 0.1 % up to 1,000 permits a second, 10 % at 100,000.

    ``rate``: permits, > 0, at most a million a second. ``burst``: permits, 1 to 10**9. ``period``: seconds, > 0, at
    most a year. A full burst must refill within nine years.
    """

    rate: float
    burst: int
    period: float = 1.0
    emission_us: int = field(init=False, repr=False, compare=False)
    """Microseconds between two permits."""
    burst_us: int = field(init=False, repr=False, compare=False)
    """Microseconds in which an empty limit refills."""

    def __post_init__(self) -> None:
        require_number("RateLimitConfig.rate", self.rate, 0.0, 1e15, unit="permits per period", exclusive=True)
        require_int("RateLimitConfig.burst", self.burst, 1, 10**9, unit="permits")
        require_number("RateLimitConfig.period", self.period, 0.0, 366 * 86_400.0, unit="seconds", exclusive=True)
        # str first: 0.1 means one tenth here, not the double next to it.
        interval = Fraction(str(self.period)) * 1_000_000 / Fraction(str(self.rate))
        emission_us = math.ceil(interval)
        if interval < 1 or emission_us * self.burst > HORIZON_US:
            raise ConfigurationError(
                f"RateLimitConfig.rate of {self.rate!r} permits per {self.period!r} seconds with burst {self.burst!r} "
                "must be at most 1,000,000 permits per second and refill the burst within nine years",
                field="RateLimitConfig.rate",
                value=self.rate,
            )
        object.__setattr__(self, "emission_us", emission_us)
        object.__setattr__(self, "burst_us", emission_us * self.burst)


class BackpressureStrategy(enum.Enum):
    """What happens to a request that is not admitted now."""

    REJECT = "reject"
    """It is told no, and when to come back."""
    WAIT = "wait"
    """It waits for its turn: most urgent first, then in order of arrival."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackpressureConfig:
    """A rate limit and what to do at it.

    ``max_wait``: seconds that a request waits at most under WAIT, 0 to a day (None: as long as it takes).
    ``fail_open``: admit when Redis cannot be asked; by default the request raises instead.
    ``priority_reserve``: share of the burst, 0 to 0.9, kept for urgent requests: priority 0 and below must leave all
    of it, 1 two thirds, 2 one third, 3 and above nothing.
    ``lease``: permits that a limiter takes in one call and spends without asking, 0 (none) to the burst; counted when
    they are taken. ``lease_ttl``: seconds in which they are spent, else given back as far as that is safe, 0.001 to 10.
    """

    rate_limit: RateLimitConfig = field(default_factory=lambda: RateLimitConfig(rate=1000.0, burst=1000))
    strategy: BackpressureStrategy = BackpressureStrategy.REJECT
    max_wait: float | None = None
    fail_open: bool = False
    priority_reserve: float = 0.0
    lease: int = 0
    lease_ttl: float = 1.0
    tolerances_us: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Per urgency, the microseconds of burst that it may use up."""

    def __post_init__(self) -> None:
        for name, kind in (("rate_limit", RateLimitConfig), ("strategy", BackpressureStrategy), ("fail_open", bool)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ConfigurationError(
                    f"BackpressureConfig.{name} must be a {kind.__name__}, got {value!r}",
                    field=f"BackpressureConfig.{name}",
                    value=value,
                )
        if self.max_wait is not None:
            require_number("BackpressureConfig.max_wait", self.max_wait, 0.0, 86_400.0, unit="seconds")
        require_number("BackpressureConfig.priority_reserve", self.priority_reserve, 0.0, 0.9, unit="of the burst")
        require_int("BackpressureConfig.lease", self.lease, 0, self.rate_limit.burst, unit="permits")
        require_number("BackpressureConfig.lease_ttl", self.lease_ttl, 0.001, 10.0, unit="seconds")
        burst = self.rate_limit.burst
        usable = (burst - self.reserve(urgency, burst) for urgency in range(URGENCIES))
        object.__setattr__(self, "tolerances_us", tuple(permits * self.rate_limit.emission_us for permits in usable))

    def reserve(self, urgency: int, burst: int) -> int:
        """Permits of ``burst`` that a request of ``urgency`` must leave untouched; at least one is left to use."""
        share = self.priority_reserve * (URGENCIES - 1 - urgency) / (URGENCIES - 1)
        return min(int(share * burst), burst - 1)

    def weigh(self, priority: int, cost: int) -> tuple[int, int]:
        """The urgency of ``priority``, 0 to 3, and the microseconds of burst that it may use up.

        Raises:
            ConfigurationError: ``priority`` is not an int, or ``cost`` not a number of permits that could ever be admitted.
        """
        if type(priority) is int and type(cost) is int and cost >= 1:
            urgency = 0 if priority <= 0 else min(priority, URGENCIES - 1)
            if cost * self.rate_limit.emission_us <= self.tolerances_us[urgency]:
                return urgency, self.tolerances_us[urgency]
        return self._weigh_bad(priority, cost)

    def _weigh_bad(self, priority: int, cost: int) -> tuple[int, int]:
        if type(priority) is not int:
            raise ConfigurationError(
                f"priority must be a plain int (larger is more urgent, unlike TaskPriority), got {priority!r}",
                field="priority",
                value=priority,
            )
        urgency = min(max(priority, 0), URGENCIES - 1)
        tolerance_us, emission_us = self.tolerances_us[urgency], self.rate_limit.emission_us
        if type(cost) is not int or not 1 <= cost <= tolerance_us // emission_us:
            raise ConfigurationError(
                f"cost must be a whole number of permits from 1 to {tolerance_us // emission_us}, got {cost!r}: "
                f"at priority {priority} the limit can never admit more at once",
                field="cost",
                value=cost,
            )
        return urgency, tolerance_us


class Admission(NamedTuple):
    """The answer to one request.

    ``retry_after``: seconds until it would be admitted if nobody else asked (in the shared line: until its turn), 0.0 when
    allowed. ``remaining``: whole permits left by the last answer of Redis; of several limits, the least. ``limiter``
    and ``key``: which limit refused.
    """

    allowed: bool
    retry_after: float
    remaining: int
    limiter: str = ""
    key: str | None = None


@dataclass(slots=True)
class FlowControlMetrics:
    """Counts of one limiter object. Every request ends in exactly one of ``acquired rejected failed cancelled``."""

    acquired: int = 0
    rejected: int = 0
    rejected_locally: int = 0
    """Part of ``rejected``: those that caused no round trip."""
    failed: int = 0
    """Raised because Redis could not be asked."""
    failed_open: int = 0
    """Part of ``acquired``: admitted because Redis could not be asked."""
    cancelled: int = 0
    abandoned: int = 0
    """Part of ``cancelled``: their permit was already given, and is lost."""
    calls: int = 0
    """Round trips."""


class Setting(NamedTuple):
    """A limit as it is in force: by its limiter's configuration (version ``"0"``), or as it was set at run time."""

    version: str
    emission_us: int
    burst_us: int
    tolerances_us: tuple[int, ...]
    """Per urgency, the microseconds of burst that it may use up."""

    @classmethod
    def of(cls, config: BackpressureConfig, text: str = "") -> Setting:
        """What ``text``, the stored ``"version T burst rate period"``, makes of ``config``; ``""`` leaves it as it is."""
        if not text:
            limit = config.rate_limit
            return cls("0", limit.emission_us, limit.burst_us, config.tolerances_us)
        version, emission, burst = text.split()[:3]
        emission_us, burst_us = int(emission), int(burst)
        permits = burst_us // emission_us
        tolerances = tuple((permits - config.reserve(urgency, permits)) * emission_us for urgency in range(URGENCIES))
        return cls(version, emission_us, burst_us, tolerances)


def require_key(key: object) -> str:
    """``key`` if it can choose a cell of a limit: a text that is not empty.

    Raises:
        ConfigurationError: it is not.
    """
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"key must be a text of 1 or more characters, got {key!r}", field="key", value=key)
    return key


def require_wait(wait: object) -> float:
    """``wait`` if it is seconds to wait, 0 to a day, or infinite.

    Raises:
        ConfigurationError: it is not.
    """
    if wait != math.inf or isinstance(wait, bool):
        require_number("wait", wait, 0.0, 86_400.0, unit="seconds")
    return float(wait)  # type: ignore[arg-type]
