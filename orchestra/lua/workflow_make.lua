-- Records a new workflow, and forgets a few that have expired.
-- Invariant: a record that is there stays as it is, but for one that the call names and nobody has changed since it was
--     read; a repeat of the same call, told by its token, succeeds.
-- KEYS: 1 record, hash | 2 context and signals, hash | 3 event log, stream | 4 outbox | 5 stream of those that ended
--       6 index by creation | 7 sorted set: ended workflow → when it may be forgotten
-- ARGV: 1 workflow | 2 token of this call | 3 ms after which the outbox is to be swept | 4 token and version of the record that
--       it takes the place of, "<token>:<version>", or "" | 5 number of steps that may begin, then their indexes | then number of fields of the record, then pairs | then number of fields of the context, then pairs
--       A record that runs was being planned: when it began, its context, signals (with the tokens of their calls) and events stay.
-- Returns: when it was made, milliseconds, or 0: there is another record already
-- Complexity: O(fields)
local record, context, events = KEYS[1], KEYS[2], KEYS[3]
local id, token, grace, roots = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[5])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local created, stale, planned = now, redis.call('HKEYS', record), false
if #stale > 0 then
  local made = redis.call('HMGET', record, 'token', 'created', 'version', 'status')
  if made[1] == token then return tonumber(made[2]) end
  if ARGV[4] == '' or (made[1] or '') .. ':' .. (made[3] or '') ~= ARGV[4] then return 0 end
  planned = made[4] == 'running'
  if planned then
    created = tonumber(made[2])
    redis.call('HLEN', context) -- these fail before anything is written if a key is of the wrong kind
    redis.call('XLEN', events)
  end
end
local function write(key, at)
  local last = at + 2 * tonumber(ARGV[at])
  for from = at + 1, last, 2000 do redis.call('HSET', key, unpack(ARGV, from, math.min(from + 1999, last))) end
  return last + 1
end
local at = 6 + roots
for k = 4, 7 do
  if k ~= 5 then redis.call('ZCARD', KEYS[k]) end -- fails before anything is written if it is no sorted set
end
local kept = {token = true, created = true}
for k = 1, 2 * tonumber(ARGV[at]), 2 do kept[ARGV[at + k]] = true end
at = write(record, at)
for _, field in ipairs(stale) do
  if not kept[field] and not (planned and string.sub(field, 1, 2) == 'b:') then redis.call('HDEL', record, field) end
end
if not planned then redis.call('DEL', context, events) end
write(context, at)
redis.call('HSET', record, 'token', token, 'created', string.format('%.0f', created))
if #stale > 0 then
  redis.call('PERSIST', record)
  redis.call('ZREM', KEYS[4], id .. '|-1|1')
end
redis.call('XADD', events, '*', 'kind', planned and 'workflow.planned' or 'workflow.started')
for k = 6, 5 + roots do
  redis.call('XADD', events, '*', 'kind', 'step.ready', 'step', ARGV[k])
  redis.call('ZADD', KEYS[4], string.format('%.0f', now + grace), id .. '|' .. ARGV[k] .. '|1')
end
redis.call('ZADD', KEYS[6], string.format('%.0f', created), id)
redis.call('ZREM', KEYS[7], id)
local old = redis.call('ZRANGEBYSCORE', KEYS[7], '-inf', now, 'LIMIT', 0, 4)
if #old > 0 then
  redis.call('ZREM', KEYS[6], unpack(old))
  redis.call('ZREM', KEYS[7], unpack(old))
end
return created
