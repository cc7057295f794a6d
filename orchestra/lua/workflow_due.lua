#!lua flags=allow-oom
-- Hands out what the outbox is to be swept for, and puts it off, so that one sweep at a time has it.
-- Invariant: no member leaves the outbox here; a lost reply costs the time by which it was put off.
-- KEYS: 1 outbox
-- ARGV: 1 how many at most | 2 ms by which they are put off
-- Returns: the members, most overdue first
-- Complexity: O(members log outbox)
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local members = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, member in ipairs(members) do
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + tonumber(ARGV[2])), member)
end
return members
