"""One target under atheris, in a process of its own: ``python -m tests.fuzz._one TARGET [libFuzzer's arguments]``."""

from __future__ import annotations

import os
import sys

import atheris  # type: ignore[import-not-found]


def main() -> None:
    name = sys.argv.pop(1)
    sys.argv[0] = os.environ.get("FUZZ_SELF", sys.argv[0])  # what libFuzzer runs again when it merges
    with atheris.instrument_imports(include=["orchestra", "tests.fuzz.targets"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
