"""Permits taken in one call and spent without asking.

Owns what was taken and is not spent yet: of each cell and urgency at most one lease, valid for ``ttl`` seconds. Refuses to
own the taking: its owner asks. A permit counts when it is *taken*: over every window of W seconds at most burst + rate * W are
taken, and as none is spent later than ``ttl`` after that, at most burst + rate * (W + ttl) are spent. What is left over
is given back by ``lua/gcra_return.lua`` as far as that is safe; the rest is lost, never spent.
One event loop; only :meth:`Leases.close` awaits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from orchestra._limiting.request import Request
from orchestra._limiting.rules import Admission
from orchestra._limiting.store import LEASE, Use
from orchestra.errors import OrchestraError

logger = logging.getLogger("orchestra.flow_control")


class _Lease:
    __slots__ = ("ends", "left", "taken_us", "tat_us", "timer")

    def __init__(self, permits: int, tat_us: int, taken_us: int, ends: float) -> None:
        self.left, self.tat_us, self.taken_us, self.ends = permits, tat_us, taken_us, ends
        self.timer: asyncio.TimerHandle | None = None


class Leases:
    """The leases of one ``limiter``: of ``size`` permits, valid for ``ttl`` seconds by the clock ``now``."""

    def __init__(self, limiter: Any, size: int, ttl: float, now: Callable[[], float]) -> None:
        self._limiter, self._size, self._ttl, self._now = limiter, size, ttl, now
        self._held: dict[tuple[str, int], _Lease] = {}
        self._locks: dict[tuple[str, int], asyncio.Lock] = {}
        self._returns: set[asyncio.Task[None]] = set()
        self.lost = 0

    @property
    def held(self) -> int:
        """Permits taken and not spent."""
        return sum([lease.left for lease in self._held.values()])

    def spend(self, cell: str, urgency: int, cost: int) -> bool:
        """Spend permits of a lease, if there are enough. O(1), no round trip."""
        lease = self._held.get((cell, urgency))
        if lease is None or lease.left < cost or self._now() >= lease.ends:
            return False
        lease.left -= cost
        return True

    async def acquire(self, cell: str, urgency: int, cost: int) -> Admission | None:
        """Permits of a lease, taking one if need be; None when Redis does not give one now. At most one round trip."""
        limiter = self._limiter
        if self.spend(cell, urgency, cost):
            return Admission(True, 0.0, limiter.remaining(cell))
        if limiter.refusal(cell, cost, urgency):
            return None
        async with self._lock(cell, urgency):
            if self.spend(cell, urgency, cost):
                return Admission(True, 0.0, limiter.remaining(cell))
            permits = self._worth_asking(cell, urgency, cost)
            asked, emission_us = self._now(), limiter.setting.emission_us
            request = Request((Use(limiter, cell, permits, urgency),), urgency, limiter.store(), LEASE)
            request.store.ask((request,))
            admission = await request.answer()
            if not admission.allowed:
                return None
            taken_us, tat_us = request.taken_us
            if tat_us and limiter.setting.emission_us == emission_us:  # else it failed open, or changed: take no more
                self._put(cell, urgency, permits - cost, tat_us, taken_us, asked)
            return admission

    def _worth_asking(self, cell: str, urgency: int, cost: int) -> int:
        """Permits to ask for: a lease, or what the last answer says that is left of it."""
        _, emission_us, burst_us, tolerances_us = self._limiter.setting
        reserve = (burst_us - tolerances_us[urgency]) // emission_us
        usable = min(self._size, tolerances_us[urgency] // emission_us, self._limiter.remaining(cell) - reserve)
        return int(max(cost, usable))

    def _lock(self, cell: str, urgency: int) -> asyncio.Lock:
        """Held by the one who takes a lease, so that those who come meanwhile share it."""
        lock = self._locks.get((cell, urgency))
        if lock is None:
            if len(self._locks) > 1024:
                self._locks = {key: lock for key, lock in self._locks.items() if lock.locked()}
            lock = self._locks[cell, urgency] = asyncio.Lock()
        return lock

    def _put(self, cell: str, urgency: int, permits: int, tat_us: int, taken_us: int, asked: float) -> None:
        """Keep ``permits`` that were asked for at ``asked``; what an older lease still held goes back."""
        self._end(cell, urgency)
        if permits > 0:
            lease = self._held[cell, urgency] = _Lease(permits, tat_us, taken_us, asked + self._ttl)
            loop = asyncio.get_running_loop()
            lease.timer = loop.call_later(self._ttl, self._expire, cell, urgency, lease)

    def forget(self) -> None:
        """Another setting is in force: what was taken under the old one is lost."""
        for lease in self._held.values():
            if lease.timer is not None:
                lease.timer.cancel()
        self.lost += self.held
        self._held.clear()

    async def close(self) -> None:
        """Give back what is left; one round trip a lease."""
        for cell, urgency in list(self._held):
            self._end(cell, urgency)
        if self._returns:
            await asyncio.gather(*self._returns)

    def _expire(self, cell: str, urgency: int, lease: _Lease) -> None:
        if self._held.get((cell, urgency)) is lease:
            self._end(cell, urgency)

    def _end(self, cell: str, urgency: int) -> None:
        lease = self._held.pop((cell, urgency), None)
        if lease is None:
            return
        if lease.timer is not None:
            lease.timer.cancel()
        if lease.left:
            task = asyncio.get_running_loop().create_task(self._return(cell, lease), name="orchestra:lease-return")
            self._returns.add(task)
            task.add_done_callback(self._returns.discard)

    async def _return(self, cell: str, lease: _Lease) -> None:
        emission_us = self._limiter.setting.emission_us
        left_us = lease.left * emission_us
        self._limiter.forget(cell)  # before and after: what is answered meanwhile may be from before
        try:
            given = await self._limiter.store().run("gcra_return", (cell,), (lease.tat_us, lease.taken_us, left_us))
            self._limiter.forget(cell)
        except (OrchestraError, OSError) as error:
            logger.debug("%d permits of %s could not be given back: %s", lease.left, cell, error)
            given = 0
        self.lost += max(0, lease.left - int(given) // emission_us)
