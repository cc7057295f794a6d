"""What the server itself can do: orchestra's own commands and scripts as precomputed bytes on a blocking socket.

Nothing is encoded, decoded or awaited inside a measured stretch, and several batches are under way at once, so that the
server is the limit. Refuses to own anything of orchestra but its key names, its scripts and its encoder (used before
the clock starts). Rates are tasks a second; times are microseconds.
Source of the method: a ceiling is only comparable when it is taken in the same run, by the same commands.
"""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Sequence

from benchmarks._server import Raw, Server, resp
from orchestra._keys import QueueKeys
from orchestra._queue.produce import TOKEN_WINDOW_MS
from orchestra._scripts import script
from orchestra.serialization import encode_task

QUEUE, GROUP, CONSUMER = "bench", "bench-group", "raw"
KEYS = QueueKeys(QUEUE)
LANE = KEYS.lanes[2]
BATCH = 500
IN_FLIGHT = 4
DEDUP_MS = 3_600_000
RECORD = 2
"""Bulk strings in the answer to a call of :func:`produce_calls`."""
ENTRY_ID = len("1000000000000-100001")
_token = itertools.count()


def task(number: int | None = None) -> dict[str, object]:
    """The payload of every workload, 126 bytes as compact JSON when it has an id."""
    body: dict[str, object] = {
        "type": "text_classification",
        "input": {"text": "Classify this text please: lorem ipsum dolor"},
        "priority": 2,
    }
    return body if number is None else {"id": f"task-{number:06d}", **body}


def load_scripts(raw: Raw) -> None:
    """Make the scripts known by their hashes."""
    for name in ("produce_many", "produce_one", "complete"):
        raw.ask("SCRIPT", "LOAD", script(name).text)


def make_groups(raw: Raw) -> None:
    """The empty lanes that a worker expects."""
    for lane in KEYS.lanes:
        raw.ask("XGROUP", "CREATE", lane, GROUP, "0", "MKSTREAM")


def produce_calls(count: int, *, ids: bool) -> list[bytes]:
    """EVALSHA of orchestra's script for many plain tasks, for ``count`` tasks, ``BATCH`` a call."""
    keys = (LANE, *(KEYS.dedup if ids else KEYS.tokens), KEYS.counters)
    window = DEDUP_MS if ids else TOKEN_WINDOW_MS
    calls = []
    for start in range(0, count, BATCH):
        some = [encode_task(task(n if ids else None)) for n in range(start, min(start + BATCH, count))]
        args: list[str | bytes | int] = [window, 2, "" if ids else f"raw{next(_token):x}", *(one.frame for one in some)]
        calls.append(script("produce_many").pack(keys, args + [one.id for one in some] if ids else args))
    return calls


def produce_one_calls(count: int) -> list[bytes]:
    """EVALSHA of orchestra's script for a single task, with a generated id, ``count`` times."""
    lua, keys = script("produce_one"), (LANE, *KEYS.tokens, KEYS.counters)
    frames = (encode_task(task()).frame for _ in range(count))
    return [lua.pack(keys, (TOKEN_WINDOW_MS, 2, "token", f"raw{next(_token):x}", frame)) for frame in frames]


def rate_of_calls(
    raw: Raw, calls: Sequence[bytes], count: int, in_flight: int = IN_FLIGHT, strings: int | None = None
) -> float:
    """Tasks a second when ``calls`` are sent ``in_flight`` at once.

    Every call is answered by ``strings`` bulk strings, by one a task unless it is said.
    """
    each = strings or count // len(calls)
    sent = got = 0
    began = time.perf_counter()
    while got < len(calls) * each:
        while sent < len(calls) and sent * each - got < in_flight * each:
            raw.socket.sendall(calls[sent])
            sent += 1
        answer = raw.socket.recv(1 << 16)  # more would be mapped anew for every answer
        assert not answer.startswith(b"-"), answer[:200]
        got += answer.count(b"$")
    return count / (time.perf_counter() - began)


def xadd_rate(raw: Raw, count: int) -> float:
    """Plain pipelined XADD of the same frames: what a queue without any promise could reach."""
    return rate_of_calls(raw, [xadd_block()] * (count // BATCH), count)


def xadd_block() -> bytes:
    """Pipelined XADD of one batch."""
    return resp("XADD", LANE, "*", "t", encode_task(task()).frame) * BATCH


def fill(raw: Raw, count: int) -> list[bytes]:
    """Queue ``count`` tasks under ids of known size; returns the ids."""
    frame = encode_task(task(0)).frame
    entries = [b"1000000000000-%06d" % number for number in range(100_001, 100_001 + count)]
    for start in range(0, count, BATCH):
        part = entries[start : start + BATCH]
        raw.socket.sendall(b"".join(resp("XADD", LANE, entry, "t", frame) for entry in part))
        raw.skip(len(part) * (ENTRY_ID + 7))
    return entries


def drain_rate(server: Server, count: int) -> float:
    """XREADGROUP COUNT 500 and orchestra's settle script for the batch, ``IN_FLIGHT`` batches under way."""
    return drain(server, count)[0]


def drain(server: Server, count: int, *, bare: bool = False) -> tuple[float, float]:
    """The same; tasks a second, and microseconds of the server's CPU a task. ``bare``: XACK and XDEL settle a batch."""
    server.flush()
    raw = server.raw
    make_groups(raw)
    entries = fill(raw, count)
    frame = encode_task(task(0)).frame
    read, size = _read_batch(), _batch_bytes(frame)
    settle = _settle_bare if bare else _settle
    size += 2 * len(b":%d\r\n" % BATCH) - len(b"*0\r\n") if bare else 0
    settles = [settle(entries[start : start + BATCH]) for start in range(0, count, BATCH)]
    sent = done = 0
    used, began = server.cpu_seconds(), time.perf_counter()
    while done < len(settles):
        while sent < len(settles) and sent - done < IN_FLIGHT:
            raw.socket.sendall(read + settles[sent])
            sent += 1
        raw.skip(size)
        done += 1
    rate, used = count / (time.perf_counter() - began), server.cpu_seconds() - used
    left = raw.ask("XLEN", LANE)
    assert left == 0, f"{left} entries are left: the replies are not what this drain expects"
    return rate, used / count * 1e6


def total_rate(server: Server, count: int) -> float:
    """Tasks a second when XADD, XREADGROUP and settling of the same batch follow each other, ``IN_FLIGHT`` batches at once."""
    server.flush()
    raw = server.raw
    make_groups(raw)
    frame = encode_task(task(0)).frame
    entries = [b"1000000000000-%06d" % number for number in range(100_001, 100_001 + count)]
    parts = [entries[start : start + BATCH] for start in range(0, count, BATCH)]
    blocks = [b"".join(resp("XADD", LANE, entry, "t", frame) for entry in part) for part in parts]
    blocks = [block + _read_batch() + _settle(part) for block, part in zip(blocks, parts, strict=True)]
    size = BATCH * (ENTRY_ID + 7) + _batch_bytes(frame)
    sent = done = 0
    began = time.perf_counter()
    while done < len(blocks):
        while sent < len(blocks) and sent - done < IN_FLIGHT:
            raw.socket.sendall(blocks[sent])
            sent += 1
        raw.skip(size)
        done += 1
    rate = count / (time.perf_counter() - began)
    left = raw.ask("XLEN", LANE)
    assert left == 0, f"{left} entries are left: the replies are not what this drain expects"
    return rate


def _read_batch() -> bytes:
    return resp("XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", BATCH, "STREAMS", LANE, ">")


def _batch_bytes(frame: bytes) -> int:
    """Size of the reply to one read and of the settle script's."""
    entry = 4 + 5 + ENTRY_ID + 2 + 4 + len(b"$1\r\nt\r\n") + len(b"$%d\r\n" % len(frame)) + len(frame) + 2
    head = len(b"*1\r\n*2\r\n$%d\r\n%s\r\n*%d\r\n" % (len(LANE), LANE.encode(), BATCH))
    return head + BATCH * entry + len(b"*0\r\n")


def _settle(entries: Sequence[bytes]) -> bytes:
    head = (GROUP, CONSUMER, len(entries), entries[0], entries[-1], len(entries))
    return script("complete").pack((LANE, KEYS.counters), (*head, *entries))


def _settle_bare(entries: Sequence[bytes]) -> bytes:
    return resp("XACK", LANE, GROUP, *entries) + resp("XDEL", LANE, *entries)


def reader(address: str | tuple[str, int], samples: int, *, echo: bool) -> None:
    """The other process of a wake-up: writes ``monotonic_ns`` to stdout for each entry, or publishes an answer."""
    raw = Raw(address)
    read = resp("XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", 1, "BLOCK", 10_000, "STREAMS", LANE, ">")
    answer = resp("PUBLISH", "answers", b"x" * 32)
    os.write(1, struct.pack("<q", 0))
    for _ in range(samples):
        raw.socket.sendall(read)
        raw.socket.recv(4096)
        if echo:
            raw.socket.sendall(answer)
            raw.socket.recv(64)
        else:
            os.write(1, struct.pack("<q", time.monotonic_ns()))
    raw.close()


def wake_times(server: Server, pipe: int, samples: int, gap: float) -> list[float]:
    """Microseconds from before XADD here until the blocked reader in the other process has the bytes."""
    add = resp("XADD", LANE, "*", "t", encode_task(task()).frame)
    times = []
    for _ in range(samples):
        began = time.monotonic_ns()
        server.raw.socket.sendall(add)
        server.raw.socket.recv(100)
        times.append((struct.unpack("<q", os.read(pipe, 8))[0] - began) / 1000)
        time.sleep(gap)
    return times


def echo_times(server: Server, samples: int, gap: float) -> list[float]:
    """Microseconds from before XADD here until the other process's publication has come back."""
    add = resp("XADD", LANE, "*", "t", encode_task(task()).frame)
    ears = server.connect()
    ears.ask("SUBSCRIBE", "answers")
    times = []
    for _ in range(samples):
        began = time.monotonic_ns()
        server.raw.socket.sendall(add)
        server.raw.socket.recv(100)
        ears.socket.recv(4096)
        times.append((time.monotonic_ns() - began) / 1000)
        time.sleep(gap)
    ears.close()
    return times
