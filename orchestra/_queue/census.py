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
        lengths = [("XLEN", key) for key in self._keys.streams]
        return sum(await self._ask([*lengths, ("ZCARD", self._keys.delayed)]))

    async def stats(self) -> QueueStats:
        """How many tasks are where, and the counters; one round trip, one moment (MULTI)."""
        keys = self._keys
        streams = [command for key in keys.streams for command in (("XLEN", key), ("XPENDING", key, self._group))]
        rest = [("ZCARD", keys.delayed), ("XLEN", keys.dlq), ("ZCARD", keys.consumers), ("HGETALL", keys.counters)]
        replies = await self._at_once([*streams, *rest])
        counted, (delayed, dead, consumers, flat) = replies[: len(streams)], replies[len(streams) :]
        held = [reply[0] if isinstance(reply, list) else 0 for reply in counted[1::2]]
        lengths, pending = _by_lane(counted[::2]), _by_lane(held)
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


def _by_lane(numbers: Sequence[int]) -> list[int]:
    """Of each lane the sum of its two streams."""
    return [sum(numbers[lane::LANES]) for lane in range(LANES)]
