"""Forgets the names of consumers that died long ago, so that restarts do not pile them up.

Owns who counts as dead: no sign of life for ten leases, and ten minutes, by the Redis clock. Refuses to own pending
entries: a consumer that still has some is kept (``lua/retire.lua``), until they have been taken over. Bounded work a run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from orchestra import telemetry
from orchestra._keys import QueueKeys
from orchestra._redis.link import Call, Link
from orchestra._redis.wire import Command, ReplyError, pack
from orchestra._scripts import script

DEAD_LEASES = 10
DEAD_MS = 600_000
MOST = 100
"""Names that one run forgets at most."""
SCAN_CONSUMERS = 10_000
"""A stream with more names than this is not searched: XINFO CONSUMERS cannot be paged, and would stop Redis for long."""


class Reaper:
    """Reaps the consumers of one queue."""

    def __init__(
        self, queue: str, keys: QueueKeys, group: str, lease_ms: int, link: Callable[[], Awaitable[Link]]
    ) -> None:
        self._queue = queue
        self._keys = keys
        self._group = group
        self._old_ms = max(DEAD_LEASES * lease_ms, DEAD_MS)
        self._link = link

    async def run(self, now_ms: int) -> int:
        """Forget up to 100 dead consumers, ``now_ms`` being the time of Redis; returns how many were looked at.

        Cost: one round trip, two more when there are any, two more when a group has names that no tick has told of.
        """
        link = await self._link()
        names = await self._silent(link, now_ms - self._old_ms)
        if not names:
            return 0
        calls = [Call(script("retire"), (*self._keys.streams, self._keys.consumers), (self._group, n)) for n in names]
        held = await link.run(calls)
        gone = sum(reply == 0 for reply in held)
        if gone:
            telemetry.emit("queue.reaped", {"count": gone}, {"queue": self._queue})
        return len(names)

    async def _silent(self, link: Link, before_ms: int) -> list[bytes]:
        keys = self._keys
        commands: list[Command] = [
            ("ZRANGEBYSCORE", keys.consumers, "-inf", f"({before_ms}", "LIMIT", 0, MOST),
            ("ZCARD", keys.consumers),
            *(("XINFO", "GROUPS", key) for key in keys.streams),
        ]
        names, known, *groups = await link.send(pack(commands), len(commands))
        if isinstance(names, ReplyError) or len(names) == MOST:
            return [] if isinstance(names, ReplyError) else names
        searched = [key for key, rows in zip(keys.streams, groups, strict=True) if self._crowd(rows) > known]
        return [*names, *await self._strangers(link, searched, MOST - len(names))]

    def _crowd(self, groups: Any) -> int:
        """How many names the group has in a stream; 0 where they are too many to be searched."""
        for row in [] if isinstance(groups, ReplyError) else groups:
            facts = _pairs(row)
            if facts[b"name"] == self._group.encode():
                count: int = facts[b"consumers"]
                return count if count <= SCAN_CONSUMERS else 0
        return 0

    async def _strangers(self, link: Link, streams: Sequence[str], most: int) -> list[bytes]:
        """Names in the group that no tick has told of: of consumers that only read, or that came back too late."""
        if not streams:
            return []
        replies = await link.send(pack([("XINFO", "CONSUMERS", key, self._group) for key in streams]), len(streams))
        rows = [_pairs(row) for reply in replies if not isinstance(reply, ReplyError) for row in reply]
        idle: dict[bytes, int] = {}
        for row in rows:  # one that is busy in another stream is alive; pending entries are taken over first
            age = -1 if row[b"pending"] else row[b"idle"]
            idle[row[b"name"]] = min(age, idle.get(row[b"name"], age))
        silent = [name for name, age in idle.items() if age > self._old_ms]
        if not silent:
            return []
        (scores,) = await link.send(pack((("ZMSCORE", self._keys.consumers, *silent),)), 1)
        if isinstance(scores, ReplyError):
            return []
        return [name for name, score in zip(silent, scores, strict=True) if score is None][:most]


def _pairs(flat: Sequence[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
