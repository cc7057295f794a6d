"""``python -m benchmarks.peers`` (``make bench-peers``): every queue through every workload, in turns, on one server.

Owns the order of the run, when it ends, and the files that are written after each turn. Refuses to own what a turn is
(:mod:`benchmarks.peers.turn`), figures (:mod:`benchmarks.peers.drive`), installations (:mod:`benchmarks.peers.environments`) and what
peers really do (:mod:`benchmarks.peers.verify`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

from benchmarks._server import Server, awake_cores
from benchmarks._table import machine
from benchmarks.peers import chart, report
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.drive import Contender, WorkloadError
from benchmarks.peers.environments import UnavailableError, prepare
from benchmarks.peers.turn import FULL, QUICK, WORKLOADS, Sizes, say, turn
from benchmarks.peers.verify import verify

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results"


def row(peer: Peer) -> dict[str, Any]:
    """A row before anything is known."""
    facts = {"name": peer.name, "own": peer.own, "note": peer.note}
    return {**facts, "facts": None, "observed": {}, "reason": None, "rounds": [], "figures": {}}


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
        say(f" {', '.join(f'{name} {number}' for name, number in contender.facts['versions'].items())}")
        if options.rounds:
            found["observed"] = verify(contender)
        say(f" {found['observed']}\n")
    return rows, able


def write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """The three files, as far as the run has come, without the names of this machine's folders."""
    for found in result["peers"]:
        found["figures"] = report.figures(found["rounds"])
    here = {str(options.environments): ".venv-peers", f"{ROOT}/": "", sys.prefix: ".venv"}
    here |= {tempfile.gettempdir(): "tmp", str(Path.home()): "~"}
    files = {
        "peers.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
        "peers.md": report.markdown(result),
        "peers.svg": chart.svg(result),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        for path, word in here.items():
            text = text.replace(path, word)  # noqa: PLW2901  one after the other
        (options.output / name).write_text(text, encoding="utf-8")


def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    sizes = QUICK if options.quick else FULL
    awake = ", cores kept awake" if options.spin else ""
    result: dict[str, Any] = {
        "machine": machine(f"redis-server {server.version} on tcp{awake}"),
        "command": command_line(options),
        "rounds": 0,
        "quick": options.quick,
        "peers": [],
    }
    peers = [peer for peer in PEERS if not options.only or any(word in peer.name for word in options.only)]
    with contextlib.ExitStack() as stack:
        result["peers"], able = contenders(peers, server, options, sizes, stack)
        if not options.prepare:
            stack.callback(write, result, options)
            rounds(result, able, options, sizes)
    return result


def rounds(
    result: dict[str, Any], able: Sequence[tuple[dict[str, Any], Contender]], options: argparse.Namespace, sizes: Sizes
) -> None:
    """Turns over all peers; a further round that would not be over in ``options.minutes`` is not begun."""
    began = time.monotonic()
    for number in range(options.rounds):
        spent = time.monotonic() - began
        if number and options.minutes and spent * (number + 1) / number > options.minutes * 60:
            break
        shift = number * 5 % max(1, len(able))  # nobody always runs behind the same neighbour
        for found, contender in [*able[shift:], *able[:shift]]:
            say(f"{time.strftime('%H:%M:%S')} round {number + 1}/{options.rounds} {contender.peer.name}:")
            found["rounds"].append(turn(contender, sizes, options.workload))
            say(f"  {summary(found['rounds'][-1])}\n")
            write(result, options)
        result["rounds"] = number + 1
        result["minutes"] = round((time.monotonic() - began) / 60, 1)


def command_line(options: argparse.Namespace) -> str:
    """What gives the same report on another machine: without the folders of this one."""
    words = [f"--{name}" for name in ("quick", "spin") if getattr(options, name)]
    words += [f"--rounds {options.rounds}"] if options.rounds != 5 else []
    words += [f"--minutes {options.minutes:g}"] if options.minutes else []
    words += ["--only " + ",".join(options.only)] if options.only else []
    words += ["--workload " + ",".join(options.workload)] if options.workload != list(WORKLOADS) else []
    return f'make bench-peers ARGS="{" ".join(words)}"' if words else "make bench-peers"


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
    parser.add_argument("--minutes", type=float, help="begin no further round that would not be over by then")
    parser.add_argument("--prepare", action="store_true", help="make the environments and measure nothing")
    parser.add_argument("--spin", action="store_true", help="keep the cores from halting, as ORCHESTRA_BENCH_SPIN does")
    parser.add_argument("--fresh", action="store_true", help="make the environments again")
    parser.add_argument(
        "--environments", type=Path, default=Path(".venv-peers"), help="where the environments are kept"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for peers.json, .md and .svg: benchmarks/results, or out/bench for a part"
    )
    options = parser.parse_args(arguments)
    part = options.quick or options.prepare or options.only or options.workload != list(WORKLOADS)
    options.output = options.output or (Path("out/bench") if part else COMMITTED)
    options.rounds = 0 if options.prepare else options.rounds or (1 if options.quick else 5)
    options.environments = options.environments.resolve()
    if not 1 <= options.rounds <= 100 and not options.prepare:
        parser.error(f"--rounds must be 1 to 100, got {options.rounds}")
    if options.minutes is not None and not 0 < options.minutes <= 1440:
        parser.error(f"--minutes must be above 0 and at most 1440, got {options.minutes:g}")
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
    """0, or 1 when orchestra itself failed a workload: a peer's failure is a finding. With ``--prepare``: 1 when one is missing."""
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
    if options.prepare:
        return int(any(row["reason"] for row in result["peers"]))
    print(report.markdown(result))
    print(f"written: {options.output}/peers.json, peers.md, peers.svg")
    return int(any(found.get("errors") for r in result["peers"] if r["own"] for found in r["rounds"]))


if __name__ == "__main__":
    sys.exit(main())
