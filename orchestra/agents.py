"""Agents and their registry: what processes tasks of a type, and how.

An agent is an async function of one :class:`~orchestra.tasks.BaseTask`, an object with ``async process(task)``, or a
plain function, which runs in a thread (or, with ``executor="process"``, in a process). Registering a type again under
another ``worker_id`` adds a replica. Types are looked up here and nowhere else: nothing is imported by name because a
message asks for it.

The registry is read by the event loop that dispatches; register before, or in the same thread.
"""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from orchestra._shared import Connectable
from orchestra.errors import ConfigurationError, UnknownAgentError
from orchestra.tasks import BaseTask, Retry, check_ident, require_int, require_number

AgentCall: TypeAlias = Callable[[BaseTask], Awaitable[Any]]
F = TypeVar("F", bound=Callable[..., Any])


@runtime_checkable
class Agent(Protocol):
    """An agent as an object."""

    async def process(self, task: BaseTask) -> Any:
        """Process one task; what it returns is the task's result, what it raises its failure."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """How tasks of a type are run.

    ``timeout``: seconds an attempt may take, None for no limit; a task's own ``timeout`` takes precedence.
    ``retry``: when failed attempts are repeated; a task's own ``max_retries`` takes precedence; None leaves it to the
    dispatcher. ``executor``: where a plain function runs. ``limiter``: asked for a permit before every attempt; a
    refusal delays the task and consumes no retry. ``cost``: permits an attempt takes.
    """

    timeout: float | None = None
    retry: Retry | None = None
    executor: Literal["thread", "process"] = "thread"
    limiter: Limiter | None = None
    cost: int = 1

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


class Replica:
    """One of the agents that serve a type. ``running`` is written by the execution of its tasks."""

    __slots__ = ("call", "max_concurrency", "running", "task_type", "weight", "worker_id")

    def __init__(
        self, task_type: str, worker_id: str, call: AgentCall, weight: int, max_concurrency: int | None
    ) -> None:
        self.task_type = task_type
        self.worker_id = worker_id
        self.call = call
        self.weight = weight
        self.max_concurrency = max_concurrency
        self.running = 0

    @property
    def has_room(self) -> bool:
        """Whether it may run another task now."""
        return self.max_concurrency is None or self.running < self.max_concurrency

    def __repr__(self) -> str:
        return f"<Replica {self.worker_id} of {self.task_type} running={self.running}>"


class AgentType:
    """All that is registered for one type: its replicas and options."""

    __slots__ = ("name", "options", "replicas")

    def __init__(self, name: str, options: AgentOptions) -> None:
        self.name = name
        self.options = options
        self.replicas: tuple[Replica, ...] = ()


class AgentRegistry(Connectable):
    """Which agents there are. Owns the threads and processes that plain functions run in."""

    def __init__(self) -> None:
        self._types: dict[str, AgentType] = {}
        self._executors: dict[str, Executor] = {}
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
        **options: Any,
    ) -> Replica:
        """Let ``agent`` serve tasks of ``task_type``.

        ``worker_id`` names the replica (default: the type); the same name again replaces it. ``weight``: 1 to 10,000,
        its share among the replicas. ``max_concurrency``: tasks it runs at once in this process, None for no limit.
        ``options``: the fields of :class:`AgentOptions`; given with any replica, they count for the whole type.

        Raises:
            ConfigurationError: an argument is wrong, or an option unknown.
        """
        check_ident("task_type", task_type)
        worker_id = check_ident("worker_id", task_type if worker_id is None else worker_id)
        require_int("weight", weight, 1, 10_000)
        if max_concurrency is not None:
            require_int("max_concurrency", max_concurrency, 1, 100_000)
        entry = self._types.get(task_type)
        chosen = _options(task_type, options) if options or entry is None else entry.options
        call = self._as_call(task_type, agent, chosen)
        if entry is None:
            entry = self._types[task_type] = AgentType(task_type, chosen)
        entry.options = chosen
        replica = Replica(task_type, worker_id, call, weight, max_concurrency)
        entry.replicas = (*(r for r in entry.replicas if r.worker_id != worker_id), replica)
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
            entry.replicas = rest
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
        """
        entry = self._types.get(task.type)
        if entry is None:
            raise unknown_agent(task.type, self._types)
        replica = next((r for r in entry.replicas if r.has_room), entry.replicas[0])
        replica.running += 1
        try:
            return await replica.call(task)
        finally:
            replica.running -= 1

    def close(self) -> None:
        """End the threads and processes of plain functions; those that still run are not waited for."""
        for executor in self._executors.values():
            executor.shutdown(wait=False, cancel_futures=True)
        self._executors.clear()

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
        if inspect.iscoroutinefunction(agent) or inspect.iscoroutinefunction(getattr(agent, "__call__", None)):  # noqa: B004
            call: AgentCall = agent
            return call
        return self._in_process(agent) if options.executor == "process" else self._in_thread(agent)

    def _in_thread(self, function: Callable[[BaseTask], Any]) -> AgentCall:
        async def call(task: BaseTask) -> Any:
            executor = self._executors.get("thread")
            if executor is None:
                executor = self._executors["thread"] = ThreadPoolExecutor(
                    min(64, 8 * (os.cpu_count() or 1)), "orchestra-agent"
                )
            result = await asyncio.get_running_loop().run_in_executor(executor, function, task)
            # a lambda or decorator around an async function does not look like one until it is called
            return await result if inspect.isawaitable(result) else result

        return call

    def _in_process(self, function: Callable[[BaseTask], Any]) -> AgentCall:
        async def call(task: BaseTask) -> Any:
            executor = self._executors.get("process")
            if executor is None:
                executor = self._executors["process"] = _process_pool(self.processors)
            try:
                return await asyncio.get_running_loop().run_in_executor(executor, function, task)
            except BrokenProcessPool:
                if self._executors.get("process") is executor:
                    del self._executors["process"]  # a new one for the next task; those in this one all failed
                    executor.shutdown(wait=False)
                raise

        return call


def _process_pool(size: int | None) -> ProcessPoolExecutor:
    # spawn: a forked child would share the parent's sockets and locks held by its threads
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(size or os.cpu_count() or 1, mp_context=context, initializer=_be_child)


def _be_child() -> None:
    """Ctrl-C reaches the whole process group; only the parent decides what it means. Its death ends the child."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:  # the pool's pipes do not tell: its children hold both ends of them
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="parent-watch", daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _options(task_type: str, options: dict[str, Any]) -> AgentOptions:
    known = AgentOptions.__dataclass_fields__
    if unknown := sorted(set(options) - set(known)):
        raise ConfigurationError(
            f"agent for {task_type!r} has no option {unknown[0]!r}; options are {', '.join(sorted(known))}, "
            "worker_id, weight, max_concurrency",
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
