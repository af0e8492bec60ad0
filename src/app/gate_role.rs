//! The gate of a process: its parts, and the services that they become.

use super::cluster;
use super::lifecycle::{Lifecycle, Stage, Task};
use super::listeners::{BoundListener, Handover, Sockets};
use super::metrics::EdgeCounts;
use super::settings::Bound;
use super::upgrade::Role;
use super::{AppError, settings};
use crate::clock::Clock;
use crate::cluster::Cluster;
use crate::config::{self, Config};
use crate::feed::Feed;
use crate::gate::Gate;
use crate::meter::{self, Meter};
use crate::proxy::access_log::{self, AccessLog};
use crate::proxy::edge::{Activity, Edge, EdgeObserver, EdgeRefusal, EdgeSettings};
use crate::proxy::slots::{Capped, Slots};
use crate::proxy::{self, Proxy};
use crate::tls::ListenerTls;
use pingora::listeners::{L4BufferSettings, ListenerConfig};
use pingora::server::Server;
use pingora::services::background::background_service;
use pingora::services::listening::Service;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A gate before it has read what a process before it wrote.
pub struct GateParts {
    gate: Arc<Gate>,
    cluster: Option<Cluster>,
    proxy: Proxy,
    feed: Feed,
    meter: meter::Settings,
    listeners: Vec<BoundListener>,
    edges: Vec<(EdgeSettings, Option<Arc<ListenerTls>>)>,
    access_log: Option<(AccessLog, access_log::Writer)>,
    /// Where a process that handed over to this one passes requests on to.
    pub passage: Option<(UnixListener, PathBuf)>,
}

/// The parts of a gate.
pub struct GateRole {
    pub gate: Arc<Gate>,
    pub cluster: Option<Cluster>,
    pub proxy: Proxy,
    pub feed: Arc<Feed>,
    pub meter: Arc<Meter>,
    pub listeners: Vec<BoundListener>,
    pub edges: Vec<(EdgeSettings, Option<Arc<ListenerTls>>)>,
    pub access_log: Option<(AccessLog, access_log::Writer)>,
    pub in_flight: Arc<AtomicU64>,
    pub edge_counts: Arc<EdgeCounts>,
    pub activity: Arc<Activity>,
    passage: Option<(UnixListener, PathBuf)>,
}

impl GateParts {
    /// Builds all that needs no file that another process may still write.
    pub fn prepare(config: &Config, bound: Bound, clock: &Clock, sockets: &mut Sockets<'_>) -> Result<Self, AppError> {
        crate::huge_pages::for_tables_only();
        let Some(gate_config) = &config.gate else {
            return Err(AppError::internal("no gate is configured"));
        };
        let failed = |error: &dyn fmt::Display| AppError::Failed(error.to_string());
        let cluster = cluster::assemble(config, clock)?;
        let gate = Gate::new(settings::gate(config)?).map_err(|error| failed(&error))?;
        let gate = Arc::new(if cluster.is_some() { gate.sharing_limits() } else { gate });
        let feed_settings = settings::feed(config, bound)?;
        let meter = meter::Settings::new(
            &gate_config.name,
            settings::usage_goes_to(&feed_settings.source),
            &gate_config.state_dir,
        );
        let feed = Feed::new(feed_settings, gate.clone(), clock.clone());
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
            proxy.share_limits(Arc::new(cluster.clone()));
        }
        let listeners = gate_config
            .listen
            .iter()
            .map(|listener| sockets.listen(Role::Gate, &listener.address));
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
        Ok(GateParts {
            gate,
            cluster,
            proxy,
            feed,
            meter,
            listeners,
            edges,
            access_log,
            passage: None,
        })
    }

    /// Takes up where the process before has stopped: its keys, its window counts, its unsent usage.
    pub fn take_up(self, clock: &Clock) -> Result<GateRole, AppError> {
        let meter = Meter::new(self.meter, self.gate.clone(), clock.clone())?;
        // The keys first: their plans say how long a window is.
        self.feed.load();
        meter.load_journal();
        Ok(GateRole {
            in_flight: self.proxy.in_flight(),
            proxy: self.proxy,
            gate: self.gate,
            cluster: self.cluster,
            feed: Arc::new(self.feed),
            meter: Arc::new(meter),
            listeners: self.listeners,
            edges: self.edges,
            access_log: self.access_log,
            edge_counts: Arc::default(),
            activity: Arc::default(),
            passage: self.passage,
        })
    }
}

impl GateRole {
    /// How this gate is called from the machine it runs on.
    pub fn url(&self) -> Option<String> {
        let ((_, address), (_, tls)) = (self.listeners.first()?, self.edges.first()?);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let host = if address.ip().is_unspecified() {
            "localhost".to_owned()
        } else {
            address.ip().to_string()
        };
        Some(format!("{scheme}://{host}:{}", address.port()))
    }

    /// Makes services of the parts.
    pub fn add_to(self, server: &mut Server, lifecycle: &Arc<Lifecycle>, clock: &Clock) {
        let mut named = vec![];
        let mut sockets = vec![];
        for ((listener, address), (settings, tls)) in self.listeners.into_iter().zip(self.edges) {
            let config = ListenerConfig::tcp(address.to_string()).l4_buffer(buffers());
            sockets.push((OwnedFd::from(listener), address.to_string()));
            named.push((format!("gate on {address}"), config, settings, tls));
        }
        if let (Some((listener, path)), Some((.., settings, _))) = (self.passage, named.first()) {
            let settings = passage_settings(settings);
            let path = path.display().to_string();
            let config = ListenerConfig::uds(path.clone()).l4_buffer(buffers());
            sockets.push((OwnedFd::from(listener), path));
            named.push(("passage".to_owned(), config, settings, None));
        }
        let handover = server.add_service(Handover::new(sockets));
        let observer = Arc::new(EdgeLog {
            proxy: self.proxy.clone(),
            counts: self.edge_counts,
        });
        let proxy = Arc::new(pingora::proxy::http_proxy(&server.configuration, self.proxy.clone()));
        // Caps on connections hold for all listeners together.
        let slots = named.first().map(|(.., settings, _)| {
            let slots = Slots::new(settings.connections, settings.connections_per_address);
            let open = slots.clone();
            lifecycle.counts_connections(move || open.open());
            slots
        });
        for (name, config, settings, tls) in named {
            let mut edge = Edge::new(settings, proxy.clone(), tls, observer.clone())
                .going_directly(self.proxy.clone())
                .rendering(render_refusal);
            if let Some(slots) = &slots {
                edge = edge.sharing(slots.clone(), self.activity.clone());
            }
            let mut service = Service::new(name, edge);
            service.add_listener(config);
            server.add_service(service).add_dependency(&handover);
        }

        let feed = self.feed;
        let follow = lifecycle.clone().on_duty(Stage::Settling, move |end| {
            let feed = feed.clone();
            async move { feed.run(end).await }
        });
        server.add_service(background_service("feed", Task::new(follow)));
        let (meter, life) = (self.meter, lifecycle.clone());
        let count = lifecycle.clone().on_duty(Stage::Settling, move |end| {
            let (meter, life) = (meter.clone(), life.clone());
            async move {
                meter.run(end).await;
                if life.is_handing_over() {
                    // The new process posts what is not posted yet.
                    meter.flush().await;
                } else {
                    meter.stop().await;
                }
            }
        });
        server.add_service(background_service("meter", Task::new(count)));
        let proxy = self.proxy;
        let looked_after = async move { proxy.look_after_upstreams().await };
        server.add_service(background_service("upstreams", Task::new(looked_after)));
        if let Some(cluster) = self.cluster {
            // Each process is a member of its own; what this one has given is in its counts, which are handed over.
            let share = lifecycle.clone().on_duty(Stage::Settling, move |end| {
                let cluster = cluster.clone();
                async move { cluster.run(end).await }
            });
            server.add_service(background_service("cluster", Task::new(share)));
        }
        let (gate, clock) = (self.gate, clock.clone());
        server.add_service(background_service("housekeeping", Task::new(housekeeping(gate, clock))));
        if let Some((_, writer)) = self.access_log {
            lifecycle.at_the_end(move || _ = writer.finish(LAST_LINES_WITHIN));
        }
    }
}

/// What comes through the passage was checked when it came in, and has one header more.
fn passage_settings(first: &EdgeSettings) -> EdgeSettings {
    EdgeSettings {
        head_bytes: first.head_bytes + 1024,
        head_fields: first.head_fields + 8,
        h2c: false,
        proxy_protocol: false,
        requests_per_connection: None,
        ..first.clone()
    }
}

/// For the last lines of the access log, where its disk hangs.
const LAST_LINES_WITHIN: Duration = Duration::from_secs(2);

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

/// What Pingora keeps for a client's connection. The edge reads into a buffer of its own; another 64 KiB before it would
/// cost memory and a copy. A head and a short body leave in one piece, as they would not with Pingora's 1,460 bytes.
fn buffers() -> L4BufferSettings {
    L4BufferSettings::new(0, 4096)
}
