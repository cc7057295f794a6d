"""What the tests of the hot connection share: a server that misbehaves on purpose, and both event loops."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from orchestra._redis.wire import Endpoint, Wire


@contextlib.asynccontextmanager
async def open_wire(endpoint, **options):
    wire = await Wire.connect(endpoint, **options)
    try:
        yield wire
    finally:
        await wire.aclose()


@contextlib.asynccontextmanager
async def fake_server(answer):
    """A server on the loopback that runs ``answer(reader, writer)`` for each connection, after greeting it."""
    handlers = set()

    async def handle(reader, writer):
        handlers.add(asyncio.current_task())
        try:
            if await reader.read(4096):  # the greeting: one CLIENT SETNAME
                writer.write(b"+OK\r\n")
                await answer(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            handlers.discard(asyncio.current_task())
            writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield Endpoint(host="127.0.0.1", port=server.sockets[0].getsockname()[1], label="fake")
    finally:
        server.close()
        for task in list(handlers):
            task.cancel()
        await asyncio.sleep(0)
        await server.wait_closed()


def run_on(kind, main):
    """Run the coroutine function ``main`` on asyncio's own loop or on uvloop's."""
    factory = None
    if kind == "uvloop":
        factory = pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())


LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
