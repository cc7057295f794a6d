"""How cost grows: ``python -m benchmarks.scaling`` (``make bench-scaling``), tables in Markdown and JSON.

Four tables: agents that run at once, the length of the backlog, the size of a body, and worker processes against one or
several servers. Owns their axes and figures. Every row tells CPU time of worker and server for one task: with fewer cores
than processes these carry over to other machines, and rates do not.
Rounds take turns over all rows of a table; figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import _raw
from benchmarks._gated import gated, queue_at, reports
from benchmarks._server import Server
from benchmarks._table import machine

FILL = 100_000
"""Tasks made and produced at a time."""


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


async def _fill(url: str, count: int, size: int) -> float:
    """Queue ``count`` tasks; seconds that producing took."""
    took = 0.0
    async with queue_at(url) as queue:
        await queue.produce_many([task(size)])
        left = count - 1
        while left:
            tasks = [task(size) for _ in range(min(left, FILL))]
            began = time.perf_counter()
            await queue.produce_many(tasks)
            took += time.perf_counter() - began
            left -= len(tasks)
    return took


def fill(server: Server, count: int, size: int = 0) -> dict[str, float]:
    """Queue ``count`` tasks in an empty server: the rate and the memory."""
    server.flush()
    before, used = server.memory(), server.cpu_seconds()
    took = asyncio.run(_fill(server.url, count, size))
    return {
        "enqueue /s": (count - 1) / took if took else 0.0,
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
    """The first ``window`` tasks of a long queue."""
    return {**fill(server, backlog), **drain([server], 1, window=min(window, backlog))}


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
        for servers in (1, 2, 4)
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
        [{"backlog": 10**n, "window": 100_000} for n in range(3, 8)],
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


def measure(table: Table, server: Server, rounds: int, *, quick: bool) -> list[Row]:
    """All rows of a table, in turns; a row that fails says why and is not tried again."""
    rows = [Row(axis) for axis in (table.quick if quick else table.full)]
    for number in range(rounds):
        for row in rows:
            if row.error:
                continue
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {table.name} {row.axis} round {number + 1}/{rounds} …")
            sys.stderr.flush()
            try:
                row.note(table.measure(server, **row.axis))
            except (OSError, RuntimeError, AssertionError) as error:
                row.error = f"{type(error).__name__}: {error}"
                sys.stderr.write(f" {row.error}\n")
                continue
            last = {name: values[-1] for name, values in row.figures.items()}
            sys.stderr.write(" " + ", ".join(f"{name} {cell(name, value)}" for name, value in last.items()) + "\n")
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench-scaling ARGS=", description="How cost grows.")
    names = [table.name for table in TABLES]
    parser.add_argument("--only", type=lambda value: value.split(","), default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="one round of small sizes")
    parser.add_argument("--rounds", type=int, help="rounds of which the medians are shown: 3, or 1 with --quick")
    parser.add_argument("--output", type=Path, default=Path("out/bench"), help="folder for scaling.json and scaling.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(names):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 when a row failed."""
    options = parse(arguments)
    server = Server()
    found: dict[str, list[Row]] = {}
    try:
        about = f"{machine(f'redis-server {server.version} on unix')}, {os.cpu_count()} cores"
        for table in TABLES:
            if table.name in options.only:
                found[table.name] = measure(table, server, options.rounds, quick=options.quick)
    finally:
        server.stop()
    command = "make bench-scaling" + (" ARGS='" + " ".join(sys.argv[1:]) + "'" if sys.argv[1:] else "")
    head = f"{about}\n\n`{command}`: medians of {options.rounds} rounds.\n"
    text = "\n".join([head, *(markdown(table, found[table.name]) for table in TABLES if table.name in found)])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scaling.md").write_text(text)
    rows = {name: [{**row.axis, **row.medians(), "error": row.error} for row in some] for name, some in found.items()}
    facts = {"machine": about, "command": command, "rounds": options.rounds, "quick": options.quick, "tables": rows}
    (options.output / "scaling.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(text)
    return int(any(row.error for some in found.values() for row in some))


if __name__ == "__main__":
    sys.exit(main())
