"""The front door: an :class:`App` gathers agents under a name, sends tasks to them and runs them.

Built from the classes of the specification, adding no second engine: an agent is registered in an
:class:`~orchestra.agents.AgentRegistry`, a call is a task of a :class:`~orchestra.task_queue.BaseTaskQueue`, a worker is
a :class:`~orchestra.dispatcher.Dispatcher`. Owns the connections it makes, one set for each event loop; refuses to own
how arguments travel (:mod:`orchestra._front.signature`) and how a task is run.

Decorate when the module is imported; afterwards an App may be used from any number of event loops.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, overload

from orchestra._durability import Durability
from orchestra._front.handles import (
    AgentDecorator,
    AgentHandle,
    AgentSettings,
    AppLimiter,
    AsyncAgentHandle,
    Given,
    PlainAgentHandle,
    keyed,
    priority_of,
    require_known,
)
from orchestra._front.runs import Run, SendOptions, post, send_options
from orchestra._front.signature import ProcessCall, Signature, make_call
from orchestra._front.workflow_runs import WorkflowDoor, WorkflowRun
from orchestra.agents import AgentContext, AgentRegistry, Limiter
from orchestra.connections import Address, ConnectionManager, default_address, parse_address
from orchestra.dispatcher import Dispatcher
from orchestra.errors import ConfigurationError, InvalidTaskError
from orchestra.flow_control import BackpressureConfig, RateLimitConfig
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.serialization import MAX_TASK_BYTES
from orchestra.task_queue import BaseTaskQueue, RedisStreamTaskQueue
from orchestra.tasks import BaseTask, Cancellation, Retry, TaskDict, check_ident, check_name, require_int

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["AgentHandle", "App", "AsyncAgentHandle", "PlainAgentHandle", "Run", "SendOptions", "WorkflowRun"]

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

GROUP = "workers"
"""The consumer group of every queue of an App."""

_PLACING = ("worker_id", "weight", "max_concurrency", "breaker", "own_limits")


@dataclass(slots=True)
class _Used:
    """What an App holds in one event loop."""

    queue: BaseTaskQueue
    manager: ConnectionManager | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _QueueSettings:
    lease: float = 60.0
    max_length: int = 0
    max_dead: int = 0
    max_task_bytes: int = MAX_TASK_BYTES
    dedup_window: float = 3600.0
    result_ttl: float = 3600.0
    max_deliveries: int = 3
    durability: str = "accepted"

    def make(self, name: str, manager: ConnectionManager | None) -> BaseTaskQueue:
        shared: dict[str, Any] = {
            "claim_interval_ms": round(self.lease * 1000),
            "max_length": self.max_length,
            "max_dead": self.max_dead,
            "max_task_bytes": self.max_task_bytes,
            "dedup_window": self.dedup_window,
            "result_ttl": self.result_ttl,
            "max_deliveries": self.max_deliveries,
        }
        if manager is None:
            return InMemoryTaskQueue(name, GROUP, **shared)
        return RedisStreamTaskQueue(name, GROUP, manager=manager, durability=self.durability, **shared)


class App(WorkflowDoor):
    """Agents under one name, and the queue that their tasks go through.

    Args:
        name: ``[A-Za-z0-9._-]{1,64}``; names the queue too, unless ``queue`` does.
        redis: the address, such as ``redis://host/0`` or ``memory:``; by default ``ORCHESTRA_REDIS_URL``, else the
            embedded server.
        queue: the queue's name, where it is not the App's.
        lease: seconds a delivery is exclusive unless renewed, 0.1 to 86,400.
        retry: when failed attempts are repeated where an agent says nothing.
        concurrency: agents that a worker runs at once, 1 to 100,000.
        agents: the registry; by default one of its own.
        max_length, max_dead, max_task_bytes, dedup_window, result_ttl, max_deliveries: as of
            :class:`~orchestra.task_queue.RedisStreamTaskQueue`.
        durability: how safe a task is when it has been sent, such as ``"replicated(1)"``; by default
            ``ORCHESTRA_DURABILITY``, else ``"accepted"``. ``memory:`` can do nothing more.

    Raises:
        ConfigurationError: naming the argument that is wrong.
    """

    def __init__(
        self,
        name: str,
        redis: str | Address | None = None,
        *,
        queue: str | None = None,
        lease: float = 60.0,
        retry: Retry | None = None,
        concurrency: int = 100,
        agents: AgentRegistry | None = None,
        max_length: int = 0,
        max_dead: int = 0,
        max_task_bytes: int = MAX_TASK_BYTES,
        dedup_window: float = 3600.0,
        result_ttl: float = 3600.0,
        max_deliveries: int = 3,
        durability: Durability | str | None = None,
    ) -> None:
        super().__init__()
        self.name = check_name("App name", name)
        self.queue_name = check_name("queue", name if queue is None else queue)
        self._address = _address(redis)
        self._given = redis is not None
        self.retry = retry or Retry()
        if not isinstance(self.retry, Retry):
            raise ConfigurationError(f"App retry must be a Retry, got {retry!r}", field="retry", value=retry)
        require_int("App concurrency", concurrency, 1, 100_000, unit="agents")
        self.concurrency = concurrency
        self.agents = AgentRegistry() if agents is None else agents
        self.handles: dict[str, AgentHandle[..., Any]] = {}
        """The decorated agents by name."""
        self.source_fn: Callable[..., Any] | None = None
        self.report_fn: Callable[..., Any] | None = None
        self._settings = _QueueSettings(
            lease=lease,
            max_length=max_length,
            max_dead=max_dead,
            max_task_bytes=max_task_bytes,
            dedup_window=dedup_window,
            result_ttl=result_ttl,
            max_deliveries=max_deliveries,
            durability=_durability(durability),
        )
        self._settings.make(self.queue_name, None)  # a wrong setting is an error here, not at the first use
        self._options: dict[str, dict[str, Any]] = {}
        self._functions: dict[tuple[str, str], Any] = {}
        self._used: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Used] = weakref.WeakKeyDictionary()

    # -- where its tasks go

    @property
    def address(self) -> Address:
        """Where Redis is: the argument or :meth:`bind`, else ``ORCHESTRA_REDIS_URL``, else the embedded server."""
        if self._address is None:
            self._address = default_address()
        return self._address

    @property
    def queue(self) -> BaseTaskQueue:
        """The queue, made once for each event loop; a ``memory:`` queue is gone with its loop.

        Raises:
            ConfigurationError: no event loop runs, or the address cannot be used.
        """
        return self._here().queue

    @property
    def manager(self) -> ConnectionManager | None:
        """The connections of this event loop; None with ``memory:``. Raises as :attr:`queue`."""
        return self._here().manager

    def _here(self) -> _Used:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                f"the queue of App {self.name!r} belongs to an event loop: use it inside a coroutine", field="queue"
            ) from None
        used = self._used.get(loop)
        if used is None:
            manager = None if self.address.scheme == "memory" else ConnectionManager(self.address)
            _require_durable(self.name, self._settings.durability, manager)
            used = self._used[loop] = _Used(self._settings.make(self.queue_name, manager), manager)
        return used

    def bind(self, *, redis: str | Address | None = None, queue: str | None = None, **settings: Any) -> Self:
        """Use another address, queue or setting of it (``lease``, ``result_ttl``, …) than the code says; None keeps.

        Raises:
            ConfigurationError: a value is wrong, or the queue is in use already.
        """
        if self._used:
            raise ConfigurationError(f"App {self.name!r} is in use: bind it before its first use", field="bind")
        if unknown := sorted(set(settings) - set(_QueueSettings.__dataclass_fields__)):
            raise ConfigurationError(f"an App's queue has no setting {unknown[0]!r}", field=unknown[0])
        if "durability" in settings:
            settings["durability"] = _durability(settings["durability"])
        chosen = replace(self._settings, **settings)
        name = self.queue_name if queue is None else check_name("queue", queue)
        chosen.make(name, None)
        self._address = _address(redis) or self._address
        self._given = self._given or redis is not None
        self.queue_name, self._settings = name, chosen
        return self

    async def connect(self) -> Self:
        """Reach Redis (or start the embedded server), so that a wrong address is an error here. Idempotent.

        Raises:
            StoreUnavailableError, StoreAuthError, EmbeddedServerError.
        """
        manager = self.manager
        if manager is not None:
            await manager.connect()
        return self

    async def close(self) -> None:
        """Give back what this event loop holds, and the threads and processes of plain functions. Idempotent."""
        used = self._used.pop(asyncio.get_running_loop(), None)
        self._drivers.pop(asyncio.get_running_loop(), None)
        if used is not None:
            await used.queue.close()
            if used.manager is not None:
                await used.manager.close()
        self.agents.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    # -- agents

    @overload
    def agent(  # type: ignore[overload-overlap]  # a coroutine function is a plain function of coroutines, too
        self, function: Callable[Concatenate[BaseTask, AgentContext, P], Coroutine[Any, Any, R]], /
    ) -> AgentHandle[P, R]: ...
    @overload
    def agent(  # type: ignore[overload-overlap]
        self, function: Callable[Concatenate[Given, P], Coroutine[Any, Any, R]], /
    ) -> AgentHandle[P, R]: ...
    @overload
    def agent(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncAgentHandle[P, R]: ...
    @overload
    def agent(self, function: Callable[P, R], /) -> PlainAgentHandle[P, R]: ...
    @overload
    def agent(self, name: str | None = None, /, **options: Unpack[AgentSettings]) -> AgentDecorator: ...

    def agent(self, function: Any = None, /, **options: Any) -> Any:
        """Make the decorated function an agent: ``@app.agent``, ``@app.agent("name", timeout=30)``.

        It takes the keyword arguments of its tasks; a parameter annotated :class:`~orchestra.tasks.BaseTask` is given
        the task itself, one annotated :class:`~orchestra.agents.AgentContext` the context of the attempt; type checkers
        know that of the first parameters. Decorating another function for the same ``name`` with another ``worker_id``
        adds a replica.

        Options: ``name``, the task type (by default the function's name). ``timeout``: seconds an attempt may take.
        ``retry``: when failed attempts are repeated (by default the App's). ``executor``: where a plain function runs,
        ``"thread"`` or ``"process"`` (then it must be at the top level of an importable module). ``limit``: a rate
        limit shared by all workers, or a limiter; a refusal delays the task, without a retry. ``cost``: permits that
        an attempt takes. ``key``: what the limit is counted for, such as ``"{tenant}"``: each key has a limit of its
        own. ``limits``, ``failover``, ``type_concurrency``: see :class:`~orchestra.agents.AgentOptions`. ``worker_id``, ``weight``, ``max_concurrency``, ``breaker``: of this
        replica, see :meth:`~orchestra.agents.AgentRegistry.register`. ``priority``: of the tasks it is sent, unless ``using`` says
        otherwise.

        Raises:
            ConfigurationError: the function cannot be called by tasks, or an option is wrong.
        """
        name: str | None = options.pop("name", None)
        if isinstance(function, str):
            function, name = None, function
        if function is not None:
            return self._decorate(function, name, options)
        return lambda wrapped: self._decorate(wrapped, name, options)

    def replica(self, name: str, function: Callable[..., Any], **options: Any) -> AgentHandle[..., Any]:
        """Let ``function`` serve ``name`` too: the form of :meth:`agent` for functions that are not decorated here."""
        return self._decorate(function, name, options)

    def _decorate(self, function: Any, name: str | None, options: dict[str, Any]) -> AgentHandle[..., Any]:
        function = getattr(function, "function", function) if isinstance(function, AgentHandle) else function
        name = check_ident("agent name", name or getattr(function, "__name__", None))
        signature = Signature(function, name)
        require_known(name, options)
        options = dict(options)
        send = SendOptions(priority=priority_of(options.pop("priority", None), self.handles.get(name)))
        placing = {key: options.pop(key) for key in _PLACING if key in options}
        self._refuse_twin(name, placing.get("worker_id") or name, function)
        if "limit" in options:
            options["limiter"] = self._limiter(name, options.pop("limit"))
        merged = {**self._options.get(name, {}), **options}
        call = make_call(function, signature)
        if merged.get("executor") == "process" and not inspect.iscoroutinefunction(function):
            call = ProcessCall(function, name)
        self.agents.register(name, call, check=signature.check_input, **placing, **keyed(merged))
        self._options[name] = merged
        kind = AsyncAgentHandle if inspect.iscoroutinefunction(function) else PlainAgentHandle
        handle: AgentHandle[..., Any] = kind(self, name, function, signature, send)
        self.handles.setdefault(name, handle)
        self._functions[name, placing.get("worker_id") or name] = function
        return handle

    def _refuse_twin(self, name: str, worker_id: str, function: Any) -> None:
        """Two functions under one name would silently hide one of them; the same one again (a reload) replaces."""
        other = self._functions.get((name, worker_id))
        if other is None:
            return
        if (other.__module__, other.__qualname__) != (function.__module__, function.__qualname__):
            raise ConfigurationError(
                f"agent {name!r} exists already ({other.__module__}.{other.__qualname__}): give this one another name=, or "
                "its own worker_id= to make it a replica",
                field="name",
                value=name,
            )

    def _limiter(self, name: str, limit: Any) -> Limiter | None:
        if isinstance(limit, RateLimitConfig):
            limit = BackpressureConfig(rate_limit=limit)
        if isinstance(limit, BackpressureConfig):
            return AppLimiter(self, f"{self.name}.{name}", limit)
        limiter: Limiter | None = limit  # anything else is checked by AgentOptions
        return limiter

    # -- sending by name

    async def send(self, name: str, input: Any = None, **options: Any) -> Run[Any]:  # noqa: A002 - the task's key
        """Send a task to the agent ``name``, which may live in another program.

        ``options`` are those of :meth:`AgentHandle.using`. An agent of this App has its ``input`` checked.

        Raises: as :meth:`AgentHandle.send`.
        Cost: one round trip.
        """
        handle = self.handles.get(name)
        if handle is not None:
            handle.signature.check_input(input)
        chosen = send_options(handle.options if handle is not None else SendOptions(), options)
        task = chosen.task(name, {} if input is None else input)
        return (await post(self, [task], want=chosen.want_result))[0]

    async def send_many(self, tasks: Iterable[Mapping[str, Any]], *, want_results: bool = True) -> list[Run[Any]]:
        """Send task dicts (``type``, ``input``, ``id``, ``priority``, …); all are checked before the first is sent.

        Raises: as :meth:`AgentHandle.send`.
        Cost: one round trip per 500 tasks.
        """
        prepared = [self._checked(number, task) for number, task in enumerate(tasks)]
        return await post(self, prepared, want=want_results)

    def _checked(self, number: int, task: Any) -> TaskDict:
        if not isinstance(task, Mapping) or "type" not in task:
            raise InvalidTaskError(
                f"task {number}: a task is a dict with at least a type, got {task!r:.80}", path=f"[{number}]"
            )
        handle = self.handles.get(task["type"]) if isinstance(task["type"], str) else None
        if handle is None:
            return dict(task)
        handle.signature.check_input(task.get("input"), f"task {number}: ")
        return {"priority": handle.options.priority, **task}

    def run(self, task_id: str, *, task_type: str = "?") -> Run[Any]:
        """The handle on a task that somebody sent with ``want_result``; no round trip, no check that it exists."""
        return Run(self, check_ident("task id", task_id), task_type, "", wanted=True)

    async def cancel(self, task_id: str) -> Cancellation:
        """Cancel a task by its id; see :meth:`Run.cancel`, which knows where to look and so ends more tasks at once.

        Raises:
            ConfigurationError: no task can have this id.
            StoreUnavailableError: Redis was unavailable for too long.
        """
        return await self.queue.cancel(task_id)

    # -- running

    def worker(self, concurrency: int | None = None, **options: Any) -> Dispatcher:
        """A worker in this process: ``async with app.worker(concurrency=100):``, or ``await app.worker().run()``.

        ``concurrency``: agents running at once; by default the App's. ``options``: others of
        :class:`~orchestra.dispatcher.Dispatcher`.

        Raises:
            ConfigurationError: an option is wrong, or no event loop runs.
        """
        settings: dict[str, Any] = {
            "agents": self.agents,
            "max_concurrent_dispatch": self.concurrency if concurrency is None else concurrency,
            "default_max_retries": self.retry.max_retries,
            "retry": self.retry,
            "workflows": self._step_runner(),
        }
        return Dispatcher(self.queue, **{**settings, **options})

    def source(self, function: F) -> F:
        """Make ``function`` where ``orchestra run`` gets tasks from: an async generator function of one job."""
        if not inspect.isasyncgenfunction(function) and not inspect.isgeneratorfunction(function):
            raise ConfigurationError(
                f"the source of App {self.name!r} must be a generator function of one job, which yields task dicts",
                field="source",
                value=function,
            )
        self.source_fn = function
        return function

    def report(self, function: F) -> F:
        """Make ``function(job, results)`` what ``orchestra run`` calls when every task has ended."""
        if not callable(function):
            raise ConfigurationError(
                f"the report of App {self.name!r} must be a function of (job, results)", field="report"
            )
        self.report_fn = function
        return function

    @property
    def address_given(self) -> bool:
        """Whether code or :meth:`bind` chose the address, not the environment or the default."""
        return self._given

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the queue by name; times are seconds."""
        return asdict(self._settings)

    @property
    def max_task_bytes(self) -> int:
        """Largest encoded task or result, in bytes."""
        return self._settings.max_task_bytes

    @property
    def result_ttl(self) -> float:
        """Seconds a wanted result is kept."""
        return self._settings.result_ttl

    @property
    def lease(self) -> float:
        """Seconds a delivery is exclusive, unless it is renewed."""
        return self._settings.lease

    def __repr__(self) -> str:
        return f"<App {self.name} queue={self.queue_name} agents={len(self.agents)}>"


def _durability(given: Durability | str | None) -> str:
    return str(Durability.parse(os.environ.get("ORCHESTRA_DURABILITY", "accepted") if given is None else given))


def _require_durable(name: str, durability: str, manager: ConnectionManager | None) -> None:
    if manager is None and durability != "accepted":
        raise ConfigurationError(
            f"App {name!r} asks for durability {durability}, but memory: keeps nothing: give it a Redis, or accepted",
            field="durability",
            value=durability,
        )


def _address(redis: str | Address | None) -> Address | None:
    return parse_address(redis) if isinstance(redis, str) else redis
