"""A real model, 135 million parameters on the CPU: structure, limits, journal and interruption hold. What it says is its own affair."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput

import orchestra.ai as ai
from orchestra import App, Retry, TaskFailedError
from orchestra.memory import MemoryManager
from orchestra.workflow import StepState, validate_plan

WAIT = 300.0
SHORT = {"max_tokens": 24, "temperature": 0.0}


@pytest.fixture
async def app(redis_url):
    async with App("llm", redis_url, retry=Retry(max_retries=2, base=0.05)) as made:
        yield made


def memory_of(app: App) -> MemoryManager:
    return MemoryManager(app.manager, namespace=app.queue_name)


class Counted:
    """Counts the requests of a model."""

    def __init__(self, model, monkeypatch):
        self.requests = 0
        for name in ("request", "request_stream"):
            monkeypatch.setattr(model, name, self.counting(getattr(model, name)))

    def counting(self, ask):
        def counted(*args, **kwargs):
            self.requests += 1
            return ask(*args, **kwargs)

        return counted


async def test_an_answer_with_its_usage(app, model):
    app.agent("chat")(ai.agent(Agent(model), result="full", model_settings=SHORT))
    async with app.worker():
        run = await app.send("chat", {"prompt": "Say hello."}, id="hello")
        answer = await run.result(WAIT)
    assert isinstance(answer["output"], str)
    assert answer["output"]
    used = answer["usage"]
    assert used["requests"] == 1
    assert used["input_tokens"] > 5
    assert 1 <= used["output_tokens"] <= 24
    assert (await ai.task_usage("hello", memory=memory_of(app))).as_dict() == used


class Verdict(BaseModel):
    positive: bool
    score: int = Field(ge=0, le=9)


async def test_a_typed_answer(app, model):
    agent = Agent(model, output_type=NativeOutput(Verdict), retries=3)
    app.agent("judge")(ai.agent(agent, model_settings={"max_tokens": 60, "temperature": 0.0}))
    async with app.worker():
        run = await app.send("judge", {"prompt": "Is this a good film? 'I loved every minute.'"})
        answer = await run.result(WAIT)
    assert Verdict.model_validate(answer)


async def test_a_planner_with_a_constrained_schema(app, model):
    ran: list[str] = []

    @app.agent
    async def fetch(**args) -> str:
        ran.append("fetch")
        return "pages"

    @app.agent
    async def write(**args) -> str:
        ran.append("write")
        return "report"

    told = "Plan two steps: first fetch, then write. Example: "
    example = '{"steps": [{"action": "fetch", "args": {}}, {"action": "write", "args": {}}]}'
    planner = ai.planner(
        Agent(model, instructions=told + example, retries=5),
        actions={"fetch": "gets pages", "write": "writes the report"},
        output="native",
        max_steps=2,
        graph=False,
        model_settings={"max_tokens": 200, "temperature": 0.2},
        budget=ai.Budget(requests=12),
    )
    app.planner(planner)
    async with app.worker():
        run = await app.start_workflow("report", {"about": "bees"})
        await run.result(WAIT)
        state = await run.state()
    validate_plan(state.plan, actions=["fetch", "write"])
    assert len(ran) == sum(step.state is StepState.COMPLETED for step in state.steps)
    assert state.workflow_context["plan_source"] == "planner"
    assert (await ai.workflow_usage(run.id, memory=memory_of(app))).requests >= 1


async def test_text_comes_in_pieces(app, model):
    app.agent("tell")(ai.agent(Agent(model), stream=True, model_settings={"max_tokens": 60, "temperature": 0.0}))
    async with app.worker():
        run = await app.start_workflow([{"action": "tell", "args": {"prompt": "Tell a story about a bee."}}])
        text = await run.result(WAIT)
    pieces = [event.data["delta"] async for event in run.events(follow=False) if event.kind == "agent.text"]
    assert "".join(pieces) == text
    assert len(pieces) >= 2
    used = await ai.workflow_usage(run.id, memory=memory_of(app))
    assert used.output_tokens <= 60


async def test_a_budget_stops_before_the_next_call(app, model, monkeypatch):
    counted = Counted(model, monkeypatch)
    agent = Agent(model)
    asked = ai.agent(agent, model_settings=SHORT, workflow_budget=ai.Budget(total_tokens=30))
    for name in ("one", "two", "three"):
        app.agent(name)(asked)
    async with app.worker():
        run = await app.start_workflow(
            [{"action": n, "args": {"prompt": "Count to ten."}} for n in ("one", "two", "three")]
        )
        with pytest.raises(TaskFailedError, match="budget of 30 total tokens"):
            await run.result(WAIT)
    assert counted.requests == 1
    assert (await ai.workflow_usage(run.id, memory=memory_of(app))).total_tokens >= 30


async def test_a_cancelled_task_stops_the_model_in_the_middle(app, model):
    told = asyncio.Event()
    agent = ai.agent(Agent(model), stream=True, model_settings={"max_tokens": 3000, "temperature": 1.0})
    app.agent("ramble")(agent)
    app.agent("chat")(ai.agent(Agent(model), model_settings=SHORT))
    async with app.worker():
        run = await app.start_workflow([{"action": "ramble", "args": {"prompt": "Write a very long story."}}])
        async with asyncio.timeout(WAIT):
            async for event in run.events():
                if event.kind == "agent.text":
                    told.set()
                    break
        assert told.is_set()
        assert await run.cancel("enough")
        with pytest.raises(Exception, match="cancelled"):
            await run.result(WAIT)
        # both slots of the server answer again: nothing goes on generating for nobody
        runs = [await app.send("chat", {"prompt": "Say hello."}) for _ in range(4)]
        assert all([await run.result(WAIT) for run in runs])


async def test_a_repeat_costs_no_call(app, model, monkeypatch):
    counted, tries = Counted(model, monkeypatch), []
    agent = Agent(model)

    @agent.output_validator
    def flaky(answer: str) -> str:
        tries.append(answer)
        if len(tries) == 1:
            raise OSError("the disk is full")
        return answer

    app.agent("chat")(ai.agent(agent, model_settings=SHORT))
    async with app.worker():
        answer = await (await app.send("chat", {"prompt": "Say hello."})).result(WAIT)
    assert tries == [answer, answer]
    assert counted.requests == 1
