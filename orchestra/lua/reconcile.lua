#!lua flags=allow-oom
-- Hands deliveries of one stream that this consumer has, but never received, to it once more.
-- Invariant: only what this consumer still has at the delivery count given, and with a new one: no fence is used twice.
-- KEYS: 1 stream | 2 counters
-- ARGV: 1 group | 2 consumer, then per delivery: id | deliveries
-- Returns: {{{id, deliveries, fields}, …}, {ids lost}}
-- Complexity: O(deliveries log pending)
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local taken, lost = {}, {}
redis.call('HLEN', KEYS[2]) -- fails before anything is written if the counters are no hash
for i = 3, #ARGV, 2 do
  local id, count = ARGV[i], tonumber(ARGV[i + 1])
  local row = redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
  if row and row[4] == count then
    local entry = redis.call('XRANGE', stream, id, id)[1]
    if entry then
      redis.call('XCLAIM', stream, group, consumer, 0, id, 'RETRYCOUNT', count + 1, 'JUSTID')
      taken[#taken + 1] = {id, count + 1, entry[2]}
    else -- trimmed away by somebody while it was pending
      redis.call('XACK', stream, group, id)
      lost[#lost + 1] = id
    end
  end
end
if #lost > 0 then redis.call('HINCRBY', KEYS[2], 'lost', #lost) end
return {taken, lost}
