"""Those of this process who wait for one cell of a limit: fair order, one timer, no polling.

Owns who is asked for next and when: the most urgent first, then in order of arrival, as many together as are due. Refuses to
own the asking and the meaning of an answer. Invariant: while somebody waits, either some of them are being asked or a timer
is set for the moment at which the first is due; whoever is behind a refused one is not asked before it.
One event loop; no method awaits.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from orchestra._limiting.store import MAX_BATCH

LOOK_AGAIN = 1.0
"""Seconds after which the first is asked for again at the latest: a setting or a lost state is noticed in that time."""
JITTER = 0.001
"""Seconds by which a wake-up is late at most, lest the processes that wait for one permit ask in the same instant."""
_jitter = random.random


class Waiter(Protocol):
    """Somebody in the line."""

    rank: tuple[int, int]
    cost: int
    urgency: int
    in_line: bool

    @property
    def over(self) -> bool:
        """Answered, cancelled or expired."""


class Line:
    """``due_in(cost, urgency)``: seconds until that is due; ``fits(total, urgency)``: whether it can be due at once."""

    def __init__(
        self,
        due_in: Callable[[int, int], float],
        fits: Callable[[int, int], bool],
        ask: Callable[[Sequence[Any]], None],
        over: Callable[[], None],
    ) -> None:
        self._due_in, self._fits, self._ask, self._over = due_in, fits, ask, over
        self._heap: list[Any] = []
        self._left = 0  # how many in the heap were cancelled or have expired since it was last tidied
        self._asking = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._heap)

    def begin(self) -> None:
        """Somebody is asked for who is not in it: whoever comes now is behind."""
        self._asking += 1

    def end(self) -> None:
        """That was answered; if he stays, he has entered before this."""
        self._asking -= 1
        if not self._asking:
            self.kick()

    def enter(self, waiter: Any) -> None:
        """Wait; asked at once if nobody is ahead."""
        self._push(waiter)
        if not self._asking and self._heap[0] is waiter:
            self.kick()

    def head(self) -> Any:
        """The first in the line, None if there is none."""
        while self._heap and self._heap[0].over:
            heapq.heappop(self._heap).in_line = False
        return self._heap[0] if self._heap else None

    def answered(self, waiter: Any, *, again: bool) -> None:
        """One that was asked for has an answer; ``again``: it was refused and keeps its place."""
        self._asking -= 1
        if again:
            self._push(waiter)
        if not self._asking:
            self.kick()

    def left(self) -> None:
        """Somebody in it was cancelled or has expired: keep such leftovers below half of it, and let the next ask."""
        self._left += 1
        if self._left * 2 > len(self._heap):
            self._heap = [waiter for waiter in self._heap if not waiter.over]
            heapq.heapify(self._heap)
            self._left = 0
        self.kick()

    def kick(self) -> None:
        """Ask for those who are due, or set the timer for the first."""
        if self._asking:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch = self._ready()
        head = self.head()
        if batch:
            self._asking = len(batch)
            self._ask(batch)
        elif head is not None:
            wait = min(self._due_in(head.cost, head.urgency), LOOK_AGAIN)
            wait += _jitter() * min(JITTER, wait / 50)
            self._timer = asyncio.get_running_loop().call_later(wait, self.kick)
        else:
            self._over()

    def _push(self, waiter: Any) -> None:
        waiter.in_line = True
        heapq.heappush(self._heap, waiter)

    def _ready(self) -> list[Any]:
        """Take those off the head of the line that are due together."""
        batch: list[Any] = []
        total = 0
        while (head := self.head()) is not None and len(batch) < MAX_BATCH:
            total += head.cost
            if (batch and not self._fits(total, head.urgency)) or self._due_in(total, head.urgency) > 0:
                break
            heapq.heappop(self._heap).in_line = False
            batch.append(head)
        return batch
