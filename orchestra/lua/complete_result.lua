#!lua flags=allow-oom
-- Settles finished deliveries of one stream whose senders want the result, and tells the senders.
-- Invariant: the record is written once, by the holder of the delivery, before the delivery disappears.
-- KEYS: 1 stream | 2 counters | 3… result key per delivery
-- ARGV: 1 group | 2 consumer, then per delivery: id | deliveries | time to live ms | record | channel ("": none)
-- Returns: the ids that were STALE and left alone
-- Complexity: O(deliveries log pending)
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local done, stale = 0, {}
redis.call('HLEN', KEYS[2]) -- fails before anything is written if the counters are no hash
for i = 1, #KEYS - 2 do
  local at = 5 * i - 2
  local id = ARGV[at]
  local row = redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
  if row and row[4] == tonumber(ARGV[at + 1]) then
    redis.call('SET', KEYS[i + 2], ARGV[at + 3], 'PX', ARGV[at + 2])
    redis.call('XACK', stream, group, id)
    redis.call('XDEL', stream, id)
    if ARGV[at + 4] ~= '' then redis.call('PUBLISH', ARGV[at + 4], ARGV[at + 3]) end
    done = done + 1
  else
    stale[#stale + 1] = id
  end
end
if done > 0 then redis.call('HINCRBY', KEYS[2], 'completed', done) end
return stale
