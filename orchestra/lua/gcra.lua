-- Admits or refuses requests under one or several rate limits: the generic cell rate algorithm (GCRA, ITU-T I.371) on the Redis clock.
--
-- Invariant: over every window of W microseconds of the Redis clock, what a cell admits is at most (burst + W) / T.
--     A request is admitted by all cells it names or by none; a refused one consumes nothing. A cell expires no earlier
--     than it is full again, so an expired cell and a full one are the same thing. The line never decides: it only spreads the
--     waits of those who come back. A repeated call (lost reply) consumes again: it errs towards refusing.
-- KEYS: 1  hash, what was set at run time: name of a limit -> "version T burst rate period"
--       2… strings, one a cell: "TAT" or "TAT line back" or "TAT line back T", microseconds of the Redis clock: theoretical
--          arrival time, end of the line of those who come back, last time permits were given back, T when that was written
-- ARGV: 1  number of limits, whole, >= 1
--       then 4 a limit: name; version of its setting as the caller knows it, 0 = none; T, emission interval of one permit,
--          microseconds, whole, >= 1; burst tolerance, microseconds (burst permits * T), whole, >= T
--       then 1 a cell: its limit, from 1
--       then a request: flags (1 keep order: refused, it lets nothing behind it pass; 2 join the line when refused; 4 a lease:
--          answer the TAT it leaves); number of cells it names; 3 a cell: its number, from 1; cost, permits, whole, >= 1; reserve that
--          it must leave untouched, microseconds, >= 0
-- Returns: array: now; the TAT of each cell afterwards, microseconds of the Redis clock; then two numbers a request: 0 = admitted,
--     else microseconds until it could be admitted if nobody else asked (in the line: until its turn); the cell that waits
--     longest, or for an admitted lease the TAT it leaves in its first cell, else 0.
--     Or, if a setting is not the one the caller knows: "!", then in pairs: limit, from 1; its setting, "" for none; nothing is done.
-- Complexity: O(limits + cells + uses); HGET a limit, GET and at most one SET a cell.

local MOST = 9007199254740992 -- 2^53: the largest span a double counts exactly
local HORIZON = 281474976710656 -- 2^48 us: nobody is told to come back later
local BACK = 60000000 -- us that the time of a give-back is kept: longer than any lease

local limits, cells = tonumber(ARGV[1]), #KEYS - 1
local first = limits and limits >= 1 and 2 + limits * 4 + cells or 0
if not (limits and limits >= 1 and limits % 1 == 0 and cells >= 1 and #ARGV >= first + 4) then
  return redis.error_reply('ERR gcra: expected the limits, a limit for each cell, then requests')
end
local emissions, bursts, of = {}, {}, {}
for i = 1, limits do
  local emission, burst = tonumber(ARGV[i * 4]), tonumber(ARGV[i * 4 + 1])
  if not (emission and burst and emission >= 1 and burst >= emission and burst <= HORIZON) then
    return redis.error_reply('ERR gcra: expected T >= 1 and T <= burst <= 2^48')
  end
  emissions[i], bursts[i] = emission, burst
end
for c = 1, cells do
  of[c] = tonumber(ARGV[1 + limits * 4 + c])
  if not emissions[of[c]] then return redis.error_reply('ERR gcra: a cell must name its limit') end
end

local uses, requests, at, named = {}, {}, first, {}
while at <= #ARGV do
  local flags, count = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  if not (flags and count and flags >= 0 and flags <= 7 and count >= 1 and at + 1 + count * 3 <= #ARGV) then
    return redis.error_reply('ERR gcra: a request is flags, a count, and three numbers a cell')
  end
  local request = { flags, #uses + 1, #uses + count }
  requests[#requests + 1] = request
  for place = at + 2, at + 1 + count * 3, 3 do
    local c, cost, reserve = tonumber(ARGV[place]), tonumber(ARGV[place + 1]), tonumber(ARGV[place + 2])
    if not (c and of[c] and cost and reserve and cost >= 1 and reserve >= 0 and named[c] ~= request) then
      return redis.error_reply('ERR gcra: a cell once a request, cost >= 1 and reserve >= 0')
    end
    named[c] = request
    uses[#uses + 1] = { c, cost * emissions[of[c]], bursts[of[c]] - reserve }
  end
  at = at + 2 + count * 3
end

local changed = { '!' }
for i = 1, limits do
  local setting = redis.call('HGET', KEYS[1], ARGV[i * 4 - 2])
  local version = setting and string.match(setting, '^%d+') or '0'
  if version ~= ARGV[i * 4 - 1] then
    changed[#changed + 1] = i
    changed[#changed + 1] = setting or ''
  end
end
if #changed > 1 then return changed end

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local tats, lines, backs, ends, write, blocked = {}, {}, {}, {}, {}, {}
for c = 1, cells do
  local text = redis.call('GET', KEYS[c + 1]) or '0'
  local stored = tonumber(text)
  lines[c], backs[c] = 0, 0
  if not stored then
    local tat, line, back, pace = string.match(text, '^(%d+) (%d+) (%d+) ?(%d*)$')
    stored, lines[c], backs[c], pace = tonumber(tat) or 0, tonumber(line) or 0, tonumber(back) or 0, tonumber(pace) or 0
    if pace > emissions[of[c]] and lines[c] > now then -- the limit was raised: the line moves on faster
      lines[c] = now + math.floor((lines[c] - now) * emissions[of[c]] / pace)
      write[c] = true
    end
  end
  -- Upper clamp: a Redis clock that went back, or a burst made smaller, locks nobody out for longer than one burst.
  local top = now + bursts[of[c]]
  if stored > top then
    tats[c], lines[c] = top, 0
    write[c] = true -- the clamp must last, or each call would clamp to a later TAT
  else
    tats[c] = math.max(now, stored)
  end
  ends[c] = tats[c]
end

local reply = { now }
for r = 1, #requests do
  local flags, from, to = requests[r][1], requests[r][2], requests[r][3]
  local wait, which = 0, 0
  for u = from, to do
    local c = uses[u][1]
    local late = ends[c] + uses[u][2] - uses[u][3] - now
    if late > 0 or blocked[c] then
      if flags % 4 >= 2 and late > 0 then
        -- Whoever comes back at his turn finds the TAT where those before him left it, or lower.
        lines[c] = math.min(math.max(lines[c], tats[c]) + uses[u][2], now + HORIZON)
        late = math.max(late, lines[c] - uses[u][3] - now)
        write[c] = true
      end
      late = math.min(math.max(late, 1), MOST)
      if late > wait then wait, which = late, c end
    end
  end
  for u = from, to do
    local c = uses[u][1]
    if wait == 0 then
      ends[c] = ends[c] + uses[u][2]
      tats[c] = ends[c]
      write[c] = true
    elseif flags % 2 == 1 then
      blocked[c] = true
      ends[c] = ends[c] + uses[u][2]
    end
  end
  if wait == 0 and flags >= 4 then which = tats[uses[from][1]] end
  reply[cells + r * 2] = wait
  reply[cells + r * 2 + 1] = which
end

for c = 1, cells do
  reply[c + 1] = tats[c]
  local line, back = lines[c] > now and lines[c] or 0, backs[c] > now - BACK and backs[c] <= now and backs[c] or 0
  local last = math.max(tats[c], line, back > 0 and back + BACK or 0)
  if write[c] and last > now then
    -- Never tostring(): Lua writes a double with 14 digits, microseconds since 1970 have 16.
    local text = string.format(line + back > 0 and '%.0f %.0f %.0f %.0f' or '%.0f', tats[c], line, back, emissions[of[c]])
    redis.call('SET', KEYS[c + 1], text, 'PX', string.format('%.0f', math.ceil((last - now) / 1000) + 1))
  end
end
return reply
