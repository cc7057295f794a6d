"""The task queue in the memory of one process: address ``memory:``, nothing durable, the semantics of the Redis queue.

For tests, for embedding and for the specification's mocks. Tasks are really encoded and decoded, so that what cannot
travel fails here too; the moves themselves are :class:`~orchestra._queue.twin_store.MemoryStore`. This module owns who
waits: blocked readers, waiters for results and for locks are woken by what they wait for, never by polling.

One event loop. Every coroutine yields to the loop once before it acts, as one that talks to Redis would, and then acts
without awaiting: cancelled before, it changed nothing; afterwards, it has returned. So no task is ever lost on the way.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

from orchestra import telemetry
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra._delivery import (
    Bury,
    Cancel,
    Complete,
    Delivery,
    Verdict,
    cancelled_record,
    frame_ident,
    read_record,
    sort_out,
)
from orchestra._queue.base import BaseTaskQueue, LeaseLost, Maintenance, QueueStats, Sent, encode_all
from orchestra._queue.twin_records import Plan, crashed, letter, parse_letter_id, plan_end, task_id_of
from orchestra._queue.twin_store import Held, MemoryStore, Why
from orchestra._queue.twin_waits import ALL, Bells, MemoryLock
from orchestra.errors import QueueFullError
from orchestra.serialization import MAX_TASK_BYTES, EncodedTask, encode_task
from orchestra.tasks import (
    LANES,
    Cancellation,
    DeadLetter,
    TaskDict,
    check_ident,
    check_name,
    require_int,
    require_number,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

T = TypeVar("T")
FULL_RETRY_AFTER = 1.0
TICK = 1.0
"""Most seconds between two looks at what was cancelled."""
TASKS = "tasks"
"""The topic on which readers wait."""


class InMemoryTaskQueue(BaseTaskQueue):
    """Tasks in the memory of this process, with the semantics of the Redis queue; durable it is not.

    The arguments are those of :class:`~orchestra.task_queue.RedisStreamTaskQueue`; ``clock`` decides due times, leases
    and windows. Blocking times are durations of the event loop.

    Raises:
        ConfigurationError: naming the argument that is out of range.
    """

    def __init__(
        self,
        stream_name: str = "memory",
        consumer_group: str = "workers",
        claim_interval_ms: int = 60_000,
        *,
        max_length: int = 0,
        max_dead: int = 0,
        max_task_bytes: int = MAX_TASK_BYTES,
        dedup_window: float = 3600.0,
        result_ttl: float = 3600.0,
        max_deliveries: int = 3,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        require_int("claim_interval_ms", claim_interval_ms, 100, 86_400_000, unit="ms")
        require_int("max_length", max_length, 0, 1 << 53, unit="tasks")
        require_int("max_dead", max_dead, 0, 1 << 53, unit="dead letters")
        require_int("max_task_bytes", max_task_bytes, 64, 256 << 20, unit="bytes")
        require_number("dedup_window", dedup_window, 60.0, 30 * 86_400.0, unit="seconds")
        require_number("result_ttl", result_ttl, 1.0, 30 * 86_400.0, unit="seconds")
        require_int("max_deliveries", max_deliveries, 1, 1000)
        self.name = check_name("stream_name", stream_name)
        self.group = check_name("consumer_group", consumer_group)
        self.lease = claim_interval_ms / 1000
        self.max_deliveries = max_deliveries
        self.max_dead, self.max_task_bytes = max_dead, max_task_bytes
        self._store = MemoryStore(clock, max_length=max_length, dedup_window=dedup_window, result_ttl=result_ttl)
        self.cancelled_steps = self.delays = self._store
        self._bells = Bells(clock)
        self._keepers: dict[str, list[LeaseLost]] = {}
        self._forget_held()

    def _forget_held(self) -> None:
        self._rank = 0
        self._marked_times = self._store.marked_times
        self.held: tuple[dict[bytes, Delivery], ...] = tuple({} for _ in range(LANES))

    def twin(self) -> Self:
        """A second queue object on the same tasks, as another process would have one."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._forget_held()
        return other

    # -- producing

    async def produce(self, task_data: TaskDict, task_id: str | None = None) -> str:
        """Add a task to its lane, or with ``delay`` to the delayed set; returns its message id.

        An own id (``task_id`` or ``task_data["id"]``) is deduplicated within the dedup window: a repeat adds nothing
        and returns the first message id.

        Raises:
            InvalidTaskError: the task cannot travel (InvalidTaskTypeError, TaskTooLargeError); nothing was added.
            QueueFullError: ``max_length`` is reached; nothing was added.
        """
        encoded = encode_task(task_data, task_id=task_id, max_bytes=self.max_task_bytes)
        return (await self._add([encoded]))[0]

    async def produce_many(self, tasks: Iterable[TaskDict], *, want_results: bool = False) -> list[str]:
        """Add tasks; returns their message ids in order. All are checked before the first is added; all fit or none.

        Raises as :meth:`produce`.
        """
        return await self._add(await encode_all(tasks, self.max_task_bytes, self.name if want_results else None))

    async def submit(self, tasks: Iterable[TaskDict], *, want_results: bool = False) -> list[Sent]:
        """:meth:`produce_many` for a sender who wants to know the ids of the tasks too."""
        encoded = await encode_all(tasks, self.max_task_bytes, self.name if want_results else None)
        return [Sent(task.id, added) for task, added in zip(encoded, await self._add(encoded), strict=True)]

    async def _add(self, tasks: Sequence[EncodedTask]) -> list[str]:
        await asyncio.sleep(0)
        began, store, count = time.perf_counter(), self._store, len(tasks)
        if not store.fits(count):
            about = {"queue": self.name, "reason": "length"}
            telemetry.emit("queue.refused", {"count": count, "limit": store.max_length}, about)
            raise QueueFullError(
                f"queue {self.name!r} holds {store.depth} live tasks of at most {store.max_length}; {count} more were "
                f"refused: try again in {FULL_RETRY_AFTER:g} s",
                retry_after=FULL_RETRY_AFTER,
                limit=store.max_length,
            )
        if self.max_dead and len(store.dead) >= self.max_dead:
            about = {"queue": self.name, "reason": "dead_letters"}
            telemetry.emit("queue.refused", {"count": count, "limit": self.max_dead}, about)
            raise QueueFullError(
                f"queue {self.name!r} holds {len(store.dead)} dead letters of at most {self.max_dead}; {count} tasks were "
                "refused: find out why tasks die, then replay or purge",
                retry_after=FULL_RETRY_AFTER,
                limit=self.max_dead,
            )
        added = store.produce(tasks)
        fresh = sum(new for _, new in added)
        # A delayed task may be due before whatever the readers are waiting for now: all of them look again.
        self._bells.ring(TASKS, ALL if any(task.delay for task in tasks) else fresh)
        if telemetry.wanted("queue.produced"):
            facts = {"count": count, "duplicates": count - fresh, "duration_s": time.perf_counter() - began}
            telemetry.emit("queue.produced", facts, {"queue": self.name})
        return [message_id for message_id, _ in added]

    # -- consuming

    async def consume(self, consumer_name: str, count: int = 1, block_ms: int = 2000) -> list[tuple[str, TaskDict]]:
        """At most ``count`` tasks as ``(message_id, task_data)``, most urgent first, oldest first within a priority.

        Deliveries whose lease ran out come before them. An entry that is not a task is dead-lettered with its bytes
        and skipped, a task that was cancelled is skipped.

        Raises:
            ConfigurationError: a bad consumer name, count or block time.
        """

        def look() -> list[tuple[str, TaskDict]]:
            found: list[tuple[str, TaskDict]] = []
            while len(found) < count:
                deliveries = self._reclaim(consumer_name, count - len(found))
                deliveries = deliveries or self._take(consumer_name, count - len(found))
                if not deliveries:
                    break
                found += self._readable(deliveries)
            return found

        return await self._wait_for(look, consumer_name, count, block_ms, reclaims=True)

    async def read(self, consumer: str, count: int, block_ms: int) -> list[Delivery]:
        """Up to ``count`` deliveries for ``consumer``, most urgent first; waits up to ``block_ms`` for the first."""
        return await self._wait_for(lambda: self._take(consumer, count), consumer, count, block_ms, reclaims=False)

    async def wake(self, consumer: str) -> None:
        """Make a blocked read of ``consumer`` return now."""
        await asyncio.sleep(0)
        self._bells.dismiss(TASKS, consumer)

    async def _wait_for(
        self, look: Callable[[], list[T]], consumer: str, count: int, block_ms: int, *, reclaims: bool
    ) -> list[T]:
        check_name("consumer_name", consumer)
        require_int("count", count, 1, 100_000, unit="tasks")
        require_int("block_ms", block_ms, 0, 86_400_000, unit="ms")
        clock = asyncio.get_running_loop().time
        deadline = clock() + block_ms / 1000
        await asyncio.sleep(0)
        while True:
            if found := look():
                return found
            left = deadline - clock()
            if left <= 0 or not await self._bells.wait(TASKS, self._pause(left, reclaims), consumer):
                return []

    def _pause(self, left: float, reclaims: bool) -> float:
        if self._bells.manual:
            return left
        due = self._store.next_due_in()
        # What is taken from now on expires a lease from now at the earliest, so looking again then is exact.
        expiry = min(self._store.next_expiry_in(self.lease) or self.lease, self.lease) if reclaims else None
        return min(left, *(seconds for seconds in (due, expiry, left) if seconds is not None))

    def _take(self, consumer: str, count: int) -> list[Delivery]:
        self._promote(consumer)
        return [self._hand_out(*taken) for taken in self._store.take(consumer, count)]

    def _promote(self, consumer: str) -> None:
        moved = self._store.promote(consumer)
        if moved:
            self._bells.ring(TASKS, moved)
            telemetry.emit("queue.promoted", {"count": moved}, {"queue": self.name})

    def _reclaim(self, consumer: str, room: int) -> list[Delivery]:
        found: list[Delivery] = []
        poison: list[Plan] = []
        while len(found) < room and (taken := self._store.reclaim(consumer, self.lease, room - len(found))):
            for delivery in [self._hand_out(*one) for one in taken]:
                if delivery.deliveries > self.max_deliveries:
                    poison.append(self._plan(delivery, crashed(delivery)))
                else:
                    found.append(delivery)
        if found or poison:
            facts = {"count": len(found), "crashed": len(poison)}
            telemetry.emit("queue.reclaimed", facts, {"queue": self.name})
        self._apply(poison)
        return found

    def _hand_out(self, lane: int, entry: bytes, held: Held) -> Delivery:
        self._rank += 1
        stream = lane + LANES if held.entry.front else lane
        delivery = Delivery(stream, entry, held.entry.fields(), held.consumer, held.deliveries, self._rank)
        self.held[lane][entry] = delivery
        return delivery

    def _readable(self, deliveries: Sequence[Delivery]) -> list[tuple[str, TaskDict]]:
        tasks, ended = sort_out(self.name, deliveries, self.cancel_requested)
        self._apply([self._plan(delivery, verdict) for delivery, verdict in ended])
        return tasks

    # -- settling

    async def settle(self, batch: Sequence[tuple[Delivery, Verdict]]) -> list[Delivery]:
        """End deliveries; returns those that were STALE, which changed nothing.

        A task that was to run again and is marked as cancelled ends as cancelled.
        """
        plans = [self._plan(delivery, verdict) for delivery, verdict in batch]
        await asyncio.sleep(0)
        return self._apply(plans)

    def _plan(self, delivery: Delivery, verdict: Verdict) -> Plan:
        return plan_end(self.name, delivery, verdict, self.max_task_bytes)

    def _apply(self, plans: Sequence[Plan]) -> list[Delivery]:
        stale = []
        for plan in plans:
            delivery = plan.delivery
            owned = self._store.holds(delivery.lane, delivery.entry, delivery.consumer, delivery.deliveries)
            if owned or self.held[delivery.lane].get(delivery.entry) is delivery:
                self.held[delivery.lane].pop(delivery.entry, None)
            if owned:
                self._end(plan)
            else:
                stale.append(delivery)
        return stale

    def _end(self, plan: Plan) -> None:
        delivery, verdict, store, record = plan.delivery, plan.verdict, self._store, plan.record
        lane, entry = delivery.lane, delivery.entry
        if isinstance(verdict, Complete):
            store.complete(lane, entry)
        elif isinstance(verdict, Bury):
            store.bury(lane, entry, Why(task_id_of(delivery), verdict.reason, verdict.attempts, plan.error))
        elif isinstance(verdict, Cancel) or store.is_marked(delivery.header.id, entry):
            store.end_cancelled(lane, entry, delivery.header.id)
            telemetry.emit("queue.cancelled", {"count": 1}, {"queue": self.name})
        else:
            store.retry(lane, entry, delivery.header.id, verdict.left(), verdict.counter)
            self._bells.ring(TASKS, ALL if verdict.delay > 0 else 1)
            record = None
        if record is not None:
            self._keep_result(delivery.header.id, record)

    def _keep_result(self, task_id: str, record: bytes) -> None:
        self._store.keep_result(task_id, record)
        self._bells.ring(("result", task_id))

    def _find(self, message_id: str) -> Delivery | None:
        stream, _, entry = str(message_id).partition(":")
        known = len(stream) == 1 and stream in "01234567"
        return self.held[int(stream) % LANES].get(entry.encode()) if known else None

    async def acknowledge(self, message_id: str) -> bool:
        """Complete a task. True only if this call settled a live delivery that this queue object handed out."""
        return (await self.acknowledge_many([message_id]))[0]

    async def acknowledge_many(self, message_ids: Iterable[str]) -> list[bool]:
        """:meth:`acknowledge` for several tasks."""
        message_ids = list(message_ids)
        await asyncio.sleep(0)
        return [self._settle_held(message_id, Complete()) for message_id in message_ids]

    def _settle_held(self, message_id: str, verdict: Verdict) -> bool:
        delivery = self._find(message_id)
        return delivery is not None and not self._apply([self._plan(delivery, verdict)])

    async def add_to_dlq(self, message_id: str, task_data: TaskDict, error_info: dict[str, Any]) -> bool:
        """Dead-letter a task with ``error_info``; the queue's own copy of the task is kept.

        True only if this call settled a live delivery that this queue object handed out.

        Raises:
            InvalidTaskError: ``error_info`` cannot be encoded; nothing was changed.
        """
        await asyncio.sleep(0)
        delivery = self._find(message_id)
        if delivery is None:
            return False
        attempts = error_info.get("attempts")
        reason = str(error_info.get("reason", "failed"))
        verdict = Bury(reason, attempts if type(attempts) is int else delivery.attempt, dict(error_info))
        return self._settle_held(message_id, verdict)

    # -- upkeep

    async def maintain(self, consumer: str, room: int, alone: bool | None = None) -> Maintenance:
        """Promote due tasks and take over up to ``room`` deliveries whose lease has run out.

        ``alone`` makes no difference: in one process, whoever crashes takes the queue along.
        """
        check_name("consumer_name", consumer)
        await asyncio.sleep(0)
        self._promote(consumer)
        found = self._reclaim(consumer, room)
        due, expiry = self._store.next_due_in(), self._store.next_expiry_in(self.lease)
        next_in = min(seconds for seconds in (due, expiry, self.lease, TICK) if seconds is not None)
        marked, self._marked_times = self._marked_times, self._store.marked_times
        return Maintenance(found, next_in, marked != self._marked_times)

    def cancel_requested(self, delivery: Delivery) -> bool:
        """Whether the task of ``delivery`` is to be cancelled."""
        return self._store.marked_times > 0 and self._store.is_marked(task_id_of(delivery), delivery.entry)

    async def cancel(self, task_id: str, message_id: str | None = None) -> Cancellation:
        """Cancel a task wherever it is; see :meth:`~orchestra.task_queue.RedisStreamTaskQueue.cancel`.

        Raises:
            ConfigurationError: no task can have this id.
        """
        record = cancelled_record(check_ident("task id", task_id))
        await asyncio.sleep(0)
        answer = self._store.cancel(task_id, frame_ident(task_id), message_id, record)
        if answer is Cancellation.CANCELLED:
            telemetry.emit("queue.cancelled", {"count": 1}, {"queue": self.name})
            self._bells.ring(("result", task_id))
        return answer

    @asynccontextmanager
    async def keep_leases(self, consumer: str, on_lost: LeaseLost) -> AsyncIterator[None]:
        """While open, no lease of ``consumer`` runs out; deliveries that were lost before are told at once."""
        store = self._store
        self._keepers.setdefault(consumer, []).append(on_lost)
        for delivery in [delivery for lane in self.held for delivery in lane.values() if delivery.consumer == consumer]:
            if not store.holds(delivery.lane, delivery.entry, consumer, delivery.deliveries):
                self._tell_lost(delivery)
        store.keep(consumer)
        try:
            yield
        finally:
            self._keepers[consumer].remove(on_lost)
            store.unkeep(consumer)

    def _tell_lost(self, delivery: Delivery) -> None:
        delivery.lost = True
        telemetry.emit("lease.lost", {}, {"queue": self.name, "task_id": task_id_of(delivery)})
        for on_lost in [*self._keepers.get(delivery.consumer, ())]:
            on_lost(delivery)

    async def retire(self, consumer: str) -> None:
        """Forget ``consumer``, if it has settled everything it read."""
        await asyncio.sleep(0)
        self._store.retire(consumer)

    async def get_queue_depth(self) -> int:
        """The number of live tasks: waiting, in flight and delayed."""
        await asyncio.sleep(0)
        return self._store.depth

    async def stats(self) -> QueueStats:
        """How many tasks are where."""
        await asyncio.sleep(0)
        store = self._store
        return QueueStats(
            queue=self.name,
            waiting=tuple(len(lane.front) + len(lane.waiting) for lane in store.lanes),
            in_flight=tuple(len(lane.pending) for lane in store.lanes),
            delayed=len(store.delayed),
            dead=len(store.dead),
            consumers=len(store.consumers),
            counters=dict(store.counters),
        )

    async def wait_result(self, task_id: str, timeout: float | None = None) -> dict[str, Any]:
        """The terminal record of a task sent with ``want_results``.

        Raises:
            TimeoutError: the task is not terminal after ``timeout`` seconds.
        """
        await asyncio.sleep(0)
        clock = asyncio.get_running_loop().time
        deadline = clock() + (float("inf") if timeout is None else timeout)
        while (record := self._store.result(task_id)) is None:
            left = deadline - clock()
            if left <= 0:
                raise TimeoutError(f"task {task_id!r} has no result after {timeout:g} s")
            await self._bells.wait(("result", task_id), left)
        return read_record(record)

    async def get_lock(
        self, lock_name: str, expire_time: float = 30, *, wait: float | None = None, renew: bool = True
    ) -> AbstractAsyncContextManager[MemoryLock]:
        """A lock shared by the handles of this queue: ``async with await queue.get_lock("x") as lock: lock.fence``."""
        await asyncio.sleep(0)
        return MemoryLock(self._store, self._bells, lock_name, expire_time, wait, renew=renew)

    # -- dead letters

    async def get_dlq_depth(self) -> int:
        """The number of dead letters."""
        await asyncio.sleep(0)
        return len(self._store.dead)

    async def read_dlq(self, count: int = 100, after: str | None = None) -> list[DeadLetter]:
        """Up to ``count`` dead letters, oldest first, behind the message id ``after``; O(dead letters).

        Raises:
            ConfigurationError: ``count`` is out of range, or ``after`` is no id of a dead letter.
        """
        require_int("count", count, 1, 10_000, unit="dead letters")
        start = parse_letter_id(after) if after is not None else (-1, 0)
        await asyncio.sleep(0)
        found = [(ident, dead) for ident, dead in self._store.dead.items() if ident > start]
        return [letter(ident, dead) for ident, dead in found[:count]]

    async def replay_dlq(self, message_ids: Iterable[str]) -> int:
        """Put dead letters back into their lanes with their retries restored; returns how many were.

        Each is replayed once, however often this is called. What cannot be decoded stays dead.
        """
        wanted = [parse_letter_id(message_id) for message_id in message_ids]
        await asyncio.sleep(0)
        sound = [
            ident for ident in wanted if ident in self._store.dead and letter(ident, self._store.dead[ident]).task_data
        ]
        replayed = sum(self._store.replay(ident) for ident in sound)
        self._bells.ring(TASKS, replayed)
        return replayed

    async def purge_dlq(self, message_ids: Iterable[str] | None = None) -> int:
        """Delete dead letters (all when None); returns how many were."""
        wanted = None if message_ids is None else [parse_letter_id(message_id) for message_id in message_ids]
        await asyncio.sleep(0)
        dead = self._store.dead
        return sum(dead.pop(ident, None) is not None for ident in (list(dead) if wanted is None else wanted))
