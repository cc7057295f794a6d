"""The executor agent: takes a step of a plan to the agent its action names.

Owns the look-up, the check of the args before anything runs, and what the agent is given. Refuses to own queue, retries,
limits and the record of a workflow: steps that need these are tasks of their own (:mod:`orchestra.orchestrator`).
One event loop.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from orchestra._agents.registry import AgentRegistry, get_agent_registry
from orchestra._agents.services import current_task
from orchestra._shared import Connectable, shared
from orchestra._workflow.rules import BUILT_IN
from orchestra.errors import InvalidTaskTypeError, UnknownAgentError
from orchestra.tasks import BaseTask


class ExecutorAgent(Connectable):
    """Runs single steps with the agents of a registry, here and now.

    As an agent its task's input is a step, ``{"action": …, "args": …}`` with an optional ``id``, and with what the step
    may know as ``"context"``. Call :meth:`execute` to do the same without a task.
    """

    def __init__(self, agents: AgentRegistry | None = None) -> None:
        self.agents = get_agent_registry() if agents is None else agents

    def check(self, step: Mapping[str, Any], where: str = "") -> None:
        """Raise what :meth:`execute` would before it runs anything; ``where`` begins the text. O(args).

        Raises:
            InvalidTaskError: an argument is missing, unknown or of another type than the agent's signature says
                (InvalidTaskTypeError): ``.path`` names it, the text the step as well.
            UnknownAgentError: no agent is registered for the action.
        """
        if not isinstance(step, Mapping) or not isinstance(step.get("action"), str):
            raise InvalidTaskTypeError(f"{where}a step is a dict with an action, got {step!r:.80}", path="input.action")
        where = f"{where}step {_name(step)}: "
        entry = self.agents.get(step["action"])
        if entry is None:
            raise self._unknown(step["action"], where)
        args = step.get("args")
        if args is not None and not isinstance(args, dict):
            raise InvalidTaskTypeError(f"{where}args must be a dict, got {type(args).__name__}", path="input.args")
        if entry.check is not None and args is not None:
            entry.check(args, where)

    async def execute(
        self, step: Mapping[str, Any], task: BaseTask, *, context: Mapping[str, Any] | None = None
    ) -> Any:
        """What the agent of ``step["action"]`` returns.

        It gets the step's ``args`` as input, the input of ``task`` where there are none, and ``context`` in its
        ``metadata["context"]``; its attempt, fence and deadline are those of ``task``.

        Raises as :meth:`check`, and what the agent raises; CircuitOpenError: the breakers of all its replicas are open.
        """
        self.check(step)
        metadata = dict(task.metadata) if context is None else {**task.metadata, "context": dict(context)}
        args = step.get("args")
        inner = BaseTask(
            id=f"{task.id}:{_name(step)}",
            type=step["action"],
            input=task.input if args is None else args,
            priority=task.priority,
            attempt=task.attempt,
            metadata=metadata,
            deadline=task.deadline,
            fence=task.fence,
        )
        token = current_task.set(inner)
        try:
            return await self.agents.call(inner)
        finally:
            current_task.reset(token)

    async def process(self, task: BaseTask) -> Any:
        """Run the step in ``task.input``; see :meth:`execute`."""
        step = task.input
        context = step.get("context") if isinstance(step, Mapping) else None
        return await self.execute(step, task, context=context if isinstance(context, Mapping) else None)

    def _unknown(self, action: str, where: str) -> UnknownAgentError:
        if action in BUILT_IN:
            text = f"{where}{action!r} is built in: no agent runs it, a workflow does"
            return UnknownAgentError(text, task_type=action)
        near = difflib.get_close_matches(action, list(self.agents), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"registered are: {', '.join(sorted(self.agents)) or 'none'}"
        return UnknownAgentError(f"{where}no agent is registered for {action!r}; {hint}", task_type=action)


def _name(step: Mapping[str, Any]) -> str:
    own = step.get("id", step.get("step_index"))
    return str(step["action"] if own is None else own)


def get_executor_agent(agents: AgentRegistry | None = None) -> ExecutorAgent:
    """The shared executor over ``agents`` (by default the process-wide registry) for this event loop."""
    chosen = get_agent_registry() if agents is None else agents
    # the executor holds the registry, so its id is not given to another while it is shared
    return shared("executor_agent", str(id(chosen)), lambda: ExecutorAgent(chosen))
