"""What the owner of a process decides: its event loop, and what its collector looks at."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap

import pytest

from orchestra import _process
from orchestra.errors import ConfigurationError


async def kind_of_loop() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


@pytest.fixture
def installed(monkeypatch):
    """Say whether uvloop can be imported."""

    def say(there: bool) -> None:
        if there:
            pytest.importorskip("uvloop")
        else:
            monkeypatch.setitem(sys.modules, "uvloop", None)

    return say


@pytest.mark.parametrize(
    ("name", "there", "kind"),
    [("auto", True, "uvloop"), ("auto", False, "asyncio"), ("asyncio", True, "asyncio"), ("uvloop", True, "uvloop")],
)
def test_the_loop_of_a_command(installed, name, there, kind):
    installed(there)
    assert _process.run(kind_of_loop(), name) == kind


@pytest.mark.parametrize(("name", "words"), [("uvloop", "orchestra-engine[uvloop]"), ("trio", "auto, asyncio, uvloop")])
def test_a_loop_that_cannot_be_had(installed, name, words):
    installed(False)
    main = kind_of_loop()
    with pytest.raises(ConfigurationError) as refused:
        _process.run(main, name)
    assert words in str(refused.value)
    assert (refused.value.field, refused.value.value) == ("--loop", name)
    assert main.cr_frame is None, "closed: nobody is warned that it was never awaited"


def test_what_is_alive_is_looked_at_no_more():
    program = """
        import gc
        from orchestra import _process

        class Node:
            pass

        thresholds, enabled = gc.get_threshold(), gc.isenabled()
        loop = Node()
        loop.itself = loop
        dead = [Node()]
        dead.append(dead)
        del dead
        _process.set_heap_aside()
        assert gc.get_freeze_count() > 1000
        assert not [thing for thing in gc.get_objects() if thing is loop]
        assert (gc.get_threshold(), gc.isenabled()) == (thresholds, enabled)
        fresh = [Node()]
        fresh.append(fresh)
        del fresh
        assert gc.collect() >= 2, "what came later is collected as ever"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_orchestra_leaves_both_alone():
    program = """
        import asyncio, gc, sys
        before = gc.get_threshold(), gc.isenabled(), gc.get_freeze_count(), type(asyncio.get_event_loop_policy())
        import orchestra
        assert before == (gc.get_threshold(), gc.isenabled(), gc.get_freeze_count(), type(asyncio.get_event_loop_policy()))
        assert "uvloop" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert gc.isenabled()
