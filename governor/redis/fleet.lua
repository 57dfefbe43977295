-- The books of a fleet: one script, whose every call is one step. docs/fleet-protocol.md says what for.
--
-- KEYS: state, held, line, ids, sessions. ARGV: the session, then for each command its name, the number of
-- its arguments, and these. Returns the grants to this session (its serial number of a place, and the
-- fleet's number), then an answer for each command.
--
-- A place taken where there is room, and one given back, are written out at the end of this file. All else
-- is in `make_commands`, which is called when needed: to make so many functions costs as much as a grant.

local STATE, HELD, LINE, IDS, SESSIONS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local call = redis.call
local me = ARGV[1]
local time = call('TIME')
local micros = time[1] * 1000000 + time[2]
local lease, now, offset, number, from, queued, epoch
local main = {} -- the limits of the layers that are there always, by key
local granted, told = {}, {} -- to this session, and to others

-- A double holds each of these exactly, but would be printed as 1.7e+15.
local function digits(integer)
  return string.format('%.0f', integer)
end

local function load()
  local s = call('HMGET', STATE, 'lease', 'now', 'offset', 'number', 'from', 'queued', 'epoch',
    'global', 'streams', 'tools')
  if not s[1] then
    return
  end
  lease, offset, number, from = tonumber(s[1]), tonumber(s[3]), tonumber(s[4]), tonumber(s[5])
  queued, epoch = tonumber(s[6]), s[7]
  main[''], main['stream/'], main['tool/'] = tonumber(s[8]), tonumber(s[9]), tonumber(s[10])
  -- The clock never goes back, and by half a lease at the most.
  local last, most = tonumber(s[2]), math.floor(lease / 2)
  now = math.floor(micros / 1000) + offset
  if now < last then
    offset = offset + last - now
    now = last
  elseif now - last > most then
    offset = offset - (now - last - most)
    now = last + most
  end
end

local function draw()
  number = math.max(number + 1, micros)
  return number
end

local function make_commands()
  local NAMES = {[''] = 'global', ['stream/'] = 'streams', ['tool/'] = 'tools'}

  local function padded(integer)
    return string.format('%020.0f', integer)
  end

  -- Without memory a server refuses the first write of a script if that may need some. What gives back or
  -- keeps alive may not be refused: it begins with a write that needs none.
  local function free()
    call('HDEL', STATE, '')
  end

---------------------------------------------------------------------------------- the layers

  local agents = {} -- the limits of agents in use, as far as they were looked at: {made with, now}

  local function agent(key)
    if agents[key] == nil then
      local value = call('HGET', STATE, 'agent ' .. key)
      local made, current = string.match(value or '', '^(%d+) (%d+)$')
      agents[key] = made and {tonumber(made), tonumber(current)} or false
    end
    return agents[key]
  end

  local function limit(key)
    if NAMES[key] then
      return main[key]
    end
    local found = agent(key)
    return found and found[2]
  end

  local function count(set, key)
    if key == '' then
      return call('ZCARD', set)
    end
    return call('ZLEXCOUNT', set, '[' .. key, '(' .. string.sub(key, 1, -2) .. '0') -- '0' follows '/'
  end

  local known = {}
  local function layers(path)
    local found = known[path]
    if not found then
      found = {''}
      for stop in string.gmatch(path, '()/') do
        found[#found + 1] = string.sub(path, 1, stop)
      end
      known[path] = found
    end
    return found
  end

  -- The outermost layer of a path that is full, if one is. What was found of each is `seen` while nothing
  -- changes: all agents share the outer ones.
  local function full(path, seen)
    for _, key in ipairs(layers(path)) do
      local found = seen[key]
      if found == nil then
        local most = limit(key)
        found = most ~= nil and most ~= false and count(HELD, key) >= most
        seen[key] = found
      end
      if found then
        return key
      end
    end
  end

  -- How many hold each layer of a path, and its limit, the outermost first.
  local function uses(path)
    local found = {}
    for _, key in ipairs(layers(path)) do
      local most = limit(key)
      found[#found + 1] = digits(count(HELD, key))
      found[#found + 1] = most and digits(most) or ''
    end
    return found
  end

  local function kind(path)
    return layers(path)[2]
  end

---------------------------------------------------------------------------------- the permits

  local function read(text)
    local id, state, num, since, path = string.match(text, '^(%S+) (%a) (%d+) (%d+) (%S+)$')
    return {text = text, id = id, state = state, number = tonumber(num), since = tonumber(since), path = path}
  end

  local function find(id)
    local text = call('ZRANGEBYLEX', IDS, '[' .. id .. ' ', '(' .. id .. '!', 'LIMIT', 0, 1)[1]
    return text and read(text)
  end

  local function of_session(session, most)
    return call('ZRANGEBYLEX', IDS, '[' .. session .. ':', '(' .. session .. ';', 'LIMIT', 0, most)
  end

  local function place(permit)
    if permit.state == 'h' then
      return HELD, permit.path .. ' ' .. permit.id
    end
    return LINE, permit.path .. ' ' .. padded(permit.number) .. ' ' .. permit.id
  end

  -- Write a permit down. Returns the error where the server has no memory for that.
  local function put(permit)
    local set, member = place(permit)
    local done = redis.pcall('ZADD', set, 0, member)
    if type(done) == 'table' and done.err then
      return done
    end
    call('ZADD', IDS, 0, table.concat({permit.id, permit.state, digits(permit.number), digits(permit.since),
      permit.path}, ' '))
    local keys = layers(permit.path)
    for i = 3, #keys do
      local found = agent(keys[i])
      if found then
        call('HSET', STATE, 'agent ' .. keys[i], digits(found[1]) .. ' ' .. digits(found[2]))
      end
    end
  end

  local function strike(permit)
    free()
    call('ZREM', IDS, permit.text)
    call('ZREM', place(permit))
  end

  -- Strike out a permit, and the limits of agents that nobody uses any more.
  local function drop(permit)
    strike(permit)
    local keys = layers(permit.path)
    for i = 3, #keys do
      if count(HELD, keys[i]) == 0 and count(LINE, keys[i]) == 0 then
        call('HDEL', STATE, 'agent ' .. keys[i])
        agents[keys[i]] = nil
      end
    end
  end

  -- Know the limits of the agents on a path, given as pairs: made with, now. Returns what contradicts.
  local function adopt(path, pairs_of_limits)
    local keys = layers(path)
    for i = 3, #keys do
      local made, current = pairs_of_limits[2 * i - 5], pairs_of_limits[2 * i - 4]
      local found = agent(keys[i])
      if found and digits(found[1]) ~= made then
        return {'conflict', keys[i], digits(found[1])}
      elseif not found and made and made ~= '' then
        agents[keys[i]] = {tonumber(made), tonumber(current)}
      end
    end
  end

---------------------------------------------------------------------------------- the line

  local function grant(permit)
    strike(permit)
    permit.state, permit.since, permit.number = 'h', now, draw()
    put(permit)
    local session, serial = string.match(permit.id, '^(.*):(%d+)$')
    if session == me then
      granted[#granted + 1] = serial
      granted[#granted + 1] = digits(permit.number)
    else
      told[session] = told[session] or {}
      table.insert(told[session], serial .. ' ' .. digits(permit.number))
    end
  end

  -- The oldest in line whose whole path has room: one look at each path in line that is not blocked above.
  local function next_in_line()
    local cursor, best, seen = '-', nil, {}
    while true do
      local first = call('ZRANGEBYLEX', LINE, cursor, '+', 'LIMIT', 0, 1)[1]
      if not first then
        return best
      end
      local path, num, id = string.match(first, '^(%S+) (%d+) (%S+)$')
      local blocked = full(path, seen)
      if blocked == '' then
        return nil
      elseif blocked then
        cursor = '[' .. string.sub(blocked, 1, -2) .. '0'
      else
        if not best or num < best.number then
          best = {number = num, id = id}
        end
        cursor = '[' .. path .. '!' -- past its own, to those of the agents below
      end
    end
  end

  local function hand_on()
    if now < from or call('ZCARD', LINE) == 0 then
      return
    end
    local best = next_in_line()
    while best do
      grant(find(best.id))
      best = next_in_line()
    end
  end

  -- End some sessions whose lease is over; not this one, which is here.
  local function reap(sessions)
    for _, session in ipairs(sessions) do
      if session ~= me then
        free()
        local texts = of_session(session, 500)
        for _, text in ipairs(texts) do
          drop(read(text))
        end
        if #texts < 500 then
          call('ZREM', SESSIONS, session)
        end
      end
    end
    hand_on()
  end

---------------------------------------------------------------------------------- the commands

  local commands = {}

  function commands.join(streams, tools, global, most, seconds, settling)
    local created = 0
    if not lease then
      if streams == '' or tools == '' or global == '' then
        return {'none'}
      end
      created = 1
      local start = math.floor(micros / 1000)
      local span = seconds == '' and 30000 or tonumber(seconds)
      call('HSET', STATE, 'streams', streams, 'tools', tools, 'global', global, 'queued', most,
        'lease', digits(span), 'now', digits(start), 'offset', '0', 'number', digits(micros),
        'from', digits(start + span * tonumber(settling)), 'epoch', digits(micros))
        load()
    end
    return {'joined', digits(main['stream/']), digits(main['tool/']), digits(main['']),
      queued and digits(queued) or '', digits(lease), tostring(created)}
  end

  function commands.renew()
    free()
    local score = call('ZSCORE', SESSIONS, me)
    call('ZADD', SESSIONS, digits(now + lease), me)
    hand_on()
    local soonest = now + lease
    local first = call('ZRANGE', SESSIONS, 0, 1, 'WITHSCORES')
    for i = 1, #first, 2 do
      if first[i] ~= me then
        soonest = math.min(soonest, tonumber(first[i + 1]) + 1)
      end
    end
    if from > now then
      soonest = math.min(soonest, from)
    end
    local answer = {score and '1' or '0', digits(math.max(0, soonest - now)), digits(math.max(0, from - now)),
      epoch, digits(main['stream/']), digits(main['tool/']), digits(main[''])}
    for _, text in ipairs(of_session(me, 100000)) do
      local permit = read(text)
      answer[#answer + 1] = string.match(permit.id, '(%d+)$')
      answer[#answer + 1] = permit.state
      answer[#answer + 1] = digits(permit.number)
    end
    return answer
  end

  -- `age` is the number of one that comes again, and empty for a newcomer.
  function commands.acquire(serial, path, waits, age, ...)
    local ends = tonumber(call('ZSCORE', SESSIONS, me) or '-1')
    if ends < now then
      return {'lapsed'}
    end
    local id = me .. ':' .. serial
    local permit = find(id)
    if not permit then
      local contradicts = adopt(path, {...})
      if contradicts then
        return contradicts
      end
      local state = 'h'
      if now < from or full(path, {}) then
        local waiting = count(LINE, kind(path))
        if waits == '0' then
          return {'full', digits(waiting), uses(path)}
        elseif age == '' and queued and waiting >= queued then
          return {'queue', digits(waiting), uses(path), digits(queued)}
        end
        state = 'w'
      end
      local num = (state == 'h' or age == '') and draw() or tonumber(age)
      permit = {id = id, state = state, number = num, since = now, path = path}
      local failed = put(permit)
      if failed then
        return {'error', failed.err}
      end
    end
    if permit.state == 'h' then
      return {'held', digits(permit.number)}
    end
    return {'waiting', digits(permit.number), uses(path)}
  end

  function commands.withdraw(serial)
    local permit = find(me .. ':' .. serial)
    if not permit then
      return {'left'}
    elseif permit.state == 'h' then
      return {'held', digits(permit.number)}
    end
    local _, member = place(permit)
    local ahead = call('ZLEXCOUNT', LINE, '[' .. permit.path .. ' ', '(' .. member)
    local used = uses(permit.path)
    drop(permit)
    return {'left', digits(ahead), used}
  end

  function commands.release(serial)
    local permit = find(me .. ':' .. serial)
    if permit then
      drop(permit)
      if permit.state == 'h' then
        hand_on()
      end
    end
    return {}
  end

  function commands.register(serial, path, age, ...)
    local id = me .. ':' .. serial
    if not call('ZSCORE', SESSIONS, me) then
      return {'lapsed'} -- else nobody would ever give it back; the next renewal has it registered
    end
    if not find(id) then
      free()
      adopt(path, {...})
      number = math.max(number, tonumber(age))
      put({id = id, state = 'h', number = tonumber(age), since = now, path = path})
    end
    return {}
  end

  function commands.resize(...)
    free()
    local changes = {...}
    for i = 1, #changes, 2 do
      local key, most = changes[i], changes[i + 1]
      if NAMES[key] then
        call('HSET', STATE, NAMES[key], most)
        main[key] = tonumber(most)
      elseif agent(key) then
        agents[key][2] = tonumber(most)
        call('HSET', STATE, 'agent ' .. key, digits(agents[key][1]) .. ' ' .. most)
      end
    end
    hand_on()
    return {}
  end

  function commands.usage(...)
    local answer = {}
    for _, key in ipairs({...}) do
      local most = limit(key)
      answer[#answer + 1] = digits(count(HELD, key))
      answer[#answer + 1] = digits(count(LINE, key))
      answer[#answer + 1] = most and digits(most) or ''
    end
    return answer
  end

  function commands.agents()
    local answer = {}
    for _, field in ipairs(call('HKEYS', STATE)) do
      answer[#answer + 1] = string.match(field, '^agent (.*)$')
    end
    return answer
  end

  function commands.holders()
    local answer = {}
    for _, member in ipairs(call('ZRANGE', HELD, 0, -1)) do
      local permit = find(string.match(member, ' (%S+)$'))
      answer[#answer + 1] = permit.id
      answer[#answer + 1] = permit.path
      answer[#answer + 1] = digits(now - permit.since)
    end
    return answer
  end

  function commands.sessions()
    local answer, all = {digits(math.max(0, from - now))}, call('ZRANGE', SESSIONS, 0, -1, 'WITHSCORES')
    for i = 1, #all, 2 do
      local held, waiting = 0, 0
      for _, text in ipairs(of_session(all[i], 100000)) do
        if read(text).state == 'h' then
          held = held + 1
        else
          waiting = waiting + 1
        end
      end
      for _, it in ipairs({all[i], digits(held), digits(waiting), digits(tonumber(all[i + 1]) - now)}) do
        answer[#answer + 1] = it
      end
    end
    return answer
  end

  function commands.leave()
    free()
    for _, text in ipairs(of_session(me, 100000)) do
      drop(read(text))
    end
    call('ZREM', SESSIONS, me)
    hand_on()
    told[me] = {''} -- so that whoever listens there looks up
    return {}
  end

  commands.hand_on, commands.reap = hand_on, reap
  return commands
end

local commands
local function slowly(name, ...)
  commands = commands or make_commands()
  return commands[name](...)
end

load()
if lease then
  local over = call('ZRANGEBYSCORE', SESSIONS, '-inf', '(' .. digits(now), 'LIMIT', 0, 10)
  if over[2] or (over[1] and over[1] ~= me) then
    slowly('reap', over)
  end
  if from > 0 and now >= from then -- who came while it settled goes before who comes now
    from = 0
    redis.pcall('HSET', STATE, 'from', '0')
    slowly('hand_on')
  end
end

local answers, at, lives = {granted}, 2, nil
while ARGV[at] do
  local name, size, path, answer = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 3], nil
  if not lease then
    answer = name ~= 'join' and {'gone'}
  elseif name == 'acquire' and size == 4 and now >= from then
    if lives == nil then
      lives = tonumber(call('ZSCORE', SESSIONS, me) or '-1') >= now
    end
    local first, past = '[tool/', '(tool0'
    if path == 'stream/' then
      first, past = '[stream/', '(stream0'
    end
    if lives and call('ZCARD', HELD) < main[''] and call('ZLEXCOUNT', HELD, first, past) < main[path] then
      local id = me .. ':' .. ARGV[at + 2]
      -- 0 where it is held already, and an error where there is no memory.
      if redis.pcall('ZADD', HELD, 0, path .. ' ' .. id) == 1 then
        local num = digits(draw())
        call('ZADD', IDS, 0, id .. ' h ' .. num .. ' ' .. digits(now) .. ' ' .. path)
        answer = {'held', num}
      end
    end
  elseif name == 'release' and main[path] and size == 2 then
    local id = me .. ':' .. ARGV[at + 2]
    if call('ZREM', HELD, path .. ' ' .. id) == 1 then
      call('ZREMRANGEBYLEX', IDS, '[' .. id .. ' ', '(' .. id .. '!')
      if call('ZCARD', LINE) > 0 then
        slowly('hand_on')
      end
      answer = {}
    end
  end
  answers[#answers + 1] = answer or slowly(name, unpack(ARGV, at + 2, at + 1 + size))
  at = at + 2 + size
end

if lease then
  -- Without memory, and with nothing given back, this one may fail: the clock only stands meanwhile.
  redis.pcall('HSET', STATE, 'now', digits(now), 'offset', digits(offset), 'number', digits(number))
  for session, messages in pairs(told) do
    call('PUBLISH', string.sub(STATE, 1, -6) .. session, table.concat(messages, ' '))
  end
end
return answers
