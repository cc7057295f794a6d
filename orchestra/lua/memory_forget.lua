-- Drops names from the list of what a scope of memory holds, unless they were written again meanwhile.
-- Invariant: a name that was noted after the caller looked stays. Repeating the call changes nothing.
-- KEYS: 1  sorted set, the names
-- ARGV: pairs of a name and its score when the caller looked, microseconds of the Redis clock
-- Returns: how many were dropped
-- Complexity: O(names given * log(names))
local dropped = 0
for i = 1, #ARGV, 2 do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if score and tonumber(score) == tonumber(ARGV[i + 1]) then
    dropped = dropped + redis.call('ZREM', KEYS[1], ARGV[i])
  end
end
return dropped
