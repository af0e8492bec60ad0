//! Keys that mean nothing, and what was probably meant.

use crate::config::fault::{did_you_mean, listed};

/// What is told of a key that a mapping of this `shape`, which has the keys `names`, does not have.
pub fn unknown_key(key: &str, shape: &str, names: &[&str]) -> String {
    if let Some((_, _, hint)) = ELSEWHERE
        .iter()
        .find(|(place, name, _)| *place == shape && *name == key)
    {
        return format!("unknown key \"{key}\"; {hint}");
    }
    let suggestion = did_you_mean(key, names.iter().copied());
    if suggestion.is_empty() {
        format!(
            "unknown key \"{key}\" (keys here: {})",
            listed(names.iter().copied(), 20)
        )
    } else {
        format!("unknown key \"{key}\"{suggestion}")
    }
}

/// Keys that people know from elsewhere, or look for in another place, with what is written instead.
const ELSEWHERE: [(&str, &str, &str); 26] = [
    (
        "",
        "server",
        "the listener is `gate.listen`, the servers behind it are `upstreams`",
    ),
    ("", "listen", "it belongs into the section `gate`, `control` or `admin`"),
    (
        "",
        "rate_limits",
        "limits are `tiers`, by name: {limit: 1000, window: 1h}",
    ),
    (
        "",
        "limits",
        "limits of keys are `tiers`; limits of connections and heads are `gate.limits`",
    ),
    ("", "environments", "it belongs into `keys`: keys.environments"),
    ("", "redis", "counts are shared through `cluster`: {url: \"redis://…\"}"),
    ("", "database", "it belongs into `control`: control.database"),
    ("", "feed", "it belongs into `gate`: gate.feed"),
    (
        "",
        "metrics",
        "metrics are served by the listener `admin`: {listen: \"127.0.0.1:9090\"}",
    ),
    ("gate", "port", "write listen: [{address: \"0.0.0.0:8080\"}]"),
    ("gate", "address", "write listen: [{address: \"0.0.0.0:8080\"}]"),
    (
        "gate",
        "tls",
        "TLS belongs to a listener: listen: [{address: …, tls: {cert: …, key: …}}]",
    ),
    ("gate", "workers", "it is called `threads`"),
    ("gate", "upstreams", "`upstreams` stands beside `gate`, not in it"),
    ("gate", "routes", "`routes` stands beside `gate`, not in it"),
    (
        "gate.listen[]",
        "port",
        "the port is part of `address`: \"0.0.0.0:8080\"",
    ),
    (
        "gate.listen[]",
        "cert",
        "certificates belong into `tls`: {cert: …, key: …}",
    ),
    (
        "keys",
        "prefix",
        "prefixes belong to environments: environments: {live: {prefix: pxk_live_}}",
    ),
    ("routes[]", "path", "it belongs into `match`: match: {path: …}"),
    (
        "routes[]",
        "methods",
        "it belongs into `match`: match: {methods: […], path: …}",
    ),
    ("routes[]", "host", "it belongs into `match`: match: {host: …, path: …}"),
    ("routes[]", "scopes", "a route asks for one scope: scope: NAME"),
    (
        "routes[]",
        "limit",
        "a route's limit is its tier's (`tiers`), or `public: {limit, window}` for one without a key",
    ),
    ("routes[].match", "method", "it is a list: methods: [GET]"),
    ("routes[].match", "prefix", "write path: \"/prefix/**\""),
    (
        "upstreams.*",
        "url",
        "write servers: [\"HOST:PORT\"], with tls: {} for https",
    ),
];
