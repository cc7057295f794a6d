"""Settling when replies are lost, when Redis refuses, when its memory is full, and what is not a task.

A lost reply is made at the boundary itself: the script runs on a real server, then its answer is thrown away.
"""

from __future__ import annotations

import asyncio

import pytest

from orchestra._delivery import Again, Bury, Cancel, Complete
from orchestra._scripts import script
from orchestra.connections import ConnectionManager
from orchestra.errors import StoreAuthError, StoreError, StoreFullError, StoreUnavailableError
from orchestra.serialization import encode_task
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Cancellation
from orchestra.testing import Recorder

DEAD = Bury("failed", 1, {"error": "x"})


def work(**keys):
    return {"type": "work", **keys}


def make(manager, lease_ms=60_000, **options):
    return RedisStreamTaskQueue("tasks", "workers", lease_ms, manager=manager, **options)


@pytest.fixture
async def queue(manager):
    made = make(manager)
    yield made
    await made.close()


class Losing:
    """Lets the next calls of the scripts ``names`` reach the server and loses their replies, ``times`` in all."""

    def __init__(self, queue, *names, times=1, before=False):
        self.queue, self.names, self.left, self.before = queue, names, times, before
        self.lost = []

    async def __aenter__(self):
        link = await self.queue._commands()
        real = self.real = link.run
        self.link = link

        async def run(calls):
            name = calls[0].script.name
            lose = self.left > 0 and name in self.names
            if lose:
                self.left -= 1
                self.lost.append(name)
            replies = None if lose and self.before else await real(calls)
            if lose:
                raise StoreUnavailableError("the reply was lost")
            return replies

        link.run = run
        return self

    async def __aexit__(self, *exc_info):
        self.link.run = self.real


async def read(queue, count, consumer="a"):
    found = []
    while len(found) < count:
        found += await queue.read(consumer, count - len(found), 1000)
    return found


async def age(queue, seconds=61):
    """Let every delivery look older, and the queue ready to take it over."""
    client = queue.manager.client
    for lane in queue.keys.streams:
        for row in await client.xpending_range(lane, queue.group, "-", "+", 100):
            who, entry = row["consumer"], row["message_id"]
            await client.xclaim(lane, queue.group, who, 0, [entry], idle=seconds * 1000, justid=True)


async def take_over(queue, consumer="b"):
    """What another worker has taken over, because its lease ran out."""
    await age(queue)
    other = make(queue.manager)
    taken = await other.reclaim(consumer, 100, 60_000)
    return other, taken


# -- C8, C9, H1, H2: lost replies

ENDS = {
    "complete": (Complete(), False, {"completed": 1}),
    "complete_result": (Complete("value"), True, {"completed": 1}),
    "retry": (Again(30.0), False, {"retried": 1}),
    "dead_letter": (DEAD, True, {"dead": 1}),
    "cancelled": (Cancel(), True, {"cancelled": 1}),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("times", [1, 3])
async def test_a_settle_whose_reply_was_lost_is_done_once(queue, name, times):
    """C8, C9, H1, H2: the script ran, its reply was lost: the repeat changes nothing, and is no false STALE."""
    verdict, wanted, counted = ENDS[name]
    await queue.submit([work(id="t")], want_results=wanted)
    (delivery,) = await read(queue, 1)
    async with Losing(queue, name, times=times) as losing:
        assert await queue.settle([(delivery, verdict)]) == []
    assert losing.lost == [name] * times
    stats = await queue.stats()
    assert stats.adds_up
    assert {key: stats.counters.get(key, 0) for key in counted} == counted
    assert (stats.live, stats.delayed) == ((1, 1) if name == "retry" else (0, 0))
    assert (await queue.get_dlq_depth()) == (1 if name == "dead_letter" else 0)
    assert not any(queue.held)
    assert await queue.settle([(delivery, verdict)]) == [delivery], "exact again"


async def test_a_release_whose_reply_was_lost_adds_one_entry(queue):
    """C9, H1: straight back to its lane, once."""
    await queue.produce(work(id="t"))
    (delivery,) = await read(queue, 1)
    async with Losing(queue, "retry"):
        assert await queue.settle([(delivery, Again(0.0, "released"))]) == []
    (again,) = await read(queue, 1)
    assert (again.retries, again.before) == (0, 1)
    assert again.fence > delivery.fence
    assert await queue.settle([(again, Complete())]) == []
    assert (await queue.stats()).counters["released"] == 1


@pytest.mark.parametrize("lost_in", ["retry", "cancelled"])
async def test_a_marked_retry_whose_reply_was_lost_ends_cancelled(queue, lost_in):
    """C9, H12: whichever of its two replies was lost."""
    await queue.submit([work(id="t")], want_results=True)
    (delivery,) = await read(queue, 1)
    assert await queue.cancel("t") is Cancellation.REQUESTED
    async with Losing(queue, lost_in) as losing:
        assert await queue.settle([(delivery, Again(5.0))]) == []
    assert losing.lost == [lost_in]
    stats = await queue.stats()
    assert (stats.live, stats.counters["cancelled"], stats.counters.get("retried", 0)) == (0, 1, 0)
    assert stats.adds_up


async def test_what_was_answered_is_exact_beside_a_lost_reply(queue):
    """C8: one call of the batch is answered and says STALE, the reply of another is lost: the first stands."""
    await queue.produce_many([work(id="old", priority=0), work(id="new", priority=1)])
    old, new = await read(queue, 2)
    other, taken = await take_over(queue)
    (mine,) = [d for d in taken if d.header.id == "new"]
    (theirs,) = [d for d in taken if d.header.id == "old"]
    async with Losing(other, "retry") as losing:  # `other` holds both: `old` completes, `new` goes again
        assert await other.settle([(theirs, Complete()), (mine, Again(5.0))]) == []
    assert losing.lost == ["retry"]
    async with Losing(queue, "retry"):
        stale = await queue.settle([(old, Complete()), (new, Again(9.0))])
    assert stale == [old], "the lost one is unknown, and counts as settled; the other is known"
    assert (await queue.stats()).delayed == 1
    await other.close()


async def test_nothing_is_in_doubt_when_nothing_was_sent(queue, redis_server, manager):
    """C8: while there is no connection nothing is sent, so the STALE of the attempt that gets through is exact."""
    await queue.produce(work(id="t"))
    (delivery,) = await read(queue, 1)
    other, (taken,) = await take_over(queue)
    link = await queue._commands()
    real, failures = link.wire, 2

    async def wire():
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreUnavailableError("cannot connect")
        return await real()

    link.wire = wire
    assert await queue.settle([(delivery, Complete())]) == [delivery]
    assert failures == 0
    assert await other.settle([(taken, Complete())]) == []
    await other.close()


async def test_a_settle_that_gave_up_may_be_repeated(manager):
    """C8: an outage longer than the patience: the whole batch is settled again, and nothing of it is a false STALE."""
    queue = make(manager, 500, patience=0.0)
    await queue.produce_many([work(id="a", priority=0), work(id="b", priority=1)])
    batch = [(delivery, Complete()) for delivery in await read(queue, 2)]
    async with Losing(queue, "complete", times=1000):
        with pytest.raises(StoreUnavailableError):
            await queue.settle(batch)
    assert [len(held) for held in queue.held] == [1, 1, *[0] * 6], "still held: they may not be settled"
    assert await queue.settle(batch) == []
    assert not any(queue.held)
    stats = await queue.stats()
    assert (stats.live, stats.counters["completed"]) == (0, 2)
    assert await queue.settle(batch) == [delivery for delivery, _ in batch]
    await queue.close()


async def test_a_cancelled_settle_may_be_repeated(queue):
    """C8, J1: the caller was cancelled while the reply was on its way."""
    await queue.produce_many([work(priority=i % 2) for i in range(4)])
    batch = [(delivery, Complete()) for delivery in await read(queue, 4)]
    settling = asyncio.create_task(queue.settle(batch))
    for _ in range(200):
        await asyncio.sleep(0)
        if (await queue._commands())._wire.in_flight:
            break
    settling.cancel()
    await asyncio.gather(settling, return_exceptions=True)
    assert await queue.settle(batch) == []
    stats = await queue.stats()
    assert (stats.live, stats.counters["completed"]) == (0, 4)


async def test_forgotten_scripts_are_no_fault(queue, manager):
    """C8: SCRIPT FLUSH between planning and settling."""
    await queue.submit([work(id="t")], want_results=True)
    await queue.produce_many([work(), work()])
    first, second, third = await read(queue, 3)
    await manager.client.script_flush()
    assert await queue.settle([(first, Complete(1)), (second, Again(1.0)), (third, DEAD)]) == []
    assert (await queue.stats()).adds_up


async def test_a_new_delivery_is_not_forgotten_with_the_old_one(queue):
    """C8: a process that took over from itself still holds, and renews, the newer delivery."""
    await queue.produce(work(id="t"))
    (old,) = await read(queue, 1)
    await age(queue)
    (new,) = await queue.reclaim("a", 1, 60_000)
    assert await queue.settle([(old, Complete())]) == [old]
    assert queue.held[2] == {new.entry: new}
    assert await queue.settle([(new, Complete())]) == []
    assert not any(queue.held)


# -- errors of one call


async def test_a_refused_call_does_not_keep_the_others_from_settling(queue, manager):
    """C8, C9: a typed error after the rest is done; what it concerns stays held; settling all again is right."""
    await queue.produce_many([work(id=f"t{i}", priority=i % 2) for i in range(6)])
    deliveries = await read(queue, 6)
    batch = [(d, DEAD if d.header.id in {"t1", "t2"} else Again(3.0) if d.lane else Complete()) for d in deliveries]
    await manager.client.set(queue.keys.dlq, "in the way")
    for _ in range(2):
        with pytest.raises(StoreError, match="WRONGTYPE") as caught:
            await queue.settle(batch)
        assert not isinstance(caught.value, StoreUnavailableError)
        assert sorted(d.header.id for held in queue.held for d in held.values()) == ["t1", "t2"]
        counters = (await queue.stats()).counters if await manager.client.delete(queue.keys.dlq) else {}
        assert (counters["completed"], counters["retried"], counters.get("dead", 0)) == (2, 2, 0)
        await manager.client.set(queue.keys.dlq, "in the way")
    await manager.client.delete(queue.keys.dlq)
    assert await queue.settle(batch) == [], "what was settled before is no STALE now"
    stats = await queue.stats()
    assert (stats.dead, stats.delayed, stats.counters["completed"], stats.live) == (2, 2, 2, 2)
    assert stats.adds_up
    assert not any(queue.held)
    assert len(await queue.settle(batch)) == 6, "and exact again"


async def test_a_stale_delivery_is_told_even_after_an_error(queue, manager):
    """C8: STALE found in a call that raised is STALE when the batch comes again."""
    await queue.produce_many([work(id="old"), work(id="new", priority=3)])
    old = (await read(queue, 1))[0]
    other, (taken,) = await take_over(queue)
    new = (await read(queue, 1))[0]
    await manager.client.set(queue.keys.dlq, "in the way")
    batch = [(old, Complete()), (new, DEAD)]
    with pytest.raises(StoreError):
        await queue.settle(batch)
    await manager.client.delete(queue.keys.dlq)
    assert await queue.settle(batch) == [old]
    assert await other.settle([(taken, Complete())]) == []
    await other.close()


async def test_a_missing_permission_is_named(redis_server, redis_url):
    """C8: NOPERM is typed, and what is permitted is settled."""
    redis_server.ask(b"ACL SETUSER half on >pw ~* &* +@all -zadd")
    async with ConnectionManager(redis_url.replace("unix://", "unix://half:pw@")) as manager:
        queue = make(manager)
        await queue.produce_many([work(id="a"), work(id="b", priority=1)])
        deliveries = {d.header.id: d for d in await read(queue, 2)}
        redis_server.ask(b"ACL SETUSER half on >pw ~* &* +@all -zadd -hexists")
        batch = [(deliveries["a"], Complete()), (deliveries["b"], Again(5.0))]
        with pytest.raises(StoreAuthError):
            await queue.settle(batch)
        assert (await queue.stats()).counters["completed"] == 1
        redis_server.ask(b"ACL SETUSER half +@all")
        assert await queue.settle(batch) == []
        stats = await queue.stats()
        assert (stats.delayed, stats.live, stats.adds_up) == (1, 1, True)
        await queue.close()
    redis_server.ask(b"ACL DELUSER half")


async def test_settling_works_when_the_memory_is_full(make_server):
    """B (maxmemory): produce refuses with a typed error; every verdict, and cancelling, still works."""
    server = make_server("--maxmemory-policy", "noeviction")
    async with ConnectionManager(server.url) as manager:
        queue = make(manager)
        await queue.submit([work(id=f"t{i}", priority=i % 4) for i in range(7)], want_results=True)
        await queue.produce_many([work(id="later", delay=60), work(id="waits", priority=3)])
        batch = await read(queue, 7)
        verdicts = [Complete(1), Again(5.0), DEAD, Cancel(), Again(0.0), Complete(2), Again(1.0)]
        await manager.client.config_set("maxmemory", 1)
        with pytest.raises(StoreFullError):
            await queue.produce(work())
        assert await queue.cancel("later") is Cancellation.CANCELLED
        assert await queue.cancel("waits") is Cancellation.CANCELLED
        assert await queue.cancel(batch[6].header.id) is Cancellation.REQUESTED
        assert await queue.settle(list(zip(batch, verdicts, strict=True))) == []
        stats = await queue.stats()
        assert (stats.counters["completed"], stats.counters["cancelled"], stats.dead) == (2, 4, 1)
        assert (stats.delayed, sum(stats.waiting), stats.adds_up) == (1, 1, True)
        (letter,) = await queue.read_dlq()
        assert await queue.replay_dlq([letter.message_id]) == 1
        await queue.close()


async def test_a_lost_group_makes_everything_stale(queue, manager):
    """E: what was in flight in a group that is gone is nobody's; the next read makes the group again."""
    await queue.produce(work(id="t"))
    (delivery,) = await read(queue, 1)
    await manager.client.xgroup_destroy(queue.keys.lanes[2], queue.group)
    assert await queue.settle([(delivery, Complete())]) == [delivery]
    (again,) = await read(queue, 1)
    assert again.header.id == "t"
    assert await queue.settle([(again, Complete())]) == []


# -- cancel and replay at their boundaries


@pytest.mark.parametrize("keys", [{}, {"delay": 9}], ids=["waiting", "delayed"])
async def test_a_cancel_whose_reply_was_lost_gives_the_same_answer(queue, keys):
    """H1, H12: the record tells the repeat what the first call did."""
    await queue.submit([work(id="t", **keys)], want_results=True)
    async with Losing(queue, "cancel", times=2):
        assert await queue.cancel("t") is Cancellation.CANCELLED
    assert await queue.cancel("t") is Cancellation.ENDED
    assert (await queue.wait_result("t", 5))["outcome"] == "cancelled"
    stats = await queue.stats()
    assert (stats.counters["cancelled"], stats.live, stats.adds_up) == (1, 0, True)


async def test_a_request_whose_reply_was_lost_is_one_mark(queue, manager):
    """H1, H12: for a task in flight."""
    await queue.produce(work(id="t"))
    (delivery,) = await read(queue, 1)
    async with Losing(queue, "cancel"):
        assert await queue.cancel("t") is Cancellation.REQUESTED
    assert await manager.client.zcard(queue.keys.cancels) == 1
    assert 0 < await manager.client.pttl(queue.keys.cancels) <= 86_400_000
    assert await queue.settle([(delivery, Cancel())]) == []
    assert await manager.client.exists(queue.keys.cancels) == 0, "its mark goes with the task"


async def test_every_key_that_cancelling_leaves_expires(manager):
    """H12: records after result_ttl, marks after a day; old and surplus marks go when a new one is made."""
    queue = make(manager, result_ttl=5.0)
    await queue.produce(work(id="t"))
    await queue.cancel("t")
    assert 0 < await manager.client.pttl(queue.keys.result("t")) <= 5000
    now = int((await manager.client.time())[0]) * 1000
    await manager.client.zadd(queue.keys.cancels, {"ancient": now - 86_500_000, "recent": now - 1000})
    await queue.cancel("nobody")
    assert await manager.client.zrange(queue.keys.cancels, 0, -1) == [b"recent", b"nobody"]
    await queue.close()


async def test_a_mark_covers_what_a_clock_that_was_set_back_left_ahead(queue, manager):
    """F, H12: entries and marks that are ahead of the clock are covered too, and reach every worker."""
    ahead = (int((await manager.client.time())[0]) + 3600) * 1000
    frame = encode_task(work(id="t")).frame
    await manager.client.xadd(queue.keys.lanes[2], {"t": frame}, id=f"{ahead}-7")
    await manager.client.hincrby(queue.keys.counters, "produced", 1)
    (delivery,) = await read(queue, 1)
    await manager.client.zadd(queue.keys.cancels, {"other": ahead + 5000})
    await queue.maintain("a", 0)
    assert await queue.cancel("t") is Cancellation.REQUESTED
    assert (await queue.maintain("a", 0)).cancels
    assert queue.cancel_requested(delivery)
    assert await queue.settle([(delivery, Again(9.0))]) == []
    assert (await queue.stats()).counters["cancelled"] == 1


async def test_a_queue_that_nobody_has_read_yet(queue):
    """H12: there is no group, so nothing can be in flight."""
    place = await queue.produce(work(id="t"))
    assert await queue.cancel("t", place) is Cancellation.CANCELLED
    assert (await queue.stats()).adds_up


async def test_two_replays_at_once(queue, manager):
    """H4: of the same dead letters, by two operators, one of whom loses a reply: each is replayed once, fences grow."""
    await queue.produce_many([work(id=f"t{i}") for i in range(30)])
    old = {d.header.id: d.fence for d in await read(queue, 30)}
    held = [d for lane in queue.held for d in lane.values()]
    assert await queue.settle([(d, DEAD) for d in held]) == []
    ids = [letter.message_id for letter in await queue.read_dlq()]
    other = make(manager)
    async with Losing(other, "replay"):
        await asyncio.gather(queue.replay_dlq(ids), other.replay_dlq(ids[::-1]))
    stats = await queue.stats()
    assert (stats.dead, stats.counters["replayed"], stats.live) == (0, 30, 30)
    again = await read(queue, 30)
    assert {d.header.id for d in again} == set(old)
    assert all(d.generation == 1 and d.attempt == 1 and d.fence > old[d.header.id] for d in again)
    assert await queue.settle([(d, Complete()) for d in again]) == []
    assert await queue.replay_dlq(ids) == 0
    await other.close()


async def test_an_interrupted_replay_goes_on(queue):
    """H4: half of the letters, then the operator dies; the other operator gives all ids and replays the rest."""
    await queue.produce_many([work(id=f"t{i}") for i in range(6)])
    assert await queue.settle([(d, DEAD) for d in await read(queue, 6)]) == []
    ids = [letter.message_id for letter in await queue.read_dlq()]
    assert await queue.replay_dlq(ids[:3]) == 3
    assert await queue.replay_dlq(ids) == 3
    stats = await queue.stats()
    assert (stats.dead, stats.live, stats.adds_up) == (0, 6, True)


# -- H11: the same id again

STATES = ("waiting", "delayed", "in flight", "completed", "dead", "cancelled", "replayed")


async def bring(queue, state):
    """A task ``t`` in the state; its first message id."""
    ((_, place),) = await queue.submit([work(id="t", **({"delay": 60} if state == "delayed" else {}))])
    if state == "cancelled":
        await queue.cancel("t")
    elif state not in {"waiting", "delayed"}:
        (delivery,) = await read(queue, 1)
        if state != "in flight":
            await queue.settle([(delivery, Complete() if state == "completed" else DEAD)])
    if state == "replayed":
        assert await queue.replay_dlq([letter.message_id for letter in await queue.read_dlq()]) == 1
    return place


@pytest.mark.parametrize("state", STATES)
async def test_the_same_id_again_within_the_window(queue, state):
    """H11: whatever became of the first task, a repeat adds nothing and answers its message id."""
    place = await bring(queue, state)
    before = await queue.stats()
    assert await queue.produce(work(id="t", delay=5)) == place
    assert await queue.produce_many([work(id="t"), work(id="t")]) == [place] * 2
    after = await queue.stats()
    assert after.counters.pop("duplicates") == 3
    assert (after.live, after.dead, after.counters) == (before.live, before.dead, before.counters)


@pytest.mark.parametrize("state", STATES)
async def test_the_same_id_again_after_the_window(queue, manager, state):
    """H11: a task of its own, whose life does not touch what is left of the first."""
    await bring(queue, state)
    before = await queue.stats()
    await manager.client.delete(*queue.keys.dedup)
    await queue.produce(work(id="t", delay=5 if state == "delayed" else 0.0))
    after = await queue.stats()
    assert (after.live, after.dead, after.counters["produced"]) == (before.live + 1, before.dead, 2)
    assert after.adds_up


# -- A19, K10: entries that are no tasks of this release

FRAME = encode_task(work(id="t", input={"x": 1})).frame
ENTRIES = {
    "no frame": ({"foreign": "entry", "more": "fields"}, "foreign", "ForeignEntry"),
    "an empty frame": ({"t": b""}, "corrupt", "CorruptEntryError"),
    "garbage": ({"t": b"\xc1garbage"}, "corrupt", "CorruptEntryError"),
    "cut short": ({"t": FRAME[:-3]}, "corrupt", "CorruptEntryError"),
    "a counter that is none": ({"t": FRAME, "n": "many"}, "corrupt", "CorruptEntryError"),
    "the next version": ({"t": FRAME[:1] + b"\x02" + FRAME[2:]}, "unknown_version", "UnknownVersion"),
    "a far version": ({"t": b"\x9c\x7f" + FRAME[2:]}, "unknown_version", "UnknownVersion"),
    "more header fields": ({"t": b"\x9b" + FRAME[1:]}, "unknown_version", "UnknownVersion"),
}


@pytest.mark.parametrize("name", ENTRIES)
async def test_what_is_no_task_is_parked_with_its_bytes_and_its_reason(queue, manager, name):
    """A19, K10: corrupt, foreign and from a newer release are told apart; the lane goes on; the bytes are all kept."""
    fields, reason, kind = ENTRIES[name]
    await manager.client.xadd(queue.keys.lanes[2], fields)
    await manager.client.hincrby(queue.keys.counters, "produced", 1)
    await queue.produce(work(id="good"))
    with Recorder("queue.corrupt") as recorder:
        assert [task["id"] for _, task in await queue.consume("a", 5, 2000)] == ["good"]
    assert [event.metadata["reason"] for event in recorder.events] == [reason]
    (letter,) = await queue.read_dlq()
    assert (letter.reason, letter.error_info["error_type"]) == (reason, kind)
    kept = letter.raw if letter.task_data is None else FRAME
    for value in fields.values() if "t" not in fields else [fields["t"]]:
        assert (value if isinstance(value, bytes) else value.encode()) in kept
    stats = await queue.stats()
    assert (stats.dead, stats.adds_up) == (1, True)


async def test_a_newer_release_can_replay_what_this_one_parked(queue, manager):
    """A19: this release refuses to; one that understands it gets the very bytes, as the next generation."""
    newer = b"\x9b\x02" + FRAME[2:]
    await manager.client.xadd(queue.keys.lanes[1], {"t": newer, "n": "3", "d": "4", "g": "2"})
    await manager.client.hincrby(queue.keys.counters, "produced", 1)
    assert await queue.consume("a", 1, 200) == []
    (letter,) = await queue.read_dlq()
    assert letter.raw == newer
    assert await queue.replay_dlq([letter.message_id]) == 0
    keys = [queue.keys.dlq, queue.keys.counters, *queue.keys.lanes, queue.keys.result("t")]
    replay = script("replay")
    assert await manager.client.eval(replay.text, len(keys), *keys, letter.message_id) == 1
    ((_, fields),) = await manager.client.xrange(queue.keys.lanes[1])
    assert fields == {b"t": newer, b"n": b"0", b"d": b"0", b"g": b"3"}
    assert (await queue.stats()).adds_up


async def test_a_dead_letter_with_damaged_counters_does_not_stop_a_replay(queue, manager):
    """H4, K10: the others go on, and it is generation 1."""
    await queue.produce(work(id="u"))
    await manager.client.xadd(queue.keys.lanes[2], {"t": FRAME, "g": "x"})
    await manager.client.hincrby(queue.keys.counters, "produced", 1)
    ((message_id, task),) = await queue.consume("a", 5, 1000)
    assert await queue.add_to_dlq(message_id, task, {"error": "x"})
    ids = [letter.message_id for letter in await queue.read_dlq()]
    assert await queue.replay_dlq(ids) == 2
    assert {d.header.id: d.generation for d in await read(queue, 2)} == {"t": 1, "u": 1}
