"""Workflows whose steps travel through the queue: graphs, conditions, failures, waits, children; any worker runs them."""

from __future__ import annotations

import asyncio

import pytest

from orchestra._delivery import STEP
from orchestra._workflow import redis_store, twin
from orchestra._workflow.runner import StepRunner
from orchestra._workflow.upkeep import sweep
from orchestra.dispatcher import Dispatcher
from orchestra.errors import (
    ConfigurationError,
    Reject,
    RetryLater,
    Throttled,
    WaitForSignal,
    WorkerPoolError,
    WorkflowError,
)
from orchestra.memory import MemoryManager
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.orchestrator import Orchestrator
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Outcome, Retry, TaskState
from orchestra.workflow import StepState
from tests.integration.noting import Agents

QUICK = {"max_retries": 2, "base": 0.001, "max_delay": 0.002}
TASK = {"type": "report", "input": {"q": 1}, "metadata": {"tenant": "acme"}}


@pytest.fixture
async def pool():
    pool = QueueWorkerPool("steps", OrchestrationWorkerPoolConfig(workers=8))
    yield pool
    await pool.shutdown(wait=False)


@pytest.fixture
async def make(place, pool):
    queue, memory = place

    def orchestrator(agents, **options):
        return Orchestrator(queue, memory, pool, agents=agents, **{"sweep": 0.1, **options})

    yield orchestrator
    await queue.close()


async def run(orchestrator, plan, task=TASK, seconds=20.0):
    """The ended workflow of ``plan``."""
    workflow_id = await orchestrator.start({"id": "t1", **task}, plan)
    return await orchestrator.wait(workflow_id, seconds)


def states(state):
    return [step.state.value for step in state.steps]


# -- the way of a step


async def test_a_planned_task_runs_through_the_queue(make, place):
    plan = [{"action": "fetch", "args": {"n": 1}, "reasoning": "first"}, {"action": "think"}, {"action": "tell"}]
    agents = Agents(planner=plan, fetch={"rows": 3}, think="thought", tell=lambda t: f"told {t.input}")
    orchestrator = make(agents)
    await orchestrator.process_incoming_task("t1", TASK)
    state = await orchestrator.workflow_engine.load_workflow_state("t1")
    assert (state.status, state.driven) == (TaskState.COMPLETED, True)
    assert state.workflow_context == {"plan_source": "planner", "final_output": "told {'q': 1}"}
    _, fetch, think, tell = agents.seen
    assert (fetch.id, fetch.type, fetch.input, fetch.attempt) == (f"t1:0:{state.task['life']}", "fetch", {"n": 1}, 1)
    assert think.input == {"q": 1}, "a step without args gets the task's input"
    assert tell.metadata["tenant"] == "acme"
    assert tell.metadata["workflow"] == {"task_id": "t1", "step_index": 2, "total": 3, "reasoning": ""}
    assert tell.metadata["context"]["results"] == [{"rows": 3}, "thought"]
    assert tell.metadata["context"]["task"] == {"id": "t1", "type": "report", "input": {"q": 1}}
    assert tell.metadata["context"]["shared"] == {"plan_source": "planner"}
    stats = await place[0].stats()
    assert (stats.live, stats.dead, stats.adds_up) == (0, 0, True)


async def test_ready_steps_of_a_graph_run_at_once(make):
    both = asyncio.Barrier(2)
    agents = Agents(meet=lambda t: both.wait(), sum=lambda t: t.input["of"])
    plan = [
        {"id": "a", "action": "meet", "depends_on": []},
        {"id": "b", "action": "meet"},
        {"id": "c", "action": "sum", "args": {"of": [{"$ref": "a"}, {"$ref": "b"}, {"$ref": "input.q"}]}},
    ]
    state = await run(make(agents), plan)
    assert state.status is TaskState.COMPLETED
    assert sorted(state.steps[2].result[:2]) == [0, 1]
    assert state.workflow_context["final_output"][2] == 1


async def test_steps_may_run_in_any_worker(make, place, pool):
    queue, _ = place
    agents = Agents(work=lambda t: t.metadata["workflow"]["step_index"])
    other = Agents()
    async with Dispatcher(queue, agents=agents):
        state = await run(make(other, serve=False), [{"action": "work"}] * 3)
    assert [step.result for step in state.steps] == [0, 1, 2]
    assert not other.seen


async def test_many_workflows_at_once(make):
    agents = Agents(work=lambda t: t.input["n"])
    orchestrator = make(agents)
    plan = [{"action": "work", "args": {"n": {"$ref": "input.n"}}}, {"action": "work", "args": {"n": {"$ref": "0"}}}]
    orchestrator.register_template("report", plan)
    ids = [f"w{number}" for number in range(40)]
    await asyncio.gather(*(orchestrator.process_incoming_task(i, {"type": "report", "input": {"n": i}}) for i in ids))
    for name in ids:
        state = await orchestrator.workflow_engine.load_workflow_state(name)
        assert state.workflow_context["final_output"] == name
    assert agents.runs()["work"] == 80
    assert orchestrator._dispatcher is None, "it rests when nobody waits"


# -- conditions and failures


async def test_a_false_condition_skips_and_what_depends_on_it_follows(make):
    agents = Agents(check={"ok": False}, work=1)
    plan = [
        {"id": "check", "action": "check"},
        {"id": "yes", "action": "work", "when": {"$ref": "check.ok"}, "depends_on": ["check"]},
        {"id": "after", "action": "work", "depends_on": ["yes"]},
        {"id": "no", "action": "work", "when": {"not": {"$ref": "check.ok"}}},
    ]
    state = await run(make(agents), plan)
    assert (state.status, states(state)) == (TaskState.COMPLETED, ["completed", "skipped", "skipped", "completed"])
    assert agents.runs()["work"] == 1


@pytest.mark.parametrize(
    ("policy", "status", "expected"),
    [
        ("fail", TaskState.FAILED, ["failed", "skipped"]),
        ("skip", TaskState.COMPLETED, ["skipped", "completed"]),
        ("continue", TaskState.COMPLETED, ["failed", "completed"]),
    ],
)
async def test_policies_of_failure(make, policy, status, expected):
    agents = Agents(bad=ValueError("no rows"), work=lambda t: t.input)
    plan = [
        {"action": "bad", "on_failure": policy},
        {"action": "work", "args": {"error": {"$ref": "0.$error.message"}}},
    ]
    state = await run(make(agents), plan)
    assert (state.status, states(state)) == (status, expected)
    error = state.steps[0].error
    assert (error["type"], error["message"], error["reason"], error["attempts"]) == (
        "ValueError",
        "no rows",
        "failed",
        1,
    )
    if policy == "fail":
        assert (state.error["message"], state.error["step_index"], state.error["action"]) == ("no rows", 0, "bad")
    else:
        assert state.workflow_context["final_output"] == {"error": "no rows"}


async def test_the_retry_of_a_step_goes_before_that_of_its_agent(make):
    agents = Agents()
    agents.answer("flaky", lambda t: ValueError("again") if t.attempt < 3 else t.attempt, retry=Retry(max_retries=0))
    state = await run(make(agents), [{"action": "flaky", "retry": QUICK}])
    assert (state.status, state.steps[0].result, state.steps[0].attempt) == (TaskState.COMPLETED, 3, 3)
    kinds = [event.kind async for event in make(agents).workflow_engine.events("t1")]
    assert kinds.count("step.retrying") == 2


async def test_an_agents_own_retry_counts_for_steps(make):
    agents = Agents()
    retry = Retry(max_retries=1, base=0.001, max_delay=0.001)
    agents.answer("flaky", lambda t: ValueError("again") if t.attempt < 2 else "at last", retry=retry)
    assert (await run(make(agents), [{"action": "flaky"}])).steps[0].result == "at last"


@pytest.mark.parametrize("error", [Throttled(0.01), RetryLater(0.01)])
async def test_a_throttled_step_comes_back(make, error):
    answers = [error, "at last"]
    agents = Agents(work=lambda t: answers.pop(0))
    state = await run(make(agents), [{"action": "work", "retry": 1}])
    assert (state.status, state.steps[0].result) == (TaskState.COMPLETED, "at last")
    assert state.steps[0].attempt == (1 if isinstance(error, Throttled) else 2)


async def test_a_limiter_delays_a_step_and_fails_nothing(make):
    class Once:
        interval = 0.01
        asked = 0

        async def try_acquire(self, priority=0, cost=1):
            self.asked += 1
            return type("Answer", (), {"allowed": self.asked > 1, "retry_after": 0.01})()

    agents, limiter = Agents(), Once()
    agents.answer("work", 1, limiter=limiter, cost=3)
    state = await run(make(agents), [{"action": "work"}])
    assert (state.status, limiter.asked, len(agents.seen)) == (TaskState.COMPLETED, 2, 1)


async def test_compensation_in_reverse_order(make):
    agents = Agents(do=lambda t: t.input["n"], undo=lambda t: t.input["of"], bad=Reject("never"))
    undo = {"action": "undo", "args": {"of": {"$ref": "b"}}}
    plan = [
        {"id": "a", "action": "do", "args": {"n": 1}, "compensate": {"action": "undo", "args": {"of": {"$ref": "a"}}}},
        {"id": "b", "action": "do", "args": {"n": 2}, "compensate": undo},
        {"id": "c", "action": "bad"},
    ]
    state = await run(make(agents), plan)
    assert state.status is TaskState.FAILED
    assert [task.input["of"] for task in agents.seen if task.type == "undo"] == [2, 1]
    assert [step.role for step in state.steps] == ["", "", "", "compensation", "compensation"]
    assert (state.error["type"], state.error["reason"]) == ("Reject", "rejected")


# -- what agents may do wrong


async def test_a_missing_agent_is_a_recorded_failure_that_names_it(make, place):
    state = await run(make(Agents(other=1)), None)
    assert state.workflow_context["plan_source"] == "single_step"
    error = state.error
    assert (state.status, error["type"], error["code"]) == (TaskState.FAILED, "UnknownAgentError", "unknown_agent")
    assert "'report'" in error["message"]
    assert "other" in error["message"]
    assert (await place[0].stats()).dead == 0, "the record holds the failure"


@pytest.mark.parametrize(
    ("result", "error", "said"),
    [
        (object(), "InvalidTaskTypeError", "result of step 0"),
        ("x" * (10 << 20), "TaskTooLargeError", "result of step 0"),
        (float, "InvalidTaskTypeError", "result of step 0"),
    ],
    ids=["object", "10 MiB", "class"],
)
async def test_a_result_that_cannot_be_recorded(make, result, error, said):
    state = await run(make(Agents(report=lambda t: result)), None)
    assert (state.status, state.error["type"], states(state)) == (TaskState.FAILED, error, ["failed"])
    assert said in state.error["message"]


async def test_an_agent_that_hangs(make):
    agents = Agents()
    agents.answer("report", lambda t: asyncio.Event().wait(), timeout=0.05)
    state = await run(make(agents), None)
    assert (state.status, state.error["type"], state.error["reason"]) == (TaskState.FAILED, "TimeoutError", "timed_out")
    assert "timeout of 0.05 s" in state.error["message"]


async def test_the_timeout_of_a_step_goes_before_that_of_its_agent(make):
    agents = Agents()
    agents.answer("report", lambda t: asyncio.Event().wait(), timeout=60)
    state = await run(make(agents), [{"action": "report", "timeout": 0.05}])
    assert "timeout of 0.05 s" in state.error["message"]


async def test_a_reference_that_leads_nowhere_fails_its_step_and_names_it(make):
    agents = Agents(fetch={"rows": 3}, work=1)
    state = await run(make(agents), [{"action": "fetch"}, {"action": "work", "args": {"n": {"$ref": "0.lines"}}}])
    assert (state.status, states(state)) == (TaskState.FAILED, ["completed", "failed"])
    assert "0.lines" in state.error["message"]
    assert "rows" in state.error["message"]
    assert not agents.runs()["work"]


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        ([], "got 0 steps"),
        ([{"action": "nobody"}], "nobody"),
        (
            [{"id": "a", "action": "work", "depends_on": ["b"]}, {"id": "b", "action": "work", "depends_on": ["a"]}],
            "a → b",
        ),
        ([{"action": "orchestra.unknown"}], "orchestra.unknown"),
        ([{"action": "work", "args": {"n": {"$ref": "gone"}}}], "gone"),
    ],
)
async def test_a_bad_plan_is_refused_before_anything_runs(make, plan, fault):
    orchestrator = make(Agents(work=1))
    with pytest.raises(WorkflowError, match=fault) as caught:
        await orchestrator.start({"id": "t1", **TASK}, plan)
    assert caught.value.faults
    assert await orchestrator.workflow_engine.load_workflow_state("t1") is None


# -- waiting without a worker


async def test_a_sleep_holds_no_worker(make, pool):
    agents = Agents(work=lambda t: t.input)
    plan = [{"action": "orchestra.sleep", "args": {"seconds": 0.2}}, {"action": "work"}]
    orchestrator = make(agents)
    began = asyncio.get_running_loop().time()
    state = await run(orchestrator, plan)
    assert (state.status, states(state)) == (TaskState.COMPLETED, ["completed"] * 2)
    assert asyncio.get_running_loop().time() - began >= 0.2


async def waiting(orchestrator, index=0):
    """The workflow when a step of it waits."""
    async with asyncio.timeout(10):
        while True:
            state = await orchestrator.workflow_engine.load_workflow_state("t1")
            if state is not None and state.steps[index].state is StepState.WAITING:
                return state
            await asyncio.sleep(0.01)


async def test_a_signal_gives_its_value_to_the_step_that_waits(make):
    agents = Agents(work=lambda t: t.input["said"])
    plan = [
        {"id": "ask", "action": "orchestra.signal", "args": {"name": "approve", "prompt": "well?"}},
        {"action": "work", "args": {"said": {"$ref": "ask"}}},
    ]
    orchestrator = make(agents)
    running = asyncio.create_task(run(orchestrator, plan))
    state = await waiting(orchestrator)
    assert (state.steps[0].waiting["name"], state.steps[0].waiting["prompt"]) == ("approve", "well?")
    assert await orchestrator.signal("t1", "approve", {"yes": True}) is True
    assert (await running).workflow_context["final_output"] == {"yes": True}
    assert await orchestrator.signal("t1", "approve", "later") is False


async def test_a_signal_may_come_first(make):
    orchestrator = make(Agents(work=lambda t: t.input["said"]), serve=False)
    plan = [{"action": "work", "args": {"said": 1}}, {"action": "orchestra.signal", "args": {"name": "go"}}]
    await orchestrator.start({"id": "t1", **TASK}, plan)
    assert await orchestrator.signal("t1", "go", "early") is True
    other = make(orchestrator.agents)
    state = await other.wait("t1", 20)
    assert state.workflow_context["final_output"] == "early"


async def test_a_signal_that_does_not_come_in_time(make):
    plan = [{"action": "orchestra.signal", "args": {"name": "go", "timeout": 0.1}, "on_failure": "continue"}]
    state = await run(make(Agents()), plan)
    assert (states(state), state.steps[0].error["type"]) == (["failed"], "SignalTimeout")


async def test_an_agent_may_wait_for_a_signal(make):
    from orchestra.agents import current_context

    def ask(task):
        signals = current_context().signals
        if "name" not in signals:
            raise WaitForSignal("name", prompt="who?")
        return f"hello {signals['name']}"

    agents = Agents(ask=ask)
    orchestrator = make(agents)
    running = asyncio.create_task(run(orchestrator, [{"action": "ask"}]))
    state = await waiting(orchestrator)
    assert state.steps[0].waiting["prompt"] == "who?"
    await orchestrator.signal("t1", "name", "Ada")
    assert (await running).workflow_context["final_output"] == "hello Ada"
    life = state.task["life"]
    assert [task.id for task in agents.seen] == [f"t1:0:{life}", f"t1:0:{life}.2"]


async def test_an_agent_that_asks_again_for_the_signal_it_was_given_fails(make):
    """It would be run again at once, for ever."""
    agents = Agents(ask=WaitForSignal("name"))
    orchestrator = make(agents)
    running = asyncio.create_task(run(orchestrator, [{"action": "ask"}]))
    await waiting(orchestrator)
    await orchestrator.signal("t1", "name", "Ada")
    state = await running
    assert (states(state), state.steps[0].error["type"]) == (["failed"], "WaitForSignal")
    assert len(agents.seen) == 2


async def test_outside_of_a_workflow_waiting_for_a_signal_is_a_failure(place):
    queue, _ = place
    agents = Agents(ask=WaitForSignal("name"))
    async with Dispatcher(queue, agents=agents, default_max_retries=0) as dispatcher:
        await queue.produce({"type": "ask"})
        async with asyncio.timeout(10):
            while not dispatcher.outcomes[Outcome.FAILED]:
                await asyncio.sleep(0.01)
    assert await queue.get_dlq_depth() == 1
    await queue.close()


# -- fan-out and children


async def test_a_map_gathers_its_results_in_order(make):
    agents = Agents(list=[3, 1, 2], square=lambda t: t.input["n"] ** 2)
    plan = [
        {"id": "list", "action": "list"},
        {
            "id": "each",
            "action": "orchestra.map",
            "args": {
                "over": {"$ref": "list"},
                "step": {"action": "square", "args": {"n": {"$ref": "item"}}},
                "max_parallel": 2,
            },
        },
    ]
    state = await run(make(agents), plan)
    assert state.workflow_context["final_output"] == [9, 1, 4]
    assert [step.role for step in state.steps] == ["", "", "item", "item", "item"]


async def test_a_map_over_nothing(make):
    plan = [{"action": "orchestra.map", "args": {"over": [], "step": {"action": "work"}}}]
    assert (await run(make(Agents(work=1)), plan)).workflow_context["final_output"] == []


async def test_items_that_fail_or_are_left_out_are_null(make):
    agents = Agents(work=lambda t: ValueError("odd") if t.input["n"] % 2 else t.input["n"])
    step = {
        "action": "work",
        "args": {"n": {"$ref": "item"}},
        "when": {"ne": [{"$ref": "item"}, 4]},
        "on_failure": "continue",
    }
    plan = [{"action": "orchestra.map", "args": {"over": [1, 2, 4], "step": step}}]
    assert (await run(make(agents), plan)).workflow_context["final_output"] == [None, 2, None]


async def test_a_child_workflow(make):
    agents = Agents(work=lambda t: t.input["n"] + 1)
    child = [{"action": "work", "args": {"n": {"$ref": "input.n"}}}, {"action": "work", "args": {"n": {"$ref": "0"}}}]
    plan = [
        {"id": "first", "action": "work", "args": {"n": 1}},
        {"id": "kid", "action": "orchestra.workflow", "args": {"plan": child, "input": {"n": {"$ref": "first"}}}},
        {"action": "work", "args": {"n": {"$ref": "kid"}}},
    ]
    orchestrator = make(agents)
    state = await run(orchestrator, plan)
    assert state.workflow_context["final_output"] == 5
    kid = await orchestrator.workflow_engine.load_workflow_state("t1/1")
    assert (kid.status, tuple(kid.parent)) == (TaskState.COMPLETED, ("t1", 1))


async def test_a_child_by_type_is_planned(make):
    orchestrator = make(Agents(work=lambda t: t.input))
    orchestrator.register_template("sub", [{"action": "work"}])
    plan = [{"action": "orchestra.workflow", "args": {"type": "sub", "input": 7}}]
    assert (await run(orchestrator, plan)).workflow_context["final_output"] == 7


async def test_a_child_that_fails_fails_its_parent(make):
    plan = [{"action": "orchestra.workflow", "args": {"plan": [{"action": "bad"}]}}]
    state = await run(make(Agents(bad=ValueError("no"))), plan)
    assert (state.status, state.error["type"]) == (TaskState.FAILED, "ChildWorkflow")


# -- steering


async def test_cancel_interrupts_what_runs(make):
    ended = []

    async def wait():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    agents = Agents(wait=lambda t: wait(), work=1)
    orchestrator = make(agents)
    running = asyncio.create_task(run(orchestrator, [{"action": "wait"}, {"action": "work"}]))
    async with asyncio.timeout(10):
        while not agents.seen:
            await asyncio.sleep(0.01)
    assert await orchestrator.cancel("t1", "enough") is True
    state = await running
    assert (state.status, states(state), ended) == (TaskState.CANCELLED, ["skipped", "skipped"], [True])
    assert not agents.runs()["work"]


async def test_a_cancelled_parent_cancels_its_child(make):
    agents = Agents(wait=lambda t: asyncio.Event().wait())
    orchestrator = make(agents)
    plan = [{"action": "orchestra.workflow", "args": {"plan": [{"action": "wait"}]}}]
    running = asyncio.create_task(run(orchestrator, plan))
    async with asyncio.timeout(10):
        while not agents.seen:
            await asyncio.sleep(0.01)
    await orchestrator.cancel("t1")
    assert (await running).status is TaskState.CANCELLED
    kid = await orchestrator.wait("t1/0", 10)
    assert kid.status is TaskState.CANCELLED


async def test_pause_holds_and_resume_releases(make):
    go = asyncio.Event()
    agents = Agents(wait=lambda t: go.wait(), work="done")
    orchestrator = make(agents)
    running = asyncio.create_task(run(orchestrator, [{"action": "wait"}, {"action": "work"}]))
    async with asyncio.timeout(10):
        while not agents.seen:
            await asyncio.sleep(0.01)
        assert await orchestrator.pause("t1") is True
        go.set()
        while True:
            state = await orchestrator.workflow_engine.load_workflow_state("t1")
            if state.steps[0].state is StepState.COMPLETED:
                break
            await asyncio.sleep(0.01)
        await sweep(orchestrator._driver)
        assert (state.phase, states(state)) == ("paused", ["completed", "pending"])
        assert await orchestrator.resume("t1") is True
        assert (await running).workflow_context["final_output"] == "done"


async def test_resume_of_a_failed_workflow_sends_the_failed_step_again(make):
    answers = [ValueError("once"), "now"]
    agents = Agents(a=1, b=lambda t: answers.pop(0))
    orchestrator = make(agents)
    state = await run(orchestrator, [{"action": "a"}, {"action": "b"}])
    assert state.status is TaskState.FAILED
    assert await orchestrator.resume("t1") is True
    state = await orchestrator.wait("t1", 20)
    assert (state.status, state.steps[1].series, agents.runs()) == (TaskState.COMPLETED, 2, {"a": 1, "b": 2})


# -- what crashes leave behind


async def test_what_was_not_sent_is_sent_by_the_sweep(make, place, monkeypatch):
    for store in (redis_store, twin):
        monkeypatch.setattr(store, "GRACE_MS", 50)
    queue, _ = place
    agents = Agents(work=1)
    orchestrator = make(agents, serve=False)
    produce = queue.produce_many
    queue.produce_many = lambda tasks: asyncio.sleep(0, [])
    await orchestrator.start({"id": "t1", **TASK}, [{"action": "work"}])
    queue.produce_many = produce
    assert await queue.get_queue_depth() == 0
    assert (await make(agents).wait("t1", 20)).status is TaskState.COMPLETED


async def test_a_dead_letter_that_is_a_step_fails_it(make, place):
    queue, _ = place
    orchestrator = make(Agents(work=1), serve=False)
    await orchestrator.start({"id": "t1", **TASK}, [{"action": "work"}])
    (found,) = await queue.consume("somebody", 1, 2000)
    message_id, task = found
    assert task["metadata"][STEP][:4] == ["wf", "t1", 0, 1]
    assert await queue.add_to_dlq(message_id, task, {"error": "it crashed", "reason": "crashed"})
    state = await make(Agents(work=1)).wait("t1", 20)
    assert (state.status, state.error["message"], states(state)) == (TaskState.FAILED, "it crashed", ["failed"])


async def test_a_second_delivery_of_a_committed_step_runs_nothing(make, place):
    queue, memory = place
    agents = Agents(work=1)
    orchestrator = make(agents)
    await run(orchestrator, [{"action": "work"}])
    await queue.produce({"type": "work", "metadata": {STEP: [memory.namespace, "t1", 0, 1, ":0"]}})
    async with Dispatcher(queue, agents=agents) as dispatcher:
        async with asyncio.timeout(10):
            while not dispatcher.outcomes[Outcome.COMPLETED]:
                await asyncio.sleep(0.01)
    assert agents.runs()["work"] == 1


@pytest.mark.parametrize(
    "where", [["wf", "gone", 0, 1, ":0"], ["wf", "t1", 7, 1, ":0"], ["bad name", "t1", 0, 1, ":0"], "nonsense"]
)
async def test_a_task_that_names_no_step_runs_nothing(place, where):
    queue, _ = place
    agents = Agents(work=1)
    await queue.produce({"type": "work", "metadata": {STEP: where}})
    async with Dispatcher(queue, agents=agents) as dispatcher:
        async with asyncio.timeout(10):
            while not sum(dispatcher.outcomes.values()):
                await asyncio.sleep(0.01)
    assert not agents.seen
    assert (await queue.stats()).live == 0
    await queue.close()


async def test_a_call_that_is_cancelled_leaves_the_workflow_to_the_next(make):
    agents = Agents(first=1, wait=lambda t: asyncio.Event().wait())
    orchestrator = make(agents)
    orchestrator.register_template("report", [{"action": "first"}, {"action": "wait"}])
    running = asyncio.create_task(orchestrator.process_incoming_task("t1", TASK))
    async with asyncio.timeout(10):
        while not agents.runs()["wait"]:
            await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    agents.answer("wait", "now")
    await orchestrator.process_incoming_task("t1", TASK)
    state = await orchestrator.workflow_engine.load_workflow_state("t1")
    assert (state.status, agents.runs()["first"]) == (TaskState.COMPLETED, 1)


async def test_a_pool_that_is_shut_down_is_told(make, pool):
    agents = Agents(wait=lambda t: asyncio.Event().wait())
    orchestrator = make(agents)
    orchestrator.register_template("report", [{"action": "wait"}])
    running = asyncio.create_task(orchestrator.process_incoming_task("t1", TASK))
    async with asyncio.timeout(10):
        while not agents.seen:
            await asyncio.sleep(0.01)
    await pool.shutdown(wait=False)
    with pytest.raises(WorkerPoolError, match="shut down"):
        await running
    state = await orchestrator.workflow_engine.load_workflow_state("t1")
    assert not state.is_finished()


async def test_a_guest_gives_back_what_it_has_no_agent_for(make, place):
    queue, _ = place
    agents = Agents(work=lambda t: asyncio.sleep(0.05))
    await queue.produce({"id": "plain", "type": "somebody-elses"})
    await run(make(agents), [{"action": "work"}])
    assert await queue.get_dlq_depth() == 0
    assert await queue.get_queue_depth() == 1


# -- planning


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (RuntimeError("model is down"), "model is down"),
        ("no plan", "expected a list"),
        ([{"action": "nobody"}], "nobody"),
        ([{"action": "work", "depends_on": ["x"]}], "'x'"),
        ({"plan": []}, "got 0 steps"),
        (object(), "expected a list"),
        ([{"action": "work"}] * 10_001, "got 10001 steps"),
        ([{"action": "work", "args": {"x": {1}}}], "step 0 of the plan.args.x: a set does not travel"),
        ([{"action": "work", "note": 2**70}], "step 0 of the plan.note: an int must be"),
        ([{"action": "work", "reasoning": "r" * 2_000_000}], "larger than the memory's limit"),
        (SystemExit(3), "raised SystemExit(3), which is no Exception"),
        (asyncio.CancelledError(), "raised CancelledError(), which is no Exception"),
        (GeneratorExit(), "raised GeneratorExit(), which is no Exception"),
    ],
    ids=range(13),
)
async def test_bad_planner_output_falls_back_to_the_alternate(make, answer, said):
    agents = Agents(planner=answer, second=[{"action": "work"}], work=2)
    orchestrator = make(agents, planner=("planner", "second"))
    await orchestrator.process_incoming_task("t1", TASK)
    state = await orchestrator.workflow_engine.load_workflow_state("t1")
    context = state.workflow_context
    assert (context["plan_source"], context["planner"], context["final_output"]) == ("alternate", "second", 2)
    assert said in context["planner_error"]["message"]


async def test_a_template_that_cannot_be_recorded_is_told_and_the_task_is_its_own_step(make):
    orchestrator = make(Agents(report=2))
    orchestrator.register_template("report", lambda task: [{"action": "report", "args": {"x": 2**70}}])
    await orchestrator.process_incoming_task("t1", TASK)
    context = (await orchestrator.workflow_engine.load_workflow_state("t1")).workflow_context
    assert (context["plan_source"], context["final_output"]) == ("single_step", 2)
    assert "step 0 of the plan.args.x" in context["template_error"]["message"]


async def test_all_planners_down_the_template_then_one_step(make):
    agents = Agents(planner=ValueError("a"), second=ValueError("b"), work=1, report=2)
    orchestrator = make(agents, planner=("planner", "second"))
    orchestrator.register_template("templated", [{"action": "work"}])
    for task_id, kind, source in (("x", "templated", "template"), ("y", "report", "single_step")):
        await orchestrator.process_incoming_task(task_id, {"type": kind})
        context = (await orchestrator.workflow_engine.load_workflow_state(task_id)).workflow_context
        assert context["plan_source"] == source
        assert [error["message"] for error in context["planner_errors"].values()] == ["a", "b"]


async def test_a_workflow_may_be_planned_by_a_worker(place):
    from orchestra._workflow.driver import Driver
    from orchestra.workflow import WorkflowEngine

    queue, memory = place
    agents = Agents(plans=[{"action": "work"}], work=lambda t: t.input)
    engine = WorkflowEngine(memory)
    runner = StepRunner(engine, queue, agents=agents, planner="plans", sweep=0.1)
    driver = Driver(engine, queue, planner="plans")
    name = await driver.start("report", {"q": 5}, metadata={"tenant": "acme"})
    state = await engine.load_workflow_state(name)
    assert [(step.action, step.state) for step in state.steps] == [("orchestra.plan", StepState.PENDING)]
    async with Dispatcher(queue, agents=agents, workflows=runner):
        state = await engine.wait_end(name, 20)
    assert (state.workflow_context["final_output"], state.workflow_context["plan_source"]) == ({"q": 5}, "planner")
    assert agents.seen[1].metadata["tenant"] == "acme"
    await queue.close()


async def test_without_a_queue_there_is_nothing_to_steer(place, pool):
    orchestrator = Orchestrator(None, place[1], pool, agents=Agents())
    with pytest.raises(ConfigurationError, match="task_queue"):
        await orchestrator.signal("t1", "go")
    with pytest.raises(WorkflowError, match=r"orchestra\.sleep needs a queue"):
        await orchestrator.start({"id": "t1", **TASK}, [{"action": "orchestra.sleep", "args": {"seconds": 1}}])


# -- cancelling at awkward moments


async def test_cancelled_while_it_begins_a_step_is_recorded_as_skipped(make):
    orchestrator = make(Agents(work=1))
    engine, begun = orchestrator._runner.driver("wf").engine, asyncio.Event()
    begin = engine.begin

    async def slow(*args):
        result = await begin(*args)
        begun.set()
        await asyncio.sleep(0 if result.verdict != "go" else 3600)
        return result

    engine.begin = slow
    running = asyncio.create_task(run(orchestrator, [{"action": "work"}]))
    async with asyncio.timeout(10):
        await begun.wait()
    await orchestrator.cancel("t1")
    state = await running
    assert (state.status, states(state)) == (TaskState.CANCELLED, ["skipped"])
    assert not orchestrator.agents.seen


async def test_a_cancelled_workflow_ends_although_the_process_of_its_step_is_gone(manager, pool):
    queue = RedisStreamTaskQueue("wf", "workers", 300, manager=manager)
    agents = Agents(work=1)
    orchestrator = Orchestrator(
        queue, MemoryManager(manager, namespace="wf"), pool, agents=agents, serve=False, sweep=0.1
    )
    await orchestrator.start({"id": "t1", **TASK}, [{"action": "work"}])
    gone = RedisStreamTaskQueue("wf", "workers", 300, manager=manager)
    (delivery,) = await gone.read("gone", 1, 2000)
    assert (await orchestrator.workflow_engine.begin("t1", 0, 1, delivery.fence)).verdict == "go"
    await gone.close()
    await orchestrator.cancel("t1")
    async with Dispatcher(queue, agents=agents):
        state = await orchestrator.wait("t1", 20)
    assert (state.status, states(state)) == (TaskState.CANCELLED, ["skipped"])
    assert not agents.seen
    await queue.close()


async def test_args_that_the_agent_does_not_take_fail_the_step_before_it_runs(make):
    from orchestra import App

    app = App("checked", "memory:")
    ran = []

    @app.agent
    async def fetch(url: str) -> str:
        ran.append(url)
        return url

    state = await run(make(app.agents), [{"id": "f", "action": "fetch", "args": {"ur": "x"}}])
    assert (state.status, ran) == (TaskState.FAILED, [])
    assert "step f: " in state.error["message"]
    assert "'ur'" in state.error["message"]
