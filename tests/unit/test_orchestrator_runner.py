"""The run of one step with an engine that fails or refuses: what is recorded, what is given back, what is sent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from orchestra._delivery import DONE, STEP, Again, Bury, Complete, Delivery
from orchestra._execution import CANCELLED, RELEASED, Ended
from orchestra._workflow import runner as runner_module
from orchestra._workflow.answers import Begun, Moved, Ready, StepFacts
from orchestra._workflow.local import LocalAgents, describe, wait_before_retry
from orchestra._workflow.planning import Planning, Templates, checked_planners
from orchestra._workflow.runner import StepRunner
from orchestra._workflow.upkeep import error_of
from orchestra.agents import AgentRegistry
from orchestra.circuit_breaker import CircuitBreakerConfig
from orchestra.errors import (
    ConfigurationError,
    CorruptEntryError,
    InvalidTaskError,
    QueueFullError,
    Reject,
    RetryLater,
    StoreUnavailableError,
    Throttled,
    UnknownAgentError,
    WaitForSignal,
    WorkflowError,
)
from orchestra.memory import MemoryManager
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.serialization import encode_task
from orchestra.tasks import BaseTask, Outcome, Retry, TaskState
from orchestra.workflow import StepState

QUIET = Moved(True, "", (), TaskState.RUNNING, "running", 1, 0)
QUICK = Retry(max_retries=2, base=0.001, max_delay=0.002)


def delivery(**metadata) -> Delivery:
    task = {"id": "w:0", "type": "work", "metadata": {STEP: ["n", "w", 0, 1, "1f:7"], **metadata}}
    return Delivery(2, b"1-1", (b"t", encode_task(task).frame), "consumer")


class Engine:
    """Answers as told; notes every call."""

    def __init__(self, **answers):
        self.memory_manager = MemoryManager("memory:", namespace="n")
        self.calls, self.answers = [], answers

    def __getattr__(self, name):
        async def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            answer = self.answers.get(name, QUIET)
            if isinstance(answer, list):
                answer = answer.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def begun(verdict="go", **more) -> Begun:
    planned = {"action": "work", "args": {"n": 1}, **more.pop("planned", {})}
    values = {
        "step": SimpleNamespace(id="s"),
        "planned": planned,
        "known": StepFacts(),
        "task": {"life": "1f"},
        "total": 1,
    }
    return Begun(
        **{"verdict": verdict, "ready": (), "phase": "running", "reads_all": False, "moved": QUIET, **values, **more}
    )


class Execution:
    """Stands for the run of the agent."""

    def __init__(self, ended):
        self.ended, self.tasks = ended, []

    async def run(self, delivery, slot, task):
        self.tasks.append(task)
        return self.ended


@pytest.fixture
def queue():
    return InMemoryTaskQueue("n", "workers")


@pytest.fixture
def slot():
    return SimpleNamespace(why=None, abandoned=False)


async def process(queue, slot, engine, ended, **options):
    runner = StepRunner(engine, queue, agents=AgentRegistry(), **options)
    given, execution = delivery(), Execution(ended)
    return await runner.run(execution, given, given.task(), slot), execution


FENCED = {"fence": 1, "claim": "1f:7"}
COMPLETED = Ended(Outcome.COMPLETED, Complete("value"))


async def test_what_is_committed_is_fenced_and_settled_as_completed(queue, slot):
    engine = Engine(begin=begun())
    ended, execution = await process(queue, slot, engine, COMPLETED)
    assert (ended.outcome, ended.verdict) == (Outcome.COMPLETED, DONE)
    (((*where, state, result, error), options),) = engine.named("finish")
    assert (where, state, result, error, options) == (["w", 0, 1], StepState.COMPLETED, "value", None, FENCED)
    assert execution.tasks[0].input == {"n": 1}


@pytest.mark.parametrize("verdict", ["stale", "done", "held", "stop"])
async def test_other_verdicts_than_go_run_nothing_and_send_what_was_not_sent(queue, slot, verdict):
    ready = (Ready(1, 1, {"action": "next"}),) if verdict == "done" else ()
    engine = Engine(begin=begun(verdict, ready=ready))
    ended, execution = await process(queue, slot, engine, COMPLETED)
    assert (ended.verdict, execution.tasks) == (DONE, [])
    assert await queue.get_queue_depth() == len(ready)
    if ready:
        (found,) = await queue.consume("c", 1, 0)
        assert (found[1]["id"], found[1]["metadata"][STEP][:4]) == ("w:1:1f", ["n", "w", 1, 1])


async def test_redis_away_at_the_beginning_gives_the_step_back(queue, slot):
    ended, execution = await process(queue, slot, Engine(begin=StoreUnavailableError("away")), COMPLETED)
    assert (ended.outcome, ended.verdict, execution.tasks) == (Outcome.RELEASED, Again(1.0, "released"), [])


async def test_a_result_waits_for_redis_to_come_back(queue, slot, monkeypatch):
    monkeypatch.setattr(runner_module.Reconnect, "next", lambda self: 0.0)
    engine = Engine(begin=begun(), finish=[StoreUnavailableError("away")] * 3 + [QUIET])
    ended, _ = await process(queue, slot, engine, COMPLETED)
    assert ended.verdict is DONE
    assert len(engine.named("finish")) == 4


async def test_when_redis_stays_away_the_step_runs_again_later(queue, slot, monkeypatch):
    monkeypatch.setattr(runner_module, "PATIENCE", -1.0)
    engine = Engine(begin=begun(), finish=StoreUnavailableError("away"))
    ended, _ = await process(queue, slot, engine, COMPLETED)
    assert ended.verdict == Again(1.0, "released")


async def test_a_full_queue_leaves_what_is_ready_to_the_outbox(queue, slot, monkeypatch):
    async def full(tasks, **options):
        raise QueueFullError("full", retry_after=1.0)

    monkeypatch.setattr(queue, "produce_many", full)
    moved = QUIET._replace(ready=(Ready(1, 1, {"action": "next"}),))
    ended, _ = await process(queue, slot, Engine(begin=begun(), finish=moved), COMPLETED)
    assert ended.verdict is DONE


async def test_a_failure_for_good_is_recorded_and_no_dead_letter(queue, slot):
    facts = {"error": "no", "error_type": "pkg.mod.OddError", "traceback": "…"}
    engine = Engine(begin=begun())
    ended, _ = await process(queue, slot, engine, Ended(Outcome.TIMED_OUT, Bury("timed_out", 3, facts)))
    assert (ended.outcome, ended.verdict) == (Outcome.TIMED_OUT, DONE)
    ((args, _),) = engine.named("finish")
    assert args[3] is StepState.FAILED
    assert args[5] == {"type": "OddError", "message": "no", "reason": "timed_out", "attempts": 3, "traceback": "…"}


@pytest.mark.parametrize(("counter", "counted"), [("retried", True), ("throttled", False)])
async def test_what_comes_back_is_recorded_as_pending(queue, slot, counter, counted):
    again = Ended(Outcome.FAILED, Again(0.5, counter, "why"))
    engine = Engine(begin=begun())
    assert (await process(queue, slot, engine, again))[0] is again
    (((*where, error, delay), options),) = engine.named("retrying")
    assert (where, error, delay, options) == (["w", 0, 1], {"message": "why"}, 0.5, {**FENCED, "counted": counted})


async def test_what_is_released_is_not_recorded(queue, slot):
    engine = Engine(begin=begun())
    assert (await process(queue, slot, engine, RELEASED))[0] is RELEASED
    assert [name for name, *_ in engine.calls] == ["begin"]


async def test_cancelled_is_recorded_as_skipped(queue, slot):
    engine = Engine(begin=begun())
    ended, _ = await process(queue, slot, engine, CANCELLED)
    assert ended is not None
    assert engine.named("finish")[0][0][3] is StepState.SKIPPED


async def test_an_agent_that_waits_is_parked(queue, slot):
    engine = Engine(begin=begun())
    wish = Ended(Outcome.COMPLETED, Complete(WaitForSignal("go", prompt="?", timeout=5.0)))
    assert (await process(queue, slot, engine, wish))[0].verdict is DONE
    ((args, options),) = engine.named("park")
    assert (args, options) == (("w", 0, 1), {"signal": "go", "prompt": "?", "due": 5.0, **FENCED})


async def test_what_cannot_be_recorded_is_a_failure(queue, slot):
    engine = Engine(begin=begun(), finish=[InvalidTaskError("no such type", path="x"), QUIET])
    await process(queue, slot, engine, COMPLETED)
    args = engine.named("finish")[1][0]
    assert (args[3], args[5]["type"], args[5]["message"]) == (StepState.FAILED, "InvalidTaskError", "no such type")


@pytest.mark.parametrize(
    ("error", "reason"), [(CorruptEntryError("damaged"), "corrupt_workflow"), (WorkflowError("gone"), None)]
)
async def test_a_record_that_is_damaged_or_gone(queue, slot, error, reason):
    ended, execution = await process(queue, slot, Engine(begin=error), COMPLETED)
    assert execution.tasks == []
    assert getattr(ended.verdict, "reason", None) == reason


async def test_an_abandoned_agent_commits_nothing(queue, slot):
    slot.abandoned = True
    engine = Engine(begin=begun())
    assert (await process(queue, slot, engine, COMPLETED))[0] is COMPLETED
    assert not engine.named("finish")


# -- planning


def planning(planners="planner", actions=None, breaker=None, **answers):
    agents = AgentRegistry()
    asked = []

    def register(name, answer, **options):
        async def agent(task):
            asked.append(name)
            value = answer.pop(0) if isinstance(answer, list) and answer and isinstance(answer[0], list) else answer
            if isinstance(value, BaseException):
                raise value
            return value

        agents.register(name, agent, **options)

    for name, answer in answers.items():
        register(name, answer)
    templates = Templates()
    made = Planning(LocalAgents(agents, breaker), templates, planners, lambda: actions)
    return made, templates, asked, register


TASK = BaseTask("t", "report", {"q": 1})


async def test_a_throttled_planner_is_waited_for_unless_another_answers():
    made, _, asked, _ = planning(("planner", "other"), planner=Throttled(5.0), other=[{"action": "work"}])
    assert (await made.plan(TASK)).context["plan_source"] == "alternate"
    made, _, asked, _ = planning(("planner", "other"), planner=Throttled(5.0), other=ValueError("no"))
    with pytest.raises(Throttled):
        await made.plan(TASK)
    assert asked == ["planner", "other"]


async def test_the_breaker_of_a_planner_spares_it():
    made, _, asked, _ = planning(planner=ValueError("down"), breaker=CircuitBreakerConfig(failure_threshold=1))
    for source in ("single_step", "single_step"):
        assert (await made.plan(TASK)).context["plan_source"] == source
    assert asked == ["planner"]


async def test_a_planner_is_asked_again_as_its_retry_says():
    made, _, asked, register = planning()
    register("planner", ValueError("down"), retry=QUICK)
    assert (await made.plan(TASK)).context["planner_error"]["message"] == "down"
    assert len(asked) == 3


async def test_a_planner_honours_its_timeout_and_its_limits():
    made, _, _, _ = planning()

    class Limit:
        interval, asked = 1.0, []

        async def try_acquire(self, priority=0, cost=1):
            self.asked.append(cost)
            return SimpleNamespace(allowed=len(self.asked) > 1, retry_after=2.0)

    async def slow(task):
        await asyncio.Event().wait()

    made._local.agents.register("planner", slow, timeout=0.01, limiter=Limit(), cost=7)
    with pytest.raises(Throttled):
        await made.plan(TASK)
    context = (await made.plan(TASK)).context
    assert "timeout of 0.01 s" in context["planner_error"]["message"]
    assert Limit.asked == [7, 7]


async def test_a_template_that_fails_leaves_one_step():
    made, templates, _, _ = planning()
    templates.add("report", lambda task: 1 / 0)
    planned = await made.plan(TASK)
    assert [step["action"] for step in planned.plan] == ["report"]
    assert planned.context["template_error"]["type"] == "ZeroDivisionError"

    async def template(task):
        return [{"action": "work", "args": task.input}]

    templates.add("report", template)
    assert (await made.plan(TASK)).plan[0]["args"] == {"q": 1}


async def test_a_planner_does_not_plan_for_itself():
    made, _, asked, _ = planning(planner=[{"action": "x"}])
    assert (await made.plan(BaseTask("t", "planner"))).context["plan_source"] == "single_step"
    assert asked == []


@pytest.mark.parametrize("planners", [("a", "a"), tuple(f"p{n}" for n in range(17)), ("bad name",), 5 * ("",)])
def test_planners_are_checked(planners):
    with pytest.raises(ConfigurationError):
        checked_planners(planners)


async def test_local_agents_need_an_agent():
    with pytest.raises(UnknownAgentError):
        await LocalAgents(AgentRegistry()).call(TASK)


@pytest.mark.parametrize(
    ("error", "attempt", "expected"),
    [
        (ValueError(), 3, None),
        (ValueError(), 1, 0.002),
        (RetryLater(7), 1, 7.0),
        (Throttled(7), 1, None),
        (Reject("no"), 1, None),
    ],
)
def test_when_an_attempt_is_repeated(error, attempt, expected):
    retry = Retry(max_retries=2, base=0.002, jitter=False)
    assert wait_before_retry(error, retry, attempt) == expected
    assert wait_before_retry(error, None, attempt) is None


def test_errors_as_they_are_recorded():
    assert describe(ValueError()) == {"type": "ValueError", "message": "ValueError"}
    assert describe(Throttled(1))["code"] == "throttled"
    assert error_of("crashed", 3, {}) == {
        "type": "CrashedError",
        "message": "the task of the step died: crashed",
        "reason": "crashed",
        "attempts": 3,
    }


@pytest.mark.parametrize(("step", "reason"), [(True, "cancelled"), (False, None)])
def test_a_step_that_ignores_its_cancellation_is_told_to_its_workflow_by_a_dead_letter(step, reason):
    from orchestra._execution import Execution as RealExecution
    from orchestra._pool.slots import Slot

    agents = AgentRegistry()
    slot, given = Slot(), delivery()
    if not step:
        given = Delivery(2, b"1-1", (b"t", encode_task({"id": "t", "type": "work"}).frame), "consumer")
    slot.replica, slot.why = agents.register("work", lambda task: None), Outcome.CANCELLED
    ended = RealExecution("q", agents, QUICK, lambda agent: None).abandoned(given, slot)
    assert (ended.outcome, getattr(ended.verdict, "reason", None)) == (Outcome.CANCELLED, reason)
