"""A worker process is killed in the middle of an agent's run: another goes on, and no recorded model call is made again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestra import App, TaskFailedError
from tests.ai.fake_openai import Answer, FakeOpenAI, in_thread

ROOT = Path(__file__).parents[2]
PATIENCE = 90


def script(*tools: str) -> list[Answer]:
    return [*(Answer(tools=((tool, {}),)) for tool in tools), Answer("finished")]


@pytest.fixture
def worker(redis_url, tmp_path):
    """Starts worker processes; those that are left are ended with the test."""
    started = []

    @contextmanager
    def start(fake: FakeOpenAI, *args: str, stay: str = ""):
        env = os.environ | {
            "ORCHESTRA_REDIS_URL": redis_url,
            "FAKE_URL": fake.url,
            "NOTES": str(tmp_path / "notes"),
            "STAY": stay,
        }
        process = subprocess.Popen([sys.executable, "-m", "tests.ai.crash_app", *args], cwd=ROOT, env=env)
        started.append(process)
        yield process
        process.kill()
        process.wait(10)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait(10)


def notes(tmp_path: Path) -> list[str]:
    file = tmp_path / "notes"
    return file.read_text().split() if file.exists() else []


def until(what, process) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, "the worker ended by itself"
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("args", [(), ("--stream",)], ids=["whole", "streamed"])
async def test_calls_one_and_two_are_not_repeated_after_a_kill_before_call_three(worker, redis_url, tmp_path, args):
    app = App("crash", redis_url)
    with in_thread(FakeOpenAI(*script("first", "second"))) as fake:
        async with app:
            run = await app.send("think", {"prompt": "go"})
            with worker(fake, *args, stay="second") as process:
                until(lambda: "second" in notes(tmp_path), process)
                process.send_signal(signal.SIGKILL)
                process.wait(10)
            assert len(fake.requests) == 2
            with worker(fake, *args):
                answer = await run.result(timeout=PATIENCE)
    assert len(fake.requests) == 3, "calls 1 and 2 came out of the journal"
    assert answer["output"].strip() == "finished"
    assert answer["usage"] == {"requests": 3, "input_tokens": 30, "output_tokens": 15, "total_tokens": 45}
    assert notes(tmp_path) == ["first", "second", "second"], "the tool in flight alone is repeated"
    assert [message["role"] for message in fake.requests[2]["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
    ]


@pytest.mark.slow
async def test_a_tool_marked_once_is_not_repeated_after_a_kill(worker, redis_url, tmp_path):
    app = App("crash", redis_url)
    with in_thread(FakeOpenAI(*script("first", "pay"))) as fake:
        async with app:
            run = await app.send("think", {"prompt": "go"})
            with worker(fake, stay="pay") as process:
                until(lambda: "pay" in notes(tmp_path), process)
                process.send_signal(signal.SIGKILL)
                process.wait(10)
            with worker(fake):
                with pytest.raises(TaskFailedError, match="'pay' may run once") as error:
                    await run.result(timeout=PATIENCE)
    assert error.value.error_type.endswith("ToolRepeatError")
    assert (len(fake.requests), notes(tmp_path)) == (2, ["first", "pay"])
