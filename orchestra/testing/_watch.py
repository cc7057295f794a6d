"""Waiting until something is so, told by whoever changes it: the reason why tests need no sleeps."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Watch:
    """Wakes coroutines whose condition has become true. ``notify`` may be called from any thread."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def notify(self) -> None:
        """Something changed: look at every condition."""
        for condition, future in tuple(self._waiting):
            if condition():
                future.get_loop().call_soon_threadsafe(_set, future)

    async def until(self, condition: Callable[[], bool], timeout: float, why: Callable[[], str]) -> None:
        """Return as soon as ``condition()`` holds.

        Raises:
            TimeoutError: it does not after ``timeout`` seconds; the message is ``why()``.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (condition, future)
        self._waiting.append(waiter)  # before looking: a thread may notify in between
        try:
            if not condition():
                async with asyncio.timeout(timeout):
                    await future
        except TimeoutError:
            raise TimeoutError(why()) from None
        finally:
            self._waiting.remove(waiter)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
