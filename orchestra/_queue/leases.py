"""Renews leases from a thread with a connection of its own, so that a blocked event loop does not lose them.

Owns when a lease is renewed, and when it counts as lost: by an answer of Redis, or by this process's own monotonic
clock when Redis has not confirmed it for so long that somebody else may have it. Refuses to own what is held and what a
lost lease means: it reads the queue's ``held`` maps (a snapshot of a dict's values is atomic under the GIL) and reports
to the event loop with ``call_soon_threadsafe``. It renews without raising delivery counts and never takes a delivery
from another consumer: see ``lua/renew.lua``.

A loop that is blocked keeps its leases for ``max_stall``; then they are let go. A C call that does not release the GIL
stops this thread, too: then nothing is renewed and nothing reported before the call returns, and what was lost meanwhile
is settled STALE, because the fences hold.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from orchestra import telemetry
from orchestra._delivery import Delivery
from orchestra._keys import QueueKeys
from orchestra._queue.base import LeaseLost
from orchestra._queue.stall import STALL_AFTER, LoopWatch, Pulse, stack_of
from orchestra._redis.errors import reply_code
from orchestra._scripts import forgotten, script
from orchestra.connections import map_redis_error
from orchestra.tasks import LANES

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

logger = logging.getLogger("orchestra.leases")

SCANS_PER_LEASE = 8
RENEW_AFTER = 0.19
"""Part of a lease after which it is renewed: at every second scan, and never for what lives shorter than a scan."""
MARGIN = 0.1
"""Part of a lease before whose end a delivery counts as lost, so that its agent has ended when another may begin."""
TRIES_PER_SCAN = 4
LOOK = 1.0
"""Seconds between two looks at the event loop."""
CHUNK = 500
SHORTEST_TIMEOUT = 0.05
LEAST_STANDSTILL = 0.05
"""Seconds beyond two timeouts after which an attempt was not slow, but interrupted by a stop of the process."""


class LeaseBook:
    """When each delivery was last surely ours. No clock, no I/O: times are arguments, seconds of one monotonic clock."""

    def __init__(self, lease: float) -> None:
        self._keep = lease * (1 - MARGIN)
        self._young = lease * RENEW_AFTER
        self._sure: dict[Delivery, float] = {}
        self._fresh: set[Delivery] = set()
        self._told: set[Delivery] = set()
        self._gone: set[Delivery] = set()

    def scan(self, now: float, floor: float, held: Sequence[Delivery]) -> list[Delivery]:
        """What is to be renewed, out of all that is ``held``; the rest is forgotten. O(held).

        ``floor``: what is seen for the first time was not handed out before.
        """
        known, sure, due = self._sure, {}, []
        self._fresh.clear()
        for delivery in held:
            at = known.get(delivery)
            if at is None:
                if delivery in self._gone:
                    continue
                at = floor
                self._fresh.add(delivery)
            sure[delivery] = at
            if now >= at + self._young:
                due.append(delivery)
        self._sure = sure
        self._gone.intersection_update(held)
        self._told.intersection_update(held)
        return due

    def overdue(self, now: float, *, tried: bool) -> list[Delivery]:
        """What counts as lost and was not returned before; unless a renewal was ``tried``, without what is new. O(held).

        It is renewed all the same: whoever works on it has to stop, but as long as nobody else has taken it, it can still
        be settled.
        """
        limit, told = now - self._keep, self._told
        late = [d for d, at in self._sure.items() if at <= limit and d not in told and (tried or d not in self._fresh)]
        told.update(late)
        return late

    def renewed(self, deliveries: Iterable[Delivery], at: float) -> None:
        """They were ours when a renewal that began at ``at`` was executed."""
        self._sure.update(dict.fromkeys(deliveries, at))

    def drop(self, deliveries: Iterable[Delivery]) -> None:
        """They are another's, for certain."""
        for delivery in deliveries:
            self._sure.pop(delivery, None)
            self._gone.add(delivery)

    def deadline(self) -> float:
        """When the next delivery counts as lost unless it is renewed; infinity when there is none. O(held)."""
        told = self._told
        return min((at for delivery, at in self._sure.items() if delivery not in told), default=math.inf) + self._keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a :class:`LeaseKeeper` keeps: where it is, whose it is, and until when.

    ``held`` are the maps it may read; ``asked()`` is the monotonic time at which the oldest call began that is under
    way and may bring more deliveries, infinity if none is. ``lease`` and ``max_stall`` are seconds.
    """

    keys: QueueKeys
    queue: str
    group: str
    consumer: str
    lease: float
    max_stall: float
    held: Sequence[dict[bytes, Delivery]]
    asked: Callable[[], float]


class LeaseKeeper(AbstractAsyncContextManager[None]):
    """Keeps what a consumer holds while the context is open; ``on_lost(delivery)`` runs in the event loop.

    Idle, its thread wakes once a second and sends nothing.
    """

    def __init__(self, manager: ConnectionManager, holding: Holding, on_lost: LeaseLost) -> None:
        self._manager = manager
        self._of = holding
        self._interval = holding.lease / SCANS_PER_LEASE
        self._timeout = max(SHORTEST_TIMEOUT, holding.lease / 4)
        self._patience = 2 * self._timeout + LEAST_STANDSTILL
        self._on_lost = on_lost
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._watch = LoopWatch(lambda _: None)
        self._pulse = Pulse(0.0)
        self._book = LeaseBook(holding.lease)
        self._floor = 0.0
        self._scan_at = 0.0
        self._let_go = False
        self._failing = False

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._watch = LoopWatch(self._loop.call_soon_threadsafe)
        self._book = LeaseBook(self._of.lease)
        self._floor, self._scan_at = -math.inf, time.monotonic()  # of what is held already, nothing is known
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name=f"orchestra-leases-{self._of.consumer}", daemon=True)
        self._thread.start()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        thread = self._thread
        if thread is not None:
            while thread.is_alive():  # a round trip at most; joining would block the loop it may be waiting for
                await asyncio.sleep(0.005)

    def lose(self, deliveries: Sequence[Delivery]) -> None:
        """They are lost, whatever their leases say. In the event loop's thread."""
        for delivery in deliveries:
            if self._of.held[delivery.stream].get(delivery.entry) is delivery and not delivery.lost:
                delivery.lost = True
                self._on_lost(delivery)

    # The rest runs in the thread.

    def _run(self) -> None:
        self._pulse, pause = Pulse(time.monotonic()), 0.0
        try:
            self._connect()
            self._beat(self._patience)
            while not self._stop.wait(pause):
                self._beat(pause)
                try:
                    self._turn()
                except Exception:
                    if self._loop is None or self._loop.is_closed():
                        return  # nobody is left to work on what is held
                    logger.exception("keeping the leases of %s failed", self._of.consumer)
                self._beat()
                pause = min(max(0.0, self._scan_at - time.monotonic()), LOOK)
        finally:
            self._disconnect()

    def _connect(self) -> None:
        """Before a renewal is urgent: on a slow link the greetings take several round trips."""
        try:
            self._client = self._manager.sync_client(self._timeout)
            self._client.ping()
        except Exception as error:  # noqa: BLE001 - the first renewal says more, and tries again
            logger.debug("the lease thread of %s cannot connect: %s", self._of.consumer, map_redis_error(error))
            self._disconnect()

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _beat(self, waited: float = 0.0) -> None:
        now = time.monotonic()
        late = self._pulse.beat(now, waited)
        if late:
            self._watch.forgive(now)
            self._tell_blocked(late, "process")

    def _turn(self) -> None:
        now = time.monotonic()
        if any(self._of.held):
            self._look_at_loop(now)
        if now >= self._scan_at:
            self._scan_at = now + self._interval  # whatever happens now
            self._scan(now)

    def _look_at_loop(self, now: float) -> None:
        blocked = self._watch.blocked(now)
        if self._watch.is_news(blocked):
            self._tell_blocked(blocked, "loop")
        let_go = blocked >= max(self._of.max_stall, STALL_AFTER)
        if let_go and not self._let_go:
            count = sum(map(len, self._of.held))
            telemetry.emit("lease.let_go", {"count": count, "blocked_s": blocked}, {"queue": self._of.queue})
            logger.error("the event loop is blocked for %.1f s: %d leases are let go", blocked, count)
        self._let_go = let_go

    def _tell_blocked(self, blocked: float, kind: str) -> None:
        facts = {"queue": self._of.queue, "kind": kind, "stack": stack_of(self._loop_thread)}
        telemetry.emit("loop.blocked", {"blocked_s": blocked}, facts)
        what = "the event loop is blocked" if kind == "loop" else "the process stood still"
        logger.warning("%s for %.1f s; it is at\n%s", what, blocked, facts["stack"])

    def _scan(self, now: float) -> None:
        floor = min(now, self._of.asked())  # before the snapshot: what is not in it was handed out later
        due = self._book.scan(now, self._floor, self._mine())
        self._floor = floor
        renewing = bool(due) and not self._let_go
        if self._failing or not renewing:
            self._tell_lost(self._book.overdue(now, tried=not renewing))
        if renewing:
            self._try_to_renew(due)
            self._tell_lost(self._book.overdue(time.monotonic(), tried=True))
        self._scan_at = min(self._scan_at, max(self._book.deadline(), now))

    def _mine(self) -> list[Delivery]:
        consumer = self._of.consumer
        return [
            delivery
            for lane in self._of.held
            for delivery in list(lane.values())
            if delivery.consumer == consumer and not delivery.abandoned
        ]

    def _try_to_renew(self, due: list[Delivery]) -> None:
        began = time.monotonic()
        try:
            try:
                self._renew(due)
            except Exception:
                if not self._stood_still(began):
                    raise
                self._disconnect()  # this process was stopped meanwhile: that it got no answer says nothing
            if self._stood_still(began):
                self._renew(due)  # and an answer is as old as the stop
        except Exception as error:  # noqa: BLE001 - the thread must outlive any fault of the connection
            log = logger.debug if self._failing else logger.warning
            log("%d leases of %s were not renewed: %s", len(due), self._of.consumer, map_redis_error(error))
            self._failing = True
            self._disconnect()
            self._scan_at = time.monotonic() + self._interval / TRIES_PER_SCAN
        else:
            self._failing = False

    def _stood_still(self, since: float) -> bool:
        return time.monotonic() - since >= self._patience

    def _renew(self, due: list[Delivery]) -> None:
        if self._client is None:  # a black hole must not keep this thread beyond the deadline
            left = self._book.deadline() - time.monotonic()
            self._client = self._manager.sync_client(max(SHORTEST_TIMEOUT, min(self._timeout, left)))
        count = 0
        for number, key in enumerate(self._of.keys.streams):
            mine = [delivery for delivery in due if delivery.stream == number]
            for start in range(0, len(mine), CHUNK):
                chunk = mine[start : start + CHUNK]
                began = time.monotonic()
                gone = self._renew_chunk(number, key, chunk)
                lost = [delivery for delivery in chunk if delivery.entry in gone]
                self._book.renewed((delivery for delivery in chunk if delivery.entry not in gone), began)
                self._book.drop(lost)
                self._tell_lost(lost)
                count += len(lost)
        telemetry.emit("lease.renewed", {"count": len(due), "lost": count}, {"queue": self._of.queue})

    def _renew_chunk(self, number: int, key: str, chunk: list[Delivery]) -> set[bytes]:
        """The entries of ``chunk`` that are no longer ours."""
        args: list[Any] = [self._of.group, self._of.consumer]
        for delivery in chunk:
            args += (delivery.entry, delivery.deliveries)
        try:
            answer = self._run_script((key, self._of.keys.counters), args)
        except Exception as error:
            if reply_code(error) != "NOGROUP":
                raise
            return {delivery.entry for delivery in chunk}
        deleted = [f"{number}:{entry[1:].decode()}" for entry in answer if entry.startswith(b"!")]
        if deleted:
            facts = {"queue": self._of.queue, "lane": number % LANES, "message_ids": deleted}
            telemetry.emit("queue.lost", {"count": len(deleted)}, facts)
            logger.error("queue %s: %d tasks were deleted by somebody else: %s", self._of.queue, len(deleted), deleted)
        return {entry.removeprefix(b"!") for entry in answer}

    def _run_script(self, keys: Sequence[str], args: Sequence[Any]) -> list[bytes]:
        lua = script("renew")
        self._beat()
        try:
            answer: list[bytes] = self._client.execute_command("EVALSHA", lua.sha, len(keys), *keys, *args)
        except Exception as error:
            if not forgotten(error):
                raise
            answer = self._client.execute_command("EVAL", lua.text, len(keys), *keys, *args)
        finally:
            self._beat(self._patience)
        return answer

    def _tell_lost(self, lost: list[Delivery]) -> None:
        if lost and self._loop is not None:
            self._loop.call_soon_threadsafe(self.lose, lost)
