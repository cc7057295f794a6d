"""What a task uses of a rate limit: which limiter, which key, how many permits. Values; no limiter is asked here.

Templates are filled from a task's input, or else its metadata, and know nothing but field names: what a message says is
never executed, and cannot reach an attribute.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from orchestra.errors import ConfigurationError
from orchestra.tasks import BaseTask, require_int


class Admission(Protocol):
    """A limiter's answer."""

    @property
    def allowed(self) -> bool:
        """Whether a permit was given."""

    @property
    def retry_after(self) -> float:
        """Seconds until one is expected."""


class Limiter(Protocol):
    """What an agent needs of a rate limiter: :class:`~orchestra.flow_control.RedisRateLimiter` has it."""

    @property
    def interval(self) -> float:
        """Seconds between two permits at the limiter's rate."""

    async def try_acquire(self, priority: int = 0, cost: int = 1) -> Admission:
        """Ask for a permit, without waiting for one."""


KeyOf: TypeAlias = str | Callable[[BaseTask], Any] | None
"""A key: constant, a template such as ``"openai:{tenant}"``, or a function of the task."""
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class LimitUse:
    """What an attempt takes of a limit.

    ``limiter``: a limiter, or the name of one that :func:`~orchestra.flow_control.get_flow_controller` knows. ``key``:
    constant, a function of the task, or a template such as ``"openai:{tenant}"``, whose fields are those of the task's
    input, or else of its metadata. ``cost``: permits, 1 to 10**9, or a function of the task that gives them.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    limiter: Limiter | str
    key: KeyOf = None
    cost: int | Callable[[BaseTask], int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.limiter, str) and not hasattr(self.limiter, "try_acquire"):
            raise ConfigurationError(
                f"agent limiter must have try_acquire(priority, cost) or be a name, got {self.limiter!r}",
                field="limiter",
            )
        require_key_of("LimitUse.key", self.key)
        if self.key is not None and not isinstance(self.limiter, str) and not _has_keys(self.limiter):
            raise ConfigurationError(
                f"LimitUse.key needs a limiter that has keys, such as a RedisRateLimiter, got {self.limiter!r}",
                field="LimitUse.key",
                value=self.key,
            )
        if not callable(self.cost):
            require_int("LimitUse.cost", self.cost, 1, 1_000_000_000, unit="permits")

    def key_for(self, task: BaseTask) -> str | None:
        """The key of ``task``. Raises whatever its function does, and ConfigurationError when there is none."""
        return key_for(self.key, task)

    def cost_for(self, task: BaseTask) -> int:
        """The cost of ``task``. Raises whatever its function does, and ConfigurationError when it is out of range."""
        if not callable(self.cost):
            return self.cost
        cost = self.cost(task)
        require_int("LimitUse.cost", cost, 1, 1_000_000_000, unit="permits")
        return cost


def key_for(given: KeyOf, task: BaseTask) -> str | None:
    """What ``given`` comes to for ``task``: a text that is not empty; None where there is no key at all.

    Raises:
        ConfigurationError: a field of the template is missing, or neither a text nor a whole number; or a function gave
            something else than those.
    """
    if given is None:
        return None
    if callable(given):
        return _as_key(given(task), "what the key function gave")
    if "{" not in given:
        return given
    parts = _parts(given)
    if len(parts) == 3 and not parts[0] and not parts[2]:
        return _field_of(task, parts[1])
    return "".join([_field_of(task, part) if number % 2 else part for number, part in enumerate(parts)])


@functools.lru_cache(maxsize=1024)
def _parts(template: str) -> tuple[str, ...]:
    """Texts and names of fields in turn."""
    return tuple(_FIELD.split(template))


def _field_of(task: BaseTask, name: str) -> str:
    for place in (task.input, task.metadata):
        if isinstance(place, Mapping) and name in place:
            value = place[name]
            return value if type(value) is str and value else _as_key(value, f"field {name!r}")
    raise ConfigurationError(f"the key of task {task.id} needs the field {name!r} in its input or metadata", field=name)


def _as_key(value: Any, what: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise ConfigurationError(
            f"a key must be a text that is not empty, {what} is {value!r}", field="key", value=value
        )
    return value


def require_key_of(field: str, key: object) -> None:
    """Raises ConfigurationError unless ``key`` can be a :data:`KeyOf`."""
    if key is not None and not callable(key) and not (isinstance(key, str) and key):
        raise ConfigurationError(
            f"{field} must be a text that is not empty, or a function of the task, got {key!r}", field=field, value=key
        )


def _has_keys(limiter: Any) -> bool:
    return hasattr(limiter, "cell") or hasattr(limiter, "here")
