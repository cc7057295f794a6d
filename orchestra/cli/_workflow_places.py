"""Where the workflows of a command line are: its values as JSON, its App, the queues that have workflows.

Owns finding a workflow by its id alone, on a whole server. Refuses to own commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from orchestra import _keys
from orchestra._front.loading import is_target
from orchestra._front.workflow_runs import WorkflowRun
from orchestra.app import App
from orchestra.cli._options import bound, manager_of
from orchestra.connections import ConnectionManager, store_errors
from orchestra.errors import ConfigurationError, InvalidTaskError
from orchestra.tasks import check_ident


def json_of(text: str, flag: str) -> Any:
    """The value of an option: JSON, ``@FILE`` with it, or ``-`` for standard input."""
    if text == "-":
        what, source = "standard input", sys.stdin.read()
    elif text.startswith("@"):
        what = text[1:]
        try:
            source = Path(what).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{flag}: cannot read {what!r}: {error}", field=flag) from error
    else:
        what, source = flag, text
    try:
        return json.loads(source)
    except ValueError as error:
        hint = '; quote it for the shell: \'{"text": "hello"}\'' if what == flag else ""
        raise InvalidTaskError(f"{what} is not JSON: {error}{hint}") from error


def named(target: str, redis: str | None, queue: str | None) -> App:
    """The App that a target names, or one that only knows a queue's name."""
    if is_target(target):
        return bound(target, redis, queue)
    if queue is not None and queue != target:
        raise ConfigurationError(f"two queues are named: {target!r} and --queue {queue!r}", field="queue")
    return _reached(App(target, redis))


def _reached(app: App) -> App:
    if app.address.scheme == "memory":
        raise ConfigurationError("memory: lives inside one process: give --redis URL", field="redis", value="memory:")
    return app


async def with_run(
    workflow_id: str,
    target: str | None,
    queue: str | None,
    redis: str | None,
    work: Callable[[WorkflowRun, App], Awaitable[int]],
) -> int:
    """What ``work`` returns for the workflow, wherever it lives. Raises ConfigurationError if it is nowhere, or in two places."""
    check_ident("workflow id", workflow_id)
    app = bound(target, redis, queue) if target is not None else None
    if app is None:
        probe = _reached(App("orchestra", redis))
        async with ConnectionManager(probe.address) as manager:
            name = await _home(manager, workflow_id, queue)
        app = App(name, probe.address)
    async with app:
        if target is not None:
            await _home(manager_of(app), workflow_id, app.queue_name)
        return await work(app.workflow(workflow_id), app)


@asynccontextmanager
async def place(
    target: str | None, queue: str | None, redis: str | None
) -> AsyncIterator[tuple[ConnectionManager, list[str]]]:
    """A connected manager, and the queue that the arguments name, if they do."""
    app = bound(target, redis, queue) if target is not None else _reached(App(queue or "orchestra", redis))
    async with ConnectionManager(app.address) as manager:
        yield manager, [app.queue_name] if target is not None or queue is not None else []


async def _home(manager: ConnectionManager, workflow_id: str, queue: str | None) -> str:
    """The queue that has a workflow of this id."""
    names = [queue] if queue is not None else await namespaces(manager)
    with store_errors(manager.address.safe, "EXISTS"):
        there = [name for name in names if await manager.client.exists(_keys.WorkflowKeys(name).state(workflow_id))]
    if len(there) == 1:
        return there[0]
    if there:
        raise ConfigurationError(
            f"several queues have a workflow {workflow_id!r}: name one of {', '.join(there)} with --queue",
            field="queue",
        )
    where = f"queue {queue!r} on {manager.address.safe}" if queue is not None else manager.address.safe
    raise ConfigurationError(
        f"there is no workflow {workflow_id!r} on {where}: it is not planned yet, was never started, or has expired; "
        f"`orchestra workflow ls` lists them",
        field="ID",
        value=workflow_id,
    )


async def namespaces(manager: ConnectionManager) -> list[str]:
    """The queues that have workflows. Cost: one SCAN over the server's keys, 1000 a round trip."""
    await manager.connect()
    head, _, tail = _keys.WorkflowKeys("NAME").index.partition("NAME")
    found: set[str] = set()
    with store_errors(manager.address.safe, "SCAN"):
        async for key in manager.client.scan_iter(match=f"{head}*{tail}", count=1000):
            found.add(key.decode("utf-8", "replace")[len(head) : -len(tail)])
    return sorted(found)
