"""The guard of the benchmarks: a made-up slowdown is caught, noise is not, and the committed baseline fits the checks."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks import bench_heap, guard
from benchmarks.checks import CHECKS, cpu_of
from benchmarks.guard import MORE, Check, judge
from tests.processes import run_module

MARGIN, ROUNDS, TRUE_RATIO = 0.2, 16, 2.0


class Noisy:
    """Costs on a machine that does other things: half of the samples are disturbed, up to four times as dear."""

    def __init__(self, seed: int, cost: float) -> None:
        self.random, self.cost = random.Random(seed), cost

    def __call__(self) -> float:
        jitter = self.random.uniform(1.0, 1.03)
        return self.cost * jitter * (self.random.uniform(1.0, 4.0) if self.random.random() < 0.5 else 1.0)


def check_of(ours, oracle, **more):
    settings = {"name": "a check", "what": "", "rounds": ROUNDS, "margin": MARGIN, **more}
    return Check(setup=lambda bench: (ours, oracle), **settings)


def noisy(seed: int, slower: float) -> guard.Finding:
    check = check_of(Noisy(2 * seed, slower), Noisy(2 * seed + 1, TRUE_RATIO))
    return judge(check, None, TRUE_RATIO, same_class=True)


def test_noise_is_no_slowdown():
    assert [seed for seed in range(300) if not noisy(seed, 1.0).passed] == []


def test_slowdown_beyond_the_margin_is_caught_under_the_same_noise():
    """1 / 1.4 is 0.29 below the baseline, of which 0.2 are allowed."""
    assert [seed for seed in range(300) if noisy(seed, 1.4).passed] == []


def test_slowdown_within_the_margin_passes():
    assert [seed for seed in range(300) if not noisy(seed, 1.1).passed] == []


def test_failing_check_is_measured_again_before_it_fails():
    """The machine was busy in all of the first rounds, and only in them."""
    costs = iter([5.0] * ROUNDS + [1.0] * (MORE * ROUNDS))
    finding = judge(check_of(lambda: next(costs), lambda: TRUE_RATIO), None, TRUE_RATIO, same_class=True)
    assert (finding.repeated, finding.passed, len(finding.ours)) == (True, True, ROUNDS * (1 + MORE))


def test_sides_take_turns_and_change_who_begins():
    order = []

    def side(name):
        return lambda: order.append(name) or 1.0

    judge(check_of(side("ours"), side("oracle"), rounds=4), None, None, same_class=True)
    assert order == ["oracle", "ours", "ours", "oracle", "oracle", "ours", "ours", "oracle"]


def test_made_up_slowdown_of_the_real_heap_is_caught():
    """Not a simulation: the compiled heap beside heapq, and the same heap made to do its work twice."""
    compiled, reference = bench_heap.steady(bench_heap.tasks(1_000))

    def twice():
        compiled()
        compiled()

    oracle = cpu_of(reference, 5)
    healthy = judge(check_of(cpu_of(compiled, 5), oracle, margin=0.3), None, None, same_class=True)
    again = judge(check_of(cpu_of(compiled, 5), oracle, margin=0.3), None, healthy.ratio, same_class=True)
    slow = judge(check_of(cpu_of(twice, 5), oracle, margin=0.3), None, healthy.ratio, same_class=True)
    assert again.passed
    assert not slow.passed
    assert slow.repeated
    assert slow.ratio < healthy.ratio * 0.7


def test_margin_grows_on_another_machine_but_has_a_bound():
    narrow, wide = check_of(None, None, margin=0.2), check_of(None, None, margin=0.45)
    assert guard.margin_here(narrow, same_class=True) == 0.2
    assert guard.margin_here(narrow, same_class=False) == 0.4
    assert guard.margin_here(wide, same_class=False) == guard.WIDEST


def test_check_that_cannot_run_fails_and_the_others_go_on(capsys):
    def broken() -> float:
        raise RuntimeError("no server")

    checks = [check_of(broken, lambda: 1.0, name="broken"), check_of(lambda: 1.0, lambda: 1.0, name="fine")]
    findings = guard.run(checks, None, {})
    assert [finding.passed for finding in findings] == [False, True]
    assert "FAILED  broken: RuntimeError: no server" in capsys.readouterr().out


def test_update_keeps_the_baseline_of_other_checks(tmp_path):
    path = tmp_path / "baseline.json"
    first, second = check_of(lambda: 1.0, lambda: 3.0, name="first"), check_of(lambda: 1.0, lambda: 5.0, name="second")
    for check in (first, second):
        guard.write_baseline(path, guard.run([check], None, {}), {"x": "1"}, "make bench-guard")
    found = guard.read_baseline(path)
    assert {name: facts["ratio"] for name, facts in found["checks"].items()} == {"first": 3.0, "second": 5.0}
    assert found["machine"] == guard.machine_class()


def test_baseline_fits_the_checks():
    """Names and margins: a check without a baseline guards nothing, a margin is changed on purpose only."""
    known = guard.read_baseline(guard.BASELINE)
    assert {check.name: check.margin for check in CHECKS} == {
        name: facts["margin"] for name, facts in known["checks"].items()
    }
    assert {"machine", "versions", "command"} <= set(known)


def test_short_form_has_no_wall_clock():
    assert [check.name for check in CHECKS if check.short and "wall" in check.what] == []
    assert len([check for check in CHECKS if check.short]) >= 10


@pytest.mark.parametrize(("factor", "status", "word"), [(0.5, 0, "ok"), (4.0, 1, "FAILED")])
def test_command_ends_with_the_verdict(tmp_path, factor, status, word):
    """A baseline four times as high as the truth stands for code that became four times as slow."""
    baseline = guard.read_baseline(guard.BASELINE)
    name = "gcra: check"
    baseline["checks"] = {name: {**baseline["checks"][name], "ratio": baseline["checks"][name]["ratio"] * factor}}
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(baseline))
    said = run_module("benchmarks.guard", "--only", name, "--baseline", str(path), status=status)
    assert next(line for line in said.splitlines() if name in line).startswith(word)
