"""Waits for results: one subscription per process and queue, and the records themselves as the truth.

A publication is only a hint that may be lost; the record under its key is what counts. So a waiter subscribes, looks,
waits for the hint, and looks again every few seconds.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestra._delivery import read_record
from orchestra._keys import QueueKeys
from orchestra.connections import map_redis_error
from orchestra.errors import CorruptEntryError, StoreError

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

LOOK_AGAIN = 2.0
"""Seconds after which a waiter looks at the record without having been told."""


class ReplyListener:
    """Resolves ``wait_result`` calls of one queue object; ``client`` is the name senders write into their tasks.

    A ``client`` of one's own stays the same over restarts, so that results of tasks sent before are heard too;
    ``on_record`` is called with every record heard.
    """

    def __init__(
        self,
        keys: QueueKeys,
        manager: ConnectionManager,
        *,
        client: str | None = None,
        on_record: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._keys = keys
        self._manager = manager
        self.client = client or secrets.token_hex(8)
        self._on_record = on_record
        self._waiting: dict[str, set[asyncio.Future[dict[str, Any]]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._subscribed = asyncio.Event()

    async def start(self) -> None:
        """Subscribe; returns when results published from now on will be heard."""
        if self._task is None or self._task.done():
            self._subscribed.clear()
            self._task = asyncio.get_running_loop().create_task(self._listen(), name="orchestra:replies")
        await self._subscribed.wait()

    async def wait(self, task_id: str, timeout: float | None) -> dict[str, Any]:
        """The terminal record of ``task_id``; see :meth:`~orchestra.task_queue.RedisStreamTaskQueue.wait_result`."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(task_id, set()).add(future)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    record = await self._manager.client.get(self._keys.result(task_id))
                    if record is not None:
                        return read_record(record)
                    done, _ = await asyncio.wait((future,), timeout=LOOK_AGAIN)
                    if done:
                        return future.result()
        except StoreError:
            raise
        except TimeoutError:
            raise TimeoutError(f"task {task_id} has no result after {timeout:g} s; it may still run") from None
        finally:
            futures = self._waiting[task_id]
            futures.discard(future)
            if not futures:
                del self._waiting[task_id]

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - a lost hint costs LOOK_AGAIN seconds, never a result
                mapped = map_redis_error(error)
                self._subscribed.set()  # waiters go on by looking
                await asyncio.sleep(LOOK_AGAIN if isinstance(mapped, StoreError) else 0.1)

    async def _listen_once(self) -> None:
        async with self._manager.client.pubsub() as pubsub:
            await pubsub.subscribe(self._keys.replies(self.client))
            while True:
                message = await pubsub.get_message(timeout=LOOK_AGAIN)
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    self._subscribed.set()
                elif message["type"] == "message":
                    self._tell(message["data"])

    def _tell(self, data: bytes) -> None:
        try:
            record = read_record(data)
        except CorruptEntryError:
            return
        if self._on_record is not None:
            self._on_record(record)
        for future in self._waiting.get(str(record.get("id")), ()):
            if not future.done():
                future.set_result(record)

    async def close(self) -> None:
        """Unsubscribe."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
