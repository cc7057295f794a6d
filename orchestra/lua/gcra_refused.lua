-- Counts how many requests a rate limit has refused, in windows of ten seconds, for display.
--
-- Invariant: the hash holds a bounded number of names, and this window and the one before. It decides nothing; said twice
--            after a lost reply, it counts twice.
-- KEYS: 1  hash: name of a limit -> "number of the window, refused in it, refused in the one before"
-- ARGV: 1  name of the limit
--       2  refused since the last time, whole, >= 1
--       3  names the hash may hold, whole, >= 1
-- Returns: 1, or 0 if there are too many names already
-- Complexity: O(1).

local count, most = tonumber(ARGV[2]), tonumber(ARGV[3])
if not (count and most and count >= 1 and most >= 1) then
  return redis.error_reply('ERR gcra_refused: expected a name, a count >= 1 and names >= 1')
end
local window = math.floor(redis.call('TIME')[1] / 10)
local known = redis.call('HGET', KEYS[1], ARGV[1])
if not known and redis.call('HLEN', KEYS[1]) >= most then return 0 end
local there, here, before = string.match(known or '', '^(%d+) (%d+) (%d+)$')
local age = window - (tonumber(there) or 0)
if age == 0 then
  here = here + count
else
  here, before = count, age == 1 and here or 0
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f %.0f %.0f', window, here, before))
redis.call('EXPIRE', KEYS[1], 60)
return 1
