"""Counts what a queue holds, without changing it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from orchestra._keys import QueueKeys
from orchestra._queue.base import QueueStats
from orchestra._redis.link import Link
from orchestra._redis.wire import Command, ReplyError, pack, reply_code, reply_error
from orchestra.errors import StoreFullError
from orchestra.tasks import LANES


class Census:
    """The counts of one queue. ``link`` gives the connection to use."""

    def __init__(
        self, queue: str, keys: QueueKeys, group: str, link: Callable[[], Awaitable[Link]], patience: float
    ) -> None:
        self._queue = queue
        self._keys = keys
        self._group = group
        self._link = link
        self._patience = patience

    async def depth(self) -> int:
        """The number of live tasks: waiting, in flight and delayed. One round trip."""
        lengths = [("XLEN", lane) for lane in self._keys.lanes]
        return sum(await self._ask([*lengths, ("ZCARD", self._keys.delayed)]))

    async def stats(self) -> QueueStats:
        """How many tasks are where, and the counters; one round trip, one moment (MULTI)."""
        keys = self._keys
        lanes = [command for lane in keys.lanes for command in (("XLEN", lane), ("XPENDING", lane, self._group))]
        rest = [("ZCARD", keys.delayed), ("XLEN", keys.dlq), ("ZCARD", keys.consumers), ("HGETALL", keys.counters)]
        replies = await self._at_once([*lanes, *rest])
        lengths = replies[0 : 2 * LANES : 2]
        pending = [reply[0] if isinstance(reply, list) else 0 for reply in replies[1 : 2 * LANES : 2]]
        delayed, dead, consumers, flat = replies[2 * LANES :]
        names = [name.decode() for name in flat[::2]]
        counters = {name: int(value) for name, value in zip(names, flat[1::2], strict=True) if ":" not in name}
        return QueueStats(
            queue=self._queue,
            waiting=tuple(length - held for length, held in zip(lengths, pending, strict=True)),
            in_flight=tuple(pending),
            delayed=delayed,
            dead=dead,
            consumers=consumers,
            counters=counters,
        )

    async def _at_once(self, commands: Sequence[Command]) -> Any:
        try:
            return (await self._ask([("MULTI",), *commands, ("EXEC",)]))[-1]
        except StoreFullError:  # Redis 7.0 queues no command while its memory is full: then not quite at one moment
            return await self._ask(commands)

    async def _ask(self, commands: Sequence[Command]) -> Any:
        link = await self._link()
        replies, _ = await link.patiently(lambda: link.send(pack(commands), len(commands)), self._patience)
        nested = replies[-1] if isinstance(replies[-1], list) else []
        for reply in (*replies, *nested):
            if isinstance(reply, ReplyError) and reply_code(reply) != "NOGROUP":  # no group yet: nothing in flight
                raise reply_error(reply, link.manager.address.safe) from reply
        return replies
