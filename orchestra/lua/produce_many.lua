-- Adds tasks to one lane, or answers a repeat with what it added before: produce.lua for many plain tasks of one kind.
-- Invariant: all tasks of a call are added, or none; one live entry per task id within the window: it keeps the records
--            that produce.lua and produce_one.lua keep, and heeds theirs; a repeat writes something, so that a WAIT
--            behind it covers what it repeats.
-- KEYS: 1 lane stream | 2-3 dedup buckets (own ids) or token buckets (generated ids) | 4 counters
-- ARGV: 1 window of the buckets ms | 2 lane 0-3 | 3 token ("": the tasks have ids of their own)
--       then at least one frame | then, without a token, the ids of the tasks, which differ from one another
-- Returns: {"!", record} when all were added or the token was seen, record = "<lane> <first id> <count> …";
--          else, per task, its entry id or "=<message id>" (a repeat of that one)
-- Complexity: O(tasks)
local time, window, lane, token = redis.call('TIME'), tonumber(ARGV[1]), ARGV[2], ARGV[3]
local own = token == ''
local tasks = own and (#ARGV - 3) / 2 or #ARGV - 3
local ids = 3 + tasks
-- Two buckets alternate: bucket k serves [k*w, (k+1)*w) and expires at (k+2)*w, when k+2 takes over its key.
local k = math.floor((time[1] * 1000 + time[2] / 1000) / window)

local known, repeats = {}, 0
for age = 0, 1 do
  local bucket = KEYS[2 + (k - age) % 2]
  if not own then
    local record = redis.call('HGET', bucket, token)
    if record then
      redis.call('PEXPIREAT', bucket, (k - age + 2) * window)
      return {'!', record}
    end
  elseif redis.call('EXISTS', bucket) == 1 then
    for from = 0, tasks - 1, 1000 do -- more would not fit on Lua's stack
      local upto = math.min(from + 1000, tasks)
      for i, where in ipairs(redis.call('HMGET', bucket, unpack(ARGV, ids + from + 1, ids + upto))) do
        if where and not known[from + i] then known[from + i], repeats = where, repeats + 1 end
      end
    end
  end
end

redis.call('HLEN', KEYS[4]) -- what follows the first write must not fail for the type of a key, so this fails here
local stream, out, added, added_of = KEYS[1], {}, {}, {}
local n = 0
for i = 1, tasks do
  if known[i] then
    out[i] = '=' .. known[i]
  else
    local id = redis.pcall('XADD', stream, '*', 't', ARGV[i + 3])
    if type(id) == 'table' then -- no memory (then nothing was written), or a stream that has used up its ids
      for _, entry in ipairs(added) do redis.call('XDEL', stream, entry) end
      return id
    end
    n = n + 1
    out[i], added[n], added_of[n] = id, id, i
  end
end

-- Entries of one millisecond are numbered one after the other; the clock may move while the script runs (before 7.2).
local record = {}
local function note(first, last)
  if string.match(added[first], '^%d+') == string.match(added[last], '^%d+') then
    record[#record + 1] = lane .. ' ' .. added[first] .. ' ' .. last - first + 1
  else
    local middle = math.floor((first + last) / 2)
    note(first, middle)
    note(middle + 1, last)
  end
end

if n > 0 then
  note(1, n)
  record = table.concat(record, ' ')
  local bucket, fresh = KEYS[2 + k % 2], {token, record}
  for j = 1, own and n or 0 do
    fresh[2 * j - 1], fresh[2 * j] = ARGV[ids + added_of[j]], lane .. ':' .. added[j]
  end
  for from = 1, #fresh, 2000 do
    redis.call('HSET', bucket, unpack(fresh, from, math.min(from + 1999, #fresh)))
  end
  redis.call('PEXPIREAT', bucket, (k + 2) * window)
  redis.call('HINCRBY', KEYS[4], 'produced', n)
end
if repeats > 0 then redis.call('HINCRBY', KEYS[4], 'duplicates', repeats) end
return repeats > 0 and out or {'!', record}
