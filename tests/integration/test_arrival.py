"""A task that arrives at an idle worker starts in the callback in which its bytes came: what its agent sees of that."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

import orchestra.orchestration_worker_pool as pools
from orchestra._agents.services import current_slot
from orchestra._delivery import DONE
from orchestra.dispatcher import Dispatcher
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Outcome, Retry

SEEN = contextvars.ContextVar("seen", default="nothing")


@pytest.fixture
async def queue(manager):
    queue = RedisStreamTaskQueue("tasks", "workers", 5_000, manager=manager)
    yield queue
    await queue.close()


@pytest.fixture
def begun(monkeypatch):
    """How often a worker began in a callback: what ``begin`` returned each time."""
    returned = []

    def begin(slot, start):
        assert asyncio.current_task() is None
        returned.append(pools_begin(slot, start))
        return returned[-1]

    pools_begin = pools.begin
    monkeypatch.setattr(pools, "begin", begin)
    return returned


async def until(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
async def idle(queue, agents, begun):
    """A dispatcher with an idle worker whose read blocks; ``await idle(task)`` sends one and waits for its end."""

    async def warm(task):
        await asyncio.sleep(0)

    agents.register("warm", warm)
    async with Dispatcher(queue, agents=agents, retry=Retry(max_retries=0)) as dispatcher:

        async def send(task):
            reader = queue._intake._consumers[dispatcher.consumer].reader
            await until(lambda: reader._blocked and dispatcher.pool._idle and not dispatcher.held)
            ended = sum(dispatcher.outcomes.values())
            await queue.produce(task)
            await until(lambda: sum(dispatcher.outcomes.values()) > ended)
            return dispatcher

        await until(lambda: dispatcher.consumer in queue._intake._consumers)
        await queue.produce({"type": "warm"})
        await until(lambda: dispatcher.outcomes[Outcome.COMPLETED] == 1)
        dispatcher.outcomes.clear()
        begun.clear()
        yield send


async def test_its_task_and_its_context_are_the_workers_from_the_first_step_on(idle, agents, begun):
    tasks, slots, values = [], [], []

    async def agent(task):
        for _ in range(3):
            tasks.append(asyncio.current_task())
            slots.append(current_slot.get())
            values.append(SEEN.get())
            SEEN.set(task.id)
            await asyncio.sleep(0)

    agents.register("work", agent)
    dispatcher = await idle({"id": "a", "type": "work"})
    await idle({"id": "b", "type": "work"})
    assert begun == [True, True]
    assert [slot.task for slot in slots] == tasks
    assert len(set(tasks[:3])) == len(set(tasks[3:])) == 1
    assert tasks[0].get_name().startswith("orchestra:")
    assert values == ["nothing", "a", "a", "nothing", "b", "b"]
    assert dispatcher.outcomes == {Outcome.COMPLETED: 2}


async def test_an_agent_that_never_waits_ends_there_and_the_worker_stays_idle(idle, agents, begun):
    async def agent(task):
        return 1

    agents.register("work", agent)
    for _ in range(3):
        dispatcher = await idle({"type": "work"})
    assert begun == [False] * 3
    assert dispatcher.outcomes == {Outcome.COMPLETED: 3}
    assert dispatcher.pool.get_running_tasks() == 0


async def test_timeouts_of_the_first_step_expire(idle, agents, begun):
    caught = []

    async def agent(task):
        for seconds in (0, 0.001):
            try:
                async with asyncio.timeout(seconds):
                    await asyncio.Event().wait()
            except TimeoutError:
                caught.append(asyncio.current_task().cancelling())

    agents.register("work", agent)
    dispatcher = await idle({"type": "work"})
    assert (begun, caught) == ([True], [0, 0])
    assert dispatcher.outcomes == {Outcome.COMPLETED: 1}


async def test_an_engine_timeout_reaches_an_agent_in_its_first_await(idle, agents, begun):
    async def agent(task):
        await asyncio.Event().wait()

    agents.register("work", agent, timeout=0.05)
    dispatcher = await idle({"type": "work"})
    assert begun == [True]
    assert dispatcher.outcomes == {Outcome.TIMED_OUT: 1}
    assert (await idle({"type": "warm"})).outcomes[Outcome.COMPLETED] == 1


async def test_children_of_the_first_step_belong_to_it(idle, agents, begun):
    async def child(n):
        return n

    async def broken():
        raise ValueError("no luck")

    async def agent(task):
        if task.input:
            async with asyncio.TaskGroup() as group:
                group.create_task(broken())
                await asyncio.Event().wait()
        assert await asyncio.gather(*(asyncio.create_task(child(n)) for n in range(3))) == [0, 1, 2]

    agents.register("work", agent)
    await idle({"type": "work"})
    dispatcher = await idle({"type": "work", "input": {"break": True}})
    assert begun == [True, True]
    assert dispatcher.outcomes == {Outcome.COMPLETED: 1, Outcome.FAILED: 1}


@pytest.mark.parametrize("waits", [False, True])
async def test_what_it_raises_is_its_outcome(idle, agents, begun, waits):
    async def agent(task):
        if waits:
            await asyncio.sleep(0)
        raise ValueError("no luck")

    agents.register("work", agent)
    dispatcher = await idle({"type": "work"})
    assert begun == [waits]
    assert dispatcher.outcomes == {Outcome.FAILED: 1}
    assert (await idle({"type": "warm"})).outcomes[Outcome.COMPLETED] == 1


async def test_cancelling_itself_meets_its_first_await(idle, agents, begun):
    met = []

    async def agent(task):
        asyncio.current_task().cancel()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            met.append(asyncio.current_task().uncancel())

    agents.register("work", agent)
    dispatcher = await idle({"type": "work"})
    assert (begun, met) == ([True], [0])
    assert dispatcher.outcomes == {Outcome.COMPLETED: 1}
    assert (await idle({"type": "warm"})).outcomes[Outcome.COMPLETED] == 2


async def test_a_cancel_between_the_callback_and_the_workers_turn_meets_the_agent(idle, agents, begun):
    met = []

    async def agent(task):
        slot, loop = current_slot.get(), asyncio.get_running_loop()
        loop.call_soon(slot.interrupt, Outcome.CANCELLED)
        # What it waits for is done before the worker has its turn, so that nothing but the cancel can stop it.
        waiting = loop.create_future()
        loop.call_soon(waiting.set_result, None)
        try:
            await waiting
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            met.append(slot.why)
            raise

    agents.register("work", agent)
    dispatcher = await idle({"type": "work"})
    assert (begun, met) == ([True], [Outcome.CANCELLED])
    assert dispatcher.outcomes == {Outcome.CANCELLED: 1}
    assert (await idle({"type": "warm"})).outcomes[Outcome.COMPLETED] == 1


async def test_stopping_the_dispatcher_out_of_the_first_step(queue, agents, begun):
    stopping = []

    async def warm(task):
        await asyncio.sleep(0)

    async def agent(task):
        stopping.append(asyncio.create_task(dispatcher.stop()))
        await asyncio.sleep(0.01)

    agents.register("warm", warm)
    agents.register("work", agent)
    dispatcher = Dispatcher(queue, agents=agents)
    await dispatcher.start()
    await queue.produce({"type": "warm"})
    await until(lambda: dispatcher.outcomes[Outcome.COMPLETED] == 1 and dispatcher.pool._idle)
    reader = queue._intake._consumers[dispatcher.consumer].reader
    await until(lambda: reader._blocked)
    await queue.produce({"type": "work"})
    await until(lambda: stopping)
    async with asyncio.timeout(20):
        await stopping[0]
    assert dispatcher.outcomes[Outcome.COMPLETED] == 2
    assert await queue.get_queue_depth() == 0


async def test_more_at_once_than_there_is_room_for_go_the_ordinary_way(queue, agents, begun):
    """A flood that a blocked read brings is run by workers in their turns, and nothing of it is lost or run twice."""
    seen = []

    async def agent(task):
        seen.append(task.input)

    agents.register("work", agent)
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=3) as dispatcher:
        for size in (1, 40, 7, 200):
            await queue.produce_many([{"type": "work", "input": (size, n)} for n in range(size)])
            await until(lambda: not dispatcher.held and len(seen) == len(set(map(tuple, seen))))
        await until(lambda: len(seen) == 248)
    assert len(set(map(tuple, seen))) == 248
    assert dispatcher.outcomes == {Outcome.COMPLETED: 248}


async def test_without_a_taker_a_blocked_read_returns_what_comes(queue):
    """The contract of ``deliver_to``: handed over at once and not returned; or returned, when nobody takes."""
    taken = []
    await queue.read("c", 1, 0)
    for take in (None, taken.append, None):
        queue.deliver_to("c", take)
        reading = asyncio.ensure_future(queue.read("c", 20, 20_000))
        reader = queue._intake._consumers["c"].reader
        await until(lambda reader=reader: reader._blocked)
        await queue.produce({"type": "work"})
        async with asyncio.timeout(20):
            found = await reading
        assert bool(found) == (take is None)
    assert [len(found) for found in taken] == [1]
    assert sum(map(len, queue.held)) == 3
    async with asyncio.timeout(20):
        assert await queue.settle([(d, DONE) for d in taken[0]]) == []
