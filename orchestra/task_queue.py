"""The durable task queue on Redis Streams: who waits, who owns a delivery, what a settle means.

Every move of a task is one script under ``lua/`` (validate → add → remove), so a task is always in exactly one of: a
lane, in flight, delayed, dead, terminal. Settling checks ownership: a delivery that was reclaimed is STALE and changes
nothing. This module decides when to call which script; it does not know what agents are.

One event loop per queue object. Concurrent calls are safe; cancelling one leaves the shared connection in step.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from orchestra._delivery import Bury, Complete, Delivery, Verdict, frame_of, sort_out
from orchestra._durability import ACCEPTED, Durability
from orchestra._keys import QueueKeys
from orchestra._queue.base import (
    BaseTaskQueue,
    DistributedLock,
    LeaseLost,
    Maintenance,
    QueueStats,
    Sent,
    encode_all,
)
from orchestra._queue.cancellation import Canceller, CancelMarks
from orchestra._queue.census import Census
from orchestra._queue.dead_letters import DeadLetters
from orchestra._queue.delays import StreamDelays
from orchestra._queue.intake import Intake
from orchestra._queue.locks import RedisLock
from orchestra._queue.produce import StreamProducer
from orchestra._queue.replies import ReplyListener
from orchestra._queue.settle import SettlePlanner
from orchestra._queue.settler import Settler
from orchestra._queue.upkeep import StreamUpkeep, Upkeep
from orchestra._redis.link import Link
from orchestra.connections import ConnectionManager, get_connection_manager
from orchestra.errors import StoreError
from orchestra.serialization import MAX_TASK_BYTES, EncodedTask, encode_task
from orchestra.tasks import Cancellation, DeadLetter, TaskDict, check_name, require_int, require_number

__all__ = ["BaseTaskQueue", "RedisStreamTaskQueue"]

logger = logging.getLogger("orchestra.queue")


class RedisStreamTaskQueue(BaseTaskQueue):
    """Tasks in a lane per priority, one consumer group, at-least-once delivery.

    Args:
        stream_name: the queue's name, ``[A-Za-z0-9._-]{1,64}``; producers and workers that share it share the queue.
        consumer_group: the one group that consumes it; since settled tasks are deleted, a queue has one group only.
        claim_interval_ms: the lease, 100 to 86,400,000 ms: a delivery that is neither settled nor renewed for so long
            is handed to somebody else.
        manager: where Redis is; by default the process-wide :func:`~orchestra.connections.get_connection_manager`.
        max_length: live tasks beyond which ``produce`` raises QueueFullError; 0 for no limit.
        max_dead: dead letters from which on ``produce`` raises QueueFullError, until some are replayed or purged; 0 for
            no limit. Tasks that are live still end, dead too.
        max_task_bytes: largest encoded task or result.
        dedup_window: seconds (60 or more) within which an own task id is recognised; at most twice as long. All
            producers of a queue must agree on it.
        result_ttl: seconds a wanted result is kept.
        max_deliveries: hand-overs of one entry after which it counts as a poison pill and is dead-lettered as
            ``crashed``.
        max_stall: seconds (0 to 604,800) for which a blocked event loop keeps the leases of what it runs, by default
            five leases. Every agent of the process stands still meanwhile; afterwards others take its tasks over.
        patience: seconds (0 to 30) that a call keeps trying while Redis is unavailable. The first contact fails at once:
            a wrong address should not look like a slow server.
        durability: how safe a task is when ``produce`` returns: a :class:`~orchestra.Durability` or its text.

    Raises:
        ConfigurationError: naming the argument that is out of range.
    """

    def __init__(
        self,
        stream_name: str,
        consumer_group: str,
        claim_interval_ms: int = 60_000,
        *,
        manager: ConnectionManager | None = None,
        max_length: int = 0,
        max_dead: int = 0,
        max_task_bytes: int = MAX_TASK_BYTES,
        dedup_window: float = 3600.0,
        result_ttl: float = 3600.0,
        max_deliveries: int = 3,
        max_stall: float | None = None,
        patience: float = 10.0,
        durability: Durability | str = ACCEPTED,
    ) -> None:
        require_int("claim_interval_ms", claim_interval_ms, 100, 86_400_000, unit="ms")
        require_int("max_task_bytes", max_task_bytes, 64, 256 << 20, unit="bytes")
        require_number("result_ttl", result_ttl, 1.0, 30 * 86_400.0, unit="seconds")
        require_int("max_deliveries", max_deliveries, 1, 1000)
        if max_stall is not None:
            require_number("max_stall", max_stall, 0.0, 7 * 86_400.0, unit="seconds")
        self.name = stream_name
        self.group = check_name("consumer_group", consumer_group)
        self.keys = QueueKeys(stream_name)
        self.lease_ms = claim_interval_ms
        self.lease = claim_interval_ms / 1000
        self.max_deliveries = max_deliveries
        self._manager = manager
        self._max_bytes, self._patience = max_task_bytes, patience
        self._producer = StreamProducer(
            stream_name,
            self.keys,
            self._commands,
            max_length=max_length,
            max_dead=max_dead,
            dedup_window=dedup_window,
            patience=patience,
            durability=durability,
        )
        self._dead_letters = DeadLetters(self.keys, self._commands, patience)
        self._census = Census(stream_name, self.keys, self.group, self._commands, patience)
        self._cancels = CancelMarks()
        self.delays = StreamDelays(self.keys, self._commands)
        self.cancelled_steps = self._canceller = Canceller(
            stream_name, self.keys, self.group, self._commands, result_ttl=result_ttl, patience=patience
        )
        self._intake = self._make_intake(5 * self.lease if max_stall is None else max_stall)
        self.held = self._intake.held
        """Per stream, every delivery read by this object and not settled: entry id → delivery."""
        self._link: Link | None = None
        self._replies: ReplyListener | None = None
        self._settler = Settler(
            stream_name,
            SettlePlanner(stream_name, self.keys, self.group, result_ttl, max_task_bytes),
            self._commands,
            self.held,
            patience=max(self.lease, patience),
            group_lost=self._intake.group.doubt,
        )
        self._background: set[asyncio.Task[Any]] = set()
        self._locks: weakref.WeakSet[RedisLock] = weakref.WeakSet()

    def _make_intake(self, max_stall: float) -> Intake:
        intake = Intake(
            self.name,
            self.keys,
            self.group,
            manager=lambda: self.manager,
            commands=self._commands,
            lease=self.lease,
            max_stall=max_stall,
            patience=self._patience,
        )
        self._upkeep = StreamUpkeep(
            Upkeep(
                queue=self.name,
                keys=self.keys,
                group=intake.group,
                group_name=self.group,
                lease_ms=self.lease_ms,
                max_deliveries=self.max_deliveries,
                link=self._commands,
                cancels=self._cancels,
            )
        )
        intake.attach(self._upkeep, self.settle)
        return intake

    # -- connections

    @property
    def manager(self) -> ConnectionManager:
        """Where Redis is."""
        if self._manager is None:
            self._manager = get_connection_manager()
        return self._manager

    async def _commands(self) -> Link:
        if self._link is None:
            await self.manager.connect()
            self._link = self._link or Link(self.manager, "commands", self.name, self._intake.reopened)
        self._link.check_loop()
        return self._link

    async def close(self) -> None:
        """Give back connections; locks that are still held are no longer renewed. The queue may be used again."""
        if self._link is not None:
            self._link.check_loop(closing=True)
        for lock in list(self._locks):
            lock.forsake()
        await self._producer.close()
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
            await asyncio.sleep(0)  # their done callbacks, which take them out of the set, run in this turn
        await self._intake.close()
        if self._replies is not None:
            await self._replies.close()
        if self._link is not None:
            await self._link.close()
        self._link = self._replies = None

    def _spawn(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- producing

    async def produce(self, task_data: TaskDict, task_id: str | None = None) -> str:
        """Add a task to its lane, or with ``delay`` to the delayed set; returns its message id.

        An own id (``task_id`` or ``task_data["id"]``) is deduplicated within the dedup window: a repeat adds nothing
        and returns the first message id. Calls made in the same loop iteration travel together.

        Raises:
            InvalidTaskError: the task cannot travel (InvalidTaskTypeError, TaskTooLargeError); nothing was sent.
            QueueFullError: ``max_length`` or ``max_dead`` is reached; nothing was added.
            StoreFullError: Redis has reached ``maxmemory``; nothing was added.
            DurabilityError: added, but not as safe as ``durability`` says in time.
            StoreError: Redis refused, or was unavailable for longer than ``patience``.
        Cost: one round trip, shared.
        """
        return await self._producer.post(encode_task(task_data, task_id=task_id, max_bytes=self._max_bytes))

    async def produce_many(self, tasks: Iterable[TaskDict], *, want_results: bool = False) -> list[str]:
        """Add tasks; returns their message ids in order. Every task is checked before the first is sent.

        With ``want_results`` their terminal records are kept for :meth:`wait_result`.

        Raises as :meth:`produce`; when Redis fails midway, own ids make it safe to send everything again.
        Cost: one round trip per 500 tasks or 1 MiB, three under way at once.
        """
        return (await self._add(tasks, want_results))[1]

    async def submit(self, tasks: Iterable[TaskDict], *, want_results: bool = False) -> list[Sent]:
        """:meth:`produce_many` for a sender who wants to know the ids of the tasks too."""
        encoded, message_ids = await self._add(tasks, want_results)
        return [Sent(task.id, message_id) for task, message_id in zip(encoded, message_ids, strict=True)]

    async def _add(self, tasks: Iterable[TaskDict], want_results: bool) -> tuple[list[EncodedTask], list[str]]:
        reply = (await self._listener()).client if want_results else None
        encoded = await encode_all(tasks, self._max_bytes, reply)
        if len(encoded) == 1:
            return encoded, [await self._producer.post(encoded[0])]
        return encoded, await self._producer.send(encoded)

    # -- consuming

    async def read(self, consumer: str, count: int, block_ms: int, *, exact: bool = False) -> list[Delivery]:
        """Up to ``count`` deliveries for ``consumer``, most urgent first; waits up to ``block_ms`` for the first.

        ``exact`` keeps the order of priorities to the letter, at the price of a slower read. One read per consumer at a
        time. Cancelling it costs the connection; what was on its way is looked for by the next read. Better: :meth:`wake`
        ends it. After a lost connection, deliveries whose reply was lost are returned first.

        Raises:
            StoreUnavailableError: at once; the caller decides when to try again.
        """
        return await self._intake.read(consumer, count, block_ms, exact)

    def deliver_to(self, consumer: str, take: Callable[[list[Delivery]], None] | None) -> None:
        """See :meth:`BaseTaskQueue.deliver_to`: saves a task that arrives at an idle worker a turn of the event loop."""
        self._intake.deliver_to(consumer, take)

    async def _read_safely(self, consumer: str, count: int, block_ms: int) -> list[Delivery]:
        """:meth:`read` that may be cancelled: what it brings after that is released."""
        reading = asyncio.ensure_future(self.read(consumer, count, block_ms, exact=True))
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            self._spawn(self._give_back(consumer, reading))
            raise

    async def _give_back(self, consumer: str, reading: asyncio.Future[list[Delivery]]) -> None:
        await self.wake(consumer)
        try:
            deliveries = await reading
        except StoreError:
            return  # nothing came, or the next read looks for it
        if deliveries:
            await self._intake.release(consumer, deliveries)

    async def wake(self, consumer: str) -> None:
        """Make a blocked read of ``consumer`` return now. Best effort; one round trip."""
        await self._intake.wake(consumer)

    async def consume(self, consumer_name: str, count: int = 1, block_ms: int = 2000) -> list[tuple[str, TaskDict]]:
        """At most ``count`` tasks as ``(message_id, task_data)``, most urgent first, oldest first within a priority.

        Also promotes due tasks and takes over deliveries whose lease ran out. An entry that is not a task is
        dead-lettered with its bytes and skipped, a task that was cancelled is skipped. A task is held until it is
        acknowledged, dead-lettered or its lease (``claim_interval_ms``) ends.

        Raises:
            ConfigurationError: a bad consumer name or count.
            StoreUnavailableError: Redis was unavailable for longer than ``patience``.
        """
        check_name("consumer_name", consumer_name)
        require_int("count", count, 1, 100_000, unit="tasks")
        require_int("block_ms", block_ms, 0, 86_400_000, unit="ms")
        deadline = time.monotonic() + block_ms / 1000
        link = await self._commands()
        while True:
            work, _ = await link.patiently(lambda: self.maintain(consumer_name, count), self._patience)
            found = work.deliveries
            left = deadline - time.monotonic()
            if not found:
                block = max(0, int(1000 * min(left, work.next_in)))
                read = functools.partial(self._read_safely, consumer_name, count, block)
                found, _ = await link.patiently(read, self._patience)
            tasks = await self._readable(consumer_name, found)
            if tasks or time.monotonic() >= deadline:
                return tasks

    async def _readable(self, consumer: str, deliveries: list[Delivery]) -> list[tuple[str, TaskDict]]:
        tasks, ended = sort_out(self.name, deliveries, self.cancel_requested)
        if ended:
            try:
                await self.settle(ended)
            except BaseException:
                self._intake.drop(consumer, deliveries)
                raise
        return tasks

    # -- settling

    async def settle(self, batch: Sequence[tuple[Delivery, Verdict]]) -> list[Delivery]:
        """End deliveries in one round trip; returns those that were STALE, which changed nothing.

        Keeps trying for a lease while Redis is unavailable. A call whose reply was lost is repeated; of what it does not
        find then, nobody can say whether the first try settled it or it was STALE: it counts as settled. Everything else
        is exact. A task that was to run again and is marked as cancelled ends so, in a second round trip.

        Raises:
            StoreUnavailableError: Redis was unavailable for too long.
            StoreError: an error reply; what it does not concern has been settled.

        After either, settle the whole batch again: what has ended is remembered, the rest is still held.
        """
        return await self._settler.settle(batch)

    def _find(self, message_id: str) -> Delivery | None:
        stream, _, entry = message_id.partition(":")
        return self.held[int(stream)].get(entry.encode()) if len(stream) == 1 and stream in "01234567" else None

    async def acknowledge(self, message_id: str) -> bool:
        """Complete a task: acknowledge and delete it. One round trip; none for an id that is not held here.

        True only if this call settled a live delivery that this queue object handed out.
        """
        return (await self.acknowledge_many([message_id]))[0]

    async def acknowledge_many(self, message_ids: Iterable[str]) -> list[bool]:
        """:meth:`acknowledge` for several tasks, in one round trip."""
        found = [self._find(message_id) for message_id in message_ids]
        batch = list(dict.fromkeys(delivery for delivery in found if delivery is not None))
        settled = set(batch)
        if batch:
            settled.difference_update(await self.settle([(delivery, Complete()) for delivery in batch]))
        answers = []
        for delivery in found:
            answers.append(delivery in settled)
            settled.discard(delivery)  # a message id given twice was settled once
        return answers

    async def add_to_dlq(self, message_id: str, task_data: TaskDict, error_info: dict[str, Any]) -> bool:
        """Dead-letter a task with ``error_info``, in one script; one round trip.

        The stream's own copy of the task is kept; ``task_data`` only if the stream has lost it. True only if this
        call settled a live delivery that this queue object handed out.
        """
        delivery = self._find(message_id)
        if delivery is None:
            return False
        if not delivery.frame:
            delivery.frame = frame_of(task_data)
        attempts = error_info.get("attempts", delivery.attempt)
        reason = str(error_info.get("reason", "failed"))
        verdict = Bury(reason, attempts if isinstance(attempts, int) else delivery.attempt, dict(error_info))
        return not await self.settle([(delivery, verdict)])

    # -- maintenance

    async def maintain(self, consumer: str, room: int, alone: bool | None = None) -> Maintenance:
        """Promote due tasks, and four times a lease take over up to ``room`` deliveries whose lease ran out.

        What was handed out more than ``max_deliveries`` times is dead-lettered as ``crashed`` instead. ``alone``: as of
        :meth:`BaseTaskQueue.maintain`.

        Raises:
            StoreUnavailableError: at once.
        Cost: one round trip, and two for each lane when reclaiming.
        """
        check_name("consumer_name", consumer)
        return await self._intake.maintain(consumer, room, alone)

    async def reclaim(self, consumer: str, room: int, idle_ms: int) -> list[Delivery]:
        """Take over up to ``room`` deliveries that have been idle for ``idle_ms``; two round trips a lane."""
        return await self._intake.reclaim(consumer, room, idle_ms)

    def now(self) -> float:
        """Unix seconds by the Redis clock, as of the last :meth:`maintain` and the monotonic clock since."""
        return time.monotonic() + self._upkeep.clock_offset

    def cancel_requested(self, delivery: Delivery) -> bool:
        """Whether the task of ``delivery`` is to be cancelled, as far as the last :meth:`maintain` knew."""
        return bool(self._cancels) and self._cancels.covers(delivery)

    async def cancel(self, task_id: str, message_id: str | None = None) -> Cancellation:
        """Cancel a task wherever it is; ``message_id``, if known, finds one that waits in its first place at once.

        CANCELLED: it waited and is terminal now. REQUESTED: its holder ends it, within about a second of running or as
        soon as somebody is handed it (for 24 hours); also the answer for an id that nobody knows. ENDED: it was terminal
        before. A task that is sent later under the same id is not touched. A cancelled task leaves a terminal record for
        ``result_ttl``, whether its sender wants one or not.

        Raises:
            ConfigurationError: no task can have this id.
            StoreUnavailableError: Redis was unavailable for longer than ``patience``.
        Cost: one round trip, a second one where somebody waits for the result.
        """
        return await self._canceller.cancel(task_id, message_id)

    def keep_leases(self, consumer: str, on_lost: LeaseLost) -> AbstractAsyncContextManager[None]:
        """Renew what ``consumer`` holds from a thread, while the context is open.

        ``on_lost(delivery)`` is called in the event loop for each delivery that is no longer ours: because Redis says so,
        or because it has not confirmed the lease for nine tenths of it; whoever is told stops working on it, and settles it
        all the same: that counts if nobody else has taken it. A blocked loop keeps its leases for ``max_stall``
        and is reported (event ``loop.blocked``). A C call that does not release the GIL stops the thread, too.
        Cost: idle none; else one round trip for 500 deliveries, four times a lease.
        """
        return self._intake.keep_leases(consumer, on_lost)

    async def retire(self, consumer: str) -> None:
        """Forget ``consumer``, unless it still holds deliveries; one round trip."""
        await self._intake.retire(consumer)

    # -- looking

    async def get_queue_depth(self) -> int:
        """The number of live tasks: waiting, in flight and delayed. One round trip."""
        return await self._census.depth()

    async def stats(self) -> QueueStats:
        """How many tasks are where, and the counters; one round trip, one moment."""
        return await self._census.stats()

    # -- dead letters, results, locks

    async def get_dlq_depth(self) -> int:
        """The number of dead letters; one round trip."""
        return await self._dead_letters.depth()

    async def read_dlq(self, count: int = 100, after: str | None = None) -> list[DeadLetter]:
        """Up to ``count`` dead letters, oldest first, behind the message id ``after``; one round trip."""
        return await self._dead_letters.read(count, after)

    async def replay_dlq(self, message_ids: Iterable[str]) -> int:
        """Put dead letters back into their lanes with their retries restored; returns how many were.

        Each is replayed once, however often this is called. What cannot be decoded stays dead.
        """
        return await self._dead_letters.replay(message_ids)

    async def purge_dlq(self, message_ids: Iterable[str] | None = None) -> int:
        """Delete dead letters (all when None); returns how many were."""
        return await self._dead_letters.purge(message_ids)

    async def _listener(self) -> ReplyListener:
        if self._replies is None:
            await self.manager.connect()
            self._replies = self._replies or ReplyListener(self.keys, self.manager)
        return self._replies

    async def wait_result(self, task_id: str, timeout: float | None = None) -> dict[str, Any]:
        """The terminal record of a task sent with ``want_results``: ``id``, ``outcome``, and ``value`` or ``error``.

        Raises:
            TimeoutError: the task is not terminal after ``timeout`` seconds.
        """
        return await (await self._listener()).wait(task_id, timeout)

    async def get_lock(
        self, lock_name: str, expire_time: float = 30, *, wait: float | None = None, renew: bool = True
    ) -> AbstractAsyncContextManager[DistributedLock]:
        """A lock shared by all processes that name it: ``async with await queue.get_lock("x") as lock: lock.fence``.

        ``renew=False``: it frees itself ``expire_time`` seconds after it was acquired, whatever its holder does.
        """
        lock = RedisLock(await self._commands(), lock_name, expire_time, wait, renew=renew)
        self._locks.add(lock)
        return lock
