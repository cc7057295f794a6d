"""The specification's "Key Test Cases", by its names, on its mocks; what follows them tests the mocks' other uses.

Performance is compared as a ratio or counted, never timed against a clock on the wall.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import Counter
from itertools import pairwise

import pytest

from orchestra._delivery import Delivery
from orchestra.agents import AgentRegistry
from orchestra.circuit_breaker import CircuitBreaker, CircuitBreakerConfig
from orchestra.dispatcher import Dispatcher
from orchestra.errors import (
    BackpressureRejectedError,
    CircuitOpenError,
    ConfigurationError,
    LockError,
    StoreUnavailableError,
)
from orchestra.flow_control import BackpressureConfig, BackpressureStrategy, RateLimitConfig, RedisRateLimiter
from orchestra.load_balancer import (
    RandomStrategy,
    RoundRobinStrategy,
    WeightedRoundRobinStrategy,
    create_load_balancer,
)
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig
from orchestra.scheduler import PriorityScheduler
from orchestra.tasks import Outcome, Retry, TaskPriority
from orchestra.testing import (
    AsyncLockMock,
    ManualClock,
    MockAgent,
    MockAgentFactory,
    MockRedis,
    MockTaskQueue,
    MockWorkerPool,
    Recorder,
    hang,
)

QUICK = Retry(max_retries=3, base=0.001, max_delay=0.002)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def mock_redis(clock):
    return MockRedis(clock)


@pytest.fixture
async def task_queue():
    return MockTaskQueue("tasks", "workers")


@pytest.fixture
def agents():
    registry = AgentRegistry()
    yield registry
    registry.close()


@pytest.fixture
def agent_factory():
    return MockAgentFactory()


@pytest.fixture
async def worker_pool():
    async with MockWorkerPool("mock-pool", OrchestrationWorkerPoolConfig(workers=10, max_concurrent_tasks=10)) as pool:
        yield pool


@pytest.fixture
async def lock():
    return AsyncLockMock("exclusive")


@pytest.fixture
def make_limiter(mock_redis, clock):
    """A function that makes limiters on the mocked Redis, where time stands still until it is told to pass."""

    def make(rate=10.0, burst=5, **more) -> RedisRateLimiter:
        config = BackpressureConfig(rate_limit=RateLimitConfig(rate=rate, burst=burst), **more)
        return RedisRateLimiter("api_limiter", config, manager=mock_redis, clock=clock)

    return make


async def drained(queue, seconds=5.0):
    """The queue's statistics once no task is live; they must add up."""
    async with asyncio.timeout(seconds):
        while (stats := await queue.stats()).live:
            await asyncio.sleep(0.001)
    assert stats.adds_up, stats
    return stats


# -- flow control


async def test_flow_controller_initialization(make_limiter, mock_redis):
    limiter = make_limiter(rate=100.0, burst=50)
    assert limiter.name == "api_limiter"
    assert (limiter.config.rate_limit.rate, limiter.config.rate_limit.burst) == (100.0, 50)
    assert limiter.config.rate_limit.period == 1.0
    assert limiter.config.strategy is BackpressureStrategy.REJECT
    assert limiter.interval == pytest.approx(0.01)
    assert mock_redis.commands == [], "constructing asks nobody"
    assert RedisRateLimiter("other", manager=mock_redis).config == BackpressureConfig()


async def test_flow_controller_acquire(make_limiter, clock):
    limiter = make_limiter(rate=10.0, burst=5)
    assert [await limiter.acquire() for _ in range(7)] == [True] * 5 + [False] * 2
    clock.advance(0.0999)
    assert await limiter.acquire() is False
    clock.advance(0.0002)
    assert [await limiter.acquire() for _ in range(2)] == [True, False], "one permit every 0.1 s"
    clock.advance(60.0)
    assert [await limiter.acquire(cost=3), await limiter.acquire(cost=3), await limiter.acquire(cost=2)] == [
        True,
        False,
        True,
    ]
    limiter.release()
    assert await limiter.acquire() is False, "time gives permits back, not release()"


async def test_flow_controller_execute(make_limiter):
    limiter, calls = make_limiter(rate=10.0, burst=2), []

    async def process_request(request_id, *, suffix=""):
        calls.append(request_id)
        return {"status": "success", "id": request_id + suffix}

    assert await limiter.execute(process_request, "a", priority=1, cost=1, suffix="!") == {
        "status": "success",
        "id": "a!",
    }
    async with limiter:
        calls.append("inside")
    with pytest.raises(BackpressureRejectedError) as caught:
        await limiter.execute(process_request, "b")
    assert caught.value.retry_after == pytest.approx(0.1, abs=0.001)
    with pytest.raises(BackpressureRejectedError):
        async with limiter:
            calls.append("never")
    assert calls == ["a", "inside"]


# -- load balancer


def test_round_robin_strategy():
    balancer = create_load_balancer("round_robin")
    assert type(balancer) is RoundRobinStrategy
    assert [balancer.select_worker(["w1", "w2", "w3"]) for _ in range(7)] == ["w1", "w2", "w3", "w1", "w2", "w3", "w1"]
    assert balancer.select_worker([]) is None


def test_random_strategy():
    balancer, workers = create_load_balancer("random"), ["w1", "w2", "w3"]
    assert type(balancer) is RandomStrategy
    counts = Counter(balancer.select_worker(workers) for _ in range(3000))
    assert set(counts) == set(workers)
    assert min(counts.values()) > 800, "each is chosen about 1,000 times; 800 is eight standard deviations below"
    assert balancer.select_worker([]) is None


def test_weighted_round_robin_strategy():
    balancer, workers = create_load_balancer("weighted_round_robin"), ["worker1", "worker2", "worker3"]
    assert isinstance(balancer, WeightedRoundRobinStrategy)
    for worker, weight in zip(workers, (3, 1, 2), strict=True):
        balancer.set_worker_weight(worker, weight)
    chosen = [balancer.select_worker(workers) for _ in range(60)]
    for start in range(54):
        assert Counter(chosen[start : start + 6]) == {"worker1": 3, "worker2": 1, "worker3": 2}, "every window is exact"
    balancer.update_worker_status("worker1", {"weight": 2})
    later = [balancer.select_worker(workers) for _ in range(10)][5:]
    assert Counter(later) == {"worker1": 2, "worker2": 1, "worker3": 2}
    assert balancer.select_worker([]) is None


# -- scheduler


def named(name, priority=None):
    return {"id": name, "type": "data_processing"} | ({} if priority is None else {"priority": priority.value})


async def test_scheduler_add_get_task():
    scheduler = PriorityScheduler()
    order = [
        ("low", TaskPriority.LOW),
        ("plain", None),
        ("high", TaskPriority.HIGH),
        ("critical", TaskPriority.CRITICAL),
    ]
    for name, priority in [*order, ("normal", TaskPriority.NORMAL), ("high2", TaskPriority.HIGH)]:
        await scheduler.add_task(named(name, priority))
    assert scheduler.get_queue_size() == 6
    got = [(await scheduler.get_next_task())["id"] for _ in range(6)]
    assert got == ["critical", "high", "high2", "plain", "normal", "low"]
    assert scheduler.is_empty()
    assert await scheduler.get_next_task(timeout=0.001) is None
    full = PriorityScheduler(max_size=1)
    await full.add_task(named("a"))
    with pytest.raises(asyncio.QueueFull):
        await full.add_task(named("b"))


async def test_scheduler_peek_task():
    scheduler = PriorityScheduler()
    assert await scheduler.peek_next_task() is None
    await scheduler.add_task(named("low", TaskPriority.LOW))
    await scheduler.add_task(named("high", TaskPriority.HIGH))
    for _ in range(2):
        assert (await scheduler.peek_next_task())["id"] == "high"
    assert scheduler.get_queue_size() == 2
    assert (await scheduler.get_next_task())["id"] == "high"


async def test_scheduler_clear():
    scheduler = PriorityScheduler()
    for n in range(5):
        await scheduler.add_task(named(f"t{n}"))
    await scheduler.clear()
    assert (scheduler.is_empty(), scheduler.get_queue_size()) == (True, 0)
    assert await scheduler.peek_next_task() is None
    async with asyncio.timeout(1):
        await scheduler.join()
    await scheduler.add_task(named("after"))
    assert (await scheduler.get_next_task())["id"] == "after"


async def test_get_tasks_by_priority():
    scheduler = PriorityScheduler()
    for n, priority in enumerate([TaskPriority.LOW, TaskPriority.CRITICAL, TaskPriority.NORMAL, TaskPriority.CRITICAL]):
        await scheduler.add_task(named(f"t{n}", priority))
    assert [task["id"] for task in await scheduler.get_tasks_by_priority(count=3)] == ["t1", "t3", "t2"]
    assert [task["id"] for task in await scheduler.get_tasks_by_priority(count=10)] == ["t0"]
    assert await scheduler.get_tasks_by_priority(count=10) == []


# -- dispatcher


async def test_dispatcher_move_to_dlq(task_queue, agents, agent_factory):
    agent = agent_factory.create_agent("doomed", fail_times=-1, error=ValueError("no luck"))
    agents.register("doomed", agent, retry=Retry(max_retries=1, base=0.001))
    await task_queue.produce({"id": "task-123", "type": "doomed", "input": {"n": 1}})
    await task_queue.produce({"id": "task-124", "type": "nobody-serves-this"})
    async with Dispatcher(task_queue, agents=agents) as dispatcher:
        stats = await drained(task_queue)
    letters = {letter.task_data["id"]: letter for letter in await task_queue.read_dlq()}
    assert stats.dead == len(letters) == 2
    assert (letters["task-123"].reason, letters["task-123"].attempts) == ("failed", 2)
    assert letters["task-123"].task_data["input"] == {"n": 1}
    assert letters["task-123"].error_info["error"] == "no luck"
    assert letters["task-124"].reason == "unknown_agent"
    assert dispatcher.outcomes[Outcome.FAILED] == 3
    assert await task_queue.get_queue_depth() == 0


async def test_process_task(task_queue, agents, agent_factory):
    """One delivery through ``start_nowait``, in a slot of the dispatcher's own pool, to its settlement."""
    agent = agent_factory.create_agent("classify", result=lambda task: task.input["text"].upper())
    agents.register("classify", agent)
    dispatcher = Dispatcher(task_queue, agents=agents)
    await task_queue.produce(
        {"id": "task-123", "type": "classify", "input": {"text": "x"}, "priority": TaskPriority.HIGH}
    )
    (delivery,) = await task_queue.read(dispatcher.consumer, 1, 0)
    source = dispatcher._deliveries
    source.offer([delivery])
    assert dispatcher.held == 1
    (slot,) = dispatcher.pool.slots
    rest = source.start_nowait(slot, math.inf)
    if rest is not None:
        assert (dispatcher.held, dispatcher.running_tasks, slot.item) == (1, 1, delivery)
        await rest
    assert source.start_nowait(slot, math.inf) is None
    assert dispatcher.outcomes == {Outcome.COMPLETED: 1}
    assert (dispatcher.held, dispatcher.running_tasks) == (0, 0)
    (task,) = agent.calls
    assert (task.id, task.input, task.priority, task.attempt) == ("task-123", {"text": "x"}, TaskPriority.HIGH, 1)
    assert await task_queue.get_queue_depth() == 1, "ended is not settled"
    assert await task_queue.settle(dispatcher._settlements.pending) == []
    assert await task_queue.get_queue_depth() == 0
    await dispatcher.pool.shutdown(wait=False)


async def test_process_task_wrapper(task_queue, agents, agent_factory):
    """Retries through the whole execution: two failures, each counted, with backoff, then success."""
    agent = agent_factory.create_agent("flaky", fail_times=2)
    agents.register("flaky", agent, retry=QUICK)
    await task_queue.produce({"id": "task-123", "type": "flaky"})
    with Recorder("task.settled") as recorder:
        async with Dispatcher(task_queue, agents=agents) as dispatcher:
            stats = await drained(task_queue)
            events = await recorder.wait_for("task.settled", 3)
    assert [(task.id, task.attempt) for task in agent.calls] == [("task-123", 1), ("task-123", 2), ("task-123", 3)]
    fences = [task.fence for task in agent.calls]
    assert all(sooner < later for sooner, later in pairwise(fences))
    assert dispatcher.outcomes == {Outcome.FAILED: 2, Outcome.COMPLETED: 1}
    assert [event.metadata["outcome"] for event in events] == ["failed", "failed", "completed"]
    assert all(0 < event.metadata["retry_in_s"] <= 0.002 for event in events[:2])
    assert (stats.counters["retried"], stats.counters["completed"], stats.dead) == (2, 1, 0)


async def test_dispatcher_consumer_task(task_queue, agents):
    """The reading loop: it survives a store that is away, holds no more than it may, reads again when there is room."""
    agent = MockAgent()
    agents.register("work", agent)
    task_queue.fail_next("read", StoreUnavailableError("away"), times=2)
    await task_queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(50)])
    most = ahead = 0

    async def watch():
        nonlocal most, ahead
        while True:
            most, ahead = max(most, dispatcher.held), max(ahead, dispatcher._prefetch.size)
            await asyncio.sleep(0)

    async with Dispatcher(task_queue, agents=agents, max_concurrent_dispatch=3, batch_size=4) as dispatcher:
        watching = asyncio.create_task(watch())
        await drained(task_queue)
        watching.cancel()
    assert sorted(task.id for task in agent.calls) == sorted(f"t{n}" for n in range(50))
    assert agent.most_running <= 3
    assert dispatcher.outcomes == {Outcome.COMPLETED: 50}
    assert 0 < most <= 3 + ahead, "slots and what was fetched ahead"


async def test_dispatcher_run_stop(task_queue, agents):
    agent = MockAgent()
    agents.register("work", agent)
    dispatcher = Dispatcher(task_queue, agents=agents, worker_pool=MockWorkerPool(), dispatcher_id="d1")
    await dispatcher.stop()  # before it ran: nothing
    for number in range(2):  # a stopped dispatcher may run again
        running = asyncio.create_task(dispatcher.run())
        await task_queue.produce({"id": f"task-{number}", "type": "work"})
        await agent.wait_for_calls(number + 1)
        assert dispatcher.running
        assert not running.done(), "run() runs until stop()"
        await dispatcher.stop()
        async with asyncio.timeout(2):
            await running
        assert not dispatcher.running
    await dispatcher.stop()
    stats = await drained(task_queue)
    assert (stats.counters["completed"], stats.consumers) == (2, 0)
    assert dispatcher.pool.get_active_workers() > 0, "a pool that was given outlives the dispatcher"
    await dispatcher.pool.shutdown()


async def test_dispatchers_that_share_a_pool_stop_each_for_itself(agents, worker_pool):
    agent, queues = hang(), [MockTaskQueue("a", "workers"), MockTaskQueue("b", "workers")]
    agents.register("work", agent)
    one, two = (Dispatcher(queue, agents=agents, worker_pool=worker_pool, drain_timeout=0.0) for queue in queues)
    async with two:
        async with one:
            for queue in queues:
                await queue.produce({"type": "work"})
            await agent.wait_for_calls(2)
        assert (one.outcomes, two.outcomes) == ({Outcome.RELEASED: 1}, {})
        assert (agent.cancelled, two.running_tasks) == (1, 1)
        agent.release()
        await drained(queues[1])
    assert two.outcomes == {Outcome.COMPLETED: 1}


async def test_an_unexpected_error_of_the_queue_loses_no_verdict(task_queue, agents):
    """What ended must be settled after the loop was restarted; else its lease is renewed for ever."""
    agents.register("work", MockAgent())
    task_queue.fail_next("settle", ValueError("a bug"))
    await task_queue.produce_many([{"type": "work"} for _ in range(5)])
    async with Dispatcher(task_queue, agents=agents):
        stats = await drained(task_queue)
    assert stats.counters["completed"] == 5


async def test_a_stale_delivery_that_is_no_task_is_reported_all_the_same(task_queue, agents):
    dispatcher = Dispatcher(task_queue, agents=agents)
    with Recorder("task.stale") as recorder:
        dispatcher._settlements._tell_stale([Delivery(2, b"1-1", (b"t", b"garbage"), "consumer")])
    assert [event.metadata["task_id"] for event in recorder.events] == ["?"]


async def test_a_scheduler_belongs_to_one_running_dispatcher(agents):
    """Each would run the other's deliveries and settle them with its own queue, where they are stale."""
    agents.register("work", MockAgent())
    shared = PriorityScheduler()
    one, two = (Dispatcher(MockTaskQueue(name, "workers"), agents=agents, scheduler=shared) for name in "ab")
    async with one:
        with pytest.raises(ConfigurationError, match="needs a scheduler of its own"):
            await two.start()
        await one.queue.produce({"type": "work"})
        await drained(one.queue)
    async with two:  # one has stopped
        await two.queue.produce({"type": "work"})
        await drained(two.queue)


async def test_what_no_queue_delivered_is_dropped_and_said(task_queue, agents, caplog):
    agent, scheduler = MockAgent(), PriorityScheduler()
    agents.register("work", agent)
    async with Dispatcher(task_queue, agents=agents, scheduler=scheduler):
        await scheduler.add_task({"id": "stray", "type": "work", "priority": 0})
        await task_queue.produce({"id": "mine", "type": "work"})
        await drained(task_queue)
    assert [task.id for task in agent.calls] == ["mine"]
    assert "no queue delivered it; add tasks with produce()" in caplog.text


# -- performance: ratios and counts


def fastest(work, rounds=5):
    """Seconds of the quickest of some rounds: what the others waited for was somebody else."""

    def once():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return min(once() for _ in range(rounds))


def test_scheduler_performance():
    """In one run, with equal work: the scheduler with all its bookkeeping against a bare heapq of tuples."""
    tasks = [{"id": str(n), "type": "t", "priority": n * 7919 % 4} for n in range(10_000)]

    def scheduler():
        held = PriorityScheduler()
        for task in tasks:
            held.add_nowait(task)
        while held.pop_nowait() is not None:
            pass

    def bare():
        heap = []
        for n, task in enumerate(tasks):
            heapq.heappush(heap, (task["priority"], n, task))
        while heap:
            heapq.heappop(heap)

    ratio = fastest(scheduler) / fastest(bare)
    assert ratio < 2.0, f"{ratio:.2f} times the time of heapq"


async def test_flow_control_throughput(make_limiter, mock_redis, clock):
    """Requests of one moment share round trips, and what is known to be refused costs none."""
    limiter = make_limiter(rate=1000.0, burst=400)
    granted = await asyncio.gather(*[limiter.acquire() for _ in range(500)])
    assert sum(granted) == 400
    assert limiter.metrics.calls <= 2
    calls = limiter.metrics.calls
    refused = [await limiter.acquire() for _ in range(500)]
    assert not any(refused)
    assert limiter.metrics.calls == calls, "a proven refusal asks nobody"
    assert limiter.metrics.rejected_locally >= 500
    passed = 0
    for _ in range(100):  # a second, in steps of 10 ms
        clock.advance(0.01)
        passed += sum(await asyncio.gather(*[limiter.acquire() for _ in range(20)]))
    assert 995 <= passed <= 1000, "the rate; steps of 10 ms are not whole microseconds as floats"
    assert len(mock_redis.commands) < 400


async def test_orchestration_resilience(task_queue, agents, agent_factory):
    """Under every failure at once: each task ends exactly once, as completed or dead, and the numbers add up."""
    flaky = agent_factory.create_agent("flaky", pattern=(True, False, True, True, False))
    agents.register("flaky", flaky, retry=Retry(max_retries=20, base=0.0005, max_delay=0.001))
    agents.register(
        "doomed", agent_factory.create_agent("doomed", fail_times=-1), retry=Retry(max_retries=1, base=0.0005)
    )
    agents.register("slow", agent_factory.create_agent("slow", latency=60.0), timeout=0.01, retry=Retry(max_retries=0))
    for method in ("read", "settle"):
        task_queue.fail_next(method, StoreUnavailableError("away"), times=2)
    kinds = {"flaky": 200, "doomed": 20, "slow": 5, "unknown": 5}
    tasks = [
        {"id": f"{kind}-{n}", "type": kind, "priority": n % 4} for kind, count in kinds.items() for n in range(count)
    ]
    await task_queue.produce_many(tasks)
    twin = task_queue.twin()
    async with (
        Dispatcher(task_queue, agents=agents, consumer_name="one", max_concurrent_dispatch=20) as one,
        Dispatcher(twin, agents=agents, consumer_name="two", max_concurrent_dispatch=20) as two,
    ):
        task_queue.fail_next("maintain", StoreUnavailableError("away"), times=2)
        stats = await drained(task_queue, 20.0)
    assert stats.counters["completed"] == kinds["flaky"] == flaky.successes
    letters = Counter(letter.reason for letter in await task_queue.read_dlq(1000))
    assert letters == {"failed": 20, "timed_out": 5, "unknown_agent": 5}
    outcomes = one.outcomes + two.outcomes
    assert outcomes[Outcome.COMPLETED] == 200
    assert outcomes[Outcome.FAILED] == flaky.failures + 2 * 20 + 5
    assert outcomes[Outcome.TIMED_OUT] == 5
    assert stats.counters["retried"] == flaky.failures + 20
    assert one.outcomes[Outcome.COMPLETED] > 0
    assert two.outcomes[Outcome.COMPLETED] > 0


# -- the other fixtures at work


async def test_exclusive_operations_take_turns(lock, task_queue, monkeypatch):
    """The lock by dependency injection: whoever asks the queue for one gets the mock."""

    async def get_lock(lock_name, expire_time=30):
        return lock

    monkeypatch.setattr(task_queue, "get_lock", get_lock)
    inside = most = 0

    async def exclusive():
        nonlocal inside, most
        async with await task_queue.get_lock("exclusive_operation", expire_time=30):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*[exclusive() for _ in range(10)])
    assert (most, lock.acquisitions, lock.releases, lock.fence, lock.locked) == (1, 10, 10, 10, False)
    lock.available = False
    with pytest.raises(LockError):
        await exclusive()


async def test_the_worker_pool_tracks_what_was_submitted(worker_pool, agent_factory):
    agent, futures = agent_factory.create_agent("work", result="done"), []
    for n in range(5):
        futures.append(await worker_pool.submit(agent.process, f"item-{n}"))
    assert await asyncio.gather(*futures) == ["done"] * 5
    assert [job.args for job in worker_pool.submitted] == [(f"item-{n}",) for n in range(5)]
    assert worker_pool.metrics.completed == 5


async def test_a_circuit_breaker_stops_the_cascade(clock):
    agent = MockAgent(fail_times=3)
    breaker = CircuitBreaker("agent", CircuitBreakerConfig(failure_threshold=3, recovery_timeout=30.0), clock=clock)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            await breaker.call(agent.process, "task")
    with pytest.raises(CircuitOpenError) as caught:
        await breaker.call(agent.process, "task")
    assert len(agent.calls) == 3, "an open breaker calls nobody"
    assert caught.value.retry_after == 30.0
    clock.advance(caught.value.retry_after)
    agent.result = "recovered"
    assert await breaker.call(agent.process, "task") == "recovered"
