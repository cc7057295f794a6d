-- One step: how its fields are read and packed, and what a change of its state brings with it, in the counters, in the
-- outbox and in what waits for it. Whether the change is allowed, its caller has asked before.
-- Needs: record, grace, now, SAID, bad, h, parent, driven, steps, dirty, sends, drops, ready, del, get, keep, log,
--     member
-- Gives: step_at, touch, packed, send, leave, close, again, give_back, release

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
