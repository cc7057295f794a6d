"""How cost grows: ``python -m benchmarks.scaling`` (``make bench-scaling``), tables in Markdown and JSON.

Four tables: agents that run at once, the length of the backlog, the size of a body, and worker processes against one or
several servers; and what follows from them for other rates. Owns their axes and figures. Every row tells CPU time of worker
and server for one task: with fewer cores than processes these carry over to other machines, and rates do not.
Rounds take turns over all rows of a table; figures are medians. A run that would outlast ``--minutes`` begins no further round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import _raw
from benchmarks._gated import answers, gated, open_gates, queue_at, reports
from benchmarks._server import Server
from benchmarks._table import machine

FILL = 100_000
"""Tasks made and produced at a time."""
BURSTS, BURST_SECONDS = 20, 60.0
RATES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
BUSY = 0.7
"""How much of a core the model lets a process use, so that queues in front of it stay short."""


@dataclass(slots=True)
class Row:
    """One line of a table: where on the axis, and the figures of all rounds by column."""

    axis: dict[str, Any]
    figures: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""

    def note(self, found: dict[str, float]) -> None:
        """Add the figures of one round."""
        for name, value in found.items():
            self.figures.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        """One figure a column."""
        return {name: statistics.median(values) for name, values in self.figures.items()}


@dataclass(frozen=True, slots=True)
class Table:
    """One table: ``rows`` for full and quick runs, and how one row is measured."""

    name: str
    title: str
    full: Sequence[dict[str, Any]]
    quick: Sequence[dict[str, Any]]
    measure: Callable[..., dict[str, float]]


def task(size: int = 0) -> dict[str, object]:
    """The task of every workload; ``size``: characters of text instead."""
    found = _raw.task()
    return {**found, "input": {"text": "x" * size}} if size else found


async def _fill(url: str, count: int, size: int) -> tuple[float, float]:
    """Queue ``count`` tasks; seconds that producing took, and of CPU."""
    took = cpu = 0.0
    async with queue_at(url) as queue:
        await queue.produce_many([task(size)])
        left = count - 1
        while left:
            tasks = [task(size) for _ in range(min(left, FILL))]
            began, used = time.perf_counter(), time.process_time()
            await queue.produce_many(tasks)
            took, cpu = took + time.perf_counter() - began, cpu + time.process_time() - used
            left -= len(tasks)
    return took, cpu


def fill(server: Server, count: int, size: int = 0) -> dict[str, float]:
    """Queue ``count`` tasks in an empty server: the rate and the memory."""
    server.flush()
    before, used = server.memory(), server.cpu_seconds()
    took, cpu = asyncio.run(_fill(server.url, count, size))
    return {
        "enqueue /s": (count - 1) / took if took else 0.0,
        "producer µs": cpu / count * 1e6,
        "server µs (enqueue)": (server.cpu_seconds() - used) / count * 1e6,
        "Redis B a task": (server.memory() - before) / count,
    }


def drain(
    servers: Sequence[Server], workers: int, concurrency: int = 100, window: int = 0, sleep: float = 0.0
) -> dict[str, float]:
    """``workers`` processes, dealt out to ``servers``, begin together."""
    settings = [
        {"url": servers[number % len(servers)].url, "concurrency": concurrency, "window": window, "sleep": sleep}
        for number in range(workers)
    ]
    with gated(settings) as processes:
        before = sum(server.cpu_seconds() for server in servers)
        found = reports(processes)
        used = sum(server.cpu_seconds() for server in servers) - before
    handled = sum(one["handled"] for one in found)
    active = [one for one in found if one["handled"]]
    took = (max(one["last"] for one in active) - min(one["first"] for one in active)) / 1e9
    return {
        "drain /s": handled / took,
        "worker µs": sum(one["cpu_s"] for one in found) / handled * 1e6,
        "server µs": used / handled * 1e6,
        "worker MiB": max(one["rss_mib"] for one in found),
    }


def agents(server: Server, agents: int, tasks: int, sleeps: int) -> dict[str, float]:
    """No-op agents, then agents that sleep 0.1 s."""
    fill(server, tasks)
    busy = drain([server], 1, agents)
    fill(server, sleeps)
    waiting = drain([server], 1, agents, sleep=0.1)
    found = {f"no-op {name}": busy[name] for name in ("drain /s", "worker µs")}
    return {
        **found,
        "sleeping /s": waiting["drain /s"],
        "of ideal": waiting["drain /s"] * 0.1 / agents,
        "worker MiB": waiting["worker MiB"],
    }


def backlog(server: Server, backlog: int, window: int) -> dict[str, float]:
    """The first ``window`` tasks of a long queue; of a short one as many backlogs as that, one after the other."""
    if backlog < window:
        return bursts(server, backlog, min(window // backlog, BURSTS))
    return {**fill(server, backlog), **drain([server], 1, window=window)}


def bursts(server: Server, backlog: int, count: int) -> dict[str, float]:
    """``count`` backlogs, each queued while the worker is stopped: it is warm, and each is timed from first to last task.

    A drain of 1,000 tasks from the start of a worker would tell how workers start.
    """
    filled = fill(server, backlog)
    held = server.memory()
    server.flush()
    filled["Redis B a task"] = (held - server.memory()) / backlog  # of so few, what Lua left behind would be half
    settings = {"url": server.url, "concurrency": 100, "window": backlog * count, "sleep": 0.0, "burst": backlog}
    with gated([settings]) as (one,):
        before = server.cpu_seconds()
        enqueue_cpu = 0.0
        open_gates([one])
        for _ in range(count):
            os.kill(one.pid, signal.SIGSTOP)
            used = server.cpu_seconds()
            try:
                asyncio.run(_fill(server.url, backlog, 0))
            finally:
                os.kill(one.pid, signal.SIGCONT)
            enqueue_cpu += server.cpu_seconds() - used
            _wait_until_empty(server, one)
        server_s = server.cpu_seconds() - before - enqueue_cpu
        (found,) = answers([one])
    handled = found["handled"]
    return {
        **filled,
        "drain /s": handled * 1e9 / (found["last"] - found["first"]),
        "worker µs": found["cpu_s"] / handled * 1e6,
        "server µs": server_s / handled * 1e6,
        "worker MiB": found["rss_mib"],
    }


def _wait_until_empty(server: Server, worker: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + BURST_SECONDS
    while server.raw.ask("XLEN", _raw.LANE):
        if worker.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"a backlog was not drained within {BURST_SECONDS:g} s")
        time.sleep(0.005)


def bodies(server: Server, bytes: int, tasks: int) -> dict[str, float]:  # noqa: A002  the name of the axis
    """Tasks whose input is a text of that size."""
    filled = fill(server, tasks, bytes)
    drained = drain([server], 1)
    megabytes = {"enqueue MB/s": filled["enqueue /s"] * bytes / 1e6, "drain MB/s": drained["drain /s"] * bytes / 1e6}
    return {**filled, **drained, **megabytes}


def workers(server: Server, servers: int, workers: int, tasks: int) -> dict[str, float]:
    """The same number of tasks on each server; further servers live as long as the row."""
    with contextlib.ExitStack() as stack:
        all_servers = [server]
        for _ in range(servers - 1):
            all_servers.append(Server())
            stack.callback(all_servers[-1].stop)
        for one in all_servers:
            fill(one, tasks // servers)
        found = drain(all_servers, workers)
        return {**found, "one server core carries /s": 1e6 / found["server µs"]}


def _workers(most: int, tasks: int) -> list[dict[str, Any]]:
    return [
        {"servers": servers, "workers": count, "tasks": tasks}
        for servers in (1, 2, 3, 4)
        for count in (1, 2, 4, 8)
        if servers <= count <= most
    ]


def _bodies(most: int) -> list[dict[str, Any]]:
    return [
        {"bytes": size, "tasks": max(16, min(20_000, most // size))}
        for size in (100, 1 << 10, 10 << 10, 100 << 10, (1 << 20) - 1024)
    ]


TABLES = (
    Table(
        "agents",
        "Agents that run at once",
        [{"agents": n, "tasks": 50_000, "sleeps": min(50_000, 20 * n)} for n in (1, 10, 100, 1_000, 10_000)],
        [{"agents": n, "tasks": 5_000, "sleeps": min(5_000, 5 * n)} for n in (1, 100, 1_000)],
        agents,
    ),
    Table(
        "backlog",
        "Length of the backlog, of which the first tasks are drained",
        [{"backlog": 10**n, "window": 200_000} for n in range(3, 8)],
        [{"backlog": 10**n, "window": 10_000} for n in range(3, 6)],
        backlog,
    ),
    Table("bodies", "Size of a body", _bodies(64 << 20), _bodies(4 << 20), bodies),
    Table("workers", "Worker processes and servers", _workers(8, 200_000), _workers(2, 10_000), workers),
)


def cell(name: str, value: float) -> str:
    """One figure as text."""
    if name == "of ideal":
        return f"{value:.0%}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(table: Table, rows: Sequence[Row]) -> str:
    """One table."""
    columns = list(dict.fromkeys(name for row in rows for name in row.figures))
    head = [*rows[0].axis, *columns]
    lines = [f"### {table.title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        found = row.medians()
        cells = [f"{value:,}" for value in row.axis.values()]
        cells += [cell(name, found[name]) if name in found else "–" for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{row.axis}: {row.error}" for row in rows if row.error]
    return "\n".join(lines) + "\n"


def model(found: dict[str, list[Row]]) -> list[dict[str, float]]:
    """What a rate costs, from CPU time a task: cores of producers and workers, partitions of Redis, its memory and traffic.

    Taken from the row of the longest backlog of which figures are known; empty without one.
    """
    rows = [row for row in found.get("backlog", ()) if row.figures]
    if not rows:
        return []
    cost = rows[-1].medians()
    server = cost["server µs (enqueue)"] + cost["server µs"]
    return [
        {
            "tasks/s": rate,
            "producer cores": rate * cost["producer µs"] / 1e6 / BUSY,
            "Redis partitions": math.ceil(rate * server / 1e6 / BUSY),
            "worker processes": math.ceil(rate * cost["worker µs"] / 1e6 / BUSY),
            "Redis MiB for a backlog of a minute": rate * 60 * cost["Redis B a task"] / 2**20,
        }
        for rate in RATES
    ]


def model_table(found: dict[str, list[Row]]) -> str:
    """The model as Markdown."""
    rows = model(found)
    if not rows:
        return ""
    lines = ["### What a rate costs", "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(cell(name, value) for name, value in row.items()) + " |" for row in rows]
    how = (
        f"\nTasks/s times CPU time a task (longest backlog above), every process at {BUSY:.0%} of a core. Agents do nothing here: "
        "their own CPU time comes on top of the workers'. Partitions share nothing, so that their number is the only thing "
        "that grows; the table of workers and servers shows by how much CPU time a task grows with it on one machine."
    )
    return "\n".join(lines) + "\n" + how + "\n"


def flatness(found: dict[str, list[Row]]) -> str:
    """How far the drain rate of any backlog is from the median of all, in one line."""
    rates = [row.medians()["drain /s"] for row in found.get("backlog", ()) if row.figures]
    if not rates:
        return ""
    middle = statistics.median(rates)
    return f"Drain rate over all lengths: {min(rates) / middle - 1:+.0%} to {max(rates) / middle - 1:+.0%} of their median.\n"


def measure(table: Table, server: Server | None, rounds: int, *, quick: bool, end: float = math.inf) -> list[Row]:
    """All rows of a table, in turns; a row that fails says why and is not tried again.

    No further round begins when it would not be over at ``end`` (monotonic seconds).
    """
    rows = [Row(axis) for axis in (table.quick if quick else table.full)]
    began = time.monotonic()
    for number in range(rounds):
        if number and began + (time.monotonic() - began) * (number + 1) / number > end:
            break
        for row in rows:
            if not row.error:
                _measure_row(table, row, server, f"round {number + 1}/{rounds}")
    return rows


def _measure_row(table: Table, row: Row, server: Server | None, which: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {table.name} {row.axis} {which} …")
    sys.stderr.flush()
    try:
        row.note(table.measure(server, **row.axis))
    except (OSError, RuntimeError, AssertionError) as error:
        row.error = f"{type(error).__name__}: {error}"
        sys.stderr.write(f" {row.error}\n")
        return
    last = {name: values[-1] for name, values in row.figures.items()}
    sys.stderr.write(" " + ", ".join(f"{name} {cell(name, value)}" for name, value in last.items()) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench-scaling ARGS=", description="How cost grows.")
    names = [table.name for table in TABLES]
    parser.add_argument("--only", type=lambda value: value.split(","), default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="one round of small sizes")
    parser.add_argument("--rounds", type=int, help="rounds of which the medians are shown: 3, or 1 with --quick")
    parser.add_argument(
        "--minutes", type=float, help="begin no further round of a table that would not be over in its share"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for scaling.json and .md: benchmarks/results, or out/bench for a part"
    )
    options = parser.parse_args(arguments)
    part = options.quick or set(options.only) != set(names)
    options.output = options.output or (Path("out/bench") if part else Path(__file__).parent / "results")
    if unknown := set(options.only) - set(names):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 when a row failed."""
    options = parse(arguments)
    server = Server()
    found: dict[str, list[Row]] = {}
    wanted = [table for table in TABLES if table.name in options.only]
    began = time.monotonic()
    try:
        about = f"{machine(f'redis-server {server.version} on unix')}, {os.cpu_count()} cores"
        for number, table in enumerate(wanted, 1):
            end = began + options.minutes * 60 * number / len(wanted) if options.minutes else math.inf
            found[table.name] = measure(table, server, options.rounds, quick=options.quick, end=end)
    finally:
        server.stop()
    write(options, about, found, (time.monotonic() - began) / 60)
    return int(any(row.error for some in found.values() for row in some))


def command_line(options: argparse.Namespace) -> str:
    """What gives the same report on another machine: without the folders of this one."""
    words = ["--quick"] if options.quick else []
    words += [f"--rounds {options.rounds}"] if options.rounds != (1 if options.quick else 3) else []
    words += [f"--minutes {options.minutes:g}"] if options.minutes else []
    words += ["--only " + ",".join(options.only)] if set(options.only) != {table.name for table in TABLES} else []
    return f'make bench-scaling ARGS="{" ".join(words)}"' if words else "make bench-scaling"


def write(options: argparse.Namespace, about: str, found: dict[str, list[Row]], minutes: float) -> None:
    """Both files, and the text on the terminal."""
    command = command_line(options)
    rounds = max((len(values) for some in found.values() for row in some for values in row.figures.values()), default=0)
    head = f"{about}\n\n`{command}`: medians of up to {rounds} rounds, in {minutes:.1f} minutes.\n"
    parts = [head]
    for table in TABLES:
        if table.name in found:
            parts.append(markdown(table, found[table.name]))
            parts += [flatness(found)] if table.name == "backlog" else []
    text = "\n".join([*parts, model_table(found)]).rstrip() + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scaling.md").write_text(text)
    rows = {name: [{**row.axis, **row.medians(), "error": row.error} for row in some] for name, some in found.items()}
    facts = {
        "machine": about,
        "command": command,
        "rounds": rounds,
        "minutes": round(minutes, 1),
        "quick": options.quick,
    }
    facts |= {"tables": rows, "model": model(found)}
    (options.output / "scaling.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
