"""Sends encoded tasks to Redis: chunks, repeats that add nothing twice, refusals.

Tasks with ids of their own are recognised one by one by the script; tasks with generated ids as a call, by a token.
Either way a call may be repeated after a lost reply.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from orchestra import telemetry
from orchestra._keys import QueueKeys
from orchestra._link import Link
from orchestra._scripts import Arg, script
from orchestra.errors import QueueFullError, StoreError
from orchestra.serialization import EncodedTask

CHUNK_TASKS, CHUNK_BYTES = 500, 1 << 20
"""A script call takes at most so many tasks or bytes, which bounds how long it keeps Redis busy (about 2 ms)."""
CHUNKS_IN_FLIGHT = 3
TOKEN_WINDOW_MS = 30_000
"""A call may be repeated for so long; no patience is longer."""
FULL_RETRY_AFTER = 1.0
"""Seconds after which a refused producer is told to try again."""

_serial = itertools.count()
_process = os.urandom(6).hex()


def _reseed() -> None:
    global _process  # noqa: PLW0603 - a forked child must not repeat its parent's tokens
    _process = os.urandom(6).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reseed)


class StreamProducer:
    """The producing end of one queue. ``link`` gives the connection to use."""

    def __init__(
        self,
        queue: str,
        keys: QueueKeys,
        link: Callable[[], Awaitable[Link]],
        *,
        max_length: int,
        dedup_window: float,
        patience: float,
    ) -> None:
        self._queue = queue
        self._link = link
        self._max_length = max_length
        self._dedup_ms = int(dedup_window * 1000)
        self._patience = patience
        self._keys = (*keys.lanes, keys.delayed, keys.bodies, *keys.dedup, *keys.tokens, keys.counters)
        self._outbox: list[tuple[EncodedTask, asyncio.Future[str]]] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._script = script("produce")

    async def post(self, task: EncodedTask) -> str:
        """Send one task together with all others posted in this iteration of the loop; returns its message id."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()
        self._outbox.append((task, future))
        if len(self._outbox) == 1:
            loop.call_soon(self._flush)
        return await future

    async def send(self, tasks: list[EncodedTask]) -> list[str]:
        """Send tasks; returns their message ids in order. See :class:`~orchestra.task_queue.RedisStreamTaskQueue`."""
        own = [i for i, task in enumerate(tasks) if task.own_id]
        if not own or len(own) == len(tasks):
            return await self._send_alike(tasks, own_ids=bool(own))
        new = [i for i, task in enumerate(tasks) if not task.own_id]
        ids = [""] * len(tasks)
        for indices, own_ids in ((own, True), (new, False)):
            sent = await self._send_alike([tasks[i] for i in indices], own_ids=own_ids)
            for i, message_id in zip(indices, sent, strict=True):
                ids[i] = message_id
        return ids

    async def settled(self) -> None:
        """Wait until everything that was posted has been answered."""
        while self._sending:
            await asyncio.gather(*self._sending, return_exceptions=True)
            await asyncio.sleep(0)  # their done callbacks, which take them out of the set, run in this turn

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        task = asyncio.get_running_loop().create_task(self._send_outbox(outbox))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_outbox(self, outbox: list[tuple[EncodedTask, asyncio.Future[str]]]) -> None:
        try:
            ids = await self.send([task for task, _ in outbox])
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

    async def _send_alike(self, tasks: list[EncodedTask], *, own_ids: bool) -> list[str]:
        link, began = await self._link(), time.monotonic()
        ids: list[str] = []
        repeats = 0
        window: deque[tuple[list[EncodedTask], asyncio.Task[Any]]] = deque()
        try:
            for chunk in _chunks(tasks):
                args = self._args(chunk, "" if own_ids else f"{_process}{next(_serial):x}")
                window.append(
                    (chunk, asyncio.ensure_future(link.script(self._script, self._keys, args, self._patience)))
                )
                await asyncio.sleep(0)  # lets it be written before the next chunk is packed
                if len(window) == CHUNKS_IN_FLIGHT:
                    repeats += await self._collect(window, ids)
            while window:
                repeats += await self._collect(window, ids)
        finally:
            for _, pending in window:
                pending.cancel()
        if telemetry.wanted("queue.produced"):
            facts = {"count": len(tasks), "duplicates": repeats, "duration_s": time.monotonic() - began}
            telemetry.emit("queue.produced", facts, {"queue": self._queue})
        return ids

    async def _collect(self, window: deque[tuple[list[EncodedTask], asyncio.Task[Any]]], ids: list[str]) -> int:
        """Append the message ids of the oldest chunk under way; returns how many were repeats."""
        chunk, pending = window[0]
        try:
            reply = await pending
        except StoreError as error:
            raise self._explain(error, len(chunk)) from error
        window.popleft()
        if reply and reply[0] == b"!":
            reply = _expand(reply[1].decode().split(), chunk)
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

    def _args(self, chunk: Sequence[EncodedTask], token: str) -> list[Arg]:
        args: list[Arg] = [self._max_length, self._dedup_ms, TOKEN_WINDOW_MS, token]
        for task_id, lane, frame, own_id, delay in chunk:
            if delay:
                mode = f"{'e' if own_id else 'd'}{round(delay * 1000)}:{task_id}"
            else:
                mode = "i" + task_id if own_id else ""
            args += (lane, mode, frame)
        return args

    def _explain(self, error: StoreError, count: int) -> Exception:
        cause = str(error.__cause__ or error)
        if not cause.startswith("ORC_FULL"):
            return error
        telemetry.emit("queue.refused", {"count": count, "limit": self._max_length}, {"queue": self._queue})
        return QueueFullError(
            f"queue {self._queue!r} holds {cause.split()[1]} live tasks of at most {self._max_length}; {count} more "
            f"were refused: try again in {FULL_RETRY_AFTER:g} s",
            retry_after=FULL_RETRY_AFTER,
            limit=self._max_length,
        )


def _chunks(tasks: list[EncodedTask]) -> Iterator[list[EncodedTask]]:
    start = size = 0
    for i, task in enumerate(tasks):
        size += len(task.frame)
        if i - start == CHUNK_TASKS or (size > CHUNK_BYTES and i > start):
            yield tasks[start:i]
            start, size = i, len(task.frame)
    if tasks:
        yield tasks[start:]


def _expand(record: list[str], chunk: Sequence[EncodedTask]) -> list[bytes]:
    """The answers that a repeated call gave the first time, from its record ``<lane> <first id> <count> …``."""
    per_lane: dict[int, deque[bytes]] = {}
    for lane, first, count in zip(record[::3], record[1::3], record[2::3], strict=True):
        ms, seq = first.split("-")
        run = (f"{ms}-{int(seq) + i}".encode() for i in range(int(count)))
        per_lane.setdefault(int(lane), deque()).extend(run)
    return [b"z" if task.delay else per_lane[task.lane].popleft() for task in chunk]
