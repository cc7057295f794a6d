"""H12: cancelling through the front door: runs, workers of this process and of another, what agents notice."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap

import pytest

from orchestra import App, Cancellation, Retry, TaskCancelledError, TaskState
from orchestra._identity import consumer_name
from orchestra.connections import ConnectionManager
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import BaseTask

PATIENCE = 30.0
"""Seconds that a loaded machine may need for what takes one."""


async def until(condition, seconds=PATIENCE):
    async with asyncio.timeout(seconds):
        while not (value := await condition()):
            await asyncio.sleep(0.01)
        return value


async def empty(app):
    stats = await until(lambda: drained(app))
    assert stats.adds_up, stats
    return stats


async def drained(app):
    stats = await app.queue.stats()
    return stats if not stats.live else None


@pytest.fixture(params=["memory", "redis"])
async def app(request):
    url = "memory:" if request.param == "memory" else request.getfixturevalue("redis_url")
    made = App("cancels", url, retry=Retry(max_retries=2, base=0.01), concurrency=2)
    made.seen = []
    made.started = asyncio.Event()
    made.ended = asyncio.Event()

    @made.agent
    async def hang(task: BaseTask) -> None:
        made.seen.append(task.id)
        made.started.set()
        try:
            await asyncio.sleep(600)
        finally:
            made.ended.set()

    @made.agent
    async def note(task: BaseTask) -> str:
        made.seen.append(task.id)
        return "noted"

    async with made:
        yield made


@pytest.mark.parametrize("options", [{}, {"delay": 600.0}, {"id": "mine"}], ids=["waiting", "delayed", "own id"])
async def test_a_run_that_has_not_started(app, options):
    """H12: waiting or delayed: who waits for it is told at once, and no worker ever starts it."""
    run = await app.send("note", **options)
    waiting = asyncio.create_task(run.result(PATIENCE))
    await asyncio.sleep(0)
    assert await run.cancel() is Cancellation.CANCELLED
    with pytest.raises(TaskCancelledError):
        await waiting
    assert await run.status() is TaskState.CANCELLED
    assert await run.cancel() is Cancellation.ENDED
    async with app.worker():
        assert await (await app.send("note")) == "noted"
    assert run.id not in app.seen
    assert (await empty(app)).counters["cancelled"] == 1


async def test_a_run_that_runs(app):
    """H12: its agent is cancelled within about a second, and its run ends as cancelled, not as retried."""
    async with app.worker():
        run = await app.send("hang")
        await app.started.wait()
        waiting = asyncio.create_task(run.result(PATIENCE))
        assert await run.cancel() is Cancellation.REQUESTED
        with pytest.raises(TaskCancelledError):
            await waiting
        assert app.ended.is_set()
        assert await app.cancel(run.id) is Cancellation.ENDED
    counters = (await empty(app)).counters
    assert (counters["cancelled"], counters.get("retried", 0), app.seen) == (1, 0, [run.id])


async def test_a_run_that_is_held_and_has_not_started(app):
    """H12: read by a worker that is full: it never starts."""
    async with app.worker(concurrency=1, batch_size=10) as worker:
        first = await app.send("hang")
        await app.started.wait()
        second = await app.send("note")
        await until(lambda: asyncio.sleep(0, worker.held >= 2))
        assert await second.cancel() is Cancellation.REQUESTED
        await until(lambda: marked(worker, second.id))
        assert await first.cancel() is Cancellation.REQUESTED
        for run in (first, second):
            with pytest.raises(TaskCancelledError):
                await run.result(PATIENCE)
    assert app.seen == [first.id]
    assert (await empty(app)).counters["cancelled"] == 2


async def marked(worker, task_id):
    """Whether the worker has been told: what it holds is marked, or ended by it."""
    held = [d for lane in worker.queue.held for d in lane.values() if d.header.id == task_id]
    return not held or worker.queue.cancel_requested(held[0])


async def test_a_run_that_fails_while_it_is_to_be_cancelled(app):
    """H12: its retry never comes."""
    go = asyncio.Event()

    @app.agent
    async def flaky(task: BaseTask) -> None:
        app.seen.append(task.id)
        app.started.set()
        await go.wait()
        raise ValueError("no")

    async with app.worker():
        run = await app.send("flaky")
        await app.started.wait()
        assert await run.cancel() is Cancellation.REQUESTED
        go.set()
        with pytest.raises(TaskCancelledError):
            await run.result(PATIENCE)
    counters = (await empty(app)).counters
    assert (counters["cancelled"], counters.get("retried", 0), len(app.seen)) == (1, 0, 1)


async def test_runs_that_nobody_waits_for(app):
    """H12: sent with want_result=False they are cancelled all the same."""
    runs = [await app.send("hang", want_result=False) for _ in range(3)]
    assert [await run.cancel() for run in runs] == [Cancellation.CANCELLED] * 3
    assert (await empty(app)).counters["cancelled"] == 3


WORKER = """
    import asyncio, os, sys
    from orchestra import App

    app = App("cancels", os.environ["ORCHESTRA_REDIS_URL"])

    @app.agent
    async def hang() -> None:
        print("started", flush=True)
        try:
            await asyncio.sleep(600)
        finally:
            print("stopped", flush=True)

    async def main() -> None:
        await app.worker().run()

    asyncio.run(main())
"""


async def test_a_task_that_runs_in_another_process(redis_url):
    """H12: the mark reaches the other process; its agent stops, and the sender here hears of it."""
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        async with App("cancels", redis_url) as app:
            run = await app.send("hang")
            async with asyncio.timeout(PATIENCE):
                assert await asyncio.to_thread(worker.stdout.readline) == "started\n"
                assert await run.cancel() is Cancellation.REQUESTED
                assert await asyncio.to_thread(worker.stdout.readline) == "stopped\n"
            with pytest.raises(TaskCancelledError):
                await run.result(PATIENCE)
            assert (await empty(app)).counters["cancelled"] == 1
    finally:
        worker.terminate()
        worker.wait(PATIENCE)
        worker.stdout.close()


async def test_a_task_whose_worker_was_killed(manager, redis_url):
    """H12, A2: cancelled while its holder is dead: whoever takes it over ends it, and it does not run again."""
    dead = subprocess.run(
        [sys.executable, "-c", "from orchestra._identity import consumer_name; print(consumer_name())"],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    ).stdout.strip()
    async with App("cancels", redis_url) as app:
        run = await app.send("note")
        victim = RedisStreamTaskQueue("cancels", "workers", manager=manager)
        await victim.maintain(dead, 0)
        (delivery,) = await victim.read(dead, 1, 1000)
        assert await run.cancel() is Cancellation.REQUESTED

        @app.agent
        async def note() -> None:
            raise AssertionError("it was cancelled")

        async with app.worker():
            with pytest.raises(TaskCancelledError):
                await run.result(PATIENCE)
        counters = (await empty(app)).counters
        assert (counters["cancelled"], counters["reclaimed"]) == (1, 1)
        assert consumer_name() != dead
        assert delivery.header.id == run.id
        await victim.close()


async def test_a_storm_of_cancels(redis_url):
    """H12: hundreds of tasks anywhere, each cancelled while workers run: every one ends once, and all are told."""
    async with App("cancels", redis_url, concurrency=20) as app, ConnectionManager(redis_url) as manager:

        @app.agent
        async def nap(n: int) -> int:
            await asyncio.sleep(0.001 * (n % 40))
            return n

        runs = await app.send_many(
            {"type": "nap", "input": {"n": n}, "priority": n % 4, **({"delay": 0.05} if n % 5 == 0 else {})}
            for n in range(300)
        )
        async with app.worker():
            answers = await asyncio.gather(*(run.cancel() for run in runs[::2]))
            results = await asyncio.gather(*(run.result(PATIENCE) for run in runs), return_exceptions=True)
        stats = await empty(app)
        ends = [isinstance(result, TaskCancelledError) for result in results]
        assert stats.counters["cancelled"] == sum(ends)
        assert stats.counters["completed"] == 300 - sum(ends)
        assert not any(ends[1::2]), "only what was to be cancelled"
        for answer, end in zip(answers, ends[::2], strict=True):
            assert end or answer is not Cancellation.CANCELLED
            assert not end or answer is not Cancellation.ENDED
        assert [n for n, end in enumerate(ends) if not end] == [r for r in results if isinstance(r, int)]
        assert await manager.client.zcard(app.queue.keys.cancels) <= answers.count(Cancellation.REQUESTED)
