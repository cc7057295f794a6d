-- Adds what an agent tells to the event log of a workflow that is there and has not ended.
-- Invariant: a log exists only beside its record, so both are forgotten together. A repeat may tell the same twice.
-- KEYS: 1 record, hash | 2 context and signals, hash | 3 event log, stream | 4 outbox | 5 stream of those that ended
--       6 index by creation | 7 sorted set: ended workflow → when it may be forgotten; only 1 and 3 are used
-- ARGV: 1 kind | 2 index of the step or "" | 3 data or ""
-- Returns: 1, or 0: there is no workflow, or it has ended
-- Complexity: O(1)
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= 'running' and status ~= 'pending' then return 0 end
local row = {'kind', ARGV[1]}
if ARGV[2] ~= '' then row[3], row[4] = 'step', ARGV[2] end
if ARGV[3] ~= '' then row[#row + 1], row[#row + 2] = 'data', ARGV[3] end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', 100000, '*', unpack(row))
return 1
