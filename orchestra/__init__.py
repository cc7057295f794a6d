"""orchestra hands tasks to a fleet of agents over Redis Streams.

Everything public is here: ``from orchestra import App, Retry``. A name is imported with its module when it is first
used, so that ``import orchestra`` costs milliseconds and needs no extra; each lives in one documented module, which may
be imported from as well. Refuses to own anything: no state, no behaviour.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from orchestra._version import __version__

try:
    from orchestra._ext import codec as _codec  # noqa: F401 - the rest of the compiled package is built with it
except ModuleNotFoundError as _error:
    if not (_error.name or "").startswith("orchestra._ext"):
        raise
    raise ImportError(
        "orchestra's compiled modules are not built: run `make build` in the source tree, or install the wheel with "
        "`pip install orchestra-engine`"
    ) from _error

if TYPE_CHECKING:
    from orchestra._breakers.exchange import BreakerExchange
    from orchestra._durability import Durability
    from orchestra._front.runs import Run, SendOptions
    from orchestra._front.workflow_runs import WorkflowRun
    from orchestra._queue.base import DistributedLock, QueueStats
    from orchestra._redis.address import Address, parse_address
    from orchestra.agents import (
        Agent,
        AgentContext,
        AgentOptions,
        AgentRegistry,
        ExecutorAgent,
        LimitUse,
        PlannerAgent,
        create_agent,
        current_context,
        get_agent_registry,
    )
    from orchestra.app import AgentHandle, App
    from orchestra.circuit_breaker import (
        BreakerSnapshot,
        CircuitBreaker,
        CircuitBreakerConfig,
        CircuitState,
        breaker_registry,
    )
    from orchestra.connections import ConnectionManager, ServerInfo, get_connection_manager
    from orchestra.dispatcher import Dispatcher
    from orchestra.embedded import EmbeddedServer
    from orchestra.errors import (
        BackpressureRejectedError,
        BudgetExceededError,
        CircuitOpenError,
        ConfigurationError,
        CorruptEntryError,
        DurabilityError,
        EmbeddedServerError,
        ForkedProcessError,
        InternalError,
        InvalidTaskError,
        InvalidTaskTypeError,
        LockError,
        MissingDependencyError,
        OrchestraError,
        QueueFullError,
        Reject,
        ResultUnavailableError,
        RetryLater,
        StoreAuthError,
        StoreError,
        StoreFullError,
        StoreUnavailableError,
        StreamExhaustedError,
        TaskCancelledError,
        TaskFailedError,
        TaskTooLargeError,
        Throttled,
        ToolRepeatError,
        UnknownAgentError,
        UnsafeServerError,
        WaitForSignal,
        WorkerPoolError,
        WorkflowError,
        WrongLoopError,
    )
    from orchestra.flow_control import (
        Admission,
        BackpressureConfig,
        BackpressureStrategy,
        FlowControlMetrics,
        RateLimitConfig,
        RedisRateLimiter,
        acquire_all,
        get_flow_controller,
        list_limits,
        reset_limit,
        set_limit,
        try_acquire_all,
    )
    from orchestra.load_balancer import (
        BaseLoadBalancerStrategy,
        ConsistentHashStrategy,
        LeastLoadedStrategy,
        RandomStrategy,
        RoundRobinStrategy,
        WeightedRoundRobinStrategy,
        create_load_balancer,
        register_strategy,
    )
    from orchestra.memory import MemoryManager, get_memory_manager
    from orchestra.memory_queue import InMemoryTaskQueue
    from orchestra.orchestration_worker_pool import (
        OrchestrationWorkerPoolConfig,
        OrchestrationWorkerPoolMetrics,
        QueueWorkerPool,
    )
    from orchestra.orchestrator import Orchestrator, get_orchestrator
    from orchestra.scheduler import PriorityScheduler, SchedulerStatistics, get_scheduler
    from orchestra.task_queue import BaseTaskQueue, RedisStreamTaskQueue
    from orchestra.tasks import (
        BaseTask,
        Cancellation,
        DeadLetter,
        Outcome,
        Retry,
        RetryBudget,
        TaskDict,
        TaskPriority,
        TaskState,
    )
    from orchestra.worker_manager import PoolSample, ScalingRecommendation, WorkerManager
    from orchestra.workflow import StepState, WorkflowEngine, WorkflowState, WorkflowStep, get_workflow_engine

__all__ = [  # noqa: RUF022 - grouped for people
    # the front door
    "AgentHandle",
    "App",
    "Run",
    "SendOptions",
    "WorkflowRun",
    # tasks and words
    "BaseTask",
    "Cancellation",
    "DeadLetter",
    "Durability",
    "Outcome",
    "Retry",
    "RetryBudget",
    "TaskDict",
    "TaskPriority",
    "TaskState",
    # queues
    "DistributedLock",
    "QueueStats",
    "InMemoryTaskQueue",
    "BaseTaskQueue",
    "RedisStreamTaskQueue",
    # agents and dispatching
    "Agent",
    "AgentContext",
    "AgentOptions",
    "AgentRegistry",
    "ExecutorAgent",
    "PlannerAgent",
    "create_agent",
    "current_context",
    "LimitUse",
    "get_agent_registry",
    "Dispatcher",
    "PriorityScheduler",
    "SchedulerStatistics",
    "get_scheduler",
    "BaseLoadBalancerStrategy",
    "ConsistentHashStrategy",
    "LeastLoadedStrategy",
    "RandomStrategy",
    "RoundRobinStrategy",
    "WeightedRoundRobinStrategy",
    "create_load_balancer",
    "register_strategy",
    "OrchestrationWorkerPoolConfig",
    "OrchestrationWorkerPoolMetrics",
    "QueueWorkerPool",
    "PoolSample",
    "ScalingRecommendation",
    "WorkerManager",
    # limits
    "Admission",
    "BackpressureConfig",
    "BackpressureStrategy",
    "FlowControlMetrics",
    "RateLimitConfig",
    "RedisRateLimiter",
    "acquire_all",
    "get_flow_controller",
    "list_limits",
    "reset_limit",
    "set_limit",
    "try_acquire_all",
    "CircuitBreaker",
    "CircuitBreakerConfig",
    "CircuitState",
    "BreakerExchange",
    "BreakerSnapshot",
    "breaker_registry",
    # workflows
    "MemoryManager",
    "get_memory_manager",
    "Orchestrator",
    "get_orchestrator",
    "StepState",
    "WorkflowEngine",
    "WorkflowState",
    "WorkflowStep",
    "get_workflow_engine",
    # connections
    "Address",
    "parse_address",
    "ConnectionManager",
    "ServerInfo",
    "get_connection_manager",
    "EmbeddedServer",
    # errors
    "BackpressureRejectedError",
    "BudgetExceededError",
    "CircuitOpenError",
    "ConfigurationError",
    "CorruptEntryError",
    "DurabilityError",
    "EmbeddedServerError",
    "ForkedProcessError",
    "InternalError",
    "InvalidTaskError",
    "InvalidTaskTypeError",
    "LockError",
    "MissingDependencyError",
    "OrchestraError",
    "QueueFullError",
    "Reject",
    "ResultUnavailableError",
    "RetryLater",
    "StoreAuthError",
    "StoreError",
    "StoreFullError",
    "StoreUnavailableError",
    "StreamExhaustedError",
    "TaskCancelledError",
    "TaskFailedError",
    "TaskTooLargeError",
    "Throttled",
    "ToolRepeatError",
    "UnknownAgentError",
    "UnsafeServerError",
    "WaitForSignal",
    "WorkerPoolError",
    "WorkflowError",
    "WrongLoopError",
    # modules
    "telemetry",
    "__version__",
]

_HOMES = {
    "orchestra.app": "AgentHandle App",
    "orchestra._front.runs": "Run SendOptions",
    "orchestra._front.workflow_runs": "WorkflowRun",
    "orchestra.tasks": "BaseTask Cancellation DeadLetter Outcome Retry RetryBudget TaskDict TaskPriority TaskState",
    "orchestra._queue.base": "DistributedLock QueueStats",
    "orchestra.memory_queue": "InMemoryTaskQueue",
    "orchestra.task_queue": "BaseTaskQueue RedisStreamTaskQueue",
    "orchestra.agents": "Agent AgentContext AgentOptions AgentRegistry ExecutorAgent LimitUse PlannerAgent create_agent current_context get_agent_registry",
    "orchestra.dispatcher": "Dispatcher",
    "orchestra.scheduler": "PriorityScheduler SchedulerStatistics get_scheduler",
    "orchestra.load_balancer": "BaseLoadBalancerStrategy ConsistentHashStrategy LeastLoadedStrategy RandomStrategy RoundRobinStrategy WeightedRoundRobinStrategy create_load_balancer register_strategy",
    "orchestra.orchestration_worker_pool": "OrchestrationWorkerPoolConfig OrchestrationWorkerPoolMetrics QueueWorkerPool",
    "orchestra.worker_manager": "PoolSample ScalingRecommendation WorkerManager",
    "orchestra.flow_control": "Admission BackpressureConfig BackpressureStrategy FlowControlMetrics RateLimitConfig RedisRateLimiter acquire_all get_flow_controller list_limits reset_limit set_limit try_acquire_all",
    "orchestra._breakers.exchange": "BreakerExchange",
    "orchestra.circuit_breaker": "BreakerSnapshot CircuitBreaker CircuitBreakerConfig CircuitState breaker_registry",
    "orchestra.memory": "MemoryManager get_memory_manager",
    "orchestra.orchestrator": "Orchestrator get_orchestrator",
    "orchestra.workflow": "StepState WorkflowEngine WorkflowState WorkflowStep get_workflow_engine",
    "orchestra._redis.address": "Address parse_address",
    "orchestra._durability": "Durability",
    "orchestra.connections": "ConnectionManager ServerInfo get_connection_manager",
    "orchestra.embedded": "EmbeddedServer",
    "orchestra.errors": "BackpressureRejectedError BudgetExceededError CircuitOpenError ConfigurationError CorruptEntryError DurabilityError EmbeddedServerError ForkedProcessError InternalError InvalidTaskError InvalidTaskTypeError LockError MissingDependencyError OrchestraError QueueFullError Reject ResultUnavailableError RetryLater StoreAuthError StoreError StoreFullError StoreUnavailableError StreamExhaustedError TaskCancelledError TaskFailedError TaskTooLargeError Throttled ToolRepeatError UnknownAgentError UnsafeServerError WaitForSignal WorkerPoolError WorkflowError WrongLoopError",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}
_MODULES = frozenset(("telemetry", "testing"))


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"orchestra.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'orchestra' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
