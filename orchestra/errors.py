"""Every error that orchestra raises on purpose.

::

    OrchestraError                      code = "error"
    ├── ConfigurationError              a setting is wrong: field, unit, value, range        (also ValueError)
    │   └── UnsafeServerError           … of the server, which production mode refuses; ``faults``
    ├── InvalidTaskError                a task cannot be sent as it is                       (also ValueError)
    │   ├── InvalidTaskTypeError        … because a value has the wrong type                 (also TypeError)
    │   └── TaskTooLargeError           … because it exceeds the size limit
    ├── CorruptEntryError               bytes in Redis that no version of orchestra wrote
    ├── MissingDependencyError          an extra is not installed                            (also ImportError)
    ├── StoreError                      Redis could not do it
    │   ├── StoreUnavailableError       unreachable, timed out, still loading                (also ConnectionError)
    │   │   └── ForkedProcessError      … because a child process uses its parent's connection
    │   ├── StoreAuthError              wrong password, missing permission                   (also PermissionError)
    │   ├── StoreFullError              maxmemory reached; ``retry_after``
    │   ├── StreamExhaustedError        a lane's stream has used up its ids
    │   ├── DurabilityError             added, but not as safe as asked for; ``message_ids``
    │   └── EmbeddedServerError         the private redis-server did not start
    ├── QueueFullError                  the queue's length limit is reached; ``retry_after``
    ├── BackpressureRejectedError       a rate limit refused; ``retry_after``
    ├── CircuitOpenError                a circuit breaker refused; ``retry_after``
    ├── WorkerPoolError                 the pool is full, or shut down
    ├── LockError                       a lock was not acquired, or is no longer held
    ├── UnknownAgentError               no agent is registered for a task type               (also LookupError)
    ├── TaskFailedError                 a run ended dead; ``.error_type`` ``.attempts``
    ├── TaskCancelledError              a run was cancelled
    ├── ResultUnavailableError          the result was not kept, or has expired
    ├── WrongLoopError                  used from another event loop than its own            (also RuntimeError)
    ├── WorkflowError                   a plan or a transition that the engine refuses
    └── InternalError                   a broken invariant: please report it

    Control flow, raised by an agent to say how its delivery ends:
    ├── RetryLater(after)               try again after so many seconds; counts as an attempt
    ├── Throttled(retry_after, key)     a provider said "too fast"; not a failure, not an attempt
    ├── Reject(reason)                  do not try again: dead-letter it now
    │   ├── BudgetExceededError         … because the next model call would exceed a budget; ``used`` ``limit``
    │   └── ToolRepeatError             … because a tool that may run once may have run already; ``tool``
    └── WaitForSignal(name)             a step of a workflow: go on when this signal has come

``code`` is stable across releases and safe to match on; messages are for people.
Facts (``retry_after``, ``field``, …) are attributes, so that no caller parses a message.
"""

from __future__ import annotations

from typing import Any


class OrchestraError(Exception):
    """Root of the tree. ``code`` names the kind of error and never changes between releases."""

    code = "error"


class ConfigurationError(OrchestraError, ValueError):
    """A setting is out of range or unknown.

    ``field`` is the dotted name of the setting, ``value`` what came.
    """

    code = "configuration"

    def __init__(self, message: str, *, field: str = "", value: Any = None) -> None:
        super().__init__(message)
        self.field = field
        self.value = value


class UnsafeServerError(ConfigurationError):
    """Production mode refuses a server that may lose tasks by its settings.

    ``field``, ``value`` and ``expected`` are those of the first fault; ``faults`` says all of them, as text.
    """

    code = "unsafe_server"

    def __init__(
        self, message: str, *, field: str = "", value: Any = None, expected: str = "", faults: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, field=field, value=value)
        self.expected = expected
        self.faults = faults


class InvalidTaskError(OrchestraError, ValueError):
    """A task was refused before Redis was touched. ``path`` leads to the offending value."""

    code = "invalid_task"

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class InvalidTaskTypeError(InvalidTaskError, TypeError):
    """A value in a task has a type that cannot travel."""

    code = "invalid_task_type"


class TaskTooLargeError(InvalidTaskError):
    """The encoded task exceeds ``limit`` bytes."""

    code = "task_too_large"

    def __init__(self, message: str, *, size: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class CorruptEntryError(OrchestraError):
    """Bytes read from Redis are not a task. The entry is kept as a dead letter with its bytes."""

    code = "corrupt_entry"


class MissingDependencyError(OrchestraError, ImportError):
    """An optional package is needed; ``extra`` names the extra that brings it."""

    code = "missing_dependency"

    def __init__(self, message: str, *, extra: str = "") -> None:
        super().__init__(message)
        self.extra = extra


class StoreError(OrchestraError):
    """Redis answered with an error, or not at all."""

    code = "store"


class StoreUnavailableError(StoreError, ConnectionError):
    """Redis is unreachable, timed out or still loading. What was sent may have been executed."""

    code = "store_unavailable"


class ForkedProcessError(StoreUnavailableError):
    """A forked child used a connection of its parent. Nothing was sent, and the parent's connection is untouched."""

    code = "forked_process"


class StoreAuthError(StoreError, PermissionError):
    """Redis refused the user, the password or a command's permission."""

    code = "store_auth"


class StoreFullError(StoreError):
    """Redis has reached ``maxmemory``; nothing was written. Try again in ``retry_after`` seconds."""

    code = "store_full"
    retry_after = 1.0


class StreamExhaustedError(StoreError):
    """A stream's last id is the highest there is, so nothing can be added to it any more; nothing was written."""

    code = "stream_exhausted"


class DurabilityError(StoreError):
    """Tasks were added, but were not as safe as asked for in time: ``reached`` of ``wanted`` copies.

    They may run. ``message_ids`` are those of all tasks of the call, in order; sending them again with the same ids
    adds nothing twice, and waits for their safety again. ``why``: the server's words, where it refused to wait.
    """

    code = "durability"

    def __init__(
        self,
        message: str,
        *,
        wanted: int = 0,
        reached: int = 0,
        message_ids: tuple[str, ...] = (),
        mode: str = "",
        why: str = "",
    ) -> None:
        super().__init__(message)
        self.wanted = wanted
        self.reached = reached
        self.message_ids = message_ids
        self.mode = mode
        self.why = why


class EmbeddedServerError(StoreError):
    """The private redis-server could not be found or started."""

    code = "embedded_server"


class QueueFullError(OrchestraError):
    """The queue holds ``limit`` tasks already; nothing was added. Try again in ``retry_after`` seconds."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after: float, limit: int = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.limit = limit


class BackpressureRejectedError(OrchestraError):
    """A rate limit refused. A permit of this cost is expected in ``retry_after`` seconds (``inf``: never)."""

    code = "backpressure_rejected"

    def __init__(self, message: str, *, retry_after: float = 0.0, limiter: str = "") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.limiter = limiter


class CircuitOpenError(OrchestraError):
    """A circuit breaker lets no call through; the next one may be tried in ``retry_after`` seconds."""

    code = "circuit_open"

    def __init__(self, message: str, *, retry_after: float = 0.0, breaker: str = "") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.breaker = breaker


class WorkerPoolError(OrchestraError):
    """The pool takes no more work: its queue is full, or it is shut down."""

    code = "worker_pool"


class LockError(OrchestraError):
    """A lock could not be acquired in time, or is no longer held by this holder."""

    code = "lock"


class UnknownAgentError(OrchestraError, LookupError):
    """No agent is registered for ``task_type``."""

    code = "unknown_agent"

    def __init__(self, message: str, *, task_type: str = "") -> None:
        super().__init__(message)
        self.task_type = task_type


class TaskFailedError(OrchestraError):
    """The awaited run is dead: its agent failed and no retry is left."""

    code = "task_failed"

    def __init__(
        self, message: str, *, task_id: str = "", error_type: str = "", reason: str = "", attempts: int = 0
    ) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.error_type = error_type
        self.reason = reason
        self.attempts = attempts


class TaskCancelledError(OrchestraError):
    """The awaited run was cancelled."""

    code = "task_cancelled"


class ResultUnavailableError(OrchestraError):
    """The run's result was not asked for when it was sent, or its time to live has passed."""

    code = "result_unavailable"


class WrongLoopError(OrchestraError, RuntimeError):
    """An object that belongs to one event loop was used from another, or from another thread. Nothing was done."""

    code = "wrong_loop"


class WorkflowError(OrchestraError):
    """A plan or a state change that the workflow engine refuses; ``faults`` lists every one found."""

    code = "workflow"

    def __init__(self, message: str, *, faults: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults


class InternalError(OrchestraError):
    """An invariant of orchestra itself does not hold. Please report it with the traceback."""

    code = "internal"


class RetryLater(OrchestraError):  # noqa: N818 - control flow, not a failure
    """Raised by an agent: run this task again ``after`` seconds from now. Consumes a retry."""

    code = "retry_later"

    def __init__(self, after: float, message: str = "") -> None:
        super().__init__(message or f"retry asked for in {after:g} s")
        self.after = after


class Throttled(OrchestraError):  # noqa: N818 - control flow, not a failure
    """Raised by an agent: a limit outside refused for ``retry_after`` seconds. Consumes no retry.

    ``key`` names what is limited (``"openai:acme"``), so that other keys of the lane go on.
    """

    code = "throttled"

    def __init__(self, retry_after: float, key: str | None = None, message: str = "") -> None:
        super().__init__(message or f"throttled for {retry_after:g} s")
        self.retry_after = retry_after
        self.key = key


class Reject(OrchestraError):  # noqa: N818 - control flow, not a failure
    """Raised by an agent: this task can never succeed; dead-letter it at once with ``reason``."""

    code = "reject"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BudgetExceededError(Reject):
    """A model call was not made, because a budget is used up; the task is dead-lettered, its journal is kept.

    ``scope`` is ``"task"`` or ``"workflow"``, ``limit`` names the limit that was reached (``"requests"``,
    ``"input_tokens"``, ``"output_tokens"``, ``"total_tokens"``), ``allowed`` is its value and ``used`` all that was used.
    """

    code = "budget_exceeded"

    def __init__(
        self, reason: str, *, scope: str = "task", limit: str = "", allowed: int = 0, used: dict[str, int] | None = None
    ) -> None:
        super().__init__(reason)
        self.scope = scope
        self.limit = limit
        self.allowed = allowed
        self.used = dict(used or {})


class ToolRepeatError(Reject):
    """A tool that may run at most once was begun by an earlier attempt, whose end is not recorded: it is not run again.

    ``tool`` is its name. Find out what became of the call before the task is replayed.
    """

    code = "tool_repeat"

    def __init__(self, reason: str, *, tool: str = "") -> None:
        super().__init__(reason)
        self.tool = tool


class WaitForSignal(OrchestraError):  # noqa: N818 - control flow, not a failure
    """Raised by an agent that runs a step of a workflow: park the step, holding no worker, until signal ``name`` comes.

    The agent is then called again, and its context has the value. ``prompt`` is for who is to send the signal.
    ``timeout``: seconds from now after which the step fails, None for never. Outside of workflows it is a failure.
    """

    code = "wait_for_signal"

    def __init__(self, name: str, *, prompt: str | None = None, timeout: float | None = None) -> None:
        super().__init__(f"waiting for signal {name!r}")
        self.name = name
        self.prompt = prompt
        self.timeout = timeout
