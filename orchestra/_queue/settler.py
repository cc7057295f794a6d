"""Settles batches of deliveries on Redis: sends the planned calls, repeats what got no answer, tells which were STALE.

Owns what is known of each delivery between the first attempt and the answer. A call that was answered is never sent
again, so its STALE deliveries are exact. A call whose reply was lost (or was an error after the script had begun) is
repeated; what it does not find then was either settled by the first attempt or had been taken over, which nobody can tell
apart, and counts as settled. An error reply to one call does not keep the others from settling; it is raised after them,
and the deliveries concerned stay held, so settling the whole batch again is right whatever happened. Refuses to own what
a verdict means (:mod:`orchestra._queue.settle`) and when to give up for good (the caller).

One event loop. Concurrent calls are safe as long as they settle different deliveries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from orchestra import telemetry
from orchestra._delivery import Cancel, Delivery, Verdict
from orchestra._queue.settle import SettlePlanner, Settling
from orchestra._redis.link import Link
from orchestra._redis.wire import reply_code, reply_error
from orchestra.errors import ForkedProcessError, StoreError, StoreUnavailableError

Batch: TypeAlias = Sequence[tuple[Delivery, Verdict]]

MOST_UNSURE = 100_000
"""Deliveries remembered, at most, from calls that raised; the oldest are forgotten."""


@dataclass(slots=True)
class _Work:
    """One batch on its way: calls still to be answered, and what the others have brought."""

    open: list[Settling] = field(default_factory=list)
    answered: list[Settling] = field(default_factory=list)
    refused: list[tuple[Settling, StoreError]] = field(default_factory=list)
    stale: list[Delivery] = field(default_factory=list)


class Settler:
    """Settles what one queue object has read. ``held[stream]`` maps entry ids to deliveries; what has ended leaves it."""

    def __init__(
        self,
        queue: str,
        planner: SettlePlanner,
        link: Callable[[], Awaitable[Link]],
        held: Sequence[dict[bytes, Delivery]],
        *,
        patience: float,
        group_lost: Callable[[], None],
    ) -> None:
        self._queue = queue
        self._planner = planner
        self._link = link
        self._held = held
        self._patience = patience
        self._group_lost = group_lost
        self._fates: dict[Delivery, bool | None] = {}
        """What a call that raised has left behind: True was STALE, False was settled, None was perhaps settled."""

    async def settle(self, batch: Batch) -> list[Delivery]:
        """End deliveries in one round trip; returns those that were STALE, which changed nothing.

        See :meth:`~orchestra.task_queue.RedisStreamTaskQueue.settle`.
        """
        if not batch:
            return []
        todo, stale = self._recall(batch) if self._fates else (batch, [])
        work = _Work()
        try:
            work.open = self._plan(todo)
            link = await self._link()
            await link.patiently(lambda: self._rounds(link, work), self._patience)
        except BaseException:
            self._remember(work)
            raise
        if work.refused:
            self._remember(work)
            raise work.refused[0][1]
        if self._fates:
            for delivery, _ in batch:
                self._fates.pop(delivery, None)
        return stale + work.stale

    def _plan(self, batch: Batch) -> list[Settling]:
        return self._planner.plan(batch, [len(lane) for lane in self._held])

    def _recall(self, batch: Batch) -> tuple[Batch, list[Delivery]]:
        """``batch`` without what an earlier call has ended, and what that call found STALE."""
        fates = self._fates
        todo = [(delivery, verdict) for delivery, verdict in batch if fates.get(delivery) is None]
        return todo, [delivery for delivery, _ in batch if fates.get(delivery)]

    def _remember(self, work: _Work) -> None:
        """Settling has failed: what was answered is answered when the batch comes again."""
        unsettled = {id(d) for settling in (*work.open, *(s for s, _ in work.refused)) for d in settling.deliveries}
        stale = {id(delivery) for delivery in work.stale}
        for settling in work.answered:
            for delivery in settling.deliveries:
                if id(delivery) not in unsettled:
                    self._fates[delivery] = id(delivery) in stale
        while len(self._fates) > MOST_UNSURE:
            del self._fates[next(iter(self._fates))]

    async def _rounds(self, link: Link, work: _Work) -> None:
        """Send the open calls until every one is answered.

        Raises:
            StoreUnavailableError: some were not, and should be sent again.
        """
        while work.open:
            await link.wire()  # while there is no connection nothing is sent, and nothing is in doubt
            calls, work.open = work.open, []
            try:
                replies = await _send(link, calls)
            except BaseException:
                work.open = calls
                self._doubt(calls)
                raise
            if lost := self._take(link, calls, replies, work):
                raise lost

    def _take(self, link: Link, calls: list[Settling], replies: list[Any], work: _Work) -> StoreUnavailableError | None:
        """Note every answer; the error because of which some calls are to be sent again."""
        lost = None
        for settling, reply in zip(calls, replies, strict=True):
            if not isinstance(reply, Exception):
                self._answered(settling, reply, work)
                continue
            error = self._refusal(link, settling, reply)
            if error is None:
                self._answered(settling, [delivery.entry for delivery in settling.deliveries], work)
            elif isinstance(error, StoreUnavailableError):
                work.open.append(settling)
                lost = error
            else:
                work.refused.append((settling, error))
        return lost

    def _refusal(self, link: Link, settling: Settling, reply: Exception) -> StoreError | None:
        """The error that a reply, or its absence, means; None if nothing is left that could be settled."""
        if isinstance(reply, StoreUnavailableError):
            self._doubt((settling,))
            return reply
        if reply_code(reply) == "NOGROUP":
            self._group_lost()
            return None
        if "script:" in str(reply):  # raised within it, so a part of its work may have been done
            self._doubt((settling,))
        return reply_error(reply, link.manager.address.safe)

    def _answered(self, settling: Settling, gone: list[bytes], work: _Work) -> None:
        """The deliveries of a call have ended, but for the ids ``gone``: STALE, or marked as cancelled."""
        work.answered.append(settling)
        deliveries = settling.deliveries
        held = self._held[deliveries[0].stream]
        if gone:
            deliveries = self._sort_out(settling, gone, work)
        for delivery in deliveries:
            other = held.pop(delivery.entry, delivery)
            if other is not delivery:
                held[other.entry] = other  # handed out again since, to this process too
        ended = len(settling.deliveries) - len(gone)
        if ended and settling.call.script.name == "cancelled":
            telemetry.emit("queue.cancelled", {"count": ended}, {"queue": self._queue})

    def _sort_out(self, settling: Settling, gone: list[bytes], work: _Work) -> list[Delivery]:
        """Note what was STALE, and open a call for what is to end as cancelled; the deliveries that need no more."""
        ids, fates = set(gone), self._fates
        marked: list[tuple[Delivery, Verdict]] = []
        ended = []
        for delivery in settling.deliveries:
            if b"!" + delivery.entry in ids:
                fates.pop(delivery, None)  # still ours, whatever became of an earlier attempt
                marked.append((delivery, Cancel()))
                continue
            ended.append(delivery)
            if delivery.entry in ids and delivery not in fates:
                work.stale.append(delivery)
        if marked:
            work.open += self._plan(marked)
        return ended

    def _doubt(self, calls: Sequence[Settling]) -> None:
        for settling in calls:
            self._fates.update(dict.fromkeys(settling.deliveries))

    def forget(self) -> None:
        """Forget what calls that raised have left behind: nobody will ask for it again."""
        self._fates.clear()


async def _send(link: Link, calls: Sequence[Settling]) -> list[Any]:
    """One reply or StoreUnavailableError per call; together in one round trip, each with an answer of its own."""
    if len(calls) == 1:
        return [await _answer(link, calls[0])]
    return await asyncio.gather(*(_answer(link, settling) for settling in calls))


async def _answer(link: Link, settling: Settling) -> Any:
    try:
        return (await link.run((settling.call,)))[0]
    except ForkedProcessError:
        raise
    except StoreUnavailableError as error:
        return error
