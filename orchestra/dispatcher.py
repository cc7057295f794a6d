"""Fetches deliveries, bounds how many are held and run, settles what has ended. No policy about a single task.

Data path: ``read`` (own connection) → scheduler heap → worker pool slot → :class:`~orchestra._execution.Execution` →
verdicts gathered while the previous batch is being settled → ``settle`` (one round trip a batch).
Four background loops: read, settle, maintain (promote due tasks, take over dead consumers' deliveries, learn of
cancelled tasks), sweep (timeouts and stuck agents, without a timer per task). Leases are renewed by a thread. All state
belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestra import _execution, _identity, telemetry
from orchestra._backoff import Reconnect
from orchestra._delivery import Again, Delivery
from orchestra._dispatch.balancers import Balancers
from orchestra._dispatch.ends import claim, disclaim, exchange_for, pool_of, reach, within
from orchestra._dispatch.prefetch import Prefetch
from orchestra._dispatch.quarantine import Quarantine
from orchestra._dispatch.retry_gate import RetryGate
from orchestra._dispatch.settlements import Settlements, is_outage, tell_settled
from orchestra._dispatch.stuck import STUCK_AFTER, StuckAgents
from orchestra._execution import CANCELLED, RELEASED, Ended, Execution
from orchestra._lifecycle import Service, set_within
from orchestra.agents import AgentRegistry, get_agent_registry, unknown_agent
from orchestra.errors import CorruptEntryError
from orchestra.load_balancer import BaseLoadBalancerStrategy
from orchestra.orchestration_worker_pool import QueueWorkerPool, Slot
from orchestra.scheduler import PriorityScheduler, ranks
from orchestra.task_queue import BaseTaskQueue
from orchestra.tasks import Outcome, Retry, RetryBudget, check_name, require_int, require_number

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from orchestra._queue.base import Maintenance
    from orchestra.flow_control import RedisRateLimiter

logger = logging.getLogger("orchestra.dispatcher")

BATCH, BATCH_MOST = 500, 10_000
BLOCK_MS = 5000
SMALL = 16
"""A read of fewer deliveries is a matter of latency, not of throughput."""
AGING = 5.0
"""Seconds per priority level: a task that was read goes before more urgent ones read so much later."""
SWEEP = 0.05
LAST_GRACE = 1.0
"""Seconds that cancelled agents get to end when draining."""
SETTLE_GRACE = 5.0
"""Seconds beyond drain timeout and last grace in which what has ended is settled while Redis cannot be reached."""
READ_GRACE = 2.0
"""Seconds that a read under way gets to end when draining; what a cancelled one brings waits for its lease."""
GOODBYE = 2.0
"""Seconds that ending the lease thread, and forgetting the consumer, may take each."""
_THE_DEFAULT = RetryBudget()


class Dispatcher(Service):
    """Hands the tasks of a queue to agents.

    ``async with dispatcher:`` or ``await dispatcher.start()`` run it in the background; ``await dispatcher.run()`` runs
    until :meth:`stop`.

    Args:
        task_queue: where tasks come from.
        scheduler: orders what is held locally.
        worker_pool: runs the agents; by default one of ``max_concurrent_dispatch`` workers, which ends with this.
        flow_controller: asked for a permit before every attempt; a refusal delays the task and consumes no retry.
        load_balancer: chooses among the replicas of an agent; by default smooth weighted round robin for each type.
        max_concurrent_dispatch: agents running at once, 1 to 100,000.
        default_max_retries: retries where neither task nor agent says otherwise, 0 to 1000.
        consumer_name: unique among the running consumers of the queue; made up by default.
        dispatcher_id: how logs call this dispatcher.
        batch_size: deliveries fetched at once, 1 to 10,000; 500 by default.
        block_timeout_ms: how long a fetch waits for the first, 1 to 600,000; 5000 by default.
        agents: who processes what; by default the process-wide registry.
        retry: backoff where the agent says nothing, with ``default_max_retries`` in place of its ``max_retries``.
        drain_timeout: seconds that :meth:`stop` lets running agents finish, 0 to a day. Whatever agents do, it ends a
            second or two later, and with Redis out of reach some seconds after that.
        retry_budget: how much of the work may be retries before they are delayed further; None for no limit.
        aging: seconds per priority level, 0 to a day: among what is held, a task goes before more urgent ones that
            were read so much later. None or 0: the most urgent always goes first.

    Raises:
        TypeError: ``task_queue`` is not a BaseTaskQueue.
        ConfigurationError: a number is out of range.
    """

    def __init__(
        self,
        task_queue: BaseTaskQueue,
        scheduler: PriorityScheduler | None = None,
        worker_pool: QueueWorkerPool | None = None,
        flow_controller: RedisRateLimiter | None = None,
        load_balancer: BaseLoadBalancerStrategy | None = None,
        max_concurrent_dispatch: int = 100,
        default_max_retries: int = 3,
        consumer_name: str | None = None,
        dispatcher_id: str | None = None,
        batch_size: int | None = None,
        block_timeout_ms: int | None = None,
        *,
        agents: AgentRegistry | None = None,
        retry: Retry | None = None,
        drain_timeout: float = 30.0,
        retry_budget: RetryBudget | None = _THE_DEFAULT,
        aging: float | None = AGING,
    ) -> None:
        super().__init__()
        if not isinstance(task_queue, BaseTaskQueue):
            raise TypeError(f"task_queue must be a BaseTaskQueue, got {task_queue!r}")
        require_int("max_concurrent_dispatch", max_concurrent_dispatch, 1, 100_000, unit="tasks")
        require_int("default_max_retries", default_max_retries, 0, 1000, unit="retries")
        require_number("drain_timeout", drain_timeout, 0.0, 86_400.0, unit="seconds")
        ranks(aging, 0.0)
        self._batch_size = BATCH if batch_size is None else batch_size
        self._block_ms = BLOCK_MS if block_timeout_ms is None else block_timeout_ms
        require_int("batch_size", self._batch_size, 1, BATCH_MOST, unit="deliveries")
        require_int("block_timeout_ms", self._block_ms, 1, 600_000, unit="ms")
        self.queue = task_queue
        self.scheduler = scheduler or PriorityScheduler()
        self._most_waiting = self.scheduler.statistics().max_size or BATCH_MOST
        self.consumer = check_name("consumer_name", consumer_name or _identity.consumer_name())
        self.id = dispatcher_id or self.consumer
        self.agents = get_agent_registry() if agents is None else agents
        self._own_pool = worker_pool is None
        self.pool = worker_pool or pool_of(max_concurrent_dispatch)
        self._concurrency = max_concurrent_dispatch
        self._drain_timeout, self._aging = drain_timeout, aging
        self.outcomes: Counter[Outcome] = Counter()
        """How many deliveries ended how, since this dispatcher was made."""
        self._stuck = StuckAgents(task_queue.name, self.agents)
        self._retries = RetryGate(task_queue.name, retry_budget, self.outcomes)
        self._balancers = Balancers(load_balancer)
        self._execution = Execution(
            task_queue.name,
            self.agents,
            replace(retry or Retry(), max_retries=default_max_retries),
            self._balancers.of,
            flow_controller,
            now=task_queue.now,
            hold_back=self._retries.hold_back,
            on_left=self._stuck.add_function,
        )
        self.running_tasks = 0
        self._cancels = False
        self._settlements = Settlements(task_queue, self.id, self._maintain_in)
        self._verdicts = self._settlements.pending
        self._ended = 0
        self._draining = False
        self._prefetch = Prefetch()
        self._quarantine = Quarantine(getattr(task_queue, "max_deliveries", 0))
        self._maintain_at, self._sweeping = 0.0, False
        self._room_wanted, self._maintain_wanted = asyncio.Event(), asyncio.Event()
        self._sweep_wanted, self._idle, self._stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._leases = AsyncExitStack()

    # -- lifecycle

    async def run(self) -> None:
        """Run until :meth:`stop`; cancelling it stops too.

        Raises:
            StoreError: Redis refused in a way that waiting does not mend.
        """
        await self.start()
        try:
            await self._stopped.wait()
        finally:
            await self.stop()
        if self._failure is not None:
            raise self._failure

    async def _start(self) -> None:
        self._draining = False
        self._stopped.clear()
        _execution.begin()
        claim(self.scheduler, self.id)
        try:
            await reach(self.queue, self.consumer)
            await self._leases.enter_async_context(self.queue.keep_leases(self.consumer, self._lease_lost))
            exchange = exchange_for(self.queue, self.agents, self.consumer)
            if exchange is not None:
                await self._leases.enter_async_context(exchange)
        except BaseException:
            disclaim(self.scheduler)
            raise
        self.pool.attach(self)
        self._reader = self.spawn("read", self._read_loop)
        self._settler = self.spawn("settle", self._settlements.loop)
        self.spawn("maintain", self._maintain_loop)
        self.spawn("sweep", self._sweep_loop)
        facts = {"queue": self.queue.name, "consumer": self.consumer}
        telemetry.emit("dispatcher.started", {"concurrency": self._concurrency}, facts)

    async def _stop(self) -> None:
        """Drain: read no more, release what has not started, let running agents finish, settle everything."""
        began, before = time.monotonic(), self.outcomes[Outcome.RELEASED]
        self._draining = True
        self._room_wanted.set()
        try:
            await self._drain(began + self._drain_timeout)
        except asyncio.CancelledError:  # in a hurry: what runs is interrupted at once
            await self._drain(began)
            raise
        finally:
            self._may_hurry = False
            disclaim(self.scheduler)
            self.pool.detach(self)
            await self._cancel_loops()
            await within(GOODBYE, self._leases.aclose(), self.id, "the lease thread goes on")
            await within(GOODBYE, self.queue.retire(self.consumer), self.id, "its consumer is forgotten by others")
            if self._own_pool:
                await self.pool.shutdown(wait=False)
                self.pool = pool_of(self._concurrency)
            self._stopped.set()
        released = self.outcomes[Outcome.RELEASED] - before
        facts = {"completed": self.outcomes[Outcome.COMPLETED], "released": released}
        meta = {"queue": self.queue.name, "consumer": self.consumer}
        telemetry.emit("dispatcher.stopped", {**facts, "duration_s": time.monotonic() - began}, meta)

    async def _drain(self, deadline: float) -> None:
        await self._stop_reading()
        while (delivery := self._pop() or self._quarantine.drop_nowait()) is not None:
            self._end(delivery, RELEASED)
        await self._wait_idle(deadline - time.monotonic())
        for slot in self._my_slots():
            slot.interrupt(Outcome.RELEASED)
        await self._wait_idle(LAST_GRACE)
        for slot in self._my_slots():
            self._abandon(slot)
        await self._settlements.rest(max(deadline + LAST_GRACE, time.monotonic()) + SETTLE_GRACE, self._settler)

    async def _stop_reading(self) -> None:
        end = time.monotonic() + READ_GRACE
        while not self._reader.done():
            if (left := end - time.monotonic()) <= 0:
                self._reader.cancel()
            await within(max(0.1, left), self.queue.wake(self.consumer), self.id, "its read was not woken")
            await asyncio.wait((self._reader,), timeout=0.1)

    def failed(self, name: str, error: BaseException) -> None:
        """A background loop keeps failing: this dispatcher drains, and :meth:`run` ends with the error."""
        super().failed(name, error)
        self._stopped.set()

    def balancer(self, task_type: str) -> BaseLoadBalancerStrategy:
        """Who chooses among the replicas of ``task_type``: its ``update_worker_status(worker_id, {...})`` changes health,
        weight and capacity while tasks run, and what was set stays as long as the replica is registered. O(replicas).

        Raises:
            UnknownAgentError: no agent is registered for the type.
        """
        agent = self.agents.get(task_type)
        if agent is None:
            raise unknown_agent(task_type, self.agents)
        agent.change(steered=True)
        return self._balancers.of(agent)

    # -- reading

    @property
    def held(self) -> int:
        """Deliveries read and not ended: running or waiting in the scheduler."""
        return self.running_tasks + self.scheduler.get_queue_size() + len(self._quarantine.waiting)

    def _room(self) -> int:
        room = min(self._concurrency, self.pool.capacity) + self._prefetch.size - self.held
        return min(room, self._most_waiting - self.scheduler.get_queue_size())

    async def _read_loop(self) -> None:
        backoff = Reconnect()
        while not self._draining:
            self._prefetch.adapt(time.monotonic(), self._ended)
            room = self._room()
            worth = min(self._prefetch.size // 2, self._batch_size) if self.scheduler.get_queue_size() else 1
            if room < max(1, worth):
                self._room_wanted.clear()
                await self._room_wanted.wait()
                continue
            try:
                found = await self.queue.read(self.consumer, min(room, self._batch_size), self._block_ms)
            except Exception as error:
                if not is_outage(error):
                    raise
                wait = backoff.next()
                log = logger.warning if backoff.failures == 1 else logger.debug
                log("%s cannot read: %s; trying again", self.id, error)
                await asyncio.sleep(wait)
            else:
                backoff.reset()
                self._offer(found)
                if len(found) < SMALL:
                    await asyncio.sleep(0)  # the worker that was woken goes before the next read is packed and sent

    def _offer(self, found: list[Delivery]) -> None:
        """Put deliveries into the heap and wake a worker; release them when draining."""
        if self._draining:
            for delivery in found:
                self._end(delivery, RELEASED)
            return
        keys = ranks(self._aging, time.monotonic())
        try:
            for delivery in found:
                self.scheduler.put_nowait(keys[delivery.lane], delivery)
        except asyncio.QueueFull:  # it has a limit, and somebody else adds to it
            for left in found[found.index(delivery) :]:
                self._end(left, RELEASED)
        if found:
            self.pool.wake()

    # -- running: the pool's source

    def capacity_changed(self) -> None:
        """The pool can run more, or less, at once: there may be room to read."""
        self._room_wanted.set()

    def take_nowait(self) -> Delivery | None:
        """The delivery to run next; None when there is none, or enough run already."""
        if self.running_tasks >= self._concurrency or self._draining:
            return None
        if self._quarantine.shut:
            return self._pop_suspect()
        return self._pop()

    def _pop(self) -> Delivery | None:
        while (item := self.scheduler.pop_nowait()) is not None:
            if type(item) is not Delivery:
                logger.error("%s drops %.200r: no queue delivered it; add tasks with produce()", self.id, item)
            elif not (item.lost or self._cancels) or self._may_start(item):
                return item
        return None

    def _pop_suspect(self) -> Delivery | None:
        while (item := self._quarantine.next_nowait(self.running_tasks)) is not None:
            if self._may_start(item):
                return item
        return None

    def _may_start(self, item: Delivery) -> bool:
        """Whether it is still ours and wanted; if not, it has ended."""
        if item.lost:
            self._end(item, RELEASED)  # it is another's; settling is fenced
        elif self._cancels and self._to_cancel(item):
            self._end(item, CANCELLED)
        else:
            return True
        return False

    def _to_cancel(self, delivery: Delivery) -> bool:
        try:
            return self.queue.cancel_requested(delivery)
        except CorruptEntryError:
            return False

    async def run_item(self, item: Delivery, slot: Slot) -> None:
        """Process one delivery to its end and queue its verdict."""
        self.running_tasks += 1
        if not self._sweeping:
            self._sweeping = True
            self._sweep_wanted.set()
        began = time.monotonic()
        try:
            ended = await self._execution.run(item, slot)
        except BaseException:
            if slot.abandoned:
                self._stuck.ended(slot)
            else:
                self.running_tasks -= 1
                self._end(item, RELEASED)
            raise
        if slot.abandoned:
            self._stuck.ended(slot)  # its delivery was settled long ago
            return
        self.running_tasks -= 1
        took = time.monotonic() - began
        if self.pool.measuring:
            self.pool.run_times.add(took)
        self._end(item, ended, took)

    def _end(self, delivery: Delivery, ended: Ended, run_s: float = 0.0) -> None:
        self.outcomes[ended.outcome] += 1
        self._ended += 1
        if delivery is self._quarantine.inside:
            self._quarantine.ended()
        if not self._verdicts:
            self._settlements.wanted.set()
        self._verdicts.append((delivery, ended.verdict))
        self._room_wanted.set()
        if type(ended.verdict) is Again and ended.verdict.delay > 0:
            self._settlements.soonest = min(ended.verdict.delay, self._settlements.soonest)
        if telemetry.wanted("task.settled"):
            tell_settled(self.queue.name, delivery, ended, run_s)
        if not self.running_tasks:
            self._idle.set()
            if self._quarantine.closed:
                self._maintain_in(0.0)

    def _lease_lost(self, delivery: Delivery) -> None:
        """Somebody else has it now: stop working on it; its settle would be stale."""
        for slot in self._my_slots():
            if slot.item is delivery:
                telemetry.emit("lease.lost", {}, {"queue": self.queue.name, "task_id": delivery.header.id})
                slot.interrupt(Outcome.RELEASED)

    # -- background

    def _maintain_in(self, seconds: float) -> None:
        when = asyncio.get_running_loop().time() + seconds
        if when < self._maintain_at:
            self._maintain_at = when
            self._maintain_wanted.set()

    def _tick(self) -> Awaitable[Maintenance]:
        if self._draining:
            return self.queue.maintain(self.consumer, 0)
        alone = self._quarantine.alone(self.running_tasks)
        return self.queue.maintain(self.consumer, max(int(alone), self._room()), alone)

    async def _maintain_loop(self) -> None:
        clock = asyncio.get_running_loop().time
        backoff = Reconnect()
        while True:
            try:
                work = await self._tick()
            except Exception as error:
                if not is_outage(error):
                    raise
                logger.debug("%s: maintenance failed: %s", self.id, error)
                self._maintain_at = clock() + backoff.next()
            else:
                backoff.reset()
                self._offer(self._quarantine.sift(work.deliveries, work.suspects))
                self.pool.wake()
                if work.cancels:
                    self._cancel_running()
                self._maintain_at = clock() + max(0.001, work.next_in)
            self._stuck.look(self.pool)
            self._retries.tell()
            while (left := self._maintain_at - clock()) > 0:
                self._maintain_wanted.clear()
                await set_within(self._maintain_wanted, left)

    def _cancel_running(self) -> None:
        """Interrupt what was marked; what waits in the scheduler is looked at when its turn comes."""
        self._cancels = True
        for slot in self._my_slots():
            if self._to_cancel(slot.item):
                slot.interrupt(Outcome.CANCELLED)

    async def _sweep_loop(self) -> None:
        """Interrupt what has run into its deadline; one pass over the busy slots instead of a timer per task."""
        while True:
            if not self.running_tasks:
                self._sweeping = False
                self._sweep_wanted.clear()
                await self._sweep_wanted.wait()
            await asyncio.sleep(SWEEP)
            now = time.monotonic()
            for slot in self._my_slots():
                if slot.why is None:
                    if slot.deadline is not None and now >= slot.deadline:
                        slot.interrupt(Outcome.TIMED_OUT)
                elif now - slot.interrupted_at > STUCK_AFTER:
                    self._abandon(slot)

    def _abandon(self, slot: Slot) -> None:
        """Give up an agent that goes on after its interruption: its delivery ends as what it was interrupted for."""
        delivery = slot.item
        ended = self._execution.abandoned(delivery, slot)
        delivery.abandoned = True
        self.pool.abandon(slot)
        self.running_tasks -= 1
        self._stuck.add(slot, delivery)
        self._stuck.look(self.pool)
        self._end(delivery, ended, time.monotonic() - slot.interrupted_at)

    @property
    def stuck(self) -> int:
        """Agents that go on although they were timed out, cancelled or released, and are not in ``running_tasks``."""
        return len(self._stuck)

    def _my_slots(self) -> list[Slot]:
        return [slot for slot in self.pool.slots if slot.source is self]

    async def _wait_idle(self, seconds: float) -> None:
        self._idle.clear()
        if self.running_tasks:
            await set_within(self._idle, seconds)
