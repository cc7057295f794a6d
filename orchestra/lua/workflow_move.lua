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

-- part: workflow_move/fields
-- part: workflow_move/step
-- part: workflow_move/ends
-- part: workflow_move/commit
-- part: workflow_move/questions

-- The ops. One chain of ifs instead of a function each, because making a function costs more than looking for it.
local op = ARGV[1]
if string.find(' begin look finish retrying park fire grow update fail_step ', ' ' .. op .. ' ', 1, true) then
  local index = num(1)
  if not index or index < 0 or index >= h.steps or index % 1 > 0 then return no('index') end
end

-- part: workflow_move/running
-- part: workflow_move/waiting
-- part: workflow_move/whole
-- part: workflow_move/by_hand
