//! The composition root: configuration → running services. The only place that wires modules together.
//!
//! A process is a gate, a control plane, or both; the sections of its configuration decide. Whatever the roles, the
//! gate follows the control plane over HTTP, also within one process: there is one way for keys to arrive.

mod cluster;
mod demo;
mod lifecycle;
mod listeners;
mod metrics;
mod settings;

use crate::clock::Clock;
use crate::cluster::Cluster;
use crate::config::{self, Config};
use crate::control::ControlPlane;
use crate::feed::Feed;
use crate::gate::Gate;
use crate::meter::{self, Meter};
use crate::proxy::access_log::{self, AccessLog};
use crate::proxy::edge::{Edge, EdgeObserver, EdgeRefusal, EdgeSettings};
use crate::proxy::slots::Capped;
use crate::proxy::{self, Proxy};
use crate::telemetry::admin::{self, Admin};
use crate::telemetry::logs;
use crate::tls::{self, ListenerTls, TlsError};
use lifecycle::{Lifecycle, Signals, Stage, Task};
use listeners::Handover;
use metrics::{EdgeCounts, Reloads, Sources};
use pingora::listeners::{L4BufferSettings, ListenerConfig};
use pingora::server::configuration::ServerConf;
use pingora::server::{RunArgs, Server};
use pingora::services::background::background_service;
use pingora::services::listening::Service;
use serde_json::{Value, json};
use settings::Bound;
use std::fmt;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// What `tollgate run` is told beside the configuration.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The file that a reload reads again.
    pub config_path: PathBuf,
}

/// What `tollgate dev` is told.
#[derive(Clone, Debug)]
pub struct DevOptions {
    /// Where everything is kept.
    pub data: PathBuf,
    /// The gate's address.
    pub listen: String,
    /// The control plane's and the portal's.
    pub control: String,
    /// The operator's.
    pub admin: String,
}

/// Why a process did not start.
#[derive(Debug)]
pub enum AppError {
    /// The configuration is at fault.
    Config(config::Faults),
    /// Something else; the text says what, and what would help.
    Failed(String),
}

impl AppError {
    /// Whether the configuration is at fault.
    pub fn is_invalid_configuration(&self) -> bool {
        matches!(self, AppError::Config(_))
    }

    /// A combination of settings that the configuration's own checks should have refused.
    fn internal(what: impl fmt::Display) -> Self {
        AppError::Failed(format!(
            "{what} (this should have been refused when the configuration was checked)"
        ))
    }
}

impl fmt::Display for AppError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AppError::Config(faults) => faults.fmt(f),
            AppError::Failed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for AppError {}

impl From<io::Error> for AppError {
    fn from(error: io::Error) -> Self {
        AppError::Failed(error.to_string())
    }
}

impl From<config::Faults> for AppError {
    fn from(faults: config::Faults) -> Self {
        AppError::Config(faults)
    }
}

impl From<TlsError> for AppError {
    fn from(error: TlsError) -> Self {
        AppError::Failed(error.to_string())
    }
}

/// Runs the roles that the configuration has sections for, until a signal ends the process.
///
/// # Errors
/// [`AppError`] where it cannot start. Once started it does not return.
pub fn run(config: Config, options: RunOptions) -> Result<(), AppError> {
    start_logging(&config.log)?;
    Process::assemble(config, Some(options.config_path), None)?.run()
}

/// The reference page of all metrics, as `src/manual/metrics.md` has it.
pub fn metrics_reference() -> String {
    metrics::reference()
}

/// The names of all metrics and of their labels.
pub fn metric_names() -> Vec<(&'static str, &'static [&'static str])> {
    let all = metrics::GROUPS.iter().flat_map(|(_, metrics)| *metrics);
    all.map(|metric| (metric.name, metric.labels)).collect()
}

/// Runs everything in one process on the built-in configuration, with a demo upstream, and prints a key.
///
/// # Errors
/// [`AppError`] where it cannot start.
pub fn dev(options: DevOptions) -> Result<(), AppError> {
    let data = &options.data;
    fs::create_dir_all(data).map_err(|error| AppError::Failed(format!("cannot make {}: {error}", data.display())))?;
    let (upstream, upstream_address) = listeners::bind("127.0.0.1:0")?;
    let overrides = config::DevOverrides {
        gate_listen: options.listen,
        control_listen: options.control,
        admin_listen: options.admin,
        data_dir: data.clone(),
        upstream: upstream_address.to_string(),
        feed_token_file: token_file(data, "feed.token")?,
        admin_token_file: token_file(data, "admin.token")?,
    };
    let config = Config::dev(&overrides)?;
    start_logging(&config.log)?;
    Process::assemble(config, None, Some((upstream, upstream_address)))?.run()
}

fn start_logging(log: &config::Log) -> Result<(), AppError> {
    let path = match &log.path {
        config::Output::File(path) => Some(path.clone()),
        config::Output::Stdout | config::Output::Stderr => None,
    };
    let settings = logs::Settings {
        level: level(log.level),
        json: log.format == config::Format::Json,
        path,
    };
    logs::start(&settings).map_err(|error| AppError::Failed(format!("cannot log: {error}")))
}

fn level(level: config::Level) -> log::LevelFilter {
    match level {
        config::Level::Off => log::LevelFilter::Off,
        config::Level::Error => log::LevelFilter::Error,
        config::Level::Warn => log::LevelFilter::Warn,
        config::Level::Info => log::LevelFilter::Info,
        config::Level::Debug => log::LevelFilter::Debug,
        config::Level::Trace => log::LevelFilter::Trace,
    }
}

/// A token that is made once and kept, readable by its owner only.
fn token_file(data: &Path, name: &str) -> Result<PathBuf, AppError> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = data.join(name);
    let failed = |error: &dyn fmt::Display| AppError::Failed(format!("cannot make {}: {error}", path.display()));
    match fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
    {
        Ok(mut file) => {
            let mut random = [0; 32];
            getrandom::fill(&mut random).map_err(|error| failed(&error))?;
            let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
            file.write_all(token.as_bytes())
                .and_then(|()| file.sync_all())
                .map_err(|error| failed(&error))?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(&error)),
    }
    Ok(path)
}

/// A socket that is bound and its address.
type BoundListener = (TcpListener, SocketAddr);

/// Everything of one process, put together and not yet started.
struct Process {
    config: Config,
    config_path: Option<PathBuf>,
    clock: Clock,
    bound: Bound,
    control: Option<BoundListener>,
    control_tls: Option<Arc<ListenerTls>>,
    /// Set once the control plane has opened its database.
    opened_control: Arc<OnceLock<ControlPlane>>,
    admin: Option<BoundListener>,
    demo: Option<BoundListener>,
    gate: Option<GateRole>,
}

/// The parts of a gate.
struct GateRole {
    gate: Arc<Gate>,
    cluster: Option<Cluster>,
    proxy: Proxy,
    feed: Arc<Feed>,
    meter: Arc<Meter>,
    listeners: Vec<BoundListener>,
    edges: Vec<(EdgeSettings, Option<Arc<ListenerTls>>)>,
    access_log: Option<(AccessLog, access_log::Writer)>,
    in_flight: Arc<AtomicU64>,
    edge_counts: Arc<EdgeCounts>,
}

impl Process {
    /// Binds every socket and loads what is on disk, so that whatever can fail fails before anything runs.
    fn assemble(config: Config, config_path: Option<PathBuf>, demo: Option<BoundListener>) -> Result<Self, AppError> {
        let clock = Clock::system();
        let control = config
            .control
            .as_ref()
            .map(|control| listeners::bind(&control.address))
            .transpose()?;
        let admin = config
            .admin
            .as_ref()
            .map(|admin| listeners::bind(&admin.address))
            .transpose()?;
        let control_tls = settings::control_tls(&config).map(ListenerTls::load).transpose()?;
        let bound = Bound {
            control: control.as_ref().map(|(_, address)| *address),
        };
        let gate = if config.gate.is_some() {
            Some(GateRole::assemble(&config, bound, &clock)?)
        } else {
            None
        };
        Ok(Process {
            config,
            config_path,
            clock,
            bound,
            control,
            control_tls: control_tls.map(Arc::new),
            opened_control: Arc::default(),
            admin,
            demo,
            gate,
        })
    }

    /// Where addresses are written: the gate's directory, or the control plane's in a process without a gate.
    fn state_dir(&self) -> Option<&Path> {
        let gate = self.config.gate.as_ref().map(|gate| gate.state_dir.as_path());
        gate.or(self.config.control.as_ref().map(|control| control.state_dir.as_path()))
    }

    /// The certificates of every listener.
    fn certificates(&self) -> Vec<Arc<ListenerTls>> {
        let edges = self.gate.iter().flat_map(|gate| &gate.edges);
        let all = edges.map(|(_, tls)| tls).chain([&self.control_tls]);
        all.flatten().cloned().collect()
    }

    fn announce(&self) -> Result<(), AppError> {
        let Some(state_dir) = self.state_dir() else {
            return Ok(());
        };
        let gate = self.gate.as_ref().and_then(|gate| gate.listeners.first());
        let named = [
            ("gate", gate),
            ("control", self.control.as_ref()),
            ("admin", self.admin.as_ref()),
            ("upstream", self.demo.as_ref()),
        ];
        for (name, listener) in named {
            if let Some((_, address)) = listener {
                listeners::write_address(state_dir, name, *address)?;
                log::info!("{name} listens on {address}");
            }
        }
        for (_, address) in self.gate.iter().flat_map(|gate| gate.listeners.iter().skip(1)) {
            log::info!("gate listens on {address}");
        }
        Ok(())
    }

    fn run(mut self) -> Result<(), AppError> {
        self.announce()?;
        let (grace, threads, pool) = match &self.config.gate {
            Some(gate) => (gate.shutdown_grace, gate.threads, gate.limits.upstream_pool),
            None => (Duration::from_secs(10), Some(1), 1),
        };
        let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let mut server = Server::new_with_opt_and_conf(
            None,
            ServerConf {
                threads,
                upstream_keepalive_pool_size: pool,
                // Pingora would sleep through all of it; `lifecycle` ends the process before that.
                grace_period_seconds: Some(grace.as_secs() + 60),
                ..ServerConf::default()
            },
        );
        server.bootstrap();
        let in_flight = self
            .gate
            .as_ref()
            .map(|gate| gate.in_flight.clone())
            .unwrap_or_default();
        let lifecycle = Lifecycle::new(in_flight, grace);

        self.add_control(&mut server, &lifecycle);
        if let Some((listener, _)) = self.demo.take() {
            let ended = lifecycle.reached(Stage::Ending);
            server.add_service(background_service(
                "demo upstream",
                Task::new(serve(listener, demo::router(), ended)),
            ));
        }
        let reloader = Arc::new(Reloader::new(&self));
        let certificates = self.certificates();
        if !certificates.is_empty() {
            server.add_service(background_service("certificates", Task::new(tls::watch(certificates))));
        }
        let admin = self.admin_listener(&reloader);
        if let Some((listener, _)) = self.admin.take() {
            let ended = lifecycle.reached(Stage::Ending);
            server.add_service(background_service(
                "admin",
                Task::new(serve(listener, admin::router(admin), ended)),
            ));
        }
        // Held until the process ends, so that the access log's writer outlives the last request.
        let _access_log_writer = self
            .gate
            .take()
            .map(|gate| gate.add_to(&mut server, &lifecycle, &self.clock));
        let reload = Box::new(move || {
            let reloader = reloader.clone();
            Box::pin(async move { drop(reloader.reload().await) }) as std::pin::Pin<Box<_>>
        });
        server.run(RunArgs {
            shutdown_signal: Box::new(Signals { lifecycle, reload }),
        });
        Ok(())
    }

    fn add_control(&mut self, server: &mut Server, lifecycle: &Arc<Lifecycle>) {
        let Some((listener, _)) = self.control.take() else {
            return;
        };
        let Some(mut settings) = settings::control(&self.config) else {
            return;
        };
        // What the portal's `curl` lines call: this process's own gate, if it is one.
        settings.gate_url = self.gate.as_ref().and_then(GateRole::url);
        let clock = self.clock.clone();
        let tls = self.control_tls.clone();
        let opened = self.opened_control.clone();
        let ended = lifecycle.reached(Stage::Ending);
        let running = lifecycle.task(Stage::Ending);
        let dev = self.demo.is_some().then(|| DevPrinter {
            gate: self.gate.as_ref().map(|gate| gate.gate.clone()),
            address: self
                .gate
                .as_ref()
                .and_then(|gate| gate.listeners.first())
                .map(|(_, address)| *address),
            control: self.bound.control,
        });
        server.add_service(background_service(
            "control plane",
            Task::new(async move {
                let _running = running;
                let control = match ControlPlane::open(settings, clock).await {
                    Ok(control) => control,
                    Err(error) => {
                        // Without its database a control plane is nothing; a supervisor should know at once.
                        log::error!("the control plane cannot start: {error}");
                        eprintln!("tollgate: the control plane cannot start: {error}");
                        std::process::exit(1);
                    }
                };
                // Set nowhere else.
                let _ = opened.set(control.clone());
                let listener = match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => listener,
                    Err(error) => return log::error!("the control plane cannot listen: {error}"),
                };
                if let Some(dev) = dev {
                    tokio::spawn(dev.print(control.clone()));
                }
                if let Err(error) = control.serve(listener, tls, ended).await {
                    log::error!("the control plane ended: {error}");
                }
            }),
        ));
    }

    fn admin_listener(&self, reloader: &Arc<Reloader>) -> Arc<Admin> {
        let reloads = &reloader.outcomes;
        let reloader = reloader.clone();
        let gate = self.gate.as_ref();
        let name = self
            .config
            .gate
            .as_ref()
            .map(|gate| gate.name.clone())
            .unwrap_or_default();
        let parts = gate.map(|gate| GateParts {
            name,
            gate: gate.gate.clone(),
            feed: gate.feed.clone(),
            meter: gate.meter.clone(),
            proxy: gate.proxy.clone(),
        });
        let ready_gate = gate.map(|gate| gate.gate.clone());
        Arc::new(Admin {
            metrics: metrics::registry(Sources {
                gate,
                control: self.config.control.as_ref().map(|_| self.opened_control.clone()),
                certificates: self.certificates(),
                reloads: reloads.clone(),
                clock: self.clock.clone(),
            }),
            ready: Box::new(move || match &ready_gate {
                Some(gate) if !gate.is_ready() => Err("no snapshot of the keys, or one too old".to_owned()),
                _ => Ok(()),
            }),
            status: Box::new(move || status(parts.as_ref())),
            reload: Box::new(move || {
                let reloader = reloader.clone();
                Box::pin(async move { reloader.reload().await })
            }),
        })
    }
}

/// What `/status` tells of a gate.
struct GateParts {
    name: String,
    gate: Arc<Gate>,
    feed: Arc<Feed>,
    meter: Arc<Meter>,
    proxy: Proxy,
}

fn status(parts: Option<&GateParts>) -> Value {
    let mut status = json!({"version": env!("CARGO_PKG_VERSION"), "pid": std::process::id()});
    if let Some(GateParts {
        name,
        gate,
        feed,
        meter,
        proxy,
    }) = parts
    {
        let (feed, meter) = (feed.status(), meter.status());
        let servers = proxy.servers().into_iter().map(|server| {
            json!({
                "upstream": server.upstream,
                "address": server.address.to_string(),
                "checked": server.is_checked,
                "up": server.health.is_up(),
            })
        });
        status["gate"] = json!({
            "name": name,
            "ready": gate.is_ready(),
            "keys": gate.key_count(),
            "revision": gate.revision(),
            "inFlight": proxy.in_flight().load(std::sync::atomic::Ordering::Relaxed),
            "feed": {
                "source": feed.source,
                "connected": feed.connected,
                "newestRevision": feed.newest_revision,
                "lastHeardUnixMs": feed.last_heard_unix_ms,
                "lastError": feed.last_error,
                "stale": feed.stale,
                "spoolError": feed.spool_error,
            },
            "meter": {
                "unsentBatches": meter.unsent_batches,
                "postError": meter.post_error,
                "diskError": meter.disk_error,
            },
            "servers": servers.collect::<Vec<_>>(),
        });
    }
    status
}

impl GateRole {
    /// How this gate is called from the machine it runs on.
    fn url(&self) -> Option<String> {
        let ((_, address), (_, tls)) = (self.listeners.first()?, self.edges.first()?);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let host = if address.ip().is_unspecified() {
            "localhost".to_owned()
        } else {
            address.ip().to_string()
        };
        Some(format!("{scheme}://{host}:{}", address.port()))
    }

    fn assemble(config: &Config, bound: Bound, clock: &Clock) -> Result<Self, AppError> {
        let Some(gate_config) = &config.gate else {
            return Err(AppError::internal("no gate is configured"));
        };
        let failed = |error: &dyn fmt::Display| AppError::Failed(error.to_string());
        let cluster = cluster::assemble(config, clock)?;
        let gate = Gate::new(settings::gate(config)?).map_err(|error| failed(&error))?;
        let gate = Arc::new(if cluster.is_some() { gate.sharing_limits() } else { gate });
        let feed_settings = settings::feed(config, bound)?;
        let meter_settings = meter::Settings::new(
            &gate_config.name,
            settings::usage_goes_to(&feed_settings.source),
            &gate_config.state_dir,
        );
        let meter = Meter::new(meter_settings, gate.clone(), clock.clone())?;
        let feed = Feed::new(feed_settings, gate.clone(), clock.clone());
        feed.load();
        meter.load_journal();
        let access_log = match &config.log.access {
            Some(access) => {
                let settings = access_log::Settings {
                    format: match access.format {
                        config::Format::Json => access_log::Format::Json,
                        config::Format::Text => access_log::Format::Text,
                    },
                    output: match &access.path {
                        config::Output::Stdout => access_log::Output::Stdout,
                        config::Output::Stderr => access_log::Output::Stderr,
                        config::Output::File(path) => access_log::Output::File(path.clone()),
                    },
                    buffer_lines: access.buffer_lines,
                };
                let opened = AccessLog::open(&settings);
                Some(opened.map_err(|error| AppError::Failed(format!("cannot open the access log: {error}")))?)
            }
            None => None,
        };
        let log = access_log.as_ref().map(|(log, _)| log.clone());
        let proxy = Proxy::new(&settings::proxy(config, bound)?, gate.clone(), clock.clone(), log)
            .map_err(|bad| AppError::internal(format!("{:?} cannot start a header's name", bad.0)))?;
        if let Some(cluster) = &cluster {
            proxy.share_limits(Arc::new(cluster::Limits(cluster.clone())));
        }
        let listeners = gate_config
            .listen
            .iter()
            .map(|listener| listeners::bind(&listener.address));
        let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
        let edge = |listener: &config::Listener| {
            let tls = settings::tls(listener).map(ListenerTls::load).transpose()?;
            Ok((settings::edge(config, listener), tls.map(Arc::new)))
        };
        let edges = gate_config
            .listen
            .iter()
            .map(edge)
            .collect::<Result<Vec<_>, AppError>>()?;
        Ok(GateRole {
            in_flight: proxy.in_flight(),
            proxy,
            gate,
            cluster,
            feed: Arc::new(feed),
            meter: Arc::new(meter),
            listeners,
            edges,
            access_log,
            edge_counts: Arc::default(),
        })
    }

    fn add_to(self, server: &mut Server, lifecycle: &Arc<Lifecycle>, clock: &Clock) -> Option<access_log::Writer> {
        let addresses: Vec<SocketAddr> = self.listeners.iter().map(|(_, address)| *address).collect();
        let handover = server.add_service(Handover::new(self.listeners));
        let observer = Arc::new(EdgeLog {
            proxy: self.proxy.clone(),
            counts: self.edge_counts,
        });
        let proxy = Arc::new(pingora::proxy::http_proxy(&server.configuration, self.proxy.clone()));
        // Caps on connections hold for all listeners together.
        let mut shared = None;
        for (address, (settings, tls)) in addresses.into_iter().zip(self.edges) {
            let mut edge = Edge::new(settings, proxy.clone(), tls, observer.clone()).rendering(render_refusal);
            if let Some((slots, activity)) = &shared {
                edge = edge.sharing(Arc::clone(slots), Arc::clone(activity));
            } else {
                shared = Some((edge.slots().clone(), edge.activity().clone()));
            }
            let mut service = Service::new(format!("gate on {address}"), edge);
            // The edge reads into a buffer of its own; another 64 KiB a connection before it would cost memory and a copy.
            let listener = ListenerConfig::tcp(address.to_string());
            service.add_listener(listener.l4_buffer(L4BufferSettings::default().read(0)));
            server.add_service(service).add_dependency(&handover);
        }

        let (feed, ended) = (self.feed, lifecycle.reached(Stage::Settling));
        let running = lifecycle.task(Stage::Settling);
        server.add_service(background_service(
            "feed",
            Task::new(async move {
                let _running = running;
                feed.run(ended).await;
            }),
        ));
        let (meter, ended) = (self.meter, lifecycle.reached(Stage::Settling));
        let running = lifecycle.task(Stage::Settling);
        server.add_service(background_service(
            "meter",
            Task::new(async move {
                let _running = running;
                meter.run(ended).await;
                meter.stop().await;
            }),
        ));
        let checked = self.proxy.clone();
        let checks = async move { checked.check_health().await };
        server.add_service(background_service("health checks", Task::new(checks)));
        if let Some(cluster) = self.cluster {
            let ended = lifecycle.reached(Stage::Settling);
            let running = lifecycle.task(Stage::Settling);
            server.add_service(background_service(
                "cluster",
                Task::new(async move {
                    let _running = running;
                    cluster.run(ended).await;
                }),
            ));
        }
        let (gate, clock) = (self.gate, clock.clone());
        server.add_service(background_service("housekeeping", Task::new(housekeeping(gate, clock))));
        self.access_log.map(|(_, writer)| writer)
    }
}

/// Logs and counts what the edge refused: such requests never reach the proxy's own logging.
struct EdgeLog {
    proxy: Proxy,
    counts: Arc<EdgeCounts>,
}

impl EdgeObserver for EdgeLog {
    fn refused(&self, client: Option<SocketAddr>, refusal: &EdgeRefusal, request_id: &str) {
        self.proxy.log_refused_at_the_edge(client, refusal, request_id);
    }

    fn connection_opened(&self) {
        self.counts.opened.fetch_add(1, Ordering::Relaxed);
    }

    fn connection_closed(&self) {
        self.counts.closed.fetch_add(1, Ordering::Relaxed);
    }

    fn capped(&self, _client: Option<SocketAddr>, _why: Capped) {
        self.counts.capped.fetch_add(1, Ordering::Relaxed);
    }

    fn handshake_failed(&self, client: Option<SocketAddr>, why: &str) {
        self.counts.handshakes_failed.fetch_add(1, Ordering::Relaxed);
        let client = client.map_or_else(|| "a client".to_owned(), |client| client.to_string());
        log::debug!("the handshake of {client} failed: {why}");
    }
}

fn render_refusal(refusal: &EdgeRefusal, request_id: &str) -> String {
    proxy::Answer::from(refusal).body(request_id, false).0
}

/// Follows corrections of the wall clock, and gives idle windows back.
async fn housekeeping(gate: Arc<Gate>, clock: Clock) {
    let mut seconds: u64 = 0;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        clock.anchor();
        seconds += 1;
        if seconds.is_multiple_of(10) {
            gate.give_back_idle(clock.now());
        }
    }
}

async fn serve(listener: TcpListener, router: axum::Router, ended: impl Future<Output = ()> + Send + 'static) {
    let served = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => axum::serve(listener, router).with_graceful_shutdown(ended).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        log::error!("a listener ended: {error}");
    }
}

/// Reads the configuration again and puts what can be changed while running in force: whole or not at all.
struct Reloader {
    path: Option<PathBuf>,
    bound: Bound,
    in_force: Mutex<Config>,
    gate: Option<(Arc<Gate>, Proxy, Option<AccessLog>)>,
    certificates: Vec<Arc<ListenerTls>>,
    outcomes: Arc<Reloads>,
    clock: Clock,
}

impl Reloader {
    fn new(process: &Process) -> Self {
        Reloader {
            path: process.config_path.clone(),
            bound: process.bound,
            in_force: Mutex::new(process.config.clone()),
            certificates: process.certificates(),
            outcomes: Arc::new(Reloads {
                in_force_since_unix_ms: (process.clock.now().unix_ms.unsigned_abs()).into(),
                ..Reloads::default()
            }),
            clock: process.clock.clone(),
            gate: process.gate.as_ref().map(|gate| {
                (
                    gate.gate.clone(),
                    gate.proxy.clone(),
                    gate.access_log.as_ref().map(|(log, _)| log.clone()),
                )
            }),
        }
    }

    async fn reload(self: &Arc<Self>) -> Result<Value, Value> {
        let this = self.clone();
        let outcome = tokio::task::spawn_blocking(move || this.reload_now()).await;
        let outcome = outcome.unwrap_or_else(|error| Err(AppError::Failed(error.to_string())));
        self.count(outcome.is_ok());
        match outcome {
            Ok(restart) => {
                log::info!("the configuration was reloaded");
                for path in &restart {
                    log::warn!("{path} has changed and needs a restart");
                }
                Ok(json!({"reloaded": true, "needsRestart": restart}))
            }
            Err(error) => {
                log::error!("the configuration was not reloaded, the old one stays in force: {error}");
                let code = if error.is_invalid_configuration() {
                    "INVALID_CONFIGURATION"
                } else {
                    "NOT_RELOADED"
                };
                Err(json!({"code": code, "message": error.to_string()}))
            }
        }
    }

    fn count(&self, succeeded: bool) {
        let outcomes = &self.outcomes;
        let count = if succeeded {
            &outcomes.succeeded
        } else {
            &outcomes.failed
        };
        count.fetch_add(1, Ordering::Relaxed);
        outcomes.last_failed.store(u64::from(!succeeded), Ordering::Relaxed);
        if succeeded {
            let now_ms = self.clock.now().unix_ms.unsigned_abs();
            outcomes.in_force_since_unix_ms.store(now_ms, Ordering::Relaxed);
        }
    }

    fn reload_now(&self) -> Result<Vec<String>, AppError> {
        let Some(path) = &self.path else {
            return Err(AppError::Failed(
                "this process runs on the built-in configuration".to_owned(),
            ));
        };
        let config = config::load(path, &config::process_env)?;
        let mut in_force = self.in_force.lock().unwrap_or_else(|e| e.into_inner());
        let restart = config::diff(&in_force, &config)
            .into_iter()
            .map(|needed| needed.path)
            .collect();
        // Certificates are read again by themselves; a reload does not wait for that, and says what is wrong with one.
        for tls in &self.certificates {
            tls.check()?;
        }
        if let (Some((gate, proxy, access_log)), Some(_)) = (&self.gate, &config.gate) {
            // What can fail comes before the first change.
            let proxy_settings = settings::proxy(&config, self.bound)?;
            let failed = |error: &dyn fmt::Display| AppError::Failed(error.to_string());
            gate.reload(settings::gate(&config)?).map_err(|error| failed(&error))?;
            proxy.reload(&proxy_settings).map_err(|bad| AppError::internal(bad.0))?;
            if let Some(access_log) = access_log {
                access_log.reopen();
            }
        }
        for tls in &self.certificates {
            tls.reload()?;
        }
        logs::set_level(level(config.log.level));
        *in_force = config;
        Ok(restart)
    }
}

/// Tells the developer what to paste, once it works.
struct DevPrinter {
    gate: Option<Arc<Gate>>,
    address: Option<SocketAddr>,
    control: Option<SocketAddr>,
}

impl DevPrinter {
    async fn print(self, control: ControlPlane) {
        let key = match control.dev_key().await {
            Ok(key) => key,
            Err(error) => return log::error!("no key could be made: {error}"),
        };
        let (Some(gate), Some(address), Some(portal)) = (self.gate, self.address, self.control) else {
            return;
        };
        // A key that is printed works: wait until the gate has it, which takes milliseconds.
        let mut tries = 0;
        while !gate.has_secret(key.secret.as_bytes()) && tries < 1000 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            tries += 1;
        }
        println!("Tollgate is running. Stop it with Ctrl-C; what it knows is kept.\n");
        println!("  gate            http://{address}");
        println!("  portal and API  http://{portal}");
        println!("\nA fresh key (shown only now):\n\n  {}\n", key.secret);
        println!("Try it in a second terminal:\n");
        println!(
            "  curl -i -H 'x-api-key: {}' http://{address}/api/v1/identity/me\n",
            key.secret
        );
    }
}
