"""Reads deliveries for one consumer, most urgent lane first, on a connection of its own.

Three commands, chosen by what the last read found: a script that respects lane order exactly, for small counts; a
pipeline of two XREADGROUPs for large ones; and one blocking XREADGROUP over all lanes when there was nothing.
What is asked for together never exceeds the count, so nothing has to be put back (but see ``surplus``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestra._delivery import Delivery
from orchestra._keys import QueueKeys
from orchestra._redis.link import Call, Link
from orchestra._redis.wire import ReplyError, Wire, pack, reply_code, reply_error
from orchestra._scripts import script
from orchestra.errors import StoreError
from orchestra.tasks import LANES

EXACT_BELOW = 16
"""Counts below it go through the script: its cost per entry no longer matters, its order does."""
BLOCKED_COUNT = 32
"""Entries per lane that a blocking read may bring: enough to notice a flood, few enough to keep lane order."""
LOWER_SHARE_EVERY = 16
"""Every so many reads the lanes below the busy one get a share, so that none starves."""
BLOCK_MARGIN = 5.0
"""Seconds a blocking read may take beyond its block before its connection counts as broken; never more than the
manager's ``timeout``."""


_SHAPELESS = (TypeError, ValueError, LookupError, AttributeError)


class GroupMissingError(Exception):
    """The stream or its group is gone (FLUSHALL, DEL, XGROUP DESTROY)."""


class StreamReader:
    """The reading end of one consumer. One read at a time."""

    def __init__(self, keys: QueueKeys, group: str, consumer: str, link: Link) -> None:
        self._keys = keys
        self._group = group
        self.consumer = consumer
        self.link = link
        self._client_id: int | None = None
        self._identified: Wire | None = None
        self._blocked = False
        self._by_key = {key.encode(): lane for lane, key in enumerate(keys.lanes)}
        self._busy = LANES - 1
        self._flooded = False
        self._reads = 0
        self._rank = 0
        self._take = script("take")

    async def read(self, count: int, block_ms: int, *, exact: bool = False) -> list[Delivery]:
        """Up to ``count`` deliveries; waits up to ``block_ms`` for the first.

        ``exact``: nothing less urgent while something more urgent waits, whatever it costs.

        A ``count`` below the number of lanes may bring a few more after a block, when several lanes fill in the same
        moment; the caller gives those back.

        Raises:
            GroupMissingError: nothing can be read until the groups exist.
            StoreUnavailableError: what was delivered, if anything, is to be looked for (``_queue.ghosts``).
        """
        if exact or count < EXACT_BELOW or (block_ms <= 0 and not self._flooded):
            found = await self._read_exactly(count, None if exact else self._favoured())
        elif self._flooded:
            found = await self._read_split(count)
        else:
            found = []
        if not found and block_ms > 0:
            found = await self._read_blocking(count, block_ms)
        return found

    def _favoured(self) -> int | None:
        """The lane whose turn it is: each of the lower ones about once in :data:`LOWER_SHARE_EVERY` reads."""
        self._reads += 1
        turn, rest = divmod(self._reads, LOWER_SHARE_EVERY // (LANES - 1))
        return 1 + turn % (LANES - 1) if rest == 0 else None

    async def _read_exactly(self, count: int, favoured: int | None) -> list[Delivery]:
        args = (self._group, self.consumer, count, "" if favoured is None else favoured)
        reply = (await self.link.run((Call(self._take, self._keys.lanes, args),)))[0]
        _check(reply, self.link)
        try:
            return [delivery for lane, entries in reply for delivery in self._deliveries(lane, entries)]
        except _SHAPELESS as error:
            raise _foreign(error, self.link) from error

    async def _read_split(self, count: int) -> list[Delivery]:
        """Most of ``count`` from the busy lane, a probe of each lane above it."""
        self._reads += 1
        busy = self._busy
        probe = max(1, count // 16)
        share = self._reads % LOWER_SHARE_EVERY == 0 and busy < LANES - 1
        lower = range(busy + 1, LANES) if share else range(0)
        most = count - probe * (busy + len(lower))
        asked = dict.fromkeys(range(busy), probe) | {busy: most} | dict.fromkeys(lower, probe)
        commands = [self._command(probe, range(busy))] if busy else []
        commands.append(self._command(most, (busy,)))
        if share:
            commands.append(self._command(probe, lower))
        found = self._collect(await self.link.send(pack(commands), len(commands), shared=False))
        self._aim(found, asked)
        return [delivery for lane in sorted(found) for delivery in found[lane]]

    def _aim(self, found: dict[int, list[Delivery]], asked: dict[int, int]) -> None:
        """The busy lane is the most urgent one that gave all it was asked for; none: one below the present one."""
        full = [lane for lane, wanted in asked.items() if len(found.get(lane, ())) >= wanted]
        self._busy = min(full) if full else min(self._busy + 1, LANES - 1)
        self._flooded = bool(found)

    async def _read_blocking(self, count: int, block_ms: int) -> list[Delivery]:
        each = max(1, min(count // LANES, BLOCKED_COUNT))
        command = self._command(each, range(LANES), block_ms)
        await self._identify()
        self._blocked = True
        try:
            timeout = block_ms / 1000 + min(BLOCK_MARGIN, self.link.manager.timeout)
            found = self._collect(await self.link.send(pack((command,)), 1, timeout, shared=False))
        finally:
            self._blocked = False
        self._flooded = any(len(entries) >= each for entries in found.values())
        if self._flooded:
            self._busy = min(lane for lane, entries in found.items() if len(entries) >= each)
        return [delivery for lane in sorted(found) for delivery in found[lane]]

    def _command(self, count: int, lanes: Sequence[int], block_ms: int = 0) -> tuple[Any, ...]:
        block = ("BLOCK", block_ms) if block_ms else ()
        streams = [self._keys.lanes[lane] for lane in lanes]
        head = ("XREADGROUP", "GROUP", self._group, self.consumer, "COUNT", count, *block, "STREAMS")
        return (*head, *streams, *(b">" for _ in streams))

    def _collect(self, replies: list[Any]) -> dict[int, list[Delivery]]:
        found: dict[int, list[Delivery]] = {}
        for reply in replies:
            _check(reply, self.link)
            try:
                for key, entries in reply or ():
                    lane = self._by_key[key]
                    found[lane] = self._deliveries(lane, entries)
            except _SHAPELESS as error:
                raise _foreign(error, self.link) from error
        return found

    def _deliveries(self, lane: int, entries: list[Any]) -> list[Delivery]:
        consumer, rank = self.consumer, self._rank
        self._rank = rank + len(entries)
        return [Delivery(lane, entry, fields, consumer, 1, rank + i) for i, (entry, fields) in enumerate(entries)]

    async def _identify(self) -> None:
        """Learn the server's id of this connection, by which :meth:`wake` can be told apart from the others."""
        wire = await self.link.wire()
        if wire is not self._identified:
            reply = (await self.link.send(pack((("CLIENT", "ID"),)), 1))[0]
            self._client_id = reply if isinstance(reply, int) else None  # an ACL may forbid it
            self._identified = wire

    async def wake(self, commands: Link) -> None:
        """Make a read of this consumer that blocks return now, through another connection. Best effort."""
        if self._blocked and self._client_id is not None:
            await commands.send(pack((("CLIENT", "UNBLOCK", self._client_id),)), 1)


def _foreign(error: Exception, link: Link) -> StoreError:
    """What a server answers that is not the Redis we know; what it delivered comes back after its lease."""
    return StoreError(f"{link.manager.address.safe} answered a read with what is no reply to it: {error!r}")


def _check(reply: Any, link: Link) -> None:
    if isinstance(reply, ReplyError):
        if reply_code(reply) in {"NOGROUP", "UNBLOCKED"}:
            raise GroupMissingError(str(reply))
        raise reply_error(reply, link.manager.address.safe) from reply
