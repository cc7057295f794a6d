-- The ops of a step that waits for something else: park, fire and signal; grow, for the items of a map.
-- Needs: context, now, ENDED, arg, num, h, over, steps, sends, drops, shared, put, get, keep, log, member, step_at,
--     touch, send, leave, close, again, give_back, failed, ended, answer, no, unsent_after, unsent_items, stops,
--     is_early, is_stale, op
-- Gives: nothing

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
