//! The world: true time, gates with clocks of their own, messages on their way, a store that fails as planned.

use crate::plan::{Fault, Plan, Random, Spread};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use tollgate::cluster::coordinator::{Coordinator, Settings};
use tollgate::cluster::memory::MemoryStore;
use tollgate::cluster::protocol::{Batch, BatchAnswer};
use tollgate::gate::limit::Limit;
use tollgate::gate::reservation::{Reservation, Spend};

const MS: u64 = 1_000_000;
/// The store's clock at the beginning of true time.
const STORE_EPOCH_MS: i64 = 1_700_000_000_000;

/// What came of a plan.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Permits given, and given by a gate with an ideal memory of all.
    pub permits: u64,
    pub ideal: u64,
    pub calls: u64,
    pub granted: u64,
    pub waited: u64,
    pub most_in_a_window: u64,
    /// What may be in a window.
    pub bound: u64,
    pub lost_seen: bool,
    pub identities: u64,
}

impl Outcome {
    pub fn under_admission(&self) -> f64 {
        1.0 - self.permits as f64 / self.ideal.max(1) as f64
    }

    pub fn faults(&self, plan: &Plan) -> Vec<String> {
        let mut faults = vec![];
        if self.most_in_a_window > self.bound {
            faults.push(format!(
                "{} permits in a window, {} at most",
                self.most_in_a_window, self.bound
            ));
        }
        if plan.is_judged_for_under_admission() && self.under_admission() > 0.03 {
            faults.push(format!(
                "under-admission {:.4} ({} of {})",
                self.under_admission(),
                self.permits,
                self.ideal
            ));
        }
        faults
    }
}

enum Event {
    /// A batch comes to the store; its answer takes so long back, or is lost.
    Arrive {
        gate: usize,
        life: u32,
        flight: u64,
        batch: Batch,
        back_ns: Option<u64>,
    },
    Answer {
        gate: usize,
        life: u32,
        flight: u64,
        answer: Box<BatchAnswer>,
    },
    /// The gate no longer waits for the batch.
    TimeOut {
        gate: usize,
        life: u32,
        flight: u64,
    },
    Wake {
        gate: usize,
        life: u32,
    },
    Request {
        gate: usize,
    },
    Start {
        gate: usize,
    },
    Strike {
        fault: usize,
    },
    TakeCopy,
}

struct Gate {
    coordinator: Coordinator,
    reservation: Arc<Reservation>,
    slot: Option<u32>,
    life: u32,
    offset_ns: u64,
    rate_ppm: i64,
    /// Requests that wait, and until when (true time).
    waiting: VecDeque<(u64, u32)>,
    woken_at: u64,
    /// Its own permits, for when it counts alone.
    own: VecDeque<(u64, u32)>,
    alone: bool,
}

pub struct World<'a> {
    plan: &'a Plan,
    random: Random,
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64)>>,
    bodies: HashMap<u64, Event>,
    next_event: u64,
    gates: Vec<Option<Gate>>,
    lives: u32,
    store: MemoryStore,
    clock_ms: i64,
    copy: Option<MemoryStore>,
    /// The old store of a fail-over, and until when each gate talks to it.
    old: Option<(MemoryStore, i64, Vec<u64>)>,
    permits: Vec<(u64, u32)>,
    outcome: Outcome,
    share_bound: u64,
    name: Arc<str>,
    trace: bool,
}

pub fn run(plan: &Plan, trace: bool) -> Outcome {
    let world = World {
        plan,
        random: Random(plan.seed ^ 0xabcd),
        now: 0,
        events: BinaryHeap::new(),
        bodies: HashMap::new(),
        next_event: 0,
        gates: (0..plan.gates).map(|_| None).collect(),
        lives: 0,
        store: MemoryStore::new("run-0"),
        clock_ms: STORE_EPOCH_MS,
        copy: None,
        old: None,
        permits: vec![],
        outcome: Outcome::default(),
        share_bound: 0,
        name: "w".into(),
        trace,
    };
    world.play()
}

impl World<'_> {
    fn play(mut self) -> Outcome {
        let plan = self.plan;
        for (gate, start) in plan.starts.iter().enumerate() {
            self.at(start * MS, Event::Start { gate });
        }
        for (index, fault) in plan.faults.iter().enumerate() {
            match *fault {
                Fault::Failover { at, lag, .. } => {
                    self.at((at - lag.min(at)) * MS, Event::TakeCopy);
                    self.at(at * MS, Event::Strike { fault: index });
                }
                Fault::Flush { at } | Fault::Replace { at, .. } | Fault::Restart { at, .. } => {
                    self.at(at * MS, Event::Strike { fault: index });
                }
                _ => {}
            }
        }
        let demand = self.demand();
        for (at, gate) in &demand {
            self.at(*at, Event::Request { gate: *gate });
        }
        let end = plan.to_ms * MS + 20 * MS;
        let mut slept = false;
        while let Some(Reverse((at, number))) = self.events.pop() {
            let Some(event) = self.bodies.remove(&number) else {
                continue;
            };
            // Everything that was under way comes after the sleep.
            if let Some(sleep) = plan.sleep_at_ms
                && !slept
                && at > sleep * MS
            {
                slept = true;
                let by = plan.window_ms * MS - 1_000 * MS;
                self.events = self
                    .events
                    .drain()
                    .map(|Reverse((at, n))| Reverse((at + by, n)))
                    .collect();
                self.bodies.insert(number, event);
                self.events.push(Reverse((at + by, number)));
                for gate in self.gates.iter_mut().flatten() {
                    gate.waiting.clear();
                }
                continue;
            }
            if !slept && at > end {
                break;
            }
            if slept && at > end + plan.window_ms * MS {
                break;
            }
            self.now = at;
            self.handle(event);
        }
        self.finish(&demand, slept)
    }

    /// When requests come, and where.
    fn demand(&mut self) -> Vec<(u64, usize)> {
        let plan = self.plan;
        let per_ns = plan.load * f64::from(plan.limit) / f64::from(plan.cost) / (plan.window_ms * MS) as f64;
        let (mut at, mut all) = (plan.from_ms as f64 * MS as f64, vec![]);
        while at < (plan.to_ms * MS) as f64 && all.len() < 100_000 {
            let unit = (self.random.next() >> 11) as f64 / (1u64 << 53) as f64;
            at += -(1.0 - unit).ln() / per_ns;
            if at >= (plan.to_ms * MS) as f64 {
                break;
            }
            let third = (plan.window_ms * MS / 3) as f64;
            let gate = match plan.spread {
                Spread::Even => self.random.next() as usize % plan.gates,
                Spread::One => plan.gates - 1,
                Spread::Rotating => (at / third) as usize % plan.gates,
            };
            let burst = if self.random.chance(2) { 10 } else { 1 };
            all.extend((0..burst).map(|_| (at as u64, gate)));
        }
        all
    }

    fn at(&mut self, time: u64, event: Event) {
        self.next_event += 1;
        self.events.push(Reverse((time, self.next_event)));
        self.bodies.insert(self.next_event, event);
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.3} ms  {}", self.now as f64 / MS as f64, what());
        }
    }

    /// Until when the gate stands still.
    fn paused_until(&self, which: usize) -> Option<u64> {
        let mut until = None;
        for fault in &self.plan.faults {
            if let Fault::Pause { gate, from, to } = *fault
                && gate == which
                && (from * MS..to * MS).contains(&self.now)
            {
                until = until.max(Some(to * MS));
            }
        }
        until
    }

    fn is_cut(&self, which: usize) -> bool {
        self.plan.faults.iter().any(|fault| {
            matches!(*fault, Fault::Cut { gate, from, to } if gate == which && (from * MS..to * MS).contains(&self.now))
        })
    }

    fn stalled_until(&self) -> Option<u64> {
        let stalls = self.plan.faults.iter().filter_map(|fault| match *fault {
            Fault::Stall { from, to } if (from * MS..to * MS).contains(&self.now) => Some(to * MS),
            _ => None,
        });
        stalls.max()
    }

    fn handle(&mut self, event: Event) {
        // A gate that stands still does nothing; what concerns it comes later.
        let concerned = match &event {
            Event::Answer { gate, .. }
            | Event::TimeOut { gate, .. }
            | Event::Wake { gate, .. }
            | Event::Start { gate } => Some(*gate),
            _ => None,
        };
        if let Some(until) = concerned.and_then(|gate| self.paused_until(gate)) {
            self.at(until, event);
            return;
        }
        match event {
            Event::Start { gate } => self.start(gate),
            Event::Request { gate } => {
                if self.paused_until(gate).is_none() {
                    self.request(gate, self.plan.cost, None);
                    self.wake_soon(gate);
                }
            }
            Event::Wake { gate, life } => {
                if self.is_alive(gate, life) {
                    self.drive(gate);
                }
            }
            Event::Arrive {
                gate,
                life,
                flight,
                batch,
                back_ns,
            } => {
                if self.is_cut(gate) {
                    return;
                }
                if let Some(until) = self.stalled_until() {
                    self.at(
                        until,
                        Event::Arrive {
                            gate,
                            life,
                            flight,
                            batch,
                            back_ns,
                        },
                    );
                    return;
                }
                let true_ms = (self.now / MS) as i64;
                let answer = match &mut self.old {
                    Some((old, clock_ms, until)) if self.now < until[gate] => {
                        old.exchange(&batch, (true_ms + *clock_ms) as u64)
                    }
                    _ => self.store.exchange(&batch, (true_ms + self.clock_ms) as u64),
                };
                self.say(|| format!("store: gate {gate} flight {flight} {batch:?} -> {answer:?}"));
                if let Some(back_ns) = back_ns {
                    let answer = Box::new(answer);
                    self.at(
                        self.now + back_ns,
                        Event::Answer {
                            gate,
                            life,
                            flight,
                            answer,
                        },
                    );
                }
            }
            Event::Answer {
                gate,
                life,
                flight,
                answer,
            } => {
                if self.is_alive(gate, life) && !self.is_cut(gate) {
                    self.answered(gate, flight, Some(&answer));
                }
            }
            Event::TimeOut { gate, life, flight } => {
                if self.is_alive(gate, life) {
                    self.answered(gate, flight, None);
                }
            }
            Event::TakeCopy => self.copy = Some(self.store.clone()),
            Event::Strike { fault } => self.strike(fault),
        }
    }

    fn is_alive(&self, gate: usize, life: u32) -> bool {
        self.gates[gate].as_ref().is_some_and(|gate| gate.life == life)
    }

    fn strike(&mut self, fault: usize) {
        let fault = self.plan.faults[fault];
        self.say(|| format!("{fault:?}"));
        match fault {
            Fault::Restart { gate, after, .. } => {
                if let Some(dead) = self.gates[gate].take() {
                    self.bury(dead);
                    self.at(self.now + after * MS, Event::Start { gate });
                }
            }
            Fault::Failover {
                found_within, clock_ms, ..
            } => {
                let mut copy = self.copy.clone().unwrap_or_else(|| self.store.clone());
                copy.run_id = format!("run-{}", self.now);
                let until = (0..self.plan.gates)
                    .map(|_| self.now + self.random.between(0, found_within) * MS)
                    .collect();
                let old = std::mem::replace(&mut self.store, copy);
                self.old = Some((old, self.clock_ms, until));
                self.clock_ms = STORE_EPOCH_MS + clock_ms;
            }
            Fault::Flush { .. } => self.store.flush(),
            Fault::Replace { clock_ms, .. } => {
                self.store = MemoryStore::new(&format!("run-{}", self.now));
                self.clock_ms = STORE_EPOCH_MS + clock_ms;
            }
            _ => {}
        }
    }

    fn start(&mut self, which: usize) {
        if self.gates[which].is_some() {
            return;
        }
        let plan = self.plan;
        self.lives += 1;
        let offset_ns = self.random.between(1_000, 1 << 45);
        let rate_ppm = self.random.between(0, 200) as i64 - 100;
        let settings = Settings {
            id: self.random.next(),
            name: format!("gate-{which}").into(),
            on_loss: plan.on_loss,
            lost_after: plan.lost_after,
            max_clock_skew: std::time::Duration::from_millis(plan.skew_ms),
            longest_window_ms: plan.window_ms,
        };
        let local = local(self.now, offset_ns, rate_ppm);
        let mut coordinator = Coordinator::new(settings, local);
        let reservation = Arc::new(Reservation::new(
            "key",
            "tier",
            Limit::new(plan.limit, plan.window_ms).unwrap(),
        ));
        let slot = coordinator.open(self.name.clone(), plan.window_ms, reservation.clone(), local);
        self.gates[which] = Some(Gate {
            coordinator,
            reservation,
            slot: Some(slot),
            life: self.lives,
            offset_ns,
            rate_ppm,
            waiting: VecDeque::new(),
            woken_at: 0,
            own: VecDeque::new(),
            alone: false,
        });
        self.drive(which);
    }

    fn bury(&mut self, gate: Gate) {
        let counts = gate.coordinator.counts();
        self.outcome.calls += counts.asks;
        self.outcome.granted += counts.granted;
        self.outcome.identities = self.outcome.identities.max(counts.identities);
        if counts.shared > 0 {
            self.share_bound += u64::from(self.plan.limit.div_ceil(counts.fewest_gates));
        }
        self.outcome.lost_seen |= counts.shared > 0 || gate.alone;
        if gate.alone {
            self.share_bound += u64::from(self.plan.limit);
        }
    }

    /// A request at a gate, or another look of one that waits until `deadline`.
    fn request(&mut self, which: usize, cost: u32, deadline: Option<u64>) {
        let (plan, now) = (self.plan, self.now);
        let Some(gate) = &mut self.gates[which] else { return };
        let local = local(now, gate.offset_ns, gate.rate_ppm);
        let spent = gate.reservation.spend(plan.limit, cost, local);
        let (admitted, ask) = match spend_of(spent) {
            Some(ask) => (matches!(spent, Spend::Spent { .. }), ask),
            None => {
                gate.alone = true;
                while gate
                    .own
                    .front()
                    .is_some_and(|(at, _)| at + plan.window_ms * MS * 61 / 60 <= now)
                {
                    gate.own.pop_front();
                }
                let own: u32 = gate.own.iter().map(|(_, n)| n).sum();
                let fits = own + cost <= plan.limit;
                if fits {
                    gate.reservation.spent_alone(cost);
                }
                (fits, false)
            }
        };
        if admitted {
            gate.own.push_back((now, cost));
            self.permits.push((now, cost));
        } else if matches!(spent, Spend::Dry { .. }) {
            let deadline = deadline.unwrap_or(now + plan.wait.as_nanos() as u64);
            if now < deadline {
                if deadline == now + plan.wait.as_nanos() as u64 {
                    self.outcome.waited += 1;
                }
                gate.reservation.wait(cost);
                gate.waiting.push_back((deadline, cost));
            }
        }
        if !admitted {
            self.say(|| format!("gate {which} has no permit: {spent:?}, {deadline:?}"));
        }
        if ask {
            self.want(which, local);
        }
    }

    fn want(&mut self, which: usize, local: u64) {
        let (plan, name) = (self.plan, self.name.clone());
        let Some(gate) = &mut self.gates[which] else { return };
        let slot = match gate.slot {
            Some(slot) if gate.coordinator.want(slot, &gate.reservation, local) => slot,
            _ => {
                let slot = gate
                    .coordinator
                    .open(name, plan.window_ms, gate.reservation.clone(), local);
                gate.coordinator.want(slot, &gate.reservation, local);
                slot
            }
        };
        gate.slot = Some(slot);
        if gate.coordinator.is_lost(plan.window_ms, local) {
            self.outcome.lost_seen = true;
        }
    }

    fn answered(&mut self, which: usize, flight: u64, answer: Option<&BatchAnswer>) {
        let now = self.now;
        if let Some(gate) = &mut self.gates[which] {
            let local = local(now, gate.offset_ns, gate.rate_ppm);
            gate.coordinator.answered(flight, answer, local);
        }
        self.drive(which);
    }

    /// Lets a gate do what it has to: waiting requests look again, batches go out.
    fn drive(&mut self, which: usize) {
        let (plan, now) = (self.plan, self.now);
        let Some(gate) = &mut self.gates[which] else { return };
        let waiting = std::mem::take(&mut gate.waiting);
        for (deadline, cost) in waiting {
            let Some(gate) = &mut self.gates[which] else { return };
            let local = local(now, gate.offset_ns, gate.rate_ppm);
            gate.reservation.waited(cost);
            if now > deadline {
                self.say(|| format!("gate {which} refuses: waited in vain"));
                continue;
            }
            if gate.reservation.is_decided(local) || plan.cost > 1 {
                self.request(which, cost, Some(deadline));
            } else {
                gate.reservation.wait(cost);
                gate.waiting.push_back((deadline, cost));
            }
        }
        let Some(gate) = &mut self.gates[which] else { return };
        let local_now = local(now, gate.offset_ns, gate.rate_ppm);
        gate.coordinator.tick(local_now);
        let (life, mut out) = (gate.life, vec![]);
        while let Some(sent) = gate.coordinator.next_batch(local_now) {
            out.push(sent);
        }
        let due = gate.coordinator.next_due_ns().max(local_now + 100_000);
        let wake = now + (due - local_now).min(3_600_000 * MS);
        // One that comes anyway is as good.
        let needs_wake = gate.woken_at <= now || wake < gate.woken_at;
        if needs_wake {
            gate.woken_at = wake;
        }
        if needs_wake {
            self.at(wake, Event::Wake { gate: which, life });
        }
        for (flight, batch) in out {
            self.send(which, life, flight, batch);
        }
    }

    /// The refiller runs beside the requests: it takes some microseconds to see what they want.
    fn wake_soon(&mut self, which: usize) {
        let at = self.now + 30_000;
        if let Some(gate) = &mut self.gates[which]
            && (gate.woken_at <= self.now || gate.woken_at > at)
        {
            gate.woken_at = at;
            let life = gate.life;
            self.at(at, Event::Wake { gate: which, life });
        }
    }

    fn send(&mut self, gate: usize, life: u32, flight: u64, batch: Batch) {
        let (plan, now) = (self.plan, self.now);
        self.at(
            now + plan.lost_after.as_nanos() as u64,
            Event::TimeOut { gate, life, flight },
        );
        let copies = 1 + u64::from(self.random.chance(plan.doubled));
        for copy in 0..copies {
            let mut there = self.random.between(plan.delay_us.0, plan.delay_us.1) * 1_000;
            let back = self.random.between(plan.delay_us.0, plan.delay_us.1) * 1_000;
            if copy == 1 && self.random.chance(30) {
                there += self.random.between(0, 2_000) * MS;
            }
            let back_ns = (!self.random.chance(plan.lost)).then_some(back);
            if !self.is_cut(gate) && !self.random.chance(plan.lost) {
                let batch = batch.clone();
                self.at(
                    now + there,
                    Event::Arrive {
                        gate,
                        life,
                        flight,
                        batch,
                        back_ns,
                    },
                );
            }
        }
    }

    fn finish(mut self, demand: &[(u64, usize)], slept: bool) -> Outcome {
        for which in 0..self.gates.len() {
            if let Some(gate) = self.gates[which].take() {
                self.bury(gate);
            }
        }
        let plan = self.plan;
        let window = plan.window_ms * MS;
        let mut outcome = self.outcome;
        outcome.permits = self.permits.iter().map(|(_, n)| u64::from(*n)).sum();
        outcome.bound = u64::from(plan.limit) + self.share_bound;
        let (mut first, mut sum) = (0, 0);
        for (at, n) in &self.permits {
            sum += u64::from(*n);
            while self.permits[first].0 + window <= *at {
                sum -= u64::from(self.permits[first].1);
                first += 1;
            }
            outcome.most_in_a_window = outcome.most_in_a_window.max(sum);
        }
        // The ideal: one memory, no network, every permit counted for W to the nanosecond.
        let (mut log, mut in_window): (VecDeque<u64>, u64) = (VecDeque::new(), 0);
        if !slept {
            for (at, _) in demand {
                while log.front().is_some_and(|old| old + window <= *at) {
                    log.pop_front();
                    in_window -= u64::from(plan.cost);
                }
                if in_window + u64::from(plan.cost) <= u64::from(plan.limit) {
                    log.push_back(*at);
                    in_window += u64::from(plan.cost);
                    outcome.ideal += u64::from(plan.cost);
                }
            }
        }
        outcome
    }
}

/// Whether the refiller is to be told; `None` where the window's own count decides.
fn spend_of(spend: Spend) -> Option<bool> {
    match spend {
        Spend::Spent { ask } | Spend::Dry { ask } => Some(ask),
        Spend::Nothing => Some(false),
        Spend::Alone => None,
    }
}

/// A gate's clock: it starts anywhere, and is up to 100 millionths fast or slow.
fn local(now: u64, offset_ns: u64, rate_ppm: i64) -> u64 {
    (now as i64 + now as i64 / 1_000_000 * rate_ppm) as u64 + offset_ns
}
