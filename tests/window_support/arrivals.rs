//! When requests come, with what cost and under which limit: patterns that wear a rate limiter down.

use tollgate::gate::limit::Limit;

/// SplitMix64: all of the randomness, so that a seed repeats a history.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `bound` − 1, or 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A number in a range, its order of magnitude evenly spread.
    pub fn log_within(&mut self, low: u64, high: u64) -> u64 {
        let (low, high) = ((low as f64).ln(), (high as f64).ln());
        let unit = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        (low + unit * (high - low)).exp().round() as u64
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// Independent arrivals, at a third to ten times the limit's rate.
    Random,
    /// Bursts a nanosecond before, at and after the edges of sub-buckets.
    Edges,
    /// One client that does as it is told.
    LoneClient,
    /// A rate that climbs and drops.
    Sawtooth,
    /// Pauses around the window's length, then bursts.
    Gaps,
    /// A burst at the end of a fixed period, then a steady drip: the two-counter estimate's worst.
    BurstThenDrip,
    /// A clock that freezes, jumps ahead and falls back.
    UnsteadyClock,
    /// A limit lowered, raised and moved to larger windows in the middle of a burst.
    ChangingLimit,
}

impl Pattern {
    pub const ALL: [Pattern; 8] = [
        Pattern::Random,
        Pattern::Edges,
        Pattern::LoneClient,
        Pattern::Sawtooth,
        Pattern::Gaps,
        Pattern::BurstThenDrip,
        Pattern::UnsteadyClock,
        Pattern::ChangingLimit,
    ];
}

/// One history's arrivals.
pub struct Arrivals {
    pattern: Pattern,
    pub limit: Limit,
    pub now_ns: u64,
    rng: Rng,
    window_ns: u64,
    largest_cost: u64,
    /// The mean time between permits at the limit's rate.
    mean_ns: u64,
    burst_left: u64,
    phase: u64,
    wait_ns: u64,
}

impl Arrivals {
    pub fn new(pattern: Pattern, rng: &mut Rng) -> Self {
        let mut rng = Rng(rng.next());
        const EDGES: [u32; 14] = [
            1,
            2,
            3,
            62,
            63,
            64,
            100,
            1_023,
            1_024,
            5_000,
            32_767,
            32_768,
            Limit::MAX_PERMITS - 1,
            Limit::MAX_PERMITS,
        ];
        let permits = match rng.below(3) {
            0 => rng.log_within(1, u64::from(Limit::MAX_PERMITS)) as u32,
            _ => EDGES[rng.below(EDGES.len() as u64) as usize],
        };
        const LENGTHS: [u64; 7] = [
            1_000,
            1_001,
            10_000,
            60_000,
            3_600_000,
            86_400_000,
            Limit::MAX_WINDOW_MS,
        ];
        let window_ms = match rng.below(3) {
            0 => rng.log_within(1_000, Limit::MAX_WINDOW_MS),
            _ => LENGTHS[rng.below(LENGTHS.len() as u64) as usize],
        };
        let window_ns = window_ms * 1_000_000;
        // So that a limit of any size is reached several times in one history.
        let largest_cost = (u64::from(permits) / rng.within(10, 700)).max(1);
        let mut now_ns = rng.within(40 * 86_400, 400 * 86_400) * 1_000_000_000;
        if rng.one_in(2) {
            now_ns -= now_ns % window_ns;
        }
        let mean_ns = (window_ns / (u64::from(permits) * 2 / (largest_cost + 1)).max(1)).max(1);
        Arrivals {
            pattern,
            limit: Limit::new(permits, window_ms).unwrap(),
            now_ns,
            rng,
            window_ns,
            largest_cost,
            mean_ns,
            burst_left: 0,
            phase: 0,
            wait_ns: 0,
        }
    }

    pub fn moves_backwards(&self) -> bool {
        self.pattern == Pattern::UnsteadyClock
    }

    pub fn changes_limits(&self) -> bool {
        self.pattern == Pattern::ChangingLimit
    }

    /// The next request: the clock's reading and the cost, which is within the limit.
    pub fn next(&mut self) -> (u64, u32) {
        match self.pattern {
            Pattern::Random => self.pass_about(self.mean_ns / (1 + self.phase % 10)),
            Pattern::Edges => self.jump_to_an_edge(),
            Pattern::LoneClient => self.now_ns += std::mem::take(&mut self.wait_ns),
            Pattern::Sawtooth => {
                self.phase += 1;
                self.pass_about(self.mean_ns * 4 / (1 + self.phase % 64));
            }
            Pattern::Gaps => self.after_a_gap(),
            Pattern::BurstThenDrip => self.burst_then_drip(),
            Pattern::UnsteadyClock => self.unsteadily(),
            Pattern::ChangingLimit => {
                self.pass_about(self.mean_ns / 4);
                if self.rng.one_in(50) {
                    self.change_limit();
                }
            }
        }
        let cost = self
            .rng
            .within(1, self.largest_cost)
            .min(u64::from(self.limit.permits()));
        (self.now_ns, cost as u32)
    }

    pub fn granted(&mut self) {
        if self.rng.one_in(1_000) {
            self.phase = self.rng.next();
        }
    }

    pub fn refused(&mut self, retry_after_s: u32) {
        self.wait_ns = u64::from(retry_after_s) * 1_000_000_000;
    }

    /// Whether this refused client now waits as told, nobody else asking meanwhile.
    pub fn waits_it_out(&self, rng: &mut Rng) -> bool {
        match self.pattern {
            Pattern::LoneClient => rng.one_in(2),
            _ => rng.one_in(200),
        }
    }

    pub fn moved_to(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        self.wait_ns = 0;
    }

    fn pass_about(&mut self, mean_ns: u64) {
        self.now_ns += self.rng.below(2 * mean_ns + 1);
    }

    /// The edge `sub_buckets` after the present one's start, in nanoseconds, rounded up: the first of its own.
    fn edge(&self, sub_buckets: u64) -> u64 {
        let sixtieth = u128::from(self.window_ns);
        let epoch = u128::from(self.now_ns) * 60 / sixtieth + u128::from(sub_buckets);
        (epoch * sixtieth).div_ceil(60) as u64
    }

    fn jump_to_an_edge(&mut self) {
        if self.burst_left > 0 {
            self.burst_left -= 1;
            return;
        }
        let far = match self.rng.below(5) {
            0 => 1,
            1 => self.rng.within(1, 3),
            2 => 60,
            3 => 61,
            _ => self.rng.within(1, 130),
        };
        let edge = self.edge(far);
        self.now_ns = (edge + self.rng.below(3)).saturating_sub(1).max(self.now_ns);
        self.burst_left = self.burst();
    }

    /// How many requests come at once: up to what the whole limit takes, and some more.
    fn burst(&mut self) -> u64 {
        let all = u64::from(self.limit.permits()) * 2 / (self.largest_cost + 1) + 2;
        self.rng.below(all.min(400) + 1)
    }

    fn after_a_gap(&mut self) {
        if self.burst_left > 0 {
            self.burst_left -= 1;
            if self.rng.one_in(8) {
                self.pass_about(self.mean_ns / 8);
            }
            return;
        }
        let more = self.window_ns / 60;
        let gap = match self.rng.below(6) {
            0 => self.window_ns,
            1 => self.window_ns + more,
            2 => self.window_ns / 2,
            3 => self.window_ns * self.rng.within(2, 5),
            _ => self.rng.below(2 * self.window_ns),
        };
        self.now_ns += (gap + self.rng.below(3)).saturating_sub(1);
        self.burst_left = self.burst();
    }

    fn burst_then_drip(&mut self) {
        if self.burst_left > 0 {
            self.burst_left -= 1;
            return;
        }
        self.phase += 1;
        // A drip of 1,024 to a window, for a window and a half; then to the end of the next fixed period but one.
        if self.phase % 1_537 != 1 {
            self.now_ns += self.window_ns / 1_024;
        } else {
            let period = self.now_ns / self.window_ns + 2;
            self.now_ns = (period + 1) * self.window_ns - 1;
            self.burst_left = u64::from(self.limit.permits())
                .div_ceil(self.largest_cost.div_ceil(2))
                .min(1_500);
        }
    }

    fn unsteadily(&mut self) {
        match self.rng.below(40) {
            0..20 => {}
            20..34 => self.pass_about(self.mean_ns),
            34 => self.now_ns -= self.rng.below(self.window_ns / 60 + 2).min(self.now_ns),
            35 => self.now_ns -= self.rng.below(2 * self.window_ns).min(self.now_ns / 2),
            36 => self.now_ns += self.rng.below(self.window_ns),
            37 => self.now_ns += self.rng.below(3),
            38 => self.now_ns = self.now_ns.saturating_sub(self.rng.below(3)),
            _ => self.now_ns = self.edge(1) - self.rng.below(2),
        }
    }

    fn change_limit(&mut self) {
        let most = u64::from(Limit::MAX_PERMITS);
        let now = u64::from(self.limit.permits());
        let permits = match self.rng.below(4) {
            0 => now / 2,
            1 => now * 2,
            2 => self.largest_cost * self.rng.within(1, 100),
            _ => now + 1,
        };
        self.limit = Limit::new(permits.clamp(1, most) as u32, self.limit.window_ms()).unwrap();
    }
}
