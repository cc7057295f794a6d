"""A model as the planner of workflows: its answer is a plan, checked as every plan is, and its faults go back to it.

Owns the shape in which a model writes a plan, and what it is told about the actions there are. Refuses to own what a plan
means and which are good (:mod:`orchestra._workflow.plan`). No state between tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models import Model
from pydantic_core import to_jsonable_python

from orchestra._workflow.plan import validate_plan
from orchestra.ai.agents import AgentFunction, PydanticAgent, as_function
from orchestra.errors import ConfigurationError, WorkflowError
from orchestra.tasks import BaseTask, require_int

Outputs = Literal["tool", "native", "prompted"]
_KINDS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "tool": ToolOutput,
    "native": NativeOutput,
    "prompted": PromptedOutput,
}
INSTRUCTIONS: Final = """\
You plan work. Answer with the steps that carry out the task, and nothing else. Each step names one of the actions you are
told of, and its arguments. Steps run one after the other."""
ABOUT_GRAPHS: Final = """
Give steps ids. A step that names others in depends_on runs as soon as those have ended; steps that do not wait for each
other run at the same time. {"$ref": "<id>"} as an argument stands for the result of the step of that id,
{"$ref": "<id>.rows.0"} for a part of it, {"$ref": "input"} for the task's input."""


class PlainStep(BaseModel):
    """A step of a plan whose steps run one after the other, as a model writes it."""

    model_config = ConfigDict(extra="forbid")

    action: str = Field(description="one of the actions")
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of the action")
    reasoning: str = Field("", description="why this step, in a few words", max_length=200)

    def as_step(self) -> dict[str, Any]:
        """The step as a plan has it."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Step(PlainStep):
    """A step that others may wait for and refer to."""

    id: str | None = Field(
        None, description="a name of its own, to refer to the step", pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$"
    )
    depends_on: list[str] | None = Field(None, description="ids of steps that must end first")


class Plan(BaseModel):
    """A plan, as a model writes it. Raises ``pydantic.ValidationError`` that names every fault, which the model is told."""

    model_config = ConfigDict(extra="forbid")

    steps: Sequence[PlainStep] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            validate_plan(self.as_plan())
        except WorkflowError as error:
            raise ValueError("; ".join(error.faults) or str(error)) from None
        return self

    def as_plan(self) -> list[dict[str, Any]]:
        """The plan as workflows take it."""
        return [step.as_step() for step in self.steps]


def plan_type(actions: Collection[str] = (), *, max_steps: int = 20, graph: bool = True) -> type[Plan]:
    """The :class:`Plan` with these limits, which its JSON schema says, so that a constrained model writes no other."""
    names = tuple(sorted(actions))
    action: Any = Literal[names] if names else str
    made: Any = create_model(
        "Step", __base__=Step if graph else PlainStep, action=(action, Field(description="one of the actions"))
    )
    return create_model("Plan", __base__=Plan, steps=(list[made], Field(min_length=1, max_length=max_steps)))


class _Planner(PydanticAgent):
    """Runs the planning agent: what it is asked and the type of its answer depend on the task."""

    def __init__(
        self,
        pydantic_agent: Agent[Any, Any],
        actions: Collection[str] | None,
        made: Callable[[Collection[str]], Any],
        **settings: Any,
    ) -> None:
        self._actions = actions
        self._made = made
        super().__init__(pydantic_agent, prompt=self._question, role="plan", **settings)

    def _known(self, task: BaseTask) -> Mapping[str, str]:
        known: Collection[str] = self._actions or ()
        if self._actions is None and isinstance(task.input, Mapping):
            known = [each for each in task.input.get("agents") or () if isinstance(each, str)]
        return dict(known) if isinstance(known, Mapping) else dict.fromkeys(known, "")

    def _question(self, task: BaseTask) -> str:
        asked = task.input.get("task", task.input) if isinstance(task.input, Mapping) else task.input
        told = "\n".join(f"- {name}{text and f': {text}'}" for name, text in sorted(self._known(task).items()))
        question = f"Actions:\n{told or '- (any)'}\n\nTask:\n{_json(asked)}"
        faults = task.input.get("faults") if isinstance(task.input, Mapping) else None
        if not faults:
            return question
        return (
            f"{question}\n\nYour plan was {_json(task.input.get('plan'))}\n\nIts faults:\n{_json(faults)}\nMend them."
        )

    def options(self, task: BaseTask) -> dict[str, Any]:
        """The answer's type names the actions there are."""
        return {**super().options(task), "output_type": self._made(self._known(task))}

    def plain(self, output: Any) -> Any:
        """The plan."""
        return output.as_plan() if isinstance(output, Plan) else super().plain(output)


def planner(
    agent_or_model: Agent[Any, Any] | Model | str,
    *,
    actions: Collection[str] | Mapping[str, str] | None = None,
    instructions: str | None = None,
    output: Outputs = "tool",
    max_steps: int = 20,
    graph: bool = True,
    retries: int = 2,
    **settings: Any,
) -> AgentFunction:
    """A planner for :class:`~orchestra.orchestrator.Orchestrator`: an async function from its task to a plan.

    Args:
        agent_or_model: a ``pydantic_ai.Agent`` without output validators, or a model, of which one is made with the next two.
        instructions: how to plan, instead of a general text.
        retries: how often the model is told the faults of its plan and asked again.
        actions: what steps may do: names, or names with what they are for and which arguments they take. By default the
            agents that the orchestrator names in its task.
        output: how the model is made to answer: by a tool call, by its native JSON schema mode, or by the prompt alone.
        max_steps: steps a plan may have, 1 to 1,000.
        graph: steps may have ids and wait for each other; False: they run one after the other, which small models master.
        **settings: as for :func:`orchestra.ai.agent`; ``budget`` bounds planning.

    Its journal is apart from that of the steps, its usage counts to the workflow.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    if output not in _KINDS:
        raise ConfigurationError(
            f"planner output must be one of {', '.join(_KINDS)}, got {output!r}", field="output", value=output
        )
    require_int("planner max_steps", max_steps, 1, 1000, unit="steps")
    asked = agent_or_model
    if not isinstance(asked, Agent):
        if instructions is None:
            instructions = INSTRUCTIONS + (ABOUT_GRAPHS if graph else "")
        asked = Agent(asked, name="planner", instructions=instructions, retries=retries)
    wrap = _KINDS[output]

    def answer(known: Collection[str]) -> Any:
        return wrap(plan_type(known, max_steps=max_steps, graph=graph))

    return as_function(_Planner(asked, actions, answer, **{"name": "planner", **settings}))


def _json(value: Any) -> str:
    return json.dumps(to_jsonable_python(value), ensure_ascii=False)
