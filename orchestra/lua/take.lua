-- Hands out up to a number of waiting tasks, most urgent lane first.
-- Invariant: never more than asked for; a lower lane only gets what the higher ones left over.
-- KEYS: 1-4 lane streams
-- ARGV: 1 group | 2 consumer | 3 count
-- Returns: {{lane 0-3, entries}, …} for the lanes that had any
-- Complexity: O(count)
local out, left = {}, tonumber(ARGV[3])
for lane = 1, 4 do
  if left > 0 then
    local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', left, 'STREAMS', KEYS[lane], '>')
    if reply then
      local entries = reply[1][2]
      left = left - #entries
      out[#out + 1] = {lane - 1, entries}
    end
  end
end
return out
