"""The ``orchestra`` command: one module a command, errors as one line, exit codes that scripts can rely on.

Owns the entry point: what every error becomes on standard error, and which status the process ends with (0 done,
1 failure, 2 usage or configuration, 3 dead tasks or findings, 130 interrupted). Refuses to own what commands do.
Typer and rich come with the extra ``cli`` and are imported here only when the command runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from orchestra._version import __version__
from orchestra.cli._status import DEAD, FAILURE, INTERRUPTED, OK, USAGE
from orchestra.errors import (
    ConfigurationError,
    InvalidTaskError,
    MissingDependencyError,
    OrchestraError,
    TaskFailedError,
    UnknownAgentError,
)

if TYPE_CHECKING:
    from typer import Typer

_COMMANDS = ("run", "worker", "submit", "cancel", "workflow", "stats", "dlq", "limits", "breakers", "doctor")
_BROKEN_PIPE = 141  # as the shell counts SIGPIPE
_EPILOG = (
    "Exit status: 0 done, 1 failure, 2 wrong usage or configuration, 3 dead tasks or findings, 130 interrupted. "
    "`--debug` shows the traceback of an error."
)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    given = sys.argv[1:] if args is None else args
    rest, debug = _take_debug(given)
    try:
        status = _run(rest)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the outermost frame: whatever it is becomes a line and a status
        status = _report(error, debug=debug)
    sys.exit(status)


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    """``args`` without ``--debug``, which may stand anywhere but behind the target of ``run`` or behind ``--``."""
    end = args.index("--") if "--" in args else len(args)
    if "run" in args[:end]:
        positions = [i for i in range(args.index("run") + 1, end) if not args[i].startswith("-")]
        end = min([end, *positions])
    debug = "--debug" in args[:end]
    return [arg for i, arg in enumerate(args) if i >= end or arg != "--debug"], debug


def _run(args: list[str]) -> int:
    try:
        typer = importlib.import_module("typer")
        importlib.import_module("rich")
    except ImportError as error:
        raise MissingDependencyError(
            "the command line needs an extra: pip install 'orchestra-engine[cli]'", extra="cli"
        ) from error
    command = typer.main.get_command(_commands(next((arg for arg in args if not arg.startswith("-")), "")))
    status = command.main(args=args, prog_name="orchestra", standalone_mode=False)
    return status if isinstance(status, int) else OK


def _commands(wanted: str) -> Typer:
    """All commands, or only ``wanted`` if it is one of them: the others need not be imported then."""
    import typer

    app = typer.Typer(
        name="orchestra",
        epilog=_EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_root())
    for name in (wanted,) if wanted in _COMMANDS else _COMMANDS:
        module = importlib.import_module(f"orchestra.cli.{name}")
        if hasattr(module, "commands"):
            app.add_typer(module.commands(), name=name)
        else:
            _add(app, module, name)
    return app


def _add(app: Typer, module: Any, name: str) -> None:
    from orchestra.cli._options import unwrapped

    function = getattr(module, name)
    settings = getattr(module, "CONTEXT_SETTINGS", None)
    epilog = getattr(module, "EPILOG", None)
    app.command(name, help=unwrapped(function.__doc__), epilog=epilog, context_settings=settings)(function)


def _root() -> Any:
    """The options before a command. A function of its own, because typer reads its annotations when it is here."""
    import typer

    def show(wanted: bool) -> None:
        if wanted:
            print(f"orchestra {__version__}")
            raise typer.Exit

    def root(
        version: bool = typer.Option(False, "--version", help="Print the version.", callback=show, is_eager=True),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    ) -> None:
        """Hand tasks to a fleet of agents over Redis Streams."""
        del version, debug  # the first has a callback, the second was taken by main()

    root.__annotations__ = {"version": bool, "debug": bool}
    return root


def _report(error: BaseException, *, debug: bool) -> int:
    """Say what went wrong in one line; the exit status."""
    name = type(error).__name__
    if isinstance(error, KeyboardInterrupt) or name == "Abort":
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILURE
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return _BROKEN_PIPE
    if name == "NoArgsIsHelpError":  # the help has been printed
        return USAGE
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"error: {_line(error)}", file=sys.stderr)
    return _status(error)


def _line(error: BaseException) -> str:
    """The error in one line, without control characters and without a traceback."""
    describe = getattr(error, "format_message", None)  # a usage error of the parser
    text = str(describe()) if callable(describe) else str(error)
    if not isinstance(error, OrchestraError | OSError) and describe is None:
        text = f"{type(error).__name__}: {text} (a bug, or an agent's: --debug shows where)"
    words = " ".join(text.split()) or type(error).__name__
    clean = "".join(ch if ch.isprintable() else f"\\x{ord(ch):02x}" for ch in words)
    if describe is None:
        return clean
    path = getattr(getattr(error, "ctx", None), "command_path", None) or "orchestra"
    return f"{clean.rstrip('.')}; see `{path} --help`"


def _status(error: BaseException) -> int:
    if hasattr(error, "format_message"):
        return USAGE
    if isinstance(error, TaskFailedError):
        return DEAD
    usage = (ConfigurationError, InvalidTaskError, MissingDependencyError, UnknownAgentError)
    return USAGE if isinstance(error, usage) else FAILURE


__all__ = ["DEAD", "FAILURE", "INTERRUPTED", "OK", "USAGE", "__version__", "main"]
