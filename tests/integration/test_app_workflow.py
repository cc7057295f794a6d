"""Workflows through the front door: start, plan, follow, steer, on Redis and in memory, across Apps."""

from __future__ import annotations

import asyncio

import pytest

from orchestra import (
    App,
    BaseTask,
    ConfigurationError,
    InvalidTaskError,
    Retry,
    TaskCancelledError,
    TaskFailedError,
    TaskPriority,
    TaskState,
    WorkflowError,
    WorkflowRun,
)
from orchestra.workflow import StepState

WAIT = 60.0


@pytest.fixture(params=["redis", "memory:"])
def address(request):
    return request.getfixturevalue("redis_url") if request.param == "redis" else "memory:"


def make(address: str, name: str = "flows") -> App:
    app = App(name, address, retry=Retry(max_retries=1, base=0.01))

    @app.agent
    async def double(n: int) -> int:
        return 2 * n

    @app.agent
    async def add(numbers: list[int]) -> int:
        return sum(numbers)

    @app.agent
    async def boom() -> None:
        raise ValueError("no way")

    return app


@pytest.fixture
async def app(address):
    async with make(address) as made:
        yield made


DIAMOND = [
    {"id": "one", "action": "double", "args": {"n": {"$ref": "input.n"}}},
    {"id": "left", "action": "double", "args": {"n": {"$ref": "one"}}, "depends_on": ["one"]},
    {"id": "right", "action": "double", "args": {"n": {"$ref": "one"}}, "depends_on": ["one"]},
    {"id": "sum", "action": "add", "args": {"numbers": [{"$ref": "left"}, {"$ref": "right"}]}},
]
WAITING = [
    {"id": "ask", "action": "orchestra.signal", "args": {"name": "go", "prompt": "Really?"}},
    {"id": "two", "action": "double", "args": {"n": {"$ref": "ask"}}},
]


async def until(run: WorkflowRun, reached) -> None:
    """Wait for an event after which ``reached(state)``."""
    async with asyncio.timeout(WAIT):
        async for _ in run.events():
            if reached(await run.state()):
                return
    raise AssertionError("the workflow ended before that")


def waits(state) -> bool:
    return any(step.state is StepState.WAITING for step in state.steps)


async def test_a_plan_runs_and_its_result_comes_back(app):
    async with app.worker():
        run = await app.start_workflow("report", {"n": 3}, plan=DIAMOND)
        assert await run.result(WAIT) == 24
        assert await run == 24  # again
        state = await run.state()
    assert state.status is TaskState.COMPLETED
    assert {step.id: step.result for step in state.steps} == {"one": 6, "left": 12, "right": 12, "sum": 24}
    assert (state.task["type"], state.task["input"]) == ("report", {"n": 3})
    assert repr(run) == f"<WorkflowRun {run.id} of report>"


async def test_a_plan_alone_is_a_workflow_too(app):
    async with app.worker():
        facts = {"metadata": {"tenant": "acme"}, "priority": TaskPriority.HIGH}
        run = await app.start_workflow(DIAMOND, {"n": 1}, id="mine", **facts)
        assert (run.id, await run.result(WAIT)) == ("mine", 8)
    state = await app.workflow("mine").state()
    assert (state.task["type"], state.task["metadata"]) == ("workflow", {"tenant": "acme"})
    assert state.task["priority"] == TaskPriority.HIGH


async def test_started_twice_with_one_id_it_is_one_workflow(app):
    async with app.worker():
        first = await app.start_workflow(DIAMOND, {"n": 1}, id="one")
        again = await app.start_workflow(DIAMOND, {"n": 1}, id="one")
        assert await first.result(WAIT) == await again.result(WAIT) == 8
        with pytest.raises(WorkflowError, match="one"):
            await app.start_workflow(DIAMOND, {"n": 2}, id="one")
    kinds = [event.kind async for event in first.events(follow=False)]
    assert kinds.count("step.completed") == 4


async def test_a_failed_workflow_says_which_step_and_why(app):
    async with app.worker():
        run = await app.start_workflow([{"id": "x", "action": "boom", "args": {}}], id="broken")
        with pytest.raises(
            TaskFailedError, match=r"workflow broken failed in step x \(boom\): ValueError: no way"
        ) as caught:
            await run.result(WAIT)
    assert (caught.value.error_type, caught.value.task_id, caught.value.attempts) == ("ValueError", "broken", 2)


async def test_a_result_that_is_not_there_yet_is_a_timeout(app):
    run = await app.start_workflow(DIAMOND, {"n": 1})
    with pytest.raises(TimeoutError):
        await run.result(timeout=0.05)
    async with app.worker():
        assert await run.result(WAIT) == 8


async def test_signals_events_and_positions(app):
    async with app.worker():
        run = await app.start_workflow(WAITING)
        seen = []
        async for event in run.events():
            seen.append(event)
            if event.kind == "step.waiting":
                assert await run.approve("go", 21)
                assert not await run.signal("go", 22)
        assert await run.result(WAIT) == 42
    kinds = [event.kind for event in seen]
    assert (kinds[0], kinds[-1]) == ("workflow.started", "workflow.completed")
    rest = [event async for event in run.events(after=seen[2].id, follow=False)]
    assert rest == seen[3:]


async def test_cancel(app):
    async with app.worker():
        run = await app.start_workflow(WAITING)
        await until(run, waits)
        assert await run.cancel("enough")
        with pytest.raises(TaskCancelledError, match="cancelled"):
            await run.result(WAIT)
        assert await run.cancel()  # again changes nothing
    assert (await run.state()).status is TaskState.CANCELLED


async def test_pause_and_resume(app):
    async with app.worker():
        run = await app.start_workflow(WAITING)
        await until(run, waits)
        assert await run.pause()
        assert await run.pause()  # again changes nothing
        assert (await run.state()).phase == "paused"
        assert await run.signal("go", 4)
        assert (await run.state()).steps[1].state is StepState.PENDING
        assert await run.resume()
        assert await run.result(WAIT) == 8


async def test_resume_tries_the_failed_steps_of_a_failed_workflow_again(app):
    repaired = []

    @app.agent
    async def fragile() -> str:
        if not repaired:
            raise OSError("broken")
        return "whole"

    async with app.worker():
        run = await app.start_workflow([{"action": "double", "args": {"n": 1}}, {"action": "fragile", "args": {}}])
        with pytest.raises(TaskFailedError, match="OSError: broken"):
            await run.result(WAIT)
        repaired.append(True)
        assert await run.resume()
        assert await run.result(WAIT) == "whole"
        assert not await run.resume()
    state = await run.state()
    assert [(step.attempt, step.series) for step in state.steps] == [(1, 1), (3, 2)]


async def test_an_unknown_workflow_is_an_error(app):
    run = app.workflow("nobody")
    for call in (run.state, run.cancel, run.pause, run.resume):
        with pytest.raises(WorkflowError, match="nobody"):
            await call()
    with pytest.raises(WorkflowError, match="nobody"):
        await run.signal("go")
    with pytest.raises(TimeoutError):
        await run.result(0.05)
    with pytest.raises(ConfigurationError, match="workflow id"):
        app.workflow("a b")


async def test_bad_plans_are_refused_with_every_fault(app):
    bad = [
        {"id": "a", "action": "double", "depends_on": ["b"]},
        {"id": "b", "action": "nope", "depends_on": ["a"]},
    ]
    with pytest.raises(WorkflowError) as caught:
        await app.start_workflow(bad, id="bad")
    assert len(caught.value.faults) == 2
    with pytest.raises(WorkflowError, match="bad"):
        await app.workflow("bad").state()
    with pytest.raises(InvalidTaskError):
        await app.start_workflow(DIAMOND, object())
    with pytest.raises(ConfigurationError, match="workflow priority must be a TaskPriority"):
        await app.start_workflow(DIAMOND, priority=9)
    with pytest.raises(ConfigurationError, match="workflow id"):
        await app.start_workflow(DIAMOND, id="a b")
    with pytest.raises(ConfigurationError, match="workflow type"):
        await app.start_workflow("a b")


# -- planning


async def test_planners_are_asked_in_order_then_the_template(address):
    async with make(address) as app:
        asked = []

        @app.planner
        async def first(task: dict, agents: list[str]) -> list[dict]:
            asked.append((task["type"], min(agents)))
            raise ConnectionError("away")

        @app.planner(timeout=5)
        def second(task: dict, agents: list[str]) -> list[dict]:
            if task["type"] != "sum":
                return [{"action": "unheard of"}]
            return [{"action": "add", "args": {"numbers": {"$ref": "input.numbers"}}}]

        @app.template("pair")
        def pair(task: BaseTask) -> list[dict]:
            return [{"action": "double", "args": {"n": task.input["n"]}}]

        assert app.planners == ["planner", "planner-2"]
        async with app.worker():
            run = await app.start_workflow("sum", {"numbers": [1, 2]})
            assert await run.result(WAIT) == 3
            state = await run.state()
            assert state.workflow_context["plan_source"] == "alternate"
            assert state.workflow_context["planner_error"]["type"] == "ConnectionError"
            run = await app.start_workflow("pair", {"n": 4})
            assert await run.result(WAIT) == 8
            assert (await run.state()).workflow_context["plan_source"] == "template"
            run = await app.start_workflow("double", {"n": 5})
            assert await run.result(WAIT) == 10
            assert (await run.state()).workflow_context["plan_source"] == "single_step"
        assert asked[0][0] == "sum"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([{"action": "duoble"}], "action 'duoble' is unknown; known are"),
        ([{"action": "double", "args": {"n": 2**70}}], "step 0 of the plan.args.n: an int must be"),
        ([{"action": "double", "note": "n" * 2_000_000}], "step 0 of the plan is larger than the memory's limit"),
        (SystemExit(3), "raised SystemExit(3), which is no Exception"),
        (asyncio.CancelledError(), "raised CancelledError(), which is no Exception"),
        (GeneratorExit(), "raised GeneratorExit(), which is no Exception"),
    ],
    ids=range(6),
)
async def test_what_a_worker_cannot_use_of_a_planner_is_no_plan(app, answer, said):
    @app.planner
    async def planner(task: dict, agents: list[str]) -> list[dict]:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async with app.worker():
        run = await app.start_workflow("double", {"n": 5})
        assert await run.result(WAIT) == 10
        context = (await run.state()).workflow_context
    assert context["plan_source"] == "single_step"
    assert said in context["planner_error"]["message"]


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_a_planner_that_takes_faults_is_asked_once_more(app, kind):
    heard = []

    def answer(task: dict, faults: list[str]) -> list[dict]:
        heard.append(faults)
        return [{"action": "double" if faults else "duoble", "args": {"n": task["input"]["n"]}}]

    async def planning(task: dict, faults: list[str] = ()) -> list[dict]:
        return answer(task, list(faults))

    def plain(task: dict, faults: list[str] = ()) -> list[dict]:
        return answer(task, list(faults))

    handle = app.planner(planning if kind == "async" else plain)
    async with app.worker():
        run = await app.start_workflow("any", {"n": 4})
        assert await run.result(WAIT) == 8
        assert (await run.state()).workflow_context["plan_source"] == "planner"
    assert heard[0] == []
    assert "duoble" in heard[1][0]
    assert handle.function in (planning, plain)


async def test_a_plain_planner_that_takes_faults_may_raise_what_no_future_takes(app):
    @app.planner
    def planner(task: dict, agents: list[str], faults: list[str] = ()) -> list[dict]:
        return [{"action": next(name for name in agents if name == "unheard of")}]

    async with app.worker():
        run = await app.start_workflow("double", {"n": 5})
        assert await run.result(WAIT) == 10
        context = (await run.state()).workflow_context
    assert "StopIteration" in context["planner_error"]["message"]


@pytest.mark.parametrize(
    ("planner", "said"),
    [
        (lambda task: [], "no parameter 'agents'"),
        (lambda agents: [], "no parameter 'task'"),
        (lambda task, agents, goal: [], "needs the argument 'goal'"),
        (lambda task, faults: [], "needs the argument 'faults'"),
    ],
    ids=range(4),
)
async def test_a_planner_that_nobody_could_ask_is_refused(app, planner, said):
    with pytest.raises(ConfigurationError, match=said):
        app.planner(planner)
    assert app.planners == []


@pytest.mark.parametrize(
    "planner", [lambda task, faults=(): [], lambda **told: [], lambda task, agents, depth=1: []], ids=range(3)
)
async def test_a_planner_may_leave_out_and_add_what_it_is_not_told(app, planner):
    app.planner(planner)
    assert app.planners == ["planner"]


async def test_without_planners_the_template_or_one_step(app):
    plan = app.template("twice")([{"action": "double"}, {"action": "double", "args": {"n": {"$ref": "0"}}}])
    assert plan == [{"action": "double"}, {"action": "double", "args": {"n": {"$ref": "0"}}}]
    async with app.worker():
        assert await (await app.start_workflow("twice", {"n": 1})).result(WAIT) == 4
        assert await (await app.start_workflow("double", {"n": 1})).result(WAIT) == 2


def test_a_bad_template_is_refused_at_once():
    app = App("flows", "memory:")
    with pytest.raises(WorkflowError, match="action"):
        app.template("bad")([{}])
    with pytest.raises(ConfigurationError, match="must be a list of steps or a function"):
        app.template("bad")("plan")
    with pytest.raises(ConfigurationError, match="workflow type"):
        app.template("a b")


# -- several Apps


async def test_an_app_without_agents_starts_what_another_does(redis_url):
    async with make(redis_url) as serving, App("flows", redis_url) as client, serving.worker():
        run = await client.start_workflow("report", {"n": 3}, plan=DIAMOND)
        assert await run.result(WAIT) == 24


async def test_workflows_of_other_queues_are_not_ours(redis_url):
    async with make(redis_url, "one") as one, make(redis_url, "two") as two, two.worker():
        run = await one.start_workflow(DIAMOND, {"n": 1}, id="same")
        other = await two.start_workflow(DIAMOND, {"n": 2}, id="same")
        assert await other.result(WAIT) == 16
        assert (await run.state()).status is not TaskState.COMPLETED
        async with one.worker():
            assert await run.result(WAIT) == 8


async def test_a_new_event_loop_or_a_closed_app_has_a_driver_of_its_own(redis_url):
    app = make(redis_url)
    for number in range(2):
        async with app, app.worker():
            run = await app.start_workflow(DIAMOND, {"n": 1}, id=f"w{number}")
            assert await run.result(WAIT) == 8
