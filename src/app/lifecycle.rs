//! The life of the process: signals in, an orderly end out.
//!
//! | signal | what happens |
//! |---|---|
//! | TERM | no new connections; what is in flight is finished, within the grace time; counts are written; exit 0 |
//! | INT | counts are written; exit 0 at once, also while TERM is being followed |
//! | HUP | the configuration is read again |
//! | QUIT | the listeners go to a new process that waits for them ([`super::upgrade`]); without one nothing happens |
//!
//! Pingora's own end sleeps its whole grace period however little is in flight. So its grace period is set long, and
//! a thread of ours ends the process as soon as there is nothing left to wait for.
//!
//! Some work is done by one process at a time: following the keys, keeping the counts, the control plane. Such work
//! is *on duty* ([`Lifecycle::on_duty`]): it ends when the process ends, and when it hands over; and it begins anew if
//! the hand-over fails.

use async_trait::async_trait;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::background::BackgroundService;
use sd_notify::NotifyState;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
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

/// Which process does what only one may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Duty {
    Ours,
    /// We stop; nobody has it yet.
    Yielding,
    Theirs,
}

/// How long the last counts may take to be written and posted.
const SETTLE_DEADLINE: Duration = Duration::from_secs(3);

/// How long an idle connection is kept after a hand-over: whatever comes on it is passed on, so there is no hurry,
/// and a client that is told to close with its next answer loses nothing.
pub const IDLE_LINGER: Duration = Duration::from_secs(10);

/// Shared by everything that has to end in order.
pub struct Lifecycle {
    stage: watch::Sender<Stage>,
    duty: watch::Sender<Duty>,
    /// How many are at work that is done by one process at a time.
    at_work: watch::Sender<usize>,
    in_flight: Arc<AtomicU64>,
    grace: Duration,
    has_successor: AtomicBool,
    connections: OnceLock<Box<dyn Fn() -> usize + Send + Sync>>,
    /// Held by each task that must have finished before the process ends, by the stage that ends it.
    settling: Tasks,
    ending: Tasks,
    /// What is done last of all.
    last: Mutex<Vec<Last>>,
}

type Last = Box<dyn FnOnce() + Send>;

#[derive(Debug)]
struct Tasks {
    running: Mutex<Option<mpsc::Sender<()>>>,
    finished: Mutex<Option<mpsc::Receiver<()>>>,
}

/// Dropped when a task has finished.
#[derive(Debug)]
pub struct Running(#[expect(dead_code, reason = "only its drop matters")] Option<mpsc::Sender<()>>);

/// What ends a piece of work.
pub type End = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Tasks {
    fn new() -> Self {
        let (running, finished) = mpsc::channel();
        Tasks {
            running: Mutex::new(Some(running)),
            finished: Mutex::new(Some(finished)),
        }
    }

    fn start(&self) -> Running {
        Running(locked(&self.running).clone())
    }

    fn wait(&self, deadline: Duration) {
        locked(&self.running).take();
        let finished = locked(&self.finished).take();
        if let Some(finished) = finished {
            // Nothing is ever sent: it ends when the last sender is dropped, or at the deadline.
            let _ = finished.recv_timeout(deadline);
        }
    }
}

impl Lifecycle {
    /// A life in which `in_flight` counts the requests to be finished, for at most `grace`.
    pub fn new(in_flight: Arc<AtomicU64>, grace: Duration) -> Arc<Self> {
        Arc::new(Lifecycle {
            stage: watch::Sender::new(Stage::Running),
            duty: watch::Sender::new(Duty::Ours),
            at_work: watch::Sender::new(0),
            in_flight,
            grace,
            has_successor: AtomicBool::new(false),
            connections: OnceLock::new(),
            settling: Tasks::new(),
            ending: Tasks::new(),
            last: Mutex::default(),
        })
    }

    /// Says how to learn how many connections are open.
    pub fn counts_connections(&self, count: impl Fn() -> usize + Send + Sync + 'static) {
        // There is one gate in a process.
        let _ = self.connections.set(Box::new(count));
    }

    /// Does `act` at the very end.
    pub fn at_the_end(&self, act: impl FnOnce() + Send + 'static) {
        locked(&self.last).push(Box::new(act));
    }

    /// Resolves once the process has come to `stage`.
    pub fn reached(&self, stage: Stage) -> impl Future<Output = ()> + Send + use<> {
        let mut watch = self.stage.subscribe();
        async move {
            // The sender lives as long as the process.
            let _ = watch.wait_for(|now| *now >= stage).await;
        }
    }

    /// Resolves once the process ends, or another has taken over.
    pub fn left(&self) -> impl Future<Output = ()> + Send + use<> {
        let (ended, mut duty) = (self.reached(Stage::Ending), self.duty.subscribe());
        async move {
            tokio::select! {
                () = ended => {}
                _ = duty.wait_for(|duty| *duty == Duty::Theirs) => {}
            }
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

    /// Does `work`, which only one process at a time may do, until `stage`; work ends when the future that it is given
    /// resolves, and is begun anew where a hand-over failed.
    pub fn on_duty<F, W>(self: Arc<Self>, stage: Stage, mut work: W) -> impl Future<Output = ()> + Send + use<F, W>
    where
        F: Future<Output = ()> + Send,
        W: FnMut(End) -> F + Send,
    {
        // From now on, not from when it is first polled: a process that ends before that waits for it all the same.
        let running = self.task(stage);
        async move {
            self.repeat_on_duty(stage, &mut work).await;
            drop(running);
        }
    }

    async fn repeat_on_duty<F>(&self, stage: Stage, work: &mut (impl FnMut(End) -> F + Send))
    where
        F: Future<Output = ()> + Send,
    {
        let mut duty = self.duty.subscribe();
        loop {
            let (ended, mut yielded) = (self.reached(stage), self.duty.subscribe());
            self.at_work.send_modify(|count| *count += 1);
            work(Box::pin(async move {
                tokio::select! {
                    () = ended => {}
                    _ = yielded.wait_for(|duty| *duty != Duty::Ours) => {}
                }
            }))
            .await;
            self.at_work.send_modify(|count| *count -= 1);
            tokio::select! {
                () = self.reached(stage) => return,
                decided = duty.wait_for(|duty| *duty != Duty::Yielding) => {
                    if decided.is_ok_and(|duty| *duty == Duty::Theirs) {
                        return;
                    }
                }
            }
        }
    }

    /// Whether another process is about to take over.
    pub fn is_handing_over(&self) -> bool {
        *self.duty.borrow() != Duty::Ours
    }

    /// Whether the process does its work, and neither ends nor hands over.
    pub fn is_on_duty(&self) -> bool {
        *self.duty.borrow() == Duty::Ours && *self.stage.borrow() == Stage::Running
    }

    /// Ends all work that one process at a time does. False if that takes too long; it has to be
    /// [resumed](Lifecycle::resume) then.
    pub async fn yield_duty(&self, within: Duration) -> bool {
        self.duty.send_replace(Duty::Yielding);
        let mut at_work = self.at_work.subscribe();
        tokio::time::timeout(within, at_work.wait_for(|count| *count == 0))
            .await
            .is_ok()
    }

    /// The hand-over failed: all goes on here.
    pub fn resume(&self) {
        self.duty.send_replace(Duty::Ours);
    }

    /// Process `successor` has taken over: finishes what is still on this process's connections, and ends.
    pub fn leave(self: &Arc<Self>, successor: u32) {
        notify(&[NotifyState::MainPid(successor)]);
        self.has_successor.store(true, Ordering::Relaxed);
        self.duty.send_replace(Duty::Theirs);
        self.end(Lifecycle::drain);
    }

    /// Ends the process in `act`, on a thread of its own.
    fn end(self: &Arc<Self>, act: fn(&Lifecycle) -> !) {
        let lifecycle = self.clone();
        let spawned = std::thread::Builder::new()
            .name("end".into())
            .spawn(move || act(&lifecycle));
        if let Err(error) = spawned {
            log::error!("no thread to end in good order: {error}");
            std::process::exit(1);
        }
    }

    /// Finishes what is in flight, then ends the process.
    fn drain(&self) -> ! {
        self.stage.send_replace(Stage::Draining);
        let begun = Instant::now();
        let mut told = begun;
        loop {
            let left = self.in_flight.load(Ordering::Relaxed);
            // After a hand-over nobody waits for this process to be gone.
            let lingers = self.has_successor.load(Ordering::Relaxed)
                && begun.elapsed() < IDLE_LINGER
                && self.connections.get().is_some_and(|open| open() > 0);
            if left == 0 && !lingers {
                break;
            }
            if begun.elapsed() >= self.grace {
                if left > 0 {
                    log::warn!("{left} requests were still under way when the grace time ended");
                }
                break;
            }
            if left > 0 && told.elapsed() >= Duration::from_secs(5) {
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
        for act in std::mem::take(&mut *locked(&self.last)) {
            act();
        }
        log::info!("ended");
        std::process::exit(0)
    }
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifecycle")
            .field("stage", &*self.stage.borrow())
            .field("duty", &*self.duty.borrow())
            .finish_non_exhaustive()
    }
}

/// Tells the service manager, where there is one.
pub fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("the service manager cannot be told: {error}");
    }
}

/// Something that a signal starts.
pub type Act = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// What signals do.
pub struct Signals {
    /// The life to end.
    pub lifecycle: Arc<Lifecycle>,
    /// What HUP does.
    pub reload: Act,
    /// What QUIT does.
    pub hand_over: Act,
}

impl Signals {
    /// Follows signals for as long as the process lives, from the return of this on: a signal that came before anybody
    /// listens for it would end the process. On a thread of its own: Pingora's sleeps once it was told to shut down.
    ///
    /// # Errors
    /// There is no thread, or no handler can be set.
    pub fn follow(self) -> io::Result<()> {
        let (watching, watched) = mpsc::channel();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime.block_on(self.follow_for_ever(&watching)),
                Err(error) => log::error!("signals cannot be followed: {error}"),
            }
        })?;
        watched.recv().map_err(io::Error::other)
    }

    async fn follow_for_ever(&self, watching: &mpsc::Sender<()>) {
        let stream =
            |kind: SignalKind| signal(kind).expect("a signal handler can be set: the numbers are the system's own");
        let (mut term, mut int, mut hup, mut quit) = (
            stream(SignalKind::terminate()),
            stream(SignalKind::interrupt()),
            stream(SignalKind::hangup()),
            stream(SignalKind::quit()),
        );
        // Whoever started the thread waits for it.
        let _ = watching.send(());
        loop {
            tokio::select! {
                _ = term.recv() => {
                    if *self.lifecycle.stage.borrow() == Stage::Running {
                        log::info!("TERM: finishing what is in flight");
                        notify(&[NotifyState::Stopping]);
                        self.lifecycle.end(Lifecycle::drain);
                    }
                }
                _ = int.recv() => {
                    log::info!("INT: ending at once");
                    self.lifecycle.end(Lifecycle::settle_and_exit);
                }
                _ = hup.recv() => (self.reload)().await,
                // Not waited for, so that TERM and INT are heard meanwhile.
                _ = quit.recv() => drop(tokio::spawn((self.hand_over)())),
            }
        }
    }
}

/// Pingora's view of a life: when to stop accepting.
pub struct Shutdown(pub Arc<Lifecycle>);

#[async_trait]
impl ShutdownSignalWatch for Shutdown {
    async fn recv(&self) -> ShutdownSignal {
        self.0.reached(Stage::Draining).await;
        // Pingora stops accepting, and tells clients to close.
        ShutdownSignal::GracefulTerminate
    }
}

/// A future that is run as a Pingora background service, once.
pub struct Task {
    future: Mutex<Option<End>>,
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
        let future = locked(&self.future).take();
        if let Some(future) = future {
            future.await;
        }
    }
}

/// What the locks here guard is whole at every step, so a panic elsewhere does not spoil it.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
