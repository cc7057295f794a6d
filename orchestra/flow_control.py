"""Rate limits that every process on the same Redis shares: GCRA with costs, keys, priorities, refusing or waiting.

Owns admission: who may go now, who is refused and for how long, under one limit or under several at once. Refuses to own
what a refusal means to a task (the dispatcher's business), the arithmetic (``lua/gcra.lua`` decides, ``_ext.gcra``
predicts), how questions travel (:mod:`orchestra._limiting.store`) and who waits behind whom (:mod:`orchestra._limiting.line`).

The rule (ITU-T I.371, virtual scheduling): over every window of W seconds the admitted cost is at most
``burst + rate * W / period``, by the clock of Redis, for each key of a limit. One event loop only; not thread-safe.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from orchestra import _keys, telemetry
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra._ext.gcra import GcraTable
from orchestra._limiting.joint import acquire_all, try_acquire_all
from orchestra._limiting.line import Line
from orchestra._limiting.permit_leases import Leases
from orchestra._limiting.refusals import Refusals
from orchestra._limiting.request import Request
from orchestra._limiting.rules import (
    Admission,
    BackpressureConfig,
    BackpressureStrategy,
    FlowControlMetrics,
    RateLimitConfig,
    Setting,
    require_key,
    require_wait,
)
from orchestra._limiting.settings import LimitStatus, list_limits, reset_limit, set_limit
from orchestra._limiting.store import ORDERED, QUEUE, Answer, LimitStore, Use, address_of, find_store
from orchestra._shared import Connectable, shared
from orchestra.errors import (
    BackpressureRejectedError,
    ConfigurationError,
    OrchestraError,
    StoreFullError,
    StoreUnavailableError,
)
from orchestra.tasks import check_ident, check_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from orchestra.connections import ConnectionManager

__all__ = [
    "Admission",
    "BackpressureConfig",
    "BackpressureRejectedError",
    "BackpressureStrategy",
    "FlowControlMetrics",
    "LimitStatus",
    "RateLimitConfig",
    "RedisRateLimiter",
    "acquire_all",
    "get_flow_controller",
    "list_limits",
    "reset_limit",
    "set_limit",
    "try_acquire_all",
]

logger = logging.getLogger("orchestra.flow_control")

R = TypeVar("R")

KEYS_KNOWN = 4096
"""Keys of a limiter whose last answer is remembered; the one answered longest ago goes first."""
_TRUST_S = 1.0
"""How long an answer of Redis is believed: bounds wrong refusals after a failover lost the limit's state."""


class RedisRateLimiter(Connectable):
    """A rate limit called ``name``, shared by all limiters of that name on the same Redis.

    Every limiter of one name should have the same configuration; what is set at run time (``orchestra limits set``,
    :func:`set_limit`) goes before it in every process within a second. With a ``key``, each key has a limit of its own by
    the one configuration; a name with a placeholder, such as ``"openai:{tenant}"``, demands a key. In contrast to
    :class:`~orchestra.tasks.TaskPriority`, a *larger* ``priority`` is *more* urgent here, as the specification has it: 0 and
    below is ordinary, 3 and above the most urgent.

    ``name``: 1 to 128 printable ASCII characters without spaces. ``manager``: the connection or an address, by
    default the shared one; with the address ``memory:`` the limit is kept in this process. ``scope``: limits that are
    asked together have the same one; all of it lies in one slot of a Cluster. Constructing costs no round trip; each request
    costs at most one (shared with all that ask at the same moment), and none when the last answer proves a refusal.

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
        scope: str = "all",
    ) -> None:
        self.name = str(check_ident("limiter name", name))
        self.scope = check_name("limit scope", scope)
        self.config = config or BackpressureConfig()
        if not isinstance(self.config, BackpressureConfig):
            raise ConfigurationError(f"config must be a BackpressureConfig, got {config!r}", field="config")
        self.metrics = FlowControlMetrics()
        self.refusals = Refusals(self)
        self.setting = Setting.of(self.config)
        self.packed: dict[tuple[str, int, int, int], bytes] = {}
        waits = self.config.strategy is BackpressureStrategy.WAIT
        self.max_wait = (math.inf if self.config.max_wait is None else self.config.max_wait) if waits else 0.0
        self._manager = manager
        self.address = address_of(manager)
        self._clock = clock
        self._needs_key = "{" in name and "}" in name
        self._plain = _keys.limiter(name, None, scope)
        self._cells: dict[str, str] = {}  # key → cell, of the keys used lately
        self._keys_of: dict[str, str] = {}  # and back
        self._known = GcraTable(KEYS_KNOWN, max_age_us=int(_TRUST_S * 1e6))
        # Per cell: TAT minus Redis now, µs; at that local moment, s; number of the call. The oldest is the first.
        self._answers: dict[str, tuple[int, float, int]] = {}
        self._call = 0
        self._told = False
        self._at: LimitStore | None = None
        self._open = False  # whether the last call failed open; for one log line an outage
        self._lines: dict[str, Line] = {}
        self._leases = (
            Leases(self, self.config.lease, self.config.lease_ttl, clock.monotonic) if self.config.lease else None
        )

    # -- the specification

    async def acquire(
        self, priority: int = 0, cost: int = 1, *, key: str | None = None, wait: float | None = None
    ) -> bool:
        """Take ``cost`` permits (of ``key``); False when refused.

        ``wait``: seconds to wait for them at most, 0 for not at all, ``math.inf`` for as long as it takes; by default as
        configured. Cancellation gives up the place in the line; a permit that Redis has given in that very moment is lost.

        Raises:
            ConfigurationError: ``cost`` is not a whole number from 1 to what the limit can ever admit at this priority; a key is
                missing or not a text.
            StoreUnavailableError: Redis cannot be asked, unless ``fail_open``.
        """
        return (await self._admit(priority, cost, key, self.max_wait if wait is None else require_wait(wait))).allowed

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
        """Seconds between two permits at the rate in force."""
        return self.setting.emission_us / 1e6

    @property
    def idle(self) -> bool:
        """Nobody waits here."""
        return not self._lines

    @property
    def leased(self) -> int:
        """Permits taken by leases and not spent yet."""
        return self._leases.held if self._leases is not None else 0

    async def try_acquire(
        self, priority: int = 0, cost: int = 1, *, key: str | None = None, queue: bool = False
    ) -> Admission:
        """Like :meth:`acquire`, but never waits for a permit, never passes those who do, and tells the facts.

        ``queue``: who is refused will come back after ``retry_after``: that is his turn in a line that all processes
        share, at the limit's rate. Always asks Redis.
        """
        return await self._admit(priority, cost, key, 0.0, queue=queue)

    def refused_for(self, priority: int = 0, cost: int = 1, *, key: str | None = None) -> float:
        """Seconds for which the last answer of Redis proves a refusal; 0.0 when it proves none. No round trip."""
        return self.refusal(self.cell(key), cost, self.config.weigh(priority, cost)[0])

    async def close(self) -> None:
        """Give back what leases still hold, as far as that is safe. One round trip a lease; none without leases."""
        if self._leases is not None:
            await self._leases.close()

    # -- asking

    async def _connect(self) -> None:
        await self.store().connect()

    def store(self) -> LimitStore:
        """Where the limit is kept, for the running event loop."""
        known = self._at
        if known is None or known.loop is not asyncio.get_running_loop():
            known = find_store(self._manager, self.address, self.scope, self._clock)
            if self._manager is not None and not isinstance(self._manager, str):
                self._at = known  # where the manager is shared, it may have a successor when it was closed
        return known

    async def _admit(
        self, priority: int, cost: int, key: str | None, max_wait: float, *, queue: bool = False
    ) -> Admission:
        urgency = self.config.weigh(priority, cost)[0]
        cell = self.cell(key)
        if self._leases is not None and not queue:
            leased = None if cell in self._lines else await self._leases.acquire(cell, urgency, cost)
            if leased is not None:
                return self.count(leased, cost)
        known = self._answers.get(cell)
        if known is not None and not queue and known[0] + cost * self.setting[1] > self.setting[3][urgency]:
            refusal = self.refusal(cell, cost, urgency)
            if refusal > max_wait:
                refused = Admission(False, refusal, self.remaining(cell), self.name, key)
                return self.count(refused, cost, local=True)
        store = self.store()
        if max_wait:
            request = Request((Use(self, cell, cost, urgency),), urgency, store, ORDERED)
            return self.count(await self._wait_for(request, max_wait), cost)
        if store.ready and cell not in self._lines:
            direct = await self._direct(store, cell, cost, urgency, QUEUE if queue else 0)
            if direct is not None:
                return self.count(direct, cost)
        request = Request((Use(self, cell, cost, urgency),), urgency, store, QUEUE if queue else 0)
        store.ask((request,))
        return self.count(await request.answer(), cost, local=not request.asked)

    async def _direct(self, store: LimitStore, cell: str, cost: int, urgency: int, flags: int) -> Admission | None:
        """Ask when nobody else does; None when nothing was decided, and it has to be asked again."""
        sent_us = int(self._clock.monotonic() * 1e6)
        try:
            reply = await store.direct(self, cell, cost, urgency, flags)
        except asyncio.CancelledError:
            self.metrics.cancelled += 1
            raise
        except OrchestraError as error:
            if self.opens(error):
                return Admission(True, 0.0, 0)
            self.metrics.failed += 1
            raise
        if reply is None:
            return None
        now_us, tat_us, wait_us, _ = reply
        self._note(cell, tat_us, now_us, sent_us, store.calls)
        store.done()
        remaining = max(0, self.setting[2] + now_us - tat_us) // self.setting[1]
        if not wait_us:
            return Admission(True, 0.0, remaining)
        return Admission(False, wait_us / 1e6, remaining, self.name, self.key_of(cell))

    async def _wait_for(self, request: Request, max_wait: float) -> Admission:
        use, store = request.uses[0], request.store
        alone = store.ready and use.cell not in self._lines
        request.wait = True
        line = request.line = self._line(use.cell)
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(max_wait, request.expire) if max_wait < math.inf else None
        try:
            if not alone:
                line.enter(request)
                return await request.answer()
            line.begin()  # whoever comes meanwhile is behind
            try:
                direct = await self._direct(store, *use[1:], ORDERED)
                if direct is not None and (direct.allowed or not request.wait):
                    return direct
                line.enter(request)
            finally:
                line.end()
            return await request.answer()
        finally:
            if expiry is not None:
                expiry.cancel()

    def _line(self, cell: str) -> Line:
        line = self._lines.get(cell)
        if line is None:
            line = self._lines[cell] = self._new_line(cell)
        return line

    def _new_line(self, cell: str) -> Line:
        def due_in(cost: int, urgency: int) -> float:
            return self.due_in(cell, cost, urgency)

        def fits(total: int, urgency: int) -> bool:
            return total * self.setting.emission_us <= self.setting.tolerances_us[urgency]

        def ask(batch: Sequence[Request]) -> None:
            batch[0].store.ask(batch)

        def over() -> None:
            self._lines.pop(cell, None)

        return Line(due_in, fits, ask, over)

    def cell(self, key: str | None) -> str:
        """The cell of ``key``."""
        if key is None:
            if self._needs_key:
                raise ConfigurationError(f"the limit {self.name!r} needs a key, such as a tenant", field="key")
            return self._plain
        cell = self._cells.get(key) if type(key) is str else None
        if cell is None:
            cell = _keys.limiter(self.name, require_key(key), self.scope)
            if len(self._cells) >= 2 * KEYS_KNOWN:
                self._cells.clear()
                self._keys_of.clear()
            self._cells[key], self._keys_of[cell] = cell, key
        return cell

    def key_of(self, cell: str) -> str | None:
        """The key of ``cell``; None for the limit without a key, and for a key not used lately."""
        return self._keys_of.get(cell)

    def count(self, admission: Admission, cost: int, *, local: bool = False) -> Admission:
        """Count an answer, and tell of it."""
        if admission.allowed:
            self.metrics.acquired += 1
            if telemetry.wanted("limiter.acquired"):
                telemetry.emit("limiter.acquired", {"cost": cost}, {"limiter": self.name})
        else:
            self.metrics.rejected += 1
            self.metrics.rejected_locally += local
            self.refusals.add()
            if telemetry.wanted("limiter.rejected"):
                facts = {"cost": cost, "retry_after_s": admission.retry_after}
                telemetry.emit("limiter.rejected", facts, {"limiter": self.name, "local": local})
        return admission

    async def _acquire_or_raise(self, priority: int, cost: int) -> None:
        admission = await self._admit(priority, cost, None, self.max_wait)
        if not admission.allowed:
            raise BackpressureRejectedError(
                f"the rate limit {self.name!r} refused {cost} permits; try again in {admission.retry_after:.3g} s",
                retry_after=admission.retry_after,
                limiter=self.name,
            )

    # -- what is known without asking

    def change(self, text: str) -> None:
        """Another setting is in force: ``text`` as it is stored, ``""`` for the configuration. No round trip."""
        self.setting = Setting.of(self.config, text)
        self.packed.clear()
        self._known.clear()
        self._answers.clear()
        if self._leases is not None:
            self._leases.forget()

    def observe(self, cell: str, answer: Answer) -> None:
        """Take note of what a call learnt of ``cell``, once a call."""
        known = self._answers.get(cell)
        if known is None or known[2] != answer.number:
            self._note(cell, answer.tats[cell], answer.now_us, answer.sent_us, answer.number)

    def _note(self, cell: str, tat_us: int, now_us: int, sent_us: int, number: int) -> None:
        if self._call != number:
            self._call = number
            self.metrics.calls += 1
            self._open = False
            if not self._told:
                self._tell()
        self._known.observe(cell, tat_us, now_us, sent_us)
        answers = self._answers
        if answers.pop(cell, None) is None and len(answers) >= KEYS_KNOWN:
            del answers[next(iter(answers))]
        answers[cell] = (tat_us - now_us, self._clock.monotonic(), number)

    def _tell(self) -> None:
        """Have the limit listed, once."""
        self._told = True
        limit = self.config.rate_limit
        text = f"{limit.emission_us} {limit.burst_us} {limit.rate!r} {limit.period!r}"
        self.store().note(self.name, text)

    def forget(self, cell: str) -> None:
        """Believe nothing of ``cell``: permits were given back."""
        self._known.forget(cell)
        self._answers.pop(cell, None)

    def refusal(self, cell: str, cost: int, urgency: int) -> float:
        """Seconds for which a refusal is proven, else 0.0. Never proves one that Redis would not give."""
        _, emission_us, _, tolerances_us = self.setting
        if cost * emission_us > tolerances_us[urgency]:  # as set at run time; only Redis knows whether it still is
            return 0.0
        local_us = int(self._clock.monotonic() * 1e6)
        wait_us = self._known.refused_for(cell, cost, local_us, emission_us, tolerances_us[urgency])
        return max(wait_us / 1e6, self.due_in(cell, cost, urgency)) if wait_us else 0.0

    def behind(self, cell: str, cost: int, rank: tuple[int, int]) -> float:
        """Seconds that somebody in line who is ahead of ``rank`` makes it wait at least; 0.0 if nobody is."""
        line = self._lines.get(cell)
        head = line.head() if line is not None else None
        if head is None or head.rank > rank:
            return 0.0
        return self.due_in(cell, head.cost, head.urgency) + cost * self.setting.emission_us / 1e6

    def due_in(self, cell: str, cost: int, urgency: int) -> float:
        """Seconds until Redis admits ``cost`` for certain if nobody else asks, by the last answer; else 0.0."""
        known = self._answers.get(cell)
        if known is None:
            return 0.0
        passed = self._clock.monotonic() - known[1]
        if passed > _TRUST_S:
            return 0.0
        late_us = known[0] + cost * self.setting.emission_us - self.setting.tolerances_us[urgency]
        return max(0.0, late_us / 1e6 - passed)

    def remaining(self, cell: str) -> int:
        """Whole permits left in ``cell`` by the last answer."""
        known = self._answers.get(cell)
        debt_us = 0 if known is None else max(0, known[0] - int((self._clock.monotonic() - known[1]) * 1e6))
        return max(0, self.setting.burst_us - debt_us) // self.setting.emission_us

    def opens(self, error: Exception) -> bool:
        """Whether to admit although Redis could not be asked."""
        admit = self.config.fail_open and isinstance(error, StoreUnavailableError | StoreFullError)
        if admit:
            self.metrics.failed_open += 1
            if not self._open:
                self._open = True
                logger.warning("rate limit %s is open until Redis answers again: %s", self.name, error)
        return admit


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
