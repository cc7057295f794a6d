"""What a running agent may know and do: the same in the event loop, in a thread and in a process, on Redis and without."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time

import pytest

from orchestra._agents.services import Services, StepScope, serving
from orchestra._workflow.driver import Driver
from orchestra._workflow.refs import Facts, StepFact
from orchestra.agents import AgentContext, AgentRegistry, current_context, follow_events, read_events
from orchestra.app import App
from orchestra.dispatcher import Dispatcher
from orchestra.errors import ConfigurationError, TaskFailedError, WaitForSignal, WorkflowError
from orchestra.memory import MemoryManager
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.tasks import BaseTask, Retry, TaskPriority, TaskState
from orchestra.workflow import WorkflowEngine


@pytest.fixture(params=["redis", "memory"])
async def app(request):
    address = request.getfixturevalue("redis_url") if request.param == "redis" else "memory:"
    made = App("ctx", address, retry=Retry(max_retries=2, base=0.001))
    async with made:
        yield made


def memory_of(app: App) -> MemoryManager:
    return MemoryManager(app.manager or "memory:", namespace=app.queue_name)


# -- who gets one


async def test_a_parameter_that_asks_gets_it_and_is_not_part_of_the_input(app):
    @app.agent
    async def wide(text: str, ctx: AgentContext, *, n: int = 1) -> list:
        return [text, n, ctx.task.id, ctx.attempt, ctx.fence >= 1, current_context() is ctx]

    @app.agent
    async def alone(context: AgentContext) -> object:
        return context.task.input

    async with app.worker():
        run = await app.send("wide", {"text": "a", "n": 2}, id="w1")
        assert await run.result(timeout=20) == ["a", 2, "w1", 1, True, True]
        assert await (await app.send("alone", {"any": 1})).result(timeout=20) == {"any": 1}
    with pytest.raises(ValueError, match="'ctx' is the context of the attempt and filled in by the worker"):
        await app.send("wide", {"text": "a", "ctx": 1})


async def test_agents_of_a_registry_may_ask_too(app):
    agents = AgentRegistry()

    async def named(task, ctx):
        return ["named", ctx.task.id]

    async def annotated(task, *, where: AgentContext):
        return ["annotated", where.task.id]

    class Holder:
        async def process(self, task: BaseTask, ctx: AgentContext):
            return ["object", ctx.task.id]

    def plain(task, ctx):
        return ["plain", ctx.task.id, threading.current_thread() is threading.main_thread()]

    async def asks(task):
        async def deeper():
            return current_context()

        first = await asyncio.create_task(deeper())
        return ["asks", first.task.id]

    for name, agent in {
        "named": named,
        "annotated": annotated,
        "object": Holder(),
        "plain": plain,
        "asks": asks,
    }.items():
        agents.register(name, agent)
    async with Dispatcher(app.queue, agents=agents):
        runs = [await app.send(name, {}, id=f"id-{name}") for name in agents]
        found = {run.task_type: await run.result(timeout=20) for run in runs}
    agents.close()
    assert found == {
        "named": ["named", "id-named"],
        "annotated": ["annotated", "id-annotated"],
        "object": ["object", "id-object"],
        "plain": ["plain", "id-plain", False],
        "asks": ["asks", "id-asks"],
    }


async def test_each_attempt_and_each_task_has_its_own(app):
    seen: list[AgentContext] = []

    @app.agent
    async def flaky(n: int) -> int:
        context = current_context()
        assert current_context() is context
        seen.append(context)
        if context.attempt == 1:
            raise ValueError("once more")
        return n

    async with app.worker(concurrency=1):
        runs = await app.send_many([{"type": "flaky", "input": {"n": n}} for n in range(3)])
        assert [await run.result(timeout=20) for run in runs] == [0, 1, 2]
    assert len({id(each) for each in seen}) == 6
    assert sorted((each.task.id, each.attempt) for each in seen) == sorted(
        (run.id, attempt) for run in runs for attempt in (1, 2)
    )


async def test_outside_of_an_agent_there_is_none():
    with pytest.raises(ConfigurationError, match="no agent runs here"):
        current_context()


async def test_one_context_is_enough(app):
    async def twice(one: AgentContext, other: AgentContext): ...

    async def starred(*ctx: AgentContext): ...

    with pytest.raises(ConfigurationError, match="agent 'twice' wants the context twice: one, other"):
        app.agent(twice)
    with pytest.raises(ConfigurationError, match="the context parameter ctx must be an ordinary parameter"):
        app.agent(starred)


async def test_a_function_that_was_given_up_does_not_take_the_place_of_the_next(app):
    late, asked = threading.Event(), threading.Event()
    found: list[AgentContext] = []

    @app.agent(timeout=0.05, retry=Retry(max_retries=0))
    def hangs() -> None:
        late.wait(30)
        found.append(current_context())
        asked.set()

    @app.agent
    async def parent() -> list:
        async def send(n: int) -> str:
            return (await current_context().submit("nobody", want_result=False)).id

        first = await asyncio.create_task(send(1))
        late.set()
        await asyncio.to_thread(asked.wait, 30)
        return [first, await asyncio.create_task(send(2))]

    async with app.worker(concurrency=1), asyncio.timeout(60):
        dead = await app.send("hangs", id="h")
        with pytest.raises(TaskFailedError):
            await dead.result(30)
        run = await app.send("parent", id="p")
        assert await run.result(30) == ["p/1", "p/2"]
    assert [each.task.id for each in found] == ["h"]


# -- memory


async def test_memory_of_a_task_is_its_own_and_outlives_the_attempt(app):
    @app.agent
    async def remembers(value: str, ctx: AgentContext) -> object:
        await ctx.shared_memory.update("total", lambda n: n + 1, 0)
        if ctx.attempt == 1:
            await ctx.memory.set("kept", value)
            raise ValueError("once more")
        return await ctx.memory.get("kept")

    async with app.worker():
        runs = [await app.send("remembers", {"value": v}, id=f"m-{v}") for v in ("a", "b")]
        assert [await run.result(timeout=20) for run in runs] == ["a", "b"]
    memory = memory_of(app)
    assert await memory.get("total") == 4
    assert await memory.scoped("task").scoped("m-a").get("kept") == "a"
    assert await memory.get("kept") is None


# -- children


async def test_a_repeated_attempt_submits_no_child_twice(app):
    begun: list[str] = []

    @app.agent
    async def child(n: int) -> int:
        begun.append(current_context().task.id)
        return n * 10

    @app.agent(priority=TaskPriority.HIGH)
    async def parent(ctx: AgentContext) -> list:
        children = [await ctx.submit("child", {"n": n}) for n in range(3)]
        named = await ctx.submit("child", {"n": 9}, key="last one", priority=TaskPriority.LOW)
        values = [await each.result(timeout=20) for each in children] + [await named]
        if ctx.attempt < 3:
            raise ValueError("after all were sent")
        return [*values, [each.id for each in children], named.task_type, ctx.attempt]

    async with app.worker():
        run = await app.send("parent", id="p")
        *values, ids, kind, attempt = await run.result(timeout=30)
    assert (values, ids, kind, attempt) == ([0, 10, 20, 90], ["p/1", "p/2", "p/3"], "child", 3)
    assert len(begun) == 4, "each ran once in three attempts"
    assert sorted(begun)[1:] == ["p/1", "p/2", "p/3"]
    assert min(begun).startswith("p/#"), "a key that is no ident goes by its digest"


async def test_a_child_has_its_parents_priority_and_says_whose_it_is(app):
    told = {}

    @app.agent
    async def child(ctx: AgentContext) -> None:
        told.update(priority=ctx.task.priority, **ctx.task.metadata)

    @app.agent
    async def parent(ctx: AgentContext) -> object:
        sent = await ctx.submit("child", metadata={"tenant": "t"}, want_result=False)
        with pytest.raises(ConfigurationError, match="submit has no option 'prio'; options are key"):
            await ctx.submit("child", prio=1)
        return sent.id

    async with app.worker():
        run = await app.send("parent", id="p", priority=TaskPriority.CRITICAL)
        assert await run.result(timeout=20) == "p/1"
        async with asyncio.timeout(20):
            while not told:
                await asyncio.sleep(0.01)
    assert told == {"priority": 0, "tenant": "t", "parent": "p"}


async def test_a_child_that_dies_is_its_waiters_error(app):
    @app.agent(retry=Retry(max_retries=0))
    async def child() -> None:
        raise LookupError("gone")

    @app.agent
    async def parent(ctx: AgentContext) -> str:
        sent = await ctx.submit("child")
        try:
            await sent
        except TaskFailedError as error:
            return f"{error.error_type}: {sent!r}"
        return "it lived"

    async with app.worker():
        run = await app.send("parent", id="p")
        assert await run.result(timeout=20) == "LookupError: <Child p/1 of child>"


async def test_a_step_that_is_resumed_sends_anew_only_the_children_that_died(app):
    runs: list[str] = []
    healed = False

    @app.agent(retry=Retry(max_retries=0))
    async def child(n: int, ctx: AgentContext) -> int:
        runs.append(ctx.task.id)
        if n == 2 and not healed:
            raise LookupError("not yet")
        return n

    @app.agent(retry=Retry(max_retries=0))
    async def parent(ctx: AgentContext) -> list:
        children = [await ctx.submit("child", {"n": n}) for n in (1, 2)]
        return [await each.result(20) for each in children]

    engine = WorkflowEngine(memory_of(app))
    driver = Driver(engine, app.queue)
    async with app.worker(), asyncio.timeout(60):
        workflow = await driver.start("family", plan=[{"action": "parent", "args": {}}])
        assert (await engine.wait_end(workflow, 30)).status is TaskState.FAILED
        healed = True
        assert await driver.resume(workflow)
        state = await engine.wait_end(workflow, 30)
    assert (state.status, state.workflow_context["final_output"]) == (TaskState.COMPLETED, [1, 2])
    assert runs == [f"{workflow}:0/1", f"{workflow}:0/2", f"{workflow}:0/2/2"]


# -- events


async def test_a_task_outside_of_workflows_tells_what_can_be_followed(app):
    go = asyncio.Event()

    @app.agent
    async def worker(ctx: AgentContext) -> None:
        await ctx.progress(0.25, "begun")
        await go.wait()
        await ctx.emit("found", {"rows": 3})
        await ctx.progress(1)

    memory = memory_of(app)
    seen = []
    async with app.worker(), asyncio.timeout(30):
        run = await app.send("worker", id="e")
        async for event in follow_events(memory, "e"):
            seen.append(event)
            go.set()
            if event.data == {"fraction": 1.0, "message": ""}:
                break
        await run.result()
    assert [(event.position, event.kind, event.data) for event in seen] == [
        (0, "progress", {"fraction": 0.25, "message": "begun"}),
        (1, "agent.found", {"rows": 3}),
        (2, "progress", {"fraction": 1.0, "message": ""}),
    ]
    assert seen[0].attempt == 1
    assert 0 < seen[0].at <= seen[2].at
    assert [event.kind for event in await read_events(memory, "e", after=0)] == ["agent.found", "progress"]
    assert await read_events(memory, "nobody") == []


async def test_what_is_told_is_checked(app):
    @app.agent(retry=Retry(max_retries=0))
    async def worker(ctx: AgentContext) -> list:
        said = []
        for tell in (ctx.progress(2), ctx.progress(float("nan")), ctx.emit("two words"), ctx.emit("ok", object())):
            try:
                await tell
            except (ConfigurationError, TypeError) as error:
                said.append(str(error))
        return said

    async with app.worker():
        said = await (await app.send("worker")).result(timeout=20)
    assert "progress must be a number, 0 or more and at most 1, got 2" in said[0]
    assert "got nan" in said[1]
    assert "event kind must be" in said[2]
    assert "object" in said[3]


# -- time and log


async def test_time_left_is_that_of_the_attempt(app):
    @app.agent
    async def free(ctx: AgentContext) -> list:
        return [ctx.deadline, ctx.time_left()]

    @app.agent(timeout=50)
    async def timed(ctx: AgentContext) -> list:
        return [ctx.deadline, ctx.time_left()]

    async with app.worker():
        assert await (await free.send()).result(timeout=20) == [None, None]
        before = time.time()
        deadline, left = await (await timed.send()).result(timeout=20)
        assert 0 < left <= 50
        assert before + left - 5 < deadline < time.time() + 55
        _, sooner = await (await app.send("timed", {}, deadline=time.time() + 20)).result(timeout=20)
        assert 0 < sooner <= 21


async def test_the_log_says_whose_it_is(app, caplog):
    @app.agent
    async def talks(ctx: AgentContext) -> None:
        ctx.log.warning("hello %s", "you", extra={"more": 1})

    with caplog.at_level(logging.INFO, "orchestra.agent"):
        async with app.worker():
            await (await app.send("talks", id="l")).result(timeout=20)
    (record,) = [each for each in caplog.records if each.name == "orchestra.agent"]
    assert record.getMessage() == "hello you"
    assert (record.task_id, record.task_type, record.attempt, record.more) == ("l", "talks", 1, 1)


# -- threads and processes


async def test_a_plain_function_waits_for_coroutines_of_its_context(app):
    @app.agent
    def plain(n: int, ctx: AgentContext) -> list:
        ctx.wait(ctx.progress(0.5, "half"))
        ctx.wait(ctx.memory.set("n", n))
        child = ctx.wait(ctx.submit("child", {"n": n}))
        try:
            ctx.wait(ctx.progress(7))
        except ConfigurationError as error:
            said = str(error)
        return [ctx.wait(ctx.memory.get("n")), ctx.wait(child.result(20)), current_context() is ctx, said]

    @app.agent
    async def child(n: int, ctx: AgentContext) -> object:
        with pytest.raises(ConfigurationError, match="runs in the event loop: await instead"):
            ctx.wait(ctx.progress(0.1))
        return n + 1

    async with app.worker():
        run = await app.send("plain", {"n": 4}, id="t")
        stored, answer, same, said = await run.result(timeout=30)
    assert (stored, answer, same) == (4, 5, True)
    assert "at most 1, got 7" in said
    assert [event.data["message"] for event in await read_events(memory_of(app), "t")] == ["half"]


def in_process(n: int, ctx: AgentContext) -> list:
    try:
        _ = ctx.memory
    except ConfigurationError as error:
        said = str(error)
    return [os.getpid(), n, ctx.task.id, ctx.attempt, current_context() is ctx, ctx.workflow is None, said]


def in_process_of_a_registry(task, ctx):
    return [os.getpid(), ctx.task.id, current_context() is ctx]


@pytest.mark.slow
async def test_in_a_process_there_is_the_data_only(redis_url):
    async with App("ctx", redis_url) as app:
        app.agent(executor="process")(in_process)
        app.agents.register("raw", in_process_of_a_registry, executor="process")
        async with app.worker():
            pid, n, task_id, attempt, same, alone, said = await (await app.send("in_process", {"n": 3}, id="x")).result(
                timeout=60
            )
            raw = await (await app.send("raw", {}, id="y")).result(timeout=60)
    assert (n, task_id, attempt, same, alone) == (3, "x", 1, True, True)
    assert pid != os.getpid()
    assert "the memory of task x is out of reach here: an agent in a process of its own" in said
    assert raw[0] != os.getpid()
    assert raw[1:] == ["y", True]


# -- by hand


async def test_by_hand_a_context_has_what_it_is_given():
    bare = AgentContext(BaseTask("t", "work"))
    assert (bare.workflow, bare.signals, bare.deadline, bare.attempt) == (None, {}, None, 1)
    for use in (bare.emit("x"), bare.progress(1), bare.submit("child")):
        with pytest.raises(ConfigurationError, match="out of reach here"):
            await use
    with pytest.raises(ConfigurationError, match="has no event loop around it"):
        bare.wait(bare.progress(1))
    queue = InMemoryTaskQueue("q", "g")
    given = AgentContext(BaseTask("t", "work", priority=TaskPriority.HIGH), Services(queue))
    child = await given.submit("child", {"n": 1})
    (delivery,) = await queue.consume("c", 1, 0)
    assert (child.id, delivery[1]["id"], delivery[1]["priority"]) == ("t/1", "t/1", TaskPriority.HIGH)


async def test_signals_of_a_step():
    facts = Facts(steps={"a": StepFact("completed", 1), "b": StepFact("skipped")}, signals={"go": {"by": "me"}})
    step = StepScope("w", 2, "last", series=3, total=4, known=facts)
    context = AgentContext(BaseTask("w:2:3", "work"), Services(step=step))
    assert context.wait_signal("go") == {"by": "me"}
    with pytest.raises(WaitForSignal) as caught:
        context.wait_signal("stop", prompt="may it?", timeout=60)
    assert (caught.value.name, caught.value.prompt, caught.value.timeout) == ("stop", "may it?", 60)
    view = context.workflow
    assert (view.id, view.step_id, view.index, view.series, view.total) == ("w", "last", 2, 3, 4)
    assert (view.results, view.result("a"), view.result("b")) == ({"a": 1, "b": None}, 1, None)
    with pytest.raises(WorkflowError, match="step last of workflow w knows nothing of step 'zz'"):
        view.result("zz")
    with pytest.raises(WorkflowError, match="no step of a workflow, so no signal 'go' can reach it"):
        AgentContext(BaseTask("t", "work")).wait_signal("go")


async def test_who_calls_an_agent_may_say_what_is_around_it():
    agents, queue = AgentRegistry(), InMemoryTaskQueue("q", "g")

    async def work(task, ctx):
        return [ctx.workflow.id, ctx.task is task]

    agents.register("work", work)
    with serving(Services(queue, step=StepScope("w", 0))):
        assert await agents.call(BaseTask("t", "work")) == ["w", True]


# -- in a workflow


async def test_a_step_knows_its_workflow_and_tells_it(app):
    seen = []

    @app.agent
    async def fetch(url: str, ctx: AgentContext) -> dict:
        await ctx.workflow.set("lang", "en")
        await ctx.memory.set("note", "from fetch")
        await ctx.progress(0.5, "half")
        await ctx.emit("found", [1])
        return {"rows": [url]}

    @app.agent
    async def write(rows: list, ctx: AgentContext) -> str:
        view = ctx.workflow
        seen.append((view.id, view.step_id, view.index, view.total, view.input, view.context["lang"]))
        seen.append((view.results, ctx.log.extra["step"], await ctx.memory.get("note")))
        child = await ctx.submit("echo", {"n": 1})
        seen.append((child.id, await child.result(timeout=20)))
        answer = ctx.wait_signal("approve", prompt="print it?")
        return f"{rows} {answer}"

    @app.agent
    async def echo(n: int) -> int:
        return n

    engine = WorkflowEngine(memory_of(app))
    driver = Driver(engine, app.queue)
    plan = [
        {"id": "get", "action": "fetch", "args": {"url": {"$ref": "input.url"}}},
        {"id": "put", "action": "write", "args": {"rows": {"$ref": "get.rows"}}},
    ]
    async with app.worker(), asyncio.timeout(60):
        workflow = await driver.start("report", {"url": "u"}, plan=plan)
        async for event in engine.events(workflow, follow=True):
            if event.kind == "step.waiting":
                await driver.signal(workflow, "approve", "yes")
        state = await engine.wait_end(workflow, 30)
    assert state.status is TaskState.COMPLETED
    assert state.workflow_context["final_output"] == "['u'] yes"
    assert seen[:2] == [
        (workflow, "put", 1, 2, {"url": "u"}, "en"),
        ({"get": {"rows": ["u"]}}, "put", "from fetch"),
    ]
    assert seen[2] == (f"{workflow}:1/1", 1)
    assert seen[5] == seen[2], "the step that was parked began anew, its child did not"
    told = [(event.kind, event.data, event.step) async for event in engine.events(workflow)]
    assert ("progress", {"fraction": 0.5, "message": "half"}, 0) in told
    assert ("agent.found", [1], 0) in told
