"""Time that passes only when a test says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class ManualClock:
    """A :class:`~orchestra._clock.Clock` that stands still until :meth:`advance`.

    ``start``: unix seconds of the wall clock at first; the monotonic clock starts at 0. What waits on a clock like
    this, such as a reader of an :class:`~orchestra.testing.InMemoryTaskQueue`, is woken by :meth:`advance`.
    Not thread-safe.
    """

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._wall = start
        self._elapsed = 0.0
        self._callbacks: list[Callable[[], None]] = []

    def monotonic(self) -> float:
        """Seconds that :meth:`advance` has let pass."""
        return self._elapsed

    def time(self) -> float:
        """Unix seconds."""
        return self._wall

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` (0 or more) pass on both clocks, then wake who waits.

        Raises:
            ValueError: ``seconds`` is negative: only the wall clock can go back, see :meth:`jump`.
        """
        if not seconds >= 0:
            raise ValueError(f"a clock advances by 0 seconds or more, got {seconds!r}; the wall clock may jump()")
        self._elapsed += seconds
        self.jump(seconds)

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an operator or NTP would; no time passes."""
        self._wall += seconds
        for callback in tuple(self._callbacks):
            callback()

    def on_advance(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` after every change; returns a function that stops that."""
        self._callbacks.append(callback)

        def detach() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return detach
