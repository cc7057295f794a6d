#!lua flags=allow-oom
-- Moves a workflow: one change of one step, of its phase or of its signals, with all that follows from it.
-- Invariant: every write is gathered and done at the end, so a damaged field changes nothing. `left` counts the steps that
--     have not ended, `running` those in state R, `undo` those COMPLETED with something that undoes them; what may be
--     sent and is not begun is a member of the outbox, added by the change that made it ready. Repeating a change
--     changes nothing and tells again which of the steps it made ready are still in the outbox.
-- KEYS: 1 record, hash | 2 context and signals, hash | 3 event log, stream | 4 outbox | 5 stream of those that ended
--       6 index by creation | 7 sorted set: ended workflow → when it may be forgotten
-- ARGV: 1 op | 2 workflow | 3 ms an ended workflow is kept, 0: for ever | 4 ms after which the outbox is to be swept
--       5 largest result, bytes | 6 … as the op has them, see there
-- Returns: {1 done or 0 refused, why, status, phase, left, running, version, steps, task, ready (index, series, plan, …), more,
--     parent, 1: the phase has to be moved on}
-- Complexity: O(the steps that change and their dependents); resume, cancel and undo: O(steps)
local record, context, events, outbox = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, ttl, grace, largest = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local FORMAT, NUMBER = '3', '%.0f'
local ENDED = {C = true, F = true, S = true}
local SAID = {C = 'step.completed', F = 'step.failed', S = 'step.skipped', B = 'step.failed'}
local LETTER = {pending = 'P', running = 'R', completed = 'C', failed = 'F', skipped = 'S'}

local function arg(n) return ARGV[5 + n] end
local function num(n) return tonumber(ARGV[5 + n]) end
local function bad(field) error({err = 'CORRUPT ' .. field}) end

-- The head: texts, and numbers that count.
local TEXTS = {'status', 'phase', 'driven', 'token'}
local COUNTS = {'steps', 'planned', 'left', 'running', 'undo', 'children', 'order', 'current', 'version'}
local h, was = {}, {}
local head = redis.call('HMGET', record, 'status', 'phase', 'driven', 'token', 'steps', 'planned', 'left', 'running', 'undo',
  'children', 'order', 'current', 'version', 'format', 'parent')
if not head[14] then
  return {0, redis.call('EXISTS', record) == 0 and 'unknown' or 'corrupt format'}
end
if head[14] ~= FORMAT then return {0, 'format ' .. head[14]} end
for k, name in ipairs(TEXTS) do h[name] = head[k] or bad(name) end
for k, name in ipairs(COUNTS) do h[name] = tonumber(head[#TEXTS + k] or '') or bad(name) end
local parent = head[15]
local STATUSES = {pending = 1, running = 1, completed = 1, failed = 1, cancelled = 1}
local PHASES = {[''] = 1, running = 1, paused = 1, failing = 1, cancelling = 1, compensating = 1}
if not STATUSES[h.status] then bad('status') end
if not PHASES[h.phase] then bad('phase') end
for name, v in pairs(h) do was[name] = v end
local driven, over = h.driven == '1', h.status ~= 'pending' and h.status ~= 'running'

-- What this call will write.
local steps, dirty, sets, gone, said, sends, drops, ready = {}, {}, {}, {}, {}, {}, {}, {}
local shared, forced = {}, false -- for the context

local function put(field, value)
  sets[field], gone[field] = value, nil
end
local function del(field)
  sets[field], gone[field] = nil, true
end
local function get(field)
  if sets[field] then return sets[field] end
  return not gone[field] and redis.call('HGET', record, field)
end
local function keep(field, value) -- "" stands for None, which is not recorded
  if value == '' then del(field) else put(field, value) end
end
local function log(kind, i, data) said[#said + 1] = {kind, i, data} end
local function member(s) return id .. '|' .. s.i .. '|' .. string.format(NUMBER, s.series) end

local function step_at(i)
  local s = steps[i]
  if s then return s end
  local f = redis.call('HMGET', record, 'n:' .. i, 'q:' .. i)
  if not f[1] then bad('n:' .. i) end
  s = {i = i}
  local linked, undo, parent, waits
  s.policy, linked, undo, s.grown, parent, waits, s.id, s.next =
    string.match(f[1], '^([fsc])([l-])([u-])([ic-]) (%-?%d+) (%d+) (%S+)([ %d]*)$')
  if not s.policy then bad('n:' .. i) end
  s.linked, s.undo, s.parent = linked == 'l', undo == 'u', tonumber(parent)
  local q = f[2] or ('P 0 1 0 ' .. waits .. ' 0 0 0 0 0')
  local n = {string.match(q, '^(%u) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')}
  if not n[1] then bad('q:' .. i) end
  s.state = n[1]
  for k, name in ipairs({'attempt', 'series', 'fence', 'unmet', 'alive', 'started', 'finished', 'order', 'copy'}) do
    s[name] = tonumber(n[k + 1])
  end
  steps[i] = s
  return s
end
local function touch(s) dirty[s.i] = s end
local function packed(s)
  return string.format('%s %.0f %.0f %.0f %.0f %.0f %.0f %.0f %.0f %.0f', s.state, s.attempt, s.series, s.fence, s.unmet,
    s.alive, s.started, s.finished, s.order, s.copy)
end

local function send(s) -- it may run: into the outbox, unless the workflow holds or ends
  if not driven then return end
  if h.phase == 'paused' then
    s.state = 'H'
  elseif h.phase == 'running' or (h.phase == 'compensating' and s.grown == 'c') then
    sends[member(s)] = now + grace
    ready[#ready + 1] = s
    log('step.ready', s.i)
  end
  touch(s)
end

local function unpark(s)
  local kind, mode, due, name = string.match(get('w:' .. s.i) or '', '^(%a+) (%a+) (%d+) ?(.*)$')
  if kind == 'signal' then
    local waiting = {}
    for other in string.gmatch(get('a:' .. name) or '', '%d+') do
      if tonumber(other) ~= s.i then waiting[#waiting + 1] = other end
    end
    keep('a:' .. name, table.concat(waiting, ' '))
  elseif kind == 'child' then
    h.children = math.max(0, h.children - 1)
  end
  del('w:' .. s.i)
  del('m:' .. s.i)
  drops[member(s)] = true
end

local function leave(s) -- whatever it did, it does it no longer
  if s.state == 'R' then h.running = h.running - 1 end
  if s.state == 'W' then unpark(s) end
end
local function close(s, state, data)
  if s.state ~= 'R' then drops[member(s)] = true end -- what runs has left it
  leave(s)
  s.state, s.finished, h.left = state, now, h.left - 1
  if state == 'C' then
    h.order = h.order + 1
    s.order = h.order
    if s.undo then h.undo = h.undo + 1 end
  end
  touch(s)
  log(SAID[state], s.i, data)
end
local function again(s) -- ready once more, under a new task id
  leave(s)
  drops[member(s)] = true
  s.state, s.series, s.fence, s.copy = 'P', s.series + 1, 0, 0
  touch(s)
  send(s)
end

local function give_back(s) -- it does not run now
  drops[member(s)] = true
  if s.state == 'P' then return end
  leave(s)
  s.state = 'P'
  touch(s)
end

local function release(first) -- its dependents; those whose dependencies were all skipped are skipped, and so on
  local stack = {first}
  while #stack > 0 do
    local s = table.remove(stack)
    for d in string.gmatch(s.next, '%d+') do
      local t = step_at(tonumber(d))
      t.unmet = t.unmet - 1
      if s.state ~= 'S' then t.alive = t.alive + 1 end
      touch(t)
      if t.unmet == 0 and t.state == 'P' then
        if t.linked and t.alive == 0 then
          close(t, 'S')
          stack[#stack + 1] = t
        else
          send(t)
        end
      end
    end
  end
end

local failed, ended -- they call each other through maps of maps

local function gather(x) -- the results of the items of a map, as one list
  local n = x.last - x.first + 1
  local out = {n < 16 and string.char(0x90 + n) or string.char(0xdc, math.floor(n / 256), n % 256)}
  local size = 3
  for i = x.first, x.last do
    out[#out + 1] = step_at(i).state == 'C' and get('r:' .. i) or '\192'
    size = size + #out[#out]
  end
  return size <= largest and table.concat(out), size
end

local function item_ended(s)
  local map = step_at(s.parent)
  local x, field = {}, 'x:' .. s.parent
  x.first, x.last, x.next, x.left, x.fault = string.match(get(field) or '', '^(%d+) (%d+) (%d+) (%d+) (%-?%d+)$')
  for name, v in pairs(x) do x[name] = tonumber(v) end
  if not x.first then bad(field) end
  x.left = x.left - 1
  if s.state == 'F' and s.policy == 'f' and x.fault < 0 then x.fault = s.i end
  if x.fault >= 0 then
    while x.next <= x.last do
      close(step_at(x.next), 'S')
      x.next, x.left = x.next + 1, x.left - 1
    end
  elseif x.next <= x.last then
    send(step_at(x.next)) -- while the workflow ends it is only noted, so that a resume knows that its turn has come
    x.next = x.next + 1
  end
  put(field, string.format('%d %d %d %d %d', x.first, x.last, x.next, x.left, x.fault))
  if x.left > 0 or map.state ~= 'W' then return end
  if x.fault >= 0 then return failed(map, get('e:' .. x.fault) or cmsgpack.pack({message = 'an item failed'})) end
  local list, size = gather(x)
  if not list then
    local text = 'the results of its items take ' .. size .. ' bytes; the limit is ' .. largest
    return failed(map, cmsgpack.pack({type = 'TaskTooLargeError', message = text}))
  end
  put('r:' .. map.i, list)
  close(map, 'C')
  ended(map)
end

function ended(s)
  if s.grown == 'i' then item_ended(s) else release(s) end
end

local function stop(phase, problem, culprit) -- nothing new begins
  h.phase = phase
  put('error', problem)
  if culprit then put('culprit', string.format('%d', culprit)) end
  log('workflow.' .. phase, nil, problem)
end

function failed(s, problem)
  keep('e:' .. s.i, problem)
  if s.grown == '-' and s.policy == 's' then
    close(s, 'S', problem)
    return ended(s)
  end
  close(s, 'F', problem)
  if s.grown ~= '-' or s.policy == 'c' then return ended(s) end
  if h.phase == 'running' or h.phase == 'paused' then stop('failing', problem, s.i) end
end

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

-- The ops. One chain of ifs instead of a function each, because making a function costs more than looking for it.
local op = ARGV[1]
if string.find(' begin look finish retrying park fire grow update fail_step ', ' ' .. op .. ' ', 1, true) then
  local index = num(1)
  if not index or index < 0 or index >= h.steps or index % 1 > 0 then return no('index') end
end

-- index, series, fence, claim: a delivery of the step is about to run. More: what its agent call needs.
-- A claim is "<life>:<copy>": the beginning of the record's token, and which sending of the step it was, 0: that does not matter.
if op == 'begin' then
  local s, fence = step_at(num(1)), num(3)
  local foreign, copy = is_foreign(s, arg(4))
  if num(2) ~= s.series or foreign and not ENDED[s.state] then return no('stale') end
  if is_early(s) then return no('early') end
  if ENDED[s.state] or s.state == 'W' then
    if s.state == 'W' then unsent_items(s.i) else unsent_after(s) end
    return no('done')
  end
  if s.state == 'R' and fence < s.fence then return no('stale') end
  if s.state == 'R' and fence == s.fence then return answer(1, 'go', known(s)) end -- its reply was lost
  if stops(s) then
    give_back(s)
    return no('stop')
  end
  drops[member(s)] = true
  if h.phase == 'paused' and s.state ~= 'R' then
    if s.state ~= 'H' then touch(s) end
    s.state = 'H'
    return no('held')
  end
  if s.state ~= 'R' then h.running = h.running + 1 end
  s.state, s.attempt, s.fence, s.started, s.finished, s.copy = 'R', s.attempt + 1, fence, now, 0, copy
  touch(s)
  log('step.started', s.i)
  return answer(1, 'go', known(s))
end

-- index: what its args and condition may refer to; changes nothing.
if op == 'look' then
  return answer(1, '', known(step_at(num(1))))
end

-- index, series or "", fence or "", completed|failed|skipped, result, error, claim
if op == 'finish' then
  local s, state = step_at(num(1)), LETTER[arg(4)]
  if is_stale(s, arg(2), arg(3), arg(7)) then return no('stale') end
  if is_early(s) then return no('early') end
  if ENDED[s.state] then
    if s.state ~= state and not (state == 'F' and s.state == 'S' and s.policy == 's') then return no('ended') end
    unsent_after(s)
    return answer(1, 'repeated')
  end
  if over then return no('over') end
  if h.phase == 'compensating' and s.grown ~= 'c' then return no('stop') end
  if state == 'F' then
    failed(s, arg(6))
  else
    if arg(5) ~= '' then put('r:' .. s.i, arg(5)) end
    if arg(6) ~= '' then put('e:' .. s.i, arg(6)) end
    close(s, state)
    ended(s)
  end
  return answer(1, '')
end

-- index, series, fence or "", 1: it counts as an attempt, event data, claim: the queue brings the step back later
if op == 'retrying' then
  local s = step_at(num(1))
  if is_stale(s, arg(2), arg(3), arg(6)) then return no('stale') end
  if s.state ~= 'R' then return answer(s.state == 'P' and 1 or 0, s.state == 'P' and 'repeated' or 'ended') end
  leave(s)
  s.state = 'P'
  touch(s)
  if arg(4) == '1' then log('step.retrying', s.i, arg(5)) else s.attempt = math.max(0, s.attempt - 1) end
  return answer(1, '')
end

-- index, series, fence or "", signal|timer|child, its name, ms until it is due or 0, prompt, event data, claim
if op == 'park' then
  local s, kind, name, due = step_at(num(1)), arg(4), arg(5), num(6)
  if is_stale(s, arg(2), arg(3), arg(9)) then return no('stale') end
  if is_early(s) then return no('early') end
  if ENDED[s.state] or s.state == 'W' then
    if s.state ~= 'W' then unsent_after(s) end
    return answer(1, 'repeated')
  end
  if stops(s) then
    give_back(s)
    return no('stop')
  end
  local mode = s.state == 'R' and kind == 'signal' and 'again' or 'result'
  local value = kind == 'signal' and redis.call('HGET', context, 'g:' .. name)
  if value and mode == 'again' then
    again(s)
    return answer(1, 'signalled')
  elseif value then
    put('r:' .. s.i, value)
    close(s, 'C')
    ended(s)
    return answer(1, 'signalled')
  end
  leave(s)
  if s.started == 0 then s.started = now end
  s.state = 'W'
  touch(s)
  put('w:' .. s.i, string.format('%s %s %.0f %s', kind, mode, due > 0 and now + due or 0, name))
  keep('m:' .. s.i, arg(7))
  if kind == 'signal' then put('a:' .. name, ((get('a:' .. name) or '') .. ' ' .. s.i):match('^ ?(.*)$')) end
  if kind == 'child' then h.children = h.children + 1 end
  if due > 0 then sends[member(s)] = now + due + 2000 else drops[member(s)] = true end
  log('step.waiting', s.i, arg(8))
  return answer(1, '')
end

-- index, series, error of a signal that did not come: what it waits for is due
if op == 'fire' then
  local s = step_at(num(1))
  if num(2) ~= s.series then return no('stale') end
  if s.state ~= 'W' then
    unsent_after(s)
    return answer(1, 'repeated')
  end
  local kind, due = string.match(get('w:' .. s.i) or '', '^(%a+) %a+ (%d+)')
  if not kind or tonumber(due) == 0 or tonumber(due) > now then return no('early') end
  if stops(s) then return no('stop') end
  if kind == 'timer' then
    close(s, 'C')
    ended(s)
  else
    failed(s, arg(3))
  end
  return answer(1, '')
end

-- name, value, token of the call, event data
if op == 'signal' then
  local name, value = arg(1), arg(2)
  if redis.call('HEXISTS', context, 'g:' .. name) == 1 then
    local mine = get('b:' .. name) == arg(3)
    return answer(mine and 1 or 0, mine and 'repeated' or 'answered')
  end
  if over then return no('over') end
  if h.phase == 'failing' or h.phase == 'cancelling' then return no('stop') end
  local waiting = get('a:' .. name) or ''
  put('b:' .. name, arg(3))
  log('signal', nil, arg(4))
  for i in string.gmatch(waiting, '%d+') do
    local s = step_at(tonumber(i))
    if s.state == 'W' and not stops(s) then
      if string.match(get('w:' .. i) or '', '^signal again ') then
        again(s)
      else
        put('r:' .. i, value)
        close(s, 'C')
        ended(s)
      end
    end
  end
  shared['g:' .. name] = value
  return answer(1, '')
end

-- index, series, fence or "", most at once or 0, number of items, then plan, policy and id of each; event data
if op == 'grow' then
  local s, most, n = step_at(num(1)), num(4), num(5)
  if is_stale(s, arg(2), arg(3)) then return no('stale') end
  if is_early(s) then return no('early') end
  if s.state == 'W' then unsent_items(s.i) end
  if ENDED[s.state] then unsent_after(s) end
  if ENDED[s.state] or s.state == 'W' then return answer(1, 'repeated') end
  if stops(s) then return no('stop') end
  if n == 0 then
    put('r:' .. s.i, '\144')
    close(s, 'C')
    ended(s)
    return answer(1, '')
  end
  local first, open = h.steps, most > 0 and math.min(most, n) or n
  leave(s)
  s.state, s.started = 'W', now
  touch(s)
  drops[member(s)] = true
  put('w:' .. s.i, 'items result 0 ' .. n)
  put('x:' .. s.i, string.format('%d %d %d %d -1', first, first + n - 1, first + open, n))
  log('step.waiting', s.i, arg(6 + 3 * n))
  h.steps, h.left = first + n, h.left + n
  for k = 0, n - 1 do
    local i, at = first + k, 6 + 3 * k
    put('p:' .. i, arg(at))
    put('n:' .. i, string.format('%s--i %d 0 %s', arg(at + 1), s.i, arg(at + 2)))
    if k < open then
      steps[i] = {i = i, policy = arg(at + 1), linked = false, undo = false, grown = 'i', parent = s.i, id = arg(at + 2),
        next = '', state = 'P', attempt = 0, series = 1, fence = 0, unmet = 0, alive = 0, started = 0, finished = 0, order = 0,
        copy = 0}
      send(steps[i])
    end
  end
  return answer(1, '')
end

-- version that was read, number of steps, then plan, id and index of what it undoes of each, in their order
if op == 'undo' then
  local n = num(2)
  if h.phase == 'compensating' then
    for i = tonumber(get('undoing') or bad('undoing')), h.steps - 1 do unsent(step_at(i)) end
    return answer(1, 'repeated')
  end
  if over then return answer(1, 'over') end
  if (h.phase ~= 'failing' and h.phase ~= 'cancelling') or h.running > 0 then return no('early') end
  if num(1) ~= h.version then return no('conflict') end
  h.undo, h.children = 0, 0
  drops[look] = true
  if n == 0 then return answer(1, '') end
  h.left, h.phase = n, 'compensating'
  log('workflow.compensating')
  put('undoing', string.format('%d', h.steps))
  for k = 0, n - 1 do
    local i, at = h.steps + k, 3 + 3 * k
    put('p:' .. i, arg(at))
    put('n:' .. i, string.format('c--c %s %d %s%s', arg(at + 2), k > 0 and 1 or 0, arg(at + 1), k < n - 1 and ' ' .. i + 1 or ''))
  end
  local i = h.steps
  h.steps = i + n
  steps[i] = {i = i, policy = 'c', linked = false, undo = false, grown = 'c', parent = num(5), id = arg(4),
    next = n > 1 and ' ' .. i + 1 or '', state = 'P', attempt = 0, series = 1, fence = 0, unmet = 0, alive = 0, started = 0,
    finished = 0, order = 0, copy = 0}
  send(steps[i])
  return answer(1, '')
end

-- name, value: an entry of the context
if op == 'context' then
  if over then return no('over') end
  if redis.call('HGET', context, 'c:' .. arg(1)) == arg(2) then return answer(1, 'repeated') end
  forced = true
  shared['c:' .. arg(1)] = arg(2)
  return answer(1, '')
end

-- nothing: the parent has been told of the end
if op == 'told' then
  if over and redis.call('PTTL', record) == -1 then expire() end
  drops[look] = true
  return answer(1, '')
end

-- pairs of index and series that the outbox had: those that may be sent; more: those that wait and are due
if op == 'sweep' then
  local due = {}
  for k = 6, #ARGV, 2 do
    local i, series = tonumber(ARGV[k]), tonumber(ARGV[k + 1])
    local name = id .. '|' .. i .. '|' .. ARGV[k + 1]
    if i < 0 then
      if not parent and (over or h.phase ~= 'failing' and h.phase ~= 'cancelling') then drops[name] = true end
    elseif i >= h.steps or over or step_at(i).series ~= series then
      drops[name] = true
    elseif step_at(i).state == 'W' then
      local at = tonumber(string.match(get('w:' .. i) or '', '^%a+ %a+ (%d+)') or 0)
      if at == 0 then drops[name] = true elseif at <= now then due[#due + 1], due[#due + 2] = i, series end
    elseif step_at(i).state == 'P' then
      unsent(step_at(i))
    else
      drops[name] = true
    end
  end
  return answer(1, '', due)
end

if op == 'pause' then
  if over or (h.phase ~= 'running' and h.phase ~= 'paused') then return no(over and 'over' or h.phase) end
  if h.phase == 'running' then
    h.phase = 'paused'
    log('workflow.paused')
  end
  return answer(1, '')
end

-- nothing: go on; a workflow that failed, and undid nothing, begins again where it failed
if op == 'resume' then
  local reopen = h.status == 'failed' and driven and not get('undoing')
  if over and not reopen then return no(h.status == 'failed' and 'compensated' or 'over') end
  if not over and h.phase ~= 'paused' then return answer(h.phase == 'running' and 1 or 0, h.phase) end
  h.status, h.phase = 'running', 'running'
  log('workflow.resumed')
  if reopen then
    over = false
    for _, field in ipairs({'ended', 'error', 'culprit'}) do del(field) end
    reopened = true
    drops[look] = true
  end
  for i = 0, h.steps - 1 do
    local s = step_at(i)
    if s.state == 'H' then
      again(s)
    elseif reopen and s.grown == '-' and s.state == 'F' and s.policy == 'f' then
      h.left, h.current = h.left + 1, math.min(h.current, i)
      s.finished = 0
      del('e:' .. i)
      again(s)
    elseif reopen and s.state == 'P' and s.unmet == 0 then
      local x = s.grown == 'i' and tonumber(string.match(get('x:' .. s.parent) or '', '^%d+ %d+ (%d+)') or 0)
      if not x or i < x then again(s) end
    elseif reopen and s.state == 'W' then -- its child was cancelled with it; its timer may have left the outbox
      local kind, due = string.match(get('w:' .. i) or '', '^(%a+) %a+ (%d+)')
      if kind == 'child' then again(s) elseif tonumber(due or 0) > 0 then sends[member(s)] = now + grace end
    end
  end
  return answer(1, '')
end

-- error: more: what runs (index, series, …), and the children that do
if op == 'cancel' then
  if over then return answer(h.status == 'cancelled' and 1 or 0, 'over') end
  if h.phase == 'failing' or h.phase == 'compensating' then return no(h.phase) end
  local runs, children = {}, {}
  if h.running > 0 or h.children > 0 then
    for i = 0, h.steps - 1 do
      local s = step_at(i)
      if s.state == 'R' then
        runs[#runs + 1] = i
        runs[#runs + 1] = s.series
      elseif s.state == 'W' then
        children[#children + 1] = string.match(get('w:' .. i) or '', '^child %a+ %d+ (.*)$')
      end
    end
  end
  if h.phase ~= 'cancelling' then
    put('cancelled', '1')
    stop('cancelling', arg(1))
    if not driven then finish_workflow('cancelled') end
  end
  return answer(1, '', {runs, children})
end

if op == 'update' or op == 'fail_step' then
  local EDGES = {P = 'RCFS', R = 'PRCFS', B = 'PRS', H = '', W = '', C = '', F = '', S = ''}
  local function update(s, state, attempt, result, problem)
    if attempt ~= '' and tonumber(attempt) ~= s.attempt then return 'attempt' end
    local now_is = s.state == 'B' and 'F' or s.state
    if state == now_is and state ~= 'R' then
      if (get('r:' .. s.i) or '') == result and (get('e:' .. s.i) or '') == problem then return 'same' end
      return over and 'over' or 'other'
    end
    if over then return 'over' end
    if s.unmet > 0 and not ENDED[s.state] then return 'wait' end
    if not string.find(EDGES[s.state], state, 1, true) then return 'edge' end
    h.status, h.phase = 'running', 'running'
    keep('r:' .. s.i, result)
    keep('e:' .. s.i, problem)
    if state == 'C' or state == 'S' then
      close(s, state)
      ended(s)
      return ''
    end
    leave(s)
    if state == 'R' then
      h.running, s.attempt, s.started = h.running + 1, s.attempt + 1, now
      log('step.started', s.i)
    elseif state == 'P' then
      s.started = 0
    else
      log('step.failed', s.i, problem)
    end
    s.state, s.finished = state == 'F' and 'B' or state, state == 'F' and now or 0
    touch(s)
    return ''
  end

  -- By hand: index, state, attempt that is recorded or "", result, error, token of the call. More: the step.
  if op == 'update' then
    if driven then return no('driven') end
    local s = step_at(num(1))
    if get('last') == arg(6) then return answer(1, 'same', row(s)) end -- its reply was lost
    local why = update(s, LETTER[arg(2)], arg(3), arg(4), arg(5))
    if why == '' then put('last', arg(6)) end
    return answer((why == '' or why == 'same') and 1 or 0, why, row(s))
  end

  -- By hand: index, attempt or "", error, token of the call: the step failed, and what that means by its policy
  if op == 'fail_step' then
    if driven then return no('driven') end
    local s, problem = step_at(num(1)), arg(3)
    if get('last') == arg(4) then return answer(1, 'same', row(s)) end
    if (s.state == 'F' or s.state == 'S' and s.policy == 's' and get('e:' .. s.i)) and arg(2) == '' then
      return answer(1, 'same', row(s))
    end
    if s.state ~= 'B' then
      local why = update(s, 'F', arg(2), '', problem)
      if why ~= '' then return no(why, row(s)) end
      if s.policy ~= 'f' then said[#said] = nil end -- it is said below
    elseif arg(2) ~= '' and tonumber(arg(2)) ~= s.attempt then
      return no('attempt', row(s))
    elseif over then
      return answer(1, 'same', row(s))
    end
    put('last', arg(4))
    if s.policy == 'f' then
      put('error', problem)
      put('culprit', string.format('%d', s.i))
      finish_workflow('failed')
    else
      close(s, s.policy == 's' and 'S' or 'F', get('e:' .. s.i))
      ended(s)
    end
    return answer(1, '', row(s))
  end
end

-- By hand: completed|failed, its output or its error. More: the step that is in the way.
if op == 'finalize' then
  local status = arg(1)
  if over then return answer(h.status == status and 1 or 0, h.status == status and 'same' or 'over') end
  if driven and status == 'failed' then
    if h.phase == 'running' or h.phase == 'paused' then stop('failing', arg(2)) end
    return answer(1, '')
  end
  for i = h.current, h.steps - 1 do
    local s = step_at(i)
    if status == 'completed' and (s.state == 'R' or s.state == 'B' or s.state == 'W') then return no('busy', row(s)) end
    if s.state == 'R' then
      put('e:' .. i, arg(2))
      h.running = h.running - 1
      s.state, s.finished = 'B', now
      touch(s)
      log('step.failed', i, arg(2))
    end
  end
  if status == 'completed' then
    h.current = h.planned
  else
    put('error', arg(2))
  end
  finish_workflow(status, status == 'completed' and arg(2) or nil)
  return answer(1, '')
end
