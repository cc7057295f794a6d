"""One turn: the raw ceiling, then one peer through the wanted workloads.

Owns the sizes and the order of the workloads, and that a failure is noted and the turn goes on. Refuses to own processes
(:mod:`benchmarks.peers.drive`), medians and files. Concurrency: one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hiredis

from benchmarks import _raw
from benchmarks._server import Server, resp
from benchmarks.bench_latency import WARM, wake_times
from benchmarks.peers.drive import Contender, WorkloadError
from orchestra.serialization import encode_task

WORKLOADS = ("single", "bulk", "drain", "latency", "sleep")
WEIGHED = 5_000
"""Tasks of which the memory is told: it does not change between rounds."""
IDEAL = 10_000.0
"""Tasks a second of 1,000 agents that sleep 0.1 s."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of each workload one turn has; ``share`` is of the peer's own numbers, ``limit`` and ``turn`` are seconds."""

    share: float
    raw: int
    single: int
    samples: int
    limit: float
    turn: float


FULL = Sizes(share=1.0, raw=50_000, single=4_000, samples=500, limit=10.0, turn=120.0)
QUICK = Sizes(share=0.1, raw=20_000, single=500, samples=100, limit=5.0, turn=60.0)


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """p50 and p99."""
    ordered = sorted(times)
    return {name: ordered[min(len(ordered) - 1, int(len(ordered) * q))] for name, q in (("p50", 0.5), ("p99", 0.99))}


def raw_turn(server: Server, sizes: Sizes, wanted: Sequence[str]) -> dict[str, float]:
    """What the server itself can do in the same minute."""
    found: dict[str, float] = {}
    _raw.load_scripts(server.raw)
    if "drain" in wanted:
        found["drain"], found["server_us"] = _raw.drain(server, sizes.raw)
    if "bulk" in wanted:
        server.flush()
        found["bulk"] = _raw.xadd_rate(server.raw, sizes.raw)
        found["bytes"] = weigh(server, sizes.raw)
    if "single" in wanted:
        server.flush()
        found["single"] = round_trips(server, sizes.single)
    if "latency" in wanted:
        found |= percentiles(wake_times(server, sizes.samples // 4 + WARM)[WARM:])
    return found


def round_trips(server: Server, count: int) -> float:
    """Plain XADD of a task on a blocking socket, one after the other, a second: no queue can confirm faster."""
    call = resp("XADD", _raw.LANE, "*", "t", encode_task(_raw.task()).frame)
    socket = server.raw.socket
    began = time.perf_counter()
    for _ in range(count):
        socket.sendall(call)
        socket.recv(4096)
    return count / (time.perf_counter() - began)


def weigh(server: Server, count: int) -> float:
    """Bytes of Redis for each of ``count`` queued tasks: what a flush frees. Empties the server.

    A difference over the enqueueing would count the garbage of the server's Lua and the buffers of clients.
    """
    end = time.monotonic() + 1.0
    while int(server.info("clients")["connected_clients"]) > 1 and time.monotonic() < end:
        time.sleep(0.01)  # the producer has ended, and the server learns of it
    held = server.memory()
    server.flush()
    return (held - server.memory()) / count


class Turn:
    """One peer, once through the wanted workloads."""

    def __init__(self, contender: Contender, sizes: Sizes, wanted: Sequence[str]) -> None:
        self.contender, self.sizes, self.wanted = contender, sizes, wanted
        self.found: dict[str, Any] = {"errors": {}}
        self.end = time.monotonic() + sizes.turn
        self.queued = 0

    def run(self) -> dict[str, Any]:
        """Figures by name, and ``errors`` and ``seconds`` by workload."""
        seconds: dict[str, float] = {}
        for name in self.wanted:
            began = time.monotonic()
            if began > self.end:
                self.found["errors"][name] = f"not run: the turn took longer than {self.sizes.turn:.0f} s"
                continue
            say(f" {name}")
            try:
                getattr(self, f"_{name}")()
            except (WorkloadError, OSError, ValueError, KeyError, AssertionError, hiredis.HiredisError) as error:
                self.found["errors"][name] = f"{error}".replace("\n", " ")[:400] or type(error).__name__
                say("!")
            seconds[name] = round(time.monotonic() - began, 2)
        self.found["seconds"] = seconds
        return self.found

    def _count(self, full: int) -> int:
        return max(1_000, int(full * self.sizes.share)) if full > 1_000 else full

    def _single(self) -> None:
        self.found["single"], _ = self.contender.enqueue("single", self.sizes.single)

    def _bulk(self) -> None:
        """What it queues is what the drain drains; before that, once a run, other tasks are queued and weighed."""
        contender = self.contender
        if contender.weight is None:
            contender.weight = weigh(contender.server, contender.enqueue("bulk", WEIGHED)[1])
        self.found["bytes"] = contender.weight
        self._fill()

    def _fill(self) -> None:
        self.found["bulk"], self.queued = self.contender.enqueue("bulk", self._count(self.contender.peer.tasks))

    def _drain(self) -> None:
        if not self.queued:
            self._fill()
        drained = self.contender.drain("drain", self.queued)
        self.found["drain"] = drained["rate"]
        self.found |= {key: drained[key] for key in ("worker_mib", "server_us", "cut")}

    def _latency(self) -> None:
        self.found |= percentiles(self.contender.latency(self.sizes.samples))

    def _sleep(self) -> None:
        self.contender.server.flush()
        _, queued = self.contender.enqueue("bulk", self._count(self.contender.peer.sleeps))
        self.found["ideal"] = self.contender.drain("sleep", queued)["rate"] / IDEAL


def turn(contender: Contender, sizes: Sizes, wanted: Sequence[str]) -> dict[str, Any]:
    """One turn with its raw ceiling; whatever fails is in ``errors``."""
    found = Turn(contender, sizes, wanted)
    began = time.monotonic()
    try:
        found.found["raw"] = raw_turn(contender.server, sizes, wanted)
    except (OSError, RuntimeError, ValueError, AssertionError, hiredis.HiredisError) as error:
        found.found["errors"]["raw ceiling"] = f"{error}".replace("\n", " ")[-400:]
    raw_seconds = round(time.monotonic() - began, 2)
    result = found.run()
    result["seconds"]["raw ceiling"] = raw_seconds
    return result


def say(text: str) -> None:
    """Show progress at once."""
    sys.stderr.write(text)
    sys.stderr.flush()
