"""The comparison with other queues: its driver against programs that work, crash, hang and lie, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks import _beside
from benchmarks._server import Server
from benchmarks.peers import __main__ as command
from benchmarks.peers import chart, drive, environments, report
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.drive import Contender, WorkloadError

ROOT = Path(__file__).parents[2]
FAKE = Peer(name="fake", program="with_fake", acknowledges=False, deduplicates=False, own=True)
SIZES = replace(command.QUICK, single=20, samples=5, sleeps=50, limit=20.0)
PROGRAM = """
import contextlib, os, sys, time
import redis
import shared

PACKAGES, UVLOOP, BACKLOG = ["redis"], False, [["LLEN", "fake"]]
SETTINGS = {"chunk": 100, "sleep": {"wide": True}}
MODE = os.environ["FAKE_MODE"]
client = redis.Redis(port=shared.PORT)


@contextlib.contextmanager
def producer():
    def send(item):
        client.rpush("fake" if MODE != "elsewhere" else "other", item["id"])

    def send_many(items):
        if MODE == "refuses":
            raise OSError("no room for more")
        for item in items:
            send(item)

    yield send, send_many


def worker():
    if MODE == "crashes":
        sys.exit("the worker cannot start")
    if MODE == "idles":
        time.sleep(600)
    while True:
        if client.blpop("fake", 1):
            {"latency": shared.plain_agent}.get(shared.WORKLOAD, lambda _: shared.PROGRESS.end())(None)
"""


@pytest.fixture(scope="module")
def server():
    server = Server("tcp")
    yield server
    server.stop()


@pytest.fixture
def fake(server, tmp_path, monkeypatch):
    """``fake(mode)``: a contender whose program behaves like that."""
    (tmp_path / "with_fake.py").write_text(textwrap.dedent(PROGRAM))
    made = []

    def make(mode, limit=20.0):
        monkeypatch.setenv("FAKE_MODE", mode)
        shared = drive.PROGRAMS / "shared.py"
        start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[0] = {str(shared)!r}; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
        made.append(Contender(FAKE, [sys.executable, "-c", start, "with_fake"], tmp_path, server, limit))
        return made[-1]

    yield make
    for contender in made:
        contender.close()


def turn(contender, *workloads):
    return command.Turn(contender, SIZES, workloads).run()


def test_every_workload_of_a_program_that_works(fake):
    found = turn(fake("works"), *command.WORKLOADS)
    assert found["errors"] == {}
    assert all(found[key] > 0 for key in ("single", "bulk", "drain", "p50", "p99", "ideal", "bytes", "server_us"))
    assert found["p50"] <= found["p99"]
    assert found["cut"] == 0


def test_settings_of_a_workload_override_the_others(fake):
    contender = fake("works")
    assert contender.settings("drain") == {"chunk": 100}
    assert contender.settings("sleep") == {"chunk": 100, "wide": True}


def test_worker_that_cannot_start_is_told_with_its_words(fake):
    found = turn(fake("crashes"), "bulk", "drain")
    assert "ended with status 1" in found["errors"]["drain"]
    assert "the worker cannot start" in found["errors"]["drain"]
    assert found["bulk"] > 0, "what did work stays"


def test_producer_that_fails_is_told_with_its_words(fake):
    found = turn(fake("refuses"), "single", "bulk")
    assert "no room for more" in found["errors"]["bulk"]
    assert found["single"] > 0


def test_worker_that_does_nothing_is_given_up(fake, monkeypatch):
    monkeypatch.setattr(drive, "START_SECONDS", 0.5)
    found = turn(fake("idles"), "drain")
    assert "no task was handled within" in found["errors"]["drain"]


def test_step_that_hangs_is_ended(fake, monkeypatch):
    monkeypatch.setattr(drive, "STEP_SECONDS", 0.2)
    contender = fake("works", limit=0.5)
    contender.command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(WorkloadError, match="did not end within"):
        contender.enqueue("single", 5)


def test_backlog_check_that_sees_nothing_is_no_empty_queue(fake):
    found = turn(fake("elsewhere"), "drain")
    assert "sees nothing of what was queued" in found["errors"]["drain"]


def test_turn_ends_when_its_time_is_over(fake):
    found = command.Turn(fake("works"), replace(SIZES, turn=-1.0), ["single", "drain"]).run()
    assert all(text.startswith("not run: the turn took longer") for text in found["errors"].values())
    assert set(found["errors"]) == {"single", "drain"}


def test_no_process_survives_its_step(fake):
    contender = fake("works")
    with contender.worker("drain") as process:
        assert process.poll() is None
    assert process.returncode is not None


def test_peer_without_its_python_says_so():
    with pytest.raises(environments.UnavailableError, match=r"needs Python 9\.9"):
        environments.find_python((9, 9))


def test_peer_without_node_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)
    node = next(peer for peer in PEERS if peer.node)
    with pytest.raises(environments.UnavailableError, match="needs node and npm"):
        environments.prepare(node, tmp_path)


def test_environment_is_kept_until_what_it_needs_changes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(environments, "_install", lambda peer, home, python: made.append(peer.requirements))
    peer = replace(FAKE, own=False, requirements=("a",))
    for _ in range(2):
        environments.prepare(peer, tmp_path)
    environments.prepare(replace(peer, requirements=("a", "b")), tmp_path)
    environments.prepare(replace(peer, requirements=("a", "b")), tmp_path, fresh=True)
    assert made == [("a",), ("a", "b"), ("a", "b")]


def test_every_peer_has_a_program():
    suffix = {True: ".mjs", False: ".py"}
    missing = [peer.name for peer in PEERS if not (drive.PROGRAMS / f"{peer.program}{suffix[peer.node]}").exists()]
    assert missing == []
    programs = {path.stem for path in drive.PROGRAMS.glob("with_*")}
    assert programs == {peer.program for peer in PEERS}


def row(name, own=False, reason=None, rounds=(), **more):
    found = {**command.row(replace(FAKE, name=name, own=own)), "reason": reason, "rounds": list(rounds), **more}
    found["figures"] = report.figures(found["rounds"])
    found["facts"] = (
        None if reason else {"versions": {name: "1.0"}, "runtime": "Python", "uvloop": False, "settings": {}}
    )
    return found


@pytest.fixture
def result():
    raw = {"drain": 1000.0}
    ours = [
        {"raw": raw, "drain": value, "bulk": 50.0, "bytes": 300.0, "p50": 10.0, "errors": {}}
        for value in (400.0, 500.0, 900.0)
    ]
    quick = [{"raw": raw, "drain": 50.0, "bytes": 100.0, "p50": 40.0, "cut": 1.0, "errors": {"sleep": "it fell over"}}]
    peers = [
        row("slow & small", rounds=quick),
        row("orchestra", own=True, rounds=ours),
        row("absent", reason="needs another planet"),
        row("careful", rounds=[{**quick[0], "drain": 20.0, "bytes": 600.0}], deduplicates=True),
    ]
    return {"machine": "a machine", "command": "make bench-peers", "rounds": 3, "quick": False, "peers": peers}


def test_report_has_medians_ratios_and_every_failure(result):
    text = report.markdown(result)
    lines = text.splitlines()
    ours, small = (
        next(line for line in lines if line.startswith(f"| {name} ")) for name in ("orchestra", "slow & small")
    )
    assert "| 500 | 0.50 | 50 |" in ours
    assert "| 50 \\* | 1/20 |" in small
    assert lines.index(ours) < lines.index(small)
    assert "- absent: not run: needs another planet" in lines
    assert "- slow & small, sleep: it fell over" in lines
    assert not any(line.startswith("| absent") for line in lines)


def test_report_compares_bytes_with_peers_that_deduplicate(result):
    leads = "\n".join(report.leads(report.ranked(result["peers"])))
    assert "no-op drain, tasks/s: 10.0 × the best peer (slow & small, 50)" in leads
    assert "Redis bytes a task: 2.0 × the best peer that deduplicates (careful, 600)" in leads
    assert "send → start p50, µs: 4.0 ×" in leads


def test_chart_is_xml_with_a_bar_for_each_queue(result):
    tree = ET.fromstring(chart.svg(result))
    bars = [node.get("class") for node in tree.iter("{http://www.w3.org/2000/svg}rect")]
    assert bars == ["o", "p", "p", "o", "o", "p", "p"], "drain of three, bulk of ours alone, latency of three"
    assert "slow & small" in [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_missing_library_is_shown(monkeypatch):
    monkeypatch.setattr(_beside, "LINES", [])

    class Benchmark:
        disabled, extra_info = False, {}

        def pedantic(self, call, **_):
            call()

    there = _beside.Rival("json", "json", "Python", lambda module: lambda: module.dumps(1))
    gone = _beside.Rival("fastest of all", "no_such_library", "no-such-library", lambda module: module.run)
    _beside.beside(Benchmark(), "encode", lambda: None, [there, gone])
    text = "\n".join(_beside.table())
    assert "| fastest of all | not installed |" in text
    assert "| json |" in text


@pytest.mark.parametrize(
    "arguments", [["--workload", "dance"], ["--only", "nobody"], ["--rounds", "0"], ["--rounds", "101"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    if arguments == ["--rounds", "0"]:
        assert command.parse(arguments).rounds == 5
        return
    with pytest.raises(SystemExit) as ended:
        command.parse(arguments)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.slow
def test_our_own_programs_run(tmp_path):
    words = ["--quick", "--only", "orchestra", "--workload", "bulk,drain", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "peers.json").read_text())
    assert [r["name"] for r in found["peers"]] == ["orchestra", "orchestra (App)"]
    for one in found["peers"]:
        assert one["rounds"][0]["errors"] == {}
        assert all(one["figures"][key] for key in ("drain", "of_raw", "bulk", "bytes"))
    assert "| raw ceiling |" in (tmp_path / "peers.md").read_text()
    assert ET.parse(tmp_path / "peers.svg").getroot().tag.endswith("svg")
