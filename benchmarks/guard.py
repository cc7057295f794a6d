"""``python -m benchmarks.guard`` (``make bench-guard``): no ratio may fall below the committed baseline by more than its margin.

A check compares what a task costs us with what it costs an oracle or the raw server, in the same minute. Costs are CPU
time wherever there is some (a thread's, the server's, a worker process's): a machine that does other things too makes
wall clocks lie, and these hardly. Each round takes both sides in turns; the ratio is the oracle's best round over ours,
because disturbances only ever add. A check below its limit is measured again with three times the rounds, which are
added to the first, before it fails. There is no wall-clock assertion in the short form, and none in seconds at all.

Owns the rule, the baseline file and the table. Refuses to own how a cost is taken (:mod:`benchmarks.checks`).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestra.embedded import find_server

BASELINE = Path(__file__).with_name("baseline.json")
MORE = 3
"""How many times the rounds a check gets that seems to fail."""
ELSEWHERE = 2.0
"""By what a margin grows on another class of machine than the baseline's, see :func:`machine_class`."""
WIDEST = 0.6

Sample = Callable[[], float]
"""What one task costs, in any unit that both sides share; less is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One guarded ratio. ``setup`` gets the bench (servers, files) and returns our side and the oracle's."""

    name: str
    what: str
    setup: Callable[[Any], tuple[Sample, Sample]]
    rounds: int
    margin: float
    short: bool = True


@dataclass(slots=True)
class Finding:
    """What a check has found. ``limit`` is None without a baseline."""

    check: Check
    limit: float | None = None
    baseline: float | None = None
    ours: list[float] = field(default_factory=list)
    oracle: list[float] = field(default_factory=list)
    repeated: bool = False
    error: str = ""

    @property
    def ratio(self) -> float:
        """The oracle's best round over our best round: 2 says that we cost half."""
        return min(self.oracle) / min(self.ours) if self.ours else 0.0

    @property
    def passed(self) -> bool:
        """Whether the ratio is within the margin of the baseline; a new check passes."""
        return not self.error and (self.limit is None or self.ratio >= self.limit)


def margin_here(check: Check, *, same_class: bool) -> float:
    """The share by which the ratio may fall."""
    return check.margin if same_class else min(WIDEST, check.margin * ELSEWHERE)


def measure(finding: Finding, sides: tuple[Sample, Sample], rounds: int) -> None:
    """Take both sides in turns; who begins changes each round."""
    ours, oracle = sides
    for number in range(rounds):
        if number % 2:
            finding.ours.append(ours())
            finding.oracle.append(oracle())
        else:
            finding.oracle.append(oracle())
            finding.ours.append(ours())


def judge(check: Check, bench: Any, baseline: float | None, *, same_class: bool) -> Finding:
    """Measure one check, again if it seems to fail."""
    limit = None if baseline is None else baseline * (1 - margin_here(check, same_class=same_class))
    finding = Finding(check, limit, baseline)
    try:
        sides = check.setup(bench)
        measure(finding, sides, check.rounds)
        if not finding.passed:
            finding.repeated = True
            measure(finding, sides, check.rounds * MORE)
    except Exception as error:  # noqa: BLE001  a check that cannot run has failed, and the others still run
        finding.error = f"{type(error).__name__}: {error}"[:300]
    return finding


def machine_class() -> dict[str, str]:
    """What ratios depend on besides the code: the processor's model, and the minor versions of Python and the server."""
    model = platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    server = find_server()
    minor = ".".join(map(str, server.version[:2]))
    return {"cpu": model, "python": ".".join(platform.python_version_tuple()[:2]), "server": f"{server.kind} {minor}"}


def read_baseline(path: Path) -> dict[str, Any]:
    """The committed baseline; empty when there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_baseline(path: Path, findings: Iterable[Finding], versions: dict[str, str], command: str) -> None:
    """Set the baseline of what was measured; other checks keep theirs."""
    known = read_baseline(path).get("checks", {})
    fresh = {
        finding.check.name: {
            "ratio": round(finding.ratio, 3),
            "margin": finding.check.margin,
            "rounds": finding.check.rounds,
            "what": finding.check.what,
        }
        for finding in findings
        if not finding.error
    }
    text = {"machine": machine_class(), "versions": versions, "command": command, "checks": {**known, **fresh}}
    path.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n")


def line(finding: Finding) -> str:
    """One finding as text."""
    if finding.error:
        return f"FAILED  {finding.check.name}: {finding.error}"
    verdict = "ok    " if finding.passed else "FAILED"
    against = "no baseline yet"
    if finding.limit is not None:
        against = f"baseline {finding.baseline:.2f}, at least {finding.limit:.2f}"
    again = f", measured again ({len(finding.ours)} rounds)" if finding.repeated else ""
    return f"{verdict}  {finding.ratio:6.2f}  {finding.check.name} ({against}{again}): {finding.check.what}"


def run(checks: Sequence[Check], bench: Any, baseline: dict[str, Any]) -> list[Finding]:
    """Judge each check, and say so at once."""
    same = baseline.get("machine") == machine_class()
    if baseline and not same:
        print(
            f"another class of machine than the baseline's ({baseline['machine']}): margins are {ELSEWHERE:g} times as wide"
        )
    findings = []
    for check in checks:
        known = baseline.get("checks", {}).get(check.name, {}).get("ratio")
        findings.append(judge(check, bench, known, same_class=same))
        print(line(findings[-1]), flush=True)
    return findings


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="make bench-guard ARGS=", description="Guard the ratios of benchmarks/baseline.json."
    )
    parser.add_argument("--short", action="store_true", help="only what is CPU time, under 40 s")
    parser.add_argument("--update", action="store_true", help="make what is measured now the baseline")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="the file of the baseline")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every ratio holds, else 1."""
    from benchmarks.checks import CHECKS, Bench, versions

    options = parse(arguments)
    chosen = [check for check in CHECKS if options.only in check.name and (check.short or not options.short)]
    began = time.monotonic()
    with Bench() as bench:
        findings = run(chosen, bench, {} if options.update else read_baseline(options.baseline))
        if options.update:
            write_baseline(options.baseline, findings, versions(bench), "make bench-guard ARGS=--update")
    failed = [finding for finding in findings if not finding.passed]
    seconds = time.monotonic() - began
    print(f"bench-guard: {len(findings) - len(failed)} of {len(findings)} ratios hold, {seconds:.0f} s")
    if failed:
        print(
            "A ratio that fell for a reason is set anew with `make bench-guard ARGS=--update`, and the reason is told."
        )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
