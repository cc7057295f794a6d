"""What an LLM run knows of the task it serves: its place in the journal, its workflow, its memory, where it may tell.

Owns the translation from a task and its context into these facts. Refuses to own any of them. No state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic_core import to_json

from orchestra._agents.context import context_of
from orchestra.ai.journal import Order, journal_key
from orchestra.ai.streaming import Emit
from orchestra.errors import ConfigurationError
from orchestra.memory import MemoryManager
from orchestra.tasks import BaseTask

PREFIX: Final = "ai"
"""Scope of journals, usage and conversations within the memory of a queue."""
MAX_BYTES: Final = 16 << 20
MAX_ENTRIES: Final = 100_000
_SPEND_S: Final = 30 * 86_400.0


@dataclass(frozen=True, slots=True)
class Calling:
    """The facts. ``key``: of the journal; ``order``: of this attempt; ``step``: its row in the workflow's usage."""

    task: BaseTask
    key: str
    order: Order
    memory: MemoryManager
    workflow_id: str | None = None
    step: str = ""
    signals: Mapping[str, Any] = field(default_factory=dict)
    emit: Emit | None = None

    @property
    def fingerprint(self) -> str:
        """Of what is asked: the journal of another question under the same id is void."""
        asked = to_json([self.task.type, _ordered(self.task.input)], fallback=repr, inf_nan_mode="constants")
        return hashlib.sha256(asked).hexdigest()[:16]


def calling(task: BaseTask, memory: MemoryManager | None = None, *, role: str = "") -> Calling:
    """The facts about ``task``, which the current code runs. ``memory``: instead of that of the task's queue.

    Without it, and outside of a worker, everything is kept in this process. ``role``: of a run that is not the task's own,
    such as planning; it gets a journal of its own.
    """
    context = context_of(task)
    try:
        around: MemoryManager | None = context.shared_memory
    except ConfigurationError:  # called by hand, outside of a worker
        around = None
    store = journals(memory or around or MemoryManager("memory:"))
    emit = None if around is None else context.emit
    workflow = context.workflow
    if workflow is None:
        key = journal_key("task", task.id, role and f"{role}.{task.type}")
        return Calling(task, key, (0, task.fence), store, _planned(task) if role else None, role, {}, emit)
    key = journal_key("step", workflow.id, str(workflow.index), role)
    order, step = (workflow.series, task.fence), f"{workflow.index}{role and f'/{role}'}"
    return Calling(task, key, order, store, workflow.id, step, context.signals, emit)


def journals(memory: MemoryManager) -> MemoryManager:
    """The part of ``memory`` that journals, usage and conversations are kept in."""
    store = memory.scoped(PREFIX, index=False)
    store.max_bytes = max(store.max_bytes, MAX_BYTES)
    store.max_entries = max(store.max_entries, MAX_ENTRIES)
    return store


def spending(memory: MemoryManager, workflow_id: str) -> tuple[MemoryManager, str]:
    """Where the usage of a workflow is kept, and under which key."""
    return memory.scoped("usage", ttl=_SPEND_S), journal_key("workflow", workflow_id)


def _planned(task: BaseTask) -> str:
    """The id of the workflow that a planner is asked for."""
    about = task.input.get("task") if isinstance(task.input, Mapping) else None
    return str(about["id"]) if isinstance(about, Mapping) and "id" in about else task.id


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((str(key), _ordered(each)) for key, each in value.items())
    return [_ordered(each) for each in value] if isinstance(value, list | tuple) else value
