"""One proxied connection: its two streams, the commands whose replies are due, and the rules that act on them.

Used by :mod:`tests.faults.proxy` alone, whose top says what can be done. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.faults._resp import Frame, Framer

if TYPE_CHECKING:
    from tests.faults.proxy import Proxy


class Command(NamedTuple):
    """A command on its way: the names it goes by, its connection, and the rule that its reply will meet."""

    names: tuple[str, ...]
    connection: Connection
    rule: Rule | None = None


class Rule:
    """Something that is to happen once."""

    def __init__(self, kind: str, name: str = "*", nth: int = 1, role: str | None = None, **facts: Any) -> None:
        self.kind, self.name, self.left, self.role, self.facts = kind, name, nth, role, facts
        self._happened = asyncio.Event()
        self._wake: Callable[[], None] | None = None
        self.released = False

    @property
    def fired(self) -> bool:
        """Whether it has happened."""
        return self._happened.is_set()

    def fire(self) -> None:
        """It happens now."""
        self._happened.set()

    async def wait(self, seconds: float = 30.0) -> None:
        """Until it has happened; TimeoutError after ``seconds``."""
        async with asyncio.timeout(seconds):
            await self._happened.wait()

    def release(self) -> None:
        """Let go what this rule holds back."""
        self.released = True
        if self._wake is not None:
            self._wake()

    def __repr__(self) -> str:
        return f"<Rule {self.kind} {self.name} {'fired' if self.fired else f'{self.left} to go'} {self.facts}>"


class _End(NamedTuple):
    how: str


class _Hold(NamedTuple):
    rule: Rule | None


_EOF = _End("eof")
BUFFERED = 8 << 20
"""Bytes a direction holds back before it stops reading."""


class Flow:
    """What all connections of a proxy suffer in one direction."""

    def __init__(self) -> None:
        self.byte_rules: list[Rule] = []
        self.clear()

    def clear(self) -> None:
        self.delay = self.jitter = self.rate = 0.0
        self.stalled: set[str | None] = set()


async def _within(event: asyncio.Event, seconds: float | None) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


class _Stream:
    """One direction of one connection: what has arrived, when it is due, how it leaves."""

    def __init__(
        self,
        connection: Connection,
        direction: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.connection, self.direction = connection, direction
        self._reader, self._writer = reader, writer
        self._flow = connection.proxy.flows[direction]
        self._framer = Framer()
        self._items: deque[tuple[float, Any]] = deque()
        self._held = 0
        self._due = self._next = 0.0
        self.wake = asyncio.Event()
        self.ended = False

    def put(self, item: Any, later: float = 0.0) -> None:
        """Queue bytes or an end, due after this direction's latency and ``later`` seconds, never before what is queued."""
        flow, now = self._flow, asyncio.get_running_loop().time()
        latency = flow.delay + (random.uniform(-flow.jitter, flow.jitter) if flow.jitter else 0.0)
        self._due = max(self._due, now + latency + later)
        self._items.append((self._due, item))
        if isinstance(item, bytes):
            self._held += len(item)
        self.wake.set()

    async def pull(self) -> None:
        """Read, find values, let rules act on them."""
        handle = self.connection.command if self.direction == "up" else self.connection.reply
        while True:
            while self._held > BUFFERED:
                await asyncio.sleep(0.005)
            try:
                data = await self._reader.read(1 << 16)
            except OSError:
                self.put(_End("rst"))
                return
            if not data:
                if rest := self._framer.rest():
                    self.put(rest)
                self.put(_EOF)
                return
            for frame in self._framer.feed(data):
                if not handle(self, frame):
                    return

    def _blocked(self) -> float | None:
        """Seconds until the next item may leave; None when something must change first; 0 now."""
        if not self._items or self._flow.stalled & {None, *self.connection.names}:
            return None
        due, item = self._items[0]
        if isinstance(item, _Hold):
            return 0.0 if item.rule is not None and item.rule.released else None
        return max(0.0, max(due, self._next) - asyncio.get_running_loop().time())

    async def push(self) -> None:
        """Write what is due, until the end."""
        while not self.ended:
            self.wake.clear()
            wait = self._blocked()
            if wait is None or wait > 0.0:
                await _within(self.wake, wait)
                continue
            _, item = self._items.popleft()
            if isinstance(item, _End):
                self._finish(item.how)
            elif isinstance(item, bytes):
                self._held -= len(item)
                await self._write(item)

    async def _write(self, data: bytes) -> None:
        rate = self._flow.rate
        if rate and len(data) > (portion := max(1, int(rate / 50))):
            self._items.appendleft((0.0, data[portion:]))
            self._held += len(data) - portion
            data = data[:portion]
        data, end = self._spoil(data)
        if rate:
            self._next = asyncio.get_running_loop().time() + len(data) / rate
        if not self._writer.is_closing():
            with contextlib.suppress(OSError):  # the other end has gone: its own pull says so
                self._writer.write(data)
                await self._writer.drain()
        if end is not None:
            self._finish(end)

    def _spoil(self, data: bytes) -> tuple[bytes, str | None]:
        """Apply the rules that count bytes."""
        for rule in list(self._flow.byte_rules):
            at = rule.left - 1
            rule.left -= len(data)
            if at >= len(data):
                continue
            self._flow.byte_rules.remove(rule)
            rule.fire()
            if rule.kind == "cut_after":
                return data[: at + 1], rule.facts["how"]
            put = rule.facts["put"][: len(data) - at]
            data = data[:at] + put + data[at + len(put) :]
        return data, None

    def _finish(self, how: str) -> None:
        self.ended = how != "stay"
        if how == "eof":
            with contextlib.suppress(OSError, RuntimeError):
                if self._writer.can_write_eof():
                    self._writer.write_eof()
            self.connection.half_ended()
        elif how == "stay":
            self._items.appendleft((0.0, _Hold(None)))
        else:
            self.connection.close(reset=how == "rst")


class Connection:
    """One client's connection and the proxy's own to the server behind it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.name = ""
        self.pending: deque[Command] = deque()
        self._writers: list[asyncio.StreamWriter] = []
        self._streams: dict[str, _Stream] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._subscribed = False
        self._over = asyncio.Event()

    @property
    def names(self) -> set[str]:
        """What ``role=`` may call it."""
        return {self.name, self.name.rpartition(":")[2]}

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry it to its end."""
        self._writers.append(writer)
        try:
            up_reader, up_writer = await self.proxy.dial()
        except OSError:
            self.close(reset=True)
            return
        self._writers.append(up_writer)
        self._streams["up"] = _Stream(self, "up", reader, up_writer)
        self._streams["down"] = _Stream(self, "down", up_reader, writer)
        for stream in self._streams.values():
            self._tasks += [asyncio.ensure_future(stream.pull()), asyncio.ensure_future(stream.push())]
        try:
            await self._over.wait()
        finally:
            self.close(reset=False)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def changed(self) -> None:
        """A mode has changed: look again at what is held back."""
        for stream in self._streams.values():
            stream.wake.set()

    def half_ended(self) -> None:
        """One direction is over; with the other over too, so is the connection."""
        if all(stream.ended for stream in self._streams.values()):
            self.close(reset=False)

    def close(self, *, reset: bool) -> None:
        """End both sides, with RST or FIN."""
        for writer in self._writers:
            if reset:
                with contextlib.suppress(OSError):
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # abort() would lose what is still in the buffer of a slow reader; closing sends it first
            (writer.transport.abort if reset else writer.close)()
        self._over.set()

    def reset(self) -> None:
        """RST to both ends."""
        self.close(reset=True)

    def half_close(self, direction: str = "down") -> None:
        """FIN in one direction, behind what is on its way."""
        if direction in self._streams:
            self._streams[direction].put(_EOF)

    def command(self, stream: _Stream, frame: Frame) -> bool:
        """A command has arrived from the client; False ends the reading."""
        names = self._names_of(frame.head)
        if names[:1] == ("CLIENT",) and frame.head[1:2] and frame.head[1].upper() == b"SETNAME":
            self.name = frame.head[2].decode()
        self._subscribed |= "SUBSCRIBE" in names
        rule = self.proxy.matching(names, self)
        command = Command(names, self, rule)
        if rule is not None and rule.kind == "refuse_command":
            rule.fire()
            stream.put(_End(rule.facts["how"]))
            return False
        if rule is not None and rule.kind == "at_command":
            rule.fire()
            rule.facts["call"]()
        self.pending.append(command)
        self.proxy.commands.update(names)
        self.proxy.tell("up", command)
        stream.put(frame.data)
        return True

    def _names_of(self, head: tuple[bytes, ...]) -> tuple[str, ...]:
        if not head:
            return ("?", "*")
        name = head[0].decode("ascii", "replace").upper()
        known = self.proxy.script_of(name, head)
        return (name, known, "*") if known else (name, "*")

    def reply(self, stream: _Stream, frame: Frame) -> bool:
        """A reply, or a published message, has arrived from the server; False ends the reading."""
        pushed = frame.data[:1] == b">" or (self._subscribed and frame.head[:1] == (b"message",))
        if pushed or not self.pending:
            stream.put(frame.data)
            return True
        command = self.pending.popleft()
        if frame.data.startswith(b"-NOSCRIPT"):  # not executed: the call comes again with the script's text
            if command.rule is not None and command.rule.kind.endswith("_reply"):
                self.proxy.rearm(command.rule)
            self.proxy.commands.subtract(command.names)
            stream.put(frame.data)
            return True
        if command.rule is not None and command.rule.kind.endswith("_reply"):
            return self._obey(stream, frame, command)
        stream.put(frame.data)
        self._count(command)
        return True

    def _count(self, command: Command) -> None:
        self.proxy.replies.update(command.names)
        self.proxy.tell("down", command)

    def _obey(self, stream: _Stream, frame: Frame, command: Command) -> bool:
        rule, data = command.rule, frame.data
        assert rule is not None
        rule.fire()
        if rule.kind in {"drop_reply", "truncate_reply"}:
            if keep := data[: rule.facts["keep"]]:
                stream.put(keep)
            stream.put(_End(rule.facts["how"]))
            return rule.facts["how"] == "stay"
        if rule.kind == "corrupt_reply":
            at, put = rule.facts["offset"], rule.facts["put"]
            data = data[:at] + put + data[at + len(put) :]
        elif rule.kind == "hold_reply":
            rule._wake = stream.wake.set
            stream.put(_Hold(rule))
        elif rule.kind == "at_reply":
            rule.facts["call"]()
        stream.put(data, rule.facts.get("seconds", 0.0))
        self._count(command)
        return True
