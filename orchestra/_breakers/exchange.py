"""Keeps the circuit breakers of a process in step with other processes, and shows them, through Redis.

Owns one background loop: it tells what shared breakers have become, asks for permits of probes, looks at what the others
have told, publishes snapshots of all breakers for ``orchestra breakers``, and carries out resets asked for there. Refuses
to own transitions (:mod:`orchestra.circuit_breaker`) and what an order means (:mod:`orchestra._breakers.link`).

No call of a breaker waits for Redis: closed, it asks nobody; half-open, it uses permits that the loop has fetched. While
Redis does not answer, each process goes on with the state it has, as if its breakers were not shared.
One event loop; the breakers themselves are used by whoever has them.

Cost: nothing without breakers. Otherwise one command every ``interval``, and every 0.1 s while a shared breaker is not
closed; every two seconds where none is shared. Where what is shown has changed, and every 25 seconds, four more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

import redis

from orchestra import _keys, _scripts
from orchestra._breakers.link import BUSY_S, BreakerLink
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra._identity import consumer_name
from orchestra._keys import QueueKeys
from orchestra._lifecycle import Service, set_within
from orchestra.circuit_breaker import BreakerSnapshot, CircuitBreaker, CircuitState, breaker_registry
from orchestra.connections import ConnectionManager, store_errors
from orchestra.errors import OrchestraError
from orchestra.tasks import check_ident, require_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

logger = logging.getLogger("orchestra.circuit_breaker")

SHOWN = 256
"""Breakers that a process shows at most; those that are not closed come first."""
TTL_MS = 30_000
"""How long what a process has told is shown after its last sign of life."""
RESET_TTL_MS = 3_600_000
_TELL_S = 2.0
_SIGN_S = 25.0
_ROUND_S = 3.0  # what Redis has for one round, before the breakers are on their own
_FAILURES = (redis.RedisError, OSError, OrchestraError, TimeoutError)


class BreakerExchange(Service):
    """Shares and shows the breakers of this process.

    ``queue``: the queue whose ``orchestra breakers ls`` shows them; None shows none. ``origin``: the name of this
    process there, by default a new consumer name. ``interval``: seconds between two looks at shared breakers, 0.05 to
    60. ``breakers``: which there are; by default all of the process. Those whose configuration says ``shared`` are
    shared as soon as a round has seen them, or at once by :meth:`share`.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    def __init__(
        self,
        manager: ConnectionManager,
        queue: str | None = None,
        *,
        origin: str | None = None,
        interval: float = 1.25,
        breakers: Callable[[], Iterable[CircuitBreaker]] = breaker_registry,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__()
        require_number("BreakerExchange.interval", interval, 0.05, 60.0, unit="seconds")
        self.origin = check_ident("origin", origin or consumer_name())
        self._manager = manager
        self._keys = QueueKeys(queue) if queue is not None else None
        self._resets = _keys.breaker_resets(queue or "none")
        self._interval = interval
        self._breakers = breakers
        self._clock = clock
        self._links: dict[CircuitBreaker, BreakerLink] = {}
        self._kicked = asyncio.Event()
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._turn = asyncio.Lock()
        self._up = True
        self._told: list[tuple[Any, ...]] | None = None
        self._next_tell = self._next_sign = 0.0
        self._since_ms = self._seen_ms = -1
        """Resets asked for before this moment of the Redis clock are not ours."""
        self._reset_at: dict[str, int] = {}

    def share(self, breaker: CircuitBreaker) -> CircuitBreaker:
        """Share ``breaker`` from the next round on, whatever its configuration says. Returns it."""
        if breaker not in self._links and not breaker.attached:
            link = self._links[breaker] = BreakerLink(breaker, self._kick, self._clock)
            breaker.attach(link)
        return breaker

    async def sync(self) -> bool:
        """One round now: tell, ask and look. Whether Redis has answered all of it.

        Cost: one round trip, and one for each transition, outcome and permit.
        """
        async with self._turn:
            there = list(self._breakers())
            for breaker in there:
                if breaker.config.shared:
                    self.share(breaker)
            if not there and not self._links and self._told is None:
                return True
            try:
                async with asyncio.timeout(_ROUND_S):
                    if not self._manager.connected:
                        await self._manager.connect()
                    good = await self._round(self._manager.client)
            except _FAILURES as error:
                good = False
                self._lost(list(self._links.values()), error)
            self._up = good
            return good

    # -- the loop

    async def _start(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self.spawn("breakers", self._run)

    async def _run(self) -> None:
        while True:
            await self.sync()
            if await set_within(self._kicked, self._pause()):
                self._kicked.clear()

    def _pause(self) -> float:
        if not self._up:
            return max(1.0, self._interval)
        if not self._links:
            return max(_TELL_S, self._interval)
        busy = any(not breaker.closed for breaker in self._links)
        return min(BUSY_S, self._interval) if busy else self._interval

    def _kick(self) -> None:
        loop = self._event_loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: there is nobody left to tell
                loop.call_soon_threadsafe(self._kicked.set)

    async def _stop(self) -> None:
        links, self._links = self._links, {}
        for breaker in links:
            breaker.attach(None)
        if not self._up:
            return
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(_ROUND_S):
                for link in links.values():
                    await link.end(self._manager.client)
                if self._keys is not None and self._told is not None:
                    pipe = self._manager.client.pipeline(transaction=False)
                    pipe.delete(self._keys.breakers_of(self.origin)).zrem(self._keys.breakers, self.origin)
                    await pipe.execute()

    # -- a round

    async def _round(self, client: Any) -> bool:
        good = True
        for link in list(self._links.values()):
            try:
                await link.speak(client)
            except redis.ResponseError as error:  # this key is spoilt; the others may be well
                self._lost([link], error)
                good = False
        good = await self._look(client) and good
        if self._keys is not None and self._clock.monotonic() >= self._next_tell:
            await self._tell(client, self._keys)
            self._next_tell = self._clock.monotonic() + _TELL_S
        return good

    async def _look(self, client: Any) -> bool:
        asked = [(link, link.breaker.era) for link in self._links.values() if not link.pending]
        if not asked and self._told is None:
            return True
        resets = self._resets
        reply = await _scripts.call(client, "breaker_look", (resets, *(link.key for link, _ in asked)), ())
        now_ms, flat, *rows = reply
        self._seen_ms = now_ms
        good = True
        for (link, before), row in zip(asked, rows, strict=True):
            if not isinstance(row, list):
                self._lost([link], redis.ResponseError(row.decode("utf-8", "replace")))
                good = False
            elif not row[0] or not row[1]:
                link.learn_nothing(before)
            else:
                wait_ms = max(0, min(int(row[2] or 0) - now_ms, round(link.breaker.config.recovery_timeout * 1000)))
                link.learn(row[0].decode(), row[1].decode(), wait_ms, row[3] == b"1", before)
        if self._told is not None:
            self._reset(dict(zip(flat[::2], flat[1::2], strict=True)))
        return good

    def _lost(self, links: list[BreakerLink], error: Exception) -> None:
        if any(link.up for link in links):
            names = ", ".join(link.breaker.name for link in links[:5])
            logger.warning("shared circuit breakers (%s) are on their own until Redis answers: %r", names, error)
        for link in links:
            link.lost()

    # -- showing

    async def _tell(self, client: Any, keys: QueueKeys) -> None:
        shown = sorted(self._breakers(), key=lambda breaker: breaker.closed)[:SHOWN]
        if not shown and self._told is None:
            return
        snapshots = [breaker.snapshot() for breaker in shown]
        facts = [
            (s.name, s.state, s.era, s.failures, s.calls, s.failure_rate, s.forced, s.last_error) for s in snapshots
        ]
        if facts != self._told or self._clock.monotonic() >= self._next_sign:
            await self._publish(client, keys, snapshots)
            self._told = facts
            self._next_sign = self._clock.monotonic() + _SIGN_S

    async def _publish(self, client: Any, keys: QueueKeys, snapshots: list[BreakerSnapshot]) -> None:
        first = self._told is None  # from then on each round looks at the clock and at the resets
        now_ms = _ms(await client.time()) if first else self._seen_ms
        if self._since_ms < 0:
            self._since_ms = now_ms
        text = json.dumps([_shown(snapshot, now_ms) for snapshot in snapshots])
        pipe = client.pipeline(transaction=False)
        pipe.set(keys.breakers_of(self.origin), text, px=TTL_MS)
        pipe.zadd(keys.breakers, {self.origin: now_ms})
        pipe.zremrangebyscore(keys.breakers, "-inf", now_ms - TTL_MS)
        pipe.pexpire(keys.breakers, TTL_MS)
        if first:
            pipe.hgetall(self._resets)
        replies = await pipe.execute()
        if first:
            self._reset(replies[-1])

    def _reset(self, resets: dict[bytes, bytes]) -> None:
        asked = {name.decode("ascii", "replace"): int(at) for name, at in resets.items()}
        for breaker in self._breakers():
            at = asked.get(breaker.name, -1)
            if at > max(self._since_ms, self._reset_at.get(breaker.name, -1)):
                breaker.reset()
                logger.warning("circuit breaker %s was reset by hand", breaker.name)
        self._reset_at = asked  # bounded by what Redis keeps, for an hour


def _ms(time: tuple[int, int]) -> int:
    return time[0] * 1000 + time[1] // 1000


def _shown(snapshot: BreakerSnapshot, now_ms: int) -> dict[str, Any]:
    """Moments instead of spans: what is stored must be true later."""
    return {
        "name": snapshot.name,
        "state": snapshot.state.value,
        "failures": snapshot.failures,
        "calls": snapshot.calls,
        "failure_rate": round(snapshot.failure_rate, 4),
        "slow_rate": round(snapshot.slow_rate, 4),
        "retry_at_ms": now_ms + round(snapshot.retry_after * 1000) if snapshot.retry_after else None,
        "since_ms": now_ms - round(snapshot.age * 1000),
        "forced": snapshot.forced,
        "shared": snapshot.shared,
        "last_error": snapshot.last_error,
    }


async def shown_breakers(manager: ConnectionManager, queue: str) -> list[dict[str, Any]]:
    """What the processes of ``queue`` told of their breakers lately, by name and process.

    Each: ``name state failures calls failure_rate slow_rate forced shared last_error`` as in
    :class:`~orchestra.circuit_breaker.BreakerSnapshot`, ``process``, ``retry_in`` (seconds) and ``since`` (Unix seconds
    of the Redis clock). Three round trips.
    """
    keys = QueueKeys(queue)
    with store_errors(manager.address.safe, "ZRANGE"):
        now_ms = _ms(await manager.client.time())
        origins = await manager.client.zrange(keys.breakers, now_ms - TTL_MS, "+inf", byscore=True)
        texts = await manager.client.mget([keys.breakers_of(each.decode()) for each in origins]) if origins else []
    rows = [
        _row(each, origin.decode(), now_ms)
        for origin, text in zip(origins, texts, strict=True)
        if text is not None
        for each in json.loads(text)
    ]
    return sorted(rows, key=lambda row: (row["name"], row["process"]))


def _row(told: dict[str, Any], process: str, now_ms: int) -> dict[str, Any]:
    retry_at_ms, since_ms = told.pop("retry_at_ms"), told.pop("since_ms")
    retry_in = max(0, retry_at_ms - now_ms) / 1000 if retry_at_ms is not None else 0.0
    if told["state"] == CircuitState.OPEN.value and retry_in == 0.0 and not told["forced"]:
        told["state"] = CircuitState.HALF_OPEN.value
    return told | {"process": process, "retry_in": retry_in, "since": since_ms / 1000}


async def ask_reset(manager: ConnectionManager, queue: str, name: str) -> None:
    """Ask every process of ``queue`` to reset its breaker ``name``; they do within about two seconds. Two round trips."""
    key = _keys.breaker_resets(queue)
    with store_errors(manager.address.safe, "HSET"):
        now_ms = _ms(await manager.client.time())
        pipe = manager.client.pipeline(transaction=False)
        pipe.hset(key, check_ident("breaker name", name), now_ms)
        pipe.pexpire(key, RESET_TTL_MS)
        await pipe.execute()
