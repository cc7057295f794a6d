"""MemoryManager and the documents underneath: the same contract on Redis and in this process."""

from __future__ import annotations

import asyncio

import pytest

from orchestra import _keys, _scripts
from orchestra._documents import ABSENT, ANY, LocalStore, RedisStore
from orchestra.connections import ConnectionManager
from orchestra.errors import (
    ConfigurationError,
    CorruptEntryError,
    InvalidTaskError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    TaskTooLargeError,
)
from orchestra.memory import MemoryManager, get_memory_manager


@pytest.fixture(params=["redis", "memory"])
def place(request):
    """What a MemoryManager is given: a connected manager, or the address of the twin."""
    return request.getfixturevalue("manager") if request.param == "redis" else "memory:"


@pytest.fixture
def memory(place):
    return MemoryManager(place, namespace="t")


async def test_set_get_delete(memory):
    assert await memory.get("a") is None
    assert await memory.get("a", 7) == 7
    assert await memory.set("a", {"x": [1, 2.5, None, "ü", b"\x00"]}) == 1
    assert await memory.set("a", {"x": 2}) == 2
    assert await memory.get("a", 7) == {"x": 2}
    assert await memory.delete("a") is True
    assert await memory.delete("a") is False
    assert await memory.get("a", 7) == 7


async def test_a_stored_none_is_not_a_missing_value(memory):
    await memory.set("a", None)
    assert await memory.get("a", "missing") is None


async def test_get_many_returns_what_exists(memory):
    await memory.set("a", 1)
    await memory.set("c", None)
    assert await memory.get_many(["a", "b", "c"]) == {"a": 1, "c": None}
    assert await memory.get_many([]) == {}


async def test_namespaces_and_confusable_names_do_not_meet(place):
    pairs = [("a", "b.c"), ("a.b", "c"), ("a", "b"), ("a", "b}:v"), ("a", "{b}"), ("a", "b:c")]
    for number, (namespace, key) in enumerate(pairs):
        await MemoryManager(place, namespace=namespace).set(key, number)
    for number, (namespace, key) in enumerate(pairs):
        assert await MemoryManager(place, namespace=namespace).get(key) == number


async def test_what_was_stored_is_a_copy(memory):
    value = {"list": [1]}
    await memory.set("a", value)
    value["list"].append(2)
    (await memory.get("a"))["list"].append(3)
    assert await memory.get("a") == {"list": [1]}


async def test_update_starts_from_the_default_and_returns_the_new_value(memory):
    assert await memory.update("n", lambda n: n + 1, 41) == 42
    assert await memory.update("n", lambda n: n + 1, 41) == 43
    assert await memory.get("n") == 43


async def test_no_update_is_lost_between_concurrent_writers(place):
    writers = [MemoryManager(place, namespace="t") for _ in range(8)]

    async def count(memory):
        for _ in range(10):
            await memory.update("n", lambda n: n + 1, 0)

    await asyncio.gather(*map(count, writers))
    assert await writers[0].get("n") == 80


async def test_update_runs_again_when_somebody_wrote_in_between(memory):
    await memory.set("a", ["first"])
    store, seen = await memory.store(), []
    read = store.read

    async def read_then_lose(keys, fields=()):
        found = await read(keys, fields)
        if not seen:
            await store.commit(keys[0], ANY, {"d": memory.encode("rival", ["rival"])})
        return found

    store.read = read_then_lose
    assert await memory.update("a", lambda v: seen.append(v) or [*v, "mine"]) == ["rival", "mine"]
    assert seen == [["first"], ["rival"]]


async def test_update_gives_up_after_64_lost_races(memory, monkeypatch):
    monkeypatch.setattr("orchestra.memory.pause_after_conflict", _no_pause)
    store, calls = await memory.store(), []
    read = store.read

    async def always_lose(keys, fields=()):
        found = await read(keys, fields)
        await store.commit(keys[0], ANY, {"d": memory.encode("rival", len(calls))})
        return found

    store.read = always_lose
    with pytest.raises(StoreError, match="64 times"):
        await memory.update("a", lambda v: calls.append(v) or "mine")
    assert len(calls) == 64
    assert await memory.get("a") == 63


async def _no_pause(attempt):
    await asyncio.sleep(0)


async def test_update_that_raises_changes_nothing(memory):
    await memory.set("a", 1)
    with pytest.raises(ZeroDivisionError):
        await memory.update("a", lambda v: v / 0)
    assert await memory.get("a") == 1


async def test_a_value_made_again_after_deletion_does_not_pass_for_the_old_one(memory):
    store = await memory.store()
    first = await store.commit("orc:{doc}:x", ABSENT, {"d": b"1"}, ttl_ms=0)
    await store.delete("orc:{doc}:x")
    again = await store.commit("orc:{doc}:x", ABSENT, {"d": b"2"}, ttl_ms=0)
    assert first.version == again.version == 1
    assert not (await store.commit("orc:{doc}:x", first.token, {"d": b"3"})).done
    assert (await store.commit("orc:{doc}:x", again.token, {"d": b"4"})).done


async def test_commit_writes_and_removes_fields_in_one_step(memory):
    store, key = await memory.store(), "orc:{doc}:y"
    first = await store.commit(key, ABSENT, {"a": b"1", "b": b"2"}, ttl_ms=0)
    refused = await store.commit(key, ABSENT, {"a": b"9"}, removed=["b"])
    assert (refused.done, refused.version) == (False, 1)
    assert (await store.commit(key, first.token, {"c": b"3"}, removed=["a", "absent"])).done
    (document,) = await store.read([key])
    assert {name: document[name] for name in document if name not in "kv"} == {"b": b"2", "c": b"3"}
    assert document["v"] == b"2"


async def test_a_document_of_30000_fields_is_one_commit(memory):
    store, key = await memory.store(), "orc:{doc}:big"
    fields = {f"f{n}": b"%d" % n for n in range(30_000)}
    first = await store.commit(key, ABSENT, fields, ttl_ms=0)
    assert first.done
    assert (await store.commit(key, first.token, {}, removed=[f"f{n}" for n in range(1, 30_000)])).done
    (document,) = await store.read([key])
    assert document.keys() == {"k", "v", "f0"}


async def test_a_commit_repeated_after_a_lost_reply_changes_nothing(manager):
    key, args = "orc:{doc}:z", [b"", b"token-1", 0, 1, "a", b"1"]
    assert await _scripts.call(manager.client, "memory_commit", [key], args) == [1, 1]
    assert await _scripts.call(manager.client, "memory_commit", [key], args) == [1, 1]
    assert await manager.client.hget(key, "v") == b"1"
    late = [b"token-1", b"token-2", 0, 1, "a", b"2"]
    assert await _scripts.call(manager.client, "memory_commit", [key], late) == [1, 2]
    assert await _scripts.call(manager.client, "memory_commit", [key], args) == [0, 2]


async def test_a_log_keeps_its_order_and_is_read_in_pages(memory):
    assert await memory.read_log("log") == []
    for n in range(5):
        assert await memory.append("log", {"n": n}) == n + 1
    assert await memory.read_log("log") == [{"n": n} for n in range(5)]
    assert await memory.read_log("log", 1, 2) == [{"n": 1}, {"n": 2}]
    assert await memory.read_log("log", 5) == []


async def test_append_at_a_position_may_be_repeated(memory):
    assert await memory.append("log", "a", at=0) == 1
    assert await memory.append("log", "b", at=1) == 2
    assert await memory.append("log", "a", at=0) == 2
    assert await memory.append("log", "b", at=1) == 2
    with pytest.raises(StoreError, match="has 2 entries, so position 1"):
        await memory.append("log", "other", at=1)
    with pytest.raises(StoreError, match="position 3"):
        await memory.append("log", "too far", at=3)
    assert await memory.read_log("log") == ["a", "b"]


async def test_a_full_log_refuses(place):
    memory = MemoryManager(place, namespace="t", max_entries=2)
    await memory.append("log", 1)
    await memory.append("log", 2)
    with pytest.raises(StoreFullError, match="limit of 2 entries"):
        await memory.append("log", 3)
    assert await memory.append("log", 2, at=1) == 2
    assert await memory.read_log("log") == [1, 2]


async def test_value_and_log_of_one_key_are_apart_and_deleted_together(memory):
    await memory.set("a", 1)
    await memory.append("a", 2)
    assert await memory.get("a") == 1
    assert await memory.read_log("a") == [2]
    assert await memory.delete("a") is True
    assert await memory.read_log("a") == []


async def test_too_large_names_the_key_and_the_limit_and_keeps_the_old_value(place):
    memory = MemoryManager(place, namespace="t", max_bytes=100)
    await memory.set("a", "x" * 90)
    with pytest.raises(TaskTooLargeError, match=r"memory key 'a' .* 100 bytes") as caught:
        await memory.set("a", "x" * 100)
    assert caught.value.limit == 100
    with pytest.raises(TaskTooLargeError, match="entry of log 'a'"):
        await memory.append("a", "x" * 100)
    with pytest.raises(TaskTooLargeError):
        await memory.update("a", lambda v: v * 2)
    assert await memory.get("a") == "x" * 90


async def test_a_value_that_cannot_travel_is_refused(memory):
    with pytest.raises(InvalidTaskError):
        await memory.set("a", {"x": object()})
    assert await memory.get("a") is None


@pytest.mark.parametrize("key", ["", "a b", "ä", "x" * 129, 5, None])
async def test_bad_keys_are_refused_before_redis_is_touched(key):
    memory = MemoryManager("unix:///nowhere/at/all.sock")
    calls = (memory.get, memory.delete, memory.read_log, lambda k: memory.set(k, 1), lambda k: memory.append(k, 1))
    for call in (*calls, lambda k: memory.update(k, lambda v: v)):
        with pytest.raises(ConfigurationError, match="memory key"):
            await call(key)


@pytest.mark.parametrize(
    "settings",
    [
        {"namespace": "a:b"},
        {"namespace": ""},
        {"ttl": 0},
        {"ttl": -1},
        {"ttl": float("nan")},
        {"ttl": float("inf")},
        {"ttl": True},
        {"max_bytes": 0},
        {"max_bytes": 1.5},
        {"max_entries": 0},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigurationError):
        MemoryManager("memory:", **settings)


async def test_time_to_live_on_redis(manager):
    memory = MemoryManager(manager, namespace="t", ttl=100)
    value, log = _keys.memory("t", "a")
    await memory.set("a", 1)
    await memory.append("a", 1)
    assert 99_000 < await manager.client.pttl(value) <= 100_000
    assert 99_000 < await manager.client.pttl(log) <= 100_000
    await memory.set("a", 1, ttl=None)
    await memory.append("a", 1, ttl=None)
    assert await manager.client.pttl(value) == await manager.client.pttl(log) == -1
    await memory.update("a", lambda v: v, ttl=5)
    assert 4_000 < await manager.client.pttl(value) <= 5_000


async def test_time_to_live_in_this_process():
    now = 0.0
    store = LocalStore(lambda: now)
    first = await store.commit("a", ABSENT, {"d": b"1"}, ttl_ms=1000)
    await store.commit("b", ABSENT, {"d": b"1"}, ttl_ms=1000)
    await store.append("l", b"1", at=-1, limit=9, ttl_ms=1000)
    now = 0.9
    kept = await store.commit("a", first.token, {"d": b"2"}, ttl_ms=1000)
    now = 1.0
    assert await store.read(["a", "b"], ["d"]) == [{"d": b"2"}, {}]
    assert await store.entries("l", 0, 9) == []
    await store.commit("a", kept.token, {"d": b"3"}, ttl_ms=0)
    now = 1e9
    assert await store.read(["a"], ["d"]) == [{"d": b"3"}]


async def test_damaged_bytes_are_a_typed_error_and_stay(manager):
    memory = MemoryManager(manager, namespace="t")
    await manager.client.hset(_keys.memory("t", "a")[0], mapping={"d": b"\xc1\xff", "k": b"x", "v": b"1"})
    with pytest.raises(CorruptEntryError):
        await memory.get("a")
    with pytest.raises(CorruptEntryError):
        await memory.update("a", lambda v: v)
    assert await manager.client.hget(_keys.memory("t", "a")[0], "d") == b"\xc1\xff"


async def test_a_key_of_another_kind_is_a_store_error(manager):
    memory = MemoryManager(manager, namespace="t")
    await manager.client.set(_keys.memory("t", "a")[0], "text")
    with pytest.raises(StoreError, match="WRONGTYPE"):
        await memory.set("a", 1)


async def test_redis_gone_is_store_unavailable(make_server):
    server = make_server()
    async with ConnectionManager(server.url, timeout=1.0, connect_timeout=1.0) as manager:
        memory = MemoryManager(manager, namespace="t")
        await memory.set("a", 1)
        server.kill()
        for call in (memory.get("a"), memory.set("a", 1), memory.append("a", 1), memory.delete("a")):
            with pytest.raises(StoreUnavailableError):
                await call


async def test_scripts_survive_a_script_flush(manager):
    memory = MemoryManager(manager, namespace="t")
    await memory.set("a", 1)
    await manager.client.script_flush()
    assert await memory.set("a", 2) == 2


async def test_the_shared_manager_is_the_same_awaited_or_not(redis_url):
    from orchestra.connections import get_connection_manager

    memory = get_memory_manager()
    assert await get_memory_manager() is memory
    assert get_memory_manager("other") is not memory
    assert isinstance(await memory.store(), RedisStore)
    await get_connection_manager().close()


async def test_managers_of_the_memory_address_share_one_store():
    await MemoryManager("memory:").set("a", 1)
    assert await MemoryManager("memory:").get("a") == 1
    assert await MemoryManager("memory:", namespace="other").get("a") is None
