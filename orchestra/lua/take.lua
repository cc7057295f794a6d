-- Hands out up to a number of waiting tasks, most urgent lane first, and of each lane first what stands before it.
-- Invariant: never more than asked for; a stream only gets what those before it left over, but for the one of ARGV 4.
-- KEYS: 1-4 lane streams | 5-8 streams before them
-- ARGV: 1 group | 2 consumer | 3 count | 4 stream that goes first, so that none starves: 4-7 for one task, 0-3 for half of
--       them; '' for none
-- Returns: {{stream 0-7, entries}, …} for those that had any; one may come twice
-- Complexity: O(count)
local out, left = {}, tonumber(ARGV[3])
local favoured = tonumber(ARGV[4])

-- The error reply of a stream that cannot be read.
local function take(number, most)
  local key = KEYS[number + 1]
  if number > 3 then -- most often nothing has come back, and asking that is cheaper than reading
    local length = redis.pcall('XLEN', key)
    if length == 0 or type(length) == 'table' then return length ~= 0 and length or nil end
  end
  local reply = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', most, 'STREAMS', key, '>')
  if reply and reply.err then return reply end
  if reply then
    local entries = reply[1][2]
    left = left - #entries
    out[#out + 1] = {number, entries}
  end
end

for turn = favoured and 0 or 1, 4 do
  local first, most = turn + 3, left
  if turn == 0 then first, most = favoured, favoured > 3 and 1 or math.ceil(left / 2) end
  for _, number in ipairs({first, (first + 4) % 8}) do
    local before = left
    local failed = left > 0 and most > 0 and take(number, most)
    if failed then
      if #out == 0 then return failed end
      return out -- what was handed out has to arrive; a lane that cannot be read says so at the next call
    end
    most = most - (before - left)
  end
end
return out
