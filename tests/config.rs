//! What is promised of the configuration beside its faults: everything written in the manual is accepted, variables are
//! replaced after parsing, and what is generated from the types is in step with them.

use std::path::Path;
use std::time::Duration;

use tollgate::config::{
    self, Access, Applies, Checksum, Config, Database, FeedSource, Foreign, Format, Level, OnLoss, Output,
    Registration, UpstreamTarget, applies, json_schema,
};

/// A directory with what configurations name: tokens, keys, certificates.
fn files() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("feed.token", "a-feed-token-for-tests\n");
    write("admin.token", "an-admin-token-for-tests\n");
    write("keys.ndjson", "");
    write("tls.crt", "");
    write("tls.key", "");
    directory
}

fn load(text: &str, directory: &Path, env: &[(&str, &str)]) -> Config {
    try_load(text, directory, env).unwrap_or_else(|faults| panic!("{faults}"))
}

fn try_load(text: &str, directory: &Path, env: &[(&str, &str)]) -> Result<Config, config::Faults> {
    let env = |name: &str| {
        env.iter()
            .find(|(variable, _)| *variable == name)
            .map(|(_, value)| (*value).to_owned())
    };
    config::load_text("test.yaml", text, directory, &env)
}

/// Every key that the manual's overview shows, in one file.
const EVERYTHING: &str = r#"
version: 1
gate:
  name: gate-1
  threads: auto
  listen:
    - {address: "0.0.0.0:8080"}
    - {address: "0.0.0.0:8443", tls: {cert: tls.crt, key: tls.key}}
  header_prefix: x-platformxe-
  state_dir: /var/lib/tollgate
  feed: {url: "http://127.0.0.1:8081", token_file: feed.token}
  trusted_proxies: [10.0.0.0/8]
  limits: {head_bytes: 32768, head_fields: 100, head_deadline: 10s, connections: 20000, connections_per_address: 1000}
  failed_attempts: {limit: 30, window: 60s}
keys:
  checksum: required
  foreign: refuse
  environments:
    live: {prefix: pxk_live_, billed: true}
    test: {prefix: pxk_test_}
    dev:  {prefix: pxk_dev_}
  rotation: {default_grace: 24h, max_grace: 30d}
scopes: [messaging:send, storage:upload, permissions:check, exports:create]
tiers:
  permissions:check: {limit: 5000, window: 1h}
  default:           {limit: 1000, window: 1h}
plans:
  starter:  {max_in_flight: 100}
  business: {tiers: {default: {limit: 50000}}}
upstreams:
  platform: {servers: ["127.0.0.1:9000"], balance: round_robin, health: {path: /healthz, every: 5s}, timeouts: {connect: 2s, read: 30s}, tls: {sni: api.internal}}
  sandbox: {servers: ["127.0.0.1:9001"]}
routes:
  - {name: register, match: {methods: [POST], path: /api/v1/register}, upstream: control, public: {limit: 20, window: 1h}}
  - {name: checks,   match: {methods: [POST], path: "/api/v1/permissions/check"}, scope: permissions:check, tier: permissions:check, upstream: platform, sandbox_upstream: sandbox}
  - {name: exports,  match: {path: "/api/v1/exports/**"}, scope: exports:create, environments: [live], upstream: platform}
  - {name: health,   match: {path: /health}, upstream: platform, public: {}}
  - {name: default,  match: {path: "/**"}, upstream: platform}
control:
  listen: {address: "127.0.0.1:8081"}
  database: sqlite:///var/lib/tollgate/tollgate.db
  feed_token_file: feed.token
  admin_token_file: admin.token
  public_url: https://keys.example.com
  registration: open
admin: {listen: "127.0.0.1:9090"}
cluster: {url: "redis://127.0.0.1:6379", on_loss: share, wait: 5ms, lost_after: 500ms, max_clock_skew: 50ms}
log: {level: info, access: {format: json, path: stdout}}
"#;

#[test]
fn everything_that_the_manual_shows_is_accepted() {
    let directory = files();
    let config = load(EVERYTHING, directory.path(), &[]);
    let gate = config.gate.unwrap();
    assert_eq!((gate.name.as_str(), gate.threads), ("gate-1", None));
    assert_eq!(
        gate.listen[1].tls.as_ref().unwrap().certificates[0].key,
        directory.path().join("tls.key")
    );
    assert!(
        matches!(gate.feed.source, FeedSource::Url { ref token, .. } if token.expose() == "a-feed-token-for-tests")
    );
    assert_eq!(
        (gate.limits.head_bytes, gate.limits.head_deadline),
        (32_768, Duration::from_secs(10))
    );
    assert_eq!(
        (gate.trusted_proxies[0].prefix_length, gate.failed_attempts.limit),
        (8, 30)
    );
    assert_eq!(
        (config.keys.checksum, config.keys.foreign),
        (Checksum::Required, Foreign::Refuse)
    );
    assert_eq!(config.keys.rotation.max_grace, Duration::from_secs(30 * 86_400));
    assert_eq!(config.plans[1].limits["default"], 50_000);
    let UpstreamTarget::Servers(servers) = &config.upstreams[0].target else {
        panic!()
    };
    assert_eq!(servers.health.as_ref().unwrap().every, Duration::from_secs(5));
    assert_eq!(servers.tls.as_ref().unwrap().sni.as_deref(), Some("api.internal"));
    let control_upstream = config
        .upstreams
        .iter()
        .find(|upstream| upstream.name == "control")
        .unwrap();
    assert_eq!(control_upstream.target, UpstreamTarget::Control);
    assert!(matches!(config.routes[0].access, Access::Public { limit: Some(limit) } if limit.limit == 20));
    assert!(matches!(config.routes[3].access, Access::Public { limit: None }));
    assert!(
        matches!(&config.routes[2].access, Access::Key { environments, tier, .. } if environments == &["live"] && tier == "default")
    );
    let control = config.control.unwrap();
    assert_eq!(
        control.database,
        Database::Sqlite {
            path: "/var/lib/tollgate/tollgate.db".into()
        }
    );
    assert_eq!(
        (control.registration, control.state_dir.as_path()),
        (Registration::Open, Path::new("/var/lib/tollgate"))
    );
    let cluster = config.cluster.unwrap();
    assert_eq!(
        (cluster.on_loss, cluster.wait),
        (OnLoss::Share, Duration::from_millis(5))
    );
    assert_eq!(config.log.level, Level::Info);
    let access = config.log.access.unwrap();
    assert_eq!((access.format, access.path), (Format::Json, Output::Stdout));
}

#[test]
fn the_benchmark_s_own_files_are_accepted() {
    let directory = files();
    let common = r#"version: 1
gate:
  name: peers
  threads: 1
  listen: [{address: "127.0.0.1:7001"}]
  state_dir: /tmp/peers/state-gate
  feed: {file: keys.ndjson}
  limits: {connections: 20000, connections_per_address: 20000}
keys: {foreign: accept, environments: {live: {prefix: pxk_live_, billed: true}}}
scopes: [things:read, permissions:check]
tiers:
  default: {limit: 1000, window: 1h}
  permissions:check: {limit: 5000, window: 1h}
plans: {peers: {}}
upstreams: {origin: {servers: ["127.0.0.1:7000"]}}
admin: {listen: "127.0.0.1:0"}
log: {level: warn, access: off}
"#;
    let gate = "routes:\n  - {name: checks, match: {path: /v1/permissions/check}, scope: permissions:check, tier: permissions:check, upstream: origin}\n  - {name: rest, match: {path: \"/**\"}, scope: things:read, upstream: origin}\n";
    let pass = "routes:\n  - {name: rest, match: {path: \"/**\"}, public: {}, upstream: origin}\n";
    for routes in [gate, pass] {
        let config = load(&format!("{common}{routes}"), directory.path(), &[]);
        assert_eq!(config.log.access, None);
        assert_eq!(config.gate.unwrap().threads, Some(1));
        assert_eq!(config.plans.len(), 1);
        assert!(config.control.is_none() && config.cluster.is_none());
    }
}

/// The least that is a gate.
fn small(rest: &str) -> String {
    format!(
        "version: 1\ngate:\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  feed: {{file: keys.ndjson}}\ntiers: {{default: {{limit: 5, window: 1h}}}}\nupstreams: {{one: {{servers: [\"127.0.0.1:9\"]}}}}\n{rest}"
    )
}

#[test]
fn a_gate_without_routes_has_the_default_rule() {
    let directory = files();
    let config = load(&small(""), directory.path(), &[]);
    assert_eq!(config.routes.len(), 1);
    assert!(config.routes[0].is_catch_all());
    assert_eq!(config.gate.unwrap().default_upstream, "one");
    assert_eq!(config.plans[0].name, "starter");
}

#[test]
fn switches_are_words_or_truth_values() {
    let directory = files();
    for (written, on) in [
        ("off", false),
        ("\"off\"", false),
        ("false", false),
        ("on", true),
        ("true", true),
        ("{}", true),
    ] {
        let config = load(&small(&format!("log: {{access: {written}}}\n")), directory.path(), &[]);
        assert_eq!(config.log.access.is_some(), on, "{written}");
    }
}

#[test]
fn scopes_may_be_written_in_three_ways() {
    let directory = files();
    let list = "scopes: [a:b, {name: c:d, description: Does c}]\n";
    let mapping = "scopes: {a:b: Does a, c:d: {description: Does c}}\n";
    let scopes = |text: &str| load(&small(text), directory.path(), &[]).scopes;
    assert_eq!(scopes(list)[0].description, None);
    assert_eq!(scopes(list)[1], scopes(mapping)[1]);
    assert_eq!(scopes(mapping)[0].description.as_deref(), Some("Does a"));
}

#[test]
fn variables_are_replaced_after_parsing_and_typed_by_what_is_expected() {
    let directory = files();
    std::fs::write(directory.path().join("name"), "from-a-file\n").unwrap();
    let text = small("log: {level: \"${LEVEL:-warn}\"}\n").replace(
        "gate:\n",
        "gate:\n  threads: ${THREADS}\n  name: ${file:name}\n  realm: \"${REALM}\"\n  header_prefix: x-$${y}-\n",
    );
    let faults = try_load(&text, directory.path(), &[("THREADS", "2"), ("REALM", "a: {b")]).unwrap_err();
    assert_eq!(faults.faults.len(), 1, "{faults}");
    assert!(
        faults.faults[0].message.contains("bad prefix \"x-${y}-\""),
        "$${{ stands for itself: {faults}"
    );

    let text = text.replace("x-$${y}-", "x-y-");
    let config = load(&text, directory.path(), &[("THREADS", "2"), ("REALM", "a: {b")]);
    let gate = config.gate.unwrap();
    assert_eq!(
        (gate.threads, gate.name.as_str(), gate.realm.as_str()),
        (Some(2), "from-a-file", "a: {b")
    );
    assert_eq!(config.log.level, Level::Warn);

    let faults = try_load(&text, directory.path(), &[("THREADS", "two")])
        .unwrap_err()
        .to_string();
    let expected = "test.yaml:3:12: gate.threads: expected auto or a whole number from 1 to 1024, found \"${THREADS}\"\n\
                    test.yaml:5:10: gate.realm: the environment variable REALM is not set; set it, or give a default: ${REALM:-default}";
    assert_eq!(faults, expected);
}

#[test]
fn one_control_plane_serves_its_own_gate() {
    let directory = files();
    let text = small("control: {listen: \"127.0.0.1:0\", database: \"sqlite://t.db\", feed_token_file: feed.token, admin_token_file: admin.token}\n")
        .replace("  feed: {file: keys.ndjson}\n", "");
    let config = load(&text, directory.path(), &[]);
    assert_eq!(config.gate.unwrap().feed.source, FeedSource::Control);
    assert_eq!(
        config.control.unwrap().database,
        Database::Sqlite {
            path: directory.path().join("t.db")
        }
    );
}

#[test]
fn nothing_that_is_read_panics() {
    let directory = files();
    // Every prefix of a real file, and every file with one byte of structure changed.
    let mut tried = 0;
    for end in (0..EVERYTHING.len())
        .step_by(7)
        .filter(|end| EVERYTHING.is_char_boundary(*end))
    {
        let _ = try_load(&EVERYTHING[..end], directory.path(), &[]);
        tried += 1;
    }
    let structure = EVERYTHING.char_indices().filter(|(_, c)| "{}[]:,-\"\n".contains(*c));
    for (at, c) in structure.step_by(5) {
        for other in ["", "{", "]", ":", "&a ", "*a ", "\t", "!x ", "\u{0}", "- "] {
            let text = format!("{}{other}{}", &EVERYTHING[..at], &EVERYTHING[at + c.len_utf8()..]);
            let _ = try_load(&text, directory.path(), &[]);
            tried += 1;
        }
    }
    assert!(tried > 500, "{tried}");
}

#[test]
fn the_reference_page_is_in_step_with_the_types() {
    let path = "src/manual/configuration.md";
    if std::env::var_os("UPDATE_MANUAL").is_some() {
        std::fs::write(path, config::reference()).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        written == config::reference(),
        "{path} is old: UPDATE_MANUAL=1 cargo test --test config writes it anew"
    );
}

#[test]
fn every_setting_is_documented() {
    fn walk(schema: &serde_json::Value, path: &str, bare: &mut Vec<String>) {
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            if property["description"]
                .as_str()
                .is_none_or(|text| text.trim().is_empty())
            {
                bare.push(format!("{path}.{name}"));
            }
        }
    }
    let schema = json_schema();
    let mut bare = Vec::new();
    walk(&schema, "", &mut bare);
    for (name, definition) in schema["$defs"].as_object().unwrap() {
        walk(definition, name, &mut bare);
    }
    assert_eq!(bare, Vec::<String>::new());
}

#[test]
fn what_needs_a_restart_is_said_where_it_is_documented() {
    let schema = json_schema();
    assert_eq!(schema["properties"]["control"]["x-applies"], "restart");
    assert_eq!(schema["$defs"]["Gate"]["properties"]["listen"]["x-applies"], "restart");
    assert_eq!(schema["properties"]["tiers"]["x-applies"], "reload");
    assert_eq!(applies("gate.listen[].tls.cert"), Applies::Restart);
    assert_eq!(applies("routes[].scope"), Applies::Reload);
    for path in config::restart_paths() {
        let page = config::reference();
        let (section, name) = path.rsplit_once('.').unwrap_or(("", path));
        let heading = if section.is_empty() {
            "## The file".to_owned()
        } else {
            format!("## `{section}`")
        };
        let part = page
            .split(&heading)
            .nth(1)
            .unwrap_or_else(|| panic!("no section for {path}"));
        assert!(part.contains(&format!("| `{name}` |")), "{path} is no setting");
    }
}
