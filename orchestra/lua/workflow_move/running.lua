-- The ops of a step that runs: begin, look, finish, retrying.
-- Needs: now, ENDED, LETTER, arg, num, h, over, drops, put, log, member, step_at, touch, leave, close, give_back,
--     failed, ended, answer, no, unsent_after, unsent_items, known, stops, is_early, is_foreign, is_stale, op
-- Gives: nothing

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
