"""Who waits for which replies: one future for the commands of one write.

Owns how a waiter learns of its replies, and what becomes of them when it is cancelled. Refuses to own their order and
deadlines (:mod:`orchestra._redis.wire`, which fills these objects in). The event loop's thread only.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context


class Batch(asyncio.Future[list[Any]]):
    """The replies to ``count`` commands. Cancelling it gives up its slots, hence the connection, unless it is ``shared``:
    then its replies are received in order and dropped.
    """

    __slots__ = ("abandon", "arrived", "count", "deadline", "replies", "shared")
    abandon: Callable[[str], object]
    count: int
    shared: bool
    arrived: Callable[[list[Any]], object] | None
    deadline: float
    replies: list[Any]

    def cancel(self, msg: Any | None = None) -> bool:
        """As of a future; see the class."""
        if not super().cancel(msg=msg):
            return False
        if not self.shared:
            self.abandon("a caller was cancelled while its reply was in flight")
        return True

    def resolve(self, *, last: bool) -> None:
        """All replies are there; ``last``: nothing else is due, and the wire is done with what has come."""
        if self.done():
            return
        try:
            if self.arrived is not None:
                self.arrived(self.replies)
        finally:
            if not self.done():
                self.set_result(self.replies)

    def fail(self, error: Exception) -> None:
        """The connection ended."""
        if not self.done():
            self.set_exception(error)
            self.exception()  # on_close reports it: asyncio need not complain about a future nobody awaited


class Prompt(Batch):
    """One for a single task that awaits it at once and alone: it goes on as the reply arrives, where no other is due, and
    not a turn of the event loop later. In every other case the event loop tells it, as with any future.
    Invariant: it was the only one when it was sent, so nobody is overtaken.
    """

    __slots__ = ("waiter",)
    waiter: tuple[Callable[[Prompt], object], Context | None] | None

    def add_done_callback(self, fn: Callable[[Prompt], object], /, *, context: Context | None = None) -> None:
        """As of a future; the first one is kept apart."""
        if self.waiter is None and not self.done():
            self.waiter = fn, context
        else:
            super().add_done_callback(fn, context=context)

    def _defer(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            super().add_done_callback(waiter[0], context=waiter[1])

    def cancel(self, msg: Any | None = None) -> bool:
        """As of a future; see :class:`Batch`."""
        self._defer()
        return super().cancel(msg=msg)

    def resolve(self, *, last: bool) -> None:
        """See the class; with ``last``, the task runs in here up to its next await, and may use the wire."""
        if not last or self.waiter is None or asyncio.current_task(self.get_loop()) is not None:
            self._defer()
            super().resolve(last=last)
            return
        (fn, context), self.waiter = self.waiter, None
        self.set_result(self.replies)
        try:
            if context is None:
                fn(self)
            else:
                context.run(fn, self)
        except BaseException as error:  # noqa: BLE001  SystemExit, KeyboardInterrupt: from a transport's callback they would not end uvloop
            self.get_loop().call_soon(_raise, error)

    def fail(self, error: Exception) -> None:
        """The connection ended."""
        self._defer()
        super().fail(error)


def _raise(error: BaseException) -> None:
    raise error
