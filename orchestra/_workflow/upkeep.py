"""What a worker does for workflows beside their steps: sends what was not sent, follows the dead letters and the cancelled.

Three looks every few seconds. The outbox of each namespace names what is ready, due or undecided and has not begun: it is
sent again under the same ids, so a repeat adds nothing. A dead letter that is a step (its process crashed too often, its
bytes are damaged) failed without anybody to say so: that is recorded here. The task of a step that somebody cancelled by
its id, where it waited, ended that step: so is that. Every worker looks; all of it may be done twice. Owns the cursor in the dead letters, kept in Redis so that a new worker does not read them all.

Idle cost: three commands a look, at most 0.6 a second. One event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from orchestra import telemetry
from orchestra._delivery import STEP
from orchestra._lifecycle import Service
from orchestra._workflow.making import PLAN, TIMER
from orchestra.errors import OrchestraError, QueueFullError, StoreError
from orchestra.serialization import decode_task
from orchestra.tasks import DeadLetter, require_number
from orchestra.workflow import StepState

if TYPE_CHECKING:
    from orchestra._queue.base import BaseTaskQueue
    from orchestra._workflow.driver import Driver

logger = logging.getLogger("orchestra.workflow")

BATCH: Final = 200
"""Overdue entries, or dead letters, that are dealt with in one go."""
StepTold: TypeAlias = tuple[str, str, int, int, str]
"""Namespace, workflow, index, series and claim of a step."""
_CLAIM: Final = re.compile(r"([0-9a-f]*:[0-9]{1,10})?")
"""A life and a copy, or nothing: whatever else a task says, no driver wrote it."""
CANCELLED_STEP: Final = {"type": "TaskCancelledError", "message": "its task was cancelled", "code": "task_cancelled"}
_random = random.Random()  # noqa: S311 - spreads load, guards nothing


class Upkeep(Service):
    """Looks after the workflows of ``drivers``, by namespace, which may grow; every ``seconds``, jittered."""

    def __init__(
        self,
        queue: BaseTaskQueue,
        drivers: Mapping[str, Driver],
        seconds: float = 5.0,
        driver_of: Callable[[str], Driver] | None = None,
    ) -> None:
        super().__init__()
        self._driver_of = drivers.__getitem__ if driver_of is None else driver_of
        require_number("workflow sweep", seconds, 0.05, 3600.0, unit="seconds")
        self._queue = queue
        self._drivers = drivers
        self._seconds = seconds
        self._after: str | None = None
        self._unreadable = False

    async def _start(self) -> None:
        self.spawn("workflows", self._loop)

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(self._seconds * _random.uniform(1.0, 1.5))
            looks: list[Callable[[], Awaitable[Any]]] = [partial(sweep, driver) for driver in self._drivers.values()]
            for look in (*looks, self._follow, self._tell_cancelled):  # a queue that is full for one keeps nobody else
                try:
                    await look()
                except (StoreError, QueueFullError) as error:
                    logger.debug("workflows are looked after later: %s", error)

    # -- dead letters

    async def _follow(self) -> None:
        if self._unreadable or not self._drivers:
            return
        driver = next(iter(self._drivers.values()))
        if self._after is None:
            self._after = await driver.engine.cursor(self._queue.name) or "0-0"
        while True:
            try:
                letters = await self._queue.read_dlq(BATCH, after=self._after)
            except TypeError:  # a queue of somebody's own that cannot list them
                self._unreadable = True
                return
            for letter in letters:
                await self._bury(letter)
            if letters:
                self._after = letters[-1].message_id
                await driver.engine.cursor(self._queue.name, self._after)
            if len(letters) < BATCH:
                return

    async def _bury(self, letter: DeadLetter) -> None:
        told = step_told((letter.task_data or {}).get("metadata"))
        if told is None:
            return
        try:
            error = error_of(letter.reason, letter.attempts, letter.error_info)
            await self._end(told, StepState.FAILED, error)
        except (StoreError, QueueFullError):
            raise
        except OrchestraError as refused:  # a workflow that is gone, or damaged
            logger.warning("dead letter %s is no step any more: %s", letter.message_id, refused)

    # -- cancelled tasks

    async def _tell_cancelled(self) -> None:
        kept = self._queue.cancelled_steps
        if kept is None or not self._drivers:
            return
        while found := await kept.steps(BATCH):
            for _, frame in found:
                await self._tell_one(frame)
            await kept.forget_steps([name for name, _ in found])

    async def _tell_one(self, frame: bytes) -> None:
        """The step of a cancelled task has ended; a timer's is up to the outbox, which has it, too."""
        try:
            task = decode_task(frame)
            told = step_told(task.get("metadata"))
            if told is not None and task["type"] != TIMER:
                await self._end(told, end_of_cancelled(task["type"]), CANCELLED_STEP)
        except (StoreError, QueueFullError):
            raise
        except OrchestraError as refused:  # it was no step, or its workflow is gone or damaged
            logger.warning("a cancelled task is no step any more: %s", refused)

    async def _end(self, told: StepTold, state: StepState, error: dict[str, Any]) -> None:
        """Record that a step ended of which no worker will tell, and send what that makes ready."""
        namespace, workflow_id, index, series, claim = told
        driver = self._driver_of(namespace)
        moved = await driver.engine.finish(workflow_id, index, series, state, None, error, claim=claim)
        await driver.send(workflow_id, moved)


def step_told(metadata: Any) -> StepTold | None:
    """What the metadata of a task says of the step that it carries; None: it says nothing that can be read."""
    told = metadata.get(STEP) if isinstance(metadata, Mapping) else None
    if not isinstance(told, list | tuple) or [type(part) for part in told] != [str, str, int, int, str]:
        return None
    return tuple(told) if _CLAIM.fullmatch(told[4]) else None


def end_of_cancelled(task_type: str) -> StepState:
    """How the step of a cancelled task ended: skipped, but a workflow without a plan cannot go on."""
    return StepState.FAILED if task_type == PLAN else StepState.SKIPPED


async def sweep(driver: Driver) -> int:
    """Send what the outbox of ``driver`` still holds; how much that was. One round trip where there is nothing."""
    overdue = await driver.engine.overdue(BATCH)
    for workflow_id, moved in overdue:
        try:
            await driver.send(workflow_id, moved)
        except StoreError:
            raise
        except QueueFullError as error:
            logger.debug("workflow %s is swept later: %s", workflow_id, error)
        except OrchestraError as error:
            logger.warning("workflow %s cannot be swept: %s", workflow_id, error)
    if overdue:
        telemetry.emit("workflow.swept", {"count": len(overdue)}, {"namespace": driver.namespace})
    return len(overdue)


_TYPES: Final = {"unknown_agent": "UnknownAgentError", "deadline_missed": "TimeoutError", "crashed": "CrashedError"}


def error_of(reason: str, attempts: int, told: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a task's death as a step's error: ``type``, ``message``, ``reason``, ``attempts``, ``traceback``."""
    kind = str(told.get("error_type", reason)).rpartition(".")[2]
    message = told.get("error") or f"the task of the step died: {reason}"
    error = {"type": _TYPES.get(kind, kind), "message": str(message), "reason": reason, "attempts": attempts}
    if kind == "unknown_agent":
        error["code"] = kind
    return error | ({"traceback": told["traceback"]} if "traceback" in told else {})
