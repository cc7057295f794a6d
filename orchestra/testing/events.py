"""Recording telemetry in tests, and waiting for an event instead of sleeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from orchestra import telemetry
from orchestra.testing._watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType


@dataclass(frozen=True, slots=True)
class Recorded:
    """One event as it was emitted."""

    name: str
    measurements: dict[str, float]
    metadata: dict[str, Any]

    def matches(self, facts: Mapping[str, Any]) -> bool:
        """Whether every one of ``facts`` is among the measurements or metadata."""
        mine = {**self.measurements, **self.metadata}
        return all(key in mine and mine[key] == value for key, value in facts.items())


class Recorder:
    """Keeps the telemetry events ``names`` (all of them by default) while the ``with`` block is open::

        with Recorder("task.settled") as recorder:
            await queue.produce({"type": "work"})
            (event,) = await recorder.wait_for("task.settled", outcome="completed")

    Events may come from any thread; waiting belongs to the event loop.

    Raises:
        KeyError: on entering, a name is no event.
    """

    def __init__(self, *names: str) -> None:
        self.names = names or tuple(telemetry.EVENTS)
        self.events: list[Recorded] = []
        self._watch = Watch()
        self._detach: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        self._detach = telemetry.attach(self._record, *self.names)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._detach is not None:
            self._detach()
            self._detach = None

    def _record(self, name: str, measurements: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
        self.events.append(Recorded(name, dict(measurements), dict(metadata)))
        self._watch.notify()

    def of(self, name: str, **facts: Any) -> list[Recorded]:
        """The events called ``name`` that have these facts, in order."""
        return [event for event in tuple(self.events) if event.name == name and event.matches(facts)]

    async def wait_for(self, name: str, count: int = 1, timeout: float = 5.0, **facts: Any) -> list[Recorded]:
        """Wait until there are ``count`` such events, counting those that came before; returns all of them.

        Raises:
            TimeoutError: there are fewer after ``timeout`` seconds; the message says what came instead.
            ValueError: ``name`` is not recorded here.
        """
        if name not in self.names:
            raise ValueError(f"{name!r} is not recorded; this recorder has {', '.join(self.names)}")

        def why() -> str:
            seen = ", ".join(sorted({event.name for event in self.events})) or "nothing"
            return f"{len(self.of(name, **facts))} of {count} {name!r} {facts} after {timeout:g} s; recorded: {seen}"

        await self._watch.until(lambda: len(self.of(name, **facts)) >= count, timeout, why)
        return self.of(name, **facts)

    def clear(self) -> None:
        """Forget what was recorded."""
        self.events.clear()
