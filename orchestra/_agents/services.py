"""Where the context of a running agent finds what it needs: the task, and the queue, memory and engine around it.

Owns the context variables that tell, so that nothing is made or handed on for a task whose agent does not ask: a worker
coroutine says once who it is, and who runs an agent on behalf of a workflow says so around that call. Refuses to own
what agents may do with it (:mod:`orchestra._agents.context`). A context variable belongs to the asyncio task or thread
that reads it; what an agent starts inherits it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orchestra._workflow.refs import Facts, Known
from orchestra.tasks import BaseTask


@dataclass(frozen=True, slots=True)
class StepScope:
    """The step of a workflow that an agent runs. ``series``: how often the step was sent under an id of its own."""

    workflow_id: str
    index: int
    step_id: str = ""
    series: int = 1
    total: int = 1
    known: Known | Any = None
    """What references could lead to, and ``signals`` that the step was waiting for."""

    @property
    def facts(self) -> Any:
        """``known``, empty where there is none."""
        return Facts() if self.known is None else self.known


@dataclass(slots=True)
class Services:
    """What is around an agent: the ``queue`` its task came from, and what else its contexts may use.

    ``memory``: a MemoryManager; None: made from the connections of the queue when it is first asked for.
    ``engine``: the WorkflowEngine of ``step``, which is None outside of workflows.
    """

    queue: Any = None
    memory: Any = None
    engine: Any = None
    step: StepScope | None = None
    context: Any = None
    """The context that was made of it last."""


current_task: contextvars.ContextVar[BaseTask] = contextvars.ContextVar("orchestra_task")
"""The task being processed, inside an agent."""
current_services: contextvars.ContextVar[Services] = contextvars.ContextVar("orchestra_services")
"""What whoever called the agent has said is around it; most callers leave that to the worker."""
current_slot: contextvars.ContextVar[Any] = contextvars.ContextVar("orchestra_slot")
"""The slot of the worker coroutine; ``slot.source.services`` is what its dispatcher offers."""


@contextmanager
def serving(services: Services) -> Iterator[None]:
    """Agents that are called inside have ``services`` around them."""
    token = current_services.set(services)
    try:
        yield
    finally:
        current_services.reset(token)


def services_here() -> Services | None:
    """What is around the running agent; None where nobody said."""
    told = current_services.get(None)
    if told is not None:
        return told
    slot = current_slot.get(None)
    return None if slot is None else getattr(slot.source, "services", None)
