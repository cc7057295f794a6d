"""``python -m tests.fuzz [TARGET …] [--minutes M]``: search for inputs that break a target, under sanitizers.

Builds the package with clang (coverage, AddressSanitizer, UndefinedBehaviorSanitizer) and installs atheris, all in
``build/fuzz``; then runs each target for M minutes, one after the other. What breaks a target is added to
``tests/fuzz/corpus``, and the exit status is 1. ``--keep N`` also adds up to N inputs that reached new code.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from tests.fuzz import corpus

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
PYTHON = BUILD / "venv" / "bin" / "python"
NEEDS = (
    "atheris>=3",
    "setuptools>=80",
    "cython>=3.2,<4",
    "redis>=6.2,<9",
    "hiredis>=3.2,<4",
    "numpy>=1.26",
    "hypothesis",
)
NAMES = ("unpack", "frame", "entry", "encode", "replies", "deliveries")
LIMITS = ("-max_len=4096", "-timeout=20", "-rss_limit_mb=3000")
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_abort=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "PYTHONMALLOC": "malloc",  # else an overflow inside a pool of small objects is nobody's business
}


def clang() -> str:
    """The C compiler: ``CC``, or the newest clang on PATH."""
    names = ["clang", *(f"clang-{n}" for n in range(30, 13, -1))]
    found = next((path for name in names if (path := shutil.which(name))), None)
    compiler = os.environ.get("CC") or found
    if compiler is None:
        sys.exit("fuzzing needs clang (with libclang-rt) for its coverage and sanitizers; none is on PATH")
    return compiler


def prepare() -> None:
    """An environment with atheris, and the package as it is now."""
    if not PYTHON.exists():
        venv.create(BUILD / "venv", with_pip=True)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if subprocess.run([str(PYTHON), "-c", "import atheris, hypothesis, hiredis, numpy"], check=False).returncode:
        subprocess.run([*pip, *NEEDS], check=True)
    shutil.rmtree(BUILD / "lib", ignore_errors=True)
    compiler = clang()
    env = {
        **os.environ,
        "ORCHESTRA_SANITIZE": "1",
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared",
        "CFLAGS": "-fsanitize=fuzzer-no-link",
    }
    base, lib = str(BUILD / "tmp"), str(BUILD / "lib")
    command = [str(PYTHON), "setup.py", "-q", "build", "--build-base", base, "--build-lib", lib]
    subprocess.run(command, cwd=ROOT, env=env, check=True)


def environment(name: str) -> dict[str, str]:
    """That of the sanitizers: their runtime first, the package as built for it."""
    where = subprocess.run(
        [str(PYTHON), "-c", "import atheris; print(atheris.path())"], capture_output=True, text=True, check=True
    )
    preload = Path(where.stdout.strip()) / "asan_with_fuzzer.so"
    path = os.pathsep.join((str(BUILD / "lib"), str(ROOT)))
    return {
        **os.environ,
        **SANITIZERS,
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "LD_PRELOAD": str(preload),
        "FUZZ_SELF": str(BUILD / f"{name}.sh"),
    }


def command(name: str) -> list[str]:
    """How to run a target; as a script of its own, because libFuzzer runs its first argument again when it merges."""
    script = BUILD / f"{name}.sh"
    script.write_text(f'#!/bin/sh\nexec "{PYTHON}" -m tests.fuzz._one {name} "$@"\n')
    script.chmod(0o755)
    return [str(script), *LIMITS]


def fuzz(name: str, minutes: float) -> bool:
    """Run one target; whether it held. What breaks it is kept in the corpus."""
    seeds, grown, found = folders(name)
    shutil.rmtree(found)
    found.mkdir()
    for number, data in enumerate(corpus.load(name)):
        (seeds / f"{number:05d}").write_bytes(data)
    options = [f"-max_total_time={round(minutes * 60)}", "-print_final_stats=1", f"-artifact_prefix={found}{os.sep}"]
    done = subprocess.run(
        [*command(name), *options, str(grown), str(seeds)],
        env=environment(name),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    log = BUILD / f"{name}.log"
    log.write_text(done.stderr)
    runs = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
    features = re.findall(r"ft: (\d+)", done.stderr)
    verdict = "held" if done.returncode == 0 else f"BROKEN, see {log}"
    print(f"{name:<12} {runs[1] if runs else '?':>12} runs {features[-1] if features else '?':>8} features  {verdict}")
    corpus.add(name, [file.read_bytes() for file in sorted(found.iterdir())], "found")
    return done.returncode == 0


def keep(name: str, most: int) -> None:
    """Add up to ``most`` of the inputs that reach new code to the corpus, the shortest first."""
    seeds, grown, _ = folders(name)
    small = BUILD / "merged" / name
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir(parents=True)
    merge = [*command(name), "-merge=1", str(small), str(seeds), str(grown)]
    subprocess.run(merge, env=environment(name), stderr=subprocess.DEVNULL, check=False)
    chosen = sorted((file.read_bytes() for file in small.iterdir()), key=lambda data: (len(data), data))
    print(f"{name:<12} {corpus.add(name, chosen[:most])} inputs kept")


def folders(name: str) -> list[Path]:
    """Where the kept, the grown and the breaking inputs of a target lie."""
    made = [BUILD / kind / name for kind in ("seeds", "grown", "found")]
    for folder in made:
        folder.mkdir(parents=True, exist_ok=True)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(NAMES)}; all by default")
    parser.add_argument("--minutes", type=float, default=3.0, help="for each target; 0: none")
    parser.add_argument("--keep", type=int, default=0, metavar="N", help="add up to N inputs a target to the corpus")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(NAMES):
        parser.error(f"unknown target {unknown.pop()!r}; targets are {', '.join(NAMES)}")
    prepare()
    held = True
    for name in given.targets or NAMES:
        held &= given.minutes <= 0 or fuzz(name, given.minutes)
        if given.keep:
            keep(name, given.keep)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
