"""A model as a planner: the shape of its answer, what it is told, and that its faults go back to it."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from pydantic_ai import Agent
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel

import orchestra.ai as ai
from orchestra.ai.planning import plan_type
from orchestra.errors import BudgetExceededError, ConfigurationError
from orchestra.workflow import validate_plan

ASKED = {"task": {"id": "wf-1", "type": "report", "input": {"topic": "bees"}}, "agents": ["fetch", "write"]}
GOOD = [{"id": "a", "action": "fetch", "args": {"url": "x"}}, {"action": "write", "args": {"text": {"$ref": "a"}}}]


class Planning(FunctionModel):
    """Answers with the next plan; ``asked`` holds messages and ``schemas`` the JSON schemas of the answers wanted."""

    def __init__(self, *plans):
        self.plans, self.asked, self.schemas, self.instructions = list(plans), [], [], []
        super().__init__(self.answer, model_name="planning")

    async def answer(self, messages, info: AgentInfo) -> ModelResponse:
        self.asked.append(messages)
        steps = self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]
        self.instructions.append(info.instructions)
        if info.output_tools:
            self.schemas.append(info.output_tools[0].parameters_json_schema)
            return ModelResponse(parts=[ToolCallPart(info.output_tools[0].name, {"steps": steps})])
        return ModelResponse(parts=[TextPart(json.dumps({"steps": steps}))])


@pytest.mark.parametrize("output", ["tool", "native", "prompted"])
async def test_a_model_is_a_planner(memory, task, output):
    model = Planning(GOOD)
    plan = await ai.planner(model, output=output, memory=memory)(task(ASKED))
    assert [(step["action"], step["args"]) for step in plan] == [
        ("fetch", {"url": "x"}),
        ("write", {"text": {"$ref": "a"}}),
    ]
    validate_plan(plan, actions=["fetch", "write"])
    question = model.asked[0][0].parts[-1].content
    assert "- fetch\n- write" in question
    assert '"topic": "bees"' in question
    assert "You plan work" in model.instructions[0]


async def test_the_schema_names_the_actions_there_are(memory, task):
    model = Planning(GOOD)
    await ai.planner(model, actions={"fetch": "gets a page; args: url", "write": ""}, memory=memory)(task(ASKED))
    assert "- fetch: gets a page; args: url" in model.asked[0][0].parts[-1].content
    assert json.dumps(["fetch", "write"]) in json.dumps(model.schemas[0])


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ([{"action": "dig"}], "'fetch' or 'write'"),
        ([], "at least 1 item"),
        ([{"id": "a", "action": "fetch", "depends_on": ["b"]}], "'b'"),
        ([{"id": "a", "action": "fetch"}, {"id": "a", "action": "write"}], "'a'"),
        ([{"id": "a", "action": "fetch", "depends_on": ["a"]}], "a"),
        ([{"action": "fetch", "args": {"url": {"$ref": "nowhere"}}}], "nowhere"),
        ([{"action": "fetch", "arguments": {}}], "arguments"),
    ],
)
async def test_faults_go_back_to_the_model(memory, task, bad, told):
    model = Planning(bad, GOOD)
    plan = await ai.planner(model, memory=memory)(task(ASKED))
    assert [step["action"] for step in plan] == ["fetch", "write"]
    assert len(model.asked) == 2
    assert told in str(model.asked[1][-1].parts)


async def test_a_model_that_does_not_learn_is_given_up(memory, task):
    model = Planning([{"action": "dig"}])
    with pytest.raises(UnexpectedModelBehavior):
        await ai.planner(model, retries=2, memory=memory)(task(ASKED))
    assert len(model.asked) == 3


async def test_faults_that_the_orchestrator_found_are_told(memory, task):
    model = Planning(GOOD)
    planner = ai.planner(model, memory=memory)
    await planner(task(ASKED))
    await planner(task({**ASKED, "faults": ["step 1: too slow"], "plan": GOOD}))
    question = model.asked[1][0].parts[-1].content
    assert "step 1: too slow" in question
    assert "Mend them" in question


async def test_an_agent_is_a_planner_with_its_own_instructions(memory, task):
    model = Planning(GOOD)
    plan = await ai.planner(Agent(model, instructions="Plan in one step."), memory=memory)(task(ASKED))
    assert len(plan) == 2
    assert model.instructions == ["Plan in one step."]


async def test_planning_is_journaled_and_counted_to_the_workflow(memory, task):
    model, wf = Planning([{"action": "dig"}], GOOD), task().id
    asked = {**ASKED, "task": {**ASKED["task"], "id": wf}}
    planner = ai.planner(model, memory=memory)
    first, second = await planner(task(asked)), await planner(task(asked))
    assert first == second
    assert len(model.asked) == 2
    assert (await ai.workflow_usage(wf, memory=memory)).requests == 2


async def test_planning_has_a_budget(memory, task):
    with pytest.raises(BudgetExceededError):
        await ai.planner(Planning([{"action": "dig"}]), budget=ai.Budget(requests=1), memory=memory)(task(ASKED))


async def test_without_known_actions_any_will_do(memory, task):
    plan = await ai.planner(Planning([{"action": "dig"}]), memory=memory)(task({"task": "dig a hole"}))
    assert plan[0]["action"] == "dig"


async def test_even_a_model_that_makes_things_up_plans_something_valid(memory, task):
    plan = await ai.planner(TestModel(), memory=memory)(task(ASKED))
    assert validate_plan(plan, actions=ASKED["agents"])


def test_a_plan_names_every_fault():
    steps = [{"id": "a", "action": "x", "depends_on": ["b"]}, {"id": "a", "action": "y", "depends_on": ["c"]}]
    with pytest.raises(ValidationError) as error:
        plan_type().model_validate({"steps": steps})
    assert all(each in str(error.value) for each in ("'b'", "'c'", "'a'"))


def test_limits_of_a_plan_are_in_its_schema():
    schema = plan_type(["fetch"], max_steps=3, graph=False).model_json_schema()
    assert schema["properties"]["steps"]["maxItems"] == 3
    assert set(schema["$defs"]["Step"]["properties"]) == {"action", "args", "reasoning"}
    assert set(plan_type().model_json_schema()["$defs"]["Step"]["properties"]) >= {"id", "depends_on"}


async def test_a_plan_with_too_many_steps_goes_back(memory, task):
    model = Planning([{"action": "fetch"}] * 3, [{"action": "fetch"}] * 2)
    plan = await ai.planner(model, max_steps=2, graph=False, memory=memory)(task(ASKED))
    assert [step["action"] for step in plan] == ["fetch", "fetch"]
    assert len(model.asked) == 2


@pytest.mark.parametrize("most", [0, 1001, 2.5])
def test_a_wrong_number_of_steps_is_refused(most):
    with pytest.raises(ConfigurationError, match="planner max_steps"):
        ai.planner(TestModel(), max_steps=most)


def test_an_unknown_way_to_answer_is_refused():
    with pytest.raises(ConfigurationError, match="tool, native, prompted"):
        ai.planner(TestModel(), output="telepathy")
