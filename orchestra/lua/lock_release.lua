#!lua flags=allow-oom
-- Releases a lock.
-- Invariant: only for the token that holds it.
-- KEYS: 1 lock, "<token>:<fence>"
-- ARGV: 1 token
-- Returns: 1 when released, 0 when not held by this token
-- Complexity: O(1)
local holder = redis.call('GET', KEYS[1])
if not holder or string.match(holder, '^(.*):%d+$') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
