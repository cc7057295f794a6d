"""`orchestra workflow` as its users meet it: real processes, a real worker, a real Redis."""

from __future__ import annotations

import functools
import json
import re
import time

import pytest

from tests.processes import LoggedProcess, assert_error_line, orchestra

JOBS = """
from __future__ import annotations
from orchestra import App, BaseTask, Retry

app = App("flows", retry=Retry(max_retries=1, base=0.01))

@app.agent
async def double(n: int) -> int:
    return 2 * n

@app.agent
async def flaky(task: BaseTask) -> str:
    if task.attempt == 1:
        raise OSError("first")
    return "second"

@app.agent
async def boom() -> None:
    raise ValueError("no \\x1b[31mway\\x1b]0;title\\x07")

@app.agent
async def undo(what: str) -> str:
    return f"undid {what}"

app.template("twice")([
    {"id": "one", "action": "double", "args": {"n": {"$ref": "input.n"}}},
    {"id": "two", "action": "double", "args": {"n": {"$ref": "one"}}},
])
"""

CAREFUL = [
    {"id": "one", "action": "double", "args": {"n": 1}},
    {"id": "ask", "action": "orchestra.signal", "args": {"name": "go", "prompt": "Really?"}},
    {"id": "two", "action": "double", "args": {"n": 2}, "when": {"eq": [{"$ref": "ask"}, True]}},
]


@pytest.fixture
def folder(tmp_path, redis_url, monkeypatch):
    (tmp_path / "jobs.py").write_text(JOBS)
    (tmp_path / "careful.json").write_text(json.dumps(CAREFUL))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


@pytest.fixture
def cli(folder, forks):
    """Run `orchestra workflow …` in a process: status, standard output, standard error."""
    return functools.partial(forks.run, folder, "workflow")


@pytest.fixture
def worker(folder):
    """A running `orchestra worker jobs.py`, ready."""
    running = LoggedProcess(folder, orchestra("worker", "jobs.py"))
    running.wait_for("ready: agents")
    yield running
    running.end()


def until(cli, workflow_id: str, reached) -> dict:
    """The facts of a workflow, once ``reached(facts)``."""
    end = time.monotonic() + 30
    while True:
        status, out, err = cli("show", workflow_id, "--json")
        if status == 0 and reached(json.loads(out)):
            return json.loads(out)
        assert time.monotonic() < end, out + err
        time.sleep(0.05)


def ended(facts: dict) -> bool:
    return facts["status"] in ("completed", "failed", "cancelled")


def waits(facts: dict) -> bool:
    return any(step["state"] == "waiting" for step in facts["steps"])


# -- start


def test_start_without_a_worker_says_so_and_is_the_same_workflow_when_repeated(cli):
    status, out, err = cli("start", "jobs.py", "twice", "--input", '{"n": 5}', "--id", "w1")
    assert (status, out) == (0, "started w1 on queue flows\n")
    assert "no worker takes tasks from this queue now" in err
    status, out, _ = cli("start", "jobs.py", "twice", "--input", '{"n": 5}', "--id", "w1", "--json")
    assert (status, json.loads(out)) == (0, {"id": "w1", "type": "twice", "queue": "flows"})
    status, out, err = cli("start", "jobs.py", "twice", "--input", '{"n": 6}', "--id", "w1")
    assert (status, out) == (1, "")
    assert "w1" in err
    facts = json.loads(cli("show", "w1", "--json")[1])
    assert (facts["status"], facts["completed"], facts["total"], facts["queue"]) == ("running", 0, 2, "flows")


def test_start_and_follow_to_the_end(cli, worker):
    status, out, err = cli("start", "jobs.py", "twice", "--input", '{"n": 5}', "--follow")
    assert status == 0, out + err
    lines = out.splitlines()
    assert lines[-1] == "20"
    kinds = [line.split()[1] for line in lines[:-1]]
    assert kinds[0] == "workflow.started"
    assert kinds[-1] == "workflow.completed"
    assert kinds.count("step.completed") == 2
    assert re.fullmatch(r"\d\d:\d\d:\d\d  step\.completed +one( .*)?", next(x for x in lines if "step.completed" in x))


def test_input_from_a_file_and_from_standard_input(cli, worker, folder):
    (folder / "in.json").write_text('{"n": 7}')
    assert cli("start", "jobs.py", "twice", "--input", "@in.json", "--follow")[1].splitlines()[-1] == "28"
    assert cli("start", "jobs.py", "twice", "--input", "-", "--follow", given='{"n": 8}')[1].splitlines()[-1] == "32"


def test_a_failed_workflow_is_status_3(cli, worker, folder):
    plan = [
        {"id": "a", "action": "double", "args": {"n": 1}, "compensate": {"action": "undo", "args": {"what": "a"}}},
        {"id": "b", "action": "boom", "args": {}, "retry": 0},
    ]
    (folder / "bad.json").write_text(json.dumps(plan))
    status, out, err = cli("start", "jobs.py", "trip", "--plan", "bad.json", "--id", "trip", "--follow", "--json")
    assert (status, err.splitlines()[1:]) == (3, [])
    *events, last = map(json.loads, out.splitlines())
    assert [set(event) for event in events] == [{"id", "at", "kind", "step", "data"}] * len(events)
    assert (last["id"], last["status"], last["output"], last["error"]["type"]) == ("trip", "failed", None, "ValueError")
    status, out, err = cli("follow", "trip", "--after", events[-2]["id"])
    assert (status, len(out.splitlines())) == (3, 1)
    assert err.startswith("error: workflow trip failed: ValueError: no way")
    status, out, _ = cli("show", "trip")
    assert status == 0
    assert re.search(r"^✗ b .* failed: ValueError: no way", out, re.MULTILINE)
    assert re.search(r"undone, newest first\n✓ a +undo .* undid a", out)
    assert "\x1b" not in out


def test_a_bad_plan_prints_every_fault_on_a_line_of_its_own(cli, folder):
    plan = [
        {"id": "a", "action": "double", "depends_on": ["b"]},
        {"id": "b", "action": "nope", "depends_on": ["a"], "timeout": -1},
        {"id": "b", "action": "double", "args": {"n": {"$ref": "ghost"}}},
    ]
    (folder / "bad.json").write_text(json.dumps(plan))
    status, out, err = cli("start", "jobs.py", "x", "--plan", "bad.json")
    assert (status, out) == (2, "")
    first, *faults = err.splitlines()
    assert re.fullmatch(r"error: the plan has 5 faults:", first)
    assert len(faults) == 5
    for words in ("nope", "timeout", "taken by step", "ghost", "circle"):
        assert any(words in fault for fault in faults), words
    status, out, _ = cli("start", "jobs.py", "x", "--plan", "bad.json", "--json")
    assert (status, json.loads(out)["error"], len(json.loads(out)["faults"])) == (2, "bad_plan", 5)
    assert cli("ls")[1] == "there are no workflows\n"


# -- look


def test_show_draws_what_it_waits_for_and_approve_lets_it_go_on(cli, worker):
    assert cli("start", "jobs.py", "x", "--plan", "careful.json", "--id", "c1")[0] == 0
    until(cli, "c1", waits)
    status, out, _ = cli("show", "c1")
    assert status == 0
    assert out.startswith("workflow c1  x  running for ")
    assert re.search(r"^✓ one +double", out, re.MULTILINE)
    assert re.search(r"^◷ ask +signal .* waits for signal go: Really\?$", out, re.MULTILINE)
    assert re.search(r"^○ two +double", out, re.MULTILINE)
    assert "orchestra workflow approve c1 go" in out
    status, out, _ = cli("approve", "c1", "--json")
    assert (status, json.loads(out)) == (
        0,
        {"id": "c1", "signal": "go", "value": True, "given": True, "waited_for": True},
    )
    assert until(cli, "c1", ended)["output"] == 4
    status, out, _ = cli("show", "c1", "--json")
    assert [step["state"] for step in json.loads(out)["steps"]] == ["completed", "completed", "completed"]


def test_deny_with_a_message(cli, worker):
    assert cli("start", "jobs.py", "x", "--plan", "careful.json", "--id", "c2")[0] == 0
    until(cli, "c2", waits)
    assert cli("approve", "c2", "go", "--deny", "--message", "not now")[:2] == (0, "denied go\n")
    facts = until(cli, "c2", ended)
    assert facts["steps"][1]["result"] == {"approved": False, "message": "not now"}
    assert facts["steps"][2]["state"] == "skipped"


def test_a_signal_is_kept_until_it_is_waited_for_and_given_once(cli):
    assert cli("start", "jobs.py", "x", "--plan", "careful.json", "--id", "c3")[0] == 0
    assert cli("approve", "c3")[0] == 2
    assert cli("approve", "c3", "go", "--value", "17")[:2] == (0, "gave go, and is kept until a step waits for it\n")
    status, out, err = cli("approve", "c3", "go")
    assert (status, out) == (3, "")
    assert err == "signal go was given before; the first value counts\n"


def test_pause_resume_and_cancel(cli, worker):
    cli("pause", "nobody")
    assert cli("start", "jobs.py", "x", "--plan", "careful.json", "--id", "c4")[0] == 0
    until(cli, "c4", waits)
    status, out, _ = cli("pause", "c4", "--json")
    assert (status, json.loads(out)) == (0, {"id": "c4", "paused": True, "status": "paused"})
    assert cli("pause", "c4")[:2] == (0, "c4 is paused: nothing changed\n")
    assert cli("approve", "c4", "go")[0] == 0
    assert json.loads(cli("show", "c4", "--json")[1])["steps"][2]["state"] == "pending"
    assert cli("resume", "c4")[:2] == (0, "resumed c4\n")
    assert until(cli, "c4", ended)["status"] == "completed"
    assert cli("start", "jobs.py", "x", "--plan", "careful.json", "--id", "c5")[0] == 0
    until(cli, "c5", waits)
    assert cli("cancel", "c5", "--reason", "enough")[:2] == (0, "cancelled c5\n")
    assert until(cli, "c5", ended)["status"] == "cancelled"
    assert cli("cancel", "c5")[:2] == (0, "c5 is cancelled: nothing changed\n")
    assert cli("follow", "c5")[0] == 3


def test_ls_is_newest_first_over_all_queues(cli):
    assert cli("ls")[:2] == (0, "there are no workflows\n")
    for number in range(3):
        assert cli("start", "jobs.py", "twice", "--input", '{"n": 1}', "--id", f"n{number}")[0] == 0
    assert cli("start", "other", "twice", "--plan", "careful.json", "--id", "elsewhere")[0] == 0
    status, out, _ = cli("ls")
    head, *rows = [line.split() for line in out.splitlines()]
    assert (status, head) == (0, ["workflow", "type", "status", "steps", "begun", "queue"])
    assert [row[0] for row in rows] == ["elsewhere", "n2", "n1", "n0"]
    assert rows[1][1:4] == ["twice", "running", "0/2"]
    assert rows[0][-1] == "other"
    found = [json.loads(line) for line in cli("ls", "--json", "--limit", "2")[1].splitlines()]
    assert [one["id"] for one in found] == ["elsewhere", "n2"]
    assert list(found[0]) == [
        *("id", "queue", "type", "status", "phase", "completed", "total", "created_at", "finished_at"),
    ]
    assert cli("ls", "--queue", "other")[1].split("\n")[0].split() == ["workflow", "type", "status", "steps", "begun"]
    assert cli("ls", "--status", "failed")[1] == "there are no workflows\n"
    assert cli("ls", "--status", "running", "--app", "jobs.py")[1].count("\n") == 4


def test_an_id_in_two_queues_must_be_told_apart(cli):
    for queue in ("one", "two"):
        assert cli("start", queue, "x", "--plan", "careful.json", "--id", "same")[0] == 0
    status, _, err = cli("show", "same")
    assert (status, "name one of one, two with --queue" in err) == (2, True)
    assert cli("show", "same", "--queue", "two")[0] == 0


# -- errors


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("show",), 2, "Missing argument 'ID'"),
        (("show", "gone"), 2, "there is no workflow 'gone' on unix:"),
        (("show", "gone", "--queue", "flows"), 2, "there is no workflow 'gone' on queue 'flows'"),
        (("show", "a b"), 2, "workflow id must be 1 to 128 printable ASCII characters"),
        *(
            ((verb, "gone"), 2, "there is no workflow 'gone'")
            for verb in ("follow", "cancel", "pause", "resume", "approve")
        ),
        (("approve", "x", "--message", "m"), 2, "--message goes with --deny"),
        (("approve", "x", "--deny", "--value", "1"), 2, "give --value or --deny, not both"),
        (("approve", "x", "--value", "{"), 2, "--value is not JSON"),
        (("start", "jobs.py"), 2, "Missing argument 'TYPE'"),
        (("start", "jobs.py", "nope"), 2, "no template or agent 'nope'; there are: boom, double, flaky, twice, undo"),
        (("start", "jobs.py", "twice", "--plan", "gone.json"), 2, "--plan: cannot read 'gone.json'"),
        (("start", "jobs.py", "twice", "--input", "{"), 2, "--input is not JSON"),
        (("start", "jobs.py", "twice", "--priority", "top"), 2, "--priority must be critical, high, normal or low"),
        (("start", "gone.py", "twice"), 2, "'gone.py' is no file in"),
        (("ls", "--status", "odd"), 2, "--status must be one of pending, running, completed, failed, cancelled"),
        (("ls", "--limit", "0"), 2, "--limit must be a whole number from 1 to"),
        (("ls", "--redis", "redis://127.0.0.1:1"), 1, "cannot be reached"),
        (("ls", "--redis", "memory:"), 2, "memory: lives inside one process"),
        (("bogus",), 2, "No such command 'bogus'"),
    ],
)
def test_an_error_is_one_line_and_a_status(cli, args, status, words):
    assert_error_line(cli(*args), status, words)


def test_a_module_without_its_app_is_taken_for_a_queue_and_says_so(cli):
    status, _, err = cli("start", "jobs", "twice", "--plan", "careful.json")
    assert status == 0
    assert "'jobs' was taken for a queue's name: for the module write jobs:app" in err


def test_help_is_for_newcomers(cli):
    status, out, _ = cli("--help")
    assert status == 0
    for name in ("start", "show", "ls", "follow", "approve", "cancel", "pause", "resume"):
        assert name in out
        status, told, _ = cli(name, "--help")
        assert (status, "Examples:" in told, "Exit status:" in told) == (0, True, True)
