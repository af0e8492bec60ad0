//! The gate's side of the control endpoint: it keeps the gate's snapshot in step with a control plane, or with a
//! key file, and keeps a copy on disk, the spool, to start from.
//!
//! Read in this order: `lines`, `parse` and `plain` (one line), `apply` (lines → the gate, whole or not at all), `client` (the
//! connection and what can go wrong with it), `spool` over `record` (the copy on disk), `file` (a key file instead).
//!
//! Decisions that are not obvious:
//! - **An older revision than the one in force is refused**, and so is a snapshot of no keys while usable keys are in
//!   force: both are what a control plane looks like that lost its data. The gate serves on from what it has and says
//!   so loudly. An operator who means it removes `keys.spool` and starts the gate again.
//! - A control plane that stays *behind* what is in force (restored from a backup) is asked for full snapshots only:
//!   its changes since then would otherwise be taken for old ones. The first snapshot that is not older is applied.
//! - A key that the gate cannot use (an environment that its configuration lacks) is left out, said, and counted; its
//!   earlier form, if there was one, is forgotten. It never holds up the other keys.
//! - An acknowledgement is sent once the change is in force and handed to the operating system for the spool, so it
//!   outlives the process; it is forced to the disk within a second. What came in a full snapshot is acknowledged once
//!   the spool has been written anew, because a crash before that goes back to the one before.
//!
//! Absent here: no decision about requests, no wire type beyond a line, no knowledge of the control plane's insides.

mod apply;
mod backoff;
mod client;
mod file;
pub mod lines;
pub mod parse;
mod plain;
mod record;
mod shared;
mod spool;

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::HeaderValue;
use tokio::sync::{Notify, watch};

use crate::clock::{Clock, Now};
use crate::gate::Gate;
use shared::{Connection, Counts, Shared};

pub use client::{ClientError, Tls, http_client};

/// How the gate gets its keys.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This gate's stable name: the control plane knows its acknowledgements by it.
    pub gate_name: String,
    pub source: Source,
    /// Where the spool lies. Created if missing.
    pub state_dir: PathBuf,
    /// Once nothing was heard from the source for longer than this, the gate is told that its keys are stale.
    /// `None`: never.
    pub max_staleness: Option<Duration>,
    /// The control plane's heartbeat interval. A connection without a complete line for three of them is dead.
    pub heartbeat: Duration,
    /// Largest number of keys accepted in a snapshot.
    pub max_keys: u64,
    /// Largest snapshot accepted, in bytes of key lines.
    pub max_snapshot_bytes: u64,
    /// How often a key file is looked at. It is read once it has held still for this long.
    pub file_poll: Duration,
    /// How often the spool is forced to the disk, and the staleness looked at.
    pub housekeeping: Duration,
}

impl Settings {
    /// Settings with every default; the numbers' reasons are beside them.
    pub fn new(gate_name: impl Into<String>, source: Source, state_dir: impl Into<PathBuf>) -> Self {
        Settings {
            gate_name: gate_name.into(),
            source,
            state_dir: state_dir.into(),
            max_staleness: None,
            // The feed's contract: a heartbeat every 5 s.
            heartbeat: Duration::from_secs(5),
            // Twenty times what the gate is measured at; some 4 GiB of memory.
            max_keys: 20_000_000,
            // 400 bytes for each of those.
            max_snapshot_bytes: 8 << 30,
            file_poll: Duration::from_millis(250),
            housekeeping: Duration::from_secs(1),
        }
    }
}

/// Where keys come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A control plane's feed.
    Http {
        /// The control plane's base URL: `http://127.0.0.1:8081`. `/feed/v1/…` is appended.
        url: String,
        token: Token,
        /// From [`http_client`]; the meter posts its usage with the same one.
        client: reqwest::Client,
        /// Whether to ask for a compressed stream. Worth it over a network, not over loopback.
        zstd: bool,
    },
    /// A file of key lines.
    File(PathBuf),
}

impl Source {
    /// The feed of the control plane at `url`; compressed unless that is on this machine.
    pub fn http(url: impl Into<String>, token: Token, client: reqwest::Client) -> Self {
        let url = url.into().trim_end_matches('/').to_owned();
        let local = reqwest::Url::parse(&url).is_ok_and(|url| match url.host_str() {
            Some("localhost") => true,
            Some(host) => host
                .trim_matches(['[', ']'])
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback()),
            None => false,
        });
        Source::Http {
            url,
            token,
            client,
            zstd: !local,
        }
    }
}

/// The source without what may be secret in it: a URL's user name, password and query.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::File(path) => write!(f, "{}", path.display()),
            Source::Http { url, .. } => match reqwest::Url::parse(url) {
                Ok(url) => write!(
                    f,
                    "{}://{}{}{}",
                    url.scheme(),
                    url.host_str().unwrap_or_default(),
                    url.port().map(|port| format!(":{port}")).unwrap_or_default(),
                    url.path().trim_end_matches('/')
                ),
                Err(_) => f.write_str("an invalid URL"),
            },
        }
    }
}

/// The feed token. Its `Debug` says nothing, and it has no `Display`.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// A token of visible ASCII characters, or `None`: others cannot be sent in a header.
    pub fn new(token: impl Into<String>) -> Option<Self> {
        let token = token.into();
        (!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic())).then_some(Token(token))
    }

    /// The `Authorization` header's value, marked as sensitive.
    pub fn authorization(&self) -> HeaderValue {
        let mut value =
            HeaderValue::try_from(format!("Bearer {}", self.0)).expect("a token is visible ASCII characters only");
        value.set_sensitive(true);
        value
    }

    fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Keeps a gate's keys in step with their source.
pub struct Feed {
    shared: Arc<Shared>,
    follower: Follower,
}

enum Follower {
    Control(client::Client),
    File(file::KeyFile),
}

impl Feed {
    pub fn new(settings: Settings, gate: Arc<Gate>, clock: Clock) -> Feed {
        let spool = match &settings.source {
            Source::Http { token, .. } => Some(spool::Spool::new(&settings.state_dir, token)),
            Source::File(_) => None,
        };
        let shared = Arc::new(Shared {
            gate,
            clock,
            spool,
            max_staleness: settings.max_staleness,
            source: settings.source.to_string(),
            heard_at_ns: AtomicU64::new(0),
            newest_revision: AtomicU64::new(0),
            stale: AtomicBool::new(false),
            counts: Counts::default(),
            behind: AtomicBool::new(false),
            holds_keys: AtomicBool::new(false),
            connection: Mutex::new(Connection::default()),
            kept_revision: Mutex::new(None),
            applied: watch::Sender::new(None),
            spool_due: Notify::new(),
        });
        let follower = match settings.source {
            Source::File(ref path) => {
                Follower::File(file::KeyFile::new(path.clone(), settings.max_keys, settings.file_poll))
            }
            Source::Http { .. } => Follower::Control(client::Client::new(&settings)),
        };
        shared.set_housekeeping(settings.housekeeping);
        Feed { shared, follower }
    }

    /// Loads the spool, or the key file, before the first request is served. Blocks; reads a million keys in about a second.
    /// Says what it found in one log line.
    pub fn load(&self) -> LoadOutcome {
        let outcome = match &self.follower {
            Follower::File(file) => file.load(&self.shared),
            Follower::Control(_) => match &self.shared.spool {
                Some(spool) => spool.load(&self.shared.gate, self.shared.clock.now()),
                None => LoadOutcome::Missing,
            },
        };
        if let LoadOutcome::Loaded { saved_at_ms, keys, .. } = &outcome {
            self.shared.holds_keys.store(*keys > 0, Ordering::Relaxed);
            *self.shared.kept() = self.shared.gate.revision();
            let now = self.shared.clock.now();
            self.shared
                .heard_at_ns
                .fetch_max(now.elapsed_ns_at(*saved_at_ms).max(1), Ordering::Relaxed);
        }
        self.shared.update_staleness();
        self.shared.say_loaded(&outcome);
        outcome
    }

    /// Follows the source until `shutdown`; reconnects for ever. Leaves the spool on the disk.
    pub async fn run(&self, shutdown: impl Future<Output = ()> + Send) {
        tokio::select! {
            () = shutdown => {}
            () = self.follow() => {}
            () = self.shared.housekeep() => {}
        }
        self.shared.keep_spool().await;
    }

    async fn follow(&self) {
        match &self.follower {
            Follower::Control(client) => client.follow(&self.shared).await,
            Follower::File(file) => file.follow(&self.shared).await,
        }
    }

    /// How the feed is doing, for metrics and `/status`.
    pub fn status(&self) -> FeedStatus {
        let shared = &self.shared;
        let connection = shared.connection();
        let heard_at_ns = shared.heard_at_ns.load(Ordering::Relaxed);
        let newest = shared.newest_revision.load(Ordering::Relaxed);
        FeedStatus {
            source: shared.source.clone(),
            connected: connection.connected,
            revision: shared.gate.revision(),
            newest_revision: (newest > 0).then_some(newest),
            last_heard_unix_ms: (heard_at_ns > 0).then(|| shared.clock.now().unix_ms_at(heard_at_ns)),
            last_error: connection.last_error.clone(),
            stale: shared.stale.load(Ordering::Relaxed),
            source_is_behind: shared.behind.load(Ordering::Relaxed),
            connections: shared.counts.connections.load(Ordering::Relaxed),
            snapshots: shared.counts.snapshots.load(Ordering::Relaxed),
            changes: shared.counts.changes.load(Ordering::Relaxed),
            refused: shared.counts.refused.load(Ordering::Relaxed),
            unusable_keys: shared.counts.unusable_keys.load(Ordering::Relaxed),
            spool_error: shared.spool.as_ref().and_then(spool::Spool::error),
        }
    }

    /// Whether nothing was heard from the source for longer than `max_staleness`.
    pub fn is_stale(&self, now: Now) -> bool {
        self.shared.is_stale(now)
    }
}

/// What [`Feed::load`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadOutcome {
    /// Keys are in force. `damage`: what had to be left out of the spool's newest changes, if anything.
    Loaded {
        revision: u64,
        keys: usize,
        saved_at_ms: i64,
        damage: Option<String>,
    },
    /// There is no spool (or key file) yet.
    Missing,
    /// It cannot be used; nothing of it is in force.
    Refused { reason: String },
}

/// The feed's state as [`Feed::status`] reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedStatus {
    /// The control plane's URL without credentials, or the key file's path.
    pub source: String,
    /// The stream is open (a key file: it could be read and all of it is in force).
    pub connected: bool,
    /// The revision in force.
    pub revision: Option<u64>,
    /// The source's newest revision, as far as it has said.
    pub newest_revision: Option<u64>,
    pub last_heard_unix_ms: Option<i64>,
    /// Why the source could not be followed last, until it can be again.
    pub last_error: Option<String>,
    pub stale: bool,
    /// The control plane offers an older revision than the one in force.
    pub source_is_behind: bool,
    /// Connections made since the start.
    pub connections: u64,
    /// Snapshots (or versions of the key file) applied.
    pub snapshots: u64,
    /// Changes applied.
    pub changes: u64,
    /// Streams or versions of the key file refused because of what was in them.
    pub refused: u64,
    /// Keys left out because the gate cannot use them, in all.
    pub unusable_keys: u64,
    /// Why the spool is not up to date, while it is not.
    pub spool_error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_and_a_url_with_a_password_never_show() {
        let token = Token::new("very-secret").unwrap();
        assert_eq!(format!("{token:?}"), "Token(…)");
        assert!(!format!("{:?}", token.authorization()).contains("secret"));
        assert!(Token::new("").is_none() && Token::new("two words").is_none());
        let client = http_client("http://127.0.0.1", &Tls::default()).unwrap();
        let source = Source::http("https://user:pass@control.example:444/base/?token=1", token, client);
        assert_eq!(source.to_string(), "https://control.example:444/base");
        assert!(matches!(source, Source::Http { zstd: true, .. }));
        let settings = Settings::new("gate-1", source, "/tmp");
        assert!(!format!("{settings:?}").contains("very-secret"));
    }

    #[test]
    fn loopback_is_not_compressed() {
        let client = http_client("http://127.0.0.1", &Tls::default()).unwrap();
        for url in ["http://127.0.0.1:1", "http://localhost:1/", "http://[::1]:1"] {
            let source = Source::http(url, Token::new("t").unwrap(), client.clone());
            assert!(matches!(source, Source::Http { zstd: false, .. }), "{url}");
        }
    }
}
