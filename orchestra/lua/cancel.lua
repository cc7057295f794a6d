#!lua flags=allow-oom
-- Cancels one task: at once where it is found waiting, else by a mark that its holder looks up.
-- Invariant: only what nobody holds is removed, after its terminal record was written and, of a workflow's step, its frame was
--            kept for whoever tells the workflow; a task in flight is ended by its holder alone. A mark covers the entries of this id that exist now, none that is added in a later millisecond.
-- KEYS: 1-4 lane streams | 5-8 streams before them | 9 delayed zset | 10 bodies hash | 11-12 dedup buckets | 13 counters
--       14 cancel marks zset | 15 result key | 16 cancelled steps hash
-- ARGV: 1 task id | 2 the id as it stands in a frame | 3 message id ("": as the dedup records say) | 4 group | 5 record
--       6 time to live of the record ms | 7 time to live of a mark ms | 8 most marks
-- Returns: {"cancelled", frame}: removed; {"ended", record}: it was terminal before, nothing changed;
--          {"requested", ms}: marked, by so many milliseconds ahead of the clock
-- Complexity: O(log delayed + log marks + log pending)
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)

-- What follows the first write must not fail for the type of a key, so these fail here.
redis.call('HLEN', KEYS[10])
redis.call('HLEN', KEYS[13])
redis.call('ZCARD', KEYS[14])
redis.call('HLEN', KEYS[16])

local function record(frame)
  redis.call('SET', KEYS[15], ARGV[5], 'PX', ARGV[6])
  if string.find(frame, 'orchestra.step', 1, true) then redis.call('HSET', KEYS[16], ARGV[1], frame) end
end

local packed = redis.call('ZSCORE', KEYS[9], ARGV[1]) and redis.call('HGET', KEYS[10], ARGV[1])
if packed then
  local frame = cmsgpack.unpack(packed)[5]
  record(frame)
  redis.call('ZREM', KEYS[9], ARGV[1])
  redis.call('HDEL', KEYS[10], ARGV[1])
  redis.call('HINCRBY', KEYS[13], 'cancelled', 1)
  return {'cancelled', frame}
end

-- The frame of the entry, if there is one and it is of this task. The id stands behind the array's head and the version.
local function frame_at(stream, id)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  if not entry then return nil end
  for i = 1, #entry[2], 2 do
    local frame = entry[2][i + 1]
    if entry[2][i] == 't' then return string.sub(frame, 3, 2 + #ARGV[2]) == ARGV[2] and frame end
  end
end

local in_flight = false
local places = {ARGV[3], redis.call('HGET', KEYS[11], ARGV[1]) or '', redis.call('HGET', KEYS[12], ARGV[1]) or ''}
for i = 1, #places do
  local number, id = string.match(places[i], '^([0-7]):(%d+%-%d+)$')
  local stream = number and KEYS[number + 1]
  local frame = stream and not in_flight and frame_at(stream, id)
  if frame then
    local rows = redis.pcall('XPENDING', stream, ARGV[4], id, id, 1)
    if rows.err and not string.find(rows.err, 'NOGROUP', 1, true) then return rows end
    in_flight = rows[1] ~= nil -- without a group, nothing has been handed out
    if not in_flight then
      record(frame)
      redis.call('XDEL', stream, id)
      redis.call('HINCRBY', KEYS[13], 'cancelled', 1)
      return {'cancelled', frame}
    end
  end
end

if not in_flight then -- a task in flight lives, whatever an earlier one of the same id left behind
  local ended = redis.call('GET', KEYS[15])
  if ended then return {'ended', ended} end
end

-- Entry ids and marks may be ahead of a clock that was set back.
local mark = math.max(now, tonumber(redis.call('ZRANGE', KEYS[14], -1, -1, 'WITHSCORES')[2] or 0))
for number = 1, 8 do
  local newest = redis.call('XREVRANGE', KEYS[number], '+', '-', 'COUNT', 1)[1]
  if newest then mark = math.max(mark, tonumber(string.match(newest[1], '^%d+'))) end
end
redis.call('ZADD', KEYS[14], mark, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[14], '-inf', '(' .. string.format('%.0f', now - ARGV[7]))
redis.call('ZREMRANGEBYRANK', KEYS[14], 0, -1 - ARGV[8])
redis.call('PEXPIRE', KEYS[14], ARGV[7])
return {'requested', string.format('%.0f', mark - now)}
