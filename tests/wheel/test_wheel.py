"""The wheel holds what runs and what types, and no source of it. Also run against the installed wheel."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILED = ("heap", "gcra", "wrr", "codec")


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_module_and_its_stub_are_in_the_wheel(wheel_files, name):
    assert f"orchestra/_ext/{name}.pyi" in wheel_files
    binary = [file for file in wheel_files if re.fullmatch(rf"orchestra/_ext/{name}\.[\w.-]*(so|pyd)", file)]
    assert len(binary) == 1


def test_every_python_module_and_script_is_in_the_wheel(wheel_files):
    wanted = {
        f"orchestra/{file.relative_to(ROOT / 'orchestra').as_posix()}"
        for kind in ("*.py", "*.lua", "py.typed")
        for file in (ROOT / "orchestra").rglob(kind)
    }
    assert "orchestra/py.typed" in wanted
    assert wanted - set(wheel_files) == set()


def test_nothing_else_is_in_the_wheel(wheel_files):
    allowed = re.compile(
        r"orchestra/[\w/]+\.py|orchestra/(cli|testing)/\w+\.py|orchestra/lua/(\w+/)?\w+\.lua|orchestra/py\.typed"
        r"|orchestra/_ext/(__init__\.py|\w+\.pyi|\w+\.[\w.-]*(so|pyd))"
        r"|orchestra_engine-[^/]+\.dist-info/.+|(\.\./)+bin/orchestra|.*Scripts/orchestra\.exe"
    )
    assert [file for file in wheel_files if not allowed.fullmatch(file)] == []


def test_version_has_one_source():
    source = (ROOT / "orchestra" / "_version.py").read_text("utf-8")
    version = re.search(r'__version__(?:: \w+)? = "([^"]+)"', source)[1]
    assert metadata.version("orchestra-engine") == version
    copies = [
        name
        for name in ("setup.py", "pyproject.toml", "Makefile")
        if re.search(rf'"{re.escape(version)}"', (ROOT / name).read_text("utf-8"))
    ]
    assert copies == []


def test_compiled_modules_import_under_their_package_name():
    program = (
        "import importlib\n"
        f"for name in {COMPILED!r}:\n"
        "    module = importlib.import_module('orchestra._ext.' + name)\n"
        "    assert module.__name__ == 'orchestra._ext.' + name and module.__file__.endswith(('.so', '.pyd')), module\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60)


def test_source_folder_refuses_to_be_imported_by_its_own_name():
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import _ext"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "orchestra._ext" in done.stderr
