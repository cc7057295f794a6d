"""Fetches deliveries, bounds how many are held and run, settles what has ended. No policy about a single task.

Data path: ``read`` (own connection) → scheduler heap → worker pool slot → :class:`~orchestra._execution.Execution` →
verdicts gathered while the previous batch is being settled → ``settle`` (one round trip a batch).
Four background loops: read, settle, maintain (promote due tasks, take over dead consumers' deliveries), sweep (timeouts
without a timer per task). Leases are renewed by a thread. All state belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import weakref
from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from orchestra import _identity, telemetry
from orchestra._backoff import Reconnect
from orchestra._delivery import Again, Bury, Delivery, Verdict
from orchestra._execution import Ended, Execution
from orchestra._lifecycle import Service, set_within
from orchestra.agents import AgentRegistry, AgentType, get_agent_registry
from orchestra.errors import ConfigurationError, CorruptEntryError, StoreError, StoreUnavailableError
from orchestra.load_balancer import BaseLoadBalancerStrategy, WeightedRoundRobinStrategy, create_load_balancer
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool, Slot
from orchestra.scheduler import PriorityScheduler
from orchestra.task_queue import BaseTaskQueue
from orchestra.tasks import Outcome, Retry, check_name, require_int, require_number

if TYPE_CHECKING:
    from orchestra.flow_control import RedisRateLimiter

logger = logging.getLogger("orchestra.dispatcher")

BATCH = 500
BLOCK_MS = 5000
PREFETCH_SECONDS, PREFETCH_MOST = 0.02, 1000
"""Beyond free slots, so many seconds of work at the present rate are held locally, and never more tasks than that."""
RATE_MEMORY = 0.25
"""Seconds over which the present rate is averaged: agents that wait alike end in waves."""
SMALL = 16
"""A read of fewer deliveries is a matter of latency, not of throughput."""
AGING_MS = 5000
"""Per priority level: a task that was read goes before more urgent ones read so much later."""
SWEEP = 0.05
REACH_PATIENCE = 1.0
"""Seconds that starting keeps trying to reach Redis."""
STUCK_AFTER = 5.0
"""Seconds after which an agent that ignores its cancellation is reported."""
LAST_GRACE = 1.0
"""Seconds that cancelled agents get to end when draining."""


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
        drain_timeout: seconds that :meth:`stop` lets running agents finish.

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
    ) -> None:
        super().__init__()
        if not isinstance(task_queue, BaseTaskQueue):
            raise TypeError(f"task_queue must be a BaseTaskQueue, got {task_queue!r}")
        require_int("max_concurrent_dispatch", max_concurrent_dispatch, 1, 100_000)
        require_int("default_max_retries", default_max_retries, 0, 1000)
        require_number("drain_timeout", drain_timeout, 0.0, 86_400.0, unit="seconds")
        self._batch_size = BATCH if batch_size is None else batch_size
        self._block_ms = BLOCK_MS if block_timeout_ms is None else block_timeout_ms
        require_int("batch_size", self._batch_size, 1, 10_000, unit="deliveries")
        require_int("block_timeout_ms", self._block_ms, 1, 600_000, unit="ms")
        self.queue = task_queue
        self.scheduler = scheduler or PriorityScheduler()
        self.consumer = check_name("consumer_name", consumer_name or _identity.consumer_name())
        self.id = dispatcher_id or self.consumer
        self.agents = get_agent_registry() if agents is None else agents
        self._own_pool = worker_pool is None
        self.pool = worker_pool or QueueWorkerPool("dispatcher", _pool_config(max_concurrent_dispatch))
        self._concurrency = max_concurrent_dispatch
        self._drain_timeout = drain_timeout
        base = retry or Retry()
        retry = Retry(
            max_retries=default_max_retries,
            base=base.base,
            factor=base.factor,
            max_delay=base.max_delay,
            jitter=base.jitter,
        )
        self._balancer = load_balancer
        self._balancers: dict[str, tuple[object, BaseLoadBalancerStrategy]] = {}
        self._execution = Execution(task_queue.name, self.agents, retry, self._balancer_for, flow_controller)
        self.outcomes: Counter[Outcome] = Counter()
        """How many deliveries ended how, since this dispatcher was made."""
        self.running_tasks = 0
        self._held: set[Delivery] = set()
        self._verdicts: list[tuple[Delivery, Verdict]] = []
        self._unsettled = 0
        self._ended = 0
        self._draining = False
        self._prefetch = 1
        self._rate = self._rate_at = 0.0
        self._rate_ended = 0
        self._maintain_at = 0.0
        self._room_wanted = asyncio.Event()
        self._settle_wanted = asyncio.Event()
        self._maintain_wanted = asyncio.Event()
        self._sweep_wanted = asyncio.Event()
        self._sweeping = False
        self._idle = asyncio.Event()
        self._stopped = asyncio.Event()
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
        self._claim_scheduler()
        try:
            await self._reach()
            await self._leases.enter_async_context(self.queue.keep_leases(self.consumer, self._lease_lost))
        except BaseException:
            _claimed.discard(self.scheduler)
            raise
        self.pool.attach(self)
        self._reader = self.spawn("read", self._read_loop)
        self.spawn("settle", self._settle_loop)
        self.spawn("maintain", self._maintain_loop)
        self.spawn("sweep", self._sweep_loop)
        facts = {"queue": self.queue.name, "consumer": self.consumer}
        telemetry.emit("dispatcher.started", {"concurrency": self._concurrency}, facts)

    async def _reach(self) -> None:
        """Reach Redis before anything is started, so that a wrong address is an error here; a blip is not."""
        backoff, deadline = Reconnect(), time.monotonic() + REACH_PATIENCE
        while True:
            try:
                await self.queue.maintain(self.consumer, 0)
            except StoreUnavailableError:
                wait = backoff.next()
                if time.monotonic() + wait > deadline:
                    raise
                await asyncio.sleep(wait)
            else:
                return

    def _claim_scheduler(self) -> None:
        if self.scheduler in _claimed:
            raise ConfigurationError(
                f"dispatcher {self.id!r} needs a scheduler of its own: the one given holds what another running "
                "dispatcher has read, and each can settle only its own",
                field="scheduler",
                value=self.scheduler,
            )
        _claimed.add(self.scheduler)

    async def _stop(self) -> None:
        """Drain: read no more, release what has not started, let running agents finish, settle everything."""
        began, before = time.monotonic(), self.outcomes[Outcome.RELEASED]
        self._draining = True
        self._room_wanted.set()
        while not self._reader.done():
            await self.queue.wake(self.consumer)
            await asyncio.wait((self._reader,), timeout=0.1)
        self._release_waiting()
        _claimed.discard(self.scheduler)
        await self._wait_idle(self._drain_timeout)
        for slot in self._my_slots():
            slot.interrupt(Outcome.RELEASED)
        await self._wait_idle(LAST_GRACE)
        self.pool.detach(self)
        await self._settle_rest()
        await self._cancel_loops()
        await self._leases.aclose()
        await self._say_goodbye()
        if self._own_pool:
            await self.pool.shutdown(wait=False)
            self.pool = QueueWorkerPool("dispatcher", _pool_config(self._concurrency))
        self._stopped.set()
        released = self.outcomes[Outcome.RELEASED] - before
        facts = {"completed": self.outcomes[Outcome.COMPLETED], "released": released}
        meta = {"queue": self.queue.name, "consumer": self.consumer}
        telemetry.emit("dispatcher.stopped", {**facts, "duration_s": time.monotonic() - began}, meta)

    async def _say_goodbye(self) -> None:
        try:
            await self.queue.retire(self.consumer)
        except StoreError as error:
            logger.warning("consumer %s could not be retired: %s", self.consumer, error)

    async def _settle_rest(self) -> None:
        self._settle_wanted.set()
        try:
            async with asyncio.timeout(max(5.0, self.queue.lease)):
                while self._verdicts or self._unsettled:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            logger.warning("%d ended tasks could not be settled and will run again", len(self._verdicts))

    def failed(self, name: str, error: Exception) -> None:
        """A background loop keeps failing: :meth:`run` ends with its error."""
        super().failed(name, error)
        self._stopped.set()

    # -- reading

    @property
    def held(self) -> int:
        """Deliveries read and not ended: running or waiting in the scheduler."""
        return self.running_tasks + self.scheduler.get_queue_size()

    def _room(self) -> int:
        return min(self._concurrency, self.pool.concurrency) + self._prefetch - self.held

    async def _read_loop(self) -> None:
        backoff = Reconnect()
        while not self._draining:
            self._adapt_prefetch()
            room = self._room()
            worth = min(self._prefetch // 2, self._batch_size) if self.scheduler.get_queue_size() else 1
            if room < max(1, worth):
                self._room_wanted.clear()
                await self._room_wanted.wait()
                continue
            try:
                found = await self.queue.read(self.consumer, min(room, self._batch_size), self._block_ms)
            except StoreError as error:
                wait = backoff.next()
                log = logger.warning if backoff.failures == 1 else logger.debug
                log("%s cannot read: %s; trying again", self.id, error)
                await asyncio.sleep(wait)
            else:
                backoff.reset()
                self._offer(found)
                if len(found) < SMALL:
                    await asyncio.sleep(0)  # the worker that was woken goes before the next read is packed and sent

    def _adapt_prefetch(self) -> None:
        """As many tasks as end in :data:`PREFETCH_SECONDS`, at least one: little when idle, much under load."""
        now = time.monotonic()
        passed = now - self._rate_at
        if passed >= PREFETCH_SECONDS:
            weight = 1.0 - math.exp(-passed / RATE_MEMORY)
            self._rate += weight * ((self._ended - self._rate_ended) / passed - self._rate)
            self._prefetch = max(1, min(PREFETCH_MOST, int(self._rate * PREFETCH_SECONDS)))
            self._rate_at, self._rate_ended = now, self._ended

    def _offer(self, found: list[Delivery]) -> None:
        """Put deliveries into the heap and wake a worker; release them when draining."""
        if self._draining:
            for delivery in found:
                self._end(delivery, _RELEASED)
            return
        now = int(time.monotonic() * 1000)
        for delivery in found:
            self.scheduler.put_nowait(now + AGING_MS * delivery.lane, delivery)
        if found:
            self.pool.wake()

    # -- running: the pool's source

    def take_nowait(self) -> Delivery | None:
        """The delivery to run next; None when there is none, or enough run already."""
        if self.running_tasks >= self._concurrency or self._draining:
            return None
        return self._pop()

    def _pop(self) -> Delivery | None:
        while (item := self.scheduler.pop_nowait()) is not None:
            if type(item) is Delivery:
                return item
            logger.error("%s drops %.200r: no queue delivered it; add tasks with produce()", self.id, item)
        return None

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
            self.running_tasks -= 1
            self._end(item, _RELEASED)
            raise
        self.running_tasks -= 1
        self._end(item, ended, time.monotonic() - began)

    def _end(self, delivery: Delivery, ended: Ended, run_s: float = 0.0) -> None:
        self.outcomes[ended.outcome] += 1
        self._ended += 1
        if not self._verdicts:
            self._settle_wanted.set()
        self._verdicts.append((delivery, ended.verdict))
        self._room_wanted.set()
        if type(ended.verdict) is Again and ended.verdict.delay > 0:
            self._maintain_by(asyncio.get_running_loop().time() + ended.verdict.delay)
        if telemetry.wanted("task.settled"):
            self._tell_settled(delivery, ended, run_s)
        if not self.running_tasks:
            self._idle.set()

    def _tell_settled(self, delivery: Delivery, ended: Ended, run_s: float) -> None:
        verdict = ended.verdict
        error = verdict.error.get("error") if isinstance(verdict, Bury) else getattr(verdict, "error", None)
        task_id, task_type = _names(delivery)
        facts = {
            "queue": self.queue.name,
            "task_id": task_id,
            "type": task_type,
            "attempt": delivery.attempt,
            "outcome": ended.outcome.value,
            "error": error,
            "retry_in_s": verdict.delay if isinstance(verdict, Again) else None,
            "dead_reason": verdict.reason if isinstance(verdict, Bury) else None,
        }
        telemetry.emit("task.settled", {"run_s": run_s}, facts)

    def _balancer_for(self, agent: AgentType) -> BaseLoadBalancerStrategy:
        known = self._balancers.get(agent.name)
        if known is not None and known[0] is agent.replicas:
            return known[1]
        balancer = self._balancer or (known[1] if known else create_load_balancer("weighted_round_robin"))
        if isinstance(balancer, WeightedRoundRobinStrategy):
            for replica in agent.replicas:
                balancer.set_worker_weight(replica.worker_id, replica.weight)
        self._balancers[agent.name] = (agent.replicas, balancer)
        return balancer

    # -- settling

    async def _settle_loop(self) -> None:
        backoff = Reconnect()
        while True:
            await self._settle_wanted.wait()
            self._settle_wanted.clear()
            while self._verdicts:
                batch, self._verdicts = self._verdicts, []
                self._unsettled = len(batch)
                try:
                    stale = await self.queue.settle(batch)
                except StoreError as error:
                    logger.warning("%s cannot settle %d tasks: %s; trying again", self.id, len(batch), error)
                    self._verdicts = batch + self._verdicts
                    await asyncio.sleep(backoff.next())
                except BaseException:
                    self._verdicts = batch + self._verdicts  # for the loop that is started in place of this one
                    self._settle_wanted.set()
                    raise
                else:
                    backoff.reset()
                    self._report_stale(stale)
                finally:
                    self._unsettled = 0

    def _report_stale(self, stale: list[Delivery]) -> None:
        for delivery in stale:
            facts = {"queue": self.queue.name, "task_id": _names(delivery)[0], "outcome": "stale"}
            telemetry.emit("task.stale", {}, facts)

    def _lease_lost(self, delivery: Delivery) -> None:
        """Somebody else has it now: stop working on it; its settle would be stale."""
        for slot in self._my_slots():
            if slot.item is delivery:
                telemetry.emit("lease.lost", {}, {"queue": self.queue.name, "task_id": delivery.header.id})
                slot.interrupt(Outcome.RELEASED)

    # -- background

    def _maintain_by(self, when: float) -> None:
        if when < self._maintain_at:
            self._maintain_at = when
            self._maintain_wanted.set()

    async def _maintain_loop(self) -> None:
        clock = asyncio.get_running_loop().time
        backoff = Reconnect()
        while True:
            try:
                work = await self.queue.maintain(self.consumer, 0 if self._draining else max(0, self._room()))
            except StoreError as error:
                logger.debug("%s: maintenance failed: %s", self.id, error)
                self._maintain_at = clock() + backoff.next()
            else:
                backoff.reset()
                self._offer(work.deliveries)
                self._maintain_at = clock() + max(0.001, work.next_in)
            while (left := self._maintain_at - clock()) > 0:
                self._maintain_wanted.clear()
                await set_within(self._maintain_wanted, left)

    async def _sweep_loop(self) -> None:
        """Interrupt what has run into its timeout; one pass over the busy slots instead of a timer per task."""
        while True:
            if not self.running_tasks:
                self._sweeping = False
                self._sweep_wanted.clear()
                await self._sweep_wanted.wait()
            await asyncio.sleep(SWEEP)
            now = time.monotonic()
            for slot in self._my_slots():
                if slot.deadline is None or now < slot.deadline:
                    continue
                if slot.why is None:
                    slot.interrupt(Outcome.TIMED_OUT)
                elif now - slot.deadline > STUCK_AFTER:
                    self._report_stuck(slot, now - slot.deadline)

    def _report_stuck(self, slot: Slot, over_s: float) -> None:
        header = slot.item.header
        facts = {"queue": self.queue.name, "task_id": header.id, "type": header.type}
        telemetry.emit("task.stuck", {"over_s": over_s}, facts)
        slot.deadline = time.monotonic()  # say it again after as long

    def _my_slots(self) -> list[Slot]:
        return [slot for slot in self.pool.slots if slot.source is self]

    def _release_waiting(self) -> None:
        while (delivery := self._pop()) is not None:
            self._end(delivery, _RELEASED)

    async def _wait_idle(self, seconds: float) -> None:
        self._idle.clear()
        if self.running_tasks:
            await set_within(self._idle, seconds)


_claimed: weakref.WeakSet[PriorityScheduler] = weakref.WeakSet()
"""The schedulers of running dispatchers."""
_RELEASED = Ended(Outcome.RELEASED, Again(0.0, "released"))


def _names(delivery: Delivery) -> tuple[str, str]:
    """Id and type of a task, for those who watch; even of a corrupt one."""
    try:
        return delivery.header.id, delivery.header.type
    except CorruptEntryError:
        return "?", "?"


def _pool_config(concurrency: int) -> OrchestrationWorkerPoolConfig:
    return OrchestrationWorkerPoolConfig(workers=concurrency, max_concurrent_tasks=concurrency)
