-- Adds tasks to their lanes, or to the delayed set; answers repeats with what they added before.
-- Invariant: all tasks of a call are added, or none; one live entry per deduplicated task id within the window; a repeat
--            writes something, so that a WAIT behind it covers what it repeats.
-- KEYS: 1-4 lane streams | 5 delayed zset | 6 bodies hash | 7-8 dedup buckets | 9-10 token buckets | 11 counters
--       12 dead letter stream | 13-16 streams before the lanes; needed with a limit
-- ARGV: 1 length limit (0: none), or two numbers with a space between: length limit and most dead letters
--       2 dedup window ms | 3 token window ms | 4 token ("": none)
--       then per task: lane 0-3 | mode | frame
--       mode: "" plain, "i<id>" deduplicate, "d<delay ms>:<id>" delay, "e<delay ms>:<id>" delay and deduplicate
-- Returns: per task its entry id, "z" (delayed) or "=<message id>" (a repeat of that one);
--          {"!", record} when the token was seen, record = "<lane> <first id> <count> …";
--          error ORC_FULL <depth> <tasks that have ended so far>, or ORC_DEAD <dead letters>
-- Complexity: O(tasks) plus O(log delayed) per delayed task
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local tasks = (#ARGV - 4) / 3
local most, most_dead = string.match(ARGV[1], '^(%d+) ?(%d*)$')
local limit, token = tonumber(most), ARGV[4]

-- Two buckets alternate: bucket k serves [k*w, (k+1)*w) and expires at (k+2)*w, when k+2 takes over its key.
local function bucket(first, window)
  local k = math.floor(now / window)
  return KEYS[first + k % 2], KEYS[first + (k + 1) % 2], (k + 2) * window
end

local tokens, tokens_before, tokens_end = bucket(9, tonumber(ARGV[3]))
if token ~= '' then
  local record = redis.call('HGET', tokens, token)
  local before = not record and redis.call('HGET', tokens_before, token)
  if record then redis.call('PEXPIREAT', tokens, tokens_end) end
  if before then redis.call('PEXPIREAT', tokens_before, tokens_end - ARGV[3]) end
  if record or before then return {'!', record or before} end
end

if limit > 0 then
  local depth = redis.call('ZCARD', KEYS[5])
  for lane = 1, 4 do depth = depth + redis.call('XLEN', KEYS[lane]) + redis.call('XLEN', KEYS[12 + lane]) end
  if depth + tasks > limit then
    local ended = 0
    for _, n in ipairs(redis.call('HMGET', KEYS[11], 'completed', 'dead', 'cancelled', 'lost')) do
      ended = ended + (tonumber(n) or 0)
    end
    return redis.error_reply(string.format('ORC_FULL %.0f %.0f', depth, ended))
  end
end
if most_dead ~= '' then
  local dead = redis.call('XLEN', KEYS[12])
  if dead >= tonumber(most_dead) then return redis.error_reply('ORC_DEAD ' .. dead) end
end

local ids, modes, delayed = {}, {}, false
for i = 1, tasks do
  local mode = ARGV[3 * i + 3]
  if mode ~= '' then
    local kind = string.sub(mode, 1, 1)
    local delay, id = nil, string.sub(mode, 2)
    if kind ~= 'i' then
      delay, id = string.match(mode, '^.(%d+):(.*)$')
      delayed = true
    end
    modes[i] = {kind ~= 'd', tonumber(delay), id}
    if kind ~= 'd' then ids[#ids + 1] = id end
  end
end

local dedup, dedup_before, dedup_end = bucket(7, tonumber(ARGV[2]))
local known = {}
for _, key in ipairs({dedup_before, dedup}) do
  if #ids > 0 and redis.call('EXISTS', key) == 1 then
    for from = 1, #ids, 1000 do
      local to = math.min(from + 999, #ids)
      local found = redis.call('HMGET', key, unpack(ids, from, to))
      for j = 1, to - from + 1 do
        if found[j] then known[ids[from + j - 1]] = found[j] end
      end
    end
  end
end

-- What follows the first write must not fail for the type of a key, so these fail here.
redis.call('HLEN', KEYS[11])
if tasks > 1 then
  for lane = 1, 4 do redis.call('XLEN', KEYS[lane]) end
end
if delayed then
  redis.call('ZCARD', KEYS[5])
  redis.call('HLEN', KEYS[6])
end

local out, members, fresh, added, first, last, count = {}, {}, {}, 0, {}, {}, {}
for i = 1, tasks do
  local lane, mode, frame = ARGV[3 * i + 2], modes[i], ARGV[3 * i + 4]
  if mode and mode[1] and known[mode[3]] then
    out[i] = '=' .. known[mode[3]]
  else
    added = added + 1
    local id, where
    if mode and mode[2] then
      local member = mode[3]
      if redis.call('HEXISTS', KEYS[6], member) == 1 then member = member .. ' ' .. now .. '.' .. i end
      redis.call('HSET', KEYS[6], member, cmsgpack.pack({tonumber(lane), 0, 0, 0, frame}))
      -- The clock is rounded up, so that no task is due before its delay is over.
      redis.call('ZADD', KEYS[5], time[1] * 1000 + math.ceil(time[2] / 1000) + mode[2], member)
      out[i], where, members[i] = 'z', 'z:' .. mode[3], member
    else
      id = redis.pcall('XADD', KEYS[lane + 1], '*', 't', frame)
      if type(id) == 'table' then -- no memory (then nothing was written), or a stream that has used up its ids
        for j = 1, i - 1 do
          if members[j] then
            redis.call('ZREM', KEYS[5], members[j])
            redis.call('HDEL', KEYS[6], members[j])
          elseif string.sub(out[j], 1, 1) ~= '=' then
            redis.call('XDEL', KEYS[ARGV[3 * j + 2] + 1], out[j])
          end
        end
        return id
      end
      out[i], where = id, lane .. ':' .. id
      if not first[lane] then first[lane], count[lane] = id, 0 end
      last[lane], count[lane] = id, count[lane] + 1
    end
    if mode and mode[1] then
      known[mode[3]] = where
      fresh[#fresh + 1] = mode[3]
      fresh[#fresh + 1] = where
    end
  end
end

for from = 1, #fresh, 2000 do
  redis.call('HSET', dedup, unpack(fresh, from, math.min(from + 1999, #fresh)))
end
if #fresh > 0 then redis.call('PEXPIREAT', dedup, dedup_end) end
if token ~= '' then
  local record = {}
  for lane, id in pairs(first) do
    local ms, seq = string.match(id, '^(%d+)%-(%d+)$')
    if ms .. '-' .. string.format('%.0f', seq + count[lane] - 1) == last[lane] then
      record[#record + 1] = lane .. ' ' .. id .. ' ' .. count[lane]
    else -- the clock moved while the script ran (Redis before 7.2): one run per id
      for i = 1, tasks do
        if ARGV[3 * i + 2] == lane and out[i] ~= 'z' then record[#record + 1] = lane .. ' ' .. out[i] .. ' 1' end
      end
    end
  end
  redis.call('HSET', tokens, token, table.concat(record, ' '))
  redis.call('PEXPIREAT', tokens, tokens_end)
end
if added > 0 then redis.call('HINCRBY', KEYS[11], 'produced', added) end
if added < tasks then redis.call('HINCRBY', KEYS[11], 'duplicates', tasks - added) end
return out
