"""What circuit breakers are made of: when one opens, and how processes share its state.

The breaker itself, with its transitions, is :mod:`orchestra.circuit_breaker`.
"""
