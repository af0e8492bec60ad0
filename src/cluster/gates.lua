-- A gate says that it lives, and hears which others do. The first one gives the store its name, which is lost with
-- the store's content.
--
-- The hash:
--   token     a random name of this content
--   joins     how many gates have ever joined
--   version   changes when a gate joins or leaves
--   born      when this content began (ms)
--   gID       "joined seen last unresolved left refilled name": see `Entry` in protocol.rs
local key, id = KEYS[1], 'g' .. ARGV[1]
local name, candidate, refilled, seen, left = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local known, forget, now, unresolved = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]
if now == 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
local function text(n) return string.format('%.0f', n) end
local read = redis.call('HMGET', key, 'token', 'joins', 'version', id, 'born')
local born = tonumber(read[5] or now)
local token, joins, version = read[1] or candidate, tonumber(read[2] or 0), tonumber(read[3] or 0)
local joined, had_left
if read[4] then
  joined, had_left = string.match(read[4], '^(%d+) %d+ %d+ %d+ (%d)')
  joined = tonumber(joined)
  if had_left ~= left then version = version + 1 end
else
  joins, version = joins + 1, version + 1
  joined = joins
end
redis.call('HSET', key, 'token', token, 'born', text(born), 'joins', text(joins), 'version', text(version),
  id, text(joined) .. ' ' .. seen .. ' ' .. text(now) .. ' ' .. unresolved .. ' ' .. left .. ' ' .. refilled .. ' ' .. name)
local answer = {now, born, version, joined, joins}
if version ~= known then
  local all = redis.call('HGETALL', key)
  for i = 1, #all, 2 do
    local last = string.match(all[i + 1], '^%d+ %d+ (%d+) %d+ %d ')
    if string.sub(all[i], 1, 1) == 'g' and last then
      if now - tonumber(last) > forget then
        redis.call('HDEL', key, all[i])
      else
        answer[#answer + 1] = string.sub(all[i], 2)
        answer[#answer + 1] = all[i + 1]
      end
    end
  end
end
return answer
