"""Where one server is, and how a protocol is tied to a socket there.

Owns the socket's options. Refuses to own what is said over it (:mod:`orchestra._redis.wire`) and how addresses are
written (:mod:`orchestra._redis.address`). One event loop.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

_UNIX_SOCKET_BUFFER = 1 << 20  # the default of 208 KiB splits a batch of 500 into several wake-ups


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One server to connect to: ``path`` (a unix socket) if given, else ``host`` and ``port``.

    ``label`` is what errors and logs call it; it must not hold the password. With ``master_only`` a replica is
    refused. Built by :mod:`orchestra.connections` from an address.
    """

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    client_name: str = ""
    master_only: bool = False
    label: str = ""


async def attach(protocol: asyncio.BaseProtocol, endpoint: Endpoint) -> None:
    """Open a socket to ``endpoint`` and tie ``protocol`` to it. Raises OSError when it is not reached."""
    loop = asyncio.get_running_loop()
    if endpoint.path is None:
        transport, _ = await loop.create_connection(
            lambda: protocol,
            endpoint.host,
            endpoint.port,
            ssl=endpoint.tls,
            server_hostname=endpoint.host if endpoint.tls is not None else None,
        )
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SOCKET_BUFFER)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNIX_SOCKET_BUFFER)
        await loop.sock_connect(raw, endpoint.path)
        await loop.create_unix_connection(lambda: protocol, sock=raw)
    except BaseException:
        raw.close()
        raise
