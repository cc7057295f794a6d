"""J10: other interpreters and builds without a GIL get a refusal or a warning, never unguarded shared state."""

from __future__ import annotations

import importlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

MODULES = ("heap", "gcra", "wrr", "codec")
# The names moved in 3.13; both spellings are CPython's own test interface to subinterpreters.
SECOND = """
import sys
import orchestra._ext.{name}
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
made = interpreters.create()
try:
    failed = interpreters.run_string(made, "import orchestra._ext.{name}")
except Exception as error:
    failed = error
print(failed)
sys.exit(failed is None)
"""


@pytest.mark.parametrize("name", MODULES)
def test_a_second_interpreter_is_refused(name):
    """J10: static state of a compiled module belongs to one interpreter; another gets ImportError."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SECOND.format(name=name)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ImportError" in done.stdout
    assert "interpreter" in done.stdout.lower() or "subinterpreters" in done.stdout.lower()


def test_no_build_claims_to_need_no_gil():
    """J10: without the declaration a free-threaded CPython switches the GIL on and warns: nothing races silently."""
    setup = Path(__file__).parents[2] / "setup.py"
    if setup.exists():
        assert "freethreading_compatible" not in setup.read_text("utf-8")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        importlib.import_module("orchestra._ext.heap")
        assert sys._is_gil_enabled()
