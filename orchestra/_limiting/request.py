"""One request for permits, of one cell or of several together: from the question to its end.

Owns the future its caller awaits and what ends it: an answer, a failure, what is known without asking, the end of its time, a
cancellation. Refuses to own limits: it asks those it names (``uses``). Invariant: the future is set exactly once, and a
line that sent it out hears of its answer exactly once. One event loop; only :meth:`Request.answer` awaits.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestra._limiting.rules import Admission
from orchestra._limiting.store import LEASE, QUEUE, Answer, LimitStore, Use
from orchestra.errors import OrchestraError

if TYPE_CHECKING:
    from orchestra._limiting.line import Line

_numbers = itertools.count()


class Request:
    """One request for permits. ``wait`` turns False when its time has passed: the next refusal is final."""

    __slots__ = ("asked", "flags", "future", "in_line", "line", "pending", "rank", "store", "taken_us", "uses", "wait")

    def __init__(self, uses: Sequence[Use], urgency: int, store: LimitStore, flags: int = 0) -> None:
        self.uses = uses
        self.flags = flags
        self.rank = (-urgency, next(_numbers))
        self.store = store
        self.wait = self.asked = self.in_line = False
        self.pending = True
        self.line: Line | None = None
        self.taken_us = (0, 0)  # of a lease: when it was taken and the TAT it left, by the clock of Redis
        self.future: asyncio.Future[Admission] = asyncio.get_running_loop().create_future()

    def __lt__(self, other: Request) -> bool:
        return self.rank < other.rank

    @property
    def over(self) -> bool:
        return self.future.done()

    @property
    def cost(self) -> int:
        return self.uses[0].cost

    @property
    def urgency(self) -> int:
        return self.uses[0].urgency

    def known(self) -> bool:
        if not self.wait and not self.flags & QUEUE:
            for place, (limiter, cell, cost, urgency) in enumerate(self.uses):
                refusal = limiter.refusal(cell, cost, urgency) or limiter.behind(cell, cost, self.rank)
                if refusal:
                    self.future.set_result(self._admission(refusal, place))
                    return True
        self.asked = self.pending = True
        return False

    def answered(self, answer: Answer, wait_us: int, which: int) -> None:
        if not self.pending:
            return
        self.pending = False
        for use in self.uses:
            use.limit.observe(use.cell, answer)
        again = False
        if self.future.done():
            if not wait_us:
                for use in self.uses:
                    use.limit.metrics.abandoned += 1
        elif wait_us and self.wait and self.line is not None:
            again = True
        else:
            if self.flags & LEASE:
                self.taken_us = (answer.now_us, which)
            self.future.set_result(self._admission(wait_us / 1e6, which if wait_us else 0))
        if self.line is not None:
            self.line.answered(self, again=again)

    def failed(self, error: Exception) -> None:
        if not self.pending:
            return
        self.pending = False
        if not self.future.done():
            opened = [use.limit.opens(error) for use in self.uses]
            if all(opened):
                self.future.set_result(Admission(True, 0.0, 0))
            else:
                self.future.set_exception(error)
        if self.line is not None:
            self.line.answered(self, again=False)

    def expire(self) -> None:
        """Its time to wait is over."""
        self.wait = False
        if self.in_line and self.line is not None and not self.future.done():
            limiter, cell, cost, urgency = self.uses[0]
            self.future.set_result(self._admission(limiter.due_in(cell, cost, urgency), 0, refused=True))
            self.line.left()

    def _admission(self, wait: float, which: int, *, refused: bool = False) -> Admission:
        remaining = min([use.limit.remaining(use.cell) for use in self.uses])
        if not wait and not refused:
            return Admission(True, 0.0, remaining)
        limiter, cell = self.uses[which][:2]
        return Admission(False, wait, remaining, limiter.name, limiter.key_of(cell))

    async def answer(self) -> Admission:
        """Wait for it. Raises what :meth:`failed` was told."""
        try:
            return await self.future
        except asyncio.CancelledError:
            future = self.future
            lost = not future.cancelled() and future.exception() is None and future.result().allowed
            for use in self.uses:
                use.limit.metrics.cancelled += 1
                use.limit.metrics.abandoned += lost
            if self.in_line and self.line is not None:
                self.line.left()
            raise
        except OrchestraError:
            for use in self.uses:
                use.limit.metrics.failed += 1
            raise
