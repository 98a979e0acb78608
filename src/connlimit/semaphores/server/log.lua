-- The order of all operations on the semaphores, and from time to time the state that they led to.
--
-- KEYS
--   1  log: a list, the operations since the state was written down, each after the time of it in ms
--   2  state: a list of pages, the state before the first of these operations
--   3  about: a hash
--        history  the name of this order of operations
--        start    how many operations led to the state
--        mark     how the last of them begins, up to the first comma
--        time     that of the last operation, or of the last question, in ms
--        bytes    how many the log has
--        count    how many records the state has
--        size     how many bytes it has
--        writer   who writes the state down, and
--        until    by when, in ms, it must have gone on with that
--   4  draft: a list, the pages of a state that is being written down by the caller
--
-- ARGV
--   1  several words with tabs between them:
--        1  what is to be done, a name of one of the functions below
--        2  the history that the caller knows, or nothing
--        3  the number of operations of it that the caller knows
--        …  see the functions
--   …  see the functions
--
-- Returns words with tabs between them; JSON has none. One string, and if it is short one of the kind that is
-- read with the least effort: this is what most of the time of a request goes into.

local words = {}
for word in string.gmatch(ARGV[1] .. '\t', '([^\t]*)\t') do table.insert(words, word) end
local log, state, about, draft = unpack(KEYS)
local history, start, mark, time, bytes, count, size, writer, until_ = unpack(redis.call(
  'HMGET', about, 'history', 'start', 'mark', 'time', 'bytes', 'count', 'size', 'writer', 'until'))
start, time, bytes = tonumber(start or 0), tonumber(time or 0), tonumber(bytes or 0)
count, size, until_ = tonumber(count or 0), tonumber(size or 0), tonumber(until_ or 0)
local known, seen = words[2], tonumber(words[3])

-- Seconds for which a writer may pause, and a draft is kept.
local PAUSE, DRAFT = 10, 60

local function last()
  return start + redis.call('LLEN', log)
end

-- Whether what the caller knows is not what is here: it is ahead, or took another way.
local function is_lost(its_mark)
  if not history then return known ~= '' end
  if history ~= known or seen < start then return false end
  if seen > last() then return true end
  local here = mark or ''
  if seen > start then here = string.match(redis.call('LINDEX', log, seen - start - 1), '^[^,]*') end
  return here ~= its_mark
end

local commands = {}

-- Lets the others know, if there are others: each server is a subscriber itself.
local function publish(what)
  local subscribers = redis.pcall('PUBSUB', 'NUMSUB', log)
  if type(subscribers[2]) ~= 'number' or subscribers[2] > 1 then redis.call('PUBLISH', log, what) end
end

-- Adds operations, and returns those that the caller does not know, or the first of them; but nothing if these
-- are those that it adds.
--
--   4  the mark of the last operation that it knows
--   5  the name of the caller
--   6  its time in ms; nothing if the time does not matter to it
--   7  how many operations are returned at most
--   8  how many operations, and
--   9  how many bytes the log has at least before the state is written down
-- and in ARGV, the second if there is one: operations with tabs between them
--
-- Returns a word first:
--   lost    what the caller knows is not known here; nothing was added
--   state   the caller must begin with the state; nothing was added; then history, start, mark
--   ok      then history, time, how many operations there are, whether the caller is to write the state down,
--           and the operations
function commands.add()
  if is_lost(words[4]) then return {'lost'} end
  if not history then
    local now = redis.call('TIME')
    history = 'h' .. redis.sha1hex(now[1] .. ' ' .. now[2] .. words[5])
    redis.call('DEL', log, state)
    redis.call('HSET', about, 'history', history, 'start', 0, 'mark', '', 'time', 0, 'bytes', 0)
  elseif history ~= known or seen < start then
    return {'state', history, tostring(start), mark or ''}
  end
  if words[6] ~= '' then
    time = math.max(time, tonumber(words[6]))
    redis.call('HSET', about, 'time', string.format('%.0f', time))
  end
  local others_are_known = seen == last()
  if ARGV[2] then
    local entries, head = {}, string.format('%.0f ', time)
    for operation in string.gmatch(ARGV[2], '[^\t]+') do
      local entry = head .. operation
      bytes = bytes + #entry
      table.insert(entries, entry)
    end
    redis.call('RPUSH', log, unpack(entries))
    redis.call('HSET', about, 'bytes', string.format('%.0f', bytes))
    publish(history .. ' ' .. last())
  end
  local there = last()
  local writes = '0'
  if there - start > math.max(tonumber(words[8]), count) or bytes > math.max(tonumber(words[9]), size) then
    if not writer or until_ < time then
      writes = '1'
      redis.call('HSET', about, 'writer', words[5], 'until', string.format('%.0f', time + PAUSE * 1000))
    end
  end
  local answer = {}
  if not others_are_known then
    answer = redis.call('LRANGE', log, seen - start, seen - start + tonumber(words[7]) - 1)
  end
  for at, head in ipairs({'ok', history, string.format('%.0f', time), tostring(there), writes}) do
    table.insert(answer, at, head)
  end
  return answer
end

-- Returns pages of the state, from the one at a number on: history and start are those of the state.
--
--   4  that number
--   5  how many pages
--
-- Returns how many there are in all, and the pages; nothing if that state is not there any more.
function commands.read()
  if history ~= known or start ~= seen then return {} end
  local answer = redis.call('LRANGE', state, words[4], words[4] + words[5] - 1)
  table.insert(answer, 1, tostring(redis.call('LLEN', state)))
  return answer
end

-- Adds pages to the draft of a state.
--
--   4  the name of the caller
-- and in ARGV, from the second on: pages
function commands.draft()
  for at = 2, #ARGV do redis.call('RPUSH', draft, ARGV[at]) end
  redis.call('EXPIRE', draft, DRAFT)
  if writer == words[4] then
    redis.call('HSET', about, 'until', string.format('%.0f', time + PAUSE * 1000))
  end
  return {}
end

-- Has the draft for the state, and drops the operations that led to it.
--
--   4  the mark of the last of them
--   5  the time of it, in ms
--   6  the name of a new history, if it is to begin with this state because the caller's was lost
--   7  how many records, and
--   8  how many bytes the draft has
--
-- Returns `kept`, or `late` if somebody else was faster.
function commands.keep()
  local lost = is_lost(words[4])
  local is_due = redis.call('EXISTS', draft) == 1
  if words[6] ~= '' then
    is_due = is_due and lost
  else
    is_due = is_due and history == known and not lost and seen > start
  end
  if not is_due then
    redis.call('DEL', draft)
    return {'late'}
  end
  redis.call('RENAME', draft, state)
  redis.call('PERSIST', state)
  if words[6] ~= '' then
    redis.call('DEL', log)
    bytes, time, history = 0, math.max(time, tonumber(words[5])), words[6]
  else
    for _, entry in ipairs(redis.call('LRANGE', log, 0, seen - start - 1)) do bytes = bytes - #entry end
    redis.call('LTRIM', log, seen - start, -1)
  end
  redis.call('HSET', about, 'history', history, 'start', words[3], 'mark', words[4], 'time', string.format('%.0f', time),
    'bytes', string.format('%.0f', bytes), 'count', words[7], 'size', words[8])
  redis.call('HDEL', about, 'writer', 'until')
  if words[6] ~= '' then publish(history .. ' ' .. words[3]) end
  return {'kept'}
end

local answer = table.concat(commands[words[1]](), '\t')
if #answer < 4096 then return {ok = answer} end
return answer
