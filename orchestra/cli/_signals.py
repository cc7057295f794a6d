"""What signals mean to a command that runs until it is told to stop, and that it ends in time whatever happens.

The first SIGTERM or Ctrl-C asks the event loop to stop, the second ends at once. Handlers run in the main thread between
two steps of the interpreter, so they work while an agent blocks the event loop; only C code that never returns to the
interpreter keeps a process from ending, and it is for whoever supervises it to kill it.
Used by one event loop, in the main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from types import FrameType, TracebackType
from typing import Any, Self

from orchestra import _process
from orchestra.cli._status import INTERRUPTED, OK

logger = logging.getLogger("orchestra.worker")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CLOSING = 5.0
"""Seconds that a command gets to close when nothing holds it up."""


class LastResort:
    """Ends the process with ``status`` when it is not disarmed in time."""

    def __init__(self) -> None:
        self._timers: list[threading.Timer] = []

    def arm(self, seconds: float, status: int, why: str) -> None:
        """From now; the soonest counts."""
        timer = threading.Timer(seconds, self._end, (status, why))
        timer.daemon = True
        timer.name = "last-resort"
        timer.start()
        self._timers.append(timer)

    def disarm(self) -> None:
        """It ends by itself."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    @staticmethod
    def _end(status: int, why: str) -> None:
        logger.error("%s: ending with status %d", why, status)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


class Stopper:
    """Turns signals, and the death of a supervising parent, into ``event``; the second signal calls ``at_once``.

    A context manager around :func:`asyncio.run`; :meth:`attach` is called inside. ``patience``: seconds from the first
    signal until the process is ended from outside its event loop, as by a second signal; None for never.
    """

    def __init__(self, at_once: Callable[[int], Any], patience: float | None = None) -> None:
        self.signal: int | None = None
        self.forced: int | None = None
        """The second signal."""
        self.last_resort = LastResort()
        self._at_once = at_once
        self._patience = patience
        self._loop: asyncio.AbstractEventLoop | None = None
        self._before: dict[int, Any] = {}
        self._seen = False

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.last_resort.disarm()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def attach(self) -> None:
        """Set :attr:`event` of the running loop from now on."""
        self.event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in SIGNALS:
            with contextlib.suppress(NotImplementedError):  # Windows; a sleeping loop notices a signal a little later
                self._loop.add_signal_handler(number, lambda: None)  # wakes a loop that waits for sockets
                signal.signal(number, self._handle)
        if self._seen:
            self.event.set()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._seen:
            self.forced = number
            self._at_once(128 + number)
            return
        self._seen, self.signal = True, number
        if self._patience is not None:
            self.last_resort.arm(self._patience, 128 + number, "the drain does not end")
        self._ask()

    def _ask(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed: there is nothing left to stop
                self._loop.call_soon_threadsafe(self.event.set)

    def watch_parent(self, fd: int) -> None:
        """Drain when the other end of ``fd`` is closed: the parent has died."""
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(fd)
            logger.error("the supervising process is gone: draining")
            self._seen = True
            self.event.set()
            if self._patience is not None:
                self.last_resort.arm(self._patience, OK, "the drain does not end")

        loop.add_reader(fd, gone)

    @property
    def status(self) -> int:
        """The exit status: after a drain that ended well, or after the second signal."""
        if self.forced is not None:
            return 128 + self.forced
        return INTERRUPTED if self.signal == signal.SIGINT else OK


def run_to_the_end(main: Coroutine[Any, Any, int], loop: str = "auto") -> int:
    """:func:`asyncio.run` on the event loop called ``loop``, one of ``_process.LOOPS``, then end the process if threads
    that it left behind would keep the interpreter waiting.
    """
    before = set(threading.enumerate())
    status = _process.run(main, loop)
    left = [each for each in threading.enumerate() if each not in before and not each.daemon]
    for thread in left:
        thread.join(CLOSING / len(left))
    if any(thread.is_alive() for thread in left):
        LastResort._end(status, f"{len(left)} threads of agents go on")
    return status
