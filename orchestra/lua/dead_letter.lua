#!lua flags=allow-oom
-- Moves deliveries of one stream to the dead letter stream.
-- Invariant: one dead letter per task and generation, added before the delivery is removed, by its holder only.
-- KEYS: 1 stream | 2 dead letter stream | 3 counters | 4… result key per delivery
-- ARGV: 1 group | 2 consumer | 3 lane 0-3, then per delivery:
--       id | deliveries | attempts | reason | error info | frame, should the stream have lost it
--       | time to live of the record ms (0: none wanted) | record | channel ("": none)
-- Returns: the ids that were STALE and left alone
-- Complexity: O(deliveries log pending)
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local dead, stale = 0, {}
redis.call('HLEN', KEYS[3]) -- fails before anything is written if the counters are no hash
for k = 4, #KEYS do
  local i = 4 + 9 * (k - 4)
  local id = ARGV[i]
  local row = redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
  if row and row[4] == tonumber(ARGV[i + 1]) then
    local entry = redis.call('XRANGE', stream, id, id)[1]
    local f = {t = ARGV[i + 5], g = 0}
    if entry then
      f.t = nil
      for j = 1, #entry[2], 2 do f[entry[2][j]] = entry[2][j + 1] end
      if not f.t then f.t = cmsgpack.pack(entry[2]) end -- a foreign entry: keep all that it had
    end
    redis.call('XADD', KEYS[2], '*', 't', f.t, 'n', ARGV[i + 2], 'g', f.g, 'l', ARGV[3], 'm', id,
      'r', ARGV[i + 3], 'e', ARGV[i + 4])
    if ARGV[i + 6] ~= '0' then redis.call('SET', KEYS[k], ARGV[i + 7], 'PX', ARGV[i + 6]) end
    redis.call('XACK', stream, group, id)
    redis.call('XDEL', stream, id)
    if ARGV[i + 8] ~= '' then redis.call('PUBLISH', ARGV[i + 8], ARGV[i + 7]) end
    dead = dead + 1
  else
    stale[#stale + 1] = id
  end
end
if dead > 0 then redis.call('HINCRBY', KEYS[3], 'dead', dead) end
return stale
