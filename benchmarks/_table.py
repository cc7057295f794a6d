"""The comparisons of one run and the table they end in.

Owns taking turns (raw, ours, raw, ours, …), medians, and the words of the table. Refuses to own how a figure is taken.
A comparison runs ``rounds`` times: 5, or 3 with ``ORCHESTRA_BENCH_QUICK=1``, or once and tiny where pytest-benchmark is
disabled. ``ORCHESTRA_BENCH_STRICT=1`` makes a missed target a failure.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUICK = os.environ.get("ORCHESTRA_BENCH_QUICK", "") not in ("", "0")
STRICT = os.environ.get("ORCHESTRA_BENCH_STRICT", "") not in ("", "0")
JSON_PATH = Path(os.environ.get("ORCHESTRA_BENCH_JSON", ".benchmarks/orchestra.json"))
HEAD = ("workload", "orchestra", "raw ceiling", "ratio", "owed", "")


@dataclass(slots=True, eq=False)
class Row:
    """One workload. ``owed`` is a bound of the ratio, or of the figure itself where there is no ceiling.

    With ``less_is_better`` it is an upper bound, else a lower one.
    """

    name: str
    unit: str
    owed: float | None = None
    less_is_better: bool = False
    ours: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Our median over the ceiling's."""
        return statistics.median(self.ours) / statistics.median(self.raw) if self.raw else None

    @property
    def met(self) -> bool | None:
        """Whether what is owed was reached; None where nothing is."""
        if self.owed is None:
            return None
        value = statistics.median(self.ours) if self.ratio is None else self.ratio
        return value <= self.owed if self.less_is_better else value >= self.owed

    def cells(self) -> tuple[str, ...]:
        """As text, one string a column."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        sign, suffix = "≤" if self.less_is_better else "≥", "" if self.raw else f" {self.unit}"
        owed = "" if self.owed is None else f"{sign} {self.owed:g}{suffix}"
        return (self.name, self._text(self.ours), self._text(self.raw), ratio, owed, _VERDICT[self.met])

    def _text(self, values: Sequence[float]) -> str:
        if not values:
            return ""
        low, high = _number(min(values)), _number(max(values))
        spread = f" [{low}..{high}]" if len(values) > 1 else ""
        return f"{_number(statistics.median(values))} {self.unit}{spread}"


_VERDICT = {True: "met", False: "MISSED", None: ""}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Comparisons:
    """What the tests of one run have measured."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.server = ""

    def run(self, benchmark: Any, ours: Callable[[], dict[Row, Any]], raw: Callable[[], dict[Row, Any]]) -> None:
        """Measure in turns; each call returns what it found for each row: one number or several."""
        rows: dict[str, Row] = {}

        def note(found: dict[Row, Any], side: str) -> None:
            for row, value in found.items():
                known = rows.setdefault(row.name, row)
                getattr(known, side).append(value)

        rounds = 1 if benchmark.disabled else 3 if QUICK else 5
        benchmark.pedantic(lambda: note(ours(), "ours"), setup=lambda: note(raw(), "raw"), rounds=rounds, iterations=1)
        self.rows += rows.values()
        for row in rows.values():
            benchmark.extra_info[row.name] = asdict(row)
        if STRICT and not benchmark.disabled:
            assert all(row.met is not False for row in rows.values()), [row.cells() for row in rows.values()]

    def write_json(self, path: Path = JSON_PATH) -> None:
        """All figures of the run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in self.rows]
        path.write_text(json.dumps({"machine": machine(self.server), "quick": QUICK, "rows": rows}, indent=1) + "\n")

    def table(self) -> list[str]:
        """The lines of a Markdown table."""
        cells = [HEAD, *(row.cells() for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(HEAD))]
        lines = [
            "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def machine(server: str) -> str:
    """Versions and the class of the machine, in one line."""
    cpu = platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{len(models)} x {models[0]}" if models else cpu
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("hiredis", "redis", "numpy"))
    return f"{cpu}, {platform.system()} {platform.release()}, Python {platform.python_version()}, {server}, {packages}, {load}"
