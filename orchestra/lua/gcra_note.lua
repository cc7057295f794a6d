-- Notes under which name, and with what settings, a rate limit is in use, for display.
--
-- Invariant: the hash holds a bounded number of names. It decides nothing and may be repeated.
-- KEYS: 1  hash: name of a limit -> "T burst rate period", as its limiters were made with
-- ARGV: 1  name of the limit
--       2  what to note
--       3  names the hash may hold, whole, >= 1
--       4  milliseconds after which it is forgotten when nobody notes anything, whole, >= 1
-- Returns: 1, or 0 if there are too many names already
-- Complexity: O(1).

local most, ttl = tonumber(ARGV[3]), tonumber(ARGV[4])
if not (most and ttl and most >= 1 and ttl >= 1) then
  return redis.error_reply('ERR gcra_note: expected a name, a text, names >= 1 and milliseconds >= 1')
end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 and redis.call('HLEN', KEYS[1]) >= most then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
