"""C3 and C4, byte by byte: what the reply reader does with replies that were cut, damaged or made up.

The replies are recorded from a live server and replayed by a peer that ends each connection as asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import struct

import pytest

from orchestra._redis.wire import Endpoint, Wire, pack
from orchestra.errors import StoreUnavailableError
from tests.faults._checks import quiet_afterwards


def _record(server):
    """Replies as a live server gives them: two deliveries, a script's array, an error, a script's error."""

    def ask(packed):
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(5)
            s.connect(server.socket)
            s.sendall(packed)
            return s.recv(1 << 16)

    ask(pack([("XGROUP", "CREATE", "st", "g", "0", "MKSTREAM")]))
    for n in range(2):
        ask(pack([("XADD", "st", f"1-{n + 1}", "t", b"\x93\x00\xff" + b"frame" * n, "n", n)]))
    return {
        "XREADGROUP": ask(pack([("XREADGROUP", "GROUP", "g", "c", "COUNT", 9, "STREAMS", "st", ">")])),
        "script": ask(pack([("EVAL", "return {1, 'two', {false, '3-0'}, {}}", 0)])),
        "error": ask(pack([("XREADGROUP", "GROUP", "none", "c", "STREAMS", "st", ">")])),
        "script error": ask(pack([("EVAL", "return redis.error_reply('ORC_FULL 5')", 0)])),
    }


@contextlib.asynccontextmanager
async def _replaying(replies):
    """A peer on a unix socket that greets, then answers connection n with ``replies[n]`` = (bytes, how it ends)."""
    waiting = iter(replies)
    handlers = set()

    async def handle(reader, writer):
        handlers.add(asyncio.current_task())
        try:
            await reader.read(4096)
            writer.write(b"+OK\r\n")
            which = int((await reader.readuntil(b"#\r\n")).rsplit(b"\r\n", 2)[-2][:-1])
            data, end = replies[which]
            writer.write(data)
            await writer.drain()
            if end == "rst":
                writer.transport.abort()
            elif end == "stay":
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            handlers.discard(asyncio.current_task())
            writer.close()

    path = f"\0orc-replay-{os.getpid()}-{id(waiting)}"
    server = await asyncio.start_unix_server(handle, path, backlog=1024)
    try:
        yield Endpoint(path=path, label="replay")
    finally:
        server.close()
        for task in list(handlers):
            task.cancel()
        await asyncio.sleep(0)


async def _ask(endpoint, number, timeout, limit):
    """What a caller gets of reply ``number``: ("value", it) or ("lost", None); the connection is gone after a loss."""
    async with limit:
        wire = await Wire.connect(endpoint, timeout=timeout, connect_timeout=60)
        try:
            (reply,) = await wire.send_nowait(pack([("ASK", f"{number}#")]), 1)
        except StoreUnavailableError:
            assert wire.closed
            return "lost", None
        else:
            return "value", reply
        finally:
            await wire.aclose()


async def test_c3_a_reply_cut_at_any_byte_is_lost_as_a_whole(redis_server, redis_url):
    """C3: recorded replies cut at every offset, then FIN or RST: an unknown outcome, never a part of a value."""
    cuts = [
        (reply[:cut], end)
        for reply in _record(redis_server).values()
        for cut in range(len(reply))
        for end in ("fin", "rst")
    ]
    limit = asyncio.Semaphore(32)
    async with quiet_afterwards(), _replaying(cuts) as endpoint:
        ends = await asyncio.gather(*[_ask(endpoint, n, 60, limit) for n in range(len(cuts))])
    assert len(ends) > 500
    assert all(kind == "lost" for kind, _ in ends)


async def test_c4_a_reply_damaged_at_any_byte_never_hangs_and_allocates_nothing(redis_server, redis_url):
    """C4: every byte of recorded replies replaced by a type, a length, a sign, rubbish: an error in time or one value."""
    damaged = []
    for reply in _record(redis_server).values():
        for at in range(len(reply)):
            damaged += [(reply[:at] + put + reply[at + 1 :], "stay") for put in (b"$", b"*", b">", b"9", b"-", b"\xff")]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = asyncio.Semaphore(256)
    async with quiet_afterwards(), _replaying(damaged) as endpoint:
        async with asyncio.timeout(120):
            ends = await asyncio.gather(*[_ask(endpoint, n, 0.3, limit) for n in range(len(damaged))])
    assert {kind for kind, _ in ends} == {"lost", "value"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 << 10, "kB"


LIES = {
    "string of 10 GB": b"$9999999999\r\nabc",
    "string of 500 MB": b"$500000000\r\nabc",
    "negative string": b"$-2\r\n",
    "list of 10^10": b"*9999999999\r\n$1\r\na\r\n",
    "list of 2^32": b"*4294967295\r\n$1\r\na\r\n",
    "list of 10^7": b"*10000000\r\n$1\r\na\r\n",
    "lists without end": b"*1\r\n" * 10_000,
    "push": b">2\r\n$7\r\nmessage\r\n$1\r\nx\r\n",
    "map": b"%1\r\n$1\r\na\r\n$1\r\nb\r\n",
    "double": b",1.5\r\n",
    "boolean": b"#t\r\n",
    "blob error": b"!5\r\nERR x\r\n",
    "push before the reply": b">1\r\n$10\r\ninvalidate\r\n+OK\r\n",
    "two replies": b"+OK\r\n+OK\r\n",
    "a reply and half of another": b"+OK\r\n$5\r\nab",
    "no type": b"hello\r\n",
}


@pytest.mark.parametrize("lie", LIES)
async def test_c4_lengths_that_lie_and_types_that_must_not_come(lie):
    """C4: a protocol error or the deadline, within it; no memory is taken for what was only announced."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with quiet_afterwards(), _replaying([(LIES[lie], "stay")]) as endpoint:
        kind, value = await _ask(endpoint, 0, 0.3, asyncio.Semaphore())
    assert (kind, value) in [("lost", None), *([("value", b"OK")] if lie == "a reply and half of another" else [])]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50 << 10, "kB"


def test_rst_is_what_the_peer_sends():
    """The tests above that ask for a reset get one: SO_LINGER 0 is a reset on this system."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection(server.getsockname()) as client:
            peer, _ = server.accept()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
