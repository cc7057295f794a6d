"""From a task to a valid plan: planners in order, then a template, then one step of the task's own type.

Owns the order of the fallbacks and what is told about them. Refuses to own how an agent is called
(:mod:`orchestra._workflow.local`) and what a valid plan is (:mod:`orchestra._workflow.plan`). One event loop.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from orchestra._workflow.local import NOT_NOW, LocalAgents, describe
from orchestra._workflow.making import checked_plan
from orchestra._workflow.plan import validate_plan
from orchestra.errors import CircuitOpenError, ConfigurationError
from orchestra.tasks import BaseTask, check_ident

if TYPE_CHECKING:
    from collections.abc import Iterable

    from orchestra._workflow.record import Encode

Plan: TypeAlias = list[dict[str, Any]]
Template: TypeAlias = Plan | Callable[[BaseTask], Any]
"""A plan, or a function (plain or async) from a task to one."""

logger = logging.getLogger("orchestra.orchestrator")


class Planned(NamedTuple):
    """A valid plan, and what ``workflow_context`` says about where it came from."""

    plan: Plan
    context: dict[str, Any]


class Templates:
    """The plans that are known beforehand, by task type; ``known``: those that somebody else keeps."""

    def __init__(self, known: Mapping[str, Template] | None = None) -> None:
        self._own: dict[str, Template] = {}
        self._known: Mapping[str, Template] = self._own if known is None else known

    def add(self, task_type: str, template: Template) -> None:
        """Use ``template`` for ``task_type``.

        Raises:
            WorkflowError: the plan has faults; ``.faults`` lists them. A function's are found when it is used.
        """
        check_ident("task_type", task_type)
        self._own[task_type] = template if callable(template) else validate_plan(template)

    def __contains__(self, task_type: object) -> bool:
        return task_type in self._own or task_type in self._known

    async def plan(self, task: BaseTask, encode: Encode | None = None) -> Plan | None:
        """The template of ``task``, filled in; None when there is none. Raises as :func:`checked_plan`."""
        template = self._own.get(task.type, self._known.get(task.type))
        if template is None:
            return None
        made = template(task) if callable(template) else template
        return await checked_plan(await made if inspect.isawaitable(made) else made, encode=encode)


class Planning:
    """Asks ``planners``, types of agents, in their order; ``local`` calls them.

    ``actions``: what a planner may use; None: whatever it likes, as other processes may have agents that this one has
    not. Templates and the single step are not held against it: an action without an agent fails when it runs.
    ``encode``: as :meth:`~orchestra.memory.MemoryManager.encode`; what it refuses cannot be recorded, and is no plan.
    """

    def __init__(
        self,
        local: LocalAgents,
        templates: Templates,
        planners: str | Sequence[str] = "planner",
        actions: Callable[[], Collection[str] | None] = lambda: None,
        encode: Encode | None = None,
    ) -> None:
        self.planners = checked_planners(planners)
        self._local = local
        self._templates = templates
        self._actions = actions
        self._encode = encode

    def available(self, task_type: str) -> list[str]:
        """The planners that are registered here, in their order; none plans for itself."""
        return [name for name in self.planners if name in self._local.agents and name != task_type]

    async def plan(self, task: BaseTask) -> Planned:
        """A plan for ``task``; there always is one.

        ``context["plan_source"]`` is ``"planner"``, ``"alternate"`` (``["planner"]`` names it), ``"template"`` or
        ``"single_step"``; ``["planner_error"]`` says why the first planner's was not used, ``["planner_errors"]``
        those of all, where there are several, ``["template_error"]`` why the template's function gave none.

        Raises:
            Throttled, RetryLater, WorkerPoolError: a planner cannot run now, and no other had a plan.
        """
        failed: dict[str, Exception] = {}
        for name in self.available(task.type):
            try:
                plan = await checked_plan(await self._ask(name, task), actions=self._actions(), encode=self._encode)
            except Exception as error:  # noqa: BLE001 - whatever a planner raises, the next in line answers
                failed[name] = error
                logger.warning("planner %r has no plan for task %s: %s", name, task.id, error)
            else:
                source = {"plan_source": "planner"}
                if name != self.planners[0]:
                    source = {"plan_source": "alternate", "planner": name}
                return Planned(plan, _told(failed) | source)
        for refusal in failed.values():
            if isinstance(refusal, NOT_NOW) and not isinstance(refusal, CircuitOpenError):
                raise refusal  # a little later there will be a real plan
        return await template_or_step(self._templates, task, _told(failed), self._encode)

    async def _ask(self, planner: str, task: BaseTask) -> Any:
        told = {"task": {"id": task.id, "type": task.type, "input": task.input}, "agents": sorted(self._local.agents)}
        question = BaseTask(f"{task.id}:plan", planner, told, task.priority, metadata=dict(task.metadata))
        answer = await self._local.call_patiently(question)
        return answer.get("plan") if isinstance(answer, Mapping) else answer


async def template_or_step(
    templates: Templates, task: BaseTask, told: dict[str, Any], encode: Encode | None = None
) -> Planned:
    """The plan of a task that no planner has one for; ``told``: what is said of those that were asked."""
    try:
        template = await templates.plan(task, encode)
    except Exception as error:  # noqa: BLE001 - a template's function is somebody's code, as a planner is
        logger.warning("the template of task %s has no plan: %s", task.id, error)
        template, told = None, told | {"template_error": describe(error)}
    if template is not None:
        return Planned(template, told | {"plan_source": "template"})
    return Planned(validate_plan([{"action": task.type}]), told | {"plan_source": "single_step"})


def checked_planners(planners: str | Iterable[str]) -> tuple[str, ...]:
    """``planners`` as a tuple of 0 to 16 names. Raises ConfigurationError for a name that no type can have."""
    names = (planners,) if isinstance(planners, str) else tuple(planners)
    for name in names:
        check_ident("planner", name)
    if len(names) > 16 or len(set(names)) < len(names):
        raise ConfigurationError(
            f"planner must be one name, or up to 16 different ones, got {names!r}", field="planner", value=names
        )
    return names


def _told(failed: Mapping[str, Exception]) -> dict[str, Any]:
    if not failed:
        return {}
    errors = {name: describe(error) for name, error in failed.items()}
    first = {"planner_error": next(iter(errors.values()))}
    return first if len(errors) == 1 else first | {"planner_errors": errors}
