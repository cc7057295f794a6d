"""The terminal records of a job's tasks: heard as they come, looked up, deleted once they are written down.

One class for Redis, one for ``memory:``. Neither knows what a record means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from orchestra._delivery import read_record
from orchestra._keys import QueueKeys, WorkflowKeys
from orchestra._queue.replies import ReplyListener
from orchestra.connections import store_errors
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.task_queue import BaseTaskQueue, RedisStreamTaskQueue

BATCH = 500
Record = dict[str, Any]


class Records(Protocol):
    """Where terminal records are."""

    look_every: float
    """Seconds between two looks of somebody who listens."""

    async def open(self) -> None:
        """Connect, and hear of records from now on. Raises: StoreError."""

    async def find(self, task_ids: Sequence[str]) -> list[Record]:
        """The records that there are of ``task_ids``. Raises: StoreError. One round trip per 500."""

    async def delete(self, task_ids: Sequence[str]) -> None:
        """Delete records. Raises: StoreError. One round trip per 500."""

    async def forget(self, task_ids: Sequence[str]) -> None:
        """Let tasks with these ids be produced again. Raises: StoreError. One round trip per 500."""

    async def keep_for(self, seconds: int | None, queue: str | None = None) -> None:
        """Let everything that the queue (or another named ``queue``) holds expire, its workflows too; None: let nothing.

        Raises: StoreError. Three round trips.
        """


class RedisRecords:
    """Records of a queue on Redis; ``client`` is the name under which the job's senders are told, in every run."""

    look_every = 1.5

    def __init__(self, queue: RedisStreamTaskQueue, client: str, on_record: Callable[[Record], None]) -> None:
        self._queue = queue
        self._keys = queue.keys
        self._client_name = client
        self._on_record = on_record

    async def open(self) -> None:
        """Subscribe."""
        manager = self._queue.manager
        await manager.connect()
        listener = ReplyListener(self._keys, manager, client=self._client_name, on_record=self._on_record)
        self._queue._replies = listener  # produce_many(want_results=True) tells workers this name
        await listener.start()

    @property
    def _redis(self) -> Any:
        return self._queue.manager.client

    async def find(self, task_ids: Sequence[str]) -> list[Record]:
        """MGET."""
        found = []
        for part in _parts(task_ids):
            with store_errors(self._queue.manager.address.safe, "MGET"):
                values = await self._redis.mget([self._keys.result(task_id) for task_id in part])
            found += [read_record(value) for value in values if value is not None]
        return found

    async def delete(self, task_ids: Sequence[str]) -> None:
        """UNLINK."""
        for part in _parts(task_ids):
            with store_errors(self._queue.manager.address.safe, "UNLINK"):
                await self._redis.unlink(*[self._keys.result(task_id) for task_id in part])

    async def forget(self, task_ids: Sequence[str]) -> None:
        """HDEL from the dedup buckets."""
        for part in _parts(task_ids):
            with store_errors(self._queue.manager.address.safe, "HDEL"):
                for bucket in self._keys.dedup:
                    await self._redis.hdel(bucket, *part)

    async def keep_for(self, seconds: int | None, queue: str | None = None) -> None:
        """EXPIRE or PERSIST of what has no time to live of its own."""
        keys = self._keys if queue is None else QueueKeys(queue)
        names = [*keys.streams, keys.delayed, keys.bodies, keys.dlq, keys.counters, keys.consumers]
        with store_errors(self._queue.manager.address.safe, "EXPIRE"):
            names += await self._unfinished(WorkflowKeys(self._queue.name if queue is None else queue))
            async with self._redis.pipeline(transaction=True) as pipeline:
                for name in names:
                    pipeline.persist(name) if seconds is None else pipeline.expire(name, seconds)
                await pipeline.execute()

    async def _unfinished(self, keys: WorkflowKeys) -> list[str]:
        """The keys of the workflows that have not ended, and those that all workflows of the queue share."""
        ended = set(await self._redis.zrange(keys.expiry, 0, -1))
        names = [keys.outbox, keys.ended, keys.index, keys.expiry]
        for workflow_id in await self._redis.zrange(keys.index, 0, -1):
            if workflow_id not in ended:
                names += keys.scripted(workflow_id.decode())[:3]
        return names


class MemoryRecords:
    """Records of a queue in the memory of this process."""

    look_every = 0.02

    def __init__(self, queue: InMemoryTaskQueue) -> None:
        self._store = queue._store

    async def open(self) -> None:
        """Nothing to do."""

    async def find(self, task_ids: Sequence[str]) -> list[Record]:
        """Look into the store."""
        values = [self._store.result(task_id) for task_id in task_ids]
        return [read_record(value) for value in values if value is not None]

    async def delete(self, task_ids: Sequence[str]) -> None:
        """Forget records."""
        for task_id in task_ids:
            self._store._results.pop(task_id, None)

    async def forget(self, task_ids: Sequence[str]) -> None:
        """Nothing was known before this process began."""

    async def keep_for(self, seconds: int | None, queue: str | None = None) -> None:
        """Nothing outlives the process."""


def records_of(queue: BaseTaskQueue, client: str, on_record: Callable[[Record], None]) -> Records:
    """The records of ``queue``."""
    if isinstance(queue, InMemoryTaskQueue):
        return MemoryRecords(queue)
    assert isinstance(queue, RedisStreamTaskQueue), "an App makes no other queues"
    return RedisRecords(queue, client, on_record)


def _parts(task_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(task_ids), BATCH):
        yield task_ids[start : start + BATCH]
