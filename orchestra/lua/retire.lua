#!lua flags=allow-oom
-- Forgets a consumer that has left.
-- Invariant: a consumer with pending entries is kept, because deleting it would lose them.
-- KEYS: 1-4 lane streams | 5-8 streams before them | 9 consumers zset
-- ARGV: 1 group | 2 consumer
-- Returns: the number of entries it still holds
-- Complexity: O(1) per stream
local held, free = 0, {}
redis.call('ZCARD', KEYS[9]) -- fails before anything is written if it is no sorted set
for number = 1, 8 do
  if redis.call('EXISTS', KEYS[number]) == 1 then
    local rows = redis.pcall('XPENDING', KEYS[number], ARGV[1], '-', '+', 1, ARGV[2])
    if rows.err and not string.find(rows.err, 'NOGROUP', 1, true) then return rows end
    if #rows == 0 and not rows.err then free[#free + 1] = KEYS[number] end -- without a group it holds nothing
    held = held + #rows
  end
end
for _, key in ipairs(free) do redis.call('XGROUP', 'DELCONSUMER', key, ARGV[1], ARGV[2]) end
if held == 0 then redis.call('ZREM', KEYS[9], ARGV[2]) end
return held
