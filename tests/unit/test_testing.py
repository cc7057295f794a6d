"""The testing package itself: what it promises to those who test with it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest
from redis.exceptions import DataError, NoScriptError, ResponseError

from orchestra import _scripts, telemetry, testing
from orchestra._delivery import Again, Complete
from orchestra.agents import AgentRegistry
from orchestra.errors import (
    BackpressureRejectedError,
    ConfigurationError,
    LockError,
    StoreUnavailableError,
    WorkerPoolError,
)
from orchestra.flow_control import BackpressureConfig, RateLimitConfig, RedisRateLimiter
from orchestra.tasks import BaseTask
from orchestra.testing import (
    AsyncLockMock,
    InMemoryTaskQueue,
    ManualClock,
    MockAgent,
    MockAgentFactory,
    MockRedis,
    MockTaskQueue,
    MockWorkerPool,
    Recorder,
    SimulatedCrash,
)

TASK = BaseTask("t", "work")


def work(**keys):
    return {"type": "work", **keys}


def test_importing_it_imports_no_test_framework():
    program = "import sys, orchestra.testing; print(sorted({'pytest', 'unittest', 'hypothesis'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_it_names_exists():
    assert sorted(testing.__all__) == testing.__all__
    assert all(getattr(testing, name).__doc__ for name in testing.__all__)


# -- the clock


def test_the_clock_stands_still_until_it_is_told():
    clock = ManualClock(start=1000.0)
    assert (clock.monotonic(), clock.time()) == (0.0, 1000.0)
    clock.advance(2.5)
    assert (clock.monotonic(), clock.time()) == (2.5, 1002.5)
    clock.jump(-100)
    assert (clock.monotonic(), clock.time()) == (2.5, 902.5)


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_time_does_not_go_back(seconds):
    with pytest.raises(ValueError, match="0 seconds or more"):
        ManualClock().advance(seconds)


def test_who_waits_on_the_clock_is_told():
    clock, seen = ManualClock(), []
    detach = clock.on_advance(lambda: seen.append(clock.monotonic()))
    clock.advance(1)
    clock.advance(2)
    detach()
    detach()
    clock.advance(3)
    assert seen == [1, 3]


# -- the queue beyond the conformance suite


async def test_a_real_clock_wakes_a_reader_when_a_task_is_due():
    queue = InMemoryTaskQueue()
    await queue.produce(work(delay=30.0))
    reading = asyncio.create_task(queue.consume("a", 1, 10_000))
    await asyncio.sleep(0)
    began = time.monotonic()
    await queue.produce(work(id="soon", delay=0.05))
    ((_, task),) = await reading
    assert task["id"] == "soon"
    assert 0.045 <= time.monotonic() - began < 1.0


async def test_a_real_clock_wakes_a_consumer_when_a_lease_runs_out():
    queue = InMemoryTaskQueue(claim_interval_ms=100)
    await queue.produce(work(id="t"))
    await queue.consume("a")
    began = time.monotonic()
    ((_, task),) = await queue.consume("b", 1, 10_000)
    assert task["id"] == "t"
    assert 0.09 <= time.monotonic() - began < 1.0


async def test_a_consumer_that_waits_already_notices_a_lease_that_begins_later():
    queue = InMemoryTaskQueue(claim_interval_ms=100)
    waiting = asyncio.create_task(queue.consume("b", 1, 10_000))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await queue.produce(work(id="t"))
    queue._store.take("a", 1)
    async with asyncio.timeout(3):
        assert [task["id"] for _, task in await waiting] == ["t"]


async def test_a_real_clock_frees_an_expired_lock():
    queue = InMemoryTaskQueue()
    await (await queue.get_lock("x", expire_time=0.05)).acquire()
    async with asyncio.timeout(3), await queue.get_lock("x") as lock:
        assert lock.fence == 2


async def test_the_dedup_window_ends():
    clock = ManualClock()
    queue = InMemoryTaskQueue(clock=clock, dedup_window=60.0)
    first = await queue.produce(work(id="x"))
    clock.advance(59)
    assert await queue.produce(work(id="x")) == first
    clock.advance(1)
    assert await queue.produce(work(id="x")) != first
    assert not queue._store._known.keys() - {"x"}


async def test_results_are_kept_for_a_while():
    clock = ManualClock()
    queue = InMemoryTaskQueue(clock=clock, result_ttl=10.0)
    await queue.produce_many([work(id="x")], want_results=True)
    (delivery,) = await queue.read("a", 1, 0)
    await queue.settle([(delivery, Complete(1))])
    clock.advance(9)
    assert (await queue.wait_result("x", 0))["value"] == 1
    clock.advance(1)
    with pytest.raises(TimeoutError, match="'x' has no result"):
        await queue.wait_result("x", 0)


async def test_kept_leases_do_not_run_out():
    clock = ManualClock()
    queue = InMemoryTaskQueue(clock=clock)
    await queue.produce_many([work(id="kept"), work(id="other")])
    (kept,) = await queue.read("a", 1, 0)
    await queue.read("x", 1, 0)
    lost = []
    async with queue.keep_leases("a", lost.append):
        clock.advance(1000)
        assert [d.header.id for d in (await queue.maintain("b", 10)).deliveries] == ["other"]
    assert (await queue.maintain("b", 10)).deliveries == [], "the lease starts anew"
    assert await queue.settle([(kept, Complete())]) == []
    assert lost == []


async def test_a_lease_that_was_lost_before_is_told():
    clock = ManualClock()
    queue = InMemoryTaskQueue(clock=clock)
    await queue.produce(work())
    (old,) = await queue.read("a", 1, 0)
    clock.advance(100)
    await queue.twin().maintain("b", 1)
    lost = []
    async with queue.keep_leases("a", lost.append):
        pass
    assert lost == [old]
    assert old.lost


async def test_next_in_says_when_to_maintain():
    clock = ManualClock()
    queue = InMemoryTaskQueue(clock=clock, claim_interval_ms=60_000)
    assert (await queue.maintain("a", 1)).next_in == 1.0, "it looks for cancelled tasks"
    await queue.produce_many([work(), work(delay=0.5)])
    await queue.read("a", 1, 0)
    assert (await queue.maintain("a", 1)).next_in == 0.5
    clock.advance(59.75)
    await queue.read("a", 1, 0)
    assert (await queue.maintain("a", 0)).next_in == 0.25


async def test_ids_grow_although_the_wall_clock_goes_back():
    clock = ManualClock()
    queue = InMemoryTaskQueue(clock=clock)
    await queue.produce(work())
    clock.jump(-3600)
    await queue.produce(work())
    first, second = [message_id for message_id, _ in await queue.consume("a", 2)]
    assert tuple(map(int, first[2:].split("-"))) < tuple(map(int, second[2:].split("-")))


async def test_every_coroutine_yields_before_it_acts():
    queue = InMemoryTaskQueue()
    producing = asyncio.create_task(queue.produce(work()))
    await asyncio.sleep(0)
    producing.cancel()
    (outcome,) = await asyncio.gather(producing, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError)
    assert await queue.get_queue_depth() == 0


async def test_no_cancellation_loses_a_task_or_leaves_a_waiter():
    """Every interleaving of a few ticks between produce, cancel and a second reader."""
    for ticks in range(6):
        for readers in range(1, 4):
            queue = InMemoryTaskQueue()
            waiting = [asyncio.create_task(queue.read(f"c{i}", 1, 5000)) for i in range(readers)]
            for _ in range(3):
                await asyncio.sleep(0)
            produced = [asyncio.create_task(queue.produce(work())) for _ in range(2)]
            for _ in range(ticks):
                await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.gather(*produced)
            for _ in range(6):
                await asyncio.sleep(0)
            stats = await queue.stats()
            held = sum(len(task.result()) for task in waiting if task.done() and not task.cancelled())
            assert sum(stats.in_flight) == held
            still = [task for task in waiting if not task.done()]
            assert not (still and sum(stats.waiting)), "somebody sleeps beside a waiting task"
            for task in still:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert queue._bells._waiting == {}


async def test_the_mock_queue_remembers():
    queue = MockTaskQueue()
    await queue.produce(work(id="a"))
    await queue.produce_many([work(id="b")])
    assert [task["id"] for task in queue.produced] == ["a", "b"]
    ((message_id, _),) = await queue.consume("c")
    await queue.acknowledge(message_id)
    await queue.acknowledge(message_id)
    assert queue.acknowledged == [message_id]
    await queue.cancel("b")
    assert queue.cancelled == ["b"]


@pytest.mark.parametrize(
    "method",
    ["produce", "produce_many", "consume", "read", "acknowledge", "add_to_dlq", "settle", "maintain", "cancel"],
)
async def test_the_mock_queue_fails_when_told(method):
    calls = {
        "produce": lambda q: q.produce(work()),
        "produce_many": lambda q: q.produce_many([work()]),
        "consume": lambda q: q.consume("a", 1, 0),
        "read": lambda q: q.read("a", 1, 0),
        "acknowledge": lambda q: q.acknowledge("2:1-1"),
        "add_to_dlq": lambda q: q.add_to_dlq("2:1-1", {}, {}),
        "settle": lambda q: q.settle([]),
        "maintain": lambda q: q.maintain("a", 1),
        "cancel": lambda q: q.cancel("t"),
    }
    queue = MockTaskQueue()
    queue.fail_next(method, StoreUnavailableError("down"), times=2)
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            await calls[method](queue)
    await calls[method](queue)
    assert (await queue.stats()).adds_up


def test_the_mock_queue_refuses_unknown_methods():
    with pytest.raises(ValueError, match="produce, produce_many"):
        MockTaskQueue().fail_next("explode", RuntimeError())


async def test_a_delivery_can_be_taken_away():
    queue = MockTaskQueue()
    await queue.produce(work(id="t"))
    (delivery,) = await queue.read("a", 1, 0)
    lost = []
    with Recorder("lease.lost") as recorder:
        async with queue.keep_leases("a", lost.append):
            queue.take_away(delivery)
    assert lost == [delivery]
    assert recorder.of("lease.lost", task_id="t")
    assert await queue.settle([(delivery, Again(0.0))]) == [delivery]
    with pytest.raises(ValueError, match="is not held"):
        queue.take_away(delivery)
    assert (await queue.stats()).adds_up


# -- agents


async def test_scripted_agents():
    assert await testing.succeed(7).process(TASK) == 7
    flaky = testing.fail_times(2, then="ok")
    for number in (1, 2):
        with pytest.raises(RuntimeError, match=f"scripted failure {number} of 2"):
            await flaky.process(TASK)
    assert await flaky.process(TASK) == "ok"
    assert flaky.calls == [TASK] * 3
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        await testing.fail(error).process(TASK)
    assert caught.value is error
    with pytest.raises(SimulatedCrash):
        await testing.crash().process(TASK)
    assert not issubclass(SimulatedCrash, Exception)


async def test_a_hanging_agent_hangs_until_it_is_released_or_cancelled():
    agent = testing.hang("late")
    running = [asyncio.create_task(agent.process(TASK)) for _ in range(3)]
    assert len(await agent.wait_for_calls(3)) == 3
    assert (agent.running, agent.most_running) == (3, 3)
    running[0].cancel()
    await asyncio.gather(running[0], return_exceptions=True)
    assert agent.cancelled == 1
    agent.release()
    assert await asyncio.gather(*running[1:]) == ["late", "late"]
    await agent.wait_until_idle()


async def test_a_stubborn_agent_ignores_its_cancellation():
    agent = testing.ignore_cancellation("done")
    running = asyncio.create_task(agent.process(TASK))
    for _ in range(3):
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.sleep(0)
    assert not running.done()
    assert agent.cancelled == 3
    agent.release()
    assert await running == "done"


async def test_a_blocking_agent_blocks_the_loop():
    ticked = []
    asyncio.get_running_loop().call_later(0.005, ticked.append, 1)
    assert await testing.block(0.03, "x").process(TASK) == "x"
    assert ticked == []


async def test_waiting_for_calls_that_do_not_come():
    with pytest.raises(TimeoutError, match="0 of 1 calls"):
        await testing.succeed().wait_for_calls(1, timeout=0.01)


async def test_mock_agents():
    agent = MockAgent("classifier")
    assert await agent.process(TASK) == {"agent": "classifier", "task_id": "t", "status": "success"}
    assert await MockAgent(result=lambda task: task.id * 2).process(TASK) == "tt"
    patterned = MockAgent(pattern=[True, False], error=ValueError("x"))
    outcomes = await asyncio.gather(*(patterned.process(TASK) for _ in range(4)), return_exceptions=True)
    assert [isinstance(outcome, ValueError) for outcome in outcomes] == [False, True, False, True]
    assert (patterned.successes, patterned.failures) == (2, 2)
    never = MockAgent(fail_times=-1)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="mock-agent fails call"):
            await never.process(TASK)
    began = time.monotonic()
    await MockAgent(latency=0.02).process(TASK)
    assert time.monotonic() - began >= 0.015
    with pytest.raises(ConfigurationError, match="latency"):
        MockAgent(latency=-1)


async def test_the_mock_factory():
    factory = MockAgentFactory(latency=0.0).configure("planner", result=[1])
    registry = AgentRegistry()
    planner, executor = factory.register(registry, "planner", "executor")
    assert await registry.call(BaseTask("t", "planner")) == [1]
    assert (await registry.call(BaseTask("t", "executor")))["agent"] == "executor"
    assert factory.created == {"planner": [planner], "executor": [executor]}
    assert factory.create_agent("planner", name="second").name == "second"
    assert len(factory.created["planner"]) == 2


async def test_the_mock_pool_runs_and_remembers():
    async def double(x, *, add=0):
        return 2 * x + add

    pool = MockWorkerPool()
    future = await pool.submit(double, 4, add=1)
    assert await future == 9
    (job,) = pool.submitted
    assert (job.func, job.args, job.kwargs, job.future) == (double, (4,), {"add": 1}, future)
    pool.fail_with = WorkerPoolError("full")
    with pytest.raises(WorkerPoolError):
        await pool.submit(double, 4)
    assert len(pool.submitted) == 1
    pool.fail_with = None
    await pool.shutdown()
    with pytest.raises(WorkerPoolError):
        await pool.submit(double, 4)


async def test_the_mock_lock_excludes_and_counts():
    lock, inside = AsyncLockMock(), []

    async def enter():
        async with lock:
            inside.append(lock.fence)
            assert lock.locked
            await asyncio.sleep(0)
            assert inside[-1] == lock.fence

    await asyncio.gather(*(enter() for _ in range(3)))
    assert (inside, lock.acquisitions, lock.releases, lock.locked) == ([1, 2, 3], 3, 3, False)
    assert await lock.release() is False
    with pytest.raises(LockError):
        async with AsyncLockMock(available=False):
            raise AssertionError("entered")


# -- the recorder


async def test_the_recorder_waits_for_events_to_come():
    with Recorder("task.started", "task.settled") as recorder:
        telemetry.emit("task.started", {}, {"task_id": "a"})
        waiting = asyncio.create_task(recorder.wait_for("task.settled", 2, outcome="completed"))
        await asyncio.sleep(0)
        for outcome in ("completed", "failed", "completed"):
            assert not waiting.done()
            telemetry.emit("task.settled", {"run_s": 0.5}, {"outcome": outcome})
        events = await waiting
        assert [event.measurements["run_s"] for event in events] == [0.5, 0.5]
        assert len(recorder.events) == 4
        recorder.clear()
        assert recorder.of("task.settled") == []
    telemetry.emit("task.started", {}, {})
    assert recorder.events == []


async def test_the_recorder_hears_other_threads():
    with Recorder() as recorder:
        thread = threading.Thread(target=telemetry.emit, args=("lease.renewed", {"count": 1}, {"queue": "q"}))
        waiting = asyncio.create_task(recorder.wait_for("lease.renewed"))
        await asyncio.sleep(0)
        thread.start()
        assert len(await waiting) == 1
        thread.join()


async def test_the_recorder_says_what_came_instead():
    with Recorder("task.started", "task.settled") as recorder:
        telemetry.emit("task.started", {}, {})
        with pytest.raises(TimeoutError, match=r"0 of 1 'task.settled' .*recorded: task.started"):
            await recorder.wait_for("task.settled", timeout=0.01)
        with pytest.raises(ValueError, match="is not recorded"):
            await recorder.wait_for("queue.produced")
    with pytest.raises(KeyError), Recorder("no.such.event"):
        raise AssertionError("entered")


# -- MockRedis


async def test_mock_redis_strings():
    clock = ManualClock()
    redis = MockRedis(clock)
    assert await redis.get("k") is None
    assert await redis.set("k", 5, px=1500) is True
    assert await redis.get(b"k") == b"5"
    assert (await redis.pttl("k"), await redis.ttl("k")) == (1500, 2)
    assert await redis.set("k", "x", nx=True) is None
    assert await redis.incr("k", 2) == 7
    assert await redis.pttl("k") == 1500
    clock.advance(1.5)
    assert (await redis.get("k"), await redis.pttl("k"), await redis.exists("k")) == (None, -2, 0)
    assert await redis.set("k", "x", xx=True) is None
    await redis.set("k", "x")
    assert (await redis.ttl("k"), await redis.expire("k", 9), await redis.ttl("k")) == (-1, True, 9)
    assert await redis.delete("k", "nothing") == 1
    assert await redis.expire("k", 9) is False
    assert redis.commands[0] == ("GET", "k")


async def test_mock_redis_hashes_and_time():
    redis = MockRedis(ManualClock(start=1000.25))
    assert await redis.hset("h", "a", 1) == 1
    assert await redis.hset("h", mapping={"a": 2, "b": 3}) == 1
    assert await redis.hget("h", "a") == b"2"
    assert await redis.hgetall("h") == {b"a": b"2", b"b": b"3"}
    assert await redis.time() == (1000, 250_000)
    assert await redis.ping() is True
    await redis.flushall()
    assert await redis.hgetall("h") == {}


async def test_mock_redis_refuses_what_it_does_not_know():
    redis = MockRedis()
    with pytest.raises(ResponseError, match="unknown command 'XADD'"):
        await redis.execute_command("XADD", "s", "*", "a", 1)
    with pytest.raises(ResponseError, match="runs only the scripts"):
        await redis.eval("return 1", 0)
    with pytest.raises(NoScriptError):
        await redis.evalsha("0" * 40, 0)
    await redis.set("k", "text")
    with pytest.raises(ResponseError, match="not an integer"):
        await redis.incr("k")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await redis.hget("k", "f")
    with pytest.raises(DataError):
        await redis.set("k", None)
    redis.fail_next(ConnectionError("down"))
    with pytest.raises(ConnectionError):
        await redis.get("k")
    assert await redis.get("k") == b"text"


async def test_mock_redis_runs_scripts_as_the_engine_calls_them():
    redis = MockRedis(ManualClock())
    reply = await _scripts.call(redis, "lock_acquire", ["l", "f"], ["me", 1000])
    assert reply == [1, 0]
    assert [command[0] for command in redis.commands] == ["EVALSHA", "EVAL"]
    assert await _scripts.call(redis, "lock_acquire", ["l", "f"], ["me", 1000]) == [1, 0]
    assert await _scripts.call(redis, "lock_acquire", ["l", "f"], ["you", 1000]) == [0, 1000]
    assert await _scripts.call(redis, "lock_extend", ["l"], ["you", 9]) == 0
    assert await _scripts.call(redis, "lock_release", ["l"], ["you"]) == 0
    assert await _scripts.call(redis, "lock_release", ["l"], ["me"]) == 1
    assert await _scripts.call(redis, "lock_acquire", ["l", "f"], ["you", 1000]) == [2, 0]


async def test_a_limiter_on_mock_redis():
    clock = ManualClock()
    config = BackpressureConfig(rate_limit=RateLimitConfig(rate=10.0, burst=5))
    limiter = RedisRateLimiter("api", config, manager=MockRedis(clock), clock=clock)
    assert [await limiter.acquire() for _ in range(6)] == [True] * 5 + [False]
    clock.advance(0.1)
    assert [await limiter.acquire(), await limiter.acquire()] == [True, False]

    async def run():
        return "ran"

    with pytest.raises(BackpressureRejectedError) as caught:
        await limiter.execute(run)
    assert 0 < caught.value.retry_after <= 0.1
    clock.advance(1.0)
    assert await limiter.execute(run, cost=5) == "ran"


async def test_the_gcra_script_admits_no_more_than_the_limit():
    clock = ManualClock()
    redis = MockRedis(clock)
    admitted = []
    for step in range(300):
        clock.advance((step * 7919 % 23) / 100)
        call = [1, "limit", 0, 100_000, 500_000, 1, 0, 1, 1, 1, 0]
        now, tat, wait, _ = await _scripts.call(redis, "gcra", ["set", "tat"], call)
        assert now == int(clock.time() * 1e6)
        assert now <= tat <= now + 500_000
        if wait == 0:
            admitted.append(now)
    for i, start in enumerate(admitted):
        for j in range(i, len(admitted)):
            assert j - i + 1 <= 5 + (admitted[j] - start) / 100_000 + 1e-9
    assert len(admitted) > 200
