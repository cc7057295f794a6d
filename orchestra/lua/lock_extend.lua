#!lua flags=allow-oom
-- Prolongs a lock.
-- Invariant: only for the token that holds it.
-- KEYS: 1 lock, "<token>:<fence>"
-- ARGV: 1 token | 2 time to live ms
-- Returns: 1 when prolonged, 0 when not held by this token
-- Complexity: O(1)
local holder = redis.call('GET', KEYS[1])
if not holder or string.match(holder, '^(.*):%d+$') ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
