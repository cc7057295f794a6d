"""The judge of the chaos runner refuses bad histories: each rule by a minimal one of its own. A good one passes.

Group G of the fault catalogue's invariants (G1 to G7); pure functions, no server.
"""

from __future__ import annotations

import pytest

from tests.faults.chaos import checker, evidence
from tests.faults.chaos.plan import Plan, make_plan
from tests.faults.chaos.run import minimise
from tests.faults.chaos.server import Final

LEASE = 1.0


class Scene:
    """A run written by hand. Times are seconds from its beginning."""

    def __init__(self, *tasks, **settings):
        settings = {"lease": LEASE, "retry_base": 0.2, "zombie_slack": 1.0} | settings
        self.plan = Plan(seed=0, seconds=10.0, **settings)
        self.plan.calls = [{"at": 0.0, "producer": 0, "how": "many", "tasks": [_task(task) for task in tasks]}]
        self.lines = []
        self.final = Final(waiting=[0] * 4, pending=[0] * 4)
        self.numbers = 0

    def line(self, t, actor, op, phase, **facts):
        self.lines.append({"t": t, "actor": actor, "op": op, "phase": phase, **facts})
        return self

    def produced(self, *uids, t=0.0, phase="ok"):
        self.line(t, "p0.1", "produce", "invoke", tasks=list(uids))
        if phase is not None:
            self.line(t + 0.01, "p0.1", "produce", phase, tasks=list(uids))
        return self

    def run(self, uid, start, end, how="ok", *, actor="w0.1", fence=1, attempt=1):
        facts = {"uid": uid, "id": uid, "fence": fence, "attempt": attempt}
        self.line(start, actor, "run", "invoke", **facts)
        if how is not None:
            self.line(end, actor, "run", how, **facts)
        return self

    def fault(self, kind, begin, end, actors, **facts):
        self.numbers += 1
        common = {"number": self.numbers, "kind": kind, "actors": actors, "fault": {"kind": kind, **facts}}
        return self.line(begin, "driver", "fault", "invoke", **common).line(end, "driver", "fault", "ok", **common)

    def counted(self, **counters):
        self.final.counters = counters
        return self

    def recorded(self, uid, outcome, fence=1):
        value = {"uid": uid, "fence": fence} if outcome == "completed" else None
        self.final.records[uid] = {"id": uid, "outcome": outcome, "value": value}
        return self

    def letter(self, uid, reason="failed"):
        self.final.letters.append({"uid": uid, "reason": reason, "attempts": 1, "error": "x"})
        return self

    def gathered(self):
        self.lines.sort(key=lambda line: line["t"])
        return evidence.gather(self.plan, self.lines)

    def violations(self):
        return checker.check(self.gathered(), self.final)

    def rules(self):
        return {violation.rule for violation in self.violations()}


def _task(task):
    given = {"uid": task} if isinstance(task, str) else task
    return {"kind": "quick", "own": True, "want": False} | given


def good():
    """Five tasks, one of each end, and a worker that was killed."""
    tasks = ["a", {"uid": "b", "kind": "flaky", "n": 1}, {"uid": "c", "kind": "doomed"}, {"uid": "d", "kind": "cancel"}]
    scene = Scene(*tasks, "e").produced("a", "b", "c", "d", "e")
    scene.run("a", 0.1, 0.2).recorded("a", "completed")
    scene.run("b", 0.1, 0.2, "fail").run("b", 0.45, 0.5, fence=2, attempt=2)
    scene.run("c", 0.1, 0.2, "fail").letter("c")
    scene.line(0.1, "p0.1", "cancel", "invoke", uid="d").line(0.2, "p0.1", "cancel", "ok", uid="d", result="cancelled")
    scene.recorded("d", "cancelled")
    scene.run("e", 0.3, 0, None, actor="w1.1").fault("worker_kill", 0.4, 0.41, ["w1.1"])
    scene.line(0.42, "driver", "process", "exit", who="w1.1", code=-9)
    scene.run("e", 1.8, 1.9, fence=2)
    scene.line(3.0, "w0.1", "actor", "stop", asked=True)
    scene.line(3.1, "w0.1", "actor", "end", leaked={"tasks": [], "threads": [], "fds": []})
    scene.line(3.2, "driver", "process", "exit", who="w0.1", code=0)
    return scene.counted(produced=5, completed=3, dead=1, cancelled=1, retried=1, reclaimed=1)


def only(uid="a", **facts):
    """One task that was produced and counted as completed."""
    return Scene({"uid": uid, **facts}).produced(uid).counted(produced=1, completed=1)


def test_a_good_history_passes():
    scene = good()
    assert scene.violations() == []
    assert checker.explained(scene.gathered()) == {"worker_kill": 1}


def test_what_is_still_visible_is_not_lost():
    scene = Scene("a").produced("a").counted(produced=1)
    scene.final.visible = ["a"]
    scene.final.waiting = [0, 0, 1, 0]
    assert scene.rules() == {"stuck"}


def test_an_unanswered_produce_may_have_happened_or_not():
    assert Scene("a").produced("a", phase="info").counted().rules() == set()
    assert Scene("a").produced("a", phase=None).counted().rules() == set()
    assert Scene("a").produced("a", phase=None).run("a", 1, 2).counted(produced=1, completed=1).rules() == set()


LOST = {
    "an acknowledged task that nobody ran": lambda: Scene("a").produced("a").counted(produced=1),
    "an execution that never ended, and no second one": lambda: (
        Scene("a").produced("a").run("a", 1, 0, None).counted(produced=1)
    ),
    "a refused produce that exists": lambda: (
        Scene("a").produced("a", phase="fail").run("a", 1, 2).counted(produced=1, completed=1)
    ),
    "a task that Redis itself counted as lost": lambda: only().run("a", 1, 2).counted(produced=1, completed=1, lost=1),
}


@pytest.mark.parametrize("name", LOST)
def test_lost(name):
    """G1: nothing acknowledged is lost."""
    assert "lost" in LOST[name]().rules()


def test_lost_within_the_window_of_everysec_only():
    """B1: with appendfsync everysec a kill may take what was done in the two seconds before it."""
    for fsync, rules in (("always", {"lost"}), ("everysec", set())):
        scene = Scene("a", fsync=fsync).produced("a", t=5.0).fault("redis_kill", 6.0, 6.5, None)
        assert scene.counted(produced=1 if fsync == "always" else 0).rules() == rules
    late = Scene("a", fsync="everysec").produced("a", t=1.0).fault("redis_kill", 6.0, 6.5, None)
    assert late.rules() == {"lost"}


def test_stuck():
    """G4: everything has ended."""
    scene = only().run("a", 1, 2)
    scene.final.quiet = False
    assert scene.rules() == {"stuck"}
    for name, value in (("waiting", [0, 1, 0, 0]), ("pending", [1, 0, 0, 0]), ("delayed", 1)):
        scene = only().run("a", 1, 2)
        setattr(scene.final, name, value)
        assert scene.rules() == {"stuck"}


PHANTOMS = {
    "completed without an execution that ended well": lambda: only().recorded("a", "completed").run("a", 1, 2, "info"),
    "completed under a fence that no execution had": lambda: only().run("a", 1, 2).recorded("a", "completed", fence=7),
    "dead as failed without a failure": lambda: (
        Scene({"uid": "a", "kind": "doomed"}).produced("a").letter("a").counted(produced=1, dead=1)
    ),
    "dead as failed though its agent never fails": lambda: (
        Scene("a").produced("a").run("a", 1, 2, "fail").letter("a").counted(produced=1, dead=1)
    ),
    "dead for a reason that nothing gives": lambda: (
        Scene("a").produced("a").run("a", 1, 2).letter("a", "corrupt").counted(produced=1, dead=1)
    ),
}


@pytest.mark.parametrize("name", PHANTOMS)
def test_phantom(name):
    """G1: a terminal state has its execution."""
    assert "phantom" in PHANTOMS[name]().rules()


def repeated(kind=None, seconds=0.1, actors=("w0.1",), **facts):
    """A task that ran twice, and perhaps a fault between."""
    scene = only().run("a", 1.0, 3.0).run("a", 2.5, 3.5, actor="w1.1", fence=2)
    return scene if kind is None else scene.fault(kind, 1.5, 1.5 + seconds, actors and list(actors), **facts)


@pytest.mark.parametrize(
    ("scene", "rules"),
    [
        (repeated(), {"duplicate"}),
        (repeated("worker_stop", 0.2), {"duplicate"}),  # A6: below the lease
        (repeated("worker_stop", 0.8), set()),  # A5: beyond it
        (repeated("worker_stop", 0.8, ("w2.1",)), {"duplicate"}),  # somebody else's
        (repeated("worker_kill", 0.0), set()),
        (repeated("redis_kill", 0.3, None), {"duplicate"}),  # back within the lease
        (repeated("redis_kill", 0.6, None), set()),
        (repeated("redis_stop", 0.3, None), {"duplicate"}),
        (repeated("script_flush", 0.0, None), {"duplicate"}),  # B15: costs nothing
        (repeated("maxmemory", 2.0, None), {"duplicate"}),  # B8: settling goes on
        (repeated("reset"), {"duplicate"}),  # one renewal may fail
        (repeated("reset").fault("truncated", 1.7, 1.7, ["w0.1"]), set()),  # two may not
        (repeated("reply_lost", how="rst"), {"duplicate"}),
        (repeated("reply_lost", how="stay"), set()),
        (repeated().line(1.9, "w0.1", "starved", "ok", seconds=0.6), set()),  # the machine's own fault
        (repeated().line(1.9, "driver", "starved", "ok", seconds=0.6), set()),  # it carries everybody's traffic
        (repeated().line(1.9, "w0.1", "starved", "ok", seconds=0.2), {"duplicate"}),
        (repeated().line(1.9, "driver", "process", "exit", who="w0.1", code=-11), set()),  # A8: a crash
    ],
)
def test_duplicate(scene, rules):
    """G7: an extra execution needs a fault that overlaps it, hits its owner and is grave enough."""
    assert scene.rules() == rules


def test_a_blocked_loop_excuses_only_what_it_could_not_read():
    """A9: what a worker holds keeps its lease while an agent blocks the loop."""
    for start, rules in ((1.0, {"duplicate"}), (2.05, set())):
        scene = Scene("a", {"uid": "b", "kind": "block"}).produced("a", "b").counted(produced=2, completed=2)
        scene.run("b", 1.2, 2.0).run("a", start, 3.0, "info").run("a", 2.1, 3.5, actor="w1.1", fence=2)
        assert scene.rules() == rules


def test_a_stop_is_not_excused_twice():
    """A6: what being stopped looks like from within is not a second fault."""
    scene = repeated("worker_stop", 0.3).line(1.8, "w0.1", "starved", "ok", seconds=0.3).fault("x", 8, 8, [])
    assert scene.rules() == {"duplicate"}


def test_a_fault_before_or_after_explains_nothing():
    """G7: the fault overlaps."""
    assert only().run("a", 5, 6).run("a", 7, 8, fence=2).fault("worker_kill", 1, 1, ["w0.1"]).rules() == {"duplicate"}
    assert only().run("a", 1, 2).run("a", 3, 4, fence=2).fault("worker_kill", 5, 5, ["w0.1"]).rules() == {"duplicate"}


def test_dead_as_crashed_needs_a_crash():
    """A8: a poison pill is buried by what it did, not by the clock."""
    scene = Scene("a").produced("a").run("a", 1, 2).letter("a", "crashed").counted(produced=1, dead=1)
    assert scene.rules() == {"duplicate"}


TERMINAL = {
    "two dead letters": lambda: (
        Scene({"uid": "a", "kind": "doomed"})
        .produced("a")
        .run("a", 1, 2, "fail")
        .letter("a")
        .letter("a")
        .counted(produced=1, dead=2)
    ),
    "a dead letter of a completed task": lambda: (
        Scene({"uid": "a", "kind": "doomed"})
        .produced("a")
        .run("a", 1, 2, "fail")
        .run("a", 2, 3, attempt=2, fence=2)
        .recorded("a", "completed", 2)
        .letter("a")
        .counted(produced=1, completed=1)
    ),
    "a record of death without a letter": lambda: (
        Scene("a").produced("a").run("a", 1, 2, "fail").recorded("a", "dead").counted(produced=1, dead=1)
    ),
    "counted twice": lambda: only().run("a", 1, 2).counted(produced=1, completed=2),
    "a task that nobody knows of": lambda: only().run("a", 1, 2).counted(produced=2, completed=1),
    "a completed task that was not counted": lambda: only().run("a", 1, 2).counted(produced=1),
    "a cancelled task that was not counted": lambda: (
        Scene("a").produced("a").recorded("a", "cancelled").counted(produced=1, completed=1)
    ),
}


@pytest.mark.parametrize("name", TERMINAL)
def test_terminal(name):
    """G2: one terminal record for a task."""
    assert "terminal" in TERMINAL[name]().rules()


def test_fence():
    """G3: fences are unique and grow, and no settle counts behind a newer one."""
    killed = ("worker_kill", 2.2, 2.3, ["w0.1"])
    again = only().run("a", 1, 2, None).fault(*killed).run("a", 3, 4, actor="w1.1")
    assert again.rules() == {"fence"}
    back = only().run("a", 1, 2, "info", fence=5).fault(*killed).run("a", 3, 4, actor="w1.1", fence=4)
    assert "fence" in back.rules()
    stopped = ("worker_stop", 1.2, 2.8, ["w0.1"])
    late = only().run("a", 1, 3.1).fault(*stopped).run("a", 2.5, 3.5, actor="w1.1", fence=2)
    assert late.recorded("a", "completed", 2).rules() == set()
    assert late.recorded("a", "completed", 1).rules() == {"fence"}


def test_a_destroyed_group_begins_its_fences_anew():
    """B14: XGROUP DESTROY forgets delivery counts."""
    scene = only().run("a", 1, 2, None).run("a", 3, 4, actor="w1.1").fault("group_destroy", 2.5, 2.5, None)
    assert scene.rules() == set()


def test_a_delivery_that_was_read_before_a_stop_may_begin_after_it():
    """A5: until the worker has learnt that its lease is over."""
    scene = only().run("a", 2.0, 3.0, actor="w1.1", fence=2).run("a", 2.9, 3.0, "info", fence=1)
    assert "fence" in scene.rules()
    assert scene.fault("worker_stop", 1.0, 2.9, ["w0.1"]).rules() == set()


@pytest.mark.parametrize(
    ("task", "gap", "rules"),
    [
        ({"kind": "flaky"}, 0.1, {"backoff"}),
        ({"kind": "flaky"}, 0.21, set()),
        ({"kind": "later"}, 0.25, {"backoff"}),
        ({"kind": "later"}, 0.31, set()),
    ],
)
def test_backoff(task, gap, rules):
    """H6: never early."""
    scene = only(**task).run("a", 1, 2, "fail").run("a", 2 + gap, 3, fence=2, attempt=2)
    assert scene.rules() == rules


def test_an_attempt_needs_a_failure():
    """H7: a crash consumes no retry."""
    scene = only().run("a", 1, 0, None).fault("worker_kill", 1.5, 1.5, ["w0.1"]).run("a", 3, 4, fence=2, attempt=2)
    assert scene.rules() == {"backoff"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adds_up", False),
        ("no_ttl", ["orc:{chaos.0}:d:0"]),
        ("consumers", [f"c{n}" for n in range(7)]),
        ("clients", ["orchestra:reader"]),
    ],
)
def test_keyspace(name, value):
    """G4, G6: nothing is left without need, and the counters add up."""
    scene = only().run("a", 1, 2)
    setattr(scene.final, name, value)
    assert scene.rules() == {"keyspace"}


LEAKS = {
    "an asyncio task": {"tasks": ["x"], "threads": [], "fds": []},
    "a thread": {"tasks": [], "threads": ["orchestra-leases"], "fds": []},
    "a descriptor": {"tasks": [], "threads": [], "fds": ["socket:[1]"]},
}


@pytest.mark.parametrize("name", LEAKS)
def test_leak(name):
    """G5: a process that ended well left nothing."""
    scene = only().run("a", 1, 2).line(3, "w0.1", "actor", "end", leaked=LEAKS[name])
    assert scene.line(4, "driver", "process", "exit", who="w0.1", code=0).rules() == {"leak"}


def test_processes_that_end_badly_by_themselves():
    """G5: nor does one vanish, give up, hang or raise."""
    exits = ("driver", "process", "exit")
    assert only().run("a", 1, 2).line(3, *exits, who="w0.1", code=0).rules() == {"leak"}
    assert only().run("a", 1, 2).line(3, *exits, who="w0.1", code=1).rules() == {"leak"}
    assert only().run("a", 1, 2).line(3, "driver", "process", "hang", who="w0.1").rules() == {"leak"}
    assert only().run("a", 1, 2).line(3, "w0.1", "actor", "stop", asked=False).rules() == {"leak"}
    assert only().run("a", 1, 2).line(3, *exits, who="w0.1", code=-9).rules() == set()


def test_stalled():
    """A1, E4: what a killed worker held runs elsewhere in time, where the plan says when."""
    for start, rules in ((3.0, set()), (5.0, {"stalled"})):
        scene = only().run("a", 1, 0, None).fault("worker_kill", 1.5, 1.5, ["w0.1"]).run("a", start, 6, fence=2)
        scene.plan.resume_within = 2.0
        assert scene.rules() == rules
    scene.plan.may_stall = 1  # the last of those above
    assert scene.rules() == set()
    never = Scene("a", resume_within=2.0).produced("a").run("a", 1, 0, None).counted(produced=1)
    assert never.fault("worker_kill", 1.5, 1.5, ["w0.1"]).rules() == {"stalled", "lost"}


def test_zombie():
    """A5: an agent that lost its lease is cancelled soon after."""
    for end, rules in ((5.0, set()), (8.0, {"zombie"})):
        scene = only().run("a", 1, end, "info").fault("worker_stop", 1.2, 2.6, ["w0.1"])
        scene.run("a", 2.5, 8.5, actor="w1.1", fence=2)
        assert scene.rules() == rules


def test_cancelled():
    """A confirmed cancellation is one."""
    scene = Scene("a").produced("a").line(1, "p0.1", "cancel", "ok", uid="a", result="cancelled")
    assert scene.run("a", 2, 3).counted(produced=1, completed=1).rules() == {"cancelled"}
    scene = Scene("a").produced("a").line(1, "p0.1", "cancel", "ok", uid="a", result="requested")
    assert scene.run("a", 2, 3).counted(produced=1, completed=1).rules() == set()


def test_a_seed_gives_one_plan(tmp_path):
    one, two = make_plan(7, 20.0), make_plan(7, 20.0)
    assert one == two
    assert make_plan(8, 20.0) != one
    one.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == one
    assert {fault["kind"] for fault in make_plan(1, 120.0).faults} > {"worker_kill", "redis_kill", "black_hole"}
    assert len(one.tasks()) == sum(len(call["tasks"]) for call in one.calls)


def test_minimising_keeps_what_makes_it_fail():
    plan = Plan(seed=0, seconds=1.0)
    plan.faults = [{"kind": str(n)} for n in range(20)]
    needed = [{"kind": "3"}, {"kind": "14"}]
    least = minimise(plan, lambda p: all(fault in p.faults for fault in needed), lambda line: None)
    assert least.faults == needed
    assert len(plan.faults) == 20
