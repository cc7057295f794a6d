"""The archives under test: those in ``ORCHESTRA_DIST``, else the installed wheel, else freshly built ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def installed_files() -> list[str] | None:
    """Files of the installed distribution; None when it is installed in editable mode or not at all."""
    try:
        found = metadata.distribution("orchestra-engine")
    except metadata.PackageNotFoundError:
        return None
    url = json.loads(found.read_text("direct_url.json") or "{}")
    if url.get("dir_info", {}).get("editable"):
        return None
    return [str(file) for file in found.files or () if "__pycache__" not in str(file)]


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Path:
    """A folder with one sdist and the wheel that was built from it."""
    if made := os.environ.get("ORCHESTRA_DIST"):
        return Path(made).resolve()
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return out


@pytest.fixture(scope="session")
def wheel_files(request) -> list[str]:
    """Names of the files in the wheel."""
    if "ORCHESTRA_DIST" not in os.environ and (files := installed_files()) is not None:
        return files
    (wheel,) = request.getfixturevalue("dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()
