"""``orchestra submit``: sends one task, and waits for its result when asked to."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestra._front.loading import is_target
from orchestra._front.runs import Run
from orchestra.app import App
from orchestra.cli._options import (
    JsonOption,
    QueueOption,
    RedisOption,
    bound,
    drop_none,
    examples,
    manager_of,
    mistaken,
    priority_of,
    workers_alive,
)
from orchestra.cli._output import plain_value, pretty, print_json, say
from orchestra.errors import ConfigurationError, InvalidTaskError, TaskFailedError, UnknownAgentError

EPILOG = examples(
    'orchestra submit jobs:app classify \'{"text": "hello"}\' --wait',
    "orchestra submit triage classify @input.json --priority high --delay 60",
)


def _text(flag: str, metavar: str, what: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=what, show_default=False)


Seconds = float | None
Target = Annotated[
    str, typer.Argument(metavar="TARGET|QUEUE", help="The app (module:app or file.py), or a queue's name.")
]
Type = Annotated[str, typer.Argument(metavar="TYPE", help="The agent that the task is for.")]
Input = Annotated[
    str,
    typer.Argument(
        metavar="[JSON|@FILE|-]",
        help="Its input: JSON, a file with it, or - for standard input.",
        show_default=False,
    ),
]


def submit(
    target: Target,
    agent: Type,
    given: Input = "{}",
    task_id: Annotated[str | None, _text("--id", "ID", "The task's id; sent twice it is one task.")] = None,
    key: Annotated[str | None, _text("--key", "TEXT", "Names the work, instead of an id.")] = None,
    priority: Annotated[str | None, _text("--priority", "LEVEL", "critical, high, normal or low.")] = None,
    delay: Annotated[Seconds, _text("--delay", "SECONDS", "Not before so many seconds.")] = None,
    timeout: Annotated[Seconds, _text("--timeout", "SECONDS", "What an attempt may take.")] = None,
    max_retries: Annotated[int | None, _text("--max-retries", "N", "Tries after the first.")] = None,
    metadata: Annotated[str | None, _text("--metadata", "JSON", "A JSON object that travels along.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it.")] = False,
    wait_timeout: Annotated[Seconds, _text("--wait-timeout", "SECONDS", "Wait so long at most.")] = None,
    redis: RedisOption = None,
    queue: QueueOption = None,
    as_json: JsonOption = False,
) -> int:
    """Send one task to a queue.

    With --wait, the agent's result is printed as JSON on standard output.

    Exit status: 0 sent (with --wait: completed), 3 the task is dead, 1 no result in time or Redis failed, 2 wrong usage.
    """
    options = drop_none(
        id=task_id, key=key, priority=priority_of(priority), delay=delay, timeout=timeout, max_retries=max_retries
    )
    if metadata is not None:
        options["metadata"] = _object("--metadata", metadata)
    options["want_result"] = wait
    app = _app(target, agent, redis, queue)
    hint = "" if is_target(target) else mistaken(target)
    work = _submit(app, agent, _input(given), options, wait_timeout, hint, as_json=as_json)
    return asyncio.run(work)


def _app(target: str, agent: str, redis: str | None, queue: str | None) -> App:
    if not is_target(target):
        if queue is not None and queue != target:
            raise ConfigurationError(f"two queues are named: {target!r} and --queue {queue!r}", field="queue")
        app = App(target, redis)
        if app.address.scheme == "memory":
            raise ConfigurationError("memory: lives inside one process: give --redis URL", field="redis")
        return app
    app = bound(target, redis, queue)
    if agent not in app.agents:
        known = ", ".join(sorted(app.agents)) or "none"
        raise UnknownAgentError(f"{target!r} has no agent {agent!r}; its agents are: {known}", task_type=agent)
    return app


def _input(text: str) -> Any:
    if text == "-":
        return _parsed("standard input", sys.stdin.read())
    if text.startswith("@"):
        try:
            return _parsed(text[1:], Path(text[1:]).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read {text[1:]!r}: {error}", field="input") from error
    return _parsed("the input", text)


def _parsed(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        hint = '; quote it for the shell: \'{"text": "hello"}\'' if what == "the input" else ""
        raise InvalidTaskError(f"{what} is not JSON: {error}{hint}") from error


def _object(what: str, text: str) -> dict[str, Any]:
    if isinstance(found := _parsed(what, text), dict):
        return found
    raise ConfigurationError(f"{what} must be a JSON object, got {text!r}", field=what.lstrip("-"), value=text)


async def _submit(
    app: App, agent: str, given: Any, options: dict[str, Any], timeout: float | None, hint: str, *, as_json: bool
) -> int:
    async with app:
        run = await app.send(agent, given, **options)
        if not options["want_result"]:
            if as_json:
                print_json({"id": run.id, "message_id": run.message_id, "queue": app.queue_name})
            else:
                print(f"sent {run.id} to queue {app.queue_name}")
        else:
            say(f"sent {run.id} to queue {app.queue_name}, waiting for its result")
        if not await workers_alive(manager_of(app), app.queue_name):
            say("no worker takes tasks from this queue now; start one with: orchestra worker TARGET" + hint)
        if not options["want_result"]:
            return 0
        return await _wait(run, timeout, as_json=as_json)


async def _wait(run: Run[Any], timeout: float | None, *, as_json: bool) -> int:
    try:
        value = await run.result(timeout)
    except TaskFailedError as error:
        if as_json:
            facts = {"error_type": error.error_type, "reason": error.reason, "attempts": error.attempts}
            print_json({"id": run.id, "outcome": "dead", **facts, "error": str(error)})
        raise
    if as_json:
        print_json({"id": run.id, "outcome": "completed", "value": value})
    else:
        print(pretty(value) if sys.stdout.isatty() else json.dumps(value, default=plain_value, ensure_ascii=False))
    return 0
