"""The dispatcher on real Redis: every outcome of a delivery, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextvars
import time

import pytest

from orchestra.dispatcher import Dispatcher
from orchestra.errors import Reject, RetryLater, StoreUnavailableError, Throttled
from orchestra.flow_control import BackpressureConfig, RateLimitConfig, RedisRateLimiter
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Outcome, Retry, TaskPriority

QUICK = Retry(max_retries=2, base=0.01, max_delay=0.02)


@pytest.fixture
async def queue(manager):
    queue = RedisStreamTaskQueue("tasks", "workers", 5_000, manager=manager)
    yield queue
    await queue.close()


async def until(condition, seconds=5.0):
    """Wait until the coroutine function ``condition`` gives something true; returns it."""
    async with asyncio.timeout(seconds):
        while not (value := await condition()):
            await asyncio.sleep(0.005)
        return value


async def settled(queue):
    """The statistics of ``queue`` once nothing is live; they must add up."""

    async def empty():
        stats = await queue.stats()
        return stats if stats.live == 0 else None

    stats = await until(empty)
    assert stats.adds_up, stats
    return stats


async def test_completes_everything_once(queue, agents):
    seen = []

    async def agent(task):
        seen.append((task.id, task.input["n"], task.attempt))
        if task.input["n"] % 3 == 0:
            await asyncio.sleep(0.001)

    agents.register("work", agent)
    await queue.produce_many([{"id": f"t{n}", "type": "work", "input": {"n": n}} for n in range(2000)])
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=50) as dispatcher:
        stats = await settled(queue)
    assert sorted(seen) == sorted((f"t{n}", n, 1) for n in range(2000))
    assert dispatcher.outcomes == {Outcome.COMPLETED: 2000}
    assert stats.counters["completed"] == stats.counters["produced"] == 2000
    assert (await queue.stats()).consumers == 0, "a stopped dispatcher leaves no consumer behind"


async def test_never_more_at_once_than_allowed(queue, agents):
    running = most = 0

    async def agent(task):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1

    agents.register("work", agent)
    await queue.produce_many([{"type": "work"} for _ in range(60)])
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=7):
        await settled(queue)
    assert most == 7


async def test_failed_attempts_are_retried_and_then_dead(queue, agents):
    attempts = []

    async def agent(task):
        attempts.append((task.attempt, task.fence))
        raise ValueError("no luck")

    agents.register("work", agent, retry=QUICK)
    await queue.produce({"id": "x", "type": "work", "input": [1, 2], "priority": TaskPriority.HIGH})
    async with Dispatcher(queue, agents=agents) as dispatcher:
        stats = await settled(queue)
    assert [attempt for attempt, _ in attempts] == [1, 2, 3]
    fences = [fence for _, fence in attempts]
    assert fences == sorted(set(fences)), "fences grow with every delivery"
    assert dispatcher.outcomes == {Outcome.FAILED: 3}
    assert (stats.counters["retried"], stats.counters["dead"], stats.dead) == (2, 1, 1)
    (letter,) = await queue.read_dlq()
    assert letter.task_data == {"id": "x", "type": "work", "input": [1, 2], "priority": 1}
    assert (letter.reason, letter.attempts) == ("failed", 3)
    assert letter.error_info["error_type"] == "ValueError"
    assert "no luck" in letter.error_info["traceback"]
    assert abs(letter.died_at - time.time()) < 60


async def test_a_tasks_own_max_retries_beats_the_agents(queue, agents):
    attempts = []

    async def agent(task):
        attempts.append(task.id)
        raise ValueError

    agents.register("work", agent, retry=QUICK)
    await queue.produce({"id": "never", "type": "work", "max_retries": 0})
    await queue.produce({"id": "once", "type": "work", "max_retries": 1})
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    assert sorted(attempts) == ["never", "once", "once"]


async def test_replayed_dead_letters_start_anew(queue, agents):
    broken = True

    async def agent(task):
        if broken:
            raise ValueError
        return task.attempt

    agents.register("work", agent, retry=Retry(max_retries=0))
    await queue.produce({"id": "x", "type": "work"})
    async with Dispatcher(queue, agents=agents) as dispatcher:
        await settled(queue)
        (letter,) = await queue.read_dlq()
        broken = False
        assert await queue.replay_dlq([letter.message_id]) == 1
        assert await queue.replay_dlq([letter.message_id]) == 0
        stats = await settled(queue)
    assert dispatcher.outcomes == {Outcome.FAILED: 1, Outcome.COMPLETED: 1}
    assert (stats.dead, stats.counters["replayed"]) == (0, 1)


@pytest.mark.parametrize(
    ("error", "reason", "attempts"), [(Reject("not mine"), "rejected", 1), (SystemExit(3), "failed", 3)]
)
async def test_how_an_agent_ends_matters(queue, agents, error, reason, attempts):
    async def agent(task):
        raise error

    agents.register("work", agent, retry=QUICK)
    await queue.produce({"type": "work"})
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    (letter,) = await queue.read_dlq()
    assert (letter.reason, letter.attempts) == (reason, attempts)


async def test_an_unknown_type_is_dead_at_once_and_says_what_is_known(queue, agents):
    agents.register("known", lambda task: None)
    await queue.produce({"type": "unknown"})
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    (letter,) = await queue.read_dlq()
    assert (letter.reason, letter.attempts) == ("unknown_agent", 0)
    assert "'unknown'" in letter.error_info["error"]
    assert "known" in letter.error_info["error"]


async def test_retry_later_waits_as_long_as_it_says(queue, agents):
    times = []

    async def agent(task):
        times.append(time.monotonic())
        if len(times) == 1:
            raise RetryLater(0.2)

    agents.register("work", agent)
    await queue.produce({"type": "work"})
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    assert 0.199 <= times[1] - times[0] < 1.0


async def test_throttled_consumes_no_retry(queue, agents):
    seen = []

    async def agent(task):
        seen.append(task.attempt)
        if len(seen) < 5:
            raise Throttled(0.01, "provider")

    agents.register("work", agent, retry=Retry(max_retries=0))
    await queue.produce({"type": "work"})
    async with Dispatcher(queue, agents=agents) as dispatcher:
        stats = await settled(queue)
    assert seen == [1, 1, 1, 1, 1]
    assert dispatcher.outcomes == {Outcome.THROTTLED: 4, Outcome.COMPLETED: 1}
    assert stats.counters["throttled"] == 4


async def test_a_limited_agent_keeps_to_its_rate_and_loses_nothing(queue, agents, manager):
    limiter = RedisRateLimiter(
        "slow", BackpressureConfig(rate_limit=RateLimitConfig(rate=100.0, burst=5)), manager=manager
    )
    times = []

    async def agent(task):
        times.append(time.monotonic())

    agents.register("work", agent, limiter=limiter)
    await queue.produce_many([{"type": "work"} for _ in range(55)])
    async with Dispatcher(queue, agents=agents):
        stats = await settled(queue)
    assert len(times) == 55
    assert times[-1] - times[0] >= 0.45, "55 permits at 100 a second with a burst of 5 take half a second"
    assert stats.counters.get("retried", 0) == stats.counters.get("dead", 0) == 0


async def test_timeouts_of_agent_and_task(queue, agents):
    async def agent(task):
        await asyncio.sleep(30)

    agents.register("work", agent, timeout=0.1, retry=Retry(max_retries=0))
    await queue.produce({"id": "agent", "type": "work"})
    await queue.produce({"id": "task", "type": "work", "timeout": 0.05})
    async with Dispatcher(queue, agents=agents) as dispatcher:
        await settled(queue)
    assert dispatcher.outcomes == {Outcome.TIMED_OUT: 2}
    letters = {letter.task_data["id"]: letter for letter in await queue.read_dlq()}
    assert {letter.reason for letter in letters.values()} == {"timed_out"}
    assert "0.05 s" in letters["task"].error_info["error"]


async def test_a_missed_deadline_is_not_started(queue, agents):
    started = []

    async def agent(task):
        started.append(task.id)

    agents.register("work", agent)
    await queue.produce({"id": "late", "type": "work", "deadline": time.time() - 1})
    await queue.produce({"id": "early", "type": "work", "deadline": time.time() + 60})
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    assert started == ["early"]
    assert [letter.reason for letter in await queue.read_dlq()] == ["deadline_missed"]


async def test_urgent_tasks_go_first(queue, agents):
    order = []

    async def agent(task):
        order.append(task.priority)
        await asyncio.sleep(0)

    agents.register("work", agent)
    await queue.produce_many([{"type": "work", "priority": n % 4} for n in range(40)])
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1):
        await settled(queue)
    assert len(order) == 40
    first_low = order.index(TaskPriority.LOW)
    assert order[:first_low].count(TaskPriority.CRITICAL) >= 8, order
    inversions = sum(1 for a, b in zip(order, order[1:], strict=False) if a > b)
    assert inversions <= 4, order


async def test_a_critical_task_waits_for_a_slot_not_for_the_backlog(queue, agents):
    started = []

    async def agent(task):
        started.append(task.id)
        await asyncio.sleep(0.02)

    agents.register("work", agent)
    await queue.produce_many([{"type": "work", "id": f"n{n}"} for n in range(200)])
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=2):
        await until(lambda: asyncio.sleep(0, len(started) >= 4))
        await queue.produce({"type": "work", "id": "urgent", "priority": TaskPriority.CRITICAL})
        at = len(started)
        await until(lambda: asyncio.sleep(0, "urgent" in started))
        assert started.index("urgent") - at <= 6
        await queue.purge_dlq()
        await settled(queue)


async def test_replicas_share_by_weight(queue, agents):
    counts = {"big": 0, "small": 0}

    def replica(name):
        async def agent(task):
            counts[name] += 1

        return agent

    agents.register("work", replica("big"), worker_id="big", weight=3)
    agents.register("work", replica("small"), worker_id="small", weight=1)
    await queue.produce_many([{"type": "work"} for _ in range(400)])
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    assert counts == {"big": 300, "small": 100}


async def test_a_full_replica_is_passed_over(queue, agents):
    most = {"a": 0, "b": 0}
    now = {"a": 0, "b": 0}

    def replica(name):
        async def agent(task):
            now[name] += 1
            most[name] = max(most[name], now[name])
            await asyncio.sleep(0.002)
            now[name] -= 1

        return agent

    agents.register("work", replica("a"), worker_id="a", max_concurrency=2)
    agents.register("work", replica("b"), worker_id="b", max_concurrency=3)
    await queue.produce_many([{"type": "work"} for _ in range(50)])
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=20):
        stats = await settled(queue)
    assert most == {"a": 2, "b": 3}
    assert stats.counters["completed"] == 50


def square(task):
    if task.input < 0:
        raise ValueError("negative")
    return task.input**2


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_plain_functions_run_in_threads_or_processes(queue, agents, executor):
    agents.register("square", square, executor=executor, retry=Retry(max_retries=0))
    tasks = [{"id": f"s{n}", "type": "square", "input": n} for n in (3, 4, -1)]
    await queue.produce_many(tasks, want_results=True)
    async with Dispatcher(queue, agents=agents):
        assert (await queue.wait_result("s3", 20))["value"] == 9
        assert (await queue.wait_result("s4", 20))["value"] == 16
        failed = await queue.wait_result("s-1", 20)
        await settled(queue)
    assert (failed["outcome"], failed["error"]["error"]) == ("dead", "negative")


async def test_a_result_that_cannot_travel_is_a_failure_with_a_reason(queue, agents):
    async def agent(task):
        return {"when": object()}

    agents.register("work", agent)
    await queue.produce_many([{"id": "x", "type": "work"}], want_results=True)
    async with Dispatcher(queue, agents=agents):
        record = await queue.wait_result("x", 5)
        await settled(queue)
    assert (record["outcome"], record["reason"]) == ("dead", "bad_result")
    assert "when" in record["error"]["error"]


async def test_a_corrupt_entry_is_parked_with_its_bytes_and_the_lane_goes_on(queue, agents, manager):
    done = []

    async def agent(task):
        done.append(task.id)

    agents.register("work", agent)
    lane = queue.keys.lanes[2]
    for fields in ({"t": b"\xc1garbage"}, {"foreign": "entry"}, {"t": b""}):
        await manager.client.xadd(lane, fields)
    await queue.produce({"id": "good", "type": "work"})
    async with Dispatcher(queue, agents=agents):
        await until(lambda: _empty(queue))
    assert done == ["good"]
    letters = await queue.read_dlq()
    assert [letter.reason for letter in letters] == ["corrupt", "foreign", "corrupt"]
    assert letters[0].raw == b"\xc1garbage"
    assert b"foreign" in letters[1].raw
    assert await queue.replay_dlq([letter.message_id for letter in letters]) == 0


async def _empty(queue):
    return await queue.get_queue_depth() == 0


async def test_context_variables_do_not_leak_from_task_to_task(queue, agents):
    var = contextvars.ContextVar("var", default="clean")
    seen = []

    async def agent(task):
        seen.append(var.get())
        var.set(task.id)
        await asyncio.sleep(0)
        assert var.get() == task.id

    agents.register("work", agent)
    await queue.produce_many([{"type": "work"} for _ in range(20)])
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
        await settled(queue)
    assert seen == ["clean"] * 20
    assert dispatcher.outcomes == {Outcome.COMPLETED: 20}


async def test_stop_drains_running_work_and_releases_the_rest_uncharged(queue, agents):
    started, finished = [], []

    async def agent(task):
        started.append(task.id)
        await asyncio.sleep(0.1)
        finished.append(task.id)

    agents.register("work", agent)
    await queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(20)])
    dispatcher = Dispatcher(queue, agents=agents, max_concurrent_dispatch=4)
    await dispatcher.start()
    await until(lambda: asyncio.sleep(0, len(started) == 4))
    await dispatcher.stop()
    assert sorted(started) == sorted(finished)
    stats = await queue.stats()
    left = 20 - len(finished)
    assert (sum(stats.waiting), sum(stats.in_flight)) == (left, 0)
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=20) as second:
        await settled(queue)
    assert second.outcomes[Outcome.COMPLETED] == left > 0


async def test_stop_interrupts_what_does_not_end_in_time(queue, agents):
    attempts = []

    async def agent(task):
        attempts.append(task.attempt)
        await asyncio.sleep(60 if len(attempts) == 1 else 0)

    agents.register("work", agent, retry=Retry(max_retries=0))
    await queue.produce({"type": "work"})
    dispatcher = Dispatcher(queue, agents=agents, drain_timeout=0.05)
    await dispatcher.start()
    await until(lambda: asyncio.sleep(0, bool(attempts)))
    await dispatcher.stop()
    assert dispatcher.outcomes == {Outcome.RELEASED: 1}
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    assert attempts == [1, 1], "being released consumes no retry"


async def test_start_and_stop_in_any_order(queue, agents):
    dispatcher = Dispatcher(queue, agents=agents)
    await dispatcher.stop()
    await asyncio.gather(*(dispatcher.start() for _ in range(5)))
    assert dispatcher.running
    await asyncio.gather(dispatcher.stop(), dispatcher.stop())
    assert not dispatcher.running
    running = asyncio.create_task(dispatcher.run())
    await until(lambda: asyncio.sleep(0, dispatcher.running))
    await dispatcher.stop()
    await running
    assert not dispatcher.running


async def test_cancelling_run_stops(queue, agents):
    dispatcher = Dispatcher(queue, agents=agents)
    running = asyncio.create_task(dispatcher.run())
    await until(lambda: asyncio.sleep(0, dispatcher.running))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not dispatcher.running


async def test_an_unreachable_server_is_an_error_at_start(agents, tmp_path):
    from orchestra.connections import ConnectionManager

    queue = RedisStreamTaskQueue(
        "tasks", "workers", manager=ConnectionManager(f"unix://{tmp_path}/none.sock"), patience=0
    )
    with pytest.raises(StoreUnavailableError, match="none.sock"):
        await Dispatcher(queue, agents=agents).start()


async def test_only_a_task_queue_is_accepted():
    with pytest.raises(TypeError, match="BaseTaskQueue"):
        Dispatcher(object())
