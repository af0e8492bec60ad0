//! One window at this gate: what it has spent and holds, what it asks for, and what it makes of the answer.

use super::protocol::{Answer, Ask, FieldId, Grant, History, buckets};
use crate::gate::reservation::Reservation;
use std::collections::VecDeque;
use std::sync::Arc;

/// Nanoseconds in a millisecond.
pub(super) const MS: u64 = 1_000_000;

/// The books of one window.
#[derive(Debug)]
pub(super) struct Ledger {
    pub name: Arc<str>,
    pub window_ms: u64,
    pub reservation: Arc<Reservation>,
    /// The identity of the store, by number, that knows all of it.
    pub generation: u64,
    /// The latest identity that it has met: no answer of an earlier one counts any more.
    pub met: u64,
    /// Somebody wants more.
    pub wanted: bool,
    /// Somebody wanted more while a call was under way already.
    pub crowded: bool,
    /// It waits in the queue of those to be asked for.
    pub queued: bool,
    /// The store may not have heard the last call: it is to be told again.
    pub unheard: bool,
    /// The calls under way, oldest first.
    pending: VecDeque<Pending>,
    /// When more was last wanted.
    pub active_ns: u64,
    /// The gate ends: what is held, and what is yet to come, is given back.
    ended: bool,
    id: FieldId,
    sequence: u64,
    /// The latest call that was answered.
    answered: u64,
    /// All that the store ever granted, as far as it was heard.
    heard: u64,
    /// All that was ever put into the reservation, less what was taken back.
    granted: u64,
    /// What the reservation had counted alone before this ledger began.
    alone_before: u64,
    /// What was spent, by the store's sub-buckets, as far as the store has told them.
    history: VecDeque<(u64, u64)>,
    /// How much of what was spent is in the history, or was.
    base: u64,
    /// The sub-bucket that what is held counts in.
    label: u64,
    /// Permits given that no label bounds, because no store granted them: all, and those that the store was told of.
    unbounded: u64,
    unbounded_told: u64,
    /// What is left in the reservation is of the share.
    pub holds_share: bool,
    /// The store has heard of this id.
    known: bool,
    /// How many permits are held at most.
    slice: u32,
    /// When it was last looked at.
    sized_ns: Option<u64>,
    /// What counted over all gates, and when that was heard.
    total: i64,
    heard_ns: Option<u64>,
    /// Permits given out of the share while the store was lost, and until when they could be spent.
    shared: VecDeque<(u64, u32)>,
}

/// A call under way.
#[derive(Clone, Copy, Debug)]
struct Pending {
    sequence: u64,
    sent_ns: u64,
    generation: u64,
    spent: u64,
    want: u32,
    /// What was heard to have been granted when it was sent.
    heard: u64,
    unbounded: u64,
}

/// What came of a call.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Heard {
    /// Permits that were granted.
    pub granted: u64,
    /// It wanted some and was granted none.
    pub is_denied: bool,
    /// The window is to be asked for again at once.
    pub ask_again: bool,
}

/// Calls under way for one window: as many round trips as there are can be begun within one.
const CALLS: usize = 8;

/// What of a call does not depend on the window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Circumstances {
    pub now_ns: u64,
    /// Identity by number.
    pub generation: u64,
    /// Whether grants count, so that it is of use to want any.
    pub grants_count: bool,
    /// Gates that share the limit.
    pub gates: u32,
    /// How long an answer takes.
    pub round_trip_ns: u64,
    /// Hardly any takes longer.
    pub answer_within_ns: u64,
    pub slack_ms: u64,
    pub keep_ms: u64,
}

impl Ledger {
    pub fn new(
        name: Arc<str>,
        window_ms: u64,
        reservation: Arc<Reservation>,
        id: FieldId,
        now: &Circumstances,
    ) -> Self {
        // What an earlier ledger left behind was counted by it, and has lapsed with it.
        reservation.take_back();
        Ledger {
            name,
            window_ms,
            id,
            generation: now.generation,
            met: now.generation,
            wanted: false,
            crowded: false,
            queued: false,
            unheard: false,
            pending: VecDeque::new(),
            active_ns: now.now_ns,
            ended: false,
            sequence: 0,
            answered: 0,
            heard: 0,
            granted: 0,
            alone_before: reservation.total_alone(),
            history: VecDeque::new(),
            base: 0,
            label: 0,
            unbounded: 0,
            unbounded_told: 0,
            holds_share: false,
            known: false,
            slice: 1,
            sized_ns: None,
            total: 0,
            heard_ns: None,
            shared: VecDeque::new(),
            reservation,
        }
    }

    /// Whether a call may be made: none is under way, or more is waited for than those will bring.
    pub fn may_ask(&self) -> bool {
        let Some(last) = self.pending.back() else { return true };
        let to_come = u64::from(last.want).saturating_sub(self.heard - last.heard);
        let to_have = to_come + u64::from(self.reservation.left());
        self.wanted && self.pending.len() < CALLS && u64::from(self.reservation.waiting()) > to_have
    }

    /// Whether a call is under way.
    pub fn is_asking(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The next call, if one [may be made](Ledger::may_ask).
    pub fn ask(&mut self, now: &Circumstances) -> Ask {
        // What has lapsed while a call was under way may live on by its answer.
        let has_lapsed = now.now_ns >= self.reservation.until_ns() && !self.is_asking();
        if self.ended || self.holds_share || has_lapsed {
            self.take_back();
        }
        let want = if self.wanted && now.grants_count {
            self.size_slice(now)
        } else {
            0
        };
        self.wanted &= !now.grants_count;
        let left = self.reservation.left();
        let spent = self.granted - u64::from(left) + self.alone();
        self.sequence += 1;
        let unbounded = self.unbounded + self.alone();
        self.pending.push_back(Pending {
            sequence: self.sequence,
            sent_ns: now.now_ns,
            generation: now.generation,
            spent,
            want,
            heard: self.heard,
            unbounded,
        });
        Ask {
            id: self.id,
            sequence: self.sequence,
            limit: self.reservation.limit(),
            window_ms: self.window_ms,
            spent,
            reserved: left,
            granted: self.heard,
            afresh: self.generation != now.generation,
            held_until: self.label,
            spent_until: if unbounded > self.unbounded_told { 0 } else { self.label },
            want,
            // What is waited for is spent when it comes; the earlier its end, the earlier it leaves the window.
            hold_ms: if left == 0 && want <= self.reservation.waiting() {
                (now.answer_within_ns + self.pace_ns() / 32).div_ceil(MS)
            } else {
                self.hold_ms(now)
            },
            slack_ms: now.slack_ms,
            keep_ms: now.keep_ms,
            // Where the store has forgotten this id, its answer says so.
            history: (!self.known).then(|| History {
                base: self.base,
                counts: self.history.iter().copied().collect(),
            }),
        }
    }

    /// Takes in the answer to the call of this number. `None`: it never came. What it grants counts only where `accept`.
    pub fn answered(&mut self, sequence: u64, answer: Option<Answer>, accept: bool, now: &Circumstances) -> Heard {
        let mut heard = Heard::default();
        let Some(index) = self.pending.iter().position(|pending| pending.sequence == sequence) else {
            return heard;
        };
        let Some(pending) = self.pending.remove(index) else {
            return heard;
        };
        let is_latest = self.pending.iter().all(|other| other.sequence < sequence) && self.answered < sequence;
        match answer {
            Some(Answer::Done(grant)) => {
                self.known = true;
                self.unheard &= sequence < self.sequence;
                self.generation = self.generation.max(pending.generation);
                self.record(&pending, &grant);
                // More than was asked for by this call: what earlier ones had granted.
                let fresh = grant.granted.saturating_sub(self.heard);
                self.heard += fresh;
                let until_ns = self.until_ns(&pending, &grant, now).filter(|_| accept);
                if accept {
                    // Here, not only where more is wanted: who counts alone wants nothing.
                    self.reservation.count_alone(false);
                    self.label = self.label.max(grant.label);
                }
                if let Some(until_ns) = until_ns {
                    heard.granted = fresh;
                    heard.is_denied = pending.want > 0 && grant.granted <= pending.heard;
                    self.take_in(&pending, &grant, fresh, until_ns, now);
                }
                self.answered = self.answered.max(sequence);
                // What was held or granted has lapsed on the way, or the grant does not count: it still wants.
                self.wanted |= is_latest && pending.want > 0 && until_ns.is_none();
            }
            Some(Answer::Unknown) => {
                self.known = false;
                self.unheard |= is_latest;
                self.wanted |= is_latest && pending.want > 0;
            }
            // Overtaken by a later call, which has told all that this one did and wanted all that it wanted; or by a copy of
            // this one.
            Some(Answer::Overtaken) | None => {
                self.unheard |= is_latest;
                self.wanted |= is_latest && pending.want > 0;
            }
        }
        heard.ask_again = self.wanted || self.unheard;
        heard
    }

    /// Gives permits of the gate's share, because the store is lost. Returns how many: none where some are left, or
    /// where the share is used up.
    pub fn give_share(&mut self, gates: Option<u32>, now: &Circumstances) -> u32 {
        let window_ns = self.window_ms * MS;
        while self
            .shared
            .front()
            .is_some_and(|(until, _)| until + window_ns <= now.now_ns)
        {
            self.shared.pop_front();
        }
        if now.now_ns < self.reservation.until_ns() && self.reservation.left() > 0 {
            return 0;
        }
        self.take_back();
        let Some(gates) = gates else { return 0 };
        let counts_still = self
            .heard_ns
            .is_some_and(|heard| now.now_ns < heard + window_ns + self.bucket_ns() * 2);
        let used = if counts_still { self.total.max(0) as u64 } else { 0 };
        let left = u64::from(self.reservation.limit()).saturating_sub(used);
        let share = left.div_ceil(u64::from(gates.max(1)));
        let given: u64 = self.shared.iter().map(|(_, n)| u64::from(*n)).sum();
        let more = share.saturating_sub(given).min(u64::from(self.most(now)));
        if more == 0 {
            return 0;
        }
        let until = now.now_ns + self.bucket_ns();
        self.shared.push_back((until, more as u32));
        self.granted += more;
        self.unbounded += more;
        self.holds_share = true;
        self.reservation.refill(more as u32, until, 0);
        more as u32
    }

    /// When something is to be done though nobody asks: what is held lapses and is to be given back, or the window
    /// is to be forgotten.
    pub fn due_ns(&self, keep_ms: u64) -> u64 {
        if self.reservation.left() > 0 {
            self.reservation.until_ns()
        } else {
            self.active_ns + (self.window_ms * 2 + keep_ms) * MS
        }
    }

    /// Whether something is held that can no longer be spent.
    pub fn has_lapsed(&self, now_ns: u64) -> bool {
        self.reservation.left() > 0 && now_ns >= self.reservation.until_ns()
    }

    /// Whether nothing of it counts any more.
    pub fn is_over(&self, now_ns: u64, keep_ms: u64) -> bool {
        self.reservation.left() == 0 && self.pending.is_empty() && now_ns >= self.due_ns(keep_ms)
    }

    /// Whether the store may be without something that counts.
    pub fn has_something_to_tell(&self) -> bool {
        // What was granted to a call without an answer is to be given up, though nothing else is known of it.
        self.sequence > 0 || self.granted > 0 || self.alone() > 0
    }

    /// No answer that is still to come counts.
    pub fn believe_none(&mut self) {
        self.wanted |= self.pending.iter().any(|pending| pending.want > 0);
        self.pending.clear();
    }

    /// The gate ends: nothing is spent from here any more.
    pub fn give_up(&mut self) {
        self.ended = true;
        self.wanted = false;
        // What is under way does not say so.
        self.unheard |= self.is_asking();
        self.take_back();
    }

    fn alone(&self) -> u64 {
        self.reservation.total_alone() - self.alone_before
    }

    fn bucket_ns(&self) -> u64 {
        self.window_ms * MS / buckets(self.window_ms)
    }

    fn take_back(&mut self) -> u32 {
        let left = self.reservation.take_back();
        self.granted -= u64::from(left);
        if std::mem::take(&mut self.holds_share)
            && let Some((_, given)) = self.shared.back_mut()
        {
            *given -= left.min(*given);
        }
        // Half of it was too much: less next time.
        if left > self.slice / 2 {
            self.slice = (self.slice / 2).max(1);
        }
        left
    }

    /// An eighth of the gate's part of what is left: the scarcer permits get, the fewer lie idle anywhere.
    fn most(&self, now: &Circumstances) -> u32 {
        let limit = i64::from(self.reservation.limit());
        let left = if self.heard_ns.is_some() {
            (limit - self.total).clamp(0, limit)
        } else {
            limit
        };
        (left as u32 / 8 / now.gates.max(1)).max(1)
    }

    /// How long a slice should last: the longer, the fewer calls; short enough to follow demand.
    fn pace_ns(&self) -> u64 {
        (self.window_ms * MS / 60).clamp(20 * MS, 250 * MS)
    }

    /// Follows demand: a slice that did not last doubles, one that lasted long is halved.
    fn size_slice(&mut self, now: &Circumstances) -> u32 {
        let crowded = std::mem::take(&mut self.crowded);
        if let Some(sized_ns) = self.sized_ns.replace(now.now_ns) {
            let since = now.now_ns - sized_ns;
            if crowded || since < self.pace_ns() + now.round_trip_ns {
                self.slice = self.slice.saturating_mul(2);
            } else if since > 4 * self.pace_ns() {
                self.slice = (self.slice / 2).max(1);
            }
        }
        let most = self.most(now);
        self.slice = self.slice.min(most);
        // What is waited for will not lie idle, so no cap on it. Where it came up while calls were under way, as much again
        // will come up while this one is.
        let waiting = self.reservation.waiting();
        let ahead = if self.is_asking() { waiting } else { 0 };
        let goal = self
            .slice
            .max(waiting.saturating_add(ahead))
            .min(self.reservation.limit());
        goal.saturating_sub(self.reservation.left())
    }

    /// Long enough that what is granted arrives and is of use.
    fn hold_ms(&self, now: &Circumstances) -> u64 {
        let hold_ns = now.answer_within_ns + self.pace_ns() / 2;
        hold_ns.min(self.window_ms * MS / 8) / MS
    }

    fn record(&mut self, pending: &Pending, grant: &Grant) {
        let fresh = pending.spent.saturating_sub(self.base);
        if fresh > 0 {
            match self.history.back_mut() {
                Some((stamp, count)) if *stamp == grant.stamp => *count += fresh,
                _ => self.history.push_back((grant.stamp, fresh)),
            }
        }
        self.base = self.base.max(pending.spent);
        let oldest = grant.stamp.saturating_sub(2 * buckets(self.window_ms));
        while self.history.front().is_some_and(|(stamp, _)| *stamp < oldest) {
            self.history.pop_front();
        }
        self.unbounded_told = self.unbounded_told.max(pending.unbounded);
    }

    /// Until when what is held may be spent; `None` where it had lapsed by the time that the answer came.
    fn until_ns(&self, pending: &Pending, grant: &Grant, now: &Circumstances) -> Option<u64> {
        let valid_ms = u64::try_from(grant.valid_ms).ok()?;
        // Counted from before the call was sent, and a thousandth less, as clocks run at different rates.
        let valid_ns = valid_ms * (MS - MS / 1000);
        // What lies idle is given back long before it must, where sub-buckets are long.
        let until_ns = pending.sent_ns + valid_ns.min((2 * self.hold_ms(now)).max(100) * MS);
        (until_ns > now.now_ns).then_some(until_ns)
    }

    fn take_in(&mut self, pending: &Pending, grant: &Grant, fresh: u64, until_ns: u64, now: &Circumstances) {
        self.granted += fresh;
        let low_water = if self.slice > 1 { self.slice.div_ceil(2) } else { 0 };
        self.reservation.refill(fresh as u32, until_ns, low_water);
        if pending.sequence < self.answered {
            // A later call knows better how things stand.
            return;
        }
        let limit = self.reservation.limit();
        self.total = grant.total;
        self.heard_ns = Some(now.now_ns);
        let elsewhere = (i64::from(limit) - grant.total).clamp(0, i64::from(limit)) as u32;
        self.reservation.note(elsewhere, now.now_ns + grant.leaves_ms * MS);
        if grant.granted < pending.heard + u64::from(pending.want) {
            // Others may give back before the oldest leaves: looked for now and then.
            let look_again_ms = (self.window_ms / 200).clamp(5, 250);
            self.reservation
                .nothing_until(now.now_ns + grant.leaves_ms.min(look_again_ms) * MS);
        } else {
            self.reservation.nothing_until(0);
        }
    }
}
