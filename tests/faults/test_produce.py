"""Producing when things go wrong: lost replies, killed producers, full servers, keys that are not what they should be."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestra import telemetry
from orchestra._delivery import DONE, Again, Bury
from orchestra._queue.produce import CHUNK_TASKS, MAX_PATIENCE, TOKEN_WINDOW_MS
from orchestra._scripts import script
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.errors import (
    InvalidTaskError,
    QueueFullError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StreamExhaustedError,
)
from orchestra.serialization import encode_task
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Retry
from tests.faults.proxy import Proxy

LAST = "18446744073709551615"
TEN_YEARS = 10 * 365.25 * 86_400.0


def queue_on(manager, **options):
    return RedisStreamTaskQueue("tasks", "workers", manager=manager, **options)


async def snapshot(manager):
    """Every key with its serialised value."""
    keys = sorted(await manager.client.keys("*"))
    return {key: await manager.client.dump(key) for key in keys}


async def lanes_and_delayed(manager, queue):
    """The message id of everything that was added, as it lies in Redis."""
    found = []
    for lane, key in enumerate(queue.keys.lanes):
        if await manager.client.type(key) == b"stream":
            found += [f"{lane}:{entry.decode()}" for entry, _ in await manager.client.xrange(key)]
    return found + [f"z:{member.decode()}" for member in await manager.client.zrange(queue.keys.delayed, 0, -1)]


# -- A17: replies that are lost

KINDS = {
    "own ids": lambda: [{"id": f"own{n}", "type": "x", "priority": n % 4} for n in range(6)],
    "generated ids": lambda: [{"type": "x", "priority": n % 4} for n in range(6)],
    "own ids, one lane": lambda: [{"id": f"own{n}", "type": "x"} for n in range(6)],
    "generated ids, one lane": lambda: [{"type": "x"} for n in range(6)],
    "own ids, delayed": lambda: [{"id": f"own{n}", "type": "x", "delay": 60} for n in range(6)],
    "generated ids, delayed": lambda: [{"type": "x", "delay": 60 * (n % 2)} for n in range(6)],
    "both": lambda: [{"type": "x"} | ({"id": f"own{n}"} if n % 2 else {}) for n in range(6)],
    "several chunks": lambda: [{"type": "x"} for _ in range(4 * CHUNK_TASKS + 7)],
    "several chunks, own ids": lambda: [{"id": f"own{n}", "type": "x"} for n in range(4 * CHUNK_TASKS + 7)],
}


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_lost_reply_adds_nothing_twice(redis_server, redis_url, kind, how):
    """A17, H11: the server has executed the call, the answer never came; the repeat gets the ids of the first."""
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url) as manager:
        queue = queue_on(manager)
        await queue.produce({"id": "warm", "type": "x", "delay": 3600})
        await manager.client.script_load(script("produce_many").text)  # so that the replies that are lost are answers
        plain = kind == "both" or kind.endswith("one lane") or kind.startswith("several")
        lost = [proxy.drop_reply("produce_many" if plain else "produce", nth, how) for nth in (1, 2, 4)]
        tasks = KINDS[kind]()
        sent = await queue.submit(tasks)
        await lost[0].wait()
        assert [one.task_id for one in sent if one.task_id.startswith("own")] == [t["id"] for t in tasks if "id" in t]
        added = await lanes_and_delayed(manager, queue)
        assert sorted(added) == sorted(["z:warm", *(one.message_id for one in sent)])
        assert len(set(added)) == len(tasks) + 1
        stats = await queue.stats()
        assert stats.adds_up
        assert stats.counters["produced"] == len(tasks) + 1
        await queue.close()


async def test_an_id_twice_in_one_call_of_plain_tasks_is_one_task(manager):
    queue = queue_on(manager)
    first = await queue.produce_many([{"id": f"own{n % 4}", "type": "x"} for n in range(6)])
    again = await queue.produce_many([{"id": f"own{n}", "type": "x"} for n in range(6)])
    assert first[4:] == first[:2]
    assert again[:4] == first[:4], "the scripts for many plain tasks and for any heed each other's records"
    assert sorted(await lanes_and_delayed(manager, queue)) == sorted(again)
    assert (await queue.stats()).counters == {"produced": 6, "duplicates": 6}
    await queue.close()


async def test_message_ids_of_a_call_whose_milliseconds_differ(manager):
    """The clock may move while the script runs (Redis before 7.2): the answer names each run of ids."""
    queue = queue_on(manager)
    ids = await queue.produce_many({"type": "x"} for _ in range(20_000))
    assert ids == await lanes_and_delayed(manager, queue)
    await queue.close()


async def test_full_memory_does_not_deny_what_a_lost_reply_has_added(make_server):
    """A17, B8: the repeat is refused before the script can tell that the first call has run: the outcome is unknown."""
    server = make_server()
    async with Proxy(server.url) as proxy, ConnectionManager(proxy.url) as manager:
        queue = queue_on(manager, patience=1.0)
        await queue.produce({"id": "warm", "type": "x"})
        lost = proxy.drop_reply("produce_one")
        sending = asyncio.ensure_future(queue.produce({"id": "t", "type": "x"}))
        await lost.wait()
        server.ask(b"CONFIG SET maxmemory 1")
        with pytest.raises(StoreUnavailableError, match="may have been executed"):
            await sending
        with pytest.raises(StoreFullError):  # a first attempt is answered exactly
            await queue.produce({"id": "u", "type": "x"})
        server.ask(b"CONFIG SET maxmemory 0")
        assert len(await lanes_and_delayed(manager, queue)) == 2
        assert await queue.produce({"id": "t", "type": "x"}) in await lanes_and_delayed(manager, queue)
        assert (await queue.stats()).counters == {"produced": 2, "duplicates": 1}
        await queue.close()


async def test_a_reply_that_is_lost_for_good_is_said_and_may_be_sent_again(redis_url):
    """A17: the caller learns that the outcome is unknown, and sending again with the same ids gives the first answer."""
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url) as manager:
        queue = queue_on(manager, patience=0.0)
        await queue.produce({"id": "warm", "type": "x", "delay": 3600})
        lost = proxy.drop_reply("produce_one")
        with pytest.raises(StoreUnavailableError, match="may have been executed"):
            await queue.produce({"id": "t", "type": "x"})
        assert lost.fired
        first = await lanes_and_delayed(manager, queue)
        assert [await queue.produce({"id": "t", "type": "x"}), "z:warm"] == first
        assert (await queue.stats()).counters == {"produced": 2, "duplicates": 1}
        await queue.close()


@pytest.mark.parametrize(("timeout", "patience"), [(10.0, 10.0), (10.0, 30.0), (25.0, 30.0), (100.0, 30.0)])
async def test_no_repeat_outlives_the_token(redis_url, timeout, patience):
    """A17: the last repeat is executed while the first one's token is surely known, whatever is configured."""
    async with ConnectionManager(redis_url, timeout=timeout) as manager:
        queue = queue_on(manager, patience=patience)
        link = await queue._commands()
        allowed = queue._producer._patience_for(link)
        assert 0 <= allowed <= min(patience, MAX_PATIENCE)
        # first attempt until its deadline, repeats, opening a connection, the last attempt until its deadline
        assert allowed == 0 or timeout + allowed + manager.connect_timeout + timeout <= TOKEN_WINDOW_MS / 1000
        if (timeout, patience) == (10.0, 10.0):
            assert allowed == 10.0, "the defaults are not cut"
        await queue.close()


# -- A16: a producer that is killed

PRODUCER = """
    import asyncio, os, sys
    from orchestra.connections import ConnectionManager
    from orchestra.task_queue import RedisStreamTaskQueue

    async def main():
        manager = ConnectionManager(os.environ["ORCHESTRA_REDIS_URL"])
        queue = RedisStreamTaskQueue("tasks", "workers", manager=manager)
        print("begin", flush=True)
        await queue.produce_many({"id": f"t{n}", "type": "x", "delay": 60 * (n % 3 == 0)} for n in range(20_000))
        print("done", flush=True)

    asyncio.run(main())
"""


async def test_a_producer_killed_in_the_middle_is_resumed_with_the_same_ids(redis_url, manager):
    """A16: SIGKILL mid batch; each task is there once or not at all, and sending the whole batch again completes it."""
    async with Proxy(redis_url) as proxy:
        command = [sys.executable, "-c", textwrap.dedent(PRODUCER)]
        env = os.environ | {"ORCHESTRA_REDIS_URL": proxy.url}
        producer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        try:
            await proxy.passed("produce", 5, 60)
            producer.send_signal(signal.SIGKILL)
            out = (await asyncio.to_thread(producer.communicate, None, 30))[0]
        finally:
            producer.kill()
            producer.wait()
    queue = queue_on(manager)
    stats = await queue.stats()
    assert out == "begin\n"
    assert 0 < stats.live < 20_000
    assert stats.live % CHUNK_TASKS == 0, "a call is added as a whole"
    assert stats.counters["produced"] == stats.live
    await queue.produce_many({"id": f"t{n}", "type": "x", "delay": 60 * (n % 3 == 0)} for n in range(20_000))
    again = await queue.stats()
    assert (again.live, again.counters) == (20_000, {"produced": 20_000, "duplicates": stats.live})
    headers: list[str] = []
    while deliveries := await queue.read("c", 1000, 100):
        headers += [delivery.header.id for delivery in deliveries]
    delayed = [member.decode() for member in await manager.client.zrange(queue.keys.delayed, 0, -1)]
    assert sorted(headers + delayed) == sorted(f"t{n}" for n in range(20_000))
    await queue.close()


# -- H11: the same id again, whatever has become of it


async def test_the_same_id_again_in_every_state(manager):
    """H11: queued, delayed, running, retrying, done and dead all answer the first message id; a new window adds anew."""
    queue = queue_on(manager)
    first = {}
    for name in ("queued", "running", "retrying", "done", "dead"):
        first[name] = await queue.produce({"id": name, "type": "x"})
    first["delayed"] = await queue.produce({"id": "delayed", "type": "x", "delay": 60})
    held = {delivery.header.id: delivery for delivery in await queue.read("c", 4, 100)}
    # the oldest four are held; "dead" comes with the next read, and "queued" goes back
    held |= {delivery.header.id: delivery for delivery in await queue.read("c", 1, 100)}
    verdicts = {"retrying": Again(60.0), "done": DONE, "dead": Bury("failed", 1, {}), "queued": Again(0.0, "released")}
    await queue.settle([(held[name], verdict) for name, verdict in verdicts.items()])
    before = await queue.stats()
    for name, message_id in first.items():
        assert await queue.produce({"id": name, "type": "x"}) == message_id, name
    after = await queue.stats()
    assert (after.live, after.dead, after.counters["duplicates"]) == (before.live, before.dead, 6)
    assert (after.delayed, sum(after.in_flight), sum(after.waiting)) == (2, 1, 1)
    for bucket in queue.keys.dedup:
        await manager.client.delete(bucket)  # as when the window is over
    assert await queue.produce({"id": "done", "type": "x"}) != first["done"]
    assert (await queue.stats()).adds_up
    await queue.close()


# -- B8: maxmemory


async def test_a_server_without_memory_refuses_tasks_and_drains(make_server):
    """B8: produce refuses, and says when to try again; every other move works; the queue drains; producing recovers."""
    server = make_server("--maxmemory-policy", "noeviction")
    async with ConnectionManager(server.url) as manager:
        queue = queue_on(manager)
        agents, done = AgentRegistry(), []

        async def agent(task):
            if task.attempt == 1 and task.input["n"] % 5 == 0:
                raise ValueError("once more")
            if task.input["n"] % 7 == 0:
                raise KeyError("never")
            done.append(task.id)

        agents.register("x", agent, retry=Retry(max_retries=1, base=0.01, max_delay=0.01))
        tasks = [{"id": f"t{n}", "type": "x", "input": {"n": n, "fill": "." * 500}} for n in range(400)]
        await queue.produce_many(tasks[:200], want_results=True)
        await queue.produce_many([{"id": f"d{n}", "type": "x", "delay": 0.01, "input": {"n": 1}} for n in range(50)])
        (first,) = await queue.read("elsewhere", 1, 100)
        seen = []
        detach = telemetry.attach(lambda *event: seen.append(event), "queue.refused")
        assert server.ask(b"CONFIG SET maxmemory 1mb") == b"+OK\r\n"
        for refused in (
            queue.produce({"type": "x"}),
            queue.produce({"type": "x", "delay": 60}),
            queue.produce_many(tasks[200:]),
        ):
            with pytest.raises(StoreFullError, match="raise maxmemory or drain") as full:
                await refused
            assert full.value.retry_after > 0
        detach()
        assert {(facts["limit"], about["reason"]) for _, facts, about in seen} == {(0, "memory")}
        assert (await queue.stats()).live == 250
        (taken,) = await queue.reclaim("c", 1, 0)
        assert taken.entry == first.entry
        await queue.settle([(taken, Again(0.0, "released"))])
        async with Dispatcher(queue, agents=agents):
            async with asyncio.timeout(60):
                while (stats := await queue.stats()).live:
                    assert int((await manager.client.info("memory"))["maxmemory"]) == 1 << 20
                    await asyncio.sleep(0.02)
        dead = sum(n % 7 == 0 for n in range(200))
        assert (len(done), stats.dead, stats.counters["retried"] >= 40) == (250 - dead, dead, True)
        assert stats.adds_up
        record = await queue.wait_result("t1", 10)
        assert record["outcome"] == "completed"
        assert server.ask(b"CONFIG SET maxmemory 1gb") == b"+OK\r\n"
        assert len(await queue.produce_many(tasks[200:])) == 200
        await queue.close()


async def test_it_recovers_by_itself_when_draining_frees_memory(make_server):
    """B8: nobody changes a setting; settled tasks give their memory back, and the producer's next try succeeds."""
    server = make_server("--maxmemory-policy", "noeviction")
    async with ConnectionManager(server.url) as manager:
        queue = queue_on(manager)
        assert await queue.read("c", 1, 0) == []  # a full server would not let the group be made
        used = int((await manager.client.info("memory"))["used_memory"])
        await manager.client.config_set("maxmemory", used + (4 << 20))
        sent = 0
        with pytest.raises(StoreFullError):
            while True:
                sent += len(await queue.produce_many([{"type": "x", "input": "." * 10_000} for _ in range(50)]))
        assert sent > 100
        while deliveries := await queue.read("c", 100, 0):
            await queue.settle([(delivery, DONE) for delivery in deliveries])
        assert await queue.produce({"type": "x", "input": "." * 10_000})
        assert (await queue.stats()).counters["produced"] == sent + 1
        await queue.close()


# -- H3, H13: bounded queues


async def test_a_bounded_queue_tells_when_to_try_again(manager):
    """H13: all or nothing, no trimming, and a time that follows how fast the queue drains."""
    queue = queue_on(manager, max_length=100)
    await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(100)])
    waits = []
    for _ in range(3):
        for deliveries in (await queue.read("c", 5, 100),):
            await queue.settle([(delivery, DONE) for delivery in deliveries])
        await queue.produce_many([{"type": "x"} for _ in range(5)])
        with pytest.raises(QueueFullError, match="100 live tasks of at most 100; 10 more were refused") as full:
            await queue.produce_many([{"type": "x"} for _ in range(10)])
        assert full.value.limit == 100
        waits.append(full.value.retry_after)
    assert waits[0] == 1.0, "nothing is known yet"
    assert all(0.05 <= seconds <= 30 and seconds != 1.0 for seconds in waits[1:]), waits
    stats = await queue.stats()
    assert (stats.live, stats.counters["produced"], stats.counters["completed"]) == (100, 115, 15)
    await queue.close()


async def test_a_flood_of_dead_letters_closes_the_entrance(manager):
    """H3: with max_dead nothing is dropped: live tasks still die, new ones are refused until somebody has looked."""
    queue = queue_on(manager, max_dead=3)
    seen = []
    detach = telemetry.attach(lambda *event: seen.append(event), "queue.refused")
    await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(6)])
    for delivery in await queue.read("c", 6, 100):
        await queue.settle([(delivery, Bury("failed", 1, {}))])
    assert await queue.get_dlq_depth() == 6, "what lives may die, and no dead letter is dropped"
    with pytest.raises(QueueFullError, match="6 dead letters of at most 3") as full:
        await queue.produce({"type": "x"})
    assert full.value.limit == 3
    with pytest.raises(QueueFullError):
        await queue.produce_many([{"type": "x", "delay": 1}])
    detach()
    assert {(facts["limit"], about["reason"]) for _, facts, about in seen} == {(3, "dead_letters")}
    letters = await queue.read_dlq()
    assert await queue.replay_dlq([letter.message_id for letter in letters[:2]]) == 2
    assert await queue.purge_dlq([letters[2].message_id]) == 1
    with pytest.raises(QueueFullError, match="3 dead letters of at most 3"):
        await queue.produce({"type": "x"})
    assert await queue.purge_dlq([letters[3].message_id]) == 1
    assert await queue.produce({"type": "x"})
    assert (await queue.stats()).adds_up
    await queue.close()


# -- B20, B21: keys that are not what they should be

MIXED = [
    {"id": "a", "type": "x", "priority": 0},
    {"id": "b", "type": "x", "priority": 3},
    {"id": "c", "type": "x", "delay": 60},
    {"id": "d", "type": "x", "priority": 2},
]


def keys_of_produce(queue):
    keys = queue.keys
    return [*keys.lanes, keys.delayed, keys.bodies, *keys.dedup, *keys.tokens, keys.counters, keys.dlq]


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("tasks", [MIXED, [{**task, "id": None} for task in MIXED]], ids=["own ids", "generated ids"])
async def test_a_key_of_the_wrong_type_fails_before_anything_is_written(manager, number, tasks):
    """B20, G1: another program wrote over one of our keys: a typed error, and every other key is as it was."""
    queue = queue_on(manager, max_dead=1000)
    tasks = [{key: value for key, value in task.items() if value is not None} for task in tasks]
    await queue.produce_many([{"type": "x", "priority": n} for n in range(4)])
    key = keys_of_produce(queue)[number]
    for wrong in ("string", "list"):
        await manager.client.delete(key)
        await (manager.client.set(key, "foreign") if wrong == "string" else manager.client.rpush(key, "foreign"))
        before = await snapshot(manager)
        try:
            await queue.produce_many(tasks)
        except StoreError as error:
            assert "WRONGTYPE" in str(error)
            assert await snapshot(manager) == before
        else:
            assert key in (*queue.keys.dedup, *queue.keys.tokens), "only the bucket that is not in use is not looked at"
            assert ("id" in tasks[0]) == (key in queue.keys.tokens)
            for lane in queue.keys.lanes:
                await manager.client.delete(lane)
        await manager.client.delete(key)
    await queue.produce_many([{**task, "id": f"later{n}"} for n, task in enumerate(tasks)])
    await queue.close()


@pytest.mark.parametrize("last", [f"{LAST}-{LAST}", f"{LAST}-{int(LAST) - 2}"])
async def test_a_stream_that_has_used_up_its_ids_says_so(manager, last):
    """B21: no endless retry, nothing of the call is added, other lanes go on."""
    queue = queue_on(manager)
    await queue.produce({"id": "before", "type": "x", "priority": 1})
    await manager.client.xadd(queue.keys.lanes[2], {"t": "foreign"}, id=last)
    tasks = [
        {"type": "x", "priority": 0},
        {"type": "x", "delay": 60},
        *({"type": "x", "priority": 2} for _ in range(4)),
    ]
    for batch in (tasks, [{**task, "id": f"own{n}"} for n, task in enumerate(tasks)]):
        before = await queue.stats()
        with pytest.raises(StreamExhaustedError, match="used up its stream ids.*DEL that stream"):
            await queue.produce_many(batch)
        after = await queue.stats()
        assert (after.live, after.delayed, after.counters) == (before.live, before.delayed, before.counters)
        assert await manager.client.hlen(queue.keys.bodies) == 0
    assert await queue.produce({"type": "x", "priority": 0})
    await manager.client.delete(queue.keys.lanes[2])
    assert await queue.produce_many([{**task, "id": f"own{n}"} for n, task in enumerate(tasks)])
    await queue.close()


async def test_a_last_id_in_the_far_future_does_not_stop_the_lane(manager):
    """B21: ids go on from there; the tasks arrive in order."""
    queue = queue_on(manager)
    await manager.client.xgroup_create(queue.keys.lanes[2], queue.group, "0", mkstream=True)
    await manager.client.xadd(queue.keys.lanes[2], {"t": encode_task({"id": "far", "type": "x"}).frame}, id="9" * 15)
    ids = await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(3)])
    assert ids == [f"2:{'9' * 15}-{n + 1}" for n in range(3)]
    assert [d.header.id for d in await queue.read("c", 10, 100)] == ["far", "t0", "t1", "t2"]
    await queue.close()


# -- F6: times beyond their range

NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e-9, 2**53, 2**63, 4102444800, TEN_YEARS, -1, True, "1", None]),
)


@given(NUMBERS)
@settings(max_examples=150)
def test_a_delay_is_in_range_or_refused(delay):
    """F6: NaN, infinite, negative, beyond ten years, not a number: a typed error; otherwise it is kept exactly."""
    number = isinstance(delay, int | float) and not isinstance(delay, bool)
    try:
        encoded = encode_task({"type": "x", "delay": delay})
    except InvalidTaskError as error:
        assert error.path == "delay"
        assert not number or not 0 <= delay < TEN_YEARS
    else:
        assert encoded.delay == (delay or 0)
        assert delay is None or (number and 0 <= delay <= TEN_YEARS)


@given(NUMBERS)
@settings(max_examples=150)
def test_a_deadline_is_a_time_or_refused(deadline):
    """F6"""
    try:
        encode_task({"type": "x", "deadline": deadline})
    except InvalidTaskError as error:
        assert error.path == "deadline"
    else:
        assert deadline is None or (not isinstance(deadline, bool) and 0 < float(deadline) < float("inf"))


@given(st.floats(0, 3e8, exclude_min=True, width=64))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_delayed_task_is_due_when_it_says_and_never_earlier(redis_server, delay):
    """F6, H6: the due time is the delay, rounded up to a millisecond, after the clock of Redis."""

    async def main():
        async with ConnectionManager(redis_server.url) as manager:
            queue = queue_on(manager)
            before = await manager.client.time()
            await queue.produce({"id": "t", "type": "x", "delay": delay})
            after = await manager.client.time()
            ((_, due),) = await manager.client.zrange(queue.keys.delayed, 0, -1, withscores=True)
            await queue.close()
            early, late = (seconds * 1000 + micros / 1000 for seconds, micros in (before, after))
            assert early + delay * 1000 - 0.01 <= due <= late + delay * 1000 + 2.01

    assert redis_server.ask(b"FLUSHALL") == b"+OK\r\n"
    asyncio.run(main())
