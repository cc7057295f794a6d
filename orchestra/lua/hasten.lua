#!lua flags=allow-oom
-- Lets delayed tasks come back sooner than they were told: those of a limit that was raised meanwhile.
-- Invariant: moved is only what waits because it was refused, about as long as the caller believes, and only to an earlier
--            time; a retry, or a task that somebody else has put off again, keeps its time. So a repeat changes nothing.
-- KEYS: 1 delayed zset | 2 bodies hash
-- ARGV: 1 ms by which what the caller believes may be off, then per task: id | ms until it is due, as the caller believes |
--       ms until it is to be due
-- Returns: how many were moved
-- Complexity: O(tasks log delayed)
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local moved, off = {}, tonumber(ARGV[1])
redis.call('HLEN', KEYS[2]) -- fails before anything is written if it is no hash
for i = 2, #ARGV, 3 do
  local due, wanted = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[i]) or ''), now + ARGV[i + 2]
  if due and wanted < due and math.abs(due - now - ARGV[i + 1]) <= off then
    local packed = redis.call('HGET', KEYS[2], ARGV[i])
    if packed and cmsgpack.unpack(packed)[6] then
      moved[#moved + 1] = string.format('%.0f', wanted)
      moved[#moved + 1] = ARGV[i]
    end
  end
end
for from = 1, #moved, 4000 do redis.call('ZADD', KEYS[1], 'XX', unpack(moved, from, math.min(from + 3999, #moved))) end
return #moved / 2
