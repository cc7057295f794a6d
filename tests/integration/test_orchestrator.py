"""Orchestrator: from a task to a recorded end, through real agents, pool and store; rivals included."""

from __future__ import annotations

import asyncio

import pytest

from orchestra.circuit_breaker import CircuitBreakerConfig
from orchestra.connections import get_connection_manager
from orchestra.errors import (
    CircuitOpenError,
    ConfigurationError,
    InvalidTaskError,
    RetryLater,
    Throttled,
    WorkerPoolError,
    WorkflowError,
)
from orchestra.memory import MemoryManager, get_memory_manager
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.orchestrator import Orchestrator, get_orchestrator
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Retry, TaskState
from orchestra.workflow import StepState, WorkflowEngine, get_workflow_engine
from tests.integration.noting import Agents

TASK = {"id": "t1", "type": "report", "input": {"q": 1}, "metadata": {"tenant": "acme"}}

PLAN = [
    {"action": "fetch", "args": {"n": 1}, "reasoning": "first"},
    {"action": "think"},
    {"action": "tell", "args": {}},
]


@pytest.fixture(params=["redis", "memory"])
def memory(request):
    place = request.getfixturevalue("manager") if request.param == "redis" else "memory:"
    return MemoryManager(place, namespace="t")


@pytest.fixture
async def pool():
    pool = QueueWorkerPool("steps", OrchestrationWorkerPoolConfig(workers=4))
    yield pool
    await pool.shutdown(wait=False)


@pytest.fixture
def make(memory, pool):
    def orchestrator(agents, **options):
        return Orchestrator(None, memory, pool, agents=agents, **options)

    return orchestrator


@pytest.fixture
def load(memory):
    return lambda task_id="t1": WorkflowEngine(memory).load_workflow_state(task_id)


async def test_a_planned_task_runs_to_its_final_output(make, load):
    agents = Agents(planner=PLAN, fetch={"rows": 3}, think="thought", tell=lambda t: f"told {t.input}")
    await make(agents).process_incoming_task("t1", TASK)
    state = await load()
    assert state.status is TaskState.COMPLETED
    assert [step.result for step in state.steps] == [{"rows": 3}, "thought", "told {}"]
    assert state.workflow_context == {"plan_source": "planner", "final_output": "told {}"}
    assert [task.type for task in agents.seen] == ["planner", "fetch", "think", "tell"]


async def test_what_planner_and_agents_are_given(make):
    agents = Agents(planner={"plan": PLAN}, fetch={"rows": 3}, think="thought", tell="told")
    await make(agents).process_incoming_task("t1", TASK)
    planner, fetch, think, tell = agents.seen
    assert planner.input["task"] == {"id": "t1", "type": "report", "input": {"q": 1}}
    assert planner.input["agents"] == ["fetch", "planner", "tell", "think"]
    assert (fetch.id, fetch.type, fetch.input, fetch.attempt, fetch.fence) == ("t1:0", "fetch", {"n": 1}, 1, 1)
    assert think.input == {"q": 1}, "a step without args gets the task's input"
    assert tell.metadata["tenant"] == "acme"
    assert tell.metadata["workflow"] == {"task_id": "t1", "step_index": 2, "total": 3, "reasoning": ""}
    assert tell.metadata["context"]["results"] == [{"rows": 3}, "thought"]
    assert tell.metadata["context"]["task"]["input"] == {"q": 1}
    assert tell.metadata["context"]["shared"] == {"plan_source": "planner"}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (RuntimeError("model is down"), "model is down"),
        ("no plan", "expected a list"),
        ([{"action": ""}], "step 0: action"),
        ({"steps": PLAN}, "expected a list"),
        ([], "got 0 steps"),
    ],
)
async def test_planning_falls_back_to_the_template_and_says_why(make, load, answer, why):
    agents = Agents(planner=answer, fetch=1, report=2)
    orchestrator = make(agents)
    orchestrator.register_template("report", [{"action": "fetch"}])
    await orchestrator.process_incoming_task("t1", TASK)
    state = await load()
    assert (state.status, state.workflow_context["plan_source"]) == (TaskState.COMPLETED, "template")
    assert why in state.workflow_context["planner_error"]["message"]


async def test_a_template_may_be_a_function_of_the_task(make, load):
    orchestrator = make(Agents(fetch=lambda t: t.input["q"] + 1))
    orchestrator.register_template("report", lambda task: [{"action": "fetch", "args": task.input}] * 2)
    await orchestrator.process_incoming_task("t1", TASK)
    assert [step.result for step in (await load()).steps] == [2, 2]
    with pytest.raises(WorkflowError):
        orchestrator.register_template("report", [{}])


async def test_without_planner_and_template_the_task_is_its_own_step(make, load):
    agents = Agents(report=lambda task: task.input)
    await make(agents).process_incoming_task("t1", {**TASK, "input": "plain text"})
    state = await load()
    assert state.workflow_context == {"plan_source": "single_step", "final_output": "plain text"}


async def test_a_missing_agent_is_a_recorded_failure_that_names_it(make, load):
    await make(Agents(other=1)).process_incoming_task("t1", TASK)
    state = await load()
    assert state.is_finished()
    assert state.status is TaskState.FAILED
    assert state.error["type"] == "UnknownAgentError"
    assert state.error["code"] == "unknown_agent"
    assert "'report'" in state.error["message"]
    assert "other" in state.error["message"]
    assert (state.error["step_index"], state.error["action"]) == (0, "report")


async def test_an_agents_failure_is_recorded_and_ends_the_workflow(make, load):
    agents = Agents(planner=PLAN, fetch=1, think=ValueError("bad\ud800 thought"), tell=2)
    await make(agents).process_incoming_task("t1", TASK)
    state = await load()
    assert state.status is TaskState.FAILED
    assert state.error == {"type": "ValueError", "message": "bad? thought", "step_index": 1, "action": "think"}
    assert [step.state.value for step in state.steps] == ["completed", "failed", "skipped"]
    assert agents.runs()["tell"] == 0


@pytest.mark.parametrize(
    ("result", "error"), [(object(), "InvalidTaskTypeError"), ("x" * (2 << 20), "TaskTooLargeError")]
)
async def test_a_result_that_cannot_be_recorded_is_a_failure(make, load, result, error):
    await make(Agents(report=lambda t: result)).process_incoming_task("t1", TASK)
    state = await load()
    assert (state.status, state.error["type"]) == (TaskState.FAILED, error)
    assert "result of step 0 (report)" in state.error["message"]


async def test_an_agent_beyond_its_timeout_fails(make, load):
    agents = Agents()
    agents.answer("report", lambda t: asyncio.Event().wait(), timeout=0.02)
    await make(agents).process_incoming_task("t1", TASK)
    assert (await load()).error["message"] == "agent 'report' took longer than its timeout of 0.02 s"


async def test_an_ended_workflow_is_left_as_it_is(make, load):
    agents = Agents(report="once")
    orchestrator = make(agents)
    await orchestrator.process_incoming_task("t1", TASK)
    ended = await load()
    await orchestrator.process_incoming_task("t1", TASK)
    await make(Agents(report="other")).process_incoming_task("t1", TASK)
    assert await load() == ended
    assert agents.runs()["report"] == 1


async def test_concurrent_calls_for_one_task_run_it_once(make, load):
    agents = Agents(planner=PLAN, fetch=lambda t: asyncio.sleep(0, 1), think=1, tell=2)
    orchestrator = make(agents)
    await asyncio.gather(*(orchestrator.process_incoming_task("t1", TASK) for _ in range(5)))
    assert [task.type for task in agents.seen] == ["planner", "fetch", "think", "tell"]
    assert (await load()).status is TaskState.COMPLETED
    assert not orchestrator._turns


async def test_many_workflows_share_the_pool(make, load):
    agents = Agents(planner=PLAN, fetch=lambda t: asyncio.sleep(0, 1), think=1, tell=lambda t: t.id)
    orchestrator = make(agents)
    ids = [f"w{n}" for n in range(30)]
    await asyncio.gather(*(orchestrator.process_incoming_task(i, {"type": "report", "input": i}) for i in ids))
    for i in ids:
        assert (await load(i)).workflow_context["final_output"] == f"{i}:2"


@pytest.mark.parametrize("error", [Throttled(2.0), RetryLater(1.0)])
async def test_not_now_gives_the_step_back_and_tells_the_caller(make, load, error):
    answers = [error, "at last"]
    agents = Agents(planner=PLAN[:2], fetch=1, think=lambda t: answers.pop(0))
    orchestrator = make(agents)
    with pytest.raises(type(error)):
        await orchestrator.process_incoming_task("t1", TASK)
    state = await load()
    assert not state.is_finished()
    assert (state.steps[1].state, state.steps[1].attempt) == (StepState.PENDING, 1)
    await orchestrator.process_incoming_task("t1", TASK)
    state = await load()
    assert (state.status, state.steps[1].result, state.steps[1].attempt) == (TaskState.COMPLETED, "at last", 2)
    assert (agents.runs()["planner"], agents.runs()["fetch"]) == (1, 1)


async def test_a_throttled_planner_plans_later_instead_of_falling_back(make, load):
    answers = [Throttled(1.0), PLAN[:1]]
    orchestrator = make(Agents(planner=lambda t: answers.pop(0), fetch=1, report=2))
    with pytest.raises(Throttled):
        await orchestrator.process_incoming_task("t1", TASK)
    assert await load() is None
    await orchestrator.process_incoming_task("t1", TASK)
    assert (await load()).workflow_context["plan_source"] == "planner"


class _Refusing:
    async def try_acquire(self, priority=0, cost=1):
        self.asked = (priority, cost)
        return type("No", (), {"allowed": False, "retry_after": 4.5})()


async def test_a_refusing_limiter_throttles_the_step(make, load):
    agents, limiter = Agents(), _Refusing()
    agents.answer("report", 1, limiter=limiter, cost=3)
    with pytest.raises(Throttled) as caught:
        await make(agents).process_incoming_task("t1", {**TASK, "priority": 0})
    assert (caught.value.retry_after, limiter.asked, agents.seen) == (4.5, (3, 3), [])
    assert (await load()).steps[0].state is StepState.PENDING


async def test_an_open_breaker_spares_the_agent_and_fails_no_workflow(make, load):
    agents = Agents(report=ValueError("down"))
    orchestrator = make(agents, breaker=CircuitBreakerConfig(failure_threshold=2))
    for task_id in ("a", "b"):
        await orchestrator.process_incoming_task(task_id, {"type": "report"})
        assert (await load(task_id)).status is TaskState.FAILED
    with pytest.raises(CircuitOpenError):
        await orchestrator.process_incoming_task("c", {"type": "report"})
    assert agents.runs()["report"] == 2
    assert not (await load("c")).is_finished()


async def test_an_open_breaker_of_the_planner_means_the_fallback(make, load):
    agents = Agents(planner=ValueError("down"), report=1)
    orchestrator = make(agents, breaker=CircuitBreakerConfig(failure_threshold=1))
    for task_id in ("a", "b"):
        await orchestrator.process_incoming_task(task_id, {"type": "report"})
    assert agents.runs()["planner"] == 1
    state = await load("b")
    assert (state.status, state.workflow_context["planner_error"]["code"]) == (TaskState.COMPLETED, "circuit_open")


async def test_a_pool_that_is_shut_down_leaves_the_workflow_resumable(make, memory, load, pool):
    agents = Agents(planner=PLAN, fetch=1, think=lambda t: asyncio.Event().wait(), tell=2)
    running = asyncio.create_task(make(agents).process_incoming_task("t1", TASK))
    while not agents.runs()["think"]:
        await asyncio.sleep(0)
    await pool.shutdown(wait=False)
    with pytest.raises(WorkerPoolError, match="was it shut down"):
        await running
    assert (await load()).steps[1].state is StepState.PENDING
    with pytest.raises(WorkerPoolError):
        await make(agents).process_incoming_task("t1", TASK)
    other = QueueWorkerPool("other")
    agents.answer("think", "now")
    await Orchestrator(None, memory, other, agents=agents).process_incoming_task("t1", TASK)
    await other.shutdown()
    assert (await load()).status is TaskState.COMPLETED
    assert (agents.runs()["planner"], agents.runs()["fetch"]) == (1, 1)


async def test_a_cancelled_call_cancels_its_agent_and_can_be_resumed(make, load):
    ended = asyncio.Event()

    async def wait():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    agents = Agents(planner=PLAN, fetch=1, think=lambda t: wait(), tell=2)
    orchestrator = make(agents)
    running = asyncio.create_task(orchestrator.process_incoming_task("t1", TASK))
    while not agents.runs()["think"]:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    async with asyncio.timeout(30):
        await ended.wait()
    assert (await load()).steps[1].state is StepState.RUNNING
    agents.answer("think", "now")
    await orchestrator.process_incoming_task("t1", TASK)
    state = await load()
    assert (state.status, state.steps[1].attempt) == (TaskState.COMPLETED, 2)
    assert agents.runs()["fetch"] == 1


async def test_a_rival_that_takes_over_a_step_wins_and_the_first_is_told(make, memory, load):
    go = asyncio.Event()

    async def slow():
        await go.wait()
        return "zombie"

    first, second = Agents(report=lambda t: slow()), Agents(report="heir")
    zombie = asyncio.create_task(make(first).process_incoming_task("t1", TASK))
    while not first.runs()["report"]:
        await asyncio.sleep(0)
    await make(second).process_incoming_task("t1", TASK)
    go.set()
    with pytest.raises(WorkflowError, match="superseded"):
        await zombie
    state = await load()
    assert (state.steps[0].result, state.steps[0].attempt) == ("heir", 2)
    assert state.workflow_context["final_output"] == "heir"


async def test_when_two_plan_at_once_the_recorded_plan_counts(make, load):
    ready, agents = asyncio.Event(), Agents(fetch="fetched", think="thought")

    async def late():
        await ready.wait()
        return [{"action": "fetch"}]

    agents.answer("planner", lambda t: late())
    slow = asyncio.create_task(make(agents).process_incoming_task("t1", TASK))
    while not agents.runs()["planner"]:
        await asyncio.sleep(0)
    agents.answer("planner", [{"action": "think"}])
    await make(agents).process_incoming_task("t1", TASK)
    ready.set()
    await slow
    state = await load()
    assert [step.result for step in state.steps] == ["thought"]
    assert agents.runs()["fetch"] == 0


async def test_another_task_under_the_same_id_is_refused(make, load):
    orchestrator = make(Agents(report=1))
    await orchestrator.process_incoming_task("t1", {"type": "report", "input": {"a": 1, "b": (2,)}})
    await orchestrator.process_incoming_task("t1", {"type": "report", "input": {"b": [2], "a": 1}})
    for other in ({"type": "report", "input": {"a": 2}}, {"type": "other", "input": {"a": 1, "b": [2]}}):
        with pytest.raises(WorkflowError, match="another type or input"):
            await orchestrator.process_incoming_task("t1", other)


@pytest.mark.parametrize(
    ("task_id", "data"),
    [
        ("t1", None),
        ("t1", []),
        ("t1", {}),
        ("t1", {"type": ""}),
        ("t1", {"type": 5}),
        ("bad id", {"type": "report"}),
        (None, {"type": "report"}),
        ("t1", {"type": "report", "id": "t2"}),
        ("t1", {"type": "report", "priority": 4}),
        ("t1", {"type": "report", "priority": True}),
        ("t1", {"type": "report", "priority": "HIGH"}),
        ("t1", {"type": "report", "priority": []}),
        ("t1", {"type": "report", "metadata": [1]}),
        ("t1", {"type": "report", "input": {1, 2}}),
    ],
)
async def test_what_is_no_task_is_refused_and_not_recorded(make, load, task_id, data):
    with pytest.raises(InvalidTaskError):
        await make(Agents(report=1)).process_incoming_task(task_id, data)
    assert await load() is None


async def test_route_and_execute_step_runs_the_current_step_only(make, memory, load):
    agents = Agents(fetch=1, think=lambda t: t.metadata["context"]["results"], tell=ValueError("no"))
    orchestrator = make(agents)
    with pytest.raises(WorkflowError, match="no workflow"):
        await orchestrator.route_and_execute_step("t1", 0)
    from orchestra.tasks import BaseTask

    await orchestrator.workflow_engine.initialize_workflow(BaseTask("t1", "report"), PLAN)
    with pytest.raises(WorkflowError, match="must wait for step 0"):
        await orchestrator.route_and_execute_step("t1", 1)
    for wrong in (3, -1, True, "0"):
        with pytest.raises(WorkflowError, match="steps 0 to 2"):
            await orchestrator.route_and_execute_step("t1", wrong)
    assert (await orchestrator.route_and_execute_step("t1", 0)).result == 1
    assert (await orchestrator.route_and_execute_step("t1", 1)).result == [1]
    with pytest.raises(WorkflowError, match="is completed and cannot become running"):
        await orchestrator.route_and_execute_step("t1", 0)
    assert (await orchestrator.route_and_execute_step("t1", 2)).state is StepState.FAILED
    assert (await load()).status is TaskState.FAILED
    with pytest.raises(WorkflowError):
        await orchestrator.route_and_execute_step("t1", 2)


async def test_a_failure_recorded_by_hand_ends_the_workflow(make, load):
    agents = Agents(planner=PLAN, fetch=Throttled(1), think=1, tell=1)
    orchestrator = make(agents)
    with pytest.raises(Throttled):
        await orchestrator.process_incoming_task("t1", TASK)
    await orchestrator.workflow_engine.update_step_state("t1", 0, StepState.FAILED, error="by hand")
    await orchestrator.process_incoming_task("t1", TASK)
    state = await load()
    assert (state.status, state.error["message"], state.steps[0].error) == (
        TaskState.FAILED,
        "by hand",
        {"message": "by hand"},
    )


async def test_a_memory_manager_is_demanded(pool):
    with pytest.raises(TypeError):
        Orchestrator(None, {}, pool)


async def test_the_example_of_the_specification(redis_url):
    """Multi-Step Workflow Execution, as documented, against the default Redis."""
    memory_manager = MemoryManager()
    workflow_engine = WorkflowEngine(memory_manager)
    task_queue = RedisStreamTaskQueue("workflow_stream", "workflow_group")
    worker_pool = QueueWorkerPool("workflow_pool")
    orchestrator = Orchestrator(task_queue=task_queue, memory_manager=memory_manager, worker_pool=worker_pool)
    task_data = {
        "id": "workflow-task-123",
        "type": "document_processing",
        "input": {"document_url": "https://example.com/doc.pdf", "analysis_type": "semantic"},
    }
    await orchestrator.process_incoming_task("workflow-task-123", task_data)
    workflow_state = await workflow_engine.load_workflow_state("workflow-task-123")
    assert workflow_state.is_finished()
    assert workflow_state.status.value == "failed"
    assert "'document_processing'" in workflow_state.error["message"]

    async def analyse(task):
        return {"rows": task.input["dataset"]}

    orchestrator.agents.register("data_analysis", analyse)
    try:
        data = {"id": "complex-task-123", "type": "data_analysis", "input": {"dataset": "customer_data.csv"}}
        await orchestrator.process_incoming_task("complex-task-123", data)
    finally:
        orchestrator.agents.unregister("data_analysis")
    workflow_state = await workflow_engine.load_workflow_state("complex-task-123")
    assert workflow_state.status == TaskState.COMPLETED
    assert workflow_state.workflow_context.get("final_output") == {"rows": "customer_data.csv"}
    assert f"{workflow_state.current_step_index}/{len(workflow_state.plan)}" == "1/1"
    await worker_pool.shutdown()
    await get_connection_manager().close()


async def test_the_initialisation_sequence_of_the_specification(redis_url):
    memory_manager = await get_memory_manager()
    task_queue = RedisStreamTaskQueue(stream_name="tasks", consumer_group="processor_group")
    worker_pool = QueueWorkerPool("processor_pool")
    orchestrator = await get_orchestrator(task_queue=task_queue, memory_manager=memory_manager, worker_pool=worker_pool)
    workflow_engine = await get_workflow_engine(memory_manager)
    assert workflow_engine.memory_manager is orchestrator.memory_manager is memory_manager
    assert get_orchestrator() is orchestrator
    assert get_orchestrator(worker_pool=worker_pool) is orchestrator
    with pytest.raises(ConfigurationError, match="another worker_pool"):
        get_orchestrator(worker_pool=QueueWorkerPool("other"))
    await get_connection_manager().close()


# -- graphs without a queue


async def test_without_a_queue_ready_steps_of_a_graph_run_at_once(make, load):
    both = asyncio.Barrier(2)
    agents = Agents(meet=lambda t: both.wait(), sum=lambda t: sum(t.input["of"]), bad=ValueError("no"), work=1)
    orchestrator = make(agents)
    plan = [
        {"id": "a", "action": "meet", "depends_on": []},
        {"id": "b", "action": "meet"},
        {"id": "c", "action": "sum", "args": {"of": [{"$ref": "a"}, {"$ref": "b"}]}},
        {"id": "left", "action": "work", "when": {"eq": [{"$ref": "c"}, 2]}},
        {"id": "out", "action": "work", "depends_on": ["left"]},
        {"id": "soft", "action": "bad", "on_failure": "continue", "depends_on": ["c"]},
        {"id": "end", "action": "sum", "args": {"of": [{"$ref": "c"}]}, "depends_on": ["soft", "out"]},
    ]
    orchestrator.register_template("report", plan)
    async with asyncio.timeout(20):
        await orchestrator.process_incoming_task("t1", TASK)
    state = await load()
    assert [step.state.value for step in state.steps] == [
        *("completed", "completed", "completed", "skipped", "skipped", "failed", "completed")
    ]
    assert (state.status, state.workflow_context["final_output"], state.driven) == (TaskState.COMPLETED, 1, False)
    assert state.steps[5].error["message"] == "no"


async def test_without_a_queue_retries_count_as_attempts(make, load):
    agents = Agents()
    retry = Retry(max_retries=3, base=0.001, max_delay=0.002)
    agents.answer("report", lambda t: ValueError("again") if t.attempt < 3 else t.attempt, retry=retry)
    await make(agents).process_incoming_task("t1", TASK)
    state = await load()
    assert (state.steps[0].attempt, state.steps[0].result) == (3, 3)


async def test_without_a_queue_wait_carries_on(make):
    agents = Agents(work=lambda t: t.input)
    orchestrator = make(agents)
    name = await orchestrator.start({"type": "report", "input": 5}, [{"action": "work"}])
    assert not agents.seen
    state = await orchestrator.wait(name)
    assert (state.status, state.workflow_context["final_output"]) == (TaskState.COMPLETED, 5)


async def test_without_a_queue_a_reference_that_leads_nowhere_is_the_steps_failure(make, load):
    orchestrator = make(Agents(work=1))
    orchestrator.register_template("report", [{"action": "work"}, {"action": "work", "args": {"n": {"$ref": "0.x"}}}])
    await orchestrator.process_incoming_task("t1", TASK)
    state = await load()
    assert (state.status, state.error["step_index"]) == (TaskState.FAILED, 1)
    assert "0.x" in state.error["message"]
