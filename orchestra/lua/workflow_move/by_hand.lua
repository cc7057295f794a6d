-- The ops of who moves a workflow that no worker drives: update, fail_step, finalize.
-- Needs: now, ENDED, LETTER, arg, num, h, driven, over, said, put, get, keep, log, step_at, touch, leave, close,
--     ended, stop, finish_workflow, answer, no, row, op
-- Gives: nothing

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
