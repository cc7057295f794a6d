"""The command line in processes of its own, forked from one that has imported it: the fixture ``forks``."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


@pytest.fixture(scope="module")
def forks():
    process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.stdin.close()
    process.wait(10)
    process.stdout.close()
