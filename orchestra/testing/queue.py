"""A task queue for tests: the in-memory queue, which remembers what was produced and fails when told to."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from orchestra._queue.twin_store import Held
from orchestra.memory_queue import InMemoryTaskQueue

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestra._delivery import Delivery, Verdict
    from orchestra._queue.base import Maintenance
    from orchestra.tasks import Cancellation, TaskDict

THIEF = "somebody-else"
"""The consumer that holds what :meth:`MockTaskQueue.take_away` took."""


class MockTaskQueue(InMemoryTaskQueue):
    """The specification's mock: a queue that passes the same conformance suite as the one on Redis, so it cannot lie.

    Takes the arguments of :class:`~orchestra.memory_queue.InMemoryTaskQueue`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.produced: list[TaskDict] = []
        """Every task that was accepted, repeats included, in order."""
        self.acknowledged: list[str] = []
        """The message ids that ``acknowledge`` completed."""
        self.cancelled: list[str] = []
        """The task ids that ``cancel`` was asked for."""
        self._failures: dict[str, deque[Exception]] = {}

    def fail_next(self, method: str, error: Exception, times: int = 1) -> None:
        """Make the next ``times`` calls of ``method`` raise ``error`` before they do anything.

        Raises:
            ValueError: ``method`` is none of ``produce produce_many consume read acknowledge add_to_dlq settle
                maintain cancel``.
        """
        if method not in _FALLIBLE:
            raise ValueError(f"method must be one of {', '.join(_FALLIBLE)}, got {method!r}")
        self._failures.setdefault(method, deque()).extend([error] * times)

    def _fail(self, method: str) -> None:
        scheduled = self._failures.get(method)
        if scheduled:
            raise scheduled.popleft()

    def take_away(self, delivery: Delivery) -> None:
        """Let the lease of ``delivery`` be lost to another consumer, as after a stall; its keepers are told.

        Raises:
            ValueError: it is not held any more.
        """
        store = self._store
        if not store.holds(delivery.lane, delivery.entry, delivery.consumer, delivery.deliveries):
            raise ValueError(f"{delivery!r} is not held by {delivery.consumer!r}")
        old = store.lanes[delivery.lane].pending.pop(delivery.entry)
        now = store.clock.monotonic()
        store.lanes[delivery.lane].pending[delivery.entry] = Held(old.entry, THIEF, old.deliveries + 1, now)
        self._tell_lost(delivery)

    async def produce(self, task_data: TaskDict, task_id: str | None = None) -> str:
        """:meth:`~orchestra.memory_queue.InMemoryTaskQueue.produce`, remembered."""
        self._fail("produce")
        message_id = await super().produce(task_data, task_id)
        self.produced.append(task_data)
        return message_id

    async def produce_many(self, tasks: Iterable[TaskDict], *, want_results: bool = False) -> list[str]:
        """:meth:`~orchestra.memory_queue.InMemoryTaskQueue.produce_many`, remembered."""
        self._fail("produce_many")
        tasks = list(tasks)
        message_ids = await super().produce_many(tasks, want_results=want_results)
        self.produced += tasks
        return message_ids

    async def consume(self, consumer_name: str, count: int = 1, block_ms: int = 2000) -> list[tuple[str, TaskDict]]:
        """:meth:`~orchestra.memory_queue.InMemoryTaskQueue.consume`, which may be told to fail."""
        self._fail("consume")
        return await super().consume(consumer_name, count, block_ms)

    async def read(self, consumer: str, count: int, block_ms: int) -> list[Delivery]:
        """:meth:`~orchestra.memory_queue.InMemoryTaskQueue.read`, which may be told to fail."""
        self._fail("read")
        return await super().read(consumer, count, block_ms)

    async def acknowledge(self, message_id: str) -> bool:
        """:meth:`~orchestra.memory_queue.InMemoryTaskQueue.acknowledge`, remembered."""
        self._fail("acknowledge")
        done = await super().acknowledge(message_id)
        if done:
            self.acknowledged.append(message_id)
        return done

    async def add_to_dlq(self, message_id: str, task_data: TaskDict, error_info: dict[str, Any]) -> bool:
        """:meth:`~orchestra.memory_queue.InMemoryTaskQueue.add_to_dlq`, which may be told to fail."""
        self._fail("add_to_dlq")
        return await super().add_to_dlq(message_id, task_data, error_info)

    async def settle(self, batch: Sequence[tuple[Delivery, Verdict]]) -> list[Delivery]:
        """:meth:`~orchestra.memory_queue.InMemoryTaskQueue.settle`, which may be told to fail."""
        self._fail("settle")
        return await super().settle(batch)

    async def maintain(self, consumer: str, room: int, alone: bool | None = None) -> Maintenance:
        """:meth:`~orchestra.memory_queue.InMemoryTaskQueue.maintain`, which may be told to fail."""
        self._fail("maintain")
        return await super().maintain(consumer, room, alone)

    async def cancel(self, task_id: str, message_id: str | None = None) -> Cancellation:
        """:meth:`~orchestra.memory_queue.InMemoryTaskQueue.cancel`, remembered."""
        self._fail("cancel")
        answer = await super().cancel(task_id, message_id)
        self.cancelled.append(task_id)
        return answer


_FALLIBLE = ("produce", "produce_many", "consume", "read", "acknowledge", "add_to_dlq", "settle", "maintain", "cancel")
