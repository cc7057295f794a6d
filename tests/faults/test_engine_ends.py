"""How deliveries end under faults: agents that do not end, timeouts, deadlines, cancellation.

Every test ends with the same check: each task is terminal exactly once and the counters add up.
"""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from orchestra import _execution
from orchestra import dispatcher as engine
from orchestra._agents import registry as agents_module
from orchestra.agents import AgentRegistry
from orchestra.dispatcher import Dispatcher
from orchestra.errors import (
    RetryLater,
)
from orchestra.tasks import Cancellation, Outcome, Retry
from orchestra.testing import Recorder
from tests.faults._engine import NEVER, QUICK, letters_of
from tests.waiting import settled, until


@pytest.fixture
def quickly_stuck(monkeypatch):
    """An agent counts as stuck a moment after it was interrupted."""
    monkeypatch.setattr("orchestra._dispatch.running.STUCK_AFTER", 0.1)
    monkeypatch.setattr("orchestra._dispatch.stuck.STUCK_AFTER", 0.1)


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
