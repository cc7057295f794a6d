"""The jobs that wait in a worker pool, and how many of each kind may run at once.

Owns the order (priority, then arrival) and the count of each limited kind; refuses to run anything. A job whose kind is
full steps aside when its turn comes, so it blocks nobody, and comes back in its old place when one of its kind ends.
One event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeAlias, TypeVar

from orchestra.errors import ConfigurationError
from orchestra.tasks import check_ident, require_int

T = TypeVar("T")


class Job(Generic[T]):
    """A coroutine function to call, and the future of its result. ``queued_at``: monotonic seconds."""

    __slots__ = ("args", "func", "future", "kind", "kwargs", "queued_at")

    def __init__(
        self,
        func: Callable[..., Coroutine[Any, Any, T]],
        args: Any,
        kwargs: Any,
        future: asyncio.Future[T],
        kind: str | None = None,
    ) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.future = future
        self.kind = kind
        self.queued_at = time.monotonic()


_Queued: TypeAlias = tuple[int, int, Job[Any]]


class _Kind:
    __slots__ = ("aside", "limit", "running")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0
        self.aside: list[_Queued] = []


class JobQueue:
    """Jobs by priority and arrival. ``limits``: kind → how many run at once; other kinds, and none, have no limit.

    ``dropped`` is called for each job whose future was done before its turn came. All O(log n), amortised.
    """

    def __init__(self, limits: Mapping[str, int], dropped: Callable[[], None]) -> None:
        self._jobs: list[_Queued] = []
        self._order = itertools.count()
        self._kinds = {kind: _Kind(limit) for kind, limit in limits.items()}
        self._dropped = dropped
        self._aside = 0

    def __len__(self) -> int:
        return len(self._jobs) + self._aside

    def push(self, priority: int, job: Job[Any]) -> None:
        """Queue a job."""
        heapq.heappush(self._jobs, (priority, next(self._order), job))

    def pop(self) -> Job[Any] | None:
        """The most urgent job that is still wanted and whose kind has room; None when there is none."""
        while self._jobs:
            queued = heapq.heappop(self._jobs)
            job = queued[2]
            kind = self._kinds.get(job.kind) if job.kind is not None else None
            if job.future.done():
                self._dropped()
                if kind is not None:
                    self._come_back(kind)
            elif kind is None:
                return job
            elif kind.running < kind.limit:
                kind.running += 1
                return job
            else:
                heapq.heappush(kind.aside, queued)
                self._aside += 1
        return None

    def ended(self, job: Job[Any]) -> bool:
        """A job that was popped has ended. True when that let another one of its kind come back."""
        kind = self._kinds.get(job.kind) if job.kind is not None else None
        if kind is None:
            return False
        kind.running -= 1
        return self._come_back(kind)

    def running(self, kind: str) -> int:
        """How many of a limited kind were popped and have not ended."""
        return self._kinds[kind].running

    def clear(self) -> Iterator[Job[Any]]:
        """Take every job out."""
        left = [*self._jobs, *(queued for kind in self._kinds.values() for queued in kind.aside)]
        self._jobs.clear()
        for kind in self._kinds.values():
            kind.aside.clear()
        self._aside = 0
        return (job for _, _, job in left)

    def _come_back(self, kind: _Kind) -> bool:
        while kind.aside and kind.running < kind.limit:
            queued = heapq.heappop(kind.aside)
            self._aside -= 1
            if queued[2].future.done():
                self._dropped()
                continue
            heapq.heappush(self._jobs, queued)
            return True
        return False


def checked_limits(field: str, limits: Any) -> Mapping[str, int]:
    """A read-only copy of ``limits``, kind of job → how many at once.

    Raises:
        ConfigurationError: it is no such mapping, a kind is no name, or a number not from 1 to 100,000.
    """
    if not isinstance(limits, Mapping):
        raise ConfigurationError(
            f"{field} must map kinds of jobs to whole numbers, got {limits!r}", field=field, value=limits
        )
    for kind, limit in limits.items():
        check_ident(field, kind)
        require_int(f"{field}[{kind!r}]", limit, 1, 100_000, unit="jobs at once")
    return MappingProxyType(dict(limits))


def check_job(priority: Any, kind: Any) -> None:
    """Raises :class:`ConfigurationError` unless ``priority`` is an int and ``kind`` a str or None."""
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise ConfigurationError(
            f"submit(priority) must be a whole number, lower is sooner, got {priority!r}",
            field="submit(priority)",
            value=priority,
        )
    if kind is not None and not isinstance(kind, str):
        raise ConfigurationError(f"submit(kind) must be a str or None, got {kind!r}", field="submit(kind)", value=kind)
