"""The registry of agents: what may be registered, how it is called, and what is refused by name."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from concurrent.futures.process import BrokenProcessPool

import pytest

from orchestra.agents import Agent, AgentOptions, AgentRegistry, get_agent_registry
from orchestra.errors import ConfigurationError, UnknownAgentError
from orchestra.tasks import BaseTask, Retry
from orchestra.testing import MockAgent, MockAgentFactory


def task(task_type="work", **more) -> BaseTask:
    return BaseTask(id="t1", type=task_type, input={"n": 7}, **more)


@pytest.fixture
def agents():
    registry = AgentRegistry()
    yield registry
    registry.close()


def where(_task):
    return os.getpid(), threading.current_thread().name


def seven(given):
    return given.input["n"]


def die(_task):
    os._exit(3)


# -- what an agent may be


class WithProcess:
    async def process(self, given):
        return ("object", given.id)


class Callable:
    async def __call__(self, given):
        return ("callable", given.id)


class WithPlainProcess:
    def process(self, given):
        return ("plain", given.id, threading.current_thread() is threading.main_thread())


async def function(given):
    return ("function", given.id)


async def with_prefix(prefix, given):
    return (prefix, given.id)


@pytest.mark.parametrize(
    ("agent", "answer"),
    [
        (function, ("function", "t1")),
        (WithProcess(), ("object", "t1")),
        (WithProcess().process, ("object", "t1")),
        (Callable(), ("callable", "t1")),
        (WithPlainProcess(), ("plain", "t1", False)),
        (functools.partial(with_prefix, "partial"), ("partial", "t1")),
        (lambda given: function(given), ("function", "t1")),
        (MockAgent(result="mocked"), "mocked"),
    ],
    ids=["function", "object", "method", "callable", "plain object", "partial", "lambda around async", "mock"],
)
async def test_every_form_of_agent_is_called_with_the_task(agents, agent, answer):
    agents.register("work", agent)
    assert await agents.call(task()) == answer


@pytest.mark.parametrize("agent", [None, 3, "module:function", WithProcess, Callable, object()])
def test_what_is_no_agent_is_refused_and_leaves_nothing_behind(agents, agent):
    with pytest.raises(ConfigurationError, match="agent for 'work' must be a function of one task") as caught:
        agents.register("work", agent)
    assert caught.value.field == "agent"
    assert caught.value.value is agent
    assert len(agents) == 0


def test_an_object_with_process_is_an_agent_by_protocol():
    assert isinstance(WithProcess(), Agent)
    assert isinstance(MockAgent(), Agent)
    assert not isinstance(function, Agent)


# -- looking


def test_the_registry_as_a_collection(agents):
    agents.register("b", function)
    agents.register("a", function)
    assert ("a" in agents, "c" in agents, 3 in agents) == (True, False, False)
    assert (sorted(agents), len(agents)) == (["a", "b"], 2)
    assert agents.get("c") is None
    assert agents.get("a").name == "a"


def test_the_decorator_gives_the_function_back(agents):
    @agents.agent("work", timeout=3.0, weight=2)
    async def mine(given):
        return given.id

    assert asyncio.iscoroutinefunction(mine)
    assert agents.get("work").options.timeout == 3.0
    assert agents.get("work").replicas[0].weight == 2


def test_the_default_registry_is_one():
    assert get_agent_registry() is get_agent_registry()
    assert isinstance(get_agent_registry(), AgentRegistry)


async def test_an_unknown_type_is_an_error_that_lists_what_is_known(agents):
    agents.register("b", function)
    agents.register("a", function)
    with pytest.raises(UnknownAgentError, match=r"'zzz'; registered are: a, b") as caught:
        await agents.call(task("zzz"))
    assert caught.value.task_type == "zzz"
    with pytest.raises(UnknownAgentError, match="registered are: none"):
        await AgentRegistry().call(task("zzz"))


# -- options


def test_options_belong_to_the_type(agents):
    retry = Retry(max_retries=1)
    agents.register("work", function, worker_id="a", timeout=5, retry=retry, cost=3)
    agents.register("work", function, worker_id="b")
    assert agents.get("work").options == AgentOptions(timeout=5, retry=retry, cost=3), "a replica without options"
    agents.register("work", function, worker_id="c", timeout=9)
    assert agents.get("work").options == AgentOptions(timeout=9), "given again, they count for all"
    assert len(agents.get("work").replicas) == 3


def test_defaults():
    options = AgentOptions()
    assert (options.timeout, options.retry, options.executor, options.limiter, options.cost) == (
        None,
        None,
        "thread",
        None,
        1,
    )


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"timeout": 0}, "agent timeout"),
        ({"timeout": -1}, "agent timeout"),
        ({"timeout": "30"}, "agent timeout"),
        ({"timeout": float("nan")}, "agent timeout"),
        ({"retry": 3}, "retry"),
        ({"executor": "gpu"}, "executor"),
        ({"limiter": object()}, "limiter"),
        ({"cost": 0}, "agent cost"),
        ({"cost": 1.5}, "agent cost"),
        ({"timeut": 3}, "timeut"),
        ({"weight": 0}, "weight"),
        ({"weight": 10_001}, "weight"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": True}, "max_concurrency"),
        ({"worker_id": "with space"}, "worker_id"),
        ({"worker_id": ""}, "worker_id"),
    ],
)
def test_a_bad_option_is_named_and_leaves_nothing_behind(agents, options, field):
    with pytest.raises(ConfigurationError) as caught:
        agents.register("work", function, **options)
    assert caught.value.field == field
    assert repr(next(iter(options.values()))) in str(caught.value) or "timeut" in str(caught.value)
    assert "work" not in agents


def test_a_bad_option_does_not_change_what_is_registered(agents):
    agents.register("work", function, worker_id="a", timeout=5)
    with pytest.raises(ConfigurationError):
        agents.register("work", function, worker_id="b", timeout=-5)
    entry = agents.get("work")
    assert (entry.options.timeout, [replica.worker_id for replica in entry.replicas]) == (5, ["a"])


def test_an_unknown_option_is_answered_with_the_known_ones(agents):
    known = (
        "cost, executor, failover, key, limiter, limits, retry, timeout, type_concurrency, "
        "worker_id, weight, max_concurrency, breaker, own_limits"
    )
    with pytest.raises(ConfigurationError, match=f"no option 'timeut'; options are {known}"):
        agents.register("work", function, timeut=3)


@pytest.mark.parametrize("task_type", ["", "two words", "x" * 129, "ümlaut", None, 3])
def test_a_bad_type_is_refused(agents, task_type):
    with pytest.raises(ConfigurationError, match="task_type must be 1 to 128 printable ASCII characters"):
        agents.register(task_type, function)


# -- replicas


def test_another_worker_id_is_a_replica_the_same_replaces(agents):
    first = agents.register("work", function)
    second = agents.register("work", function, worker_id="b", weight=3, max_concurrency=2)
    assert (first.worker_id, second.worker_id) == ("work", "b")
    before = agents.get("work").replicas
    again = agents.register("work", WithProcess(), worker_id="b")
    assert before == (first, second), "what a balancer holds does not change under it"
    assert agents.get("work").replicas == (first, again)
    assert repr(again) == "<Replica b of work running=0>"


def test_room():
    registry = AgentRegistry()
    free, limited = registry.register("a", function), registry.register("b", function, max_concurrency=2)
    free.running = 10_000
    limited.running = 1
    assert free.has_room
    assert limited.has_room
    limited.running = 2
    assert not limited.has_room


async def test_call_passes_over_a_full_replica_and_counts(agents):
    gate, seen = asyncio.Event(), []

    async def slow(given):
        seen.append("slow")
        await gate.wait()
        raise ValueError("released")

    async def quick(given):
        seen.append("quick")

    busy = agents.register("work", slow, worker_id="a", max_concurrency=1)
    agents.register("work", quick, worker_id="b")
    first = asyncio.ensure_future(agents.call(task()))
    await asyncio.sleep(0)
    assert busy.running == 1
    await agents.call(task())
    gate.set()
    with pytest.raises(ValueError, match="released"):
        await first
    assert seen == ["slow", "quick"]
    assert busy.running == 0


@pytest.mark.parametrize(
    ("worker_id", "answer", "left"),
    [(None, True, None), ("a", True, ["b"]), ("zzz", False, ["a", "b"])],
)
def test_unregister(agents, worker_id, answer, left):
    agents.register("work", function, worker_id="a")
    agents.register("work", function, worker_id="b")
    assert agents.unregister("work", worker_id) is answer
    entry = agents.get("work")
    assert (entry and [replica.worker_id for replica in entry.replicas]) == left
    assert agents.unregister("never") is False


def test_the_last_replica_takes_the_type_with_it(agents):
    agents.register("work", function, worker_id="a")
    assert agents.unregister("work", "a")
    assert "work" not in agents


def test_the_mock_factory_registers_what_it_makes(agents):
    factory = MockAgentFactory(result="ok").configure("b", fail_times=1)
    first, second = factory.register(agents, "a", "b")
    assert sorted(agents) == ["a", "b"]
    assert factory.created == {"a": [first], "b": [second]}
    assert (first.fail_times, second.fail_times) == (0, 1)


# -- executors


async def test_a_plain_function_runs_in_a_thread(agents):
    agents.register("work", where)
    pid, thread = await agents.call(task())
    assert pid == os.getpid()
    assert thread.startswith("orchestra-agent")


async def test_plain_functions_do_not_block_the_loop_or_each_other(agents):
    barrier = threading.Barrier(3, timeout=5)
    agents.register("work", lambda _task: barrier.wait())
    calls = [asyncio.ensure_future(agents.call(task())) for _ in range(2)]
    mine = await asyncio.to_thread(barrier.wait)
    assert sorted([mine, *[await call for call in calls]]) == [0, 1, 2], "all three met"


async def test_a_plain_function_may_run_in_a_process(agents):
    agents.register("where", where, executor="process")
    agents.register("seven", seven, executor="process")
    pid, _ = await agents.call(task("where"))
    assert pid != os.getpid()
    assert await agents.call(task("seven")) == 7, "the task travels"


async def test_a_broken_process_pool_recovers(agents):
    agents.register("die", die, executor="process")
    agents.register("seven", seven, executor="process")
    with pytest.raises(BrokenProcessPool):
        await agents.call(task("die"))
    assert await agents.call(task("seven")) == 7


async def test_what_a_thread_raises_arrives(agents):
    def bad(_task):
        raise KeyError("inside")

    agents.register("work", bad)
    with pytest.raises(KeyError, match="inside"):
        await agents.call(task())


async def test_a_closed_registry_makes_new_executors_when_needed(agents):
    agents.register("work", where)
    await agents.call(task())
    agents.close()
    agents.close()
    assert (await agents.call(task()))[0] == os.getpid()
