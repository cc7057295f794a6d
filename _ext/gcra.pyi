"""The Generic Cell Rate Algorithm in whole microseconds, and what is known of limiters that live in Redis."""

from typing import Any, Final, Self, final

LIMIT: Final[int]
"""2**62: the greatest time, cost, interval and tolerance."""
NEVER: Final[int]
"""2**62: the wait that is told for a cost which exceeds the whole tolerance."""

def check(tat_us: int, now_us: int, cost: int, emission_us: int, burst_us: int) -> tuple[bool, int, int, int]:
    """Decide one request: ``(allowed, new_tat_us, retry_after_us, remaining)``. Pure. O(1).

    ``tat_us``: the stored theoretical arrival time; any time in the past (0) for a limiter not used yet.
    ``emission_us`` (T): the interval of one unit of cost, 1 or more. ``burst_us``: the tolerance, ``burst * T``, 0 or more.

    ``new_tat_us`` is to be stored when allowed; after a refusal it is the old one clamped to ``[now, now + burst_us]``.
    ``retry_after_us`` is 0 when allowed, NEVER when no wait helps. ``remaining``: units of cost that would pass right after.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument, or ``now_us + burst_us``, is out of range.
    """

@final
class GcraTable:
    """The last that is known of each limiter, to refuse without a round trip what Redis is known to refuse.

    Why a refusal is safe. Redis said: at ``redis_now`` the debt was ``tat - redis_now``. A limiter's debt falls only with
    the clock of Redis; every other admission raises it. Since the question was sent at ``local_now``, the clock of Redis
    has advanced by no more than the local time since then, plus ``drift_ppm`` of it and 2 µs of rounding; so what is
    computed here is a lower bound of the debt. A clock of Redis that steps back raises the true debt. What can lower it is
    a limiter that is deleted or restored (call :meth:`forget`) and a clock of Redis that steps forward; both are believed
    for at most ``max_age_us``, or until the next answer.

    ``capacity``: keys kept, 1 to 2**24; the one observed longest ago goes first. ``lead_us``: the least time a request
    takes to reach Redis, 0 to 60 s; a request that would be admitted on arrival is not refused.
    ``max_age_us``: an older answer says nothing, 1 µs to 1 day. ``drift_ppm``: how much faster than the local clock the
    clock of Redis may run, 0 to 10**6.

    Times are whole microseconds; the local clock is any monotonic one. 48 bytes a key besides the dict.
    Thread-safe under the GIL: each method is one step.

    Raises:
        ValueError: an argument is out of range.
    """

    @property
    def capacity(self) -> int: ...
    @property
    def lead_us(self) -> int: ...
    @property
    def max_age_us(self) -> int: ...
    @property
    def drift_ppm(self) -> int: ...
    def __new__(
        cls, capacity: int = 4096, *, lead_us: int = 0, max_age_us: int = 60_000_000, drift_ppm: int = 1000
    ) -> Self: ...
    def observe(self, key: str, tat_us: int, redis_now_us: int, local_now_us: int) -> None:
        """Note an answer: the TAT and the clock of Redis, and the local time at which the question was *sent*. O(1).

        An answer to a question sent earlier than the one known is ignored.

        Raises:
            TypeError: ``key`` is not a str (subclasses are refused too), or a time is not an int.
            ValueError: a time is out of range.
        """

    def refused_for(self, key: str, cost: int, local_now_us: int, emission_us: int, burst_us: int) -> int:
        """Microseconds for which a request of ``cost`` is sure to be refused; 0: ask Redis; NEVER: cost > tolerance. O(1).

        Raises:
            TypeError: ``key`` is not a str, or a number is not an int.
            ValueError: a number is out of range.
        """

    def known(self, key: str) -> tuple[int, int] | None:
        """``(tat_us, seen_us)`` on the local clock: the bound kept for ``key`` and when its question was sent. O(1)."""

    def forget(self, key: str) -> bool:
        """Drop what is known of ``key``, as after its limiter was reset. True if something was known. O(1)."""

    def clear(self) -> None:
        """Drop everything, as after a failover. O(n)."""

    def __contains__(self, key: Any, /) -> bool: ...
    def __len__(self) -> int: ...
    def __sizeof__(self) -> int: ...
