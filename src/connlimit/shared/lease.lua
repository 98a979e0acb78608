-- Leases slots of a limit to a member, renews its lease, and says whose turn it is.
--
-- KEYS: lease (a hash: "about", what concerns all; and of each member what it has), slots (the limit, if one
--   was set for all)
-- ARGV: the question, in JSON:
--   member, ttl (ms), number (of the question), slots (the limit, if none was set for all)
--   in_use, kept (slots held in any case), wanted (slots in all), more (whether another one waits already)
--   run (which Redis gave the last answer), age (ms since the question was sent that it answered; -1: none
--   was), same (whether this one comes over the same connection)
--   hears (whether its process is told of its turn), own (how many of those who hear the channel are the member)
--   outlived (connections that have outlived a lease of late), leaves (whether the member ends)
--   channel (of the limit), turns (the prefix of the channels of processes)
-- Returns a line: slots held, how many others ask, ms until new slots are given again, ms until the member is to
--   ask again if it lacks slots and nothing happens, whether it is among those who ask, how many more
--   are held than there are, and which Redis this is. Or "late", if the question is.
local question = cjson.decode(ARGV[1])
local me, ttl = question.member, question.ttl

-- A limit that nobody asks for is forgotten after this time; each process that uses it asks once a minute at least.
local lifetime = math.max(300000, ttl * 10)
-- What a question may be delayed before the clock is suspected. A lease is used for nine tenths of the ttl.
local slack = math.floor(ttl / 20)
-- One of those who lack slots watches: it asks so often that no lease that ended and no lost notification go
-- unnoticed. The others ask rarely: one of them in twice that time, and each in this time at least.
local watch, longest = 1000, 60000
-- In what time one whose turn it is must ask, and the one that watches.
local patience = math.max(2 * watch, math.floor(ttl / 3))

local function listeners(channel)
  local answer = redis.pcall('PUBSUB', 'NUMSUB', channel)
  return answer.err and math.huge or tonumber(answer[2])
end

local function turns_of(member)
  return question.turns .. string.match(member, '^[^#]*')
end

local about
local members = {}

local function save(member, record)
  if record == about or record.held > 0 or record.turn > 0 then
    redis.call('HSET', KEYS[1], member, cjson.encode(record))
  else
    members[member] = nil
    redis.call('HDEL', KEYS[1], member)
  end
end

local stored = redis.call('HGETALL', KEYS[1])
for at = 1, #stored, 2 do
  local record = cjson.decode(stored[at + 1])
  if stored[at] == 'about' then about = record else members[stored[at]] = record end
end

-- A question that was delayed on a connection that is gone must not undo what was answered since.
local mine = members[me]
if mine and mine.number >= question.number then return {ok = 'late'} end

-- The time: that of Redis's clock, which can be set. It never goes back here, and goes forward no faster than
-- the member's own clock says. Who cannot say ends no lease of a process that is connected.
local time = redis.call('TIME')
local wall = time[1] * 1000 + math.floor(time[2] / 1000)
local now = wall
if about then
  now = wall + about.offset
  local latest = now
  if mine and question.age >= 0 then
    latest = mine.asked + question.age + slack
  else
    for member, record in pairs(members) do
      if record.ends <= now and listeners(turns_of(member)) > 0 then latest = about.last + slack end
    end
  end
  now = math.max(about.last, math.min(now, latest))
end

for member, record in pairs(members) do
  if record.ends <= now then
    members[member] = nil
    redis.call('HDEL', KEYS[1], member)
  end
end
mine = members[me]

local others, asking, alone = 0, 0, true
for member, record in pairs(members) do
  if member ~= me then
    alone = false
    others = others + record.held
    if record.turn > 0 then asking = asking + 1 end
  end
end

-- Whether this Redis may not know of all that is leased. Then it gives no new slots until each lease that it
-- does not know of has ended, or was reported.
local info = redis.pcall('INFO', 'server')
local run, uptime = '', 0
if type(info) == 'string' then
  run = 'id ' .. string.match(info, 'run_id:(%w+)')
  uptime = tonumber(string.match(info, 'uptime_in_seconds:(%-?%d+)')) * 1000
end
local answered = question.age >= 0
-- Somebody who goes to another Redis is heard there within this time.
local doubt, settling = 0, math.min(1000, math.floor(ttl / 3))
if not about then
  about = {run = run, was = '', changed = now, guard = now, turns = 0, outlived = 0}
  about.watcher, about.watched = '', now
  if run == '' or (answered and question.age < lifetime) or listeners(question.channel) > question.own then
    doubt = ttl  -- it was lost
  else
    doubt = math.max(settling, ttl - math.max(0, uptime - 1000))  -- the uptime is up to a second too long
  end
elseif about.run ~= run then
  doubt = ttl  -- another one wrote it
  about.was, about.changed, about.run = about.run, now, run
elseif run == '' then
  if not question.same then doubt = ttl end
elseif answered and question.run ~= run then
  -- Another one has answered the member, since this one knew of that, as far as can be told.
  if question.run ~= about.was or now - question.age + settling >= about.changed then
    doubt = ttl
    about.was, about.changed = question.run, now
  end
elseif alone and not mine and not answered then
  doubt = settling
end
about.guard = math.max(about.guard, now + doubt)
local is_guarded = now < about.guard

-- How many slots there are: each member may have been told another number, if none was set for all.
local set = tonumber(redis.call('GET', KEYS[2]) or '')
local slots = set or question.slots

local function may_have_more(record, taken)
  return record.turn > 0 and (set or record.slots) > taken
end

-- One slot is left for each who has asked earlier.
local earlier = 0
for member, record in pairs(members) do
  if member ~= me and may_have_more(record, others + question.kept) then
    if not mine or mine.turn == 0 or record.turn < mine.turn then earlier = earlier + 1 end
  end
end
local free = is_guarded and 0 or math.max(0, slots - others - earlier)
local held = math.max(question.kept, math.min(question.wanted, free))
local asks = held < question.wanted and held <= question.in_use
local turn = 0
if asks and mine and mine.turn > 0 then
  turn = mine.turn
elseif asks or (question.more and mine and mine.turn > 0 and asking > 0) then
  about.turns = about.turns + 1
  turn = about.turns
end
local is_new = asks and not (mine and mine.turn > 0)

local function lacks(member)
  return members[member] ~= nil and members[member].turn > 0
end

-- It may hear another Redis.
local hears = question.hears and (turn == 0 or listeners(turns_of(me)) > 0)
local pause, kept = watch, ttl
if turn > 0 and hears then
  if not lacks(about.watcher) or about.watcher == me or about.watched + patience < now then
    about.watcher, about.watched = me, now
  else
    pause = math.min(longest, 2 * watch * (asking + 1))
  end
  -- A member that has nothing keeps its turn without being heard from.
  if held == 0 then kept = math.max(ttl, 2 * pause) end
end
mine = {
  held = held, in_use = question.in_use, asked = now, ends = now + kept, number = question.number,
  turn = turn, hears = hears, slots = question.slots,
}
members[me] = mine
save(me, mine)

-- Whose turn it is asks for the slots that are left.
local taken = others + held
local queue = {}
if not is_guarded then
  for member, record in pairs(members) do
    if may_have_more(record, taken) then queue[#queue + 1] = member end
  end
  table.sort(queue, function(one, other) return members[one].turn < members[other].turn end)
  for _, member in ipairs(queue) do
    local record = members[member]
    if may_have_more(record, taken) then
      if member ~= me and not (record.called and now < record.called + patience) then
        -- Who is not there any more, or has not asked in time, loses its turn.
        local is_gone = record.called or redis.pcall('PUBLISH', turns_of(member), member) == 0 and record.hears
        if is_gone then record.turn = 0 else record.called = now end
        save(member, record)
      end
      if record.turn > 0 then taken = taken + 1 end
    end
  end
end
-- Somebody watches as long as somebody lacks slots: the last, who does so longest.
if turn == 0 and asking > 0 and (not lacks(about.watcher) or about.watched + patience < now) then
  local last
  for member, record in pairs(members) do
    if record.turn > (last and members[last].turn or 0) then last = member end
  end
  if last then
    redis.pcall('PUBLISH', turns_of(last), last)
    about.watcher, about.watched = last, now
  end
end
-- The first to ask tells all to give back what they need not.
if is_new and asking == 0 then redis.pcall('PUBLISH', question.channel, me) end

about.last, about.offset = now, now - wall
about.outlived = about.outlived + question.outlived
if question.leaves and alone and not is_guarded and listeners(question.channel) <= question.own then
  redis.call('DEL', KEYS[1])
else
  save('about', about)
  redis.call('PEXPIRE', KEYS[1], lifetime)
end

local too_many = math.max(0, others + held - slots)
return {ok = string.format(
  '%d %d %d %d %d %d %s', held, math.max(is_guarded and 0 or asking, math.min(1, too_many)),
  math.max(0, about.guard - now), pause, turn > 0 and 1 or 0, too_many, run
)}
