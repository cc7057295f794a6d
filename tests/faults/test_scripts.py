"""Group G of the fault catalogue, and B20, B22, D11: what every Lua script keeps whatever its keys and its server are.

The situations are in ``_script_cases.py``; a script without one, or with other keys than its header names, fails here.
Redis does not roll back: a script that fails in its middle keeps what it has written. So each must fail before.
"""

from __future__ import annotations

import asyncio
import binascii
import random
import re
import string
from pathlib import Path

import pytest

from orchestra import _keys
from orchestra._scripts import script
from orchestra.connections import ConnectionManager
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._script_cases import ALL, CASES, GROUP, HOUR, ME, OTHER, Case, World, cancel_call
from tests.reference import keyspace
from tests.reference.keyspace import Plain, ReplyError

LUA = Path(__file__).parents[2] / "orchestra" / "lua"
SCRIPTS = sorted(path.stem for path in LUA.glob("*.lua"))
REFUSED_WHEN_FULL = {"produce", "lock_acquire", "memory_append", "memory_commit", "memory_note", "breaker"}
REFUSED_WHEN_FULL |= {"produce_one", "produce_many", "gcra", "gcra_return", "gcra_set", "gcra_note", "gcra_refused"}
REFUSED_WHEN_FULL |= {"workflow_make", "workflow_save", "workflow_emit"}
"""Scripts that add for good. Every other one ends or moves something, which must go on when memory is full."""
COMMAND = re.compile(r"redis\.p?call\('([A-Z]+)'(?:, '(CREATE|DELCONSUMER)')?")

every_case = pytest.mark.parametrize(("name", "situation"), ALL, ids=[" ".join(case) for case in ALL])


@pytest.fixture
def client(redis_server, redis_url):
    with Plain(redis_server.socket) as connected:
        yield connected


@pytest.fixture
def world(client):
    return World(client)


def header_keys(name: str) -> tuple[int, bool]:
    """How many keys the header names, and whether the last may be repeated."""
    text = re.search(r"^-- KEYS:(.*?)^-- ARGV:", script(name).text, re.MULTILINE | re.DOTALL)[1]
    named = re.findall(r"(?:^|\||\n--)\s*(\d+)(?:-(\d+))?(…?)\s", text)
    return max(int(last or first) for first, last, _ in named), any(more for _, _, more in named)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_cases_with_the_keys_of_its_header(name, world):
    assert name in CASES, "a new script: give it a case, so that every fault below meets it"
    count, repeated = header_keys(name)
    for build in CASES[name].values():
        keys = build(World(world.client), 2).keys
        assert len(keys) == count or (repeated and len(keys) > count)


# -- G1, B20: a key of the wrong type


WRONG = {
    "string": ("SET", "text"),
    "list": ("RPUSH", "item"),
    "set": ("SADD", "member"),
    "hash": ("HSET", "field", "text"),
    "zset": ("ZADD", 1, "member"),
    "stream": ("XADD", "*", "field", "text"),
}


def right_types(world: World, keys: list[str]) -> dict[str, str]:
    """What each key is in the product, by its name."""
    k = world.keys
    types = dict.fromkeys([*k.streams, k.dlq], "stream") | dict.fromkeys([k.delayed, k.consumers, k.cancels], "zset")
    types |= dict.fromkeys([*k.dedup, *k.tokens, k.counters, k.bodies, k.cancelled_steps], "hash")
    types |= {_keys.memory("space", "tasks")[0]: "hash"}
    types |= dict.fromkeys([_keys.limit_settings(), _keys.limit_names(), _keys.breaker("tasks")], "hash")
    types |= dict.fromkeys([_keys.limit_refusals(), _keys.breaker_resets("tasks"), _keys.breaker("unknown")], "hash")
    types[_keys.memory("space", "tasks")[1]] = "list"
    types[_keys.memory_names("tasks")] = "zset"
    kinds = ("hash", "hash", "stream", "zset", "stream", "zset", "zset")
    types |= dict(zip(_keys.WorkflowKeys("tasks").scripted("w"), kinds, strict=True))
    return {key: types.get(key, "string") for key in keys}


@every_case
def test_a_key_of_the_wrong_type_changes_nothing(name, situation, client):
    """G1 B20: for each key and each wrong type, the script fails before its first write."""
    build = CASES[name][situation]
    types = right_types(World(client), build(World(client), 2).keys)
    for number, key in enumerate(types, 1):
        for wrong, (command, *value) in WRONG.items():
            if wrong == types[key]:
                continue
            world = World(client)
            case = build(world, 2)
            if number in case.replaced:
                continue
            client.many([("DEL", key), (command, key, *value)])
            before = keyspace.exact(client)
            reply = world.call(name, case)
            if number in case.untouched:
                assert client("TYPE", key) == wrong.encode()
                continue
            if name == "take" and not isinstance(reply, ReplyError):
                assert received(reply) == pending_in(world), "a lane that cannot be read hides nothing of the others"
                continue
            assert isinstance(reply, ReplyError), f"{key} as {wrong}: it answered {reply}"
            assert "WRONGTYPE" in str(reply), f"{key} as {wrong}: {reply}"
            assert keyspace.exact(client) == before, f"{key} as {wrong}: something was written before {reply}"


def received(reply):
    return {(lane, entry) for lane, entries in reply for entry, _ in entries}


def pending_in(world):
    lanes = [content for _, content in (keyspace.logical(world.client)[key] for key in world.keys.streams)]
    groups = [lane[1].get(GROUP, {}) if isinstance(lane, tuple) else {} for lane in lanes]
    return {(number, entry) for number, rows in enumerate(groups) for entry in rows}


# -- repeatability


def again_same(first, second):
    assert second == first


def again_same_era(first, second):
    assert second[:2] == first[:2]


def again_stale(first, second):
    assert first == []
    assert second


def again_nothing(first, second):
    assert second in (0, [])


AGAIN = {
    "produce everything": lambda first, second: check_expansion(first, second),
    "produce own ids": lambda first, second: check_equal(second, [b"=2:" + entry for entry in first]),
    "produce one": lambda first, second: check_equal(second, [b"!", b"2 " + first[0] + b" 1"]),
    "produce_many own ids": lambda first, second: check_equal(second, repeats_of(first)),
    "produce_many a token": again_same,
    "produce_one an own id": lambda first, second: check_equal(second, b"=2:" + first),
    "produce_one a token": again_same,
    "promote due in every lane": lambda first, second: check_equal((first[0], second[0]), (16, 0)),
    "take a favoured lane": again_nothing,
    "take every lane": again_nothing,  # the first reply is lost: those are ghosts now, and reconcile hands them out
    "complete the oldest": again_stale,
    "complete behind an older one": again_stale,
    "complete one by one, and again": again_stale,
    "complete_result the oldest": again_stale,
    "complete_result behind an older one": again_stale,
    "complete_result one by one, and again": again_stale,
    "cancelled held": again_stale,
    "hasten throttled": again_nothing,
    "retry with a delay": again_stale,
    "retry throttled": again_stale,
    "retry at once": again_stale,
    "dead_letter held": again_stale,
    "replay dead": again_nothing,
    "reclaim anybody's": lambda first, second: check_equal(second[:2], [[], []]),  # ghosts, as for take
    "reclaim a dead consumer's": lambda first, second: check_equal(second[:2], [[], []]),
    "reconcile ghosts": lambda first, second: check_equal(second, [[], []]),
    "renew held": again_same,
    "retire nothing held": again_same,
    "cancel waiting": lambda first, second: check_equal((first[0], second[0]), (b"cancelled", b"ended")),
    "cancel a step of a workflow": lambda first, second: check_equal((first[0], second[0]), (b"cancelled", b"ended")),
    "cancel delayed": lambda first, second: check_equal((first[0], second[0]), (b"cancelled", b"ended")),
    "cancel in flight": lambda first, second: check_equal((first[0], second[0]), (b"requested", b"requested")),
    "cancel unknown": lambda first, second: check_equal((first[0], second[0]), (b"requested", b"requested")),
    "gcra_return half of a lease": again_nothing,
    "gcra_note a name": again_same,
    "breaker forced open": lambda first, second: check_equal(second[:2], first[:2]),
    "breaker a probe that fails": lambda first, second: check_equal(second[:2], first[:2]),
    "breaker a probe that succeeds": lambda first, second: check_equal(second[:2], first[:2]),
    "breaker opening": again_same_era,
    "breaker permit": again_same,
    "breaker_look one that is open and one that nobody knows": lambda first, second: check_equal(second[1:], first[1:]),
    "lock_acquire free": again_same,
    "lock_acquire held by us": again_same,
    "lock_extend held": again_same,
    "lock_release held": again_nothing,
    "memory_append at its position": again_same,
    "memory_commit at its version": again_same,
    "memory_note a new name": again_same,
    "memory_forget names that were not written again": again_nothing,
    "workflow_make a plan": again_same,
    "workflow_move begin": again_same,
    "workflow_move finish before many": lambda first, second: again_repeated(first, second),
    "workflow_move finish the last": lambda first, second: again_repeated(first, second),
    "workflow_move grow": lambda first, second: again_repeated(first, second),
    "workflow_move signal": lambda first, second: check_equal(second[:2], [1, b"repeated"]),
    "workflow_save by hand": again_same,
    "workflow_due overdue": again_nothing,
}
"""What a script answers when it is called once more because its first reply was lost."""
NOT_REPEATABLE = {
    "gcra two cells": "consumes again: it errs towards refusing, as its header says",
    "workflow_emit an event": "tells the same twice, as its header says",
    "gcra_refused some": "counts again, for display, as its header says",
    "gcra_set another rate": "sets the same under a newer version, as its header says",
}


COUNTED = {"produce own ids": b"2", "produce_many own ids": b"2", "produce_one an own id": b"1"}
"""How many duplicates a second call of a script counts."""


def check_equal(one, other):
    assert one == other


def repeats_of(first):
    """What a repeat of tasks with ids of their own answers to a call that was answered with a record."""
    mark, record = first
    lanes, firsts, counts = (record.decode().split()[i::3] for i in range(3))
    assert (mark, {*lanes}) == (b"!", {"2"})
    return [b"=2:" + entry for entry in expanded(firsts, counts)]


def again_repeated(first, second):
    """Nothing more, and what may be sent is told again."""
    assert second[:2] == [1, b"repeated"]
    assert second[2:] == first[2:]


def check_expansion(first, second):
    mark, record = second
    assert mark == b"!"
    entries = [entry for entry in first if entry != b"z"]
    assert sum(int(count) for count in record.split()[2::3]) == len(entries)


@every_case
def test_a_script_may_be_repeated_after_a_lost_reply(name, situation, client):
    """C8 C9 G1: called twice with the same arguments, it leaves the state that one call leaves."""
    label = f"{name} {situation}"
    assert (label in AGAIN) != (label in NOT_REPEATABLE), "say what its second answer is"
    world = World(client)
    case = CASES[name][situation](world, 2)
    timed = (world.keys.consumers, world.keys.cancels, _keys.memory_names(world.queue))
    first = world.call(name, case)
    once = keyspace.logical(client, timed)
    second = world.call(name, case)
    twice = keyspace.logical(client, timed)
    if label in NOT_REPEATABLE:
        return
    AGAIN[label](first, second)
    if label in COUNTED:  # each is counted as the repeat that it is
        assert twice[world.keys.counters][1].pop(b"duplicates") == COUNTED[label]
    if label == "reclaim anybody's":  # each looks at the next rows
        assert once[world.keys.counters][1].pop(b"cursor:2") < twice[world.keys.counters][1].pop(b"cursor:2")
    assert twice == once


# -- the fence


FENCED = [
    case for case in ALL if case[0] in {"complete", "complete_result", "cancelled", "retry", "dead_letter", "renew"}
]


@pytest.mark.parametrize(("holder", "count"), [(OTHER, 2), (OTHER, 1), (ME, 2), (ME, 9)])
@pytest.mark.parametrize(("name", "situation"), FENCED, ids=[" ".join(case) for case in FENCED])
def test_what_was_handed_out_again_is_left_alone(name, situation, holder, count, client):
    """A5 A7 C8: to another consumer, or to the same one once more: the old delivery is STALE and changes nothing."""
    world = World(client)
    case = CASES[name][situation](world, 2)
    pending = sorted(entry for _, entry in pending_in(world))
    for entry in pending:
        held_again = situation == "one by one, and again" and entry in pending[2:]
        world.claim([entry], holder, "RETRYCOUNT", count + 5 * held_again)
    before = keyspace.exact(client)
    stale = world.call(name, case)
    assert sorted(stale) == sorted(set(pending) & {arg for arg in case.args if isinstance(arg, bytes)})
    assert keyspace.exact(client) == before


# -- G2: permissions that change under a running worker

FRAME = b"\x94\x01"
"""The first bytes of every frame here."""


def tasks_in(world: World) -> set[bytes]:
    """Every task that is somewhere: in a lane, delayed, or dead."""
    k = world.keys
    rows = world.client.many([("XRANGE", key, "-", "+") for key in (*k.streams, k.dlq)])
    frames = [fields[1] for entries in rows for _, fields in entries]
    frames += [body[: -1 if body[0] == 0x96 else None] for body in world.client("HVALS", k.bodies)]
    return {frame.partition(FRAME)[2] for frame in frames}


ENDS = {"complete", "complete_result", "cancelled", "cancel"}
"""Scripts after which a task is rightly gone."""


@pytest.fixture
def app(client, redis_server):
    """A second client, of a user whose permissions are changed while it is connected."""
    client("ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all")
    with Plain(redis_server.socket, "app", "secret") as connected:
        yield connected
    client("ACL", "DELUSER", "app")


@every_case
def test_a_permission_taken_away_loses_nothing(name, situation, client, app):
    """G2: without the right to one of its commands a script fails, and every task is still somewhere."""
    for command in sorted({"|".join(filter(None, found)) for found in COMMAND.findall(code_of(name))}):
        world = World(client)
        case = CASES[name][situation](world, 2)
        before = tasks_in(world)
        client("ACL", "SETUSER", "app", "+@all", f"-{command.lower()}")
        reply = world.call(name, case, app)
        if isinstance(reply, Exception):
            assert re.search("permission|can.t run this command", str(reply)), reply
        if name not in ENDS:
            assert before <= tasks_in(world), f"without {command}: {reply}"


# -- G3: a server whose memory is full


@every_case
def test_out_of_memory_refuses_new_work_and_nothing_else(name, situation, client):
    """G3 B8: a script that adds is refused before it writes; one that settles, moves or hands out works."""
    world = World(client)
    case = CASES[name][situation](world, 2)
    before = keyspace.exact(client)
    sha = client("SCRIPT", "LOAD", script(name).text)
    client("CONFIG", "SET", "maxmemory", 1)
    try:
        (reply,) = client.many([("EVALSHA", sha, len(case.keys), *case.keys, *case.args)])
    finally:
        client("CONFIG", "SET", "maxmemory", 0)
    if name in REFUSED_WHEN_FULL and situation != "held by us":
        assert str(reply).startswith("OOM"), reply
        assert keyspace.exact(client) == before
    else:
        assert not isinstance(reply, Exception), reply


# -- G4, G6: numbers


def test_large_numbers_keep_their_last_digit(client):
    """G4: times in microseconds and fences beyond 14 digits, which is what Lua prints, come out as they went in."""
    world = World(client)
    case = CASES["gcra"]["two cells"](world, 2)
    now, tat, *_ = world.call("gcra", case)
    assert int(client("GET", case.keys[1])) == tat > now > 10**15
    assert world.call("gcra", case)[1] == tat
    lock = CASES["lock_acquire"]["free"](world, 1)
    client("SET", lock.keys[1], 2**52 + 1)
    assert world.call("lock_acquire", lock) == [2**52 + 2, 0]
    assert world.call("lock_acquire", lock) == [2**52 + 2, 0]
    assert int(client("GET", lock.keys[1])) == 2**52 + 2


@pytest.mark.parametrize("sequence", [2**53 - 3, 2**53 + 1, 2**63 + 12_345])
def test_records_of_ids_beyond_what_a_double_counts(client, sequence):
    """G4: the record of many plain tasks of such a lane names each of them exactly."""
    world = World(client)
    lane, far = world.keys.lanes[2], 4_000_000_000_000
    client("XADD", lane, f"{far}-{sequence}", "t", world.frame(9))
    first = world.call("produce_many", CASES["produce_many"]["own ids"](world, 3))
    assert first == [b"!", f"2 {far}-{sequence + 1} 3".encode()]
    assert repeats_of(first) == [f"=2:{far}-{sequence + i}".encode() for i in (1, 2, 3)]


@pytest.mark.parametrize("sequence", [2**53 - 3, 2**53 + 1, 2**63 + 12_345])
def test_ids_beyond_what_a_double_counts(client, sequence):
    """G4: a lane whose last id has a huge sequence number is produced to and settled exactly."""
    world = World(client)
    lane = world.keys.lanes[2]
    far = 4_000_000_000_000  # ms: later than any clock, so Redis goes on counting the sequence number
    client("XADD", lane, f"{far}-{sequence}", "t", world.frame(9))
    case = CASES["produce"]["one"](world, 1)
    case.args[4:] = [2, "", world.frame(0)] * 3
    ids = world.call("produce", case)
    assert ids == [f"{far}-{sequence + i}".encode() for i in (1, 2, 3)]
    mark, record = world.call("produce", case)
    _, firsts, counts = (record.decode().split()[i::3] for i in range(3))
    assert mark == b"!"
    assert list(expanded(firsts, counts)) == ids
    held = world.read(4)
    settle = Case([lane, world.keys.counters], [GROUP, ME, 2, held[0], held[1], 2, *held[:2]])
    assert world.call("complete", settle) == []
    entries, groups = keyspace.logical(client)[lane][1]
    assert [entry for entry, _ in entries] == sorted(groups[GROUP]) == held[2:]


def expanded(firsts, counts):
    for first, count in zip(firsts, counts, strict=True):
        ms, _, start = first.partition("-")
        yield from (f"{ms}-{int(start) + i}".encode() for i in range(int(count)))


def test_no_number_is_printed_by_lua():
    """G4: tostring() gives 14 digits."""
    for name in SCRIPTS:
        assert "tostring" not in code_of(name), name


def code_of(name: str) -> str:
    return re.sub(r"--.*", "", script(name).text)


@every_case
def test_replies_hold_whole_numbers_and_no_holes(name, situation, client):
    """G6: a nil ends an array and a fraction is cut off, so replies contain neither."""

    def check(value):
        if isinstance(value, list):
            for item in value:
                check(item)
        else:
            assert isinstance(value, bytes | int), value

    world = World(client)
    check(world.call(name, CASES[name][situation](world, 3)))


# -- G5, G9, B22: size

MANY = 20_000


@every_case
def test_twenty_thousand_at_once(name, situation, client):
    """G5: no script unpacks more than Lua's stack holds, however large the batch is."""
    world = World(client)
    case = CASES[name][situation](world, MANY)
    reply = world.call(name, case)
    assert not isinstance(reply, Exception), reply
    if AGAIN.get(f"{name} {situation}") is again_stale:
        assert reply == [], "all were settled"


HUGE = 200_000
FILL = """local n = tonumber(ARGV[1])
for i = 1, n do
  local member = 'm' .. string.format('%d', i)
  redis.call('XADD', KEYS[1], '*', 't', 'x')
  redis.call('ZADD', KEYS[2], i, member)
  redis.call('HSET', KEYS[3], member, ARGV[4])
  if i <= 100000 then redis.call('ZADD', KEYS[4], i, member) end
  if i <= 2000 then redis.call('ZADD', KEYS[5], i, member) end
end
redis.call('XREADGROUP', 'GROUP', ARGV[2], ARGV[3], 'COUNT', n, 'STREAMS', KEYS[1], '>')"""


@pytest.fixture
def huge(client):
    """200,000 tasks in flight of another consumer, as many delayed, 100,000 cancel marks, 2,000 consumers."""
    world = World(client)
    k = world.keys
    keys = (k.lanes[2], k.delayed, k.bodies, k.cancels, k.consumers)
    client("EVAL", FILL, len(keys), *keys, HUGE, GROUP, OTHER, b"\x95\x02\x00\x00\x00\xa1x")
    return world


def milliseconds(client: Plain, work) -> dict[str, float]:
    """What the server spent on each command that ``work`` called once."""
    client("CONFIG", "RESETSTAT")
    work()
    return milliseconds_so_far(client)


def milliseconds_so_far(client: Plain) -> dict[str, float]:
    """Mean milliseconds of each command since the statistics were reset."""
    stats = client("INFO", "commandstats").decode()
    found = re.findall(r"^cmdstat_(\w+):calls=(\d+),usec=(\d+)", stats, re.MULTILINE)
    return {name: int(usec) / int(calls) / 1000 for name, calls, usec in found}


def best_ms(world: World, name: str, make, times: int = 7) -> float:
    """Least milliseconds of several calls: what other work on the machine cannot fake."""
    took = []
    for number in range(times):
        case = make(number)
        replies = []
        took.append(milliseconds(world.client, lambda: replies.append(world.call(name, case)))["eval"])
        assert not isinstance(replies[0], Exception), replies
    return min(took)


def test_a_huge_queue_does_not_make_a_script_slow(huge, client):
    """G9 B22: with 200,000 in flight and 200,000 delayed, the time of each call is bounded by its batch."""
    k = huge.keys
    promote = Case([*k.streams, k.delayed, k.bodies, k.counters, k.consumers, k.cancels], [200, ME, 99_990])
    assert best_ms(huge, "promote", lambda _: promote) < 10
    assert client("ZCARD", k.delayed) == HUGE - 7 * 200
    reclaim = Case([k.lanes[2], k.counters], [GROUP, ME, 2, HOUR, 100, 100, "", 0, 0])
    assert best_ms(huge, "reclaim", lambda _: reclaim) < 5
    assert client("HEXISTS", k.counters, "cursor:2"), "the next call goes on behind the rows that this one has seen"
    ids = [entry for entry, _ in client("XRANGE", k.lanes[2], "-", "+", "COUNT", 500)]
    complete = Case([k.lanes[2], k.counters], [GROUP, ME, 500, ids[0], ids[-1], 500, *ids])
    assert best_ms(huge, "complete", lambda _: complete) < 10
    assert best_ms(huge, "cancel", lambda n: cancel_call(huge, f"nobody{n}")) < 5
    assert best_ms(huge, "cancel", lambda n: cancel_call(huge, f"m{HUGE - n}")) < 5
    assert client("ZCARD", k.delayed) == HUGE - 7 * 200 - 7, "those that were delayed are gone"
    assert best_ms(huge, "retire", lambda _: Case([*k.streams, k.consumers], [GROUP, "m1"])) < 5


def test_the_statistics_of_a_huge_queue_cost_nothing(huge, client, redis_url):
    """B22: queue.stats() and get_queue_depth() read lengths, not entries."""

    async def look():
        async with ConnectionManager(redis_url) as manager:
            queue = RedisStreamTaskQueue("tasks", GROUP, manager=manager)
            took = []
            for _ in range(5):
                client("CONFIG", "RESETSTAT")
                stats = await queue.stats()
                assert await queue.get_queue_depth() == 2 * HUGE
                took.append(milliseconds_so_far(client))
            await queue.close()
            return stats, took

    stats, took = asyncio.run(look())
    assert (stats.in_flight[2], stats.delayed) == (HUGE, HUGE)
    assert {"xlen", "xpending", "zcard", "hgetall"} <= set(took[0])
    assert max(min(calls[name] for calls in took) for name in took[-1] if all(name in calls for calls in took)) < 2


# -- G7, D11: key names


def test_no_key_is_named_by_a_script():
    """G7: what stands where a key belongs comes from KEYS; no script puts a name together."""
    place = re.compile(
        r"redis\.p?call\('(?!TIME|PUBLISH)([A-Z]+)',\s*('CREATE'|'DELCONSUMER'|'GROUP')?,?\s*([\w.\[\]+ ]+)"
    )
    for name in SCRIPTS:
        assert "orc:" not in code_of(name), name
        for command, _, used in place.findall(code_of(name)):
            named = "KEYS[" in used or re.fullmatch(r"[a-z_]+", used.strip())
            assert ".." not in used, f"{name}: {command} {used}"
            assert named or command == "XREADGROUP", f"{name}: {command} {used}"


@every_case
def test_a_script_needs_no_key_but_its_own(name, situation, client, app):
    """G7: under a user who may touch nothing but the keys of the call, it answers, and leaves the same keys."""
    left = []
    for restricted in (False, True):
        world = World(client)
        case = CASES[name][situation](world, 2)
        client("ACL", "SETUSER", "app", "resetkeys", *([f"~{key}" for key in case.keys] if restricted else ["~*"]))
        reply = world.call(name, case, app)
        assert not isinstance(reply, Exception), reply
        left.append({key: has_ttl for key, (has_ttl, _) in keyspace.logical(client).items()})
    assert left[0] == left[1]


def slot(key: str) -> int:
    """The Cluster slot of a key: CRC16 (XMODEM) of its hash tag."""
    start, end = key.find("{"), key.find("}", key.find("{") + 1)
    tagged = key[start + 1 : end] if start >= 0 and end > start + 1 else key
    return binascii.crc_hqx(tagged.encode(), 0) % 16384


def test_slots_are_computed_as_redis_does():
    """D11: the vectors of the Cluster specification."""
    assert binascii.crc_hqx(b"123456789", 0) == 0x31C3
    assert slot("{user1000}.following") == slot("user1000") == slot("{user1000}.followers") != slot("other")


@every_case
def test_all_keys_of_a_script_are_in_one_slot(name, situation, client):
    """D11: whatever the queue, the lock or the document is called."""
    letters = string.ascii_letters + string.digits + "._-"
    rng = random.Random(f"{name} {situation}")
    for _ in range(5):
        world = World(client, "".join(rng.choices(letters, k=rng.randint(1, 64))))
        case = CASES[name][situation](world, 2)
        assert len({slot(key) for key in case.keys}) == 1, case.keys


# -- G8: the script cache


def test_the_script_cache_does_not_grow_with_the_calls(client):
    """G8: the text of a script never depends on its arguments, so the server caches each once."""
    client("SCRIPT", "FLUSH")
    for count in (1, 2, 5):
        for name, situation in ALL:
            world = World(client, f"q{count}")
            world.call(name, CASES[name][situation](world, count))
    cached = int(re.search(rb"number_of_cached_scripts:(\d+)", client("INFO", "memory"))[1])
    assert cached == len(SCRIPTS) + 1, "each once, and the one that fills a world"
