"""What a worker and the sources of its work know of each other: the slot, and the contract of a source.

Owns the words; refuses to own waiting (:mod:`orchestra.orchestration_worker_pool`). Both sides belong to one event loop.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable
from contextvars import Context
from typing import Any, Final, Protocol

from orchestra.tasks import Outcome


class Slot:
    """One worker coroutine. What it carries of ``item`` belongs to ``source``, an agent's ``context`` too.

    ``deadline``: when to interrupt it, monotonic seconds; ``final``: no retry follows, that deadline is the task's.
    ``replica``, ``balancer``, ``era``: who runs it, who chose him, and the state of his breaker then.
    ``home``: the context of its task; ``rest``: what has begun here already and is to be awaited.
    ``why`` it was interrupted, at ``interrupted_at``. ``abandoned``: given up by :meth:`~orchestra.orchestration_worker_pool.QueueWorkerPool.abandon`.
    """

    __slots__ = (
        "abandoned",
        "balancer",
        "context",
        "deadline",
        "era",
        "final",
        "home",
        "interrupted_at",
        "item",
        "replica",
        "rest",
        "source",
        "task",
        "waiter",
        "why",
    )

    def __init__(self) -> None:
        self.abandoned = self.final = False
        self.interrupted_at = 0.0
        self.context: Any = None
        self.home: Context | None = None
        self.rest: Awaitable[None] | None = None
        self.replica: Any = None
        self.balancer: Any = None
        self.era: int | None = None
        self.task: asyncio.Task[None] | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.item: Any = None
        self.source: Source | None = None
        self.deadline: float | None = None
        self.why: Outcome | None = None

    def interrupt(self, why: Outcome) -> None:
        """Cancel the item that runs here; ``why`` tells its source what the CancelledError means."""
        if self.item is not None and self.why is None and self.task is not None:
            self.why = why
            self.interrupted_at = time.monotonic()
            self.task.cancel()


class More(enum.Enum):
    """The type of :data:`MORE`."""

    MORE = "there may be more"


MORE: Final = More.MORE
"""What a source says that has run out of time, not of items."""


class Source(Protocol):
    """Where workers find work.

    ``start_nowait`` takes items and runs them, with ``slot.item`` and ``slot.source`` set, until one has to wait: then it
    gives what is left of that as something to await. None: there is nothing to run now; MORE: the monotonic time
    ``until`` is reached, and the event loop should have its turn.

    Neither it nor what is awaited may raise, except CancelledError when the pool itself is cancelled. An interruption
    reaches what is awaited as a CancelledError with ``slot.why`` set; it swallows that, and the pool takes the
    cancellation back. A source that has seen an interruption ignored may :meth:`~orchestra.orchestration_worker_pool.QueueWorkerPool.abandon` the slot, and
    then ignores what comes of it. A source that has ``capacity_changed()`` is told when more or fewer items can run at once;
    one that has ``waiting()`` says how many items could start, so that no more workers are woken than it takes.
    """

    def start_nowait(self, slot: Slot, until: float) -> Awaitable[None] | More | None:
        """Run what there is."""
