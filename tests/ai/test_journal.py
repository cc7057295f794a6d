"""The journal: what is recorded is found again, and an older attempt cannot append after a newer one has opened it."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from orchestra.ai import StaleAttemptError, Usage
from orchestra.ai import journal as module
from orchestra.ai.journal import Journal, journal_key
from orchestra.errors import CorruptEntryError, StoreFullError, StoreUnavailableError, Throttled

numbers = itertools.count(1)


@pytest.fixture
def opened(memory):
    """Opens the journal of the test for an attempt."""
    key = f"k{next(numbers)}"

    async def opened(fence=1, series=0, asked="a", **settings) -> Journal:
        journal = Journal(settings.pop("memory", memory), key, (series, fence), fingerprint=asked, **settings)
        await journal.open()
        return journal

    opened.key = key
    return opened


async def test_the_next_attempt_finds_what_was_recorded(opened):
    first = await opened(1)
    assert first.recall("model@1") is None
    await first.record("model@1", '"yes"', Usage(1, 7, 3))
    await first.record("tool@1", "null")
    await first.note("turns", 4)
    second = await opened(2)
    assert (second.recall("model@1"), second.recall("tool@1"), second.recall("model@2")) == ('"yes"', "null", None)
    assert (second.used, second.fact("turns"), second.recorded) == (Usage(1, 7, 3), 4, 2)


async def test_without_a_memory_it_is_kept_for_this_attempt_only():
    journal = Journal(None, "k", (0, 1))
    await journal.open()
    await journal.record("a", "1", Usage(1, 2, 3))
    assert (journal.recall("a"), journal.used) == ("1", Usage(1, 2, 3))


async def test_an_older_attempt_cannot_append(opened):
    old = await opened(1)
    await old.record("a", "1")
    new = await opened(2)
    with pytest.raises(StaleAttemptError) as stale:
        await old.record("b", "2")
    assert isinstance(stale.value, Throttled)
    assert "(0, 2) has taken over" in str(stale.value)
    await new.record("b", "3")
    assert (await opened(3)).recall("b") == "3"


async def test_nor_open_after_a_newer_one(opened):
    await (await opened(5)).record("a", "1")
    with pytest.raises(StaleAttemptError):
        await opened(4)


async def test_a_later_series_is_newer_whatever_its_fence(opened):
    old = await opened(9, series=1)
    await opened(1, series=2)
    with pytest.raises(StaleAttemptError):
        await old.record("a", "1")
    with pytest.raises(StaleAttemptError):
        await opened(10, series=1)


async def test_what_an_old_attempt_appended_while_a_new_one_opens_is_taken_in(opened, memory, monkeypatch):
    old = await opened(1)
    new = Journal(memory, opened.key, (0, 2), fingerprint="a")
    append = memory.append

    async def late(*args, **kwargs):
        if args[1]["t"] == new._token and old.recall("a") is None:
            await old.record("a", "1")
        return await append(*args, **kwargs)

    monkeypatch.setattr(memory, "append", late)
    await new.open()
    assert new.recall("a") == "1"
    with pytest.raises(StaleAttemptError):
        await old.record("b", "2")


async def test_of_two_attempts_with_the_same_fence_the_one_that_opened_last_wins(opened):
    first = await opened(0)
    second = await opened(0)
    with pytest.raises(StaleAttemptError):
        await first.record("a", "1")
    await second.record("a", "2")


async def test_many_calls_of_one_attempt_append_at_once(opened):
    journal = await opened()
    await asyncio.gather(*(journal.record(f"c{n}", str(n)) for n in range(50)))
    again = await opened(2)
    assert [again.recall(f"c{n}") for n in range(50)] == [str(n) for n in range(50)]


async def test_a_long_journal_is_read_whole(opened, monkeypatch):
    monkeypatch.setattr(module, "PAGE", 7)
    journal = await opened()
    for n in range(30):
        await journal.record(f"c{n}", str(n))
    again = await opened(2)
    assert again.recorded == 30


async def test_an_append_whose_reply_is_lost_is_repeated_and_there_once(opened, memory, monkeypatch):
    journal, append, lost = await opened(), memory.append, []

    async def losing(*args, **kwargs):
        length = await append(*args, **kwargs)
        if len(lost) < 2:
            lost.append(length)
            raise StoreUnavailableError("the reply was lost")
        return length

    monkeypatch.setattr(memory, "append", losing)
    await journal.record("a", "1", Usage(1, 1, 1))
    await journal.record("b", "2")
    assert len(lost) == 2
    monkeypatch.undo()
    again = await opened(2)
    assert (again.recall("a"), again.recall("b"), again.used) == ("1", "2", Usage(1, 1, 1))


async def test_an_outage_is_an_error_after_some_patience(opened, memory, monkeypatch):
    journal, tries = await opened(), []

    async def gone(*args, **kwargs):
        tries.append(1)
        raise StoreUnavailableError("gone")

    monkeypatch.setattr(memory, "append", gone)
    with pytest.raises(StoreUnavailableError):
        await journal.record("a", "1")
    assert len(tries) == module.TRIES


async def test_another_question_under_the_same_id_begins_anew(opened):
    journal = await opened(1, asked="a")
    await journal.record("a", "1", Usage(1, 1, 1))
    await journal.end()
    other = await opened(1, asked="b")
    assert (other.recall("a"), other.used, other.ended) == (None, Usage(), False)
    await other.record("a", "2")
    assert (await opened(2, asked="b")).recall("a") == "2"


async def test_a_reset_forgets_the_answers_and_not_what_they_used(opened):
    journal = await opened(1)
    await journal.record("a", "1", Usage(1, 5, 5))
    await journal.reset("nonsense")
    again = await opened(2)
    assert (again.recall("a"), again.used, again.recorded) == (None, Usage(1, 5, 5), 0)


async def test_an_ended_run_can_be_replayed_and_is_kept_shortly(opened, memory):
    journal = await opened(1)
    await journal.record("a", "1")
    await journal.end()
    again = await opened(1)
    assert (again.ended, again.recall("a")) == (True, "1")
    store = await memory.store()
    if hasattr(store, "_manager"):
        (name,) = await store._manager.client.keys(f"*{opened.key}*")
        assert 0 < await store._manager.client.ttl(name) <= module.ENDED_S


async def test_an_id_that_is_used_anew_goes_on_as_soon_as_its_fence_has_grown(opened):
    generation = 1 << 40
    await (await opened(2 * generation + 1)).record("a", "1")
    for returned in range(2):
        with pytest.raises(StaleAttemptError) as stale:
            await opened(returned * generation + 1)
        assert stale.value.retry_after == module.STALE_S
    assert (await opened(2 * generation + 2)).recall("a") == "1"


async def test_announced_calls_are_known_to_the_next_attempt(opened):
    journal = await opened(1)
    await journal.begin("pay@1")
    again = await opened(2)
    assert (again.has_begun("pay@1"), again.has_begun("pay@2"), again.once) == (True, False, True)


@pytest.mark.parametrize("entry", [7, {}, {"k": "call", "f": [0, 1], "t": "x"}, {"k": "open", "f": 1}])
async def test_what_is_no_journal_entry_is_an_error_that_says_so(opened, memory, entry):
    await memory.append(opened.key, entry)
    with pytest.raises(CorruptEntryError, match="entry 0 of journal"):
        await opened()


async def test_a_full_journal_is_an_error(opened, memory):
    memory.max_entries = 3
    journal = await opened()
    await journal.record("a", "1")
    await journal.record("b", "1")
    with pytest.raises(StoreFullError):
        await journal.record("c", "1")


def test_keys_fit_whatever_the_ids_are():
    assert journal_key("task", "abc", "") == "task/abc/"
    long, other = journal_key("task", "x" * 128), journal_key("task", "x" * 127, "y")
    assert long != other
    assert len(long) == len(other) == 64
    assert journal_key("conversation", "höhe 1") != journal_key("conversation", "höhe 2")


async def test_the_journal_of_a_run_that_waits_outlives_others(opened, memory):
    journal = await opened(1, keep=60.0)
    await journal.record("a", "1")
    await journal.park(86_400.0)
    store = await memory.store()
    if hasattr(store, "_manager"):
        (name,) = await store._manager.client.keys(f"*{opened.key}*")
        assert 86_000 < await store._manager.client.ttl(name) <= 86_400
    again = await opened(2, keep=60.0)
    assert (again.recall("a"), again.ended) == ("1", False)
