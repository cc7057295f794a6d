"""``orchestra run`` as its users meet it: a process, its output file, its exit status; killed, interrupted, run again."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from orchestra.embedded import EmbeddedServer

APP = """
import asyncio, os, pathlib
from orchestra import App, Retry, TaskPriority

app = App("jobs", retry=Retry(max_retries=1, base=0.02, max_delay=0.05))

@app.agent
async def double(n: int, pause: float = 0.0) -> int:
    with open("ran.log", "a") as log:
        log.write(f"{n}\\n")
    await asyncio.sleep(pause)
    if n < 0 and not pathlib.Path("mended").exists():
        raise ValueError("negative\\x1b[31m")
    return 2 * n

@app.agent
def where(n: int) -> int:
    return os.getpid()

@app.agent
async def add(numbers: list[int]) -> int:
    return sum(numbers)

@app.source
async def tasks(job):
    count, pause, below = (float(job.args[i]) if len(job.args) > i else 0.0 for i in range(3))
    numbers = range(-int(below), int(count))
    job.expect(len(numbers) + 1)
    for n in numbers:
        yield {"id": f"d:{n}", "type": "double", "input": {"n": n, "pause": pause}}
    found = await job.results(f"d:{n}" for n in numbers)
    yield {"id": "sum", "type": "add", "input": {"numbers": list(found.values())}, "priority": TaskPriority.CRITICAL}

@app.report
def report(job, results):
    job.console.print(f"REPORT {job.name} {sum(1 for _ in results)} lines")

other = App("other")

@other.agent(name="double")
async def other_double(n: int) -> int:
    return 2 * n
"""


@pytest.fixture
def here(tmp_path):
    (tmp_path / "jobs.py").write_text(APP)
    return tmp_path


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "orchestra.cli", "run", *map(str, args)]


def run(here: Path, *args: str, given: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), cwd=here, input=given, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def started(here: Path, *args: str):
    process = subprocess.Popen(command(*args), cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def wait_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    def there() -> bool:
        assert process.poll() is None, f"it ended early: {process.communicate()}"
        return path.exists() and path.read_bytes().count(b"\n") >= count

    wait_for(there)


def ran(here: Path) -> Counter:
    return Counter((here / "ran.log").read_text().split())


def once_each(out: list[dict], count: int) -> dict[str, dict]:
    ids = Counter(line["id"] for line in out)
    assert set(ids.values()) == {1}, f"more than once: {[i for i, n in ids.items() if n > 1]}"
    assert len(ids) == count
    return {line["id"]: line for line in out}


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(pid):
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_to_the_end_and_again(here, redis_url):
    first = run(here, "jobs.py:app", "200")
    assert first.returncode == 0, first.stderr
    out = once_each(lines(here / "jobs.results.jsonl"), 201)
    assert out["d:7"] == {"id": "d:7", "type": "double", "outcome": "completed", "value": 14}
    assert out["sum"]["value"] == sum(2 * n for n in range(200))
    assert "REPORT jobs 201 lines" in first.stdout
    assert "201 of 201 tasks ended" in first.stdout

    began = time.monotonic()
    second = run(here, "jobs.py:app", "200")
    assert second.returncode == 0
    assert time.monotonic() - began < 5
    assert "201 of them done before" in second.stdout
    assert set(ran(here).values()) == {1}
    assert len(lines(here / "jobs.results.jsonl")) == 201


def test_a_longer_second_run_does_only_what_is_new(here, redis_url):
    tasks = [json.dumps({"n": n}) for n in range(30)]
    (here / "in.jsonl").write_text("\n".join(tasks[:20]))
    args = ("jobs.py:app", "--agent", "double", "--input", "in.jsonl", "--output", "out.jsonl")
    assert run(here, *args).returncode == 0
    (here / "in.jsonl").write_text("\n".join(reversed(tasks)))
    assert run(here, *args).returncode == 0
    assert {line["value"] for line in once_each(lines(here / "out.jsonl"), 30).values()} == {2 * n for n in range(30)}
    assert set(ran(here).values()) == {1}


def test_dead_tasks_end_with_3_and_commands_that_work(here, redis_url):
    done = run(here, "jobs.py:app", "5", "0", "2")
    assert done.returncode == 3, done.stderr
    out = once_each(lines(here / "jobs.results.jsonl"), 8)
    line = out["d:-1"]
    assert (line["outcome"], line["reason"], line["attempts"]) == ("dead", "failed", 2)
    assert line["error_type"] == "ValueError"
    assert out["sum"]["value"] == 20
    assert "\x1b" not in done.stdout + done.stderr
    shown = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("orchestra ")]
    assert len(shown) == 3
    for text in shown[:2]:
        words = shlex.split(text)
        looked = subprocess.run(
            [sys.executable, "-m", "orchestra.cli", *words[1:]], cwd=here, capture_output=True, text=True
        )
        assert looked.returncode in (0, 3), looked.stderr
        assert "ValueError" in looked.stdout

    again = run(here, "jobs.py:app", "5", "0", "2")
    assert again.returncode == 3
    assert ran(here)["-1"] == 2

    (here / "mended").touch()
    words = shlex.split(shown[2])
    assert "--retry-dead" in words
    mended = subprocess.run(
        [sys.executable, "-m", "orchestra.cli", *words[1:]], cwd=here, capture_output=True, text=True
    )
    assert mended.returncode == 0, mended.stderr
    assert once_each(lines(here / "jobs.results.jsonl"), 8)["d:-1"]["value"] == -2
    assert ran(here)["-1"] == 3


def test_replayed_dead_letters_are_taken_back(here, redis_url):
    assert run(here, "jobs.py:app", "3", "0", "1").returncode == 3
    (here / "mended").touch()
    queue = json.loads((here / "jobs.results.jsonl.job").read_text())["queue"]
    replay = [sys.executable, "-m", "orchestra.cli", "dlq", "replay", "--all", "--queue", queue]
    assert subprocess.run(replay, cwd=here, capture_output=True, timeout=30).returncode == 0
    worker = [sys.executable, "-m", "orchestra.cli", "worker", "jobs.py:app", "--queue", queue]
    with subprocess.Popen(worker, cwd=here, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: ran(here)["-1"] == 3)
        process.send_signal(signal.SIGTERM)
    assert run(here, "jobs.py:app", "3", "0", "1").returncode == 0
    assert once_each(lines(here / "jobs.results.jsonl"), 5)["d:-1"]["value"] == -2


def test_killed_and_run_again(here, redis_url):
    args = ("jobs.py:app", "300", "0.02", "--concurrency", "8")
    output = here / "jobs.results.jsonl"
    for wanted in (20, 120):
        with started(here, *args) as process:
            wait_lines(output, wanted, process)
            process.kill()
    done = run(here, *args)
    assert done.returncode == 0, done.stderr
    out = once_each(lines(output), 301)
    assert out["sum"]["value"] == sum(2 * n for n in range(300))
    repeated = sum(n - 1 for n in ran(here).values())
    assert repeated <= 2 * 8  # what was running when it was killed, and nothing else


def test_killed_with_an_embedded_server(here, tmp_path):
    args = ("jobs.py:app", "150", "0.02", "--concurrency", "8", "--redis", f"embedded:{tmp_path / 'server'}")
    output = here / "jobs.results.jsonl"
    with started(here, *args) as process:
        wait_lines(output, 20, process)
        process.kill()
    done = run(here, *args)
    assert done.returncode == 0, done.stderr
    once_each(lines(output), 151)
    assert sum(n - 1 for n in ran(here).values()) <= 8


def test_interrupted_it_drains_and_says_how_to_go_on(here, redis_url):
    args = ("jobs.py:app", "200", "0.05", "--concurrency", "4")
    output = here / "jobs.results.jsonl"
    with started(here, *args) as process:
        wait_lines(output, 20, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "tasks sent have not ended" in out
    assert f"orchestra run {shlex.join(args)}" in out
    before = len(lines(output))
    assert 20 <= before < 201
    assert sum(ran(here).values()) == before  # what ran has its line
    assert run(here, *args).returncode == 0
    once_each(lines(output), 201)
    assert set(ran(here).values()) == {1}


def test_a_second_interrupt_ends_at_once(here, redis_url):
    with started(here, "jobs.py:app", "4", "30") as process:
        wait_for(lambda: (here / "ran.log").exists())
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.communicate(timeout=10)
    assert process.returncode == 130
    assert time.monotonic() - began < 2


BAD = """{"type": "double", "input": {"n": 1}}
not json
{"type": "double"}

{"type": "nobody", "input": {}}
{"type": "double", "input": {"n": 2}, "priority": "HIGH", "id": "two"}
{"type": "double", "input": {"n": 3}, "id": "two"}
{"type": "double", "input": {"n": 3}, "priority": "urgent"}
{"type": "double", "input": {"n": NaN}}
[1, 2]
{"type": "double", "input": {"m": 1}}
{"type": "double", "input": {"n": 4}, "id": "with space"}
{"type": "double", "input": {"n": 5}}
"""


def test_bad_lines_are_named_and_the_rest_goes_on(here, redis_url):
    (here / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + BAD.replace("\n", "\r\n").encode() + b'{"type": "\xff"}')
    done = run(here, "jobs.py:app", "--input", "in.jsonl", "--output", "out.jsonl")
    assert done.returncode == 1
    named = {int(line.split("line ")[1].split(":")[0]) for line in done.stderr.splitlines() if "bad task" in line}
    assert named == {2, 3, 5, 7, 8, 9, 10, 11, 12, 14}
    assert "in.jsonl line 2: not JSON" in done.stderr
    assert "line 5: no agent for type 'nobody'; there is: add, double, where" in done.stderr
    assert "line 14: not UTF-8: byte 0xff in column 11" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(line["value"] for line in once_each(lines(here / "out.jsonl"), 3).values()) == [2, 4, 10]


def test_strict_sends_nothing(here, redis_url):
    (here / "in.jsonl").write_text(BAD)
    done = run(here, "jobs.py:app", "--input", "in.jsonl", "--strict")
    assert done.returncode == 1
    assert "line 2: not JSON" in done.stderr
    assert "9 bad lines, nothing was sent" in done.stderr
    assert not (here / "ran.log").exists()
    (here / "in.jsonl").write_text('{"n": 1}\n{"n": 1}\n')
    assert run(here, "jobs.py:app", "--agent", "double", "--input", "in.jsonl", "--strict").returncode == 0
    assert len(lines(here / "jobs.results.jsonl")) == 2  # twice the same content is two tasks


def test_standard_input_and_json(here, redis_url):
    done = run(here, "jobs.py:app", "--agent", "double", "--input", "-", "--json", given='{"n": 1}\n2\n')
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["completed"], summary["dead"], summary["status"]) == (2, 0, 0)
    assert sorted(line["value"] for line in lines(here / "jobs.results.jsonl")) == [2, 4]


def test_one_run_at_a_time(here, redis_url):
    with started(here, "jobs.py:app", "50", "0.2", "--concurrency", "2") as process:
        wait_lines(here / "jobs.results.jsonl", 1, process)
        second = run(here, "jobs.py:app", "50", "0.2", "--concurrency", "2")
        assert second.returncode == 1
        assert "another process is running the job of jobs.results.jsonl" in second.stderr
        assert process.poll() is None


def test_worker_processes(here, redis_url):
    with started(here, "jobs.py:app", "200", "0.03", "--processes", "2", "--concurrency", "4", "--json") as process:
        wait_lines(here / "jobs.results.jsonl", 10, process)
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["restarts"] == 1
    once_each(lines(here / "jobs.results.jsonl"), 201)
    assert not any(alive(pid) for pid in workers)


def test_worker_processes_die_with_the_run(here, redis_url):
    args = ("jobs.py:app", "200", "0.05", "--processes", "2", "--concurrency", "4")
    with started(here, *args) as process:
        wait_lines(here / "jobs.results.jsonl", 10, process)
        workers = children(process.pid)
        process.kill()
    wait_for(lambda: not any(alive(pid) for pid in workers), 8)
    assert run(here, *args).returncode == 0
    once_each(lines(here / "jobs.results.jsonl"), 201)


def test_a_torn_line_and_a_lost_line_are_run_again(here, redis_url):
    output = here / "jobs.results.jsonl"
    assert run(here, "jobs.py:app", "10").returncode == 0
    text = output.read_text().splitlines(keepends=True)
    torn, lost = json.loads(text[3])["id"], json.loads(text[5])["id"]
    output.write_text("".join(line for i, line in enumerate(text) if i not in (3, 5)) + text[3][:20])
    done = run(here, "jobs.py:app", "10")
    assert done.returncode == 0, done.stderr
    assert {torn, lost} <= set(once_each(lines(output), 11))


def test_another_job_is_not_mixed_in(here, redis_url):
    assert run(here, "jobs.py:app", "3").returncode == 0
    other = run(here, "jobs.py:app", "4")
    assert other.returncode == 2
    assert "belongs to a job for source 3, and this one is for source 4" in other.stderr
    assert run(here, "jobs.py:app", "4", "--fresh").returncode == 0
    once_each(lines(here / "jobs.results.jsonl"), 5)
    (here / "mine.txt").write_text("my novel\n")
    foreign = run(here, "jobs.py:app", "4", "--output", "mine.txt")
    assert foreign.returncode == 2
    assert "mine.txt line 1 is not a result" in foreign.stderr
    assert (here / "mine.txt").read_text() == "my novel\n"


def test_an_output_that_was_deleted_is_a_new_job(here, redis_url):
    assert run(here, "jobs.py:app", "3").returncode == 0
    (here / "jobs.results.jsonl").unlink()
    assert run(here, "jobs.py:app", "3").returncode == 0
    once_each(lines(here / "jobs.results.jsonl"), 4)
    assert ran(here) == {"0": 2, "1": 2, "2": 2}


def test_a_full_disk_loses_nothing(here, redis_url):
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", *command("jobs.py:app", "200")]  # in units of 1 KiB
    done = subprocess.run(limited, cwd=here, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "jobs.results.jsonl cannot be written: File too large; nothing is lost, run it again" in done.stderr
    assert 10 < len(lines(here / "jobs.results.jsonl")) < 100
    assert run(here, "jobs.py:app", "200").returncode == 0
    once_each(lines(here / "jobs.results.jsonl"), 201)
    assert set(ran(here).values()) == {1}


def test_a_lost_server_comes_back(here, tmp_path):
    directory = tmp_path / "server"
    args = ("jobs.py:app", "150", "0.03", "--concurrency", "4", "--redis", f"embedded:{directory}")
    with started(here, *args) as process:
        wait_lines(here / "jobs.results.jsonl", 20, process)
        with EmbeddedServer(directory) as server:
            os.kill(server.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    once_each(lines(here / "jobs.results.jsonl"), 151)


def test_memory_needs_no_redis(here):
    done = run(here, "jobs.py:app", "50", "--redis", "memory:")
    assert done.returncode == 0, done.stderr
    once_each(lines(here / "jobs.results.jsonl"), 51)


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (("nothing.py",), 2, "nothing.py"),
        (("jobs.py",), 2, "has 2 Apps"),
        (("jobs.py:other",), 2, "other has no source of tasks: give --input FILE"),
        (("jobs.py:app", "--agent", "double"), 2, "--agent says how to read --input"),
        (("jobs.py:app", "--agent", "nobody", "--input", "-"), 2, "there is: add, double, where"),
        (("jobs.py:app", "--input", "missing.jsonl"), 2, "missing.jsonl cannot be read: No such file"),
        (("jobs.py:app", "3", "--output", "no/such/dir.jsonl"), 2, "cannot be written: No such file or directory"),
        (("jobs.py:app", "3", "--output", "."), 2, "the output . is not a file"),
        (("jobs.py:app", "3", "--redis", "redis://127.0.0.1:1/0"), 1, "127.0.0.1:1"),
        (("jobs.py:app", "3", "--concurrency", "0"), 2, "--concurrency"),
        (("jobs.py:app", "3", "--redis", "memory:", "--processes", "2"), 2, "memory: is in one process"),
        (("jobs.py:app", "three"), 1, "the source of jobs failed: ValueError"),
    ],
)
def test_one_line_says_what_is_wrong(here, args, status, text, redis_url):
    done = run(here, *args)
    assert done.returncode == status, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
