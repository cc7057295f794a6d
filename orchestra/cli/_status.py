"""The exit statuses of every command. Part of the contract with scripts: they never change their meaning."""

from __future__ import annotations

OK = 0
FAILURE = 1
USAGE = 2
"""Wrong usage or configuration: trying again cannot help."""
DEAD = 3
"""The command did its work, and there are dead tasks or findings."""
INTERRUPTED = 130
