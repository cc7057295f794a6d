"""Taking over, and not taking over: outages, lost replies, trimmed entries, names left behind (rows B4, B5, B19, C7, E*)."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import pytest
import redis

import orchestra
from orchestra._delivery import DONE
from orchestra._queue import read as stream_read
from orchestra._scripts import call
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._checks import until
from tests.faults._lease_tools import age, events, pending, queue_for, turns
from tests.faults.proxy import Proxy
from tests.waiting import settled

AOF = ("--appendonly", "yes", "--appendfsync", "always")


def trusting(queue):
    """Let the queue reclaim at its next tick, as if its quiet period were over."""
    queue._upkeep._quiet_until = queue._upkeep._reclaim_at = 0.0
    return queue


class Gate:
    """An agent that says when it runs, and ends when it may."""

    def __init__(self):
        self.open = asyncio.Event()
        self.started = []
        self.cancelled = []

    async def __call__(self, task):
        self.started.append(task.id)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.append(task.id)
            raise

    def registry(self):
        agents = AgentRegistry()
        agents.register("gate", self)
        return agents


# -- outages


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_b5_after_an_outage_nothing_of_a_live_owner_is_taken(make_server, how):
    """B5: Redis is away for three leases; idle times include it, and still no duplicate, for both owners are alive."""
    lease_ms = 700
    server = make_server(*AOF)
    gate = Gate()
    async with ConnectionManager(server.url) as one, ConnectionManager(server.url) as two:
        busy, idle = queue_for(one, lease_ms, patience=30.0), queue_for(two, lease_ms, patience=30.0)
        await busy.produce_many([{"id": f"t{n}", "type": "gate"} for n in range(20)])
        with events("queue.quiet", "queue.reclaimed") as seen:
            async with Dispatcher(busy, agents=gate.registry()):
                await until(lambda: len(gate.started) == 20)
                async with Dispatcher(idle, agents=gate.registry()):
                    await until(lambda: idle._upkeep._ticked_at)
                    seen.clear()
                    server.process.send_signal(signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
                    gate.open.set()
                    await asyncio.sleep(3 * lease_ms / 1000)
                    if how == "stopped":
                        server.process.send_signal(signal.SIGCONT)
                    else:
                        server.process.wait(10)
                        server.start()
                    stats = await settled(busy)
                    reasons = {"late"} if how == "stopped" else {"reconnect", "server_changed"}
                    await until(lambda: reasons & {facts.get("reason") for _, facts in seen})
        assert sorted(gate.started) == sorted({f"t{n}" for n in range(20)}), "each ran once"
        assert gate.cancelled == []
        assert "queue.reclaimed" not in {name for name, _ in seen}
        assert stats.counters == {"produced": 20, "completed": 20}
        await busy.close()
        await idle.close()


async def test_b5_a_reclaim_that_redis_ran_late_takes_nothing(manager):
    """B5: a reclaim that was on its way when Redis stood still is refused by the script itself, and begins a quiet lease."""
    owner, thief = queue_for(manager, 60_000), queue_for(manager, 60_000)
    await owner.produce({"id": "t", "type": "x"})
    (delivery,) = await owner.read("owner", 1, 100)
    await age(manager.client, owner, 61)
    trusting(thief)
    await thief.maintain("thief", 0)
    thief._upkeep.clock_offset -= 20.0  # as if Redis had stood still for 20 s since the last tick
    with events("queue.quiet") as seen:
        assert await thief.reclaim("thief", 10, 60_000) == []
    assert [facts["reason"] for _, facts in seen] == ["late"]
    await age(manager.client, owner, 61)
    assert (await thief.maintain("thief", 10)).deliveries == [], "quiet"
    assert len((await trusting(thief).maintain("thief", 10)).deliveries) == 1
    assert await owner.settle([(delivery, DONE)]) == [delivery]
    await owner.close()
    await thief.close()


async def test_b5_only_a_regular_caller_is_late(manager):
    """B5: who calls consume now and then is not stalled, and reclaims; a worker whose ticks stop is."""
    owner, lazy = queue_for(manager, 60_000), queue_for(manager, 1000)
    await owner.produce_many([{"id": f"t{n}", "type": "x"} for n in range(2)])
    await owner.read("owner", 1, 100)
    with events("queue.quiet") as seen:
        trusting(lazy)
        await lazy.maintain("lazy", 0)
        lazy._upkeep._ticked_at -= 30.0
        await age(manager.client, owner, 2)
        assert len((await lazy.maintain("lazy", 10)).deliveries) == 1
        await owner.read("owner", 1, 100)
        async with lazy.keep_leases("lazy", lambda _: None):
            trusting(lazy)._upkeep._ticked_at -= 30.0
            await age(manager.client, owner, 2)
            assert (await lazy.maintain("lazy", 10)).deliveries == []
    assert [facts["reason"] for _, facts in seen] == ["late"]
    await lazy.close()
    await owner.close()


async def test_b4_a_restart_without_persistence_is_told_and_work_goes_on(make_server):
    """B4: the group is made again at 0, the suspected loss is told once, what was held is given up, new tasks run."""
    server = make_server()
    gate = Gate()
    async with ConnectionManager(server.url) as manager:
        queue = queue_for(manager, 60_000, patience=30.0)
        await queue.produce_many([{"id": f"t{n}", "type": "gate"} for n in range(3)])
        with events("queue.data_loss_suspected", "queue.group_recreated", "queue.quiet") as seen:
            async with Dispatcher(queue, agents=gate.registry(), max_concurrent_dispatch=2, drain_timeout=0.1):
                await until(lambda: len(gate.started) == 2)
                server.kill()
                server.start()
                await until(lambda: len(gate.cancelled) == 2)
                gate.open.set()
                await queue.produce({"id": "after", "type": "gate"})
                await until(lambda: "after" in gate.started)
                await settled(queue)
        told = [facts for name, facts in seen if name == "queue.data_loss_suspected"]
        assert told == [{"held": 3, "queue": "tasks", "lanes": [0, 1, 2, 3], "restarted": True}]
        assert "server_changed" in {facts.get("reason") for _, facts in seen}
        groups = await manager.client.xinfo_groups(queue.keys.lanes[2])
        assert [group["name"] for group in groups] == [b"workers"]
        await queue.close()


async def test_b4_a_destroyed_group_is_no_loss(manager):
    """B4, B14: with the streams still there, only the pending lists are lost: everything is handed out again, once."""
    queue = queue_for(manager)
    await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(4)])
    old = await queue.read("c", 2, 100)
    lost = []
    async with queue.keep_leases("c", lost.append):
        with events("queue.data_loss_suspected", "queue.group_recreated") as seen:
            await manager.client.xgroup_destroy(queue.keys.lanes[2], queue.group)
            assert await queue.read("c", 10, 100) == []
        assert seen == [("queue.group_recreated", {"queue": "tasks", "lane": 2})]
        assert lost == old, "at once, not at the next renewal"
    new = await queue.read("c", 10, 100)
    assert {d.entry for d in new} == {d.entry for d in old} | {d.entry for d in new[2:]}
    assert len(new) == 4
    assert await queue.settle([(d, DONE) for d in new]) == []
    assert (await settled(queue)).counters == {"produced": 4, "completed": 4}
    await queue.close()


async def test_b8_a_reconnect_under_full_memory_finds_its_group(make_server):
    """B8: Redis refuses XGROUP CREATE for lack of memory even where the group exists: reading and taking over go on."""
    server = make_server()
    async with ConnectionManager(server.url) as manager:
        queue = queue_for(manager)
        await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(4)])
        (held,) = await queue.read("c", 1, 100)
        await manager.client.config_set("maxmemory", 1)
        await manager.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        async def goes_on():
            await trusting(queue).maintain("c", 10)
            return True

        await until(goes_on)
        queue._intake.group.doubt()
        rest = await queue.read("c", 10, 100)
        assert len(rest) == 3
        assert await queue.settle([(d, DONE) for d in (held, *rest)]) == []
        other = RedisStreamTaskQueue("new", "workers", manager=manager)
        with pytest.raises(orchestra.StoreFullError):
            await other.read("c", 1, 10)
        await other.close()
        await manager.client.config_set("maxmemory", 0)
        await settled(queue)
        await queue.close()


# -- entries deleted by others


async def test_b19_what_others_trim_is_counted_and_told(manager):
    """B19: trimmed while pending: by a reclaim, by a renewal, by a look for ghosts, it is lost aloud; the sums hold."""
    queue, thief = queue_for(manager, 2000), trusting(queue_for(manager, 2000))
    client, lane = manager.client, queue.keys.lanes[2]
    await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(6)])
    first = await queue.read("c", 2, 100)
    ghosts = await call(client, "take", queue.keys.streams, (queue.group, "c", 2))
    rest = await queue.read("d", 2, 100)
    for delivery in rest:
        await client.xclaim(lane, queue.group, "d", 0, [delivery.entry], idle=60_000, justid=True)
    await client.xtrim(lane, maxlen=0, approximate=False)
    with events("queue.lost") as seen:
        lost = []
        async with queue.keep_leases("c", lost.append):
            await until(lambda: len(lost) == 2)
        assert set(lost) == set(first)
        assert (await queue.stats()).counters["lost"] == 2
        queue._intake._consumers["c"].ghosts.suspect()
        assert await queue.read("c", 10, 1) == []
        assert (await thief.maintain("thief", 10)).deliveries == []
    told = [sorted(facts["message_ids"]) for _, facts in seen]
    unseen = [f"2:{entry.decode()}" for entry, _ in ghosts[0][1]]
    assert told == [sorted(d.message_id for d in first), unseen, sorted(d.message_id for d in rest)]
    stats = await settled(queue)
    assert stats.counters == {"produced": 6, "lost": 6}
    assert await pending(client, queue) == []
    assert set(await queue.settle([(d, DONE) for d in first + rest])) == {*first, *rest}
    await thief.close()
    await queue.close()


async def test_b19_a_delayed_task_whose_body_is_gone_is_told(manager):
    """B19: the same for the delayed set."""
    queue = queue_for(manager)
    await queue.produce({"id": "t", "type": "x", "delay": 3600})
    await manager.client.delete(queue.keys.bodies)
    await manager.client.zadd(queue.keys.delayed, {"t": 1})
    with events("queue.lost") as seen:
        await queue.maintain("c", 0)
    assert [(facts["count"], facts["lane"]) for _, facts in seen] == [(1, -1)]
    assert (await settled(queue)).counters == {"produced": 1, "lost": 1}
    await queue.close()


# -- replies that were lost


@pytest.mark.parametrize("name", ["take", "XREADGROUP"])
@pytest.mark.parametrize("how", ["rst", "stay"])
async def test_c7_a_delivery_whose_reply_was_lost_runs_at_once(redis_url, manager, monkeypatch, name, how):
    """C7: executed by Redis, never received: the next read takes it, long before its lease ends, with a new fence."""
    monkeypatch.setattr(stream_read, "BLOCK_MARGIN", 0.3)
    producer = queue_for(manager)
    runs = []
    agents = AgentRegistry()

    async def work(task):
        runs.append((task.id, task.attempt, task.fence))

    agents.register("work", work)
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url, timeout=2.0) as manager_behind:
        queue = queue_for(manager_behind, 3_600_000)
        concurrency = 4 if name == "take" else 100  # small counts go through the script
        blocked = asyncio.Event()
        proxy.observers.append(lambda way, command: "XREADGROUP" in command.names and way == "up" and blocked.set())
        lost = proxy.drop_reply("XREADGROUP", how=how) if name == "XREADGROUP" else None
        async with Dispatcher(queue, agents=agents, block_timeout_ms=3000, max_concurrent_dispatch=concurrency):
            await until(blocked.is_set)
            with events("queue.ghosts") as seen:
                lost = lost or proxy.drop_reply(name, how=how)  # the blocked read brings one, the script what is left
                await producer.produce_many([{"id": f"t{n}", "type": "work"} for n in range(6)])
                await lost.wait(60)
                stats = await settled(producer)
        await queue.close()
    ids = [task_id for task_id, _, _ in runs]
    assert sorted(ids) == sorted(set(ids)), "nobody had seen them before"
    assert len(ids) == stats.counters["completed"]
    assert {attempt for _, attempt, _ in runs} == {1}
    again = [fence for _, _, fence in runs if fence > 1]
    assert len(again) == sum(facts["count"] for _, facts in seen)
    assert "reclaimed" not in stats.counters
    assert again
    await producer.close()


async def test_c7_a_take_over_whose_reply_was_lost_is_repeated(redis_url, manager):
    """C7: the reply of a reclaim is lost: what it took is pending for us, and the next read brings it."""
    owner = queue_for(manager, 60_000)
    await owner.produce_many([{"id": f"t{n}", "type": "x"} for n in range(3)])
    old = await owner.read("owner", 10, 100)
    await age(manager.client, owner, 61)
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url) as manager_behind:
        queue = trusting(queue_for(manager_behind, 60_000))
        assert await queue.read("thief", 10, 1) == []
        assert await queue.reclaim("thief", 1, 3_600_000) == [], "the script is known now"
        proxy.drop_reply("reclaim", nth=3)
        with pytest.raises(orchestra.StoreUnavailableError):
            await queue.maintain("thief", 10)
        assert [who for _, who, _, _ in await pending(manager.client, owner)] == [b"thief"] * 3
        found = await queue.read("thief", 2, 1)
        found += await queue.read("thief", 2, 1)
        assert [d.deliveries for d in found] == [3, 3, 3]
        assert set(await owner.settle([(d, DONE) for d in old])) == set(old)
        assert await queue.settle([(d, DONE) for d in found]) == []
        await settled(owner)
        await queue.close()
    await owner.close()


async def test_c7_a_cancelled_read_costs_no_lease(manager):
    """C7: a read cancelled at the moment of delivery throws its connection away; the next read finds what it missed."""
    queue, producer = queue_for(manager, 3_600_000), queue_for(manager)
    sent = [f"t{n}" for n in range(40)]
    got = []
    for n, name in enumerate(sent):
        reading = asyncio.create_task(queue.read("c", 10, 5000))
        while not reading.done() and not queue._intake.asked() < float("inf"):
            await asyncio.sleep(0)
        await turns(20)
        await producer.produce({"id": name, "type": "x"})
        await turns(n % 8)
        reading.cancel()
        done = await asyncio.gather(reading, return_exceptions=True)
        got += done[0] if isinstance(done[0], list) else []

    async def all_found():
        got.extend(await queue.read("c", 100, 50))
        return len(got) >= len(sent)

    await until(all_found)
    assert sorted(d.header.id for d in got) == sorted(sent), "none lost, none twice"
    assert await queue.settle([(d, DONE) for d in got]) == []
    await settled(queue)
    await queue.close()
    await producer.close()


async def test_c7_only_what_this_object_missed_is_a_ghost(manager):
    """C7: what is held is not touched; what was pending for the name before waits for its lease; the work is bounded."""
    before = queue_for(manager)
    await before.produce_many([{"type": "x"} for _ in range(1400)])
    await before.read("c", 5, 100)
    await age(manager.client, before, 1000)
    queue = queue_for(manager)
    held = await queue.read("c", 50, 100)
    for _ in range(3):
        await call(manager.client, "take", queue.keys.streams, (queue.group, "c", 400))
    queue._intake._consumers["c"].ghosts.suspect()
    found, sizes = [], []
    while len(found) < 1200:
        some = await queue.read("c", 333, 1)
        sizes.append(len(some))
        found += some
    assert max(sizes) == 333
    assert len({d.entry for d in found}) == 1200
    assert {d.deliveries for d in found} == {2}
    rows = {entry: count for entry, _, _, count in await pending(manager.client, queue)}
    assert sorted(rows.values()) == [1] * (5 + len(held)) + [2] * 1200
    assert await queue.settle([(d, DONE) for d in held + found]) == []
    assert sum((await queue.stats()).in_flight) == 5
    await before.close()
    await queue.close()


# -- poison pills


async def test_a8_the_dead_letter_of_a_poison_pill_carries_the_evidence(manager):
    """A8: how often it was handed out, to whom last, when, and for how long nothing was heard."""
    queue, thief = queue_for(manager, max_deliveries=2), trusting(queue_for(manager, max_deliveries=2))
    await queue.produce({"id": "pill", "type": "x"})
    await queue.read("first", 1, 100)
    await age(manager.client, queue, 100)
    assert len((await thief.maintain("second", 10)).deliveries) == 1
    await age(manager.client, queue, 120)
    assert (await trusting(thief).maintain("third", 10)).deliveries == []
    (letter,) = await queue.read_dlq()
    facts = letter.error_info
    assert (letter.reason, letter.attempts, facts["deliveries"], facts["consumer"]) == ("crashed", 2, 2, "second")
    assert 120 <= facts["idle_s"] <= 180
    assert facts["delivered_at"] == pytest.approx(letter.died_at - facts["idle_s"], abs=1.0)
    assert "second" in facts["error"]
    assert thief.held[2] == {}
    await queue.close()
    await thief.close()


async def test_a8_a_pill_that_cannot_be_buried_is_not_kept_for_ever(manager):
    """A8: when the dead letter fails, the reclaimer does not hold on to the pill; the next one buries it."""
    queue, thief = queue_for(manager, max_deliveries=1), trusting(queue_for(manager, max_deliveries=1))
    await queue.produce({"id": "pill", "type": "x"})
    await queue.read("first", 1, 100)
    await age(manager.client, queue, 100)
    await manager.client.set(queue.keys.dlq, "in the way")
    assert (await thief.maintain("second", 10)).deliveries == []
    assert thief.held[2] == {}
    await manager.client.delete(queue.keys.dlq)
    await age(manager.client, queue, 100)
    assert (await trusting(thief).maintain("second", 10)).deliveries == []
    assert await queue.get_dlq_depth() == 1
    await queue.close()
    await thief.close()


@pytest.mark.parametrize("count", [2**31 - 1, 2**40])
async def test_a8_an_absurd_delivery_count_harms_no_neighbour(manager, count):
    """A8: somebody's ``XCLAIM … RETRYCOUNT`` makes a pill of one entry; the one taken over with it is handed out."""
    queue, thief = queue_for(manager), trusting(queue_for(manager))
    await queue.produce_many([{"id": "pill", "type": "x"}, {"id": "sound", "type": "x"}])
    pill, _ = await queue.read("first", 2, 100)
    key = queue.keys.streams[pill.stream]
    await manager.client.xclaim(key, queue.group, "first", 0, [pill.entry], retrycount=count)
    await age(manager.client, queue, 100)
    assert [found.header.id for found in (await thief.maintain("second", 10)).deliveries] == ["sound"]
    (letter,) = await queue.read_dlq()
    assert (letter.reason, letter.error_info["deliveries"]) == ("crashed", count)
    await queue.close()
    await thief.close()


# -- names


async def test_e1_a_consumer_with_pending_entries_is_never_deleted(manager):
    """E1: retiring races reads of the same consumer: not one entry is orphaned."""
    queue, client = queue_for(manager), manager.client
    await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(400)])
    done = []

    async def read():
        while len(done) < 400:
            found = await queue.read("c", 7, 1)
            await asyncio.sleep(0)
            assert await queue.settle([(d, DONE) for d in found]) == [], "its pending entry was dropped"
            done.extend(found)

    refused = 0
    reading = asyncio.create_task(read())
    while not reading.done():
        held = await call(client, "retire", (*queue.keys.streams, queue.keys.consumers), (queue.group, "c"))
        refused += held > 0
    await reading
    assert refused, "the race did happen"
    assert (await settled(queue)).counters == {"produced": 400, "completed": 400}
    assert await call(client, "retire", (*queue.keys.streams, queue.keys.consumers), (queue.group, "c")) == 0
    assert await client.xinfo_consumers(queue.keys.lanes[2], queue.group) == []
    await queue.close()


async def test_e1_a_retired_consumer_that_blocks_still_gets_its_task(manager):
    """E1: forgetting a consumer while its read blocks loses nothing: it is made again with its first entry."""
    queue, other = queue_for(manager), queue_for(manager)
    await other.produce({"type": "x"})
    (first,) = await queue.read("c", 1, 100)
    await queue.settle([(first, DONE)])
    reading = asyncio.create_task(queue.read("c", 1, 30_000))
    client = manager.client

    async def blocked():
        return (await client.info("clients"))["blocked_clients"] >= 1

    await until(blocked)
    await other.retire("c")
    await other.produce({"id": "late", "type": "x"})
    (delivery,) = await reading
    assert [who for _, who, _, _ in await pending(client, queue)] == [b"c"]
    assert await queue.settle([(delivery, DONE)]) == []
    await settled(queue)
    await queue.close()
    await other.close()


async def test_e2_names_of_long_dead_consumers_are_forgotten(manager):
    """E2: 500 workers came and crashed elsewhere: few names are left, and none that still holds something."""
    queue, client = queue_for(manager), manager.client
    await queue._intake.group.ensure()
    await queue.produce_many([{"type": "x"} for _ in range(5)])
    names = [f"other-host.{n}" for n in range(500)]
    for n, name in enumerate(names):
        await call(client, "take", queue.keys.streams, (queue.group, name, 1 if n < 5 else 0))
        await client.xreadgroup(queue.group, name, {queue.keys.lanes[3]: ">"}, count=1)
        await call(client, "promote", _promote_keys(queue), (0, name, "inf"))
    now_ms = round(queue.now() * 1000)
    await client.zadd(queue.keys.consumers, dict.fromkeys(names, now_ms - 601_000))
    await client.zadd(queue.keys.consumers, {"alive": now_ms - 599_000})
    with events("queue.reaped") as seen:
        for _ in range(8):
            queue._upkeep._reap_at = 0.0
            await queue.maintain("alive", 0)
    assert sum(facts["count"] for _, facts in seen) == 495
    left = {row["name"] for lane in queue.keys.streams for row in await client.xinfo_consumers(lane, queue.group)}
    assert left == {name.encode() for name in names[:5]}
    assert (await queue.stats()).consumers == 6
    assert sum((await queue.stats()).in_flight) == 5
    await queue.close()


def _promote_keys(queue):
    keys = queue.keys
    return (*keys.streams, keys.delayed, keys.bodies, keys.counters, keys.consumers, keys.cancels)


async def test_e2_names_that_no_tick_has_told_of_are_forgotten_too(manager, monkeypatch):
    """E2: consumers that only ever read are found in the group itself; those that are young or busy stay."""
    queue, client = queue_for(manager), manager.client
    await queue._intake.group.ensure()
    await queue.produce_many([{"type": "x"} for _ in range(1)])
    await call(client, "take", queue.keys.streams, (queue.group, "busy", 1))
    for n in range(20):
        await client.xgroup_createconsumer(queue.keys.lanes[n % 4], queue.group, f"stray{n}")
    await until(lambda: _all_idle(client, queue, 20))
    reaper = queue._upkeep._reaper
    await reaper.run(round(queue.now() * 1000))
    assert len(await _consumers(client, queue)) == 21, "younger than ten minutes"
    monkeypatch.setattr(reaper, "_old_ms", 1)
    await reaper.run(0)
    assert await _consumers(client, queue) == {b"busy"}
    await queue.close()


async def _consumers(client, queue):
    return {row["name"] for lane in queue.keys.streams for row in await client.xinfo_consumers(lane, queue.group)}


async def _all_idle(client, queue, ms):
    rows = [row for lane in queue.keys.streams for row in await client.xinfo_consumers(lane, queue.group)]
    return all(row["idle"] > ms for row in rows if row["name"] != b"busy")


# -- bookkeeping


async def test_e6_a_stale_tail_is_found_behind_any_fresh_head(manager):
    """E6: 20,000 renewed deliveries before one abandoned: the kept cursor reaches it within the ticks that it takes."""
    queue, thief = queue_for(manager), queue_for(manager)
    count = 20_000
    await queue.produce_many([{"type": "x"} for _ in range(count)])
    held = []
    while len(held) < count:
        held += await queue.read("owner", 1000, 100)
    tail = held[-1]
    lane = queue.keys.lanes[2]
    await manager.client.xclaim(lane, queue.group, "owner", 0, [tail.entry], idle=61_000, justid=True)
    await thief.maintain("thief", 0)
    found, ticks = [], 0
    while not found:
        thief._upkeep._quiet_until = thief._upkeep._adopt_at = 0.0
        if ticks == 0:
            thief._upkeep._reclaim_at = 0.0
        found = (await thief.maintain("thief", 10)).deliveries
        ticks += 1
        assert ticks <= count / 500 + 2
    assert [(d.entry, d.deliveries) for d in found] == [(tail.entry, 2)]
    assert ticks > 10, "bounded work a tick"
    await queue.close()
    await thief.close()


async def test_e9_one_blocking_connection_per_worker(manager, redis_url):
    """E9: a worker has one connection that blocks; among many blocked readers each task reaches one, reads end in time."""
    gate = Gate()
    gate.open.set()
    client = manager.client
    queues = [queue_for(manager) for _ in range(3)]
    dispatchers = [Dispatcher(queue, agents=gate.registry()) for queue in queues]

    async def blocked(count):
        return (await client.info("clients"))["blocked_clients"] == count

    for dispatcher in dispatchers:
        await dispatcher.start()
    await until(lambda: blocked(3))
    many = redis.asyncio.BlockingConnectionPool.from_url(redis_url, max_connections=200, protocol=2)
    crowd = redis.asyncio.Redis.from_pool(many)
    lanes = dict.fromkeys(queues[0].keys.lanes, ">")
    reads = [asyncio.create_task(crowd.xreadgroup("workers", f"c{n}", lanes, 1, 20_000)) for n in range(150)]
    await until(lambda: blocked(153))
    await queues[0].produce_many([{"id": f"t{n}", "type": "gate"} for n in range(400)])
    got = [entries for reply in await asyncio.gather(*reads) for _, entries in reply]
    for entries in got:
        await client.xack(lanes_of(queues[0], 2), "workers", *(entry for entry, _ in entries))
        await client.xdel(lanes_of(queues[0], 2), *(entry for entry, _ in entries))
    await until(lambda: len(gate.started) + sum(map(len, got)) == 400)
    assert len(set(gate.started)) == len(gate.started)
    for dispatcher in dispatchers:
        await dispatcher.stop()
    assert sum((await queues[0].stats()).in_flight) == 0
    await crowd.aclose()
    for queue in queues:
        await queue.close()


def lanes_of(queue, lane):
    return queue.keys.lanes[lane]


async def test_e11_a_restart_under_the_same_name_does_not_read_its_own_history(manager):
    """E11: counters stay, deleted entries do no harm, and what the name held comes back after its lease."""
    first = queue_for(manager)
    await first.produce_many([{"id": f"t{n}", "type": "x"} for n in range(3)])
    held = await first.read("fixed", 3, 100)
    await age(manager.client, first, 61)
    await manager.client.xdel(first.keys.lanes[2], held[0].entry)
    await first.close()
    second = queue_for(manager)
    assert await second.read("fixed", 10, 10) == []
    assert [count for _, _, _, count in await pending(manager.client, second)] == [1, 1, 1]
    found = (await trusting(second).maintain("fixed", 10)).deliveries
    assert [(d.entry, d.deliveries) for d in found] == [(d.entry, 2) for d in held[1:]]
    assert await second.settle([(d, DONE) for d in found]) == []
    assert (await settled(second)).counters["lost"] == 1
    await second.close()


SOURCES = [
    path for path in sorted(Path(orchestra.__file__).parent.rglob("*")) if path.suffix in {".py", ".lua", ".pyx"}
]


def test_e12_nothing_reads_without_pending_entries():
    """E12: there is no switch for NOACK, and no command carries it."""
    assert len(SOURCES) > 50
    assert [path.name for path in SOURCES if re.search(r"\bnoack\b", path.read_text("utf-8"), re.IGNORECASE)] == []


def test_e11_only_new_entries_are_read():
    """E11: every XREADGROUP of the product asks for ">", never for its own history."""
    reads = [
        line
        for path in SOURCES
        for line in path.read_text("utf-8").splitlines()
        if "'XREADGROUP'" in line or '"STREAMS"' in line or "'STREAMS'" in line
    ]
    assert len(reads) >= 2
    assert all("'>'" in line or line.strip().startswith("head =") for line in reads), reads


def test_e10_the_group_begins_at_the_beginning():
    """E10: the one place that makes the group makes it at 0."""
    made = [
        line.strip()
        for path in SOURCES
        for line in path.read_text("utf-8").splitlines()
        if '"XGROUP", "CREATE"' in line
    ]
    assert len(made) == 1
    assert '"0", "MKSTREAM"' in made[0]
