"""Tasks that a task sends: their ids, and what became of them.

Owns the meaning of a terminal record to whoever waits for it. Refuses to own how tasks are sent. One event loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from typing import Any

from orchestra.errors import ResultUnavailableError, TaskCancelledError, TaskFailedError
from orchestra.task_queue import BaseTaskQueue, RedisStreamTaskQueue
from orchestra.tasks import Cancellation, is_ident


def child_id(parent: str, name: str) -> str:
    """The id of the child ``name`` of ``parent``: readable where that is possible, else with a digest of both."""
    plain = f"{parent}/{name}"
    if is_ident(plain):
        return plain
    digest = hashlib.sha256(f"{len(parent)}:{plain}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{parent[:80]}/#{digest[:40]}"


def value_of(task_id: str, task_type: str, record: Mapping[str, Any]) -> Any:
    """The value in the terminal record of a task that completed.

    Raises:
        TaskFailedError: it is dead; ``.error_type``, ``.reason`` and ``.attempts`` say why.
        TaskCancelledError: it was cancelled.
    """
    outcome = record.get("outcome")
    if outcome == "completed":
        return record.get("value")
    if outcome == "cancelled":
        raise TaskCancelledError(f"task {task_id} ({task_type}) was cancelled")
    error, attempts, reason = record.get("error") or {}, record.get("attempts", 0), str(record.get("reason", outcome))
    kind = str(error.get("error_type", ""))
    text = str(error.get("error", "")) or reason
    raise TaskFailedError(
        f"task {task_id} ({task_type}) is dead after {attempts} attempt{'' if attempts == 1 else 's'}, "
        f"{reason}: {f'{kind}: ' if kind and kind != reason else ''}{text}",
        task_id=task_id,
        error_type=kind,
        reason=reason,
        attempts=attempts,
    )


async def peek(queue: BaseTaskQueue, task_id: str) -> dict[str, Any] | None:
    """The terminal record of ``task_id`` if there is one now. One round trip, two where there is one."""
    if isinstance(queue, RedisStreamTaskQueue):
        await queue.manager.connect()
        if not await queue.manager.client.exists(queue.keys.result(task_id)):
            return None
        return await queue.wait_result(task_id, 5.0)
    try:
        return await queue.wait_result(task_id, 0.0)
    except TimeoutError:
        return None


async def living_name(queue: BaseTaskQueue, name: str, series: int) -> str:
    """The id under which a step of ``series`` sends its child ``name``: a new one where that of earlier series is dead.

    What such a step did before is not done twice, but a child that failed it gets another chance when it is resumed.
    One round trip for each series before.
    """
    for earlier in range(1, series):
        tried = name if earlier == 1 else child_id(name, f"{earlier}")
        record = await peek(queue, tried)
        if record is None or record.get("outcome") == "completed":
            return tried
    return name if series == 1 else child_id(name, f"{series}")


class Child:
    """A task that an agent has sent. ``await child`` is its result."""

    __slots__ = ("_queue", "_wanted", "id", "message_id", "task_type")

    def __init__(self, queue: BaseTaskQueue, task_id: str, task_type: str, message_id: str, *, wanted: bool) -> None:
        self._queue = queue
        self._wanted = wanted
        self.id = task_id
        self.task_type = task_type
        self.message_id = message_id

    async def result(self, timeout: float | None = None) -> Any:
        """What its agent returned; waits up to ``timeout`` seconds for it, None for as long as it takes.

        Whoever waits holds a worker: where all of them wait for children that wait for a worker, nothing moves.

        Raises:
            TaskFailedError, TaskCancelledError: as they say.
            TimeoutError: it has not ended yet, and may be asked again.
            ResultUnavailableError: it was sent with ``want_result=False``.
        Cost: one round trip, and one every two seconds while waiting.
        """
        if not self._wanted:
            raise ResultUnavailableError(f"the result of {self.id} is not kept: it was sent with want_result=False")
        return value_of(self.id, self.task_type, await self._queue.wait_result(self.id, timeout))

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.result().__await__()

    async def cancel(self) -> Cancellation:
        """Cancel it wherever it is; see :meth:`orchestra.app.App.cancel`. One round trip or two."""
        return await self._queue.cancel(self.id, self.message_id or None)

    def __repr__(self) -> str:
        return f"<Child {self.id} of {self.task_type}>"
