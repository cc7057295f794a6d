"""The engine under faults: start and stop in any order, loops that break, other loops and threads, contexts.

Every test ends with the same check: each task is terminal exactly once and the counters add up.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import random
import threading

import pytest

from orchestra import _execution, _lifecycle
from orchestra import dispatcher as engine
from orchestra._lifecycle import Service
from orchestra._pool.slots import Slot
from orchestra.agents import AgentRegistry
from orchestra.dispatcher import Dispatcher
from orchestra.errors import (
    Reject,
    StoreUnavailableError,
    Throttled,
    WrongLoopError,
)
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Outcome
from orchestra.testing import Recorder
from tests.faults._engine import NEVER, QUICK, give_back, letters_of
from tests.waiting import settled, until


@pytest.fixture
def quick_restarts(monkeypatch):
    """Background loops that fail are restarted without a pause."""
    monkeypatch.setattr(_lifecycle.Reconnect, "next", lambda self: setattr(self, "failures", self.failures + 1) or 0.0)


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
