"""``orchestra stats``: how many tasks are where, once or continuously."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from orchestra.app import App
from orchestra.cli._options import (
    JsonOption,
    QueueOption,
    RedisOption,
    examples,
    manager_of,
    opened,
    queues,
    workers_alive,
)
from orchestra.cli._output import clean, console, print_json, row, say, table
from orchestra.connections import ConnectionManager
from orchestra.errors import ConfigurationError, StoreUnavailableError
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import TaskPriority, require_number

if TYPE_CHECKING:
    from orchestra._queue.base import QueueStats

EPILOG = examples("orchestra stats", "orchestra stats triage --watch", "orchestra stats jobs:app --json")
SHOWN = ("produced", "completed", "retried", "throttled", "reclaimed", "dead", "cancelled", "replayed", "duplicates")


def stats(
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="[QUEUE|TARGET]",
            help="A queue, or the app it belongs to; all queues by default.",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option("--interval", metavar="SECONDS", help="How often with --watch.")] = 1.0,
    redis: RedisOption = None,
    queue: QueueOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show how many tasks are waiting, in flight, delayed and dead.

    With --watch also how many end per second; it ends with Ctrl-C, status 130.

    Exit status: 0, 1 if Redis failed, 2 wrong usage.
    """
    require_number("--interval", interval, 0.1, 3600.0, unit="seconds")
    return asyncio.run(_stats(place, redis, queue, interval if watch else None, as_json=as_json))


async def _stats(
    place: str | None, redis: str | None, queue: str | None, interval: float | None, *, as_json: bool
) -> int:
    if place is not None or queue is not None:
        async with opened(place, redis, queue) as app:
            source = _Source(manager_of(app), [app.queue_name])
            return await _show(source, interval, as_json=as_json)
    probe = App("orchestra", redis)
    if probe.address.scheme == "memory":
        raise ConfigurationError("memory: lives inside one process: give --redis URL", field="redis")
    async with ConnectionManager(probe.address) as manager:
        source = _Source(manager, None)
        return await _show(source, interval, as_json=as_json)


class _Source:
    """Reads the statistics of chosen queues, or of all that there are, and how many tasks ended per second."""

    def __init__(self, manager: ConnectionManager, names: list[str] | None) -> None:
        self.manager = manager
        self._names = names
        self._queues: dict[str, RedisStreamTaskQueue] = {}
        self._seen: dict[str, tuple[float, int]] = {}
        self.rates: dict[str, float] = {}
        self.workers: dict[str, int] = {}

    async def read(self) -> list[QueueStats]:
        names = self._names if self._names is not None else await queues(self.manager)
        found = []
        for name in names:
            if name not in self._queues:
                self._queues[name] = RedisStreamTaskQueue(name, "workers", manager=self.manager)
            one = await self._queues[name].stats()
            found.append(one)
            self.workers[name] = await workers_alive(self.manager, name)
            self._rate(one)
        return found

    def _rate(self, one: QueueStats) -> None:
        now, ended = time.monotonic(), one.counters.get("completed", 0) + one.counters.get("dead", 0)
        then, before = self._seen.get(one.queue, (now, ended))
        if now > then:
            self.rates[one.queue] = (ended - before) / (now - then)
        self._seen[one.queue] = (now, ended)

    async def close(self) -> None:
        for queue in self._queues.values():
            await queue.close()


async def _show(source: _Source, interval: float | None, *, as_json: bool) -> int:
    try:
        if interval is None:
            _once(await source.read(), source, as_json=as_json)
        elif as_json or not sys.stdout.isatty():
            await _lines(source, interval, as_json=as_json)
        else:
            await _live(source, interval)
    finally:
        await source.close()
    return 0


def _once(found: list[QueueStats], source: _Source, *, as_json: bool) -> None:
    if as_json:
        for one in found:
            print_json(_facts(one, source))
        return
    say(f"on {source.manager.address.safe}")
    if not found:
        say("there are no queues yet: a queue appears with its first task")
        return
    console().print(_view(found, source))


def _facts(one: QueueStats, source: _Source) -> dict[str, Any]:
    return {**asdict(one), "live": one.live, "workers": source.workers[one.queue]}


def _view(found: list[QueueStats], source: _Source) -> Group:
    parts: list[Any] = []
    for one in found:
        head = f"queue {clean(one.queue)}: {one.live} live, {one.delayed} of them delayed; {one.dead} dead; "
        workers = source.workers[one.queue]
        head += f"{workers} worker{'' if workers == 1 else 's'}"
        if one.queue in source.rates:
            head += f"; {source.rates[one.queue]:,.1f} ended per second"
        lanes = table("lane", ("waiting", "right"), ("in flight", "right"))
        for lane in TaskPriority:
            busy = one.waiting[lane] or one.in_flight[lane]
            row(
                lanes,
                [f"  {lane.name.lower()}", f"{one.waiting[lane]:,}", f"{one.in_flight[lane]:,}"],
                None if busy else "dim",
            )
        ever = ", ".join(f"{one.counters[name]:,} {name}" for name in SHOWN if one.counters.get(name))
        parts += [Text(head, style="bold"), lanes, Text(f"  since it exists: {ever or 'nothing'}"), Text("")]
    return Group(*parts[:-1])


async def _lines(source: _Source, interval: float, *, as_json: bool) -> None:
    while True:
        for one in await source.read():
            if as_json:
                print_json({"time": time.time(), **_facts(one, source), "ended_per_s": source.rates.get(one.queue)})
                continue
            rate = source.rates.get(one.queue)
            speed = "" if rate is None else f" ended_per_s={rate:.1f}"
            waiting, flight = sum(one.waiting), sum(one.in_flight)
            print(
                f"queue={one.queue} waiting={waiting} in_flight={flight} delayed={one.delayed} dead={one.dead}{speed}",
                flush=True,
            )
        await asyncio.sleep(interval)


async def _live(source: _Source, interval: float) -> None:
    with Live(console=console(), auto_refresh=False, screen=False, transient=False) as live:
        while True:
            try:
                found = await source.read()
            except StoreUnavailableError as error:
                live.update(Text(clean(error), style="red"), refresh=True)
            else:
                head = Text(f"{time.strftime('%H:%M:%S')}  {source.manager.address.safe}  (Ctrl-C ends)", style="dim")
                live.update(Group(head, _view(found, source) if found else Text("no queues yet")), refresh=True)
            await asyncio.sleep(interval)
