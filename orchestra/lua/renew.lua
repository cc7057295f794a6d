#!lua flags=allow-oom
-- Prolongs the leases of deliveries of one lane.
-- Invariant: never takes a delivery from another consumer, never changes its delivery count.
-- KEYS: 1 lane stream
-- ARGV: 1 group | 2 consumer, then per delivery: id | deliveries
-- Returns: the ids that this consumer no longer holds
-- Complexity: O(deliveries log pending)
local lost = {}
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1]
  if row and row[4] == tonumber(ARGV[i + 1]) then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'JUSTID')
  else
    lost[#lost + 1] = id
  end
end
return lost
