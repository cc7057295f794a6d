"""``orchestra._ext.wire`` against the same in plain Python, in one run. Owed: at least 3 times as quick, but for holding.

Run: ``python -m pytest benchmarks/bench_wire.py --benchmark-enable -s``.
"""

from __future__ import annotations

import timeit

import pytest

from orchestra._ext import wire
from orchestra.serialization import encode_task
from tests.reference import wire as reference

OWED = 3.0
BATCH = 500
DONE = object()
FRAME = encode_task({"type": "text_classification", "input": {"text": "Classify this text please"}}).frame
ENTRIES = [[b"1700000000000-%d" % number, [b"t", FRAME]] for number in range(BATCH)]
COMMAND = b"*2\r\n$7\r\nEVALSHA\r\n$1\r\nx\r\n"


@wire.untracked
class Compiled(wire.Arrival):
    __slots__ = ()


def calls(module, kind):
    """What is timed, by its name."""
    found = module.arrivals(kind, 2, ENTRIES, "consumer", 0)
    batch = [(delivery, DONE) for delivery in found]
    held = [{} for _ in range(8)]
    return {
        "arrivals": lambda: module.arrivals(kind, 2, ENTRIES, "consumer", 0),
        "hold": lambda: module.hold(held, found),
        "sift": lambda: module.sift(batch, DONE),
        "with_ids": lambda: module.with_ids(COMMAND, found),
    }


@pytest.mark.parametrize("name", ["arrivals", "hold", "sift", "with_ids"])
def test_wire(benchmark, name):
    ours, theirs = calls(wire, Compiled)[name], calls(reference, reference.Arrival)[name]
    benchmark(ours)
    theirs()
    if benchmark.disabled:
        return
    took, oracle = (min(timeit.repeat(call, number=20, repeat=9)) / 20 / BATCH for call in (ours, theirs))
    benchmark.extra_info["ratio"] = round(oracle / took, 2)
    print(f"\n{name}: {took * 1e9:.0f} ns a delivery, plain Python {oracle * 1e9:.0f} ns, ratio {oracle / took:.2f}")
    assert name == "hold" or oracle / took >= OWED
