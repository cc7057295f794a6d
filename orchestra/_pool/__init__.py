"""What worker pools are made of: executors, the jobs that wait, numbers, and how many workers a load needs.

The public side is :mod:`orchestra.orchestration_worker_pool` and :mod:`orchestra.worker_manager`. Knows no queue.
"""
