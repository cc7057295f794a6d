"""``orchestra worker``: runs an app's agents until it is told to stop.

Owns signals, logging and the supervision of worker processes. Refuses to own dispatching. One event loop a process;
the supervisor of several processes has one, too, and runs no agents itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestra import telemetry
from orchestra._backoff import Reconnect
from orchestra.cli._options import QueueOption, RedisOption, TargetArgument, bound, examples
from orchestra.cli._output import clean
from orchestra.cli._status import FAILURE, INTERRUPTED, OK, USAGE
from orchestra.errors import ConfigurationError
from orchestra.tasks import require_int, require_number

if TYPE_CHECKING:
    from orchestra.app import App
    from orchestra.dispatcher import Dispatcher

logger = logging.getLogger("orchestra.worker")

LEVELS = ("debug", "info", "warning", "error")
STEADY = 60.0
"""A worker process that lived so many seconds was well: the next restart is quick again."""
KILL_GRACE = 5.0
"""Seconds beyond the drain timeout after which a worker process that does not end is killed."""
EPILOG = examples(
    "orchestra worker jobs:app --concurrency 200",
    "orchestra worker jobs.py --processes 4 --redis redis://localhost/0",
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
    processes: Annotated[
        int, typer.Option("--processes", "-p", metavar="N", help="Worker processes; one that dies is replaced.")
    ] = 1,
    redis: RedisOption = None,
    queue: QueueOption = None,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout", metavar="SECONDS", help="How long running agents may go on when it is told to stop."
        ),
    ] = 30.0,
    log_level: Annotated[
        str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
    ] = "info",
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log one JSON object a line.")] = False,
    parent_fd: Annotated[int | None, typer.Option("--parent-fd", hidden=True)] = None,
) -> int:
    """Run the agents of an app until SIGTERM or Ctrl-C.

    The first signal drains: no new tasks, running agents may finish, the rest goes back to the queue. A second one ends
    at once: what was running is run again by other workers, on this machine at once, elsewhere when its lease has ended.

    Exit status: 0 after SIGTERM, 130 after Ctrl-C, 1 if Redis fails for good, 2 if the app cannot be loaded.
    """
    require_int("--processes", processes, 1, 1024)
    require_number("--drain-timeout", drain_timeout, 0.0, 86_400.0, unit="seconds")
    if concurrency is not None:
        require_int("--concurrency", concurrency, 1, 100_000)
    log_to_stderr(log_level, json_logs=json_logs)
    app = bound(target, redis, queue)
    if not len(app.agents):
        raise ConfigurationError(
            f"{target!r} has an App without agents: decorate a function with @app.agent", field="target"
        )
    if processes > 1:
        if sys.platform == "win32":
            raise ConfigurationError(
                "--processes needs a POSIX system: start several workers instead", field="--processes"
            )
        options = [
            f"--drain-timeout={drain_timeout}",
            f"--log-level={log_level}",
            *(["--json-logs"] if json_logs else []),
        ]
        for name, value in (("concurrency", concurrency), ("redis", redis), ("queue", queue)):
            options += [] if value is None else [f"--{name}={value}"]
        return asyncio.run(Supervisor([target, *options], processes, drain_timeout).run())
    return asyncio.run(_work(app, concurrency, drain_timeout, parent_fd))


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


class Stopper:
    """Turns signals, and the death of a supervising parent, into an event; the second signal ends the process."""

    def __init__(self, at_once: Callable[[int], Any]) -> None:
        self.event = asyncio.Event()
        self.signal: int | None = None
        self._at_once = at_once
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C raises KeyboardInterrupt instead
                loop.add_signal_handler(number, self._asked, number)

    def _asked(self, number: int) -> None:
        if self.event.is_set():
            self._at_once(128 + number)
            return
        self.signal = number
        self.event.set()

    def watch_parent(self, fd: int) -> None:
        """Drain when the other end of ``fd`` is closed: the parent has died."""
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(fd)
            logger.error("the supervising process is gone: draining")
            self.event.set()

        loop.add_reader(fd, gone)

    @property
    def status(self) -> int:
        """The exit status after a well ended drain."""
        return INTERRUPTED if self.signal == signal.SIGINT else OK


async def _work(app: App, concurrency: int | None, drain_timeout: float, parent_fd: int | None) -> int:
    stopper = Stopper(os._exit)
    if parent_fd is not None:
        stopper.watch_parent(parent_fd)
    async with app:
        dispatcher = app.worker(concurrency, drain_timeout=drain_timeout)
        await dispatcher.start()
        logger.info("%s", _ready(app, concurrency))
        running = asyncio.ensure_future(dispatcher.run())
        asked = asyncio.ensure_future(stopper.event.wait())
        await asyncio.wait((running, asked), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            most = f"up to {drain_timeout:g} s for them" if dispatcher.running_tasks else "nothing to wait for"
            logger.info("draining: %d agents run, %s; a second signal ends at once", dispatcher.running_tasks, most)
            await dispatcher.stop()
        asked.cancel()
        await running
        logger.info("stopped: %s", _outcomes(dispatcher))
    return stopper.status


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


# -- several processes


class Supervisor:
    """Keeps ``count`` worker processes alive. They end when it does, whatever ends it: each watches a pipe to it."""

    def __init__(self, arguments: list[str], count: int, drain_timeout: float) -> None:
        self._command = [sys.executable, "-m", "orchestra.cli", "worker", *arguments]
        self._count = count
        self._drain_timeout = drain_timeout
        self._children: set[asyncio.subprocess.Process] = set()
        self._refused = 0

    async def run(self) -> int:
        """Until a signal comes, or a child says that its configuration is wrong; the exit status."""
        self._stopper = Stopper(self._kill_all)
        read_end, write_end = os.pipe()
        os.set_inheritable(write_end, False)
        logger.info("starting %d worker processes", self._count)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(1, self._count + 1):
                    group.create_task(self._keep(number, read_end))
                await self._stopper.event.wait()
                await self._drain()
        finally:
            os.close(read_end)
            os.close(write_end)
        return self._refused or self._stopper.status

    async def _keep(self, number: int, read_end: int) -> None:
        backoff = Reconnect(0.5, 30.0)
        while not self._stopper.event.is_set():
            began = time.monotonic()
            child = await asyncio.create_subprocess_exec(
                *self._command,
                f"--parent-fd={read_end}",
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(read_end,),
                start_new_session=True,  # a Ctrl-C in the terminal is for the supervisor, which passes it on once
            )
            self._children.add(child)
            if self._stopper.event.is_set():
                child.terminate()
            status = await child.wait()
            self._children.discard(child)
            if self._stopper.event.is_set():
                return
            if status in (USAGE, FAILURE) and time.monotonic() - began < KILL_GRACE and not backoff.failures:
                self._give_up(number, status)
                return
            if time.monotonic() - began > STEADY:
                backoff.reset()
            wait = backoff.next()
            logger.error("worker %d (pid %d) %s; another starts in %.1f s", number, child.pid, _ending(status), wait)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._stopper.event.wait()

    def _give_up(self, number: int, status: int) -> None:
        """A child that fails at once the first time has said why; its successors would say the same."""
        if not self._refused:
            logger.error("worker %d could not start: stopping", number)
        self._refused = status
        self._stopper.event.set()

    async def _drain(self) -> None:
        logger.info("draining %d worker processes; a second signal ends them at once", len(self._children))
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        asyncio.get_running_loop().call_later(self._drain_timeout + KILL_GRACE, self._kill_all, 0)

    def _kill_all(self, _status: int) -> None:
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"
