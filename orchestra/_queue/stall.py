"""Notices, from another thread, that an event loop or the whole process stands still.

Owns the question ("are you there?") and the patience; refuses to own what follows from silence. Used by one thread:
that it did not run itself is what it has to notice first, for then nobody else had to answer. Of a :class:`LoopWatch`
only the answer is written by the loop's own thread, and reading or writing one attribute is atomic under the GIL.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

STALL_AFTER = 1.0
"""Seconds without an answer after which a loop counts as blocked, and is reported; then at twice that, and so on."""
STACK_FRAMES = 30


class LoopWatch:
    """Asks with ``ask(answer)``, which must have ``answer`` called in the loop; ``loop.call_soon_threadsafe`` does."""

    def __init__(self, ask: Callable[[Callable[[], None]], object]) -> None:
        self._ask = ask
        self._asked: float | None = None
        self._since = 0.0
        self._report_at = STALL_AFTER

    def blocked(self, now: float) -> float:
        """Seconds for which the loop has certainly not answered; 0.0 when it has. Asks again then.

        Raises:
            RuntimeError: the loop is closed.
        """
        asked = self._asked
        if asked is not None:
            return now - max(asked, self._since)
        self._asked = now
        self._report_at = STALL_AFTER
        self._ask(self._answer)
        return 0.0

    def is_news(self, blocked: float) -> bool:
        """Whether a silence of ``blocked`` seconds is to be reported: once at a time, then each time it has doubled."""
        if blocked < self._report_at:
            return False
        while self._report_at <= blocked:
            self._report_at *= 2
        return True

    def forgive(self, now: float) -> None:
        """The process stood still until ``now``: the loop had no chance to answer."""
        self._since = now

    def _answer(self) -> None:
        self._asked = None


class Pulse:
    """Notices that its thread did not run: a stop of the process, or a call elsewhere that holds the GIL.

    The thread beats before and after whatever it waits for; between two beats it only computes.
    """

    def __init__(self, now: float) -> None:
        self._last = now

    def beat(self, now: float, waited: float = 0.0) -> float:
        """Seconds since the last beat that the thread did not run, 0.0 if fewer than ``STALL_AFTER``.

        ``waited``: seconds that it may have waited since, at most.
        """
        late = now - self._last - waited
        self._last = now
        return late if late >= STALL_AFTER else 0.0


def stack_of(thread_id: int) -> str:
    """What thread ``thread_id`` runs at this moment, innermost call last; ``""`` when it has ended."""
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return ""
    return "".join(traceback.format_stack(frame)[-STACK_FRAMES:])
