"""Which event loop and collector the commands' processes have, seen from an agent inside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys

import pytest

from orchestra import App

JOBS = """
from __future__ import annotations
import asyncio, gc
from orchestra import App

app = App("looped")

@app.agent
async def look() -> dict:
    loop = asyncio.get_running_loop()
    return {"loop": type(loop).__module__.partition(".")[0], "frozen": gc.get_freeze_count() > 1000}
"""


@pytest.fixture
def folder(tmp_path, redis_url):
    (tmp_path / "jobs.py").write_text(JOBS)
    return tmp_path


async def seen(folder, *options: str) -> dict:
    """What the agent of a worker started with ``options`` has seen."""
    command = [sys.executable, "-m", "orchestra.cli", "worker", "jobs.py", *options]
    with open(folder / "log", "wb") as log:
        worker = await asyncio.create_subprocess_exec(*command, cwd=folder, stderr=log)
    try:
        async with App("looped") as app, asyncio.timeout(60):
            run = await app.send("look", {}, want_result=True)
            return await run.result()
    finally:
        with contextlib.suppress(ProcessLookupError):
            worker.terminate()
        assert await worker.wait() == 0, (folder / "log").read_text()


@pytest.mark.parametrize(
    ("options", "loop"),
    [((), "uvloop"), (("--loop", "asyncio"), "asyncio"), (("--loop=uvloop", "--processes", "2"), "uvloop")],
    ids=["default", "asyncio", "supervised"],
)
async def test_the_loop_of_a_worker(folder, options, loop):
    pytest.importorskip("uvloop")
    assert await seen(folder, *options) == {"loop": loop, "frozen": True}


async def test_a_worker_process_of_a_job(folder):
    pytest.importorskip("uvloop")
    (folder / "input.jsonl").write_text('{"type": "look", "input": {}}\n')
    command = [
        sys.executable,
        "-m",
        "orchestra.cli",
        "run",
        "jobs.py",
        "--input",
        "input.jsonl",
        "--output",
        "out.jsonl",
    ]
    done = await asyncio.to_thread(
        subprocess.run,
        [*command, "--processes", "2", "--quiet"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (folder / "out.jsonl").read_text().splitlines()
    assert {"loop": "uvloop", "frozen": True} in json.loads(line).values()


def test_an_unknown_loop_is_refused(folder):
    done = subprocess.run(
        [sys.executable, "-m", "orchestra.cli", "worker", "jobs.py", "--loop", "trio"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "--loop must be auto, asyncio, uvloop, got 'trio'" in done.stderr
