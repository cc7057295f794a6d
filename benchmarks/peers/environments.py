"""A virtual environment (or a folder of Node packages) for each peer, kept between runs.

Owns ``FOLDER/<program>`` and its stamp. Refuses to own what is measured. An environment is made again when the peer's
requirements or its Python have changed, or with ``fresh``; versions are the newest that the requirements allow.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.catalogue import Peer

PROGRAMS = Path(__file__).parent / "programs"
INSTALL_SECONDS = 600
_ASK = "import sys; print(sys.executable, *sys.version_info[:2])"


class UnavailableError(Exception):
    """A peer cannot be run here; the text says why."""


@functools.cache
def find_python(minimum: tuple[int, int]) -> str:
    """A Python of at least ``minimum`` that can make environments: this one, else one on PATH or of pyenv."""
    if sys.version_info[:2] >= minimum:
        return sys.executable
    names = [f"python3.{minor}" for minor in (13, 12, 14) if (3, minor) >= minimum]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (*names, *(str(path) for path in sorted(versions.glob("3.*/bin/python"), reverse=True))):
        try:
            done = subprocess.run([candidate, "-c", _ASK], capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            continue
        path, major, minor = done.stdout.split()
        if (int(major), int(minor)) >= minimum:
            return path
    raise UnavailableError(f"needs Python {minimum[0]}.{minimum[1]}, and none is found")


def prepare(peer: Peer, folder: Path, *, fresh: bool = False) -> tuple[list[str], Path]:
    """The command that a role is appended to, and the folder to start it in; installs what is missing.

    Raises:
        UnavailableError: no such Python or Node, or the installation failed.
    """
    if peer.own:
        return [sys.executable, str(PROGRAMS / "shared.py"), peer.program], PROGRAMS
    home = folder / peer.program
    python = "node" if peer.node else find_python(peer.minimum)
    stamp = json.dumps([python, *peer.requirements])
    if fresh or not (home / "stamp").exists() or (home / "stamp").read_text() != stamp:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        _install(peer, home, python)
        (home / "stamp").write_text(stamp)
    if peer.node:
        return ["node", str(PROGRAMS / f"{peer.program}.mjs")], home
    return [str(home / "bin" / "python"), str(PROGRAMS / "shared.py"), peer.program], PROGRAMS


def _install(peer: Peer, home: Path, python: str) -> None:
    if peer.node:
        if shutil.which("node") is None or shutil.which("npm") is None:
            raise UnavailableError("needs node and npm, which are not here")
        (home / "package.json").write_text('{"private": true}\n')
        _run(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *peer.requirements], home)
        return
    _run([python, "-m", "venv", str(home)], home)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run([*pip, *peer.requirements], home)


def _run(command: list[str], cwd: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"installation: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.startswith(("ERROR", "npm error", "Error"))]
        raise UnavailableError(f"installation: {(lines or done.stderr.strip().splitlines() or ['failed'])[-1][:300]}")
