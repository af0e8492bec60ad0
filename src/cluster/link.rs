//! The way to the store: whether it leads anywhere, how long an answer takes, when to say hello; and since when the store
//! is lost.

use super::ledger::MS;
use std::time::Duration;

/// What is known of the way to the store, from the batches that had an answer and those that had none.
#[derive(Debug)]
pub(super) struct Link {
    lost_after_ns: u64,
    hello_due_ns: u64,
    list_due_ns: u64,
    /// The last exchange failed: look, and send nothing else.
    is_down: bool,
    /// When the latest exchange began that had an answer.
    reached_ns: u64,
    /// The content of the store has no name yet.
    is_nameless: bool,
    round_trip_ns: u64,
    /// How far round trips are from their mean, in the mean.
    round_trip_varies_ns: u64,
}

/// Since when no grant has counted, by length of window: the list of gates may be good for short ones before it is for
/// long ones.
#[derive(Debug)]
pub(super) struct Loss {
    lost_after_ns: u64,
    started_ns: u64,
    /// When grants last counted, by length of window.
    usable_ns: Vec<(u64, u64)>,
}

impl Link {
    /// To a store that nothing is known of: the first hello is due.
    pub fn new(lost_after: Duration, now_ns: u64) -> Self {
        Link {
            lost_after_ns: lost_after.as_nanos() as u64,
            hello_due_ns: now_ns,
            list_due_ns: now_ns,
            is_down: false,
            reached_ns: 0,
            is_nameless: false,
            round_trip_ns: MS,
            round_trip_varies_ns: MS,
        }
    }

    /// The store cannot be reached: look whether it is back, and send nothing else.
    pub fn is_down(&self) -> bool {
        self.is_down
    }

    /// The content of the store was found to have no name yet.
    pub fn is_nameless(&self) -> bool {
        self.is_nameless
    }

    /// The mean of the latest.
    pub fn round_trip_ns(&self) -> u64 {
        self.round_trip_ns
    }

    /// Hardly any answer takes longer.
    pub fn answer_within_ns(&self) -> u64 {
        self.round_trip_ns + 4 * self.round_trip_varies_ns
    }

    /// How often a gate says that it lives: often enough that silence means loss.
    pub fn hello_every_ns(&self) -> u64 {
        (self.lost_after_ns / 3).clamp(5 * MS, 1_000 * MS)
    }

    /// How often a gate looks for a store that it cannot reach.
    fn look_every_ns(&self) -> u64 {
        (self.lost_after_ns / 5).clamp(5 * MS, 200 * MS)
    }

    /// When the next hello is to be said.
    pub fn hello_due_ns(&self) -> u64 {
        self.hello_due_ns
    }

    /// There are news for the others, or they have some.
    pub fn hello_at_once(&mut self, now_ns: u64) {
        self.hello_due_ns = now_ns;
    }

    /// Others wait for this gate, or it waits for others.
    pub fn hello_soon(&mut self, now_ns: u64) {
        self.hello_due_ns = self.hello_due_ns.min(now_ns + HELLO_SOON_NS);
    }

    /// A hello is said now.
    pub fn hello_goes(&mut self, now_ns: u64) {
        let pause_ns = if self.is_down {
            self.look_every_ns()
        } else {
            self.hello_every_ns()
        };
        self.hello_due_ns = now_ns + pause_ns;
    }

    /// The whole list of gates is to be heard again.
    pub fn is_list_due(&self, now_ns: u64) -> bool {
        now_ns >= self.list_due_ns
    }

    /// The whole list is asked for now.
    pub fn list_goes(&mut self, now_ns: u64) {
        self.list_due_ns = now_ns + LIST_EVERY_NS;
    }

    /// What was sent at `sent_ns` has an answer.
    pub fn answered(&mut self, sent_ns: u64, has_name: bool, now_ns: u64) {
        self.is_down = false;
        self.reached_ns = self.reached_ns.max(sent_ns);
        let took_ns = now_ns - sent_ns;
        // As TCP does it (RFC 6298).
        let off_ns = self.round_trip_ns.abs_diff(took_ns);
        self.round_trip_varies_ns = (self.round_trip_varies_ns * 3 + off_ns) / 4;
        self.round_trip_ns = (self.round_trip_ns * 7 + took_ns) / 8;
        self.is_nameless = !has_name;
        if self.is_nameless {
            self.hello_at_once(now_ns);
        }
    }

    /// What was sent at `sent_ns` has none.
    pub fn failed(&mut self, sent_ns: u64, now_ns: u64) {
        // It was lost with a connection, and others have got through since.
        let is_old_news = sent_ns < self.reached_ns;
        if !is_old_news && !self.is_down {
            self.is_down = true;
            self.hello_at_once(now_ns);
        }
    }
}

impl Loss {
    /// Nothing has counted yet, and the gate starts now.
    pub fn new(lost_after: Duration, now_ns: u64) -> Self {
        Loss {
            lost_after_ns: lost_after.as_nanos() as u64,
            started_ns: now_ns,
            usable_ns: vec![],
        }
    }

    /// There are windows of this length from now on.
    pub fn begin(&mut self, window_ms: u64, now_ns: u64) {
        if !self.windows().any(|window| window == window_ms) {
            self.usable_ns.push((window_ms, now_ns));
        }
    }

    /// The lengths of windows that there are.
    pub fn windows(&self) -> impl Iterator<Item = u64> {
        self.usable_ns.iter().map(|(window_ms, _)| *window_ms)
    }

    /// Something came of a batch; grants count for the windows that `grants_count` says. Answers whether that is all.
    pub fn note(&mut self, now_ns: u64, grants_count: impl Fn(u64) -> bool) -> bool {
        let mut all_count = true;
        for (window_ms, at_ns) in &mut self.usable_ns {
            if grants_count(*window_ms) {
                *at_ns = now_ns;
            } else {
                all_count = false;
            }
        }
        all_count
    }

    /// For windows of this length no grant has counted for too long.
    pub fn is_lost(&self, window_ms: u64, now_ns: u64) -> bool {
        let usable = self.usable_ns.iter().find(|(window, _)| *window == window_ms);
        let since_ns = usable.map_or(self.started_ns, |(_, at_ns)| *at_ns);
        now_ns > since_ns + self.lost_after_ns
    }
}

/// How often a hello is said while others wait for it, or it waits for others.
pub(super) const HELLO_SOON_NS: u64 = 20 * MS;
/// How often the whole list is heard, though it has not changed: so that silence is noticed.
const LIST_EVERY_NS: u64 = 5_000 * MS;
