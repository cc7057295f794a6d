"""What every task queue promises, executed against each of them."""

from __future__ import annotations

import asyncio
import re
import time

import numpy as np
import pytest

from orchestra._delivery import Again, Bury, Complete
from orchestra.errors import (
    ConfigurationError,
    InvalidTaskError,
    InvalidTaskTypeError,
    LockError,
    QueueFullError,
    TaskTooLargeError,
)
from orchestra.tasks import TaskPriority
from orchestra.testing import Recorder

LEASE = 61.0
"""Seconds, a little more than the default lease."""


def work(**keys):
    return {"type": "work", **keys}


async def take(queue, count=1, consumer="a", block_ms=0):
    return await queue.consume(consumer, count, block_ms)


async def read_one(queue, consumer="a"):
    (delivery,) = await queue.read(consumer, 1, 1000)
    return delivery


async def _all_of(take_some, count):
    """What ``take_some(count)`` gives until there are ``count``; a single call may bring fewer."""
    taken = []
    while len(taken) < count:
        got = await take_some(count - len(taken))
        assert got, f"{len(taken)} of {count}"
        taken += got
    return taken


async def read_all(queue, count, consumer="a"):
    return await _all_of(lambda most: queue.read(consumer, most, 1000), count)


async def take_all(queue, count, consumer="a"):
    return await _all_of(lambda most: queue.consume(consumer, most, 1000), count)


async def drain(queue, consumer="a", block_ms=0):
    """Acknowledge everything; returns the ids of the tasks in order."""
    ids = []
    while got := await queue.consume(consumer, 100, block_ms):
        ids += [task["id"] for _, task in got]
        assert await queue.acknowledge_many([message_id for message_id, _ in got]) == [True] * len(got)
    return ids


# -- producing and consuming


async def test_a_task_arrives_as_it_was_produced(queue):
    task = {
        "id": "task-123",
        "type": "image_processing",
        "input": {"url": "https://example.com/a.jpg", "sizes": [1, 2.5, None, True], "raw": b"\x00\xff"},
        "priority": TaskPriority.HIGH.value,
        "max_retries": 7,
        "timeout": 1.5,
        "deadline": 4_000_000_000.0,
        "metadata": {"tenant": "acme"},
        "colour": "green",
    }
    message_id = await queue.produce(task)
    assert re.fullmatch(r"1:\d+-\d+", message_id)
    assert await take(queue) == [(message_id, task)]
    assert await queue.acknowledge(message_id) is True
    assert await queue.get_queue_depth() == 0


async def test_an_array_arrives_as_an_array(queue):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    await queue.produce(work(input={"array": array}))
    ((_, task),) = await take(queue)
    assert task["input"]["array"].dtype == array.dtype
    assert np.array_equal(task["input"]["array"], array)


async def test_a_task_gets_an_id_and_normal_priority(queue):
    message_ids = [await queue.produce(work()) for _ in range(3)]
    assert len(set(message_ids)) == 3
    tasks = [task for _, task in await take(queue, 3)]
    assert len({task["id"] for task in tasks}) == 3
    assert {task["priority"] for task in tasks} == {TaskPriority.NORMAL}


async def test_the_id_may_be_an_argument(queue):
    await queue.produce(work(), "mine")
    await queue.produce(work(id="same"), task_id="same")
    assert [task["id"] for _, task in await take(queue, 5)] == ["mine", "same"]
    with pytest.raises(InvalidTaskError):
        await queue.produce(work(id="one"), task_id="two")


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


INVALID = {
    "not a dict": ("work", InvalidTaskTypeError),
    "no type": ({"id": "x"}, InvalidTaskError),
    "type of spaces": ({"type": "a b"}, InvalidTaskError),
    "type not text": ({"type": 5}, InvalidTaskTypeError),
    "empty id": (work(id=""), InvalidTaskError),
    "id with a space": (work(id="a b"), InvalidTaskError),
    "id too long": (work(id="x" * 129), InvalidTaskError),
    "id not text": (work(id=17), InvalidTaskTypeError),
    "priority out of range": (work(priority=4), InvalidTaskError),
    "priority negative": (work(priority=-1), InvalidTaskError),
    "priority text": (work(priority="high"), InvalidTaskTypeError),
    "priority bool": (work(priority=True), InvalidTaskTypeError),
    "max_retries negative": (work(max_retries=-1), InvalidTaskError),
    "max_retries float": (work(max_retries=1.0), InvalidTaskTypeError),
    "timeout zero": (work(timeout=0), InvalidTaskError),
    "timeout nan": (work(timeout=float("nan")), InvalidTaskError),
    "delay negative": (work(delay=-1), InvalidTaskError),
    "delay infinite": (work(delay=float("inf")), InvalidTaskError),
    "delay text": (work(delay="1"), InvalidTaskTypeError),
    "deadline zero": (work(deadline=0), InvalidTaskError),
    "object": (work(input={"x": object()}), InvalidTaskTypeError),
    "set": (work(input={"x": {1}}), InvalidTaskTypeError),
    "float key": (work(input={1.5: 1}), InvalidTaskTypeError),
    "huge int": (work(input=1 << 70), InvalidTaskError),
    "surrogate": (work(input="\ud800"), InvalidTaskError),
    "too deep": (work(input=deep(100)), InvalidTaskError),
    "too large": (work(input="x" * (1 << 20)), TaskTooLargeError),
}


@pytest.mark.parametrize("name", INVALID)
async def test_what_cannot_travel_is_refused_before_anything_is_changed(queue, name):
    task, error = INVALID[name]
    with pytest.raises(error):
        await queue.produce(task)
    with pytest.raises(error):
        await queue.produce_many([work(), task, work()])
    assert await queue.get_queue_depth() == 0
    assert (await queue.stats()).counters.get("produced", 0) == 0


async def test_a_cycle_is_refused(queue):
    loop = []
    loop.append(loop)
    with pytest.raises(InvalidTaskError):
        await queue.produce(work(input=loop))


async def test_the_size_limit_is_the_queues(backend):
    queue = backend.make(max_task_bytes=200)
    with pytest.raises(TaskTooLargeError) as caught:
        await queue.produce(work(input="x" * 300))
    assert caught.value.limit == 200
    await queue.produce(work(input="x" * 100))


async def test_produce_many_answers_in_order(queue):
    tasks = [work(id=f"t{i}", priority=i % 4) for i in range(20)]
    message_ids = await queue.produce_many(tasks)
    assert [int(message_id[0]) for message_id in message_ids] == [i % 4 for i in range(20)]
    by_message = dict(await take_all(queue, 20))
    assert [by_message[message_id]["id"] for message_id in message_ids] == [f"t{i}" for i in range(20)]


async def test_produce_many_of_nothing(queue):
    assert await queue.produce_many([]) == []
    assert await queue.produce_many(iter([work()])) != []


async def test_many_producers_at_once(queue):
    message_ids = await asyncio.gather(*(queue.produce(work(id=f"t{i}")) for i in range(50)))
    assert len(set(message_ids)) == 50
    assert sorted(await drain(queue)) == sorted(f"t{i}" for i in range(50))


async def test_urgent_first_and_oldest_first_within_a_priority(queue):
    for i, priority in enumerate([3, 2, 1, 0, 3, 2, 1, 0]):
        await queue.produce(work(id=f"p{priority}-{i // 4}", priority=priority))
    got = []
    for _ in range(8):
        ((message_id, task),) = await take(queue)
        got.append(task["id"])
        await queue.acknowledge(message_id)
    assert got == ["p0-0", "p0-1", "p1-0", "p1-1", "p2-0", "p2-1", "p3-0", "p3-1"]


@pytest.mark.parametrize("count", [1, 3, 7])
async def test_consume_returns_at_most_count_across_lanes(queue, count):
    await queue.produce_many([work(id=f"t{i}", priority=3 - i % 4) for i in range(12)])
    got = await take(queue, count)
    assert len(got) == count
    assert [task["priority"] for _, task in got] == [0, 0, 0, 1, 1, 1, 2][:count]


async def test_a_large_count_leaves_nothing_more_urgent_behind(queue):
    await queue.produce_many([work(priority=3 - i % 4) for i in range(80)])
    seen = []
    while got := await take(queue, 40):
        seen.append([task["priority"] for _, task in got])
        stats = await queue.stats()
        assert not any(stats.waiting[: max(seen[-1])]), f"took {seen[-1]} and left {stats.waiting}"
    assert sum(map(len, seen)) == 80


async def test_consume_of_nothing(queue):
    assert await take(queue) == []
    began = time.monotonic()
    assert await take(queue, block_ms=60) == []
    assert 0.05 <= time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    "args",
    [("a b", 1, 0), ("", 1, 0), (None, 1, 0), ("a", 0, 0), ("a", -1, 0), ("a", 1.0, 0), ("a", 1, -1), ("a", 1, 0.5)],
)
async def test_consume_refuses_bad_arguments(queue, args):
    with pytest.raises(ConfigurationError):
        await queue.consume(*args)


async def test_a_waiting_consumer_wakes_at_once(queue):
    waiting = asyncio.create_task(take(queue, block_ms=10_000))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    message_id = await queue.produce(work())
    assert [m for m, _ in await waiting] == [message_id]
    assert time.monotonic() - began < 1.0


async def test_every_waiting_consumer_gets_one(queue):
    waiting = [asyncio.create_task(take(queue, consumer=f"c{i}", block_ms=10_000)) for i in range(4)]
    await asyncio.sleep(0.05)
    produced = [await queue.produce(work()) for _ in range(4)]
    got = await asyncio.gather(*waiting)
    assert sorted(m for tasks in got for m, _ in tasks) == sorted(produced)


async def test_consumers_share_the_tasks(queue):
    await queue.produce_many([work(id=f"t{i}") for i in range(40)])
    got = await asyncio.gather(*(drain(queue, f"c{i}") for i in range(4)))
    assert sorted(task_id for ids in got for task_id in ids) == sorted(f"t{i}" for i in range(40))


async def test_a_wake_ends_a_read(queue):
    reading = asyncio.create_task(queue.read("a", 5, 10_000))
    for _ in range(200):
        await asyncio.sleep(0.005)
        await queue.wake("a")
        if reading.done():
            break
    assert await reading == []


@pytest.mark.parametrize("ticks", range(10))
async def test_a_cancelled_consume_loses_nothing(queue, ticks):
    other = "b"
    for i in range(3):
        waiting = asyncio.create_task(take(queue, block_ms=10_000))
        await asyncio.sleep(0.01 if i else 0)
        await queue.produce(work(id=f"t{i}"))
        for _ in range(ticks):
            await asyncio.sleep(0)
        waiting.cancel()
        (got,) = await asyncio.gather(waiting, return_exceptions=True)
        if isinstance(got, list):
            assert [await queue.acknowledge(message_id) for message_id, _ in got] == [True]
        else:
            assert isinstance(got, asyncio.CancelledError)
            assert [task["id"] for m, task in await take(queue, 5, other, 5000) if await queue.acknowledge(m)] == [
                f"t{i}"
            ]
    assert await queue.get_queue_depth() == 0


async def test_a_cancelled_waiter_passes_its_wake_on(queue):
    first = asyncio.create_task(take(queue, consumer="first", block_ms=10_000))
    await asyncio.sleep(0.03)
    second = asyncio.create_task(take(queue, consumer="second", block_ms=10_000))
    await asyncio.sleep(0.03)
    produced = asyncio.create_task(queue.produce(work()))
    await asyncio.sleep(0)
    first.cancel()
    (got,) = await asyncio.gather(first, return_exceptions=True)
    if isinstance(got, asyncio.CancelledError):
        async with asyncio.timeout(5):
            assert [m for m, _ in await second] == [await produced]
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)


# -- acknowledging


async def test_acknowledge_is_true_once(queue):
    await queue.produce(work())
    ((message_id, _),) = await take(queue)
    assert await queue.acknowledge(message_id) is True
    assert await queue.acknowledge(message_id) is False
    assert (await queue.stats()).counters["completed"] == 1


@pytest.mark.parametrize("message_id", ["", "2", "2:1-1", "9:1-1", "x:1-1", "z:t", "2:99999999999999-0", "22:1-1"])
async def test_acknowledge_of_an_unknown_id_is_false(queue, message_id):
    await queue.produce(work())
    assert await queue.acknowledge(message_id) is False
    assert await queue.add_to_dlq(message_id, work(), {"error": "x"}) is False
    assert await queue.get_queue_depth() == 1


async def test_acknowledge_of_a_waiting_task_is_false(queue):
    message_id = await queue.produce(work())
    assert await queue.acknowledge(message_id) is False
    assert len(await take(queue)) == 1


async def test_acknowledge_of_another_queue_objects_delivery_is_false(backend, queue):
    await queue.produce(work())
    ((message_id, task),) = await take(queue)
    other = backend.twin(queue)
    assert await other.acknowledge(message_id) is False
    assert await other.add_to_dlq(message_id, task, {}) is False
    assert await queue.acknowledge(message_id) is True


async def test_acknowledge_many_answers_one_by_one(queue):
    await queue.produce_many([work(id="a"), work(id="b", priority=0)])
    first, second = [message_id for message_id, _ in await take(queue, 2)]
    assert await queue.acknowledge_many([first, "2:1-1", second, first]) == [True, False, True, False]
    assert await queue.acknowledge_many([]) == []
    assert await queue.get_queue_depth() == 0


async def test_two_acknowledges_at_once_are_one(queue):
    await queue.produce(work())
    ((message_id, _),) = await take(queue)
    assert sorted(await asyncio.gather(*(queue.acknowledge(message_id) for _ in range(3)))) == [False, False, True]


# -- delay


async def test_a_delayed_task_is_not_early(backend, queue):
    message_id = await queue.produce(work(id="later", delay=100))
    assert message_id == "z:later"
    assert await queue.get_queue_depth() == 1
    assert (await queue.stats()).delayed == 1
    await backend.hasten(queue, 99)
    assert await take(queue) == []
    await backend.hasten(queue, 1.01)
    ((_, task),) = await take(queue)
    assert task["id"] == "later"
    assert "delay" not in task


async def test_a_waiting_consumer_gets_a_delayed_task_when_it_is_due(backend, queue):
    began = time.monotonic()
    await queue.produce(work(delay=0.1))
    backend.let_pass(0.1)
    assert len(await take(queue, block_ms=5000)) == 1
    assert 0.095 <= time.monotonic() - began < 3.0


async def test_due_tasks_come_in_order_of_priority(backend, queue):
    await queue.produce_many([work(id="low", priority=3, delay=5), work(id="high", priority=0, delay=9)])
    await backend.hasten(queue, 10)
    assert await drain(queue) == ["high", "low"]


async def test_an_own_id_is_known_while_delayed(queue):
    assert await queue.produce(work(id="x", delay=50)) == "z:x"
    assert await queue.produce(work(id="x")) == "z:x"
    assert await queue.get_queue_depth() == 1


async def test_a_generated_id_may_be_delayed(backend, queue):
    message_ids = await queue.produce_many([work(delay=1), work(delay=1)])
    assert len(set(message_ids)) == 2
    assert all(message_id.startswith("z:") for message_id in message_ids)
    await backend.hasten(queue, 2)
    assert sorted(f"z:{task_id}" for task_id in await drain(queue)) == sorted(message_ids)


# -- deduplication


async def test_a_repeat_answers_the_first_message_id(queue):
    first = await queue.produce(work(id="once", input=1))
    assert await queue.produce(work(id="once", input=2)) == first
    assert await queue.produce(work(), task_id="once") == first
    assert [task["input"] for _, task in await take(queue, 5)] == [1]
    stats = await queue.stats()
    assert (stats.counters["produced"], stats.counters["duplicates"]) == (1, 2)


async def test_a_repeat_within_a_batch(queue):
    first, second, third = await queue.produce_many([work(id="a"), work(id="b"), work(id="a")])
    assert first == third != second
    assert await queue.get_queue_depth() == 2


async def test_an_id_stays_known_after_the_task_has_ended(queue):
    first = await queue.produce(work(id="once"))
    await drain(queue)
    assert await queue.produce(work(id="once")) == first
    assert await queue.get_queue_depth() == 0


async def test_queue_objects_share_what_is_known(backend, queue):
    first = await queue.produce(work(id="once"))
    assert await backend.twin(queue).produce(work(id="once")) == first


# -- limit


async def test_a_full_queue_refuses(backend):
    queue = backend.make(max_length=3)
    await queue.produce_many([work(), work(delay=60)])
    with pytest.raises(QueueFullError) as caught:
        await queue.produce_many([work(), work()])
    assert caught.value.retry_after > 0
    assert caught.value.limit == 3
    assert await queue.get_queue_depth() == 2
    await queue.produce(work())
    with pytest.raises(QueueFullError):
        await queue.produce(work())


async def test_what_is_in_flight_counts_against_the_limit(backend):
    queue = backend.make(max_length=1)
    await queue.produce(work())
    ((message_id, _),) = await take(queue)
    with pytest.raises(QueueFullError):
        await queue.produce(work())
    await queue.acknowledge(message_id)
    await queue.produce(work())


async def test_a_refusal_is_told(backend):
    queue = backend.make(max_length=1)
    with Recorder("queue.refused", "queue.produced") as recorder:
        await queue.produce(work())
        with pytest.raises(QueueFullError):
            await queue.produce(work())
    (refused,) = recorder.of("queue.refused", queue="tasks")
    assert refused.measurements == {"count": 1, "limit": 1}
    (produced,) = recorder.of("queue.produced", queue="tasks")
    assert produced.measurements["count"] == 1


# -- deliveries


async def test_a_delivery_knows_its_task(queue):
    await queue.produce(work(id="t", input={"x": 1}, priority=1, metadata={"m": 2}, odd=3))
    delivery = await read_one(queue)
    task = delivery.task()
    assert (task.id, task.type, task.input, task.priority) == ("t", "work", {"x": 1}, 1)
    assert (task.attempt, task.metadata, task.extra, task.fence) == (1, {"m": 2}, {"odd": 3}, delivery.fence)
    assert delivery.message_id.startswith("1:")
    assert not delivery.wants_result


async def test_what_was_read_can_be_acknowledged(queue):
    await queue.produce(work())
    delivery = await read_one(queue)
    assert await queue.acknowledge(delivery.message_id) is True
    assert await queue.settle([(delivery, Complete())]) == [delivery]


async def test_settling_completes(queue):
    await queue.produce_many([work() for _ in range(30)])
    deliveries = await read_all(queue, 30)
    assert await queue.settle([(delivery, Complete()) for delivery in deliveries]) == []
    assert await queue.settle([(delivery, Complete()) for delivery in deliveries]) == deliveries
    assert (await queue.stats()).counters["completed"] == 30
    assert await queue.settle([]) == []


@pytest.mark.parametrize("delay", [0.0, 30.0])
@pytest.mark.parametrize(("counter", "order"), [("retried", "wxt"), ("throttled", "twx"), ("released", "twx")])
async def test_who_comes_back_without_having_failed_goes_before_his_lane(queue, backend, counter, order, delay):
    """Its message id, its count in the statistics and its cancellation are like any other's; a higher lane goes first."""
    await queue.produce_many([work(id=name, priority=1) for name in "twx"])
    first = await read_one(queue)
    await queue.settle([(first, Again(delay, counter))])
    if delay:
        assert (await queue.stats()).delayed == 1
        await backend.hasten(queue, 31)
        await queue.maintain("c", 0)
    assert (await queue.stats()).waiting == (0, 3, 0, 0)
    await queue.produce(work(id="urgent", priority=0))
    found = await read_all(queue, 4)
    assert [delivery.header.id for delivery in found] == ["urgent", *order]
    assert [delivery.lane for delivery in found] == [0, 1, 1, 1]
    assert (await queue.stats()).in_flight == (1, 3, 0, 0)
    assert await queue.acknowledge_many([delivery.message_id for delivery in found]) == [True] * 4
    assert (await queue.stats()).live == 0


@pytest.mark.parametrize(("counter", "attempt"), [("retried", 2), ("throttled", 1), ("released", 1)])
async def test_again_at_once(queue, counter, attempt):
    await queue.produce(work(id="t", priority=1))
    first = await read_one(queue)
    assert await queue.settle([(first, Again(0.0, counter))]) == []
    second = await read_one(queue)
    assert (second.header.id, second.lane, second.attempt) == ("t", 1, attempt)
    assert second.fence > first.fence
    assert second.message_id != first.message_id
    assert second.task().attempt == attempt
    assert (await queue.stats()).counters[counter] == 1


@pytest.mark.parametrize("counter", ["retried", "throttled", "released"])
async def test_again_later_is_not_early(backend, queue, counter):
    await queue.produce(work(id="t"))
    first = await read_one(queue)
    await queue.settle([(first, Again(30.0, counter))])
    assert (await queue.stats()).delayed == 1
    await backend.hasten(queue, 29)
    assert await queue.maintain("a", 10)
    assert await queue.read("a", 1, 0) == []
    await backend.hasten(queue, 1.01)
    await queue.maintain("a", 10)
    second = await read_one(queue)
    assert second.retries == (counter == "retried")
    assert second.fence > first.fence


async def test_retries_add_up_over_many_moves(queue):
    await queue.produce(work())
    fences = []
    for counter in ("retried", "throttled", "retried", "released"):
        delivery = await read_one(queue)
        fences.append(delivery.fence)
        await queue.settle([(delivery, Again(0.0, counter))])
    delivery = await read_one(queue)
    assert delivery.attempt == 3
    assert fences == sorted(set(fences))
    assert delivery.fence > fences[-1]


async def test_a_retried_task_goes_to_the_end_of_its_lane(queue):
    await queue.produce_many([work(id="a"), work(id="b")])
    first = await read_one(queue)
    await queue.settle([(first, Again(0.0))])
    assert await drain(queue) == ["b", "a"]


async def test_a_mixed_batch(backend, queue):
    await queue.produce_many([work(id=f"t{i}", priority=i % 3) for i in range(6)])
    deliveries = sorted(await queue.read("a", 6, 0), key=lambda delivery: delivery.header.id)
    verdicts = [Complete(), Again(0.0), Bury("bad", 1, {"error": "x"}), Again(5.0, "throttled"), Complete(), Complete()]
    assert await queue.settle(list(zip(deliveries, verdicts, strict=True))) == []
    stats = await queue.stats()
    assert (stats.counters["completed"], stats.dead, stats.delayed, sum(stats.waiting)) == (3, 1, 1, 1)
    await backend.hasten(queue, 5.1)
    assert sorted(await drain(queue)) == ["t1", "t3"]


async def test_stats_say_where_the_tasks_are(queue):
    await queue.produce_many([work(priority=0), work(priority=3), work(priority=3), work(delay=9)])
    await queue.read("a", 2, 0)
    stats = await queue.stats()
    assert stats.queue == "tasks"
    assert stats.waiting == (0, 0, 0, 1)
    assert stats.in_flight == (1, 0, 0, 1)
    assert (stats.delayed, stats.dead, stats.live) == (1, 0, 4)


async def test_consumers_are_known_until_they_retire(queue):
    await queue.produce(work())
    await queue.maintain("a", 0)
    await queue.maintain("b", 0)
    assert (await queue.stats()).consumers == 2
    delivery = await read_one(queue, "a")
    await queue.retire("a")
    await queue.retire("b")
    assert (await queue.stats()).consumers == 1, "a consumer that holds something is kept"
    await queue.settle([(delivery, Complete())])
    await queue.retire("a")
    assert (await queue.stats()).consumers == 0


# -- leases


async def test_a_fresh_lease_is_not_reclaimed(backend, queue):
    await queue.produce(work())
    await take(queue)
    await backend.age(queue, 30)
    assert (await queue.maintain("b", 10)).deliveries == []
    assert await take(queue, consumer="b") == []


async def test_maintain_takes_over_what_expired(backend, queue):
    await queue.produce_many([work(id=f"t{i}", priority=i % 4) for i in range(5)])
    first = await queue.read("a", 5, 0)
    await backend.age(queue, LEASE)
    with Recorder("queue.reclaimed") as recorder:
        work_found = await queue.maintain("b", 10)
    again = work_found.deliveries
    assert sorted(d.header.id for d in again) == [f"t{i}" for i in range(5)]
    assert {d.deliveries for d in again} == {2}
    assert {d.consumer for d in again} == {"b"}
    assert {d.attempt for d in again} == {1}, "a crash is no attempt"
    fences = {d.header.id: d.fence for d in first}
    assert all(d.fence > fences[d.header.id] for d in again)
    assert recorder.events[0].measurements == {"count": 5, "crashed": 0}
    assert (await queue.stats()).counters["reclaimed"] == 5
    assert await queue.settle([(d, Complete()) for d in again]) == []


async def test_maintain_takes_over_no_more_than_there_is_room_for(backend, queue):
    await queue.produce_many([work(priority=i % 2) for i in range(5)])
    await queue.read("a", 5, 0)
    await backend.age(queue, LEASE)
    assert (await queue.maintain("b", 0)).deliveries == []
    seen = []
    for expected in (2, 2, 1, 0):
        await backend.age(queue, 1)
        found = (await queue.maintain("b", 2)).deliveries
        assert len(found) == expected
        seen += [d.message_id for d in found]
    assert len(set(seen)) == 5


@pytest.mark.parametrize(
    "verdict", [Complete(), Again(0.0), Again(9.0, "throttled"), Bury("x", 1, {"error": "late"})], ids=repr
)
async def test_settling_after_a_reclaim_is_stale_and_changes_nothing(backend, queue, verdict):
    await queue.produce(work(id="t"))
    old = await read_one(queue, "a")
    await backend.age(queue, LEASE)
    (new,) = (await queue.maintain("b", 10)).deliveries
    before = await queue.stats()
    assert await queue.settle([(old, verdict)]) == [old]
    assert await queue.stats() == before
    assert await queue.settle([(new, Complete())]) == []


async def test_a_reclaim_by_the_same_consumer_is_stale_too(backend, queue):
    await queue.produce(work(id="t"))
    old = await read_one(queue, "a")
    await backend.age(queue, LEASE)
    (new,) = (await queue.maintain("a", 10)).deliveries
    assert await queue.settle([(old, Complete())]) == [old]
    assert await queue.settle([(new, Complete())]) == []


async def test_stale_ones_do_not_spoil_a_batch(backend, queue):
    await queue.produce_many([work(id="old"), work(id="new")])
    old = await read_one(queue, "a")
    await backend.age(queue, LEASE)
    (taken,) = (await queue.maintain("b", 1)).deliveries
    new = await read_one(queue, "a")
    assert await queue.settle([(old, Complete()), (new, Complete())]) == [old]
    assert await queue.settle([(taken, Complete())]) == []


async def test_acknowledge_after_a_reclaim_is_false(backend, queue):
    await queue.produce(work())
    ((message_id, task),) = await take(queue, consumer="a")
    other = backend.twin(queue)
    await backend.age(queue, LEASE)
    ((again, same),) = await take(other, consumer="b")
    assert (again, same) == (message_id, task)
    assert await queue.acknowledge(message_id) is False
    assert await queue.add_to_dlq(message_id, task, {"error": "late"}) is False
    assert await other.acknowledge(message_id) is True


async def test_consume_takes_over_what_expired(backend, queue):
    await queue.produce_many([work(id="a"), work(id="b")])
    await take(queue, 1, "x")
    await backend.age(queue, LEASE)
    got = [task["id"] for _, task in await take(queue, 1, "y")]
    got += [task["id"] for _, task in await take(queue, 1, "y")]
    assert sorted(got) == ["a", "b"]


async def test_a_poison_pill_ends_as_crashed(backend):
    queue = backend.make(max_deliveries=2)
    await queue.produce(work(id="pill"))
    await read_one(queue, "a")
    await backend.age(queue, LEASE)
    (second,) = (await queue.maintain("b", 5)).deliveries
    assert second.deliveries == 2
    await backend.age(queue, LEASE)
    with Recorder("queue.reclaimed") as recorder:
        assert (await queue.maintain("c", 5)).deliveries == []
    assert recorder.events[0].measurements == {"count": 0, "crashed": 1}
    (letter,) = await queue.read_dlq()
    assert (letter.reason, letter.task_data["id"], letter.error_info["deliveries"]) == ("crashed", "pill", 2)
    assert await queue.settle([(second, Complete())]) == [second]
    assert await queue.get_queue_depth() == 0


# -- dead letters


async def bury(queue, task, error_info):
    await queue.produce(task)
    ((message_id, same),) = await take(queue)
    assert await queue.add_to_dlq(message_id, same, error_info) is True
    return message_id


async def test_a_dead_letter_keeps_the_task_and_the_error(queue):
    began = time.time()
    info = {"error": "boom", "attempts": 4, "where": ["a", 1], "timestamp": began}
    message_id = await bury(queue, work(id="t", input={"x": 1}, priority=0, odd=True), info)
    assert await queue.acknowledge(message_id) is False
    assert await queue.add_to_dlq(message_id, work(), info) is False
    (letter,) = await queue.read_dlq()
    assert letter.task_data == work(id="t", input={"x": 1}, priority=0, odd=True)
    assert letter.error_info == info
    assert (letter.reason, letter.attempts, letter.raw) == ("failed", 4, b"")
    assert letter.died_at > 1_600_000_000
    assert await queue.get_dlq_depth() == 1
    assert await queue.get_queue_depth() == 0


async def test_the_queues_own_copy_is_kept(queue):
    await queue.produce(work(id="t", input="original"))
    ((message_id, _),) = await take(queue)
    await queue.add_to_dlq(message_id, work(id="other", input="changed"), {"error": "x", "reason": "rejected"})
    (letter,) = await queue.read_dlq()
    assert (letter.task_data["input"], letter.reason) == ("original", "rejected")


async def test_error_information_that_cannot_travel_changes_nothing(queue):
    await queue.produce(work())
    ((message_id, task),) = await take(queue)
    with pytest.raises(InvalidTaskError):
        await queue.add_to_dlq(message_id, task, {"error": object()})
    assert await queue.get_dlq_depth() == 0
    assert await queue.acknowledge(message_id) is True


async def test_dead_letters_are_read_in_pages(queue):
    for i in range(5):
        await bury(queue, work(id=f"t{i}"), {"error": str(i)})
    pages, after = [], None
    while page := await queue.read_dlq(2, after):
        pages.append([letter.task_data["id"] for letter in page])
        after = page[-1].message_id
    assert pages == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert len(await queue.read_dlq(1)) == 1


async def test_a_replay_is_a_new_life(queue):
    await queue.produce(work(id="t", priority=1))
    first = await read_one(queue)
    await queue.settle([(first, Again(0.0))])
    second = await read_one(queue)
    await queue.settle([(second, Bury("failed", 2, {"error": "x"}))])
    (letter,) = await queue.read_dlq()
    assert letter.attempts == 2
    assert await queue.replay_dlq([letter.message_id]) == 1
    assert await queue.replay_dlq([letter.message_id]) == 0
    assert await queue.get_dlq_depth() == 0
    third = await read_one(queue)
    assert (third.header.id, third.lane, third.attempt, third.generation) == ("t", 1, 1, 1)
    assert third.fence > second.fence > first.fence
    await queue.settle([(third, Bury("failed", 1, {"error": "y"}))])
    assert await queue.replay_dlq([letter.message_id for letter in await queue.read_dlq()]) == 1
    assert (await read_one(queue)).generation == 2
    stats = await queue.stats()
    assert (stats.counters["dead"], stats.counters["replayed"]) == (2, 2)


async def test_a_replay_wakes_a_waiting_consumer(queue):
    await bury(queue, work(id="t"), {"error": "x"})
    (letter,) = await queue.read_dlq()
    waiting = asyncio.create_task(take(queue, block_ms=10_000))
    await asyncio.sleep(0.05)
    assert await queue.replay_dlq([letter.message_id, letter.message_id]) == 1
    async with asyncio.timeout(5):
        assert [task["id"] for _, task in await waiting] == ["t"]


async def test_purging(queue):
    for i in range(4):
        await bury(queue, work(id=f"t{i}"), {"error": "x"})
    letters = await queue.read_dlq()
    assert await queue.purge_dlq([letters[1].message_id, letters[1].message_id, "1-1"]) == 1
    assert [letter.task_data["id"] for letter in await queue.read_dlq()] == ["t0", "t2", "t3"]
    assert await queue.purge_dlq() == 3
    assert await queue.purge_dlq() == 0
    assert await queue.replay_dlq([letters[0].message_id]) == 0


async def test_ids_that_are_none_are_refused(queue):
    for call in (queue.replay_dlq(["x"]), queue.purge_dlq(["2:1-1"]), queue.read_dlq(1, "-"), queue.read_dlq(0)):
        with pytest.raises(ConfigurationError):
            await call


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"garbage", b"\x94\x02\xa1a\xa1b\x02\x80", b"\x94\x01\xa1a\xa1b\x02"])
async def test_a_corrupt_entry_is_dead_lettered_and_skipped(backend, queue, frame):
    await queue.get_queue_depth()
    await backend.put_garbage(queue, frame)
    await queue.produce(work(id="good"))
    with Recorder("queue.corrupt") as recorder:
        got = await take(queue, 2, block_ms=500)
    assert [task["id"] for _, task in got] == ["good"]
    assert len(recorder.of("queue.corrupt", queue="tasks")) == 1
    (letter,) = await queue.read_dlq()
    reason = "unknown_version" if frame[1:2] == b"\x02" else "corrupt"
    assert (letter.reason, letter.task_data, letter.raw) == (reason, None, frame)
    assert letter.error_info["error"]
    assert await queue.replay_dlq([letter.message_id]) == 0
    assert await queue.get_dlq_depth() == 1


async def test_a_consumer_waits_on_behind_a_corrupt_entry(backend, queue):
    waiting = asyncio.create_task(take(queue, block_ms=10_000))
    await asyncio.sleep(0.05)
    await backend.put_garbage(queue, b"garbage")
    await queue.produce(work(id="good"))
    async with asyncio.timeout(5):
        assert [task["id"] for _, task in await waiting] == ["good"]


# -- results


async def test_a_result_waits_for_its_sender(queue):
    await queue.produce_many([work(id="t")], want_results=True)
    delivery = await read_one(queue)
    assert delivery.wants_result
    await queue.settle([(delivery, Complete({"answer": [42]}))])
    record = await queue.wait_result("t", 5)
    assert record == {"id": "t", "outcome": "completed", "value": {"answer": [42]}}
    assert await queue.wait_result("t", 5) == record


async def test_a_sender_waits_for_its_result(queue):
    await queue.produce_many([work(id="t")], want_results=True)
    waiting = [asyncio.create_task(queue.wait_result("t", 10)) for _ in range(3)]
    await asyncio.sleep(0.02)
    began = time.monotonic()
    assert await queue.settle([(await read_one(queue), Complete(7))]) == []
    assert [record["value"] for record in await asyncio.gather(*waiting)] == [7, 7, 7]
    assert time.monotonic() - began < 1.5


async def test_acknowledging_gives_a_result_without_value(queue):
    await queue.produce_many([work(id="t")], want_results=True)
    ((message_id, _),) = await take(queue)
    await queue.acknowledge(message_id)
    assert await queue.wait_result("t", 5) == {"id": "t", "outcome": "completed", "value": None}


async def test_a_dead_task_has_a_result_until_it_is_replayed(queue):
    await queue.produce_many([work(id="t")], want_results=True)
    await queue.settle([(await read_one(queue), Bury("failed", 3, {"error": "boom", "error_type": "ValueError"}))])
    record = await queue.wait_result("t", 5)
    assert (record["outcome"], record["reason"], record["attempts"]) == ("dead", "failed", 3)
    assert record["error"]["error"] == "boom"
    (letter,) = await queue.read_dlq()
    await queue.replay_dlq([letter.message_id])
    with pytest.raises(TimeoutError):
        await queue.wait_result("t", 0.05)
    await queue.settle([(await read_one(queue), Complete("better"))])
    assert (await queue.wait_result("t", 5))["value"] == "better"


async def test_a_retry_keeps_the_wish_for_a_result(queue):
    await queue.produce_many([work(id="t")], want_results=True)
    await queue.settle([(await read_one(queue), Again(0.0))])
    with pytest.raises(TimeoutError):
        await queue.wait_result("t", 0.05)
    await queue.settle([(await read_one(queue), Complete(1))])
    assert (await queue.wait_result("t", 5))["value"] == 1


async def test_a_value_that_cannot_travel_is_a_failure(queue):
    await queue.produce_many([work(id="t"), work(id="u")], want_results=True)
    bad, good = await read_one(queue), await read_one(queue)
    assert await queue.settle([(bad, Complete(object())), (good, Complete(1))]) == []
    assert (await queue.wait_result("t", 5))["reason"] == "bad_result"
    assert (await queue.wait_result("u", 5))["value"] == 1
    assert [letter.reason for letter in await queue.read_dlq()] == ["bad_result"]


async def test_a_value_that_nobody_wants_need_not_travel(queue):
    await queue.produce(work(id="t"))
    assert await queue.settle([(await read_one(queue), Complete(object()))]) == []
    with pytest.raises(TimeoutError):
        await queue.wait_result("t", 0.05)


async def test_waiting_for_a_result_ends(queue):
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await queue.wait_result("nobody", 0.05)
    assert time.monotonic() - began < 2.0


# -- locks


async def test_a_lock_excludes(queue):
    inside, most = 0, 0

    async def enter():
        nonlocal inside, most
        async with await queue.get_lock("section", expire_time=30):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.001)
            inside -= 1

    await asyncio.gather(*(enter() for _ in range(5)))
    assert most == 1


async def test_fences_grow(backend, queue):
    fences = []
    for holder in (queue, backend.twin(queue), queue):
        async with await holder.get_lock("fenced") as lock:
            fences.append(lock.fence)
    assert fences == sorted(set(fences))
    assert fences[0] >= 1


async def test_a_lock_that_is_taken_is_waited_for(queue):
    async with await queue.get_lock("taken"):
        began = time.monotonic()
        with pytest.raises(LockError):
            async with await queue.get_lock("taken", wait=0.05):
                raise AssertionError("two holders")
        assert 0.04 <= time.monotonic() - began < 2.0
        with pytest.raises(LockError):
            await (await queue.get_lock("taken", wait=0)).acquire()
        async with await queue.get_lock("other"):
            pass


async def test_acquiring_twice_confirms(queue):
    lock = await queue.get_lock("mine")
    await lock.acquire()
    fence = lock.fence
    assert await lock.acquire_nowait() is True
    assert lock.fence == fence
    other = await queue.get_lock("mine")
    assert await other.acquire_nowait() is False
    assert await other.release() is False
    assert await lock.extend() is True
    assert await lock.release() is True
    assert await lock.release() is False
    assert await lock.extend() is False


async def test_an_expired_lock_is_free(backend, queue):
    lock = await queue.get_lock("short", expire_time=30)
    await lock.acquire()
    first = lock.fence
    waiting = asyncio.create_task((other := await queue.get_lock("short", wait=10)).acquire())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    await backend.expire_lock(queue, "short")
    await waiting
    assert other.fence > first
    assert await lock.release() is False
    assert await other.release() is True


async def test_a_cancelled_waiter_leaves_the_lock_alone(queue):
    async with await queue.get_lock("kept"):
        waiting = asyncio.create_task((await queue.get_lock("kept")).acquire())
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert await (await queue.get_lock("kept")).acquire_nowait() is True


@pytest.mark.parametrize(
    ("name", "options"),
    [("a b", {}), ("", {}), ("x", {"expire_time": 0}), ("x", {"expire_time": -1}), ("x", {"wait": -1})],
)
async def test_a_bad_lock_is_refused(queue, name, options):
    with pytest.raises(ConfigurationError):
        await queue.get_lock(name, **options)


# -- life


async def test_a_closed_queue_may_be_used_again(queue):
    await queue.produce(work(id="t"))
    await queue.close()
    assert await drain(queue) == ["t"]
    async with queue:
        await queue.produce(work())
    await queue.close()
    assert await queue.get_queue_depth() == 1


@pytest.mark.parametrize(
    "options",
    [
        {"claim_interval_ms": 0},
        {"claim_interval_ms": 1.5},
        {"max_length": -1},
        {"max_length": True},
        {"max_task_bytes": 0},
        {"dedup_window": 0},
        {"dedup_window": float("nan")},
        {"result_ttl": 0},
        {"max_deliveries": 0},
    ],
    ids=repr,
)
def test_bad_settings_are_refused(backend, options):
    (name,) = options
    with pytest.raises(ConfigurationError, match=name):
        backend.make(**options)
