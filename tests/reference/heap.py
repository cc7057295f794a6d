"""Oracle of ``orchestra._ext.heap``: heapq with tuples, as the standard library's documentation shows it."""

from __future__ import annotations

import heapq
import itertools
from typing import Any


class TaskHeap:
    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Any]] = []
        self.arrivals = 0
        self._inserts = itertools.count(1)  # of equal age, so that objects are not compared

    def push(self, priority: int, obj: Any) -> None:
        heapq.heappush(self._heap, (priority, self.arrivals, 0, obj))
        self.arrivals += 1

    def insert(self, priority: int, sequence: int, obj: Any) -> None:
        if sequence >= self.arrivals:
            raise ValueError
        heapq.heappush(self._heap, (priority, sequence, next(self._inserts), obj))

    def pop(self) -> Any:
        return heapq.heappop(self._heap)[3]

    def pop_item(self) -> tuple[int, Any]:
        priority, _, _, obj = heapq.heappop(self._heap)
        return priority, obj

    def peek(self) -> Any:
        return self._heap[0][3]

    def pop_many(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(min(count, len(self._heap)))]

    def entries(self) -> list[tuple[int, int, Any]]:
        return [(priority, sequence, obj) for priority, sequence, _, obj in self._heap]

    def clear(self) -> int:
        count = len(self._heap)
        self._heap.clear()
        return count

    def __len__(self) -> int:
        return len(self._heap)
