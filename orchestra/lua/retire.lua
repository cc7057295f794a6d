#!lua flags=allow-oom
-- Forgets a consumer that has left.
-- Invariant: a consumer with pending entries is kept, because deleting it would lose them.
-- KEYS: 1-4 lane streams | 5 consumers zset
-- ARGV: 1 group | 2 consumer
-- Returns: the number of entries it still holds
-- Complexity: O(1) per lane
local held = 0
for lane = 1, 4 do
  if redis.call('EXISTS', KEYS[lane]) == 1 then
    local pending = #redis.call('XPENDING', KEYS[lane], ARGV[1], '-', '+', 1, ARGV[2])
    if pending == 0 then redis.call('XGROUP', 'DELCONSUMER', KEYS[lane], ARGV[1], ARGV[2]) end
    held = held + pending
  end
end
if held == 0 then redis.call('ZREM', KEYS[5], ARGV[2]) end
return held
