"""Where rate limits are kept, and the one way to it: everybody's questions of a moment in one script call.

Owns the connection of a scope of limits, what travels in which call and in which order, and which answer is whose.
Refuses to own what a limit is, who may ask and what an answer means: those who ask bring that along (:class:`Question`).

There is one call under way at a time. What is asked when none is leaves at once, from the caller's own step; what is asked
meanwhile goes in the next call, most urgent first, up to :data:`MAX_BATCH`. Nothing here is a task while the connection
stands. A caller that is cancelled leaves its answer to be received and dropped. One event loop; no ``await`` between
looking at the questions and sending them.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from orchestra import _keys, _scripts
from orchestra._limiting.twin import MAX_NAMES, MemoryCells
from orchestra._redis.errors import ReplyError, reply_error
from orchestra._redis.link import Link
from orchestra._shared import shared
from orchestra.connections import default_address, get_connection_manager, map_redis_error, parse_address
from orchestra.errors import StoreUnavailableError

if TYPE_CHECKING:
    from orchestra._clock import Clock
    from orchestra._limiting.rules import Setting
    from orchestra._redis.wire import Wire
    from orchestra.connections import Address, ConnectionManager

MAX_BATCH = 512
"""Questions in one call: bounds how long one script may occupy Redis (about 0.6 ms)."""
ORDERED, QUEUE, LEASE = 1, 2, 4
"""Flags of a question, as ``lua/gcra.lua`` has them."""
MAX_PACKED = 512
"""Calls of a limit that are kept packed, about 300 bytes each."""
NAMES_TTL_MS = 30 * 86_400_000


class Limit(Protocol):
    """What a store must know of a limit; ``setting`` may be replaced by :meth:`change`."""

    name: str
    setting: Setting
    metrics: Any
    packed: dict[tuple[str, int, int, int], bytes]
    """Calls that were packed under ``setting``."""

    def change(self, text: str) -> None:
        """Another setting is in force: ``text``, "" for none."""


class Use(NamedTuple):
    """``cost`` permits of one cell, of which a request of this ``urgency`` may use a part only."""

    limit: Any
    """A :class:`Limit`; the type is left open so that whoever asks may use his own."""
    cell: str
    cost: int
    urgency: int


class Question(Protocol):
    """One request for permits of one or several cells."""

    uses: Sequence[Use]
    flags: int
    rank: tuple[int, int]
    """Smaller goes first."""

    @property
    def over(self) -> bool:
        """Nobody waits for the answer any more."""

    def known(self) -> bool:
        """Whether it could be answered without asking, and now is."""

    def answered(self, answer: Answer, wait_us: int, which: int) -> None:
        """``which``: position in ``uses`` of the cell that refused; for a lease that was admitted, the TAT it left."""

    def failed(self, error: Exception) -> None:
        """It could not be asked."""


class Answer(NamedTuple):
    """What all questions of one call learn: the clock of Redis, the TAT of each cell, and when the call was sent."""

    now_us: int
    tats: dict[str, int]
    sent_us: int
    number: int
    """Counts the calls, so that each can be told from the others."""


class LimitStore:
    """The limits of one ``scope``, in Redis (``manager``) or, without one, in this process (``cells``)."""

    def __init__(self, scope: str, clock: Clock, manager: Any = None, cells: MemoryCells | None = None) -> None:
        self.scope = scope
        self.settings_key = _keys.limit_settings(scope)
        self.names_key = _keys.limit_names(scope)
        self.calls = 0
        self._clock = clock
        self._manager = manager
        self._cells = cells
        self.loop = asyncio.get_running_loop()
        self._link = Link(manager, "limits", f"limits of {scope}") if hasattr(manager, "open_wire") else None
        self._wire: Wire | None = None
        self._waiting: list[Any] = []
        self._busy = False
        self._flushing = False
        self._noted: set[str] = set()
        self._script = _scripts.script("gcra")
        self._tasks: set[asyncio.Task[None]] = set()

    def check_loop(self) -> None:
        """Refuse another event loop and another process than its own."""
        if self._link is not None:
            self._link.check_loop()

    def usable(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether it serves ``loop``; False also when the loop it was made for is gone."""
        if self.loop is loop:
            return True
        if not self.loop.is_closed():
            self.check_loop()
        return False

    @property
    def idle(self) -> bool:
        """Nothing is under way and nothing waits to be asked."""
        return not self._busy and not self._waiting

    def ask(self, questions: Sequence[Question]) -> None:
        """Ask; every question is answered, or failed, in its own methods, perhaps before this returns."""
        self._waiting += questions
        if not self._busy:
            self._flush()

    @property
    def ready(self) -> bool:
        """Whether :meth:`direct` may be called: the connection stands, and nothing is under way or waits to be asked."""
        wire = self._wire
        return not self._busy and not self._waiting and wire is not None and not wire.closed

    async def direct(self, limit: Any, cell: str, cost: int, urgency: int, flags: int) -> list[Any] | None:
        """Ask one question in the caller's own step, without a future and a queue; only while :attr:`ready`.

        Returns the reply (now, TAT, wait, which), or None when it has to be asked by :meth:`ask`, nothing being decided.
        Raises StoreError. A cancelled caller's answer is received and dropped.
        """
        wire = self._wire
        assert wire is not None, "the caller has looked at ready"
        packed = limit.packed.get((cell, cost, urgency, flags))
        if packed is None:
            packed = self._pack(limit, cell, cost, urgency, flags)
        replies = wire.send_nowait(packed, 1)
        self._busy = True
        self.calls += 1
        try:
            reply = (await _Kept(replies))[0]
        except BaseException as error:
            if replies.done():
                self._dropped(limit, replies)
                if isinstance(error, OSError) or not isinstance(error, Exception):
                    raise
                raise map_redis_error(error, doing="rate limits") from error
            replies.add_done_callback(partial(self._dropped, limit))
            raise
        if type(reply) is list and type(reply[0]) is int:
            return reply  # the caller takes note of it, then calls done()
        self._odd(limit, reply)
        return None

    def _pack(self, limit: Any, cell: str, cost: int, urgency: int, flags: int) -> bytes:
        """The call for one question, kept for the next that is the same: packing it costs 6 µs."""
        version, emission_us, burst_us, tolerances_us = limit.setting
        reserve_us = burst_us - tolerances_us[urgency]
        args = (1, limit.name, version, emission_us, burst_us, 1, flags, 1, 1, cost, reserve_us)
        if len(limit.packed) >= MAX_PACKED:
            limit.packed.clear()
        packed = limit.packed[cell, cost, urgency, flags] = self._script.pack((self.settings_key, cell), args)
        return packed

    def done(self) -> None:
        """The caller of :meth:`direct` has taken note of the reply: ask what has come meanwhile."""
        self._busy = False
        if self._waiting:
            self._flush()

    def _free(self) -> None:
        self._busy = False
        self._flush()

    def _dropped(self, limit: Any, replies: asyncio.Future[Any]) -> None:
        """The answer to somebody who was cancelled: a permit in it is lost."""
        if not replies.cancelled() and replies.exception() is None:
            reply = replies.result()[0]
            limit.metrics.abandoned += type(reply) is list and type(reply[0]) is int and not reply[2]
        self._free()

    def _odd(self, limit: Any, reply: Any) -> None:
        """Another setting, or a forgotten script: to be asked again. Raises StoreError for any other error."""
        try:
            if isinstance(reply, ReplyError):
                if not _scripts.forgotten(reply):
                    raise reply_error(reply, self._manager.address.safe)
            else:
                limit.change(reply[2].decode())
        finally:
            self._free()

    async def connect(self) -> None:
        """Reach the store. Raises StoreUnavailableError, StoreAuthError."""
        if self._link is not None:
            self._wire = await self._link.wire()

    async def run(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run another script on the same connection; one round trip. Raises StoreError."""
        if self._cells is not None:
            return self._cells.run(name, int(self._clock.monotonic() * 1e6), keys, args)
        if self._link is None:
            return await _scripts.call(self._manager.client, name, keys, args)
        return await self._link.script(_scripts.script(name), keys, args)

    def note(self, name: str, text: str) -> None:
        """Say once that the limit ``name`` is in use here, for display; nobody waits for it."""
        if name in self._noted:
            return
        if len(self._noted) < MAX_NAMES:
            self._noted.add(name)
        args = (name, text, MAX_NAMES, NAMES_TTL_MS)
        if self._cells is not None:
            self._cells.run("gcra_note", 0, (self.names_key,), args)
        self.say("gcra_note", self.names_key, args)

    def say(self, name: str, key: str, args: Sequence[Any]) -> None:
        """Run a script that nobody waits for, if the connection stands."""
        if self._wire is not None and not self._wire.closed:
            packed = _scripts.script(name).pack_with_text((key,), args)
            self._wire.send_nowait(packed, 1).add_done_callback(_look_away)

    # -- what goes into a call; nothing here awaits

    def _flush(self) -> None:
        if self._flushing:  # asked from within an answer: the loop below goes on with it
            return
        self._flushing = True
        try:
            while self._waiting and not self._busy:
                batch, keys, args, limits = self._gather()
                if batch:
                    self._send(batch, keys, args, limits)
        finally:
            self._flushing = False

    def _gather(self) -> tuple[list[Any], list[str], list[Any], list[Any]]:
        """Take the most urgent questions that fit into one call."""
        waiting = self._waiting
        if len(waiting) > 1:
            waiting.sort(key=_rank)
        batch: list[Any] = []
        later: list[Any] = []
        requests: list[Any] = []
        limits: dict[tuple[str, Setting], int] = {}
        cells: dict[str, tuple[int, int]] = {}
        known: list[Any] = []
        taken = 0
        for question in waiting:
            if len(batch) == MAX_BATCH:
                break
            taken += 1
            if question.over or question.known():
                continue
            placed = _place(question, limits, cells, known, requests)
            (batch if placed else later).append(question)
        self._waiting = later + waiting[taken:]
        args: list[Any] = [len(limits)]
        for name, setting in limits:
            args += (name, setting.version, setting.emission_us, setting.burst_us)
        args += [limit for _, limit in cells.values()]
        return batch, [self.settings_key, *cells], args + requests, known

    def _send(self, batch: list[Any], keys: list[str], args: list[Any], limits: list[Any]) -> None:
        sent_us = int(self._clock.monotonic() * 1e6)
        self.calls += 1
        if self._cells is not None:
            self._arrived(batch, keys, limits, sent_us, self._cells.run("gcra", sent_us, keys, args))
            return
        self._busy = True
        wire = self._wire
        if wire is not None and not wire.closed:
            try:
                replies = wire.send_nowait(self._script.pack(keys, args), 1)
            except StoreUnavailableError as error:
                self._failed(batch, error)
            else:
                replies.add_done_callback(partial(self._replied, batch, keys, args, limits, sent_us))
            return
        self._start(batch, keys, args, limits)

    def _start(self, batch: list[Any], keys: list[str], args: list[Any], limits: list[Any]) -> None:
        task = self.loop.create_task(self._send_slowly(batch, keys, args, limits), name="orchestra:limits")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_slowly(self, batch: list[Any], keys: list[str], args: list[Any], limits: list[Any]) -> None:
        """Where the connection has to be opened first, or the server has forgotten the script."""
        try:
            await self.connect()
            sent_us = int(self._clock.monotonic() * 1e6)
            if self._link is not None:
                reply = await self._link.script(self._script, keys, args)
            else:
                if not self._manager.connected:
                    await self._manager.connect()
                reply = await _scripts.call(self._manager.client, "gcra", keys, args)
        except Exception as error:  # noqa: BLE001 - whatever it is, those who asked must hear of it
            self._failed(batch, error)
        except asyncio.CancelledError:
            self._failed(batch, StoreUnavailableError("the event loop ends: limits are not asked any more"))
            raise
        else:
            self._arrived(batch, keys, limits, sent_us, reply)

    def _replied(
        self, batch: list[Any], keys: list[str], args: list[Any], limits: list[Any], sent_us: int, done: Any
    ) -> None:
        if done.cancelled():
            self._failed(batch, StoreUnavailableError("the connection to the limits was closed"))
            return
        error = done.exception()
        reply: Any = None if error is not None else done.result()[0]
        if isinstance(reply, ReplyError):
            if _scripts.forgotten(reply):
                self._start(batch, keys, args, limits)
                return
            error = reply_error(reply, self._manager.address.safe)
        if error is not None:
            self._failed(batch, error)
        else:
            self._arrived(batch, keys, limits, sent_us, reply)

    # -- what comes back

    def _arrived(self, batch: list[Any], keys: list[str], limits: list[Any], sent_us: int, reply: list[Any]) -> None:
        try:
            if isinstance(reply[0], bytes | str):
                self._change(batch, limits, reply)
            else:
                self._answer(batch, keys, sent_us, reply)
        except Exception as error:  # noqa: BLE001 - a reply that makes no sense must not leave anybody waiting
            self._failed(batch, error)
            return
        self._busy = False
        self._flush()

    def _answer(self, batch: list[Any], keys: list[str], sent_us: int, reply: list[Any]) -> None:
        cells = len(keys) - 1
        answer = Answer(reply[0], dict(zip(keys[1:], reply[1 : cells + 1], strict=True)), sent_us, self.calls)
        verdicts = iter(reply[cells + 1 :])
        for question, wait_us, which in zip(batch, verdicts, verdicts, strict=True):
            told = which
            if wait_us:  # of the script's cells, the one that waits longest: tell its place in the question
                told = next(i for i, use in enumerate(question.uses) if use.cell == keys[which])
            question.answered(answer, wait_us, told)

    def _change(self, batch: list[Any], limits: list[Any], reply: list[Any]) -> None:
        """Take over what was set at run time; then it is asked again, for nothing was decided."""
        texts = {limits[number - 1].name: text for number, text in zip(reply[1::2], reply[2::2], strict=True)}
        told = {id(use.limit): use.limit for question in (*batch, *self._waiting) for use in question.uses}
        for limit in told.values():
            if limit.name in texts:
                text = texts[limit.name]
                limit.change(text.decode() if isinstance(text, bytes) else text)
        self._waiting += batch

    def _failed(self, batch: list[Any], error: BaseException) -> None:
        self._busy = False
        if not isinstance(error, Exception):
            error = StoreUnavailableError(f"the connection to the limits broke: {error!r}")
        mapped = map_redis_error(error, doing="rate limits")
        for question in batch:
            question.failed(mapped)
        self._flush()


class _Kept:
    """Awaits ``future``, whose cancellation would cost the connection: a cancelled waiter leaves it alone.

    What ``asyncio.shield`` does, without a second future and the turn of the loop that it takes (4 µs of 50). It is what
    a Task takes for a future: see ``asyncio.isfuture``.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_context", "_future", "_gone", "_loop")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self._future = future
        self._loop: asyncio.AbstractEventLoop = future.get_loop()
        self._asyncio_future_blocking = False
        self._gone = False

    def __await__(self) -> Generator[Any, None, Any]:
        self._asyncio_future_blocking = True
        yield self
        return self._future.result()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, callback: Any, *, context: Any = None) -> None:
        self._callback, self._context = callback, context
        self._future.add_done_callback(callback, context=context)

    def cancel(self, msg: Any = None) -> bool:
        if self._gone or self._future.done():
            return False
        self._gone = True
        self._future.remove_done_callback(self._callback)
        self._loop.call_soon(self._callback, self, context=self._context)
        return True

    def result(self) -> Any:
        """Called by the Task that was woken with this object: only a cancelled one is."""
        raise asyncio.CancelledError


def _look_away(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()  # retrieved: nothing depends on it


def _rank(question: Any) -> Any:
    return question.rank


def _place(
    question: Any, limits: dict[tuple[str, Setting], int], cells: dict[str, Any], known: list[Any], requests: list[Any]
) -> bool:
    """Add ``question`` to a call; False when the call has one of its cells under another setting already."""
    uses = question.uses
    for use in uses:
        there = cells.get(use.cell)
        if there is not None and limits.get((use.limit.name, use.limit.setting)) != there[1]:
            return False
    requests += (question.flags, len(uses))
    for limit, cell, cost, urgency in uses:
        setting = limit.setting
        number = limits.get((limit.name, setting))
        if number is None:
            number = limits[limit.name, setting] = len(limits) + 1
            known.append(limit)
        place = cells.get(cell)
        if place is None:
            place = cells[cell] = (len(cells) + 1, number)
        requests += (place[0], cost, setting.burst_us - setting.tolerances_us[urgency])
    return True


_stores: weakref.WeakKeyDictionary[Any, dict[str, LimitStore]] = weakref.WeakKeyDictionary()


def address_of(manager: ConnectionManager | str | None) -> Address:
    """Where ``manager`` leads: a connection, an address, or None for the default."""
    if manager is None:
        return default_address()
    return parse_address(manager) if isinstance(manager, str) else manager.address


def find_store(manager: ConnectionManager | str | None, address: Address, scope: str, clock: Clock) -> LimitStore:
    """The store for limits of ``scope`` at ``address``, which is ``manager``'s."""
    if address.scheme == "memory":
        return memory_store(address.safe, scope, clock)
    if manager is None or isinstance(manager, str):
        manager = get_connection_manager(manager)  # each time: a shared manager that was closed has a successor
    return store_on(manager, scope, clock)


def store_on(manager: ConnectionManager, scope: str, clock: Clock) -> LimitStore:
    """The store that everybody on ``manager`` shares for limits of ``scope``.

    Raises:
        WrongLoopError, ForkedProcessError: it serves another event loop, or the parent process.
    """
    scopes = _stores.setdefault(manager, {})
    store = scopes.get(scope)
    if store is None or not store.usable(asyncio.get_running_loop()):
        store = scopes[scope] = LimitStore(scope, clock, manager)
    return store


def memory_store(safe: str, scope: str, clock: Clock) -> LimitStore:
    """The store for limits of ``scope`` that live in this process under the address ``safe``."""
    cells: MemoryCells = shared("limiter state", safe, MemoryCells)
    name = f"{safe} {scope} {id(clock)}"  # the store keeps its clock, so no other has the same id
    return shared("limit store", name, lambda: LimitStore(scope, clock, None, cells))
