"""Looking on: how far workflows are, what happened to them, and waiting for their end. Changes nothing but event logs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from orchestra._workflow import record as rec
from orchestra._workflow.answers import Progress, WorkflowEvent, WorkflowSummary, trouble
from orchestra._workflow.driving import Driving
from orchestra._workflow.states import FINISHED, WorkflowState
from orchestra._workflow.unblocked import unblocked
from orchestra.serialization import loads
from orchestra.tasks import TaskState, check_ident, require_int

logger = logging.getLogger("orchestra.workflow")

_LOOK_AGAIN: Final = 2.0
"""Seconds after which a waiter looks at the record without having been told."""
_PAGE: Final = 500
_HEAD: Final = ("format", "token", "status", "phase", *rec.COUNTS)
_SUMMARY: Final = (*_HEAD, "created", "ended", "task", "parent")
_OVER: Final = frozenset(status.value.encode() for status in FINISHED)


class Looking(Driving):
    """The part of :class:`~orchestra.workflow.WorkflowEngine` that shows."""

    async def load_workflow_state(self, task_id: str) -> WorkflowState | None:
        """The whole workflow, or None if there is none. One round trip, O(workflow)."""
        record, context = await (await self._store()).read(task_id)
        return await unblocked(len(record) // 3, rec.decode_state, task_id, record, context) if record else None

    async def progress(self, workflow_id: str) -> Progress:
        """How far it is. One round trip, O(1)."""
        head = await self._head(workflow_id)
        total, current = int(head["steps"]), int(head["current"])
        status = TaskState(head["status"].decode())
        over = status in FINISHED or current >= int(head["planned"])
        done = total - int(head["left"]) if head["phase"] != b"compensating" else total
        return Progress(done, total, None if over else current, status, head["phase"].decode())

    async def list_workflows(
        self, *, status: TaskState | None = None, limit: int = 100, before: float | None = None
    ) -> list[WorkflowSummary]:
        """Workflows of this namespace, newest first, made before the time ``before`` (unix seconds).

        One round trip for each 500 that are looked at, and one for their heads; with ``status`` all may have to be.
        """
        require_int("list_workflows limit", limit, 1, 100_000)
        store, found, skip = await self._store(), dict[str, WorkflowSummary](), 0
        edge = None if before is None else round(before * 1000)
        while len(found) < limit:
            size = _PAGE if status is not None else min(_PAGE, limit - len(found))
            names = await store.listed(size, edge, skip)
            heads = await store.fields([name for name, _ in names], _SUMMARY)
            rows = [(name, at, head) for (name, at), head in zip(names, heads, strict=True) if head]
            summaries = [summary for row in rows if (summary := _summary(*row)) is not None]
            found |= {each.id: each for each in summaries if status in (None, each.status)}
            if len(names) < size:
                break
            skip += size  # newer ones that come meanwhile push some back to where they are seen twice
        return list(found.values())[:limit]

    async def emit(self, workflow_id: str, kind: str, data: Any = None, *, step: int | None = None) -> bool:
        """Add to the event log; False when the workflow is not there or has ended. One round trip.

        Repeated after a lost reply it may be there twice.
        """
        check_ident("event kind", kind)
        return await (await self._store()).emit(workflow_id, kind, step, self._packed(f"event {kind!r}", data))

    async def events(self, workflow_id: str, after: str = "0", *, follow: bool = False) -> AsyncIterator[WorkflowEvent]:
        """What happened, from behind the position ``after`` on: pass the ``id`` of the last event that was seen.

        With ``follow`` it goes on with what happens, until the workflow has ended; a workflow that is not there is
        waited for. One round trip for 500 events. The log keeps the last 100,000, as long as the record.
        """
        store, over = await self._store(), False
        while True:
            rows = await store.events(workflow_id, after, _PAGE)
            for at, row in rows:
                after = at
                yield _event(workflow_id, at, row)
            if rows:
                continue
            if not follow or over:
                return
            over = await self._is_over(workflow_id)  # what was told before that is read once more
            if not over:
                await store.wait_event(workflow_id, after, _LOOK_AGAIN)

    async def wait_end(self, workflow_id: str, timeout: float | None = None) -> WorkflowState:
        """The workflow, when it has ended; one that is not there is waited for. Polls nothing while it waits.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds; it goes on.
        """
        store = await self._store()
        try:
            async with asyncio.timeout(timeout) as limit:
                after = await store.ended_at()
                while not await self._is_over(workflow_id):
                    await store.wait_event(None, after, _LOOK_AGAIN)
                    after = await store.ended_at()
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"workflow {workflow_id} has not ended after {timeout:g} s; it goes on") from None
        return await self._require(workflow_id)

    async def _is_over(self, workflow_id: str) -> bool:
        (head,) = await (await self._store()).fields([workflow_id], ("status",))
        return head.get("status") in _OVER

    async def is_ending(self, workflow_id: str) -> bool:
        """Whether the workflow has ended, is about to, or is gone. One round trip."""
        (head,) = await (await self._store()).fields([workflow_id], ("phase",))
        return head.get("phase") not in (b"running", b"paused")

    async def life(self, workflow_id: str) -> str:
        """What the ids of its steps' tasks have in them, so that another workflow of this id has others. One round trip."""
        (head,) = await (await self._store()).fields([workflow_id], ("task",))
        try:
            return str(loads(head["task"]).get("life", "")) if head else ""
        except rec.BAD as error:
            raise rec.damaged(f"the record of workflow {workflow_id}", error) from error

    async def _head(self, task_id: str) -> dict[str, bytes]:
        """The few fields that say where a workflow is, of one moment."""
        (head,) = await (await self._store()).fields([task_id], _HEAD)
        if not head and not (await (await self._store()).read(task_id))[0]:
            raise trouble(task_id, "unknown")
        rec.check_format(task_id, head)
        return head

    async def _require(self, task_id: str) -> WorkflowState:
        state = await self.load_workflow_state(task_id)
        if state is None:
            raise trouble(task_id, "unknown")
        return state


def _summary(name: str, created_ms: int, head: Mapping[str, bytes]) -> WorkflowSummary | None:
    try:
        rec.check_format(name, head)
        parent = head["parent"].decode().rsplit(" ", 1) if "parent" in head else None
        return WorkflowSummary(
            name,
            loads(head["task"])["type"],
            TaskState(head["status"].decode()),
            head["phase"].decode(),
            int(head["steps"]) - int(head["left"]),
            int(head["steps"]),
            created_ms / 1000,
            rec.seconds(int(head.get("ended", b"0"))),
            None if parent is None else (parent[0], int(parent[1])),
        )
    except rec.BAD as error:
        logger.warning("workflow %s is left out of the list: %s", name, error)
        return None


def _event(workflow_id: str, at: str, row: Mapping[str, bytes]) -> WorkflowEvent:
    try:
        step = int(row["step"]) if "step" in row else None
        data = loads(row["data"]) if "data" in row else None
        return WorkflowEvent(at, int(at.partition("-")[0]) / 1000, row["kind"].decode(), step, data)
    except rec.BAD as error:
        raise rec.damaged(f"event {at} of workflow {workflow_id}", error) from error
