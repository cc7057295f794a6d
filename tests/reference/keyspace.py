"""A whole keyspace as Python values, so that two moments of it, or it and a model, can be compared.

``exact`` compares bytes and expiry times, ``logical`` what the protocol determines: without times, but with every entry,
every pending row with its holder and delivery count, every member and field, and whether a key has a time to live.
:class:`Plain` is the client both use: blocking, one socket, no interpretation of replies.
"""

from __future__ import annotations

import socket
from typing import Any, Self

import hiredis

ReplyError = hiredis.ReplyError


class Plain:
    """Asks a server on a unix socket. Error replies are raised by calling it, and are elements of :meth:`many`."""

    def __init__(self, path: str, *auth: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._reader = hiredis.Reader()
        if auth:
            self("AUTH", *auth)

    def __call__(self, *command: Any) -> Any:
        (reply,) = self.many([command])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def many(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """The replies to commands sent together."""
        self._socket.sendall(b"".join(hiredis.pack_command(command) for command in commands))
        replies = []
        while len(replies) < len(commands):
            reply = self._reader.gets()
            if reply is False:
                self._reader.feed(self._socket.recv(1 << 20))
            else:
                replies.append(reply)
        return replies

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def exact(client: Plain) -> dict[bytes, tuple[bytes, int]]:
    """Key → its serialised value and the moment it expires (-1: never)."""
    names = sorted(client("KEYS", "*"))
    replies = client.many([command for name in names for command in (("DUMP", name), ("PEXPIRETIME", name))])
    return {name: (replies[2 * i], replies[2 * i + 1]) for i, name in enumerate(names)}


READ = {
    b"string": ("GET",),
    b"hash": ("HGETALL",),
    b"list": ("LRANGE", 0, -1),
    b"set": ("SMEMBERS",),
    b"zset": ("ZRANGE", 0, -1, "WITHSCORES"),
    b"stream": ("XRANGE", "-", "+"),
}
ROWS = 1_000_000


def logical(client: Plain, timed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Key → (has a time to live, content); of the sorted sets named in ``timed`` the members only.

    A stream is (entries in order as (id, fields), group → (id → (consumer, deliveries))).
    """
    names = sorted(client("KEYS", "*"))
    heads = client.many([command for name in names for command in (("TYPE", name), ("PTTL", name))])
    kinds = heads[::2]
    reads = [(READ[kind][0], name, *READ[kind][1:]) for name, kind in zip(names, kinds, strict=True)]
    streams = [name for name, kind in zip(names, kinds, strict=True) if kind == b"stream"]
    replies = client.many(reads + [("XINFO", "GROUPS", name) for name in streams])
    groups = dict(zip(streams, replies[len(names) :], strict=True))
    found = {}
    for name, kind, ttl, content in zip(names, kinds, heads[1::2], replies, strict=False):
        if kind == b"stream":
            content = _stream(client, name, content, groups[name])
        elif kind in (b"hash", b"zset"):
            content = dict(zip(content[::2], content[1::2], strict=True))
            if name.decode() in timed:
                content = sorted(content)
        found[name.decode()] = (ttl >= 0, content)
    return found


def _stream(client: Plain, name: bytes, entries: list[Any], groups: list[Any]) -> tuple[Any, Any]:
    pending = {}
    for facts in groups:
        group = facts[1]
        rows = client("XPENDING", name, group, "-", "+", ROWS)
        pending[group.decode()] = {entry: (consumer, count) for entry, consumer, _, count in rows}
    return [(entry, tuple(fields)) for entry, fields in entries], pending
