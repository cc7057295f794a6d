-- What the ops ask before they change a step, and what they tell about it: only looks, but for what `unsent` puts on hold.
-- Needs: record, context, outbox, h, over, drops, ready, get, member, step_at, touch, packed
-- Gives: unsent, unsent_after, unsent_items, known, row, stops, is_early, is_foreign, is_stale

local function unsent(s) -- for who repeats: it may run and has not been begun
  if s.state ~= 'P' or s.unmet > 0 or not redis.call('ZSCORE', outbox, member(s)) then return end
  if h.phase ~= 'paused' then
    ready[#ready + 1] = s
  else
    s.state, drops[member(s)] = 'H', true
    touch(s)
  end
end
local function unsent_after(s)
  for d in string.gmatch(s.next, '%d+') do unsent(step_at(tonumber(d))) end
end
local function unsent_items(i)
  local first, last, next = string.match(get('x:' .. i) or '', '^(%d+) (%d+) (%d+)')
  for k = tonumber(first or 0), tonumber(next or 0) - 1 do unsent(step_at(k)) end
end
local function known(s) -- what a step's args may refer to: rows of {index, n, q, result, error}
  local f = redis.call('HMGET', record, 'p:' .. s.i, 'n:' .. s.i, 'input', 'task', 'd:' .. s.i, 'plain')
  local reads = f[5] or ''
  if s.parent >= 0 then reads = redis.call('HGET', record, 'd:' .. s.parent) or '' end
  if s.grown == 'c' then reads = reads .. ' ' .. s.parent end
  local rows = {}
  for i in string.gmatch(reads, '%d+') do
    local r = redis.call('HMGET', record, 'n:' .. i, 'q:' .. i, 'r:' .. i, 'e:' .. i)
    rows[#rows + 1] = {tonumber(i), r[1] or '', r[2] or '', r[3] or '', r[4] or ''}
  end
  return {f[1] or '', f[2], packed(s), f[3] or '', f[4] or '', redis.call('HGETALL', context), rows, f[5] or '', f[6] or '0', s.i}
end
local function row(s) -- the step for who changed it by hand
  local f = redis.call('HMGET', record, 'p:' .. s.i, 'n:' .. s.i, 'd:' .. s.i)
  return {s.i, f[1] or '', f[2], packed(s), get('r:' .. s.i) or '', get('e:' .. s.i) or '', f[3] or ''}
end
local function stops(s) -- nothing new begins, and only what undoes may end
  if h.phase == 'compensating' then return s.grown ~= 'c' end
  return over or h.phase == 'failing' or h.phase == 'cancelling'
end
local function is_early(s) -- what it depends on has not ended, or its turn in a map has not come
  if s.state ~= 'P' then return false end
  if s.unmet > 0 then return true end
  return s.grown == 'i' and s.i >= tonumber(string.match(get('x:' .. s.parent) or '', '^%d+ %d+ (%d+)') or 0)
end
local function is_foreign(s, claim) -- of an earlier life of the workflow, or of a second sending while the first one has it
  local life, copy = string.match(claim or '', '^(%x*):(%d+)$')
  if not life then return false, 0 end
  copy = tonumber(copy)
  return life ~= string.sub(h.token, 1, #life) or s.copy > 0 and copy > 0 and copy ~= s.copy, copy
end
local function is_stale(s, series, fence, claim)
  if series ~= '' and tonumber(series) ~= s.series or is_foreign(s, claim) then return true end
  return fence ~= '' and (tonumber(fence) < s.fence or s.state == 'R' and tonumber(fence) ~= s.fence)
end
