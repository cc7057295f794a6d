"""Script calls that are made in one turn of the event loop, in one write.

Owns that grouping. Refuses to own what a script means and how long one is patient: a group that got no answer is
repeated as a whole, which each of its scripts allows. A caller that is cancelled leaves its answer to be dropped. One
event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from orchestra._redis.errors import ReplyError, reply_error
from orchestra._redis.link import Call, Link, in_doubt

if TYPE_CHECKING:
    from orchestra._scripts import Arg, Script
    from orchestra.errors import StoreError

MOST: Final = 200
"""Calls in one write: bounds how long one answer waits for the others of its group."""


class Pipeline:
    """Calls over ``link``, repeated while Redis is away for up to ``patience`` seconds."""

    def __init__(self, link: Link, patience: float) -> None:
        self._link = link
        self._patience = patience
        self._waiting: list[tuple[Call, asyncio.Future[Any]]] = []
        self._under_way: set[asyncio.Task[None]] = set()

    async def script(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run one script; see :meth:`~orchestra._redis.link.Link.script`."""
        self._link.check_loop()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((Call(script, keys, args), future))
        if len(self._waiting) == 1:
            loop.call_soon(self._flush)
        return await future

    def _flush(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            task = asyncio.get_running_loop().create_task(self._run(group))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _run(self, group: list[tuple[Call, asyncio.Future[Any]]]) -> None:
        calls = [call for call, _ in group]
        try:
            replies, again = await self._link.patiently(lambda: self._link.run(calls), self._patience)
        except BaseException as error:
            for _, future in group:
                if not future.done():
                    future.set_exception(error if isinstance(error, Exception) else ConnectionError("closed"))
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), reply in zip(group, replies, strict=True):
            if future.done():
                continue  # its caller was cancelled
            if isinstance(reply, ReplyError):
                future.set_exception(self._error(reply, again=again))
            else:
                future.set_result(reply)

    def _error(self, reply: ReplyError, *, again: bool) -> StoreError:
        error = reply_error(reply, self._link.manager.address.safe)
        told = in_doubt(error) if again else error
        told.__cause__ = reply
        return told
