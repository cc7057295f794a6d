"""What a task queue is made of: its contract, the parts of the one on Redis Streams, and those of its twin in memory.

``twin_*`` belong to :mod:`orchestra.memory_queue`, all others to :mod:`orchestra.task_queue`. Connections are
``_redis``'s; what runs a delivery is ``_dispatch``'s.
"""
