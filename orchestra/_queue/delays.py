"""Delayed tasks of one queue that may come back sooner than they were told.

Owns the call of ``lua/hasten.lua``. Refuses to know why: who put them off, and for how long, is an argument. One event loop.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

from orchestra._delivery import OFF_MS, Sooner
from orchestra._redis.link import Call, Link
from orchestra._redis.wire import ReplyError, reply_error
from orchestra._scripts import Arg, script

if TYPE_CHECKING:
    from orchestra._keys import QueueKeys

BATCH: Final = 1000


class StreamDelays:
    """The delayed tasks of a queue on Redis; see :class:`~orchestra._queue.base.Delays`. ``link`` gives the connection to use."""

    def __init__(self, keys: QueueKeys, link: Callable[[], Awaitable[Link]]) -> None:
        self._keys = (keys.delayed, keys.bodies)
        self._link = link

    async def hasten(self, moves: Sequence[Sooner]) -> int:
        """See the protocol. One round trip a thousand; a lost reply is no loss: it is not repeated."""
        link, moved = await self._link(), 0
        for start in range(0, len(moves), BATCH):
            now, args = time.monotonic(), list[Arg]()
            for task_id, was, at in moves[start : start + BATCH]:
                args += (task_id, round((was - now) * 1000), max(0, round((at - now) * 1000)))
            reply = (await link.run((Call(script("hasten"), self._keys, (OFF_MS, *args)),)))[0]
            if isinstance(reply, ReplyError):
                raise reply_error(reply, link.manager.address.safe)
            moved += int(reply)
        return moved
