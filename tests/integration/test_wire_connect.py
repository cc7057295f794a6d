"""Opening a hot connection: greeting, refusals, TCP and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
import subprocess

import pytest

from orchestra._redis.wire import Endpoint, Wire, pack
from orchestra.errors import ConfigurationError, StoreAuthError, StoreUnavailableError
from tests.integration.wire_peers import LOOPS, open_wire, run_on


@pytest.fixture
def endpoint(redis_server, redis_url):
    return Endpoint(path=redis_server.socket, label=redis_url, client_name="orchestra:test")


async def test_nothing_listens(tmp_path, free_port):
    with pytest.raises(StoreUnavailableError, match="Is the server running"):
        await Wire.connect(Endpoint(host="127.0.0.1", port=free_port, label="nobody"))
    with pytest.raises(StoreUnavailableError, match="Is the server running"):
        await Wire.connect(Endpoint(path=str(tmp_path / "none.sock"), label="nobody"))


async def test_a_server_that_hangs_or_hangs_up_at_connect():
    async def hang(reader, writer):
        await asyncio.sleep(60)

    async def accept(reader, writer):
        writer.transport.abort()

    for handler, says in ((hang, "did not answer within"), (accept, "fake")):
        tasks = set()

        async def handle(reader, writer, handler=handler, tasks=tasks):
            tasks.add(asyncio.current_task())
            with contextlib.suppress(asyncio.CancelledError):
                await handler(reader, writer)
            writer.transport.abort()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(StoreUnavailableError, match=says):
                await Wire.connect(Endpoint(host="127.0.0.1", port=port, label="fake"), connect_timeout=0.2)
            for task in list(tasks):
                task.cancel()
            await asyncio.sleep(0.01)


async def test_passwords_users_and_databases(make_server):
    server = make_server("--requirepass", "s3cret", "--databases", "4")
    base = {"path": server.socket, "label": "locked"}
    with pytest.raises(StoreAuthError, match="NOAUTH"):
        await Wire.connect(Endpoint(**base))
    with pytest.raises(StoreAuthError, match="AUTH") as caught:
        await Wire.connect(Endpoint(**base, password="wr0ng"))
    assert "wr0ng" not in str(caught.value)
    async with open_wire(Endpoint(**base, password="s3cret", db=3, client_name="orchestra:me")) as wire:
        about = (await wire.call("CLIENT", "INFO")).decode()
        assert "db=3" in about
        assert "name=orchestra:me" in about
        await wire.call("ACL", "SETUSER", "bob", "on", ">pw", "~*", "+@all", "-client|setname", "-get")
        async with open_wire(Endpoint(**base, username="bob", password="pw")) as bobs:  # no name, no harm
            with pytest.raises(StoreAuthError, match="NOPERM"):
                await bobs.call("GET", "k")
    with pytest.raises(ConfigurationError, match="no database 9"):
        await Wire.connect(Endpoint(**base, password="s3cret", db=9))
    assert "s3cret" not in repr(Endpoint(**base, password="s3cret"))


async def test_a_password_where_none_is_set_is_refused(endpoint):
    with pytest.raises(StoreAuthError):
        await Wire.connect(Endpoint(path=endpoint.path, username="nobody", password="x", label="open"))


async def test_a_server_without_a_free_connection(make_server):
    server = make_server("--maxclients", "1")
    endpoint = Endpoint(path=server.socket, label="full")
    async with open_wire(endpoint):
        with pytest.raises(StoreUnavailableError):
            await Wire.connect(endpoint)


async def test_tcp(make_server, free_port):
    server = make_server("--port", str(free_port), "--bind", "127.0.0.1")
    async with open_wire(Endpoint(host="127.0.0.1", port=free_port, label="tcp")) as wire:
        assert await wire.call("PING") == b"PONG"
        server.kill()
        with pytest.raises(StoreUnavailableError):
            await wire.call("PING")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is needed to make a certificate")
    place = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {place}/key.pem -out {place}/cert.pem"
    subprocess.run(command.split(), check=True, capture_output=True)
    return place


@LOOPS
def test_tls(endpoint, certificate, loop):
    """Through a TLS endpoint of our own in front of the server: not every redis-server is built with TLS."""

    async def main():
        accept = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        accept.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
        tasks = set()

        async def copy(reader, writer):
            tasks.add(asyncio.current_task())
            with contextlib.suppress(OSError, asyncio.CancelledError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            writer.transport.abort()

        async def forward(reader, writer):
            inner_reader, inner_writer = await asyncio.open_unix_connection(endpoint.path)
            await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

        server = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=accept)
        port = server.sockets[0].getsockname()[1]
        trusting = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        try:
            async with open_wire(Endpoint(host="localhost", port=port, tls=trusting, label="tls")) as wire:
                body = os.urandom(1 << 20)
                assert await wire.pipeline([("SET", "k", body), ("GET", "k")]) == [b"OK", body]
            with pytest.raises(StoreUnavailableError, match=r"(?i)certificate"):
                tls = ssl.create_default_context()
                await Wire.connect(Endpoint(host="localhost", port=port, tls=tls, label="tls"))
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.sleep(0.05)

    run_on(loop, main)


def test_a_forked_child_does_not_use_the_connection_of_its_parent(endpoint):
    async def main():
        async with open_wire(endpoint) as wire:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    wire.send_nowait(pack([("SET", "child", "1")]), 1)
                except StoreUnavailableError:
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert await wire.call("EXISTS", "child") == 0

    run_on("asyncio", main)
