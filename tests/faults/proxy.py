"""A proxy between a client and redis-server that misbehaves on purpose. RESP-aware, one event loop, no product code.

    async with Proxy(server.url) as proxy:                  # upstream: "unix:///path", "redis://host:port" or a path
        manager = ConnectionManager(proxy.url)              # redis://127.0.0.1:<port>; listen="/path" → unix:///path
        lost = proxy.drop_reply("complete", nth=3)          # arm a rule; it fires once
        ...
        await lost.wait()                                   # "this happened"
    with ProxyThread(server.url) as proxy:                  # the same in a thread of its own, for tests whose own loop
        proxy.do("stall", "down")                           # is blocked; do(name, *args) calls a method in its loop
        rule = proxy.do("drop_reply", "XREADGROUP"); proxy.wait(rule)

Names: a command is known by its name ("XREADGROUP"), a script call also by its script's ("complete", see ``scripts=``,
by default those of the product), every command by "*". ``role=`` restricts to connections whose CLIENT SETNAME is that or
ends in ``:<role>`` ("reader", "commands"; redis-py's are plain "orchestra").
Counts: ``proxy.commands[name]`` passed to the server, ``proxy.replies[name]`` passed to the client;
``await proxy.passed(name, n)`` waits until n replies have. ``proxy.accepted``: connections accepted so far;
``proxy.connections``: those open, with ``.name``, ``.pending``, ``.reset()``, ``.half_close(direction)``.
``proxy.observers``: functions called with ("up" | "down", Command) in the proxy's loop for each command and each reply.

Rules (each returns a Rule: ``await rule.wait(seconds)``, ``rule.fired``, ``rule.release()``); ``nth`` counts matching
commands from now on (a NOSCRIPT answer is none: it is not counted, meets no rule, and the call comes again with the text):
  drop_reply(name, nth=1, how="rst")   executed, never answered: the connection is then reset ("rst"), ended ("fin"), or
                                       stays open and silent ("stay": TCP skips no bytes, so nothing follows either)
  delay_reply(name, nth=1, seconds=1)  this reply, and what follows it on the connection, comes so much later
  hold_reply(name, nth=1)              …comes when ``rule.release()`` is called
  truncate_reply(name, nth=1, keep=1, how="fin")   the first ``keep`` bytes, then the end ("fin", "rst" or "stay")
  corrupt_reply(name, nth=1, offset=0, put=b"\\xff")   bytes replaced from ``offset`` on
  refuse_command(name, nth=1, how="rst")   never executed: the connection ends before the server sees it
  at_command(name, nth, call), at_reply(name, nth, call)   ``call()`` when it passes (a trigger for faults elsewhere)
  cut_after(count, how="rst", direction="down")    the connection that carries the count-th byte from now on ends there
  corrupt_at(count, put=b"\\xff", direction="down")   the count-th byte from now on is another
Modes (until ``heal()``; ``direction``: "up" to the server, "down" to the client, "both"):
  delay(seconds, jitter=0, direction="both")   latency, uniformly spread, order kept
  slow(bytes_per_second, direction="both")
  stall(direction="both", role=None)   black hole: nothing passes, no FIN either; ``heal()`` delivers it late, as TCP does;
                                       ``heal(lose=True)`` resets the connections that were stalled instead
  refuse()                             new connections: ECONNREFUSED
  accept_then_close()                  new connections: accepted, closed at once
Now: reset(role=None) → RST to both ends; half_close(direction="down", role=None) → FIN in one direction only.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

from tests.faults._proxied import Command, Connection, Flow, Rule

__all__ = ["Command", "Connection", "Proxy", "ProxyThread", "Rule"]


class Proxy:
    """See the top of the file. Everything is called in the loop that :meth:`start` ran in."""

    def __init__(self, upstream: str, *, listen: str | None = None, scripts: dict[str, str] | None = None) -> None:
        self._upstream, self._path = _parse(upstream), listen
        self._scripts = _product_scripts() if scripts is None else scripts
        self.flows = {"up": Flow(), "down": Flow()}
        self.commands: Counter[str] = Counter()
        self.replies: Counter[str] = Counter()
        self.accepted = 0
        self.connections: set[Connection] = set()
        self.observers: list[Callable[[str, Command], None]] = []
        self._rules: list[Rule] = []
        self._waiting: list[tuple[str, int, asyncio.Event]] = []
        self._server: asyncio.Server | None = None
        self._reserved: socket.socket | None = None
        self._closing_new = False
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life

    @property
    def url(self) -> str:
        """Where clients connect to."""
        if self._path is not None:
            return f"unix://{self._path}"
        assert self._reserved is not None
        return "redis://{}:{}".format(*self._reserved.getsockname())

    async def start(self) -> Proxy:
        """Listen."""
        if self._path is None and self._reserved is None:
            self._reserved = _bound(0)  # never listens: it keeps the port while connections are refused
        await self._listen()
        return self

    async def close(self) -> None:
        """Stop listening and end every connection."""
        await self._stop_listening()
        for connection in list(self.connections):
            connection.reset()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._reserved is not None:
            self._reserved.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _listen(self) -> None:
        if self._server is not None:
            return
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._server = await asyncio.start_unix_server(self._accept, self._path, limit=1 << 20)
        else:
            assert self._reserved is not None
            sock = _bound(self._reserved.getsockname()[1])
            self._server = await asyncio.start_server(self._accept, sock=sock, limit=1 << 20, backlog=1024)

    async def _stop_listening(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._closing_new:
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        connection = Connection(self)
        self.connections.add(connection)
        self._tasks.add(task)
        try:
            await connection.run(reader, writer)
        finally:
            self.connections.discard(connection)
            self._tasks.discard(task)

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the server."""
        if isinstance(self._upstream, str):
            return await asyncio.open_unix_connection(self._upstream, limit=1 << 20)
        return await asyncio.open_connection(*self._upstream, limit=1 << 20)

    # -- what connections ask

    def script_of(self, name: str, head: tuple[bytes, ...]) -> str | None:
        """The name of the script that a command runs."""
        if name == "EVALSHA":
            return self._scripts.get(head[1].decode("ascii", "replace").lower())
        if name == "EVAL" and len(head) > 1:
            return self._scripts.get(hashlib.sha1(head[1]).hexdigest())
        return None

    def matching(self, names: tuple[str, ...], connection: Connection) -> Rule | None:
        """The rule whose turn this command is; counts it for all others."""
        due = None
        for rule in list(self._rules):
            if rule.name not in names or (rule.role is not None and rule.role not in connection.names):
                continue
            rule.left -= 1
            if rule.left <= 0 and due is None:
                self._rules.remove(rule)
                due = rule
        return due

    def tell(self, direction: str, command: Command) -> None:
        """Something has passed."""
        for observer in self.observers:
            observer(direction, command)
        if direction == "down":
            for row in [row for row in self._waiting if self.replies[row[0]] >= row[1]]:
                self._waiting.remove(row)
                row[2].set()

    async def passed(self, name: str, count: int, seconds: float = 30.0) -> None:
        """Until ``count`` replies to ``name`` have passed in all."""
        if self.replies[name] < count:
            event = asyncio.Event()
            self._waiting.append((name, count, event))
            async with asyncio.timeout(seconds):
                await event.wait()

    # -- rules

    def _arm(self, rule: Rule) -> Rule:
        self._rules.append(rule)
        return rule

    def rearm(self, rule: Rule) -> None:
        """Its command has to come again."""
        self._rules.insert(0, rule)

    def drop_reply(self, name: str = "*", nth: int = 1, how: str = "rst", role: str | None = None) -> Rule:
        """Executed, never answered."""
        return self._arm(Rule("drop_reply", name, nth, role, how=how, keep=0))

    def delay_reply(self, name: str = "*", nth: int = 1, seconds: float = 1.0, role: str | None = None) -> Rule:
        """Answered late."""
        return self._arm(Rule("delay_reply", name, nth, role, seconds=seconds))

    def hold_reply(self, name: str = "*", nth: int = 1, role: str | None = None) -> Rule:
        """Answered on release."""
        return self._arm(Rule("hold_reply", name, nth, role))

    def truncate_reply(
        self, name: str = "*", nth: int = 1, keep: int = 1, how: str = "fin", role: str | None = None
    ) -> Rule:
        """Answered in part."""
        return self._arm(Rule("truncate_reply", name, nth, role, keep=keep, how=how))

    def corrupt_reply(
        self, name: str = "*", nth: int = 1, offset: int = 0, put: bytes = b"\xff", role: str | None = None
    ) -> Rule:
        """Answered wrongly."""
        return self._arm(Rule("corrupt_reply", name, nth, role, offset=offset, put=put))

    def refuse_command(self, name: str = "*", nth: int = 1, how: str = "rst", role: str | None = None) -> Rule:
        """Never executed."""
        return self._arm(Rule("refuse_command", name, nth, role, how=how))

    def at_command(self, name: str, nth: int, call: Callable[[], object], role: str | None = None) -> Rule:
        """Call when the command passes."""
        return self._arm(Rule("at_command", name, nth, role, call=call))

    def at_reply(self, name: str, nth: int, call: Callable[[], object], role: str | None = None) -> Rule:
        """Call when the reply passes."""
        return self._arm(Rule("at_reply", name, nth, role, call=call))

    def cut_after(self, count: int, how: str = "rst", direction: str = "down") -> Rule:
        """End the connection at a byte."""
        rule = Rule("cut_after", nth=count, how=how)
        self.flows[direction].byte_rules.append(rule)
        return rule

    def corrupt_at(self, count: int, put: bytes = b"\xff", direction: str = "down") -> Rule:
        """Change a byte."""
        rule = Rule("corrupt_at", nth=count, put=put)
        self.flows[direction].byte_rules.append(rule)
        return rule

    def release(self, rule: Rule) -> None:
        """Let go the reply that a hold_reply holds."""
        rule.release()

    # -- modes

    def _directions(self, direction: str) -> list[Flow]:
        return list(self.flows.values()) if direction == "both" else [self.flows[direction]]

    def delay(self, seconds: float, jitter: float = 0.0, direction: str = "both") -> None:
        """Latency."""
        for flow in self._directions(direction):
            flow.delay, flow.jitter = seconds, min(jitter, seconds)

    def slow(self, bytes_per_second: float, direction: str = "both") -> None:
        """Little bandwidth."""
        for flow in self._directions(direction):
            flow.rate = bytes_per_second

    def stall(self, direction: str = "both", role: str | None = None) -> None:
        """Black hole."""
        for flow in self._directions(direction):
            flow.stalled.add(role)

    async def refuse(self) -> None:
        """Refuse new connections."""
        await self._stop_listening()

    def accept_then_close(self) -> None:
        """Close new connections at once."""
        self._closing_new = True

    async def heal(self, *, lose: bool = False) -> None:
        """End all modes and disarm all rules. ``lose``: connections that were stalled are reset."""
        stalled = {role for flow in self.flows.values() for role in flow.stalled}
        for flow in self.flows.values():
            flow.clear()
            flow.byte_rules.clear()
        self._rules.clear()
        self._closing_new = False
        for connection in list(self.connections):
            if lose and stalled & {None, *connection.names}:
                connection.reset()
            connection.changed()
        await self._listen()

    # -- now

    def _of(self, role: str | None) -> list[Connection]:
        return [connection for connection in self.connections if role is None or role in connection.names]

    def reset(self, role: str | None = None) -> int:
        """RST to both ends of each connection; returns how many."""
        chosen = self._of(role)
        for connection in chosen:
            connection.reset()
        return len(chosen)

    def half_close(self, direction: str = "down", role: str | None = None) -> int:
        """FIN in one direction of each connection; returns how many."""
        chosen = self._of(role)
        for connection in chosen:
            connection.half_close(direction)
        return len(chosen)


class ProxyThread:
    """A :class:`Proxy` whose loop runs in a thread of its own."""

    def __init__(self, upstream: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-proxy", daemon=True)
        self.proxy = Proxy(upstream, **options)

    def _run(self, coroutine: Any, seconds: float = 30.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(seconds)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self.proxy.start())
        return self

    def __exit__(self, *exc: object) -> None:
        self._run(self.proxy.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return self.proxy.url

    def do(self, name: str, *args: Any, **options: Any) -> Any:
        """Call a method of the proxy in its loop, await it if need be, and return what it returned."""

        async def call() -> Any:
            value = getattr(self.proxy, name)(*args, **options)
            return await value if asyncio.iscoroutine(value) else value

        return self._run(call())

    def wait(self, rule: Rule, seconds: float = 30.0) -> None:
        """Until ``rule`` has happened."""
        self._run(rule.wait(seconds), seconds + 5.0)


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _parse(upstream: str) -> str | tuple[str, int]:
    scheme, _, rest = upstream.rpartition("://")
    if scheme in {"", "unix"}:
        return rest
    host, _, port = rest.partition("/")[0].rpartition("@")[2].partition(":")
    return host, int(port or 6379)


def _product_scripts() -> dict[str, str]:
    from importlib import resources

    from orchestra._scripts import script

    files = (file.name for file in resources.files("orchestra.lua").iterdir())
    return {script(name[:-4]).sha: name[:-4] for name in files if name.endswith(".lua")}
