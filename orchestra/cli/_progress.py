"""What ``orchestra run`` shows while it runs: a live display on a terminal, else one plain line every two seconds.

Reads the engine, changes nothing. All of it goes to standard error, so that standard output is the report alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import RenderableType

    from orchestra._jobs.job import JobEngine

PLAIN_EVERY = 2.0
LIVE_EVERY = 0.125
RATE_OVER = 10.0
"""Seconds over which the rate is measured."""


class ProgressView:
    """Shows ``engine`` while the context is open; nothing when ``quiet``."""

    def __init__(self, engine: JobEngine, console: Console, *, quiet: bool) -> None:
        self._engine = engine
        self._console = console
        self._quiet = quiet
        self._began = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque()
        self._live: Live | None = None
        self._task: asyncio.Task[None] | None = None
        self.note = ""
        """Said beside the numbers, such as why it is ending."""

    async def __aenter__(self) -> Self:
        if not self._quiet:
            if self._console.is_terminal:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._task = asyncio.get_running_loop().create_task(self._show(), name="orchestra:progress")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    async def _show(self) -> None:
        while True:
            self._measure()
            if self._live is not None:
                self._live.update(self._picture(), refresh=True)
            elif self._engine.total:
                self._console.print(self._line(), soft_wrap=True)
            await asyncio.sleep(LIVE_EVERY if self._live is not None else PLAIN_EVERY)

    # -- numbers

    def _measure(self) -> None:
        now, fresh = time.monotonic(), self._engine.ended - self._engine.resumed
        self._seen.append((now, fresh))
        while len(self._seen) > 2 and now - self._seen[0][0] > RATE_OVER:
            self._seen.popleft()

    @property
    def _rate(self) -> float:
        (then, before), (now, after) = self._seen[0], self._seen[-1]
        return (after - before) / (now - then) if now > then else 0.0

    @property
    def _eta(self) -> str:
        engine = self._engine
        if not self._rate or (engine.feeding and not engine.expected):
            return "-"
        return clock((engine.total - engine.ended) / self._rate)

    def _counts(self) -> list[tuple[str, int, str]]:
        engine, tally = self._engine, self._engine.tally
        dead = sum(progress.dead for progress in engine.types.values())
        counts = [
            ("done", engine.ended - dead, "green"),
            ("running", tally.running, "cyan"),
            ("retrying", len(tally.retrying), "yellow"),
            ("dead", dead, "red"),
        ]
        for word, number in (("held back", len(tally.throttled)), ("restarts", tally.restarts), ("bad", engine.bad)):
            if number:
                counts.append((word, number, "yellow"))
        return counts

    # -- pictures

    def _line(self) -> str:
        engine = self._engine
        words = ", ".join(f"{number:,} {word}" for word, number, _ in self._counts())
        more = "+" if engine.feeding and not engine.expected else ""
        tail = f", {self.note}" if self.note else ""
        return f"{engine.ended:,}/{engine.total:,}{more}: {words}, {self._rate:,.0f}/s, ETA {self._eta}{tail}"

    def _picture(self) -> RenderableType:
        engine = self._engine
        head = Table.grid(padding=(0, 2))
        share = engine.ended / engine.total if engine.total else 0.0
        open_end = engine.feeding and not engine.expected
        bar = ProgressBar(
            total=engine.total or 1, completed=engine.ended, width=36, pulse=open_end and not engine.total
        )
        name = Text(engine.app.name, style="bold")
        head.add_row(
            name,
            bar,
            f"{share:4.0%}" if not open_end else "",
            f"{engine.ended:,}/{engine.total:,}{'+' if open_end else ''}",
            f"{self._rate:,.0f}/s",
            clock(time.monotonic() - self._began),
            f"ETA {self._eta}",
        )
        counts = Text("  ").join(
            Text.assemble((f"{number:,}", f"bold {style}" if number else "dim"), f" {word}")
            for word, number, style in self._counts()
        )
        if self.note:
            counts.append(f"  {self.note}", style="bold yellow")
        return Group(head, counts, self._type_rows())

    def _type_rows(self) -> Table:
        rows = Table.grid(padding=(0, 2))
        for _ in range(2):
            rows.add_column(justify="left")
        for _ in range(5):
            rows.add_column(justify="right", min_width=7)
        for name, progress in self._engine.types.items():
            tally = self._engine.tally.of(name)
            ended = progress.completed + progress.dead
            rows.add_row(
                Text(f"  {name}", style="dim" if ended == progress.total else ""),
                ProgressBar(total=progress.total or 1, completed=ended, width=20),
                f"{ended:,}/{progress.total:,}",
                Text(f"{tally.running} running", style="cyan") if tally.running else "",
                Text(f"{tally.retries} retries", style="yellow") if tally.retries else "",
                Text(f"{progress.dead} dead", style="red") if progress.dead else "",
                Text(f"{duration(tally.times.mean)} each", style="dim"),
            )
        return rows


def clock(seconds: float) -> str:
    """``1:05`` or ``2:00:09``."""
    whole = max(0, round(seconds))
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def duration(seconds: float | None) -> str:
    """``85 µs``, ``1.4 ms``, ``2.1 s``, or a dash while unknown."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.0f} µs"
