"""Oracle of ``orchestra._ext.heap``: heapq with tuples, as the standard library's documentation shows it."""

from __future__ import annotations

import heapq
import itertools
from typing import Any


class TaskHeap:
    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Any]] = []
        self._sequence = itertools.count()

    def push(self, priority: int, obj: Any) -> None:
        heapq.heappush(self._heap, (priority, next(self._sequence), obj))

    def pop(self) -> Any:
        return heapq.heappop(self._heap)[2]

    def pop_item(self) -> tuple[int, Any]:
        priority, _, obj = heapq.heappop(self._heap)
        return priority, obj

    def peek(self) -> Any:
        return self._heap[0][2]

    def pop_many(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(min(count, len(self._heap)))]

    def clear(self) -> int:
        count = len(self._heap)
        self._heap.clear()
        return count

    def __len__(self) -> int:
        return len(self._heap)
