"""The command line in processes of its own, forked from one that has imported it: ``forks``. Where workflows live: ``place``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from orchestra.memory import MemoryManager
from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.task_queue import RedisStreamTaskQueue

# Starts each command as a process of its own, but imports what they share once: a start costs 20 ms instead of 500.
FORKS = """
import json, os, sys
import orchestra.cli as cli
for name in ("worker", "submit", "cancel", "dlq", "stats", "doctor", "workflow"):
    __import__(f"orchestra.cli.{name}")
import typer.main, typer.rich_utils
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if not pid:
        os.environ.clear()
        os.environ.update(asked["env"])
        os.chdir(asked["cwd"])
        for number, name in enumerate(("in", "out", "err")):
            os.dup2(os.open(asked[name], os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)
        try:
            cli.main(asked["args"])
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """The process that is forked, and what its children say."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder, *args: str, given: str = "") -> tuple[int, str, str]:
        """Run a command in ``folder`` to its end: status, standard output, standard error."""
        files = {name: str(folder / f"std{name}") for name in ("in", "out", "err")}
        (folder / "stdin").write_text(given)
        asked = {"args": args, "cwd": str(folder), "env": dict(os.environ), **files}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        out, err = ((folder / name).read_text("utf-8") for name in ("stdout", "stderr"))
        assert "Traceback" not in err or "--debug" in args, err
        return status, out, err

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def forks():
    process = Forks()
    yield process
    process.close()


@pytest.fixture(params=["redis", "memory"])
def place(request):
    """A queue and the memory of its workflows, on Redis and in this process."""
    if request.param == "memory":
        return InMemoryTaskQueue("wf", "workers"), MemoryManager("memory:", namespace="wf")
    manager = request.getfixturevalue("manager")
    return RedisStreamTaskQueue("wf", "workers", manager=manager), MemoryManager(manager, namespace="wf")
