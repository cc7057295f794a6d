"""The command line of the chaos runner, and what it prints."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.chaos.history import Line
from tests.faults.chaos.mutants import MUTANTS
from tests.faults.chaos.plan import FAULTS, Plan, make_plan
from tests.faults.chaos.run import Report, judge, minimise, run


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        prog="python -m tests.faults", description="Chaos against the queue, and a judge of it."
    )
    p.add_argument("--seed", type=int, default=None, help="of workload and faults (default: by the clock)")
    p.add_argument("--minutes", type=float, default=1.0, help="how long tasks are sent (default 1)")
    p.add_argument("--workers", type=int, default=3)
    p.add_argument("--producers", type=int, default=2)
    p.add_argument("--rate", type=float, default=60.0, help="tasks a second (default 60)")
    p.add_argument("--every", type=float, default=0.7, help="mean seconds between two faults (default 0.7)")
    p.add_argument(
        "--crashes", type=float, default=6.0, help="agents a minute that take their process down (default 6)"
    )
    p.add_argument("--lease", type=float, default=1.5, help="seconds (default 1.5)")
    p.add_argument("--fsync", choices=("always", "everysec"), default="always", help="of the append-only file")
    p.add_argument("--faults", default=None, help=f"kinds, by comma; none: no fault; default all: {','.join(FAULTS)}")
    p.add_argument("--replay", type=Path, help="a saved plan.json instead of a seed")
    p.add_argument("--judge", type=Path, help="no run: the verdict on the directory of an earlier one")
    p.add_argument("--minimise", action="store_true", help="if it fails, drop faults while it still does")
    p.add_argument(
        "--mutant", choices=sorted(MUTANTS), help="run with this defect, with its own plan unless --seed is given"
    )
    p.add_argument("--mutants", action="store_true", help="run every mutant's plan; with --control also without it")
    p.add_argument("--control", action="store_true", help="run the plans of the mutants without the mutants")
    p.add_argument("--out", type=Path, help="directory for plan, histories and logs (default: a new one in TMPDIR)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when all is well, 1 when a rule was broken (or a mutant was not caught)."""
    options = parser().parse_args(argv)
    if options.mutants or options.control:
        return run_mutants(control=options.control, only=options.mutant)
    if options.judge is not None:
        report = judge(options.judge)
        print_report(report)
        return 0 if report.ok else 1
    plan = _plan_of(options)
    out = options.out or Path(tempfile.mkdtemp(prefix="orc-chaos-"))
    say(
        f"seed {plan.seed}: {len(plan.tasks())} tasks, {len(plan.faults)} faults in {plan.seconds:g} s; {out}/plan.json"
    )
    report = run(plan, out, say)
    print_report(report)
    if options.minimise and not report.ok and plan.faults:
        _minimise(plan, report, out)
    return 0 if report.ok else 1


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def _plan_of(options: Any) -> Plan:
    if options.replay is not None:
        return Plan.load(options.replay)
    if options.mutant is not None and options.seed is None:
        plan = MUTANTS[options.mutant].plan()
    else:
        seed = int(time.time()) if options.seed is None else options.seed
        kinds = None if options.faults is None else [k for k in options.faults.split(",") if k and k != "none"]
        plan = make_plan(
            seed,
            options.minutes * 60,
            rate=options.rate,
            kinds=kinds,
            every=options.every,
            crashes=options.crashes,
            workers=options.workers,
            producers=options.producers,
            lease=options.lease,
            fsync=options.fsync,
        )
    plan.mutant = options.mutant
    return plan


def _minimise(plan: Plan, report: Report, out: Path) -> None:
    wanted = set(report.rules)

    def fails(smaller: Plan) -> bool:
        return bool(wanted & set(run(smaller).rules))

    least = minimise(plan, fails, say)
    least.save(out / "least.json")
    say(f"{len(least.faults)} of {len(plan.faults)} faults are enough: {out}/least.json")
    for fault in least.faults:
        say(f"  {fault}")


def print_report(report: Report) -> None:
    """The table at the end, and the first counterexamples."""
    explained = ", ".join(f"{kind} {n}" for kind, n in report.explained.most_common()) or "none"
    faults = ", ".join(f"{kind} {n}" for kind, n in sorted(report.faults.items())) or "none"
    counters = ", ".join(f"{name} {n}" for name, n in sorted(report.final.counters.items()))
    rows = [
        ("seed", str(report.plan.seed)),
        ("time", f"{report.seconds:.1f} s"),
        ("tasks", str(report.tasks)),
        ("executions", str(report.executions)),
        ("run again, explained by", explained),
        ("ended well twice", str(report.finished_twice)),
        ("faults", f"{report.faults.total()}: {faults}"),
        ("processes restarted", str(report.restarts)),
        ("counted by Redis", counters),
        ("verdict", "every rule holds" if report.ok else f"{len(report.violations)} violations: {report.rules}"),
    ]
    say("")
    for name, value in rows:
        say(f"{name:>24}  {value}")
    for violation in _first(report):
        say(f"\n  {violation}")
        if violation.uid is not None:
            for line in _lines_of(report, violation.uid):
                say(f"      {line}")
    if not report.ok:
        say(f"\nreplay: {sys.executable} -m tests.faults --replay {report.out}/plan.json")


def _first(report: Report, each: int = 3) -> list[Any]:
    """The first few of each rule."""
    found = []
    for rule in report.rules:
        found += [violation for violation in report.violations if violation.rule == rule][:each]
    return found


def _lines_of(report: Report, uid: str) -> list[str]:
    """The history of a task, with the faults among it that hit its actors."""
    zero = report.lines[0]["t"]
    mine = [line for line in report.lines if line.get("uid") == uid or uid in line.get("tasks", ())]
    if not mine:
        return []
    names, actors = {line["id"] for line in mine if "id" in line} | {uid}, {line["actor"] for line in mine}
    begin, end = mine[0]["t"] - 2 * report.plan.lease, mine[-1]["t"] + 2 * report.plan.lease

    def belongs(line: Line) -> bool:
        if line["op"] in {"settled", "event"}:
            return line.get("id", line.get("task_id")) in names
        if line["op"] in {"fault", "process"} and begin <= line["t"] <= end:
            hit = line.get("actors", [line.get("who")])
            return hit is None or bool(actors & set(hit))
        return line.get("uid") == uid or uid in line.get("tasks", ())

    return [_shown(line, zero) for line in report.lines if belongs(line)][:80]


def _shown(line: Line, zero: float) -> str:
    hidden = {"t", "actor", "op", "phase", "uid", "tasks", "places", "ids", "number", "kind", "queue", "task_id"}
    facts = " ".join(f"{name}={value}" for name, value in line.items() if name not in hidden)
    return f"{line['t'] - zero:8.3f}  {line['actor']:8} {line['op']:8} {line['phase']:7} {facts[:200]}"


def run_mutants(*, control: bool = False, only: str | None = None) -> int:
    """Every mutant's plan, or that of ``only`` one after the other; the table mutant → rules → seconds."""
    missed = 0
    say(f"{'control' if control else 'mutant':24} {'seed':>4}  {'caught by':32} seconds")
    for mutant in MUTANTS.values() if only is None else [MUTANTS[only]]:
        plan = mutant.plan()
        plan.mutant = None if control else mutant.name
        report = run(plan)
        good = report.ok if control else bool(set(report.rules) & set(mutant.rules))
        missed += not good
        verdict = ", ".join(report.rules) or "nothing"
        say(f"{mutant.name:24} {plan.seed:>4}  {verdict:32} {report.seconds:5.1f}{'' if good else '   <-- wrong'}")
        if not good:
            for violation in _first(report):
                say(f"    {violation}")
    return 1 if missed else 0
