-- Records a new workflow, and forgets a few that have expired.
-- Invariant: a record that is there stays as it is; a repeat of the same call, told by its token, succeeds.
-- KEYS: 1 record, hash | 2 context and signals, hash | 3 event log, stream | 4 outbox | 5 stream of those that ended
--       6 index by creation | 7 sorted set: ended workflow → when it may be forgotten
-- ARGV: 1 workflow | 2 token of this call | 3 ms after which the outbox is to be swept | 4 number of steps that may begin, then
--       their indexes | then number of fields of the record, then pairs | then number of fields of the context, then pairs
-- Returns: when it was made, milliseconds, or 0: there is another record already
-- Complexity: O(fields)
local record, context, events = KEYS[1], KEYS[2], KEYS[3]
local id, token, grace, roots = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if redis.call('EXISTS', record) == 1 then
  local made = redis.call('HMGET', record, 'token', 'created')
  return made[1] == token and tonumber(made[2]) or 0
end
local function write(key, at)
  local last = at + 2 * tonumber(ARGV[at])
  for from = at + 1, last, 2000 do redis.call('HSET', key, unpack(ARGV, from, math.min(from + 1999, last))) end
  return last + 1
end
local at = 5 + roots
for k = 4, 7 do
  if k ~= 5 then redis.call('ZCARD', KEYS[k]) end -- fails before anything is written if it is no sorted set
end
at = write(record, at)
redis.call('DEL', context, events)
write(context, at)
redis.call('HSET', record, 'token', token, 'created', string.format('%.0f', now))
redis.call('XADD', events, '*', 'kind', 'workflow.started')
for k = 5, 4 + roots do
  redis.call('XADD', events, '*', 'kind', 'step.ready', 'step', ARGV[k])
  redis.call('ZADD', KEYS[4], string.format('%.0f', now + grace), id .. '|' .. ARGV[k] .. '|1')
end
redis.call('ZADD', KEYS[6], string.format('%.0f', now), id)
redis.call('ZREM', KEYS[7], id)
local old = redis.call('ZRANGEBYSCORE', KEYS[7], '-inf', now, 'LIMIT', 0, 4)
if #old > 0 then
  redis.call('ZREM', KEYS[6], unpack(old))
  redis.call('ZREM', KEYS[7], unpack(old))
end
return now
