"""How much memory a process keeps of many rounds of the same work: programs that define ``rounds(count)``."""

from __future__ import annotations

import subprocess
import sys

import pytest

needs_resource = pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")

MEASURED = """
import resource

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

rounds(30)
base = most()
rounds(300)
print(most() - base)
"""


def growth(program: str) -> float:
    """KB by which a fresh process grows in 300 rounds, after 30 to begin with."""
    command = [sys.executable, "-c", program + MEASURED]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return grown / (1024 if sys.platform == "darwin" else 1)
