"""An agent in a context of its own: what one task sets in context variables, the next must not see.

Runs the first step of an agent at once, in the worker's own asyncio task, and gives the rest as something to await. An
agent that never waits needs neither: no coroutine is made for it, no turn of the event loop taken. A process that an
agent forks, and that comes back here instead of ending, is ended: the event loop, its sockets and its tasks are the
parent's.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from orchestra._ext.step import first_step
from orchestra._pool.executors import leave_child

__all__ = ["Rest", "astray", "begin", "closing", "first_step"]

astray = False
"""Whether this process was forked from one that runs deliveries: those belong to the parent."""


def _go_astray() -> None:
    global astray  # noqa: PLW0603 - one fact about a process
    astray = True


def begin() -> None:
    """Deliveries are going to be run in this process: it is not the stray child of another that runs some."""
    global astray  # noqa: PLW0603
    astray = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_go_astray)


def closing(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """Whether ``error`` came out because what runs in ``task`` is being closed, and not because an agent raised it.

    Who is closed is not running: another task is, or none.
    """
    if not isinstance(error, GeneratorExit):
        return False
    try:
        return task is None or asyncio.current_task() is not task
    except RuntimeError:  # no event loop runs
        return True


class Rest:
    """The further steps of an agent that has suspended, to be awaited once. See :func:`first_step` for the arguments."""

    __slots__ = ("_context", "_coroutine", "_waiting")

    def __init__(self, context: contextvars.Context, coroutine: Any, waiting: Any) -> None:
        self._context, self._coroutine, self._waiting = context, coroutine, waiting

    def __await__(self) -> Generator[Any, Any, Any]:
        """Its result."""
        if self._coroutine is self._waiting:  # an awaitable that is no coroutine
            rest: Generator[Any, Any, Any] = self._waiting.__await__()
            return rest
        return _resumed(self._context.run, self._coroutine, self._waiting)


def _resumed(run: Callable[..., Any], coroutine: Coroutine[Any, Any, Any], waiting: Any) -> Generator[Any, Any, Any]:
    try:
        while True:
            if astray:
                leave_child()
            try:
                sent = yield waiting
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 - handed on to the coroutine, which decides
                waiting = run(coroutine.throw, error)
            else:
                waiting = run(coroutine.send, sent)
    except StopIteration as stop:
        return stop.value
