"""One hot connection: packed commands out, replies in, matched by order. The event loop's thread only.

Owns a socket, a ``hiredis.Reader`` and the queue of batches whose replies are due. Refuses to own reconnecting (the
owner does that, with backoff), pub/sub, RESP3 pushes, and the meaning of a command.
Invariant: every command written has exactly one slot for its reply, and a slot is never abandoned while the connection
lives. A timeout, a cancelled waiter, a protocol error or an unasked-for reply closes the connection and fails
everything that is pending, so no reply can reach a caller that did not ask for it (CVE-2023-28858, CVE-2023-28859 in
redis-py were exactly that). What RESP2 does not have (pushes, maps, sets, doubles, booleans) is a protocol error: it
means that bytes were damaged or that this is not the connection we opened.
A length that lies costs address space at most: a string is stored as it arrives, a list is filled as it arrives.
There is one future for a batch, not for a reply, and one timer for a connection, not for a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import hiredis

from orchestra._redis.batch import Batch, Prompt
from orchestra._redis.endpoint import Endpoint, attach
from orchestra._redis.errors import ReplyError, reply_code, reply_error
from orchestra.errors import (
    ConfigurationError,
    ForkedProcessError,
    StoreAuthError,
    StoreError,
    StoreUnavailableError,
)

__all__ = ["Command", "Endpoint", "ReplyError", "Wire", "forks", "pack", "reply_code", "reply_error"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Argument: TypeAlias = "str | bytes | float | memoryview"
Command: TypeAlias = tuple[Argument, ...]

# hiredis's own stub says that a command is a tuple of one element.
_pack_command: Callable[[Command], bytes] = cast("Any", hiredis.pack_command)

_MORE = object()
_READ_SIZE = 256 * 1024  # a reply to XREADGROUP COUNT 500 fits
_WRITE_HIGH = 1 << 20
_GRACE = 0.05  # s; see Wire._sweep
_FOREIGN = frozenset({hiredis.PushNotification, dict, float, bool})  # hiredis makes them of RESP3 only


def pack(commands: Iterable[Command]) -> bytes:
    """``commands`` as RESP bytes, to be sent any number of times. About 0.3 µs a command."""
    return b"".join(map(_pack_command, commands))


class Wire(asyncio.BufferedProtocol):
    """A connection to one server. Made by :meth:`connect`; dead for good once :attr:`closed`.

    Not for use from other threads. ``on_close(wire, error)`` is called once, soon after the connection ended;
    ``error`` is None when :meth:`close` ended it. It may be set at any time before.
    """

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._pending: deque[Batch] = deque()
        self._reader: Any = hiredis.Reader(notEnoughData=_MORE)
        self._buffer = memoryview(bytearray(_READ_SIZE))  # a bytearray would be copied when asyncio's TLS slices it
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._writable = asyncio.Event()
        self._lost = asyncio.Event()
        self._reason: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._late: Batch | None = None
        self._born = self._loop.time()
        self.endpoint = endpoint
        self.on_close: Callable[[Wire, StoreUnavailableError | None], object] | None = None

    @classmethod
    async def connect(cls, endpoint: Endpoint, *, timeout: float = 10.0, connect_timeout: float = 5.0) -> Wire:
        """Connect and greet (AUTH, SELECT, CLIENT SETNAME: one round trip).

        ``timeout``: seconds a reply may take when a call says nothing else. ``connect_timeout``: seconds for all this.

        Raises: StoreUnavailableError (not reached, TLS refused, too slow, or a replica where ``master_only``),
        StoreAuthError (AUTH refused or missing), ConfigurationError (no such ``db``).
        """
        wire = cls(endpoint, timeout)
        try:
            async with asyncio.timeout(connect_timeout):
                await attach(wire, endpoint)
                await wire._greet()
        except TimeoutError as exc:
            wire._abort("it did not answer in time")
            raise StoreUnavailableError(
                f"{endpoint.label} did not answer within {connect_timeout:g} s: is it running, and is the way open?"
            ) from exc
        except OSError as exc:
            wire._abort("connecting failed")
            if isinstance(exc, StoreError):
                raise
            raise StoreUnavailableError(
                f"cannot connect to {endpoint.label}: {exc}. Is the server running there?"
            ) from exc
        except BaseException:
            wire._abort("greeting failed")
            raise
        return wire

    # What callers use

    @property
    def closed(self) -> bool:
        """True once nothing can be sent any more."""
        return self._reason is not None

    @property
    def ready(self) -> bool:
        """Neither :attr:`closed` nor too full to take more at once."""
        return self._reason is None and not self._paused

    @property
    def age(self) -> float:
        """Seconds since the connection was opened."""
        return self._loop.time() - self._born

    @property
    def in_flight(self) -> int:
        """How many batches wait for replies."""
        return len(self._pending)

    def send_nowait(
        self,
        packed: bytes,
        count: int,
        *,
        timeout: float | None = None,
        shared: bool = False,
        arrived: Callable[[list[Any]], object] | None = None,
        prompt: bool = False,
    ) -> asyncio.Future[list[Any]]:
        """Write ``packed``, which holds ``count`` >= 1 commands, and return the future list of their replies.

        Error replies are elements of the list (:data:`ReplyError`), never raised. Cancelling the future closes the
        connection. Writes without regard to :attr:`writable`. A batch does not time out before those ahead of it,
        because their replies come first. ``arrived`` is called with the replies as they arrive, a turn of the event loop
        before whoever awaits the future; not when that was cancelled. It must not raise. ``prompt``: for one task that
        awaits the future at once; it goes on in the turn in which its reply arrives, if nothing else was under way.

        Raises: StoreUnavailableError when closed (ForkedProcessError in a child of the process that opened it);
        ValueError for a ``count`` below 1. Cost: about 1.5 µs and a write.
        """
        transport = self._transport
        if self._reason is not None or transport is None:
            raise self._gone()
        if count < 1:
            raise ValueError(f"a batch holds at least one command, got count={count!r}")
        batch: Batch
        if prompt and not self._pending:  # else it could overtake the waiter of an earlier reply that came with its own
            batch = Prompt(loop=self._loop)
            batch.waiter = None
        else:
            batch = Batch(loop=self._loop)
        batch.abandon, batch.count, batch.replies = self._abort, count, []
        batch.shared, batch.arrived = shared, arrived
        deadline = self._loop.time() + (self._timeout if timeout is None else timeout)
        if self._pending:
            deadline = max(deadline, self._pending[-1].deadline)
        batch.deadline = deadline
        self._pending.append(batch)
        if deadline < self._timer_at:
            self._arm(deadline)
        transport.write(packed)
        return batch

    async def pipeline(
        self,
        commands: Iterable[Command] | bytes,
        count: int | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Any]:
        """Send many commands (or packed bytes holding ``count`` of them) and return their replies in order.

        An error reply is an element of the list, a :data:`ReplyError`: see :func:`reply_code`, :func:`reply_error`.
        One write, one round trip; waits first while the socket takes no more.

        Raises: StoreUnavailableError; ValueError when packed bytes come without ``count``.
        """
        if isinstance(commands, bytes):
            if count is None:
                raise ValueError("packed bytes need count=, the number of commands in them")
            packed = commands
        else:
            parts = list(map(_pack_command, commands))
            packed, count = b"".join(parts), len(parts)
            if not parts:
                return []
        if self._paused:
            await self.drain()
        return await self.send_nowait(packed, count, timeout=timeout)

    async def call(self, *args: Argument, timeout: float | None = None) -> Any:
        """Send one command and return its reply; ``timeout`` in seconds (block + margin for a blocking read).

        Raises: StoreAuthError, StoreFullError, StoreUnavailableError or StoreError for an error reply (its code:
        :func:`reply_code`); StoreUnavailableError when the connection is or goes down. One round trip.
        """
        if self._paused:
            await self.drain()
        reply = (await self.send_nowait(_pack_command(args), 1, timeout=timeout))[0]
        if isinstance(reply, ReplyError):
            raise reply_error(reply, self.endpoint.label)
        return reply

    @property
    def writable(self) -> bool:
        """False while the send buffer is above its high-water mark of 1 MiB."""
        return not self._paused

    async def drain(self) -> None:
        """Wait until the send buffer has room. Raises StoreUnavailableError when the connection goes down."""
        while self._paused and self._reason is None:
            await self._writable.wait()
        if self._reason is not None:
            raise self._gone()

    def close(self) -> None:
        """Close now. Whoever still waits for a reply gets StoreUnavailableError. Idempotent."""
        self._abort("closed by its owner", failed=False)

    async def aclose(self) -> None:
        """:meth:`close`, then wait until the socket is closed."""
        self.close()
        if self._transport is not None:
            await self._lost.wait()

    def __repr__(self) -> str:
        state = f"closed: {self._reason}" if self._reason is not None else f"{len(self._pending)} in flight"
        return f"<Wire {self.endpoint.label} {state}>"

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio's protocol interface."""
        self._transport = cast("asyncio.Transport", transport)
        if self._reason is not None:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH)
        _open_wires.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Part of asyncio's protocol interface."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Part of asyncio's protocol interface: hand the replies in the buffer to their batches."""
        reader, pending = self._reader, self._pending
        try:
            reader.feed(self._buffer, 0, nbytes)
            while pending:
                batch = pending[0]
                got = batch.replies
                if batch.count == 1:  # who sends one command waits for it
                    if (reply := reader.gets()) is _MORE:
                        return
                    got.append(reply)
                else:
                    got.extend(islice(iter(reader.gets, _MORE), batch.count - len(got)))
                    if len(got) < batch.count:
                        return
                if (type(got[0]) in _FOREIGN) if batch.count == 1 else not _FOREIGN.isdisjoint(map(type, got)):
                    self._abort("it does not speak Redis's protocol: RESP3 on a RESP2 connection")
                    return
                if len(pending) == 1:
                    break  # who sends too much may have sent this one wrongly: look first
                pending.popleft()
                batch.resolve(last=False)
            stray = reader.gets()
        except (hiredis.ProtocolError, MemoryError, TypeError) as exc:  # 2^32 elements do not fit, nor a list as a key
            self._abort(f"it does not speak Redis's protocol: {exc or 'a list of absurd length'}")
            return
        if stray is not _MORE:
            self._abort(f"it sent a reply nobody asked for: {stray!r}"[:200])
        elif pending:
            pending.popleft().resolve(last=True)

    def eof_received(self) -> bool:
        """Part of asyncio's protocol interface."""
        self._abort("it closed the connection")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio's protocol interface."""
        words = self._last_words() if isinstance(exc, ConnectionError) else ""
        self._abort(words or (f"the connection broke: {exc}" if exc else "it closed the connection"))
        self._lost.set()
        _open_wires.discard(self)

    def _last_words(self) -> str:
        """What a server said before it hung up, where writing failed first: its reason (``maxclients``) lies unread."""
        if self._transport is None or self.endpoint.tls is not None or self._reason is not None:
            return ""
        with contextlib.suppress(OSError):
            said = os.read(self._transport.get_extra_info("socket").fileno(), 200)
            if said.startswith(b"-ERR "):
                return f"it hung up, saying {said[1:].splitlines()[0].decode('utf-8', 'replace')!r}"
        return ""

    def pause_writing(self) -> None:
        """Part of asyncio's protocol interface."""
        self._paused = True
        self._writable.clear()

    def resume_writing(self) -> None:
        """Part of asyncio's protocol interface."""
        self._paused = False
        self._writable.set()

    # Inside

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._sweep)

    def _sweep(self) -> None:
        """Look at the oldest deadline only: later batches cannot be answered, nor time out, before it.

        A loop that was blocked past the deadline finds this timer and the reply ready at once, and uvloop runs timers
        first; hence a late batch gets one short grace, in which what has arrived is read.
        """
        self._timer, self._timer_at = None, float("inf")
        if not self._pending:
            return
        head, now = self._pending[0], self._loop.time()
        if now < head.deadline:
            self._arm(head.deadline)
        elif self._late is not head:
            self._late = head
            self._arm(now + _GRACE)
        else:
            self._abort("no reply came before the deadline")

    def _gone(self) -> StoreUnavailableError:
        if self._reason is _FORKED:
            return ForkedProcessError(
                f"this connection to {self.endpoint.label} belongs to the parent process, which uses it: make the "
                "queue and its connections in the process that uses them"
            )
        return StoreUnavailableError(
            f"connection to {self.endpoint.label} is closed: {self._reason or 'never opened'}. "
            "What was sent may have been executed; open a new connection and repeat what may be repeated"
        )

    def _abort(self, reason: str, *, failed: bool = True) -> None:
        if self._reason is not None:
            return
        self._reason = reason
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
        self._late = None
        for batch in self._pending:
            batch.fail(self._gone())
        self._pending.clear()
        self._writable.set()
        if self.on_close is not None and not self._loop.is_closed():
            self._loop.call_soon(self.on_close, self, self._gone() if failed else None)

    async def _greet(self) -> None:
        """AUTH, SELECT, CLIENT SETNAME, ROLE as far as needed. A refused name or ROLE is no obstacle."""
        end = self.endpoint
        steps: list[Command] = []
        if end.password is not None:
            steps.append(("AUTH", end.username, end.password) if end.username else ("AUTH", end.password))
        if end.db:
            steps.append(("SELECT", end.db))
        steps.append(("CLIENT", "SETNAME", end.client_name or "orchestra"))
        if end.master_only:
            steps.append(("ROLE",))
        for step, reply in zip(steps, await self.pipeline(steps), strict=True):
            if isinstance(reply, ReplyError):
                self._refused(step, reply)
            elif step[0] == "ROLE" and reply[0] != b"master":
                raise StoreUnavailableError(f"{end.label} is no master (yet): try again after the failover")

    def _refused(self, step: Command, reply: Exception) -> None:
        error = reply_error(reply, self.endpoint.label)
        if step[0] == "AUTH" and not isinstance(error, StoreUnavailableError):
            raise StoreAuthError(
                f"{self.endpoint.label} refused AUTH with {str(reply)!r}: check user and password of the address"
            ) from reply
        if reply_code(reply) in {"NOAUTH", "DENIED"} or isinstance(error, StoreUnavailableError):
            raise error
        if step[0] == "SELECT":
            raise ConfigurationError(
                f"{self.endpoint.label} has no database {self.endpoint.db}: {reply}", field="db", value=self.endpoint.db
            ) from reply


_FORKED = "the process was forked; connections stay with the parent"
_open_wires: weakref.WeakSet[Wire] = weakref.WeakSet()
_left: list[Wire] = []  # kept for ever: their destructors would act on the parent's event loop
_forks = 0


def forks() -> int:
    """How many forks lie between the process that imported this and the present one: a cheap stand-in for its pid."""
    return _forks


def _forget_in_child() -> None:
    """A forked child must not write to its parent's sockets, nor touch the epoll set it shares with it."""
    global _forks  # noqa: PLW0603 - one number a process
    _forks += 1
    for wire in list(_open_wires):
        wire._reason = _FORKED
        wire._pending.clear()
        wire._timer = None
        wire._lost.set()
        _left.append(wire)
    _open_wires.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
