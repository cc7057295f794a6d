"""``SmoothRing`` against its pure-Python model in one run. Owed: a selection out of 10, all available, in at most 60 ns.

Run: ``python -m pytest benchmarks/bench_wrr.py --benchmark-enable -s``. Times are of the call itself as Python makes it,
loop overhead included.
"""

from __future__ import annotations

import timeit

import pytest

from orchestra._ext.wrr import SmoothRing
from tests.reference.wrr import SmoothRing as Model

OWED_NS = 60.0


def filled(ring, count):
    for number in range(count):
        ring.set_weight(f"worker-{number}", number % 10 + 1)
    return {"select": ring.select, "ids": [f"worker-{number}" for number in range(count)]}


def compare(benchmark, statement, count):
    """Time one statement on both rings; note nanoseconds and the ratio."""
    names, calls = filled(SmoothRing(), count), 100_000 // count
    benchmark(timeit.Timer(statement, globals=names).timeit, calls)
    if benchmark.disabled:
        return 0.0
    ours = min(timeit.repeat(statement, globals=names, number=calls, repeat=9)) / calls * 1e9
    few = max(1, calls // 50)
    theirs = min(timeit.repeat(statement, globals=filled(Model(), count), number=few, repeat=5)) / few * 1e9
    benchmark.extra_info["ratio"] = round(theirs / ours, 2)
    benchmark.extra_info["ns"] = round(ours, 1)
    print(f"\n{benchmark.name}: {ours:.0f} ns, plain Python {theirs:.0f} ns, ratio {theirs / ours:.2f}")
    return ours


def test_select_of_ten(benchmark):
    assert compare(benchmark, "select()", 10) <= OWED_NS


@pytest.mark.parametrize("count", [2, 100, 1_000])
def test_select(benchmark, count):
    compare(benchmark, "select()", count)


@pytest.mark.parametrize("count", [2, 10, 100])
def test_select_out_of_a_list(benchmark, count):
    compare(benchmark, "select(ids)", count)
