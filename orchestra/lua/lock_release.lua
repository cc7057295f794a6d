#!lua flags=allow-oom
-- Releases a lock.
-- Invariant: only for the token that holds it.
-- KEYS: 1 lock
-- ARGV: 1 token
-- Returns: 1 when released, 0 when not held by this token
-- Complexity: O(1)
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
