-- Adds one task to its lane, or answers a repeat with what it added before: produce.lua for a call that somebody waits for.
-- Invariant: one live entry per task id within the window: each of the two scripts keeps the records that the other heeds;
--            a repeat writes something, so that a WAIT behind it covers what it repeats.
-- KEYS: 1 lane stream | 2-3 dedup buckets (own id) or token buckets (generated id) | 4 counters
-- ARGV: 1 window of the buckets ms | 2 lane 0-3 | 3 "id" or "token" | 4 the task's id, or the token | 5 frame
-- Returns: the entry id; "=<message id>" for an id that was seen (counted as a duplicate), the entry id for a token
-- Complexity: O(1)
local time, window, own = redis.call('TIME'), ARGV[1], ARGV[3] == 'id'
-- Two buckets alternate: bucket k serves [k*w, (k+1)*w) and expires at (k+2)*w, when k+2 takes over its key.
local k = math.floor((time[1] * 1000 + time[2] / 1000) / window)
local bucket, before, name = KEYS[2 + k % 2], KEYS[3 - k % 2], ARGV[4]
local known = redis.call('HGET', bucket, name)
if not known then
  known = redis.call('HGET', before, name)
  if known then bucket, k = before, k - 1 end
end
if known and own then
  redis.call('HINCRBY', KEYS[4], 'duplicates', 1)
  return '=' .. known
elseif known then
  redis.call('PEXPIREAT', bucket, (k + 2) * window)
  return string.sub(known, 3, -3)
end

redis.call('HLEN', KEYS[4]) -- what follows the first write must not fail for the type of a key, so this fails here
local id = redis.call('XADD', KEYS[1], '*', 't', ARGV[5])
redis.call('HSET', bucket, name, own and ARGV[2] .. ':' .. id or ARGV[2] .. ' ' .. id .. ' 1')
redis.call('PEXPIREAT', bucket, (k + 2) * window)
redis.call('HINCRBY', KEYS[4], 'produced', 1)
return id
