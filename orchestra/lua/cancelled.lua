#!lua flags=allow-oom
-- Settles cancelled deliveries of one stream, and tells the senders who wait.
-- Invariant: the record is written once, by the holder of the delivery, before the delivery disappears; the mark goes last.
--            The frame of a workflow's step is kept for whoever tells the workflow.
-- KEYS: 1 stream | 2 counters | 3 cancel marks zset | 4 cancelled steps hash | 5… result key per delivery
-- ARGV: 1 group | 2 consumer | 3 time to live of a record ms, then per delivery:
--       id | deliveries | task id | record | channel ("": none)
-- Returns: the ids that were STALE and left alone
-- Complexity: O(deliveries (log pending + log marks))
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local ended, stale = 0, {}
-- What follows the first write must not fail for the type of a key, so these fail here.
redis.call('HLEN', KEYS[2])
redis.call('ZCARD', KEYS[3])
redis.call('HLEN', KEYS[4])
for k = 5, #KEYS do
  local i = 4 + 5 * (k - 5)
  local id = ARGV[i]
  local row = redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
  if row and row[4] == tonumber(ARGV[i + 1]) then
    local entry = redis.call('XRANGE', stream, id, id)[1]
    for f = 1, entry and #entry[2] or 0, 2 do
      local frame = entry[2][f + 1]
      if entry[2][f] == 't' and string.find(frame, 'orchestra.step', 1, true) then
        redis.call('HSET', KEYS[4], ARGV[i + 2], frame)
      end
    end
    redis.call('SET', KEYS[k], ARGV[i + 3], 'PX', ARGV[3])
    redis.call('XACK', stream, group, id)
    redis.call('XDEL', stream, id)
    redis.call('ZREM', KEYS[3], ARGV[i + 2])
    if ARGV[i + 4] ~= '' then redis.call('PUBLISH', ARGV[i + 4], ARGV[i + 3]) end
    ended = ended + 1
  else
    stale[#stale + 1] = id
  end
end
if ended > 0 then redis.call('HINCRBY', KEYS[2], 'cancelled', ended) end
return stale
