"""The words of orchestra: task, priority, outcome, delivery, dead letter. No behaviour, no I/O.

A *task* is a unit of work; a *delivery* is one hand-over of a task to one consumer; an *attempt* is a started
execution that counts against retries; a *lease* is how long a delivery is exclusive; a *fence* is a number that grows
with every delivery of a task. See DESIGN in ARCHITECTURE.md for who moves a task between its states.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from orchestra.errors import ConfigurationError

TaskDict: TypeAlias = dict[str, Any]
"""``id type input priority`` and optionally ``max_retries timeout delay deadline metadata``; other keys travel along."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_IDENT = re.compile(r"[!-~]{1,128}")


class TaskPriority(enum.IntEnum):
    """Lower value, sooner served; the value is also the number of the task's lane."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


LANES = len(TaskPriority)


class TaskState(enum.Enum):
    """Where a task or workflow is. COMPLETED, FAILED and CANCELLED absorb."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Cancellation(enum.Enum):
    """What a request to cancel a task has come to."""

    CANCELLED = "cancelled"
    """It had not started; it is terminal now."""
    REQUESTED = "requested"
    """A worker holds it, or it was not found waiting: its holder ends it, a second or so after; an unknown id stays one."""
    ENDED = "ended"
    """It was terminal before; nothing changed."""


class Outcome(enum.Enum):
    """How a delivery ended: a closed set, whatever an agent returned or raised.

    Only FAILED and TIMED_OUT consume a retry; CRASHED has a budget of its own (``max_deliveries``).
    """

    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    THROTTLED = "throttled"
    CANCELLED = "cancelled"
    RELEASED = "released"
    CRASHED = "crashed"

    __hash__ = object.__hash__  # members are unique; Enum's own hash is Python code, and outcomes are counted


@dataclass(slots=True)
class BaseTask:
    """What an agent is handed. ``priority`` is a :class:`TaskPriority` value; times are seconds.

    ``attempt`` counts from 1; ``fence`` grows with every delivery of the task, for resources that check it.
    ``extra`` holds the keys of the task that orchestra does not know.
    """

    id: str
    type: str
    input: Any = None
    priority: int = TaskPriority.NORMAL
    attempt: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)
    max_retries: int | None = None
    timeout: float | None = None
    deadline: float | None = None
    fence: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When a failed task is tried again.

    The delay before retry *n* (from 1) is drawn from ``[0, min(max_delay, base * factor**(n - 1))]``: exponential
    backoff with full jitter (Brooker, "Exponential Backoff And Jitter", 2015). ``jitter=False`` takes the upper end.

    ``max_retries``: tries after the first, 0 to 1000. ``base``, ``max_delay``: seconds, > 0.
    """

    max_retries: int = 3
    base: float = 1.0
    factor: float = 2.0
    max_delay: float = 300.0
    jitter: bool = True

    def __post_init__(self) -> None:
        require_int("Retry.max_retries", self.max_retries, 0, 1000, unit="retries")
        require_number("Retry.base", self.base, 0.0, 86_400.0, unit="seconds", exclusive=True)
        require_number("Retry.factor", self.factor, 1.0, 100.0)
        require_number("Retry.max_delay", self.max_delay, 0.0, 30 * 86_400.0, unit="seconds", exclusive=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryBudget:
    """How much of what a dispatcher does may be retries, so that an outage is not followed by a storm of them.

    In the long run at most ``floor`` retries a second, plus ``ratio`` times the attempts that end. A retry beyond that
    is not lost: it leaves later, by at most ``max_delay`` seconds beyond its backoff.

    ``ratio``: 0 to 10. ``floor``: per second, > 0, at most 1,000,000. ``max_delay``: seconds, 0 to a day.
    """

    ratio: float = 0.2
    floor: float = 10.0
    max_delay: float = 60.0

    def __post_init__(self) -> None:
        require_number("RetryBudget.ratio", self.ratio, 0.0, 10.0)
        require_number("RetryBudget.floor", self.floor, 0.0, 1_000_000.0, unit="retries a second", exclusive=True)
        require_number("RetryBudget.max_delay", self.max_delay, 0.0, 86_400.0, unit="seconds")


class DeadLetter(NamedTuple):
    """A task that will not be tried again, as kept in the dead letter stream.

    ``message_id`` is the id of the dead letter itself; ``died_at`` is unix seconds of the Redis clock;
    ``task_data`` is None when the entry could not be decoded, and ``raw`` then holds its bytes.
    """

    message_id: str
    task_data: TaskDict | None
    error_info: dict[str, Any]
    reason: str
    attempts: int
    died_at: float
    raw: bytes = b""


def check_name(what: str, value: Any) -> str:
    """``value`` if it may be part of a Redis key, else :class:`ConfigurationError` naming ``what``."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigurationError(
            f"{what} must be 1 to 64 characters out of A-Z a-z 0-9 . _ -, got {value!r}", field=what, value=value
        )
    return value


def check_ident(what: str, value: Any) -> str:
    """``value`` if it may name a task or type, else :class:`ConfigurationError` naming ``what``."""
    if not isinstance(value, str) or not _IDENT.fullmatch(value):
        raise ConfigurationError(
            f"{what} must be 1 to 128 printable ASCII characters without spaces, got {value!r}", field=what, value=value
        )
    return value


def is_ident(value: str) -> bool:
    """Whether ``value`` would pass :func:`check_ident`."""
    return _IDENT.fullmatch(value) is not None


def require_int(name: str, value: Any, low: int, high: int, *, unit: str = "") -> None:
    """Raise :class:`ConfigurationError` unless ``value`` is an int in ``[low, high]`` (a bool is not an int)."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigurationError(
            f"{name} must be a whole number{unit and f' of {unit}'} from {low} to {high}, got {value!r}",
            field=name,
            value=value,
        )


def require_number(name: str, value: Any, low: float, high: float, *, unit: str = "", exclusive: bool = False) -> None:
    """Raise :class:`ConfigurationError` unless ``value`` is a finite number in ``[low, high]`` (or ``(low, high]``)."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (low < value if exclusive else low <= value) or not value <= high:
        bound = f"above {low:g}" if exclusive else f"{low:g} or more"
        raise ConfigurationError(
            f"{name} must be a number{unit and f' of {unit}'}, {bound} and at most {high:g}, got {value!r}",
            field=name,
            value=value,
        )
