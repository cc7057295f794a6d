"""Who waits on an in-memory queue: wake-ups without polling, and the lock that is built from them.

A waiter waits on a *topic* and is rung when it should look again; a ring means "look", never "it is yours", so a ring
too many costs a look and nothing else. What must not happen is a ring too few: one that reaches a waiter which was
cancelled in the same moment is passed on. One event loop; nothing here awaits while its tables are inconsistent.
"""

from __future__ import annotations

import asyncio
import secrets
import weakref
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from orchestra.errors import LockError
from orchestra.tasks import check_name, require_number

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from types import TracebackType

    from orchestra._clock import Clock
    from orchestra._queue.twin_store import MemoryStore

ALL = 1 << 60


@runtime_checkable
class _Advancing(Protocol):
    """A clock that says when it moved, so that nobody has to sleep until it does."""

    def on_advance(self, callback: Callable[[], None]) -> Callable[[], None]: ...


class Bells:
    """Wakes waiters of a topic, oldest first.

    ``manual``: time passes only when the clock is told to, which wakes everybody; real timers must not wait for it.
    """

    def __init__(self, clock: Clock) -> None:
        self._waiting: dict[Hashable, dict[asyncio.Future[bool], str]] = {}
        self.manual = False
        if isinstance(clock, _Advancing):
            self.manual = True
            clock.on_advance(self._ring_everybody)

    def ring(self, topic: Hashable, count: int = ALL) -> None:
        """Wake up to ``count`` waiters of ``topic``."""
        waiting = self._waiting.get(topic)
        while waiting and count > 0:
            future = next(iter(waiting))
            del waiting[future]
            if not future.done():
                future.set_result(True)
                count -= 1

    def dismiss(self, topic: Hashable, who: str) -> None:
        """End the waits of ``who``."""
        for future, name in self._waiting.get(topic, {}).items():
            if name == who and not future.done():
                future.set_result(False)

    def _ring_everybody(self) -> None:
        for topic in [*self._waiting]:
            self.ring(topic)

    async def wait(self, topic: Hashable, seconds: float, who: str = "") -> bool:
        """Wait for a ring, at most ``seconds``; False when dismissed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        waiting = self._waiting.setdefault(topic, {})
        waiting[future] = who
        timer = loop.call_later(min(seconds, 86_400.0), _look, future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.ring(topic, 1)
            raise
        finally:
            timer.cancel()
            waiting.pop(future, None)
            if not waiting and self._waiting.get(topic) is waiting:
                del self._waiting[topic]


def _look(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(True)


class MemoryLock:
    """Enter with ``async with``; ``fence`` is valid while it is held.

    ``expire_time``: seconds (0.05 to 86,400) of the queue's clock after which the lock frees itself. ``wait``: seconds
    that entering waits for it, by default as long as it takes. ``renew``: prolong it while it is held, three times per
    ``expire_time``. ``lost`` is set when it expired while it was held. Acquiring what this object holds confirms it.
    """

    def __init__(
        self,
        store: MemoryStore,
        bells: Bells,
        name: str,
        expire_time: float,
        wait: float | None,
        *,
        renew: bool = True,
    ) -> None:
        require_number("expire_time", expire_time, 0.05, 86_400.0, unit="seconds")
        if wait is not None:
            require_number("wait", wait, 0.0, 86_400.0, unit="seconds")
        self._store = store
        self._bells = bells
        self.name = check_name("lock name", name)
        self._ttl = expire_time
        self._wait = wait
        self._token = secrets.token_hex(12)
        self._busy_for = 0.0
        self._renew = renew
        self._keeper: asyncio.Task[None] | None = None
        self.fence = 0
        self.lost = asyncio.Event()

    @property
    def held(self) -> bool:
        """Whether the lock is still held: acquired, not released, not expired."""
        return self.fence > 0 and not self.lost.is_set() and self._store.holds_lock(self.name, self._token)

    def _try(self) -> bool:
        self.fence, self._busy_for = self._store.lock(self.name, self._token, self._ttl)
        if self.fence and (self._keeper is None or self._keeper.done()):
            self.lost.clear()
            keeping = _keep(weakref.ref(self), self._bells, ("held", self.name, self._token))
            self._keeper = asyncio.get_running_loop().create_task(keeping, name=f"orchestra:lock:{self.name}")
        return bool(self.fence)

    def _renewed(self) -> bool:
        """Whether it is still held; prolonged then, if that is wanted."""
        if self._renew:
            self._store.extend_lock(self.name, self._token, self._ttl)
        return self.held

    async def acquire_nowait(self) -> bool:
        """Try once; True when held now."""
        await asyncio.sleep(0)
        return self._try()

    async def acquire(self) -> None:
        """Wait for the lock.

        Raises:
            LockError: it was not free within ``wait`` seconds.
        """
        await asyncio.sleep(0)
        clock = asyncio.get_running_loop().time
        deadline = clock() + (float("inf") if self._wait is None else self._wait)
        while not self._try():
            left = deadline - clock()
            if left <= 0:
                raise LockError(f"lock {self.name!r} was not free within {self._wait:g} s")
            await self._bells.wait(self._topic, left if self._bells.manual else min(left, self._busy_for))

    @property
    def _topic(self) -> tuple[str, str]:
        return ("lock", self.name)

    async def extend(self) -> bool:
        """Start the time to live anew; False when the lock is no longer held."""
        await asyncio.sleep(0)
        return self._store.extend_lock(self.name, self._token, self._ttl)

    async def release(self) -> bool:
        """Free the lock; False when it was no longer held."""
        self.fence = 0
        if self._keeper is not None:
            self._keeper.cancel()
        self._keeper = None
        released = self._store.unlock(self.name, self._token)  # first: a cancelled release has released
        if released:
            self._bells.ring(self._topic, 1)
        await asyncio.sleep(0)
        return released

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.release()


async def _keep(ref: weakref.ref[MemoryLock], bells: Bells, topic: Hashable) -> None:
    """Renew a lock until it is lost or nobody has it any more; looks at once when the clock was moved by hand."""
    while (lock := ref()) is not None and lock._renewed():
        pause = lock._ttl / 3
        del lock
        await bells.wait(topic, pause)
    if lock is not None:
        lock.lost.set()
