-- Changes one versioned document if nobody has changed it since the caller read it.
-- Invariant: field "k" is the token of the last commit and "v" counts commits. A commit applies wholly or not at all, and
--     repeating one after a lost reply changes nothing: its own token is already there. Tokens are compared, not counts,
--     because a document that expired and was made again counts from 1 again.
-- KEYS: 1  hash, the document
-- ARGV: 1  token that the document must carry; "": it must not exist; "*": whatever is there
--       2  token of this commit, unique
--       3  time to live, milliseconds; 0: none; -1: leave it as it is
--       4  number n of fields to write, then n pairs of field and value, then the fields to remove
-- Returns: {1, version} written; {0, version} refused and nothing changed (version 0: there is no document)
-- Complexity: O(fields written and removed)
local key = KEYS[1]
local expect, token, ttl, pairs_given = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local head = redis.call('HMGET', key, 'k', 'v')
local current, version = head[1], tonumber(head[2] or '0')

if current == token then
  return {1, version}
end
if expect ~= '*' and (current or '') ~= expect then
  return {0, version}
end

local CHUNK = 1000 -- unpack() ends at about 8000 values (LUAI_MAXCSTACK)
local values_end = 4 + 2 * pairs_given
redis.call('HSET', key, 'k', token, 'v', version + 1)
for first = 5, values_end, CHUNK do
  redis.call('HSET', key, unpack(ARGV, first, math.min(first + CHUNK - 1, values_end)))
end
for first = values_end + 1, #ARGV, CHUNK do
  redis.call('HDEL', key, unpack(ARGV, first, math.min(first + CHUNK - 1, #ARGV)))
end
if ttl > 0 then
  redis.call('PEXPIRE', key, ttl)
elseif ttl == 0 then
  redis.call('PERSIST', key)
end
return {1, version + 1}
