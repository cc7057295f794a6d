"""J1, J2, J3, J4: cancellation at every await of every operation, in the same tick as completion, and twice.

Each operation is cancelled at its first suspension, its second, and so on until it completes uncancelled. Every time
CancelledError comes out, no background task stays, the shared connections answer their own questions, and what the
operation was about exists as often as it should: the operation is repeated, and then all adds up.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest
import pytest_asyncio

from orchestra._delivery import DONE, Again
from orchestra.errors import LockError
from orchestra.flow_control import BackpressureConfig, BackpressureStrategy, RateLimitConfig, RedisRateLimiter
from tests.faults._awaits import at_every_await, at_every_tick, cancelled_at, judge, until
from tests.faults._bench import HOW, NEEDS_PROC, bench_on, ready, serial, some

pytestmark = NEEDS_PROC


@pytest_asyncio.fixture
async def bench(redis_url):
    async with bench_on(redis_url) as made:
        yield made


# --- produce


@HOW
@pytest.mark.parametrize("count", [1, 3, 1200])
async def test_produce(bench, how, count):
    """J1: a cancelled produce happened or did not; said again, every task exists exactly once."""
    tasks: list[dict] = []

    async def prepare():
        tasks[:] = some(count)
        if count == 1:
            return lambda: bench.queue.produce(tasks[0])
        return lambda: bench.queue.produce_many(tasks)

    async for _, _run in at_every_await(prepare, how=how):
        assert (await bench.queue.stats()).live in range(count + 1)
        await bench.queue.produce_many(tasks)
        await bench.in_step()
        await bench.take(*(task["id"] for task in tasks))


async def test_produce_in_the_tick_of_its_completion(bench):
    """J2: whatever the iteration of the loop in which produce is cancelled."""
    tasks: list[dict] = []

    async def prepare():
        tasks[:] = some(1)
        return lambda: bench.queue.produce(tasks[0])

    async for _, _run in at_every_tick(prepare):
        await bench.queue.produce(tasks[0])
        await bench.take(tasks[0]["id"])
    await bench.in_step()


@HOW
async def test_submit_and_wait_result(bench, how):
    """J1: submit with results; then waiting for one."""
    tasks: list[dict] = []
    queues: list = []

    async def prepare():
        tasks[:] = some(2)
        queues.append(bench.make())
        return lambda: queues[-1].submit(tasks, want_results=True)

    async for _, _run in at_every_await(prepare, how=how):
        await queues[-1].submit(tasks, want_results=True)
        ids = [task["id"] for task in tasks]
        waiting = asyncio.create_task(queues[-1].wait_result(ids[0], 30))
        await bench.take(*ids)
        assert (await waiting)["outcome"] == "completed"
        await queues.pop().close()
    (known,) = some(1)
    await bench.queue.submit([known], want_results=True)

    async def prepare_wait():
        return lambda: _expired(bench.queue.wait_result(known["id"], 0.003))

    async for _, _run in at_every_await(prepare_wait, how=how):
        assert bench.queue._replies._waiting == {}
    await bench.take(known["id"])
    async for _, _run in at_every_await(lambda: ready(lambda: bench.queue.wait_result(known["id"], 30)), how=how):
        assert (await bench.queue.wait_result(known["id"], 30))["outcome"] == "completed"
    await bench.in_step()


async def _expired(waiting):
    with pytest.raises(TimeoutError):
        await waiting


# --- consume and read


@HOW
@pytest.mark.parametrize("waiting", [3, 0])
async def test_consume(bench, how, waiting):
    """J1: what a cancelled consume had brought goes back into its lane."""
    tasks: list[dict] = []
    consumer = itertools.count()

    async def prepare():
        tasks[:] = some(waiting)
        if tasks:
            await bench.queue.produce_many(tasks)
        name = f"c{next(consumer) % 3}"
        return lambda: bench.queue.consume(name, 10, 20 if not waiting else 5000)

    async for _, run in at_every_await(prepare, how=how):
        if run.cancelled:
            await bench.take(*(task["id"] for task in tasks))
        else:
            assert sorted(task["id"] for _, task in run.value) == sorted(task["id"] for task in tasks)
            await bench.queue.acknowledge_many([message_id for message_id, _ in run.value])
            await bench.empty()
        await bench.in_step()


async def test_consume_in_the_tick_of_its_completion(bench):
    """J2: the delivery that arrives in the iteration in which consume is cancelled is not lost."""
    producer = bench.make()
    tasks: list[dict] = []

    async def prepare():
        tasks[:] = some(1)

        async def both():
            producing = asyncio.create_task(producer.produce(tasks[0]))
            try:
                return await bench.queue.consume("c", 1, 5000)
            finally:
                await asyncio.shield(producing)

        return both

    async for _, run in at_every_tick(prepare, most=240, step=4):
        if run.cancelled:
            await producer.produce(tasks[0])  # when it was cancelled before it began
            await bench.take(tasks[0]["id"])
        else:
            assert await bench.queue.acknowledge(run.value[0][0])
    await bench.in_step()
    await producer.close()


async def test_consume_cancelled_again_while_it_cleans_up(bench):
    """J3: a second cancellation, at the k2-th await after the first."""
    tasks: list[dict] = []

    async def prepare():
        tasks[:] = some(1)
        await bench.queue.produce_many(tasks)
        return lambda: bench.queue.consume("c", 1, 5000)

    for again in (1, 2):
        async for _, run in at_every_await(prepare, again=again):
            if run.cancelled:
                await bench.take(tasks[0]["id"])
            else:
                await bench.queue.acknowledge(run.value[0][0])
    await bench.in_step()


@HOW
async def test_read(bench, how):
    """J1: a cancelled read costs its connection; what was on its way is pending, and nobody believes to hold it."""
    tasks: list[dict] = []

    async def prepare():
        tasks[:] = some(2)
        await bench.queue.produce_many(tasks)
        return lambda: bench.queue.read("c", 10, 5000, exact=next(serial) % 2 == 0)

    async for _, run in at_every_await(prepare, how=how):
        mine = run.value or []
        if run.cancelled:
            await bench.queue.read("c", 10, 0)
            mine = await bench.queue.reclaim("c", 10, 0)  # what was read just now, and what a broken read left pending
        assert {delivery.header.id for delivery in mine} == {task["id"] for task in tasks}
        assert await bench.queue.settle([(delivery, DONE) for delivery in mine]) == []
        await bench.empty()
        await bench.in_step()


# --- settle


@HOW
@pytest.mark.parametrize("deed", ["settle", "acknowledge", "add_to_dlq", "release"])
async def test_settling(bench, how, deed):
    """J1: a cancelled settle happened or did not; repeated, it has happened exactly once."""
    held: list = []
    queue = bench.queue

    def operation():
        delivery = held[0]
        if deed == "acknowledge":
            return queue.acknowledge(delivery.message_id)
        if deed == "add_to_dlq":
            return queue.add_to_dlq(delivery.message_id, delivery.task_dict(), {"error": "x"})
        return queue.settle([(delivery, DONE if deed == "settle" else Again(0.0, "released"))])

    async def prepare():
        await queue.produce_many(some(1))
        held[:] = await queue.read("c", 1, 5000)
        return operation

    rounds = 0
    async for _, _run in at_every_await(prepare, how=how):
        rounds += 1
        await operation()  # of a delivery that is settled it changes nothing
        stats = await queue.stats()
        assert sum(stats.in_flight) == 0
        assert stats.adds_up
        if deed == "release":
            assert sum(stats.waiting) == 1
            await bench.take(held[0].header.id)
        else:
            assert stats.live == 0
            assert stats.counters["dead" if deed == "add_to_dlq" else "completed"] == rounds
        await bench.in_step()


async def test_settle_in_the_tick_of_its_completion(bench):
    """J2: cancelled in any iteration, a settle counts once, and held deliveries are those that are pending."""
    queue, held = bench.queue, []

    async def prepare():
        await queue.produce_many(some(1))
        held[:] = await queue.read("c", 1, 5000)
        return lambda: queue.acknowledge(held[0].message_id)

    rounds = 0
    async for _, _run in at_every_tick(prepare):
        rounds += 1
        await queue.settle([(held[0], DONE)])
        assert (await queue.stats()).counters["completed"] == rounds
        await bench.empty()
    await bench.in_step()


# --- cancel, counts, dead letters


@HOW
async def test_cancelling_a_task(bench, how):
    """J1: cancelling the call that cancels a task: the task has one end, completed or cancelled."""
    tasks: list[dict] = []
    ids: list[str] = []

    async def prepare():
        tasks[:] = some(1)
        ids[:] = await bench.queue.produce_many(tasks)
        return lambda: bench.queue.cancel(tasks[0]["id"], ids[0])

    rounds = 0
    async for _, _run in at_every_await(prepare, how=how):
        rounds += 1
        await bench.queue.cancel(tasks[0]["id"], ids[0])
        stats = await bench.queue.stats()
        assert stats.live == 0
        assert stats.counters["cancelled"] == rounds
        await bench.in_step()


@HOW
@pytest.mark.parametrize("deed", ["stats", "maintain", "read_dlq", "get_queue_depth", "retire", "wake"])
async def test_what_only_looks(bench, how, deed):
    """J1: reading, maintaining and forgetting."""
    call = {
        "stats": bench.queue.stats,
        "maintain": lambda: bench.queue.maintain("c", 10),
        "read_dlq": bench.queue.read_dlq,
        "get_queue_depth": bench.queue.get_queue_depth,
        "retire": lambda: bench.queue.retire("c"),
        "wake": lambda: bench.queue.wake("c"),
    }[deed]
    await bench.queue.consume("c", 1, 0)
    async for _, _run in at_every_await(lambda: ready(call), how=how):
        await bench.in_step()
        await call()


# --- locks


@HOW
@pytest.mark.parametrize("held", [False, True])
async def test_lock_acquire(bench, how, held):
    """J1: a cancelled acquire leaves no lock behind."""
    name, lock = f"lock{next(serial)}", None
    owner = await bench.queue.get_lock(name, 60)
    if held:
        await owner.acquire()

    async def prepare():
        nonlocal lock
        lock = await bench.queue.get_lock(name, 60, wait=0.05 if held else None)
        return lambda: _refused(lock) if held else lock.acquire()

    async for _, run in at_every_await(prepare, how=how):
        if held:
            assert await owner.extend(), "somebody else freed the lock"
        elif run.cancelled:
            await _free(bench, name)
        else:
            await lock.release()
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("orchestra:lock")] or held
        await bench.in_step()
    if held:
        assert await owner.release()


async def _free(bench, name: str) -> None:
    """Nobody holds the lock, or not for long."""
    other = await bench.queue.get_lock(name, 60)
    await until(other.acquire_nowait, f"{name} becoming free")
    await other.release()


async def _refused(lock):
    with pytest.raises(LockError):
        await lock.acquire()


async def test_lock_cancelled_twice(bench):
    """J3: acquire and release inside ``async with``, cancelled at k1 and again k2 awaits later, for all k1 × k2."""
    name, most = f"lock{next(serial)}", 0

    async def use(lock):
        async with lock:
            await asyncio.sleep(0)

    for again in range(1, 5):
        for k in range(1, 20):
            lock = await bench.queue.get_lock(name, 60)
            run = await cancelled_at(lambda lock=lock: use(lock), k, again=again)
            judge(run, f"at await {k} and {again} later")
            most = max(most, run.fired)
            await _free(bench, name)
            if not run.fired:
                break
    assert most == 2
    await bench.in_step()


async def test_lock_in_the_tick_of_its_completion(bench):
    """J2: acquired in the iteration in which acquire is cancelled: the lock is free again."""
    name = f"lock{next(serial)}"

    async def prepare():
        lock = await bench.queue.get_lock(name, 60)
        locks[:] = [lock]
        return lock.acquire

    locks: list = []
    async for _, run in at_every_tick(prepare):
        if not run.cancelled:
            await locks[0].release()
        await _free(bench, name)
    await bench.in_step()


@HOW
async def test_lock_release(bench, how):
    """J1: a cancelled release; the lock is free, or still ours to release."""
    name = f"lock{next(serial)}"

    async def prepare():
        lock = await bench.queue.get_lock(name, 60)
        await lock.acquire()
        locks[:] = [lock]
        return lock.release

    locks: list = []
    async for _, _run in at_every_await(prepare, how=how):
        await locks[0].release()
        await _free(bench, name)
        await bench.in_step()


# --- limiter


def limiter_for(bench, **options):
    config = BackpressureConfig(rate_limit=RateLimitConfig(rate=1000, burst=50), **options)
    return RedisRateLimiter(f"l{next(serial)}", config, manager=bench.manager)


@HOW
@pytest.mark.parametrize("waits", [False, True])
async def test_limiter_acquire(bench, how, waits):
    """J1: a cancelled acquire leaves its place in the line, and the line ends."""
    strategy = BackpressureStrategy.WAIT if waits else BackpressureStrategy.REJECT
    limiter = limiter_for(bench, strategy=strategy)
    tried = 0

    async def prepare():
        while waits and (await limiter.try_acquire(cost=40)).allowed:
            pass
        return lambda: limiter.acquire(cost=40 if waits else 1)

    async for _, _run in at_every_await(prepare, how=how):
        tried += 1
        assert limiter.idle
        await until(lambda: _allowed(limiter), "a permit")
    metrics = limiter.metrics
    assert metrics.cancelled == tried - 1
    await bench.in_step()


async def _allowed(limiter):
    return (await limiter.try_acquire()).allowed


async def test_limiter_in_the_tick_of_its_completion(bench):
    """J2: every acquire is counted once: acquired, or cancelled; a permit lost in that tick is counted as abandoned."""
    limiter = limiter_for(bench)
    tried = 0
    async for _, run in at_every_tick(lambda: ready(limiter.acquire)):
        tried += 1
        assert limiter.idle
        assert run.cancelled or isinstance(run.value, bool)
    metrics = limiter.metrics
    assert (
        metrics.acquired + metrics.rejected + metrics.cancelled == tried - 1
    )  # the first was cancelled before it began
    assert metrics.abandoned <= metrics.cancelled
    await bench.in_step()
