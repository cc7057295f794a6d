"""The contract of a task queue, as the specification documents it and as the dispatcher uses it.

The methods of the specification are enough to write a queue of one's own: the delivery-level methods below them
(``read``, ``settle``, ``maintain``) have defaults that are built from ``consume``, ``acknowledge`` and ``add_to_dlq``,
correct but neither batched nor atomic. :class:`~orchestra.task_queue.RedisStreamTaskQueue` and
:class:`~orchestra.memory_queue.InMemoryTaskQueue` replace them.
"""

from __future__ import annotations

import abc
import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from orchestra._delivery import WANTS_RESULT, Again, Bury, Delivery, Sooner, Verdict, frame_of
from orchestra.serialization import EncodedTask, encode_tasks, new_task_id
from orchestra.tasks import Cancellation, DeadLetter, TaskDict

YIELD_EVERY = 500
"""Tasks that are encoded between two chances for the event loop to do something else."""

LeaseLost = Callable[[Delivery], None]


class DistributedLock(Protocol):
    """A lock that several processes share. ``fence`` grows with every acquisition; the resource should check it.

    ``lost`` is set when the lock is no longer this holder's although it was not released.
    """

    fence: int
    lost: asyncio.Event

    @property
    def held(self) -> bool:
        """Whether it is surely still held, by this process's own clock."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """How many tasks are where; each lane's ``waiting`` excludes ``in_flight``.

    ``counters`` hold ``produced completed dead cancelled retried throttled released reclaimed replayed duplicates lost``,
    counted since the queue exists.
    """

    queue: str
    waiting: tuple[int, ...]
    in_flight: tuple[int, ...]
    delayed: int
    dead: int
    consumers: int
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def live(self) -> int:
        """Tasks that are not terminal: waiting, in flight or delayed."""
        return sum(self.waiting) + sum(self.in_flight) + self.delayed

    @property
    def adds_up(self) -> bool:
        """``produced + replayed == completed + dead + cancelled + lost + live``."""
        count = self.counters.get
        ended = count("completed", 0) + count("dead", 0) + count("cancelled", 0) + count("lost", 0)
        return count("produced", 0) + count("replayed", 0) == ended + self.live


class Sent(NamedTuple):
    """A task that was added: its id, generated where it had none, and its message id."""

    task_id: str
    message_id: str


@dataclass(frozen=True, slots=True)
class Maintenance:
    """What :meth:`BaseTaskQueue.maintain` found.

    ``deliveries`` taken over; ``next_in`` seconds until it should be called again; ``cancels``: whether tasks were marked
    as cancelled since the last call, so that what is held should be looked up with ``cancel_requested``; ``suspects``:
    deliveries on their last allowed hand-over that were left where they are.
    """

    deliveries: list[Delivery]
    next_in: float
    cancels: bool = False
    suspects: int = 0


class CancelledSteps(Protocol):
    """Tasks that were cancelled and carried steps of workflows, kept until their workflows have been told."""

    async def steps(self, count: int) -> list[tuple[str, bytes]]:
        """Up to ``count`` of them, in no order: task id and frame. One round trip."""

    async def forget_steps(self, task_ids: Sequence[str]) -> None:
        """Their workflows have been told. One round trip."""


class Delays(Protocol):
    """What may be asked of a queue's delayed tasks."""

    async def hasten(self, moves: Sequence[Sooner]) -> int:
        """Let throttled tasks come back sooner; returns how many do. Others, and those that moved on, stay."""


class BaseTaskQueue(abc.ABC):
    """Hands tasks to consumers at least once, most urgent lane first."""

    name: str = "queue"
    lease: float = 60.0
    """Seconds a delivery is exclusive, unless it is renewed."""
    cancelled_steps: CancelledSteps | None = None
    """What workflows are still to be told; None: a queue of somebody's own, which keeps none."""
    delays: Delays | None = None
    """How delayed tasks are hastened; None: a queue of somebody's own, where they come when they were told."""

    # -- the specification

    @abc.abstractmethod
    async def produce(self, task_data: TaskDict, task_id: str | None = None) -> str:
        """Add a task; returns its message id. See :class:`~orchestra.task_queue.RedisStreamTaskQueue`."""

    @abc.abstractmethod
    async def consume(self, consumer_name: str, count: int = 1, block_ms: int = 2000) -> list[tuple[str, TaskDict]]:
        """Up to ``count`` tasks as ``(message_id, task_data)``, waiting up to ``block_ms`` for the first."""

    @abc.abstractmethod
    async def acknowledge(self, message_id: str) -> bool:
        """Complete a task; True only if this call settled a live delivery handed out by this queue object."""

    @abc.abstractmethod
    async def add_to_dlq(self, message_id: str, task_data: TaskDict, error_info: dict[str, Any]) -> bool:
        """Dead-letter a task; True only if this call settled a live delivery handed out by this queue object."""

    @abc.abstractmethod
    async def get_queue_depth(self) -> int:
        """The number of live tasks: waiting, in flight and delayed."""

    async def get_lock(self, lock_name: str, expire_time: float = 30) -> AbstractAsyncContextManager[DistributedLock]:
        """A lock shared by all processes that name it, to be entered with ``async with``."""
        raise TypeError(f"{type(self).__name__} has no locks: get_lock is not implemented")

    # -- beyond it

    async def produce_many(self, tasks: Iterable[TaskDict], *, want_results: bool = False) -> list[str]:
        """Add tasks; returns their message ids in order."""
        return [await self.produce(task) for task in tasks]

    async def submit(self, tasks: Iterable[TaskDict], *, want_results: bool = False) -> list[Sent]:
        """:meth:`produce_many` for a sender who wants to know the ids of the tasks too."""
        named = [task if "id" in task else {**task, "id": new_task_id()} for task in tasks]
        message_ids = await self.produce_many(named, want_results=want_results)
        return [Sent(task["id"], message_id) for task, message_id in zip(named, message_ids, strict=True)]

    async def acknowledge_many(self, message_ids: Iterable[str]) -> list[bool]:
        """:meth:`acknowledge` for several tasks."""
        return [await self.acknowledge(message_id) for message_id in message_ids]

    async def get_dlq_depth(self) -> int:
        """The number of dead letters."""
        raise TypeError(f"{type(self).__name__} cannot count its dead letters: get_dlq_depth is not implemented")

    async def read_dlq(self, count: int = 100, after: str | None = None) -> list[DeadLetter]:
        """Up to ``count`` dead letters, oldest first, behind the message id ``after``."""
        raise TypeError(f"{type(self).__name__} cannot list its dead letters: read_dlq is not implemented")

    async def replay_dlq(self, message_ids: Iterable[str]) -> int:
        """Put dead letters back into their lanes; returns how many were."""
        raise TypeError(f"{type(self).__name__} cannot replay dead letters: replay_dlq is not implemented")

    async def purge_dlq(self, message_ids: Iterable[str] | None = None) -> int:
        """Delete dead letters (all when None); returns how many were."""
        raise TypeError(f"{type(self).__name__} cannot purge dead letters: purge_dlq is not implemented")

    async def stats(self) -> QueueStats:
        """How many tasks are where."""
        raise TypeError(f"{type(self).__name__} has no statistics: stats is not implemented")

    async def wait_result(self, task_id: str, timeout: float | None = None) -> dict[str, Any]:
        """The terminal record of a task sent with ``want_results``; see :func:`orchestra._delivery.read_record`.

        Raises:
            TimeoutError: the task is not terminal after ``timeout`` seconds.
        """
        raise TypeError(f"{type(self).__name__} keeps no results: wait_result is not implemented")

    async def cancel(self, task_id: str, message_id: str | None = None) -> Cancellation:
        """Cancel a task wherever it is: waiting, delayed or running in any process."""
        raise TypeError(f"{type(self).__name__} cannot cancel tasks: cancel is not implemented")

    # -- deliveries: what the dispatcher uses

    async def read(self, consumer: str, count: int, block_ms: int) -> list[Delivery]:
        """Up to ``count`` deliveries for ``consumer``, waiting up to ``block_ms`` (0: not at all) for the first."""
        out = []
        for message_id, task_data in await self.consume(consumer, count, block_ms):
            lane = task_data.get("priority", 2)
            out.append(Delivery(lane, message_id.encode(), (b"t", frame_of(task_data)), consumer))
        return out

    def deliver_to(self, consumer: str, take: Callable[[list[Delivery]], None] | None) -> None:
        """Let a read of ``consumer`` that blocks hand what arrives to ``take`` at once, and then return nothing.

        A queue may ignore this, and so may any of its reads: what they return is to be taken as well. ``take`` must
        not raise. None: no longer.
        """

    async def wake(self, consumer: str) -> None:
        """Make a blocked read of ``consumer`` return soon."""

    async def settle(self, batch: Sequence[tuple[Delivery, Verdict]]) -> list[Delivery]:
        """End deliveries; returns those that were STALE. May be repeated when its outcome is unknown."""
        stale = []
        for delivery, verdict in batch:
            message_id = delivery.entry.decode()
            if isinstance(verdict, Bury):
                ok = await self.add_to_dlq(
                    message_id, delivery.task_dict(), {**verdict.error, "reason": verdict.reason}
                )
            elif isinstance(verdict, Again):
                await self.produce({**delivery.task_dict(), "delay": verdict.delay}, None)
                ok = await self.acknowledge(message_id)
            else:
                ok = await self.acknowledge(message_id)
            if not ok:
                stale.append(delivery)
        return stale

    async def maintain(self, consumer: str, room: int, alone: bool | None = None) -> Maintenance:
        """Promote due tasks and take over up to ``room`` deliveries whose lease has run out.

        ``alone``: whether the caller runs nothing else, so that a crash would convict exactly one task. True: at most one
        delivery that is on its last allowed hand-over is taken, now; False: none is, they are counted in ``suspects``;
        None: the caller does not care.
        """
        return Maintenance([], 1.0)

    def now(self) -> float:
        """Unix seconds of the clock that all users of the queue share; deadlines are compared with it. No round trip."""
        return time.time()

    def cancel_requested(self, delivery: Delivery) -> bool:
        """Whether the task of ``delivery`` is to be cancelled, as far as the last :meth:`maintain` knew."""
        return False

    def keep_leases(self, consumer: str, on_lost: LeaseLost) -> AbstractAsyncContextManager[None]:
        """Renew the leases of everything ``consumer`` has read and not settled, while the context is open."""
        return _NoLeases()

    async def retire(self, consumer: str) -> None:
        """Forget ``consumer``, which has settled everything it read."""

    async def close(self) -> None:
        """Give back connections. The queue may be used again afterwards."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


async def encode_all(tasks: Iterable[TaskDict], max_bytes: int, reply: str | None) -> list[EncodedTask]:
    """Check and encode ``tasks`` before any is sent; the event loop gets a chance every 500.

    ``reply`` names the client that wants the results, None when nobody does.
    """
    flags, encoded = 0 if reply is None else WANTS_RESULT, list[EncodedTask]()
    rest = iter(tasks)
    while part := list(islice(rest, YIELD_EVERY)):
        encoded += encode_tasks(part, max_bytes=max_bytes, reply=reply, flags=flags)
        if len(part) == YIELD_EVERY:
            await asyncio.sleep(0)
    return encoded


class _NoLeases(AbstractAsyncContextManager[None]):
    async def __aexit__(self, *exc_info: object) -> None:
        return None
