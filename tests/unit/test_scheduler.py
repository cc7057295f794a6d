"""PriorityScheduler: order, waiting, cancellation, join. No clock is waited for except by the timeout itself."""

from __future__ import annotations

import asyncio
import random

import pytest

from orchestra import _shared
from orchestra.errors import ConfigurationError, InvalidTaskError, InvalidTaskTypeError
from orchestra.scheduler import PriorityScheduler, TaskPriority, get_scheduler


async def turn(times=5):
    """Let every task that can run do so."""
    for _ in range(times):
        await asyncio.sleep(0)


def task(name, priority=None):
    return {"id": name, "type": "t"} | ({} if priority is None else {"priority": priority})


async def test_most_urgent_first_and_fifo_within_a_priority():
    scheduler = PriorityScheduler()
    for name, priority in [("l", 3), ("n1", None), ("h", TaskPriority.HIGH), ("n2", 2), ("c", 0)]:
        await scheduler.add_task(task(name, priority))
    assert (await scheduler.peek_next_task())["id"] == "c"
    assert scheduler.get_queue_size() == len(scheduler) == 5
    assert [(await scheduler.get_next_task())["id"] for _ in range(5)] == ["c", "h", "n1", "n2", "l"]
    assert scheduler.is_empty()


async def test_empty_scheduler():
    scheduler = PriorityScheduler()
    assert await scheduler.peek_next_task() is None
    assert await scheduler.get_next_task(timeout=0) is None
    assert await scheduler.get_next_task(timeout=0.005) is None
    assert await scheduler.get_tasks_by_priority(3) == []
    assert scheduler.pop_nowait() is None
    assert scheduler.statistics().waiting == 0
    assert bool(scheduler) is True


async def test_bulk_takes_in_order():
    scheduler = PriorityScheduler()
    for number in range(10):
        scheduler.add_nowait(task(number, 3 - number % 4))
    taken = await scheduler.get_tasks_by_priority(count=4)
    assert [t["id"] for t in taken] == [3, 7, 2, 6]
    assert len(await scheduler.get_tasks_by_priority()) == 6
    with pytest.raises(ConfigurationError, match="count"):
        await scheduler.get_tasks_by_priority(-1)


async def test_arbitrary_items_with_an_explicit_priority():
    scheduler = PriorityScheduler()
    item = object()
    scheduler.put_nowait(-5, item)
    scheduler.put_nowait(-6, "sooner")
    assert scheduler.pop_many_nowait(5) == ["sooner", item]
    with pytest.raises(InvalidTaskTypeError, match="None cannot be scheduled"):
        scheduler.put_nowait(0, None)
    with pytest.raises(TypeError):
        scheduler.put_nowait(0.5, item)
    assert scheduler.statistics().added == 2


@pytest.mark.parametrize("priority", ["high", 1.0, True, None, [1]])
async def test_refuses_priorities_of_the_wrong_type(priority):
    scheduler = PriorityScheduler()
    with pytest.raises(InvalidTaskTypeError, match="priority must be a TaskPriority") as caught:
        await scheduler.add_task({"id": "x", "priority": priority})
    assert caught.value.path == "priority"
    assert scheduler.is_empty()


@pytest.mark.parametrize("priority", [-1, 4, 2**80])
async def test_refuses_priorities_out_of_range(priority):
    with pytest.raises(InvalidTaskError, match="priority must be from 0"):
        await PriorityScheduler().add_task({"id": "x", "priority": priority})


async def test_refuses_what_is_no_task():
    with pytest.raises(InvalidTaskTypeError, match="must be a dict, got str"):
        await PriorityScheduler().add_task("task")


async def test_full_scheduler_refuses_and_recovers():
    scheduler = PriorityScheduler(max_size=2)
    await scheduler.add_task(task(1))
    await scheduler.add_task(task(2))
    assert scheduler.is_full()
    with pytest.raises(asyncio.QueueFull, match="holds 2 tasks"):
        await scheduler.add_task(task(3))
    assert (scheduler.get_queue_size(), scheduler.statistics().refused) == (2, 1)
    await scheduler.get_next_task()
    await scheduler.add_task(task(3))
    assert not PriorityScheduler().is_full()


@pytest.mark.parametrize("max_size", [-1, 1.5, True, None])
def test_refuses_a_bad_max_size(max_size):
    with pytest.raises(ConfigurationError, match="PriorityScheduler.max_size"):
        PriorityScheduler(max_size)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", float("inf")])
async def test_refuses_a_bad_timeout(timeout):
    with pytest.raises(ConfigurationError, match="timeout"):
        await PriorityScheduler().get_next_task(timeout)


async def test_waiters_are_served_in_order_of_arrival():
    scheduler, served = PriorityScheduler(), []

    async def getter(name):
        served.append((name, await scheduler.get_next_task()))

    getters = [asyncio.create_task(getter(name)) for name in "abcd"]
    await turn()
    assert scheduler.statistics().waiting == 4
    for number in range(4):
        scheduler.put_nowait(2, number)
    late = asyncio.create_task(getter("late"))
    await turn()
    assert served == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
    scheduler.put_nowait(2, 4)
    await asyncio.gather(late, *getters)
    assert served[-1] == ("late", 4)


async def test_a_late_getter_does_not_overtake_a_woken_one():
    scheduler = PriorityScheduler()
    first = asyncio.create_task(scheduler.get_next_task())
    await turn()
    scheduler.put_nowait(2, "task")
    assert await scheduler.get_next_task(timeout=0) is None  # promised to `first`, which has not run yet
    assert await first == "task"


async def test_waiters_woken_in_vain_keep_their_order():
    scheduler, served = PriorityScheduler(), []

    async def getter(name):
        served.append((name, await scheduler.get_next_task()))

    getters = [asyncio.create_task(getter(name)) for name in "abc"]
    await turn()
    scheduler.put_nowait(2, 1)
    scheduler.put_nowait(2, 2)
    assert scheduler.pop_many_nowait(2) == [1, 2]
    await turn()
    assert served == []
    for number in range(3):
        scheduler.put_nowait(2, number)
    await asyncio.gather(*getters)
    assert served == [("a", 0), ("b", 1), ("c", 2)]


async def test_a_woken_getter_takes_the_most_urgent_of_its_moment():
    scheduler = PriorityScheduler()
    getter = asyncio.create_task(scheduler.get_next_task())
    await turn()
    scheduler.put_nowait(3, "low")
    scheduler.put_nowait(0, "critical")
    assert await getter == "critical"


@pytest.mark.parametrize("woken", [False, True])
async def test_a_cancelled_getter_loses_nothing(woken):
    scheduler = PriorityScheduler()
    first = asyncio.create_task(scheduler.get_next_task())
    second = asyncio.create_task(scheduler.get_next_task())
    await turn()
    if woken:
        scheduler.put_nowait(2, "task")
        first.cancel()
    else:
        first.cancel()
        scheduler.put_nowait(2, "task")  # the cancelled getter is still in line: its task has not run
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == "task"
    assert scheduler.statistics().waiting == 0


async def test_a_getter_closed_from_outside_leaves_the_line():
    scheduler = PriorityScheduler()
    coroutine = scheduler.get_next_task()
    coroutine.send(None)
    assert scheduler.statistics().waiting == 1
    coroutine.close()
    assert scheduler.statistics().waiting == 0


async def test_no_task_is_lost_or_doubled_under_random_cancellation():
    scheduler, rng, got = PriorityScheduler(), random.Random(7), []

    async def getter():
        item = await scheduler.get_next_task(timeout=None if rng.random() < 0.5 else 0.0005)
        if item is not None:
            got.append(item)

    getters, number = [], 0
    for _ in range(400):
        getters += [asyncio.create_task(getter()) for _ in range(rng.randrange(4))]
        if rng.random() < 0.7:
            await turn(rng.randrange(3))
        for _ in range(rng.randrange(4)):
            number += 1
            scheduler.put_nowait(rng.randrange(4), number)
        for victim in rng.sample(getters, min(2, len(getters))):
            victim.cancel()
        if rng.random() < 0.3 and (item := scheduler.pop_nowait()) is not None:
            got.append(item)
    await turn(20)
    for left in getters:
        left.cancel()
    await asyncio.gather(*getters, return_exceptions=True)
    got += scheduler.pop_many_nowait(number)
    assert sorted(got) == list(range(1, number + 1))
    statistics = scheduler.statistics()
    assert (statistics.waiting, statistics.added, statistics.taken) == (0, number, number)


async def test_join_waits_for_task_done():
    scheduler = PriorityScheduler()
    await scheduler.join()
    scheduler.add_nowait(task(1))
    scheduler.add_nowait(task(2))
    joined = asyncio.create_task(scheduler.join())
    with pytest.raises(ValueError, match="more often"):
        scheduler.task_done()
    await scheduler.get_tasks_by_priority(2)
    scheduler.task_done()
    await turn()
    assert not joined.done()
    scheduler.task_done()
    await joined
    with pytest.raises(ValueError, match="more often"):
        scheduler.task_done()


async def test_clear_ends_join_and_keeps_waiters():
    scheduler = PriorityScheduler()
    scheduler.add_nowait(task(1))
    scheduler.add_nowait(task(2))
    await scheduler.get_next_task()
    joined = asyncio.create_task(scheduler.join())
    cancelled = asyncio.create_task(scheduler.join())
    await turn()
    cancelled.cancel()
    await scheduler.clear()
    assert scheduler.is_empty()
    await turn()
    assert not joined.done()
    scheduler.task_done()
    await joined
    assert cancelled.cancelled()
    getter = asyncio.create_task(scheduler.get_next_task())
    await turn()
    scheduler.put_nowait(2, "x")
    assert scheduler.clear_nowait() == 1
    await turn()
    scheduler.put_nowait(2, "y")
    assert await getter == "y"
    statistics = scheduler.statistics()
    assert statistics.added == statistics.taken + statistics.cleared + statistics.size == 4


async def test_repr_shows_occupancy():
    scheduler = PriorityScheduler(10)
    scheduler.add_nowait(task(1))
    assert repr(scheduler) == "<PriorityScheduler 1/10 tasks, 0 waiting>"


async def test_shared_instance_is_the_same_awaited_or_not():
    _shared.reset()
    scheduler = get_scheduler("priority")
    assert await get_scheduler("priority") is scheduler
    assert get_scheduler() is scheduler
    assert get_scheduler("other") is not scheduler
    _shared.reset()
