#!lua flags=allow-oom
-- Moves deliveries of one stream to the delayed set, or straight back to their lane when there is no delay.
-- Invariant: the task is added before its delivery is removed; only the holder moves it; the body is the stream's own;
--            a task that is marked as cancelled is not moved, so no delayed task is covered by a mark older than itself.
-- KEYS: 1 stream | 2 delayed zset | 3 bodies hash | 4 counters | 5 cancel marks zset | 6 lane stream
--       7 stream before it
-- ARGV: 1 group | 2 consumer | 3 lane 0-3, then per delivery: id | deliveries | task id | delay ms | counter
--       counter: "retried" (consumes a retry), "throttled" or "released" (do not, and come back before their lane)
-- Returns: the ids that were STALE and left alone; "!<id>": marked and left alone, to be settled as cancelled
-- Complexity: O(deliveries (log pending + log delayed))
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local now = redis.call('TIME')
now = now[1] * 1000 + math.ceil(now[2] / 1000) -- a fraction of a millisecond late is not early
local stale, marks = {}, redis.call('EXISTS', KEYS[5]) == 1
-- What follows the first write must not fail for the type of a key, so these fail here.
redis.call('ZCARD', KEYS[2])
redis.call('HLEN', KEYS[3])
redis.call('HLEN', KEYS[4])
redis.call('ZCARD', KEYS[5])
redis.call('XLEN', KEYS[6])
redis.call('XLEN', KEYS[7])

-- Most batches are one stretch of the stream. What is found there saves commands, what is not is looked up.
local rows, entries, many = {}, {}, (#ARGV - 3) / 5
if many > 1 then
  local first, last = ARGV[4], ARGV[#ARGV - 4]
  for _, row in ipairs(redis.call('XPENDING', stream, group, first, last, many, consumer)) do rows[row[1]] = row end
  for _, entry in ipairs(redis.call('XRANGE', stream, first, last, 'COUNT', many)) do entries[entry[1]] = entry end
end

-- What has to be added and removed, all of it at once: a flood of refused tasks must not keep Redis from others for long.
local bodies, dues, adds, gone, seen, counts = {}, {}, {}, {}, {}, {}
for i = 4, #ARGV, 5 do
  local id, delay, counter = ARGV[i], tonumber(ARGV[i + 3]), ARGV[i + 4]
  local row = not seen[id] and (rows[id] or redis.call('XPENDING', stream, group, id, id, 1, consumer)[1])
  if row and row[4] ~= tonumber(ARGV[i + 1]) then row = nil end -- ours, but handed out again since
  local entry = row and (entries[id] or redis.call('XRANGE', stream, id, id)[1])
  local mark = entry and marks and redis.call('ZSCORE', KEYS[5], ARGV[i + 2])
  if mark and tonumber(string.match(id, '^%d+')) <= tonumber(mark) then
    stale[#stale + 1] = '!' .. id
  elseif entry then
    local f = {n = 0, d = 0, g = 0}
    for j = 1, #entry[2], 2 do f[entry[2][j]] = entry[2][j + 1] end
    local retries = f.n + (counter == 'retried' and 1 or 0)
    local before = f.d + row[4]
    if delay > 0 then
      local member = ARGV[i + 2]
      if seen['z' .. member] or redis.call('HEXISTS', KEYS[3], member) == 1 then member = member .. ' ' .. id end
      seen['z' .. member] = true
      local packed = {tonumber(ARGV[3]), retries, before, tonumber(f.g), f.t}
      if counter ~= 'retried' then packed[6] = 1 end
      bodies[#bodies + 1] = member
      bodies[#bodies + 1] = cmsgpack.pack(packed)
      dues[#dues + 1] = now + delay
      dues[#dues + 1] = member
    else
      adds[#adds + 1] = {KEYS[counter == 'retried' and 6 or 7], '*', 't', f.t, 'n', retries, 'd', before, 'g', f.g}
    end
    gone[#gone + 1] = id
    counts[counter] = (counts[counter] or 0) + 1
    seen[id] = true -- named twice, it is moved once
  else
    if row then -- pending, but trimmed away by somebody: say so instead of waiting for it for ever
      redis.call('XACK', stream, group, id)
      redis.call('HINCRBY', KEYS[4], 'lost', 1)
    end
    stale[#stale + 1] = id
  end
end

for i = 1, #adds do redis.call('XADD', unpack(adds[i])) end
for from = 1, #bodies, 4000 do
  local to = math.min(from + 3999, #bodies)
  redis.call('HSET', KEYS[3], unpack(bodies, from, to))
  redis.call('ZADD', KEYS[2], unpack(dues, from, to))
end
for from = 1, #gone, 4000 do
  local to = math.min(from + 3999, #gone)
  redis.call('XACK', stream, group, unpack(gone, from, to))
  redis.call('XDEL', stream, unpack(gone, from, to))
end
for counter, count in pairs(counts) do redis.call('HINCRBY', KEYS[4], counter, count) end
return stale
