"""What the documentation says runs: every python block of a page, in order, in one session of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Like `python -m asyncio`: await at the top level, one event loop for all blocks. Line numbers are those of the page.
SESSION = """
import ast, asyncio, inspect, pathlib, sys, types
page, lines = sys.argv[1], [int(line) for line in sys.argv[2:]]
text = pathlib.Path(page).read_text("utf-8").splitlines()
module = types.ModuleType("__main__"); module.__file__ = page
loop = asyncio.new_event_loop()
for start in lines:
    end = text.index("```", start)
    source = "\\n" * start + "\\n".join(text[start:end])
    code = compile(source, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    made = eval(code, module.__dict__)
    if inspect.iscoroutine(made):
        loop.run_until_complete(asyncio.wait_for(made, 60))
loop.close()
"""


def starts(page: Path) -> list[int]:
    """The line of each python block's first statement, from 0."""
    text = page.read_text("utf-8")
    return [text.count("\n", 0, match.start(1)) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if starts(page)], ids=lambda page: page.stem)
def test_examples_run(page, redis_url, tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", SESSION, str(page), *map(str, starts(page))],
        env=os.environ | {"ORCHESTRA_REDIS_URL": redis_url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_reference_is_up_to_date_and_links_hold():
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "docs" / "build.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_begins_with_the_two_commands():
    commands = re.search(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)[1]
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == ["make run", "make test"]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in ("run", "test"))
