#!lua flags=allow-oom
-- Settles a batch of finished deliveries of one stream whose senders want no result.
-- Invariant: only a delivery that this consumer holds, at this delivery count, is acknowledged and deleted.
-- KEYS: 1 stream | 2 counters
-- ARGV: 1 group | 2 consumer | 3 room: rows that a range check may need (0: check each id) | 4 lowest id | 5 highest id
--       6 number of first deliveries, then their ids, best in order, then id | deliveries for each repeated one
-- Returns: the ids that were STALE and left alone
-- Complexity: O(room) with a range check, O(ids log pending) without
local stream, group, consumer, last = KEYS[1], ARGV[1], ARGV[2], #ARGV
redis.call('HLEN', KEYS[2]) -- fails before anything is written if the counters are no hash
-- part: complete/ours
if whole then
  finish_whole()
  return {}
end

local mine, stale = {}, {}
local function sort(id, expected)
  local list = is_ours(id, expected) and mine or stale
  list[#list + 1] = id
end
for i = 7, 6 + firsts do sort(ARGV[i], 1) end
for i = 7 + firsts, last, 2 do sort(ARGV[i], tonumber(ARGV[i + 1])) end
finish(mine)
return stale
