"""LLM agents in workers and workflows: registered every way there is, limited by their provider, parked and approved."""

from __future__ import annotations

import asyncio

import pytest
from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import ModelResponse, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel

import orchestra.ai as ai
from orchestra import AgentRegistry, App, BaseTask, Retry, TaskFailedError
from orchestra.memory import MemoryManager
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.orchestrator import Orchestrator
from orchestra.workflow import StepState
from tests.ai.fake_openai import Answer, Failure, served
from tests.ai.scripted import Scripted, call

WAIT = 60.0


@pytest.fixture(params=["redis", "memory:"])
def address(request):
    return request.getfixturevalue("redis_url") if request.param == "redis" else "memory:"


@pytest.fixture
async def app(address):
    async with App("ai", address, retry=Retry(max_retries=2, base=0.01)) as made:
        yield made


def memory_of(app: App) -> MemoryManager:
    return MemoryManager("memory:" if app.manager is None else app.manager, namespace=app.queue_name)


async def test_an_app_runs_it(app):
    app.agent("echo")(ai.agent(Agent(TestModel(custom_output_text="hello")), prompt="Say {what}"))
    async with app.worker():
        runs = [await app.send("echo", {"what": str(n)}) for n in range(20)]
        assert {await run.result(WAIT) for run in runs} == {"hello"}


async def test_a_registry_runs_it():
    registry = AgentRegistry()
    registry.register("echo", ai.agent(Agent(TestModel(custom_output_text="hello"))), max_concurrency=3)
    assert await registry.call(BaseTask("t", "echo", {"prompt": "x"})) == "hello"
    registry.close()


async def test_each_queue_has_journals_of_its_own(address):
    models, answers = (Scripted("one"), Scripted("two")), []
    for name, model in zip(("q1", "q2"), models, strict=True):
        async with App(name, address) as app:
            app.agent("ask")(ai.agent(Agent(model)))
            async with app.worker():
                run = await app.send("ask", {"prompt": "?"}, id="same-id")
                answers.append(await run.result(WAIT))
    assert answers == ["one", "two"]
    assert [len(model.asked) for model in models] == [1, 1]


async def test_a_429_delays_the_task_and_consumes_no_retry(app, monkeypatch):
    monkeypatch.setattr("pydantic_ai.models.ALLOW_MODEL_REQUESTS", True)
    limited = Failure(429, {"retry-after-ms": "60"})
    async with served(limited, limited, limited, limited, Answer("at last")) as fake:
        app.agent("ask")(ai.agent(Agent(fake.model())))
        async with app.worker():
            run = await app.send("ask", {"prompt": "?"}, max_retries=0)
            assert await run.result(WAIT) == "at last"
    assert len(fake.requests) == 5


async def test_a_500_is_retried_and_a_401_is_not(app, monkeypatch):
    monkeypatch.setattr("pydantic_ai.models.ALLOW_MODEL_REQUESTS", True)
    async with served(Failure(500), Answer("yes"), Failure(401)) as fake:
        app.agent("ask")(ai.agent(Agent(fake.model())))
        async with app.worker():
            assert await (await app.send("ask", {"prompt": "?"})).result(WAIT) == "yes"
            with pytest.raises(TaskFailedError) as error:
                await (await app.send("ask", {"prompt": "?"})).result(WAIT)
    assert error.value.reason == "rejected"
    assert len(fake.requests) == 3


async def test_a_used_up_budget_is_a_dead_letter_that_says_so(app):
    agent = Agent(Scripted(call("more")))

    @agent.tool_plain
    def more() -> str:
        return "again"

    app.agent("ask")(ai.agent(agent, budget=ai.Budget(requests=3)))
    async with app.worker():
        run = await app.send("ask", {"prompt": "?"}, id="costly")
        with pytest.raises(TaskFailedError, match="budget of 3 requests is used up: 3 requests, 30 input") as error:
            await run.result(WAIT)
    assert error.value.error_type.endswith("BudgetExceededError")
    assert await ai.task_usage("costly", memory=memory_of(app)) == ai.Usage(3, 30, 15)


async def test_a_worker_that_stops_releases_the_run_and_the_next_goes_on(app):
    model, arrived, stay = Scripted(call("wait"), "done"), asyncio.Event(), asyncio.Event()
    agent = Agent(model)

    @agent.tool_plain
    async def wait() -> str:
        if not arrived.is_set():
            arrived.set()
            await stay.wait()
        return "waited"

    app.agent("ask")(ai.agent(agent))
    run = await app.send("ask", {"prompt": "?"})
    async with app.worker(drain_timeout=0.05):
        async with asyncio.timeout(WAIT):
            await arrived.wait()
    async with app.worker():
        assert await run.result(WAIT) == "done"
    assert len(model.asked) == 2


# -- workflows


async def waiting(run, name: str) -> None:
    async with asyncio.timeout(WAIT):
        async for event in run.events():
            if event.kind == "step.waiting" and event.data["name"] == name:
                return
    raise AssertionError(f"the workflow ended without waiting for {name}")


@pytest.mark.parametrize(("answer", "done"), [(True, ["report"]), ({"approved": False, "message": "no"}, [])])
async def test_a_plan_by_a_model_with_a_step_that_waits_for_approval(app, answer, done):
    sent: list[str] = []
    writer = Agent(Scripted(call("send", what="report"), "finished"), name="writer")

    @writer.tool_plain(requires_approval=True)
    def send(what: str) -> str:
        sent.append(what)
        return "sent"

    def plans(messages, info: AgentInfo) -> ModelResponse:
        steps = [
            {"id": "read", "action": "read", "args": {"prompt": "the papers"}},
            {"id": "write", "action": "write", "args": {"prompt": {"$ref": "read"}}},
        ]
        return ModelResponse(parts=[ToolCallPart(info.output_tools[0].name, {"steps": steps})])

    app.agent("read")(ai.agent(Agent(TestModel(custom_output_text="papers")), workflow_budget=ai.Budget(requests=9)))
    app.agent("write")(ai.agent(writer, workflow_budget=ai.Budget(requests=9)))
    app.planner(ai.planner(FunctionModel(plans), actions={"read": "", "write": ""}))
    async with app.worker():
        run = await app.start_workflow("report", {"about": "bees"})
        await waiting(run, "approve")
        state = await run.state()
        assert state.workflow_context["plan_source"] == "planner"
        assert "approve send(" in state.steps[1].waiting["prompt"]
        assert sent == []
        assert await run.approve("approve", answer)
        assert await run.result(WAIT) == "finished"
    assert sent == done
    assert len(writer.model.asked) == 2
    assert (await ai.workflow_usage(run.id, memory=memory_of(app))).requests == 4
    events = [event async for event in run.events(follow=False)]
    assert [event.kind for event in events].count("agent.usage") == 2


@pytest.mark.parametrize("queued", [True, False])
async def test_an_orchestrator_plans_and_runs_with_models(queued):
    memory, registry = MemoryManager("memory:", namespace="orch"), AgentRegistry()
    registry.register("ask", ai.agent(Agent(Scripted("hi")), prompt=lambda task: "?"))
    registry.register("planner", ai.planner(TestModel(), actions=["ask"]))
    pool = QueueWorkerPool("steps", OrchestrationWorkerPoolConfig(workers=2))
    orchestrator = Orchestrator(InMemoryTaskQueue("orch", "g") if queued else None, memory, pool, agents=registry)
    task = {"id": f"w-{queued}", "type": "report", "input": {"a": 1}}
    await orchestrator.process_incoming_task(task["id"], task)
    state = await orchestrator.workflow_engine.load_workflow_state(task["id"])
    assert (state.workflow_context["plan_source"], state.workflow_context["final_output"]) == ("planner", "hi")
    assert (await ai.workflow_usage(task["id"], memory=memory)).requests == 2
    await pool.shutdown(wait=False)
    registry.close()


async def test_the_budget_of_a_workflow_holds_over_its_steps(app):
    model = Scripted("one")
    for name in ("a", "b", "c"):
        app.agent(name)(ai.agent(Agent(model), workflow_budget=ai.Budget(requests=2)))
    plan = [{"action": name, "args": {"prompt": name}} for name in ("a", "b", "c")]
    async with app.worker():
        run = await app.start_workflow(plan)
        with pytest.raises(TaskFailedError, match="workflow's budget of 2 requests"):
            await run.result(WAIT)
    assert len(model.asked) == 2


async def test_parallel_steps_share_the_budget_of_their_workflow(app):
    model = Scripted("one")
    app.agent("ask")(ai.agent(Agent(model), workflow_budget=ai.Budget(requests=4)))
    plan = [{"id": f"s{n}", "action": "ask", "args": {"prompt": "?"}, "depends_on": []} for n in range(8)]
    plan[-1]["depends_on"] = ["s0"]
    plan = [{**step, "on_failure": "skip"} for step in plan]
    async with app.worker():
        run = await app.start_workflow(plan)
        await run.result(WAIT)
        states = [step.state for step in (await run.state()).steps]
    assert len(model.asked) == 4
    assert states.count(StepState.COMPLETED) == 4


async def test_what_an_agent_says_is_in_the_events_of_its_workflow(app, monkeypatch):
    monkeypatch.setattr("pydantic_ai.models.ALLOW_MODEL_REQUESTS", True)
    async with served(Answer("one two three")) as fake:
        app.agent("say")(ai.agent(Agent(fake.model()), stream=True))
        async with app.worker():
            run = await app.start_workflow([{"action": "say", "args": {"prompt": "?"}}])
            assert (await run.result(WAIT)).split() == ["one", "two", "three"]
    told = [event async for event in run.events(follow=False) if event.kind == "agent.text"]
    assert "".join(event.data["delta"] for event in told).split() == ["one", "two", "three"]


async def test_deps_can_be_made_from_the_context(app):
    from orchestra import current_context

    agent = Agent(TestModel(), deps_type=str)

    @agent.tool
    def where(ctx: RunContext[str]) -> str:
        return ctx.deps

    app.agent("ask")(ai.agent(agent, deps=lambda task: current_context().workflow.step_id))
    async with app.worker():
        run = await app.start_workflow([{"id": "here", "action": "ask", "args": {"prompt": "?"}}])
        assert await run.result(WAIT) == '{"where":"here"}'
