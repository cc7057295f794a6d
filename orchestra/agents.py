"""Agents: what processes tasks of a type, how it is registered, and what it is given.

An agent is an async function of one :class:`~orchestra.tasks.BaseTask`, an object with ``async process(task)``, or a
plain function, which runs in a thread (or, with ``executor="process"``, in a process). A second parameter that is
annotated :class:`AgentContext`, or called ``ctx``, gets the context of the attempt. Registering a type again under
another ``worker_id`` adds a replica.

The public face of :mod:`orchestra._agents`; owns nothing itself.
"""

from __future__ import annotations

from orchestra._agents.children import Child
from orchestra._agents.context import (
    AgentContext,
    TaskEvent,
    WorkflowView,
    current_context,
    follow_events,
    read_events,
)
from orchestra._agents.executor import ExecutorAgent, get_executor_agent
from orchestra._agents.factory import create_agent, register_agent_kind
from orchestra._agents.planner import PlannerAgent
from orchestra._agents.registry import (
    THREADS,
    Agent,
    AgentCall,
    AgentOptions,
    AgentRegistry,
    AgentType,
    Replica,
    get_agent_registry,
    unknown_agent,
)
from orchestra._agents.services import Services
from orchestra._limiting.use import Limiter, LimitUse

__all__ = [
    "THREADS",
    "Agent",
    "AgentCall",
    "AgentContext",
    "AgentOptions",
    "AgentRegistry",
    "AgentType",
    "Child",
    "ExecutorAgent",
    "LimitUse",
    "Limiter",
    "PlannerAgent",
    "Replica",
    "Services",
    "TaskEvent",
    "WorkflowView",
    "create_agent",
    "current_context",
    "follow_events",
    "get_agent_registry",
    "get_executor_agent",
    "read_events",
    "register_agent_kind",
    "unknown_agent",
]
