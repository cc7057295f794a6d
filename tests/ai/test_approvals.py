"""Tool calls that wait for somebody: the step is parked, the answer reaches the run, and nothing is done twice."""

from __future__ import annotations

import pytest
from pydantic_ai import Agent, ApprovalRequired, CallDeferred, RunContext
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.external_events import wait_for_external_event

import orchestra.ai as ai
from orchestra._agents.services import Services, StepScope, serving
from orchestra._workflow.refs import Facts
from orchestra.ai.calling import journals
from orchestra.ai.journal import journal_key
from orchestra.errors import Reject, WaitForSignal
from tests.ai.scripted import Scripted, call


class Shop:
    """An agent with a tool that needs approval, one that does not, and what they did."""

    def __init__(self, *script):
        self.model, self.done = Scripted(*script), []
        self.agent = Agent(self.model, name="shop")

        @self.agent.tool_plain
        def look(what: str) -> str:
            self.done.append(("look", what))
            return f"{what}: 5"

        @self.agent.tool_plain(requires_approval=True)
        def buy(what: str) -> str:
            self.done.append(("buy", what))
            return f"bought {what}"


@pytest.fixture
def step(memory, task):
    """Runs an agent as a step, each time as the next series, with the signals that have come."""
    workflow, series = task().id, iter(range(1, 100))

    async def run(agent, **signals):
        scope = StepScope(workflow, 0, "shop", next(series), 1, Facts(signals=signals))
        with serving(Services(memory=memory, step=scope)):
            return await agent(task("buy tea"))

    run.workflow = workflow
    return run


def returned(shop) -> list[str]:
    """What the tools gave, as the model was told last."""
    return [part.content for part in shop.model.asked[-1][-1].parts if part.part_kind == "tool-return"]


async def test_the_step_is_parked_and_goes_on_with_the_answer(step):
    shop = Shop([call("look", what="tea"), call("buy", what="tea")], "done")
    run = ai.agent(shop.agent)
    with pytest.raises(WaitForSignal) as parked:
        await run_parked(step, run)
    assert (parked.value.name, parked.value.prompt) == ("approve", 'approve buy("what":"tea")  [id-buy]')
    assert shop.done == [("look", "tea")]
    assert await step(run, approve=True) == "done"
    assert shop.done == [("look", "tea"), ("buy", "tea")]
    assert len(shop.model.asked) == 2
    assert sorted(returned(shop)) == ["bought tea", "tea: 5"]


async def run_parked(step, run):
    return await step(run)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (False, "denied"),
        ("too dear", "too dear"),
        ({"approved": False, "message": "not today"}, "not today"),
        ({"approved": False}, "denied"),
        ({"calls": {"other": True}}, "Nobody decided"),
        ({"calls": {"id-buy": "no tea"}}, "no tea"),
        ({"approved": "yes"}, "denied"),
        (None, "denied"),
        (7, "denied"),
    ],
)
async def test_what_is_denied_is_not_done_and_the_model_learns_why(step, answer, told):
    shop = Shop(call("buy", what="tea"), "never mind")
    run = ai.agent(shop.agent)
    with pytest.raises(WaitForSignal):
        await step(run)
    assert await step(run, approve=answer) == "never mind"
    assert shop.done == []
    assert told in returned(shop)[0]


async def test_arguments_may_be_changed(step):
    shop = Shop(call("buy", what="tea"), "done")
    run = ai.agent(shop.agent)
    with pytest.raises(WaitForSignal):
        await step(run)
    assert await step(run, approve={"approved": True, "override_args": {"what": "water"}}) == "done"
    assert shop.done == [("buy", "water")]


async def test_several_calls_are_decided_one_by_one(step):
    shop = Shop([call("buy", "a", what="tea"), call("buy", "b", what="gin")], "done")
    run = ai.agent(shop.agent)
    with pytest.raises(WaitForSignal) as parked:
        await step(run)
    assert len(parked.value.prompt.splitlines()) == 2
    await step(run, approve={"calls": {"a": True, "b": {"approved": False, "message": "no"}}})
    assert shop.done == [("buy", "tea")]


async def test_a_second_round_has_a_signal_of_its_own(step):
    shop = Shop(call("buy", "a", what="tea"), call("buy", "b", what="milk"), "done")
    run = ai.agent(shop.agent, approval="ok", approval_timeout=60)
    with pytest.raises(WaitForSignal) as first:
        await step(run)
    with pytest.raises(WaitForSignal) as second:
        await step(run, ok=True)
    assert (first.value.name, second.value.name, second.value.timeout) == ("ok", "ok-2", 60)
    assert await step(run, **{"ok": True, "ok-2": True}) == "done"
    assert shop.done == [("buy", "tea"), ("buy", "milk")]
    assert len(shop.model.asked) == 3


async def test_an_approval_counts_for_the_calls_that_were_asked_about_and_no_others(step, memory):
    shop = Shop(call("buy", what="tea"), call("buy", what="gin"), "done")
    run = ai.agent(shop.agent)
    with pytest.raises(WaitForSignal):
        await step(run)
    await journals(memory).delete(journal_key("step", step.workflow, "0", ""))
    with pytest.raises(WaitForSignal) as again:
        await step(run, approve=True)
    assert (again.value.name, again.value.prompt) == ("approve-2", 'approve buy("what":"gin")  [id-buy]')
    assert shop.done == []
    assert await step(run, **{"approve": True, "approve-2": True}) == "done"
    assert shop.done == [("buy", "gin")]


async def test_a_run_without_a_journal_cannot_wait(step):
    shop = Shop(call("buy", what="tea"))
    with pytest.raises(Reject, match="only a durable step"):
        await step(ai.agent(shop.agent, durable=False), approve=True)
    assert shop.done == []


async def test_a_tool_may_ask_by_itself_and_is_marked_once(step):
    model, done = Scripted(call("pay", amount=500), "done"), []
    agent = Agent(model)

    @agent.tool(metadata=ai.ONCE)
    def pay(ctx: RunContext[None], amount: int) -> str:
        if amount > 100 and not ctx.tool_call_approved:
            raise ApprovalRequired
        done.append(amount)
        return "paid"

    run = ai.agent(agent)
    with pytest.raises(WaitForSignal):
        await step(run)
    assert await step(run, approve=True) == "done"
    assert await step(run, approve=True) == "done"
    assert done == [500]


async def test_a_call_that_somebody_else_carries_out(step):
    model = Scripted(call("ask_human", question="sugar?"), "done")
    agent = Agent(model)

    @agent.tool_plain
    def ask_human(question: str) -> str:
        raise CallDeferred

    run = ai.agent(agent)
    with pytest.raises(WaitForSignal) as parked:
        await step(run)
    assert parked.value.prompt == 'answer ask_human("question":"sugar?")  [id-ask_human]'
    assert await step(run, approve={"lumps": 2}) == "done"
    assert model.asked[-1][-1].parts[0].content == {"lumps": 2}


async def test_outside_of_workflows_nobody_could_answer(memory, task):
    with pytest.raises(Reject, match="buy, which waits for somebody"):
        await ai.agent(Shop(call("buy", what="tea")).agent, memory=memory)(task())


async def test_the_usage_of_a_parked_step_counts_once(step, memory):
    shop = Shop(call("buy", what="tea"), "done")
    run = ai.agent(shop.agent, workflow_budget=ai.Budget(requests=2))
    with pytest.raises(WaitForSignal):
        await step(run)
    assert await ai.workflow_usage(step.workflow, memory=memory) == ai.Usage(1, 10, 5)
    await step(run, approve=True)
    assert await ai.workflow_usage(step.workflow, memory=memory) == ai.Usage(2, 20, 10)
    assert await ai.task_usage(step.workflow, step=0, memory=memory) == ai.Usage(2, 20, 10)
    await step(run, approve=True)
    assert await ai.workflow_usage(step.workflow, memory=memory) == ai.Usage(2, 20, 10)


async def test_a_capability_that_waits_for_an_event_parks_the_step(step):
    asked = []

    class Asking(AbstractCapability):
        async def before_run(self, ctx) -> None:
            asked.append(await wait_for_external_event("colour", ask=lambda token: tokens.append(token)))

    tokens: list[str] = []
    run = ai.agent(Agent(Scripted("done"), name="x"), capabilities=[Asking()])
    with pytest.raises(WaitForSignal) as parked:
        await step(run)
    assert parked.value.name == "colour"
    assert await step(run, colour="red") == "done"
    assert (asked, tokens) == (["red"], [f"{step.workflow}:colour"])
