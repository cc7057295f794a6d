"""Rate limits that every process on the same Redis shares: GCRA with costs, priorities, refusing or waiting.

Owns admission: who may go now, who is refused and for how long, who waits behind whom. Refuses to own what a refusal
means to a task (the dispatcher's business) and the arithmetic (``lua/gcra.lua`` decides, ``_ext.gcra`` predicts).

The rule (ITU-T I.371, virtual scheduling): over every window of W seconds the admitted cost is at most
``burst + rate * W / period``, by the clock of Redis. One pump task per limiter asks Redis, one call at a time: what
arrives within a tick or while a call is under way travels together in the next call, most urgent first.
One event loop only; not thread-safe. No ``await`` lies between looking at the queue and taking from it.
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
import itertools
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Self, TypeVar

from orchestra import _keys, _scripts, telemetry
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra._ext.gcra import GcraTable, check
from orchestra._limits import (
    Admission,
    BackpressureConfig,
    BackpressureStrategy,
    FlowControlMetrics,
    RateLimitConfig,
    Verdict,
)
from orchestra._shared import Connectable, shared
from orchestra.connections import default_address, get_connection_manager, map_redis_error, parse_address
from orchestra.errors import (
    BackpressureRejectedError,
    ConfigurationError,
    OrchestraError,
    StoreFullError,
    StoreUnavailableError,
)
from orchestra.tasks import check_ident

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType

    from orchestra.connections import Address, ConnectionManager

__all__ = [
    "Admission",
    "BackpressureConfig",
    "BackpressureRejectedError",
    "BackpressureStrategy",
    "FlowControlMetrics",
    "RateLimitConfig",
    "RedisRateLimiter",
    "get_flow_controller",
]

logger = logging.getLogger("orchestra.flow_control")

R = TypeVar("R")

MAX_BATCH = 512
"""Requests in one call: bounds how long one script may occupy Redis (about 0.3 ms)."""

_TRUST_S = 1.0
"""How long an answer of Redis is believed: bounds wrong refusals after a failover lost the limit's state."""


class _Request:
    """One ``acquire``. ``wait`` turns False when its ``max_wait`` has passed: the next refusal is final."""

    __slots__ = ("asked", "cost", "future", "in_line", "rank", "tolerance_us", "wait")

    def __init__(self, urgency: int, cost: int, tolerance_us: int, wait: bool, number: int) -> None:
        self.cost = cost
        self.tolerance_us = tolerance_us
        self.wait = wait
        self.asked = False
        self.in_line = False
        self.rank = (-urgency, number)
        self.future: asyncio.Future[Admission] = asyncio.get_running_loop().create_future()

    def __lt__(self, other: _Request) -> bool:
        return self.rank < other.rank


class _RedisStore:
    """The limit's state in Redis; one script call is one round trip."""

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self._keys = (_keys.limiter(name),)

    async def ask(self, limit: RateLimitConfig, batch: Sequence[_Request], ordered: bool) -> Verdict:
        args = [limit.emission_us, limit.burst_us, int(ordered)]
        for request in batch:
            args += (request.cost, limit.burst_us - request.tolerance_us)
        now_us, tat_us, *waits_us = await _scripts.call(self._client, "gcra", self._keys, args)
        return Verdict(now_us, tat_us, waits_us)


class _MemoryStore:
    """The limit's state in this process, for ``memory:``; the same decisions as ``lua/gcra.lua``."""

    def __init__(self, tats: dict[str, int], name: str, clock: Clock) -> None:
        self._tats, self._name, self._clock = tats, name, clock

    async def ask(self, limit: RateLimitConfig, batch: Sequence[_Request], ordered: bool) -> Verdict:
        return self.decide(int(self._clock.monotonic() * 1e6), limit, batch, ordered)

    def decide(self, now_us: int, limit: RateLimitConfig, batch: Sequence[_Request], ordered: bool) -> Verdict:
        tat = line = min(max(self._tats.get(self._name, now_us), now_us), now_us + limit.burst_us)
        waits: list[int] = []
        blocked = False
        for request in batch:
            allowed, after, wait, _ = check(line, now_us, request.cost, limit.emission_us, request.tolerance_us)
            if allowed and not blocked:
                tat = line = after
                waits.append(0)
                continue
            # check() knows the tolerance only; a debt that reaches into the reserve has to be paid off as well
            over = max(0, line - now_us - request.tolerance_us)
            waits.append(max(1, wait + over))
            if ordered:
                blocked = True
                line += request.cost * limit.emission_us
        self._tats[self._name] = tat
        return Verdict(now_us, tat, waits)


def _address_of(manager: ConnectionManager | str | None) -> Address:
    if manager is None:
        return default_address()
    return parse_address(manager) if isinstance(manager, str) else manager.address


class RedisRateLimiter(Connectable):
    """A rate limit called ``name``, shared by all limiters of that name on the same Redis.

    Every limiter of one name should have the same configuration; Redis stores only when the next permit is due.
    In contrast to :class:`~orchestra.tasks.TaskPriority`, a *larger* ``priority`` is *more* urgent here, as the
    specification has it: 0 and below is ordinary, 3 and above the most urgent.

    ``name``: 1 to 128 printable ASCII characters without spaces. ``manager``: the connection or an address, by
    default the shared one; with the address ``memory:`` the limit is kept in this process. Constructing costs no round
    trip; each request costs at most one (shared with all that ask at the same moment), and none when the last answer
    proves a refusal.

    Raises:
        ConfigurationError: the name or the configuration is not valid.
    """

    def __init__(
        self,
        name: str,
        config: BackpressureConfig | None = None,
        *,
        manager: ConnectionManager | str | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.name = str(check_ident("limiter name", name))
        self.config = config or BackpressureConfig()
        if not isinstance(self.config, BackpressureConfig):
            raise ConfigurationError(f"config must be a BackpressureConfig, got {config!r}", field="config")
        self.metrics = FlowControlMetrics()
        self._limit = self.config.rate_limit
        self._waits = self.config.strategy is BackpressureStrategy.WAIT
        self._manager = manager
        self._address = _address_of(manager)
        self._clock = clock
        self._known = GcraTable(1, max_age_us=int(_TRUST_S * 1e6))
        self._answer: tuple[int, float] = (-(2**62), 0.0)  # TAT minus Redis now, µs, at that local moment, seconds
        self._open = False  # whether the last call failed open; for one log line an outage
        self._line: list[_Request] = []  # heap of those who wait; may hold some that were cancelled or have expired
        self._left = 0  # how many became such leftovers since the line was last tidied
        self._tries: deque[_Request] = deque()
        self._numbers = itertools.count()
        self._pump: asyncio.Task[None] | None = None
        self._kick = asyncio.Event()

    # -- the specification

    async def acquire(self, priority: int = 0, cost: int = 1) -> bool:
        """Take ``cost`` permits; False when refused (under WAIT: when not admitted within ``max_wait``).

        Cancellation gives up the place in the queue; a permit that Redis has given in that very moment is lost.

        Raises:
            ConfigurationError: ``cost`` is not a whole number from 1 to what the limit can ever admit at this priority.
            StoreUnavailableError: Redis cannot be asked, unless ``fail_open``.
        """
        return (await self._admit(priority, cost, self._waits)).allowed

    def release(self) -> None:
        """Do nothing: a permit is used up by time, not given back."""

    async def execute(
        self,
        func: Callable[..., Awaitable[R]],
        *args: Any,
        priority: int = 0,
        cost: int = 1,
        **kwargs: Any,
    ) -> R:
        """``await func(*args, **kwargs)`` once admitted.

        Raises:
            BackpressureRejectedError: refused; ``func`` was not called. ``.retry_after`` is in seconds.
            TypeError: ``func`` is not callable, or what it returns cannot be awaited.
        """
        if not callable(func):
            raise TypeError(f"execute needs an async function, got {func!r}")
        await self._acquire_or_raise(priority, cost)
        pending = func(*args, **kwargs)
        if not inspect.isawaitable(pending):
            raise TypeError(f"execute needs an async function, but {func!r} returned {type(pending).__name__}")
        return await pending

    async def __aenter__(self) -> Self:
        await self._acquire_or_raise(0, 1)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    # -- beyond it

    @property
    def interval(self) -> float:
        """Seconds between two permits at the configured rate."""
        return self._limit.emission_us / 1e6

    async def try_acquire(self, priority: int = 0, cost: int = 1) -> Admission:
        """Like :meth:`acquire`, but never waits for a permit, never passes those who do, and tells the facts."""
        return await self._admit(priority, cost, False)

    def refused_for(self, priority: int = 0, cost: int = 1) -> float:
        """Seconds for which the last answer of Redis proves a refusal; 0.0 when it proves none. No round trip."""
        return self._refusal(cost, self.config.weigh(priority, cost)[1])

    # -- asking

    async def _connect(self) -> None:
        await self._reach()

    async def _reach(self) -> _RedisStore | _MemoryStore:
        if self._address.scheme == "memory":
            tats: dict[str, int] = shared("limiter state", self._address.safe, dict)
            return _MemoryStore(tats, self.name, self._clock)
        manager = self._manager
        if manager is None or isinstance(manager, str):
            manager = get_connection_manager(manager)  # each time: a shared manager that was closed has a successor
        if not manager.connected:
            await manager.connect()
        return _RedisStore(manager.client, self.name)

    async def _admit(self, priority: int, cost: int, wait: bool) -> Admission:
        urgency, tolerance_us = self.config.weigh(priority, cost)
        max_wait = self.config.max_wait if wait else 0.0
        wait = max_wait != 0.0
        refusal = self._refusal(cost, tolerance_us)
        if refusal and max_wait is not None and refusal > max_wait:
            return self._count(Admission(False, refusal, self._remaining()), cost, local=True)
        request = _Request(urgency, cost, tolerance_us, wait, next(self._numbers))
        self._enqueue(request)
        expiry = wait and max_wait and asyncio.get_running_loop().call_later(max_wait, self._expire, request)
        try:
            admission = await request.future
        except asyncio.CancelledError:
            self._cancelled(request)
            raise
        except OrchestraError:
            self.metrics.failed += 1
            raise
        finally:
            if expiry:
                expiry.cancel()
        return self._count(admission, cost, local=not request.asked)

    def _count(self, admission: Admission, cost: int, *, local: bool) -> Admission:
        if admission.allowed:
            self.metrics.acquired += 1
            if telemetry.wanted("limiter.acquired"):
                telemetry.emit("limiter.acquired", {"cost": cost}, {"limiter": self.name})
        else:
            self.metrics.rejected += 1
            self.metrics.rejected_locally += local
            if telemetry.wanted("limiter.rejected"):
                facts = {"cost": cost, "retry_after_s": admission.retry_after}
                telemetry.emit("limiter.rejected", facts, {"limiter": self.name, "local": local})
        return admission

    async def _acquire_or_raise(self, priority: int, cost: int) -> None:
        admission = await self._admit(priority, cost, self._waits)
        if not admission.allowed:
            raise BackpressureRejectedError(
                f"the rate limit {self.name!r} refused {cost} permits; try again in {admission.retry_after:.3g} s",
                retry_after=admission.retry_after,
                limiter=self.name,
            )

    # -- what is known without asking

    def _refusal(self, cost: int, tolerance_us: int) -> float:
        """Seconds for which a refusal is proven, else 0.0. Never proves one that Redis would not give."""
        local_us = int(self._clock.monotonic() * 1e6)
        wait_us = self._known.refused_for(self.name, cost, local_us, self._limit.emission_us, tolerance_us)
        return max(wait_us / 1e6, self._due_in(cost, tolerance_us)) if wait_us else 0.0

    def _due_in(self, cost: int, tolerance_us: int) -> float:
        """Seconds until Redis admits ``cost`` for certain if nobody else asks, by the last answer; else 0.0."""
        debt_us, answered = self._answer
        passed = self._clock.monotonic() - answered
        if passed > _TRUST_S:
            return 0.0
        return max(0.0, (debt_us + cost * self._limit.emission_us - tolerance_us) / 1e6 - passed)

    def _remaining(self) -> int:
        debt_us, answered = self._answer
        debt_us = max(0, debt_us - int((self._clock.monotonic() - answered) * 1e6))
        return (self._limit.burst_us - debt_us) // self._limit.emission_us

    # -- the queue; nothing from here to the pump awaits

    def _enqueue(self, request: _Request) -> None:
        if request.wait:
            self._push(request)
        else:
            self._tries.append(request)
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._run(), name=f"orchestra:limiter {self.name}")
        elif not request.wait or self._line[0] is request:
            self._kick.set()

    def _push(self, request: _Request) -> None:
        request.in_line = True
        heapq.heappush(self._line, request)

    def _pop(self) -> _Request:
        request = heapq.heappop(self._line)
        request.in_line = False
        return request

    def _head(self) -> _Request | None:
        while self._line and self._line[0].future.done():
            self._pop()
        return self._line[0] if self._line else None

    def _tidy(self) -> None:
        """Somebody in the line was answered or cancelled: keep such leftovers below half of it, and let the next ask."""
        self._left += 1
        if self._left * 2 > len(self._line):
            self._line = [request for request in self._line if not request.future.done()]
            heapq.heapify(self._line)
            self._left = 0
        self._kick.set()

    def _expire(self, request: _Request) -> None:
        request.wait = False
        if request.in_line and not request.future.done():
            wait = self._due_in(request.cost, request.tolerance_us)
            request.future.set_result(Admission(False, wait, self._remaining()))
            self._tidy()

    def _cancelled(self, request: _Request) -> None:
        self.metrics.cancelled += 1
        future = request.future
        if not future.cancelled() and future.exception() is None and future.result().allowed:
            self.metrics.abandoned += 1
        if request.in_line:
            self._tidy()

    def _ready(self) -> list[_Request]:
        """Take those off the head of the line that are due together."""
        batch: list[_Request] = []
        total = 0
        while (head := self._head()) is not None and len(batch) < MAX_BATCH:
            total += head.cost
            if batch and total * self._limit.emission_us > head.tolerance_us:
                break
            if self._due_in(total, head.tolerance_us) > 0:
                break
            batch.append(self._pop())
        return batch

    def _undecided(self) -> list[_Request]:
        """Take those of the tries that only Redis can answer; the others are answered here."""
        batch: list[_Request] = []
        while self._tries and len(batch) < MAX_BATCH:
            request = self._tries.popleft()
            if request.future.done():
                continue
            refusal = self._refusal(request.cost, request.tolerance_us)
            head = self._head()
            if not refusal and head is not None and head < request:
                refusal = self._due_in(head.cost, head.tolerance_us) + request.cost * self._limit.emission_us / 1e6
            if not refusal:
                batch.append(request)
            else:
                request.future.set_result(Admission(False, refusal, self._remaining()))
        return sorted(batch)

    # -- the pump: lives while somebody wants something

    async def _run(self) -> None:
        try:
            while self._tries or self._head() is not None:
                ready = self._ready()
                if ready:
                    await self._ask(ready, ordered=True)
                tries = self._undecided()
                if tries:
                    await self._ask(tries, ordered=False)
                if not ready and not tries:
                    await self._pause()
        finally:
            self._pump = None
            for request in (*self._line, *self._tries):  # none, unless the pump itself was cancelled
                request.future.cancel()
            self._line.clear()
            self._tries.clear()

    async def _pause(self) -> None:
        head = self._head()
        if head is None:
            return
        self._kick.clear()
        try:
            async with asyncio.timeout(min(self._due_in(head.cost, head.tolerance_us), _TRUST_S)):
                await self._kick.wait()
        except TimeoutError:
            return

    async def _ask(self, batch: list[_Request], *, ordered: bool) -> None:
        for request in batch:
            request.asked = True
        try:
            store = await self._reach()
            sent_us = int(self._clock.monotonic() * 1e6)
            self.metrics.calls += 1
            self._settle(batch, await store.ask(self._limit, batch, ordered), sent_us)
        except Exception as error:  # noqa: BLE001 - whatever it is, those who asked must hear of it
            self._fail(batch, error)
        except asyncio.CancelledError:
            for request in batch:
                request.future.cancel()
            raise

    def _settle(self, batch: list[_Request], verdict: Verdict, sent_us: int) -> None:
        self._known.observe(self.name, verdict.tat_us, verdict.now_us, sent_us)
        self._answer = (verdict.tat_us - verdict.now_us, self._clock.monotonic())
        self._open = False
        remaining = self._remaining()
        for request, wait_us in zip(batch, verdict.waits_us, strict=True):
            if request.future.done():
                self.metrics.abandoned += not wait_us
            elif wait_us and request.wait:
                self._push(request)
            else:
                request.future.set_result(Admission(not wait_us, wait_us / 1e6, remaining))

    def _fail(self, batch: list[_Request], error: Exception) -> None:
        mapped = map_redis_error(error, doing=f"rate limit {self.name!r}")
        admit = self.config.fail_open and isinstance(mapped, StoreUnavailableError | StoreFullError)
        if admit and not self._open:
            self._open = True
            logger.warning("rate limit %s is open until Redis answers again: %s", self.name, mapped)
        for request in batch:
            if request.future.done():
                continue
            if admit:
                self.metrics.failed_open += 1
                request.future.set_result(Admission(True, 0.0, 0))
            else:
                request.future.set_exception(mapped)


def get_flow_controller(name: str = "default", config: BackpressureConfig | None = None) -> RedisRateLimiter:
    """The limiter called ``name`` that everything in this event loop shares; may be awaited, which connects it.

    ``config`` counts when the limiter is made; later calls may leave it out.

    Raises:
        ConfigurationError: ``config`` differs from the one that the limiter was made with, or ``name`` is not valid.
    """
    check_ident("limiter name", name)
    limiter = shared("flow controller", name, lambda: RedisRateLimiter(name, config))
    if config is not None and config != limiter.config:
        raise ConfigurationError(
            f"the flow controller {name!r} exists with {limiter.config!r}; got another config, {config!r}: "
            "give it another name, or leave the config out",
            field="config",
            value=config,
        )
    return limiter
