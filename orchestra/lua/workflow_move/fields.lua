-- The record's fields: its head, checked as it is read, and every write of this call, gathered until the commit.
-- Needs: record, id, FORMAT, NUMBER, bad
-- Gives: h, was, parent, driven, over, steps, dirty, sets, gone, said, sends, drops, ready, shared, forced, put,
--     del, get, keep, log, member

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
