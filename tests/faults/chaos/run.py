"""One run from plan to verdict, and the search for the smallest list of faults that still fails."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.chaos import checker, evidence, history
from tests.faults.chaos.driver import Driver
from tests.faults.chaos.plan import Fault, Plan
from tests.faults.chaos.server import Final

Say = Callable[[str], None]


@dataclass
class Report:
    """What came of a run."""

    plan: Plan
    out: Path
    seconds: float
    final: Final
    violations: list[checker.Violation]
    tasks: int
    executions: int
    explained: Counter[str]
    finished_twice: int
    """Tasks of which more than one execution ended well."""
    faults: Counter[str]
    restarts: int
    lines: list[history.Line] = field(repr=False, default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no rule was broken."""
        return not self.violations

    @property
    def rules(self) -> list[str]:
        """The rules that were broken, each once."""
        return list(dict.fromkeys(violation.rule for violation in self.violations))


async def run_plan(plan: Plan, out: Path, say: Say = lambda line: None) -> Report:
    """Carry a plan out in the directory ``out``, and judge it."""
    began = time.monotonic()
    driver = Driver(plan, out, say)
    final = await driver.run()
    (out / "final.json").write_text(json.dumps(dataclasses.asdict(final), default=str))
    return judge(out, time.monotonic() - began)


def judge(out: Path, seconds: float = 0.0) -> Report:
    """The verdict on a run that has left its plan, its histories and its last state in ``out``."""
    plan, final = Plan.load(out / "plan.json"), Final(**json.loads((out / "final.json").read_text()))
    lines = history.read(out)
    found = evidence.gather(plan, lines)
    begun = Counter(line["kind"] for line in lines if line["op"] == "fault" and line["phase"] == "invoke")
    starts = sum(line["op"] == "process" and line["phase"] == "start" for line in lines)
    return Report(
        plan=plan,
        out=out,
        seconds=seconds,
        final=final,
        violations=checker.check(found, final),
        tasks=len(found.produced),
        executions=sum(map(len, found.executions.values())),
        explained=checker.explained(found),
        finished_twice=sum(sum(run.how == "ok" for run in runs) > 1 for runs in found.executions.values()),
        faults=begun,
        restarts=starts - plan.workers - plan.producers,
        lines=lines,
    )


def run(plan: Plan, out: Path | None = None, say: Say = lambda line: None) -> Report:
    """:func:`run_plan` in an event loop of its own; without ``out`` the histories are removed."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return asyncio.run(run_plan(plan, out, say))
    directory = Path(tempfile.mkdtemp(prefix="orc-chaos-"))
    try:
        return asyncio.run(run_plan(plan, directory, say))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def minimise(plan: Plan, fails: Callable[[Plan], bool], say: Say) -> Plan:
    """Drop faults while the plan still fails (delta debugging: Zeller, Hildebrandt, 2002)."""
    faults, parts = list(plan.faults), 2
    while len(faults) >= 2 and parts <= len(faults):
        size = -(-len(faults) // parts)
        for start in range(0, len(faults), size):
            rest = faults[:start] + faults[start + size :]
            say(f"minimise: {len(rest)} of {len(faults)} faults")
            if rest and fails(_with(plan, rest)):
                faults, parts = rest, max(2, parts - 1)
                break
        else:
            if parts == len(faults):
                break
            parts = min(len(faults), parts * 2)
    return _with(plan, faults)


def _with(plan: Plan, faults: list[Fault]) -> Plan:
    copy = Plan(**vars(plan))
    copy.faults = faults
    return copy
