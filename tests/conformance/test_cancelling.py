"""H12: a task is cancelled wherever it is, and ends once. Executed against every task queue."""

from __future__ import annotations

import asyncio
import time

import pytest

from orchestra._delivery import Again, Bury, Cancel, Complete
from orchestra.errors import ConfigurationError, QueueFullError
from orchestra.tasks import Cancellation
from orchestra.testing import Recorder

LEASE = 61.0
"""Seconds, a little more than the default lease."""
CANCELLED = {"id": "t", "outcome": "cancelled"}


def work(**keys):
    return {"type": "work", **keys}


async def send(queue, **keys):
    """A task whose sender wants its record."""
    ((_, message_id),) = await queue.submit([work(**keys)], want_results=True)
    return message_id


async def read_one(queue, consumer="a"):
    (delivery,) = await queue.read(consumer, 1, 1000)
    return delivery


async def consumed(queue, count=10, consumer="c", block_ms=0):
    """The ids of what a consumer gets; all of it is acknowledged."""
    got = await queue.consume(consumer, count, block_ms)
    assert all(await queue.acknowledge_many([message_id for message_id, _ in got]))
    return [task["id"] for _, task in got]


async def ended_cancelled(queue, count=1):
    """Nothing is left, ``count`` tasks were cancelled, and the record says so."""
    stats = await queue.stats()
    assert (stats.live, stats.dead, stats.counters["cancelled"]) == (0, 0, count), stats
    assert await queue.wait_result("t", 5) == CANCELLED


# -- at once


async def test_a_waiting_task_whose_place_is_known(queue):
    """H12: waiting, found by its message id."""
    ((_, message_id),) = await queue.submit([work()])
    task_id = (await queue.submit([work(id="other")]))[0].task_id
    sent = await queue.submit([work(priority=0)], want_results=True)
    assert await queue.cancel(sent[0].task_id, sent[0].message_id) is Cancellation.CANCELLED
    assert (await queue.wait_result(sent[0].task_id, 5))["outcome"] == "cancelled"
    got = await queue.consume("c", 10, 0)
    assert [m for m, _ in got][0] == message_id
    assert got[1][1]["id"] == task_id
    assert len(got) == 2
    assert (await queue.stats()).counters["cancelled"] == 1


@pytest.mark.parametrize("keys", [{}, {"delay": 50}], ids=["waiting", "delayed"])
@pytest.mark.parametrize("wanted", [True, False])
async def test_a_task_with_an_own_id_that_has_not_started(backend, queue, keys, wanted):
    """H12: waiting or delayed: terminal at once, with one record, whether the sender wanted it or not."""
    await queue.submit([work(id="t", **keys)], want_results=wanted)
    with Recorder("queue.cancelled") as recorder:
        assert await queue.cancel("t") is Cancellation.CANCELLED
    assert [event.measurements for event in recorder.events] == [{"count": 1}]
    await backend.hasten(queue, 60)
    assert await consumed(queue) == []
    await ended_cancelled(queue)
    assert await queue.cancel("t") is Cancellation.ENDED
    await ended_cancelled(queue)


async def test_a_delayed_task_with_a_generated_id(backend, queue):
    """H12: delayed."""
    first, second = await queue.submit([work(delay=5), work(delay=9)])
    assert await queue.cancel(first.task_id, first.message_id) is Cancellation.CANCELLED
    await backend.hasten(queue, 10)
    assert await consumed(queue) == [second.task_id]


async def test_a_delayed_retry(backend, queue):
    """H12: waiting for its retry: cancelled at once, and the retry never comes."""
    await send(queue, id="t")
    await queue.settle([(await read_one(queue), Again(30.0))])
    assert await queue.cancel("t") is Cancellation.CANCELLED
    await backend.hasten(queue, 31)
    assert await consumed(queue) == []
    await ended_cancelled(queue)


async def test_cancelling_makes_room(backend):
    """H12: what was cancelled is not live."""
    queue = backend.make(max_length=2)
    await queue.produce_many([work(id="a"), work(id="t", delay=5)])
    with pytest.raises(QueueFullError):
        await queue.produce(work())
    await queue.cancel("t")
    await queue.produce(work(id="b"))
    assert await consumed(queue) == ["a", "b"]


@pytest.mark.parametrize("keys", [{}, {"delay": 50}], ids=["waiting", "delayed"])
async def test_a_sender_who_waits_is_told_at_once(queue, keys):
    """H12: not when it looks again."""
    await send(queue, id="t", **keys)
    waiting = [asyncio.create_task(queue.wait_result("t", 10)) for _ in range(2)]
    await asyncio.sleep(0.05)
    began = time.monotonic()
    assert await queue.cancel("t") is Cancellation.CANCELLED
    assert await asyncio.gather(*waiting) == [CANCELLED] * 2
    assert time.monotonic() - began < 1.5


async def test_the_wrong_place_removes_nothing(queue):
    """H12: a message id of another task, or of none, cancels no other task."""
    other = await queue.produce(work(id="other"))
    ((_, place),) = await queue.submit([work()])
    for wrong in (other, place, "", "x", "z:t", "2:1-1", "9:1-1", "2:1", "2:99999999999999999999999-0", "2:-", ":"):
        assert await queue.cancel("t", wrong) is Cancellation.REQUESTED
    assert len(await consumed(queue)) == 2


async def test_a_prefix_of_an_id_is_another_id(queue):
    """H12: ids are compared whole."""
    place = await queue.produce(work(id="t" * 40))
    for other in ("t", "t" * 39, "t" * 41):
        assert await queue.cancel(other, place) is Cancellation.REQUESTED
    assert await queue.cancel("t" * 40, place) is Cancellation.CANCELLED
    place = await queue.produce(work(id="u"))
    assert await queue.cancel("uu", place) is Cancellation.REQUESTED
    assert await consumed(queue) == ["u"]


@pytest.mark.parametrize("task_id", ["", "a b", "x" * 129, None, 7, "ä"])
async def test_ids_that_no_task_can_have(queue, task_id):
    with pytest.raises(ConfigurationError):
        await queue.cancel(task_id)


# -- by a mark


async def test_a_waiting_task_whose_place_is_not_known(queue):
    """H12: nobody is handed it: a consumer that meets it settles it as cancelled."""
    sent = await queue.submit([work(), work(id="next")])
    assert await queue.cancel(sent[0].task_id) is Cancellation.REQUESTED
    assert await consumed(queue) == ["next"]
    stats = await queue.stats()
    assert (stats.live, stats.counters["cancelled"], stats.counters["completed"]) == (0, 1, 1)
    assert await queue.cancel(sent[0].task_id) is Cancellation.ENDED


async def test_a_delayed_task_that_has_become_due(backend, queue):
    """H12: it has left the delayed set for a place that nobody knows."""
    await send(queue, id="t", delay=5)
    await backend.hasten(queue, 6)
    await queue.maintain("a", 0)
    assert (await queue.stats()).delayed == 0
    assert await queue.cancel("t") is Cancellation.REQUESTED
    assert await consumed(queue) == []
    await ended_cancelled(queue)


async def test_a_consumer_waits_on_behind_a_cancelled_task(queue):
    """H12: skipping a cancelled task does not end the wait."""
    sent = await queue.submit([work()])
    await queue.cancel(sent[0].task_id)
    waiting = asyncio.create_task(consumed(queue, block_ms=10_000))
    await asyncio.sleep(0.05)
    await queue.produce(work(id="later"))
    async with asyncio.timeout(5):
        assert await waiting == ["later"]


async def test_a_task_in_flight_is_ended_by_its_holder(backend, queue):
    """H12: in flight: the next tick tells its holder, whose settle makes it terminal, once."""
    await send(queue, id="t")
    await queue.produce(work(id="u"))
    delivery, other = await read_one(queue), await read_one(queue)
    assert not queue.cancel_requested(delivery)
    assert await backend.twin(queue).cancel("t") is Cancellation.REQUESTED
    assert (await queue.stats()).in_flight == (0, 0, 2, 0)
    assert (await queue.maintain("a", 0)).cancels
    assert not (await queue.maintain("a", 0)).cancels, "told once"
    assert queue.cancel_requested(delivery)
    assert not queue.cancel_requested(other)
    waiting = asyncio.create_task(queue.wait_result("t", 10))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    with Recorder("queue.cancelled") as recorder:
        assert await queue.settle([(delivery, Cancel()), (other, Complete())]) == []
    assert [event.measurements for event in recorder.events] == [{"count": 1}]
    assert await waiting == CANCELLED
    assert time.monotonic() - began < 1.5
    await ended_cancelled(queue)
    assert await queue.settle([(delivery, Cancel())]) == [delivery]
    assert await queue.settle([(delivery, Complete(1))]) == [delivery], "a late settle is STALE"
    assert await queue.cancel("t", delivery.message_id) is Cancellation.ENDED
    await ended_cancelled(queue)


async def test_asking_twice_while_it_runs(queue):
    """H12: twice."""
    await send(queue, id="t")
    delivery = await read_one(queue)
    for _ in range(3):
        assert await queue.cancel("t", delivery.message_id) is Cancellation.REQUESTED
    await queue.maintain("a", 0)
    assert await queue.settle([(delivery, Cancel())]) == []
    await ended_cancelled(queue)


async def test_an_agent_that_was_faster_completes(queue):
    """H12: a mark ends nothing by itself; what completed before its holder knew has completed."""
    await send(queue, id="t")
    delivery = await read_one(queue)
    assert await queue.cancel("t") is Cancellation.REQUESTED
    assert await queue.settle([(delivery, Complete(7))]) == []
    assert await queue.cancel("t") is Cancellation.ENDED
    assert (await queue.wait_result("t", 5))["value"] == 7
    stats = await queue.stats()
    assert (stats.counters["completed"], stats.counters.get("cancelled", 0)) == (1, 0)


@pytest.mark.parametrize("counter", ["retried", "throttled", "released"])
@pytest.mark.parametrize("delay", [0.0, 30.0])
async def test_a_marked_task_is_not_run_again(queue, counter, delay):
    """H12: failed, throttled or released while marked: it ends cancelled and never reaches lane or delayed set."""
    await send(queue, id="t")
    delivery = await read_one(queue)
    await queue.cancel("t")
    with Recorder("queue.cancelled") as recorder:
        assert await queue.settle([(delivery, Again(delay, counter))]) == []
    assert [event.measurements for event in recorder.events] == [{"count": 1}]
    await ended_cancelled(queue)
    assert (await queue.stats()).counters.get(counter, 0) == 0
    assert await queue.settle([(delivery, Again(delay, counter))]) == [delivery]


async def test_only_the_marked_task_of_a_batch_ends(backend, queue):
    """H12: its neighbours go on."""
    await queue.produce_many([work(id=f"t{i}") for i in range(5)])
    deliveries = []
    while len(deliveries) < 5:
        deliveries += await queue.read("a", 5 - len(deliveries), 1000)
    await queue.cancel("t1")
    await queue.cancel("t3")
    verdicts = [Again(5.0) if delivery.header.id != "t3" else Again(0.0) for delivery in deliveries]
    assert await queue.settle(list(zip(deliveries, verdicts, strict=True))) == []
    assert await queue.settle(list(zip(deliveries, verdicts, strict=True))) == deliveries
    await backend.hasten(queue, 6)
    assert sorted(await consumed(queue)) == ["t0", "t2", "t4"]
    counters = (await queue.stats()).counters
    assert (counters["cancelled"], counters["retried"]) == (2, 3)


@pytest.mark.parametrize("verdict", [Complete(1), Bury("failed", 1, {"error": "x"})], ids=repr)
async def test_a_task_that_ended_by_itself_ended_so(queue, verdict):
    """H12: completed or dead before its holder acted on the mark: that is its one end."""
    await send(queue, id="t")
    delivery = await read_one(queue)
    await queue.cancel("t")
    await queue.maintain("a", 0)
    assert await queue.settle([(delivery, verdict)]) == []
    record = await queue.wait_result("t", 5)
    assert record["outcome"] == ("completed" if isinstance(verdict, Complete) else "dead")
    assert (await queue.stats()).counters.get("cancelled", 0) == 0


async def test_who_takes_a_marked_delivery_over_ends_it(backend, queue):
    """H12: the mark outlives the holder; the old holder's settle is STALE."""
    await send(queue, id="t")
    old = await read_one(queue, "a")
    await queue.cancel("t")
    await backend.age(queue, LEASE)
    other = backend.twin(queue)
    await backend.age(other, 0)
    (new,) = (await other.maintain("b", 5)).deliveries
    assert other.cancel_requested(new)
    assert await queue.settle([(old, Cancel())]) == [old]
    assert (await queue.stats()).counters.get("cancelled", 0) == 0
    assert await other.settle([(new, Cancel())]) == []
    await ended_cancelled(queue)


async def test_a_consumer_does_not_take_over_a_cancelled_task(backend, queue):
    """H12: consume() skips what it takes over, too."""
    await send(queue, id="t")
    await read_one(queue, "a")
    await queue.cancel("t")
    await backend.age(queue, LEASE)
    assert await consumed(queue, consumer="b") == []
    await ended_cancelled(queue)


# -- what is not touched


async def test_an_id_that_nobody_knows(queue):
    """H12: a request for nothing changes nothing, and a task sent afterwards runs."""
    for task_id in ("t", "u"):
        assert await queue.cancel(task_id) is Cancellation.REQUESTED
        await queue.produce(work(id=task_id))
        assert await consumed(queue) == [task_id]
    stats = await queue.stats()
    assert (stats.counters["completed"], stats.counters.get("cancelled", 0)) == (2, 0)


async def test_a_completed_task(queue):
    """H12: ENDED while its record is kept; the record stays as it is."""
    await send(queue, id="t")
    await queue.settle([(await read_one(queue), Complete("done"))])
    assert await queue.cancel("t") is Cancellation.ENDED
    assert (await queue.wait_result("t", 5))["value"] == "done"
    await queue.produce(work(id="u"))
    await consumed(queue)
    assert await queue.cancel("u") is Cancellation.REQUESTED, "without a record nobody knows that it has ended"
    assert (await queue.stats()).counters.get("cancelled", 0) == 0


async def test_a_cancelled_id_sent_again_within_the_window(queue):
    """H11, H12: it is known, so nothing is added and its end stays."""
    first = await send(queue, id="t")
    await queue.cancel("t")
    assert await send(queue, id="t") == first
    assert await consumed(queue) == []
    await ended_cancelled(queue)


async def test_a_later_task_of_the_same_id(backend, queue):
    """H11, H12: after the window it is another task: a mark covers the older one only."""
    await queue.produce(work(id="t", input="old"))
    old = await read_one(queue)
    assert await queue.cancel("t") is Cancellation.REQUESTED
    await backend.forget_ids(queue)
    await send(queue, id="t", input="new")
    new = await read_one(queue)
    await queue.maintain("a", 0)
    assert queue.cancel_requested(old)
    assert not queue.cancel_requested(new)
    assert await queue.settle([(new, Again(0.0)), (old, Again(0.0))]) == []
    assert (await queue.stats()).counters["cancelled"] == 1
    assert await consumed(queue) == ["t"]


async def test_the_record_of_an_earlier_life_does_not_hide_a_running_task(backend, queue):
    """H11, H12: an own id sent again after the window, while the first record is still kept."""
    await send(queue, id="t")
    await queue.settle([(await read_one(queue), Complete("first"))])
    await backend.forget_ids(queue)
    place = await send(queue, id="t")
    delivery = await read_one(queue)
    assert await queue.cancel("t") is Cancellation.REQUESTED
    assert await queue.cancel("t", place) is Cancellation.REQUESTED
    await queue.maintain("a", 0)
    assert await queue.settle([(delivery, Cancel())]) == []
    await ended_cancelled(queue)


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_dead_letter_stays_and_may_be_replayed(queue, wanted):
    """H4, H12: a dead task is terminal; its replay is a new life that an old request does not end."""
    await queue.submit([work(id="t")], want_results=wanted)
    await queue.settle([(await read_one(queue), Bury("failed", 1, {"error": "x"}))])
    assert await queue.cancel("t") is (Cancellation.ENDED if wanted else Cancellation.REQUESTED)
    (letter,) = await queue.read_dlq()
    assert await queue.replay_dlq([letter.message_id]) == 1
    again = await read_one(queue)
    await queue.maintain("a", 0)
    assert not queue.cancel_requested(again)
    assert await queue.cancel("t", again.message_id) is Cancellation.REQUESTED
    await queue.maintain("a", 0)
    assert queue.cancel_requested(again)
    assert await queue.settle([(again, Cancel())]) == []
    stats = await queue.stats()
    assert (stats.dead, stats.counters["dead"], stats.counters["cancelled"]) == (0, 1, 1)
    assert await queue.wait_result("t", 5) == CANCELLED


async def test_many_ends_at_once_are_one(backend, queue):
    """H12: cancelled from several places while it is delayed: one of them does it."""
    await send(queue, id="t", delay=9)
    others = [queue, backend.twin(queue), backend.twin(queue)]
    answers = await asyncio.gather(*(one.cancel("t") for one in others))
    assert sorted(answer.value for answer in answers) == ["cancelled", "ended", "ended"]
    await ended_cancelled(queue)


# -- entries that nobody can read


@pytest.mark.parametrize("verdict", [Again(0.0, "released"), Again(5.0), Complete(1), Cancel()], ids=repr)
async def test_an_unreadable_entry_is_buried_whatever_is_asked_for_it(backend, queue, verdict):
    """K10: released before anybody tried to read it, too; the others of its batch are settled as asked."""
    await queue.get_queue_depth()
    await queue.produce(work(id="good"))
    await backend.put_garbage(queue, b"garbage")
    batch = []
    while len(batch) < 2:
        batch += await queue.read("a", 2 - len(batch), 1000)
    verdicts = [verdict if delivery.frame == b"garbage" else Complete() for delivery in batch]
    assert await queue.settle(list(zip(batch, verdicts, strict=True))) == []
    (letter,) = await queue.read_dlq()
    assert (letter.reason, letter.raw) == ("corrupt", b"garbage")
    stats = await queue.stats()
    assert (stats.live, stats.counters["completed"], stats.counters["dead"]) == (0, 1, 1)
