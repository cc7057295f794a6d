"""What agents are given and made of: their context, the planner and the executor, and who makes them by kind.

The registry, and the face of all this, is :mod:`orchestra.agents`. Who calls agents lives elsewhere.
"""
