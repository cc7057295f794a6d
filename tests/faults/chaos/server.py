"""The redis-server under test, and what is read from it at the end, past every proxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import redis

from orchestra._delivery import read_record
from orchestra._keys import QueueKeys
from orchestra.connections import ConnectionManager
from orchestra.task_queue import RedisStreamTaskQueue
from tests.conftest import PrivateServer
from tests.faults.chaos.history import Heartbeat, History
from tests.faults.chaos.worker import GROUP, QUEUE

KEYS = QueueKeys(QUEUE)


class Server:
    """A server with an append-only file, that may be killed, stopped and started again."""

    def __init__(self, fsync: str) -> None:
        self._server = PrivateServer("--appendonly", "yes", "--appendfsync", fsync, "--maxmemory-policy", "noeviction")
        self._stopped = False

    @property
    def url(self) -> str:
        """Past every proxy."""
        return self._server.url

    def start(self) -> None:
        """Start, and wait until it answers; what it had is there again."""
        self._server.start()
        end = time.monotonic() + 30
        while True:
            try:
                if self.ask("PING"):
                    return
            except redis.RedisError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def ask(self, *command: Any) -> Any:
        """One command on a connection of its own; redis.RedisError when it fails or takes longer than 10 s."""
        with redis.Redis(
            unix_socket_path=self._server.socket, socket_timeout=10, client_name="chaos-driver", protocol=2
        ) as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """SIGKILL."""
        self._server.kill()

    def freeze(self) -> None:
        """SIGSTOP."""
        os.kill(self._server.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self._server.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it and remove its directory."""
        if self._server.process is not None and self._server.process.poll() is None:
            self.thaw()
        self._server.stop()

    def log(self) -> str:
        """What it wrote."""
        return (self._server.dir / "log").read_text("utf-8", "replace")


class Pulse(Heartbeat):
    """A heartbeat that also asks the server: when the machine starves it, everybody suffers."""

    def __init__(self, history: History, tolerated: float, server: Server) -> None:
        super().__init__(history, tolerated)
        self._server = server

    def _beat(self) -> None:
        with contextlib.suppress(redis.RedisError):
            self._server.ask("PING")


@dataclass(kw_only=True)
class Final:
    """What is in Redis at the end."""

    waiting: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    delayed: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    adds_up: bool = True
    letters: list[dict[str, Any]] = field(default_factory=list)
    """Dead letters: ``uid reason attempts generation``."""
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task id → terminal record."""
    visible: list[str] = field(default_factory=list)
    """uids of tasks that have not ended."""
    no_ttl: list[str] = field(default_factory=list)
    """Keys without a time to live that should have one."""
    consumers: list[str] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    """Names of connections that should be gone."""
    quiet: bool = True
    """Whether everything had ended within the limit."""


PERMANENT = {*KEYS.streams, KEYS.counters, KEYS.dlq, KEYS.consumers}
"""Keys that may stay for ever; each is bounded by something else."""


async def read_final(url: str) -> Final:
    """Everything that the checker wants to know."""
    final = Final()
    async with ConnectionManager(url, client_name="chaos-driver") as manager:
        queue = RedisStreamTaskQueue(QUEUE, GROUP, manager=manager)
        stats = await queue.stats()
        final.waiting, final.pending, final.delayed = list(stats.waiting), list(stats.in_flight), stats.delayed
        final.counters, final.adds_up = stats.counters, stats.adds_up
        final.letters = [_letter(letter) for letter in await _all_letters(queue)]
        await _keyspace(manager.client, final)
        await queue.close()
    return final


async def _all_letters(queue: RedisStreamTaskQueue) -> list[Any]:
    found: list[Any] = []
    while more := await queue.read_dlq(500, found[-1].message_id if found else None):
        found += more
    return found


def _letter(letter: Any) -> dict[str, Any]:
    data = letter.task_data or {}
    uid = (data.get("input") or {}).get("uid")
    return {"uid": uid, "reason": letter.reason, "attempts": letter.attempts, "error": letter.error_info.get("error")}


async def _keyspace(client: Any, final: Final) -> None:
    prefix = KEYS.result("")
    async for raw in client.scan_iter(count=1000):
        key = raw.decode()
        if key.startswith(prefix):
            final.records[key.removeprefix(prefix)] = read_record(await client.get(raw))
        if key not in PERMANENT and await client.pttl(raw) < 0:
            final.no_ttl.append(key)
    for lane in KEYS.streams:
        try:
            final.consumers += [row["name"].decode() for row in await client.xinfo_consumers(lane, GROUP)]
        except redis.ResponseError:
            continue  # no group, no consumers
        for _, fields in await client.xrange(lane, count=50):
            final.visible.append(_uid(fields.get(b"t", b"")))
    for name in await client.zrange(KEYS.delayed, 0, 50):
        final.visible.append(name.decode())
    names = [row["name"] for row in await client.client_list()]
    final.clients = [name for name in names if not name.startswith("chaos-driver")]


def _uid(frame: bytes) -> str:
    """The uid inside a frame, without decoding it: uids look like nothing else."""
    start = frame.find(b"uid")
    return (
        frame[start + 4 : start + 24].split(b"\xa4")[0].decode("ascii", "replace") if start >= 0 else repr(frame[:40])
    )


async def wait_quiet(server: Server, seconds: float) -> bool:
    """Until nothing waits, runs or is delayed; False when that takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lengths = [await asyncio.to_thread(server.ask, "XLEN", lane) for lane in KEYS.streams]
        if sum(lengths) + await asyncio.to_thread(server.ask, "ZCARD", KEYS.delayed) == 0:
            return True
        await asyncio.sleep(0.05)
    return False
