"""The comparison with other queues: its driver against programs that work, crash, hang and lie, and its report."""

from __future__ import annotations

import base64
import json
import sys
import textwrap
import time
import zlib
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest

from benchmarks import _beside
from benchmarks._server import Server
from benchmarks.peers import __main__ as command
from benchmarks.peers import chart, drive, environments, report, verify
from benchmarks.peers import turn as turns
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.drive import Contender, WorkloadError
from tests.processes import run_module

FAKE = Peer(name="fake", program="with_fake", tasks=1_000, sleeps=50, own=True)
SIZES = replace(command.QUICK, single=20, samples=5, limit=20.0)
PROGRAM = """
import contextlib, os, sys, time, zlib
from concurrent.futures import ThreadPoolExecutor
import redis
import shared

PACKAGES, UVLOOP, BACKLOG = ["redis"], False, [["LLEN", "fake"]]
SETTINGS = {"chunk": 100, "sleep": {"wide": True}}
MODE = os.environ["FAKE_MODE"]
client, later = redis.Redis(port=shared.PORT), ThreadPoolExecutor(1)


@contextlib.contextmanager
def producer():
    def send(item):
        text = zlib.compress(str(item).encode()) if MODE == "wraps" else item["id"] if MODE == "lies" else str(item)
        if MODE == "careful" and not client.sadd("known", item["id"]):
            return
        key = "other" if MODE == "elsewhere" else "fake"
        later.submit(client.rpush, key, text) if MODE == "hurries" else client.rpush(key, text)

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
        keeps = MODE == "careful" and client.lindex("fake", 0)
        if keeps or client.blpop("fake", 1):
            act = shared.plain_agent if shared.WORKLOAD in ("latency", "hold") else lambda _: shared.PROGRESS.end()
            act(None)
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
    return turns.Turn(contender, SIZES, workloads).run()


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
    found = turns.Turn(fake("works"), replace(SIZES, turn=-1.0), ["single", "drain"]).run()
    assert all(text.startswith("not run: the turn took longer") for text in found["errors"].values())
    assert set(found["errors"]) == {"single", "drain"}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("works", {"single": True, "bulk": True, "carries": True, "deduplicates": False, "kept": False}),
        ("careful", {"single": True, "bulk": True, "carries": True, "deduplicates": True, "kept": True}),
        ("wraps", {"single": True, "bulk": True, "carries": True, "deduplicates": False, "kept": False}),
        ("lies", {"single": True, "bulk": True, "carries": False, "deduplicates": None, "kept": False}),
        ("hurries", {"single": False, "bulk": False, "carries": True, "deduplicates": False, "kept": False}),
    ],
)
def test_what_a_queue_really_does_is_observed(fake, server, mode, expected):
    assert verify.verify(fake(mode)) == expected
    assert server.raw.ask("PING") == b"PONG", "the server goes on"


def test_observation_that_fails_is_told(fake, server):
    found = verify.verify(fake("crashes"))
    assert found["kept"] is None
    assert "no agent has begun: the worker cannot start" in found["why"]
    assert found["single"] is True, "what could be observed stays"
    assert server.raw.ask("DBSIZE") == 0


def test_payload_is_found_in_whatever_wraps_it(server):
    numbers = ",".join(str(byte) for byte in b"x" * 60 + verify.MARK)
    server.flush()
    server.raw.ask("SET", "json", f'{{"payload":[{numbers}]}}')
    server.raw.ask("LPUSH", "base64", b'{"body": "' + base64.b64encode(b"x" * 31 + verify.MARK + b"y") + b'"}')
    server.raw.ask("XADD", "stream", "*", "zlib", zlib.compress(verify.MARK * 2))
    server.raw.ask("ZADD", "plain", 1, verify.MARK)
    assert verify.bodies(server) == 5


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


def row(name, own=False, reason=None, rounds=(), **observed):
    found = {**command.row(replace(FAKE, name=name, own=own)), "reason": reason, "rounds": list(rounds)}
    found["observed"] = observed
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
    assert "no-op drain, tasks/s: orchestra 10.0 × the best peer (slow & small, 50)" in leads
    assert "Redis bytes a task: orchestra 2.0 × the best peer that deduplicates (careful, 600)" in leads
    assert "send → start p50, µs: orchestra 4.0 ×" in leads


def test_figure_that_was_not_confirmed_is_shown_and_not_compared(result):
    bulk = [{"raw": {"drain": 1.0}, "bulk": value, "errors": {}} for value in (9_000.0,)]
    result["peers"] += [
        row("hasty", rounds=bulk, bulk=False),
        row("honest", rounds=[{**bulk[0], "bulk": 25.0}], bulk=True),
    ]
    text = report.markdown(result)
    assert "| 9,000 † |" in next(line for line in text.splitlines() if line.startswith("| hasty "))
    assert "- bulk enqueue, tasks/s: orchestra 2.0 × the best peer (honest, 25)" in text
    assert "9,000 †" in chart.svg(result)


def test_chart_is_xml_with_a_bar_for_each_queue(result):
    tree = ET.fromstring(chart.svg(result))
    bars = [node.get("class") for node in tree.iter("{http://www.w3.org/2000/svg}rect")]
    assert bars == ["c", "o", "p", "p", "o", "o", "p", "p"], "drain of three, bulk of ours alone, latency of three"
    assert "slow & small" in [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_rounds_end_in_time_and_files_name_no_folder_of_this_machine(tmp_path, monkeypatch):
    words = ["--rounds", "4", "--minutes", "0.0001", "--only", "orchestra", "--output", str(tmp_path)]
    options = command.parse([*words, "--environments", str(tmp_path / "envs")])
    failed = {"errors": {"drain": f"File {command.ROOT}/orchestra/x.py, {tmp_path}/envs/bin/python"}}
    monkeypatch.setattr(command, "turn", lambda *_: time.sleep(0.01) or failed)
    found = row("orchestra", own=True)
    result = {"machine": "m", "command": command.command_line(options), "rounds": 0, "quick": False, "peers": [found]}
    command.rounds(result, [(found, SimpleNamespace(peer=FAKE))], options, SIZES)
    assert (result["rounds"], len(found["rounds"])) == (1, 1), "the second would end after 6 ms"
    text = (tmp_path / "peers.json").read_text() + (tmp_path / "peers.md").read_text()
    assert str(tmp_path) not in text
    assert str(command.ROOT) not in text
    assert 'make bench-peers ARGS=\\"--rounds 4 --minutes 0.0001 --only orchestra\\"' in text


@pytest.mark.parametrize(
    ("words", "folder"),
    [([], "results"), (["--rounds", "3"], "results"), (["--quick"], "bench"), (["--only", "ardiq"], "bench")],
)
def test_only_a_whole_run_replaces_what_is_committed(words, folder):
    assert command.parse(words).output.name == folder


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
    "arguments",
    [["--workload", "dance"], ["--only", "nobody"], ["--rounds", "0"], ["--rounds", "101"], ["--minutes", "0"]],
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
    run_module("benchmarks.peers", *words)
    found = json.loads((tmp_path / "peers.json").read_text())
    assert [r["name"] for r in found["peers"]] == ["orchestra", "orchestra (generated ids)", "orchestra (App)"]
    for one in found["peers"]:
        assert one["rounds"][0]["errors"] == {}
        assert all(one["figures"][key] for key in ("drain", "of_raw", "bulk", "bytes"))
    assert "| raw ceiling |" in (tmp_path / "peers.md").read_text()
    assert ET.parse(tmp_path / "peers.svg").getroot().tag.endswith("svg")
