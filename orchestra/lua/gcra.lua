-- Admits or refuses requests under one rate limit: the generic cell rate algorithm (GCRA, ITU-T I.371) on the Redis clock.
--
-- Invariant: over every window of W microseconds of the Redis clock, the admitted cost is at most (burst + W) / T.
--     A refused request consumes nothing. The key expires no earlier than the limit is full again, so an expired key
--     and a full limit are the same thing. A repeated call (lost reply) consumes again: it errs towards refusing.
-- KEYS: 1  string, theoretical arrival time (TAT), microseconds of the Redis clock
-- ARGV: 1  T, emission interval of one permit, microseconds, whole, >= 1
--       2  burst tolerance, microseconds (burst permits * T), whole, >= T
--       3  1: keep order, everything behind a refused request is refused; 0: each request for itself
--       4, 5, then in pairs: cost, permits, whole, >= 1; reserve this request must leave untouched, microseconds, >= 0
-- Returns: array: now and TAT afterwards, microseconds of the Redis clock; then one number a request:
--     0 = admitted, else microseconds until it could be admitted if nobody else asked
-- Complexity: O(requests); one GET, at most one SET.

local emission, burst, ordered = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
if not (emission and burst and emission >= 1 and burst >= emission and #ARGV >= 5 and #ARGV % 2 == 1) then
  return redis.error_reply('ERR gcra: expected T >= 1, burst >= T, order, then pairs of cost and reserve')
end
local wants, reserves = {}, {}
for i = 4, #ARGV, 2 do
  local cost, reserve = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  if not (cost and reserve and cost >= 1 and reserve >= 0) then
    return redis.error_reply('ERR gcra: cost must be >= 1 and reserve >= 0')
  end
  wants[#wants + 1] = cost * emission
  reserves[#reserves + 1] = reserve
end

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local stored = tonumber(redis.call('GET', KEYS[1]) or '0') or 0
-- Upper clamp: a Redis clock that went back, or a burst made smaller, locks nobody out for longer than one burst.
local tat = math.max(now, math.min(stored, now + burst))

local reply, line, blocked = { now, 0 }, tat, false
local write = stored > tat and tat > now -- the clamp must last, or each call would clamp to a later TAT
for i = 1, #wants do
  local late = line + wants[i] - (burst - reserves[i]) - now
  if late <= 0 and not blocked then
    line = line + wants[i]
    tat = line
    write = true
    reply[i + 2] = 0
  else
    -- 2^53: the largest span a double counts exactly; only a cost far beyond the burst gets there.
    reply[i + 2] = math.min(math.max(late, 1), 9007199254740992)
    if ordered then
      blocked = true
      line = line + wants[i]
    end
  end
end
reply[2] = tat

if write then
  -- Never tostring(): Lua writes a double with 14 digits, microseconds since 1970 have 16.
  redis.call('SET', KEYS[1], string.format('%.0f', tat), 'PX', string.format('%.0f', math.ceil((tat - now) / 1000) + 1))
end
return reply
