"""The specification's mocks of agents, worker pools and locks, by its names.

Each is the real contract with a memory of what happened and a switch for failure, not a bag of canned answers: a
MockAgent is an agent, a MockWorkerPool runs what is submitted, an AsyncLockMock excludes. One event loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from orchestra.errors import LockError
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.tasks import TaskPriority, require_int, require_number
from orchestra.testing.agents import ScriptedAgent

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType

    from orchestra.agents import AgentRegistry
    from orchestra.tasks import BaseTask

T = TypeVar("T")


class MockAgent(ScriptedAgent):
    """An agent with a configurable pattern of success and failure.

    ``result``: what a success returns, a function of the task, or by default a dict that names agent and task.
    ``error``: what a failure raises, by default a RuntimeError. ``fail_times``: how many calls fail before the first
    success, -1 for all; or ``pattern``: success (True) or failure (False) per call, repeated from the start.
    ``latency``: seconds that each call takes, 0 or more.

    Raises:
        ConfigurationError: ``fail_times`` or ``latency`` is out of range.
    """

    def __init__(
        self,
        name: str = "mock-agent",
        *,
        result: Any = None,
        error: Exception | None = None,
        fail_times: int = 0,
        pattern: Sequence[bool] | None = None,
        latency: float = 0.0,
    ) -> None:
        require_int("fail_times", fail_times, -1, 1 << 31, unit="calls")
        require_number("latency", latency, 0.0, 86_400.0, unit="seconds")
        super().__init__(self._answer)
        self.name = name
        self.result = result
        self.error = error
        self.fail_times = fail_times
        self.pattern = pattern
        self.latency = latency
        self.successes = 0
        self.failures = 0

    def _succeeds(self, number: int) -> bool:
        if self.pattern:
            return bool(self.pattern[(number - 1) % len(self.pattern)])
        return 0 <= self.fail_times < number

    async def _answer(self, task: BaseTask, number: int) -> Any:
        if self.latency:
            await asyncio.sleep(self.latency)
        if not self._succeeds(number):
            self.failures += 1
            raise self.error or RuntimeError(f"{self.name} fails call {number}")
        self.successes += 1
        if self.result is None:
            return {"agent": self.name, "task_id": task.id, "status": "success"}
        return self.result(task) if callable(self.result) else self.result


class MockAgentFactory:
    """Makes MockAgents by type and remembers them in ``created``; ``options`` are those of every agent it makes."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._by_type: dict[str, dict[str, Any]] = {}
        self.created: dict[str, list[MockAgent]] = {}

    def configure(self, agent_type: str, **options: Any) -> Self:
        """Set options of the agents of one type that are made from now on."""
        self._by_type.setdefault(agent_type, {}).update(options)
        return self

    def create_agent(self, agent_type: str, **options: Any) -> MockAgent:
        """A new agent, called ``agent_type`` unless ``name`` is given."""
        chosen = {"name": agent_type, **self._options, **self._by_type.get(agent_type, {}), **options}
        agent = MockAgent(**chosen)
        self.created.setdefault(agent_type, []).append(agent)
        return agent

    def register(self, registry: AgentRegistry, *agent_types: str) -> list[MockAgent]:
        """Make one agent of each type and let it serve the tasks of that type."""
        agents = [self.create_agent(agent_type) for agent_type in agent_types]
        for agent_type, agent in zip(agent_types, agents, strict=True):
            registry.register(agent_type, agent)
        return agents


class Submitted(NamedTuple):
    """One job that a MockWorkerPool was given."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    future: asyncio.Future[Any]


class MockWorkerPool(QueueWorkerPool):
    """A worker pool that runs what is submitted and remembers it in ``submitted``; ``fail_with`` makes it refuse."""

    def __init__(self, name: str = "mock-pool", config: OrchestrationWorkerPoolConfig | None = None) -> None:
        super().__init__(name, config)
        self.submitted: list[Submitted] = []
        self.fail_with: Exception | None = None

    def submit_nowait(
        self,
        func: Callable[..., Coroutine[Any, Any, T]],
        *args: Any,
        priority: int = TaskPriority.NORMAL,
        **kwargs: Any,
    ) -> asyncio.Future[T]:
        """:meth:`QueueWorkerPool.submit_nowait`, remembered; ``submit`` ends up here too."""
        if self.fail_with is not None:
            raise self.fail_with
        future = super().submit_nowait(func, *args, priority=priority, **kwargs)
        self.submitted.append(Submitted(func, args, kwargs, future))
        return future


class AsyncLockMock:
    """A distributed lock without the distribution: excludes within one event loop and counts.

    ``available=False`` makes every acquisition fail with LockError. ``fence`` grows with every acquisition.
    """

    def __init__(self, name: str = "lock", *, available: bool = True) -> None:
        self.name = name
        self.available = available
        self.fence = 0
        self.acquisitions = 0
        self.releases = 0
        self._lock = asyncio.Lock()

    @property
    def locked(self) -> bool:
        """Whether somebody holds it."""
        return self._lock.locked()

    async def acquire(self) -> None:
        """Wait for the lock.

        Raises:
            LockError: it was made unavailable.
        """
        if not self.available:
            raise LockError(f"lock {self.name!r} is not available: the mock was told so")
        await self._lock.acquire()
        self.acquisitions += 1
        self.fence += 1

    async def release(self) -> bool:
        """Free the lock; False when nobody held it."""
        if not self._lock.locked():
            return False
        self._lock.release()
        self.releases += 1
        return True

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.release()
