"""A circuit breaker: stops calling what keeps failing, and finds out with few calls when it works again.

Owns the states closed, open and half-open of one name and when they change; refuses to retry, to wait and to know what
is called. The shape is that of Michael Nygard, "Release It!", 2007, with a limited number of probes when half-open.
Durations by a monotonic clock. Thread-safe: every transition is one short critical section that calls no foreign code.
"""

from __future__ import annotations

import enum
import inspect
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestra import telemetry
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra.errors import CircuitOpenError, ConfigurationError, Reject, RetryLater, Throttled
from orchestra.tasks import check_ident, require_int, require_number

if TYPE_CHECKING:
    from collections.abc import Callable

NEUTRAL: tuple[type[Exception], ...] = (Throttled, Reject, RetryLater)
"""What an agent raises to steer its task says nothing about the health of what it called."""


class CircuitState(enum.Enum):
    """CLOSED: calls pass. OPEN: none does. HALF_OPEN: a few probes do."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitBreakerConfig:
    """When a breaker opens and closes.

    ``failure_threshold``: failures that open it, 1 to 10,000: in a row when ``window`` is None, else within the last
    ``window`` seconds whatever succeeded between them. ``recovery_timeout``: seconds open before probes are let through.
    ``half_open_max_calls``: probes at one time, 1 to 1,000. ``success_threshold``: successful probes that close it.
    ``neutral``: exceptions that count neither as success nor as failure.
    """

    failure_threshold: int = 5
    recovery_timeout: float = 30.0
    half_open_max_calls: int = 1
    success_threshold: int = 1
    window: float | None = None
    neutral: tuple[type[Exception], ...] = NEUTRAL

    def __post_init__(self) -> None:
        name = "CircuitBreakerConfig"
        require_int(f"{name}.failure_threshold", self.failure_threshold, 1, 10_000, unit="failures")
        require_number(f"{name}.recovery_timeout", self.recovery_timeout, 0.0, 86_400.0, unit="seconds", exclusive=True)
        require_int(f"{name}.half_open_max_calls", self.half_open_max_calls, 1, 1000, unit="calls")
        require_int(f"{name}.success_threshold", self.success_threshold, 1, 1000, unit="calls")
        if self.window is not None:
            require_number(f"{name}.window", self.window, 0.0, 86_400.0, unit="seconds", exclusive=True)
        kinds = self.neutral if isinstance(self.neutral, tuple) else (None,)
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise ConfigurationError(
                f"{name}.neutral must be a tuple of exception classes, got {self.neutral!r}",
                field=f"{name}.neutral",
                value=self.neutral,
            )


class CircuitBreaker:
    """The breaker called ``name``. O(1) a call; ``failure_threshold`` numbers of memory.

    Either wrap calls in :meth:`call`, or ask :meth:`allow_nowait` and report with exactly one of
    :meth:`record_success`, :meth:`record_failure` and :meth:`release`. A probe that has not reported after
    ``recovery_timeout`` gives up its place to another one, so that a hung probe does not keep the breaker half-open.
    """

    def __init__(self, name: str, config: CircuitBreakerConfig | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self.name = str(check_ident("breaker name", name))
        self.config = config or CircuitBreakerConfig()
        self._clock = clock
        self._lock = threading.Lock()
        self._state = CircuitState.CLOSED
        self._era = 0
        """Number of state changes: a call that began in an earlier state has no say in this one."""
        self._failures: deque[float] = deque(maxlen=self.config.failure_threshold)
        """Moments of the failures that count towards opening, oldest first."""
        self._changed = 0.0
        self._probes = 0
        """Probes that may run; <= ``half_open_max_calls``."""
        self._probed = 0.0
        self._successes = 0

    # -- what it is

    @property
    def state(self) -> CircuitState:
        """The state that the next call meets: HALF_OPEN as soon as a probe would be let through."""
        if self._state is CircuitState.OPEN and self.retry_after == 0.0:
            return CircuitState.HALF_OPEN
        return self._state

    @property
    def retry_after(self) -> float:
        """Seconds until a call may be let through; 0.0 when one may be now."""
        with self._lock:
            return self._wait(self._clock.monotonic())

    @property
    def available(self) -> bool:
        """Whether :meth:`allow_nowait` would say yes; takes no probe's place."""
        return self.retry_after == 0.0

    @property
    def failures(self) -> int:
        """Failures that count towards opening."""
        return len(self._failures)

    # -- by hand

    def allow_nowait(self) -> bool:
        """Whether a call may be made now; at half-open this takes a probe's place until its outcome is recorded."""
        return self._enter() is not None

    @property
    def era(self) -> int:
        """Number of state changes. A report that names the era in which its call was allowed is ignored in a later one;
        one that names none is taken for a report on the present one.
        """
        return self._era

    def record_success(self, era: int | None = None) -> None:
        """An allowed call has succeeded."""
        self._leave(era, True)

    def record_failure(self, era: int | None = None) -> None:
        """An allowed call has failed."""
        self._leave(era, False)

    def release(self, era: int | None = None) -> None:
        """An allowed call ended without saying anything (it was cancelled, say): gives the probe's place back."""
        self._leave(era, None)

    async def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``func(*args, **kwargs)``, awaited if need be, and its outcome recorded.

        An exception other than ``neutral`` ones counts as a failure; cancellation counts neither way.

        Raises:
            CircuitOpenError: not let through; ``func`` was not called. ``.retry_after`` is in seconds.
        """
        era = self._enter()
        if era is None:
            wait = self.retry_after
            raise CircuitOpenError(
                f"the circuit breaker {self.name!r} is {self.state.value}; try again in {wait:.3g} s",
                retry_after=wait,
                breaker=self.name,
            )
        outcome: bool | None = None
        try:
            result = func(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
            outcome = True
        except self.config.neutral:
            raise
        except Exception:
            outcome = False
            raise
        finally:
            self._leave(era, outcome)
        return result

    # -- transitions

    def _wait(self, now: float) -> float:
        config = self.config
        if self._state is CircuitState.OPEN:
            return max(0.0, self._changed + config.recovery_timeout - now)
        if self._state is CircuitState.HALF_OPEN and self._probes >= config.half_open_max_calls:
            return max(0.0, self._probed + config.recovery_timeout - now)
        return 0.0

    def _enter(self) -> int | None:
        changed = None
        with self._lock:
            now = self._clock.monotonic()
            if self._state is not CircuitState.CLOSED:
                if self._wait(now) > 0.0:
                    return None
                if self._state is CircuitState.OPEN:
                    changed = self._become(CircuitState.HALF_OPEN, now)
                self._probes = min(self._probes, self.config.half_open_max_calls - 1) + 1
                self._probed = now
            era = self._era
        self._tell(changed)
        return era

    def _leave(self, era: int | None, success: bool | None) -> None:
        changed = None
        with self._lock:
            if era not in {None, self._era} or self._state is CircuitState.OPEN:
                return
            now = self._clock.monotonic()
            if self._state is CircuitState.HALF_OPEN:
                changed = self._probe_ended(success, now)
            elif success is False:
                changed = self._call_failed(now)
            elif success and self.config.window is None:
                self._failures.clear()
        self._tell(changed)

    def _probe_ended(self, success: bool | None, now: float) -> tuple[CircuitState, CircuitState, int] | None:
        self._probes = max(0, self._probes - 1)
        if success is False:
            return self._become(CircuitState.OPEN, now)
        if success:
            self._successes += 1
            if self._successes >= self.config.success_threshold:
                return self._become(CircuitState.CLOSED, now)
        return None

    def _call_failed(self, now: float) -> tuple[CircuitState, CircuitState, int] | None:
        window = self.config.window
        while window is not None and self._failures and self._failures[0] <= now - window:
            self._failures.popleft()
        self._failures.append(now)
        if len(self._failures) < self.config.failure_threshold:
            return None
        return self._become(CircuitState.OPEN, now)

    def _become(self, state: CircuitState, now: float) -> tuple[CircuitState, CircuitState, int]:
        old, failures = self._state, len(self._failures)
        self._state = state
        self._era += 1
        self._changed = now
        self._probes = self._successes = 0
        if state is CircuitState.CLOSED:
            self._failures.clear()
        return old, state, failures

    def _tell(self, changed: tuple[CircuitState, CircuitState, int] | None) -> None:
        # Outside the lock: a handler may look at this breaker.
        if changed is not None and telemetry.wanted("breaker.changed"):
            old, new, failures = changed
            facts = {"breaker": self.name, "old": old.value, "new": new.value}
            telemetry.emit("breaker.changed", {"failures": failures}, facts)
