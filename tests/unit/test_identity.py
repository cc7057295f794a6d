"""Who may be called dead: only a process of this machine that has certainly ended."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from orchestra import _identity
from orchestra.tasks import check_name

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="death can only be proven on Linux")


@pytest.fixture
def child():
    """A process that waits; reaped after the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()


def name_of(pid, start=None, machine=None):
    return f"{machine or _identity.machine()}.{pid}.{start or _identity.start_time(pid)}.abcd"


def test_names_are_new_each_time_and_fit_into_keys():
    names = {_identity.consumer_name() for _ in range(100)}
    assert len(names) == 100
    assert all(check_name("consumer_name", name) for name in names)


def test_this_process_and_others_that_run_are_not_dead(child):
    assert not _identity.is_dead(_identity.consumer_name())
    assert not _identity.is_dead(name_of(child.pid))


def test_a_process_that_has_ended_is_dead_before_and_after_it_is_reaped(child):
    name = name_of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert _identity.is_dead(name), "a zombie"
    child.wait()
    assert _identity.is_dead(name)


def test_a_reused_pid_does_not_bring_the_dead_back(child):
    assert _identity.is_dead(name_of(child.pid, start="1"))


@pytest.mark.parametrize("name", ["worker-1", "a.b", "a.b.c.d", "host.1.2.3", "..."])
def test_a_name_of_another_kind_is_never_dead(name):
    assert not _identity.is_dead(name)


def test_a_process_of_another_machine_is_never_dead():
    assert not _identity.is_dead(name_of(2**22 - 1, start="1", machine="00000000"))


def test_a_process_that_proc_hides_is_not_dead_while_it_exists(child, monkeypatch):
    def refuse(pid, sig):
        raise PermissionError(pid)

    name = name_of(child.pid)
    monkeypatch.setattr(_identity, "start_time", lambda pid: None)
    assert not _identity.is_dead(name)
    monkeypatch.setattr(os, "kill", refuse)
    assert not _identity.is_dead(name), "it belongs to another user"
    monkeypatch.undo()
    child.kill()
    child.wait()
    monkeypatch.setattr(_identity, "start_time", lambda pid: None)
    assert _identity.is_dead(name)


def test_nothing_is_dead_where_the_machine_is_unknown(monkeypatch):
    monkeypatch.setattr(_identity, "machine", str)
    assert not _identity.is_dead(".999999.1.abcd")
