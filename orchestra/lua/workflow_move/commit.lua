-- The end of the workflow, and of every call: what follows from the counters, all writes at once, the reply.
-- Needs: record, context, events, outbox, id, ttl, grace, now, NUMBER, ENDED, h, was, parent, driven, over, dirty,
--     sets, gone, said, sends, drops, ready, shared, forced, put, get, log, step_at, packed
-- Gives: look, reopened, finish_workflow, expire, answer, no

local function output() -- the result of the last that completed, or of each step that nothing waits for
  local sinks = {}
  for i in string.gmatch(get('sinks') or '', '%d+') do sinks[#sinks + 1] = tonumber(i) end
  if #sinks < 2 then
    for i = h.planned - 1, 0, -1 do
      if step_at(i).state == 'C' then return get('r:' .. i) or '\192' end
    end
    return '\192'
  end
  local n = #sinks
  local out = {n < 16 and string.char(0x80 + n) or string.char(0xde, math.floor(n / 256), n % 256)}
  for _, i in ipairs(sinks) do
    local s = step_at(i)
    out[#out + 1] = cmsgpack.pack(s.id)
    out[#out + 1] = s.state == 'C' and get('r:' .. i) or '\192'
  end
  return table.concat(out)
end

local look = id .. '|-1|1' -- the outbox entry of the workflow itself
local closing, reopened = false, false

local function finish_workflow(status, result)
  h.status, h.phase, closing = status, '', true
  put('ended', string.format(NUMBER, now))
  if result then shared['c:final_output'] = result end
  if parent then sends[look] = now + grace else drops[look] = true end
  log('workflow.' .. status, nil, status ~= 'completed' and get('error') or nil)
end

local function settle() -- what follows for the workflow of a driven one
  if not driven or over or closing then return end
  if h.phase == 'running' or h.phase == 'paused' then
    if h.left == 0 then finish_workflow('completed', output()) end
  elseif h.phase == 'compensating' then
    if h.left == 0 then finish_workflow(get('cancelled') and 'cancelled' or 'failed') end
  elseif h.running == 0 then
    if h.undo > 0 or h.children > 0 then
      sends[look] = now + grace
    else
      finish_workflow(get('cancelled') and 'cancelled' or 'failed')
    end
  end
end

local function expire()
  if ttl == 0 then return end
  redis.call('ZADD', KEYS[7], string.format(NUMBER, now + ttl), id)
  for k = 1, 3 do redis.call('PEXPIRE', KEYS[k], ttl) end
end

local function commit()
  while h.current < h.planned and ENDED[step_at(h.current).state] do h.current = h.current + 1 end
  for i, s in pairs(dirty) do put('q:' .. i, packed(s)) end
  for name, v in pairs(h) do
    if was[name] ~= v then put(name, type(v) == 'number' and string.format(NUMBER, v) or v) end
  end
  local couples, names = {}, {}
  for field, v in pairs(sets) do
    couples[#couples + 1] = field
    couples[#couples + 1] = v
  end
  for field in pairs(gone) do names[#names + 1] = field end
  if #couples + #names + #said == 0 and not forced then return end
  -- Every key that is about to be written is looked at: one of the wrong kind changes nothing.
  if next(shared) then redis.call('HLEN', context) end
  if #said > 0 then redis.call('XLEN', events) end
  if next(sends) or next(drops) then redis.call('ZCARD', outbox) end
  if closing then redis.call('XLEN', KEYS[5]) end
  if closing or reopened then redis.call('ZCARD', KEYS[7]) end
  h.version = h.version + 1
  couples[#couples + 1], couples[#couples + 2] = 'version', string.format(NUMBER, h.version)
  for from = 1, #couples, 2000 do redis.call('HSET', record, unpack(couples, from, math.min(from + 1999, #couples))) end
  for field, v in pairs(shared) do redis.call('HSET', context, field, v) end
  for _, e in ipairs(said) do
    local row = {'kind', e[1]}
    if e[2] then row[3], row[4] = 'step', e[2] end
    if e[3] then row[#row + 1], row[#row + 2] = 'data', e[3] end
    redis.call('XADD', events, 'MAXLEN', '~', 100000, '*', unpack(row))
  end
  for name, due in pairs(sends) do redis.call('ZADD', outbox, string.format(NUMBER, due), name) end
  for from = 1, #names, 2000 do redis.call('HDEL', record, unpack(names, from, math.min(from + 1999, #names))) end
  if reopened then
    for k = 1, 3 do redis.call('PERSIST', KEYS[k]) end
    redis.call('ZREM', KEYS[7], id)
  end
  if closing then
    redis.call('XADD', KEYS[5], 'MAXLEN', '~', 10000, '*', 'id', id, 'status', h.status)
    if not parent then expire() end -- a child is kept until its parent has been told
  end
end

local function drop() -- after the commit: a member leaves the outbox last
  for name in pairs(drops) do
    if not sends[name] then redis.call('ZREM', outbox, name) end
  end
end

local function answer(done, why, more)
  settle()
  commit()
  drop()
  local rows, task = {}, ''
  for k, s in ipairs(ready) do
    local f = redis.call('HMGET', record, 'p:' .. s.i, 'task')
    if k == 1 then task = f[2] or '' end
    rows[#rows + 1] = s.i
    rows[#rows + 1] = s.series
    rows[#rows + 1] = f[1] or ''
  end
  local attention = closing and parent or not over and h.running == 0 and (h.undo > 0 or h.children > 0)
    and (h.phase == 'failing' or h.phase == 'cancelling')
  return {done, why, h.status, h.phase, h.left, h.running, h.version, h.steps, task, rows, more or {}, parent or '',
    attention and 1 or 0}
end
local function no(why, more) return answer(0, why, more) end
