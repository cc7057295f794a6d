"""Keeps one queue moving: promotes due tasks, takes over what dead or stalled consumers hold.

Bounded work a call, so that it may run every second beside the hot path. After a reconnect nothing is reclaimed for one
lease: idle times include the outage, and live owners must have had a chance to renew.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from orchestra import _identity, telemetry
from orchestra._cancellation import CancelMarks
from orchestra._delivery import Bury, Delivery
from orchestra._keys import QueueKeys
from orchestra._link import Link
from orchestra._queue_base import Maintenance
from orchestra._scripts import Arg, script
from orchestra._wire import pack

PROMOTE_BATCH = 200
"""Due tasks that one promotion moves at most."""
SCAN_ROWS = 100
"""Pending rows that one reclaim looks at per lane."""
RECLAIMS_PER_LEASE = 4
ADOPT_EVERY = 5.0
"""Seconds between two looks for dead processes of this machine."""
ADOPT_AGAIN = 0.05
"""Seconds until the next look when the last one found more than there was room for."""
TICK = 1.0
"""Most seconds between two looks at the delayed set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What :class:`StreamUpkeep` works on: the queue's name, keys, group and limits, and its connection."""

    queue: str
    keys: QueueKeys
    group: str
    lease_ms: int
    max_deliveries: int
    link: Callable[[], Awaitable[Link]]
    cancels: CancelMarks
    prepare: Callable[[], Awaitable[None]]


class StreamUpkeep:
    """The maintenance of one queue object."""

    def __init__(self, of: Upkeep) -> None:
        self._of = of
        self._lease = of.lease_ms / 1000
        self._quiet_until = 0.0
        self._reclaim_at = 0.0
        self._adopt_at = 0.0
        self.clock_offset = time.time() - time.monotonic()
        """Redis clock minus monotonic clock, seconds, as of the last tick."""

    def stay_quiet(self) -> None:
        """Reclaim nothing for one lease from now."""
        self._quiet_until = time.monotonic() + self._lease

    async def run(self, consumer: str, room: int) -> Maintenance:
        """Promote what is due, take over up to ``room`` deliveries; one round trip, more when it is time to reclaim."""
        of = self._of
        link = await of.link()
        keys = (*of.keys.lanes, of.keys.delayed, of.keys.bodies, of.keys.counters, of.keys.consumers, of.keys.cancels)
        args = (PROMOTE_BATCH, consumer, of.cancels.newest)
        moved, wait_ms, now_ms, marks = await link.script(script("promote"), keys, args)
        self.clock_offset = now_ms / 1000 - time.monotonic()
        fresh = of.cancels.add(marks)
        if moved:
            telemetry.emit("queue.promoted", {"count": moved}, {"queue": of.queue})
        now = time.monotonic()
        deliveries: list[Delivery] = []
        tick = TICK
        if room > 0 and now >= self._adopt_at:
            deliveries = await self._adopt(consumer, room)
            if len(deliveries) < room:
                self._adopt_at = now + min(ADOPT_EVERY, self._lease / RECLAIMS_PER_LEASE)
            else:
                tick = ADOPT_AGAIN
        if len(deliveries) < room and now >= max(self._reclaim_at, self._quiet_until):
            self._reclaim_at = now + self._lease / RECLAIMS_PER_LEASE
            deliveries += await self.reclaim(consumer, room - len(deliveries), of.lease_ms)
        return Maintenance(deliveries, tick if wait_ms < 0 else min(tick, wait_ms / 1000), fresh)

    async def reclaim(self, consumer: str, room: int, idle_ms: int, dead: str = "") -> list[Delivery]:
        """Take over up to ``room`` deliveries that have been idle for ``idle_ms``, or that ``dead`` held.

        One round trip a lane. Includes those that were handed out too often: see :meth:`is_poison`.
        """
        of = self._of
        await of.prepare()
        link = await of.link()
        taken: list[Delivery] = []
        for lane, key in enumerate(of.keys.lanes):
            args: list[Arg] = [of.group, consumer, lane, idle_ms, SCAN_ROWS, room - len(taken), dead]
            rows, _lost = await link.script(script("reclaim"), (key, of.keys.counters), args)
            taken += [Delivery(lane, entry, fields, consumer, int(count)) for entry, count, fields in rows]
            if len(taken) >= room:
                break
        if taken:
            crashed = sum(map(self.is_poison, taken))
            facts = {"count": len(taken) - crashed, "crashed": crashed}
            telemetry.emit("queue.reclaimed", facts, {"queue": of.queue})
        return taken

    def is_poison(self, delivery: Delivery) -> bool:
        """Whether its entry was handed out, and not settled, as often as is allowed."""
        return delivery.deliveries > self._of.max_deliveries

    async def retire(self, consumer: str) -> None:
        """Forget ``consumer``, unless it still holds deliveries; one round trip."""
        keys = (*self._of.keys.lanes, self._of.keys.consumers)
        link = await self._of.link()
        await link.script(script("retire"), keys, (self._of.group, consumer))

    async def _adopt(self, consumer: str, room: int) -> list[Delivery]:
        """Take over what processes of this machine held that are certainly dead: no need to wait for their leases."""
        link = await self._of.link()
        (names,) = await link.send(pack((("ZRANGE", self._of.keys.consumers, 0, -1),)), 1)
        found: list[Delivery] = []
        for name in (raw.decode() for raw in names):
            if name == consumer or not _identity.is_dead(name):
                continue
            while taken := await self.reclaim(consumer, room - len(found), 0, name):
                found += taken
                if len(found) >= room:
                    return found  # the rest at the next call
            await self.retire(name)
        return found


def crashed_verdict(delivery: Delivery) -> Bury:
    """The end of a poison pill."""
    times = delivery.deliveries - 1
    text = f"handed out {times} times and never settled: its worker died or stalled each time"
    return Bury("crashed", delivery.retries + times, {"error": text, "error_type": "Crashed", "deliveries": times})
