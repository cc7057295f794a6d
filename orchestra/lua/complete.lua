#!lua flags=allow-oom
-- Settles a batch of finished deliveries of one lane whose senders want no result.
-- Invariant: only a delivery that this consumer holds, at this delivery count, is acknowledged and deleted.
-- KEYS: 1 lane stream | 2 counters
-- ARGV: 1 group | 2 consumer | 3 room: rows that a range check may need (0: check each id) | 4 lowest id | 5 highest id
--       6 number of first deliveries, then their ids, then id | deliveries for each repeated one
-- Returns: the ids that were STALE and left alone
-- Complexity: O(room) with a range check, O(ids log pending) without
local stream, group, consumer, room = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local firsts = tonumber(ARGV[6])
local held, mine, stale = {}, {}, {}
if room > 0 then
  local rows = redis.call('XPENDING', stream, group, ARGV[4], ARGV[5], room, consumer)
  for i = 1, #rows do held[rows[i][1]] = rows[i][4] end
end

-- The range is a hint that saves commands; an id it does not cover is looked up, so a wrong range costs time only.
local function sort(id, expected)
  local count = held[id]
  if not count then
    local row = redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
    count = row and row[4]
  end
  if count == expected then mine[#mine + 1] = id else stale[#stale + 1] = id end
end

for i = 7, 6 + firsts do sort(ARGV[i], 1) end
for i = 7 + firsts, #ARGV, 2 do sort(ARGV[i], tonumber(ARGV[i + 1])) end

for from = 1, #mine, 4000 do
  local to = math.min(from + 3999, #mine)
  redis.call('XACK', stream, group, unpack(mine, from, to))
  redis.call('XDEL', stream, unpack(mine, from, to))
end
if #mine > 0 then redis.call('HINCRBY', KEYS[2], 'completed', #mine) end
return stale
