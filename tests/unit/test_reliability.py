"""docs/reliability.md names a test for every fault it lists, and each of them exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ([A-K]\d+) \| S([123]) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")
WITHOUT = {"A18": "not covered", "K8": "does not apply"}


def rows():
    return ROW.findall((ROOT / "docs" / "reliability.md").read_text("utf-8"))


@cache
def named_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_fault_has_a_test_that_exists(row):
    ident, _, _, holds, tests = row
    if ident in WITHOUT:
        assert holds.startswith(WITHOUT[ident])
        return
    named = NAMED.findall(tests)
    assert named, f"{ident} names no test"
    assert tests.count("::") == len(named)
    for path, name in named:
        assert name in named_in(path), f"{ident}: tests/{path} has no {name}"


def test_no_fault_is_listed_twice_and_none_is_forgotten():
    idents = [row[0] for row in rows()]
    assert len(idents) == len(set(idents))
    most = {"A": 19, "B": 22, "C": 13, "E": 12, "F": 6, "G": 9, "H": 16, "J": 10, "K": 13}
    assert set(idents) == {f"{group}{n}" for group, last in most.items() for n in range(1, last + 1)}
