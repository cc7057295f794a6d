"""The instances behind every ``get_*()``: one per kind, name and event loop; awaiting connects."""

from __future__ import annotations

import asyncio

import pytest

from orchestra import _shared


class Thing(_shared.Connectable):
    connects = 0

    async def _connect(self):
        await asyncio.sleep(0)
        self.connects += 1


@pytest.fixture(autouse=True)
def clean():
    _shared.reset()
    yield
    _shared.reset()


async def test_one_instance_per_kind_and_name():
    first = _shared.shared("thing", "a", Thing)
    assert _shared.shared("thing", "a", Thing) is first
    assert _shared.shared("thing", "b", Thing) is not first
    assert _shared.shared("other", "a", Thing) is not first


async def test_awaiting_connects_and_gives_the_same_object():
    thing = _shared.shared("thing", "a", Thing)
    assert thing.connects == 0
    assert await thing is thing
    assert await _shared.shared("thing", "a", Thing) is thing
    assert thing.connects == 2


def test_every_loop_has_its_own():
    async def get():
        return _shared.shared("thing", "a", Thing)

    first, second = asyncio.run(get()), asyncio.run(get())
    assert first is not second


def test_one_made_without_a_loop_is_adopted_by_the_first_loop():
    homeless = _shared.shared("thing", "a", Thing)
    assert _shared.shared("thing", "a", Thing) is homeless

    async def get():
        return _shared.shared("thing", "a", Thing)

    assert asyncio.run(get()) is homeless
    assert asyncio.run(get()) is not homeless
    assert _shared.shared("thing", "a", Thing) is not homeless, "it has gone to its loop"


async def test_a_forgotten_one_is_made_again():
    first, other = _shared.shared("thing", "a", Thing), _shared.shared("thing", "b", Thing)
    _shared.forget(first)
    assert _shared.shared("thing", "a", Thing) is not first
    assert _shared.shared("thing", "b", Thing) is other
    _shared.forget(object())


async def test_reset_forgets_all():
    first = _shared.shared("thing", "a", Thing)
    _shared.reset()
    assert _shared.shared("thing", "a", Thing) is not first


async def test_a_failing_maker_leaves_nothing_behind():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        _shared.shared("thing", "a", fail)
    assert isinstance(_shared.shared("thing", "a", Thing), Thing)


async def test_a_connectable_without_connection():
    plain = _shared.Connectable()
    assert await plain is plain
