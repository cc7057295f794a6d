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

from orchestra import _identity, telemetry
from orchestra._backoff import Reconnect
from orchestra._dispatch.balancers import Balancers
from orchestra._dispatch.ends import GOODBYE, READ_GRACE, claim, disclaim, exchange_for, pool_of, reach, within
from orchestra._dispatch.isolation import begin
from orchestra._dispatch.prefetch import SMALL, Prefetch
from orchestra._dispatch.quarantine import Quarantine
from orchestra._dispatch.retry_gate import RetryGate
from orchestra._dispatch.running import Running
from orchestra._dispatch.settlements import Settlements, is_outage
from orchestra._dispatch.stuck import StuckAgents
from orchestra._execution import Execution
from orchestra._lifecycle import Service, set_within
from orchestra._workflow.runner import StepRunner
from orchestra.agents import AgentRegistry, get_agent_registry, unknown_agent
from orchestra.load_balancer import BaseLoadBalancerStrategy
from orchestra.orchestration_worker_pool import QueueWorkerPool
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
AGING = 5.0
"""Seconds per priority level: a task that was read goes before more urgent ones read so much later."""
SWEEP = 0.05
LAST_GRACE = 1.0
"""Seconds that cancelled agents get to end when draining."""
SETTLE_GRACE = 5.0
"""Seconds beyond drain timeout and last grace in which what has ended is settled while Redis cannot be reached."""
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
        workflows: runs what is a step of a workflow; by default made when the first one comes.

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
        workflows: StepRunner | None = None,
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
        self._concurrency, self._drain_timeout = max_concurrent_dispatch, drain_timeout
        self.outcomes: Counter[Outcome] = Counter()
        """How many deliveries ended how, since this dispatcher was made."""
        self._stuck = StuckAgents(task_queue.name, self.agents)
        self._retries = RetryGate(task_queue.name, retry_budget, self.outcomes)
        self._balancers = Balancers(load_balancer)
        self.workflows = workflows or StepRunner(None, task_queue, agents=self.agents)
        self._execution = execution = Execution(
            task_queue.name,
            self.agents,
            replace(retry or Retry(), max_retries=default_max_retries),
            self._balancers.of,
            flow_controller,
            now=task_queue.now,
            hold_back=self._retries.hold_back,
            on_left=self._stuck.add_function,
            steps=self.workflows,
        )
        self._settlements = Settlements(task_queue, self.id, self._maintain_in)
        self._prefetch = Prefetch()
        self._quarantine = Quarantine(getattr(task_queue, "max_deliveries", 0))
        self._deliveries = Running(
            *(task_queue, self.id, self.pool, self.scheduler, execution),
            *(self._quarantine, self._settlements, self._stuck, self.outcomes),
            concurrency=max_concurrent_dispatch,
            aging=aging,
            on_empty=lambda: self._maintain_in(0.0),
        )
        self._maintain_at, self._maintain_wanted, self._stopped = 0.0, asyncio.Event(), asyncio.Event()
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
        self._deliveries.draining = False
        self._stopped.clear()
        begin()
        claim(self.scheduler, self.id)
        try:
            await reach(self.queue, self.consumer)
            await self._leases.enter_async_context(self.queue.keep_leases(self.consumer, self._deliveries.lease_lost))
            exchange = exchange_for(self.queue, self.agents, self.consumer)
            if exchange is not None:
                await self._leases.enter_async_context(exchange)
            await self._leases.enter_async_context(self.workflows)
        except BaseException:
            disclaim(self.scheduler)
            raise
        self.queue.deliver_to(self.consumer, self._deliveries.arrived)
        self.pool.attach(self._deliveries)
        self._reader = self.spawn("read", self._read_loop)
        self._settler = self.spawn("settle", self._settlements.loop)
        self.spawn("maintain", self._maintain_loop)
        self.spawn("sweep", self._deliveries.sweep)
        facts = {"queue": self.queue.name, "consumer": self.consumer}
        telemetry.emit("dispatcher.started", {"concurrency": self._concurrency}, facts)

    async def _stop(self) -> None:
        """Drain: read no more, release what has not started, let running agents finish, settle everything."""
        began, before = time.monotonic(), self.outcomes[Outcome.RELEASED]
        self._deliveries.draining = True
        self._deliveries.room_wanted.set()
        try:
            await self._drain(began + self._drain_timeout)
        except asyncio.CancelledError:  # in a hurry: what runs is interrupted at once
            await self._drain(began)
            raise
        finally:
            self._may_hurry = False
            disclaim(self.scheduler)
            self.queue.deliver_to(self.consumer, None)
            self.pool.detach(self._deliveries)
            await self._cancel_loops()
            await within(GOODBYE, self._leases.aclose(), self.id, "the lease thread goes on")
            await within(GOODBYE, self.queue.retire(self.consumer), self.id, "its consumer is forgotten by others")
            if self._own_pool:
                await self.pool.shutdown(wait=False)
                self.pool = self._deliveries.pool = pool_of(self._concurrency)
            self._stopped.set()
        released = self.outcomes[Outcome.RELEASED] - before
        facts = {"completed": self.outcomes[Outcome.COMPLETED], "released": released}
        meta = {"queue": self.queue.name, "consumer": self.consumer}
        telemetry.emit("dispatcher.stopped", {**facts, "duration_s": time.monotonic() - began}, meta)

    async def _drain(self, deadline: float) -> None:
        await self._stop_reading()
        running = self._deliveries
        running.release_waiting()
        await running.wait_idle(deadline - time.monotonic())
        running.interrupt_all()
        await running.wait_idle(LAST_GRACE)
        for slot in running.slots():
            running.abandon(slot)
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
    def running_tasks(self) -> int:
        """Deliveries that run, stuck agents aside."""
        return self._deliveries.count

    @property
    def held(self) -> int:
        """Deliveries read and not ended: running or waiting in the scheduler."""
        return self._deliveries.held

    def _room(self) -> int:
        room = min(self._concurrency, self.pool.capacity) + self._prefetch.size - self.held
        return min(room, self._most_waiting - self.scheduler.get_queue_size())

    async def _read_loop(self) -> None:
        backoff = Reconnect()
        while not self._deliveries.draining:
            self._prefetch.adapt(time.monotonic(), self._deliveries.ended)
            room = self._room()
            worth = min(self._prefetch.size // 2, self._batch_size) if self.scheduler.get_queue_size() else 1
            if room < max(1, worth):
                self._deliveries.room_wanted.clear()
                await self._deliveries.room_wanted.wait()
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
                self._deliveries.offer(found)
                if len(found) < SMALL:
                    await asyncio.sleep(0)  # the worker that was woken goes before the next read is packed and sent

    # -- background

    def _maintain_in(self, seconds: float) -> None:
        when = asyncio.get_running_loop().time() + seconds
        if when < self._maintain_at:
            self._maintain_at = when
            self._maintain_wanted.set()

    def _tick(self) -> Awaitable[Maintenance]:
        if self._deliveries.draining:
            return self.queue.maintain(self.consumer, 0)
        alone = self._quarantine.alone(self._deliveries.count)
        return self.queue.maintain(self.consumer, max(int(alone), self._room()), alone)

    async def _maintain_loop(self) -> None:
        clock = asyncio.get_running_loop().time
        backoff = Reconnect()
        while True:
            try:
                if (sooner := self._execution.take_sooner()) and self.queue.delays is not None:
                    await self.queue.delays.hasten(sooner)  # lost in an outage, they come when they were told
                work = await self._tick()
            except Exception as error:
                if not is_outage(error):
                    raise
                logger.debug("%s: maintenance failed: %s", self.id, error)
                self._maintain_at = clock() + backoff.next()
            else:
                backoff.reset()
                self._deliveries.offer(self._quarantine.sift(work.deliveries, work.suspects))
                self.pool.wake()
                if work.cancels:
                    self._deliveries.interrupt_cancelled()
                self._maintain_at = clock() + max(0.001, work.next_in)
            self._stuck.look(self.pool)
            self._retries.tell()
            while (left := self._maintain_at - clock()) > 0:
                self._maintain_wanted.clear()
                await set_within(self._maintain_wanted, left)

    @property
    def stuck(self) -> int:
        """Agents that go on although they were timed out, cancelled or released, and are not in ``running_tasks``."""
        return len(self._stuck)
