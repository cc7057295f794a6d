"""Real processes, a real server with an append-only file, a proxy before each, faults from a seed, and a judge.

``python -m tests.faults --help`` runs the same for longer. A run that fails prints how to replay it.
"""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from tests.faults.chaos.mutants import MUTANTS
from tests.faults.chaos.plan import FAULTS, make_plan
from tests.faults.chaos.run import run_plan

pytestmark = pytest.mark.slow


def complaint(report):
    """What is wrong with a run, for the message of an assertion."""
    rows = [str(violation) for violation in report.violations[:10]]
    command = f"python -m tests.faults --replay {report.out}/plan.json"
    return "\n".join([*rows, f"faults: {dict(report.faults)}", f"replay: {command}"])


async def test_without_faults_nothing_runs_twice(tmp_path):
    """G7, A11: no fault, no duplicate; tasks longer than their lease included."""
    plan = make_plan(11, 2.5, kinds=[], lease=2.0, workers=2, rate=50.0)
    report = await run_plan(plan, tmp_path)
    assert report.ok, complaint(report)
    assert report.tasks > 100
    assert any(task["kind"] == "long" for task in plan.tasks().values())
    # "starved": the machine itself stood still for most of a lease, which the actors have noticed
    assert set(report.explained) <= {"starved"}, "an execution too many, although nothing was injected"
    assert report.faults.total() == 0


async def test_two_seeds_of_chaos(tmp_path):
    """A1 to A5, A8, A9, A16, A17, B1, B5, B6, B8, B14 to B17, C1, C3, C5 to C9, C11 mixed: every rule holds."""
    plans = [make_plan(seed, 6.0, rate=50.0, every=0.35, crashes=20.0) for seed in (153, 212)]
    outs = [tmp_path / str(plan.seed) for plan in plans]
    for out in outs:
        out.mkdir()
    reports = await asyncio.gather(*map(run_plan, plans, outs))
    for report in reports:
        assert report.ok, complaint(report)
    applied = set().union(*(report.faults for report in reports))
    assert len(applied) >= len(FAULTS) // 2, "the plans have hardly been carried out"


QUICK = (
    "ack_before_run",
    "promote_removes_first",
    "retry_removes_first",
    "no_dedup",
    "fence_stays",
    "letter_stays",
    "entry_stays",
    "promotes_early",
    "group_at_end",
    "cancel_lies",
)
"""Mutants whose runs are short, and which no pause of a busy machine can excuse."""


async def test_the_judge_catches_defects_of_the_product(tmp_path):
    """Ten mutants of the product: a directed run of each breaks the rule it should; two at a time."""
    gate = asyncio.Semaphore(2)

    async def rules_of(name):
        mutant, out = MUTANTS[name], tmp_path / name
        out.mkdir()
        plan = dataclasses.replace(mutant.plan(), mutant=name)
        async with gate:
            report = await run_plan(plan, out)
        return name, set(report.rules) & set(mutant.rules)

    caught = dict(await asyncio.gather(*map(rules_of, QUICK)))
    assert {name for name, rules in caught.items() if not rules} == set()


def test_every_mutant_still_finds_what_it_breaks():
    """A mutant that no longer applies would be caught by nothing, or for the wrong reason."""
    import subprocess
    import sys
    from pathlib import Path

    program = (
        "import os, sys\n"
        "from tests.faults.chaos import mutants\n"
        "for name in mutants.MUTANTS:\n"
        "    if os.fork() == 0:\n"
        "        mutants.apply(name)\n"
        "        os._exit(0)\n"
        "    if os.wait()[1]:\n"
        "        sys.exit(name)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
