"""Replicas in the dispatcher: breakers take them out and let them back in, balancers obey what they are told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from orchestra.agents import LimitUse
from orchestra.circuit_breaker import CircuitBreakerConfig, CircuitState
from orchestra.dispatcher import Dispatcher
from orchestra.errors import ConfigurationError, RetryLater, Throttled, UnknownAgentError
from orchestra.flow_control import BackpressureConfig, RateLimitConfig, RedisRateLimiter
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Outcome, Retry
from tests.waiting import settled, until

NEVER = Retry(max_retries=0)
QUICK = Retry(max_retries=3, base=0.01, max_delay=0.05)


@pytest.fixture
async def queue(manager):
    queue = RedisStreamTaskQueue("tasks", "workers", 30_000, manager=manager)
    yield queue
    await queue.close()


class Replicas:
    """Replicas a, b, … of the type ``ask``, some of which fail; counts who ran how often."""

    def __init__(self, queue, agents, weights, config=None, **options) -> None:
        self.queue, self.failing = queue, set()
        self.ran: Counter[str] = Counter()
        self.attempts: list[int] = []
        self.of = {}
        for name, weight in weights.items():
            self.of[name] = agents.register(
                "ask", self._agent(name), worker_id=name, weight=weight, breaker=config, **options
            )

    def _agent(self, name):
        async def agent(task):
            self.ran[name] += 1
            self.attempts.append(task.attempt)
            if name in self.failing:
                raise ConnectionError(f"{name} is down")

        return agent

    async def send(self, count) -> Counter[str]:
        """Send tasks, one finished before the next ones are sent; who ran them."""
        before = Counter(self.ran)
        await self.queue.produce_many([{"type": "ask"} for _ in range(count)])
        await settled(self.queue)
        return self.ran - before


async def test_a_failing_replica_is_out_of_rotation_and_comes_back(queue, agents):
    """Three weighted replicas: the failing one gets no more than opens its breaker, the others stay exact, none is dead."""
    config = CircuitBreakerConfig(failure_threshold=3, recovery_timeout=60.0, window=10.0)
    replicas = Replicas(queue, agents, {"a": 5, "b": 3, "c": 2}, config, retry=QUICK)
    breaker = replicas.of["b"].breaker
    assert breaker.name == "ask/b"
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
        assert await replicas.send(40) == {"a": 20, "b": 12, "c": 8}
        replicas.failing.add("b")
        ran = await replicas.send(20)
        assert ran["b"] == 3, "the window is three failures"
        assert breaker.state is CircuitState.OPEN
        # Out of rotation: weights are exact among the rest, at the latest one window after the change.
        await replicas.send(7)
        assert await replicas.send(70) == {"a": 50, "c": 20}
        replicas.failing.clear()
        breaker.adopt(CircuitState.OPEN, 0.2, forced=False, fresh=True, era=breaker.era)  # its time is over soon
        await until(lambda: breaker.state is CircuitState.HALF_OPEN)
        await replicas.send(20)
        assert breaker.state is CircuitState.CLOSED
        assert await replicas.send(40) == {"a": 20, "b": 12, "c": 8}
        stats = await queue.stats()
    assert stats.dead == 0
    assert stats.counters["retried"] == 3
    assert dispatcher.outcomes[Outcome.FAILED] == 3


async def test_all_replicas_open_parks_tasks_uncharged(queue, agents):
    """Pain 23: the provider is down; what waits for it consumes no attempt, and goes on when it is back."""
    config = CircuitBreakerConfig(failure_threshold=2, recovery_timeout=0.3)
    replicas = Replicas(
        queue, agents, {"a": 1, "b": 1}, config, retry=Retry(max_retries=500, base=0.01, max_delay=0.01)
    )
    replicas.failing.update("ab")
    began = time.monotonic()

    def most():
        """Runs that fail: two open each breaker, then one of each is a probe every 0.3 seconds, however slow the machine is."""
        return 4 + 2 * (1 + (time.monotonic() - began) / 0.3)

    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
        await queue.produce_many([{"type": "ask"} for _ in range(50)])
        await until(lambda: dispatcher.outcomes[Outcome.THROTTLED] >= 50)
        failed = sum(replicas.ran.values())
        assert failed <= most(), "but for probes nothing runs"
        replicas.failing.clear()
        stats = await settled(queue)
    assert stats.dead == 0
    assert stats.counters["completed"] == 50
    assert len(replicas.attempts) == 50 + failed, "what waited consumed no attempt"


async def test_a_half_open_replica_gets_its_probes_only(queue, agents):
    """I12: a hundred tasks wait for a breaker that is half-open; not more than its probes run at once."""
    running = most = 0
    release = asyncio.Event()
    down = True

    async def agent(_task):
        nonlocal running, most
        if down:
            raise ConnectionError
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1

    config = CircuitBreakerConfig(failure_threshold=1, recovery_timeout=0.2, half_open_max_calls=2, success_threshold=2)
    replica = agents.register("ask", agent, breaker=config, retry=QUICK)
    async with Dispatcher(queue, agents=agents) as dispatcher:
        await queue.produce({"type": "ask"})
        await until(lambda: replica.breaker.state is CircuitState.OPEN)
        down = False
        await queue.produce_many([{"type": "ask"} for _ in range(100)])
        await until(lambda: running == 2)
        refused = dispatcher.outcomes[Outcome.THROTTLED]
        await until(lambda: dispatcher.outcomes[Outcome.THROTTLED] >= refused + 20)
        assert most == 2
        release.set()
        stats = await settled(queue)
    assert (stats.dead, stats.counters["completed"]) == (0, 101)


@pytest.mark.parametrize("error", [Throttled(0.01), RetryLater(0.01)])
async def test_words_of_an_agent_do_not_open_its_breaker(queue, agents, error):
    calls = 0

    async def agent(_task):
        nonlocal calls
        calls += 1
        if calls <= 3:
            raise error

    config = CircuitBreakerConfig(failure_threshold=1, neutral=())
    if isinstance(error, RetryLater):
        config = CircuitBreakerConfig(failure_threshold=1)
    replica = agents.register("ask", agent, breaker=config)
    async with Dispatcher(queue, agents=agents):
        await queue.produce({"type": "ask"})
        await settled(queue)
    assert (replica.breaker.state, calls) == (CircuitState.CLOSED, 4)


async def test_timeouts_open_a_breaker_and_releases_do_not(queue, agents):
    async def agent(task):
        await asyncio.sleep(60)

    config = CircuitBreakerConfig(failure_threshold=2, recovery_timeout=60)
    slow = agents.register("slow", agent, breaker=config, timeout=0.05, retry=NEVER)
    held = agents.register("held", agent, breaker=CircuitBreakerConfig(failure_threshold=1), retry=NEVER)
    dispatcher = Dispatcher(queue, agents=agents, drain_timeout=0.0)
    async with dispatcher:
        await queue.produce_many([{"type": "slow"}, {"type": "slow"}, {"type": "held"}])
        await until(lambda: dispatcher.outcomes[Outcome.TIMED_OUT] == 2)
        assert slow.breaker.state is CircuitState.OPEN
        await until(lambda: held.running == 1)
    assert held.breaker.state is CircuitState.CLOSED
    assert held.breaker.failures == 0


async def test_failing_over_does_not_wait(queue, agents):
    """The failure that opens the breaker is repeated on the other replica at once, not after its backoff."""
    config = CircuitBreakerConfig(failure_threshold=1, recovery_timeout=60)
    slow = Retry(max_retries=1, base=60.0, jitter=False)
    replicas = Replicas(queue, agents, {"a": 1, "b": 1}, config, retry=slow, failover=True)
    replicas.failing.add("a")
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1, retry_budget=None):
        assert await replicas.send(2) == {"a": 1, "b": 2}
    assert sorted(replicas.attempts) == [1, 1, 2]


async def test_what_a_balancer_is_told_holds_while_tasks_run(queue, agents):
    replicas = Replicas(queue, agents, {"a": 1, "b": 1, "c": 1})
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
        balancer = dispatcher.balancer("ask")
        assert await replicas.send(30) == {"a": 10, "b": 10, "c": 10}
        balancer.update_worker_status("b", {"healthy": False})
        assert await replicas.send(30) == {"a": 15, "c": 15}
        balancer.update_worker_status("a", {"weight": 4})
        await replicas.send(5)
        assert await replicas.send(50) == {"a": 40, "c": 10}
        balancer.update_worker_status("b", {"healthy": True})
        agents.register("ask", replicas._agent("d"), worker_id="d", weight=2)
        await replicas.send(8)
        assert await replicas.send(80) == {"a": 40, "b": 10, "c": 10, "d": 20}, "what was set stays when others come"
        agents.unregister("ask", "d")
        await replicas.send(6)
        assert await replicas.send(60) == {"a": 40, "b": 10, "c": 10}
        with pytest.raises(UnknownAgentError):
            dispatcher.balancer("unknown")


async def test_a_single_replica_that_is_said_to_be_ill_gets_nothing(queue, agents):
    replicas = Replicas(queue, agents, {"a": 1}, retry=NEVER)
    async with Dispatcher(queue, agents=agents) as dispatcher:
        assert await replicas.send(5) == {"a": 5}
        dispatcher.balancer("ask").update_worker_status("a", {"healthy": False})
        await queue.produce({"type": "ask"})
        await until(lambda: dispatcher.outcomes[Outcome.THROTTLED] >= 3)
        assert replicas.ran["a"] == 5
        dispatcher.balancer("ask").update_worker_status("a", {"healthy": True})
        await settled(queue)
    assert replicas.ran["a"] == 6
    assert set(replicas.attempts) == {1}


async def test_a_type_runs_no_more_at_once_than_it_may_and_others_go_on(queue, agents):
    running = Counter()
    most = Counter()

    async def agent(task):
        running[task.type] += 1
        most[task.type] = max(most[task.type], running[task.type])
        await asyncio.sleep(0.005)
        running[task.type] -= 1

    agents.register("few", agent, worker_id="a", type_concurrency=3, retry=NEVER)
    agents.register("few", agent, worker_id="b")
    agents.register("many", agent, retry=NEVER)
    await queue.produce_many([{"type": kind} for _ in range(60) for kind in ("few", "many")])
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=30):
        stats = await settled(queue)
    assert most["few"] == 3
    assert most["many"] > 3
    assert (stats.dead, stats.counters["completed"]) == (0, 120)


async def test_the_breakers_of_a_worker_are_shown(queue, agents, manager):
    from orchestra._breakers.exchange import shown_breakers

    agents.register("ask", lambda task: None, worker_id="a", breaker=CircuitBreakerConfig())
    async with Dispatcher(queue, agents=agents) as dispatcher:
        async with asyncio.timeout(20):
            while not (shown := await shown_breakers(manager, "tasks")):
                await asyncio.sleep(0.05)
        assert "ask/a" in str(shown)
        assert dispatcher.consumer in str(shown)


def limit(manager, name, rate, burst, **options):
    config = BackpressureConfig(rate_limit=RateLimitConfig(rate=rate, burst=burst), **options)
    return RedisRateLimiter(name, config, manager=manager)


async def test_a_limit_of_one_replica_counts_for_it_alone(queue, agents, manager):
    """One of two endpoints gives 5 calls: the other takes over all the rest, nobody is charged, and weights hold before."""
    narrow = limit(manager, "narrow", 0.01, 5)
    replicas = Replicas(queue, agents, {"wide": 1})
    replicas.of["narrow"] = agents.register(
        "ask", replicas._agent("narrow"), worker_id="narrow", own_limits=[LimitUse(narrow)]
    )
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
        assert await replicas.send(10) == {"wide": 5, "narrow": 5}
        assert await replicas.send(30) == {"wide": 30}
        assert dispatcher.outcomes == {Outcome.COMPLETED: 40}
        assert narrow.metrics.calls <= 7, "what is known to be refused is not asked"
    assert set(replicas.attempts) == {1}
    assert [replica.running for replica in replicas.of.values()] == [0, 0]


async def test_when_the_limits_of_all_replicas_refuse_tasks_wait_uncharged(queue, agents, manager):
    """Two endpoints with limits of their own: together they give what both do, in order, and nothing is retried."""
    replicas = Replicas(queue, agents, {})
    config = CircuitBreakerConfig(failure_threshold=1, half_open_max_calls=1)
    for name in "ab":
        own = [LimitUse(limit(manager, "ask:{replica}", 50.0, 2), key=name)]
        replicas.of[name] = agents.register(
            "ask", replicas._agent(name), worker_id=name, own_limits=own, breaker=config, max_concurrency=1
        )
    began = time.monotonic()
    async with Dispatcher(queue, agents=agents) as dispatcher:
        ran = await replicas.send(40)
        assert dispatcher.outcomes[Outcome.THROTTLED] > 0
    took = time.monotonic() - began
    assert sum(ran.values()) == 40
    assert max(ran.values()) <= 2 + 50 * took + 1
    assert set(replicas.attempts) == {1}
    assert [replica.breaker.state for replica in replicas.of.values()] == [CircuitState.CLOSED] * 2
    stats = await queue.stats()
    assert (stats.counters.get("retried", 0), stats.counters.get("dead", 0)) == (0, 0)


async def test_a_key_of_a_replicas_limit_that_cannot_be_told_is_the_tasks_failure(queue, agents, manager):
    own = [LimitUse(limit(manager, "ask:{tenant}", 50.0, 2), key="{tenant}")]
    agents.register("ask", Replicas(queue, agents, {})._agent("a"), worker_id="a", own_limits=own)
    await queue.produce({"type": "ask"})
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    (letter,) = await queue.read_dlq()
    assert (letter.reason, letter.attempts) == ("bad_limit", 0)
    with pytest.raises(ConfigurationError, match="own_limits"):
        agents.register("ask", lambda task: None, own_limits=["narrow"])


async def test_a_breaker_that_comes_later_is_shown_too(queue, agents, manager):
    """An agent registered while the worker runs: its breaker is shown, and shared where its configuration says so."""
    from orchestra._breakers.exchange import shown_breakers

    agents.register("plain", lambda task: None)
    async with Dispatcher(queue, agents=agents):
        late = agents.register("ask", lambda task: None, worker_id="late", breaker=CircuitBreakerConfig(shared=True))
        async with asyncio.timeout(30):
            while not (shown := await shown_breakers(manager, "tasks")):
                await asyncio.sleep(0.05)
        assert [(each["name"], each["shared"]) for each in shown] == [("ask/late", True)]
        assert late.breaker.attached
