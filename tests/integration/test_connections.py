"""The connection manager against real servers, a Sentinel, and users with few rights."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import hiredis
import pytest
import redis

from orchestra._shared import reset
from orchestra.connections import (
    ConnectionManager,
    get_connection_manager,
    map_redis_error,
    parse_address,
    reply_code,
    store_errors,
)
from orchestra.embedded import EmbeddedServer
from orchestra.errors import (
    BackpressureRejectedError,
    ConfigurationError,
    StoreAuthError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)


async def test_client_wire_and_sync_client_see_the_same_database(manager):
    assert await manager.client.set("k", b"\xff") is True
    wire = await manager.open_wire("reader")
    assert await wire.call("GET", "k") == b"\xff"
    assert b"orchestra:reader" in await wire.call("CLIENT", "GETNAME")
    assert await asyncio.to_thread(manager.sync_client().get, "k") == b"\xff"


async def test_it_speaks_resp2_and_repeats_nothing(manager):
    kwargs = manager.client.connection_pool.connection_kwargs
    assert kwargs["protocol"] == 2
    assert kwargs["retry"].get_retries() == 0
    assert manager.sync_client().get_retry().get_retries() == 0
    about = await manager.client.client_info()
    assert str(about["resp"]) == "2"
    assert about["name"] == "orchestra"


async def test_a_command_that_times_out_is_sent_once(make_server):
    """redis-py's own defaults would send it eleven times."""
    server = make_server()
    async with ConnectionManager(server.url, timeout=0.3) as manager:
        await manager.ping()
        server.ask(b"CONFIG RESETSTAT")
        blocker = asyncio.create_task(asyncio.to_thread(server.ask, b"DEBUG SLEEP 1"))
        await asyncio.sleep(0.1)
        with pytest.raises(StoreUnavailableError, match="INCR"), store_errors("here", "INCR"):
            await manager.client.execute_command("INCR", "n")
        await blocker
        assert await manager.client.get("n") == b"1"
        assert server.ask(b"INFO commandstats").count(b"cmdstat_incr:calls=1,") == 1


async def test_ping_is_a_duration(manager):
    assert 0 < await manager.ping() < 5


async def test_server_info(manager):
    info = await manager.server_info()
    assert info.kind in {"redis", "valkey"}
    assert info.version >= (7, 0)
    assert len(info.run_id) == 40
    assert info.role == "master"
    assert info.maxmemory_policy == "noeviction"
    assert info.aof_enabled is False


async def test_supports_asks_the_server_once_for_each_command(manager):
    assert await manager.supports("xadd", "EVALSHA")
    assert not await manager.supports("NOSUCHCOMMAND")
    assert not await manager.supports("XADD", "NOSUCHCOMMAND")
    calls = (await manager.client.info("commandstats"))["cmdstat_command|info"]["calls"]
    assert await manager.supports("XADD")
    assert not await manager.supports("NOSUCHCOMMAND")
    assert (await manager.client.info("commandstats"))["cmdstat_command|info"]["calls"] == calls
    newer = (await manager.server_info()).version >= (8, 2)
    if (await manager.server_info()).kind == "redis":
        assert await manager.supports("XACKDEL") is newer


async def test_a_user_with_few_rights_is_enough(make_server):
    server = make_server()
    server.ask(b"ACL SETUSER worker on >pw ~orc:* -@all +ping +xadd +hello +auth")
    async with ConnectionManager(f"unix://worker:pw@{server.socket}") as manager:
        info = await manager.server_info()
        assert info.version >= (7, 0)
        assert info.role == "master"
        assert info.maxmemory_policy is None
        assert info.aof_enabled is None
        assert not await manager.supports("XACKDEL")
        wire = await manager.open_wire("writer")
        with pytest.raises(StoreAuthError, match="NOPERM"):
            await wire.call("XADD", "other", "*", "a", "b")
        assert await wire.call("XADD", "orc:x", "*", "a", "b")
        assert await asyncio.to_thread(manager.sync_client().xadd, "orc:x", {"a": "b"})


async def test_a_wrong_password_is_said_and_not_shown(make_server):
    server = make_server("--requirepass", "right")
    manager = ConnectionManager(f"unix://:wr0ng@{server.socket}")
    with pytest.raises(StoreAuthError, match=r":\*\*\*@") as caught:
        await manager.connect()
    assert "wr0ng" not in str(caught.value)
    assert not manager.connected
    await manager.close()
    manager = ConnectionManager(server.url)
    with pytest.raises(StoreAuthError):
        await manager.connect()
    async with ConnectionManager(f"unix://:right@{server.socket}?db=2&client_name=me") as manager:
        assert "right" not in repr(manager)
        about = (await (await manager.open_wire("w")).call("CLIENT", "INFO")).decode()
        assert "db=2" in about
        assert "name=me:w" in about


async def test_nobody_there(free_port, tmp_path):
    for url in (f"redis://127.0.0.1:{free_port}", f"unix://{tmp_path}/none.sock"):
        manager = ConnectionManager(url)
        with pytest.raises(StoreUnavailableError, match="PING"):
            await manager.connect()
        with pytest.raises(StoreUnavailableError, match=r"connect\(\)"):
            _ = manager.client
        await manager.close()


async def test_close_ends_everything_and_connect_begins_again(redis_url, redis_server):
    manager = ConnectionManager(redis_url)
    await manager.close()
    await manager.connect()
    wire = await manager.open_wire("reader")
    sync = manager.sync_client()
    sync.ping()
    pending = asyncio.create_task(wire.call("BLPOP", "none", 5))
    while not wire.in_flight:
        await asyncio.sleep(0)
    await manager.close()
    await manager.close()
    assert wire.closed
    with pytest.raises(StoreUnavailableError, match="closed by its owner"):
        await pending
    deadline = time.monotonic() + 5
    while redis_server.ask(b"CLIENT LIST").count(b"name=orchestra"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    await manager.connect()
    assert await manager.ping() > 0
    await manager.close()


async def test_the_pool_waits_instead_of_refusing(redis_url):
    async with ConnectionManager(redis_url, max_connections=2) as manager:
        assert await asyncio.gather(*(manager.client.echo(str(n)) for n in range(50))) == [
            str(n).encode() for n in range(50)
        ]


async def test_concurrent_connects_make_one_client(redis_url):
    manager = ConnectionManager(redis_url)
    await asyncio.gather(*(manager.connect() for _ in range(10)))
    client = manager.client
    await manager.connect()
    assert manager.client is client
    await manager.close()


async def test_the_shared_manager(redis_url):
    reset()
    manager = get_connection_manager()
    assert manager is get_connection_manager()
    assert manager is get_connection_manager(redis_url)
    assert not manager.connected
    assert await manager is manager
    assert manager.connected
    await manager.close()
    other = get_connection_manager()
    assert other is not manager
    await other.close()


async def test_a_sync_client_works_in_a_thread_while_the_loop_is_blocked(manager):
    client = manager.sync_client()
    replies = []
    thread = threading.Thread(target=lambda: replies.extend(client.incr("n") for _ in range(20)))
    thread.start()
    thread.join(10)
    assert replies == list(range(1, 21))


def test_bad_settings_are_refused():
    for settings in ({"max_connections": 0}, {"timeout": 0}, {"connect_timeout": float("inf")}):
        with pytest.raises(ConfigurationError, match=next(iter(settings))):
            ConnectionManager("redis://h", **settings)
    with pytest.raises(ConfigurationError, match="no Redis"):
        ConnectionManager("memory:")
    with pytest.raises(ConfigurationError, match="not supported yet"):
        ConnectionManager("redis+cluster://h")
    with pytest.raises(ConfigurationError, match="certificates"):
        ConnectionManager("rediss://h?ssl_ca_certs=/none.pem")


def test_options_of_the_address_go_before_arguments():
    manager = ConnectionManager("redis://h?socket_timeout=2&max_connections=3", timeout=9, max_connections=9)
    assert (manager.timeout, manager.max_connections, manager.connect_timeout) == (2.0, 3, 5.0)


# The embedded server


async def test_an_embedded_address_starts_and_stops_the_server(tmp_path):
    async with ConnectionManager(f"embedded:{tmp_path / 'q'}") as manager:
        pid = manager.embedded.pid
        assert (await manager.server_info()).aof_enabled is True
        async with ConnectionManager(f"embedded:{tmp_path / 'q'}") as other:
            assert other.embedded.pid == pid
        assert await (await manager.open_wire("w")).call("PING") == b"PONG"
        assert manager.sync_client().ping()
    assert not Path(manager.embedded.socket).exists()
    with pytest.raises(StoreUnavailableError, match="connect"):
        manager.sync_client()


async def test_open_wire_starts_a_crashed_embedded_server_again(tmp_path):
    async with ConnectionManager(f"embedded:{tmp_path / 'q'}") as manager:
        wire = await manager.open_wire("w")
        await wire.call("SET", "k", "1")
        await asyncio.sleep(0.01)
        os.kill(manager.embedded.pid, 9)
        with pytest.raises(StoreUnavailableError):
            await wire.call("GET", "k")
        again = await manager.open_wire("w")
        assert await again.call("GET", "k") == b"1"
        deadline = time.monotonic() + 5
        while True:  # pooled connections of the old server fail once each
            try:
                assert await manager.ping() > 0
                break
            except StoreUnavailableError:
                assert time.monotonic() < deadline


async def test_without_an_address_the_embedded_server_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    async with ConnectionManager() as manager:
        assert manager.embedded.dir == tmp_path / "orchestra" / "embedded"
        assert await manager.ping() > 0


def test_a_subprocess_reaches_the_server_of_the_fixture(redis_url, redis_server):
    code = """
import asyncio
from orchestra.connections import get_connection_manager
async def main():
    manager = await get_connection_manager()
    await manager.client.set("from", "child")
    await manager.close()
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert redis_server.ask(b"GET from") == b"$5\r\nchild\r\n"


async def test_a_cancelled_connect_leaves_no_embedded_server(tmp_path):
    manager = ConnectionManager(f"embedded:{tmp_path / 'q'}")
    task = asyncio.create_task(manager.connect())
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not manager.embedded.started
    await manager.close()


# Sentinel


@pytest.fixture
def sentinel(make_server):
    """A Sentinel that watches a master with one replica; all on the loopback."""
    from tests.conftest import free_port

    ports = [free_port() for _ in range(3)]
    master = make_server("--port", str(ports[0]), "--bind", "127.0.0.1")
    replica = make_server("--port", str(ports[1]), "--bind", "127.0.0.1", "--replicaof", "127.0.0.1", str(ports[0]))
    place = Path(tempfile.mkdtemp(prefix="orc-test-"))
    conf = place / "sentinel.conf"
    conf.write_text(
        f"port {ports[2]}\nbind 127.0.0.1\ndir {place}\nunixsocket {place}/s.sock\n"
        f"sentinel monitor mymaster 127.0.0.1 {ports[0]} 1\n"
        "sentinel down-after-milliseconds mymaster 500\nsentinel failover-timeout mymaster 3000\n"
    )
    with open(place / "log", "wb") as out:
        process = subprocess.Popen(
            [master.program, str(conf), "--sentinel"], stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    yield f"redis+sentinel://127.0.0.1:{ports[2]}/mymaster", master, replica, ports
    process.terminate()
    process.wait(10)
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
async def test_sentinel_finds_the_master_and_after_a_failover_the_new_one(sentinel):
    url, master, replica, ports = sentinel
    manager = ConnectionManager(url, connect_timeout=2)
    await _eventually(manager.connect)
    wire = await manager.open_wire("writer")
    assert await wire.call("SET", "k", "1") == b"OK"
    assert (await manager.server_info()).role == "master"
    assert await asyncio.to_thread(manager.sync_client().get, "k") == b"1"
    watcher = redis.Redis(port=int(url.split(":")[2].split("/")[0]))

    async def replica_is_known():
        if not [r for r in watcher.sentinel_slaves("mymaster") if r["port"] == ports[1] and not r["is_disconnected"]]:
            raise StoreUnavailableError("not yet")
        if b"master_link_status:up" not in replica.ask(b"INFO replication"):
            raise StoreUnavailableError("not yet")

    await _eventually(replica_is_known)
    master.kill()
    with pytest.raises(StoreUnavailableError):
        await wire.call("GET", "k")

    async def write():
        fresh = await manager.open_wire("writer")
        return await fresh.call("SET", "k", "2")

    assert await _eventually(write) == b"OK"
    assert b"role:master" in replica.ask(b"INFO replication")
    watcher.close()
    await manager.close()


async def _eventually(action, seconds=40):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await action()
        except StoreUnavailableError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


async def test_a_sentinel_that_is_not_there(free_port):
    manager = ConnectionManager(f"redis+sentinel://127.0.0.1:{free_port}/m", connect_timeout=0.5)
    with pytest.raises(StoreUnavailableError):
        await manager.connect()
    await manager.close()


# Errors


def _texts(code):
    return hiredis.ReplyError(f"{code} some words")


@pytest.mark.parametrize(
    ("exc", "kind", "code"),
    [
        (_texts("NOAUTH"), StoreAuthError, "NOAUTH"),
        (_texts("WRONGPASS"), StoreAuthError, "WRONGPASS"),
        (_texts("NOPERM"), StoreAuthError, "NOPERM"),
        (_texts("OOM"), StoreFullError, "OOM"),
        (_texts("LOADING"), StoreUnavailableError, "LOADING"),
        (_texts("READONLY"), StoreUnavailableError, "READONLY"),
        (_texts("MASTERDOWN"), StoreUnavailableError, "MASTERDOWN"),
        (_texts("NOGROUP"), StoreError, "NOGROUP"),
        (hiredis.ReplyError("ERR max number of clients reached"), StoreUnavailableError, "MAXCLIENTS"),
        (hiredis.ReplyError("no code at all"), StoreError, ""),
        (redis.AuthenticationError("x"), StoreAuthError, "WRONGPASS"),
        (redis.BusyLoadingError("x"), StoreUnavailableError, "LOADING"),
        (redis.OutOfMemoryError("x"), StoreFullError, "OOM"),
        (redis.exceptions.NoPermissionError("x"), StoreAuthError, "NOPERM"),
        (redis.exceptions.NoScriptError("x"), StoreError, "NOSCRIPT"),
        (redis.ReadOnlyError("x"), StoreUnavailableError, "READONLY"),
        (redis.ResponseError("WRONGTYPE x"), StoreError, "WRONGTYPE"),
        (redis.TimeoutError("x"), StoreUnavailableError, ""),
        (redis.ConnectionError("x"), StoreUnavailableError, ""),
        (redis.DataError("x"), StoreError, ""),
        (TimeoutError("x"), StoreUnavailableError, ""),
        (ConnectionRefusedError("x"), StoreUnavailableError, ""),
        (ValueError("x"), StoreError, ""),
    ],
)
def test_the_table_of_errors(exc, kind, code):
    error = map_redis_error(exc, address="redis://h", doing="XADD")
    assert type(error) is kind
    assert "redis://h" in str(error)
    assert "XADD" in str(error)
    assert error.__cause__ is exc
    assert reply_code(error) == reply_code(exc) == code


def test_our_own_errors_stay_as_they_are():
    ours = BackpressureRejectedError("no", retry_after=1.0)
    assert map_redis_error(ours) is ours
    unavailable = StoreUnavailableError("gone")
    with pytest.raises(StoreUnavailableError) as caught, store_errors("here"):
        raise unavailable
    assert caught.value is unavailable


async def test_the_errors_of_a_live_server_are_in_the_table(make_server):
    server = make_server("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    async with ConnectionManager(server.url) as manager:
        wire = await manager.open_wire("w")
        with pytest.raises(StoreFullError, match="maxmemory"):
            await wire.call("SET", "k", b"x")
        with pytest.raises(StoreFullError), store_errors(manager.address.safe, "SET"):
            await manager.client.set("k", b"x")
        await wire.call("CONFIG", "SET", "maxmemory", "0")
        await wire.call("SET", "k", b"x")
        with pytest.raises(StoreError, match="WRONGTYPE") as caught, store_errors(manager.address.safe, "XADD"):
            await manager.client.xadd("k", {"a": "b"})
        assert reply_code(caught.value) == "WRONGTYPE"
        await wire.call("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnavailableError, match="replica"):
            await wire.call("SET", "k", b"x")


def test_the_safe_address_is_what_errors_show():
    address = parse_address("redis://u:s3cret@h/1")
    assert "s3cret" not in str(map_redis_error(OSError("no"), address=address.safe))


def test_the_embedded_server_of_a_manager_is_an_embedded_server(tmp_path):
    manager = ConnectionManager(f"embedded:{tmp_path}")
    assert isinstance(manager.embedded, EmbeddedServer)
    assert manager.embedded.dir == tmp_path
