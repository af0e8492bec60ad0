//! What is to happen in one seed.

use std::time::Duration;
use tollgate::cluster::protocol::OnLoss;

/// A small generator of its own, so that a seed means the same for ever (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `from` to `to`, both included.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from + 1)
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    pub fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.next() as usize % of.len()]
    }
}

/// Where demand comes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    Even,
    One,
    /// On one gate after the other, for a third of a window each.
    Rotating,
}

/// What befalls whom, from when to when. Milliseconds of true time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The store takes nothing up; what comes waits.
    Stall { from: u64, to: u64 },
    /// The store and the gate do not reach each other.
    Cut { gate: usize, from: u64, to: u64 },
    /// The gate stands still.
    Pause { gate: usize, from: u64, to: u64 },
    /// The gate is killed, and started again some time later.
    Restart { gate: usize, at: u64, after: u64 },
    /// A copy that lags takes over; each gate finds it within some time, and talks to the old one till then.
    Failover {
        at: u64,
        lag: u64,
        found_within: u64,
        clock_ms: i64,
    },
    /// The store loses its content.
    Flush { at: u64 },
    /// Another, empty store takes its place.
    Replace { at: u64, clock_ms: i64 },
}

/// A seed, unfolded.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    /// Nothing fails, and demand has no sudden peaks.
    pub calm: bool,
    pub gates: usize,
    pub limit: u32,
    pub window_ms: u64,
    pub on_loss: OnLoss,
    pub spread: Spread,
    /// Demand in permits of the limit per window.
    pub load: f64,
    /// Permits that a request costs. One, as in a real gate, where the ideal is what is looked at: parts of a dear request's
    /// cost that lie at many gates are of use to none. Else a hundredth of a large limit, to keep the runs short.
    pub cost: u32,
    /// One way, in microseconds.
    pub delay_us: (u64, u64),
    /// In a hundred.
    pub lost: u64,
    pub doubled: u64,
    pub wait: Duration,
    pub lost_after: Duration,
    pub skew_ms: u64,
    pub faults: Vec<Fault>,
    /// When each gate first starts.
    pub starts: Vec<u64>,
    /// Demand from this time on, until the end.
    pub from_ms: u64,
    pub to_ms: u64,
    /// An hour in which nothing moves, after this time.
    pub sleep_at_ms: Option<u64>,
}

impl Plan {
    pub fn of(seed: u64) -> Plan {
        let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x1234_5678);
        let calm = random.chance(20);
        let gates = random.one_of(&[1, 2, 2, 4, 4, 8]);
        let limit = if calm {
            random.one_of(&[100, 100, 100, 100, 100, 100, 1_000, 1_000, 1_000, 5_000])
        } else {
            random.one_of(&[1, 5, 100, 1_000, 5_000])
        };
        let window_ms = random.one_of(&[1_000, 1_000, 1_000, 1_000, 1_000, 1_000, 10_000, 10_000, 3_600_000]);
        let on_loss = random.one_of(&[
            OnLoss::Share,
            OnLoss::Share,
            OnLoss::Closed,
            OnLoss::Closed,
            OnLoss::Closed,
            OnLoss::Local,
        ]);
        let cost = if calm { 1 } else { (limit / 100).max(1) };
        let load = if limit < 100 {
            random.one_of(&[2.0, 10.0, 50.0])
        } else {
            random.one_of(&[0.7, 1.2, 2.0, 2.0, 4.0])
        };
        // So many that one burst, refused because it comes a sub-bucket too early, is a small part of the whole.
        let windows = match limit {
            100 if calm => 6,
            _ if calm => 3,
            _ => random.between(2, 3),
        };
        let from_ms = 1_500;
        // Of an hour, half a minute is enough to use it up; its end comes after a sleep.
        let (to_ms, load) = match window_ms {
            3_600_000 => (from_ms + 6_000, load * 600.0),
            _ => (from_ms + windows * window_ms, load),
        };
        let delay_us = if calm {
            random.one_of(&[(50, 150), (200, 600), (500, 1_200), (1_000, 2_400), (2_400, 2_450)])
        } else {
            random.one_of(&[
                (50, 150),
                (200, 2_000),
                (1_000, 30_000),
                (100_000, 180_000),
                (100, 400_000),
            ])
        };
        let mut plan = Plan {
            seed,
            calm,
            gates,
            limit,
            window_ms,
            on_loss,
            spread: random.one_of(&[Spread::Even, Spread::Even, Spread::One, Spread::Rotating]),
            load,
            cost,
            delay_us,
            lost: if calm { 0 } else { random.one_of(&[0, 0, 1, 10]) },
            doubled: if calm { 0 } else { random.one_of(&[0, 5, 20]) },
            wait: Duration::from_millis(5),
            lost_after: Duration::from_millis(500),
            skew_ms: random.one_of(&[0, 5, 50]),
            faults: vec![],
            starts: (0..gates).map(|_| random.between(0, 50)).collect(),
            from_ms,
            to_ms,
            sleep_at_ms: (window_ms == 3_600_000 && random.chance(50)).then_some(from_ms + 4_000),
        };
        if !calm {
            plan.add_faults(&mut random);
        }
        plan
    }

    /// Whether nothing fails, and two round trips are within the wait: a request that comes just after a call was sent
    /// waits for that one and its own.
    pub fn is_judged_for_under_admission(&self) -> bool {
        self.calm && 2 * self.delay_us.1 < self.wait.as_micros() as u64
    }

    fn add_faults(&mut self, random: &mut Random) {
        let (from, to) = (self.from_ms, self.to_ms);
        let span = |random: &mut Random| {
            let start = random.between(from - 500, to);
            let long = random.one_of(&[30, 300, 1_000, 2_500]);
            (start, start + random.between(1, long))
        };
        let loses_content = random.chance(40);
        // Gates that know what was before a loss: at least one of them stays in touch (see `members.rs`).
        let keeper = 0;
        for _ in 0..random.between(0, 4) {
            let gate = random.between(u64::from(loses_content), self.gates as u64 - u64::from(self.gates > 1)) as usize
                % self.gates;
            let (from, to) = span(random);
            let fault = match random.between(0, 9) {
                0..=1 => Fault::Stall { from, to },
                2..=4 => Fault::Cut { gate, from, to },
                5..=6 => Fault::Pause { gate, from, to },
                _ => Fault::Restart {
                    gate,
                    at: from,
                    after: random.between(1, 1_000),
                },
            };
            let strikes_keeper = match fault {
                Fault::Cut { gate, .. } | Fault::Pause { gate, .. } | Fault::Restart { gate, .. } => gate == keeper,
                _ => false,
            };
            if !(loses_content && strikes_keeper) {
                self.faults.push(fault);
            }
        }
        if loses_content {
            for _ in 0..random.between(1, 2) {
                let at = random.between(from, to);
                let clock_ms = random.between(0, 2 * self.skew_ms) as i64 - self.skew_ms as i64;
                self.faults.push(match random.between(0, 2) {
                    0 => Fault::Failover {
                        at,
                        lag: random.one_of(&[0, 5, 100, 1_000]),
                        found_within: random.one_of(&[1, 100, 700]),
                        clock_ms: clock_ms / 2,
                    },
                    1 => Fault::Flush { at },
                    _ => Fault::Replace {
                        at,
                        clock_ms: clock_ms / 2,
                    },
                });
            }
        }
        // Late joiners.
        for gate in 1..self.gates {
            if random.chance(15) {
                self.starts[gate] = random.between(from, to);
            }
        }
    }
}
