"""``orchestra run``: a job from the shell, from its tasks to its results. Owns what it prints and its exit status."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from orchestra import _process
from orchestra._front.loading import load_app
from orchestra._jobs.file import JobIdentity, ResultsFile, Sidecar, new_identity
from orchestra._jobs.input import BadLine, TaskChecker, open_input, parse_line, read_lines
from orchestra._jobs.job import KEEP, Job, JobEngine
from orchestra._jobs.tally import Tally
from orchestra._jobs.workers import LocalWorkers, Orders, ProcessWorkers, Workers, kill_processes
from orchestra._redis.address import Address
from orchestra.cli._options import RedisOption, TargetArgument, examples
from orchestra.cli._output import clean, console, row, table
from orchestra.cli._progress import ProgressView, clock, duration
from orchestra.cli._status import DEAD, FAILURE, OK
from orchestra.cli._steering import steering
from orchestra.embedded import default_directory
from orchestra.errors import ConfigurationError, InvalidTaskError, OrchestraError
from orchestra.tasks import require_int

BAD_SHOWN = 50

EPILOG = examples(
    "orchestra run examples/code_audit.py",
    "orchestra run jobs.py --agent classify --input texts.jsonl --output labels.jsonl --concurrency 50",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    target: str
    args: list[str]
    agent: str | None
    input: str | None
    output: Path | None
    concurrency: int | None
    processes: int
    redis: str | None
    strict: bool
    retry_dead: bool
    fresh: bool
    quiet: bool
    json: bool

    def __post_init__(self) -> None:
        if self.concurrency is not None:
            require_int("--concurrency", self.concurrency, 1, 100_000, unit="agents")
        require_int("--processes", self.processes, 0, 1024)
        if self.input is None and (self.agent is not None or self.strict):
            name = "--agent" if self.agent is not None else "--strict"
            raise ConfigurationError(f"{name} says how to read --input, which is missing", field=name)
        if self.input is not None and self.args:
            raise ConfigurationError(
                f"{self.args[0]!r} is an argument for the App's own source, but tasks come from --input", field="args"
            )


def run(
    target: TargetArgument,
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARGS]", help="Arguments for the app's own source.", show_default=False),
    ] = None,
    agent: Annotated[
        str | None, typer.Option(metavar="NAME", help="Every line of --input is the input of this agent.")
    ] = None,
    input: Annotated[  # noqa: A002 - the word of the command line
        str | None, typer.Option(metavar="FILE", help="Tasks as JSON lines; - for standard input.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where results go, as JSON lines. Default: <app's name>.results.jsonl."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Agents running at once, in each process. Default: the app's.")
    ] = None,
    processes: Annotated[
        int,
        typer.Option(metavar="N", help="Worker processes. Default: none, agents run in this one.", show_default=False),
    ] = 0,
    redis: RedisOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Check all of --input first; send nothing if a line is bad.")
    ] = False,
    retry_dead: Annotated[
        bool, typer.Option("--retry-dead", help="Give the dead tasks of this job another chance.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was done: start the job over.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no report, only the last lines.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="At the end one JSON object on standard output.")] = False,
) -> None:
    """Run a job: send every task to its agent and write every result to a file.

    Tasks come from the App's own source, or from --input, a file of JSON lines: each line a task such as
    {"type": "classify", "input": {"text": "hello"}}, or with --agent just the input of that agent. A bad line is named
    with its number and reason, and the rest goes on.

    Results are appended to the output as they come, one line per task. Run the same command again, after Ctrl-C, a
    crash or a reboot: it goes on where it stopped and repeats nothing that finished. Ctrl-C lets running tasks finish
    (10 seconds); a second one ends at once.

    Exit status: 0 every task ended well; 3 some are dead (the commands that show them are printed); 1 something else
    went wrong, such as a bad line; 2 the command line is wrong; 130 interrupted.
    """
    given = locals()  # the parameters: exactly the fields of Options
    options = Options(**{**given, "args": args or []})
    raise typer.Exit(_process.run(_Run(options).main()))


class _Run:
    """One invocation."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.out = console()
        self.err = console(sys.stderr)
        self.app = load_app(options.target)
        if options.redis is not None:
            self.app.bind(redis=options.redis)
        self.output = options.output or Path(f"{self.app.name}.results.jsonl")
        self.began = time.monotonic()
        self._bad_shown = 0
        self._signal = 0
        self._replaced: str | None = None
        """The queue of the job that was here before, if this one starts over."""
        self._require_usable()

    def _require_usable(self) -> None:
        agent, app = self.options.agent, self.app
        if self.output.exists() and not self.output.is_file():
            raise ConfigurationError(
                f"the output {self.output} is not a file; the next run reads results again, so name a file",
                field="--output",
            )
        if self.options.input is not None:
            os.close(open_input(self.options.input))
        if agent is not None and agent not in app.agents:
            names = ", ".join(sorted(app.agents)) or "none"
            raise ConfigurationError(
                f"{app.name} has no agent {agent!r}; there is: {names}", field="--agent", value=agent
            )
        if self.options.input is None and app.source_fn is None:
            raise ConfigurationError(
                f"{app.name} has no source of tasks: give --input FILE, or write one with @app.source", field="--input"
            )

    async def main(self) -> int:
        """Returns the exit status."""
        strict = await self._read_strictly() if self.options.strict else None
        if strict is not None and self._bad_shown:
            self.err.print(f"error: {self._bad_shown} bad lines, nothing was sent (--strict)")
            return FAILURE
        sidecar = Sidecar(self.output)
        results = ResultsFile(self.output)
        try:
            identity = self._identify(sidecar, results)
            return await self._run_job(identity, results, strict)
        finally:
            await self.app.close()
            results.close()
            sidecar.close()

    async def _run_job(self, identity: JobIdentity, results: ResultsFile, strict: list[Any] | None) -> int:
        settings: dict[str, Any] = {"result_ttl": max(KEEP, self.app.result_ttl), "dedup_window": KEEP, "max_length": 0}
        self.app.bind(queue=identity.queue, **settings)
        engine = JobEngine(
            self.app, identity, results, lambda tally: self._workers(identity, settings, tally), self._show_bad
        )
        job = Job(engine, self.options.args, self.out)
        view = ProgressView(engine, self.err, quiet=self.options.quiet or self.options.json)
        if self._replaced is not None:
            await engine.abandon(self._replaced)
        revived = await engine.revisit_dead(retry=self.options.retry_dead)
        if revived:
            self._say(f"{revived:,} dead tasks are tried again")
        if len(results):
            self._say(f"going on with job {identity.job}: {len(results):,} results are in {self.output}")
        async with view:
            self._catch_signals(engine, view)
            await engine.run(self._tasks(job, strict))
            self._release_signals()
        return await self._finish(engine, job)

    def _say(self, text: str) -> None:
        if not self.options.quiet and not self.options.json:
            self.err.print(text, soft_wrap=True)

    # -- which job

    def _identify(self, sidecar: Sidecar, results: ResultsFile) -> JobIdentity:
        """The job of the output file: the one begun before, or a new one."""
        fresh = self._new_identity()
        known = sidecar.lock()
        if self.options.fresh:
            self.output.unlink(missing_ok=True)
        if known is not None and self.output.exists() and self.output.stat().st_size:
            self._require_same(known, fresh)
        elif known is not None and (not self.output.exists() or not _same(known, fresh)):
            self._replaced = known.queue if known.redis == fresh.redis else None
            known = None
        results.open()
        if known is None:
            sidecar.write(fresh)
        return known or fresh

    def _new_identity(self) -> JobIdentity:
        options = self.options
        target = options.target
        place, colon, name = target.rpartition(":")
        if (path := Path(place if colon else target)).is_file():
            target = f"{path.resolve()}{colon}{name if colon else ''}"
        source = options.input and ("-" if options.input == "-" else str(Path(options.input).resolve()))
        asked = [f"--input {source}" if source else "source", *(["--agent " + options.agent] if options.agent else [])]
        return new_identity(self.app.name, _place(self.app.address), target, [*asked, *options.args])

    def _require_same(self, known: JobIdentity, now: JobIdentity) -> None:
        for what in ("target", "asked", "redis"):
            was, is_ = getattr(known, what), getattr(now, what)
            if was != is_:
                was, is_ = (" ".join(v) if isinstance(v, list) else v for v in (was, is_))
                word = {"target": "of", "asked": "for", "redis": "on"}[what]
                raise ConfigurationError(
                    f"{self.output} belongs to a job {word} {was}, and this one is {word} {is_}: name another --output, "
                    "or start over with --fresh",
                    field="--output",
                    value=str(self.output),
                )

    def _workers(self, identity: JobIdentity, settings: dict[str, Any], tally: Tally) -> Workers:
        options = self.options
        if not options.processes:
            return LocalWorkers(self.app, options.concurrency, tally)
        if self.app.address.scheme == "memory":
            raise ConfigurationError(
                "memory: is in one process: leave out --processes, or name a Redis", field="--processes"
            )
        orders = Orders(
            target=options.target,
            redis=options.redis,
            queue=identity.queue,
            settings=settings,
            concurrency=options.concurrency,
            processors=max(1, (os.cpu_count() or 1) // options.processes),
        )
        return ProcessWorkers(orders, options.processes, tally)

    # -- tasks

    def _tasks(self, job: Job, strict: list[Any] | None) -> AsyncIterator[Any]:
        if strict is not None:
            return _as_async(iter(strict))
        if self.options.input is not None:
            return self._input()
        assert self.app.source_fn is not None, "required before"
        made = self.app.source_fn(job)
        return made if hasattr(made, "__aiter__") else _as_async(made)

    async def _input(self) -> AsyncIterator[Any]:
        assert self.options.input is not None
        name = "standard input" if self.options.input == "-" else self.options.input
        async for number, line in read_lines(self.options.input):
            where = f"{name} line {number}"
            try:
                yield where, self._as_task(parse_line(line))
            except InvalidTaskError as error:
                yield BadLine(where, str(error))

    def _as_task(self, value: Any) -> Any:
        """The task of one line; the input is checked against the agent's signature where it has one."""
        if self.options.agent is not None:
            value = {"type": self.options.agent, "input": value}
        if not isinstance(value, dict):
            return value
        handle = self.app.handles.get(value["type"]) if isinstance(value.get("type"), str) else None
        if handle is None or not handle.signature.takes_input:
            return value
        given = value.get("input", {})
        keywords, positional = (given, ()) if isinstance(given, dict) else ({}, (given,))
        defaults = {"priority": handle.options.priority}
        return {**defaults, **value, "input": handle.signature.bind(positional, keywords)}

    async def _read_strictly(self) -> list[Any]:
        checker = TaskChecker(self.app.agents.__contains__, lambda: sorted(self.app.agents), self.app.max_task_bytes)
        items: list[Any] = []
        async for item in self._input():
            if isinstance(item, tuple):
                try:
                    items.append((item[0], checker.check(item[1])))
                except InvalidTaskError as error:
                    self._show_bad(BadLine(item[0], str(error)))
            else:
                self._show_bad(item)
        return items

    def _show_bad(self, bad: BadLine) -> None:
        self._bad_shown += 1
        if self._bad_shown <= BAD_SHOWN:
            self.err.print(Text(clean(f"bad task, {bad}"), style="red"), soft_wrap=True)
        elif self._bad_shown == BAD_SHOWN + 1:
            self.err.print("more bad tasks follow; they are counted, not shown", style="red")

    # -- interruption

    def _catch_signals(self, engine: JobEngine, view: ProgressView) -> None:
        def interrupted(number: int) -> None:
            if self._signal:
                view.close()
                self.err.print("ended at once; what was running will be run again by the next run")
                os._exit(128 + number)
            self._signal = number
            view.note = "ending: running tasks have 10 s to finish, Ctrl-C ends at once"
            if not self.options.quiet and not self.err.is_terminal:
                self.err.print(view.note)
            engine.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupted, number)

    def _release_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    # -- the end

    async def _finish(self, engine: JobEngine, job: Job) -> int:
        if engine.stopped or engine.failure is not None:
            kill_processes(self.app)
        if engine.failure is not None and not engine.started and not engine.resumed:
            raise engine.failure  # nothing was begun: there is nothing to tell
        status = self._status(engine)
        ended_well = not engine.stopped and engine.failure is None
        if ended_well and not self.options.quiet and not self.options.json and len(engine.file):
            status = await self._report(engine, job) or status
            steered = steering(self.app, engine.tally)
            if steered is not None:
                self.out.print(steered)
        letter = await self._first_letter(engine) if engine.file.dead and ended_well else None
        if self.options.json:
            print(json.dumps(self._summary(engine, status)))
        else:
            self._print_end(engine, letter)
        if engine.failure is not None:
            if not isinstance(engine.failure, OrchestraError):
                raise engine.failure
            self.err.print(Text(clean(f"error: {engine.failure}"), style="bold red"), soft_wrap=True)
        return status

    def _status(self, engine: JobEngine) -> int:
        if engine.stopped:
            return 128 + (self._signal or signal.SIGINT)
        if engine.failure is not None or engine.bad or engine.left:
            return FAILURE
        return DEAD if engine.file.dead else OK

    async def _report(self, engine: JobEngine, job: Job) -> int:
        if self.app.report_fn is None:
            self.out.print(_table(engine))
            return OK
        try:
            made = self.app.report_fn(job, engine.file)
            if hasattr(made, "__await__"):
                await made
        except Exception as error:  # noqa: BLE001 - the results are safe; say that and go on
            self.err.print(Text(clean(f"error: the report failed: {type(error).__name__}: {error}"), style="bold red"))
            return FAILURE
        return OK

    async def _first_letter(self, engine: JobEngine) -> str | None:
        try:
            await engine.connect()
            letters = await self.app.queue.read_dlq(1)
        except OrchestraError:
            return None
        return letters[0].message_id if letters else None

    def _summary(self, engine: JobEngine, status: int) -> dict[str, Any]:
        return {
            "job": engine.identity.job,
            "queue": engine.identity.queue,
            "redis": engine.identity.redis,
            "output": str(self.output),
            "results": len(engine.file),
            "completed": len(engine.file) - len(engine.file.dead),
            "dead": len(engine.file.dead),
            "resumed": engine.resumed,
            "left": engine.left,
            "bad": engine.bad,
            "restarts": engine.tally.restarts,
            "seconds": round(time.monotonic() - self.began, 3),
            "status": status,
        }

    def _print_end(self, engine: JobEngine, letter: str | None) -> None:
        def say(text: str) -> None:
            self.out.print(clean(text), soft_wrap=True)

        dead, seconds = len(engine.file.dead), time.monotonic() - self.began
        fresh = engine.ended - engine.resumed
        rate = f", {fresh / seconds:,.0f} a second" if fresh > 1 and seconds else ""
        before = f", {engine.resumed:,} of them done before" if engine.resumed else ""
        say(f"{engine.ended:,} of {engine.total:,} tasks ended in {clock(seconds)}{rate}{before}")
        say(f"results       {self.output} ({len(engine.file):,} lines, {dead:,} dead)")
        if engine.bad:
            say(f"bad tasks     {engine.bad:,}, not sent")
        if dead:
            where = shlex.join(["--queue", engine.identity.queue, *self._redis_option()])
            say(f"dead letters  {dead:,}; look at them with")
            say(f"    orchestra dlq ls {where}")
            if letter is not None:
                say(f"    orchestra dlq show {letter} {where}")
            say(f"  and try them again with\n    {_again(retry_dead=True)}")
        if engine.stopped or engine.failure is not None:
            left = f"{engine.left:,} tasks sent have not ended" if engine.left else "not everything was sent"
            say(f"unfinished    {left}; go on with\n    {_again(retry_dead=False)}")

    def _redis_option(self) -> list[str]:
        """What names the same Redis to another command; nothing where the default does."""
        if self.options.redis is None or "***" in self.app.address.safe:
            return []
        return ["--redis", self.options.redis]


def _same(known: JobIdentity, now: JobIdentity) -> bool:
    return (known.target, known.asked, known.redis) == (now.target, now.asked, now.redis)


def _place(address: Address) -> str:
    """The address for the sidecar: without secrets, and the same wherever it is read."""
    if address.scheme != "embedded":
        return address.safe
    return f"embedded:{Path(address.path or default_directory()).absolute()}"


async def _as_async(items: Any) -> AsyncIterator[Any]:
    for number, item in enumerate(items):
        if number % 100 == 0:
            await asyncio.sleep(0)
        yield item


def _again(*, retry_dead: bool) -> str:
    words = [word for word in sys.argv[1:] if word not in ("--fresh", "--retry-dead")]
    if words and words[0] == "--debug":
        words = words[1:]
    place = words.index("run") + 1 if "run" in words else 0
    return shlex.join(["orchestra", *words[:place], *(["--retry-dead"] if retry_dead else []), *words[place:]])


def _table(engine: JobEngine) -> Table:
    made = table("type", *((heading, "right") for heading in ("completed", "dead", "retries", "mean", "p95")))
    for name, progress in sorted(engine.types.items()):
        tally = engine.tally.of(name)
        dead = Text(f"{progress.dead:,}", style="red" if progress.dead else "dim")
        times = (duration(tally.times.mean), duration(tally.times.percentile(0.95)))
        row(made, (name, f"{progress.completed:,}", dead, f"{tally.retries:,}", *times))
    return made
