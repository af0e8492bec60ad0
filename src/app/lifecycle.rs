//! The life of the process: signals in, an orderly end out.
//!
//! | signal | what happens |
//! |---|---|
//! | TERM | no new connections; what is in flight is finished, within the grace time; counts are written; exit 0 |
//! | INT | counts are written; exit 0 at once |
//! | HUP | the configuration is read again |
//!
//! Pingora's own end sleeps its whole grace period however little is in flight. So its grace period is set long, and
//! a thread of ours ends the process as soon as there is nothing left to wait for.

use async_trait::async_trait;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::background::BackgroundService;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How far the process is with ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Not at all.
    Running,
    /// Requests are finished, everything else still works.
    Draining,
    /// The last request is through: counters are written and posted.
    Settling,
    /// The rest, the control plane last of all, because the last usage is posted to it.
    Ending,
}

/// How long the last counts may take to be written and posted.
const SETTLE_DEADLINE: Duration = Duration::from_secs(3);

/// Shared by everything that has to end in order.
#[derive(Debug)]
pub struct Lifecycle {
    stage: watch::Sender<Stage>,
    in_flight: Arc<AtomicU64>,
    grace: Duration,
    /// Held by each task that must have finished before the process ends, by the stage that ends it.
    settling: Tasks,
    ending: Tasks,
}

#[derive(Debug)]
struct Tasks {
    running: Mutex<Option<mpsc::Sender<()>>>,
    finished: Mutex<Option<mpsc::Receiver<()>>>,
}

/// Dropped when a task has finished.
#[derive(Debug)]
pub struct Running(#[expect(dead_code, reason = "only its drop matters")] Option<mpsc::Sender<()>>);

impl Tasks {
    fn new() -> Self {
        let (running, finished) = mpsc::channel();
        Tasks {
            running: Mutex::new(Some(running)),
            finished: Mutex::new(Some(finished)),
        }
    }

    fn start(&self) -> Running {
        Running(self.running.lock().unwrap_or_else(|e| e.into_inner()).clone())
    }

    fn wait(&self, deadline: Duration) {
        self.running.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(finished) = self.finished.lock().unwrap_or_else(|e| e.into_inner()).take() {
            // Nothing is ever sent: it ends when the last sender is dropped, or at the deadline.
            let _ = finished.recv_timeout(deadline);
        }
    }
}

impl Lifecycle {
    /// A life in which `in_flight` counts the requests to be finished, for at most `grace`.
    pub fn new(in_flight: Arc<AtomicU64>, grace: Duration) -> Arc<Self> {
        let stage = watch::Sender::new(Stage::Running);
        Arc::new(Lifecycle {
            stage,
            in_flight,
            grace,
            settling: Tasks::new(),
            ending: Tasks::new(),
        })
    }

    /// Resolves once the process has come to `stage`.
    pub fn reached(&self, stage: Stage) -> impl Future<Output = ()> + Send + use<> {
        let mut watch = self.stage.subscribe();
        async move {
            // The sender lives as long as the process.
            let _ = watch.wait_for(|now| *now >= stage).await;
        }
    }

    /// A task that runs until `stage` and has to be waited for then.
    pub fn task(&self, stage: Stage) -> Running {
        if stage <= Stage::Settling {
            self.settling.start()
        } else {
            self.ending.start()
        }
    }

    /// Finishes what is in flight, then ends the process.
    fn drain(&self) -> ! {
        self.stage.send_replace(Stage::Draining);
        let deadline = Instant::now() + self.grace;
        let mut told = Instant::now();
        loop {
            let left = self.in_flight.load(Ordering::Relaxed);
            if left == 0 {
                break;
            }
            if Instant::now() >= deadline {
                log::warn!("{left} requests were still under way when the grace time ended");
                break;
            }
            if told.elapsed() >= Duration::from_secs(5) {
                told = Instant::now();
                log::info!("waiting for {left} requests");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.settle_and_exit()
    }

    fn settle_and_exit(&self) -> ! {
        self.stage.send_replace(Stage::Settling);
        self.settling.wait(SETTLE_DEADLINE);
        self.stage.send_replace(Stage::Ending);
        self.ending.wait(SETTLE_DEADLINE);
        log::info!("ended");
        std::process::exit(0)
    }
}

/// A boxed future that a reload is.
pub type Reload = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// Watches for signals on Pingora's behalf.
pub struct Signals {
    /// The life to end.
    pub lifecycle: Arc<Lifecycle>,
    /// What HUP does.
    pub reload: Reload,
}

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        let stream =
            |kind: SignalKind| signal(kind).expect("a signal handler can be set: the numbers are the system's own");
        let (mut term, mut int, mut hup) = (
            stream(SignalKind::terminate()),
            stream(SignalKind::interrupt()),
            stream(SignalKind::hangup()),
        );
        let end = |act: fn(&Lifecycle) -> !| {
            let lifecycle = self.lifecycle.clone();
            let spawned = std::thread::Builder::new()
                .name("end".into())
                .spawn(move || act(&lifecycle));
            if let Err(error) = spawned {
                log::error!("no thread to end in good order: {error}");
                std::process::exit(1);
            }
        };
        loop {
            tokio::select! {
                _ = term.recv() => {
                    log::info!("TERM: finishing what is in flight");
                    end(Lifecycle::drain);
                    // Pingora stops accepting, and tells clients to close.
                    return ShutdownSignal::GracefulTerminate;
                }
                _ = int.recv() => {
                    log::info!("INT: ending at once");
                    end(Lifecycle::settle_and_exit);
                }
                _ = hup.recv() => (self.reload)().await,
            }
        }
    }
}

/// A future that is run as a Pingora background service, once.
pub struct Task {
    future: Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>,
}

impl Task {
    /// The service that runs `future`.
    pub fn new(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Task {
            future: Mutex::new(Some(Box::pin(future))),
        }
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Task")
    }
}

#[async_trait]
impl BackgroundService for Task {
    /// Pingora's own shutdown signal comes when draining begins; each task ends at its own [`Stage`] instead.
    async fn start(&self, _shutdown: ShutdownWatch) {
        let future = self.future.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(future) = future {
            future.await;
        }
    }
}
