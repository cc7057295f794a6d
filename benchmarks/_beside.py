"""Our compiled modules beside the library that a user would reach for: turns, the best of each side, a table.

Owns timing (CPU time of this thread) and telling which library is missing: its row says so. Refuses to own what is
called. The libraries are the ``bench`` extra of pyproject.toml.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TURNS = 9
MISSING = "not installed"


@dataclass(frozen=True, slots=True)
class Rival:
    """What is called on the other side: ``make`` gets the imported ``module`` and returns a call of no argument."""

    label: str
    module: str
    package: str
    make: Callable[[Any], Callable[[], Any]]
    operations: int = 1
    """How many operations one call makes."""


@dataclass(frozen=True, slots=True)
class Beside:
    """One line: nanoseconds of ours and theirs for one operation; None where the library is missing."""

    what: str
    ours_ns: float
    rival: str
    theirs_ns: float | None
    package: str

    def text(self) -> str:
        """As a line of a Markdown table."""
        if self.theirs_ns is None:
            return f"| {self.what} | {self.ours_ns:,.0f} ns | {self.rival} | {MISSING} | | {self.package} |"
        ratio = self.theirs_ns / self.ours_ns
        return f"| {self.what} | {self.ours_ns:,.0f} ns | {self.rival} | {self.theirs_ns:,.0f} ns | {ratio:.2f} | {self.package} |"


LINES: list[Beside] = []
"""What the tests of this run have found."""


def table() -> list[str]:
    """All lines as Markdown; the ratio is the library's time over ours."""
    return [
        "| operation | orchestra | beside | takes | ratio | version |",
        "|---|---|---|---|---|---|",
        *(line.text() for line in LINES),
    ]


def beside(benchmark: Any, what: str, ours: Callable[[], Any], rivals: Sequence[Rival], operations: int = 1) -> None:
    """Time ``ours`` and each rival in turns and note the lines; a smoke run calls each once."""
    calls = [(rival, _call(rival)) for rival in rivals]
    benchmark.pedantic(ours, rounds=1, iterations=1)
    if benchmark.disabled:
        for _, call in calls:
            if call is not None:
                call()
        return
    sides = [(ours, operations), *((call, rival.operations) for rival, call in calls if call is not None)]
    best = iter(_best_in_turns(sides))
    ours_ns = next(best)
    for rival, call in calls:
        theirs = None if call is None else next(best)
        LINES.append(Beside(what, ours_ns, rival.label, theirs, _version(rival.package)))
        benchmark.extra_info[rival.label] = MISSING if theirs is None else round(theirs / ours_ns, 2)


def _call(rival: Rival) -> Callable[[], Any] | None:
    try:
        return rival.make(importlib.import_module(rival.module))
    except ModuleNotFoundError:
        return None


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package if package == "Python" else f"{package}: {MISSING}"


def _best_in_turns(sides: Sequence[tuple[Callable[[], Any], int]]) -> list[float]:
    """Nanoseconds of CPU for one operation of each side, best of :data:`TURNS` blocks of about 10 ms."""
    loops = []
    for call, _ in sides:
        began = time.perf_counter()
        call()
        loops.append(max(1, min(100_000, int(0.01 / max(1e-7, time.perf_counter() - began)))))
    best = [float("inf")] * len(sides)
    for _ in range(TURNS):
        for number, (call, operations) in enumerate(sides):
            began = time.thread_time_ns()
            for _ in range(loops[number]):
                call()
            best[number] = min(best[number], (time.thread_time_ns() - began) / loops[number] / operations)
    return best
