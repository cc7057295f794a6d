"""When a circuit breaker opens: its configuration, the sliding window of its rates, and what it shows of itself.

Owns validation, the arithmetic of the window and which exceptions count; refuses to change any state, which is
:mod:`orchestra.circuit_breaker`'s business. Configuration and snapshots are values, safe to share; a
:class:`RateWindow` belongs to one breaker and is used under its lock.
Sources: Michael Nygard, "Release It!", 2007; the time-based window and the slow-call rate are those of resilience4j.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from orchestra.errors import ConfigurationError, Reject, RetryLater, Throttled
from orchestra.tasks import require_int, require_number

logger = logging.getLogger("orchestra.circuit_breaker")

NEUTRAL: tuple[type[Exception], ...] = (Throttled, Reject, RetryLater)
"""What an agent raises to steer its task says nothing about the health of what it called."""

Counted: TypeAlias = type[Exception] | Callable[[Exception], Any]
"""A class of exceptions, or a function that says whether one counts."""

BUCKETS = 10
"""Parts of a rate window: it moves on by a tenth at a time."""
_DAY = 86_400.0
_ERROR_TEXT = 200  # characters kept of an error


class CircuitState(enum.Enum):
    """CLOSED: calls pass. OPEN: none does. HALF_OPEN: a few probes do."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitBreakerConfig:
    """When a breaker opens and closes. Each trigger opens it by itself.

    ``failure_threshold``: failures that open it, 1 to 10,000: in a row when ``window`` is None, else within the last
    ``window`` seconds whatever succeeded between them. None means 5, or never where a rate is configured.
    ``failure_rate``: share of failed calls that opens it, above 0 to 1. ``slow_call``: seconds from which on a call is
    slow; ``slow_rate``: share of slow calls that opens it. Rates are those of the last ``rate_window`` seconds, 0.01 to
    a day, which moves on in tenths; they count from ``minimum_calls`` calls on, 1 to 1,000,000.
    ``recovery_timeout``: seconds open before probes are let through. ``half_open_max_calls``: probes at one time, 1 to
    1,000. ``success_threshold``: successful probes that close it; a slow probe has failed.
    ``counts``: exceptions that are failures: classes, or functions of the exception; any other one is an answer, so a
    success. ``neutral``: exceptions that count neither way, looked at first.
    ``shared``: whether all processes that name the breaker have one state, where an exchange runs.
    """

    failure_threshold: int | None = None
    recovery_timeout: float = 30.0
    half_open_max_calls: int = 1
    success_threshold: int = 1
    window: float | None = None
    neutral: tuple[type[Exception], ...] = NEUTRAL
    counts: tuple[Counted, ...] = (Exception,)
    failure_rate: float | None = None
    slow_call: float | None = None
    slow_rate: float = 0.5
    rate_window: float = 30.0
    minimum_calls: int = 10
    shared: bool = False

    def __post_init__(self) -> None:
        name = "CircuitBreakerConfig"
        if self.failure_threshold is None and self.failure_rate is None and self.slow_call is None:
            object.__setattr__(self, "failure_threshold", 5)
        if self.failure_threshold is not None:
            require_int(f"{name}.failure_threshold", self.failure_threshold, 1, 10_000, unit="failures")
        require_int(f"{name}.half_open_max_calls", self.half_open_max_calls, 1, 1000, unit="calls")
        require_int(f"{name}.success_threshold", self.success_threshold, 1, 1000, unit="calls")
        require_int(f"{name}.minimum_calls", self.minimum_calls, 1, 1_000_000, unit="calls")
        self._check_times(name)
        for field in ("failure_rate", "slow_rate"):
            if getattr(self, field) is not None:
                require_number(f"{name}.{field}", getattr(self, field), 0.0, 1.0, unit="share", exclusive=True)
        if type(self.shared) is not bool:
            raise _wrong("shared", "True or False", self.shared)
        self._check_exceptions()

    def _check_times(self, name: str) -> None:
        require_number(f"{name}.recovery_timeout", self.recovery_timeout, 0.0, _DAY, unit="seconds", exclusive=True)
        require_number(f"{name}.rate_window", self.rate_window, 0.01, _DAY, unit="seconds")
        for field in ("window", "slow_call"):
            if getattr(self, field) is not None:
                require_number(f"{name}.{field}", getattr(self, field), 0.0, _DAY, unit="seconds", exclusive=True)

    def _check_exceptions(self) -> None:
        kinds = self.neutral if isinstance(self.neutral, tuple) else (None,)
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise _wrong("neutral", "a tuple of exception classes", self.neutral)
        counted = self.counts if isinstance(self.counts, tuple) and self.counts else (None,)
        if not all(issubclass(each, Exception) if isinstance(each, type) else callable(each) for each in counted):
            raise _wrong("counts", "a tuple of exception classes and of functions of an exception", self.counts)

    def verdict(self, error: BaseException) -> bool | None:
        """What ``error`` says about the health of what was called: False a failure, True an answer, None nothing."""
        if not isinstance(error, Exception) or isinstance(error, self.neutral):
            return None
        return not any(_counts(each, error) for each in self.counts)


def _counts(rule: Counted, error: Exception) -> bool:
    if isinstance(rule, type):
        return isinstance(error, rule)
    try:
        return bool(rule(error))
    except Exception:
        logger.exception(
            "the rule %r of a circuit breaker raised; the error it was asked about counts as a failure", rule
        )
        return True


def _wrong(field: str, expected: str, value: object) -> ConfigurationError:
    name = f"CircuitBreakerConfig.{field}"
    return ConfigurationError(f"{name} must be {expected}, got {value!r}", field=name, value=value)


def told(error: BaseException | None) -> str | None:
    """An error as text of bounded length; the error itself, and what it holds, is let go."""
    if error is None:
        return None
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - a message that cannot be made is no reason to lose the failure
        text = type(error).__name__
    return text if len(text) <= _ERROR_TEXT else f"{text[: _ERROR_TEXT - 1]}…"


class RateWindow:
    """Calls, failures and slow calls of the last ``seconds``, in :data:`BUCKETS` parts. O(1) a call, amortised.

    Exact for the part under way and the nine before it, that is for 0.9 to 1.0 times ``seconds``.
    """

    __slots__ = ("_calls", "_failures", "_part", "_slow", "_width", "calls", "failures", "slow")

    def __init__(self, seconds: float) -> None:
        self._width = seconds / BUCKETS
        self.clear()

    def clear(self) -> None:
        """Forget every call."""
        self._part = -1
        self._calls, self._failures, self._slow = [0] * BUCKETS, [0] * BUCKETS, [0] * BUCKETS
        self.calls = self.failures = self.slow = 0

    def move(self, now: float) -> None:
        """Forget what has left the window at the moment ``now``, in seconds."""
        part = int(now // self._width)
        if part <= self._part:
            return
        if part - self._part >= BUCKETS:
            self.clear()
        else:
            for index in range(self._part + 1, part + 1):
                self._forget(index % BUCKETS)
        self._part = part

    def _forget(self, slot: int) -> None:
        self.calls -= self._calls[slot]
        self.failures -= self._failures[slot]
        self.slow -= self._slow[slot]
        self._calls[slot] = self._failures[slot] = self._slow[slot] = 0

    def add(self, now: float, *, failed: bool, slow: bool) -> None:
        """Count a call that ended at ``now``."""
        self.move(now)
        slot = self._part % BUCKETS
        self.calls += 1
        self._calls[slot] += 1
        if failed:
            self.failures += 1
            self._failures[slot] += 1
        if slow:
            self.slow += 1
            self._slow[slot] += 1

    def trips(self, config: CircuitBreakerConfig) -> bool:
        """Whether a rate has reached its limit. Division, because it rounds 7 / 100 to the very double 0.07."""
        if self.calls < config.minimum_calls:
            return False
        if config.failure_rate is not None and self.failures / self.calls >= config.failure_rate:
            return True
        return config.slow_call is not None and self.slow / self.calls >= config.slow_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSnapshot:
    """A breaker at one moment, for display.

    ``failures``: those that count towards opening, in a row or in ``window``. ``calls``, ``failure_rate``, ``slow_rate``:
    of the rate window, 0 without one. ``retry_after``: seconds. ``age``: seconds in this state. ``since``: when it
    began, Unix seconds by the clock of the process. ``forced``: whether it was put into this state by hand.
    ``last_error``: the last failure, at most 200 characters; None before the first.
    """

    name: str
    state: CircuitState
    failures: int
    calls: int
    failure_rate: float
    slow_rate: float
    retry_after: float
    age: float
    since: float
    era: int
    forced: bool
    shared: bool
    last_error: str | None
