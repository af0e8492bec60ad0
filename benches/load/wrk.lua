-- Every request another key, and one line at the end that the bench reads.
local requests, at = {}, 0

function init(args)
  for key in io.lines(args[1]) do
    local headers = { Host = "load.test" }
    if key ~= "" then headers["x-api-key"] = key end
    requests[#requests + 1] = wrk.format("GET", nil, headers)
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  print(string.format("tally %d %d %.1f %.1f %.1f", summary.requests, summary.errors.status,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
