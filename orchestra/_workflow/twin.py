"""Workflows in this process: the twin of :class:`~orchestra._workflow.redis_store.RedisWorkflows`, nothing durable.

Owns what ``memory:`` addresses keep, and its clock. The same results as on Redis, gone with the process. One event loop;
no method awaits while it changes something, so each is atomic.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestra._workflow.record import FORMAT, GRACE_MS, NewRecord, token_of
from orchestra._workflow.twin_moves import Place, next_position
from orchestra._workflow.twin_ops import Moves
from orchestra.tasks import check_ident

if TYPE_CHECKING:
    from collections.abc import Callable


class LocalWorkflows:
    """The workflows of one namespace in this process; see :class:`~orchestra._workflow.store.WorkflowStore`.

    ``now``: the clock, unix seconds.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.place = Place()
        self._now = now
        self._bell: asyncio.Event | None = None
        self._cursors: dict[str, str] = {}

    def _ms(self) -> int:
        return int(self._now() * 1000)

    def _forget_expired(self) -> None:
        place, now = self.place, self._ms()
        for task_id in [each for each, due in place.expiry.items() if due <= now]:
            for kept in (place.expiry, place.records, place.contexts, place.events, place.index):
                kept.pop(task_id, None)

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.set()
            self._bell = None

    async def make(self, task_id: str, new: NewRecord) -> int:
        """See the protocol."""
        check_ident("task id", task_id)
        self._forget_expired()
        place, now = self.place, self._ms()
        created, there = now, place.records.get(task_id, {})
        if there.get("token") == new.token.encode():
            return int(there["created"])
        if there and token_of(there) != new.instead:
            return 0
        planned = there.get("status") == b"running"
        said: dict[str, bytes] = {}
        if planned:
            created = int(there["created"])
            said = {name: value for name, value in there.items() if name.startswith("b:")}
        else:
            place.contexts.pop(task_id, None)
            place.events.pop(task_id, None)
        place.records[task_id] = {**said, **new.record, "token": new.token.encode(), "created": b"%d" % created}
        place.contexts.setdefault(task_id, {}).update(new.context)
        place.expiry.pop(task_id, None)
        place.outbox.pop(f"{task_id}|-1|1", None)
        place.log(task_id, now, "workflow.planned" if planned else "workflow.started")
        for index in new.ready:
            place.log(task_id, now, "step.ready", index)
            place.outbox[f"{task_id}|{index}|1"] = now + GRACE_MS
        place.index[task_id] = created
        self._ring()
        return created

    async def move(self, op: str, task_id: str, ttl_ms: int, largest: int, args: Sequence[Any]) -> list[Any]:
        """See the protocol."""
        check_ident("task id", task_id)
        self._forget_expired()
        record = self.place.records.get(task_id)
        if record is None:
            return [0, b"unknown"]
        if record.get("format") != FORMAT:
            found = record.get("format")
            return [0, b"format " + found if found else b"corrupt format"]
        answer = Moves(self.place, self._ms(), task_id, ttl_ms, GRACE_MS, largest, args).run(op)
        self._ring()
        return answer

    async def save(self, task_id: str, expected: bytes, token: str, ttl_ms: int, args: Sequence[Any]) -> int:
        """See the protocol."""
        self._forget_expired()
        place, now = self.place, self._ms()
        record = place.records.get(task_id, {})
        if record.get("saved") == token.encode():
            return int(record["version"])
        if not record or token_of(record) != expected:
            return 0
        words = list(args)
        status = words.pop(0)
        for fields in (record, place.contexts[task_id]):
            for _ in range(words.pop(0)):
                name = words.pop(0)
                fields[name] = words.pop(0)
            for _ in range(words.pop(0)):
                fields.pop(words.pop(0), None)
        version = int(record["version"]) + 1
        record |= {"version": b"%d" % version, "saved": token.encode()}
        if status:
            record["ended"] = b"%d" % now
            place.log(task_id, now, f"workflow.{status}")
            place.ended.append((next_position(place.ended[-1][0] if place.ended else "0-0", now), task_id))
            if ttl_ms > 0:
                place.expiry[task_id] = now + ttl_ms
        self._ring()
        return version

    async def read(self, task_id: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """See the protocol."""
        check_ident("task id", task_id)
        self._forget_expired()
        return dict(self.place.records.get(task_id, {})), dict(self.place.contexts.get(task_id, {}))

    async def fields(self, task_ids: Sequence[str], names: Sequence[str]) -> list[dict[str, bytes]]:
        """See the protocol."""
        for task_id in task_ids:
            check_ident("task id", task_id)
        self._forget_expired()
        records = [self.place.records.get(task_id, {}) for task_id in task_ids]
        return [{name: record[name] for name in names if name in record} for record in records]

    async def due(self, limit: int) -> list[str]:
        """See the protocol."""
        now, outbox = self._ms(), self.place.outbox
        members = sorted((due, name) for name, due in outbox.items() if due <= now)[:limit]
        for _, name in members:
            outbox[name] = now + GRACE_MS
        return [name for _, name in members]

    async def forget(self, members: Sequence[str]) -> None:
        """See the protocol."""
        for name in members:
            self.place.outbox.pop(name, None)

    async def listed(self, limit: int, before_ms: int | None, skip: int) -> list[tuple[str, int]]:
        """See the protocol."""
        self._forget_expired()
        rows = [(at, name) for name, at in self.place.index.items() if before_ms is None or at < before_ms]
        return [(name, at) for at, name in sorted(rows, reverse=True)[skip : skip + limit]]

    async def emit(self, task_id: str, kind: str, step: int | None, data: bytes) -> bool:
        """See the protocol."""
        self._forget_expired()
        record = self.place.records.get(task_id, {})
        if record.get("status") not in (b"running", b"pending"):
            return False
        self.place.log(task_id, self._ms(), kind, step, data)
        self._ring()
        return True

    async def events(self, task_id: str, after: str, count: int) -> list[tuple[str, dict[str, bytes]]]:
        """See the protocol. O(log) of it."""
        self._forget_expired()
        edge = _position(after)
        return [row for row in self.place.events.get(task_id, []) if _position(row[0]) > edge][:count]

    async def ended_at(self) -> str:
        """See the protocol."""
        return self.place.ended[-1][0] if self.place.ended else "0"

    async def wait_event(self, task_id: str | None, after: str, timeout: float) -> None:
        """See the protocol."""
        rows: Sequence[tuple[str, Any]] = self.place.ended if task_id is None else self.place.events.get(task_id, [])
        if rows and _position(rows[-1][0]) > _position(after):
            return
        if self._bell is None:
            self._bell = asyncio.Event()
        bell = self._bell
        try:
            async with asyncio.timeout(timeout):
                await bell.wait()
        except TimeoutError:
            return

    async def cursor(self, name: str, value: str | None) -> str | None:
        """See the protocol."""
        if value is not None:
            self._cursors[name] = value
        return self._cursors.get(name)


def _position(text: str) -> tuple[int, int]:
    at, _, number = text.partition("-")
    return int(at), int(number or 0)
