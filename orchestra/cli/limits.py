"""``orchestra limits``: shows rate limits, changes them while workers run, and takes the change back.

Owns the commands; what they do is :func:`~orchestra.flow_control.set_limit` and its siblings.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import typer

from orchestra._limiting.rules import RateLimitConfig
from orchestra.app import App
from orchestra.cli._options import JsonOption, RedisOption, bound, examples, unwrapped
from orchestra.cli._output import clean, console, print_json, row, say, table
from orchestra.connections import ConnectionManager
from orchestra.errors import ConfigurationError
from orchestra.flow_control import list_limits, reset_limit, set_limit
from orchestra.tasks import check_ident, check_name

TargetArgument = Annotated[
    str | None, typer.Argument(metavar="[TARGET]", help="The app whose Redis it is.", show_default=False)
]
WordsArgument = Annotated[
    list[str], typer.Argument(metavar="[TARGET] NAME", help="The limit's name; an app whose Redis it is before it.")
]
ScopeOption = Annotated[str, typer.Option("--scope", metavar="NAME", help="The scope of the limit.")]


def commands() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help="Look at rate limits, and change them while workers run.", no_args_is_help=True)
    shown = (
        (ls, "ls", ("orchestra limits ls jobs:app", "orchestra limits ls --redis redis://localhost --json")),
        (change, "set", ("orchestra limits set jobs:app openai --rate 50 --burst 10",)),
        (reset, "reset", ("orchestra limits reset jobs:app openai",)),
    )
    for function, name, lines in shown:
        app.command(name, help=unwrapped(function.__doc__), epilog=examples(*lines))(function)
    return app


@asynccontextmanager
async def _manager(target: str | None, redis: str | None) -> AsyncIterator[ConnectionManager]:
    app = bound(target, redis, None) if target is not None else App("orchestra", redis)
    if app.address.scheme == "memory":
        raise ConfigurationError("memory: lives inside one process: give --redis URL", field="redis", value="memory:")
    async with ConnectionManager(app.address) as manager:
        yield manager


def _named(words: list[str]) -> tuple[str | None, str]:
    if len(words) > 2:
        raise ConfigurationError(f"give one limit, after an app at most; got {' '.join(words)!r}", field="NAME")
    check_ident("limiter name", words[-1])
    return (words[0] if len(words) == 2 else None), words[-1]


def ls(target: TargetArgument = None, redis: RedisOption = None, as_json: JsonOption = False) -> int:
    """List the limits that are in use: what they are, and what could be had now.

    Columns: permits per period, burst, keys with permits in use, permits available now (of the fullest key), refused a second
    (requests and parked tasks of all processes, over ten seconds), and whether the limit was set at run time. Reads every key of the server once, so it is for people.

    Exit status: 0, also when there are none; 1 if Redis failed, 2 wrong usage.
    """

    async def work() -> int:
        async with _manager(target, redis) as manager:
            found = await list_limits(manager=manager)
        if as_json:
            for status in found:
                print_json(status._asdict())
            return 0
        if not found:
            print("no limits are in use")
            return 0
        listed = table(
            *("limit", "scope", ("rate", "right"), ("burst", "right"), ("keys", "right"), ("available", "right")),
            *(("refused", "right"), "set"),
        )
        for status in found:
            per = f"{status.rate:g}/s" if status.period == 1 else f"{status.rate:g} per {status.period:g} s"
            changed = "at run time" if status.version else ""
            row(
                listed,
                [
                    *(clean(status.name, 60), status.scope, per, status.burst, status.keys, status.available),
                    *(f"{status.refused:.3g}/s" if status.refused else "", changed),
                ],
            )
        console().print(listed)
        return 0

    return asyncio.run(work())


def change(
    words: WordsArgument,
    rate: Annotated[float, typer.Option("--rate", metavar="N", help="Permits per period.")],
    burst: Annotated[int, typer.Option("--burst", metavar="N", help="Permits at once after a pause.")],
    period: Annotated[float, typer.Option("--period", metavar="SECONDS", help="Length of a period.")] = 1.0,
    scope: ScopeOption = "all",
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Set a limit for all processes that use it, whatever they were started with; they follow within a second.

    It stays until `orchestra limits reset`. A limit that nobody uses yet may be set, too.

    Exit status: 0; 1 if Redis failed, 2 wrong usage.
    """
    target, name = _named(words)
    limit = RateLimitConfig(rate=rate, burst=burst, period=period)
    check_name("--scope", scope)

    async def work() -> int:
        async with _manager(target, redis) as manager:
            version = await set_limit(name, rate=rate, burst=burst, period=period, scope=scope, manager=manager)
        facts = {"name": name, "scope": scope, "rate": rate, "burst": burst, "period": period, "version": version}
        if as_json:
            print_json(facts)
        else:
            say(f"limit {name}: {limit.rate:g} per {limit.period:g} s, burst {limit.burst}")
        return 0

    return asyncio.run(work())


def reset(
    words: WordsArgument, scope: ScopeOption = "all", redis: RedisOption = None, as_json: JsonOption = False
) -> int:
    """Take back what `orchestra limits set` did: a limit is again what its processes were started with.

    Exit status: 0, also when it was not set; 1 if Redis failed, 2 wrong usage.
    """
    target, name = _named(words)
    check_name("--scope", scope)

    async def work() -> int:
        async with _manager(target, redis) as manager:
            was_set = await reset_limit(name, scope=scope, manager=manager)
        if as_json:
            print_json({"name": name, "scope": scope, "reset": was_set})
        else:
            say(f"limit {name} is what its processes were started with" + ("" if was_set else ", as before"))
        return 0

    return asyncio.run(work())
