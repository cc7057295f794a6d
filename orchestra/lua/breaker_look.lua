-- Looks at the shared circuit breakers of a process, and at the resets asked for, in one command.
-- Invariant: writes nothing; a key that cannot be read hides none of the others.
-- KEYS: 1 hash of the resets of a queue | 2… hash per breaker
-- ARGV: none
-- Returns: {Redis clock ms, {breaker, ms, …} of the resets, then per breaker {state, era, until, forced} or its error}
-- Complexity: O(breakers + resets)
local now = redis.call('TIME')
local resets = redis.pcall('HGETALL', KEYS[1])
local out = {now[1] * 1000 + math.floor(now[2] / 1000), resets.err and {} or resets}
for i = 2, #KEYS do
  local row = redis.pcall('HMGET', KEYS[i], 'state', 'era', 'until', 'forced')
  for field = 1, row.err and 0 or 4 do row[field] = row[field] or '' end
  out[i + 1] = row.err or row
end
return out
