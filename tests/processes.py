"""Commands in processes of their own: run to their end, or beside a test, waited for by what they say."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_module(name: str, *words: str, status: int = 0, seconds: float = 300.0) -> str:
    """What ``python -m name`` prints; it must end with ``status``."""
    command = [sys.executable, "-m", name, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def orchestra(*args: str) -> list[str]:
    """The command line with ``args``, as a process of its own has it."""
    return [sys.executable, "-m", "orchestra.cli", *args]


class LoggedProcess:
    """A command that runs on in ``folder``, in a session of its own; its log is its standard error."""

    def __init__(self, folder, command, **environment: str) -> None:
        self.log_path = folder / f"log{time.monotonic_ns()}"
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text("utf-8")

    def wait_for(self, pattern: str, count: int = 1, seconds: float = 60.0) -> str:
        """The log, once ``pattern`` stands in it ``count`` times."""
        end = time.monotonic() + seconds
        while len(re.findall(pattern, self.log)) < count:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.02)
        return self.log

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        """Kill it with all that it started, if it still runs."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


def assert_error_line(answered: tuple[int, str, str], status: int, words: str) -> None:
    """A command that ended with ``status`` said why in one line, and nothing else."""
    got, out, err = answered
    assert (got, out) == (status, "")
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("error: ")
    assert words in line
