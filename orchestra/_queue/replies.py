"""Waits for results: one subscription per process and queue, and the records themselves as the truth.

A publication is only a hint that may be lost; the record under its key is what counts. So a waiter subscribes, looks,
waits for the hint, and looks again every few seconds. While Redis is away it goes on waiting: an outage is not a result.
A subscription that has heard nothing for a while asks whether it is still one, because a connection that was dropped on
the way says nothing at all. One event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import redis

from orchestra._delivery import read_record
from orchestra._keys import QueueKeys
from orchestra.connections import map_redis_error
from orchestra.errors import CorruptEntryError, StoreAuthError, StoreUnavailableError

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

logger = logging.getLogger("orchestra.replies")

LOOK_AGAIN = 2.0
"""Seconds after which a waiter looks at the record without having been told."""
SILENCE = 10.0
"""Seconds without a message after which the subscription is tested with a PING."""


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
        self._heard = False

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
            async with asyncio.timeout(timeout) as limit:
                while True:
                    record = await self._look(task_id)
                    if record is not None:
                        return record
                    done, _ = await asyncio.wait((future,), timeout=LOOK_AGAIN)
                    if done:
                        return future.result()
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"task {task_id} has no result after {timeout:g} s; it may still run") from None
        finally:
            futures = self._waiting[task_id]
            futures.discard(future)
            if not futures:
                del self._waiting[task_id]

    async def _look(self, task_id: str) -> dict[str, Any] | None:
        """The record, if there is one and Redis can say so now."""
        try:
            record = await self._manager.client.get(self._keys.result(task_id))
        except (redis.RedisError, OSError) as error:
            mapped = map_redis_error(error, address=self._manager.address.safe, doing="GET")
            if not isinstance(mapped, StoreUnavailableError):
                raise mapped from error
            logger.debug("the result of %s cannot be looked at now: %s", task_id, mapped)
            return None
        return None if record is None else read_record(record)

    async def _listen(self) -> None:
        failures = 0
        while True:
            try:
                await self._listen_once()
            except Exception as error:  # noqa: BLE001 - a lost hint costs LOOK_AGAIN seconds, never a result
                mapped = map_redis_error(error, address=self._manager.address.safe, doing="SUBSCRIBE")
                failures = 1 if self._subscribed.is_set() and self._heard else failures + 1
                log = logger.warning if failures == 1 or isinstance(mapped, StoreAuthError) else logger.debug
                log("results are looked for every %g s only: %s", LOOK_AGAIN, mapped)
                self._heard = False
                self._subscribed.set()  # waiters go on by looking
                await asyncio.sleep(LOOK_AGAIN * random.uniform(0.1, 1.0))  # noqa: S311 - spreads load

    async def _listen_once(self) -> None:
        channel, silent = self._keys.replies(self.client), 0.0
        async with self._manager.client.pubsub() as pubsub:
            await pubsub.subscribe(channel)
            while True:
                message = await pubsub.get_message(timeout=LOOK_AGAIN)
                silent = 0.0 if message is not None else silent + LOOK_AGAIN
                if message is None:
                    if silent >= SILENCE + LOOK_AGAIN:
                        raise redis.ConnectionError(f"a PING was not answered within {LOOK_AGAIN:g} s")
                    if silent >= SILENCE:
                        await pubsub.ping()
                elif message["type"] == "subscribe":
                    self._heard = True
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
        while task is not None and not task.done():
            task.cancel()  # again if need be: a client that is busy closing a broken connection may drop it
            await asyncio.wait((task,), timeout=1.0)
