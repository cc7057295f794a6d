"""Verdicts on their way to the queue: gathered while the batch before them is being settled, one round trip a batch.

Owns what has ended and is not settled; refuses to know how anything ended. What an outage of Redis keeps from being
settled is tried again until it is. One event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from orchestra import telemetry
from orchestra._backoff import Reconnect
from orchestra._delivery import Again, Bury, Delivery, Verdict
from orchestra._execution import Ended
from orchestra.errors import CorruptEntryError, StoreError
from orchestra.task_queue import BaseTaskQueue

logger = logging.getLogger("orchestra.dispatcher")


class Settlements:
    """The unsettled verdicts of one dispatcher, called ``name``. Whoever adds to ``pending`` sets ``wanted``.

    ``on_retry(seconds)`` is called when a retry was settled, with its delay: it is due so long after that at the latest.
    """

    def __init__(self, queue: BaseTaskQueue, name: str, on_retry: Callable[[float], None]) -> None:
        self._queue, self._name, self._on_retry = queue, name, on_retry
        self.pending: list[tuple[Delivery, Verdict]] = []
        """Always the same list."""
        self.wanted = asyncio.Event()
        self.soonest = math.inf
        """Seconds, the shortest delay of a retry among ``pending``; written by who adds it."""
        self._under_way = 0

    def __len__(self) -> int:
        """Deliveries that have ended and are not known to be settled."""
        return len(self.pending) + self._under_way

    async def loop(self) -> None:
        """Settle, for ever."""
        backoff = Reconnect()
        while True:
            await self.wanted.wait()
            self.wanted.clear()
            while self.pending:
                batch = self.pending[:]
                self.pending.clear()
                self._under_way = len(batch)
                soonest, self.soonest = self.soonest, math.inf
                try:
                    stale = await self._queue.settle(batch)
                except BaseException as error:
                    self.pending[:0] = batch
                    self.soonest = min(soonest, self.soonest)
                    self._under_way = 0
                    if not is_outage(error):
                        self.wanted.set()  # for the loop that is started in place of this one
                        raise
                    logger.warning("%s cannot settle %d tasks: %s; trying again", self._name, len(batch), error)
                    await asyncio.sleep(backoff.next())
                else:
                    self._under_way = 0
                    backoff.reset()
                    if soonest < math.inf:
                        self._on_retry(soonest)
                    self._tell_stale(stale)

    async def rest(self, until: float, looping: asyncio.Task[None]) -> None:
        """Wait until everything is settled, up to ``until`` (monotonic seconds), or until ``looping`` has ended."""
        self.wanted.set()
        while len(self) and not looping.done() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if len(self):
            logger.warning("%d ended tasks could not be settled and will run again", len(self))

    def _tell_stale(self, stale: list[Delivery]) -> None:
        for delivery in stale:
            facts = {"queue": self._queue.name, "task_id": names_of(delivery)[0], "outcome": "stale"}
            telemetry.emit("task.stale", {}, facts)


def is_outage(error: BaseException) -> bool:
    """Whether waiting may help: Redis refused, or was away; also where a task group has wrapped that."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_outage, error.exceptions))
    return isinstance(error, StoreError | ConnectionError)


def tell_settled(queue: str, delivery: Delivery, ended: Ended, run_s: float) -> None:
    """Emit ``task.settled``."""
    verdict = ended.verdict
    error = verdict.error.get("error") if isinstance(verdict, Bury) else getattr(verdict, "error", None)
    task_id, task_type = names_of(delivery)
    facts = {
        "queue": queue,
        "task_id": task_id,
        "type": task_type,
        "attempt": delivery.attempt,
        "outcome": ended.outcome.value,
        "error": error,
        "retry_in_s": verdict.delay if isinstance(verdict, Again) else None,
        "dead_reason": verdict.reason if isinstance(verdict, Bury) else None,
    }
    telemetry.emit("task.settled", {"run_s": run_s}, facts)


def names_of(delivery: Delivery) -> tuple[str, str]:
    """Id and type of a task, for those who watch; even of a corrupt one."""
    try:
        return delivery.header.id, delivery.header.type
    except CorruptEntryError:
        return "?", "?"
