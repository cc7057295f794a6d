"""The registry of agents: what processes tasks of a type, and how.

Owns the forms an agent may have, the options of a type, its replicas, and the threads and processes of plain functions.
Types are looked up here and nowhere else: nothing is imported by name because a message asks for it. Refuses to own
queues and retries.

The registry is read by the event loop that dispatches; register before, or in the same thread.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from orchestra._agents.context import InProcess, context_of, context_parameter
from orchestra._limiting.use import KeyOf, Limiter, LimitUse, key_for, require_key_of
from orchestra._pool.executors import FunctionProcesses, FunctionThreads, Left
from orchestra._shared import Connectable
from orchestra.circuit_breaker import CircuitBreaker, CircuitBreakerConfig
from orchestra.errors import ConfigurationError, UnknownAgentError
from orchestra.tasks import BaseTask, Retry, check_ident, require_int, require_number

THREADS = min(64, 8 * (os.cpu_count() or 1))
"""Plain functions that run at once in threads of one registry."""

AgentCall: TypeAlias = Callable[[BaseTask], Awaitable[Any]]
Check: TypeAlias = Callable[[Any, str], None]
"""``check(input, where)`` raises InvalidTaskError for an input that its agent cannot take; ``where`` begins the text."""
F = TypeVar("F", bound=Callable[..., Any])


@runtime_checkable
class Agent(Protocol):
    """An agent as an object."""

    async def process(self, task: BaseTask) -> Any:
        """Process one task; what it returns is the task's result, what it raises its failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """How tasks of a type are run.

    ``timeout``: seconds an attempt may take, None for no limit; a task's own ``timeout`` takes precedence.
    ``retry``: when failed attempts are repeated; a task's own ``max_retries`` takes precedence; None leaves it to the
    dispatcher. ``executor``: where a plain function runs. ``limiter``: asked for a permit before every attempt; a
    refusal delays the task and consumes no retry. ``cost``: permits an attempt takes. ``limits``: several limits, asked
    together: all of them give, or none does. ``key``: which key a task belongs to when an agent raises ``Throttled``
    with a key, given as for :class:`LimitUse`; those of ``limits`` count anyway. ``failover``: an attempt whose failure
    opens the breaker of its replica is repeated without a backoff where another replica is available.
    ``type_concurrency``: tasks of the type that run at once in this process, over all replicas; None for no limit.
    """

    timeout: float | None = None
    retry: Retry | None = None
    executor: Literal["thread", "process"] = "thread"
    limiter: Limiter | None = None
    cost: int = 1
    limits: Sequence[LimitUse] = ()
    key: KeyOf = None
    failover: bool = False
    type_concurrency: int | None = None
    uses: tuple[LimitUse, ...] = field(init=False, repr=False, compare=False)
    """All limits an attempt uses."""

    def __post_init__(self) -> None:
        if self.timeout is not None:
            require_number("agent timeout", self.timeout, 0.0, 30 * 86_400.0, unit="seconds", exclusive=True)
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise ConfigurationError(
                f"agent retry must be a Retry, got {self.retry!r}", field="retry", value=self.retry
            )
        if self.executor not in ("thread", "process"):
            raise ConfigurationError(
                f"agent executor must be 'thread' or 'process', got {self.executor!r}",
                field="executor",
                value=self.executor,
            )
        if self.limiter is not None and not hasattr(self.limiter, "try_acquire"):
            raise ConfigurationError(
                f"agent limiter must have try_acquire(priority, cost), got {self.limiter!r}", field="limiter"
            )
        require_int("agent cost", self.cost, 1, 1_000_000_000, unit="permits")
        if not all(isinstance(use, LimitUse) for use in self.limits):
            raise ConfigurationError(
                f"agent limits must be LimitUse objects, got {self.limits!r}", field="limits", value=self.limits
            )
        require_key_of("agent key", self.key)
        if type(self.failover) is not bool:
            raise ConfigurationError(
                f"agent failover must be True or False, got {self.failover!r}", field="failover", value=self.failover
            )
        if self.type_concurrency is not None:
            require_int("agent type_concurrency", self.type_concurrency, 1, 100_000, unit="tasks")
        own = () if self.limiter is None else (LimitUse(self.limiter, None, self.cost),)
        object.__setattr__(self, "uses", (*own, *self.limits))

    def key_for(self, task: BaseTask) -> str | None:
        """The key of ``task`` outside of its limits. Raises as :meth:`LimitUse.key_for`."""
        return key_for(self.key, task)


class Replica:
    """One of the agents that serve a type. ``running`` is written by the execution of its tasks."""

    __slots__ = ("breaker", "call", "max_concurrency", "running", "task_type", "uses", "weight", "worker_id")

    def __init__(
        self,
        task_type: str,
        worker_id: str,
        call: AgentCall,
        weight: int,
        max_concurrency: int | None,
        breaker: CircuitBreaker | None = None,
        uses: Sequence[LimitUse] = (),
    ) -> None:
        self.task_type = task_type
        self.worker_id = worker_id
        self.call = call
        self.weight = weight
        self.max_concurrency = max_concurrency
        self.breaker = breaker
        self.uses = tuple(uses)
        """Limits of its own, which no other replica uses."""
        self.running = 0

    @property
    def has_room(self) -> bool:
        """Whether it may run another task now."""
        return self.max_concurrency is None or self.running < self.max_concurrency

    @property
    def open_to_tasks(self) -> bool:
        """Whether it has room and its breaker, if it has one, lets a task through."""
        return self.has_room and (self.breaker is None or self.breaker.available)

    def __repr__(self) -> str:
        return f"<Replica {self.worker_id} of {self.task_type} running={self.running}>"


class AgentType:
    """All that is registered for one type: its replicas and options.

    ``steered``: somebody has asked for its balancer, which therefore decides even where there is one replica only.
    """

    __slots__ = ("check", "mean_run", "name", "only", "options", "replicas", "steered")

    def __init__(self, name: str, options: AgentOptions) -> None:
        self.name = name
        self.options = options
        self.replicas: tuple[Replica, ...] = ()
        self.steered = False
        self.check: Check | None = None
        """What an input is held against before it is sent; None: its agents take whatever comes."""
        self.only: Replica | None = None
        """The one replica that gets every task; None where there is something to choose or to look at first."""
        self.mean_run = 0.0
        """Seconds an attempt takes of late, where there is something to choose."""

    def change(
        self, options: AgentOptions | None = None, replicas: tuple[Replica, ...] | None = None, *, steered: bool = False
    ) -> None:
        """Take over what has changed."""
        self.options = options or self.options
        self.replicas = self.replicas if replicas is None else replicas
        self.steered = self.steered or steered
        first = self.replicas[0] if len(self.replicas) == 1 else None
        plain = first is not None and first.max_concurrency is None and first.breaker is None and not first.uses
        self.only = first if plain and not self.steered and self.options.type_concurrency is None else None

    @property
    def full(self) -> bool:
        """Whether ``type_concurrency`` tasks of it run."""
        limit = self.options.type_concurrency
        return limit is not None and sum([replica.running for replica in self.replicas]) >= limit


class AgentRegistry(Connectable):
    """Which agents there are. Owns the threads and processes that plain functions run in."""

    def __init__(self) -> None:
        self._types: dict[str, AgentType] = {}
        self._threads: FunctionThreads | None = None
        self._processes: FunctionProcesses | None = None
        self._pid = os.getpid()
        self.processors: int | None = None
        """How many processes ``executor="process"`` uses, None for one per core."""

    def register(
        self,
        task_type: str,
        agent: Agent | Callable[..., Any],
        *,
        worker_id: str | None = None,
        weight: int = 1,
        max_concurrency: int | None = None,
        breaker: CircuitBreakerConfig | None = None,
        own_limits: Sequence[LimitUse] = (),
        check: Check | None = None,
        **options: Any,
    ) -> Replica:
        """Let ``agent`` serve tasks of ``task_type``.

        ``worker_id`` names the replica (default: the type); the same name again replaces it. ``weight``: 1 to 10,000,
        its share among the replicas. ``max_concurrency``: tasks it runs at once in this process, None for no limit.
        ``breaker``: the replica gets a circuit breaker of this configuration, called ``<task_type>/<worker_id>``: while
        it is open other replicas get the tasks, or they wait, and no attempt is consumed.
        ``own_limits``: limits of this replica alone: while they refuse, other replicas get the tasks, or they wait.
        ``check(input, where)``: raises InvalidTaskError for an input that the agent cannot take; senders who know the
        registry ask it.
        ``options``: the fields of :class:`AgentOptions`; given with any replica, they count for the whole type.

        Raises:
            ConfigurationError: an argument is wrong, or an option unknown.
        """
        check_ident("task_type", task_type)
        worker_id = check_ident("worker_id", task_type if worker_id is None else worker_id)
        require_int("weight", weight, 1, 10_000)
        if max_concurrency is not None:
            require_int("max_concurrency", max_concurrency, 1, 100_000, unit="tasks")
        if breaker is not None and not isinstance(breaker, CircuitBreakerConfig):
            raise ConfigurationError(
                f"breaker must be a CircuitBreakerConfig, got {breaker!r}", field="breaker", value=breaker
            )
        if not all(isinstance(use, LimitUse) for use in own_limits):
            raise ConfigurationError(
                f"own_limits must be LimitUse objects, got {own_limits!r}", field="own_limits", value=own_limits
            )
        entry = self._types.get(task_type)
        chosen = _options(task_type, options) if options or entry is None else entry.options
        call = self._as_call(task_type, agent, chosen)
        if entry is None:
            entry = self._types[task_type] = AgentType(task_type, chosen)
        guard = None if breaker is None else CircuitBreaker(f"{task_type}/{worker_id}"[:128], breaker)
        replica = Replica(task_type, worker_id, call, weight, max_concurrency, guard, own_limits)
        entry.check = check or entry.check
        entry.change(chosen, (*(r for r in entry.replicas if r.worker_id != worker_id), replica))
        return replica

    def agent(self, task_type: str, **options: Any) -> Callable[[F], F]:
        """Decorator form of :meth:`register`."""

        def decorate(function: F) -> F:
            self.register(task_type, function, **options)
            return function

        return decorate

    def unregister(self, task_type: str, worker_id: str | None = None) -> bool:
        """Remove one replica, or the type; False when it was not there. What runs already runs on."""
        entry = self._types.get(task_type)
        if entry is None:
            return False
        rest = tuple(r for r in entry.replicas if worker_id is not None and r.worker_id != worker_id)
        removed = len(rest) < len(entry.replicas)
        if rest:
            entry.change(replicas=rest)
        else:
            del self._types[task_type]
        return removed

    def get(self, task_type: str) -> AgentType | None:
        """What serves ``task_type``, None if nothing does."""
        return self._types.get(task_type)

    def __contains__(self, task_type: object) -> bool:
        return task_type in self._types

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)

    async def call(self, task: BaseTask) -> Any:
        """Run the first agent for ``task.type`` that has room here and now, without queue, retries or limits.

        Raises:
            UnknownAgentError: no agent is registered for the type.
            CircuitOpenError: the breakers of all replicas with room are open.
        """
        entry = self._types.get(task.type)
        if entry is None:
            raise unknown_agent(task.type, self._types)
        replica = next((r for r in entry.replicas if r.open_to_tasks), entry.replicas[0])
        replica.running += 1
        try:
            call, breaker = replica.call, replica.breaker
            return await (call(task) if breaker is None else breaker.call(call, task))
        finally:
            replica.running -= 1

    def breakers(self) -> list[CircuitBreaker]:
        """The circuit breakers of all replicas. O(replicas)."""
        replicas = [replica for entry in self._types.values() for replica in entry.replicas]
        return [replica.breaker for replica in replicas if replica.breaker is not None]

    @property
    def left(self) -> int:
        """Plain functions that go on although their tasks were given up: timed out, cancelled or released."""
        return sum(each.left for each in (self._threads, self._processes) if each is not None)

    @property
    def thread_capacity(self) -> int:
        """Plain functions that can run at once in threads: fewer when many that were given up go on."""
        return THREADS if self._threads is None else self._threads.capacity

    def left_by(self, task: BaseTask) -> Left | None:
        """The plain function that was given ``task``, was given up and goes on; None where there is none."""
        for each in (self._threads, self._processes):
            left = None if each is None else each.left_by(task)
            if left is not None:
                return left
        return None

    def close(self) -> None:
        """End the threads and processes of plain functions, without waiting.

        A process ends at once, a thread after the function that it runs; it does not keep the interpreter from ending.
        """
        for each in (self._threads, self._processes):
            if each is not None:
                each.close()
        self._threads = self._processes = None

    # -- plain functions

    def _as_call(self, task_type: str, agent: Any, options: AgentOptions) -> AgentCall:
        process = getattr(agent, "process", None)
        if process is not None and not inspect.isclass(agent) and callable(process):
            agent = process
        if not callable(agent) or inspect.isclass(agent):
            raise ConfigurationError(
                f"agent for {task_type!r} must be a function of one task or an object with process(task), got {agent!r}",
                field="agent",
                value=agent,
            )
        wanted = context_parameter(agent)
        if inspect.iscoroutinefunction(agent) or inspect.iscoroutinefunction(getattr(agent, "__call__", None)):  # noqa: B004
            call: AgentCall = agent if wanted is None else _with_context(agent, wanted)
            return call
        if options.executor == "process":
            return self._in_process(InProcess(agent, wanted))
        return self._in_thread(agent if wanted is None else _plain_with_context(agent, wanted))

    def _in_thread(self, function: Callable[[BaseTask], Any]) -> AgentCall:
        async def call(task: BaseTask) -> Any:
            if self._threads is None or self._pid != os.getpid():
                self._stay_at_home()
                self._threads = FunctionThreads(THREADS, "orchestra-agent")
            result = await self._threads.run(function, task)
            # a lambda or decorator around an async function does not look like one until it is called
            return await result if inspect.isawaitable(result) else result

        return call

    def _in_process(self, function: Callable[[BaseTask], Any]) -> AgentCall:
        async def call(task: BaseTask) -> Any:
            if self._processes is None or self._pid != os.getpid():
                self._stay_at_home()
                self._processes = FunctionProcesses(self.processors or os.cpu_count() or 1)
            return await self._processes.run(function, task)

        return call

    def _stay_at_home(self) -> None:
        """The threads of a parent do not exist in its forked child, and its processes are not the child's."""
        if self._pid != os.getpid():
            _parents.append((self._threads, self._processes))
            self._threads = self._processes = None
            self._pid = os.getpid()


def _with_context(agent: Callable[..., Any], wanted: str) -> AgentCall:
    async def call(task: BaseTask) -> Any:
        return await agent(task, **{wanted: context_of(task)})

    return call


def _plain_with_context(agent: Callable[..., Any], wanted: str) -> Callable[[BaseTask], Any]:
    def call(task: BaseTask) -> Any:
        return agent(task, **{wanted: context_of(task)})

    return call


_parents: list[Any] = []  # kept for ever: their finalizers would wait for locks that a thread of the parent may hold


def _options(task_type: str, options: dict[str, Any]) -> AgentOptions:
    known = set(AgentOptions.__dataclass_fields__) - {"uses"}
    if unknown := sorted(set(options) - set(known)):
        raise ConfigurationError(
            f"agent for {task_type!r} has no option {unknown[0]!r}; options are {', '.join(sorted(known))}, "
            "worker_id, weight, max_concurrency, breaker, own_limits",
            field=unknown[0],
            value=options[unknown[0]],
        )
    return AgentOptions(**options)


def unknown_agent(task_type: str, known: Any) -> UnknownAgentError:
    """The error for a type that nobody serves."""
    names = ", ".join(sorted(known)) or "none"
    return UnknownAgentError(
        f"no agent is registered for type {task_type!r}; registered are: {names}", task_type=task_type
    )


_default = AgentRegistry()


def get_agent_registry() -> AgentRegistry:
    """The process-wide registry, used by every dispatcher and orchestrator that is not given another."""
    return _default
