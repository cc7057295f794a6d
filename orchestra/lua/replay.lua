#!lua flags=allow-oom
-- Puts dead letters back into their lanes as a new generation, with their retries restored.
-- Invariant: each dead letter is replayed once however often this is called; it is added before it is removed.
-- KEYS: 1 dead letter stream | 2 counters | 3-6 lane streams | 7… result key per dead letter
-- ARGV: id of each dead letter
-- Returns: the number replayed
-- Complexity: O(dead letters log all)
local replayed = 0
-- What follows the first write must not fail for the type of a key, so these fail here.
redis.call('HLEN', KEYS[2])
for lane = 3, 6 do redis.call('XLEN', KEYS[lane]) end
for i = 1, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry then
    local f = {}
    for j = 1, #entry[2], 2 do f[entry[2][j]] = entry[2][j + 1] end
    redis.call('XADD', KEYS[3 + f.l], '*', 't', f.t, 'n', 0, 'd', 0, 'g', (tonumber(f.g) or 0) + 1)
    redis.call('DEL', KEYS[6 + i])
    redis.call('XDEL', KEYS[1], ARGV[i])
    replayed = replayed + 1
  end
end
if replayed > 0 then redis.call('HINCRBY', KEYS[2], 'replayed', replayed) end
return replayed
