"""Obvious pure-Python models: the oracles of the compiled modules. Slow on purpose, never shipped."""
