"""Where workflows are kept: what a store must do, and which one belongs to a memory manager.

Owns the choice between Redis and this process. Refuses to own meaning: what a script answers is read by
:mod:`orchestra._workflow.answers`. One event loop a store.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from orchestra._documents import RedisStore
from orchestra._shared import shared
from orchestra._workflow.record import NewRecord
from orchestra._workflow.redis_store import RedisWorkflows
from orchestra._workflow.twin import LocalWorkflows

if TYPE_CHECKING:
    from orchestra.memory import MemoryManager

Arg = str | bytes | int


class WorkflowStore(Protocol):
    """The records of one namespace; see the scripts ``workflow_*`` for what each call does. Raises StoreError."""

    async def make(self, task_id: str, new: NewRecord) -> int:
        """When the record was made, milliseconds, by this call or an earlier one with this token; 0: by another."""

    async def move(self, op: str, task_id: str, ttl_ms: int, largest: int, args: Sequence[Arg]) -> list[Any]:
        """What ``lua/workflow_move.lua`` answers."""

    async def save(self, task_id: str, expected: bytes, token: str, ttl_ms: int, args: Sequence[Arg]) -> int:
        """The version afterwards, or 0: somebody else was quicker."""

    async def read(self, task_id: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Record and context of one moment; empty when there is none."""

    async def fields(self, task_ids: Sequence[str], names: Sequence[str]) -> list[dict[str, bytes]]:
        """Those of the fields ``names`` that each record has."""

    async def due(self, limit: int) -> list[str]:
        """Members of the outbox that are overdue; they are put off."""

    async def forget(self, members: Sequence[str]) -> None:
        """Take members of workflows that are gone out of the outbox."""

    async def listed(self, limit: int, before_ms: int | None, skip: int) -> list[tuple[str, int]]:
        """Workflows made before a time, newest first, each with the milliseconds when; the first ``skip`` left out."""

    async def emit(self, task_id: str, kind: str, step: int | None, data: bytes) -> bool:
        """Add to the event log of a workflow that is there."""

    async def events(self, task_id: str, after: str, count: int) -> list[tuple[str, dict[str, bytes]]]:
        """Events behind the position ``after``."""

    async def ended_at(self) -> str:
        """The position of the last workflow that ended."""

    async def wait_event(self, task_id: str | None, after: str, timeout: float) -> None:
        """Return when there may be an event behind ``after``; without a workflow, when one may have ended."""

    async def cursor(self, name: str, value: str | None) -> str | None:
        """A position that is kept under ``name``; written when ``value`` is given."""


_on_manager: weakref.WeakKeyDictionary[Any, dict[str, tuple[asyncio.AbstractEventLoop, RedisWorkflows]]] = (
    weakref.WeakKeyDictionary()
)


async def workflow_store(memory: MemoryManager) -> WorkflowStore:
    """The store that everybody shares who has the connections and the namespace of ``memory``; connected."""
    documents = await memory.store()
    if not isinstance(documents, RedisStore):
        return shared("workflows", f"memory: {memory.namespace}", LocalWorkflows)
    return store_on(documents.manager, memory.namespace)


def store_on(manager: Any, namespace: str) -> RedisWorkflows:
    """The workflows of ``namespace`` on the connections of ``manager``, for the running loop."""
    stores, loop = _on_manager.setdefault(manager, {}), asyncio.get_running_loop()
    found = stores.get(namespace)
    if found is None or found[0] is not loop:
        found = stores[namespace] = (loop, RedisWorkflows(manager, namespace))
    return found[1]
