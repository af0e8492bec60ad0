//! The old process's side.

use super::super::lifecycle::{IDLE_LINGER, Lifecycle};
use super::{AN_ANSWER, BUILDING, Channel, Described, Message, Role, VERSION, directory, waiting_place};
use crate::feed::Feed;
use crate::gate::Gate;
use crate::meter::Meter;
use crate::proxy::Proxy;
use crate::proxy::edge::Activity;
use serde_json::{Value, json};
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// A listening socket that can be handed over.
#[derive(Debug)]
pub struct Held {
    pub role: Role,
    /// The address as the configuration has it.
    pub asked: String,
    pub listener: TcpListener,
}

/// What a running process needs to hand itself over.
pub struct Upgrade {
    pub lifecycle: Arc<Lifecycle>,
    pub state_dir: PathBuf,
    /// What the new process runs: the file may have been replaced since, its path has not.
    pub program: Option<PathBuf>,
    /// `None`: this process runs on the built-in configuration, and there is nothing to start another with.
    pub config_path: Option<PathBuf>,
    pub listeners: Mutex<Vec<Held>>,
    pub gate: Option<RunningGate>,
    /// Set while the process before this one still passes requests on.
    pub has_predecessor: Arc<AtomicBool>,
    pub under_way: Mutex<()>,
}

/// The parts of a running gate that a hand-over has to do with.
pub struct RunningGate {
    pub gate: Arc<Gate>,
    pub proxy: Proxy,
    pub feed: Arc<Feed>,
    pub meter: Arc<Meter>,
    pub activity: Arc<Activity>,
}

impl RunningGate {
    /// What the new process could not know, because it cannot be written down.
    fn unwritten(&self) -> Option<String> {
        self.meter.status().disk_error.or(self.feed.status().spool_error)
    }
}

/// What came of it.
struct HandedOver {
    successor: u32,
    /// How long requests waited.
    pause: Duration,
}

impl Upgrade {
    /// Starts a new process from the same program file and configuration file, and hands over to it.
    ///
    /// # Errors
    /// What to answer; this process serves on.
    pub async fn start(self: Arc<Self>) -> Result<Value, Value> {
        let outcome = tokio::task::spawn_blocking(move || self.start_now()).await;
        let outcome = outcome.unwrap_or_else(|error| Err(error.to_string()));
        match outcome {
            Ok(done) => Ok(json!({
                "successor": done.successor,
                "predecessor": std::process::id(),
                "pauseMs": done.pause.as_secs_f64() * 1000.0,
            })),
            Err(why) => {
                log::error!("no upgrade, this process serves on: {why}");
                Err(json!({"code": "NOT_UPGRADED", "message": why}))
            }
        }
    }

    /// Hands over to the process that waits, if one does.
    pub async fn hand_over_to_waiting(self: Arc<Self>) {
        let outcome = tokio::task::spawn_blocking(move || {
            let _under_way = self.begin()?;
            match self.connect() {
                Ok(stream) => self.hand_over(stream),
                Err(_) => Err(
                    "nobody waits to take over; start `tollgate run --upgrade` first, or use `tollgate \
                               upgrade`"
                        .to_owned(),
                ),
            }
        });
        match outcome.await {
            Ok(Ok(_)) => {}
            Ok(Err(why)) => log::warn!("QUIT: {why}: this process serves on"),
            Err(error) => log::error!("QUIT: {error}: this process serves on"),
        }
    }

    fn start_now(&self) -> Result<HandedOver, String> {
        let _under_way = self.begin()?;
        let (Some(program), Some(config)) = (&self.program, &self.config_path) else {
            return Err("this process runs on the built-in configuration, or its program file is not known".to_owned());
        };
        log::info!("starting {} run --upgrade -c {}", program.display(), config.display());
        let child = Command::new(program)
            .args(["run", "--upgrade", "-c"])
            .arg(config)
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", program.display()))?;
        let mut child = Started(Some(child));
        let done = self.hand_over(self.await_waiting(&mut child)?)?;
        child.0 = None;
        Ok(done)
    }

    /// One at a time, and not while there is still a process before this one.
    fn begin(&self) -> Result<MutexGuard<'_, ()>, String> {
        let under_way = match self.under_way.try_lock() {
            Ok(guard) => guard,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => return Err("an upgrade is under way already".to_owned()),
        };
        if !self.lifecycle.is_on_duty() {
            return Err("this process is ending".to_owned());
        }
        if self.has_predecessor.load(Ordering::Acquire) {
            return Err("the process before this one has not ended yet; try again when it has".to_owned());
        }
        Ok(under_way)
    }

    fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(waiting_place(&directory(&self.state_dir)?))
    }

    fn await_waiting(&self, child: &mut Started) -> Result<UnixStream, String> {
        let deadline = Instant::now() + BUILDING;
        loop {
            if let Some(status) = child.ended() {
                return Err(format!("the new process ended with {status}; the log has its reason"));
            }
            match self.connect() {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() >= deadline => {
                    return Err(format!("the new process does not get ready: {error}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn hand_over(&self, stream: UnixStream) -> Result<HandedOver, String> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                "the new process has ended; the log has its reason".to_owned()
            }
            _ => format!("the new process: {error}"),
        };
        let mut channel = Channel::new(stream).map_err(failed)?;
        let (successor, passage) = {
            let listeners = locked(&self.listeners);
            let described = listeners.iter().map(|held| Described {
                role: held.role,
                asked: held.asked.clone(),
            });
            let hello = Message::Hello {
                version: VERSION,
                pid: std::process::id(),
                listeners: described.collect(),
            };
            let descriptors: Vec<_> = listeners.iter().map(|held| held.listener.as_fd()).collect();
            channel.send(&hello, &descriptors).map_err(failed)?;
            match channel.receive(BUILDING).map_err(failed)? {
                Message::Ready { pid, passage } => (pid, passage),
                other => return Err(format!("the new process says {other:?} instead of being ready")),
            }
        };
        let begun = Instant::now();
        log::info!("handing over to process {successor}");
        if let Err(why) = self.yield_to(&mut channel, passage) {
            drop(channel);
            if let Some(gate) = &self.gate {
                gate.proxy.decide_again();
            }
            self.lifecycle.resume();
            return Err(why);
        }
        let pause = begun.elapsed();
        log::info!(
            "process {successor} serves; requests waited for {:.1} ms",
            pause.as_secs_f64() * 1000.0
        );
        // The sockets are the new process's now; were they kept open here they would outlive it.
        locked(&self.listeners).clear();
        if let Some(gate) = &self.gate {
            gate.activity.linger(IDLE_LINGER);
        }
        self.lifecycle.leave(successor);
        // Open until this process ends: that is how the new one sees it.
        std::mem::forget(channel);
        Ok(HandedOver { successor, pause })
    }

    /// Steps 3 to 6.
    fn yield_to(&self, channel: &mut Channel, passage: Option<PathBuf>) -> Result<(), String> {
        let failed = |error: io::Error| format!("the new process gave up: {error}");
        if let Some(gate) = &self.gate {
            let passage = passage.ok_or("the new process is no gate, and this one is")?;
            gate.proxy
                .pass_on_to(&passage)
                .map_err(|error| format!("requests cannot be passed on: {error}"))?;
        }
        if !Handle::current().block_on(self.lifecycle.yield_duty(AN_ANSWER)) {
            return Err(format!(
                "keys, counts or the control plane were not put down within {AN_ANSWER:?}"
            ));
        }
        if let Some(why) = self.gate.as_ref().and_then(RunningGate::unwritten) {
            return Err(format!(
                "keys and counts cannot be written down for the new process: {why}"
            ));
        }
        let had_keys = self.gate.as_ref().is_some_and(|gate| gate.gate.is_ready());
        channel.send(&Message::Go { had_keys }, &[]).map_err(failed)?;
        match channel.receive(BUILDING).map_err(failed)? {
            Message::Taken {} => {}
            other => return Err(format!("the new process says {other:?} instead of having taken over")),
        }
        channel.send(&Message::Yours {}, &[]).map_err(failed)?;
        match channel.receive(BUILDING) {
            Ok(Message::Serving {}) => {}
            // It has the word, and it lives.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                log::warn!("the new process has taken over, but does not say that it serves");
            }
            Ok(other) => log::warn!("the new process has taken over, but says {other:?}"),
            Err(error) => return Err(failed(error)),
        }
        Ok(())
    }
}

/// A new process that is ended if it does not take over.
struct Started(Option<Child>);

impl Started {
    fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.0.as_mut()?.try_wait().ok().flatten()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
