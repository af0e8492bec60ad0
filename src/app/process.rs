//! One process: its roles put together, then run.

use super::dev::DevPrinter;
use super::gate_role::{GateParts, GateRole};
use super::lifecycle::{self, Lifecycle, Shutdown, Signals, Stage, Task};
use super::listeners::{self, BoundListener, Sockets};
use super::metrics::{self, Sources};
use super::reload::Reloader;
use super::settings::Bound;
use super::upgrade::{Held, Role, RunningGate, Successor, Upgrade};
use super::{AppError, demo, settings};
use crate::clock::Clock;
use crate::config::Config;
use crate::control::ControlPlane;
use crate::feed::Feed;
use crate::gate::Gate;
use crate::meter::Meter;
use crate::proxy::Proxy;
use crate::telemetry::admin::{self, Admin};
use crate::tls::{self, ListenerTls};
use futures_util::FutureExt as _;
use pingora::server::configuration::ServerConf;
use pingora::server::{RunArgs, Server};
use pingora::services::background::background_service;
use sd_notify::NotifyState;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Everything of one process, put together and not yet started.
pub struct Process {
    pub config: Config,
    pub config_path: Option<PathBuf>,
    pub clock: Clock,
    pub bound: Bound,
    control: Option<BoundListener>,
    control_tls: Option<Arc<ListenerTls>>,
    /// Set once the control plane has opened its database.
    opened_control: Arc<OnceLock<ControlPlane>>,
    admin: Option<BoundListener>,
    demo: Option<BoundListener>,
    pub gate: Option<GateRole>,
    held: Vec<Held>,
    successor: Option<Successor>,
}

impl Process {
    /// Has every socket and loads what is on disk, so that whatever can fail fails before anything runs. With
    /// `upgrade` it takes over from a running process; that one is on duty until this returns.
    pub fn assemble(
        config: Config,
        config_path: Option<PathBuf>,
        demo: Option<BoundListener>,
        upgrade: bool,
    ) -> Result<Self, AppError> {
        let mut successor = match state_dir_of(&config) {
            Some(state_dir) if upgrade => Some(Successor::wait(state_dir)?),
            _ => None,
        };
        match Self::assemble_on(&config, successor.as_mut()) {
            Ok(assembled) => Ok(Process {
                config,
                config_path,
                demo,
                successor,
                ..assembled
            }),
            Err(error) => {
                if let Some(successor) = successor {
                    successor.give_up(&error);
                }
                Err(error)
            }
        }
    }

    fn assemble_on(config: &Config, mut successor: Option<&mut Successor>) -> Result<Self, AppError> {
        let clock = Clock::system();
        let mut sockets = Sockets::new(successor.as_deref_mut())?;
        let mut listen =
            |role, address: Option<&String>| address.map(|address| sockets.listen(role, address)).transpose();
        let control = listen(Role::Control, config.control.as_ref().map(|control| &control.address))?;
        let admin = listen(Role::Admin, config.admin.as_ref().map(|admin| &admin.address))?;
        let control_tls = settings::control_tls(config).map(ListenerTls::load).transpose()?;
        let bound = Bound {
            control: control.as_ref().map(|(_, address)| *address),
        };
        let mut gate = match &config.gate {
            Some(_) => Some(GateParts::prepare(config, bound, &clock, &mut sockets)?),
            None => None,
        };
        let held = sockets.finish();
        let mut had_keys = false;
        if let Some(successor) = successor.as_deref_mut() {
            if let (Some(gate), Some(gate_config)) = (&mut gate, &config.gate) {
                gate.passage = Some(successor.open_passage(&gate_config.state_dir)?);
            }
            had_keys = successor.ready()?;
        }
        // From here on nobody else writes what is read now.
        let gate = gate.map(|gate| gate.take_up(&clock)).transpose()?;
        if let Some(successor) = successor {
            if had_keys && !gate.as_ref().is_none_or(|gate| gate.gate.is_ready()) {
                let why = "the running process has keys, but they cannot be loaded from its spool";
                return Err(AppError::Failed(why.to_owned()));
            }
            successor.taken()?;
        }
        Ok(Process {
            config: config.clone(),
            config_path: None,
            clock,
            bound,
            control,
            control_tls: control_tls.map(Arc::new),
            opened_control: Arc::default(),
            admin,
            demo: None,
            gate,
            held,
            successor: None,
        })
    }

    /// The certificates of every listener.
    pub fn certificates(&self) -> Vec<Arc<ListenerTls>> {
        let edges = self.gate.iter().flat_map(|gate| &gate.edges);
        let all = edges.map(|(_, tls)| tls).chain([&self.control_tls]);
        all.flatten().cloned().collect()
    }

    fn announce(&self) -> Result<(), AppError> {
        let Some(state_dir) = state_dir_of(&self.config) else {
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

    /// Runs until a signal ends the process; does not return then.
    pub fn run(mut self) -> Result<(), AppError> {
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
                // One worker has nobody to steal from, and is cheaper without the machinery.
                work_stealing: threads > 1,
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
        let reloader = Arc::new(Reloader::new(&self));
        let upgrade = Arc::new(self.upgrade(&lifecycle));
        let (reloader_of_hup, upgrade_of_quit) = (reloader.clone(), upgrade.clone());
        let signals = Signals {
            lifecycle: lifecycle.clone(),
            reload: Box::new(move || {
                let reloader = reloader_of_hup.clone();
                Box::pin(async move { drop(reloader.reload().await) })
            }),
            hand_over: Box::new(move || Box::pin(upgrade_of_quit.clone().hand_over_to_waiting())),
        };
        signals.follow()?;
        self.announce()?;

        let opened = self.add_control(&mut server, &lifecycle);
        if let Some((listener, _)) = self.demo.take() {
            let ended = lifecycle.reached(Stage::Ending);
            server.add_service(background_service(
                "demo upstream",
                Task::new(serve(listener, demo::router(), ended)),
            ));
        }
        let certificates = self.certificates();
        if !certificates.is_empty() {
            server.add_service(background_service("certificates", Task::new(tls::watch(certificates))));
        }
        let admin = self.admin_listener(&reloader, &upgrade);
        if let Some((listener, _)) = self.admin.take() {
            let (left, running) = (lifecycle.left(), lifecycle.task(Stage::Ending));
            server.add_service(background_service(
                "admin",
                Task::new(async move {
                    let _running = running;
                    serve(listener, admin::router(admin), left).await;
                }),
            ));
        }
        server.add_service(background_service(
            "readiness",
            Task::new(tell_ready(
                opened,
                self.gate.as_ref().map(|gate| gate.gate.clone()),
                self.successor.take(),
                upgrade.has_predecessor.clone(),
            )),
        ));
        if let Some(gate) = self.gate.take() {
            gate.add_to(&mut server, &lifecycle, &self.clock);
        }
        server.run(RunArgs {
            shutdown_signal: Box::new(Shutdown(lifecycle)),
        });
        Ok(())
    }

    fn upgrade(&mut self, lifecycle: &Arc<Lifecycle>) -> Upgrade {
        Upgrade {
            lifecycle: lifecycle.clone(),
            state_dir: state_dir_of(&self.config).map(Path::to_path_buf).unwrap_or_default(),
            program: std::env::current_exe().ok(),
            config_path: self.config_path.clone(),
            listeners: Mutex::new(std::mem::take(&mut self.held)),
            gate: self.gate.as_ref().map(|gate| RunningGate {
                gate: gate.gate.clone(),
                proxy: gate.proxy.clone(),
                feed: gate.feed.clone(),
                meter: gate.meter.clone(),
                activity: gate.activity.clone(),
            }),
            has_predecessor: Arc::new(AtomicBool::new(self.successor.is_some())),
            under_way: Mutex::new(()),
        }
    }

    /// Resolves what is returned once the control plane is open, if this process has one.
    fn add_control(&mut self, server: &mut Server, lifecycle: &Arc<Lifecycle>) -> oneshot::Receiver<()> {
        let (opened, is_open) = oneshot::channel();
        let (Some((listener, _)), Some(mut settings)) = (self.control.take(), settings::control(&self.config)) else {
            // Nobody reads it who has dropped it.
            let _ = opened.send(());
            return is_open;
        };
        // What the portal's `curl` lines call: this process's own gate, if it is one.
        settings.gate_url = self.gate.as_ref().and_then(GateRole::url);
        let dev = self.demo.is_some().then(|| DevPrinter {
            gate: self.gate.as_ref().map(|gate| gate.gate.clone()),
            address: self
                .gate
                .as_ref()
                .and_then(|gate| gate.listeners.first())
                .map(|(_, address)| *address),
            control: self.bound.control,
        });
        let first = Arc::new(Mutex::new(Some((opened, dev))));
        let (tls, keeps) = (self.control_tls.clone(), self.opened_control.clone());
        let (clock, lifecycle) = (self.clock.clone(), lifecycle.clone());
        server.add_service(background_service(
            "control plane",
            Task::new(lifecycle.on_duty(Stage::Ending, move |end| {
                let (settings, clock, first) = (settings.clone(), clock.clone(), first.clone());
                let (tls, keeps) = (tls.clone(), keeps.clone());
                let listener = listener.try_clone();
                async move {
                    let control = match ControlPlane::open(settings, clock).await {
                        Ok(control) => control,
                        Err(error) => {
                            // Without its database a control plane is nothing; a supervisor should know at once.
                            log::error!("the control plane cannot start: {error}");
                            eprintln!("tollgate: the control plane cannot start: {error}");
                            std::process::exit(1);
                        }
                    };
                    // Metrics read it; one that was opened anew after a failed hand-over has the same database.
                    let _ = keeps.set(control.clone());
                    let listener = match listener.and_then(tokio::net::TcpListener::from_std) {
                        Ok(listener) => listener,
                        Err(error) => return log::error!("the control plane cannot listen: {error}"),
                    };
                    let first = first.lock().unwrap_or_else(|e| e.into_inner()).take();
                    if let Some((opened, dev)) = first {
                        let _ = opened.send(());
                        if let Some(dev) = dev {
                            tokio::spawn(dev.print(control.clone()));
                        }
                    }
                    let end = end.shared();
                    let at_the_latest = async {
                        end.clone().await;
                        tokio::time::sleep(CONTROL_GRACE).await;
                    };
                    tokio::select! {
                        served = control.serve(listener, tls, end.clone()) => if let Err(error) = served {
                            log::error!("the control plane ended: {error}");
                        },
                        () = at_the_latest => log::warn!("calls of the control plane that took too long were cut off"),
                    }
                }
            })),
        ));
        is_open
    }

    fn admin_listener(&self, reloader: &Arc<Reloader>, upgrade: &Arc<Upgrade>) -> Arc<Admin> {
        let reloads = &reloader.outcomes;
        let (reloader, upgrade) = (reloader.clone(), upgrade.clone());
        let has_predecessor = upgrade.has_predecessor.clone();
        let gate = self.gate.as_ref();
        let name = self
            .config
            .gate
            .as_ref()
            .map(|gate| gate.name.clone())
            .unwrap_or_default();
        let parts = gate.map(|gate| StatusParts {
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
            status: Box::new(move || {
                let mut status = status(parts.as_ref());
                status["predecessorDraining"] = has_predecessor.load(Ordering::Acquire).into();
                status
            }),
            reload: Box::new(move || {
                let reloader = reloader.clone();
                Box::pin(async move { reloader.reload().await })
            }),
            upgrade: Box::new(move || Box::pin(upgrade.clone().start())),
        })
    }
}

/// Where a process keeps its state: the gate's directory, or the control plane's in a process without a gate.
fn state_dir_of(config: &Config) -> Option<&Path> {
    let gate = config.gate.as_ref().map(|gate| gate.state_dir.as_path());
    gate.or(config.control.as_ref().map(|control| control.state_dir.as_path()))
}

/// Tells the process before, and the service manager, once this one serves.
async fn tell_ready(
    opened: oneshot::Receiver<()>,
    gate: Option<Arc<Gate>>,
    successor: Option<Successor>,
    has_predecessor: Arc<AtomicBool>,
) {
    if opened.await.is_err() {
        return;
    }
    if let Some(successor) = successor {
        let waited = tokio::task::spawn_blocking(move || successor.serve_until_alone(&has_predecessor));
        if let Err(error) = waited.await {
            log::error!("waiting for the end of the process before broke off: {error}");
        }
        return;
    }
    let begun = Instant::now();
    while gate.as_ref().is_some_and(|gate| !gate.is_ready()) {
        if begun.elapsed() >= READY_AT_THE_LATEST {
            lifecycle::notify(&[NotifyState::Status(
                "serving, but without keys: the control plane was not reached",
            )]);
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    lifecycle::notify(&[NotifyState::Ready]);
}

/// For calls that are under way when the control plane ends, or moves to another process: a password costs a second.
const CONTROL_GRACE: Duration = Duration::from_secs(5);

/// Public routes work without keys, and keys come by themselves: a service manager need not give up on us.
const READY_AT_THE_LATEST: Duration = Duration::from_secs(30);

/// What `/status` tells of a gate.
struct StatusParts {
    name: String,
    gate: Arc<Gate>,
    feed: Arc<Feed>,
    meter: Arc<Meter>,
    proxy: Proxy,
}

fn status(parts: Option<&StatusParts>) -> Value {
    let mut status = json!({"version": env!("CARGO_PKG_VERSION"), "pid": std::process::id()});
    if let Some(StatusParts {
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

async fn serve(listener: TcpListener, router: axum::Router, ended: impl Future<Output = ()> + Send + 'static) {
    let served = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => axum::serve(listener, router).with_graceful_shutdown(ended).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        log::error!("a listener ended: {error}");
    }
}
