"""Lets those of one key ask in rounds: nobody asks before the answers to all who came before him are known and acted on.

Whoever comes while a round is under way waits for the next one; all who wait make up the next round and ask together.
Owns that order only. O(1) for who need not wait. One event loop; only :meth:`Turnstiles.enter` awaits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable


class _Round:
    __slots__ = ("inside", "waiting")

    def __init__(self) -> None:
        self.inside = 1
        self.waiting: list[asyncio.Future[None]] = []


class Turnstiles:
    """One turnstile a key, there while somebody is inside."""

    def __init__(self) -> None:
        self._rounds: dict[Hashable, _Round] = {}

    async def enter(self, keys: Iterable[Hashable]) -> None:
        """Enter all of ``keys``, in an order that everybody must keep. Cancelled, it has entered none."""
        entered: list[Hashable] = []
        try:
            for key in keys:
                current = self._rounds.get(key)
                if current is None:
                    self._rounds[key] = _Round()
                else:
                    await self._wait(key, current)
                entered.append(key)
        except BaseException:
            self.leave(entered)
            raise

    async def _wait(self, key: Hashable, current: _Round) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        current.waiting.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.leave((key,))  # it was let in at the moment in which it gave up
            raise

    def leave(self, keys: Iterable[Hashable]) -> None:
        """Leave them; the last one of a round lets the next round in."""
        for key in keys:
            current = self._rounds[key]
            current.inside -= 1
            if current.inside:
                continue
            turns = [turn for turn in current.waiting if not turn.done()]
            current.waiting = []
            current.inside = len(turns)
            for turn in turns:
                turn.set_result(None)
            if not turns:
                del self._rounds[key]
