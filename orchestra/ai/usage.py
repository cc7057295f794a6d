"""What model calls use, and how much of it a task or a workflow may use.

Owns the arithmetic of usage, the check before a call, and the sum over the steps of a workflow, which is one document
of a :class:`~orchestra.memory.MemoryManager`. Refuses to own what a call is (the journal says which were made) and money.

The sum holds, for each step that runs, what its journal says *in all*, and one number for the steps that have ended: a
write may be repeated, and what a journal replays is not counted twice. Requests are reserved in the same write that
checks the budget, so parallel steps cannot exceed it together; tokens are known after a call only, so calls in flight
may exceed a budget of tokens, and no call begins after that. One event loop; no state between calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from orchestra.errors import BudgetExceededError
from orchestra.memory import MemoryManager
from orchestra.tasks import require_int

_MOST = 10**15


class Usage(NamedTuple):
    """What model calls have used: calls that answered, and the tokens that the provider says it read and wrote."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Tokens read and written."""
        return self.input_tokens + self.output_tokens

    def plus(self, other: Usage) -> Usage:
        """The sum of both."""
        return Usage(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )

    def as_dict(self) -> dict[str, int]:
        """``requests``, ``input_tokens``, ``output_tokens`` and ``total_tokens``."""
        return {**self._asdict(), "total_tokens": self.total_tokens}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much model calls may use; None for no limit.

    A call is made while every limit is above what was used before it, so the last call may exceed a limit of tokens.
    ``requests``: model calls. ``input_tokens``, ``output_tokens``, ``total_tokens``: as the provider counts them. Each
    from 1 to 10**15.

    Raises:
        ConfigurationError: a limit is out of range.
    """

    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                require_int(f"Budget.{each.name}", value, 1, _MOST, unit=each.name.replace("_", " "))

    def check(self, used: Usage, *, scope: str, reserved: int = 0) -> None:
        """Raise BudgetExceededError if a call may not be made after ``used`` and ``reserved`` calls in flight."""
        for each in fields(self):
            allowed = getattr(self, each.name)
            if allowed is None:
                continue
            value = getattr(used, each.name) + (reserved if each.name == "requests" else 0)
            if value >= allowed:
                raise BudgetExceededError(
                    f"the {scope}'s budget of {allowed} {each.name.replace('_', ' ')} is used up: {_told(used)}; the "
                    f"next model call was not made",
                    scope=scope,
                    limit=each.name,
                    allowed=allowed,
                    used=used.as_dict(),
                )


class WorkflowUsage:
    """The sum over the steps of one workflow, and this step's part in it."""

    def __init__(self, memory: MemoryManager, key: str, step: str, budget: Budget | None) -> None:
        self._memory = memory
        self._key = key
        self._step = step
        self._budget = budget

    @property
    def bounded(self) -> bool:
        """Whether the workflow has a budget."""
        return self._budget is not None

    async def reserve(self, used: Usage) -> None:
        """Count one call that a step is going to make that has ``used`` so much. Two round trips; none without a budget.

        Raises:
            BudgetExceededError: the workflow's budget is used up; nothing was counted.
        """
        budget = self._budget
        if budget is None:
            return

        def take(document: Any) -> Any:
            row = _row(document)
            row["steps"][self._step] = list(used)
            budget.check(total(row), scope="workflow")
            row["steps"][self._step] = list(used.plus(Usage(1)))
            return row

        await self._memory.update(self._key, take)

    async def settle(self, used: Usage, *, ended: bool = False) -> None:
        """Say what the step has used in all. Two round trips; repeating it changes nothing.

        ``ended``: the step counts no more, and its row is folded into the sum; then it must not be repeated.
        """

        def put(document: Any) -> Any:
            row = _row(document)
            if ended:
                row["steps"].pop(self._step, None)
                row["ended"] = list(Usage(*row["ended"]).plus(used))
            else:
                row["steps"][self._step] = list(used)
            return row

        await self._memory.update(self._key, put)


def total(document: Any) -> Usage:
    """The sum that a workflow's document holds."""
    row = _row(document)
    sum_ = Usage(*row["ended"])
    for each in row["steps"].values():
        sum_ = sum_.plus(Usage(*each))
    return sum_


def _row(document: Any) -> dict[str, Any]:
    if not document:
        return {"steps": {}, "ended": [0, 0, 0]}
    return {"steps": dict(document["steps"]), "ended": list(document["ended"])}


def _told(used: Usage) -> str:
    return f"{used.requests} requests, {used.input_tokens} input and {used.output_tokens} output tokens"


class Meter:
    """Counts the calls of one run against its budgets. ``used`` tells what the task's journal holds now."""

    def __init__(self, budget: Budget | None, used: Callable[[], Usage], workflow: WorkflowUsage | None) -> None:
        self._budget = budget
        self._used = used
        self._workflow = workflow
        self._in_flight = 0

    async def before(self) -> None:
        """A model call is going to be made. Raises BudgetExceededError, and then it must not be."""
        if self._budget is not None:
            self._budget.check(self._used(), scope="task", reserved=self._in_flight)
        if self._workflow is not None:
            await self._workflow.reserve(self._so_far())
        self._in_flight += 1

    async def after(self) -> None:
        """A call that :meth:`before` let pass has been journaled."""
        self._in_flight -= 1
        if self._workflow is not None:
            await self._workflow.settle(self._so_far())

    async def failed(self) -> None:
        """A call that :meth:`before` let pass came to nothing."""
        self._in_flight -= 1
        if self._workflow is not None and self._workflow.bounded:
            await self._workflow.settle(self._so_far())

    def interrupted(self) -> None:
        """A call was cancelled: nothing can be awaited. The next attempt puts the sum right."""
        self._in_flight -= 1

    async def ended(self) -> None:
        """The run is over and its journal closed."""
        if self._workflow is not None:
            await self._workflow.settle(self._used(), ended=True)

    def _so_far(self) -> Usage:
        """What is journaled, and the calls in flight."""
        return self._used().plus(Usage(self._in_flight))
