#!lua flags=allow-oom
-- Takes over deliveries of one lane whose lease has run out.
-- Invariant: bounded work a call; the cursor is kept, so a fresh head never hides a stale tail; no entry vanishes unseen.
-- KEYS: 1 lane stream | 2 counters (cursor:<lane> lives here)
-- ARGV: 1 group | 2 consumer | 3 lane 0-3 | 4 lease ms | 5 pending rows to look at | 6 most to take over
--       7 dead consumer: only what it held, whatever its age ("": anybody's)
-- Returns: {{{id, deliveries, fields}, …}, number lost}; a caller dead-letters what was delivered too often
-- Complexity: O(rows looked at)
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local lease, scan, room = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local field = 'cursor:' .. ARGV[3]
local dead, cursor, rows = ARGV[7], nil, nil
if dead == '' then
  cursor = redis.call('HGET', KEYS[2], field)
  rows = redis.call('XPENDING', stream, group, cursor and '(' .. cursor or '-', '+', scan)
else
  lease = 0
  rows = redis.call('XPENDING', stream, group, '-', '+', scan, dead)
end
local taken, lost, last = {}, 0, nil
for i = 1, #rows do
  local id, idle, count = rows[i][1], rows[i][3], rows[i][4]
  if idle >= lease then
    if #taken >= room then break end
    local entry = redis.call('XRANGE', stream, id, id)[1]
    if entry then
      redis.call('XCLAIM', stream, group, consumer, lease, id, 'RETRYCOUNT', count + 1, 'JUSTID')
      taken[#taken + 1] = {id, count + 1, entry[2]}
    else -- trimmed away by somebody while it was pending
      redis.call('XACK', stream, group, id)
      lost = lost + 1
    end
  end
  last = id
end
if dead ~= '' then
  last = nil
elseif #rows < scan and (#rows == 0 or last == rows[#rows][1]) then
  if cursor then redis.call('HDEL', KEYS[2], field) end
elseif last then
  redis.call('HSET', KEYS[2], field, last)
end
if lost > 0 then redis.call('HINCRBY', KEYS[2], 'lost', lost) end
if #taken > 0 then redis.call('HINCRBY', KEYS[2], 'reclaimed', #taken) end
return {taken, lost}
