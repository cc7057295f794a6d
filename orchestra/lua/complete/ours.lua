-- Which of the deliveries named in ARGV this consumer still holds, and how they are taken out of the stream.
-- ARGV 3 room | 4 lowest id | 5 highest id | 6 number of first deliveries, then ids, best in order, up to number `last`.
-- Needs: stream, group, consumer, last
-- Gives: firsts, whole, finish_whole, is_ours, finish

local room, firsts = tonumber(ARGV[3]), tonumber(ARGV[6])

-- Whether these rows prove that every id is a first delivery that we hold: one walk, if the ids are in order.
local function prove(rows)
  local j = 0
  for i = 7, last do
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
local rows, whole, head = {}, room > 0 and last == 6 + firsts, false
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

local function finish_whole()
  if head then
    local gone = redis.call('XTRIM', stream, 'MINID', '=', ARGV[5]) + redis.call('XDEL', stream, ARGV[5])
    if gone > firsts then redis.call('HINCRBY', KEYS[2], 'lost', gone - firsts) end -- acknowledged by a stranger
  end
  for from = 7, last, 4000 do
    local to = math.min(from + 3999, last)
    redis.call('XACK', stream, group, unpack(ARGV, from, to))
    if not head then redis.call('XDEL', stream, unpack(ARGV, from, to)) end
  end
  redis.call('HINCRBY', KEYS[2], 'completed', firsts)
end

local held = {}
if not whole then
  for i = 1, #rows do held[rows[i][1]] = rows[i][4] end
end

-- The range is a hint that saves commands; an id it does not cover is looked up, so a wrong range costs time only.
local function is_ours(id, expected)
  local count = held[id]
  if not count then
    local row = redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
    count = row and row[4]
  end
  if count ~= expected then return false end
  held[id] = 0 -- named twice, it is settled once
  return true
end

local function finish(ids)
  for from = 1, #ids, 4000 do
    local to = math.min(from + 3999, #ids)
    redis.call('XACK', stream, group, unpack(ids, from, to))
    redis.call('XDEL', stream, unpack(ids, from, to))
  end
  if #ids > 0 then redis.call('HINCRBY', KEYS[2], 'completed', #ids) end
end
