"""An App's agents as the caller holds them, and their rate limits.

Owns the typed call and ``send`` of one agent. Refuses to own what a task is and where it goes. A handle is immutable:
``using`` makes another.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    Self,
    TypedDict,
    TypeVar,
    cast,
    overload,
)

from orchestra._agents.context import AgentContext
from orchestra._front.runs import Run, SendOptions, post, send_options
from orchestra._limiting.use import LimitUse
from orchestra._queue.base import YIELD_EVERY
from orchestra.errors import ConfigurationError, InvalidTaskTypeError
from orchestra.flow_control import Admission, BackpressureConfig, RateLimitConfig, RedisRateLimiter
from orchestra.tasks import BaseTask, TaskPriority

if TYPE_CHECKING:
    from orchestra._breakers.rules import CircuitBreakerConfig
    from orchestra._front.signature import Signature
    from orchestra.agents import Limiter
    from orchestra.app import App
    from orchestra.tasks import Retry, TaskDict

P = ParamSpec("P")
R = TypeVar("R")
Given = TypeVar("Given", BaseTask, AgentContext)
"""What a worker fills in: as first parameters, these are no arguments of a call."""


_AGENT_OPTIONS = frozenset(
    (
        *("timeout", "retry", "executor", "limit", "cost", "limits", "key", "failover", "type_concurrency", "priority"),
        *("worker_id", "weight", "max_concurrency", "breaker", "own_limits"),
    )
)


class ReplicaSettings(TypedDict, total=False):
    """The options of an agent; see :meth:`orchestra.app.App.agent`."""

    timeout: float | None
    retry: Retry | None
    executor: Literal["thread", "process"]
    limit: RateLimitConfig | BackpressureConfig | Limiter | None
    cost: int
    worker_id: str | None
    weight: int
    max_concurrency: int | None
    limits: Sequence[LimitUse]
    key: str | Callable[[BaseTask], Any] | None
    failover: bool
    type_concurrency: int | None
    breaker: CircuitBreakerConfig | None
    own_limits: Sequence[LimitUse]
    priority: int


class AgentSettings(ReplicaSettings, total=False):
    """The options of ``@app.agent(...)``."""

    name: str | None


class AgentHandle(Generic[P, R]):
    """An agent of an App. Called, it is the plain function; :meth:`send` makes the call a task."""

    def __init__(
        self, app: App, name: str, function: Callable[..., Any], signature: Signature, options: SendOptions
    ) -> None:
        functools.update_wrapper(self, function)
        self.app = app
        self.name = name
        self.function = function
        self.signature = signature
        self.options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function here and now, without a queue."""
        return self.function(*args, **kwargs)

    async def send(self, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Send this call as a task.

        Raises:
            InvalidTaskError: the arguments do not fit the signature, or cannot travel (InvalidTaskTypeError,
                TaskTooLargeError); nothing was sent.
            QueueFullError, StoreError: as :meth:`~orchestra.task_queue.RedisStreamTaskQueue.produce`.
        Cost: one round trip.
        """
        task = self.options.task(self.name, self.signature.bind(args, kwargs))
        return cast("Run[R]", (await post(self.app, [task], want=self.options.want_result))[0])

    async def send_many(self, calls: Iterable[Mapping[str, Any] | tuple[Any, ...]]) -> list[Run[R]]:
        """Make each of ``calls`` a task: a dict of keyword arguments, or a tuple of positional ones.

        All are checked before the first is sent.

        Raises as :meth:`send`; the text names the call by its number.
        Cost: one round trip per 500 tasks.
        """
        tasks: list[TaskDict] = []
        for number, call in enumerate(calls):
            tasks.append(self.options.task(self.name, self._bind_one(number, call)))
            if number % YIELD_EVERY == 0:
                await asyncio.sleep(0)
        if len(tasks) > 1 and (self.options.key is not None or self.options.id is not None):
            raise ConfigurationError(
                f"key= and id= name one task, but {len(tasks)} are sent: use app.send_many with an id in each task",
                field="key" if self.options.key is not None else "id",
            )
        return cast("list[Run[R]]", await post(self.app, tasks, want=self.options.want_result))

    def _bind_one(self, number: int, call: Any) -> dict[str, Any]:
        where = f"call {number}: "
        if isinstance(call, Mapping):
            return self.signature.bind((), call, where)
        if isinstance(call, tuple):
            return self.signature.bind(call, {}, where)
        raise InvalidTaskTypeError(
            f"{where}send_many takes dicts of keyword arguments or tuples of positional ones, got {type(call).__name__}",
            path=f"[{number}]",
        )

    def using(self, **options: Any) -> Self:
        """The same agent with other options for what it sends; those not named stay.

        ``priority``: a TaskPriority. ``delay``: seconds before it is due. ``key``: a text that names the work, so that
        it is not sent twice within the dedup window; the first one's Run counts. ``id``: the task's id itself.
        ``timeout``: seconds an attempt may take. ``max_retries``. ``deadline``: unix seconds after which it is not
        started any more. ``metadata``: a dict that travels along. ``want_result``: False keeps no result.

        Raises:
            ConfigurationError: an option is unknown, or ``key`` and ``id`` come together.
        """
        return type(self)(self.app, self.name, self.function, self.signature, send_options(self.options, options))

    def __repr__(self) -> str:
        return f"<agent {self.name} of {self.app.name}>"


class AsyncAgentHandle(AgentHandle[P, R]):
    """An :class:`AgentHandle` of a coroutine function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function here and now, without a queue."""
        return cast("Coroutine[Any, Any, R]", self.function(*args, **kwargs))


class PlainAgentHandle(AgentHandle[P, R]):
    """An :class:`AgentHandle` of a plain function, which a worker runs in a thread or a process."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function here and now, in this thread."""
        return cast("R", self.function(*args, **kwargs))


class AgentDecorator(Protocol):
    """What ``@app.agent(...)`` returns. A coroutine function is a plain function of coroutines too, hence the order."""

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[Concatenate[BaseTask, AgentContext, P], Coroutine[Any, Any, R]], /
    ) -> AgentHandle[P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[Concatenate[Given, P], Coroutine[Any, Any, R]], /
    ) -> AgentHandle[P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncAgentHandle[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> PlainAgentHandle[P, R]: ...


class AppLimiter:
    """The rate limiter of an App's agent: known by name on whatever Redis the App turns out to use."""

    def __init__(self, app: App, name: str, config: BackpressureConfig) -> None:
        self.name = name
        self.config = config
        self.interval = config.rate_limit.emission_us / 1e6
        self._app = app
        self._made: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, RedisRateLimiter] = weakref.WeakKeyDictionary()

    def here(self) -> RedisRateLimiter:
        """The limiter itself, for the running event loop."""
        loop = asyncio.get_running_loop()
        limiter = self._made.get(loop)
        if limiter is None:
            where = self._app.manager or "memory:"
            limiter = self._made[loop] = RedisRateLimiter(self.name, self.config, manager=where)
        return limiter

    async def try_acquire(self, priority: int = 0, cost: int = 1) -> Admission:
        """Ask for a permit, without waiting for one."""
        return await self.here().try_acquire(priority, cost)


def keyed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The ``options`` of an agent; its limiter is asked for its ``key``, where it has both.

    Raises:
        ConfigurationError: the limiter has no keys, or ``key`` or ``cost`` is wrong.
    """
    limiter, key = options.get("limiter"), options.get("key")
    if limiter is None or key is None:
        return dict(options)
    use = LimitUse(limiter, key, options.get("cost", 1))
    return {**options, "limiter": None, "limits": (use, *options.get("limits", ()))}


def priority_of(given: Any, first: AgentHandle[..., Any] | None) -> int:
    """The priority of what an agent is sent: as ``given``, else that of its ``first`` replica, else NORMAL."""
    if given is None:
        return first.options.priority if first is not None else TaskPriority.NORMAL
    try:
        return TaskPriority(given)
    except ValueError:
        raise ConfigurationError(
            f"agent priority must be a TaskPriority, 0 (critical) to 3 (low), got {given!r}",
            field="priority",
            value=given,
        ) from None


def require_known(name: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for an option that no agent has."""
    if unknown := sorted(set(options) - _AGENT_OPTIONS):
        raise ConfigurationError(
            f"agent {name!r} has no option {unknown[0]!r}; options are name, {', '.join(sorted(_AGENT_OPTIONS))}",
            field=unknown[0],
            value=options[unknown[0]],
        )
