"""Planner, executor and factory: what they ask of the agents they stand before, and what they say when it is not met."""

from __future__ import annotations

import functools
import threading

import pytest

from orchestra._agents.context import context_parameter
from orchestra.agents import (
    AgentContext,
    AgentRegistry,
    ExecutorAgent,
    PlannerAgent,
    create_agent,
    current_context,
    get_executor_agent,
    register_agent_kind,
)
from orchestra.app import App
from orchestra.errors import (
    ConfigurationError,
    InvalidTaskError,
    InvalidTaskTypeError,
    UnknownAgentError,
    WorkflowError,
)
from orchestra.orchestrator import Orchestrator
from orchestra.tasks import BaseTask, TaskPriority
from orchestra.testing import MockAgent


def question(agents=("fetch", "send"), **more) -> BaseTask:
    told = {"task": {"id": "t", "type": "report", "input": {"q": 1}}, "agents": list(agents)}
    return BaseTask("t:plan", "planner", told | more)


GOOD = [{"action": "fetch", "id": "f"}, {"action": "send", "args": {"rows": {"$ref": "f.rows"}}}]
BAD = [{"action": "fetch"}, {"action": "fly", "depends_on": ["gone"]}]


class Planner:
    """Answers with what it was given, one after the other, and keeps what it was asked."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.asked: list[dict] = []

    async def process(self, task: BaseTask):
        self.asked.append(task.input)
        return self.answers.pop(0)


# -- the planner


@pytest.mark.parametrize("answer", [GOOD, {"plan": GOOD}, {"plan": GOOD, "thoughts": "…"}, tuple(GOOD)])
async def test_a_good_answer_is_a_valid_plan(answer):
    inner = Planner(answer)
    plan = await PlannerAgent(inner).process(question())
    assert [step["action"] for step in plan] == ["fetch", "send"]
    assert plan[0]["args"] is None
    assert inner.asked == [question().input], "it is told the task and the agents"


async def test_the_faults_are_handed_back_once():
    inner = Planner(BAD, GOOD)
    assert len(await PlannerAgent(inner).process(question())) == 2
    first, second = inner.asked
    assert "faults" not in first
    assert second["faults"] == [
        "step 1: action 'fly' is unknown; known are: fetch, send",
        "step 1: depends_on names 'gone', which is no step of this plan",
    ]
    assert second["plan"] == BAD
    assert second["task"] == first["task"]


async def test_a_second_bad_answer_is_an_error_that_names_every_fault():
    inner = Planner(BAD, [])
    with pytest.raises(WorkflowError, match="expected a list of 1 to 10000 steps, got 0 steps"):
        await PlannerAgent(inner).process(question())
    assert len(inner.asked) == 2
    with pytest.raises(WorkflowError) as caught:
        await PlannerAgent(Planner(BAD), repairs=0).process(question())
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Sure! Here is a plan", "expected a list of 1 to 10000 steps, got str"),
        (None, "got NoneType"),
        ({"steps": []}, "expected a list of steps or a dict with 'plan', got 'steps'"),
        ({"plan": {"plan": []}}, "got dict"),
        ([["fetch"]], "step 0: expected a dict, got list"),
    ],
)
async def test_what_a_planner_may_say_instead_of_a_plan(answer, said):
    with pytest.raises(WorkflowError) as caught:
        await PlannerAgent(Planner(answer), repairs=0).process(question())
    assert said in str(caught.value)


async def test_every_form_of_agent_may_plan():
    def plain(task):
        assert threading.current_thread() is not threading.main_thread()
        return GOOD

    async def with_context(task, ctx):
        return [{"action": ctx.task.input["agents"][0]}]

    planner = PlannerAgent(plain)
    assert len(await planner.process(question())) == 2
    planner.close()
    assert (await PlannerAgent(with_context).process(question()))[0]["action"] == "fetch"
    assert len(await PlannerAgent(MockAgent(result=GOOD)).process(question())) == 2
    with pytest.raises(ConfigurationError, match="agent for 'planner' must be a function of one task"):
        PlannerAgent("planner")
    with pytest.raises(ConfigurationError, match="PlannerAgent.repairs must be a whole number of rounds"):
        PlannerAgent(plain, repairs=-1)


async def test_what_a_planner_raises_is_not_repaired():
    async def broken(task):
        raise LookupError("no model")

    with pytest.raises(LookupError, match="no model"):
        await PlannerAgent(broken).process(question())


async def test_own_actions_go_before_those_it_is_told_of():
    with pytest.raises(WorkflowError, match="known are: only"):
        await PlannerAgent(Planner(GOOD), actions=["only"], repairs=0).process(question())
    assert await PlannerAgent(Planner([{"action": "any"}])).process(BaseTask("t", "planner", "just text"))


async def test_the_orchestrator_takes_one_as_its_planner(memory_orchestrator):
    agents, orchestrator = memory_orchestrator
    inner = Planner(BAD, GOOD)
    agents.register("planner", PlannerAgent(inner))
    await orchestrator.process_incoming_task("t1", {"type": "report", "input": {"q": 1}})
    state = await orchestrator.workflow_engine.load_workflow_state("t1")
    assert state.workflow_context["plan_source"] == "planner"
    assert state.workflow_context["final_output"] == "sent [1]"
    assert len(inner.asked) == 2


@pytest.fixture
async def memory_orchestrator():
    from orchestra.memory import MemoryManager
    from orchestra.memory_queue import InMemoryTaskQueue
    from orchestra.orchestration_worker_pool import QueueWorkerPool

    agents = AgentRegistry()

    async def fetch(task):
        return {"rows": [1]}

    async def send(task):
        return f"sent {task.input['rows']}"

    agents.register("fetch", fetch)
    agents.register("send", send)
    pool = QueueWorkerPool("p")
    yield agents, Orchestrator(InMemoryTaskQueue("q", "g"), MemoryManager("memory:"), pool, agents=agents)
    await pool.shutdown()


# -- the executor


@pytest.fixture
def app():
    app = App("steps", "memory:")

    @app.agent
    async def fetch(url: str, *, limit: int = 10) -> list:
        return [url, limit]

    @app.agent
    async def knows(ctx: AgentContext) -> object:
        return [ctx.task.id, ctx.task.metadata["context"], current_context() is ctx]

    return app


async def test_a_step_goes_to_the_agent_its_action_names(app):
    executor = ExecutorAgent(app.agents)
    task = BaseTask("t", "report", {"url": "u"}, TaskPriority.HIGH, attempt=2, fence=7)
    assert await executor.execute({"action": "fetch", "args": {"url": "x", "limit": 1}}, task) == ["x", 1]
    assert await executor.execute({"action": "fetch", "args": None}, task) == ["u", 10], "no args: the task's input"
    told = await executor.execute({"action": "knows", "id": "k", "args": {}}, task, context={"results": [1]})
    assert told == ["t:k", {"results": [1]}, True]
    asked = BaseTask("t", "executor", {"action": "knows", "args": {}, "context": {"a": 1}})
    assert await executor.process(asked) == ["t:knows", {"a": 1}, True]


@pytest.mark.parametrize(
    ("step", "error", "said", "path"),
    [
        (
            {"action": "fetch", "id": "f", "args": {}},
            InvalidTaskError,
            "step f: agent 'fetch' needs the argument 'url'",
            "input.url",
        ),
        (
            {"action": "fetch", "args": {"url": "x", "limt": 1}},
            InvalidTaskError,
            "step fetch: agent 'fetch' has no parameter 'limt'; did you mean 'limit'?",
            "input.limt",
        ),
        (
            {"action": "fetch", "step_index": 3, "args": {"url": 5}},
            InvalidTaskTypeError,
            "step 3: agent 'fetch': url must be str, got int 5",
            "input.url",
        ),
        (
            {"action": "fetch", "args": [1]},
            InvalidTaskTypeError,
            "step fetch: args must be a dict, got list",
            "input.args",
        ),
        ({"args": {}}, InvalidTaskTypeError, "a step is a dict with an action", "input.action"),
        ("fetch", InvalidTaskTypeError, "a step is a dict with an action, got 'fetch'", "input.action"),
    ],
)
async def test_args_are_held_against_the_signature_before_anything_runs(app, step, error, said, path):
    executor = ExecutorAgent(app.agents)
    for run in (executor.check, functools.partial(executor.execute, task=BaseTask("t", "r"))):
        with pytest.raises(error) as caught:
            found = run(step)
            if found is not None:
                await found
        assert said in str(caught.value)
        assert caught.value.path == path


async def test_an_action_that_nobody_serves(app):
    executor = ExecutorAgent(app.agents)
    with pytest.raises(
        UnknownAgentError, match="step x: no agent is registered for 'fetsh'; did you mean 'fetch'"
    ) as caught:
        executor.check({"action": "fetsh", "id": "x"})
    assert caught.value.task_type == "fetsh"
    with pytest.raises(UnknownAgentError, match="registered are: fetch, knows"):
        executor.check({"action": "zzz"})
    with pytest.raises(UnknownAgentError, match="'orchestra.sleep' is built in: no agent runs it, a workflow does"):
        executor.check({"action": "orchestra.sleep"})


async def test_agents_of_a_task_take_whatever_comes():
    agents = AgentRegistry()

    async def any_form(task):
        return task.input

    agents.register("any", any_form)
    assert await ExecutorAgent(agents).execute({"action": "any", "args": {"x": 1}}, BaseTask("t", "r")) == {"x": 1}


async def test_the_shared_executor_is_one_for_each_registry(app):
    one = get_executor_agent(app.agents)
    assert one is get_executor_agent(app.agents)
    assert await one is one
    assert one is not get_executor_agent()
    assert one.agents is app.agents


# -- the factory


async def test_agents_are_made_by_the_name_of_their_kind(app):
    planner = create_agent("planner", Planner(GOOD), repairs=0)
    assert isinstance(planner, PlannerAgent)
    assert isinstance(create_agent("executor", app.agents), ExecutorAgent)
    register_agent_kind("mock", MockAgent)
    assert await create_agent("mock", result=5).process(BaseTask("t", "x")) == 5


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("planer", {}, "there is no kind of agent 'planer'; did you mean 'planner'?"),
        ("zzz", {}, "there is no kind of agent 'zzz'; kinds are executor, "),
        (None, {}, "there is no kind of agent None"),
        ("planner", {}, "an agent of kind 'planner' is not made so: missing a required argument: 'planner'"),
        (
            "executor",
            {"nope": 1},
            "an agent of kind 'executor' is not made so: got an unexpected keyword argument 'nope'",
        ),
    ],
)
def test_what_cannot_be_made_is_said(kind, options, said):
    with pytest.raises(ConfigurationError) as caught:
        create_agent(kind, **options)
    assert said in str(caught.value)
    assert caught.value.field == "kind"


def test_a_kind_is_made_by_a_callable():
    with pytest.raises(ConfigurationError, match="kind 'x' must be made by a callable"):
        register_agent_kind("x", 5)
    with pytest.raises(ConfigurationError, match="kind must be 1 to 128"):
        register_agent_kind("two words", MockAgent)


# -- who asks for a context


def one(task): ...
def by_name(task, ctx): ...
def by_default(task, ctx=None): ...
def only_ctx(ctx): ...
def other(task, ctx: dict): ...
def annotated(task, where: AgentContext): ...
def optional(task, where: AgentContext | None = None): ...
def spelled(task, where: AgentContext): ...
def starred(task, *ctx, **more): ...


class Object:
    async def __call__(self, task, where: AgentContext): ...
    async def process(self, task, ctx): ...


@pytest.mark.parametrize(
    ("agent", "name"),
    [
        (one, None),
        (by_name, "ctx"),
        (by_default, None),
        (only_ctx, None),
        (other, None),
        (annotated, "where"),
        (optional, "where"),
        (spelled, "where"),
        (starred, None),
        (Object(), "where"),
        (Object().process, "ctx"),
        (functools.partial(annotated), "where"),
        (print, None),
        (dict.fromkeys, None),
    ],
)
def test_the_parameter_that_asks(agent, name):
    assert context_parameter(agent) == name
