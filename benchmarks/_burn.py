"""Work for a processor: what a CPU-bound agent does, and the same without any queue, in processes of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
LOOPS = 40_000
"""About 2 ms of a processor."""


def burn(task: object = None) -> int:
    """Add numbers."""
    total = 0
    for number in range(LOOPS):
        total += number
    return total


def plain_rate(processes: int, count: int) -> float:
    """Calls a second of ``processes`` that do nothing else, ``count`` calls in all: the ideal of a pool."""
    command = [sys.executable, "-m", "benchmarks._burn", str(count // processes)]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        began = time.perf_counter()
        for process in running:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == b"done\n"
        return count // processes * processes / (time.perf_counter() - began)
    finally:
        for process in running:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def main(count: int) -> None:
    """Say ``ready``, wait for a line, burn ``count`` times, say ``done``."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    for _ in range(count):
        burn()
    sys.stdout.write("done\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
