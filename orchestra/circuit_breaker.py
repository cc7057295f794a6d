"""A circuit breaker: stops calling what keeps failing, and finds out with few calls when it works again.

Owns the states closed, open and half-open of one name and when they change, and the list of a process's breakers;
refuses to retry, to wait, to know what is called and to speak to Redis (:mod:`orchestra._breakers.exchange` does). The
shape is that of Michael Nygard, "Release It!", 2007, with a limited number of probes when half-open.
Durations by a monotonic clock. Thread-safe: every transition is one short critical section that calls no foreign code.
While closed, asking takes no lock, and neither does a success that has nothing to change.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from orchestra import telemetry
from orchestra._breakers.rules import (
    NEUTRAL,
    BreakerSnapshot,
    CircuitBreakerConfig,
    CircuitState,
    RateWindow,
    told,
)
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra.errors import CircuitOpenError
from orchestra.tasks import check_ident

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NEUTRAL", "BreakerSnapshot", "CircuitBreaker", "CircuitBreakerConfig", "CircuitState", "breaker_registry"]

_Change = tuple[CircuitState, CircuitState, int]


class Link(Protocol):
    """What connects a breaker to its namesakes in other processes. Called under the breaker's lock, but for ``kick``."""

    @property
    def up(self) -> bool:
        """Whether Redis answers, so that probes are permitted by it; else the breaker is on its own."""

    def hold(self, wish: bool) -> float:
        """0.0 when the permit of a probe is in hand; else says when to ask again, in seconds, and notes a ``wish``."""

    def take(self) -> bool:
        """Use such a permit, if Redis answers; False when there is none any more."""

    def ended(self, outcome: bool | None) -> None:
        """A probe has ended."""

    def order(self, op: str) -> None:
        """The breaker has opened by itself (``open``), or by hand ``force_open``, ``force_closed`` or ``reset``."""

    def kick(self) -> None:
        """Tell Redis soon. Called from any thread, outside the lock."""


class CircuitBreaker:
    """The breaker called ``name``. O(1) a call; at most ``failure_threshold`` numbers of memory.

    Either wrap calls in :meth:`call`, or ask :meth:`allow_nowait` (or :meth:`enter`) and report with exactly one of
    :meth:`record_success`, :meth:`record_failure` and :meth:`release`. A probe that has not reported after
    ``recovery_timeout`` gives up its place to another one, so that a hung probe does not keep the breaker half-open.
    """

    def __init__(self, name: str, config: CircuitBreakerConfig | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self.name = str(check_ident("breaker name", name))
        self.config = config or CircuitBreakerConfig()
        self._clock = clock
        self._lock = threading.Lock()
        self._state = CircuitState.CLOSED
        self._closed = True
        """Whether ``_state`` is CLOSED: what the hot path reads, without the lock."""
        self._era = 0
        """Number of state changes: a call that began in an earlier state has no say in this one."""
        self._failures: deque[float] = deque(maxlen=self.config.failure_threshold or 1)
        """Moments of the failures that count towards opening, oldest first."""
        rated = self.config.failure_rate is not None or self.config.slow_call is not None
        self._rates = RateWindow(self.config.rate_window) if rated else None
        self._changed = clock.monotonic()
        self._until = 0.0
        """When an open breaker lets probes through."""
        self._probes = 0
        """Probes that may run; <= ``half_open_max_calls``."""
        self._probed = 0.0
        self._successes = 0
        self._forced = False
        self._last_error: str | None = None
        self._link: Link | None = None
        with _listing:
            _breakers.add(self)

    # -- what it is; none of this takes the lock, so that a state that is just changing may be seen half changed

    @property
    def state(self) -> CircuitState:
        """The state that the next call meets: HALF_OPEN as soon as a probe would be let through."""
        if self._state is CircuitState.OPEN and self._wait(self._clock.monotonic(), wish=False) == 0.0:
            return CircuitState.HALF_OPEN
        return self._state

    @property
    def retry_after(self) -> float:
        """Seconds until a call may be let through; 0.0 when one may be now. ``recovery_timeout`` when forced open."""
        return 0.0 if self._closed else self._wait(self._clock.monotonic())

    @property
    def available(self) -> bool:
        """Whether :meth:`allow_nowait` would say yes; takes no probe's place, and no lock."""
        return self._closed or self._wait(self._clock.monotonic()) == 0.0

    @property
    def failures(self) -> int:
        """Failures that count towards opening."""
        return len(self._failures) if self._rates is None or self._failures else self._rates.failures

    @property
    def era(self) -> int:
        """Number of state changes. A report that names the era in which its call was allowed is ignored in a later one;
        one that names none is taken for a report on the present one.
        """
        return self._era

    def snapshot(self) -> BreakerSnapshot:
        """All of it at one moment. O(1)."""
        with self._lock:
            now, rates = self._clock.monotonic(), self._rates
            if rates is not None:
                rates.move(now)
            wait = 0.0 if self._closed else self._wait(now, wish=False)  # who only looks takes no permit from others
            ready = self._state is CircuitState.OPEN and wait == 0.0
            calls = rates.calls if rates else 0
            return BreakerSnapshot(
                name=self.name,
                state=CircuitState.HALF_OPEN if ready else self._state,
                failures=self._counted(now) or self.failures,
                calls=calls,
                failure_rate=rates.failures / calls if rates and calls else 0.0,
                slow_rate=rates.slow / calls if rates and calls else 0.0,
                retry_after=wait,
                age=now - self._changed,
                since=self._clock.time() - (now - self._changed),
                era=self._era,
                forced=self._forced,
                shared=self._link is not None,
                last_error=self._last_error,
            )

    # -- a call

    def allow_nowait(self) -> bool:
        """Whether a call may be made now; at half-open this takes a probe's place until its outcome is recorded."""
        return self._closed or self.enter() is not None

    def enter(self) -> int | None:
        """:meth:`allow_nowait` and :attr:`era` in one step, for several threads: the era, None when refused."""
        era = self._era  # read first: beside a state that changes meanwhile it is an old one, and its report ignored
        if self._closed:
            return era
        changed = None
        with self._lock:
            now = self._clock.monotonic()
            if self._state is not CircuitState.CLOSED:
                if self._wait(now) > 0.0 or not (self._link is None or self._link.take()):
                    return None
                if self._state is CircuitState.OPEN:
                    changed = self._become(CircuitState.HALF_OPEN, now)
                self._probes = min(self._probes, self.config.half_open_max_calls - 1) + 1
                self._probed = now
            era = self._era
        self._tell(changed)
        return era

    def record_success(self, duration: float | None = None, *, era: int | None = None) -> None:
        """An allowed call has succeeded after ``duration`` seconds, by which it may have been slow."""
        if self._closed and self._rates is None and not self._failures:
            return
        self._leave(era, True, duration)

    def record_failure(
        self, error: BaseException | None = None, duration: float | None = None, *, era: int | None = None
    ) -> None:
        """An allowed call has failed; with an ``error``, the configuration says whether that counts."""
        outcome = False if error is None else self.config.verdict(error)
        self._leave(era, outcome, duration, told(error) if outcome is False else None)

    def release(self, *, era: int | None = None) -> None:
        """An allowed call ended without saying anything (it was cancelled, say): gives the probe's place back."""
        if not self._closed:
            self._leave(era, None)

    async def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``func(*args, **kwargs)``, awaited if need be, and its outcome recorded.

        Exceptions count as configured; cancellation counts neither way.

        Raises:
            CircuitOpenError: not let through; ``func`` was not called. ``.retry_after`` is in seconds.
        """
        era = self.enter()
        if era is None:
            raise self.refusal()
        began = self._clock.monotonic() if self.config.slow_call is not None else None
        try:
            result = func(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
        except BaseException as error:
            self.record_failure(error, self._since(began), era=era)
            raise
        self.record_success(self._since(began), era=era)
        return result

    def _since(self, began: float | None) -> float | None:
        return None if began is None else self._clock.monotonic() - began

    def refusal(self) -> CircuitOpenError:
        """The error for a call that is not let through."""
        wait = self.retry_after
        return CircuitOpenError(
            f"the circuit breaker {self.name!r} is {self.state.value}; try again in {wait:.3g} s",
            retry_after=wait,
            breaker=self.name,
        )

    # -- by hand

    def force_open(self) -> None:
        """Let nothing through, not even probes, until :meth:`force_closed` or :meth:`reset`."""
        self._force("force_open", CircuitState.OPEN, forced=True)

    def force_closed(self) -> None:
        """Let everything through, whatever fails, until :meth:`force_open` or :meth:`reset`."""
        self._force("force_closed", CircuitState.CLOSED, forced=True)

    def reset(self) -> None:
        """Close it, forget what was counted, and let it decide by itself again."""
        self._force("reset", CircuitState.CLOSED, forced=False)

    def _force(self, op: str, state: CircuitState, *, forced: bool) -> None:
        with self._lock:
            self._forced = forced
            changed = self._become(state, self._clock.monotonic())
            if self._link is not None:
                self._link.order(op)
        self._tell(changed)

    # -- other processes

    def attach(self, link: Link | None) -> None:
        """Share the state through ``link``; None ends that."""
        with self._lock:
            self._link = link

    @property
    def attached(self) -> bool:
        """Whether the state is shared through a link."""
        return self._link is not None

    @property
    def closed(self) -> bool:
        """Whether every call passes."""
        return self._closed

    def adopt(self, state: CircuitState, wait: float, *, forced: bool, fresh: bool, era: int) -> None:
        """Take over what the processes share: CLOSED, or OPEN for ``wait`` more seconds.

        ``fresh``: it is not the state that was taken over before. ``era``: that of this breaker when Redis was asked; if
        it has changed since, the link has something newer to tell, and nothing is taken over.
        """
        changed = None
        with self._lock:
            now, closed = self._clock.monotonic(), state is CircuitState.CLOSED
            if era != self._era:
                return
            if closed is not self._closed or forced is not self._forced or (fresh and not closed):
                self._forced = forced
                if state is not self._state:
                    changed = self._become(state, now)
                self._until = now + wait
        self._tell(changed, kick=False)

    # -- transitions; the lock is held

    def _wait(self, now: float, *, wish: bool = True) -> float:
        config, link = self.config, self._link
        wait = 0.0
        if self._state is CircuitState.OPEN:
            if self._forced:
                return config.recovery_timeout
            wait = max(0.0, self._until - now)
        elif self._state is CircuitState.HALF_OPEN:
            if link is not None and link.up:
                return link.hold(wish)
            if self._probes >= config.half_open_max_calls:
                return max(0.0, self._probed + config.recovery_timeout - now)
        return link.hold(wish) if wait == 0.0 and link is not None and link.up and not self._closed else wait

    def _leave(
        self, era: int | None, success: bool | None, duration: float | None = None, text: str | None = None
    ) -> None:
        slow = duration is not None and self.config.slow_call is not None and duration >= self.config.slow_call
        changed = None
        with self._lock:
            if (era is not None and era != self._era) or self._state is CircuitState.OPEN:
                return
            now = self._clock.monotonic()
            self._last_error = text or self._last_error
            if self._state is CircuitState.HALF_OPEN:
                changed = self._probe_ended(success and not slow, now)
            elif success is not None and not self._forced:
                changed = self._call_ended(success, slow, now)
        self._tell(changed)

    def _probe_ended(self, success: bool | None, now: float) -> _Change | None:
        self._probes = max(0, self._probes - 1)
        if self._link is not None:
            self._link.ended(success)
        if success is False:
            return self._become(CircuitState.OPEN, now)
        if success:
            self._successes += 1
            shared = self._link is not None and self._link.up  # then all processes together count, and Redis closes it
            if self._successes >= self.config.success_threshold and not shared:
                return self._become(CircuitState.CLOSED, now)
        return None

    def _call_ended(self, success: bool, slow: bool, now: float) -> _Change | None:
        config, trips = self.config, False
        if self._rates is not None:
            self._rates.add(now, failed=not success, slow=slow)
            trips = self._rates.trips(config)
        if not success and config.failure_threshold is not None:
            self._counted(now)
            self._failures.append(now)
            trips = trips or len(self._failures) >= config.failure_threshold
        elif success and config.window is None:
            self._failures.clear()
        if not trips:
            return None
        changed = self._become(CircuitState.OPEN, now)
        if self._link is not None:
            self._link.order("open")
        return changed

    def _counted(self, now: float) -> int:
        window = self.config.window
        while window is not None and self._closed and self._failures and self._failures[0] <= now - window:
            self._failures.popleft()
        return len(self._failures)

    def _become(self, state: CircuitState, now: float) -> _Change:
        old, failures = self._state, self.failures
        self._era += 1
        self._state = state
        self._closed = state is CircuitState.CLOSED
        self._changed = now
        self._until = now + self.config.recovery_timeout
        self._probes = self._successes = 0
        if state is CircuitState.CLOSED:
            self._failures.clear()
            if self._rates is not None:
                self._rates.clear()
        return old, state, failures

    def _tell(self, changed: _Change | None, *, kick: bool = True) -> None:
        # Outside the lock: a handler may look at this breaker.
        if kick and self._link is not None and not (self._closed and changed is None):
            self._link.kick()
        if changed is not None and changed[0] is not changed[1] and telemetry.wanted("breaker.changed"):
            old, new, failures = changed
            facts = {"breaker": self.name, "old": old.value, "new": new.value}
            telemetry.emit("breaker.changed", {"failures": failures}, facts)


_breakers: weakref.WeakSet[CircuitBreaker] = weakref.WeakSet()
_listing = threading.Lock()


def breaker_registry() -> list[CircuitBreaker]:
    """The breakers that exist in this process, by name; two of one name are both listed. O(n log n)."""
    with _listing:
        return sorted(_breakers, key=lambda breaker: breaker.name)
