"""What is sent through an App, and the caller's handle on it.

Owns the options of a call, the task it becomes, and what its terminal record means to the caller. Refuses to own
agents and connections, which are the App's. A :class:`Run` belongs to the event loop that awaits it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from orchestra._agents.children import peek, value_of
from orchestra.errors import ConfigurationError, ResultUnavailableError
from orchestra.tasks import Cancellation, TaskDict, TaskPriority, TaskState

if TYPE_CHECKING:
    from orchestra.app import App

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class SendOptions:
    """How a call travels; see :meth:`AgentHandle.using`."""

    priority: int = TaskPriority.NORMAL
    delay: float | None = None
    key: str | None = None
    id: str | None = None
    timeout: float | None = None
    max_retries: int | None = None
    deadline: float | None = None
    metadata: Mapping[str, Any] | None = None
    want_result: bool = True

    def __post_init__(self) -> None:
        if self.key is not None and self.id is not None:
            raise ConfigurationError(
                "give key= or id=, not both: each of them decides the task's id", field="key", value=self.key
            )
        if self.key is not None and not isinstance(self.key, str):
            raise ConfigurationError(f"key must be a text, got {self.key!r}", field="key", value=self.key)

    def task(self, task_type: str, given: Any) -> TaskDict:
        """The task of a call with the input ``given``; its values are checked when it is sent."""
        task: TaskDict = {"type": task_type, "input": given, "priority": self.priority}
        if self.key is not None:
            task["id"] = key_id(task_type, self.key)
        elif self.id is not None:
            task["id"] = self.id
        for name in ("delay", "timeout", "max_retries", "deadline"):
            value = getattr(self, name)
            if value is not None:
                task[name] = value
        if self.metadata is not None:
            task["metadata"] = dict(self.metadata)
        return task


def send_options(base: SendOptions, changes: Mapping[str, Any]) -> SendOptions:
    """``base`` with ``changes``. Raises ConfigurationError for an option that does not exist."""
    known = SendOptions.__dataclass_fields__
    if unknown := sorted(set(changes) - set(known)):
        raise ConfigurationError(
            f"sending has no option {unknown[0]!r}; options are {', '.join(known)}", field=unknown[0]
        )
    return replace(base, **changes)


def key_id(task_type: str, key: str) -> str:
    """The task id of ``key`` for agent ``task_type``: readable where that is possible, else a digest of both."""
    plain = f"{task_type}:{key}"
    if len(plain) <= 128 and plain.isascii() and plain.isprintable() and " " not in plain:
        return plain
    digest = hashlib.sha256(f"{len(task_type)}:{plain}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{task_type[:80]}#{digest[:40]}"


class Run(Generic[R]):
    """A task that was sent: its ``id``, and the ``message_id`` the queue gave it. ``await run`` is its result."""

    __slots__ = ("_record", "_wanted", "app", "id", "message_id", "task_type")

    def __init__(self, app: App, task_id: str, task_type: str, message_id: str, *, wanted: bool) -> None:
        self.app = app
        self.id = task_id
        self.task_type = task_type
        self.message_id = message_id
        self._wanted = wanted
        self._record: dict[str, Any] | None = None

    async def result(self, timeout: float | None = None) -> R:
        """What the agent returned; waits up to ``timeout`` seconds for it, None for as long as it takes.

        A result is kept for the ``result_ttl`` of the App that sent the task (an hour by default); afterwards, as for
        a ``key`` that somebody sent before with ``want_result=False``, only the timeout ends the waiting.

        Raises:
            TaskFailedError: the task is dead; ``.error_type``, ``.reason`` and ``.attempts`` say why.
            TaskCancelledError: it was cancelled.
            TimeoutError: it has not ended yet. It goes on, and may be asked again.
            ResultUnavailableError: it was sent with ``want_result=False``.
        Cost: one round trip, and one every two seconds while waiting.
        """
        self._require_wanted()
        if self._record is None:
            self._record = await self.app.queue.wait_result(self.id, timeout)
        return cast("R", value_of(self.id, self.task_type, self._record))

    def __await__(self) -> Generator[Any, Any, R]:
        return self.result().__await__()

    async def status(self) -> TaskState:
        """COMPLETED, FAILED or CANCELLED once it has ended, PENDING before (waiting, running or delayed).

        Raises:
            ResultUnavailableError: it was sent with ``want_result=False``.
        Cost: one round trip, none once it has ended.
        """
        self._require_wanted()
        if self._record is None:
            self._record = await peek(self.app.queue, self.id)
        if self._record is None:
            return TaskState.PENDING
        return _STATES.get(str(self._record.get("outcome")), TaskState.FAILED)

    async def cancel(self) -> Cancellation:
        """Cancel the task wherever it is; who waits for :meth:`result` gets TaskCancelledError when it has ended.

        CANCELLED: it had not started, and never will. REQUESTED: a worker ends it as soon as it learns of it, within
        about a second; an agent that is done before completes. ENDED: it was terminal before.

        Raises:
            StoreUnavailableError: Redis was unavailable for too long.
        Cost: one round trip, a second one where somebody waits for the result.
        """
        return await self.app.queue.cancel(self.id, self.message_id or None)

    def _require_wanted(self) -> None:
        if not self._wanted:
            raise ResultUnavailableError(f"the result of {self.id} is not kept: it was sent with want_result=False")

    def __repr__(self) -> str:
        return f"<Run {self.id} of {self.task_type}>"


_STATES = {"completed": TaskState.COMPLETED, "dead": TaskState.FAILED, "cancelled": TaskState.CANCELLED}


async def post(app: App, tasks: Sequence[TaskDict], *, want: bool) -> list[Run[Any]]:
    """Send ``tasks``; every one is checked before the first is sent. Calls of one loop iteration travel together.

    A task without an id gets one here and is not looked up in the dedup records, unlike one whose sender chose it.
    """
    sent = await app.queue.submit(tasks, want_results=want)
    return [
        Run(app, one.task_id, str(task["type"]), one.message_id, wanted=want)
        for task, one in zip(tasks, sent, strict=True)
    ]
