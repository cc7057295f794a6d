"""A connection that comes back: one role's :class:`~orchestra._wire.Wire`, opened on demand, replaced when it breaks.

Decides when to connect, how long to be patient and what to do when the server has forgotten a script. A caller that is
cancelled leaves its reply to be received and dropped in order, so a shared link survives it. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from orchestra import telemetry
from orchestra._backoff import Reconnect
from orchestra._scripts import Arg, Script, forgotten
from orchestra._wire import ReplyError, Wire, reply_error
from orchestra.errors import StoreUnavailableError

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

T = TypeVar("T")
logger = logging.getLogger("orchestra.link")


class Call(NamedTuple):
    """One script call of a pipeline."""

    script: Script
    keys: Sequence[str]
    args: Sequence[Arg]

    def pack(self) -> bytes:
        """As bytes, by hash."""
        return self.script.pack(self.keys, self.args)


class Link:
    """The connection for one ``role`` of ``queue``; ``on_open`` is told of every connection after the first."""

    def __init__(
        self, manager: ConnectionManager, role: str, queue: str, on_reopened: Callable[[], None] | None = None
    ) -> None:
        self.manager = manager
        self.role = role
        self._queue = queue
        self._wire: Wire | None = None
        self._opening = asyncio.Lock()
        self._backoff = Reconnect()
        self._down_since: float | None = None
        self._opened = False
        self._on_reopened = on_reopened

    async def wire(self) -> Wire:
        """The open connection, opening it if need be; one attempt.

        Raises:
            StoreUnavailableError: it cannot be reached now.
            StoreAuthError: it refuses us.
        """
        wire = self._wire
        if wire is not None and not wire.closed:
            return wire
        async with self._opening:
            if self._wire is None or self._wire.closed:
                self._wire = await self._open()
            return self._wire

    async def _open(self) -> Wire:
        now = asyncio.get_running_loop().time
        if self._down_since is None and self._opened:
            self._down_since = now()
        wire = await self.manager.open_wire(self.role)
        if self._opened:
            facts = {"outage_s": now() - (self._down_since or now()), "attempts": self._backoff.failures}
            telemetry.emit("queue.reconnected", facts, {"queue": self._queue, "role": self.role})
            if self._on_reopened is not None:
                self._on_reopened()
        self._opened, self._down_since = True, None
        self._backoff.reset()
        return wire

    async def send(self, packed: bytes, count: int, timeout: float | None = None, *, shared: bool = True) -> list[Any]:
        """Send packed commands once; error replies are elements of the list.

        A ``shared`` connection survives the caller's cancellation; another is thrown away, and is a loop turn quicker.
        """
        wire = self._wire
        if wire is None or wire.closed:
            wire = await self.wire()
        if not wire.writable:
            await wire.drain()
        replies = wire.send_nowait(packed, count, timeout=timeout)
        return await (asyncio.shield(replies) if shared else replies)

    async def patiently(self, attempt: Callable[[], Awaitable[T]], patience: float) -> tuple[T, bool]:
        """Repeat ``await attempt()`` while Redis is unavailable, for up to ``patience`` seconds.

        Returns the result and whether it took more than one attempt; a repeated attempt may find its work done.
        """
        deadline = asyncio.get_running_loop().time() + patience
        repeated = False
        while True:
            try:
                return await attempt(), repeated
            except StoreUnavailableError as error:
                wait = self._backoff.next()
                if asyncio.get_running_loop().time() + wait > deadline:
                    raise
                if not repeated:
                    logger.warning("%s: %s; trying again for %.0f s", self._queue, error, patience)
                repeated = True
                await asyncio.sleep(wait)

    async def run(self, calls: Sequence[Call]) -> list[Any]:
        """Run scripts in one round trip; those the server has forgotten once more, with their text.

        Returns their replies; error replies are elements of the list. Raises StoreUnavailableError.
        """
        replies = await self.send(b"".join([call.pack() for call in calls]), len(calls))
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, ReplyError) and forgotten(reply)]
        if unknown:
            packed = b"".join([calls[i].script.pack_with_text(calls[i].keys, calls[i].args) for i in unknown])
            for i, reply in zip(unknown, await self.send(packed, len(unknown)), strict=True):
                replies[i] = reply
        return replies

    async def script(self, script: Script, keys: Sequence[str], args: Sequence[Arg], patience: float = 0.0) -> Any:
        """Run one script; being idempotent, it is repeated while Redis is unavailable, up to ``patience`` seconds.

        Raises:
            StoreError: an error reply (StoreFullError, StoreAuthError, … by its kind).
        """
        call = Call(script, keys, args)

        async def attempt() -> Any:
            reply = (await self.run((call,)))[0]
            if isinstance(reply, ReplyError):
                raise reply_error(reply, self.manager.address.safe) from reply
            return reply

        return (await self.patiently(attempt, patience))[0]

    async def close(self) -> None:
        """Close the connection; the next use opens a new one."""
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.aclose()
        self._opened = False
