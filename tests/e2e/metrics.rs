//! Metrics, and the rules and the dashboard that use them.

use crate::alone::{GateAlone, Samples};
use crate::certificates::Authority;
use crate::harness::{PATIENCE, Process, Tollgate, client, data, standing_upstream, until};
use crate::origin::{Manner, Origin};
use reqwest::Method;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Metrics of counts that are shared between gates take a store; the tests that have one look at them.
const OF_A_CLUSTER: &str = "tollgate_cluster_";

/// What can have one value only: it is looked at, but does not move.
const CONSTANT: [&str; 3] = ["tollgate_build_info", "process_start_time_seconds", "process_max_fds"];

fn promtool(args: &[&str], input: &str) -> (bool, String) {
    let mut child = Command::new("promtool")
        .args(args)
        .current_dir(ROOT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed by `make test` (Debian's package prometheus)");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

#[test]
fn promtool_accepts_the_alert_rules_and_every_alert_has_a_case_that_fires_it() {
    let (accepted, said) = promtool(&["check", "rules", "conf/alerts.yaml"], "");
    assert!(accepted && said.contains("SUCCESS"), "{said}");
    let (passed, said) = promtool(&["test", "rules", "tests/alerts/alerts.test.yaml"], "");
    assert!(passed && said.contains("SUCCESS"), "{said}");
    let read = |file: &str| std::fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
    let names = |text: &str, before: &str| -> BTreeSet<String> {
        let lines = text.lines().filter_map(|line| line.trim().strip_prefix(before));
        lines.map(str::to_owned).collect()
    };
    let alerts = names(&read("conf/alerts.yaml"), "- alert: ");
    assert!(alerts.len() > 15);
    assert_eq!(alerts, names(&read("tests/alerts/alerts.test.yaml"), "alertname: "));
}

/// The PromQL of the alert rules and of the dashboard, with the dashboard's variables replaced.
fn expressions() -> Vec<String> {
    fn walk(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| match value.as_str() {
                Some(text) if key == "expr" => found.push(text.to_owned()),
                _ => walk(value, found),
            }),
            Value::Array(list) => list.iter().for_each(|value| walk(value, found)),
            _ => {}
        }
    }
    let read = |file: &str| std::fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
    let mut found = vec![];
    walk(
        &serde_json::from_str(&read("conf/grafana-dashboard.json")).unwrap(),
        &mut found,
    );
    let of_dashboard = found.len();
    walk(
        &serde_yaml::from_str::<Value>(&read("conf/alerts.yaml")).unwrap(),
        &mut found,
    );
    assert!(
        of_dashboard > 30 && found.len() > of_dashboard + 15,
        "{of_dashboard} of {}",
        found.len()
    );
    let replaced = [
        ("$__rate_interval", "5m"),
        ("$__interval", "5m"),
        ("$instance", ".*"),
        ("$job", ".*"),
    ];
    found
        .into_iter()
        .map(|expr| replaced.iter().fold(expr, |expr, (from, to)| expr.replace(from, to)))
        .collect()
}

#[test]
fn rules_and_dashboard_name_metrics_that_exist() {
    let expressions = expressions();
    let mut rules = String::from("groups:\n  - name: all\n    rules:\n");
    for (number, expr) in expressions.iter().enumerate() {
        rules += &format!("      - {{record: \"r:{number}\", expr: {}}}\n", json!(expr));
    }
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    std::fs::write(file.path(), rules).unwrap();
    let (accepted, said) = promtool(&["check", "rules", &file.path().display().to_string()], "");
    assert!(
        accepted && said.contains(&format!("{} rules found", expressions.len())),
        "{said}"
    );

    let known: BTreeSet<&str> = tollgate::app::metric_names()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    let mut named = BTreeSet::new();
    for expr in &expressions {
        // Outside of strings.
        for part in expr.split('"').step_by(2) {
            for word in part.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
                if word.starts_with("tollgate_") || word.starts_with("process_") {
                    let base = ["_bucket", "_sum", "_count"]
                        .iter()
                        .find_map(|suffix| word.strip_suffix(suffix));
                    named.insert(base.filter(|base| known.contains(base)).unwrap_or(word).to_owned());
                }
            }
        }
    }
    let unknown: Vec<_> = named.iter().filter(|name| !known.contains(name.as_str())).collect();
    assert!(unknown.is_empty(), "{unknown:?} are no metrics");
    let unseen: Vec<_> = known
        .iter()
        .filter(|name| !named.contains(**name) && !CONSTANT.contains(*name))
        .filter(|name| !name.starts_with(OF_A_CLUSTER))
        .collect();
    assert!(unseen.is_empty(), "{unseen:?} are in no rule and on no panel");
}

/// All samples that were ever seen of each metric, added up over its labels.
#[derive(Default)]
struct Seen {
    values: BTreeMap<String, BTreeSet<String>>,
    labels: BTreeMap<String, BTreeSet<String>>,
}

impl Seen {
    async fn look(&mut self, who: &str, client: &reqwest::Client, admin: &str) -> Samples {
        let samples = Samples::read(client, admin).await;
        let mut sums: BTreeMap<String, f64> = BTreeMap::new();
        for (sample, value) in &samples.0 {
            let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
            let is_part = ["_bucket", "_sum"].iter().any(|suffix| name.ends_with(suffix));
            // A histogram stands for itself by the count.
            let name = name.strip_suffix("_count").unwrap_or(name);
            if is_part {
                continue;
            }
            *sums.entry(name.to_owned()).or_default() += value;
            let names = labels
                .split(',')
                .filter_map(|label| label.split('=').next())
                .filter(|name| !name.is_empty());
            self.labels
                .entry(name.to_owned())
                .or_default()
                .extend(names.map(str::to_owned));
        }
        for (name, sum) in sums {
            self.values.entry(name).or_default().insert(format!("{who} {sum}"));
        }
        samples
    }
}

/// `tollgate run` in a directory of the test.
pub struct Running {
    _process: Process,
    pub admin: String,
    address: String,
    log: std::path::PathBuf,
}

pub fn start(dir: &Path, name: &str, role: &str, text: &str) -> Running {
    let config = dir.join(format!("{name}.yaml"));
    std::fs::write(&config, text).unwrap();
    let log = dir.join(format!("{name}.log"));
    let child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .arg("run")
        .arg("-c")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let address = |which: &str| {
        let file = dir.join(name).join(format!("run/{which}.addr"));
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        until(|| std::fs::read_to_string(&file).ok(), said).trim().to_owned()
    };
    Running {
        _process: Process::new(child),
        admin: format!("http://{}", address("admin")),
        address: address(role),
        log,
    }
}

async fn eventually(what: &str, seen: &mut Seen, who: &str, running: &Running, holds: impl Fn(&Samples) -> bool) {
    let (client, deadline) = (client(), Instant::now() + PATIENCE);
    loop {
        let samples = seen.look(who, &client, &running.admin).await;
        if holds(&samples) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{what} does not come about: {samples:#?}\n{}",
            std::fs::read_to_string(&running.log).unwrap()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A gate and a control plane through good and bad times; every metric of the reference page takes more than one value.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_of_the_reference_page_exists_and_moves() {
    let mut seen = Seen::default();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("feed.token"), "a-feed-token-for-tests").unwrap();
    std::fs::write(at("admin.token"), "an-admin-token-for-tests").unwrap();
    Authority::new("Ours").issue(dir.path(), "front", &["localhost"]);
    std::os::unix::fs::symlink(at("access.log"), at("access")).unwrap();
    // Something in the spool's place.
    std::fs::create_dir_all(at("edge/keys.spool/in the way")).unwrap();
    let control_port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let (one, two) = (
        Origin::start("one", Manner::Answers).await,
        Origin::start("two", Manner::Answers).await,
    );
    let common = "tiers: {default: {limit: 1000000, window: 1h}}\nadmin: {listen: \"127.0.0.1:0\", key_labels: true}\n";
    let edge_text = format!(
        "version: 1\n{common}gate:\n  name: edge\n  listen: [{{address: \"127.0.0.1:0\"}}, {{address: \"127.0.0.1:0\", tls: {{cert: front.crt, key: front.key}}}}]\n  \
         state_dir: edge\n  feed: {{url: \"http://127.0.0.1:{control_port}\", token_file: feed.token}}\n  limits: {{connections_per_address: 20}}\n\
         upstreams: {{origin: {{servers: [\"{}\", \"{}\"], health: {{path: /healthz, every: 100ms, unhealthy_after: 1, healthy_after: 1}}}}}}\n\
         log: {{access: {{path: access}}}}\n",
        one.address, two.address
    );
    let control_text = |database: &str| {
        format!(
            "version: 1\n{common}control:\n  listen: \"127.0.0.1:{control_port}\"\n  database: sqlite://{database}\n  state_dir: control\n  \
             feed_token_file: feed.token\n  admin_token_file: admin.token\n"
        )
    };

    // Before the control plane: nothing works yet.
    let edge = start(dir.path(), "edge", "gate", &edge_text);
    eventually("not ready", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_ready") == Some(0.0)
    })
    .await;
    let control = start(dir.path(), "control", "control", &control_text("first.db"));
    eventually("a control plane", &mut seen, "control", &control, |samples| {
        samples.get("tollgate_control_revision").is_some()
    })
    .await;
    let (account, key) = account(&format!("http://{}", control.address)).await;
    let url = format!("http://{}", edge.address);
    let ask = async |method: Method, path: &str| {
        let request = client()
            .request(method, format!("{url}{path}"))
            .header("x-api-key", &key);
        request.send().await.unwrap().status().as_u16()
    };
    eventually("a spool that fails", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_ready") == Some(1.0) && samples.get("tollgate_spool_failing") == Some(1.0)
    })
    .await;
    std::fs::remove_dir_all(at("edge/keys.spool")).unwrap();
    another_key(&account).await;
    eventually("a spool", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_spool_failing") == Some(0.0)
    })
    .await;
    eventually("an acknowledgement", &mut seen, "control", &control, |samples| {
        samples.get("tollgate_control_gate_revision{gate=\"edge\"}") == samples.get("tollgate_control_revision")
    })
    .await;

    // Requests of every kind.
    for _ in 0..5 {
        assert_eq!(ask(Method::GET, "/x").await, 200);
    }
    assert_eq!(client().get(format!("{url}/x")).send().await.unwrap().status(), 401);
    one.behave(Manner::Delays(Duration::from_millis(300)));
    two.behave(Manner::Delays(Duration::from_millis(300)));
    let slow = tokio::spawn(client().get(format!("{url}/slow")).header("x-api-key", &key).send());
    eventually("a request under way", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_requests_in_flight") == Some(1.0)
    })
    .await;
    assert_eq!(slow.await.unwrap().unwrap().status(), 200);
    one.behave(Manner::Answers);
    two.behave(Manner::Answers);
    let log = std::fs::read_to_string(&edge.log).unwrap();
    let tls: SocketAddr = log
        .lines()
        .filter_map(|line| line.split("gate listens on ").nth(1))
        .nth(1)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let mut plain = std::net::TcpStream::connect(tls).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    eventually("a failed handshake", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_handshakes_failed_total") == Some(1.0)
    })
    .await;
    let many: Vec<_> = (0..30)
        .map(|_| std::net::TcpStream::connect(&edge.address).unwrap())
        .collect();
    eventually("connections over the cap", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_connections_capped_total").unwrap() > 0.0
    })
    .await;
    drop((many, plain));
    eventually("free places", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_connections").unwrap() < 10.0
    })
    .await;
    eventually("posted usage", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_usage_batches_sent_total").unwrap() > 0.0
            && samples.get("tollgate_usage_batches_unsent") == Some(0.0)
    })
    .await;

    // Upstreams go and come.
    one.behave_towards_checks(Manner::Status(500));
    eventually("a server that is out", &mut seen, "edge", &edge, |samples| {
        samples.sum("tollgate_upstream_up") == Some(1.0)
    })
    .await;
    one.behave_towards_checks(Manner::Answers);
    eventually("both", &mut seen, "edge", &edge, |samples| {
        samples.sum("tollgate_upstream_up") == Some(2.0)
    })
    .await;
    one.kill().await;
    two.kill().await;
    assert_eq!(ask(Method::GET, "/x").await, 502);

    // Disks fill up.
    std::fs::remove_file(at("access")).unwrap();
    std::os::unix::fs::symlink("/dev/full", at("access")).unwrap();
    let reload = async || {
        client()
            .post(format!("{}/reload", edge.admin))
            .send()
            .await
            .unwrap()
            .status()
            .as_u16()
    };
    assert_eq!(reload().await, 200);
    ask(Method::GET, "/x").await;
    eventually("lost lines", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_access_log_dropped_total").unwrap() > 0.0
    })
    .await;
    std::fs::write(at("edge.yaml"), "version: 1\n").unwrap();
    assert_eq!(reload().await, 422);
    eventually("a failed reload", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_config_last_reload_successful") == Some(0.0)
    })
    .await;
    std::fs::write(at("edge.yaml"), &edge_text).unwrap();
    std::fs::rename(at("edge/usage"), at("edge/elsewhere")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while seen
        .look("edge", &client(), &edge.admin)
        .await
        .get("tollgate_journal_failing")
        != Some(1.0)
    {
        ask(Method::GET, "/x").await;
        assert!(
            Instant::now() < deadline,
            "{}",
            std::fs::read_to_string(&edge.log).unwrap()
        );
    }
    std::fs::rename(at("edge/elsewhere"), at("edge/usage")).unwrap();
    Authority::new("Ours").issue_for(dir.path(), "front", &["localhost"], 30);

    // The control plane goes, and comes back with a younger database.
    drop(control);
    ask(Method::GET, "/x").await;
    eventually("usage that waits", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_usage_post_failing") == Some(1.0)
            && samples.get("tollgate_usage_unsent_bytes").unwrap() > 0.0
    })
    .await;
    // In its place, for a moment, something that sends a key which stands in no header field.
    let odd = tokio::spawn(odd_feed(control_port));
    eventually("a key that is left out", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_feed_unusable_keys_total").unwrap() > 0.0
    })
    .await;
    odd.abort();
    assert!(odd.await.unwrap_err().is_cancelled());
    std::fs::remove_file(at("control/run/control.addr")).unwrap();
    std::fs::remove_file(at("control/run/admin.addr")).unwrap();
    let control = start(dir.path(), "control", "control", &control_text("second.db"));
    eventually("a source that is behind", &mut seen, "edge", &edge, |samples| {
        samples.get("tollgate_feed_source_is_behind") == Some(1.0)
    })
    .await;
    eventually("a renewed certificate", &mut seen, "edge", &edge, |samples| {
        let expiry = samples.sum("tollgate_certificate_expiry_timestamp_seconds").unwrap();
        expiry - samples.get("process_start_time_seconds").unwrap() < 40.0 * 86_400.0
    })
    .await;
    seen.look("control", &client(), &control.admin).await;

    // A file of keys that is damaged.
    let alone = GateAlone::start(&format!("origin: {{servers: [\"{}\"]}}", standing_upstream().await)).await;
    seen.look("alone", &alone.client, &alone.admin).await;
    let keys = alone.path().join("keys.ndjson");
    let good = std::fs::read_to_string(&keys).unwrap();
    std::fs::write(&keys, format!("{good}garbage\n")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while seen
        .look("alone", &alone.client, &alone.admin)
        .await
        .get("tollgate_feed_refused_total")
        != Some(1.0)
    {
        assert!(
            Instant::now() < deadline,
            "the damaged file is not refused: {}",
            alone.log()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    // Everything that was promised was there, with its labels, and moved; and nothing else.
    // Those of shared counts want a store; `tests/cluster` looks at them.
    let promised: BTreeMap<&str, BTreeSet<&str>> = tollgate::app::metric_names()
        .into_iter()
        .filter(|(name, _)| !name.starts_with("tollgate_cluster_"))
        .map(|(name, labels)| (name, labels.iter().copied().collect()))
        .collect();
    let page = std::fs::read_to_string(Path::new(ROOT).join("src/manual/metrics.md")).unwrap();
    for (name, labels) in promised.iter().filter(|(name, _)| !name.starts_with(OF_A_CLUSTER)) {
        assert!(page.contains(&format!("| `{name}` |")), "{name} is not in the manual");
        let values = seen
            .values
            .get(*name)
            .unwrap_or_else(|| panic!("{name} was never seen"));
        let labels_seen: BTreeSet<&str> = seen.labels[*name].iter().map(String::as_str).collect();
        assert_eq!(*labels, labels_seen, "labels of {name}");
        let each: BTreeSet<&str> = values.iter().map(|value| value.split(' ').next().unwrap()).collect();
        let moved = values.len() > each.len();
        assert!(
            moved || CONSTANT.contains(name),
            "{name} was always {values:?}; let this test move it"
        );
    }
    let unknown: Vec<_> = seen
        .values
        .keys()
        .filter(|name| !promised.contains_key(name.as_str()))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?} are described nowhere");
}

/// A feed that goes on from whatever revision a gate has, with one key of a strange organisation.
async fn odd_feed(port: u16) {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        connections.spawn(async move {
            let mut stream = BufReader::new(stream);
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") && stream.read_line(&mut head).await.unwrap() > 0 {}
            let after = head.split_once("/feed/v1/keys?after=").map(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next());
            let Some(Some(after)) = after else {
                let refused = b"HTTP/1.1 404 X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                return stream.write_all(refused).await.unwrap();
            };
            let line = json!({
                "type": "key", "revision": after.parse::<u64>().unwrap() + 1, "id": "key_odd", "organization": "in no\nheader field",
                "environment": "live", "scopes": [], "plan": "starter", "secrets": [{"sha256": "ab".repeat(32)}],
                "expires_at": null, "disabled": false, "revoked": false,
            });
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n{line}\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
            std::future::pending().await
        });
    }
}

struct Account {
    control: String,
    cookie: String,
}

/// An account and a key of it that the gates know.
async fn account(control: &str) -> (Account, String) {
    let seed = json!({"name": "Ours", "email": "ours@example.com", "password": "your-secure-password"});
    let registered = client()
        .post(format!("{control}/api/v1/register"))
        .json(&seed)
        .send()
        .await
        .unwrap();
    let key = data(registered).await["apiKey"].as_str().unwrap().to_owned();
    let credentials = json!({"email": seed["email"], "password": seed["password"]});
    let signed_in = client()
        .post(format!("{control}/api/v1/login"))
        .json(&credentials)
        .send()
        .await
        .unwrap();
    assert!(signed_in.status().is_success(), "{}", signed_in.text().await.unwrap());
    let cookie = signed_in.headers()["set-cookie"]
        .to_str()
        .unwrap()
        .split(';')
        .next()
        .unwrap()
        .to_owned();
    let control = control.to_owned();
    (Account { control, cookie }, key)
}

async fn another_key(account: &Account) {
    let wanted = json!({"name": "another", "environment": "live", "scopes": []});
    let request = client()
        .post(format!("{}/api/v1/keys?wait=all", account.control))
        .json(&wanted);
    let made = request.header("cookie", &account.cookie).send().await.unwrap();
    assert!(made.status().is_success(), "{}", made.text().await.unwrap());
}

#[tokio::test]
async fn prometheus_gets_what_it_asks_for_and_promtool_finds_no_fault() {
    let tollgate = Tollgate::start().await;
    assert_eq!(tollgate.ask("/any", &tollgate.key).await.status(), 200);
    let metrics = |accept: &str| {
        tollgate
            .client
            .get(format!("{}/metrics", tollgate.admin))
            .header("accept", accept)
            .send()
    };
    let plain = metrics("*/*").await.unwrap();
    assert_eq!(
        plain.headers()["content-type"],
        "text/plain; version=0.0.4; charset=utf-8"
    );
    let text = plain.text().await.unwrap();
    let (accepted, said) = promtool(&["check", "metrics"], &text);
    assert!(accepted && said.is_empty(), "{said}\n{text}");
    let open = metrics("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
        .await
        .unwrap();
    assert_eq!(
        open.headers()["content-type"],
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    let open = open.text().await.unwrap();
    assert!(
        open.ends_with("# EOF\n") && open.contains("# TYPE tollgate_requests counter"),
        "{open}"
    );
}
