"""The extra is optional: orchestra works without it, and says what is missing where it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import orchestra.ai

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_orchestra_never_imports_pydantic_ai():
    code = """
import sys
from orchestra import *
import orchestra.app, orchestra.orchestrator, orchestra.workflow, orchestra.agents, orchestra.cli
print(sorted(name for name in sys.modules if name.partition(".")[0] in {"pydantic_ai", "pydantic", "openai"}))
"""
    assert run(code) == "[]"


def test_without_the_extra_the_error_names_it():
    code = """
import sys
sys.modules["pydantic_ai"] = None
import orchestra
try:
    import orchestra.ai
except orchestra.MissingDependencyError as error:
    print(error.extra, "|", error)
"""
    assert run(code).startswith("ai | orchestra.ai needs pydantic-ai-slim 2.68 or newer")


@pytest.mark.parametrize("name", orchestra.ai.__all__)
def test_every_public_name_is_there(name):
    assert getattr(orchestra.ai, name) is not None


def test_public_interfaces_of_pydantic_ai_alone_are_used():
    """What begins with an underscore there may change with any release."""
    for file in (ROOT / "orchestra" / "ai").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("pydantic"):
                continue
            assert not any(part.startswith("_") for name in names for part in name.split(".")), f"{file.name}: {names}"


def test_the_extra_asks_for_the_version_that_is_tested():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pin,) = extras["ai"]
    assert pin.startswith("pydantic-ai-slim>=2.68")
    assert tuple(map(int, version("pydantic-ai-slim").split(".")[:2])) >= (2, 68)
