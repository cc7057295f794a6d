"""A connection that comes back: one role's :class:`~orchestra._redis.wire.Wire`, opened on demand and replaced.

Decides when to connect, how long to be patient and what to do when the server has forgotten a script. A caller that is
cancelled leaves its reply to be received and dropped in order, so a shared link survives it. Belongs to one event loop,
and to the process that made it.
However many callers wait, there is one attempt to connect at a time, whose end is everybody's; between failed attempts
lies a pause that grows to a second (full jitter), in which callers are told of the last failure at once. An outage is
one line in the log, and so are ten of them within :data:`SAY_AGAIN`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from orchestra import telemetry
from orchestra._backoff import Reconnect
from orchestra._redis.wire import ReplyError, Wire, forks, reply_error
from orchestra._scripts import Arg, Script, forgotten
from orchestra.errors import ForkedProcessError, StoreError, StoreFullError, StoreUnavailableError, WrongLoopError

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

T = TypeVar("T")
logger = logging.getLogger("orchestra.link")

CONNECT_PAUSE = 1.0
"""Seconds that lie between two failed attempts to connect, at most."""
SAY_AGAIN = 10.0
"""Seconds between two warnings about the same connection, at least."""


class Call(NamedTuple):
    """One script call of a pipeline."""

    script: Script
    keys: Sequence[str]
    args: Sequence[Arg]

    def pack(self) -> bytes:
        """As bytes, by hash."""
        return self.script.pack(self.keys, self.args)

    def pack_with_text(self) -> bytes:
        """As bytes, for a server that has forgotten the script."""
        return self.script.pack_with_text(self.keys, self.args)


class Link:
    """The connection for one ``role`` of ``queue``; ``on_reopened`` is told of every connection after the first."""

    def __init__(
        self, manager: ConnectionManager, role: str, queue: str, on_reopened: Callable[[], None] | None = None
    ) -> None:
        self.manager = manager
        self.role = role
        self._queue = queue
        self._wire: Wire | None = None
        self._opening = asyncio.Lock()
        self._pause = Reconnect(cap=CONNECT_PAUSE)
        self._open_at = 0.0
        self._failure: StoreUnavailableError | None = None
        self._failures = 0
        self._down_since: float | None = None
        self._said_at = float("-inf")
        self._opened = False
        self._forks = forks()
        self._home: asyncio.AbstractEventLoop | None = None
        self._on_reopened = on_reopened

    async def wire(self) -> Wire:
        """The open connection, opening it if need be; one attempt, shared with everybody who waits for it.

        Raises:
            StoreUnavailableError: it cannot be reached now, or could not a moment ago.
            StoreAuthError: it refuses us.
            ForkedProcessError: this process is a child of the one that made the link.
            WrongLoopError: it is open in another event loop.
        """
        self.check_loop()
        wire = self._wire
        if wire is not None and not wire.closed:
            return wire
        failures = self._failures
        async with self._opening:
            if self._wire is not None and not self._wire.closed:
                return self._wire
            if self._failure is not None and (failures != self._failures or self._wait_to_open() > 0):
                raise StoreUnavailableError(str(self._failure)) from self._failure
            self._wire = await self._open()
            return self._wire

    def ready(self) -> Wire | None:
        """The connection, if it is open, takes more, and belongs to the running loop and this process."""
        wire = self._wire
        if wire is None or self._home is not asyncio._get_running_loop():  # None, not an error, in a forked child
            return None
        return wire if wire.ready else None

    def check_loop(self, *, closing: bool = False) -> None:
        """Refuse another process and another loop than its own; ``closing`` forgives a loop that is gone.

        Raises:
            ForkedProcessError, WrongLoopError: see :meth:`wire`.
        """
        child = self._forks != forks()
        if closing and (child or self._home is None or self._home.is_closed()):
            return
        if child:
            raise ForkedProcessError(
                f"queue {self._queue!r} belongs to the parent process, with its connections and its event loop: make "
                "the queue in the process that uses it"
            )
        loop = asyncio.get_running_loop()
        if self._home is None:
            self._home = loop
        elif self._home is not loop:
            raise WrongLoopError(
                f"queue {self._queue!r} is open in another event loop: make a queue for each loop, or close() it there "
                "first; from another thread, use asyncio.run_coroutine_threadsafe"
            )

    def _wait_to_open(self) -> float:
        """Seconds until the next attempt to connect is allowed."""
        return self._open_at - asyncio.get_running_loop().time()

    async def _open(self) -> Wire:
        now = asyncio.get_running_loop().time
        if self._down_since is None and self._opened:
            self._down_since = now()
        try:
            wire = await self.manager.open_wire(self.role)
        except StoreUnavailableError as error:
            self._failure = error
            self._failures += 1
            self._open_at = now() + self._pause.next()
            raise
        if self._opened:
            facts = {"outage_s": now() - (self._down_since or now()), "attempts": self._pause.failures}
            telemetry.emit("queue.reconnected", facts, {"queue": self._queue, "role": self.role})
            if self._on_reopened is not None:
                self._on_reopened()
        self._opened, self._down_since, self._failure = True, None, None
        self._pause.reset()
        return wire

    async def send(
        self,
        packed: bytes,
        count: int,
        timeout: float | None = None,
        *,
        shared: bool = True,
        arrived: Callable[[list[Any]], object] | None = None,
    ) -> list[Any]:
        """Send packed commands once; error replies are elements of the list.

        A ``shared`` connection survives the caller's cancellation; another is thrown away. ``arrived``: as of
        :meth:`Wire.send_nowait`.
        """
        if self._home is not asyncio._get_running_loop():  # None, not an error, in a forked child
            self.check_loop()
        wire = self._wire
        if wire is None or wire.closed:
            wire = await self.wire()
        if not wire.writable:
            await wire.drain()
        return await wire.send_nowait(packed, count, timeout=timeout, shared=shared, arrived=arrived)

    async def patiently(self, attempt: Callable[[], Awaitable[T]], patience: float) -> tuple[T, bool]:
        """Repeat ``await attempt()`` while Redis is unavailable, for up to ``patience`` seconds.

        Returns the result and whether it took more than one attempt; a repeated attempt may find its work done.
        """
        try:
            return await attempt(), False
        except ForkedProcessError:
            raise
        except StoreUnavailableError as error:
            return await self._again(attempt, patience, error), True

    async def _again(self, attempt: Callable[[], Awaitable[T]], patience: float, error: StoreUnavailableError) -> T:
        clock, backoff = asyncio.get_running_loop().time, Reconnect()
        deadline = clock() + patience
        while True:
            wait = self._wait_to_open()  # together with all others: one of them connects, for all
            if wait <= 0:
                wait = backoff.next()  # it was reached, and broke off or had no time for us
            if clock() + wait > deadline:
                raise error
            self._say(error, patience)
            await asyncio.sleep(wait)
            try:
                return await attempt()
            except StoreUnavailableError as again:
                error = again

    def _say(self, error: StoreUnavailableError, patience: float) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._said_at >= SAY_AGAIN:
            logger.warning("%s: %s; trying again for %.0f s", self._queue, error, patience)
        self._said_at = now

    async def run(self, calls: Sequence[Call]) -> list[Any]:
        """Run scripts in one round trip; those the server has forgotten once more, with their text.

        Returns their replies; error replies are elements of the list. Raises StoreUnavailableError.
        """
        replies = await self.send(b"".join([call.pack() for call in calls]), len(calls))
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, ReplyError) and forgotten(reply)]
        if unknown:
            packed = b"".join([calls[i].pack_with_text() for i in unknown])
            for i, reply in zip(unknown, await self.send(packed, len(unknown)), strict=True):
                replies[i] = reply
        return replies

    async def script(self, script: Script, keys: Sequence[str], args: Sequence[Arg], patience: float = 0.0) -> Any:
        """Run one script; being idempotent, it is repeated while Redis is unavailable, up to ``patience`` seconds.

        Raises:
            StoreError: an error reply (StoreFullError, StoreAuthError, … by its kind).
            StoreUnavailableError: no answer; also when a repeat met full memory, because the first attempt may have run.
        """
        wire = self.ready()
        if wire is not None:  # without the coroutines of the general case: a single task is a matter of latency
            try:
                reply = (await wire.send_nowait(script.pack(keys, args), 1, shared=True, prompt=True))[0]
                if not isinstance(reply, ReplyError):
                    return reply
                if not forgotten(reply):
                    raise reply_error(reply, self.manager.address.safe) from reply
            except ForkedProcessError:
                raise
            except StoreUnavailableError as error:
                return await self._again(self._attempts(Call(script, keys, args), 1), patience, error)
        return (await self.patiently(self._attempts(Call(script, keys, args)), patience))[0]

    def _attempts(self, call: Call, made: int = 0) -> Callable[[], Awaitable[Any]]:
        """One attempt after the other at ``call``, of which ``made`` may have been executed."""

        async def attempt() -> Any:
            nonlocal made
            made += 1
            reply = (await self.run((call,)))[0]
            if isinstance(reply, ReplyError):
                error = reply_error(reply, self.manager.address.safe)
                raise in_doubt(error) if made > 1 else error from reply
            return reply

        return attempt

    async def close(self) -> None:
        """Close the connection; the next use opens a new one."""
        self.check_loop(closing=True)
        lost = self._home is not None and self._home.is_closed()  # its sockets went with it
        wire, self._wire = self._wire, None
        if wire is not None and not lost:
            await wire.aclose()
        self._opened = False
        self._home = None


def in_doubt(error: StoreError) -> StoreError:
    """What ``error`` means as the answer to a repeat: full memory refuses a script before it can tell what it did before."""
    if not isinstance(error, StoreFullError):
        return error
    return StoreUnavailableError(f"an earlier attempt got no answer and may have been executed; now {error}")
