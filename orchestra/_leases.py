"""Renews leases from a thread with a connection of its own, so that a blocked event loop does not lose them.

The thread only reads the queue's ``held`` maps (a snapshot of a dict's values is atomic under the GIL) and reports
what it lost to the event loop with ``call_soon_threadsafe``. It renews without raising delivery counts and never takes
a delivery from another consumer: see ``lua/renew.lua``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from orchestra import telemetry
from orchestra._delivery import Delivery
from orchestra._keys import QueueKeys
from orchestra._queue_base import LeaseLost
from orchestra._scripts import forgotten, script
from orchestra.connections import map_redis_error

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

logger = logging.getLogger("orchestra.leases")

PER_LEASE = 4
"""Renewals per lease. The first comes one to two intervals after the read, so one may fail before a lease is lost."""
CHUNK = 500


class LeaseKeeper(AbstractAsyncContextManager[None]):
    """Keeps what ``consumer`` holds while the context is open; ``on_lost(delivery)`` runs in the event loop."""

    def __init__(
        self,
        manager: ConnectionManager,
        keys: QueueKeys,
        group: str,
        consumer: str,
        lease: float,
        held: Sequence[dict[bytes, Delivery]],
        on_lost: LeaseLost,
    ) -> None:
        self._manager = manager
        self._keys = keys
        self._group = group
        self._consumer = consumer
        self._interval = lease / PER_LEASE
        self._held = held
        self._on_lost = on_lost
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seen: set[Delivery] = set()

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name=f"orchestra-leases-{self._consumer}", daemon=True)
        self._thread.start()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        thread = self._thread
        if thread is not None:
            while thread.is_alive():  # a round trip at most; joining would block the loop it may be waiting for
                await asyncio.sleep(0.005)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._interval):
                try:
                    self._renew(self._due())
                except Exception as error:  # noqa: BLE001 - the thread must outlive any fault of the connection
                    logger.warning("leases of %s were not renewed: %s", self._consumer, map_redis_error(error))
        finally:
            if self._client is not None:
                self._client.close()

    def _due(self) -> list[Delivery]:
        """What was held a whole interval ago already: younger ones have most of their lease before them."""
        now_held = {
            delivery
            for lane in self._held
            for delivery in list(lane.values())
            if delivery.consumer == self._consumer and not delivery.lost
        }
        due, self._seen = now_held & self._seen, now_held
        return list(due)

    def _renew(self, due: list[Delivery]) -> None:
        if not due:
            return
        if self._client is None:
            self._client = self._manager.sync_client()
        lost: list[Delivery] = []
        for lane, key in enumerate(self._keys.lanes):
            mine = [delivery for delivery in due if delivery.lane == lane]
            for start in range(0, len(mine), CHUNK):
                lost += self._renew_chunk(key, mine[start : start + CHUNK])
        telemetry.emit("lease.renewed", {"count": len(due), "lost": len(lost)}, {"queue": self._keys.tag})
        if lost and self._loop is not None:
            self._loop.call_soon_threadsafe(self._report, lost)

    def _renew_chunk(self, key: str, chunk: list[Delivery]) -> list[Delivery]:
        args: list[Any] = [self._group, self._consumer]
        for delivery in chunk:
            args += (delivery.entry, delivery.deliveries)
        lua = script("renew")
        try:
            gone = self._client.execute_command("EVALSHA", lua.sha, 1, key, *args)
        except Exception as error:
            if not forgotten(error):
                raise
            gone = self._client.execute_command("EVAL", lua.text, 1, key, *args)
        gone = set(gone)
        return [delivery for delivery in chunk if delivery.entry in gone]

    def _report(self, lost: list[Delivery]) -> None:
        for delivery in lost:
            if self._held[delivery.lane].get(delivery.entry) is delivery:  # else it was settled meanwhile
                delivery.lost = True
                self._on_lost(delivery)
