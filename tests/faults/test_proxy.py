"""The proxy does what its first page says; the fault tests rest on it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest

from orchestra._redis.wire import Endpoint, Wire
from orchestra.connections import ConnectionManager
from orchestra.errors import StoreUnavailableError
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._resp import Framer
from tests.faults.proxy import Proxy, ProxyThread


@contextlib.asynccontextmanager
async def through(redis_url, **options):
    """A proxy in front of the session's server, and a wire through it."""
    async with Proxy(redis_url) as proxy:
        port = int(proxy.url.rpartition(":")[2])
        wire = await Wire.connect(
            Endpoint(host="127.0.0.1", port=port, client_name="orchestra:probe", label="proxy"), **options
        )
        try:
            yield proxy, wire
        finally:
            await wire.aclose()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_values_are_found_however_the_stream_is_cut(size):
    values = [
        b"*3\r\n$7\r\nEVALSHA\r\n$2\r\n\r\n\r\n$1\r\n2\r\n",
        b"+OK\r\n",
        b"*2\r\n*-1\r\n*1\r\n$-1\r\n",
        b"PING now\r\n",
        b"%1\r\n+a\r\n:1\r\n",
        b"|1\r\n+ttl\r\n:9\r\n*0\r\n",
        b"-ERR x\r\n",
        b"*0\r\n",
    ]
    stream, framer, found = b"".join(values), Framer(), []
    for at in range(0, len(stream), size):
        found += framer.feed(stream[at : at + size])
    assert [frame.data for frame in found] == values
    assert found[0].head == (b"EVALSHA", b"\r\n", b"2")
    assert found[3].head == (b"PING", b"now")


def test_what_is_no_resp_passes_unframed():
    framer = Framer()
    assert framer.feed(b"*x\r\nrest")[0].data == b"*x\r\nrest"
    assert framer.feed(b"more")[0].data == b"more"


async def test_it_counts_scripts_by_name_and_knows_roles(redis_url):
    async with Proxy(redis_url) as proxy, ConnectionManager(proxy.url) as manager:
        queue = RedisStreamTaskQueue("tasks", "workers", manager=manager)
        await queue.produce_many([{"type": "x"}] * 3)
        assert [task["type"] for _, task in await queue.consume("c", 3, 100)] == ["x"] * 3
        assert proxy.replies["produce_many"] >= 1
        assert proxy.replies["take"] + proxy.replies["XREADGROUP"] >= 1
        assert {"orchestra:commands", "orchestra:reader"} <= {c.name for c in proxy.connections}
        assert proxy.commands["*"] == proxy.replies["*"] + sum(len(c.pending) for c in proxy.connections)
        seen = []
        proxy.observers.append(lambda direction, command: seen.append((direction, command.names[0])))
        assert await queue.get_queue_depth() == 3
        assert seen == [("up", "XLEN")] * 8 + [("up", "ZCARD")] + [("down", "XLEN")] * 8 + [("down", "ZCARD")]
        await queue.close()


async def test_a_dropped_reply_was_executed(redis_url, manager):
    async with through(redis_url) as (proxy, wire):
        rule = proxy.drop_reply("INCR", nth=2)
        assert await wire.call("INCR", "n") == 1
        with pytest.raises(StoreUnavailableError):
            await wire.call("INCR", "n")
        await rule.wait()
        assert await manager.client.get("n") == b"2"


async def test_a_refused_command_was_not(redis_url, manager):
    async with through(redis_url) as (proxy, wire):
        rule = proxy.refuse_command("INCR")
        with pytest.raises(StoreUnavailableError):
            await wire.call("INCR", "n")
        assert rule.fired
        assert await manager.client.get("n") is None


async def test_a_silent_connection_stays_open(redis_url):
    async with through(redis_url) as (proxy, wire):
        rule = proxy.drop_reply("ECHO", how="stay", role="probe")
        with pytest.raises(StoreUnavailableError, match="deadline"):
            await wire.call("ECHO", "a", timeout=0.2)
        assert rule.fired


async def test_held_and_delayed_replies_keep_their_order(redis_url):
    async with through(redis_url) as (proxy, wire):
        held = proxy.hold_reply("ECHO")
        first, second = (asyncio.ensure_future(wire.call("ECHO", text)) for text in "ab")
        await held.wait()
        await proxy.passed("ECHO", 2)
        assert not first.done()
        assert not second.done()
        proxy.release(held)
        assert await asyncio.gather(first, second) == [b"a", b"b"]
        late = proxy.delay_reply("ECHO", seconds=0.2)
        began = time.monotonic()
        assert await wire.call("ECHO", "c") == b"c"
        assert late.fired
        assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_reply_is_cut_at_the_byte(redis_url, how):
    async with Proxy(redis_url) as proxy:
        host, port = proxy.url.removeprefix("redis://").split(":")
        for keep in range(5):
            proxy.truncate_reply("PING", keep=keep, how=how)
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"PING\r\n")
            if how == "fin":
                assert await reader.read() == b"+PONG"[:keep]
            else:
                with pytest.raises(ConnectionResetError):
                    while await reader.read(1):
                        pass
            writer.close()


async def test_bytes_are_counted_over_replies(redis_url):
    async with Proxy(redis_url) as proxy:
        host, port = proxy.url.removeprefix("redis://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        wrong = proxy.corrupt_at(9, b"ZZ")
        writer.write(b"PING\r\nPING\r\n")
        assert await reader.readexactly(14) == b"+PONG\r\n+ZZNG\r\n"
        assert wrong.fired
        cut = proxy.cut_after(10, "fin")
        writer.write(b"PING\r\nPING\r\n")
        assert await reader.read() == b"+PONG\r\n+PO"
        assert cut.fired
        writer.close()


async def test_a_corrupt_reply_closes_a_wire(redis_url):
    async with through(redis_url) as (proxy, wire):
        proxy.corrupt_reply("ECHO", put=b"?")
        with pytest.raises(StoreUnavailableError, match="protocol"):
            await wire.call("ECHO", "a")


async def test_a_black_hole_passes_nothing_and_heals_late(redis_url, manager):
    async with through(redis_url) as (proxy, wire):
        proxy.stall("down", role="probe")
        call = asyncio.ensure_future(wire.call("INCR", "n"))
        while await manager.client.get("n") is None:
            await asyncio.sleep(0.005)
        assert not call.done()
        await proxy.heal()
        assert await call == 1
        proxy.stall("up")
        call = asyncio.ensure_future(wire.call("INCR", "n", timeout=0.2))
        with pytest.raises(StoreUnavailableError):
            await call
        assert await manager.client.get("n") == b"1"
        await proxy.heal(lose=True)
        assert await manager.client.get("n") == b"1"


async def test_delay_and_bandwidth(redis_url):
    async with through(redis_url) as (proxy, wire):
        proxy.delay(0.05, 0.01)
        began = time.monotonic()
        assert await wire.call("ECHO", "a") == b"a"
        assert time.monotonic() - began >= 0.08
        await proxy.heal()
        proxy.slow(10_000, "down")
        began = time.monotonic()
        assert await wire.call("ECHO", "a" * 2000) == b"a" * 2000
        assert time.monotonic() - began >= 0.15


async def test_resets_half_closes_and_refusals(redis_url):
    async with through(redis_url) as (proxy, wire):
        host, port = proxy.url.removeprefix("redis://").split(":")
        assert proxy.half_close("down", role="probe") == 1
        with pytest.raises(StoreUnavailableError):
            await wire.call("PING")
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, int(port))
        await proxy.heal()
        proxy.accept_then_close()
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b""
        writer.close()
        await proxy.heal()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PING\r\n")
        assert await reader.readexactly(7) == b"+PONG\r\n"
        assert proxy.reset() >= 1
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


def test_in_a_thread_and_on_a_unix_socket(redis_url, tmp_path):
    with ProxyThread(redis_url, listen=str(tmp_path / "s")) as proxy:
        rule = proxy.do("truncate_reply", "PING", keep=3)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(proxy.url.removeprefix("unix://"))
            client.sendall(b"PING\r\n")
            proxy.wait(rule)
            assert client.recv(100) == b"+PO"
            assert client.recv(100) == b""
