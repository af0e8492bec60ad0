//! Two control planes on one PostgreSQL, two gates, all of them real processes, and a balancer that sends each connection
//! to whichever control plane lives: a change on either reaches both gates, whatever dies meanwhile.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};

use crate::postgres::Postgres;

/// How long a change may take to be in force everywhere, whatever happens to a control plane.
const BOUND: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);

/// How many keys are revoked.
fn revocations() -> usize {
    match std::env::var("TOLLGATE_PROOF").as_deref() {
        Ok("full") => 10_000,
        _ => 200,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_on_either_replica_reach_every_gate_whatever_dies() {
    let mut world = World::start().await;
    let before = world.revoke_many(revocations() / 2, 0).await;
    report("both replicas alive", before);

    // One is killed with changes under way, and started again while they go on.
    let (killed, after) = {
        let victim = world.replicas[0].process.take().unwrap();
        let changes = world.revoke_many(revocations() / 2, 1_000_000);
        let fate = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let mut victim = victim;
            victim.kill().unwrap();
            victim.wait().unwrap();
            world.balancer.remove(world.replicas[0].address());
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            let again = Process::spawn(&world.binary(), &world.replicas[0].config, &world.replicas[0].state);
            (again, Instant::now())
        };
        let (changes, (again, _)) = tokio::join!(changes, fate);
        (again, changes)
    };
    world.replicas[0].process = Some(killed);
    world.replicas[0].wait_for_address();
    world.balancer.add(world.replicas[0].address());
    report("one killed with -9 and started again", after);
    world.nothing_acknowledged_is_lost().await;
    world.waiting_for_all_names_both_gates().await;

    // The database goes away. What cannot be served says so; afterwards nobody needs to do anything.
    world.server.stop();
    for replica in &world.replicas {
        let (status, body) = world
            .try_call(replica.address(), Method::GET, "/api/v1/keys", None)
            .await
            .unwrap();
        assert_eq!(
            (status, body["error"]["code"].as_str()),
            (StatusCode::SERVICE_UNAVAILABLE, Some("UNAVAILABLE"))
        );
    }
    world.server.resume();
    let healed = world.revoke_many(20, 2_000_000).await;
    report("after the database was restarted", healed);
    world.nothing_acknowledged_is_lost().await;
    world.every_permit_is_in_the_ledger_once().await;
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: usize| times[(times.len() * share / 100).min(times.len() - 1)];
    println!(
        "{what}: {} effects of revocations, from the request to the refusal at a gate: p50 {:?}, p99 {:?}, max {:?}",
        times.len(),
        at(50),
        at(99),
        times[times.len() - 1]
    );
}

struct World {
    server: Postgres,
    replicas: Vec<Replica>,
    gates: Vec<Gate>,
    balancer: Balancer,
    client: Client,
    bearer: String,
    turn: AtomicUsize,
    /// Requests that a gate let through.
    passed: AtomicU64,
    /// Ids of keys whose making and whose end were acknowledged.
    acknowledged: Mutex<Vec<String>>,
    _directory: TempDir,
}

struct Replica {
    config: PathBuf,
    state: PathBuf,
    process: Option<Child>,
}

struct Gate {
    url: String,
    _process: Process,
}

/// A child that is ended when dropped.
struct Process(Child);

impl Process {
    fn spawn(binary: &Path, config: &Path, state: &Path) -> Child {
        for name in ["control", "gate"] {
            let _ = std::fs::remove_file(state.join(format!("run/{name}.addr")));
        }
        std::fs::create_dir_all(state).unwrap();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(state.join("log"))
            .unwrap();
        Command::new(binary)
            .arg("run")
            .arg("-c")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            drop(Process(process));
        }
    }
}

impl Replica {
    fn address(&self) -> SocketAddr {
        address(&self.state, "control")
    }

    fn wait_for_address(&self) {
        self.address();
    }
}

/// Waits until a process has written where it listens.
fn address(state: &Path, name: &str) -> SocketAddr {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let written = std::fs::read_to_string(state.join(format!("run/{name}.addr")));
        if let Some(address) = written.ok().and_then(|text| text.trim().parse().ok()) {
            return address;
        }
        let log = || std::fs::read_to_string(state.join("log")).unwrap_or_default();
        assert!(Instant::now() < deadline, "no {name}.addr:\n{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl World {
    async fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let write = |name: &str, text: String| {
            std::fs::write(at(name), text).unwrap();
            at(name)
        };
        write("feed.token", "feed-token-of-the-tests\n".into());
        write("admin.token", "admin-token-of-the-tests\n".into());
        let server = Postgres::durable();
        let database = server.database();
        let binary = PathBuf::from(env!("CARGO_BIN_EXE_tollgate"));
        let replicas: Vec<Replica> = (1..=2)
            .map(|number| {
                let state = at(&format!("control-{number}"));
                let control = format!(
                    "control: {{listen: \"127.0.0.1:0\", database: \"{database}\", feed_token_file: feed.token, \
                     admin_token_file: admin.token, state_dir: {}}}\n",
                    state.display()
                );
                let config = write(&format!("control-{number}.yaml"), format!("{CATALOGUE}{control}"));
                let process = Some(Process::spawn(&binary, &config, &state));
                Replica { config, state, process }
            })
            .collect();
        let balancer = Balancer::start(replicas.iter().map(Replica::address).collect()).await;
        let upstream = standing_upstream().await;
        let gates = (1..=2)
            .map(|number| {
                let state = at(&format!("gate-{number}"));
                let gate = format!(
                    "gate: {{name: gate-{number}, threads: 1, listen: [{{address: \"127.0.0.1:0\"}}], state_dir: {}, \
                     feed: {{url: \"http://{}\", token_file: feed.token}}, failed_attempts: {{limit: 1000000, window: 60s}}}}\n\
                     upstreams: {{origin: {{servers: [\"{upstream}\"]}}}}\n\
                     routes: [{{name: rest, match: {{path: \"/**\"}}, upstream: origin}}]\n",
                    state.display(),
                    balancer.address
                );
                let config = write(&format!("gate-{number}.yaml"), format!("{CATALOGUE}{gate}"));
                let process = Process(Process::spawn(&binary, &config, &state));
                let url = format!("http://{}/", address(&state, "gate"));
                Gate { url, _process: process }
            })
            .collect();
        let client = Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        let mut world = Self {
            server,
            replicas,
            gates,
            balancer,
            client,
            bearer: String::new(),
            turn: AtomicUsize::new(0),
            passed: AtomicU64::new(0),
            acknowledged: Mutex::default(),
            _directory: directory,
        };
        world.bearer = world.sign_up().await;
        world
    }

    fn binary(&self) -> PathBuf {
        PathBuf::from(env!("CARGO_BIN_EXE_tollgate"))
    }

    async fn sign_up(&self) -> String {
        let first = format!("http://{}", self.replicas[0].address());
        let person = json!({"name": "Acme", "email": "dev@example.com", "password": "your-secure-password"});
        let registered = self
            .client
            .post(format!("{first}/api/v1/register"))
            .json(&person)
            .send()
            .await
            .unwrap();
        assert_eq!(registered.status(), StatusCode::CREATED);
        // Registered with one, signed in at the other.
        let second = format!("http://{}", self.replicas[1].address());
        let login = self
            .client
            .post(format!("{second}/api/v1/login"))
            .json(&person_login())
            .send()
            .await
            .unwrap();
        assert_eq!(login.status(), StatusCode::OK);
        let cookie = login.headers()["set-cookie"]
            .to_str()
            .unwrap()
            .split(';')
            .next()
            .unwrap()
            .to_owned();
        let made = self
            .client
            .post(format!("{first}/api/v1/tokens"))
            .header("cookie", cookie)
            .json(&json!({"name": "tests"}))
            .send()
            .await
            .unwrap();
        let made: Value = made.json().await.unwrap();
        format!("Bearer {}", made["data"]["token"].as_str().unwrap())
    }

    async fn try_call(
        &self,
        to: SocketAddr,
        method: Method,
        path: &str,
        body: Option<(&str, &Value)>,
    ) -> Result<(StatusCode, Value), reqwest::Error> {
        let mut request = self
            .client
            .request(method, format!("http://{to}{path}"))
            .header("authorization", &self.bearer);
        if let Some((idempotency_key, body)) = body {
            request = request.header("idempotency-key", idempotency_key).json(body);
        }
        let response = request.send().await?;
        Ok((response.status(), response.json().await?))
    }

    /// Calls the replicas in turn until one answers: what a client of several addresses does. Answers when the call that
    /// succeeded was begun, too.
    async fn call(&self, method: Method, path: &str, body: Option<(&str, &Value)>) -> (Value, Instant) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let to = self.balancer.next(self.turn.fetch_add(1, Relaxed));
            let begun = Instant::now();
            match self.try_call(to, method.clone(), path, body).await {
                Ok((status, mut answer)) if status.is_success() => return (answer["data"].take(), begun),
                Ok((status, answer)) => assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{path}: {answer}"),
                Err(error) => assert!(!error.is_timeout(), "{path}: {error}"),
            }
            assert!(Instant::now() < deadline, "{path} is not answered");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Makes keys and revokes them, four at a time; answers how long each revocation took at each gate.
    async fn revoke_many(&self, count: usize, first: usize) -> Vec<Duration> {
        let next = AtomicUsize::new(0);
        let workers = join_all((0..4).map(|_| async {
            let mut times = Vec::new();
            loop {
                let number = next.fetch_add(1, Relaxed);
                if number >= count {
                    return times;
                }
                times.extend(self.revoke_one(first + number).await);
            }
        }));
        workers.await.into_iter().flatten().collect()
    }

    async fn revoke_one(&self, number: usize) -> Vec<Duration> {
        let wanted = json!({"name": format!("key {number}"), "environment": "live", "scopes": []});
        let (made, _) = self
            .call(Method::POST, "/api/v1/keys", Some((&format!("make-{number}"), &wanted)))
            .await;
        let id = made["id"].as_str().unwrap();
        let path = format!("/api/v1/keys/{id}");
        // A replica that died after the commit: the key is there, its secret was never told.
        let secret = made["apiKey"].as_str();
        if let Some(secret) = secret {
            for gate in &self.gates {
                self.until(gate, secret, StatusCode::OK, Instant::now()).await;
            }
        }
        let (revoked, begun) = self.call(Method::DELETE, &path, None).await;
        assert_eq!(revoked["status"], "revoked");
        self.acknowledged.lock().unwrap().push(id.to_owned());
        let Some(secret) = secret else { return Vec::new() };
        join_all(
            self.gates
                .iter()
                .map(|gate| self.until(gate, secret, StatusCode::UNAUTHORIZED, begun)),
        )
        .await
    }

    /// Asks a gate until it answers as expected; answers how long that took since `begun`.
    async fn until(&self, gate: &Gate, secret: &str, expected: StatusCode, begun: Instant) -> Duration {
        loop {
            let answer = self
                .client
                .get(&gate.url)
                .header("x-api-key", secret)
                .send()
                .await
                .unwrap();
            let status = answer.status();
            if status == StatusCode::OK {
                self.passed.fetch_add(1, Relaxed);
            }
            let took = begun.elapsed();
            if status == expected {
                return took;
            }
            let waits = matches!(
                status,
                StatusCode::OK | StatusCode::UNAUTHORIZED | StatusCode::SERVICE_UNAVAILABLE
            );
            assert!(waits, "{status}");
            assert!(took < BOUND, "{} still answers {status} after {took:?}", gate.url);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn nothing_acknowledged_is_lost(&self) {
        let ids = self.acknowledged.lock().unwrap().clone();
        assert!(!ids.is_empty());
        for (index, id) in ids.iter().enumerate() {
            let to = self.replicas[index % 2].address();
            let (status, answer) = self
                .try_call(to, Method::GET, &format!("/api/v1/keys/{id}"), None)
                .await
                .unwrap();
            assert_eq!(status, StatusCode::OK);
            assert_eq!(answer["data"]["status"], "revoked", "{id}");
        }
    }

    /// Whichever replica a gate is connected to and acknowledges to.
    async fn waiting_for_all_names_both_gates(&self) {
        for number in 0..6 {
            let wanted = json!({"name": "w", "environment": "live", "scopes": []});
            let to = self.replicas[number % 2].address();
            let key = format!("wait-{number}");
            let path = "/api/v1/keys?wait=all&wait_seconds=10";
            let (status, made) = self
                .try_call(to, Method::POST, path, Some((&key, &wanted)))
                .await
                .unwrap();
            assert_eq!(status, StatusCode::CREATED);
            let applied = &made["data"]["applied"];
            assert_eq!(
                applied,
                &json!({"gates": ["gate-1", "gate-2"], "pending": [], "silent": []})
            );
        }
    }

    async fn every_permit_is_in_the_ledger_once(&self) {
        let passed = self.passed.load(Relaxed);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (usage, _) = self.call(Method::GET, "/api/v1/usage", None).await;
            let counted = usage["totals"]["permits"].as_u64().unwrap();
            assert!(counted <= passed, "{counted} permits counted of {passed}");
            if counted == passed {
                println!("ledger: {counted} permits, as many as requests passed");
                return;
            }
            assert!(Instant::now() < deadline, "{counted} permits counted of {passed}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn person_login() -> Value {
    json!({"email": "dev@example.com", "password": "your-secure-password"})
}

/// Sends each connection to the next living replica, as a TCP balancer does: the feed, acknowledgements and usage of one
/// gate may go to different ones.
struct Balancer {
    address: SocketAddr,
    alive: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Balancer {
    async fn start(replicas: Vec<SocketAddr>) -> Self {
        let alive = Arc::new(Mutex::new(replicas));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let targets = Arc::clone(&alive);
        tokio::spawn(async move {
            for turn in 0.. {
                let Ok((mut near, _)) = listener.accept().await else {
                    return;
                };
                let target = pick(&targets, turn);
                tokio::spawn(async move {
                    if let Ok(mut far) = TcpStream::connect(target).await {
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        });
        Self { address, alive }
    }

    fn next(&self, turn: usize) -> SocketAddr {
        pick(&self.alive, turn)
    }

    fn remove(&self, address: SocketAddr) {
        self.alive.lock().unwrap().retain(|other| *other != address);
    }

    fn add(&self, address: SocketAddr) {
        self.alive.lock().unwrap().push(address);
    }
}

fn pick(alive: &Mutex<Vec<SocketAddr>>, turn: usize) -> SocketAddr {
    let alive = alive.lock().unwrap();
    alive[turn % alive.len()]
}

async fn standing_upstream() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(|| async { "up" })).await });
    address
}

/// What gates and control planes have in common.
const CATALOGUE: &str =
    "version: 1\nscopes: [things:read]\ntiers: {default: {limit: 1000000, window: 1h}}\nlog: {level: info}\n";
