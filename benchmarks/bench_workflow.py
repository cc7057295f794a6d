"""A thousand workflows of ten steps at once, each step committed to Redis before the next begins.

Owed: at least 2,000 steps a second end to end, from the first start to the last end, in one worker process, which also
starts the workflows. Two processes share the work where the machine has the cores for it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

from benchmarks._server import cpu_seconds
from benchmarks._table import Row
from benchmarks._worker import ROOT

STEPS = 10


@contextlib.contextmanager
def process(mode, url, workflows):
    command = [sys.executable, "-m", "benchmarks._workflow_worker", mode, url, str(workflows), str(STEPS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, bufsize=0, **pipes) as started:
        try:
            line = started.stderr.readline()
            if line != b"ready\n":
                raise RuntimeError((line + started.stderr.read()).decode())
            yield started
        finally:
            started.kill()


def carry(server, workflows, processes):
    """Start and end ``workflows``; steps a second, and CPU of the leading process and of Redis, µs a step."""
    server.flush()
    with contextlib.ExitStack() as stack:
        for _ in range(processes - 1):
            stack.enter_context(process("help", server.url, workflows))
        lead = stack.enter_context(process("lead", server.url, workflows))
        used = cpu_seconds(server.process.pid)
        lead.stdin.write(b"go\n")
        line = lead.stdout.readline()
        if not line:
            raise RuntimeError(lead.stderr.read().decode())
        used = cpu_seconds(server.process.pid) - used
    report = json.loads(line)
    assert report["outputs"] == [{"n": STEPS}] * 2
    steps = workflows * STEPS
    return steps / report["run_s"], report["cpu_s"] / steps * 1e6, used / steps * 1e6


def test_a_thousand_workflows_in_one_process(benchmark, comparisons, empty, scale):
    workflows = scale(1_000, 1_000, 20)
    rate = Row(f"{workflows:,} workflows of {STEPS} steps at once, one process", "steps/s", 2_000)
    cpu = Row("workflows: CPU of the worker a step", "µs")
    redis = Row("workflows: CPU of Redis a step", "µs")
    comparisons.run(benchmark, lambda: dict(zip((rate, cpu, redis), carry(empty, workflows, 1), strict=True)), dict)


def test_a_thousand_workflows_in_two_processes(benchmark, comparisons, empty, scale):
    workflows = scale(1_000, 1_000, 20)
    rate = Row(f"{workflows:,} workflows of {STEPS} steps at once, two processes", "steps/s", 2_000)
    comparisons.run(benchmark, lambda: {rate: carry(empty, workflows, 2)[0]}, dict)
