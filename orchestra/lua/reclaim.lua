#!lua flags=allow-oom
-- Takes over deliveries of one stream whose lease has run out.
-- Invariant: bounded work a call; the cursor is kept, so a fresh head never hides a stale tail; no entry vanishes unseen;
--   nothing is taken when Redis stood still, or its clock jumped, since it was asked: idle times mean nothing then.
-- KEYS: 1 stream | 2 counters (cursor:<stream> lives here)
-- ARGV: 1 group | 2 consumer | 3 stream 0-7 | 4 lease ms | 5 pending rows to look at | 6 most to take over
--       7 dead consumer: only what it held, whatever its age ("": anybody's)
--       8 Redis ms at which the caller expects this to run | 9 ms it may be off (0: any)
--       10 suspects: the delivery count of the last hand-over that is allowed | 11 most suspects to take
-- Returns: {{{id, deliveries, fields, former holder, idle ms}, …}, {ids lost}, 0: refused by the clock | 1: all seen |
--          2: there are more rows, number of suspects left alone}; a caller dead-letters what was delivered too often
-- Complexity: O(rows looked at)
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local lease, scan, room = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local field = 'cursor:' .. ARGV[3]
redis.call('HLEN', KEYS[2]) -- fails before anything is written if the counters are no hash
local dead, cursor, rows = ARGV[7], nil, nil
if tonumber(ARGV[9]) > 0 then
  local now = redis.call('TIME')
  now = now[1] * 1000 + math.floor(now[2] / 1000)
  if math.abs(now - tonumber(ARGV[8])) > tonumber(ARGV[9]) then return {{}, {}, 0, 0} end
end
if dead == '' then
  cursor = redis.call('HGET', KEYS[2], field)
  rows = redis.call('XPENDING', stream, group, cursor and '(' .. cursor or '-', '+', scan)
else
  lease = 0
  rows = redis.call('XPENDING', stream, group, '-', '+', scan, dead)
end
local taken, lost, last = {}, {}, nil
local suspect, suspects, left = tonumber(ARGV[10] or 0), tonumber(ARGV[11] or 0), 0
for i = 1, #rows do
  local id, holder, idle, count = unpack(rows[i])
  if idle >= lease and count + 1 == suspect and suspects == 0 then
    left = left + 1
  elseif idle >= lease then
    if #taken >= room then break end
    local entry = redis.call('XRANGE', stream, id, id)[1]
    if entry then
      redis.call('XCLAIM', stream, group, consumer, lease, id, 'RETRYCOUNT', count + 1, 'JUSTID')
      taken[#taken + 1] = {id, count + 1, entry[2], holder, idle}
      if count + 1 == suspect then suspects = suspects - 1 end
    else -- trimmed away by somebody while it was pending
      redis.call('XACK', stream, group, id)
      lost[#lost + 1] = id
    end
  end
  last = id
end
local seen = #rows < scan and (#rows == 0 or last == rows[#rows][1])
if dead == '' then
  if not seen and last then
    redis.call('HSET', KEYS[2], field, last)
  elseif seen and cursor then
    redis.call('HDEL', KEYS[2], field)
  end
end
if #lost > 0 then redis.call('HINCRBY', KEYS[2], 'lost', #lost) end
if #taken > 0 then redis.call('HINCRBY', KEYS[2], 'reclaimed', #taken) end
return {taken, lost, seen and 1 or 2, left}
