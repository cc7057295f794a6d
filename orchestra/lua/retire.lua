#!lua flags=allow-oom
-- Forgets a consumer that has left.
-- Invariant: a consumer with pending entries is kept, because deleting it would lose them.
-- KEYS: 1-4 lane streams | 5 consumers zset
-- ARGV: 1 group | 2 consumer
-- Returns: the number of entries it still holds
-- Complexity: O(1) per lane
local held, free = 0, {}
redis.call('ZCARD', KEYS[5]) -- fails before anything is written if it is no sorted set
for lane = 1, 4 do
  if redis.call('EXISTS', KEYS[lane]) == 1 then
    local rows = redis.pcall('XPENDING', KEYS[lane], ARGV[1], '-', '+', 1, ARGV[2])
    if rows.err and not string.find(rows.err, 'NOGROUP', 1, true) then return rows end
    if #rows == 0 and not rows.err then free[#free + 1] = KEYS[lane] end -- without a group it holds nothing
    held = held + #rows
  end
end
for _, key in ipairs(free) do redis.call('XGROUP', 'DELCONSUMER', key, ARGV[1], ARGV[2]) end
if held == 0 then redis.call('ZREM', KEYS[5], ARGV[2]) end
return held
