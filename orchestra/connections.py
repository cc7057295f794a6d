"""The one object through which a process reaches Redis.

Owns the redis-py client for whatever is not hot, opening hot connections (:mod:`orchestra._redis.wire`), joining the
embedded server, and turning redis-py's errors into orchestra's. Refuses to own retries: nothing here sends a command
twice, because an XADD that timed out may have been executed; callers repeat what is safe to repeat. redis-py's defaults
(ten silent retries, RESP3 with push notifications) are therefore turned off.
One event loop for a manager; :meth:`ConnectionManager.sync_client` is the door for threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
import weakref
from typing import TYPE_CHECKING, Any, Self

import redis
import redis.asyncio as aredis
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry as SyncRetry

from orchestra._redis.address import Address, default_address, parse_address
from orchestra._redis.client_connections import SentinelConnection, TcpConnection, TlsConnection, UnixConnection
from orchestra._redis.errors import ReplyError, reply_code, reply_error
from orchestra._redis.server_settings import INFO_SECTIONS, ServerInfo, judge, production_by_environment, version_of
from orchestra._redis.wire import Endpoint, Wire
from orchestra._shared import Connectable, forget, shared
from orchestra.embedded import EmbeddedServer
from orchestra.errors import ConfigurationError, OrchestraError, StoreAuthError, StoreError, StoreUnavailableError
from orchestra.tasks import require_int, require_number

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = [
    "Address",
    "ConnectionManager",
    "ServerInfo",
    "default_address",
    "get_connection_manager",
    "map_redis_error",
    "parse_address",
    "reply_code",
    "reply_error",
    "store_errors",
]

# Errors


def map_redis_error(exc: BaseException, *, address: str = "Redis", doing: str = "") -> OrchestraError:
    """The orchestra error for what redis-py, hiredis or a socket raised; an orchestra error comes back as it is.

    ``address`` must be fit for logs (:attr:`Address.safe`); ``doing`` says what was tried (``"PING"``). The caller
    raises it ``from exc``.
    """
    if isinstance(exc, OrchestraError):
        return exc
    where = f"{address} ({doing})" if doing else address
    # The order matters: redis-py's AuthenticationError and BusyLoadingError are ConnectionErrors.
    if reply_code(exc) or isinstance(exc, ReplyError | redis.ResponseError):
        return reply_error(exc, where)
    if isinstance(exc, redis.TimeoutError | TimeoutError):
        return _caused(StoreUnavailableError(f"{where} did not answer in time: {exc}. It may have executed it"), exc)
    if isinstance(exc, redis.ConnectionError | OSError):
        return _caused(
            StoreUnavailableError(f"{where} cannot be reached: {str(exc).rstrip('.')}. Is it running there?"), exc
        )
    return _caused(StoreError(f"{where} failed: {exc!r}"), exc)


def _caused(error: StoreError, cause: BaseException) -> StoreError:
    error.__cause__ = cause
    return error


@contextlib.contextmanager
def store_errors(address: str = "Redis", doing: str = "") -> Iterator[None]:
    """Within it, errors of redis-py and of sockets become orchestra's (:func:`map_redis_error`)."""
    try:
        yield
    except (redis.RedisError, OSError) as exc:
        if isinstance(exc, OrchestraError):
            raise
        raise map_redis_error(exc, address=address, doing=doing) from exc


# The manager


class ConnectionManager(Connectable):
    """Connections to the Redis at ``url`` (default: :func:`default_address`), for one event loop.

    ``max_connections``: of the redis-py pool, 1 to 100,000; a caller beyond it waits up to ``timeout``. ``timeout``:
    seconds a reply may take. ``connect_timeout``: seconds to connect. ``client_name``: shown by CLIENT LIST, followed
    by ``:role``. ``production``: refuse a server that may lose tasks by its settings (it evicts, keeps no append-only
    file, or is a replica); by default as ``ORCHESTRA_PRODUCTION`` says, else such a server is warned about. The options
    of an address (``socket_timeout``, ``socket_connect_timeout``, ``production``, …) go before these.

    Usable at once; whatever needs the server connects first. ``await manager``, :meth:`connect` and ``async with``
    do so explicitly. After :meth:`close` it may be connected again.

    Raises: ConfigurationError for a bad address or number, ``memory:`` (which has no Redis), or ``redis+cluster:``
    (not supported yet).
    """

    def __init__(
        self,
        url: str | Address | None = None,
        *,
        max_connections: int = 64,
        timeout: float = 10.0,
        connect_timeout: float = 5.0,
        client_name: str = "orchestra",
        production: bool | None = None,
    ) -> None:
        self.address = url if isinstance(url, Address) else parse_address(url) if url else default_address()
        _require_redis(self.address)
        get = self.address.options.get
        self.max_connections: int = get("max_connections", max_connections)
        self.timeout: float = get("socket_timeout", timeout)
        self.connect_timeout: float = get("socket_connect_timeout", connect_timeout)
        self.client_name: str = get("client_name", client_name)
        asked: bool | None = get("production", production)
        self.production = production_by_environment() if asked is None else asked
        require_int("max_connections", self.max_connections, 1, 100_000)
        require_number("timeout", self.timeout, 0.0, 3600.0, unit="seconds", exclusive=True)
        require_number("connect_timeout", self.connect_timeout, 0.0, 3600.0, unit="seconds", exclusive=True)
        self._tls = _tls_context(self.address) if self.address.scheme == "rediss" else None
        self._server = EmbeddedServer(self.address.path or None) if self.address.scheme == "embedded" else None
        self._client: Any = None
        self._sentinel: Any = None
        self._ended: list[Any] = []  # redis-py clients that are still to be closed
        self._named = True
        self._lock = asyncio.Lock()
        self._wires: weakref.WeakSet[Wire] = weakref.WeakSet()
        self._sync: weakref.WeakSet[redis.Redis] = weakref.WeakSet()
        self._known: dict[str, bool] = {}

    # Life

    @property
    def connected(self) -> bool:
        """Whether :meth:`connect` has succeeded and :meth:`close` was not called since."""
        return self._client is not None

    @property
    def embedded(self) -> EmbeddedServer | None:
        """The embedded server, where the address names one."""
        return self._server

    async def connect(self) -> Self:
        """Start or join the embedded server if the address says so, then PING and INFO. Idempotent; two round trips.

        Raises: StoreUnavailableError, StoreAuthError, EmbeddedServerError; UnsafeServerError in production mode.
        """
        async with self._lock:
            if self._client is None:
                if self._server is not None:
                    await self._server.start(timeout=max(30.0, self.connect_timeout))
                client = await self._greet()
                try:
                    await self._inspect(client)
                except BaseException:
                    await self._release(client)
                    raise
                self._client = client
                self._known.clear()
        return self

    async def _greet(self) -> Any:
        """A client that has been answered. One who may not use CLIENT SETNAME goes without a name."""
        client = self._make_client()
        try:
            with store_errors(self.address.safe, "PING"):
                await client.ping()
        except BaseException as exc:
            if isinstance(exc, StoreAuthError) and self._named and "client|setname" in str(exc):
                self._named = False
                await client.aclose()
                return await self._greet()
            await self._release(client)
            if isinstance(exc, StoreUnavailableError):
                await self._say_why(exc)
            raise
        return client

    async def _say_why(self, error: StoreUnavailableError) -> None:
        """Raise the reason of a server that hung up at once (``maxclients``): a wire reads it, redis-py may not."""
        cause = error.__cause__
        if self._sentinel is None and isinstance(cause, redis.ConnectionError) and " connecting to " not in str(cause):
            endpoint = await self._endpoint("hello")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    (await Wire.connect(endpoint, connect_timeout=self.connect_timeout)).close()

    async def _inspect(self, client: Any) -> None:
        """Refuse, or warn about, settings that may cost tasks. The embedded server's are orchestra's own."""
        if self._server is not None:
            return
        info = None
        with store_errors(self.address.safe, "INFO"), contextlib.suppress(NoPermissionError):
            info = await client.info(*INFO_SECTIONS)
        judge(info, self.address.safe, production=self.production, sentinel=self._sentinel is not None)

    async def _connect(self) -> None:
        await self.connect()

    async def close(self) -> None:
        """Close the client, every wire and every synchronous client it gave out; leave the embedded server. Idempotent."""
        async with self._lock:
            forget(self)
            client, self._client = self._client, None
            await self._release(client)

    async def _release(self, client: Any) -> None:
        """Close everything; what a cancellation leaves open is closed by the next call."""
        self._ended += [client] if client is not None else []
        sentinel, self._sentinel = self._sentinel, None
        self._ended += sentinel.sentinels if sentinel is not None else []
        for wire in list(self._wires):
            await wire.aclose()
        for sync in list(self._sync):
            sync.close()
        self._sync.clear()
        while self._ended:
            with contextlib.suppress(redis.RedisError, OSError):  # what is closed need not be reachable
                await self._ended[-1].aclose()
            self._ended.pop()
        if self._server is not None:
            await self._server.stop()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<ConnectionManager {self.address.safe} {'connected' if self.connected else 'not connected'}>"

    # Doors

    @property
    def client(self) -> Any:
        """The ``redis.asyncio.Redis`` client for what is not hot: bytes in and out, no retries, RESP2.

        Its errors are redis-py's: see :func:`store_errors`. Raises: StoreUnavailableError before :meth:`connect`.
        """
        if self._client is None:
            raise StoreUnavailableError(f"not connected to {self.address.safe} yet: `await manager.connect()` first")
        return self._client

    async def open_wire(self, role: str, *, timeout: float | None = None) -> Wire:
        """A new hot connection, called ``<client_name>:<role>``; the caller owns, closes and replaces it.

        ``timeout``: seconds a reply may take unless a call says otherwise. A Sentinel is asked for the present master
        each time; an embedded server that died is started again.

        Raises: StoreUnavailableError, StoreAuthError, ConfigurationError (no such db), EmbeddedServerError.
        """
        await self.connect()
        seconds = self.timeout if timeout is None else timeout
        try:
            wire = await Wire.connect(await self._endpoint(role), timeout=seconds, connect_timeout=self.connect_timeout)
        except StoreUnavailableError:
            if self._server is None:
                raise
            await self._server.start()
            wire = await Wire.connect(await self._endpoint(role), timeout=seconds, connect_timeout=self.connect_timeout)
        self._wires.add(wire)
        return wire

    def sync_client(self, timeout: float | None = None) -> redis.Redis:
        """A new blocking ``redis.Redis`` with a pool of its own, for use in threads; same settings as :attr:`client`.

        The caller may close it; :meth:`close` does so otherwise. Connects when first used. ``timeout``: seconds that
        connecting and each reply may take, where they must be shorter than those of the manager.
        Raises: StoreUnavailableError while an embedded server is not joined.
        """
        if self._server is not None and not self._server.started:
            raise StoreUnavailableError(f"not connected to {self.address.safe} yet: `await manager.connect()` first")
        settings, address = self._settings(SyncRetry(NoBackoff(), 0)), self.address
        watching = self._sentinel_settings(settings["retry"])
        if timeout is not None:
            settings["socket_timeout"] = min(timeout, self.timeout)
            settings["socket_connect_timeout"] = min(timeout, self.connect_timeout)
            watching["socket_timeout"] = watching["socket_connect_timeout"] = settings["socket_connect_timeout"]
        client: redis.Redis
        if address.scheme == "redis+sentinel":
            sentinel: Any = redis.sentinel.Sentinel  # untyped in redis-py
            watchers = sentinel(address.hosts, sentinel_kwargs=watching, **settings)
            client = watchers.master_for(address.service)
        elif self._socket_path is not None:
            client = redis.Redis(unix_socket_path=self._socket_path, **settings)
        else:
            host, port = address.hosts[0]
            client = redis.Redis(host=host, port=port, ssl=address.scheme == "rediss", **settings)
        self._sync.add(client)
        return client

    # Questions

    async def ping(self) -> float:
        """Seconds that one PING took. Raises: StoreUnavailableError, StoreAuthError."""
        await self.connect()
        began = time.monotonic()
        with store_errors(self.address.safe, "PING"):
            await self.client.ping()
        return time.monotonic() - began

    async def server_info(self) -> ServerInfo:
        """What the server is. One round trip; with ACLs that forbid INFO a second (HELLO), and then less is known."""
        await self.connect()
        with store_errors(self.address.safe, "INFO"):
            try:
                said = await self.client.info(*INFO_SECTIONS)
            except NoPermissionError:
                return await self._hello()
        return ServerInfo.of(said)

    async def _hello(self) -> ServerInfo:
        """HELLO without arguments changes nothing and needs no permission beyond @connection."""
        wire = await self.open_wire("info")
        try:
            flat = await wire.call("HELLO")
        except StoreError:
            return ServerInfo()
        finally:
            wire.close()
        said = {bytes(k).decode(): v for k, v in zip(flat[::2], flat[1::2], strict=False)}
        text = {k: v.decode() for k, v in said.items() if isinstance(v, bytes)}
        return ServerInfo(
            kind=text.get("server", "redis"), version=version_of(text.get("version", "")), role=text.get("role")
        )

    async def supports(self, *commands: str) -> bool:
        """Whether the server knows all of ``commands`` (``"XACKDEL"``). One round trip for names not asked before.

        A user who may not ask (COMMAND INFO) is told False: newer commands are fast paths only.
        """
        names = [name.upper() for name in commands]
        missing = [name for name in names if name not in self._known]
        if missing:
            wire = await self.open_wire("probe")
            try:
                answers = await wire.call("COMMAND", "INFO", *missing)
            except StoreUnavailableError:
                raise
            except StoreError:
                answers = [None] * len(missing)
            finally:
                wire.close()
            self._known.update(zip(missing, (bool(answer) for answer in answers), strict=True))
        return all(self._known[name] for name in names)

    # Inside

    @property
    def _socket_path(self) -> str | None:
        if self._server is not None:
            return self._server.socket
        return self.address.path if self.address.scheme == "unix" else None

    def _settings(self, retry: Any) -> dict[str, Any]:
        address, tls = self.address, {}
        if address.scheme == "rediss":
            tls = {name: value for name, value in address.options.items() if name.startswith("ssl_")}
        return {
            "db": address.db,
            "username": address.username,
            "password": address.password,
            "socket_timeout": self.timeout,
            "socket_connect_timeout": self.connect_timeout,
            "client_name": self.client_name if self._named else None,
            "protocol": 2,
            "decode_responses": False,
            "retry": retry,
            **tls,
        }

    def _sentinel_settings(self, retry: Any) -> dict[str, Any]:
        return {
            "username": self.address.options.get("sentinel_username"),
            "password": self.address.options.get("sentinel_password"),
            "socket_timeout": self.connect_timeout,
            "socket_connect_timeout": self.connect_timeout,
            "protocol": 2,
            "retry": retry,
        }

    def _make_client(self) -> Any:
        settings, address = self._settings(AsyncRetry(NoBackoff(), 0)), self.address
        if address.scheme == "redis+sentinel":
            extra = self._sentinel_settings(settings["retry"])
            sentinel: Any = AsyncSentinel  # untyped in redis-py
            self._sentinel = sentinel(address.hosts, sentinel_kwargs=extra, **settings)
            for watcher in self._sentinel.sentinels:
                watcher.connection_pool.connection_class = TcpConnection
            return self._sentinel.master_for(
                address.service, max_connections=self.max_connections, connection_class=SentinelConnection
            )
        kind: type[TcpConnection | TlsConnection | UnixConnection]
        if self._socket_path is not None:
            kind = UnixConnection
            settings["path"] = self._socket_path
        else:
            kind = TcpConnection if self._tls is None else TlsConnection
            settings["host"], settings["port"] = address.hosts[0]
        pool = aredis.BlockingConnectionPool(
            connection_class=kind, max_connections=self.max_connections, timeout=self.timeout, **settings
        )
        return aredis.Redis.from_pool(pool)

    async def _endpoint(self, role: str) -> Endpoint:
        """Where a hot connection goes now, and as whom."""
        host, port = self.address.hosts[0] if self.address.hosts else ("", 0)
        if self._sentinel is not None:
            with store_errors(self.address.safe, "SENTINEL GET-MASTER-ADDR-BY-NAME"):
                host, port = await self._sentinel.discover_master(self.address.service)
        return Endpoint(
            host=host,
            port=port,
            path=self._socket_path,
            tls=self._tls,
            username=self.address.username,
            password=self.address.password,
            db=self.address.db,
            client_name=f"{self.client_name}:{role}",
            master_only=self._sentinel is not None,
            label=self.address.safe,
        )


def _require_redis(address: Address) -> None:
    if address.scheme == "memory":
        raise ConfigurationError(
            "memory: has no Redis to connect to; give it to App or to orchestra.testing", field="url", value="memory:"
        )
    if address.scheme == "redis+cluster":
        raise ConfigurationError(
            f"{address.safe}: Redis Cluster is not supported yet; use one master, with Sentinel for failover",
            field="url",
            value=address.safe,
        )


def _tls_context(address: Address) -> ssl.SSLContext:
    get = address.options.get
    try:
        context = ssl.create_default_context(cafile=get("ssl_ca_certs"))
        certificate = get("ssl_certfile")
        if certificate:
            context.load_cert_chain(certificate, get("ssl_keyfile"))
    except (OSError, ValueError) as exc:
        raise ConfigurationError(
            f"the certificates of {address.safe} cannot be read: {exc}", field="ssl_ca_certs", value=address.safe
        ) from exc
    level = get("ssl_cert_reqs", "required")
    context.check_hostname = level == "required" and get("ssl_check_hostname", True)
    context.verify_mode = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}[level]
    return context


def get_connection_manager(url: str | None = None) -> ConnectionManager:
    """The manager shared by everything in this event loop that talks to ``url``; may be awaited, which connects it.

    ``url`` defaults to ``ORCHESTRA_REDIS_URL``, else the embedded server.
    """
    name = url or os.environ.get("ORCHESTRA_REDIS_URL") or "embedded:"
    return shared("connections", name, lambda: ConnectionManager(url))
