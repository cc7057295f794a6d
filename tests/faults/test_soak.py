"""M1, M2, M3, M4: the short form of ``python -m tests.soak``, and its measure."""

from __future__ import annotations

import os

import pytest

from tests.soak import Sample, Soak, slope

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")


@pytest.mark.slow
async def test_nothing_grows_over_200_000_tasks():
    """M1–M4: one worker process; memory, descriptors, threads, keys, counters."""
    soak = Soak(200_000, every=0.1, say=1e9)
    assert await soak.run(), soak.report()


def test_a_slope_is_found_and_spikes_are_not():
    """M1: the measure bites: a leak of 100 B a task is seen, one spike is not."""

    def samples(kib):
        return [Sample(n, n * 10_000, 0, round(kib(n)), 9, 3, 1000, 5) for n in range(40)]

    assert abs(slope(samples(lambda n: 50_000), "rss")) < 0.001
    assert slope(samples(lambda n: 50_000 + 976 * n), "rss") == pytest.approx(97.6, rel=0.01)
    assert slope(samples(lambda n: 50_000 + (9_000 if n == 17 else 0)), "rss") == 0
