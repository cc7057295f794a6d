-- Hands out up to a number of waiting tasks, most urgent lane first.
-- Invariant: never more than asked for; a lower lane only gets what the higher ones left over, but for the one of ARGV 4.
-- KEYS: 1-4 lane streams
-- ARGV: 1 group | 2 consumer | 3 count | 4 lane 0-3 that gets one task first, so that none starves; '' for none
-- Returns: {{lane 0-3, entries}, …} for the lanes that had any; a lane may come twice
-- Complexity: O(count)
local out, left = {}, tonumber(ARGV[3])
local favoured = tonumber(ARGV[4])
for turn = favoured and 0 or 1, 4 do
  local lane, most = turn, left
  if turn == 0 then lane, most = favoured + 1, 1 end
  if left > 0 then
    local reply = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', most, 'STREAMS', KEYS[lane], '>')
    if reply and reply.err then
      if #out == 0 then return reply end
      return out -- what was handed out has to arrive; a lane that cannot be read says so at the next call
    end
    if reply then
      local entries = reply[1][2]
      left = left - #entries
      out[#out + 1] = {lane - 1, entries}
    end
  end
end
return out
