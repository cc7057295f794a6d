"""LLM agents: pydantic-ai agents as agents and planners of orchestra, with a journal, budgets and approvals.

Needs the extra ``ai``; ``import orchestra`` never imports it.
"""

from __future__ import annotations

from orchestra.errors import MissingDependencyError

try:
    import pydantic_ai.durable_exec  # noqa: F401
except ImportError as error:  # pragma: no cover - tests run with the extra
    raise MissingDependencyError(
        f"orchestra.ai needs pydantic-ai-slim 2.68 or newer ({error}): pip install 'orchestra-engine[ai]'", extra="ai"
    ) from error

from orchestra.ai.agents import PydanticAgent, agent, task_usage, workflow_usage
from orchestra.ai.durability import ONCE, UNRECORDED, OrchestraDurability
from orchestra.ai.journal import StaleAttemptError
from orchestra.ai.planning import Plan, planner
from orchestra.ai.usage import Budget, Usage

__all__ = [
    "ONCE",
    "UNRECORDED",
    "Budget",
    "OrchestraDurability",
    "Plan",
    "PydanticAgent",
    "StaleAttemptError",
    "Usage",
    "agent",
    "planner",
    "task_usage",
    "workflow_usage",
]
