-- Writes what was changed by hand in a workflow, if nobody has changed it since it was read.
-- Invariant: a save applies wholly or not at all; a repeat finds its own token and changes nothing.
-- KEYS: 1 record, hash | 2 context and signals, hash | 3 event log, stream | 4 outbox | 5 stream of those that ended
--       6 index by creation | 7 sorted set: ended workflow → when it may be forgotten
-- ARGV: 1 workflow | 2 token and version that were read, "<token>:<version>" | 3 token of this save | 4 ms an ended workflow is
--       kept, 0: for ever | 5 status if the workflow ends by it, else "" | then for the record and for the context: number of
--       fields to write, then pairs, number of fields to remove, then their names
-- Returns: the version afterwards, or 0: somebody else was quicker
-- Complexity: O(fields)
local record, id, mine, ttl, status = KEYS[1], ARGV[1], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local f = redis.call('HMGET', record, 'token', 'version', 'saved')
if f[3] == mine then return tonumber(f[2]) end
if (f[1] or '') .. ':' .. (f[2] or '') ~= ARGV[2] then return 0 end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('HLEN', KEYS[2]) -- these fail before anything is written if a key is of the wrong kind
if status ~= '' then
  redis.call('XLEN', KEYS[3])
  redis.call('XLEN', KEYS[5])
  redis.call('ZCARD', KEYS[7])
end
local at = 6
for k = 1, 2 do
  local last = at + 2 * tonumber(ARGV[at])
  for from = at + 1, last, 2000 do redis.call('HSET', KEYS[k], unpack(ARGV, from, math.min(from + 1999, last))) end
  at = last + 1
  last = at + tonumber(ARGV[at])
  for from = at + 1, last, 2000 do redis.call('HDEL', KEYS[k], unpack(ARGV, from, math.min(from + 1999, last))) end
  at = last + 1
end
local version = tonumber(f[2]) + 1
redis.call('HSET', record, 'version', string.format('%.0f', version), 'saved', mine)
if status ~= '' then
  redis.call('HSET', record, 'ended', string.format('%.0f', now))
  redis.call('XADD', KEYS[3], '*', 'kind', 'workflow.' .. status)
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', 10000, '*', 'id', id, 'status', status)
  if ttl > 0 then
    redis.call('ZADD', KEYS[7], string.format('%.0f', now + ttl), id)
    for k = 1, 3 do redis.call('PEXPIRE', KEYS[k], ttl) end
  end
end
return version
