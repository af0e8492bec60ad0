//! The gate's side of the control endpoint, against a control plane that can be made to misbehave.

mod faults;
mod files;
mod large;
mod meter;
mod plane;
mod spool;

use std::collections::BTreeSet;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue, Method};
use sha2::{Digest, Sha256};
use tollgate::clock::Clock;
use tollgate::feed::{Feed, Settings, Source, Tls, Token, http_client};
use tollgate::gate::key::{Checksum, Foreign, checksum};
use tollgate::gate::limit::Limit;
use tollgate::gate::{
    AccessSettings, EnvironmentSettings, FailedAttemptsSettings, Gate, Pattern, PlanSettings, Reason, RequestHead,
    RouteSettings, Settings as GateSettings,
};
use tollgate::wire::{KeyLine, SecretLine};

pub const START_MS: i64 = 1_800_000_000_000;
pub const FEED_TOKEN: &str = "feed-token-of-the-tests";

/// A gate of three environments with one tier of `permits` an hour.
pub fn gate(permits: u32) -> Arc<Gate> {
    let environment = |name: &str, billed| EnvironmentSettings {
        name: name.into(),
        prefix: format!("pxk_{name}_"),
        billed,
    };
    let settings = GateSettings {
        environments: vec![
            environment("live", true),
            environment("test", false),
            environment("dev", false),
        ],
        checksum: Checksum::Required,
        foreign: Foreign::Refuse,
        tiers: vec![("default".into(), Limit::new(permits, 3_600_000).unwrap())],
        plans: vec![PlanSettings {
            name: "starter".into(),
            max_in_flight: None,
            tiers: vec![],
        }],
        routes: vec![RouteSettings {
            name: "all".into(),
            pattern: Pattern {
                host: None,
                methods: vec![],
                path: "/**".into(),
            },
            access: AccessSettings::Keyed {
                scope: None,
                tier: "default".into(),
                environments: None,
            },
            upstream: "up".into(),
            sandbox_upstream: None,
            upgrade: false,
        }],
        default_upstream: "up".into(),
        failed_attempts: FailedAttemptsSettings {
            limit: u32::MAX,
            window: Duration::from_secs(60),
        },
    };
    Arc::new(Gate::new(settings).unwrap())
}

/// The secret of key `n` in an environment.
pub fn secret(n: u32, environment: &str) -> String {
    let payload = format!("pxk_{environment}_{n:030}");
    let digits = checksum(payload.as_bytes());
    payload + std::str::from_utf8(&digits).unwrap()
}

/// Key `n` as the feed tells of it, in force.
pub fn key(n: u32) -> KeyLine {
    key_in(n, "live")
}

pub fn key_in(n: u32, environment: &str) -> KeyLine {
    let digest = Sha256::digest(secret(n, environment).as_bytes());
    KeyLine {
        revision: 0,
        id: format!("key_{n}"),
        organization: "org_1".into(),
        environment: environment.into(),
        scopes: vec!["things:read".into()],
        plan: "starter".into(),
        secrets: vec![SecretLine {
            sha256: digest.iter().map(|b| format!("{b:02x}")).collect(),
            not_after: None,
        }],
        expires_at: None,
        disabled: false,
        revoked: false,
    }
}

/// What the gate says to a request with the secret of key `n`.
pub fn verdict_in(gate: &Gate, clock: &Clock, n: u32, environment: &str) -> Result<(), Reason> {
    let mut headers = HeaderMap::new();
    headers.insert("x-api-key", HeaderValue::try_from(secret(n, environment)).unwrap());
    let request = RequestHead {
        method: &Method::GET,
        host: "",
        path: "/things",
        headers: &headers,
        client: IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
    gate.check(&request, clock.now())
        .map(drop)
        .map_err(|refusal| refusal.reason)
}

pub fn verdict(gate: &Gate, clock: &Clock, n: u32) -> Result<(), Reason> {
    verdict_in(gate, clock, n, "live")
}

/// The ids of all keys in force, each with whether it is revoked.
pub fn keys(gate: &Gate) -> BTreeSet<(String, bool)> {
    for _ in 0..20_000 {
        let mut keys = BTreeSet::new();
        let exported = gate.export_keys(&mut |key| {
            keys.insert((key.id.to_string(), key.revoked));
        });
        // Without a revision there is none; while a snapshot is being built they are not told.
        if exported.is_some() || gate.revision().is_none() {
            return keys;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("a snapshot is being built for ever");
}

/// One for all: to make one takes the system's certificates to be read.
pub fn client() -> reqwest::Client {
    static CLIENT: OnceLock<reqwest::Client> = OnceLock::new();
    CLIENT
        .get_or_init(|| http_client("http://127.0.0.1", &Tls::default()).unwrap())
        .clone()
}

/// Settings for a feed that notices silence after 0.3 s.
pub fn settings(url: &str, state_dir: &Path) -> Settings {
    let client = client();
    let source = Source::http(url, Token::new(FEED_TOKEN).unwrap(), client);
    let mut settings = Settings::new("gate-1", source, state_dir);
    settings.heartbeat = Duration::from_millis(100);
    settings.housekeeping = Duration::from_millis(20);
    settings
}

/// A feed at work; it stops when this is dropped or stopped.
pub struct Running {
    pub feed: Arc<Feed>,
    pub gate: Arc<Gate>,
    pub clock: Clock,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    pub fn start(settings: Settings) -> Self {
        Self::start_with(settings, gate(1_000_000), Clock::manual(START_MS))
    }

    pub fn start_with(settings: Settings, gate: Arc<Gate>, clock: Clock) -> Self {
        let feed = Arc::new(Feed::new(settings, Arc::clone(&gate), clock.clone()));
        feed.load();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = Arc::clone(&feed);
        let task = tokio::spawn(async move {
            running
                .run(async {
                    let _ = stopped.await;
                })
                .await;
        });
        Running {
            feed,
            gate,
            clock,
            stop: Some(stop),
            task,
        }
    }

    pub async fn revision(&self, revision: u64) {
        eventually(&format!("revision {revision}"), || {
            self.gate.revision() == Some(revision)
        })
        .await;
    }

    pub async fn stop(mut self) {
        drop(self.stop.take());
        within("the feed's end", self.task).await.unwrap();
    }

    /// As kill -9 would: nothing is flushed.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
        std::mem::forget(self.stop);
    }
}

/// Waits for something that other tasks bring about.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(30), future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for {what}"),
    }
}
