"""Keeps one queue moving: promotes due tasks, takes over what dead or stalled consumers hold, forgets dead consumers.

Owns the trust in idle times. They are wall clock of Redis and include every moment in which a live owner could not
renew, so nothing is reclaimed for one lease (the *quiet period*) after a reconnect, when the server is another one, when
its clock and ours disagree about the time since the last tick, and when a tick came late because Redis or this process
stood still. Bounded work a call, so that it may run every second beside the hot path. Refuses to own what is held.
One event loop; calls do not overlap (the queue sees to it).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orchestra import _identity, telemetry
from orchestra._delivery import Bury, Delivery
from orchestra._keys import QueueKeys
from orchestra._queue.cancellation import CancelMarks
from orchestra._queue.group import StreamGroup
from orchestra._queue.reaper import Reaper
from orchestra._redis.link import Link
from orchestra._redis.wire import pack
from orchestra._scripts import Arg, script
from orchestra.errors import StoreError
from orchestra.tasks import LANES

logger = logging.getLogger("orchestra.queue")

PROMOTE_BATCH = 200
"""Due tasks that one promotion moves at most."""
SCAN_ROWS = 500
"""Pending rows that one reclaim looks at per stream."""
RECLAIMS_PER_LEASE = 4
ADOPT_EVERY = 5.0
"""Seconds between two looks for dead processes of this machine."""
ADOPT_AGAIN = 0.05
"""Seconds until the next look when the last one found more than there was room for."""
REAP_EVERY = 30.0
"""Seconds between two looks for names of dead consumers; a lease if that is longer."""
TICK = 1.0
"""Most seconds between two ticks; four in a lease if that is shorter, but not below :data:`SHORTEST_TICK`."""
SHORTEST_TICK = 0.05
LEAST_LATE, LEAST_OFF = 0.25, 0.1
"""Seconds below which a tick is not late, and a clock not off, however short the lease is."""
UNSET = -1.0
REFUSED, ALL_SEEN = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What :class:`StreamUpkeep` works on: the queue's name, keys, group and limits, and its connection."""

    queue: str
    keys: QueueKeys
    group: StreamGroup
    group_name: str
    lease_ms: int
    max_deliveries: int
    link: Callable[[], Awaitable[Link]]
    cancels: CancelMarks


@dataclass(slots=True)
class Taken:
    """Deliveries taken over: those to be run, and those handed out too often, with the verdict that ends them.

    ``alone``: None takes everything; True takes one delivery that is on its last allowed hand-over, at most; False none,
    but counts them in ``suspects``.
    """

    deliveries: list[Delivery] = field(default_factory=list)
    pills: list[tuple[Delivery, Bury]] = field(default_factory=list)
    alone: bool | None = None
    suspects: int = 0

    def __len__(self) -> int:
        return len(self.deliveries) + len(self.pills)


class Tick(NamedTuple):
    """What one tick brought: what was taken over, seconds until the next, whether there are new cancel marks."""

    taken: Taken
    next_in: float
    cancels: bool


class StreamUpkeep:
    """The maintenance of one queue object."""

    def __init__(self, of: Upkeep) -> None:
        self._of = of
        self._lease = of.lease_ms / 1000
        self._late = max(self._lease / 2, LEAST_LATE)
        self._off = max(self._lease / 4, LEAST_OFF)
        self._tick = min(TICK, max(self._lease / 4, SHORTEST_TICK))
        self._reaper = Reaper(of.queue, of.keys, of.group_name, of.lease_ms, of.link)
        self._quiet_until = UNSET
        self._reasons: set[str] = set()
        self._reclaim_at = 0.0
        self._adopt_at = 0.0
        self._reap_at = time.monotonic() + max(self._lease, REAP_EVERY)
        self._reopened = self._marked = False
        self._suspects = 0
        """What the last tick counted."""
        self._ticked_at: float | None = None
        self._clock = (0.0, 0.0)
        self.regular = 0
        """How many callers of :meth:`run` have promised to come back when it says."""
        self.clock_offset = time.time() - time.monotonic()
        """Redis clock minus monotonic clock, seconds, as of the last tick."""

    # -- trust in idle times

    def stay_quiet(self, reason: str = "") -> None:
        """Reclaim nothing for one lease from now; without a ``reason``, without a word."""
        now = time.monotonic()
        if now >= self._quiet_until:
            self._reasons.clear()
        if reason and reason not in self._reasons:
            self._reasons.add(reason)
            telemetry.emit("queue.quiet", {"quiet_s": self._lease}, {"queue": self._of.queue, "reason": reason})
            logger.info("queue %s: nothing is reclaimed for %g s: %s", self._of.queue, self._lease, reason)
        self._quiet_until = now + self._lease

    def reopened(self) -> None:
        """A connection is another one: look at the server before the next tick."""
        self._reopened = True
        self.stay_quiet("reconnect")

    async def _look_at_server(self) -> None:
        self._reopened = False
        try:
            if await self._of.group.verify():
                self.stay_quiet("server_changed")
        except BaseException:
            self._reopened = True
            raise

    def _compare_clocks(self, sent: float, now_ms: int) -> None:
        """``now_ms`` was read by Redis at some time between ``sent`` and now: so exact is the difference known."""
        now = time.monotonic()
        least, most = now_ms / 1000 - now, (now_ms + 1) / 1000 - sent
        if self._ticked_at is not None:
            if max(least - self._clock[1], self._clock[0] - most) > self._lease / 4:
                self.stay_quiet("clock_jump")
            elif (now - self._ticked_at if self.regular else now - sent) > self._late:
                self.stay_quiet("late")
        self._clock, self._ticked_at = (least, most), now
        self.clock_offset = (least + most) / 2

    # -- one tick

    async def run(self, consumer: str, room: int, alone: bool | None = None) -> Tick:
        """Promote what is due, take over up to ``room`` deliveries; one round trip, more when it is time to reclaim.

        ``alone`` as in :class:`Taken`. While suspects are known it is always time.

        Raises:
            StoreError: nothing was taken over.
        """
        of = self._of
        if self._quiet_until == UNSET:
            self.stay_quiet()
        if self._reopened:
            await self._look_at_server()
        link = await of.link()
        keys = of.keys
        names = (*keys.streams, keys.delayed, keys.bodies, keys.counters, keys.consumers, keys.cancels)
        args = (PROMOTE_BATCH, consumer, of.cancels.newest)
        await link.wire()  # the time to connect says nothing about the server
        sent = time.monotonic()
        moved, wait_ms, now_ms, marks, lost = await link.script(script("promote"), names, args)
        self._compare_clocks(sent, now_ms)
        self._marked |= of.cancels.add(marks)
        if moved:
            telemetry.emit("queue.promoted", {"count": moved}, {"queue": of.queue})
        if lost:
            self.tell_lost(-1, [], lost)
        taken = Taken(alone=alone)
        tick = self._tick
        try:
            if room > 0:
                tick = min(tick, await self._take_over(consumer, room, taken))
            await self._reap(now_ms)
        except StoreError as error:
            if not taken:
                raise
            logger.warning("queue %s: taking over was interrupted: %s", of.queue, error)
        marked, self._marked = self._marked, False
        self._suspects = taken.suspects
        return Tick(taken, tick if wait_ms < 0 else min(tick, wait_ms / 1000), marked)

    async def _take_over(self, consumer: str, room: int, taken: Taken) -> float:
        """Look for dead and for stalled consumers when it is time; seconds until the next look at most."""
        now, again = time.monotonic(), TICK
        if now >= self._adopt_at or self._suspects:
            await self._adopt(consumer, room, taken)
            if len(taken) < room:
                self._adopt_at = now + min(ADOPT_EVERY, self._lease / RECLAIMS_PER_LEASE)
            else:
                again = ADOPT_AGAIN
        if len(taken) < room and now >= max(0.0 if self._suspects else self._reclaim_at, self._quiet_until):
            self._reclaim_at = now + self._lease / RECLAIMS_PER_LEASE
            if not await self._reclaim(consumer, room, taken, self._of.lease_ms):
                self._reclaim_at = now  # there is more to look at: at the next tick
        return again

    async def _reap(self, now_ms: int) -> None:
        now = time.monotonic()
        if now >= self._reap_at:
            self._reap_at = now + max(self._lease, REAP_EVERY)
            await self._reaper.run(now_ms)

    # -- taking over

    async def reclaim(self, consumer: str, room: int, idle_ms: int) -> Taken:
        """Take over up to ``room`` deliveries that have been idle for ``idle_ms``; one round trip a stream, two a lane."""
        taken = Taken()
        try:
            await self._reclaim(consumer, room, taken, idle_ms)
        except StoreError:
            if not taken:
                raise
        return taken

    async def _reclaim(self, consumer: str, room: int, taken: Taken, idle_ms: int, dead: str = "") -> bool:
        """Add to ``taken`` what has been idle for ``idle_ms``, or what ``dead`` held; False while rows are left over."""
        of, before, whole = self._of, len(taken), True
        await of.group.ensure()
        link = await of.link()
        pills = len(taken.pills)
        try:
            for number, key in enumerate(of.keys.streams):
                args: list[Arg] = [of.group_name, consumer, number, idle_ms, SCAN_ROWS, room - len(taken), dead]
                args += self._expectation() if not dead else (0, 0)
                args += self._suspicion(taken, room)
                rows, lost, state, left = await link.script(script("reclaim"), (key, of.keys.counters), args)
                if state == REFUSED:
                    self.stay_quiet("late")
                    return True
                self._sort(number, rows, consumer, taken)
                taken.suspects += left
                whole = whole and state == ALL_SEEN
                if lost:
                    self.tell_lost(number % LANES, [f"{number}:{entry.decode()}" for entry in lost], len(lost))
                if len(taken) >= room:
                    break
        finally:
            if len(taken) > before:
                crashed = len(taken.pills) - pills
                facts = {"count": len(taken) - before - crashed, "crashed": crashed}
                telemetry.emit("queue.reclaimed", facts, {"queue": of.queue})
        return whole

    def _suspicion(self, taken: Taken, room: int) -> tuple[int, int]:
        """The delivery count that makes a suspect (0: none does), and how many may be taken now."""
        most = self._of.max_deliveries
        if most < 2 or taken.alone is None:
            return 0, room
        has_one = any(delivery.deliveries >= most for delivery in taken.deliveries)
        return most, int(taken.alone and not has_one)

    def _expectation(self) -> tuple[int, int]:
        """When, by the Redis clock, a call sent now should be executed, and by how much it may be off (0: not known)."""
        if self._ticked_at is None:
            return 0, 0
        return int((time.monotonic() + self.clock_offset) * 1000), int(self._off * 1000)

    def _sort(self, number: int, rows: Sequence[Any], consumer: str, taken: Taken) -> None:
        for entry, count, fields, holder, idle in rows:
            delivery = Delivery(number, entry, fields, consumer, int(count))
            if delivery.deliveries <= self._of.max_deliveries:
                taken.deliveries.append(delivery)
            else:
                at = time.monotonic() + self.clock_offset - idle / 1000
                taken.pills.append((delivery, crashed_verdict(delivery, holder.decode(), idle / 1000, at)))

    def tell_lost(self, lane: int, message_ids: Sequence[str], count: int) -> None:
        """Entries in flight (or, lane -1, bodies of delayed tasks) were deleted by somebody who is none of us."""
        facts = {"queue": self._of.queue, "lane": lane, "message_ids": list(message_ids)}
        telemetry.emit("queue.lost", {"count": count}, facts)
        logger.error("queue %s: %d tasks were deleted by somebody else: %s", self._of.queue, count, facts)

    async def retire(self, consumer: str) -> None:
        """Forget ``consumer``, unless it still holds deliveries; one round trip."""
        keys = (*self._of.keys.streams, self._of.keys.consumers)
        link = await self._of.link()
        await link.script(script("retire"), keys, (self._of.group_name, consumer))

    async def _adopt(self, consumer: str, room: int, taken: Taken) -> None:
        """Take over what processes of this machine held that are certainly dead: no need to wait for their leases."""
        link = await self._of.link()
        (names,) = await link.send(pack((("ZRANGE", self._of.keys.consumers, 0, -1),)), 1)
        for name in (raw.decode() for raw in names):
            if name == consumer or not _identity.is_dead(name):
                continue
            before = -1
            while before < len(taken):
                before = len(taken)
                await self._reclaim(consumer, room, taken, 0, name)
                if len(taken) >= room:
                    return  # the rest at the next call
            await self.retire(name)


def crashed_verdict(delivery: Delivery, holder: str, idle: float, at: float) -> Bury:
    """The end of a poison pill: how often it was handed out, to whom last, when (unix s), how long ago (s)."""
    times = delivery.deliveries - 1
    text = (
        f"handed out {times} times and never settled: its worker died or stalled each time, the last one was {holder}"
    )
    facts = {"deliveries": times, "consumer": holder, "idle_s": round(idle, 3), "delivered_at": round(at, 3)}
    return Bury("crashed", delivery.retries + times, {"error": text, "error_type": "Crashed", **facts})
