-- Sets what a rate limit is, at run time, or goes back to what its limiters were made with.
--
-- Invariant: every change has a version of its own, larger than those before it while the setting is there, so that whoever
--     knows another one learns of it at its next call. Repeated after a lost reply it sets the same under a newer version.
-- KEYS: 1  hash: name of a limit -> "version T burst rate period"
-- ARGV: 1  name of the limit
--       2  T, emission interval of one permit, microseconds, whole, >= 1; 0: forget the setting
--       3  burst tolerance, microseconds, whole, >= T
--       4  rate, permits a period, as people wrote it
--       5  period, seconds, as people wrote it
-- Returns: its version, microseconds of the Redis clock or more; when forgetting: 1 if there was a setting, else 0
-- Complexity: O(1).

local emission, burst = tonumber(ARGV[2]), tonumber(ARGV[3])
if emission == 0 then return redis.call('HDEL', KEYS[1], ARGV[1]) end
if not (emission and burst and emission >= 1 and burst >= emission and #ARGV == 5) then
  return redis.error_reply('ERR gcra_set: expected a name, T >= 1, burst >= T, rate and period')
end
local time = redis.call('TIME')
local before = tonumber(string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '0', '^%d+')) or 0
local version = math.max(time[1] * 1000000 + time[2], before + 1)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f %s %s %s %s', version, ARGV[2], ARGV[3], ARGV[4], ARGV[5]))
return version
