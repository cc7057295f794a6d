"""``orchestra dlq``: lists, shows, replays and deletes dead letters.

What a task or its error says is untrusted text: everything is printed without terminal escapes.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestra.cli._options import AppOption, JsonOption, QueueOption, RedisOption, examples, opened, unwrapped
from orchestra.cli._output import ago, clean, console, hexdump, pairs, pretty, print_json, row, say, table
from orchestra.errors import ConfigurationError
from orchestra.tasks import DeadLetter, TaskPriority, require_int

if TYPE_CHECKING:
    from orchestra.app import App

PAGE = 200
ROOMY = 120
"""Columns of a terminal from which on the task's id is listed, too."""
_ID = re.compile(r"\d{1,20}-\d{1,20}")
_LAST_SEQ = 2**64 - 1

PlaceArgument = Annotated[
    str | None,
    typer.Argument(metavar="[QUEUE|TARGET]", help="The queue, or the app it belongs to.", show_default=False),
]
WordsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[QUEUE|TARGET] ID...",
        help="Ids of dead letters, as `dlq ls` shows them; a queue before them.",
        show_default=False,
    ),
]
ReasonOption = Annotated[
    str | None,
    typer.Option(
        "--reason",
        metavar="WORD",
        help="Only those that died of it: failed, timed_out, crashed, rejected, corrupt, …",
        show_default=False,
    ),
]
AllOption = Annotated[bool, typer.Option("--all", help="Every dead letter (with --reason: of that reason).")]


def commands() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help="Look at dead letters, send them again, delete them.", no_args_is_help=True)
    shown = (
        (ls, ("orchestra dlq ls triage", "orchestra dlq ls jobs:app --reason timed_out --limit 100")),
        (show, ("orchestra dlq show triage 1700000000000-0",)),
        (
            replay,
            ("orchestra dlq replay triage 1700000000000-0", "orchestra dlq replay triage --all --reason timed_out"),
        ),
        (purge, ("orchestra dlq purge triage --all --reason rejected --yes",)),
    )
    for function, lines in shown:
        app.command(function.__name__, help=unwrapped(function.__doc__), epilog=examples(*lines))(function)
    return app


def ls(
    place: PlaceArgument = None,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", help="Show so many, oldest first.")] = 20,
    after: Annotated[
        str | None, typer.Option("--after", metavar="ID", help="Go on behind this one.", show_default=False)
    ] = None,
    reason: ReasonOption = None,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """List dead letters, oldest first.

    Exit status: 0, also when there are none; 1 if Redis failed, 2 wrong usage.
    """
    require_int("--limit", limit, 1, 100_000)

    async def work() -> int:
        async with opened(place or app, redis, queue) as opened_app:
            found, more = await _page(opened_app, limit, after, reason)
            if as_json:
                for letter in found:
                    print_json(_facts(letter))
                return 0
            depth = await opened_app.queue.get_dlq_depth()
            _print_list(opened_app.queue_name, found, depth, more=more)
            return 0

    return asyncio.run(work())


async def _page(app: App, limit: int, after: str | None, reason: str | None) -> tuple[list[DeadLetter], bool]:
    found: list[DeadLetter] = []
    async for letter in _letters(app, after, reason):
        if len(found) == limit:
            return found, True
        found.append(letter)
    return found, False


async def _letters(app: App, after: str | None, reason: str | None) -> AsyncIterator[DeadLetter]:
    """Dead letters behind ``after``; as many as there are at the start, so that new ones are not chased for ever."""
    left = await app.queue.get_dlq_depth()
    while left > 0:
        page = await app.queue.read_dlq(min(PAGE, left), after)
        if not page:
            return
        left -= len(page)
        after = page[-1].message_id
        for letter in page:
            if reason is None or letter.reason == reason:
                yield letter


def _print_list(queue: str, found: Sequence[DeadLetter], depth: int, *, more: bool) -> None:
    if not found:
        print(
            f"queue {queue} has no dead letters"
            if not depth
            else f"none of the {depth} dead letters of queue {queue} is such"
        )
        return
    terminal = console()
    roomy = terminal.width >= ROOMY
    titles: list[str | tuple[str, str]] = ["id", "died", "type", "reason", ("tries", "right"), "error"]
    listed = table(*titles[:3], *(["task"] if roomy else []), *titles[3:])
    for letter in found:
        task = letter.task_data or {}
        cells = [letter.message_id, ago(letter.died_at), clean(task.get("type", "?"), 30)]
        cells += [clean(task.get("id", "?"), 40)] if roomy else []
        row(listed, [*cells, clean(letter.reason, 20), letter.attempts, _short_error(letter)])
    for column in listed.columns[:-1]:
        column.no_wrap = True  # what is copied into the next command stays in one piece; the error gets the rest
    terminal.print(listed)
    say(f"{len(found)} of {depth} dead letters of queue {queue}")
    if more:
        say(f"more: orchestra dlq ls {queue} --after {found[-1].message_id}")


def _short_error(letter: DeadLetter) -> str:
    kind, text = str(letter.error_info.get("error_type", "")), str(letter.error_info.get("error", ""))
    return clean(f"{kind}: {text}" if kind and kind != letter.reason else text, 80)


def _facts(letter: DeadLetter) -> dict[str, Any]:
    return {**letter._asdict(), "raw": letter.raw.hex()}


def show(
    words: WordsArgument = None,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show dead letters in full: the task, the error with its traceback, and the bytes of what could not be decoded.

    Exit status: 0, 1 if one of them does not exist or Redis failed, 2 wrong usage.
    """
    place, ids = _words(words, app)
    if not ids:
        raise ConfigurationError("give the id of a dead letter; `orchestra dlq ls` lists them", field="ID")

    async def work() -> int:
        missing = 0
        async with opened(place, redis, queue) as opened_app:
            for ident in ids:
                letter = await _find(opened_app, ident)
                if letter is None:
                    missing += 1
                    say(f"there is no dead letter {ident} in queue {opened_app.queue_name}")
                elif as_json:
                    print_json(_facts(letter))
                else:
                    _print_letter(opened_app.queue_name, letter)
        return 1 if missing else 0

    return asyncio.run(work())


async def _find(app: App, ident: str) -> DeadLetter | None:
    ms, _, seq = ident.partition("-")
    before = f"{ms}-{int(seq) - 1}" if int(seq) else f"{int(ms) - 1}-{_LAST_SEQ}"
    found = await app.queue.read_dlq(1, before if int(ms) or int(seq) else None)
    return found[0] if found and found[0].message_id == ident else None


def _print_letter(queue: str, letter: DeadLetter) -> None:
    task, error = letter.task_data, dict(letter.error_info)
    print(f"dead letter {letter.message_id} of queue {queue}")
    facts: list[tuple[str, Any]] = [
        ("died", ago(letter.died_at)),
        ("reason", letter.reason),
        ("attempts", letter.attempts),
    ]
    if task is not None:
        priority = task.get("priority", TaskPriority.NORMAL)
        facts += [
            ("task", task.get("id")),
            ("type", task.get("type")),
            ("priority", TaskPriority(priority).name.lower()),
        ]
        facts += [(name, task[name]) for name in task if name not in ("id", "type", "priority", "input")]
    trace = error.pop("traceback", None)
    facts += error.items()
    print(pairs(facts))
    if task is not None:
        print(f"\ninput\n{_indented(pretty(task.get('input')))}")
    else:
        print(f"\nthe entry is not a task; its bytes\n{hexdump(letter.raw)}")
    if trace:
        print(f"\ntraceback\n{_indented(clean(trace))}")
    if task is not None:
        print(f"\nsend it again: orchestra dlq replay {queue} {letter.message_id}")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def replay(
    words: WordsArgument = None,
    everything: AllOption = False,
    reason: ReasonOption = None,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Send dead letters again, with all their retries restored. What cannot be decoded stays dead.

    Exit status: 0, 1 if one of the ids could not be replayed or Redis failed, 2 wrong usage.
    """
    place, ids = _chosen(words, app, everything, reason)

    async def work() -> int:
        async with opened(place, redis, queue) as opened_app:
            wanted = ids or [letter.message_id async for letter in _letters(opened_app, None, reason)]
            done = await opened_app.queue.replay_dlq(wanted)
            return _tell("replayed", done, len(wanted), opened_app.queue_name, strict=bool(ids), as_json=as_json)

    return asyncio.run(work())


def purge(
    words: WordsArgument = None,
    everything: AllOption = False,
    reason: ReasonOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Delete dead letters for good. Asks first, unless --yes is given.

    Exit status: 0, 1 if one of the ids does not exist, Redis failed or you said no, 2 wrong usage.
    """
    place, ids = _chosen(words, app, everything, reason)

    async def work() -> int:
        async with opened(place, redis, queue) as opened_app:
            wanted = ids or [letter.message_id async for letter in _letters(opened_app, None, reason)]
            if wanted and not yes and not _agreed(len(wanted), opened_app.queue_name):
                say("nothing was deleted")
                return 1
            done = await opened_app.queue.purge_dlq(wanted) if wanted else 0
            return _tell("deleted", done, len(wanted), opened_app.queue_name, strict=bool(ids), as_json=as_json)

    return asyncio.run(work())


def _agreed(count: int, queue: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigurationError(
            f"deleting {count} dead letters of queue {queue} needs --yes when nobody can be asked", field="--yes"
        )
    answer = input(f"delete {count} dead letters of queue {queue} for good? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def _tell(what: str, done: int, wanted: int, queue: str, *, strict: bool, as_json: bool) -> int:
    if as_json:
        print_json({what: done, "of": wanted, "queue": queue})
    else:
        print(
            f"{what} {done} of {wanted} dead letters of queue {queue}"
            if done < wanted
            else f"{what} {done} dead letters of queue {queue}"
        )
    return 1 if strict and done < wanted else 0


def _chosen(
    words: list[str] | None, app: str | None, everything: bool, reason: str | None
) -> tuple[str | None, list[str]]:
    place, ids = _words(words, app)
    if bool(ids) == everything:
        raise ConfigurationError("give ids of dead letters, or --all (with --reason for some of them)", field="ID")
    if ids and reason is not None:
        raise ConfigurationError("--reason goes with --all, not with ids", field="--reason", value=reason)
    return place, ids


def _words(words: list[str] | None, app: str | None) -> tuple[str | None, list[str]]:
    """The queue or target, and the ids, among the words of a command line."""
    ids = [word for word in words or () if _ID.fullmatch(word)]
    places = [word for word in words or () if not _ID.fullmatch(word)]
    if len(places) > 1 or (places and words and words[0] != places[0]):
        raise ConfigurationError(
            f"{places[-1]!r} is not the id of a dead letter, such as 1700000000000-0", field="ID", value=places[-1]
        )
    return (places[0] if places else app), ids
