"""Tells Redis how many requests a limit has refused in this process, for ``orchestra limits ls``.

Owns the count since the last word, and the pace: one command every two seconds while something is refused, none else.
Nobody waits for it, and what cannot be told is lost. Refuses to own what a refusal is. One event loop; nothing awaits.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from orchestra import _keys
from orchestra._limiting.twin import MAX_NAMES

EVERY = 2.0
"""Seconds between two words."""
WINDOW = 10
"""Seconds of a window of ``lua/gcra_refused.lua``."""


class Refusals:
    """What one ``limiter`` has refused."""

    __slots__ = ("_limiter", "_telling", "_untold")

    def __init__(self, limiter: Any) -> None:
        self._limiter = limiter
        self._untold = 0
        self._telling = False

    def add(self, count: int = 1) -> None:
        """That many were refused. O(1)."""
        self._untold += count
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_later(EVERY, self._tell)

    def _tell(self) -> None:
        self._telling = False
        count, self._untold = self._untold, 0
        store = self._limiter.store()
        store.say("gcra_refused", _keys.limit_refusals(store.scope), (self._limiter.name, count, MAX_NAMES))


def per_second(text: str, now: float) -> float:
    """What the stored ``text`` says at ``now``, seconds of the Redis clock: refused a second, over the last ten."""
    window, here, before = map(int, text.split())
    age = math.floor(now / WINDOW) - window
    passed = now % WINDOW / WINDOW
    if age == 0:
        return (here + before * (1 - passed)) / WINDOW
    return here * (1 - passed) / WINDOW if age == 1 else 0.0
