"""Scopes, versions, following and listing: the same on Redis and in this process."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra import _documents, _keys
from orchestra._documents import LocalStore
from orchestra.connections import get_connection_manager
from orchestra.errors import ConfigurationError, StoreFullError
from orchestra.memory import MemoryManager, Versioned, get_memory_manager


@pytest.fixture(params=["redis", "memory"])
def place(request):
    return request.getfixturevalue("manager") if request.param == "redis" else "memory:"


@pytest.fixture
def memory(place):
    return MemoryManager(place, namespace="v")


# -- scopes


async def test_scopes_are_apart_from_each_other_and_from_the_namespace(memory):
    views = [memory, memory.scoped("a"), memory.scoped("b"), memory.scoped("a").scoped("b"), memory.scoped("1:a")]
    views += [memory.scoped("a/1:b"), memory.scoped("a").scoped("b").scoped("k")]
    for number, view in enumerate(views):
        await view.set("k", number)
        await view.append("k", number)
    assert [await view.get("k") for view in views] == list(range(len(views)))
    assert [await view.read_log("k") for view in views] == [[n] for n in range(len(views))]
    assert await views[1].delete("k")
    assert [await view.get("k") for view in views] == [0, None, 2, 3, 4, 5, 6]
    assert await memory.get("1:a/k") is None


idents = st.text("ab1:/}{.", min_size=1, max_size=4)


@given(st.lists(idents, max_size=3), idents, st.lists(idents, max_size=3), idents)
def test_two_paths_of_scopes_never_give_the_same_key(parts, name, others, other):
    def key(path: list[str], end: str) -> tuple[str, str]:
        scope = ""
        for part in path:
            scope = _keys.memory_scope(scope, part)
        return _keys.memory("n", end, scope)

    assert (key(parts, name) == key(others, other)) == ((parts, name) == (others, other))


async def test_a_view_has_the_limits_of_its_manager_and_a_ttl_of_its_own(place, memory):
    small = MemoryManager(place, namespace="v", max_bytes=100, max_entries=2, ttl=500).scoped("s", ttl=7)
    assert (small.max_bytes, small.max_entries, small.ttl, small.namespace) == (100, 2, 7, "v")
    assert memory.scoped("s").ttl == memory.ttl
    assert memory.scoped("s", ttl=None).ttl is None
    await small.append("log", 1)
    await small.append("log", 2)
    with pytest.raises(StoreFullError):
        await small.append("log", 3)
    with pytest.raises(ConfigurationError, match="memory scope must be 1 to 128"):
        memory.scoped("two words")
    with pytest.raises(ConfigurationError, match="ttl must be a number"):
        memory.scoped("s", ttl=0)


async def test_the_time_to_live_of_a_view_counts(manager):
    view = MemoryManager(manager, namespace="v").scoped("s", ttl=50)
    await view.set("k", 1)
    assert 40_000 < await manager.client.pttl(_keys.memory("v", "k", view.scope)[0]) <= 50_000


# -- versions


async def test_compare_and_set(memory):
    absent = await memory.get_versioned("k", "none")
    assert absent == Versioned("none", 0, b"")
    first = await memory.compare_and_set("k", "one", absent)
    assert (first.value, first.version) == ("one", 1)
    assert await memory.compare_and_set("k", "lost", absent) is None
    assert await memory.compare_and_set("k", "lost", 0) is None
    second = await memory.compare_and_set("k", "two", 1)
    assert second.version == 2
    assert await memory.compare_and_set("k", "lost", first) is None
    third = await memory.compare_and_set("k", "three", second)
    assert await memory.get_versioned("k") == third
    assert await memory.get("k") == "three"


async def test_a_value_made_anew_is_told_from_the_one_that_was_read(memory):
    await memory.set("k", "old")
    read = await memory.get_versioned("k")
    await memory.delete("k")
    await memory.set("k", "new")
    assert (await memory.get_versioned("k")).version == read.version
    assert await memory.compare_and_set("k", "lost", read) is None
    assert await memory.compare_and_set("k", "by number", read.version) is not None, "a number cannot tell"


async def test_of_many_who_set_the_same_version_one_wins(memory):
    read = await memory.get_versioned("k")
    done = await asyncio.gather(*(memory.compare_and_set("k", n, read) for n in range(20)))
    (winner,) = [each for each in done if each is not None]
    assert await memory.get_versioned("k") == winner


@pytest.mark.parametrize("version", [-1, 1.0, "1", None, True])
async def test_what_is_no_version_is_refused(memory, version):
    with pytest.raises(ConfigurationError, match="compare_and_set version must be a whole number of writes"):
        await memory.compare_and_set("k", 1, version)


# -- following


async def test_a_log_is_followed_from_a_position(memory):
    for number in range(3):
        await memory.append("log", number)
    found = []
    async with asyncio.timeout(30):
        async for position, entry in memory.follow_log("log", 1):
            found.append((position, entry))
            if position == 2:
                await memory.append("log", "more")
            if position == 3:
                break
    assert found == [(1, 1), (2, 2), (3, "more")]


async def test_a_full_log_ends_and_a_long_one_is_read_in_pages(place):
    memory = MemoryManager(place, namespace="v", max_entries=1200)
    await asyncio.gather(*(memory.append("log", number) for number in range(1200)))
    async with asyncio.timeout(30):
        found = [entry async for _, entry in memory.follow_log("log")]
    assert sorted(found) == list(range(1200))


# -- listing


async def test_keys_are_those_that_have_a_value_or_a_log(place):
    memory = MemoryManager(place, namespace="v", index=True)
    assert await memory.keys() == []
    await memory.set("a", 1)
    await memory.append("b", 1)
    await memory.update("c", lambda n: n + 1, 0)
    view = memory.scoped("inner")
    await view.compare_and_set("d", 1, 0)
    assert sorted(await memory.keys()) == ["a", "b", "c"]
    assert await view.keys() == ["d"]
    await memory.delete("b")
    assert sorted(await memory.keys()) == ["a", "c"]
    await memory.set("b", 1)
    assert sorted(await memory.keys()) == ["a", "b", "c"]


async def test_without_an_index_there_are_no_keys_to_tell(memory, place):
    with pytest.raises(ConfigurationError, match="make it with index=True"):
        await memory.keys()
    with pytest.raises(ConfigurationError, match="make it with index=True"):
        await MemoryManager(place, index=True).scoped("x", index=False).keys()


async def test_many_keys_are_listed_without_a_scan(manager):
    memory = MemoryManager(manager, namespace="v", index=True)
    await asyncio.gather(*(memory.set(f"k{number}", number) for number in range(1100)))
    await manager.client.config_resetstat()
    assert len(await memory.keys()) == 1100
    told = await manager.client.info("commandstats")
    assert "cmdstat_scan" not in told
    assert "cmdstat_keys" not in told


async def test_names_that_were_never_written_are_dropped_after_a_while(manager, monkeypatch):
    memory = MemoryManager(manager, namespace="v", index=True)
    store, names = await memory.store(), _keys.memory_names("v")
    await store.note(names, "gone", ttl_ms=0)
    await memory.set("here", 1)
    assert await memory.keys() == ["here"]
    assert await manager.client.zcard(names) == 2, "it may be about to be written"
    monkeypatch.setattr(_documents, "NOTE_GRACE", -1.0)
    assert await memory.keys() == ["here"]
    assert await manager.client.zrange(names, 0, -1) == [b"here"]


async def test_a_name_noted_again_meanwhile_stays(manager):
    from orchestra import _scripts

    store, names = await MemoryManager(manager, index=True).store(), _keys.memory_names("v")
    await store.note(names, "a", ttl_ms=0)
    ((_, seen),) = await manager.client.zrange(names, 0, -1, withscores=True)
    await manager.client.zadd(names, {"a": seen + 5})
    assert await _scripts.call(manager.client, "memory_forget", [names], ["a", seen]) == 0
    assert await _scripts.call(manager.client, "memory_forget", [names], ["a", seen + 5]) == 1
    assert await _scripts.call(manager.client, "memory_forget", [names], ["a", seen + 5]) == 0, "repeated"


@pytest.mark.parametrize(("ttls", "low", "high"), [([10], 60, 70), ([10, 900], 950, 960), ([900, 10], 950, 960)])
async def test_the_list_lives_as_long_as_the_longest_of_its_keys(manager, ttls, low, high):
    memory = MemoryManager(manager, namespace="v", index=True)
    for number, ttl in enumerate(ttls):
        await memory.set(f"k{number}", 1, ttl=ttl)
    assert low * 1000 < await manager.client.pttl(_keys.memory_names("v")) <= high * 1000
    await memory.set("ever", 1, ttl=None)
    await memory.set("short", 1, ttl=1)
    assert await manager.client.pttl(_keys.memory_names("v")) == -1


async def test_the_twin_forgets_names_too(monkeypatch):
    now = [0.0]
    store = LocalStore(lambda: now[0])
    await store.note("names", "a", ttl_ms=1000)
    await store.commit("a", _documents.ANY, {"d": b"1"}, ttl_ms=1000)
    await store.note("names", "b", ttl_ms=0)
    assert await store.noted("names", lambda name: (name,)) == ["a"]
    now[0] = 2.0
    assert await store.noted("names", lambda name: (name,)) == []
    assert store._names == {"names": {"a": 0.0, "b": 0.0}}
    now[0] = 4000.0
    assert await store.noted("names", lambda name: (name,)) == []
    assert store._names == {}


# -- the factory


async def test_both_spellings_of_the_factory_give_one_manager(redis_url):
    plain = get_memory_manager("n")
    assert await plain is plain
    assert plain is get_memory_manager("n")
    assert await get_memory_manager("n") is plain
    assert plain is not get_memory_manager()
    await plain.set("k", 1)
    assert await plain.get("k") == 1
    await get_connection_manager().close()
