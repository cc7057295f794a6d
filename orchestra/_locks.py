"""A lock shared by processes, on Redis: one owner token, a time to live, and a fence that only grows.

It is an efficiency lock unless the guarded resource checks the fence: an owner that is paused for longer than the time
to live does not know that it lost the lock (Kleppmann, "How to do distributed locking", 2016). After a failover the
fence counter may lag behind, because replication is asynchronous.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from types import TracebackType
from typing import Any, Self

from orchestra import _keys
from orchestra._link import Link
from orchestra._scripts import script
from orchestra.errors import LockError, StoreError
from orchestra.tasks import require_number


class RedisLock:
    """Enter with ``async with``; ``fence`` is valid while it is held.

    ``expire_time``: seconds (0.05 to 86,400) after which the lock frees itself. ``wait``: seconds that entering waits
    for it, by default as long as it takes.
    """

    def __init__(self, link: Link, name: str, expire_time: float, wait: float | None = None) -> None:
        require_number("expire_time", expire_time, 0.05, 86_400.0, unit="seconds")
        if wait is not None:
            require_number("wait", wait, 0.0, 86_400.0, unit="seconds")
        self._link = link
        self.name = name
        self._keys = _keys.lock(name)
        self._ttl_ms = round(expire_time * 1000)
        self._wait = wait
        self._token = secrets.token_hex(12)
        self.fence = 0

    async def acquire_nowait(self) -> bool:
        """Try once; True when held now. One round trip; asking again after a lost reply gives the same fence."""
        fence, self._busy_ms = await self._run("lock_acquire", self._keys, self._token, self._ttl_ms)
        self.fence = fence
        return bool(fence)

    async def acquire(self) -> None:
        """Wait for the lock, looking again when its time to live may be over or every 50 to 100 ms.

        Raises:
            LockError: it was not free within ``wait`` seconds.
        """
        try:
            async with asyncio.timeout(self._wait):
                while not await self.acquire_nowait():
                    await asyncio.sleep(min(self._busy_ms / 1000, random.uniform(0.05, 0.1)))  # noqa: S311
        except TimeoutError:
            await self._abandon()
            raise LockError(f"lock {self.name!r} was not free within {self._wait:g} s") from None
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.ensure_future(self._abandon()))
            raise

    async def extend(self) -> bool:
        """Start the time to live anew; False when the lock is no longer held. One round trip."""
        return bool(await self._run("lock_extend", self._keys[:1], self._token, self._ttl_ms))

    async def release(self) -> bool:
        """Free the lock; False when it was no longer held. One round trip."""
        self.fence = 0
        return bool(await self._run("lock_release", self._keys[:1], self._token))

    async def _abandon(self) -> None:
        """An acquire whose answer nobody awaits may have succeeded; if this fails too, the time to live ends it."""
        try:
            await self.release()
        except StoreError:
            self.fence = 0

    async def _run(self, name: str, keys: tuple[str, ...], *args: Any) -> Any:
        return await self._link.script(script(name), keys, args, self._ttl_ms / 1000)

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.release()
