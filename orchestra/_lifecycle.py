"""The start/stop contract of everything that runs in the background.

A :class:`Service` tolerates being started twice, stopped twice, stopped without having been started, and stopped while
it starts. Its loops belong to it: one that raises is logged with its traceback and restarted after a backoff, and one
that keeps failing fails the service, which is told through :meth:`Service.failed` instead of dying silently.
One event loop only; not thread-safe.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from orchestra import telemetry
from orchestra._backoff import Reconnect

logger = logging.getLogger("orchestra.lifecycle")

MAX_RESTARTS = 10
"""Consecutive failures of one background loop after which its service counts as failed."""


class Service:
    """Base of what has ``start()``, ``stop()`` and background loops.

    Subclasses implement :meth:`_start` and :meth:`_stop`; both run under one lock, so they never overlap.
    """

    def __init__(self) -> None:
        self._lifecycle_lock = asyncio.Lock()
        self._loops: set[asyncio.Task[None]] = set()
        self._running = False
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether the service has been started and not stopped since."""
        return self._running

    async def start(self) -> Self:
        """Start; returns when ready. Does nothing when already started."""
        async with self._lifecycle_lock:
            if not self._running:
                self._running = True  # set first: loops spawned by _start look at it
                self._failure = None
                try:
                    await self._start()
                except BaseException:
                    self._running = False
                    await self._cancel_loops()
                    raise
        return self

    async def stop(self) -> None:
        """Stop; returns when everything has ended. Does nothing when not started."""
        async with self._lifecycle_lock:
            if self._running:
                try:
                    await self._stop()
                finally:
                    self._running = False
                    await self._cancel_loops()

    async def _start(self) -> None:
        """Acquire what is needed and :meth:`spawn` the loops."""

    async def _stop(self) -> None:
        """Finish; loops that still run afterwards are cancelled."""

    def spawn(self, name: str, loop: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run the coroutine function ``loop`` until it returns, restarting it when it raises."""
        task = asyncio.get_running_loop().create_task(self._supervise(name, loop), name=f"orchestra:{name}")
        self._loops.add(task)
        task.add_done_callback(self._loops.discard)
        return task

    def failed(self, name: str, error: Exception) -> None:
        """Loop ``name`` has failed :data:`MAX_RESTARTS` times in a row and is given up."""
        self._failure = error

    async def _supervise(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        backoff = Reconnect()
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            try:
                await loop()
            except Exception as error:
                if clock() - began > 60.0:
                    backoff.reset()
                telemetry.emit(
                    "service.loop_failed", {"failures": backoff.failures + 1}, {"loop": name, "error": error}
                )
                logger.exception("background loop %s failed", name)
                if backoff.failures >= MAX_RESTARTS:
                    self.failed(name, error)
                    return
                await asyncio.sleep(backoff.next())
            else:
                return

    async def _cancel_loops(self) -> None:
        pending = [task for task in self._loops if task is not asyncio.current_task()]
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.gather(*pending, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> Any:
        await self.stop()


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether ``event`` was set within ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
