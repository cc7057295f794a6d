"""The comparison as an SVG: one panel a workload, one bar a queue, linear from zero. No library: text and rectangles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.peers.report import LESS_IS_BETTER, ranked, text

PANELS = (
    ("drain", "no-op drain, tasks/s"),
    ("bulk", "bulk enqueue, tasks/s"),
    ("p50", "send → start, p50 µs (less is better)"),
)
WIDTH, LABEL, BAR, ROW, TOP = 880, 150, 560, 19, 34
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.t{font-weight:600;font-size:13px}"
    ".p{fill:#8c959f}.o{fill:#cf4a1f}@media(prefers-color-scheme:dark){text{fill:#e6edf3}.p{fill:#6e7681}}"
)


def svg(result: dict[str, Any]) -> str:
    """All panels, one below the other."""
    rows = [row for row in ranked(result["peers"]) if row["reason"] is None]
    parts, y = [], 8
    for key, title in PANELS:
        shown = [row for row in rows if row["figures"].get(key)]
        if shown:
            parts.append(_panel(shown, key, title, y))
            y += TOP + ROW * len(shown) + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
        f'aria-label="orchestra beside other queues"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _panel(rows: Sequence[dict[str, Any]], key: str, title: str, y: int) -> str:
    order = sorted(rows, key=lambda row: row["figures"][key], reverse=key not in LESS_IS_BETTER)
    longest = max(row["figures"][key] for row in rows)
    parts = [f'<text class="t" x="8" y="{y + 16}">{escape(title)}</text>']
    for number, row in enumerate(order):
        value, top = row["figures"][key], y + TOP - 6 + number * ROW
        width = max(1.0, BAR * value / longest)
        kind = "o" if row["own"] else "p"
        parts.append(
            f'<text x="{LABEL}" y="{top + 11}" text-anchor="end">{escape(row["name"])}</text>'
            f'<rect class="{kind}" x="{LABEL + 8}" y="{top}" width="{width:.1f}" height="{ROW - 5}" rx="2"/>'
            f'<text x="{LABEL + 14 + width:.1f}" y="{top + 11}">{text(key, value)}</text>'
        )
    return "".join(parts)
