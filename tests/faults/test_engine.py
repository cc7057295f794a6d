"""The engine under faults: agents that do not end, loops that break, deadlines, cancellation, order, pressure.

Every test ends with the same check: each task is terminal exactly once and the counters add up.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import random
import threading
import time

import pytest

from orchestra import _execution, _lifecycle
from orchestra import dispatcher as engine
from orchestra._agents import registry as agents_module
from orchestra._lifecycle import Service
from orchestra._pool.slots import Slot
from orchestra.agents import AgentRegistry
from orchestra.dispatcher import Dispatcher
from orchestra.errors import (
    QueueFullError,
    Reject,
    RetryLater,
    StoreUnavailableError,
    Throttled,
    WorkerPoolError,
    WrongLoopError,
)
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.scheduler import PriorityScheduler
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Cancellation, Outcome, Retry, RetryBudget, TaskPriority
from orchestra.testing import Recorder

NEVER = Retry(max_retries=0)
QUICK = Retry(max_retries=2, base=0.01, jitter=False)


@pytest.fixture
async def queue(manager):
    queue = RedisStreamTaskQueue("tasks", "workers", 5_000, manager=manager)
    yield queue
    await queue.close()


@pytest.fixture
def quickly_stuck(monkeypatch):
    """An agent counts as stuck a moment after it was interrupted."""
    monkeypatch.setattr("orchestra._dispatch.running.STUCK_AFTER", 0.1)
    monkeypatch.setattr("orchestra._dispatch.stuck.STUCK_AFTER", 0.1)


@pytest.fixture
def quick_restarts(monkeypatch):
    """Background loops that fail are restarted without a pause."""
    monkeypatch.setattr(_lifecycle.Reconnect, "next", lambda self: setattr(self, "failures", self.failures + 1) or 0.0)


async def until(condition, seconds=30.0):
    """Wait until the function ``condition`` gives something true, which it returns."""
    async with asyncio.timeout(seconds):
        while not (value := condition()):
            await asyncio.sleep(0.005)
        return value


async def settled(queue, seconds=30.0):
    """The statistics of ``queue`` once nothing is live; they must add up."""
    async with asyncio.timeout(seconds):
        while (stats := await queue.stats()).live:
            await asyncio.sleep(0.005)
    assert stats.adds_up, stats
    return stats


async def letters_of(queue):
    """Dead letters by task id; no task may have two."""
    letters = await queue.read_dlq(1000)
    by_id = {letter.task_data["id"]: letter for letter in letters}
    assert len(by_id) == len(letters)
    return by_id


async def give_back(queue):
    """Release what dead consumers hold, as if their leases had run out."""
    left = await queue.reclaim("survivor", 1000, 0)
    await queue.settle([(delivery, _execution.RELEASED.verdict) for delivery in left])


class Stubborn:
    """An agent that ignores its cancellation until it is let go."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.started, self.ended = [], []

    async def process(self, task):
        self.started.append(task.id)
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                continue
        self.ended.append(task.id)
        return "far too late"


# -- A10: agents that ignore cancellation


async def test_an_agent_that_ignores_its_timeout_is_settled_reported_and_replaced(queue, agents, quickly_stuck):
    """A10: its task ends at once, its slot is replaced, what it returns later is ignored, its lease is let go."""
    stubborn, done = Stubborn(), []

    async def quick(task):
        done.append(task.id)

    agents.register("stubborn", stubborn, timeout=0.05, retry=NEVER)
    agents.register("quick", quick)
    await queue.produce_many([{"id": f"s{n}", "type": "stubborn"} for n in range(2)], want_results=True)
    with Recorder("task.stuck", "dispatcher.exhausted", "task.settled") as recorder:
        async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=2) as dispatcher:
            await until(lambda: dispatcher.stuck == 2)
            await queue.produce_many([{"id": f"q{n}", "type": "quick"} for n in range(20)])
            stats = await settled(queue)
            assert (dispatcher.running_tasks, dispatcher.pool.metrics.stuck_tasks) == (0, 2)
            assert dispatcher.pool.capacity == 2, "as many stuck slots as it has places are replaced"
            assert not any(queue.held), "nothing is left for the lease thread to renew"
            records = [await queue.wait_result(f"s{n}", 10) for n in range(2)]
            stubborn.released.set()
            await until(lambda: dispatcher.stuck == 0)
            assert dispatcher.pool.metrics.stuck_tasks == 0
    assert len(done) == 20
    assert sorted(stubborn.ended) == ["s0", "s1"]
    assert [(record["outcome"], record["reason"]) for record in records] == [("dead", "timed_out")] * 2
    assert dispatcher.outcomes == {Outcome.TIMED_OUT: 2, Outcome.COMPLETED: 20}
    assert {event.metadata["task_id"] for event in recorder.of("task.stuck")} == {"s0", "s1"}
    assert len(recorder.of("task.stuck")) == 2, "once, and rarely again"
    assert recorder.of("dispatcher.exhausted") == []
    assert (await queue.stats()).counters == stats.counters, "what a stuck agent returns changes nothing"


async def test_a_stuck_attempt_is_retried_like_any_that_timed_out(queue, agents, quickly_stuck):
    """A10: and while the first attempt still hangs, the second one completes."""
    stubborn, attempts = Stubborn(), []

    async def agent(task):
        attempts.append((task.attempt, task.fence))
        if task.attempt == 1:
            await stubborn.process(task)

    agents.register("work", agent, timeout=0.05, retry=QUICK, max_concurrency=1)
    await queue.produce({"id": "t", "type": "work"})
    async with Dispatcher(queue, agents=agents) as dispatcher:
        stats = await settled(queue)
        assert dispatcher.stuck == 1
        stubborn.released.set()
    assert [attempt for attempt, _ in attempts] == [1, 2], "its replica has room again, too"
    assert attempts[1][1] > attempts[0][1]
    assert (stats.counters["completed"], stats.counters["retried"]) == (1, 1)


async def test_beyond_as_many_stuck_slots_capacity_shrinks_loudly_and_recovers(queue, agents, quickly_stuck):
    """A10: concurrency 1 bears one stuck agent; the second leaves nothing to run with, and an event says so."""
    stubborn, done = Stubborn(), []

    async def quick(task):
        done.append(task.id)

    agents.register("stubborn", stubborn, timeout=0.05, retry=NEVER)
    agents.register("quick", quick)
    with Recorder("dispatcher.exhausted") as recorder:
        async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
            await queue.produce_many([{"id": f"s{n}", "type": "stubborn"} for n in range(2)])
            await until(lambda: dispatcher.stuck == 2)
            assert dispatcher.pool.capacity == 0
            (event,) = recorder.of("dispatcher.exhausted")
            assert event.measurements == {"stuck": 2, "capacity": 0}
            assert event.metadata["what"] == "slots"
            await queue.produce({"id": "q", "type": "quick"})
            stubborn.released.set()
            await settled(queue)
            assert dispatcher.pool.capacity == 1
    assert done == ["q"], "it waits in its lane, and runs when there is room again"


async def test_stop_ends_in_time_whatever_agents_do(queue, agents, monkeypatch):
    """A10, A14: deliveries of agents that ignore the drain go back uncharged, and another worker has them at once."""
    monkeypatch.setattr(engine, "LAST_GRACE", 0.1)
    stubborn, seen = Stubborn(), []

    async def patient(task):
        await asyncio.sleep(60)

    agents.register("stubborn", stubborn)
    agents.register("patient", patient)
    await queue.produce_many([{"id": "s", "type": "stubborn"}, {"id": "p", "type": "patient"}])
    dispatcher = await Dispatcher(queue, agents=agents, drain_timeout=0.1).start()
    await until(lambda: dispatcher.running_tasks == 2)
    async with asyncio.timeout(5):
        await dispatcher.stop()
    assert (dispatcher.outcomes, dispatcher.stuck) == ({Outcome.RELEASED: 2}, 1)
    stats = await queue.stats()
    assert (sum(stats.waiting), sum(stats.in_flight), stats.consumers) == (2, 0, 0)

    async def other(task):
        seen.append((task.id, task.attempt))

    fresh = AgentRegistry()
    fresh.register("stubborn", other)
    fresh.register("patient", other)
    async with Dispatcher(queue, agents=fresh):
        await settled(queue)
    assert sorted(seen) == [("p", 1), ("s", 1)]
    stubborn.released.set()
    await until(lambda: stubborn.ended)
    assert (await queue.stats()).counters["completed"] == 2


async def test_a_cancelled_agent_that_goes_on_is_cancelled_all_the_same(queue, agents, quickly_stuck):
    """A10, H12: the task is terminal as cancelled, once, whatever its agent returns later."""
    stubborn = Stubborn()
    agents.register("stubborn", stubborn)
    (sent,) = await queue.submit([{"id": "t", "type": "stubborn"}], want_results=True)
    async with Dispatcher(queue, agents=agents) as dispatcher:
        await until(lambda: stubborn.started)
        assert await queue.cancel(sent.task_id, sent.message_id) is Cancellation.REQUESTED
        assert (await queue.wait_result("t", 20))["outcome"] == "cancelled"
        stubborn.released.set()
        stats = await settled(queue)
        await until(lambda: dispatcher.stuck == 0)
    assert dispatcher.outcomes == {Outcome.CANCELLED: 1}
    assert stats.counters == {"produced": 1, "cancelled": 1}


async def test_functions_that_hang_in_threads_are_counted_and_replaced(queue, agents, quickly_stuck, monkeypatch):
    """A10: a plain function cannot be cancelled: its thread is replaced, and when too many hang an event says so."""
    monkeypatch.setattr(agents_module, "THREADS", 1)
    monkeypatch.setattr("orchestra._dispatch.stuck.THREADS", 1)
    gate, done = threading.Event(), []
    agents.register("hang", lambda task: gate.wait(60), timeout=0.1, retry=NEVER)
    agents.register("quick", lambda task: done.append((task.id, _execution.current_task.get().id)))
    try:
        with Recorder("task.stuck", "dispatcher.exhausted") as recorder:
            async with Dispatcher(queue, agents=agents) as dispatcher:
                await queue.produce({"id": "h0", "type": "hang"})
                await settled(queue)
                assert (dispatcher.stuck, dispatcher.running_tasks) == (1, 0)
                await queue.produce({"id": "q0", "type": "quick"})
                await settled(queue)
                assert recorder.of("dispatcher.exhausted") == []
                await queue.produce({"id": "h1", "type": "hang"})
                (event,) = await recorder.wait_for("dispatcher.exhausted", timeout=20, what="threads")
                assert event.measurements == {"stuck": 2, "capacity": 0}
                await recorder.wait_for("task.stuck", 2, timeout=20)
                gate.set()
                await until(lambda: dispatcher.stuck == 0)
                await queue.produce({"id": "q1", "type": "quick"})
                await settled(queue)
    finally:
        gate.set()
    assert done == [("q0", "q0"), ("q1", "q1")]
    assert {letter.reason for letter in (await letters_of(queue)).values()} == {"timed_out"}


def hang_in_process(task):
    time.sleep(600)


def seven(task):
    return 7


async def test_processes_full_of_functions_that_hang_are_made_anew(queue, agents):
    """A10: the only process hangs in a function that timed out: it is ended, and the next task gets a new one."""
    agents.processors = 1
    agents.register("hang", hang_in_process, executor="process", timeout=2.0, retry=NEVER)
    agents.register("seven", seven, executor="process", timeout=60.0, retry=NEVER)
    await queue.produce({"id": "h", "type": "hang"})
    async with Dispatcher(queue, agents=agents) as dispatcher:
        await until(lambda: dispatcher.running_tasks == 1)
        await queue.produce_many([{"id": "s", "type": "seven"}], want_results=True)
        assert (await queue.wait_result("s", 60))["value"] == 7
        await settled(queue)
        await until(lambda: dispatcher.stuck == 0)
    assert dispatcher.outcomes == {Outcome.TIMED_OUT: 1, Outcome.COMPLETED: 1}


# -- timeouts and deadlines


async def test_the_deadline_ends_a_running_attempt_and_there_is_no_retry(queue, agents):
    """F3: the total deadline holds while the agent runs; the attempt's own timeout would have been longer."""
    started = []

    async def agent(task):
        started.append(task.attempt)
        await asyncio.sleep(60)

    agents.register("work", agent, timeout=30.0, retry=Retry(max_retries=5))
    async with Dispatcher(queue, agents=agents) as dispatcher:
        await queue.produce({"id": "t", "type": "work", "deadline": queue.now() + 0.5})
        await settled(queue)
    assert started == [1]
    assert dispatcher.outcomes == {Outcome.TIMED_OUT: 1}
    letter = (await letters_of(queue))["t"]
    assert (letter.reason, letter.attempts) == ("deadline_missed", 1)
    assert "while the agent ran" in letter.error_info["error"]


async def test_an_attempts_timeout_before_the_deadline_is_retried(queue, agents):
    started = []

    async def agent(task):
        started.append(task.attempt)
        await asyncio.sleep(60 if task.attempt == 1 else 0)

    agents.register("work", agent, timeout=0.1, retry=QUICK)
    async with Dispatcher(queue, agents=agents) as dispatcher:
        await queue.produce({"id": "t", "type": "work", "deadline": queue.now() + 120})
        await settled(queue)
    assert started == [1, 2]
    assert dispatcher.outcomes == {Outcome.TIMED_OUT: 1, Outcome.COMPLETED: 1}


@pytest.mark.parametrize("error", [ValueError("no luck"), RetryLater(3600.0)], ids=["backoff", "asked for"])
async def test_a_retry_that_would_start_after_the_deadline_is_not_waited_for(queue, agents, error):
    async def agent(task):
        raise error

    agents.register("work", agent, retry=Retry(base=3600.0, max_delay=3600.0, jitter=False))
    async with Dispatcher(queue, agents=agents):
        await queue.produce({"id": "t", "type": "work", "deadline": queue.now() + 600})
        await settled(queue)
    letter = (await letters_of(queue))["t"]
    assert (letter.reason, letter.attempts) == ("deadline_missed", 1)
    assert str(error) in letter.error_info["error"], "what really went wrong is kept"


@pytest.mark.parametrize("days", [-400, 400])
async def test_deadlines_do_not_follow_this_machines_wall_clock(queue, agents, monkeypatch, days):
    """F3: a worker whose wall clock is wrong by days starts what is in time and drops what is late, by Redis's."""
    started = []

    async def agent(task):
        started.append(task.id)

    agents.register("work", agent)
    seconds, micros = await queue.manager.client.time()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + days * 86_400)
    async with Dispatcher(queue, agents=agents):
        assert abs(queue.now() - (seconds + micros / 1e6)) < 30
        await queue.produce({"type": "work", "deadline": seconds + 60}, "in-time")
        await queue.produce({"type": "work", "deadline": seconds - 60}, "late")
        await settled(queue)
    assert started == ["in-time"]
    assert (await letters_of(queue))["late"].reason == "deadline_missed"


# -- cancellation


async def test_what_waits_in_the_worker_is_cancelled_without_being_started(queue, agents):
    """H12: a delivery that was read and has not begun ends cancelled when its turn comes."""
    started, gate = [], asyncio.Event()

    async def agent(task):
        started.append(task.id)
        await gate.wait()

    agents.register("work", agent)
    sent = await queue.submit([{"id": f"t{n}", "type": "work"} for n in range(2)], want_results=True)
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
        await until(lambda: dispatcher.held == 2)
        assert started == ["t0"]
        assert await queue.cancel("t1", sent[1].message_id) is Cancellation.REQUESTED
        await until(lambda: dispatcher._deliveries._cancels)
        gate.set()
        record = await queue.wait_result("t1", 20)
        stats = await settled(queue)
    assert (started, record["outcome"]) == (["t0"], "cancelled")
    assert dispatcher.outcomes == {Outcome.COMPLETED: 1, Outcome.CANCELLED: 1}
    assert (stats.counters["completed"], stats.counters["cancelled"]) == (1, 1)


@pytest.mark.parametrize("answer", ["gives in", "completes", "raises", "retry later"])
async def test_a_running_agent_is_interrupted_and_one_record_tells_how_it_ended(queue, agents, answer):
    """H12: an agent that completes in spite of its cancellation has completed; anything else is cancelled."""
    started = asyncio.Event()

    async def agent(task):
        try:
            started.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if answer == "completes":
                return "done"
            if answer == "raises":
                raise ValueError("in the clean-up") from None
            if answer == "retry later":
                raise RetryLater(1.0) from None
            raise

    agents.register("work", agent)
    (sent,) = await queue.submit([{"id": "t", "type": "work"}], want_results=True)
    async with Dispatcher(queue, agents=agents):
        await started.wait()
        assert await queue.cancel("t", sent.message_id) is Cancellation.REQUESTED
        record = await queue.wait_result("t", 20)
        stats = await settled(queue)
    expected = "completed" if answer == "completes" else "cancelled"
    assert record["outcome"] == expected
    assert stats.counters == {"produced": 1, expected: 1}


# -- A15: start and stop in any order


class Nothing(Service):
    """A service with a loop and nothing to do."""

    async def _start(self):
        await asyncio.sleep(0)
        self.spawn("idle", asyncio.Event().wait)

    async def _stop(self):
        await asyncio.sleep(0)


async def stress(service, count, seed):
    """Start and stop concurrently, in random order, cancelling some of the calls half-way."""
    rng = random.Random(seed)

    async def one(number):
        await asyncio.sleep(rng.random() * 0.2)
        call = asyncio.ensure_future(service.start() if rng.random() < 0.5 else service.stop())
        if number % 10 == 0:
            await asyncio.sleep(rng.random() * 0.01)
            call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async with asyncio.timeout(60):
        await asyncio.gather(*(one(number) for number in range(count)))
        await service.stop()


async def test_a_service_survives_being_started_and_stopped_concurrently():
    """A15: 200 calls in random order neither deadlock nor leave a task behind."""
    before = asyncio.all_tasks()
    service = Nothing()
    await stress(service, 200, seed=15)
    assert not service.running
    assert asyncio.all_tasks() == before
    async with service:
        assert service.running


async def test_a_dispatcher_survives_being_started_and_stopped_concurrently(queue, agents, manager):
    """A15: 200 calls; no task, thread, descriptor, connection or consumer is left, and it still works."""
    done = []

    async def agent(task):
        done.append(task.id)

    agents.register("work", agent)
    dispatcher = Dispatcher(queue, agents=agents, drain_timeout=1.0)
    async with dispatcher:
        pass
    await queue.close()

    async def census():
        gc.collect()
        await manager.client.ping()
        clients = len(await manager.client.client_list())
        return len(asyncio.all_tasks()), threading.active_count(), len(os.listdir("/proc/self/fd")), clients

    before = await census()
    await stress(dispatcher, 200, seed=51)
    assert not dispatcher.running
    await queue.close()
    after = await census()
    for _ in range(200):  # the server notices closed connections a moment later
        if after <= before:
            break
        await asyncio.sleep(0.01)
        after = await census()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
    assert (await queue.stats()).consumers == 0
    await queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(50)])
    async with dispatcher:
        await settled(queue)
    assert sorted(done) == sorted(f"t{n}" for n in range(50))


# -- J4, J5: background loops


async def test_background_tasks_are_not_collected_as_garbage(queue, agents, caplog):
    """J4: everything that runs in the background is referenced by somebody while the collector runs all the time."""
    stop = asyncio.Event()

    async def agent(task):
        await asyncio.sleep(0.001)
        if task.attempt == 1 and task.input % 5 == 0:
            raise ValueError

    async def collect():
        while not stop.is_set():
            gc.collect()
            await asyncio.sleep(0.01)

    agents.register("work", agent, retry=QUICK)
    collecting = asyncio.create_task(collect())
    await queue.produce_many([{"type": "work", "input": n} for n in range(300)])
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=20):
        await settled(queue)
    stop.set()
    await collecting
    gc.collect()
    assert not [record for record in caplog.records if "destroyed" in record.getMessage()]


def break_loop(monkeypatch, queue, name, error, times):
    """Let the background loop ``name`` raise ``error`` in the midst of its work, ``times`` times; returns the raises."""
    raised = []

    def fault():
        if len(raised) < times and asyncio.current_task().get_name() == f"orchestra:{name}":
            raised.append(name)
            raise error

    if name == "sweep":
        interrupt = Slot.interrupt

        def broken_interrupt(slot, why):
            if why is Outcome.TIMED_OUT:
                fault()
            interrupt(slot, why)

        monkeypatch.setattr(Slot, "interrupt", broken_interrupt)
        return raised
    real = getattr(queue, name)

    async def broken(*args, **kwargs):
        fault()
        return await real(*args, **kwargs)

    monkeypatch.setattr(queue, name, broken)
    return raised


LOOPS = ("read", "settle", "maintain", "sweep")


@pytest.mark.parametrize("kind", [RuntimeError, asyncio.CancelledError], ids=["error", "stray cancellation"])
@pytest.mark.parametrize("name", LOOPS)
async def test_a_loop_that_breaks_is_restarted(queue, agents, monkeypatch, quick_restarts, name, kind):
    """J5: three exceptions in the midst of a loop, also a CancelledError that nobody asked for; nothing is lost."""

    async def agent(task):
        await asyncio.sleep(60 if task.input == "slow" else 0.001)

    agents.register("work", agent, timeout=0.1, retry=NEVER)
    raised = break_loop(monkeypatch, queue, name, kind("injected"), 3)
    await queue.produce_many([{"type": "work"} for _ in range(20)] + [{"type": "work", "input": "slow"}])
    with Recorder("service.loop_failed", "service.failed") as recorder:
        async with Dispatcher(queue, agents=agents) as dispatcher:
            stats = await settled(queue)
            await until(lambda: len(raised) == 3)
            assert dispatcher.running
    assert [event.metadata["loop"] for event in recorder.of("service.loop_failed")] == [name] * 3
    assert recorder.of("service.failed") == []
    assert (stats.counters["completed"], stats.dead) == (20, 1)


@pytest.mark.parametrize("name", LOOPS)
async def test_a_loop_that_stays_broken_ends_the_dispatcher_loudly(queue, agents, monkeypatch, quick_restarts, name):
    """J5: never half-dead: it stops by itself, its error reaches who waits for it, and its tasks are not lost."""

    async def agent(task):
        await asyncio.sleep(60 if name == "sweep" else 0)

    agents.register("work", agent, timeout=0.1, retry=NEVER)
    break_loop(monkeypatch, queue, name, RuntimeError("broken for good"), 10_000)
    monkeypatch.setattr(engine, "SETTLE_GRACE", 0.1)
    await queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(5)])
    with Recorder("service.failed", "dispatcher.stopped") as recorder:
        async with asyncio.timeout(30):
            with pytest.raises(RuntimeError, match="broken for good"):
                await Dispatcher(queue, agents=agents, drain_timeout=0.1).run()
            await give_back(queue)
            with pytest.raises(RuntimeError, match="broken for good"):
                async with Dispatcher(queue, agents=agents, drain_timeout=0.1) as dispatcher:
                    await until(lambda: not dispatcher.running)
    assert str(dispatcher.failure) == "broken for good"
    assert [event.metadata["loop"] for event in recorder.of("service.failed")] == [name] * 2
    assert len(recorder.of("dispatcher.stopped")) == 2
    monkeypatch.undo()
    seen = set()

    async def good(task):
        seen.add(task.id)

    fresh = AgentRegistry()
    fresh.register("work", good)
    await give_back(queue)
    async with Dispatcher(queue, agents=fresh):
        stats = await settled(queue)
    assert stats.counters["completed"] == 5


async def test_an_outage_in_an_exception_group_is_an_outage(queue, agents, monkeypatch, quick_restarts):
    """D6: a task group wraps a lost connection; 30 of them in each loop neither end a worker nor count as faults."""
    left = dict.fromkeys(("read", "settle", "maintain"), 30)

    def wrap(name):
        real = getattr(queue, name)

        async def broken(*args, **kwargs):
            if left[name] and "started" in left:
                left[name] -= 1
                inner = ExceptionGroup("inner", [StoreUnavailableError("gone"), ConnectionResetError("gone")])
                raise ExceptionGroup("outer", [inner])
            return await real(*args, **kwargs)

        monkeypatch.setattr(queue, name, broken)

    async def agent(task):
        await asyncio.sleep(0)

    agents.register("work", agent)
    for name in tuple(left):
        wrap(name)
    with Recorder("service.loop_failed") as recorder:
        async with Dispatcher(queue, agents=agents) as dispatcher:
            left["started"] = 0
            await queue.produce_many([{"type": "work"} for _ in range(20)])
            stats = await settled(queue)
            dispatcher._maintain_in(0.0)
            await until(lambda: not any(left.values()), 60)
    assert recorder.events == []
    assert stats.counters["completed"] == 20


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ([Reject("never")], "rejected"),
        ([Throttled(0.001), Reject("never")], "rejected"),
        ([ValueError("one")], "failed"),
        ([ValueError("one"), Throttled(0.001)], "failed"),
    ],
    ids=["reject", "throttled and reject", "one error", "mixed"],
)
async def test_what_a_task_group_in_an_agent_raises_keeps_its_meaning(queue, agents, errors, reason):
    """D6: ``raise Reject`` in a child of a TaskGroup is a Reject, not an ExceptionGroup."""

    async def child(error):
        await asyncio.sleep(0)
        raise error

    async def agent(task):
        async with asyncio.TaskGroup() as group:
            for error in errors:
                group.create_task(child(error))

    agents.register("work", agent, retry=NEVER)
    await queue.produce({"id": "t", "type": "work"})
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    letter = (await letters_of(queue))["t"]
    assert letter.reason == reason
    if len(errors) == 1:
        assert letter.error_info["error"] == str(errors[0])


# -- J6, J9: loops, threads, context


def in_another_loop(coroutine):
    """Run ``coroutine()`` in a loop of another thread; returns what it raised."""
    caught = []

    def run():
        try:
            asyncio.run(coroutine())
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, caught


async def test_a_dispatcher_and_its_queue_belong_to_one_loop(queue, agents):
    """J6: used from another loop or thread they raise a typed error, and nothing of theirs is harmed."""
    done = []

    async def agent(task):
        done.append(task.id)

    agents.register("work", agent)
    async with Dispatcher(queue, agents=agents) as dispatcher:
        await queue.produce({"id": "before", "type": "work"})
        for misuse in (
            dispatcher.start,
            dispatcher.stop,
            lambda: queue.produce({"id": "foreign", "type": "work"}),
            queue.stats,
            lambda: queue.read("c", 1, 0),
            queue.close,
        ):
            thread, caught = in_another_loop(misuse)
            await asyncio.to_thread(thread.join, 20)
            assert [type(error) for error in caught] == [WrongLoopError], caught
        await queue.produce({"id": "after", "type": "work"})
        stats = await settled(queue)
    assert done == ["before", "after"]
    assert stats.counters == {"produced": 2, "completed": 2}


def test_a_queue_closed_in_one_loop_may_be_used_in_the_next(redis_url):
    """J6: and one whose loop is gone says so, until it is closed."""
    from orchestra.connections import ConnectionManager

    queue = RedisStreamTaskQueue("tasks", "workers", manager=ConnectionManager(redis_url))

    async def use(close):
        await queue.produce({"type": "x"})
        if close:
            await queue.close()
            await queue.manager.close()

    asyncio.run(use(close=True))
    asyncio.run(use(close=True))


async def test_context_variables_are_each_tasks_own_in_threads_too(queue, agents):
    """J9: what one task sets no other sees, in coroutines, their children and threads; the task itself is known."""
    mark, seen = contextvars.ContextVar("mark", default="clean"), []

    async def coroutine(task):
        before = mark.get()
        mark.set(task.id)
        await asyncio.sleep(0.001)
        inner = await asyncio.create_task(asyncio.sleep(0, mark.get()))
        seen.append((task.id, before, mark.get(), inner, _execution.current_task.get().id))

    def function(task):
        before = mark.get()
        mark.set(task.id)
        seen.append((task.id, before, mark.get(), mark.get(), _execution.current_task.get().id))

    agents.register("coroutine", coroutine)
    agents.register("function", function)
    kinds = ("coroutine", "function")
    await queue.produce_many([{"id": f"t{n}", "type": kinds[n % 2]} for n in range(60)])
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=8):
        await settled(queue)
    assert len(seen) == 60
    assert all(row == (row[0], "clean", row[0], row[0], row[0]) for row in seen), seen


# -- H: retries, order, pressure


async def test_no_retry_starts_before_its_backoff_has_passed_by_redis_clock(queue, agents, manager):
    """H6: start − fail ≥ backoff(n), for backoff, ``RetryLater`` and ``Throttled``; both moments told by Redis."""
    failed, early = {}, []

    async def redis_ms():
        seconds, micros = await manager.client.time()
        return seconds * 1000 + micros / 1000

    async def agent(task):
        now = await redis_ms()
        if task.id in failed:
            at, wait = failed.pop(task.id)
            if now - at < wait * 1000:
                early.append((task.id, now - at, wait))
        kind, tries = task.input, task.attempt
        if kind == "throttled" and task.fence < 3:
            failed[task.id] = (await redis_ms(), 0.0333)
            raise Throttled(0.0333)
        if tries < 3 and kind != "throttled":
            wait = 0.0217 * 2 ** (tries - 1) if kind == "backoff" else 0.0451
            failed[task.id] = (await redis_ms(), wait)
            raise ValueError if kind == "backoff" else RetryLater(wait)

    agents.register("work", agent, retry=Retry(base=0.0217, jitter=False))
    kinds = ("backoff", "asked", "throttled")
    await queue.produce_many([{"id": f"t{n}", "type": "work", "input": kinds[n % 3]} for n in range(60)])
    async with Dispatcher(queue, agents=agents, retry_budget=None):
        stats = await settled(queue)
    assert early == []
    assert stats.counters["completed"] == 60
    assert stats.counters["retried"] == 80


async def test_attempts_are_counted_whatever_crashes_between_them(queue, agents, manager):
    """H7: attempts ≤ max_retries + 1, and executions ≤ that plus the hand-overs that were lost to crashes."""
    runs = []

    async def agent(task):
        runs.append((task.attempt, task.fence))
        raise ValueError

    agents.register("work", agent, retry=Retry(max_retries=2, base=0.01, jitter=False))
    await queue.produce({"id": "t", "type": "work"})
    crashes, lost = 0, queue
    for _ in range(3):
        for consumer in ("ghost-a", "ghost-b"):  # read it, and never come back
            if await lost.read(consumer, 1, 100) or await lost.reclaim(consumer, 1, 0):
                crashes += 1
        (delivery,) = await lost.reclaim("survivor", 1, 0)
        crashes += 1
        await lost.settle([(delivery, _execution.RELEASED.verdict)])
    async with Dispatcher(queue, agents=agents):
        stats = await settled(queue)
    letter = (await letters_of(queue))["t"]
    assert crashes == 9
    assert [attempt for attempt, _ in runs] == [1, 2, 3]
    assert [fence for _, fence in runs] == sorted({fence for _, fence in runs})
    assert runs[0][1] > crashes, "each hand-over has its own fence"
    assert (letter.reason, letter.attempts, stats.dead) == ("failed", 3, 1)


async def test_urgent_work_goes_first_and_the_lowest_lane_gets_its_share(queue, agents):
    """H8: with the HIGH lane full all the time, LOW tasks are served too; among what is held HIGH goes first.

    Aging within the worker is shortened from seconds to milliseconds, so that its steady state comes at once.
    """
    order, stop = [], asyncio.Event()

    async def agent(task):
        order.append(task.priority)
        await asyncio.sleep(0.0005)

    async def flood():
        while not stop.is_set():
            if sum((await queue.stats()).waiting[:2]) < 100:
                await queue.produce_many([{"type": "work", "priority": TaskPriority.HIGH} for _ in range(100)])
            await asyncio.sleep(0.005)

    agents.register("work", agent)
    await queue.produce_many([{"type": "work", "priority": TaskPriority.LOW} for _ in range(20)])
    flooding = asyncio.create_task(flood())
    async with asyncio.timeout(30):
        while not sum((await queue.stats()).waiting[:2]):
            await asyncio.sleep(0.002)
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=2, aging=0.02):
        await until(lambda: order.count(TaskPriority.LOW) >= 8, 60)
        stop.set()
        await flooding
        share = order.count(TaskPriority.LOW) / len(order)
        await settled(queue)
    assert order[0] == TaskPriority.HIGH
    assert share > 1 / 600, share


@pytest.mark.parametrize("concurrency", [1, 8])
async def test_a_lane_is_served_in_order(queue, agents, concurrency):
    """H9: one consumer, no retries: tasks start in the order of their stream ids."""
    started = []

    async def agent(task):
        started.append(task.id)
        if concurrency > 1 and len(started) % 7 == 0:
            await asyncio.sleep(0)

    agents.register("work", agent)
    ids = await queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(500)])
    assert ids == sorted(ids, key=lambda text: tuple(map(int, text.partition(":")[2].split("-"))))
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=concurrency):
        await settled(queue)
    assert started == [f"t{n}" for n in range(500)]


async def test_no_worker_is_needed_for_delayed_tasks_to_become_due(queue, agents, manager):
    """H10: the worker that promoted dies for good; every other one promotes, and no task is lost or doubled."""
    other, done = RedisStreamTaskQueue("tasks", "workers", 5_000, manager=manager), []

    async def agent(task):
        done.append(task.id)

    agents.register("work", agent)
    first = await Dispatcher(other, agents=agents).start()
    await queue.produce_many([{"id": f"t{n}", "type": "work", "delay": 0.05 + n / 100} for n in range(50)])
    await until(lambda: len(done) >= 3)
    for loop in list(first._loops):
        loop.cancel()  # as dead as a process: it reads, promotes and settles no more
    async with Dispatcher(queue, agents=agents):
        assert await queue.produce({"id": "last", "type": "work", "delay": 0.2})
        await until(lambda: "last" in done)
        async with asyncio.timeout(30):
            while (await queue.stats()).delayed:
                await asyncio.sleep(0.01)
        for delivery in [each for lane in other.held for each in lane.values()]:  # as if its lease had run out
            delivery.abandoned = True
            lane, entry = other.keys.streams[delivery.stream], delivery.entry
            await manager.client.xclaim(lane, "workers", first.consumer, 0, [entry], idle=60_000, justid=True)
        first._draining = True
        stats = await settled(queue)
    await first.stop()
    await other.close()
    assert stats.counters["completed"] == 51
    assert set(done) == {f"t{n}" for n in range(50)} | {"last"}


async def test_a_full_queue_pushes_back_and_loses_nothing(queue, agents, manager):
    """H13: a producer faster than its workers is refused with a time to wait; the bound holds, nothing is trimmed."""
    small, done, refused = RedisStreamTaskQueue("tasks", "workers", manager=manager, max_length=50), set(), []

    async def agent(task):
        done.add(task.id)
        await asyncio.sleep(0.001)

    agents.register("work", agent)
    longest = 0
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=5):
        for start in range(0, 400, 20):
            while True:
                try:
                    await small.produce_many([{"id": f"t{n}", "type": "work"} for n in range(start, start + 20)])
                    break
                except QueueFullError as full:
                    refused.append(full.retry_after)
                    await asyncio.sleep(min(full.retry_after, 0.02))
            longest = max(longest, await small.get_queue_depth())
        stats = await settled(queue)
    await small.close()
    assert refused
    assert all(seconds > 0 for seconds in refused)
    assert longest <= 50
    assert (len(done), stats.counters["completed"]) == (400, 400)


async def test_a_scheduler_with_a_limit_bounds_what_is_read(queue, agents):
    """H14: a local queue smaller than the worker's room is no reason to lose a delivery, nor to stop reading."""
    done = []

    async def agent(task):
        done.append(task.id)
        await asyncio.sleep(0.001)

    agents.register("work", agent)
    await queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(200)])
    scheduler = PriorityScheduler(max_size=3)
    with Recorder("service.loop_failed") as recorder:
        async with Dispatcher(queue, scheduler, agents=agents, max_concurrent_dispatch=50):
            await settled(queue)
    assert recorder.events == []
    assert sorted(done) == sorted(f"t{n}" for n in range(200))


async def test_a_shared_pool_that_is_full_or_shut_down_loses_no_task(queue, agents):
    """H14: submit to a full pool, during and after shutdown is a typed error; the queue's tasks are not lost."""
    limits = OrchestrationWorkerPoolConfig(workers=2, max_concurrent_tasks=2, max_queue_size=1)
    pool, gate, done = QueueWorkerPool("shared", limits), asyncio.Event(), []

    async def agent(task):
        done.append(task.id)
        await gate.wait()

    agents.register("work", agent)
    await queue.produce_many([{"id": f"t{n}", "type": "work"} for n in range(6)])
    dispatcher = await Dispatcher(queue, worker_pool=pool, agents=agents, drain_timeout=0.1).start()
    await until(lambda: len(done) == 2)
    waiting = await pool.submit(asyncio.sleep, 0)
    with pytest.raises(WorkerPoolError, match="max_queue_size"):
        await pool.submit(asyncio.sleep, 0)
    ending = asyncio.ensure_future(pool.shutdown(wait=True, timeout=0.2))
    await asyncio.sleep(0)
    with pytest.raises(WorkerPoolError, match="shut down"):
        await pool.submit(asyncio.sleep, 0)
    await ending
    await dispatcher.stop()
    assert waiting.done()
    gate.set()
    async with Dispatcher(queue, agents=agents):
        stats = await settled(queue)
    assert stats.counters["completed"] == 6
    assert stats.counters.get("retried", 0) == stats.dead == 0


async def test_submitting_in_a_loop_settles_each_message_with_its_own_task(queue):
    """H15: the specification's loop over messages, with two of them in flight: each job gets its own arguments."""
    await queue.produce_many([{"id": f"t{n}", "type": "x", "input": n} for n in range(2)])
    pool, acked = QueueWorkerPool("spec", OrchestrationWorkerPoolConfig(workers=2)), {}

    async def process(message_id, task_data):
        await asyncio.sleep(0.001)
        acked[task_data["id"]] = (message_id, await queue.acknowledge(message_id))

    messages = await queue.consume("c", 2, 1000)
    futures = [await pool.submit(process, message_id, task_data) for message_id, task_data in messages]
    await asyncio.gather(*futures)
    await pool.shutdown()
    assert acked == {task_data["id"]: (message_id, True) for message_id, task_data in messages}
    await settled(queue)


async def test_a_task_that_waits_for_its_retry_holds_nothing(queue, agents):
    """H16: retries wait in the delayed set: no slot, no delivery, no lease; others run meanwhile."""
    done = []

    async def agent(task):
        if task.input == "fails" and task.attempt == 1:
            raise RetryLater(1.0)
        done.append(task.id)

    agents.register("work", agent)
    await queue.produce({"id": "fails", "type": "work", "input": "fails"})
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=1) as dispatcher:
        await until(lambda: dispatcher.outcomes[Outcome.FAILED] == 1)
        async with asyncio.timeout(20):
            while not (stats := await queue.stats()).delayed:
                await asyncio.sleep(0.001)
        assert (sum(stats.in_flight), dispatcher.held, any(queue.held)) == (0, 0, False)
        await queue.produce({"id": "other", "type": "work"})
        await until(lambda: done == ["other"])
        await settled(queue)
    assert done == ["other", "fails"]


async def test_a_storm_of_retries_is_spread_and_none_is_lost(queue, agents):
    """H5: 60 tasks fail at one moment with a budget of 20 a second: they come back at that rate, and all complete."""
    starts = []

    async def agent(task):
        if task.attempt == 1:
            raise ValueError
        starts.append(time.monotonic())

    agents.register("work", agent, retry=Retry(base=0.001, jitter=False))
    await queue.produce_many([{"type": "work"} for _ in range(60)])
    budget = RetryBudget(ratio=0.0, floor=20.0)
    with Recorder("retry.throttled") as recorder:
        async with Dispatcher(queue, agents=agents, retry_budget=budget):
            stats = await settled(queue)
    assert stats.counters["completed"] == 60
    assert starts[-1] - starts[0] >= 1.8, "20 at once, 40 more at 20 a second"
    assert sum(event.measurements["count"] for event in recorder.events) >= 35
    assert all(event.measurements["delay_s"] <= 3.0 for event in recorder.events)
