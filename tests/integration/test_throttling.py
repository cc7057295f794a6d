"""Limits in the dispatcher: throttled is not failed, a key that is refused is parked, other keys go on."""

from __future__ import annotations

import asyncio
import time
from statistics import median

import pytest

from orchestra import telemetry
from orchestra.agents import AgentRegistry, LimitUse
from orchestra.dispatcher import Dispatcher
from orchestra.errors import CircuitOpenError, ConfigurationError, Throttled
from orchestra.flow_control import BackpressureConfig, RateLimitConfig, RedisRateLimiter
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Outcome, Retry
from tests.integration.waiting import settled, until

NEVER = Retry(max_retries=0)


@pytest.fixture
async def queue(manager):
    queue = RedisStreamTaskQueue("tasks", "workers", 30_000, manager=manager)
    yield queue
    await queue.close()


def limit(manager, name, rate, burst=1, **options):
    return RedisRateLimiter(
        name, BackpressureConfig(rate_limit=RateLimitConfig(rate=rate, burst=burst), **options), manager=manager
    )


def heard(*names):
    """Listen to events: the list they go to, and what ends it."""
    events = []
    return events, telemetry.attach(lambda name, numbers, facts: events.append((name, dict(facts))), *names)


def p99(values):
    return sorted(values)[int(len(values) * 0.99)]


def displaced(order):
    """Places by which the one that is farthest from its place is off. 0 but where a busy machine is late by a burst."""
    return max(abs(place - n) for place, n in enumerate(order))


class Tenants:
    """Two tenants of one agent on one lane: what of A was started, and how long tasks of B took to start."""

    def __init__(self, queue) -> None:
        self.queue = queue
        self.a: list[tuple[int, int, float]] = []
        self.b: list[float] = []

    async def run(self, task) -> None:
        if task.input["tenant"] == "A":
            self.a.append((task.input["n"], task.attempt, time.monotonic()))
        else:
            self.b.append(time.monotonic() - task.input["sent"])

    async def flood(self, count) -> None:
        await self.queue.produce_many(
            [{"id": f"a{n}", "type": "call", "input": {"tenant": "A", "n": n}} for n in range(count)]
        )

    async def beat(self, rounds, count=100) -> list[list[float]]:
        """Send a task of B every 20 ms; their latencies from sending to starting, of each round."""
        found = []
        for _ in range(rounds):
            self.b.clear()
            for _ in range(count):
                await self.queue.produce({"type": "call", "input": {"tenant": "B", "sent": time.monotonic()}})
                await asyncio.sleep(0.02)
            await until(lambda: len(self.b) == count)
            found.append(sorted(self.b))
        return found


@pytest.mark.slow
async def test_a_tenants_flood_does_not_delay_another(queue, agents, manager):
    """Pains 19 and 20: A floods a limited key; B, on the same lane, agent and limit, starts as it does alone.

    Medians over rounds of 100 tasks, so that neither the moment of the flood nor a busy machine decides.
    """
    rate, burst, flood = 50.0, 10, 2000
    limiter = limit(manager, "provider", rate=rate, burst=burst)
    tenants = Tenants(queue)
    agents.register("call", tenants.run, limits=[LimitUse(limiter, key="{tenant}")], retry=NEVER)
    async with Dispatcher(queue, agents=agents):
        await tenants.beat(1, 20)
        alone = await tenants.beat(3)
        began = time.monotonic()
        await tenants.flood(flood)
        beside = await tenants.beat(5)
        took = time.monotonic() - began
        started = list(tenants.a)
        counters = (await queue.stats()).counters
    for share, floor in ((0.5, 0.002), (0.99, 0.010)):
        before, after = (median(each[int(len(each) * share)] for each in rounds) for rounds in (alone, beside))
        assert after <= max(1.2 * before, before + floor), f"{share}: {before * 1e3:.2f} → {after * 1e3:.2f} ms"
    order = [n for n, _, _ in started]
    assert displaced(order) <= 10, "A goes on in its order"
    assert {attempt for _, attempt, _ in started} == {1}, "throttling consumes no attempt"
    assert len(order) <= burst + rate * took + 1
    assert len(order) >= 0.8 * rate * took, "A goes on at its rate"
    assert (counters.get("retried", 0), counters.get("dead", 0)) == (0, 0)
    assert flood - 2 * burst <= counters["throttled"] <= 3 * flood
    assert limiter.metrics.rejected < flood / 2, "those behind a parked key do not ask"


async def test_everything_of_a_parked_key_runs_in_order_and_at_its_rate(queue, agents, manager):
    """One worker: all of 300 tasks, the first attempt each, in order; over no window more than the limit gives."""
    limiter = limit(manager, "provider", rate=200.0, burst=5)
    seen = []

    async def agent(task):
        seen.append((task.input, task.attempt, time.monotonic()))

    agents.register("call", agent, limits=[LimitUse(limiter, key="only")], retry=NEVER)
    events, stop = heard("key.parked", "key.resumed")
    await queue.produce_many([{"type": "call", "input": n} for n in range(300)])
    async with Dispatcher(queue, agents=agents) as dispatcher:
        stats = await settled(queue)
        await asyncio.sleep(0.15)
        await queue.produce({"type": "call", "input": 300})
        await settled(queue)
    stop()
    assert sorted(n for n, _, _ in seen) == list(range(301))
    assert displaced([n for n, _, _ in seen]) <= 10
    assert {attempt for _, attempt, _ in seen} == {1}
    took = seen[299][2] - seen[0][2]
    assert took >= (300 - 5) / 200 - 0.1, "not faster than the limit"
    assert dispatcher.outcomes[Outcome.COMPLETED] == 301
    assert (stats.counters.get("retried", 0), stats.counters.get("dead", 0)) == (0, 0)
    assert events[0] == ("key.parked", {"queue": "tasks", "key": "provider:only"})
    assert events[-1] == ("key.resumed", {"queue": "tasks", "key": "provider:only"})


async def test_several_workers_share_one_line(queue, agents, manager):
    """Three workers, one key: each task once, the first attempt, and nearly in order."""
    limiter = limit(manager, "provider", rate=200.0, burst=5)
    seen = []

    async def agent(task):
        seen.append((task.input, task.attempt))

    agents.register("call", agent, limits=[LimitUse(limiter, key="only")], retry=NEVER)
    await queue.produce_many([{"type": "call", "input": n} for n in range(300)])
    async with (
        Dispatcher(queue, agents=agents, batch_size=20),
        Dispatcher(queue, agents=agents, batch_size=20),
        Dispatcher(queue, agents=agents, batch_size=20),
    ):
        stats = await settled(queue)
    assert sorted(n for n, _ in seen) == list(range(300))
    assert {attempt for _, attempt in seen} == {1}
    assert (stats.counters.get("retried", 0), stats.counters.get("dead", 0)) == (0, 0)
    off = median(abs(place - n) for place, (n, _) in enumerate(seen))
    assert off <= 100, f"half of the tasks are within {off} places of their order"


async def test_all_limits_of_a_task_are_asked_together(queue, agents, manager):
    """Refused by one limit, a task takes nothing of the other, whose permits are there for other tasks."""
    wide, narrow = limit(manager, "wide", rate=0.01, burst=3), limit(manager, "narrow", rate=0.01, burst=1)
    seen = []

    async def agent(task):
        seen.append(task.input)

    agents.register("both", agent, limits=[LimitUse(wide), LimitUse(narrow, key="x")])
    agents.register("wide", agent, limiter=wide)
    await queue.produce_many([{"type": "both", "input": n} for n in range(10)])
    async with Dispatcher(queue, agents=agents, drain_timeout=0.0) as dispatcher:
        await until(lambda: dispatcher.outcomes[Outcome.THROTTLED] == 9)
        assert seen == [0]
        await queue.produce_many([{"type": "wide", "input": name} for name in "ab"])
        await until(lambda: len(seen) == 3)
    assert seen == [0, "a", "b"]
    assert (await queue.stats()).delayed == 9


@pytest.mark.parametrize(
    ("use", "told"),
    [
        ({"key": "openai:{tenant}"}, "needs the field 'tenant'"),
        ({"key": lambda task: task.input["tenant"]}, "KeyError"),
        ({"key": lambda task: None}, "must be a text"),
        ({"key": "x", "cost": lambda task: 0}, "LimitUse.cost"),
        ({"key": "x", "cost": 11}, "cost must be a whole number"),
        ({}, "needs a key"),
    ],
)
async def test_a_bad_key_or_cost_is_the_tasks_failure(queue, agents, manager, use, told):
    async def agent(task):
        raise AssertionError("started")

    agents.register("call", agent, limits=[LimitUse(limit(manager, "openai:{tenant}", 1.0, 10), **use)])
    await queue.produce({"type": "call", "input": {}})
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    (letter,) = await queue.read_dlq()
    assert (letter.reason, letter.attempts) == ("bad_limit", 0)
    assert told in str(letter.error_info)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LimitUse(3),
        lambda: LimitUse("name", key=""),
        lambda: LimitUse("name", key=7),
        lambda: LimitUse("name", cost=0),
        lambda: LimitUse("name", cost=True),
        lambda: LimitUse("name", cost=1.5),
        lambda: AgentRegistry().register("t", print, limits=["name"]),
        lambda: AgentRegistry().register("t", print, key=""),
        lambda: AgentRegistry().register("t", print, failover=1),
        lambda: AgentRegistry().register("t", print, type_concurrency=0),
        lambda: AgentRegistry().register("t", print, breaker=True),
    ],
)
def test_bad_options_are_refused_before_anything_runs(make):
    with pytest.raises(ConfigurationError):
        make()


async def test_a_provider_that_refuses_parks_its_key_only(queue, agents):
    """Pain 22: one 429 parks the key once; nobody of it starts before, other keys of the type go on."""
    seen = []
    first = True

    async def agent(task):
        nonlocal first
        if task.input["tenant"] == "A" and first:
            first = False
            raise Throttled(0.5, "openai:A")
        seen.append((task.input["tenant"], task.attempt, time.monotonic()))

    agents.register("call", agent, key="openai:{tenant}", retry=NEVER)
    began = time.monotonic()
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
        for number in range(40):
            await queue.produce({"type": "call", "input": {"tenant": "AB"[number % 2]}})
        stats = await settled(queue)
    a, b = ([each for each in seen if each[0] == tenant] for tenant in "AB")
    assert (len(a), len(b)) == (20, 20)
    assert {attempt for _, attempt, _ in seen} == {1}
    assert min(at for _, _, at in a) >= began + 0.5
    assert min(at for _, _, at in b) < began + 0.5
    assert dispatcher.outcomes[Outcome.COMPLETED] == 40
    assert (stats.counters.get("retried", 0), stats.counters.get("dead", 0)) == (0, 0)


async def test_a_type_is_parked_when_no_key_is_named(queue, agents):
    runs = {"call": 0, "other": 0}

    async def agent(task):
        runs[task.type] += 1
        if task.type == "call":
            raise Throttled(60.0)

    agents.register("call", agent, retry=NEVER)
    agents.register("other", agent, retry=NEVER)
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1, drain_timeout=0.0) as dispatcher:
        await queue.produce_many([{"type": "call"} for _ in range(20)])
        await until(lambda: dispatcher.outcomes[Outcome.THROTTLED] == 20)
        await queue.produce({"type": "other"})
        await until(lambda: runs["other"])
    assert runs == {"call": 1, "other": 1}, "one refusal is enough"


async def test_an_open_circuit_inside_an_agent_parks_its_task(queue, agents):
    attempts = []

    async def agent(task):
        attempts.append(task.attempt)
        if len(attempts) < 4:
            raise CircuitOpenError("open", retry_after=0.01, breaker="db")

    agents.register("call", agent, retry=NEVER)
    await queue.produce({"type": "call"})
    async with Dispatcher(queue, agents=agents):
        stats = await settled(queue)
    assert attempts == [1, 1, 1, 1]
    assert (stats.counters["throttled"], stats.counters.get("dead", 0)) == (3, 0)


async def test_a_limit_that_cannot_be_asked_refuses_and_costs_no_attempt(queue, agents, make_server):
    """I9: fail-closed; the limit lives on another Redis, which is gone."""
    from orchestra.connections import ConnectionManager

    async def agent(task):
        raise AssertionError("started")

    server = make_server()
    async with ConnectionManager(server.url) as there:
        closed, opened = limit(there, "closed", 100.0), limit(there, "open", 100.0, fail_open=True)
        ran = []
        agents.register("closed", agent, limiter=closed, retry=NEVER)
        agents.register("open", lambda task: ran.append(task.attempt), limiter=opened, retry=NEVER)
        server.kill()
        await queue.produce_many([{"type": "closed"}, {"type": "open"}])
        async with Dispatcher(queue, agents=agents, drain_timeout=0.0) as dispatcher:
            await until(lambda: ran and dispatcher.outcomes[Outcome.THROTTLED])
    stats = await queue.stats()
    assert ran == [1]
    assert (stats.counters.get("dead", 0), stats.counters.get("retried", 0), stats.live) == (0, 0, 1)
