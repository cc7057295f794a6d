"""What the dispatcher is made of: admission, isolation, retries and settling around the run of each delivery.

The dispatcher is :mod:`orchestra.dispatcher`, the run of one delivery :mod:`orchestra._execution`; queues and limits
are used here, not made.
"""
