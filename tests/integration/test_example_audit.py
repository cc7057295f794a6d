"""The main example over a small tree: what it finds, what dies on purpose, and that a killed run leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from orchestra.connections import ConnectionManager
from orchestra.flow_control import set_limit

EXAMPLES = Path(__file__).parents[2] / "examples"

RISKY = '''"""A module."""
import pickle, subprocess

def load(data, seen=[]):
    try:
        return pickle.loads(data)
    except:
        return eval(data)

def shell(line):
    """Run it."""
    return subprocess.run(line, shell=True)
'''

DEEP = """
def deep(n):
    for a in range(n):
        if a:
            while n:
                with a:
                    if a and n or a:
                        for b in a:
                            n += b
                    elif n:
                        pass
    return n
"""


@pytest.fixture
def audit(monkeypatch):
    """The example as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import code_audit

    yield code_audit
    del sys.modules["code_audit"]


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name, text in {
        "risky.py": RISKY,
        "pkg/deep.py": DEEP,
        "pkg/plain.py": '"""Nothing."""\n',
        "pkg/no.txt": "no",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "pkg" / "__pycache__").mkdir()
    (root / "pkg" / "__pycache__" / "skipped.py").write_text("(")
    return root


def run(here: Path, *args, target: Path = EXAMPLES / "code_audit.py") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "orchestra.cli", "run", str(target), *map(str, args)]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)


def results(here: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (here / "code-audit.results.jsonl").read_text().splitlines()]
    assert max(Counter(line["id"] for line in lines).values()) == 1
    return {line["id"]: line for line in lines}


def test_measures(audit, tree):
    found = audit.measure(str(tree), "pkg/deep.py")
    assert found["functions"] == 1
    assert (found["worst"], found["worst_line"]) == ("deep", 2)
    assert found["complexity"] == 1 + 6 + 2  # for, if, while, if, for, elif; "and", "or"
    assert found["nesting"] == 6
    assert audit.measure(str(tree), "pkg/plain.py")["complexity"] == 0
    (tree / "bad.py").write_text("def f(:\n")
    with pytest.raises(SyntaxError):
        audit.measure(str(tree), "bad.py")


def test_risks(audit, tree):
    found = audit.risks(str(tree), "risky.py")["found"]
    assert [(f["line"], f["risk"]) for f in found] == [
        (4, "mutable default"),
        (6, "pickle"),
        (7, "bare except"),
        (8, "eval"),
        (12, "shell=True"),
    ]
    (tree / "bad.py").write_text("def f(:\n")
    assert audit.risks(str(tree), "bad.py")["found"] == []


async def test_docs(audit, tree):
    assert audit.docs_careful(str(tree), "risky.py") == {
        "path": "risky.py",
        "by": "careful",
        "coverage": 0.67,
        "grade": "C",
    }
    assert (await audit.docs_quick(str(tree), "pkg/plain.py"))["grade"] == "A"
    assert (await audit.docs_quick(str(tree), "pkg/deep.py"))["grade"] == "F"


async def test_the_service_is_away_first(audit, tree, monkeypatch):
    monkeypatch.setattr(audit, "service", audit.Service())
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError, match="restarted"):
            await audit.docs_service(str(tree), "pkg/plain.py")
    monkeypatch.setattr(audit.service, "back_at", time.monotonic())
    graded = {"path": "pkg/plain.py", "by": "service", "coverage": 1.0, "grade": "A"}
    assert await audit.docs_service(str(tree), "pkg/plain.py") == graded


def test_the_score_says_why(audit):
    facts = {
        "complexity": 42,
        "worst": "f",
        "worst_line": 7,
        "nesting": 6,
        "longest": 100,
        "risks": 1,
        "kinds": ["eval"],
    }
    points, why = audit.score(facts)
    assert points == 32 + 10 + 8 + 4
    assert why == "42 branches in f(), line 7; nested 6 deep; a function of 100 lines"
    assert audit.score({"complexity": 10, "nesting": 4, "longest": 60}) == (0, "")


def test_a_sound_tree_ends_with_0(tree, tmp_path, redis_url):
    done = run(tmp_path, tree)
    assert done.returncode == 0, done.stderr
    out = results(tmp_path)
    assert Counter(line["type"] for line in out.values()) == {
        "measure": 3,
        "risks": 3,
        "docs": 3,
        "verdict": 1,
    }
    assert {line["value"]["by"] for line in out.values() if line["type"] == "docs"} <= {"careful", "service", "quick"}
    table = done.stdout[done.stdout.index("The ten worst files") :]
    assert table.index("risky.py") < table.index("pkg/deep.py")
    assert "5 risks" in table
    assert "10 of 10 tasks ended" in done.stdout
    assert "2 packages summed up by a workflow each" in done.stdout
    words = re.search(r"orchestra (workflow show package:\w+ --queue code-audit\.\w+)", done.stdout)[1].split()
    shown = subprocess.run([sys.executable, "-m", "orchestra.cli", *words, "--json"], capture_output=True, timeout=60)
    facts = json.loads(shown.stdout)
    assert (facts["type"], facts["status"], facts["output"]["package"]) == ("package", "completed", "(top level)")
    assert {step["id"]: step["depends_on"] for step in facts["steps"]} == {
        "size": [],
        "danger": [],
        "summary": ["size", "danger"],
    }


def test_a_file_that_is_no_python_is_a_dead_letter(tree, tmp_path, redis_url):
    (tree / "bad.py").write_text("def f(:\n")
    (tree / "coded.py").write_bytes(b"# -*- coding: no-such-code -*-\n")
    done = run(tmp_path, tree)
    assert done.returncode == 3, done.stderr
    dead = [line for line in results(tmp_path).values() if line["outcome"] != "completed"]
    assert {(line["type"], line["attempts"], line["error_type"]) for line in dead} == {("measure", 3, "SyntaxError")}
    assert len(dead) == 2
    assert "orchestra dlq show" in done.stdout
    again = run(tmp_path, tree)
    assert again.returncode == 3
    assert "How it was steered" in done.stdout
    assert "How it was steered" not in again.stdout
    assert "16 of 16 tasks ended" in again.stdout, again.stdout


def steered(stdout: str) -> dict[str, list[str]]:
    """The words of each line of "How it was steered", by the replica, or by the first words."""
    lines = stdout[stdout.index("How it was steered") :].splitlines()
    words = [line.removeprefix("docs").split() for line in lines]
    return {each[0] if each[0] not in ("limit", "breaker") else " ".join(each[:3]): each for each in words if each}


FEW_REFUSALS = """
from code_audit import Service, app

refused = []

async def ask(self, text):
    if len(refused) < 4:
        refused.append(text)
        raise ConnectionRefusedError("away")
    return 1.0

Service.ask = ask
"""


@pytest.mark.slow
async def test_limit_weights_and_breaker_at_work(tmp_path, redis_url, monkeypatch):
    """Three refusals open the breaker, the first probe is refused, the second closes it; a limit keeps tasks coming."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=os.pathsep)
    tree = tmp_path / "tree" / "pkg"
    tree.mkdir(parents=True)
    for number in range(40):
        (tree / f"m{number}.py").write_text('"""Nothing."""\n')
    (tmp_path / "audit.py").write_text(FEW_REFUSALS)
    async with ConnectionManager(redis_url) as manager:
        await set_limit("code-audit.docs", rate=8, burst=4, manager=manager)
    done = run(tmp_path, tree.parent, target=tmp_path / "audit.py")
    assert done.returncode == 0, done.stderr
    assert "(121 lines, 0 dead)" in done.stdout  # what the replica refused costs no task
    rows = steered(done.stdout)
    assert [rows[replica][3] for replica in ("careful", "service", "quick")] == ["50.0%", "33.3%", "16.7%"]
    assert sum(int(rows[replica][1]) for replica in ("careful", "service", "quick")) == 40
    assert int(rows["careful"][-1]) > 0  # throttled
    assert rows["service"][-1] == "4"  # failed
    assert " ".join(rows["limit of docs"][3:]) == "120 per s, 40 at once, for each key"
    told = " ".join(rows["breaker of docs/service"][3:])
    assert re.fullmatch(r"opened at [\d.]+ s, recovered after [\d.]+ s", told)


def descendants(pid: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_killed_it_leaves_no_process_and_is_finished_by_the_next_run(tmp_path, redis_url):
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(60):
        (tree / f"m{number}.py").write_text(DEEP * 20)
    command = [sys.executable, "-m", "orchestra.cli", "run", str(EXAMPLES / "code_audit.py"), str(tree)]
    output = tmp_path / "code-audit.results.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 30
        while not output.exists() or output.read_bytes().count(b"\n") < 40:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        family = descendants(process.pid)
        assert len(family) >= 2
        process.kill()
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < end, "worker processes outlive the run"
        time.sleep(0.02)
    done = run(tmp_path, tree)
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path)) == 3 * 60 + 1
