#!lua flags=allow-oom
-- Prolongs the leases of deliveries of one stream.
-- Invariant: never takes a delivery from another consumer, never changes its delivery count; no entry vanishes unseen.
-- KEYS: 1 stream | 2 counters
-- ARGV: 1 group | 2 consumer, then per delivery: id | deliveries
-- Returns: the ids that this consumer no longer holds; with a "!" before it where somebody has deleted the entry
-- Complexity: O(deliveries log pending)
local lost = {}
redis.call('HLEN', KEYS[2]) -- fails before anything is written if the counters are no hash
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1]
  if row and row[4] == tonumber(ARGV[i + 1]) then
    if #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'JUSTID') == 0 then
      -- trimmed away by somebody: XCLAIM has taken it off the pending list
      redis.call('HINCRBY', KEYS[2], 'lost', 1)
      lost[#lost + 1] = '!' .. id
    end
  else
    lost[#lost + 1] = id
  end
end
return lost
