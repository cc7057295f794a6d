"""Leases under fault: stopped, blocked and cut-off holders (reliability rows A5 to A11, C11, E7)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from orchestra._delivery import DONE, Complete
from orchestra._queue.leases import LeaseKeeper
from orchestra._scripts import call
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.errors import ConfigurationError
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._checks import until
from tests.faults._lease_tools import TalkingWorker, events, pending, queue_for
from tests.faults.proxy import Proxy
from tests.waiting import settled


@pytest.fixture
def worker(redis_url, tmp_path):
    """Starts talking worker processes, which are killed after the test; ``worker.flag`` lets their agents end."""
    started = []

    def start(lease_ms, **options):
        started.append(TalkingWorker(redis_url, lease_ms, start.flag, **options))
        return started[-1]

    start.flag = tmp_path / "flag"
    yield start
    for process in started:
        process.end()


async def steal(queue, lease_ms, count=1):
    """Reclaim until ``count`` deliveries are ours."""
    taken = []

    async def try_again():
        taken.extend(await queue.reclaim("thief", 10, lease_ms))
        return len(taken) >= count

    await until(try_again, every=0.05)
    return taken


async def test_a5_a_stopped_worker_learns_at_once_that_it_lost_its_task(manager, worker):
    """A5: SIGSTOP beyond the lease; the other's result stands, the zombie's agent is cancelled, its settle is STALE."""
    lease_ms = 1600
    queue = queue_for(manager, lease_ms)
    await queue.produce_many([{"id": "t", "type": "wait"}], want_results=True)
    zombie = worker(lease_ms)
    (started,) = await zombie.says("started")
    zombie.stop()
    (mine,) = await steal(queue, lease_ms)
    assert (mine.deliveries, mine.header.id) == (2, "t")
    assert mine.fence > started["fence"]
    woken = time.monotonic()  # before the signal: the other process may be quicker than this one
    zombie.go_on()
    (cancelled,) = await zombie.says("cancelled")
    await zombie.says("task.stale")
    assert cancelled["at"] >= woken
    (stood_still,) = await zombie.says("loop.blocked")
    assert stood_still["kind"] == "process"
    assert await pending(manager.client, queue) == [(mine.entry, b"thief", pytest.approx(0, abs=60_000), 2)]
    assert await queue.settle([(mine, Complete("the thief's"))]) == []
    assert (await queue.wait_result("t", 30))["value"] == "the thief's"
    assert (await settled(queue)).counters["completed"] == 1
    await queue.close()


async def test_a5_a_stopped_worker_whose_task_nobody_took_goes_on_with_it(manager, worker):
    """A5: stopped beyond its lease with nobody to take over: Redis confirms that the task is still its own."""
    queue = queue_for(manager, 800)
    await queue.produce({"id": "t", "type": "wait"})
    stopped = worker(800)
    await stopped.says("started")
    stopped.stop()

    async def expired():
        ((_, _, idle, _),) = await pending(manager.client, queue)
        return idle > 1.5 * 800

    await until(expired)
    stopped.go_on()

    async def renewed():
        ((_, _, idle, _),) = await pending(manager.client, queue)
        return idle < 400

    await until(renewed)
    worker.flag.touch()
    assert (await settled(queue)).counters == {"produced": 1, "completed": 1}
    assert len(stopped.heard("started")) == 1
    assert stopped.heard("cancelled") == stopped.heard("lease.lost") == []
    await queue.close()


@pytest.mark.slow
async def test_a6_pauses_shorter_than_the_lease_cost_nothing(manager, worker):
    """A6: SIGSTOP for 0.6 leases, again and again: nobody takes the task over, its agent goes on."""
    lease_ms, client = 3000, manager.client
    queue = queue_for(manager, lease_ms)
    await queue.produce({"id": "t", "type": "wait"})
    paused = worker(lease_ms)
    await paused.says("started")

    async def just_renewed():
        ((_, _, idle, _),) = await pending(client, queue)
        return idle < 0.1 * lease_ms

    for _ in range(2):
        await until(just_renewed, every=0.02)
        paused.stop()
        end = time.monotonic() + 0.6 * lease_ms / 1000
        while time.monotonic() < end:
            assert await queue.reclaim("thief", 10, lease_ms) == []
            await asyncio.sleep(0.05)
        paused.go_on()
    await until(just_renewed, every=0.02)
    worker.flag.touch()
    stats = await settled(queue)
    assert stats.counters == {"produced": 1, "completed": 1}
    assert len(paused.heard("started")) == 1
    assert paused.heard("cancelled") == paused.heard("task.stale") == []
    await queue.close()


async def test_a7_renewing_never_steals_back(manager):
    """A7: a zombie's renewal leaves the entry with the consumer that has taken it over, and reports the loss."""
    ours, theirs = queue_for(manager, 800), queue_for(manager, 800)
    await ours.produce_many([{"id": f"t{n}", "type": "x"} for n in range(3)])
    old = await ours.read("zombie", 10, 100)
    new = await theirs.reclaim("thief", 2, 0)
    lost = []
    async with ours.keep_leases("zombie", lost.append):
        await until(lambda: len(lost) == 2)
    assert set(lost) == set(old[:2])
    assert [d.lost for d in old] == [True, True, False]
    rows = {entry: (who, count) for entry, who, _, count in await pending(manager.client, ours)}
    assert rows == {old[0].entry: (b"thief", 2), old[1].entry: (b"thief", 2), old[2].entry: (b"zombie", 1)}
    assert set(await ours.settle([(d, DONE) for d in old])) == set(old[:2])
    assert await theirs.settle([(d, DONE) for d in new]) == []
    assert (await settled(ours)).counters["completed"] == 3
    await ours.close()
    await theirs.close()


@pytest.mark.parametrize("how", ["sleep_in_the_loop", "spin_in_the_loop"])
async def test_a9_a_blocked_loop_keeps_its_leases_for_max_stall(manager, worker, how):
    """A9: leases outlive the blocked loop until max_stall, then are let go; the stack is reported; fences hold."""
    lease_ms = 600
    queue = queue_for(manager, lease_ms)
    blocked = worker(lease_ms, max_stall=2.0)
    await queue.produce({"id": "other", "type": "wait"})
    await blocked.says("started", id="other")
    await queue.produce({"id": "t", "type": how})
    await blocked.says("started", id="t")
    mine = []
    while not blocked.heard("lease.let_go"):
        mine += await queue.reclaim("thief", 10, lease_ms)
        assert mine == [] or blocked.heard("lease.let_go"), "taken over before it was let go"
        await asyncio.sleep(0.02)
    first = blocked.heard("loop.blocked")[0]
    assert first["kind"] == "loop"
    assert 1.0 <= first["blocked_s"]
    assert how in first["stack"]
    (let_go,) = blocked.heard("lease.let_go")
    assert let_go["blocked_s"] >= 2.0
    assert let_go["count"] == 2
    mine += await steal(queue, lease_ms, 2 - len(mine))
    assert {d.header.id for d in mine} == {"t", "other"}
    await until(lambda: len(blocked.heard("loop.blocked")) >= 2)
    reports = [row["blocked_s"] for row in blocked.heard("loop.blocked", kind="loop")]
    assert all(later >= 2 * before * 0.9 for before, later in zip(reports, reports[1:], strict=False)), reports
    worker.flag.touch()
    await blocked.says("task.stale", 1)
    assert await queue.settle([(d, DONE) for d in mine]) == []
    assert (await settled(queue)).counters["completed"] == 2
    await queue.close()


async def test_a9_a_call_that_holds_the_gil_is_seen_afterwards_and_fenced(manager, worker):
    """A9: a C call with the GIL held stops the renewals too; what it cost is reported, its late settle is STALE."""
    lease_ms = 600
    queue = queue_for(manager, lease_ms)
    await queue.produce({"id": "t", "type": "hold_the_gil", "input": 3.0})
    stuck = worker(lease_ms)
    await stuck.says("started")
    lost = []
    async with queue.keep_leases("thief", lost.append):  # or the other takes it back as soon as it is healthy again
        (mine,) = await steal(queue, lease_ms)
        assert stuck.heard("done") == []
        (report,) = await stuck.says("loop.blocked")
        assert report["kind"] == "process"
        assert report["stack"], "where it is by now: the call may have returned before the thread got its turn"
        await stuck.says("task.stale")
        assert await queue.settle([(mine, DONE)]) == []
    assert lost == []
    assert (await settled(queue)).counters["completed"] == 1
    await queue.close()


@pytest.mark.slow
async def test_a9_a_standstill_in_the_middle_of_a_renewal_is_reported_and_costs_no_lease(manager, monkeypatch):
    """A9 A5: a call holds the GIL while the renewing thread waits for Redis; the answer is older than the lease then."""
    connect, pauses = LeaseKeeper._connect, iter((4.0,))

    def interrupted(keeper):
        while keeper._client is None:  # on a busy machine it may take more than one attempt
            connect(keeper)
        ask = keeper._client.execute_command

        def without_the_gil(*command):
            answer = ask(*command)
            time.sleep(next(pauses, 0.0))  # as long as this thread does not get it back
            return answer

        monkeypatch.setattr(keeper._client, "execute_command", without_the_gil)

    monkeypatch.setattr(LeaseKeeper, "_connect", interrupted)
    queue, lost = queue_for(manager, 3000), []
    await queue.produce({"id": "t", "type": "x"})
    (mine,) = await queue.read("c", 1, 100)
    with events("loop.blocked", "lease.renewed") as seen:
        async with queue.keep_leases("c", lost.append):
            await until(lambda: [name for name, _ in seen].count("lease.renewed") >= 3)
            assert lost == []
            assert await queue.settle([(mine, DONE)]) == []
    (report,) = (facts for name, facts in seen if name == "loop.blocked")
    assert report["kind"] == "process"
    assert report["blocked_s"] > 1.0, "less what Redis may have needed"
    await queue.close()


async def test_a10_an_abandoned_delivery_is_no_longer_renewed(manager):
    """A10: what its agent has lost control of keeps no lease, and what is beside it does."""
    queue = queue_for(manager, 2000)
    await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(2)])
    given_up, kept = await queue.read("c", 2, 100)
    given_up.abandoned = True
    lost = []
    async with queue.keep_leases("c", lost.append):

        async def apart():
            idle = {entry: ms for entry, _, ms, _ in await pending(manager.client, queue)}
            return idle[given_up.entry] - idle[kept.entry] > 1000

        await until(apart)
    assert lost == []
    await queue.settle([(given_up, DONE), (kept, DONE)])
    await queue.close()


@pytest.mark.slow
async def test_a11_a_slow_agent_keeps_its_task_as_long_as_it_is_healthy(manager):
    """A11: an agent that takes several leases runs once, though another worker is waiting to take over."""
    lease_ms, seen = 1500, []
    agents = AgentRegistry()

    async def slow(task):
        seen.append(task.id)
        await asyncio.sleep(3 * lease_ms / 1000)

    agents.register("slow", slow)
    queues = [queue_for(manager, lease_ms) for _ in range(2)]
    await queues[0].produce_many([{"id": f"t{n}", "type": "slow"} for n in range(20)])
    async with Dispatcher(queues[0], agents=agents), Dispatcher(queues[1], agents=agents):
        stats = await settled(queues[0])
    assert sorted(seen) == sorted({f"t{n}" for n in range(20)})
    assert stats.counters == {"produced": 20, "completed": 20}
    for queue in queues:
        await queue.close()


@pytest.mark.slow
async def test_c10_a_round_trip_of_a_seventh_of_the_lease_costs_no_lease(redis_url):
    """C10: renewals wait long enough for a slow link, and greet the server before they are urgent."""
    lease_ms, seen = 3000, []
    agents = AgentRegistry()

    async def slow(task):
        seen.append(task.id)
        await asyncio.sleep(2 * lease_ms / 1000)

    agents.register("slow", slow)
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url) as manager:
        queue = queue_for(manager, lease_ms)
        await queue.produce_many([{"id": f"t{n}", "type": "slow"} for n in range(5)])
        proxy.delay(0.2)
        async with Dispatcher(queue, agents=agents):
            stats = await settled(queue, 60)
        await queue.close()
    assert sorted(seen) == [f"t{n}" for n in range(5)]
    assert stats.counters == {"produced": 5, "completed": 5}


@pytest.mark.slow
async def test_c11_a_worker_that_is_cut_off_cancels_by_its_own_clock(redis_server, redis_url, manager):
    """C11: black hole for one worker only: its agent is cancelled while it is cut off, the other worker takes over."""
    lease_ms, story = 1500, []
    done = asyncio.Event()

    def registry(name):
        agents = AgentRegistry()

        async def work(task):
            story.append((name, "started", task.fence, time.monotonic()))
            if name == "near":
                done.set()
                return
            try:
                await asyncio.sleep(300)
            except asyncio.CancelledError:
                story.append((name, "cancelled", task.fence, time.monotonic()))
                raise

        agents.register("work", work)
        return agents

    near = queue_for(manager, lease_ms)
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url, timeout=3600.0) as cut_off:
        far = queue_for(cut_off, lease_ms)
        async with Dispatcher(far, agents=registry("far"), consumer_name="far", drain_timeout=0.1):
            await near.produce({"id": "t", "type": "work"})
            await until(lambda: story)
            async with Dispatcher(near, agents=registry("near"), consumer_name="near"):
                proxy.stall()
                await until(lambda: ("far", "cancelled") in [row[:2] for row in story])
                async with asyncio.timeout(60):
                    await done.wait()
                await settled(near)
                await proxy.heal(lose=True)
        await far.close()
    told = {row[:2]: row[2:] for row in story}
    assert set(told) == {("far", "started"), ("far", "cancelled"), ("near", "started")}
    assert len(story) == 3
    (old, _), (_, cancelled), (new, started) = told["far", "started"], told["far", "cancelled"], told["near", "started"]
    assert new > old
    assert cancelled - started < 1.0, "an idle machine is quicker by a tenth of a lease, a busy one may be late"
    assert (await near.stats()).counters["completed"] == 1
    await near.close()


async def test_c11_a_server_that_does_not_answer_does_not_hang_the_renewals(make_server):
    """C11: SIGSTOP of the server: the thread gives up each renewal in time, and the delivery counts as lost in time."""
    server = make_server()
    lost = asyncio.Event()
    async with ConnectionManager(server.url) as manager:
        queue = queue_for(manager, 1600)
        await queue.produce({"id": "t", "type": "x"})
        with events("lease.renewed") as renewed:
            (delivery,) = await queue.read("c", 1, 100)
            async with queue.keep_leases("c", lambda _: lost.set()):
                await until(lambda: renewed)
                os.kill(server.pid, signal.SIGSTOP)
                began = time.monotonic()
                try:
                    async with asyncio.timeout(60):
                        await lost.wait()
                    took = time.monotonic() - began
                finally:
                    os.kill(server.pid, signal.SIGCONT)
        assert delivery.lost
        assert 0.5 <= took, "it had more than half of its lease before it"
        assert took < manager.timeout, "the socket's own timeout was not waited for"
        assert await queue.settle([(delivery, DONE)]) == [], "nobody has taken it over, so its settle still counts"
        await queue.close()


async def test_e7_renewals_never_touch_the_delivery_count(manager):
    """E7: many renewals later the pending entry still has its count, and with it its fence."""
    queue = queue_for(manager, 400)
    await queue.produce({"id": "t", "type": "x"})
    (delivery,) = await queue.read("c", 1, 100)
    for _ in range(100):
        args = (queue.group, "c", delivery.entry, delivery.deliveries)
        assert await call(manager.client, "renew", (queue.keys.lanes[2], queue.keys.counters), args) == []
    with events("lease.renewed") as renewed:
        async with queue.keep_leases("c", lambda _: None):
            await until(lambda: len(renewed) >= 5)
    ((entry, who, _, count),) = await pending(manager.client, queue)
    assert (entry, who, count) == (delivery.entry, b"c", 1)
    assert await queue.settle([(delivery, DONE)]) == []
    await queue.close()


ABANDONED_LOOP = """
import asyncio, sys, threading, time
from orchestra.connections import ConnectionManager
from orchestra.task_queue import RedisStreamTaskQueue

async def begin():
    queue = RedisStreamTaskQueue("tasks", "workers", 300, manager=await ConnectionManager(sys.argv[1]).connect())
    await queue.produce({"id": "t", "type": "x"})
    await queue.read("c", 1, 100)
    await queue.keep_leases("c", lambda _: None).__aenter__()

loop = asyncio.new_event_loop()
loop.run_until_complete(begin())
(thread,) = [t for t in threading.enumerate() if t.name == "orchestra-leases-c"]
loop.close()
thread.join(60)
print(thread.is_alive())
"""


async def test_a9_leases_are_not_kept_for_an_event_loop_that_is_gone(redis_url):
    """A9: a loop that was closed under a running lease thread ends that thread."""
    command = [sys.executable, "-c", ABANDONED_LOOP, redis_url]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=90)
    assert done.stdout == "False\n", done.stderr


def test_max_stall_is_checked():
    """A9: the one setting of the row."""
    for bad in (-1, float("nan"), float("inf"), "1", True):
        with pytest.raises(ConfigurationError, match="max_stall must be a number of seconds, 0 or more and at most"):
            RedisStreamTaskQueue("q", "g", max_stall=bad)
    assert RedisStreamTaskQueue("q", "g", 2000)._intake._max_stall == 10.0
