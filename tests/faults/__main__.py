"""The chaos runner: ``python -m tests.faults --seed N --minutes M``; ``--help`` says the rest."""

from __future__ import annotations

import sys

from tests.faults.chaos.cli import main

if __name__ == "__main__":
    sys.exit(main())
