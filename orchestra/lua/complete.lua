#!lua flags=allow-oom
-- Settles a batch of finished deliveries of one stream whose senders want no result.
-- Invariant: only a delivery that this consumer holds, at this delivery count, is acknowledged and deleted.
-- KEYS: 1 stream | 2 counters
-- ARGV: 1 group | 2 consumer | 3 room: rows that a range check may need (0: check each id) | 4 lowest id | 5 highest id
--       6 number of first deliveries, then their ids, best in order, then id | deliveries for each repeated one
-- Returns: the ids that were STALE and left alone
-- Complexity: O(room) with a range check, O(ids log pending) without
local stream, group, consumer, room = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local firsts = tonumber(ARGV[6])
redis.call('HLEN', KEYS[2]) -- fails before anything is written if the counters are no hash

-- Whether these rows prove that every id is a first delivery that we hold: one walk, if the ids are in order.
local function prove(rows)
  local j = 0
  for i = 7, #ARGV do
    local row
    repeat
      j = j + 1
      row = rows[j]
    until not row or row[1] == ARGV[i]
    if not row or row[2] ~= consumer or row[4] ~= 1 then return false end
  end
  return true
end

-- A worker that keeps up settles the oldest part of the pending list, whole. Everything up to its highest id has been
-- delivered, so nothing else lives there, and the stream can drop whole nodes instead of searching for each id.
local rows, whole, head = {}, room > 0 and #ARGV == 6 + firsts, false
if whole then
  local oldest = redis.call('XPENDING', stream, group, '-', '+', 1)[1]
  if oldest and oldest[1] == ARGV[4] then
    rows = redis.call('XPENDING', stream, group, ARGV[4], ARGV[5], firsts + 1)
    head = #rows == firsts and prove(rows)
  end
end
if room > 0 and not head then
  rows = redis.call('XPENDING', stream, group, ARGV[4], ARGV[5], room, consumer)
  whole = whole and prove(rows)
end

if whole then
  if head then
    local gone = redis.call('XTRIM', stream, 'MINID', '=', ARGV[5]) + redis.call('XDEL', stream, ARGV[5])
    if gone > firsts then redis.call('HINCRBY', KEYS[2], 'lost', gone - firsts) end -- acknowledged by a stranger
  end
  for from = 7, #ARGV, 4000 do
    local to = math.min(from + 3999, #ARGV)
    redis.call('XACK', stream, group, unpack(ARGV, from, to))
    if not head then redis.call('XDEL', stream, unpack(ARGV, from, to)) end
  end
  redis.call('HINCRBY', KEYS[2], 'completed', firsts)
  return {}
end

local held, mine, stale = {}, {}, {}
for i = 1, #rows do held[rows[i][1]] = rows[i][4] end

-- The range is a hint that saves commands; an id it does not cover is looked up, so a wrong range costs time only.
local function sort(id, expected)
  local count = held[id]
  if not count then
    local row = redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
    count = row and row[4]
  end
  if count == expected then
    mine[#mine + 1] = id
    held[id] = 0 -- named twice, it is settled once
  else
    stale[#stale + 1] = id
  end
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
