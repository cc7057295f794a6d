"""The source archive holds what the repository holds, and nothing that was built."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = (".github/", ".gitignore")
GENERATED = ("PKG-INFO", "setup.cfg")


@pytest.fixture(scope="module")
def sdist_files(dist) -> set[str]:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}


def repository_files() -> set[str]:
    """What git tracks or would track; without git, what MANIFEST.in grafts."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0 and (ROOT / ".git").exists():
        return {name for name in listing.stdout.splitlines() if (ROOT / name).exists()}
    folders = ("_ext", "orchestra", "tests", "benchmarks", "examples", "docs")
    kinds = {".py", ".pyx", ".pxi", ".pyi", ".lua", ".md"}
    return {
        file.relative_to(ROOT).as_posix()
        for folder in folders
        for file in (ROOT / folder).rglob("*")
        if file.suffix in kinds
    }


def test_sdist_is_the_repository(sdist_files):
    repository = {name for name in repository_files() if not name.startswith(NOT_SHIPPED)}
    shipped = {name for name in sdist_files if name not in GENERATED and ".egg-info/" not in name}
    assert repository - shipped == set()
    if (ROOT / ".git").exists():
        assert shipped - repository == set()


def test_sdist_holds_nothing_built(sdist_files):
    built = [name for name in sdist_files if name.endswith((".so", ".pyd", ".html", ".pyc"))]
    built += [name for name in sdist_files if name.startswith("_ext/") and name.endswith(".c")]
    assert built == []
    assert {f"_ext/{name}.pyx" for name in ("heap", "gcra", "wrr", "codec")} <= sdist_files
