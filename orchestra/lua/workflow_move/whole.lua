-- The ops of a workflow as a whole: undo, context, told, sweep, pause, resume, cancel.
-- Needs: record, context, id, grace, now, arg, num, bad, h, parent, driven, over, steps, sends, drops, shared,
--     forced, put, del, get, log, member, step_at, send, again, stop, look, reopened, finish_workflow, expire,
--     answer, no, unsent, op
-- Gives: nothing

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
