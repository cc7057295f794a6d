"""The life of a lock, the same for every queue: renewed while it is held, and it tells when it is lost."""

from __future__ import annotations

import asyncio

import pytest

LONG = 20.0


async def test_a_lock_is_held_until_it_is_released(queue):
    lock = await queue.get_lock("x", expire_time=30)
    assert not lock.held
    async with lock:
        assert lock.held
        assert lock.fence > 0
        assert not lock.lost.is_set()
    assert not lock.held
    assert lock.fence == 0
    assert not lock.lost.is_set()


async def test_an_expired_lock_is_lost(backend, queue):
    lock = await queue.get_lock("x", expire_time=1.0)
    await lock.acquire()
    first = lock.fence
    await backend.expire_lock(queue, "x")
    async with asyncio.timeout(LONG):
        await lock.lost.wait()
    assert not lock.held
    other = await queue.get_lock("x", expire_time=30)
    assert await other.acquire_nowait() is True
    assert other.fence > first
    assert await lock.release() is False
    assert await lock.extend() is False
    assert other.held
    assert await other.release() is True
    await lock.acquire()  # the object may be used again
    assert lock.held
    assert not lock.lost.is_set()
    assert lock.fence > first
    assert await lock.release() is True


@pytest.mark.parametrize("backend", ["redis"], indirect=True)
async def test_without_renewal_a_lock_lives_as_long_as_it_says(queue):
    began = asyncio.get_running_loop().time()
    async with await queue.get_lock("x", expire_time=0.5, renew=False) as lock:
        async with asyncio.timeout(LONG):
            await lock.lost.wait()
        assert asyncio.get_running_loop().time() - began >= 0.45
        assert not lock.held


@pytest.mark.parametrize("backend", ["redis"], indirect=True)
async def test_a_lock_that_nobody_has_any_more_frees_itself(queue):
    await (await queue.get_lock("x", expire_time=0.3)).acquire()
    async with asyncio.timeout(LONG), await queue.get_lock("x") as other:
        assert other.held


async def test_no_task_is_left_when_it_is_released_or_lost(backend, queue):
    async with await queue.get_lock("x", expire_time=30):
        pass
    lock = await queue.get_lock("x", expire_time=1.0)
    await lock.acquire()
    await backend.expire_lock(queue, "x")
    async with asyncio.timeout(LONG):
        await lock.lost.wait()
        while [task for task in asyncio.all_tasks() if task.get_name().startswith("orchestra:lock")]:
            await asyncio.sleep(0.01)
