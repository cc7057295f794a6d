"""The Lua scripts of the protocol on Redis, one file each; loaded by :mod:`orchestra._scripts`."""
