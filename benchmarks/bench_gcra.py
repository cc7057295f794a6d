"""``GcraTable`` and ``check`` against the same rule in plain Python integers. Owed: a local refusal in at most 100 ns.

Run: ``python -m pytest benchmarks/bench_gcra.py --benchmark-enable -s``. Times are of the call itself as Python makes it,
loop overhead included; the arguments are microseconds since 1970, as in use.
"""

from __future__ import annotations

import timeit

from orchestra._ext.gcra import GcraTable, check

OWED_NS = 100.0
EPOCH_US = 1_700_000_000_000_000
LOCAL_US = 123_456_789_000
CALLS = 10_000


def python_check(tat, now, cost, emission, burst):
    tat = min(max(tat, now), now + burst)
    new = tat + cost * emission
    if new - burst <= now:
        return True, new, 0, (now + burst - new) // emission
    return False, tat, new - burst - now, (now + burst - tat) // emission


class PythonTable:
    def __init__(self):
        self.cells = {}

    def observe(self, key, tat, redis_now, local_now):
        self.cells[key] = (local_now + tat - redis_now, local_now)

    def refused_for(self, key, cost, local_now, emission, burst):
        cell = self.cells.get(key)
        if cell is None:
            return 0
        tat, seen = cell
        now = local_now + (local_now - seen) * 1000 // 1_000_000
        return max(0, tat + cost * emission - burst - now)


def nanoseconds(statement, names):
    return min(timeit.repeat(statement, globals=names, number=CALLS, repeat=9)) / CALLS * 1e9


def compare(benchmark, statement, compiled, reference):
    """Time one statement with both sets of names; note nanoseconds and the ratio."""
    timer = timeit.Timer(statement, globals=compiled)
    benchmark(timer.timeit, CALLS)
    if benchmark.disabled:
        return 0.0
    theirs, ours = nanoseconds(statement, reference), nanoseconds(statement, compiled)
    benchmark.extra_info["ratio"] = round(theirs / ours, 2)
    benchmark.extra_info["ns"] = round(ours, 1)
    print(f"\n{benchmark.name}: {ours:.0f} ns, plain Python {theirs:.0f} ns, ratio {theirs / ours:.2f}")
    return ours


def known(table):
    for number in range(1_000):
        table.observe(f"tenant-{number}", EPOCH_US + 500_000, EPOCH_US, LOCAL_US)
    return {"refused_for": table.refused_for, "observe": table.observe, "now": LOCAL_US + 500, "epoch": EPOCH_US}


def test_refusal(benchmark):
    ours = compare(
        benchmark, "refused_for('tenant-7', 1, now, 10_000, 200_000)", known(GcraTable()), known(PythonTable())
    )
    assert ours <= OWED_NS


def test_nothing_known(benchmark):
    ours = compare(
        benchmark, "refused_for('nobody', 1, now, 10_000, 200_000)", known(GcraTable()), known(PythonTable())
    )
    assert ours <= OWED_NS


def test_observe(benchmark):
    compare(benchmark, "observe('tenant-7', epoch, epoch, now)", known(GcraTable()), known(PythonTable()))


def test_check(benchmark):
    statement = "check(epoch + 100, epoch, 1, 10_000, 200_000)"
    compare(benchmark, statement, {"check": check, "epoch": EPOCH_US}, {"check": python_check, "epoch": EPOCH_US})
