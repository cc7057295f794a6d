"""The comparison as an SVG: one panel a workload, one bar a queue, linear from zero. No library: text and rectangles.

Colours follow the reader's light or dark scheme; a card behind everything keeps it readable where a page does not. † marks a
queue that returns before Redis has answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.peers.report import CONFIRMED, LESS_IS_BETTER, ranked, text

PANELS = (
    ("drain", "no-op drain by one worker process, tasks/s"),
    ("bulk", "bulk enqueue by one process, tasks/s"),
    ("p50", "send → agent starts, p50 in µs: less is better"),
    ("p99", "send → agent starts, p99 in µs: less is better"),
    ("ideal", "1,000 agents at once that sleep 0.1 s, of the ideal"),
    ("single", "one by one, each confirmed, tasks/s"),
)
WIDTH, COLUMN, LABEL, BAR, ROW, TOP, EDGE = 900, 442, 168, 200, 16, 32, 14
STYLE = (
    ".c{fill:#ffffff;stroke:#d0d7de}text{font:11px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#24292f}"
    ".t{font-weight:600;font-size:13px}.s{fill:#57606a;font-size:11px}.p{fill:#8c959f}.o{fill:#cf4a1f}.b{font-weight:600}"
    "@media(prefers-color-scheme:dark){.c{fill:#0d1117;stroke:#30363d}text{fill:#e6edf3}.s{fill:#9198a1}.p{fill:#6e7681}"
    ".o{fill:#f0703f}}"
)


def svg(result: dict[str, Any]) -> str:
    """All panels in two columns, and one line about where the figures are from."""
    rows = [row for row in ranked(result["peers"]) if row["reason"] is None]
    parts, y = [], EDGE
    for pair in (PANELS[:2], PANELS[2:4], PANELS[4:]):
        shown = {key: [row for row in rows if row["figures"].get(key)] for key, _ in pair}
        if any(shown.values()):
            parts += [_panel(shown[key], key, title, EDGE + COLUMN * n, y) for n, (key, title) in enumerate(pair)]
            y += TOP + ROW * max(map(len, shown.values())) + 14
    plural = "s" * (result["rounds"] != 1)
    about = f"medians of {result['rounds']} round{plural}, {result['machine'].split(', hiredis')[0]}"
    parts.append(f'<text class="s" x="{EDGE}" y="{y + 4}">{escape(about)}</text>')
    y += EDGE + 4
    card = f'<rect class="c" x="0.5" y="0.5" width="{WIDTH - 1}" height="{y - 1}" rx="6"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
        f'aria-label="orchestra beside other queues"><style>{STYLE}</style>{card}{"".join(parts)}</svg>\n'
    )


def _panel(rows: Sequence[dict[str, Any]], key: str, title: str, x: int, y: int) -> str:
    if not rows:
        return ""
    order = sorted(rows, key=lambda row: row["figures"][key], reverse=key not in LESS_IS_BETTER)
    longest = 1.0 if key == "ideal" else max(row["figures"][key] for row in rows)
    parts = [f'<text class="t" x="{x}" y="{y + 13}">{escape(title)}</text>']
    for number, row in enumerate(order):
        value, top = row["figures"][key], y + TOP - 8 + number * ROW
        width = max(1.0, BAR * min(1.0, value / longest))
        kind, weight = ("o", ' class="b"') if row["own"] else ("p", "")
        mark = " †" if key in CONFIRMED and row["observed"].get(key) is False else ""
        parts.append(
            f'<text{weight} x="{x + LABEL}" y="{top + 10}" text-anchor="end">{escape(row["name"])}</text>'
            f'<rect class="{kind}" x="{x + LABEL + 6}" y="{top}" width="{width:.1f}" height="{ROW - 4}" rx="2"/>'
            f'<text{weight} x="{x + LABEL + 12 + width:.1f}" y="{top + 10}">{text(key, value)}{mark}</text>'
        )
    return "".join(parts)
