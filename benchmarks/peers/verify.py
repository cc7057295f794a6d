"""What a peer does as it is configured here, observed and not believed: once before it is measured.

Owns the questions: do its calls wait until Redis has answered, is the payload in Redis as it was sent, is a second task of
the same id dropped, and does a task stay in Redis while its agent runs. Refuses to own figures.
Concurrency: one thread. The server is stopped for moments (SIGSTOP) and always goes on when this returns.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import select
import signal
import time
import zlib
from collections.abc import Iterator
from typing import Any

import hiredis

from benchmarks._server import Server
from benchmarks.peers.drive import Contender, WorkloadError

MARK = b"Classify this text please: lorem ipsum dolor"
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{80,}={0,2}")
_NUMBERS = re.compile(rb"\[((?:\d{1,3},){80,}\d{1,3})\]")
_READS = {
    b"string": ("GET", ()),
    b"list": ("LRANGE", (0, -1)),
    b"hash": ("HGETALL", ()),
    b"set": ("SMEMBERS", ()),
    b"zset": ("ZRANGE", (0, -1)),
    b"stream": ("XRANGE", ("-", "+")),
}
START_SECONDS = 20.0


def verify(contender: Contender) -> dict[str, Any]:
    """``single`` and ``bulk`` (calls confirm), ``carries``, ``deduplicates``, ``kept`` (until the agent has returned).

    An answer that could not be had is None, and ``why`` says so.
    """
    found: dict[str, Any] = dict.fromkeys(("single", "bulk", "carries", "deduplicates", "kept"))
    server = contender.server
    for question in (_calls, _keeps):
        server.flush()
        try:
            found |= question(contender)
        except (WorkloadError, OSError, ValueError, KeyError, hiredis.HiredisError) as error:
            found["why"] = f"{error}".replace("\n", " ")[:300] or type(error).__name__
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
    server.flush()
    return found


def _calls(contender: Contender) -> dict[str, Any]:
    """The role sends task 1 twice and every other once, the later ones while the server is stopped."""
    told = contender.ask("probe", "probe")
    held, sent = bodies(contender.server), told["sent"]  # a queue may keep a payload in several places
    facts = {"single": told["single"], "bulk": told["bulk"], "carries": held >= sent}
    return {**facts, "deduplicates": held % sent == 0 if held >= sent else None}


def _keeps(contender: Contender) -> dict[str, Any]:
    """One task whose agent says that it has begun and then waits."""
    contender.ask("enqueue", "bulk", "bulk", 1)
    pipe = os.open(contender.home / "pipe", os.O_RDWR | os.O_NONBLOCK)
    try:
        with contender.worker("hold") as process:
            end = time.monotonic() + START_SECONDS
            while not select.select([pipe], [], [], 0.1)[0]:
                if process.poll() is not None or time.monotonic() > end:
                    raise WorkloadError(f"no agent has begun: {contender.last_words()}")
            os.read(pipe, 8)
            return {"kept": bodies(contender.server) > 0}
    finally:
        os.close(pipe)


def bodies(server: Server) -> int:
    """How many payloads lie in Redis, in whatever structure: as they are, in base64, as JSON numbers, or under zlib."""
    return sum(_plain(value).count(MARK) for key in _keys(server) for value in _flat(_read(server, key)))


def _keys(server: Server) -> Iterator[bytes]:
    cursor = b"0"
    while True:
        cursor, keys = server.raw.ask("SCAN", cursor, "COUNT", 1000)
        yield from keys
        if cursor == b"0":
            return


def _read(server: Server, key: bytes) -> Any:
    kind = server.raw.ask("TYPE", key)
    command, arguments = _READS.get(kind.encode() if isinstance(kind, str) else kind, ("TYPE", ()))
    return server.raw.ask(command, key, *arguments)


def _flat(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _flat(one)


def _plain(value: bytes) -> bytes:
    """A value with what it wraps."""
    with contextlib.suppress(zlib.error):
        return zlib.decompress(value)
    unwrapped = [base64.b64decode(part + b"=" * (-len(part) % 4)) for part in _BASE64.findall(value)]
    unwrapped += [bytes(int(number) & 255 for number in part.split(b",")) for part in _NUMBERS.findall(value)]
    return b" ".join([value, *unwrapped])
