"""What one queue object has been handed: reads, takes over, keeps leases, and knows every delivery it holds.

Owns the ``held`` maps and their invariant: a delivery is held from the moment its hand-over is known until it has ended,
and whatever is held has been returned to a caller. A call that fails or is cancelled with deliveries in hand lets them go;
they are pending for a consumer that does not know them, and :mod:`orchestra._queue.ghosts` finds them. Refuses to own
settling and what a task means.

One event loop. Reads of one consumer take turns, so do take-overs: what is on its way must not look like a ghost.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from orchestra._delivery import Again, Delivery, Verdict, hold
from orchestra._keys import QueueKeys
from orchestra._queue.base import LeaseLost, Maintenance
from orchestra._queue.ghosts import Ghosts
from orchestra._queue.group import StreamGroup
from orchestra._queue.leases import Holding, LeaseKeeper
from orchestra._queue.read import GroupMissingError, StreamReader
from orchestra._queue.upkeep import StreamUpkeep, Taken
from orchestra._redis.link import Link
from orchestra.errors import StoreError
from orchestra.tasks import LANES, check_name

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

T = TypeVar("T")
Settle: TypeAlias = Callable[[Sequence[tuple[Delivery, Verdict]]], Awaitable[Any]]
logger = logging.getLogger("orchestra.queue")


class _Consumer:
    """One consumer of this object: its reading end, what it may have missed, and whose turn it is."""

    __slots__ = ("asked", "ghosts", "reader", "turn")

    def __init__(self, reader: StreamReader, ghosts: Ghosts) -> None:
        self.reader = reader
        self.ghosts = ghosts
        self.turn = asyncio.Lock()
        self.asked = math.inf
        """When the read began that is under way, monotonic seconds."""


class Intake:
    """The receiving end of one queue object."""

    def __init__(
        self,
        queue: str,
        keys: QueueKeys,
        group: str,
        *,
        manager: Callable[[], ConnectionManager],
        commands: Callable[[], Awaitable[Link]],
        lease: float,
        max_stall: float,
        patience: float,
    ) -> None:
        self._queue = queue
        self._keys = keys
        self._group_name = group
        self._manager = manager
        self._commands = commands
        self._lease = lease
        self._max_stall = max_stall
        self.group = StreamGroup(queue, keys, group, commands, patience, self._gone)
        self.held: tuple[dict[bytes, Delivery], ...] = tuple({} for _ in keys.streams)
        self._consumers: dict[str, _Consumer] = {}
        self._takers: dict[str, Callable[[list[Delivery]], None]] = {}
        self._keepers: dict[str, LeaseKeeper] = {}
        self._taking = asyncio.Lock()
        self._taking_since = math.inf
        self._upkeep: StreamUpkeep
        self._settle: Settle

    def attach(self, upkeep: StreamUpkeep, settle: Settle) -> None:
        """The two parts of the queue that need this one to be made."""
        self._upkeep, self._settle = upkeep, settle

    # -- reading

    async def read(self, consumer: str, count: int, block_ms: int, exact: bool) -> list[Delivery]:
        """See :meth:`~orchestra.task_queue.RedisStreamTaskQueue.read`."""
        mine = self._consumers.get(consumer) or await self._open(consumer)
        if not self.group.ready:
            await self.group.ensure()
        async with mine.turn:
            found: list[Delivery] = []
            if mine.ghosts.looks:
                found = await self._take_ghosts(mine, count)
                if block_ms and mine.ghosts.looks:
                    block_ms = max(1, min(block_ms, int(1000 * mine.ghosts.due_in())))
            if not found:
                found = await self._receive(mine, count, block_ms, exact)
        if len(found) > count:
            try:
                await self.release(consumer, found[count:])
            except BaseException:
                self.drop(consumer, found)
                raise
            del found[count:]
        return found

    def deliver_to(self, consumer: str, take: Callable[[list[Delivery]], None] | None) -> None:
        """See :meth:`~orchestra._queue.base.BaseTaskQueue.deliver_to`."""
        if take is None:
            self._takers.pop(consumer, None)
        else:
            self._takers[consumer] = take
        if consumer in self._consumers:
            self._consumers[consumer].reader.arrived = self._arrived(consumer)

    def _arrived(self, consumer: str) -> Callable[[list[Delivery]], None] | None:
        """What holds and hands over the deliveries of a blocked read, in the callback in which they arrive."""
        take, held = self._takers.get(consumer), self.held
        if take is None:
            return None

        def arrived(found: list[Delivery]) -> None:
            hold(held, found)
            take(found)

        return arrived

    async def _receive(self, mine: _Consumer, count: int, block_ms: int, exact: bool) -> list[Delivery]:
        mine.asked = time.monotonic()
        try:
            found = await mine.reader.read(count, block_ms, exact=exact)
            hold(self.held, found)
        except GroupMissingError as error:
            logger.warning("queue %s: %s", self._queue, error)
            self._upkeep.stay_quiet("server_changed" if await self.group.verify() else "")
            return []
        except BaseException:
            mine.ghosts.suspect(block_ms / 1000)
            raise
        finally:
            mine.asked = math.inf
        return found

    async def _take_ghosts(self, mine: _Consumer, room: int) -> list[Delivery]:
        if mine.ghosts.due_in() > 0:
            return []
        async with self._taking:
            self._taking_since = time.monotonic()
            try:
                found, lost = await mine.ghosts.take(room)
                self._hold(found)
            finally:
                self._taking_since = math.inf
        for lane in {int(message_id[0]) % LANES for message_id in lost}:
            gone = [message_id for message_id in lost if int(message_id[0]) % LANES == lane]
            self._upkeep.tell_lost(lane, gone, len(gone))
        return found

    async def release(self, consumer: str, deliveries: list[Delivery]) -> None:
        """Put back what is not wanted; what cannot be put back now is a ghost, and found later."""
        try:
            await self._settle([(delivery, Again(0.0, "released")) for delivery in deliveries])
        except BaseException as error:
            self.drop(consumer, deliveries)
            if not isinstance(error, StoreError):
                raise
            logger.warning("queue %s: %d deliveries could not be put back: %s", self._queue, len(deliveries), error)

    async def wake(self, consumer: str) -> None:
        """Make a blocked read of ``consumer`` return now. Best effort; one round trip."""
        mine = self._consumers.get(consumer)
        if mine is not None:
            try:
                await mine.reader.wake(await self._commands())
            except StoreError as error:
                logger.debug("queue %s: could not wake %s: %s", self._queue, consumer, error)

    # -- taking over

    async def maintain(self, consumer: str, room: int, alone: bool | None) -> Maintenance:
        """See :meth:`~orchestra.task_queue.RedisStreamTaskQueue.maintain`."""
        tick = await self._take(consumer, self._upkeep.run(consumer, room, alone), lambda tick: tick.taken)
        await self._bury(consumer, tick.taken)
        return Maintenance(tick.taken.deliveries, tick.next_in, tick.cancels, tick.taken.suspects)

    async def reclaim(self, consumer: str, room: int, idle_ms: int) -> list[Delivery]:
        """See :meth:`~orchestra.task_queue.RedisStreamTaskQueue.reclaim`."""
        taken = await self._take(consumer, self._upkeep.reclaim(consumer, room, idle_ms), lambda taken: taken)
        await self._bury(consumer, taken)
        return taken.deliveries

    async def _take(self, consumer: str, work: Awaitable[T], taken_of: Callable[[T], Taken]) -> T:
        """Hold what ``work`` takes over."""
        async with self._taking:
            self._taking_since = time.monotonic()
            try:
                result = await work
                taken = taken_of(result)
                self._hold(taken.deliveries)
                self._hold(delivery for delivery, _ in taken.pills)
            except BaseException:
                if consumer in self._consumers:
                    self._consumers[consumer].ghosts.suspect()
                raise
            finally:
                self._taking_since = math.inf
        return result

    async def _bury(self, consumer: str, taken: Taken) -> None:
        """Dead-letter the poison pills; when that fails, their next holder does."""
        if not taken.pills:
            return
        try:
            await self._settle(taken.pills)
        except StoreError as error:
            logger.warning("queue %s: poison pills could not be buried: %s", self._queue, error)
            self.drop("", [delivery for delivery, _ in taken.pills])
        except BaseException:
            self.drop("", [delivery for delivery, _ in taken.pills])
            self.drop(consumer, taken.deliveries)
            raise

    # -- holding

    def _hold(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            self.held[delivery.stream][delivery.entry] = delivery

    def drop(self, consumer: str, deliveries: Iterable[Delivery]) -> None:
        """Hold no longer what no caller will hear of; the next read of ``consumer`` finds it."""
        for delivery in deliveries:
            if self.held[delivery.stream].get(delivery.entry) is delivery:
                del self.held[delivery.stream][delivery.entry]
        if consumer in self._consumers:
            self._consumers[consumer].ghosts.suspect()

    def _gone(self, streams: Sequence[int]) -> int:
        """The group of these streams was taken away: nobody holds anything there any more."""
        given_up = [delivery for number in streams for delivery in self.held[number].values() if not delivery.lost]
        for delivery in given_up:
            keeper = self._keepers.get(delivery.consumer)
            if keeper is not None:
                keeper.lose((delivery,))
            delivery.lost = True
        return len(given_up)

    def asked(self) -> float:
        """When the oldest call began that is under way and may bring deliveries; infinity if none is. Any thread."""
        reads = min((mine.asked for mine in list(self._consumers.values())), default=math.inf)
        return min(reads, self._taking_since)

    @asynccontextmanager
    async def keep_leases(self, consumer: str, on_lost: LeaseLost) -> AsyncIterator[None]:
        """See :meth:`~orchestra.task_queue.RedisStreamTaskQueue.keep_leases`."""
        holding = Holding(
            keys=self._keys,
            queue=self._queue,
            group=self._group_name,
            consumer=consumer,
            lease=self._lease,
            max_stall=self._max_stall,
            held=self.held,
            asked=self.asked,
        )
        keeper = LeaseKeeper(self._manager(), holding, on_lost)
        self._keepers[consumer] = keeper
        self._upkeep.regular += 1
        try:
            async with keeper:
                yield
        finally:
            self._upkeep.regular -= 1
            if self._keepers.get(consumer) is keeper:
                del self._keepers[consumer]

    # -- connections

    async def _open(self, consumer: str) -> _Consumer:
        check_name("consumer_name", consumer)
        manager = self._manager()
        await self._commands()  # connects, and refuses another event loop
        if consumer not in self._consumers:
            ghosts = Ghosts(self._queue, self._keys, self._group_name, consumer, self.held, self._commands)
            link = Link(manager, "reader", self._queue, self._upkeep.reopened)
            reader = StreamReader(self._keys, self._group_name, consumer, link)
            reader.arrived = self._arrived(consumer)
            self._consumers[consumer] = _Consumer(reader, ghosts)
        return self._consumers[consumer]

    def reopened(self) -> None:
        """The connection for commands is another one: a take-over may have lost its reply."""
        self._upkeep.reopened()
        for mine in self._consumers.values():
            mine.ghosts.suspect()

    async def retire(self, consumer: str) -> None:
        """Forget ``consumer``, unless it still holds deliveries; one round trip."""
        await self._upkeep.retire(consumer)
        mine = self._consumers.pop(consumer, None)
        if mine is not None:
            await mine.reader.link.close()

    async def close(self) -> None:
        """Close the connections of readers; whatever is found next is a first start."""
        for mine in self._consumers.values():
            await mine.reader.link.close()
        self._consumers.clear()
        await self.group.close()
