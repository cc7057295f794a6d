"""The research assistant: by rules over real documents, with a scripted model, and with a model that answers nonsense."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import pytest

from tests.ai.fake_openai import Answer, FakeOpenAI, in_thread

EXAMPLE = Path(__file__).parents[2] / "examples" / "research_assistant.py"
DOCS = EXAMPLE.parents[1] / "docs"

LOCKS = """# Locks

A lock is held by one process. It has a fence that grows.

| a | table about locks |
|---|---|

- A lock that is lost is told to its holder.
"""
LEASES = """# Leases

A lease ends when nobody renews it. Locks are leases, too.

```python
lock = "a lock in code is no prose"
```
"""


@pytest.fixture
def folder(tmp_path):
    """A few documents, one of which speaks of something else."""
    made = tmp_path / "documents"
    made.mkdir()
    (made / "locks.md").write_text(LOCKS)
    (made / "leases.txt").write_text(LEASES)
    (made / "soup.md").write_text("# Soup\n\nBoil water.\n")
    (made / "picture.png").write_bytes(b"\x89PNG lock")
    return made


def run(*args: object, given: str = "", **env: str) -> subprocess.CompletedProcess:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRA_LLM")}
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, args)],
        env=plain | {"COLUMNS": "80"} | env,
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def shown(workflow_id: str) -> dict:
    command = [sys.executable, "-m", "orchestra.cli", "workflow", "show", workflow_id, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


def id_of(done: subprocess.CompletedProcess) -> str:
    return re.search(r"^workflow (research-\w+):", done.stderr, re.MULTILINE)[1]


def test_an_answer_has_a_source_behind_every_statement(folder, redis_url):
    done = run("Who holds a lock?", "--folder", folder, "--yes")
    assert done.returncode == 0, done.stderr
    title, _, _, _, *statements = done.stdout.splitlines()
    assert title == "# Who holds a lock?"
    sources = [re.fullmatch(r"- (.+) \[([\w.]+):(\d+)\]", line).groups() for line in statements]
    assert {name for _, name, _ in sources} == {"locks.md", "leases.txt"}
    for text, name, line in sources:
        there = " ".join(" ".join((folder / name).read_text().splitlines()[int(line) - 1 :]).split())
        assert text[:40] in there.removeprefix("- ")
    assert not any("table" in text or "code" in text for text, _, _ in sources)
    facts = shown(id_of(done))
    assert [step["id"] for step in facts["steps"] if step["role"] == "planned"] == [
        *("collect", "read", "critic", "publish", "write"),
    ]
    assert [step["action"] for step in facts["steps"] if step["role"] == "item"] == ["read", "read"]
    by_id = {step["id"]: step for step in facts["steps"]}
    assert by_id["critic"]["attempt"] == 2
    assert "statements name no source" in done.stderr
    assert facts["context"]["plan_source"] == "planner"


def test_asked_again_it_answers_at_once_and_anew_when_told_to(folder, redis_url):
    first = run("Who holds a lock?", "--folder", folder, "--yes")
    second = run("Who holds a lock?", "--folder", folder)
    assert (second.returncode, second.stdout, id_of(second)) == (0, first.stdout, id_of(first))
    third = run("Who holds a lock?", "--folder", folder, "--yes", "--new", "--output", folder.parent / "answer.md")
    assert id_of(third) != id_of(first)
    assert (third.stdout, (folder.parent / "answer.md").read_text()) == ("", first.stdout)


class Started:
    """The example, running; what it says on standard error is read as it comes."""

    def __init__(self, *args: object, stdin: int = subprocess.DEVNULL) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLE), *map(str, args)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self.told = ""
        self._guard = threading.Timer(90, self.process.kill)

    def __enter__(self) -> Self:
        self._guard.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.cancel()
        self.process.kill()
        self.process.communicate()

    def until(self, words: str) -> str:
        while words not in self.told:
            piece = self.process.stderr.read(1000)
            assert piece, self.told
            self.told += piece.decode()
        return self.told

    def end(self) -> tuple[int, str, str]:
        out, rest = self.process.communicate(timeout=60)
        return self.process.returncode, out.decode(), self.told + rest.decode()


def test_without_a_terminal_somebody_else_decides(folder, redis_url):
    with Started("Who holds a lock?", "--folder", folder) as example:
        words = re.search(r"orchestra (workflow approve research-\w+ publish)", example.until("(or --deny)"))[1].split()
        denied = subprocess.run(
            [sys.executable, "-m", "orchestra.cli", *words, "--deny", "--message", "too short"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (denied.returncode, denied.stdout) == (0, "denied publish\n")
        status, out, told = example.end()
    assert (status, out) == (3, "")
    assert told.endswith("not published\n")


@pytest.mark.parametrize(("answer", "status", "title"), [(b"y\n", 0, "# Who holds a lock?\n"), (b"\n", 3, "")])
def test_on_a_terminal_it_asks(folder, redis_url, answer, status, title):
    ours, theirs = os.openpty()
    try:
        with Started("Who holds a lock?", "--folder", folder, stdin=theirs) as example:
            assert "[locks.md:" in example.until("Publish it? [y/N]")
            os.write(ours, answer)
            ended = example.end()
    finally:
        os.close(ours)
        os.close(theirs)
    assert (ended[0], ended[1][: len(title)]) == (status, title)
    assert bool(ended[1]) is bool(title)


def test_killed_it_goes_on_where_it_stopped(folder, redis_url):
    with Started("Who holds a lock?", "--folder", folder) as example:
        example.until("(or --deny)")
        example.process.kill()
    done = run("Who holds a lock?", "--folder", folder, "--yes")
    assert done.returncode == 0, done.stderr
    attempts = {step["id"]: step["attempt"] for step in shown(id_of(done))["steps"] if step["kind"] == "agent"}
    assert attempts == {"collect": 1, "read[0]": 1, "read[1]": 1, "critic": 2, "write": 1}


def test_nothing_to_say_and_no_folder(folder, redis_url, tmp_path):
    done = run("Which xylophone?", "--folder", folder, "--yes")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "Nothing in the documents speaks of it.")
    done = run("Who?", "--folder", tmp_path / "nowhere", "--yes")
    assert (done.returncode, done.stdout) == (3, "")
    assert "NotADirectoryError" in done.stderr


def test_the_projects_own_documents_are_read_by_default(redis_url):
    done = run("--yes")
    assert done.returncode == 0, done.stderr
    sources = re.findall(r"\[([\w./-]+\.md):\d+\]$", done.stdout, re.MULTILINE)
    assert len(sources) >= 3
    assert all((DOCS / name).is_file() for name in sources)


# -- with a model


def with_model(server, *args: object) -> subprocess.CompletedProcess:
    return run(*args, ORCHESTRA_LLM_URL=server.url, ORCHESTRA_LLM_MODEL="scripted")


def test_a_model_chooses_words_sums_up_and_introduces(folder, redis_url):
    script = Answer('{"words": ["holder", "fence"]}'), Answer("A  lock has\none holder.")
    with in_thread(FakeOpenAI(*script)) as server:
        done = with_model(server, "Who holds a lock?", "--folder", folder, "--yes")
        asked = list(server.requests)
    assert done.returncode == 0, done.stderr
    assert "A lock has one holder." in done.stdout
    assert re.search(r"^- .+ \[locks\.md:\d+\]$", done.stdout, re.MULTILINE)
    assert len(asked) == 1 + 2 + 1  # planner, two readers, critic: its rejected draft asks for nothing
    assert asked[0]["response_format"]["type"] == "json_schema"
    assert all(body.get("max_tokens") or body.get("max_completion_tokens") for body in asked)
    facts = shown(id_of(done))
    assert facts["context"]["plan_source"] == "planner"
    assert "fence" in facts["steps"][0]["args"]["words"]


@pytest.mark.parametrize("answer", ["no JSON", '{"words": ["' + "x" * 5000 + '", 7]}', ""])
def test_whatever_a_model_answers_the_run_ends_well(folder, redis_url, answer):
    with in_thread(FakeOpenAI(Answer(answer))) as server:
        done = with_model(server, "Who holds a lock?", "--folder", folder, "--yes")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^- .+ \[locks\.md:\d+\]$", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stderr
    facts = shown(id_of(done))
    assert facts["status"] == "completed"
    assert facts["context"]["plan_source"] in ("planner", "alternate")
