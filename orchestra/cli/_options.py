"""Options that several commands share, and the App or queue that they name.

Owns how ``--redis``, ``--queue`` and a target become an :class:`~orchestra.app.App`, and the list of queues that a
server has. Refuses to own commands. Each command runs one event loop, once.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestra._front.loading import is_target, load_app
from orchestra._keys import PREFIX, QueueKeys
from orchestra.app import App
from orchestra.connections import ConnectionManager, store_errors
from orchestra.errors import ConfigurationError
from orchestra.tasks import TaskPriority

ALIVE = 10
"""Seconds within which a worker gives a sign of life several times."""

RedisOption = Annotated[
    str | None,
    typer.Option(
        "--redis",
        metavar="URL",
        help="Where Redis is: redis://host:port/0, unix:///path, embedded:DIR. "
        "Default: the app's own address, else ORCHESTRA_REDIS_URL, else the embedded server.",
        show_default=False,
    ),
]
QueueOption = Annotated[
    str | None,
    typer.Option(
        "--queue",
        metavar="NAME",
        help="The queue's name; by default the app's, or the only one there is.",
        show_default=False,
    ),
]
AppOption = Annotated[
    str | None,
    typer.Option(
        "--app",
        metavar="TARGET",
        help="Take queue and address from this app: module:app or path/file.py[:app].",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="The app: module, module:app, path/file.py or path/file.py:app.")
]


def bound(target: str, redis: str | None, queue: str | None) -> App:
    """The App that ``target`` names, bound to ``redis`` and ``queue`` where they are given.

    Raises:
        ConfigurationError: as :func:`~orchestra._front.loading.load_app`; or its address is ``memory:``.
    """
    app = load_app(target).bind(redis=redis, queue=queue)
    return _reachable(app)


def _reachable(app: App) -> App:
    if app.address.scheme == "memory":
        raise ConfigurationError(
            "memory: lives inside one process, where no command can reach it: give --redis URL, such as embedded:",
            field="redis",
            value="memory:",
        )
    return app


@asynccontextmanager
async def opened(target: str | None, redis: str | None, queue: str | None) -> AsyncIterator[App]:
    """An App connected to the queue that the arguments name: a target, a queue's name, or the only queue there is.

    Raises:
        ConfigurationError: there is no such queue, or there are several and none is named.
    """
    if target is not None and is_target(target):
        app = bound(target, redis, queue)
    else:
        if target is not None and queue is not None and target != queue:
            raise ConfigurationError(f"two queues are named: {target!r} and --queue {queue!r}", field="queue")
        probe = _reachable(App("orchestra", redis))
        async with ConnectionManager(probe.address) as manager:
            name = await _choose(manager, target or queue)
        app = App(name, probe.address)
    async with app:
        yield app


async def _choose(manager: ConnectionManager, wanted: str | None) -> str:
    if wanted is not None:
        keys = QueueKeys(wanted)
        with store_errors(manager.address.safe, "EXISTS"):
            if await manager.client.exists(keys.counters, keys.dlq, *keys.streams):
                return wanted
    names = await queues(manager)
    if wanted is None and len(names) == 1:
        return names[0]
    there = f"queues there: {', '.join(names)}" if names else "there are no queues yet"
    if wanted is not None:
        raise ConfigurationError(
            f"there is no queue {wanted!r} on {manager.address.safe}; {there}{mistaken(wanted)}",
            field="queue",
            value=wanted,
        )
    raise ConfigurationError(f"name a queue on {manager.address.safe} with --queue NAME; {there}", field="queue")


def mistaken(word: str) -> str:
    """What to write instead, if ``word`` was taken for a queue's name and is a module in this directory; else nothing."""
    module = Path(word.replace(".", "/"))
    if not (module.with_name(f"{module.name}.py").is_file() or (module / "__init__.py").is_file()):
        return ""
    return f"; {word!r} was taken for a queue's name: for the module write {word}:app"


async def queues(manager: ConnectionManager) -> list[str]:
    """The queues of a server, sorted. Cost: one SCAN over its keys, 1000 per round trip."""
    await manager.connect()
    head, tail = f"{PREFIX}{{", ".0}:n"
    found: set[str] = set()
    with store_errors(manager.address.safe, "SCAN"):
        async for key in manager.client.scan_iter(match=f"{head}*{tail}", count=1000):
            found.add(key.decode("utf-8", "replace")[len(head) : -len(tail)])
    return sorted(name for name in found if ":" not in name)


async def workers_alive(manager: ConnectionManager, queue: str) -> int:
    """Workers of ``queue`` that gave a sign of life lately; killed ones stay listed until another takes over. Two round trips."""
    with store_errors(manager.address.safe, "ZCOUNT"):
        seconds, _ = await manager.client.time()
        return int(await manager.client.zcount(QueueKeys(queue).consumers, (seconds - ALIVE) * 1000, "+inf"))


def manager_of(app: App) -> ConnectionManager:
    """The connections of an App that is not on ``memory:``."""
    manager = app.manager
    assert manager is not None, "the command line refuses memory:"
    return manager


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "[bold]Examples:[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)


def unwrapped(doc: str | None) -> str:
    """A docstring as help: its paragraphs, each on one line, so that the terminal's width decides."""
    paragraphs = inspect.cleandoc(doc or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def priority_of(text: str | None) -> int | None:
    """The level that ``--priority`` names. Raises ConfigurationError."""
    if text is None:
        return None
    try:
        return TaskPriority(int(text)) if text.isdecimal() else TaskPriority[text.upper()]
    except (KeyError, ValueError):
        raise ConfigurationError(
            f"--priority must be critical, high, normal or low (or 0 to 3), got {text!r}",
            field="--priority",
            value=text,
        ) from None


def drop_none(**values: Any) -> dict[str, Any]:
    """Those of ``values`` that were given."""
    return {name: value for name, value in values.items() if value is not None}
