"""Workflows on Redis: each change is one script call on one pipelined connection.

Owns the connection of the workflows of a namespace, and one for those who wait for events. Refuses to own what the
scripts mean. A call whose reply was lost is repeated while Redis is away, for up to :data:`PATIENCE` seconds; the scripts
allow that. One event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from orchestra._keys import WorkflowKeys
from orchestra._redis.errors import ReplyError, reply_code, reply_error
from orchestra._redis.link import Link
from orchestra._redis.wire import pack
from orchestra._scripts import Arg, script
from orchestra._workflow.pipeline import Pipeline
from orchestra._workflow.record import GRACE_MS, NewRecord
from orchestra._workflow.tail import Tail
from orchestra.errors import CorruptEntryError, OrchestraError

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

PATIENCE: Final = 5.0
"""Seconds for which a call is repeated while Redis is away."""


class RedisWorkflows:
    """The workflows of ``namespace`` on Redis; see :class:`~orchestra._workflow.store.WorkflowStore`."""

    def __init__(self, manager: ConnectionManager, namespace: str) -> None:
        self.keys = WorkflowKeys(namespace)
        self._manager = manager
        self._link = Link(manager, "workflows", f"workflows of {namespace}")
        self._calls = Pipeline(self._link, PATIENCE)
        self._tail = Tail(manager, self.keys)
        self._move = script("workflow_move")

    async def make(self, task_id: str, new: NewRecord) -> int:
        """See the protocol. O(fields), one round trip."""
        args: list[Arg] = [task_id, new.token, GRACE_MS, new.instead, len(new.ready), *new.ready]
        for fields in (new.record, new.context):
            args.append(len(fields))
            for name, value in fields.items():
                args += (name, value)
        return int(await self._call("workflow_make", self.keys.scripted(task_id), args))

    async def move(self, op: str, task_id: str, ttl_ms: int, largest: int, args: Sequence[Arg]) -> list[Any]:
        """See the protocol. One round trip."""
        told = (op, task_id, ttl_ms, GRACE_MS, largest, *args)
        reply: list[Any] = await self._call("workflow_move", self.keys.scripted(task_id), told)
        return reply

    async def save(self, task_id: str, expected: bytes, token: str, ttl_ms: int, args: Sequence[Arg]) -> int:
        """See the protocol. O(fields), one round trip."""
        told = (task_id, expected, token, ttl_ms, *args)
        return int(await self._call("workflow_save", self.keys.scripted(task_id), told))

    async def read(self, task_id: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """See the protocol. O(workflow), one round trip."""
        keys = self.keys
        commands = [("MULTI",), ("HGETALL", keys.state(task_id)), ("HGETALL", keys.context(task_id)), ("EXEC",)]
        replies = (await self._ask(commands))[3]
        record, context = ({n.decode(): v for n, v in zip(r[::2], r[1::2], strict=True)} for r in replies)
        return record, context

    async def fields(self, task_ids: Sequence[str], names: Sequence[str]) -> list[dict[str, bytes]]:
        """See the protocol. O(records x names), one round trip."""
        if not task_ids or not names:
            return [{} for _ in task_ids]
        replies = await self._ask([("HMGET", self.keys.state(task_id), *names) for task_id in task_ids])
        return [{n: v for n, v in zip(names, reply, strict=True) if v is not None} for reply in replies]

    async def due(self, limit: int) -> list[str]:
        """See the protocol. One round trip."""
        return [m.decode() for m in await self._call("workflow_due", (self.keys.outbox,), (limit, GRACE_MS))]

    async def forget(self, members: Sequence[str]) -> None:
        """See the protocol."""
        await self._ask([("ZREM", self.keys.outbox, *members)])

    async def listed(self, limit: int, before_ms: int | None, skip: int) -> list[tuple[str, int]]:
        """See the protocol. O(log workflows + skip + limit)."""
        highest = "+inf" if before_ms is None else f"({before_ms}"
        told = ("ZREVRANGEBYSCORE", self.keys.index, highest, "-inf", "WITHSCORES", "LIMIT", skip, limit)
        (rows,) = await self._ask([told])
        return [(name.decode(), int(float(score))) for name, score in zip(rows[::2], rows[1::2], strict=True)]

    async def emit(self, task_id: str, kind: str, step: int | None, data: bytes) -> bool:
        """See the protocol. One round trip."""
        keys, where = self.keys.scripted(task_id), "" if step is None else step
        return bool(await self._call("workflow_emit", keys, (kind, where, data)))

    async def events(self, task_id: str, after: str, count: int) -> list[tuple[str, dict[str, bytes]]]:
        """See the protocol. O(count), one round trip."""
        (rows,) = await self._ask([("XRANGE", self.keys.events(task_id), f"({after}", "+", "COUNT", count)])
        return [(at.decode(), {n.decode(): v for n, v in zip(row[::2], row[1::2], strict=True)}) for at, row in rows]

    async def ended_at(self) -> str:
        """See the protocol. One round trip."""
        (rows,) = await self._ask([("XREVRANGE", self.keys.ended, "+", "-", "COUNT", 1)])
        return rows[0][0].decode() if rows else "0"

    async def wait_event(self, task_id: str | None, after: str, timeout: float) -> None:
        """See the protocol; waits on a connection of its own."""
        await self._tail.wait(self.keys.ended if task_id is None else self.keys.events(task_id), after, timeout)

    async def cursor(self, name: str, value: str | None) -> str | None:
        """See the protocol. One round trip."""
        key = f"{self.keys.tag}q:{name}"
        if value is not None:
            await self._ask([("SET", key, value)])
            return value
        (found,) = await self._ask([("GET", key)])
        return None if found is None else found.decode()

    async def _call(self, name: str, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        try:
            return await self._calls.script(script(name), keys, args)
        except OrchestraError as error:
            raise _read_error(error) from error.__cause__

    async def _ask(self, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
        """Run commands that may be repeated; one round trip."""
        packed = pack(commands)

        async def attempt() -> list[Any]:
            return await self._link.send(packed, len(commands))

        replies, _ = await self._link.patiently(attempt, PATIENCE)
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise _read_error(reply_error(reply, self._manager.address.safe))
        inner = replies[-1]
        if isinstance(inner, list):
            for reply in inner:
                if isinstance(reply, ReplyError):
                    raise _read_error(reply_error(reply, self._manager.address.safe))
        return replies


def _read_error(error: Exception) -> Exception:
    """A key of the wrong kind, and what a script finds wrong with a field, is damage to the record."""
    code = reply_code(error)
    if code not in ("CORRUPT", "WRONGTYPE"):
        return error
    text = str(error.__cause__ or error)
    what = text.split(" ")[1] if code == "CORRUPT" else "its key, which holds something else"
    return CorruptEntryError(f"a workflow's record is damaged at {what}; it is left as it is")
