-- Notes that a name of a scope of memory is about to be written, so that names can be listed without a scan.
-- Invariant: a name is noted before it is written, and so every value and log of the scope is listed; the list expires
--     with the longest-lived of them. Repeating the call changes nothing but the time noted.
-- KEYS: 1  sorted set, the names
-- ARGV: 1  the name
--       2  time to live of what is written, milliseconds; 0: none
-- Returns: 1
-- Complexity: O(log(names))
local key, ttl = KEYS[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local known = redis.call('PTTL', key) -- -2: no list yet, -1: it lives for ever

redis.call('ZADD', key, time[1] * 1000000 + time[2], ARGV[1])
if ttl == 0 then
  redis.call('PERSIST', key)
elseif known ~= -1 and ttl + 60000 > known then
  redis.call('PEXPIRE', key, ttl + 60000) -- a minute: the write itself comes later
end
return 1
