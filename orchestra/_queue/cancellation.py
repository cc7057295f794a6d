"""Cancels tasks by id, and knows which tasks this process has been asked to stop.

Owns the script call behind ``queue.cancel`` and the marks that one queue object has heard of. A mark ``task id → T`` means
every entry of that id whose entry id is not newer than T (milliseconds), so a task that is sent later is not touched. It
is made only where a task was not found waiting; its holder looks it up and settles with
:class:`~orchestra._delivery.Cancel`, and ``retry.lua`` refuses to move a marked task. Hence no delayed task is ever covered
by a mark older than itself. Refuses to own when marks are fetched (the maintenance tick) and who acts on them.

One event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from orchestra import telemetry
from orchestra._delivery import Delivery, cancelled_record, frame_ident, read_record
from orchestra._keys import QueueKeys
from orchestra._redis.link import Call, Link
from orchestra._redis.wire import ReplyError, pack, reply_error
from orchestra._scripts import Arg, script
from orchestra.errors import CorruptEntryError, StoreError
from orchestra.serialization import decode_header
from orchestra.tasks import Cancellation, check_ident

MARK_TTL_MS = 24 * 3_600_000
"""How long a mark is kept, in Redis and here."""
MOST_MARKS = 100_000
"""Marks kept at most; the oldest go first."""
MARK_WAIT = 0.002
"""Most seconds that a cancel waits for the millisecond of its mark to pass."""

_MESSAGE_ID = re.compile(r"[0-7]:(\d{1,20})-(\d{1,20})")


class CancelMarks:
    """The cancel marks that one queue object has heard of. False while there are none."""

    def __init__(self) -> None:
        self.newest = 0
        """Score of the newest mark, milliseconds of the Redis clock."""
        self._marks: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._marks)

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, flat: Sequence[bytes]) -> bool:
        """Take what a tick returned, ``task id, milliseconds, …``; True when there was anything new. O(given)."""
        marks, fresh = self._marks, False
        for task_id, score in zip(flat[::2], flat[1::2], strict=True):
            name, until = task_id.decode(), int(float(score))
            if marks.get(name) != until:
                marks.pop(name, None)  # reinserted at the end: they stay in the order in which they were made
                marks[name] = until
                fresh = True
            self.newest = max(self.newest, until)
        if fresh:
            self._forget()
        return fresh

    def _forget(self) -> None:
        oldest = self.newest - MARK_TTL_MS
        while self._marks:
            name = next(iter(self._marks))
            if len(self._marks) <= MOST_MARKS and self._marks[name] >= oldest:
                return
            del self._marks[name]

    def covers(self, delivery: Delivery) -> bool:
        """Whether ``delivery`` is of a marked task, and not newer than the mark. O(1); decodes the header once."""
        try:
            until = self._marks.get(delivery.header.id)
        except CorruptEntryError:
            return False  # it has no id; whoever takes it buries it
        return until is not None and int(delivery.entry.partition(b"-")[0]) <= until


class Canceller:
    """Cancels tasks of one queue. ``link`` gives the connection to use."""

    def __init__(
        self,
        queue: str,
        keys: QueueKeys,
        group: str,
        link: Callable[[], Awaitable[Link]],
        *,
        result_ttl: float,
        patience: float,
    ) -> None:
        self._queue = queue
        self._keys = keys
        self._group = group
        self._link = link
        self._ttl_ms = int(result_ttl * 1000)
        self._patience = patience

    async def cancel(self, task_id: str, message_id: str | None) -> Cancellation:
        """See :meth:`~orchestra.task_queue.RedisStreamTaskQueue.cancel`.

        One round trip, and one more to tell a sender who waits. Repeated after a lost reply it gives the same answer: what
        it removed has left a record.
        """
        record = cancelled_record(check_ident("task id", task_id))
        link = await self._link()
        call = self._call(task_id, message_id, record)

        async def attempt() -> list[bytes]:
            reply = (await link.run((call,)))[0]
            if isinstance(reply, ReplyError):
                raise reply_error(reply, link.manager.address.safe) from reply
            answer: list[bytes] = reply
            return answer

        (word, fact), repeated = await link.patiently(attempt, self._patience)
        answer = Cancellation(word.decode())
        if answer is Cancellation.CANCELLED:
            telemetry.emit("queue.cancelled", {"count": 1}, {"queue": self._queue})
            await self._tell(link, fact, record)
        elif answer is Cancellation.REQUESTED:
            # What the caller sends after this is newer than the mark, so that it is not covered.
            await asyncio.sleep(min(MARK_WAIT, (int(fact) + 1) / 1000))
        elif repeated and read_record(fact).get("outcome") == "cancelled":
            return Cancellation.CANCELLED  # by the call whose reply was lost
        return answer

    def _call(self, task_id: str, message_id: str | None, record: bytes) -> Call:
        keys = self._keys
        names = (
            *(*keys.streams, keys.delayed, keys.bodies, *keys.dedup, keys.counters, keys.cancels),
            *(keys.result(task_id), keys.cancelled_steps),
        )
        where = message_id if message_id is not None and _is_entry(message_id) else ""
        args = (task_id, frame_ident(task_id), where, self._group, record, self._ttl_ms, MARK_TTL_MS, MOST_MARKS)
        return Call(script("cancel"), names, args)

    async def steps(self, count: int) -> list[tuple[str, bytes]]:
        """See :class:`~orchestra._queue.base.CancelledSteps`."""
        found = await self._ask("HRANDFIELD", self._keys.cancelled_steps, count, "WITHVALUES")
        return [(name.decode(), frame) for name, frame in zip(found[::2], found[1::2], strict=True)]

    async def forget_steps(self, task_ids: Sequence[str]) -> None:
        """See :class:`~orchestra._queue.base.CancelledSteps`."""
        await self._ask("HDEL", self._keys.cancelled_steps, *task_ids)

    async def _ask(self, *command: Arg) -> Any:
        link, packed = await self._link(), pack((command,))

        async def attempt() -> Any:
            reply = (await link.send(packed, 1))[0]
            if isinstance(reply, ReplyError):
                raise reply_error(reply, link.manager.address.safe) from reply
            return reply

        return (await link.patiently(attempt, self._patience))[0]

    async def _tell(self, link: Link, frame: bytes, record: bytes) -> None:
        """Let a sender who waits know at once; the record is the truth, so a lost hint costs seconds only."""
        with contextlib.suppress(CorruptEntryError, StoreError):
            reply = decode_header(frame).reply
            if reply:
                await link.send(pack((("PUBLISH", self._keys.replies(reply), record),)), 1)


def _is_entry(message_id: str) -> bool:
    """Whether it names an entry of a lane, not a delayed task or something else."""
    match = _MESSAGE_ID.fullmatch(message_id)
    return match is not None and all(int(part) < 1 << 64 for part in match.groups())
