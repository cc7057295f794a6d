"""Faults that the protocol is built for: dead workers, forgotten scripts, lost groups, broken connections.

Every test ends with the same check: all tasks are terminal exactly once and the counters add up.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from orchestra._delivery import DONE, Again, Bury
from orchestra._redis.wire import pack
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.errors import QueueFullError
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Outcome, Retry
from tests.waiting import settled

WORKER = """
    import asyncio, os, sys, time
    from orchestra import _identity
    from orchestra.agents import AgentRegistry
    from orchestra.connections import ConnectionManager
    from orchestra.dispatcher import Dispatcher
    from orchestra.task_queue import RedisStreamTaskQueue

    async def hang(task):
        print("started", task.id, flush=True)
        await asyncio.sleep(60)

    async def die(task):
        print("dying", task.id, flush=True)
        os._exit(9)

    async def block(task):
        print("blocking", task.id, flush=True)
        time.sleep(1.5)
        print("done", task.id, flush=True)

    async def main():
        agents = AgentRegistry()
        agents.register("block", block)
        agents.register("hang", hang)
        agents.register("die", die)
        manager = ConnectionManager(os.environ["ORCHESTRA_REDIS_URL"])
        queue = RedisStreamTaskQueue("tasks", "workers", int(sys.argv[1]), manager=manager)
        await Dispatcher(queue, agents=agents, consumer_name=sys.argv[2] if len(sys.argv) > 2 else None).run()

    asyncio.run(main())
"""


def start_worker(lease_ms, *args):
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(lease_ms), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)


def kill(worker):
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    worker.stdout.close()


@pytest.fixture
def worker():
    """Starts worker processes; those still alive are killed after the test."""
    started = []

    def start(lease_ms, *args):
        started.append(start_worker(lease_ms, *args))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            kill(process)


def queue_for(manager, lease_ms=5_000, **options):
    return RedisStreamTaskQueue("tasks", "workers", lease_ms, manager=manager, **options)


async def until(condition, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not (value := await condition()):
            await asyncio.sleep(0.01)
        return value


async def test_a_killed_worker_of_this_machine_is_replaced_without_waiting_for_its_leases(manager, worker):
    queue = queue_for(manager, 60_000)
    await queue.produce_many([{"id": f"t{n}", "type": "hang"} for n in range(5)])
    victim = worker(60_000)
    for _ in range(5):
        assert (await asyncio.to_thread(victim.stdout.readline)).startswith("started")
    kill(victim)
    seen = []

    async def agent(task):
        seen.append((task.id, task.attempt))

    agents = AgentRegistry()
    agents.register("hang", agent)
    began = time.monotonic()
    async with Dispatcher(queue, agents=agents):
        stats = await settled(queue)
    assert time.monotonic() - began < 5
    assert sorted(seen) == [(f"t{n}", 1) for n in range(5)], "a crash consumes no retry"
    assert stats.counters["reclaimed"] == 5
    assert (await queue.stats()).consumers == 0, "the dead consumer was forgotten"
    await queue.close()


async def test_a_killed_worker_of_another_machine_is_replaced_after_its_lease(manager, worker):
    queue = queue_for(manager, 600)
    await queue.produce({"id": "t", "type": "hang"})
    victim = worker(600, "elsewhere")
    assert (await asyncio.to_thread(victim.stdout.readline)).startswith("started")
    await asyncio.sleep(1.2)
    assert (await queue.stats()).in_flight[2] == 1, "a live worker keeps its lease"
    kill(victim)
    killed = time.monotonic()
    agents = AgentRegistry()
    done = asyncio.Event()

    async def agent(task):
        done.set()

    agents.register("hang", agent)
    async with Dispatcher(queue, agents=agents):
        async with asyncio.timeout(10):
            await done.wait()
        assert time.monotonic() - killed >= 0.4, "not before the lease can have ended"
        await settled(queue)
    await queue.close()


async def test_a_blocked_event_loop_keeps_its_leases(manager, worker):
    queue = queue_for(manager, 600)
    await queue.produce({"id": "t", "type": "block"})
    blocked = worker(600)
    assert await asyncio.to_thread(blocked.stdout.readline) == "blocking t\n"
    end = time.monotonic() + 1.3
    while time.monotonic() < end:
        assert await queue.reclaim("thief", 10, 600) == []
        await asyncio.sleep(0.05)
    assert await asyncio.to_thread(blocked.stdout.readline) == "done t\n"
    stats = await settled(queue)
    assert stats.counters == {"produced": 1, "completed": 1}
    kill(blocked)
    await queue.close()


async def test_a_poison_pill_ends_as_crashed_and_others_survive(manager, worker):
    queue = queue_for(manager, 60_000, max_deliveries=2)
    await queue.produce_many([{"id": "pill", "type": "die"}], want_results=True)
    for _ in range(2):
        victim = worker(60_000)
        assert await asyncio.to_thread(victim.stdout.readline) == "dying pill\n"
        assert await asyncio.to_thread(victim.wait, 10) == 9
        victim.stdout.close()
    await queue.produce({"id": "innocent", "type": "ok"})
    agents = AgentRegistry()
    agents.register("ok", lambda task: None)
    agents.register("die", lambda task: None)
    async with Dispatcher(queue, agents=agents) as dispatcher:
        record = await queue.wait_result("pill", 10)
        await settled(queue)
    agents.close()
    assert dispatcher.outcomes == {Outcome.COMPLETED: 1}
    assert (record["outcome"], record["reason"]) == ("dead", "crashed")
    (letter,) = await queue.read_dlq()
    assert (letter.reason, letter.attempts, letter.task_data["id"]) == ("crashed", 2, "pill")
    await queue.close()


async def test_everything_survives_forgotten_scripts_and_killed_connections(manager):
    queue = queue_for(manager)
    agents = AgentRegistry()
    seen = []

    async def agent(task):
        seen.append(task.id)
        await asyncio.sleep(0.001)
        if task.attempt == 1 and task.input % 7 == 0:
            raise ValueError

    agents.register("work", agent, retry=Retry(base=0.01, max_delay=0.01))
    stop = asyncio.Event()

    async def havoc():
        while not stop.is_set():
            await manager.client.script_flush()
            await manager.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(0.03)

    havocking = asyncio.create_task(havoc())
    ids = []
    async with Dispatcher(queue, agents=agents):
        for start in range(0, 2000, 100):
            ids += await queue.produce_many(
                [{"id": f"t{n}", "type": "work", "input": n} for n in range(start, start + 100)]
            )
            await asyncio.sleep(0.01)
        stop.set()
        await havocking
        stats = await settled(queue, 30)
    assert len(set(ids)) == len(set(seen)) == 2000
    assert stats.counters["completed"] == 2000
    await queue.close()


async def test_flushall_under_a_blocked_reader_heals(manager):
    queue = queue_for(manager)
    agents = AgentRegistry()
    done = []

    async def agent(task):
        done.append(task.id)

    agents.register("work", agent)
    async with Dispatcher(queue, agents=agents):
        await queue.produce({"id": "before", "type": "work"})
        await settled(queue)
        await manager.client.flushall()
        await queue.produce({"id": "after", "type": "work"})
        await until(lambda: asyncio.sleep(0, "after" in done))
    assert done == ["before", "after"]
    await queue.close()


async def test_a_stale_settle_changes_nothing(manager):
    ours, theirs = queue_for(manager), queue_for(manager)
    await ours.produce_many([{"id": f"t{n}", "type": "x"} for n in range(4)])
    old = await ours.read("slow", 10, 100)
    new = await theirs.reclaim("quick", 10, 0)
    assert [d.deliveries for d in new] == [2] * 4
    assert all(n.fence > o.fence for o, n in zip(old, new, strict=True))
    verdicts = (DONE, Again(0.0, "released"), Again(1.0), Bury("failed", 1, {}))
    stale = await ours.settle(list(zip(old, verdicts, strict=True)))
    assert set(stale) == set(old)
    stats = await ours.stats()
    assert (stats.live, stats.dead, stats.delayed) == (4, 0, 0)
    assert await theirs.settle([(delivery, DONE) for delivery in new]) == []
    await settled(ours)
    await ours.close()
    await theirs.close()


async def test_every_script_may_be_repeated_after_a_lost_reply(manager):
    queue = queue_for(manager)
    link = await queue._commands()
    real_run, lost = link.run, []

    async def run(calls):
        replies = await real_run(calls)
        if calls[0].script.name not in lost:
            lost.append(calls[0].script.name)
            link._wire.close()
            return await real_run(calls) if calls[0].script.name == "promote" else await _lose()
        return replies

    async def _lose():
        from orchestra.errors import StoreUnavailableError

        raise StoreUnavailableError("the reply was lost")

    link.run = run
    own = await queue.produce_many([{"id": f"own{n}", "type": "x"} for n in range(3)])
    new = await queue.produce_many([{"type": "x", "priority": n} for n in (2, 2, 0, 3)])
    assert len(set(own + new)) == 7
    assert (await queue.stats()).live == 7
    deliveries = await queue.read("c", 100, 100)
    assert {d.message_id for d in deliveries} == set(own + new), "a repeated call answers the ids of the first"
    verdicts = [DONE, DONE, Again(30.0), Again(0.0, "released"), Bury("failed", 1, {}), DONE, DONE]
    assert await queue.settle(list(zip(deliveries, verdicts, strict=True))) == []
    stats = await queue.stats()
    assert (stats.delayed, stats.dead, sum(stats.waiting)) == (1, 1, 1)
    assert stats.counters["completed"] == 4
    assert stats.adds_up
    assert {"produce_many", "produce", "complete"} <= set(lost)
    await queue.close()


async def test_a_full_queue_refuses_all_or_nothing_and_recovers(manager):
    queue = queue_for(manager, max_length=5)
    await queue.produce_many([{"type": "x"} for _ in range(4)])
    with pytest.raises(QueueFullError, match="4 live tasks of at most 5") as refused:
        await queue.produce_many([{"type": "x"}, {"type": "x"}])
    assert refused.value.retry_after > 0
    assert (await queue.stats()).live == 4
    (delivery,) = await queue.read("c", 1, 100)
    await queue.settle([(delivery, DONE)])
    await queue.produce_many([{"type": "x"}, {"type": "x"}])
    assert (await queue.stats()).live == 5
    await queue.close()


async def test_a_cancelled_consume_loses_nothing_and_leaves_the_connection_in_step(manager):
    queue, producer = queue_for(manager), queue_for(manager)
    cancelled, got = 0, []
    for n in range(60):
        consuming = asyncio.create_task(queue.consume("c", 4, 5000))
        await asyncio.sleep(0.002)
        producing = asyncio.create_task(producer.produce({"id": f"t{n}", "type": "x"}))
        await asyncio.sleep(n * 1e-5)  # sweeps the moment of the cancel over the delivery
        consuming.cancel()
        await asyncio.gather(consuming, producing, return_exceptions=True)
        if consuming.cancelled():
            cancelled += 1
        else:
            got += consuming.result()
    assert 0 < cancelled
    assert all(await queue.acknowledge_many([message_id for message_id, _ in got]))
    await until(lambda: _none_in_flight(queue))
    left = await queue.consume("c", 100, 500)
    assert sorted(task["id"] for _, task in left + got) == sorted(f"t{n}" for n in range(60))
    assert all(await queue.acknowledge_many([message_id for message_id, _ in left]))
    await producer.close()
    await settled(queue)
    await queue.close()


async def _none_in_flight(queue):
    return sum((await queue.stats()).in_flight) == 0


async def test_a_second_group_is_refused(manager):
    first = queue_for(manager)
    await first.consume("c", 1, 0)
    second = RedisStreamTaskQueue("tasks", "others", manager=manager)
    with pytest.raises(ValueError, match="group 'workers', not 'others'"):
        await second.consume("c", 1, 0)
    await first.close()
    await second.close()


async def test_delayed_tasks_of_the_same_id_do_not_overwrite_one_another(manager):
    queue = queue_for(manager)
    await queue.produce_many([{"type": "x"} for _ in range(2)])
    first, second = await queue.read("c", 2, 100)
    second._header = first.header  # as if the id had been used again after the dedup window
    await queue.settle([(first, Again(0.01)), (second, Again(0.01))])
    assert (await queue.stats()).delayed == 2
    await asyncio.sleep(0.02)
    await queue.maintain("c", 0)
    stats = await queue.stats()
    assert (stats.delayed, sum(stats.waiting)) == (0, 2)
    await queue.close()


async def test_no_key_is_left_without_need(manager, redis_url):
    queue = queue_for(manager)
    agents = AgentRegistry()

    async def agent(task):
        if task.attempt == 1:
            raise ValueError

    agents.register("x", agent, retry=Retry(base=0.01, max_delay=0.01))
    await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(20)], want_results=True)
    async with Dispatcher(queue, agents=agents):
        await settled(queue)
    for key in await manager.client.keys("*"):
        name = key.decode()
        permanent = name in queue.keys.streams or name == queue.keys.counters
        assert permanent or await manager.client.pttl(key) > 0, f"{name} has no time to live"
    for lane in queue.keys.streams:
        assert await manager.client.xlen(lane) == 0
    await queue.close()


async def test_a_fork_does_not_use_its_parents_connections(redis_url):
    manager = await ConnectionManager(redis_url).connect()
    queue = queue_for(manager)
    await queue.produce({"type": "x"})
    link = await queue._commands()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if (await link.wire()).closed else 1) if link._wire is None else os._exit(
            0 if link._wire.closed else 1
        )
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (await link.send(pack((("PING",),)), 1)) == [b"PONG"]
    await queue.close()
    await manager.close()
