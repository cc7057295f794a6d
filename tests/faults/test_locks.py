"""Locks on Redis under faults: lost renewals, lost replies, stopped holders, cancelled callers, foreign keys."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from orchestra._keys import lock as lock_keys
from orchestra._queue.locks import RedisLock
from orchestra._redis.link import Link
from orchestra.connections import ConnectionManager
from orchestra.errors import LockError, StoreError, StoreUnavailableError
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults.proxy import Proxy

LONG = 30.0
KEY, FENCE = lock_keys("x")


def lock_on(manager, expire_time=30.0, wait=None, **options):
    return RedisLock(Link(manager, "commands", "tasks"), "x", expire_time, wait, **options)


async def settles(condition, seconds=LONG):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def lock_tasks():
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("orchestra:lock")]


# -- I10: a lock that expires while it is held


async def test_a_held_lock_is_renewed(manager):
    """I10: longer than its time to live, without anybody else getting it."""
    async with lock_on(manager, 0.6) as lock:
        other, end = lock_on(manager, 0.6), time.monotonic() + 1.5
        while time.monotonic() < end:
            if lock.held:  # on a machine that is too busy to renew, it knows that it is lost
                assert not await other.acquire_nowait() or not lock.held
            await asyncio.sleep(0.05)
        if not lock.lost.is_set():
            assert await manager.client.pttl(KEY) > 0
        await other.release()


async def test_a_taken_lock_is_lost_at_the_next_renewal(manager):
    """I10: the renewal compares; the loss is told long before the time to live would end."""
    lock = lock_on(manager, 3.0)
    await lock.acquire()
    await manager.client.set(KEY, "somebody:1")
    async with asyncio.timeout(LONG):
        await lock.lost.wait()
    assert not lock.held
    assert await lock.extend() is False
    assert await lock.release() is False
    assert await manager.client.get(KEY) == b"somebody:1", "what belongs to another is not touched"


async def test_without_redis_it_is_lost_when_its_time_is_over(redis_url):
    """I10: nothing answers; the own monotonic clock decides, and nothing hangs."""
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url, timeout=60) as manager:
        lock = lock_on(manager, 1.0)
        await lock.acquire()
        proxy.stall()
        began = time.monotonic()
        async with asyncio.timeout(LONG):
            await lock.lost.wait()
        assert time.monotonic() - began >= 0.3, "its last renewal was sent a third of its life ago at most"
        assert not lock.held
        await proxy.heal(lose=True)
        await settles(lambda: not lock_tasks())


async def test_one_failed_renewal_is_no_loss(redis_url):
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url) as manager:
        lock = lock_on(manager, 6.0)
        await lock.acquire()
        await lock.extend()  # the script is known
        lost = [proxy.drop_reply("lock_extend", nth) for nth in (1, 2)]
        for rule in lost:
            await rule.wait(LONG)
        await proxy.passed("lock_extend", 2, LONG)
        assert lock.held
        assert await lock.release() is True


HOLDER = """
    import asyncio, os, sys
    from orchestra.connections import ConnectionManager
    from orchestra.task_queue import RedisStreamTaskQueue

    async def main():
        manager = ConnectionManager(os.environ["ORCHESTRA_REDIS_URL"])
        queue = RedisStreamTaskQueue("tasks", "workers", manager=manager)
        async with await queue.get_lock("x", expire_time=1.0) as lock:
            print(lock.fence, flush=True)
            while lock.held:
                await asyncio.sleep(0.01)
            await lock.lost.wait()
            print("lost", flush=True)
            await manager.client.rpush("writes", lock.fence)  # a write that comes too late
        print(await lock.release(), flush=True)
        await queue.close()
        await manager.close()

    asyncio.run(main())
"""


class Resource:
    """What a lock guards: it takes a write only with a fence that is not lower than the highest it has seen."""

    def __init__(self):
        self.highest, self.taken = 0, []

    def write(self, fence):
        if fence < self.highest:
            return False
        self.highest = fence
        self.taken.append(fence)
        return True


async def test_a_stopped_holder_learns_of_its_loss_and_its_fence_is_refused(manager, redis_url):
    """I10: SIGSTOP for longer than the time to live; another holds it meanwhile; SIGCONT; the resource refuses."""
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        old = int(await asyncio.to_thread(holder.stdout.readline))
        resource = Resource()
        assert resource.write(old)
        os.kill(holder.pid, signal.SIGSTOP)
        async with asyncio.timeout(LONG), lock_on(manager, 30.0) as lock:
            assert lock.fence > old
            assert resource.write(lock.fence)
            os.kill(holder.pid, signal.SIGCONT)
            assert await asyncio.to_thread(holder.stdout.readline) == "lost\n"
            assert await asyncio.to_thread(holder.stdout.readline) == "False\n"
            late = int((await manager.client.lrange("writes", 0, 0))[0])
            assert late == old
            assert not resource.write(late), "the resource that checks fences refuses the old owner"
            assert lock.held, "the old owner's release did not free the new one's lock"
        assert await asyncio.to_thread(holder.wait, LONG) == 0
    finally:
        os.kill(holder.pid, signal.SIGCONT) if holder.poll() is None else None
        holder.kill()
        holder.wait()
        holder.stdout.close()


# -- I11: compare, idempotence, fences


@pytest.mark.parametrize("how", ["rst", "fin"])
async def test_an_acquire_whose_reply_is_lost_is_confirmed(redis_url, how):
    """I11: the repeat finds its own token and gives the same fence; no wait for the time to live."""
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url) as manager:
        async with lock_on(manager):
            pass
        rule = proxy.drop_reply("lock_acquire", how=how)
        lock = lock_on(manager, 30.0)
        began = time.monotonic()
        await lock.acquire()
        assert rule.fired
        assert time.monotonic() - began < 20
        assert int((await manager.client.get(KEY)).rpartition(b":")[2]) == lock.fence
        assert int(await manager.client.get(FENCE)) == lock.fence, "one fence was given"
        rule = proxy.drop_reply("lock_release", how=how)
        await lock.release()
        assert rule.fired
        assert await manager.client.exists(KEY) == 0


async def test_an_old_release_cannot_end_a_new_tenure(manager):
    """I11: each tenure has a token of its own, so what was on its way for the last one finds another's lock."""
    lock = lock_on(manager)
    await lock.acquire()
    old = lock._token
    await lock.release()
    await lock.acquire()
    assert lock._token != old
    lock._token, new = old, lock._token
    assert await lock._run("lock_release", (KEY,), old) == 0
    lock._token = new
    assert lock.held
    assert await lock.release() is True


async def test_fences_grow_over_expiry_deletion_and_restart(make_server):
    """I11, F5: also when the counter itself is deleted, because fences start from the clock."""
    server = make_server("--appendonly", "yes", "--appendfsync", "always")
    fences = []

    async def once(manager):
        lock = lock_on(manager, renew=False)
        assert await lock.acquire_nowait()
        fences.append(lock.fence)
        return lock

    async with ConnectionManager(server.url) as manager:
        await (await once(manager)).release()
        await once(manager)
        await manager.client.pexpire(KEY, 1)
        await settles_async(lambda: manager.client.exists(KEY), 0)
        await once(manager)
        await manager.client.delete(KEY)
        await once(manager)
        await manager.client.delete(KEY, FENCE)
        await once(manager)
        await manager.client.set(FENCE, fences[-1] + 10**12)  # the clock was ahead by eleven days, and set back
        await manager.client.delete(KEY)
        await once(manager)
        assert fences[-1] == fences[-2] + 10**12 + 1
        server.kill()
    server.start()
    async with ConnectionManager(server.url) as manager:
        assert not await lock_on(manager).acquire_nowait(), "the holder survived the restart"
        await manager.client.delete(KEY)
        await (await once(manager)).release()
        assert 0 < await manager.client.pttl(FENCE) <= 30 * 86_400_000, "no key without a time to live"
    assert fences == sorted(set(fences))
    assert len(fences) == 7
    await settles(lambda: True)


async def settles_async(ask, expected):
    async with asyncio.timeout(LONG):
        while await ask() != expected:
            await asyncio.sleep(0.01)


async def test_fences_follow_the_order_of_holders(manager):
    """I11: many tasks on many links; fences grow in the order in which the lock was held."""
    order, inside = [], 0

    async def enter():
        nonlocal inside
        async with lock_on(manager, 30.0) as lock:
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            order.append(lock.fence)
            inside -= 1

    async with asyncio.timeout(LONG):
        await asyncio.gather(*(enter() for _ in range(8)))
    assert order == sorted(set(order))
    assert len(order) == 8


# -- J1: cancelled callers


class CancelAt:
    """Awaits ``aw`` and cancels the running task at its k-th suspension."""

    def __init__(self, aw, k):
        self.aw, self.k, self.seen = aw, k, 0

    def __await__(self):
        steps, value = self.aw.__await__(), None
        error = None
        while True:
            try:
                future = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as stop:
                return stop.value
            self.seen += 1
            if self.seen == self.k:
                asyncio.current_task().cancel()
            try:
                value, error = (yield future), None
            except BaseException as raised:
                value, error = None, raised


async def test_a_cancel_at_any_await_leaves_no_lock_and_no_task(manager):
    """J1, I11: acquire, hold and release cancelled at every suspension: the lock is free at once, the link in step."""
    link = Link(manager, "commands", "tasks")
    await link.wire()

    async def use(lock):
        async with lock:
            await asyncio.sleep(0)

    k, completed = 0, False
    while not completed:
        k += 1
        lock = RedisLock(link, "x", 30.0)
        harness = CancelAt(use(lock), k)

        async def run(harness=harness):
            return await harness

        task = asyncio.create_task(run())
        await asyncio.gather(task, return_exceptions=True)
        completed = not task.cancelled()
        await settles(lambda: not lock_tasks())
        assert not lock.held
        assert (await (await link.wire()).call("ECHO", str(k))) == str(k).encode()
        await settles_async(lambda: manager.client.exists(KEY), 0)
    assert k >= 3
    await link.close()


async def test_a_waiter_that_gives_up_holds_nothing(redis_url):
    """I11: the wait ends while its own acquire is under way: what it got is given back."""
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url) as manager:
        async with lock_on(manager):
            with pytest.raises(LockError, match="not free within 0.2 s"):
                await lock_on(manager, wait=0.2).acquire()
        held = proxy.hold_reply("lock_acquire")
        waiting = asyncio.create_task(lock_on(manager, wait=0.2).acquire())
        with pytest.raises(LockError):
            await waiting
        assert held.fired
        held.release()
        await settles_async(lambda: manager.client.exists(KEY), 0)
        assert await lock_on(manager, wait=0).acquire() is None, "one try is made, however short the wait"


# -- B20, and Redis that is not there


@pytest.mark.parametrize("key", [KEY, FENCE])
async def test_a_key_of_the_wrong_type_is_an_error_and_stays_as_it_is(manager, key):
    """B20: nothing is half-applied."""
    await manager.client.rpush(key, "foreign")
    lock = lock_on(manager)
    with pytest.raises(StoreError, match="WRONGTYPE"):
        await lock.acquire_nowait()
    assert not lock.held
    assert [name.decode() for name in await manager.client.keys("*")] == [key]
    assert not lock_tasks()
    await manager.client.delete(key)
    async with lock:
        await manager.client.delete(KEY)
        await manager.client.rpush(KEY, "foreign")
        with pytest.raises(StoreError, match="WRONGTYPE"):
            await lock.extend()
    assert await manager.client.lrange(KEY, 0, -1) == [b"foreign"], "leaving does not raise, nor touch it"


async def test_leaving_while_redis_is_gone_does_not_hide_what_happened(make_server):
    server = make_server()
    async with ConnectionManager(server.url) as manager:
        with pytest.raises(KeyError, match="mine"):
            async with lock_on(manager, 0.5):
                server.kill()
                raise KeyError("mine")
        with pytest.raises(StoreUnavailableError):
            await lock_on(manager, 0.2).acquire_nowait()
        assert not lock_tasks()


async def test_a_closed_queue_renews_nothing(redis_url):
    async with ConnectionManager(redis_url) as manager:
        queue = RedisStreamTaskQueue("tasks", "workers", manager=manager)
        async with await queue.get_lock("x") as lock:
            await queue.close()
            assert lock.lost.is_set()
            assert not lock.held
        assert queue._link is None
        rows = await manager.client.client_list()
        assert not [row for row in rows if row["name"].endswith(":commands")], "leaving opened no connection"
        assert await manager.client.pttl(KEY) > 0
