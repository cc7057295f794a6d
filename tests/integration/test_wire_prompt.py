"""Who awaits a single reply goes on in the turn in which it arrives; in every other case the event loop tells it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars

import pytest

from orchestra._redis.wire import Endpoint, Wire, pack
from orchestra.connections import ConnectionManager
from orchestra.errors import StoreUnavailableError
from orchestra.task_queue import RedisStreamTaskQueue
from tests.integration.wire_peers import LOOPS, run_on

where = contextvars.ContextVar("where", default="nowhere")


@pytest.fixture
def endpoint(redis_server, redis_url):
    return Endpoint(path=redis_server.socket, label=redis_url, client_name="orchestra:test")


class Watched(Wire):
    """Notes what had been told when it was done with the bytes that came."""

    def buffer_updated(self, nbytes):
        super().buffer_updated(nbytes)
        self.seen = [*getattr(self, "seen", []), list(getattr(self, "told", []))]


@contextlib.asynccontextmanager
async def open_watched(endpoint):
    wire = await Watched.connect(endpoint)
    wire.told, wire.seen = [], []
    try:
        yield wire
    finally:
        await wire.aclose()


async def ask(wire, word, *, prompt=True):
    (reply,) = await wire.send_nowait(pack([("ECHO", word)]), 1, shared=True, prompt=prompt)
    wire.told.append((reply.decode(), where.get()))
    return reply


@LOOPS
@pytest.mark.parametrize("prompt", [True, False])
def test_it_goes_on_before_the_wire_is_done_in_its_own_context(endpoint, loop, prompt):
    async def main():
        async with open_watched(endpoint) as wire:
            where.set("here")
            assert await ask(wire, "a", prompt=prompt) == b"a"
            assert wire.told == [("a", "here")]
            assert asyncio.current_task() is not None
            while not wire.seen:
                await asyncio.sleep(0)
            assert wire.seen == [wire.told if prompt else []]

    run_on(loop, main)


@LOOPS
def test_one_with_others_behind_it_is_told_by_the_event_loop_and_all_get_their_own(endpoint, loop):
    async def main():
        async with open_watched(endpoint) as wire:
            words = [f"w{n}" for n in range(50)]
            assert await asyncio.gather(*(ask(wire, word) for word in words)) == [word.encode() for word in words]
            assert sorted(word for word, _ in wire.told) == sorted(words)

    run_on(loop, main)


@LOOPS
def test_nobody_is_overtaken_where_several_replies_come_in_one_read(endpoint, loop):
    async def main():
        async with open_watched(endpoint) as wire:
            await wire.call("PING")
            words = [f"w{n}" for n in range(5)]
            for _ in range(20):
                wire.told.clear()
                tasks = [asyncio.create_task(ask(wire, word)) for word in words]
                for task in tasks:
                    await task
                assert [word for word, _ in wire.told] == words

    run_on(loop, main)


@LOOPS
def test_a_cancelled_one_hears_of_it_at_once_and_its_reply_reaches_nobody_else(endpoint, loop):
    async def main():
        async with open_watched(endpoint) as wire:
            blocked = pack([("BLPOP", "empty", "30")])

            async def wait():
                await wire.send_nowait(blocked, 1, shared=True, prompt=True)

            task = asyncio.create_task(wait())
            while not wire.in_flight:
                await asyncio.sleep(0)
            task.cancel()
            async with asyncio.timeout(20):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert not wire.closed
            other = asyncio.create_task(ask(wire, "mine"))
            helper = await Wire.connect(endpoint)
            await helper.call("RPUSH", "empty", "late")
            await helper.aclose()
            assert await other == b"mine"

    run_on(loop, main)


@LOOPS
def test_a_lost_connection_fails_it(endpoint, loop):
    async def main():
        async with open_watched(endpoint) as wire:
            task = asyncio.create_task(wire.pipeline([("CLIENT", "ID")]))
            (number,) = await task
            blocked = wire.send_nowait(pack([("BLPOP", "empty", "30")]), 1, shared=True, prompt=True)
            helper = await Wire.connect(endpoint)
            await helper.call("CLIENT", "KILL", "ID", number)
            with pytest.raises(StoreUnavailableError):
                await blocked
            await helper.aclose()

    run_on(loop, main)


@LOOPS
def test_who_goes_on_may_close_the_wire(endpoint, loop):
    async def main():
        async with open_watched(endpoint) as wire:
            await ask(wire, "a")
            wire.close()
            assert wire.closed
            with pytest.raises(StoreUnavailableError):
                await ask(wire, "b")

    run_on(loop, main)


@LOOPS
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_program_ends_it(endpoint, loop, error):
    async def main():
        wire = await Watched.connect(endpoint)
        wire.told = []
        await ask(wire, "a")
        wire.close()  # what follows is raised in the same step: nothing was awaited since the reply
        raise error("enough")

    with pytest.raises(error):
        run_on(loop, main)


@LOOPS
def test_a_producer_in_a_loop_starves_nobody(redis_url, loop):
    async def main():
        turns, over = 0, asyncio.Event()

        async def other():
            nonlocal turns
            while not over.is_set():
                turns += 1
                await asyncio.sleep(0)

        async with ConnectionManager(redis_url) as manager:
            queue = RedisStreamTaskQueue("tasks", "workers", manager=manager)
            ids = [await queue.produce({"type": "x"})]
            task = asyncio.create_task(other())
            ids += [await queue.produce({"type": "x"}) for _ in range(300)]
            over.set()
            await task
            assert len(set(ids)) == 301
            assert await queue.get_queue_depth() == 301
            assert turns >= 300 // 32, "libuv reads a socket up to 32 times in a turn, asyncio once"
            await queue.close()

    run_on(loop, main)
