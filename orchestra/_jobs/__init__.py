"""``orchestra run``: every task of a source through a queue into a file, each exactly once.

What is shown of it is the command's (``orchestra/cli/run.py``); how a task is run is the dispatcher's.
"""
