"""Sends encoded tasks to Redis: chunks, repeats that add nothing twice, refusals.

Owns how tasks become script calls, and what their answers mean. Refuses to own encoding and connections. Tasks with
ids of their own are recognised one by one by the script; tasks with generated ids as a call, by a token. Either way a
call may be repeated after a lost reply. Concurrent calls of one event loop are safe.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

from orchestra import telemetry
from orchestra._durability import ACCEPTED, Durability
from orchestra._keys import QueueKeys
from orchestra._redis.durable_send import GROUP, Confirmed, DurableSender
from orchestra._redis.errors import ReplyError, reply_error
from orchestra._redis.link import Call, Link, in_doubt
from orchestra._scripts import Arg, Bound, script
from orchestra.errors import DurabilityError, QueueFullError, StoreError, StoreFullError, StreamExhaustedError
from orchestra.serialization import EncodedTask
from orchestra.tasks import require_int, require_number

CHUNK_TASKS, CHUNK_BYTES = 500, 1 << 20
"""A script call takes at most so many tasks or bytes, which bounds how long it keeps Redis busy (about 2 ms)."""
CHUNKS_IN_FLIGHT = 3
TOKEN_WINDOW_MS = 60_000
"""A call without ids of its own is recognised for so long at least; no repeat of it is executed later."""
MAX_PATIENCE = 30.0
"""Most seconds that a call is repeated for."""
FULL_RETRY_AFTER = 1.0
"""Seconds after which a refused producer is told to try again, while it is not known how fast the queue drains."""
RETRY_AFTER = (0.05, 30.0)
"""Bounds of what it is told when that is known."""

_REPEAT = ord("=")
_serial = itertools.count()
_process = os.urandom(6).hex()


def _reseed() -> None:
    global _process  # noqa: PLW0603 - a forked child must not repeat its parent's tokens
    _process = os.urandom(6).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reseed)


class DrainRate:
    """Estimates, from the refusals of one producer, how long a full queue needs for some room."""

    def __init__(self) -> None:
        self._seen: tuple[float, int] | None = None

    def retry_after(self, now: float, ended: int, over: int) -> float:
        """Seconds until ``over`` tasks may have ended, ``ended`` having done so by the monotonic time ``now``.

        Takes the rate since the refusal before; without one, or when nothing ended since, FULL_RETRY_AFTER.
        """
        seen, self._seen = self._seen, (now, ended)
        if seen is None or now <= seen[0] or ended <= seen[1]:
            return FULL_RETRY_AFTER
        rate = (ended - seen[1]) / (now - seen[0])
        return min(max(over / rate, RETRY_AFTER[0]), RETRY_AFTER[1])


class _Tally:
    """How safe the tasks of one call are: the least number of copies that any part of it reached."""

    __slots__ = ("reached", "why")

    def __init__(self, wanted: int) -> None:
        self.reached = wanted
        self.why = ""

    def note(self, confirmed: Confirmed) -> None:
        if confirmed.reached < self.reached:
            self.reached, self.why = confirmed.reached, confirmed.why


class StreamProducer:
    """The producing end of one queue. ``link`` gives the connection to use.

    Raises:
        ConfigurationError: naming the argument that is out of range.
    """

    def __init__(
        self,
        queue: str,
        keys: QueueKeys,
        link: Callable[[], Awaitable[Link]],
        *,
        max_length: int,
        max_dead: int = 0,
        dedup_window: float,
        patience: float,
        durability: Durability | str = ACCEPTED,
    ) -> None:
        require_int("max_length", max_length, 0, 1 << 53, unit="tasks")
        require_int("max_dead", max_dead, 0, 1 << 53, unit="dead letters")
        require_number("dedup_window", dedup_window, 60.0, 30 * 86_400.0, unit="seconds")
        require_number("patience", patience, 0.0, MAX_PATIENCE, unit="seconds")
        self._queue = queue
        self._link = link
        self._max_length, self._max_dead = max_length, max_dead
        self._limits: Arg = f"{max_length} {max_dead}" if max_dead else max_length
        self._dedup_ms = int(dedup_window * 1000)
        self._patience = self._patient = patience
        self._keys: tuple[str, ...] = (
            *(*keys.lanes, keys.delayed, keys.bodies, *keys.dedup, *keys.tokens, keys.counters),
            *((keys.dlq, *keys.fronts) if max_dead or max_length else ()),
        )
        self._durability = Durability.parse(durability)
        self._durable: DurableSender | None = None
        self._drain = DrainRate()
        self._outbox: list[tuple[EncodedTask, asyncio.Future[str]]] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._script = script("produce")
        limited = bool(max_dead or max_length)
        self._singles = None if limited else (self._lanes(keys, own_ids=False), self._lanes(keys, own_ids=True))
        """The calls that add one task: by whether it has an id of its own, and by lane. Limits are for ``_script``."""
        self._plain, self._plain_keys = script("produce_many"), {} if limited else self._keys_of_lanes(keys)
        self._posting = False
        """Whether a task that was sent at once has not been answered yet."""
        self._posted: asyncio.Future[None] | None = None
        """Done when it has been; made when somebody waits for that."""
        self._known: Link | None = None
        self._together = self._durability.wanted > 0
        """Whether even a single task waits for what else is posted in this turn."""

    def _lanes(self, keys: QueueKeys, *, own_ids: bool) -> tuple[Bound, ...]:
        """What adds one task without delay, of each lane."""
        buckets, window = (keys.dedup, self._dedup_ms) if own_ids else (keys.tokens, TOKEN_WINDOW_MS)
        one, kind = script("produce_one"), "id" if own_ids else "token"
        return tuple(
            Bound(one, (key, *buckets, keys.counters), (window, lane, kind), 2) for lane, key in enumerate(keys.lanes)
        )

    @staticmethod
    def _keys_of_lanes(keys: QueueKeys) -> dict[tuple[bool, int], tuple[str, ...]]:
        """What ``produce_many`` touches: by whether the tasks have ids of their own, and by lane."""
        buckets = {True: keys.dedup, False: keys.tokens}
        return {
            (own, lane): (key, *buckets[own], keys.counters) for own in buckets for lane, key in enumerate(keys.lanes)
        }

    def post(self, task: EncodedTask) -> Awaitable[str]:
        """Send one task; what is returned gives its message id, and is to be awaited at once.

        The first goes at once; those posted while it is under way wait for the end of this iteration of the loop, and
        travel together.
        """
        if not (self._posting or self._outbox or self._together):
            return self._post_at_once(task)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()
        self._outbox.append((task, future))
        if len(self._outbox) == 1:
            loop.call_soon(self._flush)
        return future

    async def _post_at_once(self, task: EncodedTask) -> str:
        """A single task is a matter of latency: few calls lie between this and the write."""
        self._posting = True
        try:
            began = time.monotonic() if telemetry.wanted("queue.produced") else None
            link = self._known
            if link is None or link.ready() is None:
                link = self._known = await self._link()
                self._patient = self._patience_for(link)
            task_id, lane, frame, own_id, delay = task
            try:
                if self._singles is None or delay:
                    reply = await link.script(*self._call((task,), own_ids=own_id), self._patient)
                else:
                    name = task_id if own_id else _token()
                    reply = await link.script(self._singles[own_id][lane], (), (name, frame), self._patient)
            except StoreError as error:
                raise self._explain(error, 1) from error
            if began is None and type(reply) is bytes and reply[0] != _REPEAT:
                return f"{lane}:{reply.decode()}"
            ids: list[str] = []
            repeats = self._read(reply, (task,), ids)
            if began is not None:
                self._tell_produced(1, repeats, began)
            return ids[0]
        finally:
            self._posting = False
            if self._posted is not None:
                self._posted.set_result(None)
                self._posted = None

    async def send(self, tasks: list[EncodedTask]) -> list[str]:
        """Send tasks; returns their message ids in order. See :class:`~orchestra.task_queue.RedisStreamTaskQueue`."""
        own = [i for i, task in enumerate(tasks) if task.own_id]
        tally = _Tally(self._durability.wanted)
        if not own or len(own) == len(tasks):
            ids = await self._send_alike(tasks, tally, own_ids=bool(own))
        else:
            new = [i for i, task in enumerate(tasks) if not task.own_id]
            ids = [""] * len(tasks)
            for indices, own_ids in ((own, True), (new, False)):
                sent = await self._send_alike([tasks[i] for i in indices], tally, own_ids=own_ids)
                for i, message_id in zip(indices, sent, strict=True):
                    ids[i] = message_id
        if tally.reached < self._durability.wanted:
            raise self._unsafe(ids, tally.reached, tally.why)
        return ids

    async def settled(self) -> None:
        """Wait until everything that was posted has been answered."""
        while self._posting or self._outbox or self._sending:
            self._flush()
            if self._posting and self._posted is None:
                self._posted = asyncio.get_running_loop().create_future()
            await asyncio.wait([*self._sending, *((self._posted,) if self._posted else ())])
            await asyncio.sleep(0)  # their done callbacks, which take them out of the set, run in this turn

    async def close(self) -> None:
        """:meth:`settled`, then give back the connection that waits for durability."""
        await self.settled()
        durable, self._durable = self._durable, None
        if durable is not None:
            await durable.close()

    def _flush(self) -> None:
        if not self._outbox:
            return
        task = asyncio.get_running_loop().create_task(self._send_outbox())
        self._sending.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if task.cancelled():  # with the whole loop, maybe before it began: nobody else would send or tell them
            outbox, self._outbox = self._outbox, []
            for _, future in outbox:
                future.cancel()

    async def _send_outbox(self) -> None:
        """Send what has been posted until now: until it starts, more may come, and nothing overtakes it."""
        outbox, self._outbox = self._outbox, []
        if not outbox:  # close() was quicker
            return
        try:
            ids = await self.send([task for task, _ in outbox])
        except DurabilityError as error:
            for (_, future), message_id in zip(outbox, error.message_ids, strict=True):
                if not future.done():
                    future.set_exception(self._unsafe([message_id], error.reached, error.why))
        except BaseException as error:
            for _, future in outbox:
                if not future.done():
                    future.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), message_id in zip(outbox, ids, strict=True):
                if not future.done():
                    future.set_result(message_id)

    async def _send_alike(self, tasks: list[EncodedTask], tally: _Tally, *, own_ids: bool) -> list[str]:
        link, began = await self._link(), time.monotonic()
        patience, durable = self._patience_for(link), self._durability.wanted > 0
        ids: list[str] = []
        repeats = 0
        window: deque[tuple[list[EncodedTask], asyncio.Task[Any]]] = deque()
        chunks: Iterable[list[EncodedTask]] = _chunks(tasks)
        if not durable and len(tasks) <= CHUNK_TASKS and len(chunks := list(chunks)) == 1:
            repeats = await self._send_chunk(link, tasks, patience, ids, own_ids=own_ids)
            chunks = ()
        try:
            for chunk in chunks:
                call = self._call(chunk, own_ids=own_ids)
                sending = self._safely(link, call, patience, tally) if durable else link.script(*call, patience)
                window.append((chunk, asyncio.ensure_future(sending)))
                await asyncio.sleep(0)  # lets it be written before the next chunk is packed
                if len(window) == (GROUP if durable else CHUNKS_IN_FLIGHT):
                    repeats += await self._collect(window, ids)
            while window:
                repeats += await self._collect(window, ids)
        finally:
            for _, pending in window:
                pending.cancel()
        self._tell_produced(len(tasks), repeats, began)
        return ids

    async def _send_chunk(
        self, link: Link, chunk: list[EncodedTask], patience: float, ids: list[str], *, own_ids: bool
    ) -> int:
        """Send what is one chunk in all: without a task of its own, which would cost two turns of the event loop."""
        try:
            reply = await link.script(*self._call(chunk, own_ids=own_ids), patience)
        except StoreError as error:
            raise self._explain(error, len(chunk)) from error
        return self._read(reply, chunk, ids)

    def _tell_produced(self, count: int, repeats: int, began: float) -> None:
        if telemetry.wanted("queue.produced"):
            facts = {"count": count, "duplicates": repeats, "duration_s": time.monotonic() - began}
            telemetry.emit("queue.produced", facts, {"queue": self._queue})

    async def _safely(self, link: Link, call: Call, patience: float, tally: _Tally) -> Any:
        """Run the script over the connection that waits for durability; ``tally`` learns how far it came.

        After one miss the rest of the call is added without waiting: its outcome is known already.
        """
        if self._durable is None:
            self._durable = DurableSender(Link(link.manager, "durable", self._queue), self._durability)
        wait = tally.reached == self._durability.wanted
        confirmed = await self._durable.send(call, patience, wait=wait)
        if isinstance(confirmed.reply, ReplyError):
            error = reply_error(confirmed.reply, link.manager.address.safe)
            raise in_doubt(error) if confirmed.repeated else error from confirmed.reply
        tally.note(confirmed)
        return confirmed.reply

    def _patience_for(self, link: Link) -> float:
        """Seconds in which repeats may begin, so that the last of them is executed while the token is known."""
        manager = link.manager
        longest = 2 * manager.timeout + manager.connect_timeout + self._durability.timeout
        return max(0.0, min(self._patience, TOKEN_WINDOW_MS / 1000 - longest))

    async def _collect(self, window: deque[tuple[list[EncodedTask], asyncio.Task[Any]]], ids: list[str]) -> int:
        """Append the message ids of the oldest chunk under way; returns how many were repeats."""
        chunk, pending = window[0]
        try:
            reply = await pending
        except StoreError as error:
            raise self._explain(error, len(chunk)) from error
        window.popleft()
        return self._read(reply, chunk, ids)

    @staticmethod
    def _read(reply: bytes | Sequence[bytes], chunk: Sequence[EncodedTask], ids: list[str]) -> int:
        """Append the message ids that the script answered for ``chunk``; returns how many were repeats."""
        if isinstance(reply, bytes):
            reply = (reply,)
        if reply and reply[0] == b"!":
            record = reply[1].decode().split()
            if len(record) == 3 and int(record[2]) == len(chunk):
                ids += _run(*record)
                return 0
            reply = _expand(record, chunk)
        repeats = 0
        for task, answer in zip(chunk, reply, strict=True):
            if answer == b"z":
                ids.append(f"z:{task.id}")
            elif answer[:1] == b"=":
                repeats += 1
                ids.append(f"z:{task.id}" if answer == b"=z" else answer[1:].decode())
            else:
                ids.append(f"{task.lane}:{answer.decode()}")
        return repeats

    def _call(self, chunk: Sequence[EncodedTask], *, own_ids: bool) -> Call:
        """What adds ``chunk``: for a single task the script for one, unless it is delayed or there are limits."""
        if len(chunk) == 1 and self._singles is not None and not chunk[0].delay:
            task_id, lane, frame, _, _ = chunk[0]
            return Call(self._singles[own_ids][lane], (), (task_id if own_ids else _token(), frame))
        return self._plain_call(chunk, own_ids) or Call(
            self._script, self._keys, self._args(chunk, "" if own_ids else _token())
        )

    def _plain_call(self, chunk: Sequence[EncodedTask], own_ids: bool) -> Call | None:
        """What adds tasks without delay to one lane, if ``chunk`` is that, its ids differ and there are no limits."""
        ids, lanes, frames, _, delays = zip(*chunk, strict=True)
        keys = self._plain_keys.get((own_ids, lanes[0]))
        if keys is None or lanes.count(lanes[0]) < len(chunk) or any(delays):
            return None
        if not own_ids:
            return Call(self._plain, keys, (TOKEN_WINDOW_MS, lanes[0], _token(), *frames))
        if len(set(ids)) < len(ids):
            return None
        return Call(self._plain, keys, (self._dedup_ms, lanes[0], "", *frames, *ids))

    def _args(self, chunk: Sequence[EncodedTask], token: str) -> list[Arg]:
        args: list[Arg] = [self._limits, self._dedup_ms, TOKEN_WINDOW_MS, token]
        for task_id, lane, frame, own_id, delay in chunk:
            if delay:
                mode = f"{'e' if own_id else 'd'}{math.ceil(delay * 1000 - 1e-6)}:{task_id}"
            else:
                mode = "i" + task_id if own_id else ""
            args += (lane, mode, frame)
        return args

    def _explain(self, error: StoreError, count: int) -> Exception:
        cause = str(error.__cause__ or error)
        if cause.startswith("ORC_FULL"):
            depth, ended = (int(number) for number in cause.split()[1:3])
            return self._full(depth, ended, count)
        if cause.startswith("ORC_DEAD"):
            self._refused(count, self._max_dead, "dead_letters")
            return QueueFullError(
                f"queue {self._queue!r} holds {cause.split()[1]} dead letters of at most {self._max_dead}; {count} "
                "tasks were refused: find out why tasks die, then replay or purge (orchestra dlq)",
                retry_after=RETRY_AFTER[1],
                limit=self._max_dead,
            )
        if isinstance(error, StoreFullError):
            self._refused(count, 0, "memory")
        if "exhausted the last possible ID" in cause:
            return StreamExhaustedError(
                f"queue {self._queue!r} has a lane that has used up its stream ids ({cause.partition(' script:')[0]}): "
                "somebody added an entry with the highest id. Drain the queue, then DEL that stream"
            )
        return error

    def _full(self, depth: int, ended: int, count: int) -> QueueFullError:
        after = self._drain.retry_after(time.monotonic(), ended, depth + count - self._max_length)
        self._refused(count, self._max_length, "length")
        return QueueFullError(
            f"queue {self._queue!r} holds {depth} live tasks of at most {self._max_length}; {count} more were refused: "
            f"try again in {after:.3g} s",
            retry_after=after,
            limit=self._max_length,
        )

    def _refused(self, count: int, limit: int, reason: str) -> None:
        telemetry.emit("queue.refused", {"count": count, "limit": limit}, {"queue": self._queue, "reason": reason})

    def _unsafe(self, message_ids: list[str], reached: int, why: str) -> DurabilityError:
        durability = self._durability
        what = "replicas have" if durability.mode == "replicated" else "disk has"
        return DurabilityError(
            f"queue {self._queue!r}: {len(message_ids)} tasks were added and may run, but only {reached} of "
            f"{durability.wanted} {what} them after {durability.timeout:g} s{why and f' ({why})'}: send them again with the "
            "same ids, which adds nothing twice, or go on without",
            wanted=durability.wanted,
            reached=reached,
            message_ids=tuple(message_ids),
            mode=durability.mode,
            why=why,
        )


def _token() -> str:
    """What the script knows a repeat of one call by; not needed for own ids, which are known by themselves."""
    return f"{_process}{next(_serial):x}"


def _chunks(tasks: list[EncodedTask]) -> Iterator[list[EncodedTask]]:
    start = size = 0
    for i, task in enumerate(tasks):
        size += len(task.frame)
        if i - start == CHUNK_TASKS or (size > CHUNK_BYTES and i > start):
            yield tasks[start:i]
            start, size = i, len(task.frame)
    if tasks:
        yield tasks[start:]


def _run(lane: str, first: str, count: str) -> list[str]:
    """The message ids of ``count`` entries, of which the first is ``first``."""
    ms, _, seq = first.partition("-")
    head, start = f"{lane}:{ms}-", int(seq)
    return [f"{head}{number}" for number in range(start, start + int(count))]


def _expand(record: list[str], chunk: Sequence[EncodedTask]) -> list[bytes]:
    """The answers that a repeated call gave the first time, from its record ``<lane> <first id> <count> …``."""
    per_lane: dict[int, deque[bytes]] = {}
    for lane, first, count in zip(record[::3], record[1::3], record[2::3], strict=True):
        ms, seq = first.split("-")
        run = (f"{ms}-{int(seq) + i}".encode() for i in range(int(count)))
        per_lane.setdefault(int(lane), deque()).extend(run)
    return [b"z" if task.delay else per_lane[task.lane].popleft() for task in chunk]
