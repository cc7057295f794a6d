"""Limits in the dispatcher: throttled is not failed, a key that is refused is parked, other keys go on."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import AsyncExitStack
from statistics import median

import pytest

from orchestra import telemetry
from orchestra._limiting.refusals import per_second
from orchestra.agents import AgentRegistry, LimitUse
from orchestra.dispatcher import Dispatcher
from orchestra.errors import CircuitOpenError, ConfigurationError, Throttled
from orchestra.flow_control import BackpressureConfig, RateLimitConfig, RedisRateLimiter, list_limits
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Outcome, Retry
from tests.waiting import settled, until

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
    """Two tenants of one agent: what of A was started, and how long tasks of B took to start."""

    def __init__(self) -> None:
        self.a: list[tuple[int, int, float]] = []
        self.b: list[float] = []
        self._sent = 0

    async def run(self, task) -> None:
        if task.input["tenant"] == "A":
            self.a.append((task.input["n"], task.attempt, time.monotonic()))
        else:
            self.b.append(time.monotonic() - task.input["sent"])

    async def flood(self, queue, count) -> None:
        """``count`` more of A, as fast as it goes."""
        numbers = range(self._sent, self._sent + count)
        self._sent += count
        await queue.produce_many([{"id": f"a{n}", "type": "call", "input": {"tenant": "A", "n": n}} for n in numbers])

    async def beat(self, queue, count=100, flood=0) -> list[float]:
        """Send a task of B every 20 ms, and between two of them ``flood`` of A; B's latencies from sending to starting."""
        self.b = []
        for _ in range(count):
            await queue.produce({"type": "call", "input": {"tenant": "B", "sent": time.monotonic()}})
            await asyncio.sleep(0.01)
            if flood:
                await self.flood(queue, flood)
            await asyncio.sleep(0.01)
        await until(lambda: len(self.b) == count)
        return self.b


@pytest.mark.slow
async def test_a_tenants_flood_does_not_delay_another(queue, agents, manager):
    """Pains 19 and 20: A sends 20 times what its key may; B, on the same lane, agent and limit, starts as it does alone.

    Rounds without and with the flood in turn, each p99 over all rounds of its kind. Another process that takes the core for
    a moment is in either; so it goes on, up to 10 rounds, while too few were seen to tell. 1 ms is what waking a process
    differs by from one time to the next.
    """
    rate, burst = 50.0, 10
    calm = RedisStreamTaskQueue("calm", "workers", 30_000, manager=manager)
    limiter = limit(manager, "provider", rate=rate, burst=burst)
    tenants = Tenants()
    agents.register("call", tenants.run, limits=[LimitUse(limiter, key="{tenant}")], retry=NEVER)
    alone, beside, start = [], [], time.monotonic()
    for rounds in range(1, 11):
        async with Dispatcher(calm, agents=agents):
            await tenants.beat(calm, 10)
            alone += await tenants.beat(calm)
        async with Dispatcher(queue, agents=agents):
            await tenants.beat(queue, 10)
            beside += await tenants.beat(queue, flood=20)
        if rounds >= 3 and p99(beside) <= 1.2 * p99(alone) + 0.001:
            break
    counters = (await queue.stats()).counters
    await calm.close()
    facts = f"p99 {p99(alone) * 1e3:.2f} → {p99(beside) * 1e3:.2f} ms in {rounds} rounds"
    assert p99(beside) <= 1.2 * p99(alone) + 0.001, facts
    assert median(beside) <= 1.2 * median(alone) + 0.001, facts
    order = [n for n, _, _ in tenants.a]
    assert {attempt for _, attempt, _ in tenants.a} == {1}, "throttling consumes no attempt"
    assert 0 < len(order) <= burst + rate * (time.monotonic() - start)
    assert (counters.get("retried", 0), counters.get("dead", 0)) == (0, 0)
    assert counters["throttled"] >= 2000 * rounds - len(order)


@pytest.mark.slow
async def test_a_flood_is_in_the_way_only_while_it_is_refused(queue, agents, manager):
    """2,000 of A at once, before B in its lane: B waits while they are read and refused, not much longer than no-ops take."""
    limiter = limit(manager, "provider", rate=50.0, burst=10)
    tenants, done = Tenants(), []
    agents.register("call", tenants.run, limits=[LimitUse(limiter, key="{tenant}")], retry=NEVER)

    async def nothing(task):
        done.append(1)

    agents.register("nothing", nothing, retry=NEVER)
    async with Dispatcher(queue, agents=agents, drain_timeout=0.0):
        await tenants.beat(queue, 10)
        ratios = []
        for rounds in range(1, 6):
            began = time.monotonic()
            await queue.produce_many([{"type": "nothing"} for _ in range(2000)])
            await until(lambda rounds=rounds: len(done) == 2000 * rounds)
            plain = time.monotonic() - began
            began = time.monotonic()
            await tenants.flood(queue, 2000)
            await tenants.beat(queue, 1)
            ratios.append((time.monotonic() - began) / plain)
        started = list(tenants.a)
        await tenants.beat(queue, 5)
    counters = (await queue.stats()).counters
    assert min(ratios) <= 5, f"B started after {ratios} times what 2,000 no-ops take"
    assert displaced([n for n, _, _ in started]) <= 10, "A goes on in its order"
    assert {attempt for _, attempt, _ in started} == {1}
    assert counters["throttled"] <= 5 * 3 * 2000
    assert limiter.metrics.rejected < 2000, "those behind a parked key do not ask"


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


@pytest.mark.parametrize("workers", [1, 3])
async def test_who_was_throttled_goes_before_those_behind_it(queue, agents, manager, workers, monkeypatch):
    """1,000 tasks wait; the first ones of a key are refused, and are handed out again, when it opens, before those behind.

    The others stand still until all of the key are due. A read that begins then and brings one of the others found none of
    the key any more, so no read that brings one of the key begins after it: whatever the machine does, but for the one
    read in sixteen whose turn is the lane's, at most one a worker here.
    """
    limiter = limit(manager, "provider", rate=5.0, burst=10)
    started, reads, gate = [], [], asyncio.Event()
    read, moments = queue.read, itertools.count()

    async def agent(task):
        started.append(task.id)
        if task.type == "other":
            await gate.wait()

    async def noted(*args, **options):
        began, after = next(moments), gate.is_set()
        found = await read(*args, **options)
        reads.append((began, next(moments), after, {delivery.task().type for delivery in found}))
        return found

    monkeypatch.setattr(queue, "read", noted)
    agents.register("key", agent, limits=[LimitUse(limiter, key="k")], retry=NEVER)
    agents.register("other", agent, retry=NEVER)
    tasks = [{"id": f"key{n}", "type": "key"} for n in range(10)]
    tasks += [{"id": f"other{n}", "type": "other"} for n in range(990)]
    async with AsyncExitStack() as stack:
        made = [Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) for _ in range(workers)]
        for dispatcher in made:
            await stack.enter_async_context(dispatcher)
        assert await limiter.acquire(cost=10, key="k")
        await queue.produce_many(tasks)
        full = time.monotonic() + 10 / 5.0 + 0.1  # then all of the key may start
        await until(lambda: sum(name.startswith("other") for name in started) == workers)
        while (await queue.stats()).delayed or time.monotonic() < full:
            await asyncio.sleep(0.01)
        held = sum(dispatcher.held for dispatcher in made)
        refused = sum(dispatcher.outcomes[Outcome.THROTTLED] for dispatcher in made)
        gate.set()
        stats = await settled(queue)
    assert refused > 0
    assert 0 < held <= 2 * workers
    assert sorted(started) == sorted([*(f"key{n}" for n in range(10)), *(f"other{n}" for n in range(990))])
    last = max(began for began, _, _, types in reads if "key" in types)
    behind = [ended for _, ended, after, types in reads if after and "other" in types]
    assert len(behind) > 10 * workers
    assert sum(ended < last for ended in behind) <= workers, "those behind were handed out while the key still waited"
    assert (stats.counters.get("retried", 0), stats.counters.get("dead", 0)) == (0, 0)


async def test_refusals_a_second_are_listed(queue, agents, manager):
    """Of what was asked and of what was parked without asking, over all processes; forgotten when it is over."""
    limiter = limit(manager, "provider", rate=0.01, burst=1)
    agents.register("call", lambda task: None, limits=[LimitUse(limiter, key="k")], retry=NEVER)
    await queue.produce_many([{"type": "call"} for _ in range(101)])
    async with Dispatcher(queue, agents=agents, drain_timeout=0.0) as dispatcher:
        await until(lambda: dispatcher.outcomes[Outcome.THROTTLED] == 100)
        async with asyncio.timeout(30):
            while not (status := (await list_limits(manager=manager))[0]).refused:
                await asyncio.sleep(0.05)
    assert (status.name, status.rate) == ("provider", 0.01)
    assert 0 < status.refused <= 10.0
    assert per_second("100 40 60", 1000.0) == 10.0
    assert per_second("100 40 60", 1005.0) == 7.0
    assert per_second("100 40 60", 1015.0) == 2.0
    assert per_second("100 40 60", 1020.0) == 0.0
