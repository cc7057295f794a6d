"""The edge to Redis: addresses, hot connections, what replies and servers mean, the life of an embedded server.

Knows no task and no queue. The public side is :mod:`orchestra.connections` and :mod:`orchestra.embedded`; keys and
scripts have one owner each, :mod:`orchestra._keys` and :mod:`orchestra._scripts`.
"""
