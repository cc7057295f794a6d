"""Waiting for entries of streams: one blocking read for all who wait, on a connection of its own.

A wake-up is a hint: who waits reads again and decides. While Redis is away, waiters are woken by their time-outs only.
The reader lives as long as somebody waits. One event loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from orchestra._redis.errors import ReplyError
from orchestra._redis.link import Link
from orchestra._redis.wire import pack
from orchestra.errors import OrchestraError

if TYPE_CHECKING:
    from orchestra._keys import WorkflowKeys
    from orchestra.connections import ConnectionManager

logger = logging.getLogger("orchestra.workflow")

BLOCK_MS: Final = 250
"""How long one read blocks: who comes later is served by the next, so this is what it waits at most."""


class Tail:
    """Wakes who waits for a stream to go on behind a position."""

    def __init__(self, manager: ConnectionManager, keys: WorkflowKeys) -> None:
        self._link = Link(manager, "workflow events", keys.tag)
        self._waiting: dict[tuple[str, str], set[asyncio.Future[None]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def wait(self, key: str, after: str, timeout: float) -> None:
        """Return when ``key`` has an entry behind ``after``, or after ``timeout`` seconds, or earlier for no reason."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        place = self._waiting.setdefault((key, after), set())
        place.add(future)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run(), name="orchestra:workflow events")
        try:
            await asyncio.wait((future,), timeout=timeout)
        finally:
            place.discard(future)
            if not place and self._waiting.get((key, after)) is place:
                del self._waiting[key, after]

    async def _run(self) -> None:
        try:
            while self._waiting:
                try:
                    await self._read()
                except OrchestraError as error:
                    logger.debug("events are looked for by time only: %s", error)
                    await asyncio.sleep(BLOCK_MS / 1000)
        finally:
            await self._link.close()

    async def _read(self) -> None:
        places = list(self._waiting)
        lowest: dict[str, str] = {}
        for key, after in places:
            lowest[key] = min(lowest.get(key, after), after, key=_position)
        head = ("XREAD", "COUNT", 1000, "BLOCK", BLOCK_MS, "STREAMS")
        command: tuple[str | int, ...] = (*head, *lowest, *lowest.values())
        timeout = BLOCK_MS / 1000 + self._link.manager.timeout
        (reply,) = await self._link.send(pack([command]), 1, timeout, shared=False)
        if isinstance(reply, ReplyError):
            logger.debug("events cannot be read: %s", reply)
            self._wake(places)
            await asyncio.sleep(BLOCK_MS / 1000)
            return
        newest = {key.decode(): _position(rows[-1][0].decode()) for key, rows in reply or ()}
        self._wake([place for place in places if place[0] in newest and newest[place[0]] > _position(place[1])])

    def _wake(self, places: list[tuple[str, str]]) -> None:
        for place in places:
            for future in self._waiting.pop(place, ()):
                if not future.done():
                    future.set_result(None)


def _position(text: str) -> tuple[int, int]:
    at, _, number = text.partition("-")
    return int(at), int(number or 0)
