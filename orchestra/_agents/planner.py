"""The planner agent: any agent that answers with a plan, held to what a plan must be.

Owns the contract between orchestrator and planner, and one round of repair. Refuses to own what is planned and which
planner is asked next. One event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from orchestra._agents.registry import Agent, AgentRegistry
from orchestra._workflow.plan import refused, validate_plan
from orchestra.errors import WorkflowError
from orchestra.tasks import BaseTask, require_int

logger = logging.getLogger("orchestra.agent")


class PlannerAgent:
    """Makes ``planner``, an agent of any form, a planner whose plans can be executed.

    It is given a task whose input is ``{"task": {"id", "type", "input"}, "agents": [names]}`` and answers with a list of
    steps, or a dict with that list as ``"plan"``. Where the plan has faults it is asked once more, with ``"faults"``
    (all of them, as texts) and ``"plan"`` (what it answered) in its input. ``actions``: what it may use instead of the
    ``agents`` it is told of. ``repairs``: how often it may be asked again, 0 to 10.

    Raises:
        ConfigurationError: ``planner`` is no agent, or a number is out of range.
    """

    def __init__(
        self,
        planner: Agent | Callable[..., Any],
        *,
        actions: Collection[str] | None = None,
        repairs: int = 1,
    ) -> None:
        require_int("PlannerAgent.repairs", repairs, 0, 10, unit="rounds")
        self._agents = AgentRegistry()
        self._agents.register("planner", planner)
        self._actions = None if actions is None else frozenset(actions)
        self._repairs = repairs

    async def process(self, task: BaseTask) -> list[dict[str, Any]]:
        """A valid plan, as :func:`~orchestra.workflow.validate_plan` gives it.

        Raises:
            WorkflowError: what the planner answered last is no plan; ``.faults`` names all that is wrong.
            Exception: whatever the planner raises.
        """
        told: dict[str, Any] = dict(task.input) if isinstance(task.input, Mapping) else {"task": task.input}
        actions = self._actions if self._actions is not None else told.get("agents")
        for left in range(self._repairs, -1, -1):
            answer = await self._agents.call(replace(task, type="planner", input=told))
            try:
                return checked_plan(answer, actions)
            except WorkflowError as error:
                if not left:
                    raise
                logger.info("the planner for task %s is asked again: %s", task.id, error)
                told = {**told, "faults": list(error.faults), "plan": answer}
        raise AssertionError("the last round returns or raises")

    def close(self) -> None:
        """End the threads of a plain planner."""
        self._agents.close()


def checked_plan(answer: Any, actions: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The plan that a planner answered with: a list of steps, or a dict that has it as ``"plan"``.

    Raises:
        WorkflowError: it is none; ``.faults`` names all that is wrong with it.
    """
    if isinstance(answer, Mapping):
        if "plan" not in answer:
            keys = ", ".join(repr(key) for key in list(answer)[:10]) or "no keys"
            raise refused("the planner's answer", [f"expected a list of steps or a dict with 'plan', got {keys}"])
        answer = answer["plan"]
    return validate_plan(answer, actions=actions)
