"""``orchestra breakers``: lists the circuit breakers of a queue's processes, and resets them.

What an error says is untrusted text: everything is printed without terminal escapes.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import typer

from orchestra._breakers.exchange import ask_reset, shown_breakers
from orchestra.cli._options import JsonOption, QueueOption, RedisOption, examples, manager_of, opened, unwrapped
from orchestra.cli._output import ago, clean, console, print_json, row, say, span, table
from orchestra.errors import ConfigurationError
from orchestra.tasks import check_ident

_STYLES = {"open": "red", "half_open": "yellow"}
_LISTED = 10  # names that an error lists at most

PlaceArgument = Annotated[
    str | None,
    typer.Argument(metavar="[QUEUE|TARGET]", help="The queue, or the app it belongs to.", show_default=False),
]


def commands() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help="Look at circuit breakers, and close them by hand.", no_args_is_help=True)
    shown = (
        (ls, ("orchestra breakers ls triage", "orchestra breakers ls jobs:app --json")),
        (reset, ("orchestra breakers reset triage classify/eu",)),
    )
    for function, lines in shown:
        app.command(help=unwrapped(function.__doc__), epilog=examples(*lines))(function)
    return app


def ls(
    place: PlaceArgument = None,
    redis: RedisOption = None,
    queue: QueueOption = None,
    as_json: JsonOption = False,
) -> int:
    """List the circuit breakers that the processes of a queue have told of in the last 30 seconds.

    A process tells of changes within two seconds. Rates are those of the breaker's window. With --json, one line a
    breaker and process.
    """

    async def work() -> int:
        async with opened(place, redis, queue) as app:
            rows = await shown_breakers(manager_of(app), app.queue_name)
            if as_json:
                for each in rows:
                    print_json(each)
            elif rows:
                _print(rows)
            else:
                say(f"no process of {app.queue_name} has told of a circuit breaker in the last 30 s")
        return 0

    return asyncio.run(work())


def _print(rows: list[dict[str, Any]]) -> None:
    shown = table(
        "BREAKER",
        "STATE",
        ("FAILED", "right"),
        ("SLOW", "right"),
        ("RETRY IN", "right"),
        "SINCE",
        "PROCESS",
        "LAST ERROR",
    )
    for each in rows:
        state = each["state"] + (" (by hand)" if each["forced"] else " (shared)" if each["shared"] else "")
        row(
            shown,
            (
                each["name"],
                state,
                f"{each['failure_rate']:.0%} of {each['calls']}" if each["calls"] else each["failures"],
                f"{each['slow_rate']:.0%}" if each["calls"] else "-",
                span(each["retry_in"]) if each["retry_in"] else "-",
                ago(min(each["since"], time.time())),
                each["process"],
                clean(each["last_error"] or "-", 80),
            ),
            _STYLES.get(each["state"]),
        )
    console().print(shown)


def reset(
    place: Annotated[str, typer.Argument(metavar="QUEUE|TARGET", help="The queue, or the app it belongs to.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The breaker, as `breakers ls` shows it.")],
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> int:
    """Close a circuit breaker in every process of a queue, and let it decide by itself again.

    Processes do so within about two seconds. Exit status: 0; 2 if no process has such a breaker, 1 if Redis failed.
    """
    check_ident("breaker name", name)

    async def work() -> int:
        async with opened(place, redis, queue) as app:
            rows = await shown_breakers(manager_of(app), app.queue_name)
            count = sum(each["name"] == name for each in rows)
            if not count:
                names = sorted({each["name"] for each in rows})
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                there = f"there are {', '.join(names[:_LISTED])}{more}" if names else "there are none"
                raise ConfigurationError(
                    f"no process of {app.queue_name} has a circuit breaker {name!r}; {there}", field="name", value=name
                )
            await ask_reset(manager_of(app), app.queue_name, name)
            say(f"asked {count} {'process' if count == 1 else 'processes'} to reset {name}")
        return 0

    return asyncio.run(work())
