"""Reads deliveries for one consumer, most urgent lane first, on a connection of its own.

A lane is two streams: what was there before and comes back stands in the one before it, and is read first. It is mostly
empty, and travels in the same commands, so that it costs a plain task nothing.

Three commands, chosen by what the last read found: a script that respects lane order exactly, for small counts; a
pipeline of two XREADGROUPs for large ones, while a stream gives all it is asked for; and else one blocking XREADGROUP
over all streams, which returns at once where there is something: so no round trip finds out that there is nothing.
What is asked for together never exceeds the count, so nothing has to be put back (but see ``surplus``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orchestra._delivery import Delivery, arrivals
from orchestra._keys import QueueKeys
from orchestra._redis.link import Call, Link
from orchestra._redis.wire import ReplyError, Wire, pack, reply_code, reply_error
from orchestra._scripts import script
from orchestra.errors import StoreError
from orchestra.tasks import LANES

EXACT_BELOW = 16
"""Counts below it go through the script: its cost per entry no longer matters, its order does."""
BLOCKED_COUNT = 64
"""Entries per stream that a blocking read may bring: enough to notice a flood, few enough to keep lane order."""
LOWER_SHARE_EVERY = 16
"""Every so many reads the lanes below the busy one get a share, so that none starves."""
BLOCK_MARGIN = 5.0
"""Seconds a blocking read may take beyond its block before its connection counts as broken; never more than the
manager's ``timeout``."""


ORDER = tuple(number for lane in range(LANES) for number in (lane + LANES, lane))
"""The streams, most urgent first."""
LAST = len(ORDER) - 1
PROBES = 32
"""Of a large read, one part in so many is asked of each stream above the busy one."""

_SHAPELESS = (TypeError, ValueError, LookupError, AttributeError, OverflowError)


class GroupMissingError(Exception):
    """The stream or its group is gone (FLUSHALL, DEL, XGROUP DESTROY)."""


class _Given:
    """Hands the replies to one blocking read over as they arrive; what it cannot take is left to whoever awaits them."""

    __slots__ = ("count", "each", "reader", "taken")

    def __init__(self, reader: StreamReader, count: int, each: int) -> None:
        self.reader, self.count, self.each = reader, count, each
        self.taken = False

    def __call__(self, replies: list[Any]) -> None:
        reader = self.reader
        if reader.arrived is None:
            return
        try:
            found = reader._blocked_found(replies, self.each)
        except (GroupMissingError, StoreError):
            return
        if found and len(found) <= self.count:
            self.taken = True
            reader.arrived(found)


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
        self._by_key = {keys.streams[number].encode(): place for place, number in enumerate(ORDER)}
        self._busy = LAST
        self._flooded = False
        self._reads = 0
        self._fronts = 0
        """Reads in a row that brought only what stands before its lane."""
        self._kept_out = 0
        """The lane that has to wait for that."""
        self._rank = 0
        self._take = script("take")
        self.arrived: Callable[[list[Delivery]], None] | None = None
        """Gets what a blocking read brings in the callback in which it arrives; such a read returns nothing."""

    async def read(self, count: int, block_ms: int, *, exact: bool = False) -> list[Delivery]:
        """Up to ``count`` deliveries; waits up to ``block_ms`` for the first.

        ``exact``: nothing less urgent while something more urgent waits, whatever it costs.

        A ``count`` below the number of streams may bring a few more after a block, when several fill in the same moment; the caller gives those back.

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
        """The stream whose turn it is: of each lower lane about once in :data:`LOWER_SHARE_EVERY` reads.

        And a lane itself as often, where all that is read stands before it: what comes back again and again must not
        keep it out for ever.
        """
        self._reads += 1
        if self._fronts >= LOWER_SHARE_EVERY:
            self._fronts = 0
            return self._kept_out
        turn, rest = divmod(self._reads, LOWER_SHARE_EVERY // (LANES - 1))
        return LANES + 1 + turn % (LANES - 1) if rest == 0 else None

    async def _read_exactly(self, count: int, favoured: int | None) -> list[Delivery]:
        args = (self._group, self.consumer, count, "" if favoured is None else favoured)
        reply = (await self.link.run((Call(self._take, self._keys.streams, args),)))[0]
        _check(reply, self.link)
        try:
            fronts = [number - LANES for number, _ in reply if number >= LANES]
            if fronts and len(fronts) == len(reply):
                self._fronts, self._kept_out = self._fronts + 1, fronts[0]
            else:
                self._fronts = 0
            return [delivery for number, entries in reply for delivery in self._deliveries(number, entries)]
        except _SHAPELESS as error:
            raise _foreign(error, self.link) from error

    async def _read_split(self, count: int) -> list[Delivery]:
        """Most of ``count`` from the busy stream, a probe of each above it. Streams are told by their place in the order."""
        self._reads += 1
        busy = self._busy
        probe = max(1, count // PROBES)
        share = self._reads % LOWER_SHARE_EVERY == 0 and busy < LAST
        lower = range(busy + 1, LAST + 1) if share else range(0)
        behind = max(1, count // 4) if ORDER[busy] >= LANES else 0  # what comes back again and again keeps no lane out
        most = count - probe * (busy + len(lower)) - behind
        asked = dict.fromkeys(range(busy), probe) | {busy: most} | dict.fromkeys(lower, probe)
        commands = [self._command(probe, range(busy))] if busy else []
        commands.append(self._command(most, (busy,)))
        if behind:
            asked[busy + 1] = behind
            commands.append(self._command(behind, (busy + 1,)))
            lower = lower[1:]
        if lower:
            commands.append(self._command(probe, lower))
        found = self._collect(await self.link.send(pack(commands), len(commands), shared=False))
        self._aim(found, asked)
        return [delivery for place in sorted(found) for delivery in found[place]]

    def _aim(self, found: dict[int, list[Delivery]], asked: dict[int, int]) -> None:
        """The busy stream is the most urgent one that gave all it was ``asked`` for; none: there is no flood."""
        full = [place for place, entries in found.items() if len(entries) >= asked[place]]
        self._flooded = bool(full)
        if full:
            self._busy = min(full)

    async def _read_blocking(self, count: int, block_ms: int) -> list[Delivery]:
        each = max(1, min(count // len(ORDER), BLOCKED_COUNT))
        command = self._command(each, range(len(ORDER)), block_ms)
        await self._identify()
        self._blocked = True
        try:
            timeout = block_ms / 1000 + min(BLOCK_MARGIN, self.link.manager.timeout)
            given = _Given(self, count, each) if self.arrived is not None else None
            replies = await self.link.send(pack((command,)), 1, timeout, shared=False, arrived=given)
        finally:
            self._blocked = False
        return self._blocked_found(replies, each) if given is None or not given.taken else []

    def _blocked_found(self, replies: list[Any], each: int) -> list[Delivery]:
        """What a blocking read has brought, ``each`` of a stream at the most."""
        found = self._collect(replies)
        self._aim(found, dict.fromkeys(found, each))
        if len(found) == 1:
            return next(iter(found.values()))
        return [delivery for place in sorted(found) for delivery in found[place]]

    def _command(self, count: int, places: Sequence[int], block_ms: int = 0) -> tuple[Any, ...]:
        block = ("BLOCK", block_ms) if block_ms else ()
        streams = [self._keys.streams[ORDER[place]] for place in places]
        head = ("XREADGROUP", "GROUP", self._group, self.consumer, "COUNT", count, *block, "STREAMS")
        return (*head, *streams, *(b">" for _ in streams))

    def _collect(self, replies: list[Any]) -> dict[int, list[Delivery]]:
        found: dict[int, list[Delivery]] = {}
        for reply in replies:
            _check(reply, self.link)
            try:
                for key, entries in reply or ():
                    place = self._by_key[key]
                    found[place] = self._deliveries(ORDER[place], entries)
            except _SHAPELESS as error:
                raise _foreign(error, self.link) from error
        return found

    def _deliveries(self, number: int, entries: list[Any]) -> list[Delivery]:
        consumer, rank = self.consumer, self._rank
        self._rank = rank + len(entries)
        return arrivals(Delivery, number, entries, consumer, rank)

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
