-- Acquires a lock, or confirms that this token holds it already.
-- Invariant: fences of one lock only grow, also when its keys were deleted or lost, as long as the clock does not go back;
--            asking again after a lost reply gives the same fence.
-- KEYS: 1 lock, "<token>:<fence>" | 2 last fence
-- ARGV: 1 token | 2 time to live ms
-- Returns: {fence, 0} when held by this token, else {0, milliseconds until it may be free}
-- Complexity: O(1)
local holder, last = redis.call('GET', KEYS[1]), tonumber(redis.call('GET', KEYS[2])) or 0
if holder then
  local token, fence = string.match(holder, '^(.*):(%d+)$')
  if token ~= ARGV[1] then return {0, math.max(1, redis.call('PTTL', KEYS[1]))} end
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return {tonumber(fence), 0}
end
-- Microseconds of the clock, or one more than the last fence: whichever is more.
local time = redis.call('TIME')
local fence = string.format('%.0f', math.max(last + 1, time[1] * 1000000 + time[2]))
redis.call('SET', KEYS[2], fence, 'PX', 30 * 86400000)
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. fence, 'PX', ARGV[2])
return {tonumber(fence), 0}
