"""A single task, which has a script of its own: lost replies, forgotten scripts, buckets that change, both scripts mixed."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestra import telemetry
from orchestra._queue.produce import TOKEN_WINDOW_MS
from orchestra._scripts import Bound, Script
from orchestra.connections import ConnectionManager
from orchestra.errors import StoreError, StreamExhaustedError
from orchestra.serialization import encode_task
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._script_cases import HOUR, Case, World
from tests.faults.proxy import Proxy
from tests.reference import keyspace
from tests.reference.keyspace import Plain

LAST = 2**64 - 1


def queue_on(manager, **options):
    return RedisStreamTaskQueue("tasks", "workers", manager=manager, **options)


async def calls_of(manager, name):
    """How many calls of scripts the server has counted under ``name``."""
    stats = await manager.client.info("commandstats")
    return stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]


# -- through the product


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("task", [{"id": "own", "type": "x"}, {"type": "x"}], ids=["own id", "generated id"])
async def test_a_lost_reply_adds_nothing_twice(redis_url, task, how):
    """A17: the server has added the task, the answer never came; the repeat gets the id of the first."""
    told = []
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url) as manager:
        queue = queue_on(manager)
        await queue.produce({"type": "x", "delay": 3600})
        lost = proxy.drop_reply("produce_one", 1, how)
        detach = telemetry.attach(lambda name, facts, about: told.append(facts), "queue.produced")
        try:
            message_id = await queue.produce(task)
        finally:
            detach()
        await lost.wait()
        (entry,) = await manager.client.xrange(queue.keys.lanes[2])
        assert message_id == f"2:{entry[0].decode()}"
        assert proxy.replies["produce_one"] >= 1, "the repeat was the same call"
        repeats = int("id" in task)
        assert [(facts["count"], facts["duplicates"]) for facts in told] == [(1, repeats)]
        assert (await queue.stats()).counters == {"produced": 2} | ({"duplicates": 1} if repeats else {})
        await queue.close()


async def test_a_server_that_forgot_the_script_is_given_it_again(manager):
    queue = queue_on(manager)
    first = await queue.produce({"id": "t", "type": "x"})
    await manager.client.script_flush()
    assert await queue.produce({"id": "t", "type": "x"}) == first
    await manager.client.script_flush()
    assert await queue.produce({"type": "x", "priority": 0}) != first
    assert (await queue.stats()).counters == {"produced": 2, "duplicates": 1}
    await queue.close()


@pytest.mark.parametrize("own", [True, False])
async def test_a_lane_that_has_used_up_its_ids_says_so(manager, own):
    """B21: the error is the same as from the script for many, and nothing is written."""
    queue = queue_on(manager)
    await queue.produce({"id": "before", "type": "x", "priority": 1})
    await manager.client.xadd(queue.keys.lanes[2], {"t": "foreign"}, id=f"{LAST}-{LAST}")
    before = (await queue.stats()).counters, await manager.client.keys("*")
    with pytest.raises(StreamExhaustedError, match="used up its stream ids.*DEL that stream"):
        await queue.produce({"type": "x"} | ({"id": "t"} if own else {}))
    assert ((await queue.stats()).counters, await manager.client.keys("*")) == before
    await manager.client.delete(queue.keys.lanes[2])
    assert await queue.produce({"id": "t", "type": "x"})
    await queue.close()


async def test_a_key_of_the_wrong_type_is_named_and_nothing_is_written(manager):
    """B20: a typed error through the product; what the script leaves is in test_scripts.py."""
    queue = queue_on(manager)
    await queue.produce({"id": "before", "type": "x"})
    await manager.client.delete(queue.keys.counters)
    await manager.client.set(queue.keys.counters, "foreign")
    with pytest.raises(StoreError, match="WRONGTYPE"):
        await queue.produce({"id": "t", "type": "x"})
    assert await manager.client.xlen(queue.keys.lanes[2]) == 1
    await queue.close()


async def test_limits_and_delays_are_left_to_the_script_that_looks_at_them(manager, redis_url):
    """Under a limit, or with a delay, a single task is sent as before; without, by eight commands and no more."""
    limited, plain = queue_on(manager, max_length=1000), queue_on(manager)
    for queue in (limited, plain):
        await queue.produce({"type": "x"})
    await manager.client.config_resetstat()
    await plain.produce({"id": "t", "type": "x"})
    assert [await calls_of(manager, name) for name in ("xadd", "hget", "xlen", "zcard", "exists")] == [1, 2, 0, 0, 0]
    await plain.produce_many([{"id": "w", "type": "x", "priority": 3}])
    await plain.submit([{"type": "x"}], want_results=True)
    assert [await calls_of(manager, name) for name in ("xadd", "hget", "xlen")] == [3, 6, 0], "one of many is one too"
    await limited.produce({"id": "u", "type": "x"})
    assert await calls_of(manager, "zcard") == 1
    assert await plain.produce({"id": "v", "type": "x", "delay": 60}) == "z:v"
    assert await plain.produce({"id": "v", "type": "x"}) == "z:v", "a delayed task is known to the script for one"
    for queue in (limited, plain):
        await queue.close()


IDS = st.sampled_from(("a", "b", "c"))
CALLS = st.lists(
    st.tuples(st.integers(0, 1), st.one_of(IDS, st.lists(IDS, min_size=1, max_size=4)), st.sampled_from((0, 0, 60))),
    min_size=1,
    max_size=12,
)


@given(CALLS, st.integers(0, 3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_scripts_together_add_each_id_once(redis_server, calls, lane):
    """E1: whatever mix of produce and produce_many sends an id, in turn or at once: one entry, and one answer for all."""

    async def main():
        async with ConnectionManager(redis_server.url) as manager:
            await manager.client.flushall()
            queues = [queue_on(manager), queue_on(manager)]

            async def send(who, ids, delay):
                tasks = [{"id": i, "type": "x", "priority": lane, "delay": delay} for i in ids]
                if isinstance(ids, str):
                    return [(ids, await queues[who].produce(tasks[0]))]
                return list(zip(ids, await queues[who].produce_many(tasks), strict=True))

            half = len(calls) // 2
            answers = [await send(*call) for call in calls[:half]]
            answers += await asyncio.gather(*(send(*call) for call in calls[half:]))
            said = {pair for some in answers for pair in some}
            names = {i for i, _ in said}
            assert len(said) == len(names), f"an id has two message ids: {said}"
            stats = await queues[0].stats()
            assert stats.live == len(names)
            sent = sum(len(some) for some in answers)
            assert stats.counters.get("duplicates", 0) == sent - len(names)
            for queue in queues:
                await queue.close()

    asyncio.run(main())


# -- the script alone


@pytest.fixture
def world(redis_server, redis_url):
    with Plain(redis_server.socket) as client:
        yield World(client)


def one(world, kind, name, window):
    buckets = world.keys.dedup if kind == "id" else world.keys.tokens
    return Case([world.keys.lanes[2], *buckets, world.keys.counters], [window, 2, kind, name, world.frame(0)])


def clock(world):
    seconds, micros = map(int, world.client("TIME"))
    return seconds * 1000 + micros // 1000


@pytest.mark.parametrize("kind", ["id", "token"])
def test_a_name_of_the_bucket_before_is_known(world, kind):
    """E3: as if a window had begun since; a token's repeat sets when its bucket ends, which is what WAIT has to cover."""
    window, keys = 1000 * HOUR, world.keys.dedup if kind == "id" else world.keys.tokens
    case = one(world, kind, "name", window)
    first = world.call("produce_one", case)
    (key,) = (key for key in keys if world.client("EXISTS", key))
    (other,) = {*keys} - {key}
    world.client("RENAME", key, other)
    world.client("PERSIST", other)
    again = world.call("produce_one", case)
    assert again == (b"=2:" + first if kind == "id" else first)
    assert world.client("XLEN", world.keys.lanes[2]) == 1
    ends = (clock(world) // window + 1) * window
    assert world.client("PEXPIRETIME", other) == (-1 if kind == "id" else ends)
    assert not world.client("EXISTS", key), "nothing is made"


@pytest.mark.parametrize("kind", ["id", "token"])
def test_a_bucket_ends_when_the_one_after_the_next_takes_its_key(world, kind):
    window = 1000 * HOUR
    case = one(world, kind, "name", window)
    world.call("produce_one", case)
    k = clock(world) // window
    assert world.client("PEXPIRETIME", case.keys[1 + k % 2]) == (k + 2) * window
    assert not world.client("EXISTS", case.keys[1 + (k + 1) % 2])


@pytest.mark.parametrize("first", ["produce", "produce_one"])
@pytest.mark.parametrize("kind", ["id", "token"])
def test_each_script_leaves_what_the_other_would_have(world, kind, first):
    """The records are the same to the byte, so each heeds those of the other, and a release may change between them."""
    k = world.keys
    keys = [*k.lanes, k.delayed, k.bodies, *k.dedup, *k.tokens, k.counters, k.dlq, *k.fronts]
    many = Case(keys, [0, HOUR, 60_000, "" if kind == "id" else "n", 2, "in" if kind == "id" else "", world.frame(0)])
    window = HOUR if kind == "id" else TOKEN_WINDOW_MS
    calls = {"produce": many, "produce_one": one(world, kind, "n", window)}
    second = ({*calls} - {first}).pop()
    world.call(first, calls[first])
    before = keyspace.logical(world.client)
    ((entry, _),) = world.client("XRANGE", k.lanes[2], "-", "+")
    answer = world.call(second, calls[second])
    told = answer if second == "produce_one" else answer[0]
    if kind == "id":
        assert told == b"=2:" + entry
    else:
        assert told == (entry if second == "produce_one" else b"!")
        assert told != b"!" or answer[1] == b"2 " + entry + b" 1"
    after = keyspace.logical(world.client)
    after[k.counters][1].pop(b"duplicates", None)
    assert after == before


# -- the call as bytes


args = st.lists(st.one_of(st.text(max_size=20), st.binary(max_size=300), st.integers()), min_size=1, max_size=9)


@given(st.lists(st.text(max_size=30), max_size=5), args, args)
def test_what_is_packed_beforehand_makes_the_same_bytes(keys, fixed, more):
    script = Script("any", "return 1")
    bound = Bound(script, keys, fixed, len(more))
    assert bound.pack((), more) == script.pack(keys, [*fixed, *more])
    assert bound.pack_with_text((), more) == script.pack_with_text(keys, [*fixed, *more])
    assert (bound.sha, bound.name) == (script.sha, script.name)


def test_a_frame_with_line_ends_is_packed_as_it_is():
    frame = encode_task({"type": "x", "input": "$3\r\n*1\r\n"}).frame
    script = Script("any", "return 1")
    assert Bound(script, ["k"], [1], 1).pack((), [frame]) == script.pack(["k"], [1, frame])
