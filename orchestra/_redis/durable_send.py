"""Sends script calls and waits until what they wrote is safe: on replicas (WAIT), or on disk (WAITAOF).

Owns the connection on which it waits, because WAIT blocks a connection and covers what that connection wrote and
nothing else; so a call and its WAIT always go over the same wire, and a wire that breaks between them makes the call be
repeated. Refuses to own what the calls mean. One round at a time: calls that come while one is under way share the
next one, and its wait (a group commit).

Belongs to one event loop. Sources: redis.io, commands WAIT and WAITAOF; replication.c and networking.c of Redis 7.2.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, NamedTuple

from orchestra._durability import Durability
from orchestra._redis.link import Call, Link
from orchestra._redis.wire import Command, ReplyError, Wire, pack
from orchestra._scripts import forgotten
from orchestra.errors import ConfigurationError, StoreError

GROUP = 16
"""Calls that share one round at most: 16 times 1 MiB is written at once."""


class Confirmed(NamedTuple):
    """The reply to a call, how many copies were reached, why not more, where the server said so, and whether it was repeated."""

    reply: Any
    reached: int
    why: str = ""
    repeated: bool = False


class _Waiting(NamedTuple):
    call: Call
    patience: float
    wait: bool
    future: asyncio.Future[Confirmed]


class DurableSender:
    """Runs calls over ``link``, which is its own, as safely as ``durability`` says."""

    def __init__(self, link: Link, durability: Durability) -> None:
        self._link = link
        self._durability = durability
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._checked: Wire | None = None
        self._command: Command | None = None

    async def send(self, call: Call, patience: float, *, wait: bool = True) -> Confirmed:
        """Run ``call``, repeating it for up to ``patience`` seconds while Redis is unavailable.

        Without ``wait`` it does not ask for a wait of its own. The reply may be an error reply.

        Raises:
            ConfigurationError: the server cannot do what is asked for.
            StoreUnavailableError: it could not be reached; the call may have been executed.
        Cost: one round trip and the wait, shared with other calls.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Confirmed] = loop.create_future()
        self._waiting.append(_Waiting(call, patience, wait, future))
        if self._worker is None:
            self._worker = loop.create_task(self._work(), name="orchestra:durable")
        return await future

    async def close(self) -> None:
        """Wait for what is under way, then give back the connection."""
        while (worker := self._worker) is not None:
            await asyncio.gather(worker, return_exceptions=True)
        await self._link.close()

    async def _work(self) -> None:
        try:
            while self._waiting:
                group = [self._waiting.popleft() for _ in range(min(GROUP, len(self._waiting)))]
                group = [one for one in group if not one.future.done()]  # its caller was cancelled before it was sent
                if group:
                    await self._serve(group)
        finally:
            self._worker = None
            for one in self._waiting:  # only when this task itself was cancelled
                one.future.cancel()
            self._waiting.clear()

    async def _serve(self, group: list[_Waiting]) -> None:
        patience = min(one.patience for one in group)
        calls, wait = [one.call for one in group], any(one.wait for one in group)
        try:
            (replies, reached, why), repeated = await self._link.patiently(
                lambda: self._round(calls, wait=wait), patience
            )
        except BaseException as error:
            for one in group:
                if not one.future.done():
                    one.future.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
            if not isinstance(error, Exception):
                raise
            return
        for one, reply in zip(group, replies, strict=True):
            if not one.future.done():
                one.future.set_result(Confirmed(reply, reached, why, repeated))

    async def _round(self, calls: list[Call], *, wait: bool) -> tuple[list[Any], int, str]:
        """One round trip, a second for scripts that the server has forgotten; all of it on one wire."""
        wire = await self._link.wire()
        if wire is not self._checked:
            self._command = await self._waiting_command(wire)
            self._checked = wire
        replies, answer = await self._send(wire, [call.pack() for call in calls], wait=wait)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, ReplyError) and forgotten(reply)]
        if unknown:
            texts = [calls[i].script.pack_with_text(calls[i].keys, calls[i].args) for i in unknown]
            again, answer = await self._send(wire, texts, wait=wait)
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return replies, *self._judge(answer, wait=wait)

    async def _send(self, wire: Wire, packed: list[bytes], *, wait: bool) -> tuple[list[Any], Any]:
        """The replies to ``packed``, and to the waiting command behind them, if there is one."""
        seconds = self._link.manager.timeout
        if not wire.writable:
            await wire.drain()
        if self._command is None or not wait:
            return await asyncio.shield(wire.send_nowait(b"".join(packed), len(packed), timeout=seconds)), None
        seconds += self._durability.timeout
        packed = [*packed, pack((self._command,))]
        *replies, answer = await asyncio.shield(wire.send_nowait(b"".join(packed), len(packed), timeout=seconds))
        return replies, answer

    def _judge(self, answer: Any, *, wait: bool) -> tuple[int, str]:
        """How many copies there are, and the server's words when it did not say."""
        if isinstance(answer, ReplyError):
            return 0, str(answer)
        if answer is None:  # appendfsync always: what is answered is on disk
            return (self._durability.wanted if wait and self._command is None else 0), ""
        return int(answer[0] if isinstance(answer, list) else answer), ""

    async def _waiting_command(self, wire: Wire) -> Command | None:
        """What is sent behind every group of calls; None where an answer alone says that they are on disk."""
        durability = self._durability
        millis = max(1, round(durability.timeout * 1000))
        if durability.mode == "replicated":
            return ("WAIT", durability.replicas, millis)
        found = await wire.call("COMMAND", "INFO", "WAITAOF")
        if found and found[0]:
            await self._require_aof(wire)
            return ("WAITAOF", 1, 0, millis)
        await self._require_always(wire)
        return None

    async def _require_aof(self, wire: Wire) -> None:
        try:
            said = bytes(await wire.call("INFO", "persistence")).decode("utf-8", "replace")
        except StoreError:
            return  # this user may not ask: WAITAOF itself refuses where there is no append-only file
        if "aof_enabled:0" in said:
            raise self._refusal(wire, "appendonly", "no", "CONFIG SET appendonly yes")

    async def _require_always(self, wire: Wire) -> None:
        """Before Redis 7.2 only ``appendfsync always`` puts a task on disk before it is answered."""
        settings: dict[str, str] = {}
        for name in ("appendonly", "appendfsync"):
            try:
                pair = await wire.call("CONFIG", "GET", name)
            except StoreError as error:
                raise self._refusal(wire, name, "unknown", f"let this user ask ({error}), or use Redis 7.2") from error
            settings[name] = bytes(pair[1]).decode() if len(pair) > 1 else "unknown"
        for name, expected in (("appendonly", "yes"), ("appendfsync", "always")):
            if settings[name] != expected:
                raise self._refusal(wire, name, settings[name], f"CONFIG SET {name} {expected}, or use Redis 7.2")

    def _refusal(self, wire: Wire, name: str, value: str, change: str) -> ConfigurationError:
        return ConfigurationError(
            f"durability fsynced cannot be kept by {wire.endpoint.label}: its setting {name} is {value}: {change}",
            field=name,
            value=value,
        )
