-- Gives back permits of a lease that were taken from one cell and not spent, as far as that cannot admit too much.
--
-- Invariant: the TAT stays at or above the one that a limiter would have that was never asked for these permits. Let A be
--     the TAT that the lease left. Nothing was given back since, and A > now: then the cell was never idle since, the TAT is A
--     plus all that was admitted later, and without the lease it would be at most max(A - amount, now) plus the same. So
--     min(amount, A - now) may go; the rest is lost. Repeated after a lost reply it gives nothing: something was given back since.
-- KEYS: 1  string, the cell: "TAT" or "TAT line back T" (see gcra)
-- ARGV: 1  A, the TAT that the lease left, microseconds of the Redis clock
--       2  when the lease was taken, microseconds of the Redis clock
--       3  amount, microseconds (permits * T), whole, >= 1
-- Returns: microseconds given back, 0 for none
-- Complexity: O(1); one GET, at most one SET.

local BACK = 60000000 -- us that the time of a give-back is kept: longer than any lease

local left, taken, amount = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
if not (left and taken and amount and amount >= 1 and left >= taken and taken >= 0) then
  return redis.error_reply('ERR gcra_return: expected TAT >= taken >= 0 and amount >= 1')
end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local text = redis.call('GET', KEYS[1]) or '0'
local tat, line, back, pace = string.match(text, '^(%d+) ?(%d*) ?(%d*)( ?%d*)$')
tat, line, back = tonumber(tat) or 0, tonumber(line) or 0, tonumber(back) or 0
local given = math.min(amount, left - now)
-- The time of a give-back outlives the oldest lease that is still looked at here.
if given < 1 or taken > now or now - taken > BACK / 2 or back >= taken or tat < left then return 0 end
local last = math.max(tat, line, now + BACK)
redis.call('SET', KEYS[1], string.format('%.0f %.0f %.0f', tat - given, line, now) .. (pace or ''),
  'PX', string.format('%.0f', math.ceil((last - now) / 1000) + 1))
return given
