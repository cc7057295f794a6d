"""``orchestra worker``: runs an app's agents until it is told to stop.

Owns logging and how a worker ends. Refuses to own dispatching, what signals mean (``_signals``), and the supervision of
several processes (``_supervisor``). One event loop a process; the supervisor has one, too, and runs no agents.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestra import _process, telemetry
from orchestra.cli._options import QueueOption, RedisOption, TargetArgument, bound, examples
from orchestra.cli._output import clean
from orchestra.cli._signals import CLOSING, Stopper, run_to_the_end
from orchestra.cli._status import FAILURE
from orchestra.cli._supervisor import KILL_GRACE, Processes, Supervisor, report, say_ready
from orchestra.errors import ConfigurationError
from orchestra.tasks import RetryBudget, require_int, require_number

if TYPE_CHECKING:
    from orchestra.app import App
    from orchestra.dispatcher import Dispatcher

logger = logging.getLogger("orchestra.worker")

LEVELS = ("debug", "info", "warning", "error")
ProcessesOption = Annotated[
    str,
    typer.Option(
        "--processes",
        "-p",
        metavar="N|MIN:MAX",
        help="Worker processes; one that dies is replaced. With MIN:MAX as many as the load needs.",
    ),
]
ScaleIntervalOption = Annotated[
    float, typer.Option("--scale-interval", metavar="SECONDS", help="With MIN:MAX: how often the number is decided.")
]
ScaleCooldownOption = Annotated[
    float, typer.Option("--scale-cooldown", metavar="SECONDS", help="With MIN:MAX: how long fewer must be enough.")
]
LoopOption = Annotated[
    str,
    typer.Option("--loop", metavar="NAME", help="Event loop: asyncio, uvloop, or auto: uvloop where it is installed."),
]
EPILOG = examples(
    "orchestra worker jobs:app --concurrency 200",
    "orchestra worker jobs.py --processes 4 --redis redis://localhost/0",
    "orchestra worker jobs:app --processes 1:8",
)


def worker(
    target: TargetArgument,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "-c",
            metavar="N",
            help="Agents that run at once in a process. Default: the app's, 100.",
            show_default=False,
        ),
    ] = None,
    processes: ProcessesOption = "1",
    redis: RedisOption = None,
    queue: QueueOption = None,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout", metavar="SECONDS", help="How long running agents may go on when it is told to stop."
        ),
    ] = 30.0,
    retry_budget: Annotated[
        str,
        typer.Option(
            "--retry-budget",
            metavar="RATIO[+FLOOR]",
            help="How much may be retries: a share of all attempts, plus so many a second; or off.",
        ),
    ] = "0.2+10",
    scale_interval: ScaleIntervalOption = 5.0,
    scale_cooldown: ScaleCooldownOption = 60.0,
    log_level: Annotated[
        str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
    ] = "info",
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log one JSON object a line.")] = False,
    loop: LoopOption = "auto",
    parent_fd: Annotated[int | None, typer.Option("--parent-fd", hidden=True)] = None,
    report_every: Annotated[float | None, typer.Option("--report", hidden=True)] = None,
) -> int:
    """Run the agents of an app until SIGTERM or Ctrl-C.

    The first signal drains: no new tasks, running agents may finish, the rest goes back to the queue. A second one ends
    at once: what was running is run again by other workers, on this machine at once, elsewhere when its lease has ended.

    Exit status: 0 after SIGTERM, 130 after Ctrl-C, 1 if Redis fails for good, 2 if the app cannot be loaded; 143 or 130
    after a second signal, or when an agent that blocks everything keeps the drain from ending in time.
    """
    count = Processes.parse(processes, scale_interval, scale_cooldown)
    require_number("--drain-timeout", drain_timeout, 0.0, 86_400.0, unit="seconds")
    if concurrency is not None:
        require_int("--concurrency", concurrency, 1, 100_000)
    budget = parse_retry_budget(retry_budget)
    log_to_stderr(log_level, json_logs=json_logs)
    _process.loop_factory(loop)  # a name that is wrong is told before anything starts
    app = bound(target, redis, queue)
    if not len(app.agents):
        raise ConfigurationError(
            f"{target!r} has an App without agents: decorate a function with @app.agent", field="target"
        )
    if count.high > 1:
        given = {"drain-timeout": drain_timeout, "retry-budget": retry_budget, "log-level": log_level, "loop": loop}
        given |= {"concurrency": concurrency, "redis": redis, "queue": queue}
        return _supervised(target, given, count, drain_timeout, json_logs=json_logs)
    with Stopper(os._exit, drain_timeout + KILL_GRACE) as stopper:
        dispatching = {"concurrency": concurrency, "drain_timeout": drain_timeout, "retry_budget": budget}
        return run_to_the_end(_work(app, stopper, parent_fd, report_every, dispatching), loop)


def _supervised(
    target: str, given: dict[str, object], count: Processes, drain_timeout: float, *, json_logs: bool
) -> int:
    """Run ``count`` workers with the options that were ``given`` (None: by default) until they are told to stop."""
    if sys.platform == "win32":
        raise ConfigurationError("--processes needs a POSIX system: start several workers instead", field="--processes")
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return Supervisor([target, *options, *(["--json-logs"] if json_logs else [])], count, drain_timeout).run()


def parse_retry_budget(text: str) -> RetryBudget | None:
    """``RATIO+FLOOR``, ``RATIO`` or ``off``.

    Raises:
        ConfigurationError: it is none of these, or a number is out of range.
    """
    if text == "off":
        return None
    ratio, plus, floor = text.partition("+")
    try:
        numbers = {"ratio": float(ratio), **({"floor": float(floor)} if plus else {})}
    except ValueError:
        raise ConfigurationError(
            f"--retry-budget must be RATIO+FLOOR (like 0.2+10), RATIO, or off, got {text!r}",
            field="--retry-budget",
            value=text,
        ) from None
    return RetryBudget(**numbers)


# -- logging


def log_to_stderr(level: str, *, json_logs: bool) -> None:
    """Log to standard error, with the events that an operator wants and every attempt that failed."""
    if level.lower() not in LEVELS:
        raise ConfigurationError(
            f"--log-level must be {', '.join(LEVELS)}, got {level!r}", field="--log-level", value=level
        )
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(process)d %(message)s", "%H:%M:%S")
    handler.setFormatter(telemetry.JsonFormatter() if json_logs else plain)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    telemetry.attach_default_logger()
    telemetry.attach(_log_failed, "task.settled")


def _log_failed(name: str, measurements: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
    if metadata["outcome"] not in ("failed", "timed_out", "cancelled"):
        return
    again, dead = metadata["retry_in_s"], metadata["dead_reason"]
    what = f"again in {again:.1f} s" if again is not None else f"dead: {dead}"
    error = f": {clean(metadata['error'], 300)}" if metadata["error"] else ""
    text = f"task {metadata['task_id']} ({metadata['type']}) {metadata['outcome']} on attempt {metadata['attempt']}, {what}{error}"
    facts = {"event": name, "facts": {**measurements, **metadata}}
    logger.log(logging.WARNING if again is not None else logging.ERROR, "%s", text, extra=facts)


# -- one process


async def _work(
    app: App, stopper: Stopper, parent_fd: int | None, report_every: float | None, dispatching: dict[str, Any]
) -> int:
    stopper.attach()
    if parent_fd is not None:
        stopper.watch_parent(parent_fd)
    async with app:
        dispatcher = app.worker(**dispatching)
        _process.set_heap_aside()
        await dispatcher.start()
        if parent_fd is not None:
            say_ready(parent_fd)
        logger.info("%s", _ready(app, dispatching["concurrency"]))
        reporting = None
        if parent_fd is not None and report_every is not None:
            reporting = asyncio.create_task(report(dispatcher, parent_fd, report_every), name="orchestra:report")
        running = asyncio.ensure_future(dispatcher.run())
        asked = asyncio.ensure_future(stopper.event.wait())
        await asyncio.wait((running, asked), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            most = (
                f"up to {dispatching['drain_timeout']:g} s for them"
                if dispatcher.running_tasks
                else "nothing to wait for"
            )
            logger.info("draining: %d agents run, %s; a second signal ends at once", dispatcher.running_tasks, most)
            await dispatcher.stop()
        asked.cancel()
        if reporting is not None:
            reporting.cancel()
        failed = await asyncio.gather(running, return_exceptions=True)
        logger.info("stopped: %s", _outcomes(dispatcher))
    stuck = dispatcher.stuck
    status = FAILURE if isinstance(failed[0], BaseException) else stopper.status
    why = f"{stuck} agents ignore that they were stopped" if stuck else "what agents left behind does not end"
    stopper.last_resort.arm(0.5 if stuck else CLOSING, status, why)
    if isinstance(failed[0], BaseException):
        raise failed[0]
    return status


def _ready(app: App, concurrency: int | None) -> str:
    agents = []
    for name in app.agents:
        entry = app.agents.get(name)
        count = len(entry.replicas) if entry is not None else 1
        agents.append(name if count == 1 else f"{name} ({count} replicas)")
    most = app.concurrency if concurrency is None else concurrency
    return f"ready: agents {', '.join(agents)}; queue {app.queue_name} on {app.address.safe}; {most} at once"


def _outcomes(dispatcher: Dispatcher) -> str:
    counted = [f"{count} {outcome.value}" for outcome, count in dispatcher.outcomes.items() if count]
    return ", ".join(counted) or "no task came"
