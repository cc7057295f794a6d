-- Appends one entry to a bounded log, at a position that the caller may insist on.
-- Invariant: entries are never changed or dropped. With a position, repeating the call after a lost reply changes nothing,
--     because the entry is found where it belongs; without one, a repeat appends again.
-- KEYS: 1  list, the log
-- ARGV: 1  the entry
--       2  position the entry must get, from 0; -1: the end, wherever that is
--       3  most entries the log may hold
--       4  time to live, milliseconds; 0: none
-- Returns: {1, length} the entry is in the log; {0, length} another entry has that position, or the log does not reach
--     it; {-1, length} the log is full. Only the first changes anything
-- Complexity: O(1); O(length) when repeated at a position far from both ends
local key, entry, at = KEYS[1], ARGV[1], tonumber(ARGV[2])
local limit, ttl = tonumber(ARGV[3]), tonumber(ARGV[4])
local length = redis.call('LLEN', key)

if at >= 0 and at ~= length then
  if at < length and redis.call('LINDEX', key, at) == entry then
    return {1, length}
  end
  return {0, length}
end
if length >= limit then
  return {-1, length}
end

redis.call('RPUSH', key, entry)
if ttl > 0 then
  redis.call('PEXPIRE', key, ttl)
else
  redis.call('PERSIST', key)
end
return {1, length + 1}
