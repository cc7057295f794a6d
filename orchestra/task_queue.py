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
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from orchestra import telemetry
from orchestra._cancellation import Canceller, CancelMarks
from orchestra._dead_letters import DeadLetters
from orchestra._delivery import Again, Bury, Complete, Delivery, Verdict, corrupt_verdict, frame_of
from orchestra._keys import QueueKeys
from orchestra._leases import LeaseKeeper
from orchestra._link import Link
from orchestra._locks import RedisLock
from orchestra._queue_base import (
    BaseTaskQueue,
    DistributedLock,
    LeaseLost,
    Maintenance,
    QueueStats,
    Sent,
    encode_all,
)
from orchestra._replies import ReplyListener
from orchestra._stream_census import Census
from orchestra._stream_produce import TOKEN_WINDOW_MS, StreamProducer
from orchestra._stream_read import GroupMissingError, StreamReader
from orchestra._stream_settle import SettlePlanner, Settling
from orchestra._stream_upkeep import StreamUpkeep, Upkeep, crashed_verdict
from orchestra._wire import Command, ReplyError, pack, reply_code, reply_error
from orchestra.connections import ConnectionManager, get_connection_manager
from orchestra.errors import ConfigurationError, CorruptEntryError, StoreError
from orchestra.serialization import MAX_TASK_BYTES, EncodedTask, encode_task
from orchestra.tasks import LANES, Cancellation, DeadLetter, TaskDict, check_name, require_int, require_number

__all__ = ["BaseTaskQueue", "RedisStreamTaskQueue"]

logger = logging.getLogger("orchestra.queue")


class RedisStreamTaskQueue(BaseTaskQueue):
    """Tasks in one stream per priority, one consumer group, at-least-once delivery.

    Args:
        stream_name: the queue's name, ``[A-Za-z0-9._-]{1,64}``; producers and workers that share it share the queue.
        consumer_group: the one group that consumes it; since settled tasks are deleted, a queue has one group only.
        claim_interval_ms: the lease, 100 to 86,400,000 ms: a delivery that is neither settled nor renewed for so long
            is handed to somebody else.
        manager: where Redis is; by default the process-wide :func:`~orchestra.connections.get_connection_manager`.
        max_length: live tasks beyond which ``produce`` raises QueueFullError; 0 for no limit.
        max_task_bytes: largest encoded task or result.
        dedup_window: seconds (60 or more) within which an own task id is recognised; at most twice as long. All
            producers of a queue must agree on it.
        result_ttl: seconds a wanted result is kept.
        max_deliveries: hand-overs of one entry after which it counts as a poison pill and is dead-lettered as
            ``crashed``.
        patience: seconds that a call keeps trying while Redis is unavailable.

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
        max_task_bytes: int = MAX_TASK_BYTES,
        dedup_window: float = 3600.0,
        result_ttl: float = 3600.0,
        max_deliveries: int = 3,
        patience: float = 10.0,
    ) -> None:
        require_int("claim_interval_ms", claim_interval_ms, 100, 86_400_000, unit="ms")
        require_int("max_length", max_length, 0, 1 << 53, unit="tasks")
        require_int("max_task_bytes", max_task_bytes, 64, 256 << 20, unit="bytes")
        require_number("dedup_window", dedup_window, 60.0, 30 * 86_400.0, unit="seconds")
        require_number("result_ttl", result_ttl, 1.0, 30 * 86_400.0, unit="seconds")
        require_int("max_deliveries", max_deliveries, 1, 1000)
        require_number("patience", patience, 0.0, TOKEN_WINDOW_MS / 1000, unit="seconds")
        self.name = stream_name
        self.group = check_name("consumer_group", consumer_group)
        self.keys = QueueKeys(stream_name)
        self.lease_ms = claim_interval_ms
        self.lease = claim_interval_ms / 1000
        self.max_deliveries = max_deliveries
        self._manager = manager
        self._max_bytes, self._patience = max_task_bytes, patience
        self._producer = StreamProducer(
            stream_name, self.keys, self._commands, max_length=max_length, dedup_window=dedup_window, patience=patience
        )
        self._dead_letters = DeadLetters(self.keys, self._commands, patience)
        self._census = Census(stream_name, self.keys, self.group, self._commands, patience)
        self._planner = SettlePlanner(self.keys, self.group, result_ttl, max_task_bytes)
        self._cancels = CancelMarks()
        self._canceller = Canceller(self.keys, self.group, self._commands, result_ttl, patience)
        self._upkeep = StreamUpkeep(
            Upkeep(
                queue=stream_name,
                keys=self.keys,
                group=self.group,
                lease_ms=claim_interval_ms,
                max_deliveries=max_deliveries,
                link=self._commands,
                cancels=self._cancels,
                prepare=self._prepare,
            )
        )
        self._link: Link | None = None
        self._readers: dict[str, StreamReader] = {}
        self._replies: ReplyListener | None = None
        self._prepared: asyncio.Future[None] | None = None
        self.held: tuple[dict[bytes, Delivery], ...] = tuple({} for _ in range(LANES))
        """Per lane, every delivery read by this object and not settled: entry id → delivery."""
        self._background: set[asyncio.Task[Any]] = set()

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
            self._link = self._link or Link(self.manager, "commands", self.name, self._upkeep.stay_quiet)
        return self._link

    async def _open_reader(self, consumer: str) -> StreamReader:
        check_name("consumer_name", consumer)
        await self.manager.connect()
        link = Link(self.manager, "reader", self.name, self._upkeep.stay_quiet)
        return self._readers.setdefault(consumer, StreamReader(self.keys, self.group, consumer, link))

    async def _prepare(self) -> None:
        """Make sure that the group exists in every lane; once per queue object, again when it was lost."""
        if self._prepared is None:
            self._prepared = asyncio.ensure_future(self._make_groups())
        try:
            await asyncio.shield(self._prepared)
        except Exception:
            self._prepared = None
            raise

    async def _make_groups(self) -> None:
        link = await self._commands()
        commands: list[Command] = [("XGROUP", "CREATE", lane, self.group, "0", "MKSTREAM") for lane in self.keys.lanes]
        commands += [("XINFO", "GROUPS", lane) for lane in self.keys.lanes]
        replies, _ = await link.patiently(lambda: link.send(pack(commands), len(commands)), self._patience)
        for reply in replies[:LANES]:
            if isinstance(reply, ReplyError) and reply_code(reply) != "BUSYGROUP":
                raise reply_error(reply, self.manager.address.safe) from reply
        for groups in replies[LANES:]:
            names = [] if isinstance(groups, ReplyError) else [bytes(group[1]).decode() for group in groups]
            if others := [name for name in names if name != self.group]:
                raise ConfigurationError(
                    f"queue {self.name!r} is consumed by the group {others[0]!r}, not {self.group!r}: settled tasks "
                    "are deleted, so a queue has one group; use its name, or another queue",
                    field="consumer_group",
                    value=self.group,
                )
        self._upkeep.stay_quiet()

    async def close(self) -> None:
        """Give back connections. The queue may be used again afterwards."""
        await self._producer.settled()
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
            await asyncio.sleep(0)  # their done callbacks, which take them out of the set, run in this turn
        for reader in self._readers.values():
            await reader.link.close()
        self._readers.clear()
        if self._replies is not None:
            await self._replies.close()
        if self._link is not None:
            await self._link.close()
        self._link = self._replies = self._prepared = None

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
            QueueFullError: ``max_length`` is reached; nothing was added.
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
        reply = await self._reply_client() if want_results else None
        encoded = await encode_all(tasks, self._max_bytes, reply)
        if len(encoded) == 1:
            return encoded, [await self._producer.post(encoded[0])]
        return encoded, await self._producer.send(encoded)

    # -- consuming

    async def read(self, consumer: str, count: int, block_ms: int, *, exact: bool = False) -> list[Delivery]:
        """Up to ``count`` deliveries for ``consumer``, most urgent first; waits up to ``block_ms`` for the first.

        ``exact`` keeps the order of priorities to the letter, at the price of a slower read. One read per consumer at a
        time. Not to be cancelled (that costs the connection, and what was on its way waits for its lease): :meth:`wake`
        ends it.

        Raises:
            StoreUnavailableError: at once; the caller decides when to try again.
        """
        reader = self._readers.get(consumer) or await self._open_reader(consumer)
        if self._prepared is None or not self._prepared.done():
            await self._prepare()
        try:
            deliveries = await reader.read(count, block_ms, exact=exact)
        except GroupMissingError as error:
            logger.warning("queue %s: %s; making the group again", self.name, error)
            telemetry.emit("queue.group_recreated", {}, {"queue": self.name, "lane": -1})
            await self._make_groups()
            return []
        held = self.held
        for delivery in deliveries:
            held[delivery.lane][delivery.entry] = delivery
        if len(deliveries) > count:
            await self.settle([(delivery, Again(0.0, "released")) for delivery in deliveries[count:]])
            del deliveries[count:]
        return deliveries

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
            return  # nothing came, or it comes back after its lease
        if deliveries:
            await self.settle([(delivery, Again(0.0, "released")) for delivery in deliveries])

    async def wake(self, consumer: str) -> None:
        """Make a blocked read of ``consumer`` return now. Best effort; one round trip."""
        if consumer in self._readers:
            try:
                await self._readers[consumer].wake(await self._commands())
            except StoreError as error:
                logger.debug("queue %s: could not wake %s: %s", self.name, consumer, error)

    async def consume(self, consumer_name: str, count: int = 1, block_ms: int = 2000) -> list[tuple[str, TaskDict]]:
        """At most ``count`` tasks as ``(message_id, task_data)``, most urgent first, oldest first within a priority.

        Also promotes due tasks and takes over deliveries whose lease ran out. An entry that is not a task is
        dead-lettered with its bytes and skipped. A task is held until it is acknowledged, dead-lettered or its lease
        (``claim_interval_ms``) ends.

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
            tasks = await self._readable(found)
            if tasks or time.monotonic() >= deadline:
                return tasks

    async def _readable(self, deliveries: list[Delivery]) -> list[tuple[str, TaskDict]]:
        tasks, corrupt = [], []
        for delivery in deliveries:
            try:
                tasks.append((delivery.message_id, delivery.task_dict()))
            except CorruptEntryError as error:
                corrupt.append((delivery, corrupt_verdict(self.name, delivery, error)))
        if corrupt:
            await self.settle(corrupt)
        return tasks

    # -- settling

    async def settle(self, batch: Sequence[tuple[Delivery, Verdict]]) -> list[Delivery]:
        """End deliveries in one round trip; returns those that were STALE, which changed nothing.

        Keeps trying for a lease while Redis is unavailable. After a repeat it cannot know whether a missing delivery
        was settled by the first try or is stale, and reports it as settled.
        """
        if not batch:
            return []
        held = [len(lane) for lane in self.held]
        plan = self._planner.plan(batch, held)
        link = await self._commands()
        calls = [settling.call for settling in plan]
        replies, repeated = await link.patiently(lambda: link.run(calls), max(self.lease, self._patience))
        for delivery, _ in batch:
            self.held[delivery.lane].pop(delivery.entry, None)
        stale: list[Delivery] = []
        for settling, reply in zip(plan, replies, strict=True):
            stale += self._stale_of(settling, reply)
        return [] if repeated else stale

    def _stale_of(self, settling: Settling, reply: Any) -> list[Delivery]:
        if not isinstance(reply, ReplyError):
            if not reply:
                return []
            gone = set(reply)
            return [delivery for delivery in settling.deliveries if delivery.entry in gone]
        if reply_code(reply) == "NOGROUP":
            self._prepared = None
            return list(settling.deliveries)
        raise reply_error(reply, self.manager.address.safe) from reply

    def _find(self, message_id: str) -> Delivery | None:
        lane, _, entry = message_id.partition(":")
        return self.held[int(lane)].get(entry.encode()) if lane in "0123" and len(lane) == 1 else None

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

    async def maintain(self, consumer: str, room: int) -> Maintenance:
        """Promote due tasks, and four times a lease take over up to ``room`` deliveries whose lease ran out.

        What was handed out more than ``max_deliveries`` times is dead-lettered as ``crashed`` instead.

        Raises:
            StoreUnavailableError: at once.
        Cost: one round trip, and one for each lane when reclaiming.
        """
        check_name("consumer_name", consumer)
        work = await self._upkeep.run(consumer, room)
        return Maintenance(await self._take_over(work.deliveries), work.next_in, work.cancels)

    async def reclaim(self, consumer: str, room: int, idle_ms: int) -> list[Delivery]:
        """Take over up to ``room`` deliveries that have been idle for ``idle_ms``; one round trip a lane."""
        return await self._take_over(await self._upkeep.reclaim(consumer, room, idle_ms))

    async def _take_over(self, taken: list[Delivery]) -> list[Delivery]:
        for delivery in taken:
            self.held[delivery.lane][delivery.entry] = delivery
        poison = [delivery for delivery in taken if self._upkeep.is_poison(delivery)]
        await self.settle([(delivery, crashed_verdict(delivery)) for delivery in poison])
        return [delivery for delivery in taken if not self._upkeep.is_poison(delivery)] if poison else taken

    def now(self) -> float:
        """Unix seconds by the Redis clock, as of the last :meth:`maintain` and the monotonic clock since."""
        return time.monotonic() + self._upkeep.clock_offset

    def cancel_requested(self, delivery: Delivery) -> bool:
        """Whether the task of ``delivery`` is to be cancelled, as far as the last :meth:`maintain` knew."""
        return bool(self._cancels) and self._cancels.covers(delivery)

    async def cancel(self, task_id: str, message_id: str | None = None) -> Cancellation:
        """Cancel a task wherever it is; ``message_id``, if known, finds one that waits in a lane at once.

        Raises:
            ConfigurationError: no task can have this id.
            StoreUnavailableError: Redis was unavailable for longer than ``patience``.
        Cost: one round trip.
        """
        return await self._canceller.cancel(task_id, message_id)

    def keep_leases(self, consumer: str, on_lost: LeaseLost) -> AbstractAsyncContextManager[None]:
        """Renew what ``consumer`` holds from a thread, while the context is open."""
        return LeaseKeeper(self.manager, self.keys, self.group, consumer, self.lease, self.held, on_lost)

    async def retire(self, consumer: str) -> None:
        """Forget ``consumer``, unless it still holds deliveries; one round trip."""
        await self._upkeep.retire(consumer)
        reader = self._readers.pop(consumer, None)
        if reader is not None:
            await reader.link.close()

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

    async def _reply_client(self) -> str:
        if self._replies is None:
            await self.manager.connect()
            self._replies = self._replies or ReplyListener(self.keys, self.manager)
        await self._replies.start()
        return self._replies.client

    async def wait_result(self, task_id: str, timeout: float | None = None) -> dict[str, Any]:
        """The terminal record of a task sent with ``want_results``: ``id``, ``outcome``, and ``value`` or ``error``.

        Raises:
            TimeoutError: the task is not terminal after ``timeout`` seconds.
        """
        await self._reply_client()
        assert self._replies is not None
        return await self._replies.wait(task_id, timeout)

    async def get_lock(
        self, lock_name: str, expire_time: float = 30, *, wait: float | None = None
    ) -> AbstractAsyncContextManager[DistributedLock]:
        """A lock shared by all processes that name it: ``async with await queue.get_lock("x") as lock: lock.fence``."""
        return RedisLock(await self._commands(), lock_name, expire_time, wait)
