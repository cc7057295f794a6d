"""Connections that a server refuses: too many clients, and TLS that cannot be trusted. Both kinds of connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess

import pytest

from orchestra._redis.wire import Wire
from orchestra.connections import ConnectionManager, store_errors
from orchestra.errors import ConfigurationError, StoreUnavailableError
from orchestra.task_queue import RedisStreamTaskQueue

# -- B18: maxclients


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture
def full(make_server):
    """A server whose last connection is taken, and the connections that take them."""
    server = make_server("--maxclients", "6")
    taken = contextlib.ExitStack()
    with taken:
        yield server, taken


def answered(sock, path):
    sock.settimeout(10)
    try:
        sock.connect(path)
        sock.sendall(b"PING\r\n")
        return sock.recv(100) == b"+PONG\r\n"
    except OSError:  # it says its reason and hangs up, maybe before we could write
        return False


async def take_all(server, taken):
    while True:
        sock = socket.socket(socket.AF_UNIX)
        if not await asyncio.to_thread(answered, sock, server.socket):
            sock.close()
            return
        taken.callback(sock.close)


async def test_a_server_without_room_for_a_client_says_so(full):
    """B18: a clear error for every kind of connection, no descriptor is lost, and it works when there is room."""
    server, taken = full
    async with ConnectionManager(server.url) as manager:
        wire = await manager.open_wire("mine")
        await take_all(server, taken)
        before = descriptors()
        for _ in range(20):
            with pytest.raises(StoreUnavailableError, match="max number of clients"):
                await manager.open_wire("one too many")
            other = ConnectionManager(server.url)
            with pytest.raises(StoreUnavailableError, match="max number of clients"):
                await other.connect()
            await other.close()
        assert await wire.call("PING") == b"PONG", "those that are in stay in"
        assert descriptors() <= before + 1
        taken.close()
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(StoreUnavailableError):
                    (await manager.open_wire("later")).close()
                    break
                await asyncio.sleep(0.02)


async def test_a_producer_waits_for_room_without_a_storm(full):
    """B18: backoff; the task is added once there is room."""
    server, taken = full
    manager = await ConnectionManager(server.url).connect()
    queue = RedisStreamTaskQueue("tasks", "workers", manager=manager, patience=20.0)
    await take_all(server, taken)
    refused = int((await manager.client.info("stats"))["rejected_connections"])
    sending = asyncio.create_task(queue.produce({"id": "t", "type": "x"}))
    while int((await manager.client.info("stats"))["rejected_connections"]) < refused + 3:
        await asyncio.sleep(0.01)
    assert not sending.done()
    began = asyncio.get_running_loop().time()
    first = int((await manager.client.info("stats"))["rejected_connections"])
    await asyncio.sleep(0.5)
    seconds = asyncio.get_running_loop().time() - began
    storm = int((await manager.client.info("stats"))["rejected_connections"]) - first
    assert storm <= 20 * seconds, f"{storm} attempts in {seconds:.2f} s"
    taken.close()
    assert await sending
    assert (await queue.stats()).live == 1
    await queue.close()
    await manager.close()


# -- C13: TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A CA, and what it signed: good, expired, and for another name; and another CA."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is needed to make certificates")
    place = tmp_path_factory.mktemp("tls")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"

    def run(command):
        subprocess.run(f"openssl {command}".split(), check=True, capture_output=True, cwd=place)

    for ca in ("ca", "other"):
        run(f"req -x509 {key} -days 2 -subj /CN={ca} -keyout {ca}.key -out {ca}.pem")
    for name, subject, days in (("good", "localhost", 2), ("expired", "localhost", -1), ("foreign", "elsewhere", 2)):
        run(f"req {key} -subj /CN={subject} -keyout {name}.key -out {name}.csr")
        (place / "ext").write_text(f"subjectAltName=DNS:{subject}")
        run(
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days {days} -extfile ext -out {name}.pem"
        )
    return place


@contextlib.asynccontextmanager
async def tls_before(server, certificates, name):
    """A TLS endpoint with certificate ``name`` in front of ``server``; its port. Without a name: no TLS."""
    context = None
    if name is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    tasks: set[asyncio.Task] = set()

    async def copy(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            inner_reader, inner_writer = await asyncio.open_unix_connection(server.socket)
            await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        except asyncio.CancelledError:
            writer.transport.abort()

    endpoint = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield endpoint.sockets[0].getsockname()[1]
    finally:
        endpoint.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def every_door(url, seconds=20.0):
    """What each kind of connection raises, or None: redis-py's asynchronous, the hot wire, redis-py's for threads."""
    manager = ConnectionManager(url, timeout=seconds, connect_timeout=seconds)
    raised = []
    try:
        endpoint = await manager._endpoint("test")

        async def synchronous():
            client = manager.sync_client()
            with store_errors("tls"):
                await asyncio.to_thread(client.ping)

        async def hot():
            wire = await Wire.connect(endpoint, connect_timeout=seconds)
            assert await wire.call("PING") == b"PONG"
            await wire.aclose()

        for door in (manager.connect, hot, synchronous):
            try:
                await door()
                raised.append(None)
            except StoreUnavailableError as error:
                raised.append(error)
    finally:
        await manager.close()
    return raised


@pytest.mark.parametrize(
    ("certificate", "trusted", "says"),
    [
        ("good", "ca", None),
        ("expired", "ca", "expired"),
        ("good", "other", "verify failed|unable to get local issuer"),
        ("good", None, "verify failed|self.signed|unable to get local issuer"),
        ("foreign", "ca", "(?i)hostname mismatch|not valid for"),
        (None, "ca", "(?i)ssl|wrong version|record layer|did not answer|closed|timed? ?out|reset"),
    ],
)
async def test_what_cannot_be_trusted_is_refused(redis_server, redis_url, certificates, certificate, trusted, says):
    """C13: expired, wrong CA, unknown CA, another name, no TLS at all; by every door, and never downgraded."""
    async with tls_before(redis_server, certificates, certificate) as port:
        options = f"?ssl_ca_certs={certificates}/{trusted}.pem" if trusted else ""
        raised = await every_door(f"rediss://localhost:{port}{options}", 20.0 if certificate else 0.5)
        if says is None:
            assert raised == [None, None, None]
            return
        for door, error in zip(("redis-py", "wire", "thread"), raised, strict=True):
            assert error is not None, f"{door} was let in"
            texts, seen = [], error
            while seen is not None:
                texts.append(str(seen))
                seen = seen.__cause__ or seen.__context__
            assert any(re.search(says, text) for text in texts), f"{door}: {texts}"
        if certificate == "foreign":
            assert await every_door(f"rediss://localhost:{port}{options}&ssl_check_hostname=no") == [None] * 3


async def test_plain_redis_to_a_tls_port_is_refused(redis_server, redis_url, certificates):
    """C13: the other way round; nothing hangs."""
    async with tls_before(redis_server, certificates, "good") as port:
        raised = await every_door(f"redis://localhost:{port}", 0.5)
        assert all(isinstance(error, StoreUnavailableError) for error in raised), raised


def test_certificates_that_cannot_be_read_are_an_error_not_a_downgrade(tmp_path):
    broken = tmp_path / "ca.pem"
    broken.write_text("no certificate")
    with pytest.raises(ConfigurationError, match="certificates"):
        ConnectionManager(f"rediss://h?ssl_ca_certs={broken}")
    manager = ConnectionManager("rediss://h")
    assert manager._tls.verify_mode is ssl.CERT_REQUIRED
    assert manager._tls.check_hostname is True
