"""What flow control is made of: rate limits, who waits for them, and the one way to where they are kept.

The public side is :mod:`orchestra.flow_control`. What a worker does with a task that was refused is ``_dispatch``'s.
"""
