"""Waits for results: one subscription per process and queue, and the records themselves as the truth.

A publication is only a hint that may be lost; the record under its key is what counts. So who waits subscribes first, has
the record looked for, waits for the hint, and has it looked for again every few seconds: one search for all that wait,
500 records a round trip. While Redis is away they go on waiting: an outage is not a result.
A subscription that has heard nothing for a while asks whether it is still one, because a connection that was dropped on
the way says nothing at all. One event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import redis

from orchestra._delivery import published_records, read_record
from orchestra._keys import QueueKeys
from orchestra.connections import map_redis_error
from orchestra.errors import CorruptEntryError, StoreAuthError, StoreUnavailableError

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

logger = logging.getLogger("orchestra.replies")

LOOK_AGAIN = 2.0
"""Seconds after which the records that are waited for are looked for without a hint."""
AT_ONCE = 500
"""Records looked for in one round trip."""
CLOSED = "the queue was closed while its result was waited for"
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
        self._unseen: dict[str, None] = {}
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._search: asyncio.Task[None] | None = None
        self._subscribed = asyncio.Event()
        self._heard = self._closed = False

    async def start(self) -> None:
        """Subscribe; returns when results published from now on will be heard. Raises StoreUnavailableError: it is closed."""
        if self._closed:
            raise StoreUnavailableError(CLOSED)
        if self._task is None or self._task.done():
            self._subscribed.clear()
            self._task = asyncio.get_running_loop().create_task(self._listen(), name="orchestra:replies")
        await self._subscribed.wait()
        if self._closed:
            raise StoreUnavailableError(CLOSED)

    async def wait(self, task_id: str, timeout: float | None) -> dict[str, Any]:
        """The terminal record of ``task_id``; see :meth:`~orchestra.task_queue.RedisStreamTaskQueue.wait_result`."""
        try:
            async with asyncio.timeout(timeout) as limit:
                await self.start()
                return await self._record_of(task_id)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"task {task_id} has no result after {timeout:g} s; it may still run") from None

    async def _record_of(self, task_id: str) -> dict[str, Any]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(task_id, set()).add(future)
        self._ask(task_id)
        try:
            return await future
        finally:
            futures = self._waiting[task_id]
            futures.discard(future)
            if not futures:
                del self._waiting[task_id]

    def _ask(self, task_id: str) -> None:
        self._unseen[task_id] = None
        self._asked.set()
        if self._search is None or self._search.done():
            self._search = asyncio.get_running_loop().create_task(self._look_for_all(), name="orchestra:results")

    async def _look_for_all(self) -> None:
        """Look for what is asked for, at once, and for all that is waited for, every few seconds; ends when nothing is."""
        loop = asyncio.get_running_loop()
        sweep = loop.time() + LOOK_AGAIN
        try:
            while self._waiting:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(sweep):
                        await self._asked.wait()
                self._asked.clear()
                wanted, self._unseen = self._unseen, {}
                if loop.time() >= sweep:
                    wanted, sweep = dict.fromkeys(self._waiting), loop.time() + LOOK_AGAIN
                await self._look(list(wanted))
        except Exception as error:  # noqa: BLE001 - whoever waits is told; the next who asks begins anew
            self._fail(error)

    async def _look(self, task_ids: Sequence[str]) -> None:
        """Tell of the records that there are, if Redis can say so now."""
        for start in range(0, len(task_ids), AT_ONCE):
            part = task_ids[start : start + AT_ONCE]
            try:
                found = await self._manager.client.mget([self._keys.result(task_id) for task_id in part])
            except (redis.RedisError, OSError) as error:
                mapped = map_redis_error(error, address=self._manager.address.safe, doing="MGET")
                if not isinstance(mapped, StoreUnavailableError):
                    raise mapped from error
                logger.debug("%d results cannot be looked at now: %s", len(part), mapped)
                return
            for task_id, record in zip(part, found, strict=True):
                if record is not None:
                    self._resolve(task_id, record)

    def _resolve(self, task_id: str, record: bytes) -> None:
        for future in self._waiting.get(task_id, ()):
            if not future.done():
                try:
                    future.set_result(read_record(record))
                except CorruptEntryError as error:
                    future.set_exception(error)

    def _fail(self, error: Exception) -> None:
        for futures in self._waiting.values():
            for future in futures:
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # whoever gives up at this moment leaves nothing unheard

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
        for record in published_records(data):
            if self._on_record is not None:
                self._on_record(record)
            for future in self._waiting.get(str(record.get("id")), ()):
                if not future.done():
                    future.set_result(record)

    async def close(self) -> None:
        """Unsubscribe. Whoever waits is told that nothing will come: StoreUnavailableError."""
        self._closed = True
        tasks, self._task, self._search = (self._task, self._search), None, None
        for task in tasks:
            while task is not None and not task.done():
                task.cancel()  # again if need be: a client that is busy closing a broken connection may drop it
                await asyncio.wait((task,), timeout=1.0)
        self._subscribed.set()
        self._fail(StoreUnavailableError(CLOSED))
