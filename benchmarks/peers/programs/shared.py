"""What the programs of all peers share: the task, the agents that record progress, the roles. Standard library only.

Runs inside the virtual environment of a peer, so it imports nothing of this project. Started as
``python shared.py PROGRAM ROLE [ARGUMENTS]`` with ``BENCH_*`` variables; prints one JSON line.
A program is a module beside this one, imported by its name (some queues send ``module.function``), with

- ``PACKAGES``: distributions whose versions are told, ``UVLOOP``: whether the program runs on uvloop,
- ``BACKLOG``: Redis commands whose integer answers are all 0 when the queue is empty; ``GROUP name`` stands for what the
  groups of a stream have not acknowledged,
- ``SETTINGS``: the peer's best settings; a key that is the name of a workload overrides them there,
- ``producer()``: an (async) context manager of ``(send, send_many)``; ``worker()``: serves until killed.

Concurrency: agents may run in threads and in forked children; each process records in a file of its own.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import mmap
import os
import select
import struct
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version

PORT = int(os.environ.get("BENCH_PORT", "0"))
URL = f"redis://127.0.0.1:{PORT}/0"
WIDE_URL = URL + "?max_connections=4000"
"""For redis-py 8, whose pools end at 100 connections: with 1,000 agents at once some peers lose tasks there."""
WORKLOAD = os.environ.get("BENCH_WORKLOAD", "drain")
SETTINGS = json.loads(os.environ.get("BENCH_SETTINGS", "{}"))
LIMIT = float(os.environ.get("BENCH_LIMIT", "20"))
ENTRY = struct.Struct("<qqq")
SLEEP, GAP, WARM, PATIENCE = 0.1, 0.005, 20, 20.0
PROBES, PROBE_BULK, HOLD_SECONDS = 3, 100, 60
STOPPED = "kill -STOP {0}; echo stopped; sleep 0.3; echo goes on; kill -CONT {0}"
"""``goes on`` is said before the server can answer: a call that returns earlier has not waited for it."""


def payload(number):
    """134 bytes as json.dumps writes it."""
    return {
        "id": f"task-{number:06d}",
        "type": "text_classification",
        "input": {"text": "Classify this text please: lorem ipsum dolor"},
        "priority": 2,
    }


class Progress:
    """Tasks handled by this process, its first and last moment (monotonic ns), in a mapped file the driver reads."""

    def __init__(self, folder):
        self.folder = folder
        self.open()
        os.register_at_fork(after_in_child=self.open)

    def open(self):
        self.lock, self.count, self.first = threading.Lock(), 0, 0
        file = os.open(os.path.join(self.folder, str(os.getpid())), os.O_RDWR | os.O_CREAT)
        os.ftruncate(file, ENTRY.size)
        self.map = mmap.mmap(file, ENTRY.size)
        os.close(file)

    def begin(self):
        if not self.first:
            self.first = time.monotonic_ns()

    def end(self):
        now = time.monotonic_ns()
        with self.lock:
            self.count += 1
            self.first = self.first or now
            ENTRY.pack_into(self.map, 0, self.count, self.first, now)


PROGRESS = Progress(os.environ["BENCH_PROGRESS"]) if os.environ.get("BENCH_ROLE") == "worker" else None
PIPE = os.open(os.environ["BENCH_PIPE"], os.O_RDWR) if "BENCH_PIPE" in os.environ else -1


async def _noop(payload):
    PROGRESS.end()


async def _sleep(payload):
    PROGRESS.begin()
    await asyncio.sleep(SLEEP)
    PROGRESS.end()


async def _tell(payload):
    os.write(PIPE, struct.pack("<q", time.monotonic_ns()))


async def _hold(payload):
    os.write(PIPE, struct.pack("<q", time.monotonic_ns()))
    await asyncio.sleep(HOLD_SECONDS)


def _plain_noop(payload):
    PROGRESS.end()


def _plain_sleep(payload):
    PROGRESS.begin()
    time.sleep(SLEEP)
    PROGRESS.end()


def _plain_tell(payload):
    os.write(PIPE, struct.pack("<q", time.monotonic_ns()))


def _plain_hold(payload):
    os.write(PIPE, struct.pack("<q", time.monotonic_ns()))
    time.sleep(HOLD_SECONDS)


agent = {"sleep": _sleep, "latency": _tell, "hold": _hold}.get(WORKLOAD, _noop)
plain_agent = {"sleep": _plain_sleep, "latency": _plain_tell, "hold": _plain_hold}.get(WORKLOAD, _plain_noop)


def each(send):
    """``send_many`` of a queue without one: one after the other."""

    def send_many(items):
        for item in items:
            send(item)

    return send_many


def all_at_once(send):
    """``send_many`` of an asyncio queue without one: all calls of a part at once."""

    async def send_many(items):
        await asyncio.gather(*[send(item) for item in items])

    return send_many


async def _maybe(value):
    return await value if inspect.isawaitable(value) else value


def _parts(mode, count):
    items = [payload(number) for number in range(1, count)]
    size = 1 if mode == "single" else SETTINGS.get("chunk", 1000)
    return [items[start : start + size] for start in range(0, len(items), size)]


async def _enqueue(producer, mode, count):
    parts = _parts(mode, count)
    async with producer() as (send, send_many):
        await _maybe(send(payload(0)))  # opens connections, loads scripts
        done, began = 0, time.monotonic_ns()
        for part in parts:
            await _maybe(send(part[0]) if mode == "single" else send_many(part))
            done += len(part)
            if time.monotonic_ns() - began > LIMIT * 1e9:
                break
        return {"count": done, "seconds": (time.monotonic_ns() - began) / 1e9}


def _enqueue_plain(producer, mode, count):
    parts = _parts(mode, count)
    with producer() as (send, send_many):
        send(payload(0))
        done, began = 0, time.monotonic_ns()
        for part in parts:
            if mode == "single":
                send(part[0])
            else:
                send_many(part)
            done += len(part)
            if time.monotonic_ns() - began > LIMIT * 1e9:
                break
        return {"count": done, "seconds": (time.monotonic_ns() - began) / 1e9}


def _told(pipe, patience):
    if not select.select([pipe], [], [], patience)[0]:
        raise TimeoutError(f"no agent started within {patience:.0f} s")
    return struct.unpack("<q", os.read(pipe, 8))[0]


async def _latency(producer, count):
    """Blocks this process while it waits: it has nothing else to do, and another loop would be measured with it."""
    times, end = [], time.monotonic() + LIMIT
    async with producer() as (send, _):
        for number in range(WARM + count):
            began = time.monotonic_ns()
            await _maybe(send(payload(number)))
            times.append(_told(PIPE, PATIENCE) - began)
            await asyncio.sleep(GAP)
            if time.monotonic() > end and number > WARM:
                break
    return times[WARM:]


def _latency_plain(producer, count):
    times, end = [], time.monotonic() + LIMIT
    with producer() as (send, _):
        for number in range(WARM + count):
            began = time.monotonic_ns()
            send(payload(number))
            times.append(_told(PIPE, PATIENCE) - began)
            time.sleep(GAP)
            if time.monotonic() > end and number > WARM:
                break
    return times[WARM:]


class _StoppedServer:
    """The server while it is stopped for a moment; ``waited()``: whether it has gone on meanwhile."""

    def __enter__(self):
        command = STOPPED.format(int(os.environ["BENCH_SERVER"]))
        self.shell = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE)
        self.shell.stdout.readline()
        time.sleep(0.02)
        return self

    def waited(self):
        return bool(select.select([self.shell.stdout], [], [], 0)[0])

    def __exit__(self, *_):
        self.shell.wait()
        self.shell.stdout.close()


def _probes():
    """What a probe sends, and the calls that meet a stopped server: ``PROBES`` single ones, then as many bulk ones."""
    firsts = [2 + number for number in range(PROBES)]
    parts = [[payload(2 + PROBES + number * PROBE_BULK + n) for n in range(PROBE_BULK)] for number in range(PROBES)]
    return [payload(number) for number in firsts], parts


async def _probe(producer):
    """Task 0, task 1 twice, then calls that meet a stopped server. A call that returns first does not confirm."""
    singles, parts = _probes()
    found = {"single": True, "bulk": True}
    async with producer() as (send, send_many):
        for number in (0, 1, 1):
            await _maybe(send(payload(number)))
        for kind, call, items in [
            *(("single", send, one) for one in singles),
            *(("bulk", send_many, p) for p in parts),
        ]:
            with _StoppedServer() as server:
                await _maybe(call(items))
                found[kind] &= server.waited()
    return {**found, "sent": 2 + PROBES * (1 + PROBE_BULK)}


def _probe_plain(producer):
    singles, parts = _probes()
    found = {"single": True, "bulk": True}
    with producer() as (send, send_many):
        for number in (0, 1, 1):
            send(payload(number))
        for kind, call, items in [
            *(("single", send, one) for one in singles),
            *(("bulk", send_many, p) for p in parts),
        ]:
            with _StoppedServer() as server:
                call(items)
                found[kind] &= server.waited()
    return {**found, "sent": 2 + PROBES * (1 + PROBE_BULK)}


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:  # a source tree on PYTHONPATH
        return getattr(importlib.import_module("orchestra"), "__version__", "?") if "orchestra" in name else "?"


def _facts(program):
    return {
        "versions": {name: _version(name) for name in program.PACKAGES},
        "runtime": f"Python {sys.version.split()[0]}",
        "uvloop": program.UVLOOP,
        "backlog": program.BACKLOG,
        "settings": program.SETTINGS,
    }


def main(name, role, *arguments):
    """Play ``role`` with the program ``name``."""
    program = importlib.import_module(name)
    if role == "facts":
        print(json.dumps(_facts(program)))
        return
    if program.UVLOOP:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    if role == "worker":
        program.worker()
        return
    is_async = hasattr(program.producer(), "__aenter__")
    play, plain = {
        "enqueue": (_enqueue, _enqueue_plain),
        "latency": (_latency, _latency_plain),
        "probe": (_probe, _probe_plain),
    }[role]
    words = [int(word) if word.isdigit() else word for word in arguments]
    print(json.dumps(asyncio.run(play(program.producer, *words)) if is_async else plain(program.producer, *words)))


if __name__ == "__main__":
    # The programs import this file as ``shared``: it must not be loaded a second time under another name.
    sys.modules["shared"] = sys.modules["__main__"]
    main(*sys.argv[1:])
