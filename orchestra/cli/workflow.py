"""``orchestra workflow``: starts, shows, follows and steers workflows.

Owns the commands: which queue a workflow belongs to, what they print, their exit status. Refuses to own pictures
(:mod:`orchestra.cli._workflow_view`) and what steering means, which is a :class:`~orchestra._front.workflow_runs.WorkflowRun`'s.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer

from orchestra._front.loading import is_target
from orchestra._front.workflow_runs import WorkflowRun
from orchestra.app import App
from orchestra.cli._options import (
    AppOption,
    JsonOption,
    QueueOption,
    RedisOption,
    drop_none,
    examples,
    manager_of,
    mistaken,
    priority_of,
    unwrapped,
    workers_alive,
)
from orchestra.cli._output import ago, clean, console, plain_value, pretty, print_json, row, say, table
from orchestra.cli._status import DEAD, OK, USAGE
from orchestra.cli._workflow_places import json_of, named, namespaces, place, with_run
from orchestra.cli._workflow_view import (
    Picture,
    error_text,
    event_facts,
    event_line,
    facts_of,
    name_of,
    signal_of,
    word_of,
)
from orchestra.errors import ConfigurationError, UnknownAgentError, WorkflowError
from orchestra.memory import MemoryManager
from orchestra.tasks import TaskState, check_ident, require_int
from orchestra.workflow import WorkflowEngine, WorkflowState, WorkflowSummary

IdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="The workflow's id, as `orchestra workflow ls` shows it.")
]
_STATUSES = ", ".join(state.value for state in TaskState)


def commands() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help="Start, show, follow and steer workflows.", no_args_is_help=True)
    shown = (
        (
            start,
            (
                'orchestra workflow start jobs:app report --input \'{"month": "May"}\' --follow',
                "orchestra workflow start jobs:app report --plan plan.json --id may-report",
            ),
        ),
        (show, ("orchestra workflow show may-report", "orchestra workflow show may-report --all --json")),
        (ls, ("orchestra workflow ls", "orchestra workflow ls --status running --limit 100 --json")),
        (follow, ("orchestra workflow follow may-report", "orchestra workflow follow may-report --after 17-0 --json")),
        (
            approve,
            (
                "orchestra workflow approve may-report publish",
                'orchestra workflow approve may-report publish --deny --message "not before Monday"',
                'orchestra workflow approve may-report choose --value \'{"model": "b"}\'',
            ),
        ),
        (cancel, ('orchestra workflow cancel may-report --reason "wrong month"',)),
        (pause, ("orchestra workflow pause may-report",)),
        (resume, ("orchestra workflow resume may-report",)),
    )
    for function, lines in shown:
        app.command(function.__name__, help=unwrapped(function.__doc__), epilog=examples(*lines))(function)
    return app


# -- start


def start(
    target: Annotated[
        str, typer.Argument(metavar="APP|QUEUE", help="The app (module:app or file.py), or a queue's name.")
    ],
    workflow_type: Annotated[
        str, typer.Argument(metavar="TYPE", help="What kind of workflow: what planner and template know it by.")
    ],
    given: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="JSON|@FILE|-", help="Its input: JSON, a file with it, or - for standard input."
        ),
    ] = None,
    plan: Annotated[
        str | None, typer.Option("--plan", metavar="FILE", help="A JSON file with its plan: a list of steps.")
    ] = None,
    workflow_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Its id; started twice it is one workflow.")
    ] = None,
    priority: Annotated[
        str | None, typer.Option("--priority", metavar="LEVEL", help="Of its steps: critical, high, normal or low.")
    ] = None,
    following: Annotated[
        bool, typer.Option("--follow", help="Print its events until it ends, then its result.")
    ] = False,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Start a workflow.

    It runs by the plan in --plan; else the workers plan it: by the app's planners, the template of its type, or as one
    step of that type. Workers (`orchestra worker APP`) do its steps.

    A bad plan is refused before anything runs, with all its faults, one a line.

    Exit status: 0 started (with --follow: completed), 3 it failed or was cancelled, 1 Redis failed, 2 wrong usage or a bad
    plan.
    """
    steps = None if plan is None else json_of(f"@{plan}", "--plan")
    told = None if given is None else json_of(given, "--input")
    app = named(target, redis, queue)
    _require_startable(app, target, workflow_type, planned=steps is not None)
    options = drop_none(plan=steps, id=workflow_id, priority=priority_of(priority))

    hint = "" if is_target(target) else mistaken(target)
    return asyncio.run(_start(app, workflow_type, told, options, hint, following=following, as_json=as_json))


async def _start(
    app: App, workflow_type: str, given: Any, options: dict[str, Any], hint: str, *, following: bool, as_json: bool
) -> int:
    async with app:
        try:
            run = await app.start_workflow(workflow_type, given, **options)
        except WorkflowError as error:
            return _refused(error, as_json=as_json)
        if not following and as_json:
            print_json({"id": run.id, "type": workflow_type, "queue": app.queue_name})
        elif not following:
            print(f"started {run.id} on queue {app.queue_name}")
        else:
            say(f"started {run.id} on queue {app.queue_name}")
        if not await workers_alive(manager_of(app), app.queue_name):
            say("no worker takes tasks from this queue now; start one with: orchestra worker TARGET" + hint)
        return await _follow(run, "0", as_json=as_json) if following else OK


def _require_startable(app: App, target: str, workflow_type: str, *, planned: bool) -> None:
    """A type that nothing of the app knows is a slip of the pen; a queue's name alone says nothing about types."""
    check_ident("TYPE", workflow_type)
    if planned or not is_target(target) or app.planners or workflow_type in app.templates:
        return
    if workflow_type not in app.agents:
        known = ", ".join(sorted({*app.templates, *app.agents})) or "none"
        raise UnknownAgentError(
            f"{target!r} has no planner, and no template or agent {workflow_type!r}; there are: {known}",
            task_type=workflow_type,
        )


def _refused(error: WorkflowError, *, as_json: bool) -> int:
    """Say every fault of a plan on a line of its own."""
    if not error.faults:
        raise error
    if as_json:
        print_json({"error": "bad_plan", "faults": list(error.faults)})
    count = len(error.faults)
    say(f"error: the plan has {count} fault{'s' * (count != 1)}:")
    for fault in error.faults:
        say(f"  {clean(fault, 400)}")
    return USAGE


# -- look


def show(
    workflow_id: IdArgument,
    every: Annotated[bool, typer.Option("--all", help="Fold nothing: every item, every line of the result.")] = False,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Draw a workflow: its steps as a tree with their states, times and results, and what it waits for.

    What forks is indented, what joins again is not. Many alike lines are folded.

    Exit status: 0, whatever became of it; 1 if Redis failed, 2 wrong usage or no such workflow.
    """

    async def work(run: WorkflowRun, at: App) -> int:
        state = await run.state()
        if as_json:
            print_json(facts_of(state, at.queue_name))
        else:
            Picture(console(), every=every).show(state, at.queue_name)
        return OK

    return asyncio.run(with_run(workflow_id, app, queue, redis, work))


def ls(
    status: Annotated[
        str | None, typer.Option("--status", metavar="WORD", help=f"Only those that are {_STATUSES}.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", help="Show so many, newest first.")] = 20,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """List workflows, newest first; of all queues, unless one is named.

    Ended ones are forgotten after their retention, a day by default.

    Exit status: 0, also when there are none; 1 if Redis failed, 2 wrong usage.
    """
    require_int("--limit", limit, 1, 100_000)
    wanted = None if status is None else _status(status)

    async def work() -> int:
        async with place(app, queue, redis) as (manager, names):
            found = []
            for name in names or await namespaces(manager):
                engine = WorkflowEngine(MemoryManager(manager, namespace=name))
                found += [(name, one) for one in await engine.list_workflows(status=wanted, limit=limit)]
        found.sort(key=lambda pair: pair[1].created_at, reverse=True)
        _print_list(found[:limit], as_json=as_json)
        return OK

    return asyncio.run(work())


def _status(word: str) -> TaskState:
    try:
        return TaskState(word.lower())
    except ValueError:
        raise ConfigurationError(
            f"--status must be one of {_STATUSES}, got {word!r}", field="--status", value=word
        ) from None


def _print_list(found: list[tuple[str, WorkflowSummary]], *, as_json: bool) -> None:
    if as_json:
        for queue, one in found:
            print_json(
                {
                    "id": one.id,
                    "queue": queue,
                    "type": one.type,
                    "status": one.status.value,
                    "phase": one.phase,
                    "completed": one.completed,
                    "total": one.total,
                    "created_at": one.created_at,
                    "finished_at": one.finished_at,
                }
            )
        return
    if not found:
        print("there are no workflows")
        return
    several = len({queue for queue, _ in found}) > 1
    listed = table("workflow", "type", "status", ("steps", "right"), "begun", *(["queue"] if several else []))
    for queue, one in found:
        progress = f"{one.completed}/{one.total}"
        cells = [clean(one.id, 60), clean(one.type, 30), word_of(one), progress, ago(one.created_at)]
        row(listed, [*cells, queue] if several else cells)
    console().print(listed)


def follow(
    workflow_id: IdArgument,
    after: Annotated[
        str, typer.Option("--after", metavar="POS", help="Go on behind this event; its id is in --json.")
    ] = "0",
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Print what happens in a workflow, from its start, until it has ended; then its result.

    With --json each line is an event; the last one has the status and the output.

    Exit status: 0 it completed, 3 it failed or was cancelled, 1 Redis failed, 2 wrong usage or no such workflow.
    """

    async def work(run: WorkflowRun, _: App) -> int:
        return await _follow(run, after, as_json=as_json)

    return asyncio.run(with_run(workflow_id, app, queue, redis, work))


async def _follow(run: WorkflowRun, after: str, *, as_json: bool) -> int:
    out = console()
    names: dict[int, str] = {}
    async for event in run.events(after):
        if as_json:
            print_json(event_facts(event))
            continue
        if event.step is not None and event.step not in names:
            names = _names(await run.state())
        out.print(event_line(event, names), no_wrap=True, overflow="ellipsis")
    state = await run.state()
    output = state.workflow_context.get("final_output")
    if as_json:
        print_json({"id": run.id, "status": state.status.value, "output": output, "error": state.error})
    elif state.status is TaskState.COMPLETED:
        tty = sys.stdout.isatty()
        print(pretty(output) if tty else json.dumps(output, default=plain_value, ensure_ascii=False))
    if state.status is TaskState.COMPLETED:
        return OK
    if not as_json:
        say(f"error: workflow {run.id} {word_of(state)}" + (f": {error_text(state.error)}" if state.error else ""))
    return DEAD


def _names(state: WorkflowState) -> dict[int, str]:
    """What steps are called in a line of their own, where no picture says where they belong."""
    names = {}
    for step in state.steps:
        name = name_of(step, state)
        if step.role == "item" and step.parent is not None:
            name = f"{state.steps[step.parent].id}{name}"
        names[step.step_index] = f"{step.action} undoes {name}" if step.role == "compensation" else name
    return names


# -- steer


def approve(
    workflow_id: IdArgument,
    signal: Annotated[
        str | None,
        typer.Argument(
            metavar="[SIGNAL]", help="The signal; may be left out if just one step waits for one.", show_default=False
        ),
    ] = None,
    value: Annotated[
        str | None, typer.Option("--value", metavar="JSON|@FILE", help="The signal's value; by default true.")
    ] = None,
    deny: Annotated[
        bool, typer.Option("--deny", help="Deny: the value is false, or says so with the message.")
    ] = False,
    message: Annotated[
        str | None,
        typer.Option(
            "--message", metavar="TEXT", help='With --deny: why; the value is {"approved": false, "message": …}.'
        ),
    ] = None,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Give a workflow the signal that a step waits for: approve, deny, or any other value.

    A signal that no step waits for yet is kept until one does. Each signal is given once; the first value counts.

    Exit status: 0 given; 3 it was given before; 1 the workflow has ended or Redis failed, 2 wrong usage or no such workflow.
    """
    if deny and value is not None:
        raise ConfigurationError("give --value or --deny, not both", field="--deny")
    if message is not None and not deny:
        raise ConfigurationError("--message goes with --deny", field="--message", value=message)
    told: Any = True if value is None else json_of(value, "--value")
    if deny:
        told = False if message is None else {"approved": False, "message": message}

    async def work(run: WorkflowRun, _: App) -> int:
        state = await run.state()
        waiting = _waited_for(state)
        name = signal or _only(state, waiting)
        given = await run.signal(name, told)
        if as_json:
            print_json({"id": run.id, "signal": name, "value": told, "given": given, "waited_for": name in waiting})
        elif not given:
            say(f"signal {name} was given before; the first value counts")
        else:
            held = "" if name in waiting else ", and is kept until a step waits for it"
            print(f"{'denied' if deny else 'gave'} {name}{held}")
        return OK if given else DEAD

    return asyncio.run(with_run(workflow_id, app, queue, redis, work))


def _waited_for(state: WorkflowState) -> list[str]:
    return [name for step in state.steps if (name := signal_of(step))]


def _only(state: WorkflowState, waiting: list[str]) -> str:
    if len(waiting) == 1:
        return waiting[0]
    what = f"steps wait for: {', '.join(waiting)}" if waiting else "no step waits for one now"
    raise ConfigurationError(f"name the signal for workflow {state.task_id}; {what}", field="SIGNAL")


def cancel(
    workflow_id: IdArgument,
    reason: Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why, for the record.")] = None,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Cancel a workflow: nothing new begins, running steps are cancelled, compensations run.

    Exit status: 0, also when it had ended; 1 if Redis failed, 2 wrong usage or no such workflow.
    """

    async def steer(run: WorkflowRun) -> bool:
        return await run.cancel(reason)

    return asyncio.run(with_run(workflow_id, app, queue, redis, _steered("cancelled", steer, as_json=as_json)))


def pause(
    workflow_id: IdArgument,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Pause a workflow: what runs goes on, nothing new begins until it is resumed.

    Exit status: 0, also when it was paused or has ended; 1 if Redis failed, 2 wrong usage or no such workflow.
    """
    return asyncio.run(with_run(workflow_id, app, queue, redis, _steered("paused", WorkflowRun.pause, as_json=as_json)))


def resume(
    workflow_id: IdArgument,
    app: AppOption = None,
    queue: QueueOption = None,
    redis: RedisOption = None,
    as_json: JsonOption = False,
) -> int:
    """Go on with a paused workflow, or with a failed one, whose failed steps are tried again.

    Exit status: 0, also when there was nothing to resume; 1 if Redis failed, 2 wrong usage or no such workflow.
    """
    return asyncio.run(
        with_run(workflow_id, app, queue, redis, _steered("resumed", WorkflowRun.resume, as_json=as_json))
    )


def _steered(
    word: str, steer: Callable[[WorkflowRun], Awaitable[bool]], *, as_json: bool
) -> Callable[[WorkflowRun, App], Awaitable[int]]:
    async def work(run: WorkflowRun, _: App) -> int:
        before = await run.state()
        done = await steer(run)
        after = await run.state()
        now = word_of(after)
        if as_json:
            print_json({"id": run.id, word: done, "status": now})
        else:
            print(f"{word} {run.id}" if after.version != before.version else f"{run.id} is {now}: nothing changed")
        return OK

    return work
