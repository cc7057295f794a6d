"""Medians of all rounds as JSON and as one Markdown table. Owns the words; refuses to own how a figure is taken."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

COLUMNS = (
    ("drain", "no-op drain, tasks/s"),
    ("of_raw", "of the raw drain"),
    ("bulk", "bulk enqueue, tasks/s"),
    ("single", "one by one, tasks/s"),
    ("p50", "send → start p50, µs"),
    ("p99", "p99, µs"),
    ("ideal", "10,000 × 0.1 s, of ideal"),
    ("bytes", "Redis bytes a task"),
    ("worker_mib", "worker, MiB"),
    ("server_us", "server CPU a task, µs"),
)
LESS_IS_BETTER = frozenset(("p50", "p99", "bytes", "worker_mib", "server_us"))


def median(rounds: Sequence[dict[str, Any]], key: str) -> float | None:
    """Median of a figure over the rounds that have it."""
    values = [found[key] for found in rounds if found.get(key) is not None]
    return statistics.median(values) if values else None


def figures(rounds: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The medians of one queue; ``of_raw`` is the median of the ratios within each round."""
    ratios = [{"of_raw": r["drain"] / r["raw"]["drain"]} for r in rounds if r.get("drain") and r.get("raw")]
    found = {key: median(rounds, key) for key, _ in COLUMNS if key != "of_raw"}
    return {**found, "of_raw": median(ratios, "of_raw"), "cut": median(rounds, "cut")}


def raw_figures(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The medians of the raw ceiling over all turns."""
    raws = [found["raw"] for row in rows for found in row["rounds"] if found.get("raw")]
    return {key: median(raws, key) for key, _ in COLUMNS}


def text(key: str, value: float | None) -> str:
    """One cell."""
    if value is None:
        return "–"
    if key == "ideal":
        return f"{value:.0%}"
    if key == "of_raw":
        return f"{value:.2f}" if value >= 0.1 else f"1/{1 / value:,.0f}"
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours first, then the fastest drain first, then those without one."""
    return sorted(rows, key=lambda row: (not row["own"], -(row["figures"].get("drain") or 0.0), row["name"]))


def leads(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far the first row of ours is ahead of the best peer, one line a column."""
    ours = next((row for row in rows if row["own"] and any(row["figures"].values())), None)
    peers = [row for row in rows if not row["own"]]
    lines = []
    for key, title in COLUMNS:
        among = [p for p in peers if p["figures"].get(key) and (key != "bytes" or p["deduplicates"])]
        mine = ours["figures"].get(key) if ours else None
        if key in ("of_raw", "server_us", "worker_mib") or not among or not mine:
            continue
        less = key in LESS_IS_BETTER
        best = min(among, key=lambda row: row["figures"][key] * (1 if less else -1))
        factor = best["figures"][key] / mine if less else mine / best["figures"][key]
        who = "the best peer that deduplicates" if key == "bytes" else "the best peer"
        lines.append(f"- {title}: {factor:.1f} × {who} ({best['name']}, {text(key, best['figures'][key])})")
    return lines


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every queue that did not run, and every workload that failed, with the reason."""
    lines = [f"- {row['name']}: not run: {row['reason']}" for row in rows if row["reason"]]
    for row in rows:
        seen = {(name, why) for found in row["rounds"] for name, why in found.get("errors", {}).items()}
        lines += [f"- {row['name']}, {name}: {why}" for name, why in sorted(seen)]
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    rows = ranked(result["peers"])
    head = ["queue", "version", *(title for _, title in COLUMNS), "kept until run", "deduplicates", "note"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    raw = raw_figures(rows)
    lines.append(
        "| " + " | ".join(["raw ceiling", "", *(text(key, raw.get(key)) for key, _ in COLUMNS), "", "", ""]) + " |"
    )
    for row in rows:
        if row["reason"] is None:
            lines.append("| " + " | ".join(_cells(row)) + " |")
    sections = [
        _head(result),
        "\n".join(lines),
        "\\* cut at the time limit and rated by what was handled until then.",
        "orchestra (first row) compared:\n\n" + "\n".join(leads(rows)),
    ]
    if found := problems(rows):
        sections.append("What did not run:\n\n" + "\n".join(found))
    sections.append("Versions and settings:\n\n" + "\n".join(_facts(row) for row in rows if row["facts"]))
    return "\n\n".join(sections) + "\n"


def _head(result: dict[str, Any]) -> str:
    how = f"`{result['command']}`: medians of {result['rounds']} round{'s' * (result['rounds'] != 1)}, in turns"
    return f"{result['machine']}\n\n{how}, over TCP on the loopback; one worker process each."


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [text(key, row["figures"].get(key)) for key, _ in COLUMNS]
    if row["figures"].get("cut"):
        cells[0] += " \\*"
    version = next(iter((row["facts"] or {}).get("versions", {}).values()), "")
    yes = {True: "yes", False: "no"}
    return [row["name"], version, *cells, yes[row["acknowledges"]], yes[row["deduplicates"]], row["note"]]


def _facts(row: dict[str, Any]) -> str:
    facts = row["facts"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    loop = ", uvloop" if facts["uvloop"] else ""
    return f"- {row['name']}: {versions}; {facts['runtime']}{loop}; `{facts['settings']}`"
