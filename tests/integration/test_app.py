"""The front door over a real Redis."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from orchestra.app import App
from orchestra.errors import StoreUnavailableError, TaskFailedError
from orchestra.flow_control import RateLimitConfig
from orchestra.tasks import BaseTask, Outcome, Retry, TaskPriority, TaskState


def pid_and_square(n: int) -> tuple[int, int]:
    return os.getpid(), n * n


def name_of(job: BaseTask, n: int) -> str:
    return f"{job.type} {n} {job.attempt}"


@pytest.fixture
async def app(redis_url):
    made = App("front", retry=Retry(max_retries=1, base=0.001))
    async with made:
        yield made


async def test_send_run_result(app):
    @app.agent
    async def classify(text: str, *, tenant: str = "") -> str:
        return f"{tenant}:{text}"

    app.agent(name_of)
    async with app.worker():
        run = await classify.send("hello", tenant="acme")
        assert await run.result(timeout=5) == "acme:hello"
        assert await run.status() is TaskState.COMPLETED
        named = app.handles["name_of"]
        assert await (await named.send(n=2)).result(timeout=5) == "name_of 2 1"
    stats = await app.queue.stats()
    assert (stats.live, stats.dead, stats.adds_up) == (0, 0, True)


async def test_a_process_runs_the_function_itself(app):
    app.agent(executor="process")(pid_and_square)
    async with app.worker():
        run = await app.send("pid_and_square", {"n": 9})
        pid, value = await run.result(timeout=30)
    assert (pid != os.getpid(), value) == (True, 81)


async def test_calls_made_together_travel_together(app):
    @app.agent
    async def echo(n: int) -> int:
        return n

    before = (await app.manager.client.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0)
    runs = await asyncio.gather(*(echo.send(n) for n in range(200)))
    after = (await app.manager.client.info("commandstats"))["cmdstat_evalsha"]["calls"]
    assert after - before <= 10
    assert len({run.id for run in runs}) == 200
    assert await app.manager.client.exists(*app.queue.keys.dedup) == 0  # ids made here are not looked up
    async with app.worker():
        assert await asyncio.gather(*runs) == list(range(200))


async def test_the_same_key_is_one_task_and_one_result(app):
    calls = []

    @app.agent
    async def work(n: int) -> int:
        calls.append(n)
        return n

    keyed = work.using(key="doc-1")
    first, second = await keyed.send(1), await keyed.send(2)
    assert first.message_id == second.message_id
    async with app.worker():
        assert (await first, await second) == (1, 1)
        assert await (await keyed.send(3)).result(timeout=5) == 1
    assert calls == [1]


async def test_a_dead_task_tells_why_and_stays_readable(app):
    @app.agent
    async def boom() -> None:
        raise LookupError("gone")

    async with app.worker():
        run = await boom.send()
        with pytest.raises(TaskFailedError, match="LookupError: gone") as caught:
            await run.result(timeout=5)
    assert (caught.value.attempts, caught.value.reason) == (2, "failed")
    assert await app.run(run.id).status() is TaskState.FAILED
    (letter,) = await app.queue.read_dlq()
    assert letter.task_data["id"] == run.id


async def test_priority_and_delay_are_kept(app):
    order = []

    @app.agent
    async def note(n: int) -> None:
        order.append(n)

    await note.send(1)
    await note.using(priority=TaskPriority.LOW).send(2)
    late = await note.using(priority=TaskPriority.CRITICAL, delay=0.3).send(3)
    await note.using(priority=TaskPriority.CRITICAL).send(0)
    async with app.worker(concurrency=1):
        await late.result(timeout=5)
    assert order == [0, 1, 2, 3]


async def test_a_limit_is_shared_by_workers(app, redis_url):
    other = App("front", redis_url)

    for each in (app, other):

        @each.agent(name="limited", limit=RateLimitConfig(rate=20, burst=1))
        async def limited(n: int) -> float:
            return time.monotonic()

    first, second = app.worker(), other.worker()
    async with first, second:
        began = time.monotonic()
        runs = await app.send_many([{"type": "limited", "input": {"n": n}} for n in range(8)])
        await asyncio.gather(*runs)
        took = time.monotonic() - began
    await other.close()
    assert took > 7 / 20 * 0.9
    assert first.outcomes[Outcome.FAILED] == second.outcomes[Outcome.FAILED] == 0


async def test_an_agent_may_send(app):
    @app.agent
    async def part(n: int) -> int:
        return n * 10

    @app.agent
    async def whole(n: int) -> int:
        return sum([await run for run in await part.send_many([(i,) for i in range(n)])])

    async with app.worker(concurrency=4):
        assert await (await whole.send(4)).result(timeout=5) == 60


def test_one_app_in_two_loops(redis_url):
    app = App("loops", redis_url)

    @app.agent
    async def work(n: int) -> int:
        return n

    async def send() -> str:
        async with app:
            return (await work.send(5)).id

    async def receive(task_id: str) -> int:
        async with app, app.worker():
            return await app.run(task_id).result(timeout=5)

    assert asyncio.run(receive(asyncio.run(send()))) == 5


async def test_a_wrong_address_is_an_error_when_connecting(free_port):
    app = App("x", f"redis://127.0.0.1:{free_port}")
    with pytest.raises(StoreUnavailableError):
        await app.connect()
    await app.close()


async def test_without_an_address_it_is_the_embedded_server(tmp_path):
    app = App("local", f"embedded:{tmp_path / 'd'}")

    @app.agent
    async def work(n: int) -> int:
        return n + 1

    async with app, app.worker():
        assert await (await work.send(1)).result(timeout=10) == 2
    assert App("default").address.scheme == "embedded"
