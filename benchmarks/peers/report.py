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
    ("ideal", "agents of 0.1 s, of ideal"),
    ("bytes", "Redis bytes a task"),
    ("worker_mib", "worker, MiB"),
    ("server_us", "server CPU a task, µs"),
)
OBSERVED = (("kept", "kept until run"), ("deduplicates", "deduplicates"))
LESS_IS_BETTER = frozenset(("p50", "p99", "bytes", "worker_mib", "server_us"))
NOT_COMPARED = frozenset(("of_raw", "server_us", "worker_mib"))
CONFIRMED = frozenset(("single", "bulk"))
"""Workloads whose definition is that the queue confirms; observed by :mod:`benchmarks.peers.verify` under the same names."""
NOTES = (
    "\\* cut at the time limit and rated by what was handled until then. † the call returns before Redis has answered: not the "
    "workload, and not compared. ‡ the payload was not found in Redis as it was sent. These marks, *kept until run* (the task "
    "is still in Redis while its agent runs) and *deduplicates* (a second task of the same id was not queued) are observed, "
    "in the configuration that was measured."
)


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
    """Ours first, as they were, then the fastest drain first, then those without one."""
    ours = [row for row in rows if row["own"]]
    peers = [row for row in rows if not row["own"]]
    return ours + sorted(peers, key=lambda row: (-(row["figures"].get("drain") or 0.0), row["name"]))


def compared(row: dict[str, Any], key: str) -> bool:
    """Whether a figure of a peer is the workload that the column is about."""
    if not row["figures"].get(key):
        return False
    if key == "bytes":
        return bool(row["observed"].get("deduplicates"))
    return key not in CONFIRMED or row["observed"].get(key) is not False


def leads(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far each row of ours is ahead of the best peer, one line a column."""
    peers = [row for row in rows if not row["own"]]
    lines = []
    for key, title in COLUMNS:
        among = [row for row in peers if compared(row, key)]
        ours = [row for row in rows if row["own"] and row["figures"].get(key)]
        if key in NOT_COMPARED or not among or not ours:
            continue
        less = key in LESS_IS_BETTER
        best = min(among, key=lambda row: row["figures"][key] * (1 if less else -1))
        factors = [_factor(row["figures"][key], best["figures"][key], less=less) for row in ours]
        who = "the best peer that deduplicates" if key == "bytes" else "the best peer"
        shown = ", ".join(f"{row['name']} {factor:.1f} ×" for row, factor in zip(ours, factors, strict=True))
        lines.append(f"- {title}: {shown} {who} ({best['name']}, {text(key, best['figures'][key])})")
    return lines


def _factor(mine: float, theirs: float, *, less: bool) -> float:
    return theirs / mine if less else mine / theirs


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every queue that did not run, and every workload that failed, with the reason."""
    lines = [f"- {row['name']}: not run: {row['reason']}" for row in rows if row["reason"]]
    for row in rows:
        seen = {(name, why) for found in row["rounds"] for name, why in found.get("errors", {}).items()}
        if why := row["observed"].get("why"):
            seen.add(("observation", why))
        lines += [f"- {row['name']}, {name}: {why}" for name, why in sorted(seen)]
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    rows = ranked(result["peers"])
    head = ["queue", "version", *(title for _, title in COLUMNS + OBSERVED), "note"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    raw = raw_figures(rows)
    lines.append(
        "| " + " | ".join(["raw ceiling", "", *(text(key, raw.get(key)) for key, _ in COLUMNS), "", "", ""]) + " |"
    )
    for row in rows:
        if row["reason"] is None:
            lines.append("| " + " | ".join(_cells(row)) + " |")
    sections = [_head(result), "\n".join(lines), NOTES, "orchestra compared:\n\n" + "\n".join(leads(rows))]
    if found := problems(rows):
        sections.append("What did not run:\n\n" + "\n".join(found))
    sections.append("Versions and settings:\n\n" + "\n".join(_facts(row) for row in rows if row["facts"]))
    return "\n\n".join(sections) + "\n"


def _head(result: dict[str, Any]) -> str:
    took = f" in {result['minutes']:g} minutes" if result.get("minutes") else ""
    how = f"`{result['command']}`: medians of {result['rounds']} round{'s' * (result['rounds'] != 1)}{took}, in turns"
    return f"{result['machine']}\n\n{how}, over TCP on the loopback; one worker process each."


def _cells(row: dict[str, Any]) -> list[str]:
    seen = row["observed"]
    cells = {key: text(key, row["figures"].get(key)) for key, _ in COLUMNS}
    for key in CONFIRMED:
        cells[key] += " †" if seen.get(key) is False and row["figures"].get(key) else ""
    if row["figures"].get("cut"):
        cells["drain"] += " \\*"
    if seen.get("carries") is False:
        cells["bytes"] += " ‡"
    version = next(iter((row["facts"] or {}).get("versions", {}).values()), "")
    words = {True: "yes", False: "no", None: "?"}
    return [row["name"], version, *cells.values(), *(words[seen.get(key)] for key, _ in OBSERVED), row["note"]]


def _facts(row: dict[str, Any]) -> str:
    facts = row["facts"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    loop = ", uvloop" if facts["uvloop"] else ""
    return f"- {row['name']}: {versions}; {facts['runtime']}{loop}; `{facts['settings']}`"
