"""What a workflow is made of: the words of its plan, its record, and who drives it.

The engine is :mod:`orchestra.workflow`, what plans and serves workflows :mod:`orchestra.orchestrator`. Agents and
queues know nothing of what lies here.
"""
