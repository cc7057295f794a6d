"""Audit a tree of Python files with a pipeline of agents and a workflow for each package: ``orchestra run examples/code_audit.py [DIRECTORY]``.

Without a directory it audits the standard library of the interpreter it runs in: about five thousand tasks.

=========  ===========================================================================================================
measure    parses one file: lines, functions, complexity, nesting; in worker processes, for it is CPU-bound.
           A file that is no Python fails, is tried again, and ends as a dead letter: that is meant to be seen.
risks      finds risky constructs in one file, with their lines; in worker processes
docs       grades the docstrings of one file; three replicas: ``careful`` takes three of six tasks, ``service`` two and
           ``quick`` one. ``service`` stands for a grader behind a network that is just being restarted: its breaker takes
           it out of rotation and back in. No package may have more than 120 files a second graded: a limit with a key
package    a workflow for each package, from the results of its files: ``size`` and ``danger`` side by side, then
           ``summary``, which is limited to 50 a second
verdict    judges the whole from the summaries
=========  ===========================================================================================================

Tasks carry paths, not contents: agents read for themselves. Ids are made of the agent and the path, so that a second
run of the same job recognises what is done. Importing this module does nothing, since worker processes do it too.
The table "How it was steered" at the end shows what limits, weights and breakers did.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import hashlib
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestra import App, BaseTask, CircuitBreakerConfig, RateLimitConfig, Retry, TaskFailedError, TaskPriority

# Twelve at once keep the worker processes fed; a hundred would only wait in front of them.
app = App("code-audit", concurrency=12, retry=Retry(max_retries=2, base=0.4, max_delay=2.0), max_task_bytes=16 << 20)

Finding = dict[str, Any]
TOP = "(top level)"


# -- agents


@app.agent(executor="process", timeout=60)
def measure(root: str, path: str) -> Finding:
    """Size, complexity and nesting of one file. A file that does not parse is a failure."""
    text = (Path(root) / path).read_bytes()
    functions = [_measure_function(node) for node in ast.walk(_parse(text, path)) if isinstance(node, FUNCTIONS)]
    worst = max(functions, key=lambda f: f["complexity"], default={"name": None, "line": 0, "complexity": 0})
    return {
        "path": path,
        "lines": text.count(b"\n") + 1,
        "functions": len(functions),
        "worst": worst["name"],
        "worst_line": worst["line"],
        "complexity": worst["complexity"],
        "mean_complexity": round(sum(f["complexity"] for f in functions) / len(functions), 1) if functions else 0.0,
        "nesting": max((f["nesting"] for f in functions), default=0),
        "longest": max((f["lines"] for f in functions), default=0),
    }


@app.agent(executor="process", timeout=60)
def risks(root: str, path: str) -> Finding:
    """Constructs of one file that deserve a second look; none for a file that does not parse."""
    try:
        tree = _parse((Path(root) / path).read_bytes(), path)
    except (SyntaxError, ValueError) as error:
        return {"path": path, "unparsed": str(error), "found": []}
    found = sorted({hit for node in ast.walk(tree) for hit in _risks_of(node)})
    return {"path": path, "found": [{"line": line, "risk": risk} for line, risk in found]}


def package_of_task(task: BaseTask) -> str:
    """What the limit of ``docs`` is counted for."""
    return package_of(task.input["path"])


@app.agent(
    name="docs",
    worker_id="careful",
    weight=3,
    executor="process",
    timeout=60,
    # One replica that is down may fail a task more often than the others together: its breaker bounds that to eight.
    retry=Retry(max_retries=12, base=0.1, max_delay=1.0),
    failover=True,
    limit=RateLimitConfig(rate=120, burst=40),
    key=package_of_task,
)
def docs_careful(root: str, path: str) -> Finding:
    """Which public things of a file have a docstring, by its syntax tree."""
    try:
        tree = _parse((Path(root) / path).read_bytes(), path)
    except (SyntaxError, ValueError):
        return {"path": path, "by": "careful", "grade": None}
    public = [tree, *(n for n in ast.walk(tree) if isinstance(n, DOCUMENTED) and not n.name.startswith("_"))]
    share = sum(ast.get_docstring(node, clean=False) is not None for node in public) / len(public)
    return {"path": path, "by": "careful", "coverage": round(share, 2), "grade": _grade(share)}


class Service:
    """Stands for a grader behind a network that is restarted while the job begins: it refuses for two seconds."""

    outage = 2.0  # seconds from the first call on

    def __init__(self) -> None:
        self.back_at: float | None = None

    async def ask(self, text: bytes) -> float:
        """The share of prose in ``text``."""
        if self.back_at is None:
            self.back_at = time.monotonic() + self.outage
        await asyncio.sleep(0.005)  # the way there and back
        if time.monotonic() < self.back_at:
            raise ConnectionRefusedError("the grading service is being restarted")
        return _share_of_prose(text)


service = Service()


@app.agent(
    name="docs",
    worker_id="service",
    weight=2,
    breaker=CircuitBreakerConfig(failure_threshold=3, recovery_timeout=0.5, counts=(ConnectionError,)),
)
async def docs_service(root: str, path: str) -> Finding:
    """What the service says. Three refusals in a row open the breaker, then one call in half a second finds out."""
    share = await service.ask((Path(root) / path).read_bytes())
    return {"path": path, "by": "service", "coverage": round(share, 2), "grade": _grade(share)}


@app.agent(name="docs", worker_id="quick", weight=1)
async def docs_quick(root: str, path: str) -> Finding:
    """How much of a file is prose: a cheap guess at the same, which does not have to parse."""
    share = _share_of_prose((Path(root) / path).read_bytes())
    return {"path": path, "by": "quick", "coverage": round(share, 2), "grade": _grade(share)}


# -- the workflow of one package: two steps side by side, and one that joins them

PACKAGE = [
    {
        "id": "size",
        "action": "size",
        "args": {"files": {"$ref": "input.files"}, "unparsed": {"$ref": "input.unparsed"}},
    },
    {"id": "danger", "action": "danger", "args": {"files": {"$ref": "input.files"}}},
    {
        "id": "summary",
        "action": "summary",
        "args": {"package": {"$ref": "input.package"}, "size": {"$ref": "size"}, "danger": {"$ref": "danger"}},
        "depends_on": ["size", "danger"],
    },
]


@app.agent
async def size(files: list[Finding], unparsed: int) -> Finding:
    """How much a package is."""
    return {"files": len(files) + unparsed, "lines": sum(f["lines"] for f in files), "unparsed": unparsed}


@app.agent
async def danger(files: list[Finding]) -> Finding:
    """How bad a package is."""
    return {
        "risks": sum(f["risks"] for f in files),
        "score": round(sum(f["score"] for f in files) / max(1, len(files)), 1),
        "worst": max(files, key=lambda f: f["score"], default={"path": None})["path"],
    }


@app.agent(limit=RateLimitConfig(rate=50, burst=20))
async def summary(package: str, size: Finding, danger: Finding) -> Finding:
    """What the files of one package add up to."""
    return {"package": package, **size, **danger}


@app.agent(priority=TaskPriority.CRITICAL)
async def verdict(packages: list[Finding]) -> Finding:
    """One sentence about everything."""
    lines, risky = sum(p["lines"] for p in packages), sum(p["risks"] for p in packages)
    per_kilo = 1000 * risky / max(1, lines)
    worst = max(packages, key=lambda p: p["score"], default={"package": "none"})["package"]
    return {
        "packages": len(packages),
        "lines": lines,
        "riskiest": sorted(packages, key=lambda p: (-p["risks"], p["package"]))[:5],
        "text": f"{per_kilo:.1f} risky constructs per 1,000 lines; the package to begin with is {worst}",
    }


# -- where tasks come from


@app.source
async def tasks(job: Any) -> AsyncIterator[dict[str, Any]]:
    """Three tasks for each file, a workflow for each package once its files are done, one task for all."""
    root, paths = find_files(job.args[0] if job.args else sysconfig.get_paths()["stdlib"])
    packages: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        packages[package_of(path)].append(path)
    job.expect(3 * sum(map(len, packages.values())) + 1)
    for package, paths in packages.items():
        for path in paths:
            for agent in ("measure", "risks", "docs"):
                yield _task(agent, path, {"root": str(root), "path": path}, _priority(package))
    runs = []
    for package, paths in packages.items():
        files = merge(await job.results(_id(agent, path) for agent in ("measure", "risks") for path in paths))
        facts = [{"path": f["path"], "lines": f["lines"], "risks": f["risks"], "score": score(f)[0]} for f in files]
        given = {"package": package, "files": facts, "unparsed": len(paths) - len(files)}
        # Started again by a later run of this job, a workflow goes on or has its result: its id is the same.
        runs.append(
            await app.start_workflow(
                "package", given, plan=PACKAGE, id=_id("package", package), priority=TaskPriority.CRITICAL
            )
        )
    found = []
    for run in runs:
        with contextlib.suppress(TaskFailedError):  # `orchestra workflow ls --status failed` shows it
            found.append(await run.result())
    yield _task("verdict", "all", {"packages": found}, TaskPriority.CRITICAL)


def find_files(directory: str) -> tuple[Path, list[str]]:
    """The directory, and relative to it every Python file under it that is not installed by somebody else."""
    root = Path(directory).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a directory")
    skip = {"site-packages", "__pycache__", ".git", ".venv", "node_modules"}
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return root, sorted(path.as_posix() for path in found if not skip.intersection(path.parts))


def package_of(path: str) -> str:
    """The package that a file belongs to."""
    return path.partition("/")[0] if "/" in path else TOP


def _task(agent: str, name: str, given: dict[str, Any], priority: TaskPriority) -> dict[str, Any]:
    return {"id": _id(agent, name), "type": agent, "input": given, "priority": priority}


def _id(agent: str, name: str) -> str:
    return f"{agent}:{hashlib.sha1(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def _priority(package: str) -> TaskPriority:
    """What everybody imports first, tests last."""
    if package == TOP:
        return TaskPriority.HIGH
    return TaskPriority.LOW if package in ("test", "tests") else TaskPriority.NORMAL


def merge(results: dict[str, Finding]) -> list[Finding]:
    """What ``measure`` and ``risks`` say about each file that parses, one dict a file."""
    measured = {value["path"]: value for task_id, value in results.items() if task_id.startswith("measure:")}
    out = []
    for task_id, value in results.items():
        if task_id.startswith("risks:") and value["path"] in measured:
            kinds = sorted({hit["risk"] for hit in value["found"]})
            out.append({**measured[value["path"]], "risks": len(value["found"]), "kinds": kinds})
    return out


# -- reading code

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.match_case)
NESTING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.Match)
PROSE = re.compile(rb'""".*?"""|\'\'\'.*?\'\'\'|#[^\n]*', re.DOTALL)
CALLS = {
    "eval": "eval",
    "exec": "exec",
    "pickle.load": "pickle",
    "pickle.loads": "pickle",
    "marshal.load": "marshal",
    "marshal.loads": "marshal",
    "os.system": "os.system",
    "os.popen": "os.popen",
    "tempfile.mktemp": "mktemp",
}


def _parse(text: bytes, path: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old code has invalid escapes
        return ast.parse(text, path)


def _measure_function(node: ast.AST) -> dict[str, Any]:
    assert isinstance(node, FUNCTIONS)
    complexity = 1 + sum(
        len(n.values) - 1 if isinstance(n, ast.BoolOp) else isinstance(n, BRANCHES) for n in ast.walk(node)
    )
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return {"name": node.name, "line": node.lineno, "complexity": complexity, "nesting": _depth(node), "lines": lines}


def _depth(node: ast.AST) -> int:
    deepest, todo = 0, [(node, 0)]
    while todo:
        at, depth = todo.pop()
        deepest = max(deepest, depth)
        for child in ast.iter_child_nodes(at):
            if isinstance(child, FUNCTIONS):
                continue
            # "elif" is an If within an else, and no deeper for a reader
            chained = isinstance(at, ast.If) and child in at.orelse and isinstance(child, ast.If)
            todo.append((child, depth + (isinstance(child, NESTING) and not chained)))
    return deepest


def _risks_of(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Call):
        name = _dotted(node.func)
        if name in CALLS:
            yield node.lineno, CALLS[name]
        if name.startswith("subprocess.") and any(k.arg == "shell" and _is_true(k.value) for k in node.keywords):
            yield node.lineno, "shell=True"
    elif isinstance(node, ast.ExceptHandler):
        if node.type is None:
            yield node.lineno, "bare except"
        elif (
            len(node.body) == 1
            and isinstance(node.body[0], ast.Pass)
            and _dotted(node.type) in ("Exception", "BaseException")
        ):
            yield node.lineno, "except: pass"
    elif isinstance(node, FUNCTIONS):
        defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        if any(isinstance(default, ast.List | ast.Dict | ast.Set) for default in defaults):
            yield node.lineno, "mutable default"
    elif isinstance(node, ast.Global):
        yield node.lineno, "global"
    elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
        yield node.lineno, "import *"


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def _is_true(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _share_of_prose(text: bytes) -> float:
    return min(1.0, 4 * sum(map(len, PROSE.findall(text))) / max(1, len(text)))


def _grade(share: float) -> str:
    return next((grade for limit, grade in ((0.9, "A"), (0.7, "B"), (0.5, "C"), (0.25, "D")) if share >= limit), "F")


# -- the report


def score(f: Finding) -> tuple[float, str]:
    """How bad a file is, and why. 100 points are as bad as a hundred branches in one function."""
    branches = max(0, f.get("complexity", 0) - 10)
    depth = 5 * max(0, f.get("nesting", 0) - 4)
    size = max(0, f.get("longest", 0) - 60) / 5
    risk = 4 * min(25, f.get("risks", 0))
    reasons = []
    if branches:
        reasons.append((branches, f"{f['complexity']} branches in {f['worst']}(), line {f['worst_line']}"))
    if depth:
        reasons.append((depth, f"nested {f['nesting']} deep"))
    if size:
        reasons.append((size, f"a function of {f['longest']} lines"))
    if risk:
        reasons.append((risk, f"{f['risks']} risk{'s' * (f['risks'] > 1)} ({', '.join(f['kinds'][:3])})"))
    why = "; ".join(reason for _, reason in sorted(reasons, reverse=True)[:3])
    return round(branches + depth + size + risk, 1), why


@app.report
def report(job: Any, results: Iterable[Finding]) -> None:
    """The ten worst files and why, packages by risk, the verdict."""
    done: dict[str, Finding] = {}
    dead: list[Finding] = []
    for line in results:
        if line["outcome"] == "completed":
            done[line["id"]] = line["value"]
        else:
            dead.append(line)
    files = merge(done)
    grades = {v["path"]: v for i, v in done.items() if i.startswith("docs:")}
    worst = Table(title="The ten worst files", title_justify="left", expand=False)
    for heading, justify in (
        ("score", "right"),
        ("file", "left"),
        ("lines", "right"),
        ("docs", "center"),
        ("why", "left"),
    ):
        worst.add_column(heading, justify=justify, overflow="fold")
    for f in sorted(files, key=lambda f: (-score(f)[0], f["path"]))[:10]:
        points, why = score(f)
        if not points:
            break
        grade = grades.get(f["path"], {}).get("grade") or "?"
        worst.add_row(f"{points:.0f}", f["path"], f"{f['lines']:,}", grade, why)
    job.console.print(worst)
    judged = done.get(_id("verdict", "all"))
    if judged is not None:
        job.console.print(_package_table(judged["riskiest"]))
    _print_totals(job.console, files, grades, dead)
    if judged is not None:
        first = _id("package", judged["riskiest"][0]["package"]) if judged["riskiest"] else ""
        job.console.print(
            f"{judged['packages']} packages summed up by a workflow each, size and danger side by side; see one of them:\n"
            f"  orchestra workflow show {first} --queue {app.queue_name}",
            soft_wrap=True,
        )
        job.console.print(f"{judged['text']}.", style="bold", soft_wrap=True)


def _package_table(packages: Iterable[Finding]) -> Table:
    table = Table(title="Packages with the most risks", title_justify="left")
    table.add_column("package")
    for heading in ("files", "lines", "risks", "per 1,000 lines", "mean score"):
        table.add_column(heading, justify="right")
    for p in packages:
        rate = 1000 * p["risks"] / max(1, p["lines"])
        table.add_row(
            p["package"], f"{p['files']:,}", f"{p['lines']:,}", f"{p['risks']:,}", f"{rate:.1f}", f"{p['score']:.1f}"
        )
    return table


def _print_totals(console: Any, files: list[Finding], grades: dict[str, Finding], dead: list[Finding]) -> None:
    by = Counter(grade["by"] for grade in grades.values())
    lines, functions = sum(f["lines"] for f in files), sum(f["functions"] for f in files)
    risky = sum(f["risks"] for f in files)
    console.print(f"{len(files):,} files, {lines:,} lines, {functions:,} functions, {risky:,} risks", soft_wrap=True)
    console.print("docstrings graded by: " + ", ".join(f"{who} {count:,}" for who, count in sorted(by.items())))
    if dead:
        console.print(
            f"{len(dead)} dead, such as {dead[0]['id']}: {dead[0]['error_type']}: {dead[0]['error']}", soft_wrap=True
        )


if __name__ == "__main__":
    sys.exit("run it with: orchestra run examples/code_audit.py [DIRECTORY]")
