"""Addresses: where Redis is, as one line of text.

Owns the grammar of ``redis://…`` and its kin, and what may be shown of an address. Refuses to own connecting.
No state but "the default was said"; safe from any thread. The option names are redis-py's, so that an address can be
carried over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote

from orchestra.embedded import default_directory
from orchestra.errors import ConfigurationError
from orchestra.tasks import require_int, require_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger("orchestra.address")

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster", "embedded", "memory")
_FORMS = (
    "redis://[user:password@]host[:port][/db], rediss://…, unix:///path/to.sock, "
    "redis+sentinel://host1,host2/service[/db], redis+cluster://host1,host2, embedded:[directory] or memory:"
)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_CLIENT_NAME = re.compile(r"[!-~]{1,64}")
_SECRET = frozenset({"password", "sentinel_password"})


def _seconds(name: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        require_number(name, float(text), 0.0, 3600.0, unit="seconds", exclusive=True)
        return float(text)
    raise ConfigurationError(f"{name} must be seconds above 0 and at most 3600, got {text!r}", field=name, value=text)


def _whole(low: int, high: int) -> Callable[[str, str], int]:
    def convert(name: str, text: str) -> int:
        require_int(name, int(text) if text.isascii() and text.isdigit() else text, low, high)
        return int(text)

    return convert


def _switch(name: str, text: str) -> bool:
    if text.lower() not in {"true", "yes", "1", "false", "no", "0"}:
        raise ConfigurationError(f"{name} must be true or false, got {text!r}", field=name, value=text)
    return text.lower() in {"true", "yes", "1"}


def _text(_name: str, text: str) -> str:
    return text


def _client_name(name: str, text: str) -> str:
    if not _CLIENT_NAME.fullmatch(text):
        raise ConfigurationError(
            f"{name} must be 1 to 64 printable ASCII characters without spaces, got {text!r}", field=name, value=text
        )
    return text


def _cert_reqs(name: str, text: str) -> str:
    if text not in {"required", "optional", "none"}:
        raise ConfigurationError(f"{name} must be required, optional or none, got {text!r}", field=name, value=text)
    return text


_db = _whole(0, 1_000_000)
_COMMON: dict[str, Callable[[str, str], Any]] = {
    "socket_timeout": _seconds,
    "socket_connect_timeout": _seconds,
    "client_name": _client_name,
    "max_connections": _whole(1, 100_000),
    "production": _switch,
}
_TLS: dict[str, Callable[[str, str], Any]] = {
    "ssl_ca_certs": _text,
    "ssl_certfile": _text,
    "ssl_keyfile": _text,
    "ssl_cert_reqs": _cert_reqs,
    "ssl_check_hostname": _switch,
}
_OPTIONS: dict[str, dict[str, Callable[[str, str], Any]]] = {
    "redis": _COMMON,
    "rediss": _COMMON | _TLS,
    "unix": _COMMON | {"db": _db, "username": _text, "password": _text},
    "redis+sentinel": _COMMON | {"sentinel_username": _text, "sentinel_password": _text},
    "redis+cluster": _COMMON,
    "embedded": _COMMON | {"db": _db},
    "memory": {},
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Address:
    """Where Redis is. Made by :func:`parse_address`; prints without its passwords.

    ``path`` is the socket of ``unix:`` or the directory of ``embedded:`` (empty: the default directory); ``options``
    holds the options after ``?``, converted.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None
    service: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def safe(self) -> str:
        """The address for logs and errors: every password is ``***``."""
        shown = "&".join(
            f"{name}={'***' if name in _SECRET else quote(str(value), safe='/:')}"
            for name, value in sorted(self.options.items())
        )
        tail = f"?{shown}" if shown else ""
        if self.scheme in {"embedded", "memory"}:
            return f"{self.scheme}:{quote(self.path)}{tail}"
        user = quote(self.username or "", safe="")
        login = f"{user}:***@" if self.password is not None else f"{user}@" if user else ""
        hosts = ",".join(f"{f'[{host}]' if ':' in host else host}:{port}" for host, port in self.hosts)
        parts = [part for part in (self.service, str(self.db) if self.db else "") if part]
        path = quote(self.path) if self.scheme == "unix" else "".join(f"/{part}" for part in parts)
        return f"{self.scheme}://{login}{hosts}{path}{tail}"

    def __repr__(self) -> str:
        return f"Address({self.safe!r})"

    __str__ = __repr__


def parse_address(url: str) -> Address:
    """Read an address; user, password, path and options may be percent-encoded.

    Raises: ConfigurationError, which never shows a password, for an unknown scheme, an unknown option, a bad host,
    port or database, or a part that the scheme does not take.
    """
    if not isinstance(url, str) or not url.strip():
        raise ConfigurationError(f"an address must be a text such as {_FORMS}", field="url", value=type(url).__name__)
    url = url.strip()
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower()
    if not colon or scheme not in SCHEMES:
        raise _bad(url, f"must be one of {_FORMS}")
    if "#" in url:
        raise _bad(url, "contains '#': write it as %23")
    body, _, query = rest.partition("?")
    if scheme not in {"embedded", "memory"} and "@" in body[2:].partition("/")[2] + query:
        raise _bad(url, "has a '@' after a '/' or '?': within a password write them as %40, %2F and %3F")
    options = _parse_options(url, scheme, query)
    if scheme in {"embedded", "memory"}:
        return _parse_local(url, scheme, body.removeprefix("//"), options)
    return _parse_remote(url, scheme, body, options)


def _bad(url: str, what: str) -> ConfigurationError:
    """An error about ``url`` that shows it as far as it holds no secret, however malformed it is."""
    head, at, tail = url.rpartition("@")
    shown = f"{head.partition(':')[0]}://***@{tail}" if at else url
    shown = re.sub(r"(password=)[^&]*", r"\1***", shown)
    return ConfigurationError(f"address {shown!r} {what}", field="url", value=shown)


def _parse_options(url: str, scheme: str, query: str) -> dict[str, Any]:
    known, options = _OPTIONS[scheme], dict[str, Any]()
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            allowed = ", ".join(sorted(known)) or "no options"
            raise _bad(url, f"has an unknown option {name!r}; {scheme}: takes {allowed}")
        if name in options:
            raise _bad(url, f"gives the option {name!r} twice")
        options[name] = known[name](name, text)
    return options


def _parse_local(url: str, scheme: str, body: str, options: dict[str, Any]) -> Address:
    if scheme == "memory" and body:
        raise _bad(url, "must be just memory:")
    return Address(scheme=scheme, path=unquote(body), db=options.pop("db", 0), options=options)


def _parse_remote(url: str, scheme: str, body: str, options: dict[str, Any]) -> Address:
    if not body.startswith("//"):
        raise _bad(url, f"must have // after {scheme}:")
    authority, slash, path = body[2:].partition("/")
    login, at, netloc = authority.rpartition("@")
    user, _, password = login.partition(":")
    username = unquote(user) or options.pop("username", None)
    secret = unquote(password) if at and ":" in login else options.pop("password", None)
    if scheme == "unix":
        if netloc or not path:
            raise _bad(url, "must name the socket's absolute path after three slashes: unix:///run/redis.sock")
        return Address(
            scheme=scheme,
            path=unquote(slash + path),
            db=options.pop("db", 0),
            username=username,
            password=secret,
            options=options,
        )
    service, db = _parse_path(url, scheme, path)
    hosts = _parse_hosts(url, netloc, 26379 if scheme == "redis+sentinel" else 6379)
    if len(hosts) > 1 and scheme in {"redis", "rediss"}:
        raise _bad(url, "names several hosts: that needs redis+sentinel:// or redis+cluster://")
    return Address(
        scheme=scheme, hosts=hosts, db=db, username=username, password=secret, service=service, options=options
    )


def _parse_path(url: str, scheme: str, path: str) -> tuple[str, int]:
    """The service and the database number in ``/db``, ``/service`` or ``/service/db``."""
    parts = [unquote(part) for part in path.strip("/").split("/") if part]
    service = parts.pop(0) if scheme == "redis+sentinel" and parts else ""
    if scheme == "redis+sentinel" and not service:
        raise _bad(url, "must name the service that the sentinels watch: redis+sentinel://host1,host2/service")
    if len(parts) > 1 or (parts and scheme == "redis+cluster"):
        raise _bad(url, f"has a path /{path} that does not belong there")
    if parts and not (parts[0].isascii() and parts[0].isdigit()):
        raise _bad(url, f"must end in a database number, got {parts[0]!r}")
    return service, _db("db", parts[0]) if parts else 0


def _parse_hosts(url: str, netloc: str, default_port: int) -> tuple[tuple[str, int], ...]:
    hosts = []
    for number, item in enumerate(netloc.split(","), 1):
        found = _HOST.fullmatch(item)
        port = int(found[2] or default_port) if found else 0
        if found is None or not 0 < port < 65536:
            raise _bad(url, f"must name a host and a port from 1 to 65535; its host number {number} does not")
        hosts.append((found[1].strip("[]"), port))
    return tuple(hosts)


_said_default: list[str] = []


def default_address() -> Address:
    """The address in ``ORCHESTRA_REDIS_URL``, else the embedded server, which is said once in the log."""
    url = os.environ.get("ORCHESTRA_REDIS_URL")
    if url:
        return parse_address(url)
    if not _said_default:
        _said_default.append("embedded:")
        log.info("ORCHESTRA_REDIS_URL is not set: using the embedded server in %s", default_directory())
    return Address(scheme="embedded")
