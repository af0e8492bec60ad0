-- One call of one gate for one window: hears what the gate spent and holds, and grants what it asks for.
--
-- Atomic, on one key, a function of its arguments and the hash (and of the server's clock, where argument 14 is 0).
-- `memory.rs` says the same in Rust; a test runs both on the same calls.
--
-- The hash:
--   m        "first newest sum last swept": the oldest and the newest sub-bucket with a count, the sum of all of
--            them, the latest time seen (ms), the sub-bucket in which fields of gates were last swept
--   NUMBER   permits counted in that sub-bucket, by all gates
--   gID      "seq spent label reserved granted": a gate's last call, all it has ever spent, what it holds until when, and
--            all it was ever granted
local key, id = KEYS[1], 'g' .. ARGV[1]
local seq, limit = tonumber(ARGV[2]), tonumber(ARGV[3])
local window, buckets = tonumber(ARGV[4]), tonumber(ARGV[5])
local spent, reserved = tonumber(ARGV[6]), tonumber(ARGV[7])
local held_until, spent_until = tonumber(ARGV[8]), tonumber(ARGV[9])
local want, hold = tonumber(ARGV[10]), tonumber(ARGV[11])
local slack, keep, now, history = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14]), ARGV[15]
local granted, afresh = tonumber(ARGV[16]), ARGV[17] == '1'

local function epoch_at(ms) return math.floor(ms * buckets / window) end
local function text(n) return string.format('%.0f', n) end

local read = redis.call('HMGET', key, 'm', id)
local known_seq, known_spent, known_label, known_reserved, known_granted
if read[2] then
  known_seq, known_spent, known_label, known_reserved, known_granted =
    string.match(read[2], '(%d+) (%d+) (%d+) (%d+) (%d+)')
  -- A call that was overtaken by a later one, or comes a second time, changes nothing.
  if tonumber(known_seq) >= seq then return {1} end
elseif history == '-' then
  -- The store has lost what it knew of this gate: it must be told the whole.
  return {2}
end

local first, newest, sum, last, swept = 0, -1, 0, 0, 0
if read[1] then
  local a, b, c, d, e = string.match(read[1], '(%d+) (%-?%d+) (%d+) (%d+) (%d+)')
  first, newest, sum, last, swept = tonumber(a), tonumber(b), tonumber(c), tonumber(d), tonumber(e)
end
if now == 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
-- Time never runs backwards: that would let counts live on, and be given twice.
if now < last then now = last end
local epoch = epoch_at(now)
if not read[1] then swept = epoch end

local function counts(from, to)
  local names = {}
  for e = from, to do names[#names + 1] = text(e) end
  return redis.call('HMGET', key, unpack(names)), names
end

-- What even the slowest clock lets go of is forgotten.
local gone = epoch_at(now - keep) - buckets - 1
if first <= newest and gone >= first then
  local to = math.min(gone, newest)
  local old, names = counts(first, to)
  local empty = {}
  for i, count in ipairs(names) do
    if old[i] then
      sum = sum - tonumber(old[i])
      empty[#empty + 1] = names[i]
    end
  end
  if #empty > 0 then redis.call('HDEL', key, unpack(empty)) end
  first = to + 1
end

-- What counts for this caller: a little less, where clocks are known to agree.
local past = epoch_at(now - slack) - buckets - 1
local live = sum
if first <= newest and past >= first then
  for _, count in ipairs((counts(first, math.min(past, newest)))) do
    if count then live = live - tonumber(count) end
  end
end

local change = {}
local function add(e, n)
  if n ~= 0 and e > gone then
    change[e] = (change[e] or 0) + n
    sum = sum + n
    if e > past then live = live + n end
  end
end

local fresh
if read[2] then
  add(tonumber(known_label), -tonumber(known_reserved))
  fresh = spent - tonumber(known_spent)
else
  local base, rest = string.match(history, '(%d+)(.*)')
  for e, n in string.gmatch(rest, '(%d+):(%d+)') do add(tonumber(e), tonumber(n)) end
  fresh = spent - tonumber(base)
end
-- What was spent since is counted where it was spent at the latest.
local stamp = epoch
if spent_until > 0 and spent_until < stamp then stamp = spent_until end
add(stamp, fresh)

-- What earlier calls granted and the gate had not heard of when it sent this one, it may hold too, and it is what it wants;
-- unless it will not believe the answers to those.
local held = reserved
if read[2] then
  local unheard = afresh and 0 or math.max(0, tonumber(known_granted) - granted)
  held, granted, want = held + unheard, granted + unheard, math.max(0, want - unheard)
  -- It may have been told the later label.
  if held > 0 then held_until = math.max(held_until, tonumber(known_label)) end
end

local label, grant = held_until, 0
if held == 0 or held_until >= epoch then
  label = math.max(held_until, epoch_at(now + hold))
  grant = math.max(0, math.min(want, limit - live - held))
end
-- Otherwise the call came so late that what was held lapsed on the way. It may have been spent until then, so it stays
-- where it is, and the gate asks again.
held, granted = held + grant, granted + grant
add(label, held)

for e, n in pairs(change) do
  if n ~= 0 then
    local left = redis.call('HINCRBY', key, text(e), text(n))
    if left == 0 then redis.call('HDEL', key, text(e)) end
    if first > newest then first, newest = e, e end
    first, newest = math.min(first, e), math.max(newest, e)
  end
end

local leaves = 0
if sum > 0 then
  if grant < want then
    local all = counts(first, newest)
    for i = 1, newest - first + 1 do
      if all[i] then
        first = first + i - 1
        break
      end
    end
  end
  leaves = math.max(1, math.ceil((first + buckets + 1) * window / buckets) - now + slack)
end

-- Gates that are gone leave a field behind: swept away when nothing in it counts any more.
if epoch - swept > 2 * buckets then
  swept = epoch
  local all = redis.call('HGETALL', key)
  for i = 1, #all, 2 do
    local old = string.match(all[i + 1], '^%d+ %d+ (%d+) %d+ %d+$')
    if string.sub(all[i], 1, 1) == 'g' and all[i] ~= id and old and tonumber(old) <= gone then
      redis.call('HDEL', key, all[i])
    end
  end
end

redis.call('HSET', key,
  'm', string.format('%.0f %.0f %.0f %.0f %.0f', first, newest, sum, now, swept),
  id, string.format('%.0f %.0f %.0f %.0f %.0f', seq, spent, label, held, granted))
redis.call('PEXPIRE', key, text(math.ceil((math.max(newest, label) + buckets + 2) * window / buckets) - now + keep))
return {0, granted, label, math.floor((label + 1) * window / buckets) - now - 1, live, leaves, stamp}
