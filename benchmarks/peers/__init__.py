"""The same workloads for other Redis-backed queues: ``make bench-peers``; see README.md of this folder's parent."""
