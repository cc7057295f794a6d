"""The start/stop contract of everything that runs in the background.

A :class:`Service` tolerates being started twice, stopped twice, stopped without having been started, and stopped while
it starts. Its loops belong to it: one that raises is logged with its traceback and restarted after a backoff. One that
keeps failing fails the service, which says so, stops, and raises the error to whoever waits for it: a service never
goes on with a part of its loops.

One event loop, which it meets in :meth:`Service.start`; not thread-safe, and used from elsewhere it raises.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from orchestra import telemetry
from orchestra._backoff import Reconnect
from orchestra.errors import WrongLoopError

logger = logging.getLogger("orchestra.lifecycle")

MAX_RESTARTS = 10
"""Consecutive failures of one background loop after which its service counts as failed."""
WELL = 60.0
"""Seconds without a failure after which a loop's failures are forgotten."""


class Service:
    """Base of what has ``start()``, ``stop()`` and background loops.

    Subclasses implement :meth:`_start` and :meth:`_stop`; both run under one lock, so they never overlap.
    """

    def __init__(self) -> None:
        self._lifecycle_lock = asyncio.Lock()
        self._home: asyncio.AbstractEventLoop | None = None
        self._loops: set[asyncio.Task[None]] = set()
        self._running = False
        self._failure: BaseException | None = None
        self._giving_up: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._may_hurry = False
        """Whether :meth:`_stop` still waits for work to end, and may be cancelled to make it clean up at once."""

    @property
    def running(self) -> bool:
        """Whether the service has been started and not stopped since."""
        return self._running

    @property
    def failure(self) -> BaseException | None:
        """What a background loop kept failing with, so that the service stopped; None while all is well."""
        return self._failure

    async def start(self) -> Self:
        """Start; returns when ready. Does nothing when already started.

        Raises:
            WrongLoopError: it was started in another event loop before.
        """
        self._check_loop()
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
        """Stop; returns when everything has ended. Does nothing when not started.

        Cancelled, it hurries: it waits for no work, but cleans up. Cancelled again, it leaves that to go on by itself.

        Raises:
            WrongLoopError: it was started in another event loop.
        """
        self._check_loop()
        if asyncio.current_task() in self._loops:
            return await self._stop_locked()  # as a task of its own it would wait for this one
        if self._ending is None or self._ending.done():
            self._ending = asyncio.get_running_loop().create_task(self._stop_locked(), name="orchestra:stop")
        ending = self._ending
        try:
            await asyncio.wait((ending,))
        except asyncio.CancelledError:
            if self._may_hurry:
                self._may_hurry = False
                ending.cancel()
            await asyncio.wait((ending,))
            raise
        return None if ending.cancelled() else ending.result()  # cancelled by another who waits for it

    async def _start(self) -> None:
        """Acquire what is needed and :meth:`spawn` the loops."""

    async def _stop(self) -> None:
        """Finish; loops that still run afterwards are cancelled. Cancelled once at the most, while ``_may_hurry``."""

    async def _stop_locked(self) -> None:
        async with self._lifecycle_lock:
            await self._stop_once()

    async def _stop_once(self) -> None:
        if self._running:
            self._may_hurry = True
            try:
                await self._stop()
            finally:
                self._may_hurry = self._running = False
                await self._cancel_loops()

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._home is None:
            self._home = loop
        elif self._home is not loop:
            raise WrongLoopError(
                f"this {type(self).__name__} belongs to the event loop that started it first: make one of its own for "
                "each loop, and call it from that loop's thread (asyncio.run_coroutine_threadsafe)"
            )

    def spawn(self, name: str, loop: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run the coroutine function ``loop`` until it returns, restarting it when it raises."""
        task = asyncio.get_running_loop().create_task(self._supervise(name, loop), name=f"orchestra:{name}")
        self._loops.add(task)
        task.add_done_callback(self._loops.discard)
        return task

    def failed(self, name: str, error: BaseException) -> None:
        """Loop ``name`` has failed more than :data:`MAX_RESTARTS` times in a row: the service stops by itself."""
        self._failure = error
        telemetry.emit("service.failed", {}, {"loop": name, "error": error})
        logger.critical("%s stops: its background loop %s keeps failing: %r", type(self).__name__, name, error)
        self._giving_up = asyncio.get_running_loop().create_task(self._give_up(error), name=f"orchestra:{name}:end")

    async def _give_up(self, error: BaseException) -> None:
        async with self._lifecycle_lock:
            if self._failure is error:  # else it was stopped, and started again, meanwhile
                try:
                    await self._stop_once()
                except Exception:
                    logger.exception("%s did not stop in good order", type(self).__name__)

    async def _supervise(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        backoff = Reconnect()
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            try:
                await loop()
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError):
                    if _cancelled():
                        raise
                    error = RuntimeError("a CancelledError came out of the loop, though nobody cancels it")
                if clock() - began > WELL:
                    backoff.reset()
                facts = {"failures": backoff.failures + 1}
                telemetry.emit("service.loop_failed", facts, {"loop": name, "error": error})
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
        """Stop.

        Raises:
            Exception: what a background loop kept failing with, unless the body of the block raised.
        """
        await self.stop()
        if exc is None and self._failure is not None:
            raise self._failure


def _cancelled() -> bool:
    """Whether somebody cancels the present asyncio.Task; a CancelledError may also come out of a foreign future."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether ``event`` was set within ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
