"""What one dispatcher holds: deliveries that wait for a worker, that run, and that have ended and wait to be settled.

The source that its worker pool pulls from. Runs deliveries in line as far as their agents do not wait, so that a task whose
agent never does costs a few calls and no turn of the event loop. Owns the counts of what runs and how it ended; refuses to
know what a single outcome means (:mod:`orchestra._execution`), where deliveries come from and how they are settled. One
event loop; not thread-safe.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from orchestra import telemetry
from orchestra._agents.services import Services
from orchestra._delivery import DONE, Again, Delivery
from orchestra._dispatch.prefetch import SMALL
from orchestra._dispatch.settlements import tell_settled
from orchestra._dispatch.stuck import STUCK_AFTER
from orchestra._execution import CANCELLED, COMPLETED, RELEASED, Ended
from orchestra._lifecycle import set_within
from orchestra._pool.slots import MORE, More, Slot
from orchestra.errors import CorruptEntryError
from orchestra.orchestration_worker_pool import QueueWorkerPool
from orchestra.scheduler import places
from orchestra.tasks import Outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from orchestra._dispatch.quarantine import Quarantine
    from orchestra._dispatch.settlements import Settlements
    from orchestra._dispatch.stuck import StuckAgents
    from orchestra._execution import Execution
    from orchestra._queue.base import BaseTaskQueue
    from orchestra.scheduler import PriorityScheduler

logger = logging.getLogger("orchestra.dispatcher")

SWEEP = 0.05
"""Seconds between two looks at the deadlines of what runs."""


_LATER = Ended(Outcome.RELEASED, Again(1.0, "released"))


def _given_up(error: BaseException) -> Ended:
    """The end of a delivery whose worker dies: of a fault of the engine it would meet again at once, so it waits."""
    return _LATER if isinstance(error, Exception) else RELEASED


class Running:
    """The deliveries of one dispatcher, called ``name``, at most ``concurrency`` of them running.

    ``on_empty()`` is called when nothing runs any more and suspects were seen, one of which may be taken over now.
    """

    def __init__(
        self,
        queue: BaseTaskQueue,
        name: str,
        pool: QueueWorkerPool,
        scheduler: PriorityScheduler,
        execution: Execution,
        quarantine: Quarantine,
        settlements: Settlements,
        stuck: StuckAgents,
        outcomes: Counter[Outcome],
        *,
        concurrency: int,
        aging: float | None,
        on_empty: Callable[[], None],
    ) -> None:
        self._queue, self._name, self.pool = queue, name, pool
        self._scheduler, self._aging, self._concurrency = scheduler, aging, concurrency
        self._execution, self._quarantine, self._stuck = execution, quarantine, stuck
        self._settlements, self._verdicts = settlements, settlements.pending
        self._outcomes, self._on_empty = outcomes, on_empty
        self.services = Services(queue)
        self.count = self.ended = 0
        """Deliveries that run, and how many have ended since this was made."""
        self.draining = self._cancels = self._sweeping = False
        self.room_wanted, self._idle, self._sweep_wanted = asyncio.Event(), asyncio.Event(), asyncio.Event()

    # -- waiting

    @property
    def held(self) -> int:
        """Deliveries that were read and have not ended."""
        return self.count + self._scheduler.get_queue_size() + len(self._quarantine.waiting)

    def arrived(self, found: Sequence[Delivery]) -> None:
        """:meth:`offer` in the very callback of the event loop in which they came: a few start there and then."""
        self.offer(found, at_once=len(found) < SMALL)

    def offer(self, found: Sequence[Delivery], *, at_once: bool = False) -> None:
        """Put deliveries into the heap and wake a worker; release them when draining."""
        if not found:
            return
        if self.draining:
            for delivery in found:
                self.end(delivery, RELEASED)
            return
        keys = places(self._aging, time.monotonic())
        put = self._scheduler.put_nowait
        try:
            for delivery in found:
                put(keys[delivery.stream], delivery)
        except asyncio.QueueFull:  # it has a limit, and somebody else adds to it
            for left in found[found.index(delivery) :]:
                self.end(left, RELEASED)
        if at_once:
            self.pool.begin()
        else:
            self.pool.wake()

    def release_waiting(self) -> None:
        """Give back whatever has not started."""
        while (delivery := self._pop() or self._quarantine.drop_nowait()) is not None:
            self.end(delivery, RELEASED)

    def _take_nowait(self) -> Delivery | None:
        if self.draining:
            return None
        if not self._quarantine.shut:
            return self._pop()
        while (item := self._quarantine.next_nowait(self.count - 1)) is not None:
            if self._may_start(item):
                return item
        return None

    def _pop(self) -> Delivery | None:
        return self._startable(self._scheduler.pop_nowait())

    def _startable(self, item: Any) -> Delivery | None:
        """``item``, which was the most urgent; or what follows, where it is none of ours any more."""
        while item is not None:
            if type(item) is not Delivery:
                logger.error("%s drops %.200r: no queue delivered it; add tasks with produce()", self._name, item)
            elif not (item.lost or self._cancels) or self._may_start(item):
                return item
            item = self._scheduler.pop_nowait()
        return None

    def _may_start(self, item: Delivery) -> bool:
        """Whether it is still ours and wanted; if not, it has ended."""
        if item.lost:
            self.end(item, RELEASED)  # it is another's; settling is fenced
        elif self._cancels and self._to_cancel(item) and not item.is_step:  # a step ends by its workflow's record
            self.end(item, CANCELLED)
        else:
            return True
        return False

    def _to_cancel(self, delivery: Delivery) -> bool:
        try:
            return self._queue.cancel_requested(delivery)
        except CorruptEntryError:
            return False

    # -- running: the pool's source

    def waiting(self) -> int:
        """Deliveries that could start; see :class:`~orchestra.orchestration_worker_pool.Source`."""
        return self._scheduler.get_queue_size() + len(self._quarantine.waiting)

    def capacity_changed(self) -> None:
        """The pool can run more, or less, at once: there may be room to read."""
        self.room_wanted.set()

    def start_nowait(self, slot: Slot, until: float) -> Awaitable[None] | More | None:
        """Run deliveries until one has to wait; see :class:`~orchestra.orchestration_worker_pool.Source`."""
        if self.count >= self._concurrency:
            return None
        self.count += 1
        slot.source = self
        rest: Awaitable[None] | More | None = None
        try:
            rest = self._run_nowait(slot, until)
        finally:
            if rest is None or rest is MORE:
                slot.item = slot.source = None
                self._stops()
        return rest

    def _run_nowait(self, slot: Slot, until: float) -> Awaitable[None] | More | None:
        start, clock, completed = self._execution.start_nowait, time.monotonic, 0
        pop, quarantine, done = self._scheduler.pop_nowait, self._quarantine, self._verdicts.append
        timed = self.pool.measuring or telemetry.wanted("task.settled")
        assert slot.task is not None, "a worker starts what it can wait for"
        began, cancelled = clock(), slot.task.cancelling
        try:
            while True:
                if self.draining or quarantine.shut:
                    item = self._take_nowait()
                elif type(item := pop()) is not Delivery or item.lost or self._cancels:
                    item = self._startable(item)
                if item is None:
                    return None
                slot.item = item
                try:
                    ended = start(item, slot)
                except BaseException as error:
                    self.end(item, _given_up(error))
                    raise
                if ended is COMPLETED and not timed and item is not quarantine.inside:
                    completed += 1  # counted together: this is the way of most tasks
                    done((item, DONE))
                elif isinstance(ended, Ended):
                    self._ran(item, ended, clock() - began)
                else:
                    return self._finish(item, slot, ended, began)
                if (began := clock()) >= until or cancelled():  # an agent may have cancelled the task it runs in
                    return MORE
        finally:
            if completed:
                self._count_ended(Outcome.COMPLETED, completed)

    async def _finish(self, item: Delivery, slot: Slot, rest: Awaitable[Ended], began: float) -> None:
        """Wait for the end of a delivery and queue its verdict."""
        if not self._sweeping:
            self._sweeping = True
            self._sweep_wanted.set()
        try:
            ended = await rest
        except BaseException as error:
            if slot.abandoned:
                self._stuck.ended(slot)
            else:
                self.end(item, _given_up(error))
                self._stops()
            raise
        if slot.abandoned:
            self._stuck.ended(slot)  # its delivery was settled long ago
            return
        try:
            self._ran(item, ended, time.monotonic() - began)
        finally:
            self._stops()

    def _ran(self, delivery: Delivery, ended: Ended, took: float) -> None:
        if self.pool.measuring:
            self.pool.run_times.add(took)
        self.end(delivery, ended, took)

    def _stops(self) -> None:
        self.count -= 1
        if not self.count:
            self._idle.set()
            if self._quarantine.closed:
                self._on_empty()

    # -- ended

    def end(self, delivery: Delivery, ended: Ended, run_s: float = 0.0) -> None:
        """Queue the verdict on a delivery."""
        verdict = ended.verdict
        if delivery is self._quarantine.inside:
            self._quarantine.ended()
        self._verdicts.append((delivery, verdict))
        if type(verdict) is Again and verdict.delay > 0:
            self._settlements.soonest = min(verdict.delay, self._settlements.soonest)
        if telemetry.wanted("task.settled"):
            tell_settled(self._queue.name, delivery, ended, run_s)
        self._count_ended(ended.outcome, 1)

    def _count_ended(self, outcome: Outcome, count: int) -> None:
        self._outcomes[outcome] += count
        self.ended += count
        self._settlements.wanted.set()
        self.room_wanted.set()

    async def wait_idle(self, seconds: float) -> None:
        """Wait up to ``seconds`` until nothing runs."""
        self._idle.clear()
        if self.count:
            await set_within(self._idle, seconds)

    # -- interrupting

    def slots(self) -> list[Slot]:
        """The workers that run something of this dispatcher."""
        return [slot for slot in self.pool.slots if slot.source is self]

    def interrupt_all(self) -> None:
        """Release everything that runs."""
        for slot in self.slots():
            slot.interrupt(Outcome.RELEASED)

    def interrupt_cancelled(self) -> None:
        """Interrupt what was marked as cancelled; what waits is looked at when its turn comes."""
        self._cancels = True
        for slot in self.slots():
            if self._to_cancel(slot.item):
                slot.interrupt(Outcome.CANCELLED)

    def lease_lost(self, delivery: Delivery) -> None:
        """Somebody else has it now: stop working on it; its settle would be stale."""
        for slot in self.slots():
            if slot.item is delivery:
                telemetry.emit("lease.lost", {}, {"queue": self._queue.name, "task_id": delivery.header.id})
                slot.interrupt(Outcome.RELEASED)

    async def sweep(self) -> None:
        """Interrupt what has run into its deadline; one pass over the busy slots instead of a timer per task."""
        while True:
            if not self.count:
                self._sweeping = False
                self._sweep_wanted.clear()
                await self._sweep_wanted.wait()
            await asyncio.sleep(SWEEP)
            now = time.monotonic()
            for slot in self.slots():
                if slot.why is None:
                    if slot.deadline is not None and now >= slot.deadline:
                        slot.interrupt(Outcome.TIMED_OUT)
                elif now - slot.interrupted_at > STUCK_AFTER:
                    self.abandon(slot)

    def abandon(self, slot: Slot) -> None:
        """Give up an agent that goes on after its interruption: its delivery ends as what it was interrupted for."""
        delivery = slot.item
        ended = self._execution.abandoned(delivery, slot)
        delivery.abandoned = True
        self.pool.abandon(slot)
        self._stuck.add(slot, delivery)
        self._stuck.look(self.pool)
        self.end(delivery, ended, time.monotonic() - slot.interrupted_at)
        self._stops()
