"""What a worker pool has done and does, in numbers. No clock: durations are arguments. One event loop; not thread-safe.

Owns the histogram of durations and the pool's counters; refuses to decide anything from them.
Buckets of equal ratio bound the relative error at any magnitude with a fixed size (Masson, Rim and Lee, "DDSketch",
2019); equal buckets everywhere make histograms of different workers add up.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestra.tasks import require_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PER_DOUBLING, _BUCKETS = 5, 192
_SHORTEST = 1e-6
_LONGEST = _SHORTEST * 2 ** (_BUCKETS / _PER_DOUBLING)
_OFFSET = -_PER_DOUBLING * math.log2(_SHORTEST)
_EDGES = tuple(_SHORTEST * 2.0 ** (bucket / _PER_DOUBLING) for bucket in range(1, _BUCKETS + 1))
_log2 = math.log2


class Histogram:
    """Durations from 1 µs to 4 days in 192 buckets; a percentile is at most 15 % above the exact one and never below.

    Shorter durations count as 1 µs, longer ones as the longest; 1.8 KiB each, whatever is counted.
    """

    __slots__ = ("_cells", "count", "longest", "total")

    def __init__(self) -> None:
        self._cells = array("q", bytes(8 * _BUCKETS))
        self.count = 0
        self.total = 0.0
        """Sum of the durations, seconds."""
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration. O(1), about 0.2 µs.

        Raises:
            ValueError: ``seconds`` is not a number (NaN).
        """
        if _SHORTEST < seconds < _LONGEST:
            self._cells[int(_PER_DOUBLING * _log2(seconds) + _OFFSET)] += 1
        elif seconds >= _LONGEST:
            self._cells[_BUCKETS - 1] += 1
        elif seconds <= _SHORTEST:
            self._cells[0] += 1
        else:
            raise ValueError(f"a duration must be a number of seconds, got {seconds!r}")
        self.count += 1
        self.total += seconds
        if seconds > self.longest:  # noqa: PLR1730 - max() would cost as much as the rest
            self.longest = seconds

    @property
    def values(self) -> NDArray[np.int64]:
        """How many durations fell into each bucket: the counts themselves, as a NumPy array.

        NumPy is imported when somebody looks: 18 MiB and 60 ms that most workers never need.
        """
        import numpy as np  # noqa: PLC0415

        return np.frombuffer(self._cells, np.int64)

    @property
    def mean(self) -> float:
        """Mean duration in seconds; 0 when there are none."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, q: float) -> float:
        """Seconds within which a share ``q`` (0 to 1) of the durations lies; 0 when there are none. O(buckets).

        Raises:
            ConfigurationError: ``q`` is not a number from 0 to 1.
        """
        return self.percentiles((q,))[0]

    def percentiles(self, shares: Sequence[float]) -> list[float]:
        """:meth:`percentile` of each, for the price of one."""
        for q in shares:
            require_number("percentile(q)", q, 0.0, 1.0)
        if not self.count:
            return [0.0] * len(shares)
        below = self.values.cumsum()
        indexes = below.searchsorted([max(1, math.ceil(q * self.count)) for q in shares])
        return [min(_EDGES[index], self.longest) for index in indexes]

    def merge(self, other: Histogram) -> None:
        """Add what ``other`` has counted."""
        values = self.values
        values += other.values
        self.count += other.count
        self.total += other.total
        self.longest = max(self.longest, other.longest)

    def copy(self) -> Histogram:
        """One that counts on by itself."""
        made = Histogram()
        made.merge(self)
        return made

    def since(self, earlier: Histogram) -> Histogram:
        """What has been counted since ``earlier``, a :meth:`copy` of this one; ``longest`` is that of all times."""
        made = Histogram()
        values = made.values
        values += self.values - earlier.values
        made.count, made.total = self.count - earlier.count, self.total - earlier.total
        made.longest = self.longest
        return made

    def as_dict(self) -> dict[str, float]:
        """``count``, and in seconds ``mean p50 p95 p99 max``."""
        p50, p95, p99 = self.percentiles((0.5, 0.95, 0.99))
        return {"count": self.count, "mean": self.mean, "p50": p50, "p95": p95, "p99": p99, "max": self.longest}

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self.values.__sizeof__() + self._cells.__sizeof__()

    def __repr__(self) -> str:
        facts = self.as_dict()
        return (
            f"<Histogram of {self.count}: p50 {facts['p50']:.3g} s, p95 {facts['p95']:.3g} s, p99 {facts['p99']:.3g} s>"
        )


@dataclass(slots=True)
class OrchestrationWorkerPoolMetrics:
    """What a pool has done and does. Counters only grow; gauges are of this moment."""

    active_workers: int = 0
    """Worker coroutines that exist."""
    running_tasks: int = 0
    """Jobs being run, of all sources."""
    queued_tasks: int = 0
    """Jobs waiting in the pool's own queue."""
    submitted: int = 0
    completed: int = 0
    failed: int = 0
    """Submitted jobs that raised."""
    cancelled: int = 0
    rejected: int = 0
    """Jobs refused because the queue was full or the pool shut down."""
    stuck_tasks: int = 0
    """Items that ignore their cancellation: given up by their source, not running, not ended."""
    wait_times: Histogram = field(default_factory=Histogram)
    """How long submitted jobs were queued."""
    run_times: Histogram = field(default_factory=Histogram)
    """How long jobs ran; those of other sources only while somebody measures (``QueueWorkerPool.measuring``)."""

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values: counts, and for the times ``count mean p50 p95 p99 max`` in seconds."""
        return {
            name: value.as_dict() if isinstance(value := getattr(self, name), Histogram) else value
            for name in self.__slots__
        }
