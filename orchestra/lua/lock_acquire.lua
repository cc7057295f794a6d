-- Acquires a lock, or confirms that this token holds it already.
-- Invariant: fences of one lock only grow; asking again after a lost reply gives the same fence.
-- KEYS: 1 lock | 2 fence counter (kept for ever: fences must not restart)
-- ARGV: 1 token | 2 time to live ms
-- Returns: {fence, 0} when held by this token, else {0, milliseconds until it may be free}
-- Complexity: O(1)
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return {tonumber(redis.call('GET', KEYS[2])), 0}
end
if holder then return {0, math.max(1, redis.call('PTTL', KEYS[1]))} end
local fence = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {fence, 0}
