"""Writes docs/reference/*.md from the code, and checks every relative link of the Markdown files.

``python docs/build.py`` writes; ``python docs/build.py --check`` only says what is out of date or broken, with status 1.
The text of a page comes from docstrings and script headers: correct it there. Needs nothing but orchestra itself.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orchestra.errors
from orchestra import _keys
from orchestra.telemetry import EVENTS

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NOTE = "<!-- Written by `make docs` from the code; correct the docstring or script header instead. -->\n"

CONFIGURED = (
    "app.App",
    "_front.runs.SendOptions",
    "agents.AgentOptions",
    "tasks.Retry",
    "_durability.Durability",
    "dispatcher.Dispatcher",
    "task_queue.RedisStreamTaskQueue",
    "memory_queue.InMemoryTaskQueue",
    "_limiting.rules.RateLimitConfig",
    "_limiting.rules.BackpressureConfig",
    "_breakers.rules.CircuitBreakerConfig",
    "orchestration_worker_pool.OrchestrationWorkerPoolConfig",
    "worker_manager.WorkerManager",
    "memory.MemoryManager",
    "connections.ConnectionManager",
)


def plain(text: str) -> str:
    """Docstring markup as Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def cell(text: str) -> str:
    return " ".join(plain(text).split()).replace("|", "\\|")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def arguments(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring without its ``Args:`` section, and that section by name."""
    before, found, rest = doc.partition("Args:\n")
    if not found:
        return doc, {}
    section, _, after = rest.partition("\n\n")
    described: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if match := re.match(r" {4}([\w, ]+): (.*)", line):
            names = [name.strip() for name in match[1].split(",")]
            described |= dict.fromkeys(names, match[2])
        else:
            for name in names:
                described[name] += " " + line.strip()
    return before + after, described


def default_of(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if " object at 0x" in repr(value):
        return f"a `{type(value).__name__}`"
    name = getattr(value, "name", None)
    return f"`{type(value).__name__}.{name}`" if name and hasattr(type(value), "__members__") else f"`{value!r}`"


def configured(path: str) -> str:
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(f"orchestra.{module}"), name)
    text, described = arguments(inspect.getdoc(cls) or "")
    factories = {}
    if dataclasses.is_dataclass(cls):
        fields = dataclasses.fields(cls)
        factories = {f.name: f"`{f.default_factory()!r}`" for f in fields if callable(f.default_factory)}
    rows = []
    for parameter in inspect.signature(cls).parameters.values():
        kind = str(parameter.annotation).replace("|", "\\|")
        default = factories.get(parameter.name) or default_of(parameter.default)
        row = (f"`{parameter.name}`", f"`{kind}`", default.replace("|", "\\|"))
        rows.append((*row, cell(described.get(parameter.name, ""))) if described else row)
    head = ("name", "type", "default", "meaning") if described else ("name", "type", "default")
    return f"## {name}\n\n{plain(text).strip()}\n\n{table(head, rows)}"


def configuration() -> str:
    intro = "# Configuration reference\n\nTimes named `*_ms` are whole milliseconds, all others are seconds.\n"
    return "\n".join([NOTE + intro, *(configured(path) for path in CONFIGURED)])


def telemetry() -> str:
    intro = (
        "# Telemetry reference\n\nEvery event and the keys that are always present. A handler is attached with "
        "`orchestra.telemetry.attach(handler, *names)`; see [operations](../operations.md#events).\n"
    )
    rows = [
        (
            f"`{name}`",
            event.doc,
            ", ".join(f"`{m}`" for m in event.measurements),
            ", ".join(f"`{m}`" for m in event.metadata),
        )
        for name, event in EVENTS.items()
    ]
    return "\n".join([NOTE + intro, table(("event", "when", "measurements", "metadata"), rows)])


def errors() -> str:
    module = orchestra.errors
    rows = [
        (f"`{name}`", f"`{cls.code}`", cell((inspect.getdoc(cls) or "").split("\n\n")[0]))
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, module.OrchestraError)
    ]
    tree = (inspect.getdoc(module) or "").split("::\n", 1)[1].split("\n\n``code``", 1)[0]
    intro = "# Error reference\n\n`code` is stable across releases and safe to match on; messages are for people.\n"
    return "\n".join([NOTE + intro, f"```text{tree}\n```\n", table(("class", "code", "meaning"), rows)])


def assigned_keys(keys: Any) -> Iterator[tuple[str, str]]:
    """The keys that a class of ``_keys.py`` assigns, each with the text below."""
    source = ast.parse(inspect.getsource(type(keys))).body[0]
    body = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "__init__").body
    for node, following in itertools.pairwise(body):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Attribute)
            and isinstance(following, ast.Expr)
        ):
            value = getattr(keys, node.targets[0].attr)
            yield (value if isinstance(value, str) else " ".join(value)), following.value.value


def documented_keys() -> Iterator[tuple[str, str]]:
    """Each key with the text below its assignment in ``_keys.py``, or of the function that makes it."""
    keys = _keys.QueueKeys("QUEUE")
    yield from assigned_keys(keys)
    yield keys.result("ID"), inspect.getdoc(_keys.QueueKeys.result)
    yield keys.replies("CLIENT"), inspect.getdoc(_keys.QueueKeys.replies)
    yield keys.breakers_of("PROCESS"), inspect.getdoc(_keys.QueueKeys.breakers_of)
    yield f"{_keys.limiter('NAME')} {_keys.limiter('NAME', 'KEY')}", inspect.getdoc(_keys.limiter)
    yield _keys.limit_settings(), inspect.getdoc(_keys.limit_settings)
    yield _keys.limit_names(), inspect.getdoc(_keys.limit_names)
    yield _keys.breaker("NAME"), inspect.getdoc(_keys.breaker)
    workflows = _keys.WorkflowKeys("SPACE")
    yield from assigned_keys(workflows)
    for function, given in (
        (workflows.state, ("ID",)),
        (workflows.context, ("ID",)),
        (workflows.events, ("ID",)),
        (_keys.lock, ("NAME",)),
        (_keys.memory, ("SPACE", "NAME")),
        (_keys.memory_names, ("SPACE",)),
    ):
        value = function(*given)
        yield (value if isinstance(value, str) else " ".join(value)), inspect.getdoc(function)


def script_page(path: Path) -> str:
    header = [line for line in path.read_text("utf-8").splitlines() if line.startswith("--")]
    upto = next(i for i, line in enumerate(header) if line.startswith("-- Complexity:")) + 1
    text = "\n".join(line.removeprefix("--").removeprefix(" ") for line in header[:upto])
    return f"### {path.stem}\n\n```text\n{text}\n```\n"


def protocol() -> str:
    intro = (
        "# The protocol on Redis\n\nOne queue keeps its keys under one hash tag, so every script touches one Cluster slot. "
        "An entry of a lane has the field `t` (the task's frame: two MessagePack values, header and body) and, once it has "
        "been moved, `n` (retries consumed), `d` (deliveries before this entry) and `g` (how often it was replayed). Every "
        "move of a task is one script, and every script may be repeated after a lost reply.\n\n## Keys\n"
    )
    keys = [(" ".join(f"`{part}`" for part in key.split()), cell(text)) for key, text in documented_keys()]
    scripts = [script_page(path) for path in sorted((ROOT / "orchestra" / "lua").glob("*.lua"))]
    return "\n".join([NOTE + intro, table(("key", "what it holds"), keys), "## Scripts\n", *scripts])


PAGES = {"configuration": configuration, "telemetry": telemetry, "errors": errors, "protocol": protocol}


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links() -> list[str]:
    broken = []
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
                broken.append(f"{page.relative_to(ROOT)}: broken link {target}")
    return broken


def stale_pages(*, write: bool) -> list[str]:
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / "reference" / f"{name}.md", make()
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(f"docs/reference/{name}.md is out of date: run `make docs`")
            if write:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, "utf-8")
    return [] if write else stale


def main() -> int:
    """Build or check; the exit status."""
    faults = stale_pages(write="--check" not in sys.argv[1:]) + broken_links()
    print("\n".join(faults) or "docs: reference pages and links are in order")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
