"""Tells a limit's shared line of those who were put behind it without asking.

A worker that knows a key to be refused gives further tasks of it their places by itself, and tells Redis how many there
were: one question a round trip, however many. Owns that count; refuses to own places (:mod:`orchestra._dispatch.parking`).
The question can never be admitted (it may use none of the burst), so telling consumes no permit. One event loop;
nothing awaits, and an answer that never comes only leaves workers with places that are not spread over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orchestra._limiting.rules import URGENCIES, Setting
from orchestra._limiting.store import QUEUE, Answer, Use


class _LineOnly:
    """A limit under which nothing is admitted: what a store needs to know of it."""

    __slots__ = ("_limiter", "name")

    def __init__(self, limiter: Any) -> None:
        self._limiter = limiter
        self.name = limiter.name

    @property
    def setting(self) -> Setting:
        setting: Setting = self._limiter.setting
        return setting._replace(tolerances_us=(0,) * URGENCIES)

    def change(self, text: str) -> None:
        self._limiter.change(text)


class LineTeller:
    """Tells the line of one ``cell``. ``learn(end)``: seconds until the end of the line, as all workers have made it."""

    def __init__(self, limiter: Any, cell: str, learn: Callable[[float], None]) -> None:
        self._use = Use(_LineOnly(limiter), cell, 1, 0)
        self._store = limiter.store
        self._learn = learn
        self._asking = False
        self.untold = 0
        """Permits' worth of places given and not told."""

    def add(self, cost: int) -> None:
        """A place for ``cost`` permits was given."""
        self.untold += cost
        if not self._asking:
            self._ask()

    def _ask(self) -> None:
        cost, self.untold = self.untold, 0
        self._asking = True
        self._store().ask((_Word(self, self._use._replace(cost=cost)),))

    def answered(self, seconds: float | None) -> None:
        """The end of the line, None if it could not be told."""
        self._asking = False
        if seconds is not None:
            self._learn(seconds)
        if self.untold and seconds is not None:
            self._ask()


class _Word:
    """The :class:`~orchestra._limiting.store.Question` of a :class:`LineTeller`."""

    __slots__ = ("_teller", "flags", "over", "rank", "uses")

    def __init__(self, teller: LineTeller, use: Use) -> None:
        self._teller = teller
        self.uses: Sequence[Use] = (use,)
        self.flags = QUEUE
        self.rank = (1, 0)  # behind everybody who waits for a permit
        self.over = False

    def known(self) -> bool:
        return False

    def answered(self, answer: Answer, wait_us: int, which: int) -> None:
        del answer, which
        self.over = True
        self._teller.answered(wait_us / 1e6)

    def failed(self, error: Exception) -> None:
        del error
        self.over = True
        self._teller.answered(None)
