//! How long a request waits for permits of a shared limit, in virtual time: from the proxy's filter through the gate and the
//! running part of the shared counts to a store that does as it likes. Nothing of it is modelled but the store.
//!
//! Time passes in steps, and only when nobody has anything left to do, so that every wait is known to a step. No machine
//! is so busy that it could be seen here.

use crate::gate_support::START_MS;
use crate::plan::Random;
use crate::sharing_gate::{Asked, KEYS, SharingGate};
use async_trait::async_trait;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, advance, sleep};
use tollgate::clock::Clock;
use tollgate::cluster::Cluster;
use tollgate::cluster::coordinator::Settings;
use tollgate::cluster::memory::MemoryStore;
use tollgate::cluster::protocol::{Batch, BatchAnswer, OnLoss};
use tollgate::cluster::store::{Store, StoreError};
use tollgate::gate::limit::Limit;
use tollgate::gate::reservation::Reservation;
use tollgate::proxy::SharedLimits;

/// How many seeds `make test` runs with each policy.
const SEEDS: u64 = 10;
const SEEDS_FULL: u64 = 200;
/// What time advances by.
const STEP: Duration = Duration::from_micros(250);
/// The runtime's timers tick each millisecond from its start. Whoever comes does so between two ticks.
const BETWEEN_TICKS: Duration = Duration::from_micros(130);
/// Turns that everybody has in a step: an answer wakes the client, which wakes requests, which want more, and so on.
const TURNS: usize = 8;
const EPISODES: u64 = 10;

#[test]
fn none_waits_longer_than_it_may_where_the_policy_is_closed() {
    none_waits_longer_than_it_may(OnLoss::Closed);
}

#[test]
fn none_waits_longer_than_it_may_where_the_policy_is_share() {
    none_waits_longer_than_it_may(OnLoss::Share);
}

#[test]
fn none_waits_longer_than_it_may_where_the_policy_is_local() {
    none_waits_longer_than_it_may(OnLoss::Local);
}

fn none_waits_longer_than_it_may(on_loss: OnLoss) {
    let full = std::env::var("TOLLGATE_PROOF").is_ok_and(|proof| proof == "full");
    let seeds = if full { SEEDS_FULL } else { SEEDS };
    let mut seen = Seen::default();
    for seed in 0..seeds {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        seen.add(runtime.block_on(World::run(on_loss, seed)));
    }
    println!("{on_loss:?}, {seeds} seeds: {seen:?}");
    seen.check(seeds);
}

/// What a store does with the calls of one gate.
#[derive(Clone, Copy, Debug)]
enum Mood {
    /// It does what it is told in half of that time, and has answered after all of it.
    Answers(Duration),
    /// What is sent to it vanishes.
    Gone,
    /// It does what it is told, and its answers vanish.
    Mute,
    /// The connection breaks after so long, before it has done anything.
    Breaks(Duration),
    /// The connection breaks after so long, and it has done what it was told.
    Forgets(Duration),
    /// What comes is held up until it is in another mood.
    Stopped,
    /// It does everything twice, and answers after so long.
    Repeats(Duration),
    /// Any of the others, by the call.
    Moody,
}

impl Mood {
    fn any(random: &mut Random, wait: Duration, lost_after: Duration) -> Mood {
        let after = random.one_of(&[
            Duration::ZERO,
            STEP,
            wait / 3,
            wait - STEP,
            wait,
            wait + STEP,
            wait * 3,
            lost_after - STEP,
            lost_after,
            lost_after * 2,
        ]);
        match random.between(0, 9) {
            0 => Mood::Gone,
            1 => Mood::Mute,
            2 => Mood::Breaks(after),
            3 => Mood::Forgets(after),
            4 => Mood::Stopped,
            5 => Mood::Repeats(after),
            6 => Mood::Moody,
            _ => Mood::Answers(after),
        }
    }
}

/// The store, as one gate meets it.
#[derive(Debug)]
struct Fickle {
    store: Arc<Mutex<MemoryStore>>,
    clock: Clock,
    mood: Mutex<Mood>,
    random: Mutex<Random>,
    wait: Duration,
    lost_after: Duration,
    /// What it says of its settings: nothing, an error, or that all is well.
    looks: Looks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looks {
    Fit,
    /// Not before so much time has passed.
    FitAfter(Duration),
    /// It is asked, and never says.
    Silent,
}

impl Fickle {
    fn carry_out(&self, batch: &Batch) -> BatchAnswer {
        let now_ms = self.clock.now().unix_ms as u64;
        self.store.lock().unwrap().exchange(batch, now_ms)
    }

    fn mood(&self) -> Mood {
        *self.mood.lock().unwrap()
    }
}

#[async_trait]
impl Store for Fickle {
    fn partitions(&self) -> u16 {
        1
    }

    async fn exchange(&self, _partition: u16, batch: &Batch) -> Result<BatchAnswer, StoreError> {
        let mut mood = self.mood();
        while let Mood::Moody = mood {
            mood = Mood::any(&mut self.random.lock().unwrap(), self.wait, self.lost_after);
        }
        let broken = Err(StoreError::Unreachable("the connection broke".into()));
        match mood {
            Mood::Answers(after) => {
                sleep(after / 2).await;
                let answer = self.carry_out(batch);
                sleep(after - after / 2).await;
                Ok(answer)
            }
            Mood::Gone => std::future::pending().await,
            Mood::Mute => {
                self.carry_out(batch);
                std::future::pending().await
            }
            Mood::Breaks(after) => {
                sleep(after).await;
                broken
            }
            Mood::Forgets(after) => {
                self.carry_out(batch);
                sleep(after).await;
                broken
            }
            Mood::Stopped => {
                while let Mood::Stopped = self.mood() {
                    sleep(STEP).await;
                }
                Ok(self.carry_out(batch))
            }
            Mood::Repeats(after) => {
                let answer = self.carry_out(batch);
                sleep(after).await;
                self.carry_out(batch);
                Ok(answer)
            }
            Mood::Moody => unreachable!("it has made up its mind"),
        }
    }

    async fn check(&self) -> Result<Vec<String>, StoreError> {
        match self.looks {
            Looks::Fit => Ok(vec![]),
            Looks::FitAfter(time) => {
                let now_ms = self.clock.now().unix_ms;
                if now_ms < START_MS + time.as_millis() as i64 {
                    return Err(StoreError::Unreachable("not there yet".into()));
                }
                Ok(vec![])
            }
            Looks::Silent => std::future::pending().await,
        }
    }
}

/// The shared counts on a machine of many processors: who wakes up because there are permits may find that somebody on
/// another one was faster, and has to wait again.
#[derive(Debug)]
struct Outrun {
    limits: Cluster,
    random: Mutex<Random>,
    wait: Duration,
}

#[async_trait]
impl SharedLimits for Outrun {
    fn want(&self, reservation: &Arc<Reservation>) {
        self.limits.want(reservation);
    }

    fn deadline(&self) -> Instant {
        self.limits.deadline()
    }

    async fn wait(&self, reservation: &Arc<Reservation>, deadline: Instant) -> bool {
        let outrun_after = {
            let mut random = self.random.lock().unwrap();
            let after = self.wait * random.between(0, 100) as u32 / 100;
            random.chance(30).then_some(after)
        };
        let waits = self.limits.wait(reservation, deadline);
        match outrun_after {
            Some(after) => tokio::time::timeout(after, waits).await.unwrap_or(true),
            None => waits.await,
        }
    }

    fn waited(&self, in_vain: bool) {
        self.limits.waited(in_vain);
    }
}

/// Two gates and their store.
struct World {
    random: Random,
    clock: Clock,
    store: Arc<Mutex<MemoryStore>>,
    wait: Duration,
    lost_after: Duration,
    gates: Vec<(SharingGate, Arc<Fickle>)>,
    requests: JoinSet<Asked>,
    trace: bool,
}

impl World {
    async fn run(on_loss: OnLoss, seed: u64) -> Seen {
        let mut random = Random(seed);
        let limit = random.one_of(&[1, 5, 100, 1_000, 100_000]);
        let limit = Limit::new(limit, random.one_of(&[1_000, 10_000])).unwrap();
        let lost_after = Duration::from_millis(random.one_of(&[100, 500]));
        let wait = Duration::from_millis(random.one_of(&[1, 5, 20, 50]));
        let (clock, store) = (Clock::manual(START_MS), Arc::new(Mutex::new(MemoryStore::new("first"))));
        let gates = (0..2).map(|number| {
            let fickle = Fickle {
                store: store.clone(),
                clock: clock.clone(),
                mood: Mutex::new(Mood::Answers(wait / 3)),
                random: Mutex::new(Random(seed ^ (0xf00 + number))),
                wait,
                lost_after,
                looks: match random.between(0, 9) {
                    0 => Looks::Silent,
                    1 | 2 => Looks::FitAfter(lost_after * 2),
                    _ => Looks::Fit,
                },
            };
            let settings = Settings {
                id: 1 + number,
                name: format!("gate-{number}").into(),
                on_loss,
                lost_after,
                max_clock_skew: Duration::from_millis(5),
                longest_window_ms: limit.window_ms(),
            };
            let fickle = Arc::new(fickle);
            let outrun = |limits| -> Arc<dyn SharedLimits> {
                let random = Mutex::new(Random(seed ^ (0xfa57 + number)));
                Arc::new(Outrun { limits, random, wait })
            };
            let gate = SharingGate::start(&settings, limit, wait, fickle.clone(), &clock, outrun);
            (gate, fickle)
        });
        let mut world = World {
            gates: gates.collect(),
            random,
            clock,
            store,
            wait,
            lost_after,
            requests: JoinSet::new(),
            trace: std::env::var("TOLLGATE_CLUSTER_SEED").is_ok(),
        };
        world.pass(BETWEEN_TICKS).await;
        world.live().await;
        world.end(on_loss, seed).await
    }

    /// One disorder after the other, under load.
    async fn live(&mut self) {
        for episode in 0..EPISODES {
            let lasting = Duration::from_millis(self.random.between(50, 600));
            if episode > 0 {
                self.befall();
            }
            for _ in 0..lasting.as_micros() / STEP.as_micros() {
                self.load();
                self.pass(STEP).await;
            }
        }
        // A gate that ends has requests to answer still.
        for (gate, _) in &mut self.gates {
            gate.begin_to_end();
        }
        for _ in 0..self.wait.as_micros() / STEP.as_micros() {
            self.load();
            self.pass(STEP).await;
        }
    }

    fn befall(&mut self) {
        for (_, store) in &self.gates {
            if self.random.chance(70) {
                let mood = Mood::any(&mut self.random, self.wait, self.lost_after);
                if self.trace {
                    println!("{} ms: {mood:?}", self.clock.now().unix_ms - START_MS);
                }
                *store.mood.lock().unwrap() = mood;
            }
        }
        match self.random.between(0, 9) {
            0 => self.store.lock().unwrap().flush(),
            1 => *self.store.lock().unwrap() = MemoryStore::new(&format!("{:x}", self.random.next())),
            _ => {}
        }
    }

    /// The requests of a step: one now and then, or a crowd that wants the same.
    fn load(&mut self) {
        let crowd = match self.random.between(0, 199) {
            0 => self.random.between(2, 40),
            1..=40 => 1,
            _ => return,
        };
        let gate = self.random.between(0, 1) as usize;
        let key = self.random.between(0, u64::from(KEYS) - 1) as u32;
        for _ in 0..crowd {
            self.requests.spawn(self.gates[gate].0.request(key));
        }
    }

    /// Both clocks go on together; then everybody has all the turns that they need.
    async fn pass(&self, time: Duration) {
        self.clock.advance(time);
        advance(time).await;
        for _ in 0..TURNS {
            tokio::task::yield_now().await;
        }
    }

    async fn end(mut self, on_loss: OnLoss, seed: u64) -> Seen {
        let mut seen = Seen::default();
        // Those that have come last, and the gates, which say goodbye.
        let mut left = (Duration::from_secs(3).as_micros() / STEP.as_micros()) as u64;
        while !self.requests.is_empty() || self.gates.iter().any(|(gate, _)| !gate.has_ended()) {
            self.pass(STEP).await;
            while let Some(asked) = self.requests.try_join_next() {
                seen.note(asked.unwrap(), self.wait);
            }
            left -= 1;
            assert!(left > 0, "{on_loss:?}, seed {seed}: {} unanswered", self.requests.len());
        }
        for (gate, _) in &self.gates {
            let status = gate.cluster.status();
            seen.calls += status.counts.asks;
            seen.shared += status.counts.shared;
            seen.identities += status.counts.identities;
            seen.longest_by_their_count = seen.longest_by_their_count.max(status.longest_wait);
            seen.over += u64::from(status.longest_wait > self.wait);
        }
        assert_eq!(
            seen.over, 0,
            "{on_loss:?}, seed {seed}: waited {:?} of {:?}, by the gate's count {:?}",
            seen.longest, self.wait, seen.longest_by_their_count
        );
        seen
    }
}

/// What was seen, so that it is known that the disorders struck.
#[derive(Debug, Default)]
struct Seen {
    requests: u64,
    passed_at_once: u64,
    passed_after_a_wait: u64,
    refused_at_once: u64,
    refused_before_the_end: u64,
    refused_at_the_end: u64,
    longest: Duration,
    longest_by_their_count: Duration,
    /// Those that waited longer than they may.
    over: u64,
    calls: u64,
    shared: u64,
    identities: u64,
}

impl Seen {
    fn note(&mut self, asked: Asked, wait: Duration) {
        self.requests += 1;
        let waited = asked.answered - asked.came;
        self.longest = self.longest.max(waited);
        self.over += u64::from(waited > wait);
        *match (asked.passed, waited) {
            (true, Duration::ZERO) => &mut self.passed_at_once,
            (true, _) => &mut self.passed_after_a_wait,
            (false, Duration::ZERO) => &mut self.refused_at_once,
            // Timers tick each millisecond, and none may be late.
            (false, waited) if waited + Duration::from_millis(1) > wait => &mut self.refused_at_the_end,
            (false, _) => &mut self.refused_before_the_end,
        } += 1;
    }

    fn add(&mut self, other: Seen) {
        self.requests += other.requests;
        self.passed_at_once += other.passed_at_once;
        self.passed_after_a_wait += other.passed_after_a_wait;
        self.refused_at_once += other.refused_at_once;
        self.refused_before_the_end += other.refused_before_the_end;
        self.refused_at_the_end += other.refused_at_the_end;
        self.longest = self.longest.max(other.longest);
        self.longest_by_their_count = self.longest_by_their_count.max(other.longest_by_their_count);
        self.over += other.over;
        self.calls += other.calls;
        self.shared += other.shared;
        self.identities += other.identities;
    }

    fn check(&self, seeds: u64) {
        for (what, seen, least) in [
            ("passed at once", self.passed_at_once, 20),
            ("passed after a wait", self.passed_after_a_wait, 20),
            ("refused at once", self.refused_at_once, 20),
            ("refused at the end of the wait", self.refused_at_the_end, 20),
            ("calls of the store", self.calls, 20),
            ("identities of the store", self.identities, 2),
        ] {
            assert!(seen > least * seeds, "{what}: {seen} over {seeds} seeds");
        }
    }
}
