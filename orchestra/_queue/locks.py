"""A lock shared by processes, on Redis: one token per tenure, a time to live that its holder renews, a growing fence.

Owns acquiring, renewing and knowing when the lock is lost. It is an efficiency lock unless the guarded resource checks
the fence: a holder that is paused for longer than the time to live learns of its loss only when it goes on (Kleppmann,
"How to do distributed locking", 2016). Fences start from the Redis clock, so they grow over expiry, deletion and
restarts; they may repeat or fall back only when that clock does, as after a failover to a server whose clock is behind.
Refuses to own what is guarded, and fairness: waiters poll.

One event loop for a lock object, and one task that uses it. The renewing task ends with the tenure, and when nobody
has the object any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
import weakref
from types import TracebackType
from typing import Any, Self

from orchestra import _keys
from orchestra._redis.link import Link
from orchestra._scripts import script
from orchestra.errors import LockError, StoreError
from orchestra.tasks import require_number

logger = logging.getLogger("orchestra.locks")

RENEWALS = 3
"""Renewals per time to live: two may fail before the lock is lost."""
ONE_TRY = 1.0
"""Seconds that one attempt to acquire has, however short ``wait`` is."""
ABANDON = 1.0
"""Seconds for taking back an acquire that was cancelled; afterwards the time to live does it."""


class RedisLock:
    """Enter with ``async with``; ``fence`` is valid while it is held.

    ``expire_time``: seconds (0.05 to 86,400) after which the lock frees itself when it is not renewed. ``wait``: seconds
    that entering waits for it, by default as long as it takes. ``renew``: prolong it while it is held, three times per
    ``expire_time``; a blocked event loop cannot.

    ``lost`` is set when a renewal finds the lock gone, or ``expire_time`` after the last successful one was sent, by
    this process's monotonic clock; nothing is raised by itself.
    """

    def __init__(
        self, link: Link, name: str, expire_time: float, wait: float | None = None, *, renew: bool = True
    ) -> None:
        require_number("expire_time", expire_time, 0.05, 86_400.0, unit="seconds")
        if wait is not None:
            require_number("wait", wait, 0.0, 86_400.0, unit="seconds")
        self._link = link
        self.name = name
        self._keys = _keys.lock(name)
        self._ttl = expire_time
        self._wait = wait
        self._renew = renew
        self._token = secrets.token_hex(12)
        self._until = self._busy = 0.0
        self._pause = expire_time / RENEWALS
        self._keeper: asyncio.Task[None] | None = None
        self._forsaken = False
        self.fence = 0
        self.lost = asyncio.Event()

    @property
    def held(self) -> bool:
        """Whether the lock is surely still held: acquired, not released, not lost, its time to live not over."""
        return self.fence > 0 and not self.lost.is_set() and time.monotonic() < self._until

    async def acquire_nowait(self) -> bool:
        """Try once; True when held now. Asking again confirms it, with the same fence, also after a lost reply.

        Raises:
            StoreUnavailableError: Redis was unavailable for ``expire_time`` seconds; the lock may be held until it
                expires, and asking again tells.
        Cost: one round trip.
        """
        if self.lost.is_set():
            self._end_tenure()
        before, self._forsaken = self.fence, False
        try:
            fence = await self._ask()
        except asyncio.CancelledError:
            if not before:
                await asyncio.shield(asyncio.ensure_future(self._abandon()))
            raise
        self.fence = fence
        if fence and self._keeper is None:
            self.lost.clear()
            keeping = _keep(weakref.ref(self))
            self._keeper = asyncio.get_running_loop().create_task(keeping, name=f"orchestra:lock:{self.name}")
        return bool(fence)

    async def acquire(self) -> None:
        """Wait for the lock, looking again when its time to live may be over or every 50 to 100 ms.

        Raises:
            LockError: it was not free within ``wait`` seconds.
            StoreUnavailableError: Redis was unavailable for ``expire_time`` seconds.
        """
        deadline = None if self._wait is None else time.monotonic() + self._wait
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), ONE_TRY)):
                    if await self.acquire_nowait():
                        return
            pause = min(self._busy, random.uniform(0.05, 0.1))  # noqa: S311
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise LockError(f"lock {self.name!r} was not free within {self._wait:g} s")
                pause = min(left, pause)
            await asyncio.sleep(pause)

    async def extend(self) -> bool:
        """Start the time to live anew; False when the lock is no longer held. One round trip."""
        sent = time.monotonic()
        if self.lost.is_set() or not await self._run("lock_extend", self._keys[:1], self._token, self._ttl_ms):
            return False
        self._until = max(self._until, sent + self._ttl)
        return True

    async def release(self) -> bool:
        """Free the lock and stop renewing it; False when it was no longer held. One round trip.

        Raises:
            StoreUnavailableError: Redis was unavailable until the lock expired.
        """
        token, held = self._token, not self.lost.is_set()
        left = max(0.0, self._until - time.monotonic())
        self._end_tenure()
        if self._forsaken:
            return False
        freeing = asyncio.ensure_future(self._run("lock_release", self._keys[:1], token, patience=left))
        return bool(await asyncio.shield(freeing)) and held  # a release that is cancelled goes on: no one else can

    def forsake(self) -> None:
        """Stop renewing, and tell: the connection is being closed. The time to live frees the lock."""
        self._forsaken = True
        if self._keeper is not None:
            self._stop_keeping()
            self.lost.set()

    # Inside

    @property
    def _ttl_ms(self) -> int:
        return round(self._ttl * 1000)

    def _end_tenure(self) -> None:
        """Forget the tenure. The next has a token of its own: what is still on its way cannot touch it."""
        self._stop_keeping()
        self.fence, self._until, self._token = 0, 0.0, secrets.token_hex(12)

    def _stop_keeping(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()

    async def _ask(self) -> int:
        """The fence when acquired, else 0; again when the answer took longer than the lock lives."""
        while True:
            sent = time.monotonic()
            fence, busy_ms = await self._run("lock_acquire", self._keys, self._token, self._ttl_ms)
            self._busy = busy_ms / 1000
            if not fence or time.monotonic() < sent + self._ttl:
                self._until = sent + self._ttl if fence else 0.0
                return int(fence)

    async def _renew_in_time(self, left: float) -> bool:
        """Renew, with ``left`` seconds for it; False when the lock is gone for sure. A failure may be repeated."""
        self._pause = self._ttl / RENEWALS
        try:
            async with asyncio.timeout(left):
                return await self.extend()
        except (StoreError, TimeoutError) as error:
            logger.warning("lock %s was not renewed: %s", self.name, error or "no answer in time")
            self._pause /= 4
            return True

    async def _abandon(self) -> None:
        """An acquire whose answer nobody awaits may have succeeded; if this fails too, the time to live ends it."""
        token = self._token
        self._end_tenure()
        try:
            async with asyncio.timeout(ABANDON):
                await self._run("lock_release", self._keys[:1], token, patience=0.0)
        except (StoreError, TimeoutError) as error:
            logger.debug("lock %s could not be taken back: %s", self.name, error)

    async def _run(self, name: str, keys: tuple[str, ...], *args: Any, patience: float | None = None) -> Any:
        return await self._link.script(script(name), keys, args, self._ttl if patience is None else patience)

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self.release()
        except StoreError as error:  # it must not hide what the block raised or did; the time to live frees the lock
            logger.warning("lock %s could not be released and will expire: %s", self.name, error)


async def _keep(ref: weakref.ref[RedisLock]) -> None:
    """Renew a lock until it is lost, and tell; ended by its cancellation, and when nobody has the lock any more."""
    try:
        while (lock := ref()) is not None and (left := lock._until - time.monotonic()) > 0:
            renews = lock._renew
            pause = min(left, lock._pause) if renews else left
            del lock
            await asyncio.sleep(pause)
            lock = ref()
            left = lock._until - time.monotonic() if renews and lock is not None else 0.0
            if lock is not None and left > 0 and not await lock._renew_in_time(left):
                break
    except Exception:
        logger.exception("a lock is given up")
    if (lock := ref()) is not None:
        lock._keeper = None
        lock.lost.set()
