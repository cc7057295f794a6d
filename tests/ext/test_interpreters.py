"""J10: another interpreter is refused, and where there is no GIL none is asked for: no unguarded shared state."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

MODULES = ("heap", "gcra", "wrr", "codec", "step", "wire")
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


ALONE = """
import importlib.util
import sys
for name, path in {files}.items():
    spec = importlib.util.spec_from_file_location("orchestra._ext." + name, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert not sys._is_gil_enabled(), name
print("off")
"""


@pytest.mark.parametrize("name", MODULES)
def test_each_module_says_that_it_needs_no_gil(name):
    """J10: the sources declare it, and say what a second thread may do and see."""
    source = Path(__file__).parents[2] / "_ext" / f"{name}.pyx"
    if not source.exists():
        source = Path(importlib.import_module(f"orchestra._ext.{name}").__file__)
        assert source.suffix == ".so"
        return
    text = source.read_text("utf-8")
    assert text.startswith("# cython: freethreading_compatible=True\n")
    assert "Concurrency: " in text.split('"""')[1]


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="an interpreter with a GIL")
def test_no_compiled_module_switches_the_gil_on():
    """J10: on a free-threaded CPython the GIL stays off when they are imported."""
    files = {name: importlib.import_module(f"orchestra._ext.{name}").__file__ for name in MODULES}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", ALONE.format(files=files)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHON_GIL"},
    )
    assert (done.stdout, done.stderr) == ("off\n", "")
