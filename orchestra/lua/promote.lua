#!lua flags=allow-oom
-- One tick of a queue: moves due tasks to their lanes, those that were throttled before them, notes that the consumer is alive, hands out fresh cancel marks.
-- Invariant: never early by the Redis clock; a task is added to its stream before it leaves the set; any worker may call.
-- KEYS: 1-4 lane streams | 5-8 streams before them | 9 delayed zset | 10 bodies hash | 11 counters | 12 consumers zset
--       13 cancel marks zset
-- ARGV: 1 most to move | 2 consumer ("": none) | 3 score of the newest cancel mark known, ms
-- Returns: {moved, milliseconds until the next task is due (-1: none), Redis clock ms, {task id, score, …} of the marks
--          that are not older than ARGV 3, number lost: due tasks whose bodies somebody has deleted}
-- Complexity: O(moved log delayed + marks returned)
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[9], '-inf', now, 'LIMIT', 0, ARGV[1])
-- What follows the first write must not fail for the type of a key, so these fail here.
redis.call('ZCARD', KEYS[13])
if #due > 0 then
  for stream = 1, 8 do redis.call('XLEN', KEYS[stream]) end
  redis.call('HLEN', KEYS[10])
  redis.call('HLEN', KEYS[11])
end
if ARGV[2] ~= '' then redis.call('ZADD', KEYS[12], now, ARGV[2]) end
local moved, lost = 0, 0
for i = 1, #due do
  local member = due[i]
  local packed = redis.call('HGET', KEYS[10], member)
  if packed then
    local lane, retries, before, generation, frame, front = unpack(cmsgpack.unpack(packed))
    local stream = KEYS[lane + (front and 5 or 1)]
    if retries == 0 and before == 0 and generation == 0 then
      redis.call('XADD', stream, '*', 't', frame)
    else
      redis.call('XADD', stream, '*', 't', frame, 'n', retries, 'd', before, 'g', generation)
    end
    moved = moved + 1
  else
    redis.call('HINCRBY', KEYS[11], 'lost', 1)
    lost = lost + 1
  end
  redis.call('ZREM', KEYS[9], member)
  redis.call('HDEL', KEYS[10], member)
end
local wait = -1
local next = redis.call('ZRANGE', KEYS[9], 0, 0, 'WITHSCORES')
if next[2] then wait = math.max(0, next[2] - now) end
return {moved, wait, now, redis.call('ZRANGEBYSCORE', KEYS[13], ARGV[3], '+inf', 'WITHSCORES'), lost}
