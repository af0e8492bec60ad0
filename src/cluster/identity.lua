-- Who answers: the name of the content, and of the server that runs. Sent after the calls of a batch: if the content still
-- has the name that is expected, it had it all the while, as a name that is lost never comes back.
return {redis.call('HGET', KEYS[1], 'token'), string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')}
