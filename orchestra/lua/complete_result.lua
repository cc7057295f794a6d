#!lua flags=allow-oom
-- Settles finished deliveries of one stream whose senders want the result, and tells the senders.
-- Invariant: the record is written once, by the holder of the delivery, before the delivery disappears.
-- KEYS: 1 stream | 2 counters | 3… result key per delivery
-- ARGV: 1 group | 2 consumer | 3 room: rows that a range check may need (0: check each id) | 4 lowest id | 5 highest id
--       6 number of first deliveries, then their ids, best in order, then id | deliveries for each repeated one,
--       then per delivery, in that order: time to live ms | record | channel ("": none)
-- Returns: the ids that were STALE and left alone
-- Complexity: O(deliveries) with a range check, O(deliveries log pending) without
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local last = 6 + 2 * (#KEYS - 2) - tonumber(ARGV[6])
redis.call('HLEN', KEYS[2]) -- fails before anything is written if the counters are no hash
-- part: complete/ours

-- One publication carries as many records as fit: a record as it is, several behind a byte that begins none, each
-- with its length before it.
local MOST = 65536
local heard = {}

local function publish(channel, records)
  local message = records[1]
  if #records > 1 then
    local pieces = { '\193' }
    for i = 1, #records do
      pieces[2 * i] = struct.pack('>I4', #records[i])
      pieces[2 * i + 1] = records[i]
    end
    message = table.concat(pieces)
  end
  redis.call('PUBLISH', channel, message)
end

local function keep(number)
  local at = last + 3 * number
  local record, channel = ARGV[at - 1], ARGV[at]
  redis.call('SET', KEYS[number + 2], record, 'PX', ARGV[at - 2])
  if channel == '' then return end
  local waiting = heard[channel]
  if not waiting or waiting.size + #record > MOST then
    if waiting then publish(channel, waiting) end
    waiting = { size = 0 }
    heard[channel] = waiting
  end
  waiting[#waiting + 1] = record
  waiting.size = waiting.size + #record
end

local mine, stale = {}, {}
if whole then
  for number = 1, firsts do keep(number) end
  finish_whole()
else
  local function sort(number, id, expected)
    if is_ours(id, expected) then
      keep(number)
      mine[#mine + 1] = id
    else
      stale[#stale + 1] = id
    end
  end
  for i = 7, 6 + firsts do sort(i - 6, ARGV[i], 1) end
  for i = 7 + firsts, last, 2 do sort(firsts + (i - 5 - firsts) / 2, ARGV[i], tonumber(ARGV[i + 1])) end
  finish(mine)
end
for channel, records in pairs(heard) do publish(channel, records) end
return stale
