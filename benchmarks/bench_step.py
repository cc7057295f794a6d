"""``first_step`` against the same in plain Python, in one run. Owed: at least 1.5 times as quick where nothing waits.

Run: ``python -m pytest benchmarks/bench_step.py --benchmark-enable -s``.
"""

from __future__ import annotations

import contextvars
import timeit

import pytest

from orchestra._ext.step import first_step
from tests.reference import step as reference

OWED = 1.5
VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
CALLS = 20_000


class Once:
    """Suspends once."""

    def __await__(self):
        yield


async def returns(argument):
    return None


async def waits(argument):
    await Once()


def seconds(step, agent, calls):
    """The best of nine rounds, a call."""
    names = {"step": step, "agent": agent, "variable": VARIABLE}
    return min(timeit.repeat("step(agent, 1, variable)", globals=names, number=calls, repeat=9)) / calls


@pytest.mark.parametrize("agent", [returns, waits], ids=lambda agent: agent.__name__)
def test_first_step(benchmark, agent):
    benchmark(first_step, agent, 1, VARIABLE)
    if benchmark.disabled:
        return
    ours, theirs = seconds(first_step, agent, CALLS), seconds(reference.first_step, agent, CALLS)
    benchmark.extra_info["ratio"] = round(theirs / ours, 2)
    print(f"\n{benchmark.name}: {ours * 1e9:.0f} ns, plain Python {theirs * 1e9:.0f} ns, ratio {theirs / ours:.2f}")
    assert agent is waits or theirs / ours >= OWED
