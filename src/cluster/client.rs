//! The running part: carries batches between the coordinators and the store, and lets requests wait for permits.

use super::coordinator::{Coordinator, Counts, Settings};
use super::protocol::{Batch, BatchAnswer};
use super::store::{Store, StoreError};
use crate::clock::Clock;
use crate::gate::reservation::Reservation;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use xxhash_rust::xxh3::xxh3_64;

/// Takes part in the shared counts. Clones are the same.
#[derive(Clone, Debug)]
pub struct Cluster(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Arc<dyn Store>,
    clock: Clock,
    wait: Duration,
    lost_after: Duration,
    parts: Vec<Part>,
    /// The store was found fit for its purpose.
    is_fit: AtomicBool,
    /// A store that is unfit when it is first seen ends the process.
    was_fit: AtomicBool,
    waited: AtomicU64,
    waited_in_vain: AtomicU64,
    longest_wait_ns: AtomicU64,
}

/// What fails by itself: all windows of one partition of the store.
#[derive(Debug)]
struct Part {
    coordinator: Mutex<Coordinator>,
    /// Something is to be sent.
    work: Notify,
    /// An answer came.
    news: Notify,
}

/// What has been counted, over all partitions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Status {
    /// See [`Counts`].
    pub counts: Counts,
    /// Calls that are not answered yet.
    pub unacked: usize,
    /// Windows that this gate shares at the moment.
    pub windows: usize,
    /// Requests that waited for permits.
    pub waited: u64,
    /// Those that got none in time.
    pub waited_in_vain: u64,
    /// The longest that one has waited.
    pub longest_wait: Duration,
    /// Gates that share the limits, as far as it was ever heard.
    pub gates: u32,
    /// Grants count, in every partition and for every window.
    pub is_usable: bool,
}

impl Cluster {
    /// Takes part through `store`. A request waits for permits for at most `wait`. Nothing runs before [`Cluster::run`].
    pub fn new(settings: &Settings, wait: Duration, store: Arc<dyn Store>, clock: Clock) -> Self {
        let now_ns = clock.now().elapsed_ns;
        let part = |_| Part {
            coordinator: Mutex::new(Coordinator::new(settings.clone(), now_ns)),
            work: Notify::new(),
            news: Notify::new(),
        };
        Cluster(Arc::new(Inner {
            parts: (0..store.partitions()).map(part).collect(),
            store,
            clock,
            wait,
            lost_after: settings.lost_after,
            is_fit: AtomicBool::new(false),
            was_fit: AtomicBool::new(false),
            waited: AtomicU64::new(0),
            waited_in_vain: AtomicU64::new(0),
            longest_wait_ns: AtomicU64::new(0),
        }))
    }

    /// More permits are wanted for a window. Does not wait.
    pub fn want(&self, reservation: &Arc<Reservation>) {
        let part = self.0.part_of(reservation);
        let (mut coordinator, now_ns) = part.lock(&self.0.clock);
        if !coordinator.want(reservation.handle(), reservation, now_ns) {
            let name = reservation.name().clone();
            let handle = coordinator.open(name, reservation.window_ms(), reservation.clone(), now_ns);
            reservation.set_handle(handle);
            coordinator.want(handle, reservation, now_ns);
        }
        drop(coordinator);
        part.work.notify_one();
    }

    /// Until when a request that finds no permits now may wait.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.0.wait
    }

    /// Says that more is wanted, and waits until there may be permits, or it is known that there are none. `false`: neither, by
    /// the deadline.
    pub async fn wait(&self, reservation: &Arc<Reservation>, deadline: Instant) -> bool {
        let is_worth_while = self.decided(reservation, deadline).await;
        let waited = self.0.wait.saturating_sub(deadline - Instant::now()) + deadline.elapsed();
        self.0
            .longest_wait_ns
            .fetch_max(waited.as_nanos() as u64, Ordering::Relaxed);
        is_worth_while
    }

    async fn decided(&self, reservation: &Arc<Reservation>, deadline: Instant) -> bool {
        let part = self.0.part_of(reservation);
        let _waiting = Waiting::begin(reservation);
        self.want(reservation);
        loop {
            let news = part.news.notified();
            tokio::pin!(news);
            // From here on no answer is missed.
            news.as_mut().enable();
            if reservation.is_decided(self.0.clock.now().elapsed_ns) {
                return true;
            }
            if timeout_at(deadline - LESS_THAN_A_TICK, news).await.is_err() {
                return false;
            }
        }
    }

    /// A request has waited, and got permits or not.
    pub fn count_wait(&self, in_vain: bool) {
        self.0.waited.fetch_add(1, Ordering::Relaxed);
        self.0.waited_in_vain.fetch_add(u64::from(in_vain), Ordering::Relaxed);
    }

    /// Runs until `ended`; then tells the store what is spent and gives the rest back.
    pub async fn run(&self, ended: impl Future<Output = ()> + Send) {
        let ended = async {
            ended.await;
            for part in &self.0.parts {
                let (mut coordinator, now_ns) = part.lock(&self.0.clock);
                coordinator.leave(now_ns);
                drop(coordinator);
                part.work.notify_one();
            }
        };
        let parts: FuturesUnordered<_> = (0..self.0.parts.len()).map(|index| self.0.work(index)).collect();
        tokio::pin!(ended);
        let work = parts.collect::<Vec<()>>();
        tokio::pin!(work);
        tokio::select! {
            () = &mut ended => {}
            _ = &mut work => return,
            () = self.0.watch_over() => return,
        }
        // What is not told by then counts as spent, which is safe.
        let _ = tokio::time::timeout(LEAVE_DEADLINE, work).await;
    }

    /// What has been counted.
    pub fn status(&self) -> Status {
        let mut status = Status {
            waited: self.0.waited.load(Ordering::Relaxed),
            waited_in_vain: self.0.waited_in_vain.load(Ordering::Relaxed),
            longest_wait: Duration::from_nanos(self.0.longest_wait_ns.load(Ordering::Relaxed)),
            is_usable: true,
            ..Status::default()
        };
        for part in &self.0.parts {
            let (coordinator, now_ns) = part.lock(&self.0.clock);
            status.counts.add(&coordinator.counts());
            status.unacked += coordinator.unacked();
            status.windows += coordinator.windows();
            status.gates = status.gates.max(coordinator.gates(0, now_ns).unwrap_or(0));
            status.is_usable &= coordinator.grants_count(coordinator.longest_window_ms(), now_ns);
        }
        status
    }
}

/// The runtime's timers go by whole milliseconds and round up: asked for so much less, they round down, and nobody waits for
/// longer than they may.
const LESS_THAN_A_TICK: Duration = Duration::from_nanos(999_999);
/// How long leaving may take.
const LEAVE_DEADLINE: Duration = Duration::from_secs(2);
/// How often a store's settings are looked at again.
const CHECK_EVERY: Duration = Duration::from_secs(30);

impl Inner {
    fn part_of(&self, reservation: &Reservation) -> &Part {
        // Every gate must come to the same part: the hash is one for ever.
        &self.parts[xxh3_64(reservation.name().as_bytes()) as usize % self.parts.len()]
    }

    /// Carries one partition's batches, until the coordinator has left and all is told.
    async fn work(&self, index: usize) {
        let part = &self.parts[index];
        let mut under_way = FuturesUnordered::new();
        loop {
            let (due, is_due) = {
                let (mut coordinator, now_ns) = part.lock(&self.clock);
                let is_due = coordinator.next_due_ns() <= now_ns;
                coordinator.tick(now_ns);
                while let Some((number, batch)) = coordinator.next_batch(now_ns) {
                    under_way.push(self.exchange(index as u16, number, batch));
                }
                if coordinator.has_left() && under_way.is_empty() {
                    return;
                }
                let due_ns = coordinator.next_due_ns().saturating_sub(now_ns);
                (Duration::from_nanos(due_ns).min(Duration::from_secs(3600)), is_due)
            };
            if is_due {
                // Something may have been decided about those that wait: that the store is lost, for one.
                part.news.notify_waiters();
            }
            tokio::select! {
                Some((number, answer)) = under_way.next() => {
                    let (mut coordinator, now_ns) = part.lock(&self.clock);
                    coordinator.answered(number, answer.as_ref(), now_ns);
                    drop(coordinator);
                    part.news.notify_waiters();
                }
                () = part.work.notified() => {}
                () = tokio::time::sleep(due) => {}
            }
        }
    }

    async fn exchange(&self, partition: u16, number: u64, batch: Batch) -> (u64, Option<BatchAnswer>) {
        if !self.is_fit.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(20)).await;
            return (number, None);
        }
        let exchanged = tokio::time::timeout(self.lost_after, self.store.exchange(partition, &batch)).await;
        match exchanged {
            Ok(Ok(answer)) => (number, Some(answer)),
            Ok(Err(error)) => {
                log::debug!("{error}");
                (number, None)
            }
            Err(_) => (number, None),
        }
    }

    /// Looks at the store's settings at the start, and now and then.
    async fn watch_over(&self) {
        let mut told: Vec<String> = vec![];
        let mut reachable = true;
        loop {
            let pause = match self.store.check().await {
                Ok(warnings) => {
                    for warning in warnings.iter().filter(|warning| !told.contains(warning)) {
                        log::warn!("the store of shared counts: {warning}");
                    }
                    if !self.is_fit.swap(true, Ordering::Relaxed) {
                        log::info!("counts are shared through the store");
                    }
                    self.was_fit.store(true, Ordering::Relaxed);
                    told = warnings;
                    reachable = true;
                    CHECK_EVERY
                }
                Err(StoreError::Unfit(why)) => {
                    self.is_fit.store(false, Ordering::Relaxed);
                    log::error!("cluster.url: {}", StoreError::Unfit(why.clone()));
                    if !self.was_fit.load(Ordering::Relaxed) {
                        // Found out by whoever sets it up, not by whoever relies on it.
                        eprintln!("tollgate: cluster.url: {}", StoreError::Unfit(why));
                        std::process::exit(1);
                    }
                    Duration::from_secs(5)
                }
                Err(error) => {
                    if std::mem::take(&mut reachable) {
                        log::warn!("{error}");
                    }
                    Duration::from_millis(100)
                }
            };
            tokio::time::sleep(pause).await;
        }
    }
}

impl Part {
    /// The coordinator, and the time for it. Read in this order: a reading from before another thread's turn would be
    /// a time that runs backwards.
    fn lock(&self, clock: &Clock) -> (MutexGuard<'_, Coordinator>, u64) {
        let coordinator = self.coordinator.lock().unwrap_or_else(|e| e.into_inner());
        (coordinator, clock.now().elapsed_ns)
    }
}

/// A request that waits, counted for as long as it does.
struct Waiting<'a>(&'a Reservation);

impl<'a> Waiting<'a> {
    fn begin(reservation: &'a Reservation) -> Self {
        reservation.wait(1);
        Waiting(reservation)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waited(1);
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::MemoryStore;
    use super::super::protocol::OnLoss;
    use super::*;
    use crate::gate::limit::Limit;
    use async_trait::async_trait;

    /// Answers at once.
    #[derive(Debug)]
    struct Near(Mutex<MemoryStore>, Clock);

    #[async_trait]
    impl Store for Near {
        fn partitions(&self) -> u16 {
            1
        }

        async fn exchange(&self, _partition: u16, batch: &Batch) -> Result<BatchAnswer, StoreError> {
            Ok(self.0.lock().unwrap().exchange(batch, self.1.now().unix_ms as u64))
        }

        async fn check(&self) -> Result<Vec<String>, StoreError> {
            Ok(vec![])
        }
    }

    /// Requests and answers come on different threads. None may see the coordinator at a time before that of another's
    /// turn: differences of times would be negative, which ends a request without an answer, or makes a loss look old.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn time_does_not_run_backwards_between_threads() {
        let clock = Clock::system();
        let settings = Settings {
            id: 7,
            name: "gate".into(),
            on_loss: OnLoss::Closed,
            // A sign of life every millisecond.
            lost_after: Duration::from_millis(3),
            max_clock_skew: Duration::ZERO,
            longest_window_ms: 1_000,
        };
        let near = Near(Mutex::new(MemoryStore::new("run")), clock.clone());
        let cluster = Cluster::new(&settings, Duration::from_millis(5), Arc::new(near), clock);
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn({
            let cluster = cluster.clone();
            async move { cluster.run(async { drop(ended.await) }).await }
        });
        let askers: Vec<_> = (0..2)
            .map(|n| {
                let cluster = cluster.clone();
                let limit = Limit::new(100, 1_000).unwrap();
                let reservation = Arc::new(Reservation::new(&format!("key_{n}"), "default", limit));
                std::thread::spawn(move || {
                    let begin = std::time::Instant::now();
                    for n in 0.. {
                        cluster.want(&reservation);
                        let was_asked = cluster.status().counts.asks > 0;
                        if (n > 20_000 && was_asked) || begin.elapsed() > Duration::from_secs(20) {
                            break;
                        }
                    }
                })
            })
            .collect();
        tokio::task::spawn_blocking(|| askers.into_iter().for_each(|asker| asker.join().unwrap()))
            .await
            .unwrap();
        assert!(cluster.status().counts.asks > 0, "nothing was asked of the store");
        end.send(()).unwrap();
        running.await.unwrap();
    }
}
