"""The specification's API reference and interface tables, held against the code by inspection.

``REFERENCE`` is its text without docstrings and annotations: names, order, defaults, and what is a coroutine. The code
may add parameters, but only by keyword and with a default, so that every documented call keeps working.
"""

from __future__ import annotations

import abc
import ast
import importlib
import inspect
from dataclasses import fields

import pytest

import orchestra
from orchestra import (
    BackpressureConfig,
    BackpressureRejectedError,
    BackpressureStrategy,
    BaseLoadBalancerStrategy,
    BaseTask,
    BaseTaskQueue,
    Dispatcher,
    OrchestrationWorkerPoolConfig,
    OrchestrationWorkerPoolMetrics,
    RandomStrategy,
    RateLimitConfig,
    RedisRateLimiter,
    RedisStreamTaskQueue,
    RoundRobinStrategy,
    StepState,
    TaskPriority,
    TaskState,
    WeightedRoundRobinStrategy,
    WorkerPoolError,
    WorkflowState,
    WorkflowStep,
    create_load_balancer,
)

REFERENCE = """
class Dispatcher:
    def __init__(
        self, task_queue, scheduler=None, worker_pool=None, flow_controller=None, load_balancer=None,
        max_concurrent_dispatch=100, default_max_retries=3, consumer_name=None, dispatcher_id=None, batch_size=None,
        block_timeout_ms=None
    ): ...
    async def run(self): ...
    async def stop(self): ...

class RedisRateLimiter:
    def __init__(self, name, config=None): ...
    async def acquire(self, priority=0, cost=1): ...
    def release(self): ...
    async def execute(self, func, *args, priority=0, cost=1, **kwargs): ...
    async def __aenter__(self): ...
    async def __aexit__(self, exc_type, exc, tb): ...

class BaseLoadBalancerStrategy:
    def select_worker(self, available_workers, task_info=None): ...
    def update_worker_status(self, worker_id, status): ...

class WeightedRoundRobinStrategy:
    def select_worker(self, available_workers, task_info=None): ...
    def update_worker_status(self, worker_id, status): ...
    def set_worker_weight(self, worker_id, weight): ...

class QueueWorkerPool:
    def __init__(self, name, config=None): ...
    async def submit(self, func, *args, **kwargs): ...
    async def shutdown(self, wait=True, timeout=None): ...
    def get_active_workers(self): ...
    def get_queue_size(self): ...
    def get_running_tasks(self): ...

class PriorityScheduler:
    def __init__(self, max_size=0): ...
    async def add_task(self, task_data): ...
    async def get_next_task(self, timeout=None): ...
    async def peek_next_task(self): ...
    async def get_tasks_by_priority(self, count=10): ...
    def get_queue_size(self): ...
    def is_empty(self): ...
    async def clear(self): ...
    async def join(self): ...

class BaseTaskQueue:
    async def produce(self, task_data, task_id=None): ...
    async def consume(self, consumer_name, count=1, block_ms=2000): ...
    async def acknowledge(self, message_id): ...
    async def add_to_dlq(self, message_id, task_data, error_info): ...
    async def get_queue_depth(self): ...
    async def get_lock(self, lock_name, expire_time=30): ...

class RedisStreamTaskQueue:
    def __init__(self, stream_name, consumer_group, claim_interval_ms=60000): ...
    async def produce(self, task_data, task_id=None): ...
    async def consume(self, consumer_name, count=1, block_ms=2000): ...
    async def acknowledge(self, message_id): ...
    async def add_to_dlq(self, message_id, task_data, error_info): ...
    async def get_queue_depth(self): ...
    async def get_lock(self, lock_name, expire_time=30): ...

class Orchestrator:
    def __init__(self, task_queue, memory_manager, worker_pool): ...
    async def process_incoming_task(self, task_id, task_data): ...
    async def route_and_execute_step(self, task_id, step_index): ...

class WorkflowEngine:
    def __init__(self, memory_manager): ...
    async def initialize_workflow(self, task, plan): ...
    async def get_next_step(self, task_id): ...
    async def update_step_state(self, task_id, step_index, new_step_state, result=None, error=None): ...
    async def handle_step_failure(self, task_id, step_index, error): ...
    async def complete_workflow(self, task_id, final_output): ...
    async def fail_workflow(self, task_id, error): ...
    async def load_workflow_state(self, task_id): ...
    async def save_workflow_state(self, state): ...

class WorkerManager:
    def __init__(self, worker_pool, monitor_interval=15, scale_check_interval=60): ...
    async def start(self): ...
    async def stop(self): ...

def create_load_balancer(strategy_name="round_robin"): ...
"""

MODULES = {
    "dispatcher": "Dispatcher",
    "flow_control": "RedisRateLimiter BackpressureConfig BackpressureStrategy RateLimitConfig BackpressureRejectedError "
    "get_flow_controller",
    "load_balancer": "BaseLoadBalancerStrategy RoundRobinStrategy RandomStrategy WeightedRoundRobinStrategy "
    "create_load_balancer",
    "orchestration_worker_pool": "QueueWorkerPool OrchestrationWorkerPoolConfig OrchestrationWorkerPoolMetrics "
    "WorkerPoolError",
    "scheduler": "PriorityScheduler TaskPriority get_scheduler",
    "task_queue": "BaseTaskQueue RedisStreamTaskQueue",
    "orchestrator": "Orchestrator WorkflowEngine get_orchestrator",
    "workflow": "WorkflowEngine WorkflowState WorkflowStep StepState get_workflow_engine",
    "worker_manager": "WorkerManager",
}
"""The files that the specification names, and what it puts there."""

ELSEWHERE = "BaseTask TaskState MemoryManager get_memory_manager get_connection_manager"
"""What its examples use without saying where it is."""


def documented():
    """``(where, name, node)`` for every function of REFERENCE; ``where`` is a class name or empty."""
    for node in ast.parse(REFERENCE).body:
        if isinstance(node, ast.ClassDef):
            yield from ((node.name, function.name, function) for function in node.body)
        else:
            yield "", node.name, node


def expected(arguments: ast.arguments) -> list[tuple[str, object]]:
    """Positional parameters with their defaults; ``inspect.Parameter.empty`` where there is none."""
    names = [argument.arg for argument in arguments.args]
    defaults = [ast.literal_eval(default) for default in arguments.defaults]
    return list(zip(names, [inspect.Parameter.empty] * (len(names) - len(defaults)) + defaults, strict=True))


@pytest.mark.parametrize(
    ("where", "name", "node"), list(documented()), ids=[f"{where}.{name}".strip(".") for where, name, _ in documented()]
)
def test_signature(where, name, node):
    owner = getattr(orchestra, where) if where else orchestra
    function = inspect.getattr_static(owner, name) if where and name in vars(owner) else getattr(owner, name)
    assert inspect.iscoroutinefunction(function) is isinstance(node, ast.AsyncFunctionDef)
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == expected(node.args)
    kinds = {p.kind: p.name for p in parameters}
    assert kinds.get(inspect.Parameter.VAR_POSITIONAL) == (node.args.vararg and node.args.vararg.arg)
    assert kinds.get(inspect.Parameter.VAR_KEYWORD) == (node.args.kwarg and node.args.kwarg.arg)
    by_keyword = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        assert by_keyword.pop(argument.arg) == ast.literal_eval(default)
    assert inspect.Parameter.empty not in by_keyword.values(), "what was added must have a default"


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in MODULES.items() for name in names.split()]
)
def test_import_path(module, name):
    assert getattr(importlib.import_module(f"orchestra.{module}"), name) is getattr(orchestra, name)


@pytest.mark.parametrize(
    "name", [*ELSEWHERE.split(), *sorted({name for names in MODULES.values() for name in names.split()})]
)
def test_importable_from_the_package(name):
    assert name in orchestra.__all__
    assert getattr(orchestra, name).__doc__


@pytest.mark.parametrize("name", sorted(set(orchestra.__all__)))
def test_whatever_the_package_lists_is_there(name):
    assert getattr(orchestra, name) is not None
    assert name in dir(orchestra)


@pytest.mark.parametrize(
    ("enum", "members"),
    [
        (TaskPriority, "CRITICAL HIGH NORMAL LOW"),
        (StepState, "PENDING RUNNING COMPLETED FAILED SKIPPED"),
        (BackpressureStrategy, "REJECT"),
        (TaskState, "COMPLETED FAILED"),
    ],
)
def test_enum_members(enum, members):
    names = [member.name for member in enum]
    assert [name for name in members.split() if name not in names] == []
    if enum not in (BackpressureStrategy, TaskState, StepState):  # WAITING was added: it holds no worker
        assert len(names) == len(members.split()), "a closed set in the specification"


def test_priorities_are_ordered_and_travel_by_value():
    assert TaskPriority.CRITICAL < TaskPriority.HIGH < TaskPriority.NORMAL < TaskPriority.LOW
    assert all(type(priority.value) is int for priority in TaskPriority)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (RateLimitConfig, "rate burst period"),
        (BackpressureConfig, "rate_limit strategy"),
        (OrchestrationWorkerPoolConfig, "workers max_queue_size max_concurrent_tasks shutdown_timeout"),
        (OrchestrationWorkerPoolMetrics, "active_workers running_tasks"),
        (BaseTask, "id type input"),
        (WorkflowStep, "step_index action args reasoning state"),
        (WorkflowState, "status workflow_context error current_step_index plan"),
    ],
)
def test_documented_fields(config, options):
    names = {field.name for field in fields(config) if field.init}
    assert set(options.split()) <= names


@pytest.mark.parametrize(
    ("owner", "options"),
    [
        (RedisStreamTaskQueue, "stream_name consumer_group claim_interval_ms"),
        (Dispatcher, "max_concurrent_dispatch default_max_retries batch_size block_timeout_ms"),
    ],
)
def test_documented_options_of_constructors(owner, options):
    assert set(options.split()) <= set(inspect.signature(owner).parameters)


def test_strategies_by_name_and_their_tree():
    for name, strategy in [
        ("round_robin", RoundRobinStrategy),
        ("random", RandomStrategy),
        ("weighted_round_robin", WeightedRoundRobinStrategy),
    ]:
        assert type(create_load_balancer(name)) is strategy
        assert issubclass(strategy, BaseLoadBalancerStrategy)
    assert type(create_load_balancer()) is RoundRobinStrategy


@pytest.mark.parametrize(
    ("base", "methods"),
    [(BaseTaskQueue, {"produce", "consume", "acknowledge"}), (BaseLoadBalancerStrategy, {"select_worker"})],
)
def test_documented_abstract_methods(base, methods):
    assert issubclass(base, abc.ABC)
    assert methods <= base.__abstractmethods__
    with pytest.raises(TypeError, match="abstract"):
        base()


def test_documented_errors():
    assert issubclass(WorkerPoolError, orchestra.OrchestraError)
    assert issubclass(BackpressureRejectedError, orchestra.OrchestraError)
    with pytest.raises(TypeError, match="task_queue must be a BaseTaskQueue"):
        Dispatcher("tasks")
    with pytest.raises(ValueError, match="strategy"):
        create_load_balancer("best")


def test_the_limiter_needs_a_name_and_has_a_default():
    limiter = RedisRateLimiter("name", manager="memory:")
    assert limiter.config == BackpressureConfig()
    assert limiter.config.strategy is BackpressureStrategy.REJECT
