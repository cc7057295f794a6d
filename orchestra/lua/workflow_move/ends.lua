-- What follows from a step's end: for its dependents, for the map that it is an item of, for the workflow when it failed.
-- Needs: largest, bad, h, put, get, keep, log, step_at, send, close, release
-- Gives: failed, ended, stop

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
