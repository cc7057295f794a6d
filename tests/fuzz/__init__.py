"""Coverage-guided fuzzing of what reads bytes from outside: the codec and the replies of Redis.

``targets`` hold what must be true of any input, and run without a fuzzer too: ``tests/ext/test_corpus.py`` replays the
inputs under ``corpus/``. ``python -m tests.fuzz`` searches for new ones, with the extensions built for it.
"""
