-- The state of one circuit breaker that processes share: opening it, permits for probes, their outcomes, orders by hand.
--
-- Invariant: at most n permits of probes are out at one time. Era grows with every change of state and never comes again,
--     even after the key has expired; a call made for another era changes nothing and learns the present state. An
--     outcome counts once: it uses up its permit. So a repeated call (lost reply) changes nothing more. A missing key is a
--     closed breaker.
-- KEYS: 1  hash: state open or closed, era, until (milliseconds of the Redis clock), forced 1 or 0, done, p:TOKEN → expiry
-- ARGV: 1  open | probe | success | failure | release | force_open | force_closed | reset
--       2  era that the caller knows, whole, 0 if none
--       3  recovery_timeout, milliseconds, whole, >= 1
--       4  token of the probe, or empty
--       5  n, probes at one time, whole, >= 1
--       6  successes that close it, whole, >= 1
-- Returns: state, era (text), milliseconds until probes are let through, forced 1 or 0, 1 if a permit was given
-- Complexity: O(n).

local OPS = { open = 0, probe = 1, success = 1, failure = 1, release = 1, force_open = 0, force_closed = 0, reset = 0 }
local op, recovery, token = ARGV[1], tonumber(ARGV[3]), ARGV[4]
local most, needed = tonumber(ARGV[5]), tonumber(ARGV[6])
if not (OPS[op] and tonumber(ARGV[2]) and recovery and recovery >= 1 and most and most >= 1 and needed and needed >= 1) then
  return redis.error_reply('ERR breaker: expected an operation, era, recovery >= 1, token, n >= 1, successes >= 1')
end
if OPS[op] == 1 and token == '' then
  return redis.error_reply('ERR breaker: ' .. op .. ' needs a token')
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local raw, known, probes, held = redis.call('HGETALL', KEYS[1]), {}, {}, 0
for i = 1, #raw, 2 do
  local name, value = raw[i], raw[i + 1]
  if string.sub(name, 1, 2) ~= 'p:' then
    known[name] = value
  elseif tonumber(value) and tonumber(value) > now then
    probes[name] = value
    held = held + 1
  end
end
local state, era, forced = known.state or 'closed', known.era or ARGV[2], known.forced or '0'
-- Upper clamp: a Redis clock that went back keeps nothing open for longer than one recovery.
local till = math.min(tonumber(known['until'] or '0') or 0, now + recovery)

local function keep(span)
  redis.call('PEXPIRE', KEYS[1], string.format('%.0f', span + 86400000))
end

local function become(to, by_hand)
  state, forced, till = to, by_hand, to == 'open' and now + recovery or 0
  era = string.format('%.0f', math.max((tonumber(era) or 0) + 1, now))
  local gone = {}
  for i = 1, #raw, 2 do
    if string.sub(raw[i], 1, 2) == 'p:' then gone[#gone + 1] = raw[i] end
  end
  redis.call('HSET', KEYS[1], 'state', state, 'era', era, 'until', string.format('%.0f', till), 'forced', forced, 'done', '0')
  for i = 1, #gone do redis.call('HDEL', KEYS[1], gone[i]) end
  keep(recovery)
end

local function answer(granted)
  return { state, era, math.max(0, till - now), tonumber(forced) or 0, granted }
end

if era ~= ARGV[2] then return answer(0) end
local field = 'p:' .. token
if op == 'open' then
  if state == 'closed' and forced == '0' then become('open', '0') end
elseif op == 'force_open' then
  become('open', '1')
elseif op == 'force_closed' then
  become('closed', '1')
elseif op == 'reset' then
  become('closed', '0')
elseif state == 'closed' or forced == '1' then
  return answer(0)
elseif op == 'probe' then
  if till > now then return answer(0) end
  if probes[field] then return answer(1) end
  if held >= most then return answer(0) end
  redis.call('HSET', KEYS[1], field, string.format('%.0f', now + recovery))
  for i = 1, #raw, 2 do
    if string.sub(raw[i], 1, 2) == 'p:' and not probes[raw[i]] then redis.call('HDEL', KEYS[1], raw[i]) end
  end
  keep(recovery)
  return answer(1)
elseif probes[field] then
  if op == 'failure' then
    become('open', '0')
  elseif op == 'release' then
    redis.call('HDEL', KEYS[1], field)
  elseif (tonumber(known.done or '0') or 0) + 1 >= needed then
    become('closed', '0')
  else
    redis.call('HINCRBY', KEYS[1], 'done', 1)
    redis.call('HDEL', KEYS[1], field)
  end
end
return answer(0)
