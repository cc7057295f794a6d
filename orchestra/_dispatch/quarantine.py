"""Lets a task that may kill its process run alone: a delivery on the last hand-over that it is allowed.

A process that dies takes down everything it was handed, and each of those deliveries counts one hand-over. Without
isolation a few poison pills would bury innocent tasks as ``crashed`` together with themselves. Alone in its process, the
last hand-over ends in a settle or convicts exactly the task that crashed.

So a worker that learns of such suspects starts nothing more, and when nothing runs it takes over one of them and runs it.
Owns who may start; refuses to take anything over itself. One event loop.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestra._delivery import Delivery


class Quarantine:
    """``most``: hand-overs of an entry that are allowed; with 0 (unknown) or 1 nothing is isolated."""

    __slots__ = ("_most", "closed", "inside", "shut", "waiting")

    def __init__(self, most: int) -> None:
        self._most = most
        self.shut = False
        """Nothing may start but :meth:`next_nowait`: an attribute, because every start of a task looks at it."""
        self.closed = False
        """Suspects wait somewhere: start nothing, so that this process becomes empty."""
        self.waiting: list[Delivery] = []
        self.inside: Delivery | None = None
        """The suspect that runs alone now."""

    def alone(self, running: int) -> bool:
        """Whether a suspect may be taken over now."""
        return self.closed and not running and not self.waiting

    def sift(self, taken_over: Iterable[Delivery], suspects: int) -> list[Delivery]:
        """Keep the suspects of what was taken over; ``suspects``: how many were left. Returns the rest."""
        rest: list[Delivery] = []
        for delivery in taken_over:
            (self.waiting if delivery.deliveries >= self._most > 1 else rest).append(delivery)
        self.closed = suspects > 0
        self._decide()
        return rest

    def next_nowait(self, running: int) -> Delivery | None:
        """The suspect to run now; None unless one waits and nothing runs."""
        if running or self.inside is not None or not self.waiting:
            return None
        self.inside = self.waiting.pop(0)
        return self.inside

    def drop_nowait(self) -> Delivery | None:
        """One that waits and will not run here; None when there is none."""
        dropped = self.waiting.pop(0) if self.waiting else None
        self._decide()
        return dropped

    def ended(self) -> None:
        """The suspect inside has ended, in whatever way."""
        self.inside = None
        self._decide()

    def _decide(self) -> None:
        self.shut = self.closed or self.inside is not None or bool(self.waiting)
