"""``python -m benchmarks.peers`` (``make bench-peers``): every queue through every workload, in turns, on one server.

Owns the order of the run, what a failure does (it is noted, the run goes on), and the files that are written after each
turn. Refuses to own figures (:mod:`benchmarks.peers.drive`) and installations (:mod:`benchmarks.peers.environments`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import hiredis

from benchmarks import _raw
from benchmarks._server import Server, awake_cores
from benchmarks._table import machine
from benchmarks.bench_latency import WARM, wake_times
from benchmarks.peers import chart, report
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.drive import Contender, WorkloadError
from benchmarks.peers.environments import UnavailableError, prepare

WORKLOADS = ("single", "bulk", "drain", "latency", "sleep")
IDEAL = 10_000.0
"""Tasks a second of 1,000 agents that sleep 0.1 s."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of each workload one turn has; ``limit`` and ``turn`` are seconds."""

    share: float
    single: int
    samples: int
    sleeps: int
    limit: float
    turn: float


FULL = Sizes(share=1.0, single=4_000, samples=500, sleeps=10_000, limit=20.0, turn=240.0)
QUICK = Sizes(share=0.1, single=500, samples=100, sleeps=2_000, limit=5.0, turn=90.0)


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """p50 and p99."""
    ordered = sorted(times)
    return {name: ordered[min(len(ordered) - 1, int(len(ordered) * q))] for name, q in (("p50", 0.5), ("p99", 0.99))}


def raw_turn(server: Server, sizes: Sizes, wanted: Sequence[str]) -> dict[str, float]:
    """What the server itself can do in the same minute."""
    found: dict[str, float] = {}
    count = int(50_000 * max(sizes.share, 0.2))
    server.flush()
    before = server.memory()
    _raw.load_scripts(server.raw)
    if "drain" in wanted:
        found["drain"], found["server_us"] = _raw.drain(server, count)
    if "bulk" in wanted:
        server.flush()
        found["bulk"] = _raw.xadd_rate(server.raw, count)
        found["bytes"] = (server.memory() - before) / count
    if "single" in wanted:
        server.flush()
        calls = _raw.produce_calls(sizes.single, ids=True, batch=1)
        found["single"] = _raw.rate_of_calls(server.raw, calls, sizes.single, in_flight=1)
    if "latency" in wanted:
        found |= percentiles(wake_times(server, sizes.samples // 2 + WARM)[WARM:])
    return found


class Turn:
    """One peer, once through the wanted workloads."""

    def __init__(self, contender: Contender, sizes: Sizes, wanted: Sequence[str]) -> None:
        self.contender, self.sizes, self.wanted = contender, sizes, wanted
        self.found: dict[str, Any] = {"errors": {}}
        self.end = time.monotonic() + sizes.turn

    def run(self) -> dict[str, Any]:
        """Figures by name, and ``errors`` by workload."""
        for name in self.wanted:
            if time.monotonic() > self.end:
                self.found["errors"][name] = f"not run: the turn took longer than {self.sizes.turn:.0f} s"
                continue
            say(f" {name}")
            try:
                getattr(self, f"_{name}")()
            except (WorkloadError, OSError, ValueError, KeyError, AssertionError, hiredis.HiredisError) as error:
                self.found["errors"][name] = f"{error}".replace("\n", " ")[:400] or type(error).__name__
                say("!")
        return self.found

    def _single(self) -> None:
        self.found["single"], _ = self.contender.enqueue("single", self.sizes.single)

    def _bulk(self) -> None:
        self._fill()

    def _fill(self) -> int:
        """Queue the tasks of a drain; notes the rate and the memory."""
        server = self.contender.server
        server.flush()
        before = server.memory()
        rate, queued = self.contender.enqueue("bulk", max(1_000, int(self.contender.peer.tasks * self.sizes.share)))
        self.found["bulk"] = max(rate, self.found.get("bulk", 0.0))
        self.found["bytes"] = (server.memory() - before) / queued
        return queued

    def _drain(self) -> None:
        drained = self.contender.drain("drain", self._fill())
        self.found["drain"] = drained["rate"]
        self.found |= {key: drained[key] for key in ("worker_mib", "server_us", "cut")}

    def _latency(self) -> None:
        self.found |= percentiles(self.contender.latency(self.sizes.samples))

    def _sleep(self) -> None:
        server = self.contender.server
        server.flush()
        _, queued = self.contender.enqueue("bulk", self.sizes.sleeps)
        self.found["ideal"] = self.contender.drain("sleep", queued)["rate"] / IDEAL


def turn(contender: Contender, sizes: Sizes, wanted: Sequence[str]) -> dict[str, Any]:
    """One turn with its raw ceiling; whatever fails is in ``errors``."""
    found = Turn(contender, sizes, wanted)
    try:
        found.found["raw"] = raw_turn(contender.server, sizes, wanted)
    except (OSError, RuntimeError, ValueError, AssertionError, hiredis.HiredisError) as error:
        found.found["errors"]["raw ceiling"] = f"{error}".replace("\n", " ")[-400:]
    return found.run()


def say(text: str) -> None:
    """Show progress at once."""
    sys.stderr.write(text)
    sys.stderr.flush()


def row(peer: Peer) -> dict[str, Any]:
    """A row before anything is known."""
    facts = {"name": peer.name, "own": peer.own, "note": peer.note}
    promises = {"acknowledges": peer.acknowledges, "deduplicates": peer.deduplicates}
    return {**facts, **promises, "facts": None, "reason": None, "rounds": [], "figures": {}}


def contenders(
    peers: Sequence[Peer], server: Server, options: argparse.Namespace, sizes: Sizes, stack: contextlib.ExitStack
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], Contender]]]:
    """All rows, and those whose peer can run."""
    rows, able = [], []
    for peer in peers:
        found = row(peer)
        rows.append(found)
        say(f"preparing {peer.name} …")
        try:
            command, cwd = prepare(peer, options.environments, fresh=options.fresh)
            contender = Contender(peer, command, cwd, server, sizes.limit)
        except (UnavailableError, WorkloadError, OSError, ValueError) as error:
            found["reason"] = f"{error}".replace("\n", " ")[:400]
            say(f" not available: {found['reason']}\n")
            continue
        stack.callback(contender.close)
        found["facts"] = contender.facts
        able.append((found, contender))
        say(f" {', '.join(f'{name} {number}' for name, number in contender.facts['versions'].items())}\n")
    return rows, able


def write(result: dict[str, Any], folder: Path) -> None:
    """The three files, as far as the run has come."""
    for found in result["peers"]:
        found["figures"] = report.figures(found["rounds"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "peers.md").write_text(report.markdown(result))
    (folder / "peers.svg").write_text(chart.svg(result))


def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    sizes = QUICK if options.quick else FULL
    awake = ", cores kept awake" if options.spin else ""
    result: dict[str, Any] = {
        "machine": machine(f"redis-server {server.version} on tcp{awake}"),
        "command": "python -m benchmarks.peers " + shlex.join(sys.argv[1:]) if sys.argv[1:] else "make bench-peers",
        "rounds": options.rounds,
        "quick": options.quick,
        "peers": [],
    }
    peers = [peer for peer in PEERS if not options.only or any(word in peer.name for word in options.only)]
    with contextlib.ExitStack() as stack:
        result["peers"], able = contenders(peers, server, options, sizes, stack)
        stack.callback(write, result, options.output)
        for number in range(options.rounds):
            shift = number * 5 % max(1, len(able))  # nobody always runs behind the same neighbour
            for found, contender in able[shift:] + able[:shift]:
                say(f"{time.strftime('%H:%M:%S')} round {number + 1}/{options.rounds} {contender.peer.name}:")
                found["rounds"].append(turn(contender, sizes, options.workload))
                say(f"  {summary(found['rounds'][-1])}\n")
                write(result, options.output)
    return result


def summary(found: dict[str, Any]) -> str:
    """One turn on one line."""
    cells = [f"{key} {report.text(key, found[key])}" for key, _ in report.COLUMNS if found.get(key) is not None]
    return ", ".join(cells + [f"{name} FAILED: {why[:120]}" for name, why in found["errors"].items()])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="make bench-peers ARGS=", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument(
        "--only", type=_words, default=[], help="peers whose name contains one of these words, by comma"
    )
    parser.add_argument("--workload", type=_workloads, default=list(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--quick", action="store_true", help="one round, a tenth of the tasks, short limits")
    parser.add_argument("--rounds", type=int, help="rounds of which the medians are shown: 5, or 1 with --quick")
    parser.add_argument("--spin", action="store_true", help="keep the cores from halting, as ORCHESTRA_BENCH_SPIN does")
    parser.add_argument("--fresh", action="store_true", help="make the environments again")
    parser.add_argument(
        "--environments", type=Path, default=Path(".venv-peers"), help="where the environments are kept"
    )
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder for peers.json, .md and .svg")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.environments = options.environments.resolve()
    if not 1 <= options.rounds <= 100:
        parser.error(f"--rounds must be 1 to 100, got {options.rounds}")
    if options.only and not any(word in peer.name for peer in PEERS for word in options.only):
        parser.error(f"--only names none of {', '.join(peer.name for peer in PEERS)}")
    return options


def _words(value: str) -> list[str]:
    return [word for word in value.split(",") if word]


def _workloads(value: str) -> list[str]:
    wanted = _words(value)
    if unknown := sorted(set(wanted) - set(WORKLOADS)):
        raise argparse.ArgumentTypeError(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    return [name for name in WORKLOADS if name in wanted]


def _stop(*_: object) -> Never:
    raise SystemExit(143)


def main() -> int:
    """0, or 1 when orchestra itself failed a workload: a peer's failure is a finding."""
    options = parse()
    signal.signal(signal.SIGTERM, _stop)
    server = Server("tcp")
    try:
        with awake_cores(options.spin):
            result = measure(server, options)
    except KeyboardInterrupt:
        say(f"\ninterrupted; what was measured is in {options.output}\n")
        return 130
    finally:
        server.stop()
    print(report.markdown(result))
    print(f"written: {options.output}/peers.json, peers.md, peers.svg")
    return int(any(found.get("errors") for r in result["peers"] if r["own"] for found in r["rounds"]))


if __name__ == "__main__":
    sys.exit(main())
