"""The command line as its users meet it: real processes, a real Redis."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import LoggedProcess, assert_error_line
from tests.processes import orchestra as command

JOBS = """
from __future__ import annotations
import asyncio
from orchestra import App, Retry

app = App("jobs", retry=Retry(max_retries=1, base=0.01))

@app.agent
async def shout(text: str) -> str:
    return text.upper()

@app.agent
async def boom(n: int) -> None:
    raise ValueError(f"no \\x1b[31m{n}\\x1b]0;title\\x07")

@app.agent
async def slow(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "slept"
"""


@pytest.fixture
def folder(tmp_path, redis_url, monkeypatch):
    (tmp_path / "jobs.py").write_text(JOBS)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


@pytest.fixture
def cli(folder, forks):
    """Run the command line in a process: status, standard output, standard error."""
    return functools.partial(forks.run, folder)


class Background(LoggedProcess):
    """A command that runs on; its log is on standard error."""

    def __init__(self, folder, *args: str) -> None:
        super().__init__(folder, command(*args))

    def status(self) -> int:
        return self.process.wait(15)


@pytest.fixture
def worker(folder):
    """Start `orchestra worker`, which is ready when this returns."""
    started = []

    def start(*args: str, ready: int = 1) -> Background:
        started.append(Background(folder, "worker", *args))
        started[-1].wait_for("ready: agents", ready)
        return started[-1]

    yield start
    for each in started:
        each.end()


# -- help


def test_help_is_for_newcomers(cli):
    status, out, _ = cli("--help")
    assert status == 0
    for name in ("worker", "submit", "cancel", "dlq", "stats", "doctor", "Exit status"):
        assert name in out
    for name in ("worker", "submit", "cancel", "stats", "doctor"):
        status, out, _ = cli(name, "--help")
        assert (status, "Examples:" in out, "Exit status:" in out) == (0, True, True)
    status, out, _ = cli("dlq", "purge", "--help")
    assert (status, "Examples:" in out, "--yes" in out) == (0, True, True)
    assert cli("--version")[:2] == (0, "orchestra 0.1.0\n")


# -- errors


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("bogus",), 2, "No such command 'bogus'"),
        (("worker",), 2, "Missing argument 'TARGET'; see `orchestra worker --help`"),
        (("worker", "jobs.py", "--bogus"), 2, "No such option"),
        (("worker", "gone.py"), 2, "'gone.py' is no file in"),
        (("worker", "jobs.py", "--processes", "0"), 2, "--processes must be a whole number from 1 to 1024, got 0"),
        (("worker", "jobs.py", "--log-level", "loud"), 2, "--log-level must be debug, info, warning, error"),
        (("submit", "jobs.py", "nope"), 2, "has no agent 'nope'; its agents are: boom, shout, slow"),
        (("submit", "jobs.py", "shout", '{"txt": 1}'), 2, "no parameter 'txt'; did you mean 'text'?"),
        (("submit", "jobs.py", "shout", "hello"), 2, "the input is not JSON"),
        (("submit", "jobs.py", "shout", "@gone.json"), 2, "cannot read 'gone.json'"),
        (("submit", "jobs", "shout", "--priority", "top"), 2, "--priority must be critical, high, normal or low"),
        (("stats", "--redis", "redis://127.0.0.1:1"), 1, "cannot be reached"),
        (("stats", "--redis", "http://x"), 2, "must be one of redis://"),
        (("stats", "--redis", "embedded:/dev/null/x"), 1, "cannot make /dev/null/x"),
        (("stats", "--redis", "memory:"), 2, "memory: lives inside one process"),
        (("stats", "gone"), 2, "there is no queue 'gone'"),
        (("cancel",), 2, "Missing argument 'TARGET|QUEUE'"),
        (("cancel", "jobs.py"), 2, "Missing argument 'TASK_ID...'"),
        (("cancel", "jobs.py", "fine", "a b"), 2, "task id must be 1 to 128 printable ASCII characters"),
        (("cancel", "gone", "x"), 2, "there is no queue 'gone'"),
        (("dlq", "ls"), 2, "name a queue"),
        (("dlq", "show", "jobs"), 2, "give the id"),
        (("dlq", "replay", "jobs"), 2, "give ids of dead letters, or --all"),
        (("dlq", "show", "one", "two"), 2, "'two' is not the id of a dead letter"),
    ],
)
def test_an_error_is_one_line_and_a_status(cli, args, status, words):
    assert_error_line(cli(*args), status, words)


def test_debug_shows_the_traceback(cli):
    status, _, err = cli("stats", "--redis", "redis://127.0.0.1:1", "--debug")
    assert status == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")
    assert cli("--debug", "stats", "--redis", "redis://127.0.0.1:1")[2].count("Traceback") >= 1


def test_a_wrong_password_is_said_and_not_shown(cli, make_server):
    server = make_server("--requirepass", "right")
    status, _, err = cli("stats", "--redis", f"unix://:wrongsecret@{server.socket}")
    assert status == 1
    assert "check the user name and password" in err
    assert "wrongsecret" not in err


def test_the_module_and_the_script_are_the_command(folder):
    done = subprocess.run(command("stats", "--json"), cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = subprocess.run(command(), cwd=folder, capture_output=True, text=True)
    assert (done.returncode, "Usage: orchestra" in done.stdout + done.stderr) == (2, True)


def test_without_the_extra_it_says_what_to_install(folder):
    code = "import sys; sys.modules['typer'] = None; from orchestra.cli import main; main(['stats'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the command line needs an extra: pip install 'orchestra-engine[cli]'\n"


def test_a_closed_pipe_is_no_error(folder):
    done = subprocess.run(
        f"{' '.join(command('doctor'))} | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


# -- submit and worker


def test_submit_and_wait(cli, worker):
    status, out, err = cli("submit", "jobs.py", "shout", '{"text": "hi"}')
    assert status == 0
    assert re.fullmatch(r"sent [0-9a-f]{31} to queue jobs\n", out)
    assert "no worker takes tasks from this queue now" in err
    worker("jobs.py")
    assert cli("submit", "jobs.py", "shout", '{"text": "é"}', "--wait")[:2] == (0, '"É"\n')
    assert cli("submit", "jobs.py", "shout", "-", "--wait", given='{"text": "in"}')[:2] == (0, '"IN"\n')
    status, out, _ = cli(
        "submit", "jobs", "shout", '{"text": "x"}', "--id", "mine", "--wait", "--json", "--priority", "high"
    )
    assert (status, json.loads(out)) == (0, {"id": "mine", "outcome": "completed", "value": "X"})
    status, out, err = cli("submit", "jobs.py", "boom", '{"n": 1}', "--wait", "--json")
    assert (status, json.loads(out)["error_type"]) == (3, "ValueError")
    assert "\x1b" not in err
    status, _, err = cli("submit", "jobs.py", "slow", '{"seconds": 5}', "--wait", "--wait-timeout", "0.2")
    assert (status, "has no result after 0.2 s" in err) == (1, True)


def test_a_module_that_is_taken_for_a_queue_is_told(cli, folder):
    (folder / "other.py").write_text(JOBS)  # its App's queue is "jobs"
    what = "'other' was taken for a queue's name: for the module write other:app"
    status, _, err = cli("stats", "other")
    assert (status, what in err) == (2, True)
    status, out, err = cli("submit", "other", "shout", '{"text": "hi"}')
    assert (status, "to queue other" in out, what in err) == (0, True, True)
    assert "was taken" not in cli("submit", "other:app", "shout", '{"text": "hi"}')[2]
    assert "was taken" not in cli("submit", "neither", "shout", '{"text": "hi"}')[2]


@pytest.mark.parametrize("given", ["[]", '[["a", 1]]', "null", "3"])
def test_metadata_is_an_object(cli, given):
    status, out, err = cli("submit", "jobs.py", "shout", '{"text": "hi"}', "--metadata", given)
    assert (status, out, err) == (2, "", f"error: --metadata must be a JSON object, got {given!r}\n")


def test_a_worker_drains_on_sigterm(cli, worker):
    running = worker("jobs.py", "--json-logs")
    cli("submit", "jobs.py", "slow", '{"seconds": 1.0}', "--id", "s1")
    end = time.monotonic() + 5
    while json.loads(cli("stats", "jobs", "--json")[1])["in_flight"] != [0, 0, 1, 0]:
        assert time.monotonic() < end
    running.signal(signal.SIGTERM)
    assert running.status() == 0
    lines = [json.loads(line) for line in running.log.splitlines()]
    assert any("draining: 1 agents run" in line["message"] for line in lines)
    stats = json.loads(cli("stats", "jobs", "--json")[1])
    assert (stats["live"], stats["counters"]["completed"], stats["consumers"]) == (0, 1, 0)


def test_the_second_signal_ends_a_worker_at_once_and_its_task_survives(cli, worker):
    running = worker("jobs.py")
    cli("submit", "jobs.py", "slow", '{"seconds": 0.8}', "--id", "s2")
    running.signal(signal.SIGINT)
    running.wait_for("draining")
    began = time.monotonic()
    running.signal(signal.SIGINT)
    assert running.status() == 130
    assert time.monotonic() - began < 5
    worker("jobs.py")
    end = time.monotonic() + 15
    while json.loads(cli("stats", "jobs", "--json")[1])["counters"].get("completed") != 1:
        assert time.monotonic() < end


def test_ctrl_c_of_an_idle_worker_is_130(worker):
    running = worker("jobs.py")
    running.signal(signal.SIGINT)
    assert running.status() == 130


def test_failed_attempts_are_logged(cli, worker):
    running = worker("jobs.py")
    cli("submit", "jobs.py", "boom", '{"n": 7}', "--wait")
    log = running.wait_for("failed on attempt 2, dead: failed")
    assert "failed on attempt 1, again in" in log
    assert "\x1b" not in log


def children(parent: int) -> list[int]:
    with open(f"/proc/{parent}/task/{parent}/children") as listed:
        return [int(pid) for pid in listed.read().split()]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_process_that_dies_is_replaced(cli, worker):
    supervisor = worker("jobs.py", "--processes", "2", ready=2)
    before = children(supervisor.process.pid)
    os.kill(before[0], signal.SIGKILL)
    supervisor.wait_for(r"was killed by SIGKILL; another starts in")
    supervisor.wait_for("ready: agents", 3)
    after = children(supervisor.process.pid)
    assert (len(before), len(after), len({*before, *after})) == (2, 2, 3)
    assert cli("submit", "jobs.py", "shout", '{"text": "a"}', "--wait")[0] == 0
    supervisor.signal(signal.SIGTERM)
    assert supervisor.status() == 0
    assert not any(alive(pid) for pid in after)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_processes_end_with_their_supervisor(worker):
    supervisor = worker("jobs.py", "--processes", "2", ready=2)
    left = children(supervisor.process.pid)
    os.kill(supervisor.process.pid, signal.SIGKILL)
    supervisor.status()
    end = time.monotonic() + 10
    while any(alive(pid) for pid in left):
        assert time.monotonic() < end, supervisor.log
        time.sleep(0.05)
    assert supervisor.log.count("the supervising process is gone") == 2


def test_processes_that_cannot_start_end_the_supervisor(folder):
    failed = Background(folder, "worker", "jobs.py", "--processes", "2", "--redis", "redis://127.0.0.1:1")
    assert failed.status() == 1
    assert "could not start: stopping" in failed.log


# -- dead letters


@pytest.fixture
def dead(cli, worker, redis_server):
    """Three dead letters of queue jobs: two that failed, one that is no task; returns their ids."""
    running = worker("jobs.py")
    cli("submit", "jobs.py", "boom", '{"n": 1}', "--id", "b1", "--wait")
    cli("submit", "jobs.py", "boom", '{"n": 2}', "--id", "b2", "--metadata", '{"who": "me"}', "--wait")
    running.signal(signal.SIGTERM)
    running.status()
    redis_server.ask(b'XADD orc:{jobs.0}:dlq * t "\\x01\\x02not a task\\x1b[31m" r corrupt n 0')
    return [json.loads(line)["message_id"] for line in cli("dlq", "ls", "--json")[1].splitlines()]


def test_dead_letters_are_listed(cli, dead):
    status, out, err = cli("dlq", "ls")
    assert status == 0
    assert [ident in out for ident in dead] == [True] * 3
    assert "ValueError: no 1" in out
    assert "\x1b" not in out
    assert "3 of 3 dead letters" in err
    status, out, err = cli("dlq", "ls", "jobs", "--limit", "1")
    assert "b1" in out
    assert "b2" not in out
    assert f"more: orchestra dlq ls jobs --after {dead[0]}" in err
    assert "b1" not in cli("dlq", "ls", "--after", dead[0])[1]
    rows = [json.loads(line) for line in cli("dlq", "ls", "jobs.py", "--reason", "corrupt", "--json")[1].splitlines()]
    assert [(row["message_id"], row["task_data"], bytes.fromhex(row["raw"])[:2]) for row in rows] == [
        (dead[2], None, b"\x01\x02")
    ]


def test_dead_letters_are_shown_in_full(cli, dead):
    status, out, _ = cli("dlq", "show", dead[1])
    assert status == 0
    for words in ("task        b2", "'who': 'me'", "ValueError", "traceback", "in boom", f"dlq replay jobs {dead[1]}"):
        assert words in out
    assert "\x1b" not in out
    status, out, _ = cli("dlq", "show", "jobs", dead[2])
    assert "0000  01 02 6e 6f 74 20 61 20 74 61 73 6b 1b 5b 33 31" in out
    assert cli("dlq", "show", "jobs", "1-1")[0] == 1
    assert json.loads(cli("dlq", "show", dead[0], "--json")[1])["task_data"]["input"] == {"n": 1}


def test_dead_letters_are_replayed_and_purged(cli, dead):
    assert cli("dlq", "replay", dead[0])[:2] == (0, "replayed 1 dead letters of queue jobs\n")
    assert cli("dlq", "replay", dead[0])[0] == 1
    status, _, err = cli("dlq", "purge", "--all")
    assert (status, "needs --yes" in err) == (2, True)
    status, out, _ = cli("dlq", "purge", "jobs", "--all", "--reason", "corrupt", "--yes", "--json")
    assert (status, json.loads(out)) == (0, {"deleted": 1, "of": 1, "queue": "jobs"})
    assert cli("dlq", "replay", "--all")[:2] == (0, "replayed 1 dead letters of queue jobs\n")
    stats = json.loads(cli("stats", "--json")[1])
    assert (stats["dead"], stats["live"]) == (0, 2)
    assert "has no dead letters" in cli("dlq", "ls", "jobs")[1]


# -- cancel


def test_tasks_are_cancelled_by_their_ids(cli):
    """H12: waiting, delayed, unknown, ended; by target and by queue."""
    cli("submit", "jobs.py", "shout", '{"text": "a"}', "--id", "a")
    cli("submit", "jobs.py", "shout", '{"text": "b"}', "--id", "b", "--delay", "600")
    status, out, err = cli("cancel", "jobs.py", "a", "b", "nobody")
    assert status == 0
    assert out.splitlines() == [
        "cancelled a",
        "cancelled b",
        "requested nobody: a worker ends it when it learns of it",
    ]
    assert "no worker" in err
    status, out, err = cli("cancel", "jobs", "a", "--json")
    assert (status, json.loads(out), err) == (0, {"id": "a", "cancellation": "ended", "queue": "jobs"}, "")
    assert cli("cancel", "jobs", "b")[1] == "had ended b\n"
    stats = json.loads(cli("stats", "jobs", "--json")[1])
    assert (stats["live"], stats["counters"]["cancelled"]) == (0, 2)


def test_a_running_task_is_cancelled(cli, folder, worker):
    """H12: the worker, another process, ends it; who waits for it, a third one, is told."""
    running = worker("jobs.py")
    waiting = Background(folder, "submit", "jobs.py", "slow", '{"seconds": 600}', "--id", "s", "--wait")
    try:
        waiting.wait_for("waiting for its result")
        end = time.monotonic() + 20
        while sum(json.loads(cli("stats", "jobs", "--json")[1])["in_flight"]) == 0:
            assert time.monotonic() < end
        status, out, err = cli("cancel", "jobs.py", "s")
        assert (status, out, err) == (0, "requested s: a worker ends it when it learns of it\n", "")
        assert waiting.process.wait(20) == 1
        assert "was cancelled" in waiting.log
    finally:
        if waiting.process.poll() is None:
            waiting.process.kill()
            waiting.process.wait(5)
    running.signal(signal.SIGTERM)
    assert running.status() == 0


# -- stats and doctor


def test_stats_are_for_people_and_for_scripts(cli):
    status, out, err = cli("stats")
    assert (status, "there are no queues yet" in err) == (0, True)
    cli("submit", "jobs.py", "shout", '{"text": "a"}')
    cli("submit", "other", "anything", "{}", "--delay", "60")
    status, out, _ = cli("stats")
    assert "queue jobs: 1 live" in out
    assert "queue other: 1 live, 1 of them delayed" in out
    assert [json.loads(line)["queue"] for line in cli("stats", "--json")[1].splitlines()] == ["jobs", "other"]
    assert "name a queue" in cli("dlq", "ls")[2]


def test_watching_ends_with_ctrl_c(folder, cli):
    cli("submit", "jobs.py", "shout", '{"text": "a"}')
    process = subprocess.Popen(
        command("stats", "--watch", "--interval", "0.1", "--json"),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup and a shell's & let children ignore it
    )
    lines = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err == ""
    assert lines[2]["ended_per_s"] == 0


def test_doctor_says_what_is_wrong(cli, make_server):
    bad = make_server("--maxmemory", "200mb", "--maxmemory-policy", "allkeys-lru")
    status, out, _ = cli("doctor", "jobs.py", "--redis", bad.url)
    assert status == 3
    assert re.search(r"XX  maxmemory-policy +allkeys-lru", out)
    assert re.search(r"!!  persistence +none", out)
    assert re.search(r"queue +jobs +\(the name of jobs.py\)", out)
    assert re.search(r"retry.max_retries +1 +\(jobs.py\)", out)
    assert re.search(r"redis +unix://\S+ +\(--redis\)", out)
    status, out, _ = cli("doctor", "--json", "--redis", bad.url)
    levels = {finding["what"]: finding["level"] for finding in json.loads(out)["findings"]}
    assert levels["latency"] == levels["server clock"] == levels["python"] == "ok"


def test_doctor_reports_a_server_that_is_not_there(cli):
    status, out, _ = cli("doctor", "--redis", "redis://127.0.0.1:1")
    assert status == 1
    assert "cannot be reached" in out
    assert "configuration" in out
