//! This gate's side of the protocol, whole: which windows are asked for and when, what answers mean, what holds while
//! the store is lost. No I/O and no clock of its own: whoever drives it passes the time and carries batches.
//!
//! - A call is made for a window where none is under way, or where more is waited for than those under way will bring; a
//!   bounded number of windows go together, and a bounded number of them are under way.
//! - What is held and lapses unspent is reported once, so that the store has it back. A window that nobody asks for
//!   is forgotten here; the store forgets it by itself.
//! - *Slow is not lost.* The store is lost when no call has had a full answer for [`Settings::lost_after`]. While it is,
//!   [`OnLoss`] holds, a hello looks now and then whether it is back, and nothing else is sent. Each of these hellos goes
//!   over a connection of its own, and none waits for the one before it: however long the store was away, and whatever
//!   became of the connections, the first one sent after its return finds it.

use super::ledger::{Circumstances, Ledger, MS};
use super::link::{HELLO_SOON_NS, Link, Loss};
use super::members::{self, Members};
use super::protocol::{Answer, Batch, BatchAnswer, FieldId, Hello, OnLoss};
use super::windows::Windows;
use crate::gate::reservation::Reservation;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// How a gate takes part.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Random: this process.
    pub id: u64,
    /// The gate's name; stable across restarts, and no other's.
    pub name: Arc<str>,
    /// What holds while the store is lost.
    pub on_loss: OnLoss,
    /// Without a full answer for so long the store is lost.
    pub lost_after: Duration,
    /// The most that the clocks of two servers of the store differ by.
    pub max_clock_skew: Duration,
    /// The longest window there is.
    pub longest_window_ms: u64,
}

/// Hellos under way: a slow store hears several at once.
const HELLOS: usize = 8;
/// See [`members::Settings::silent_ms`]: long enough for a person to restart a store.
const SILENT_MS: u64 = 10_000;
/// How often a window that lives on its share looks whether the store is back.
const SHARE_LOOK_NS: u64 = 200 * MS;
/// Calls that go together: some hundreds keep the store busy for about 10 ms.
const BATCH: usize = 256;
/// Windows looked at in one go: some 400 µs, for which requests cannot say what they want.
const DUE_AT_ONCE: usize = 1_024;
/// Windows that meet a new identity of the store in one go. They are looked at less closely than those above.
const MET_AT_ONCE: usize = 1_024;
/// Batches under way: many small ones where windows are few and the store is far.
const BATCHES: usize = 64;
/// Calls under way.
const CALLS: usize = 8 * BATCH;

/// What has been counted.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Calls sent.
    pub asks: u64,
    /// Permits granted by the store.
    pub granted: u64,
    /// Calls that wanted permits and were granted none.
    pub denied: u64,
    /// Calls without an answer that could be used.
    pub lost: u64,
    /// Permits given out of a share.
    pub shared: u64,
    /// The fewest gates that a share was ever taken among; 0: none was taken.
    pub fewest_gates: u32,
    /// How often another identity was met.
    pub identities: u64,
}

/// The state of the protocol at one gate. No time that it is told may be before one that it was told earlier.
#[derive(Debug)]
pub struct Coordinator {
    settings: Settings,
    members: Members,
    windows: Windows,
    flights: HashMap<u64, Flight>,
    /// Calls in all flights.
    under_way: usize,
    next_flight: u64,
    windows_made: u32,
    /// Windows that may not have met the current identity.
    unmet: Range<u32>,
    /// Windows that have met the current identity and that it has not been told of.
    untold: usize,
    link: Link,
    loss: Loss,
    /// The gate ends: it says so once the store knows all that it spent.
    leaving: bool,
    /// The store has heard that the gate leaves.
    said_goodbye: bool,
    counts: Counts,
}

#[derive(Debug)]
struct Flight {
    sent_ns: u64,
    generation: u64,
    /// The windows, and the numbers of their calls.
    slots: Vec<(u32, u64)>,
    has_hello: bool,
    is_goodbye: bool,
}

impl Counts {
    /// Adds others.
    pub fn add(&mut self, other: &Counts) {
        self.asks += other.asks;
        self.granted += other.granted;
        self.denied += other.denied;
        self.lost += other.lost;
        self.shared += other.shared;
        self.fewest_gates = match (self.fewest_gates, other.fewest_gates) {
            (0, n) | (n, 0) => n,
            (a, b) => a.min(b),
        };
        self.identities += other.identities;
    }
}

impl Coordinator {
    /// Of a gate that starts now.
    pub fn new(settings: Settings, now_ns: u64) -> Self {
        let keep_ms = settings.max_clock_skew.as_millis() as u64;
        let lost_after_ms = settings.lost_after.as_millis() as u64;
        let link = Link::new(settings.lost_after, now_ns);
        let members = Members::new(members::Settings {
            id: settings.id,
            name: settings.name.clone(),
            is_exact: settings.on_loss == OnLoss::Closed,
            silent_ms: SILENT_MS,
            // Whoever lives has said so by then, however slow.
            settle_ms: lost_after_ms + 2 * link.hello_every_ns() / MS,
            longest_window_ms: settings.longest_window_ms,
            keep_ms,
        });
        Coordinator {
            loss: Loss::new(settings.lost_after, now_ns),
            settings,
            members,
            link,
            windows: Windows::default(),
            flights: HashMap::new(),
            under_way: 0,
            next_flight: 0,
            windows_made: 0,
            unmet: 0..0,
            untold: 0,
            leaving: false,
            said_goodbye: false,
            counts: Counts::default(),
        }
    }

    /// What has been counted.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Calls that are not answered yet.
    pub fn unacked(&self) -> usize {
        self.under_way
    }

    /// Windows that are known.
    pub fn windows(&self) -> usize {
        self.windows.len()
    }

    /// Whether grants count, for windows of this length.
    pub fn grants_count(&self, window_ms: u64, now_ns: u64) -> bool {
        self.members.grants_count(window_ms, now_ns)
    }

    /// How many gates share the limits of this length of window, if that was ever heard.
    pub fn gates(&self, window_ms: u64, now_ns: u64) -> Option<u32> {
        self.members.count(window_ms, now_ns)
    }

    /// Whether the store is lost.
    pub fn is_lost(&self, window_ms: u64, now_ns: u64) -> bool {
        self.loss.is_lost(window_ms, now_ns)
    }

    /// Begins to look after a window: more is wanted for it. The number is what [`Coordinator::want`] takes.
    pub fn open(&mut self, name: Arc<str>, window_ms: u64, reservation: Arc<Reservation>, now_ns: u64) -> u32 {
        self.windows_made += 1;
        let id = FieldId {
            process: self.settings.id,
            window: self.windows_made,
        };
        self.loss.begin(window_ms, now_ns);
        let circumstances = self.circumstances(window_ms, now_ns);
        self.windows
            .open(Ledger::new(name, window_ms, reservation, id, &circumstances))
    }

    /// More is wanted. `false`: the window is not known (any more); open it.
    pub fn want(&mut self, slot: u32, reservation: &Arc<Reservation>, now_ns: u64) -> bool {
        self.meet(slot);
        let Some(ledger) = self.windows.get_mut(slot) else {
            return false;
        };
        if !Arc::ptr_eq(&ledger.reservation, reservation) {
            return false;
        }
        ledger.reservation.heard();
        ledger.wanted = true;
        ledger.crowded |= ledger.is_asking();
        ledger.active_ns = now_ns;
        let window_ms = ledger.window_ms;
        if self.is_lost(window_ms, now_ns) {
            self.fall_back(slot, now_ns);
        } else if !self.members.grants_count(window_ms, now_ns) {
            // Until then the request waits; it is told again when grants count, or the store is lost.
            self.windows.watch(slot, now_ns + HELLO_SOON_NS);
        } else {
            reservation.count_alone(false);
            self.windows.enqueue(slot);
        }
        true
    }

    /// What is to be done at this time though nothing came in. Where that is much, a part of it; the rest is due still.
    pub fn tick(&mut self, now_ns: u64) {
        self.meet_more(now_ns);
        let keep_ms = self.keep_ms();
        for _ in 0..DUE_AT_ONCE {
            let Some(slot) = self.windows.pop_due(now_ns) else {
                break;
            };
            self.meet(slot);
            let Some(ledger) = self.windows.get_mut(slot) else {
                continue;
            };
            if ledger.is_asking() {
                continue;
            }
            if ledger.is_over(now_ns, keep_ms) {
                ledger.reservation.count_alone(false);
                self.untold -= usize::from(ledger.generation != self.members.generation());
                self.windows.forget(slot);
                continue;
            }
            let reservation = ledger.reservation.clone();
            // What lapsed before those that waited for it got to it is not what they want.
            let wanted = ledger.wanted || (ledger.has_lapsed(now_ns) && reservation.waiting() > 0);
            let (holds_share, window_ms) = (ledger.holds_share, ledger.window_ms);
            let has_lapsed = ledger.has_lapsed(now_ns);
            let is_to_tell = has_lapsed || ledger.unheard || ledger.generation != self.members.generation();
            let due_ns = ledger.due_ns(keep_ms).max(now_ns + MS);
            if wanted {
                self.want(slot, &reservation, now_ns);
            } else if holds_share && !has_lapsed && self.is_lost(window_ms, now_ns) {
                self.windows.watch(slot, now_ns + SHARE_LOOK_NS);
            } else if holds_share && self.members.grants_count(window_ms, now_ns) {
                // The store is back: no more out of the share, however long it would last.
                self.want(slot, &reservation, now_ns);
            } else if is_to_tell {
                if self.link.is_down() {
                    self.windows.watch(slot, now_ns + 5 * HELLO_SOON_NS);
                } else {
                    self.windows.enqueue(slot);
                }
            } else {
                self.windows.watch(slot, due_ns);
            }
        }
    }

    /// When [`Coordinator::tick`] and [`Coordinator::next_batch`] have something to do next.
    pub fn next_due_ns(&self) -> u64 {
        let due = if self.have_all_met() {
            self.windows.next_due_ns()
        } else {
            0
        };
        if self.may_say_hello() {
            due.min(self.link.hello_due_ns())
        } else {
            due
        }
    }

    /// The next batch to be sent, if there is anything to say. Its number comes back with [`Coordinator::answered`].
    pub fn next_batch(&mut self, now_ns: u64) -> Option<(u64, Batch)> {
        let mut batch = Batch::default();
        let look = now_ns >= self.link.hello_due_ns() && self.may_say_hello();
        if look {
            batch.anew = self.link.is_down();
            self.link.hello_goes(now_ns);
            batch.hello = self.hello(now_ns);
        }
        let mut slots = vec![];
        let may_ask = !self.link.is_down() && self.members.current().is_some() && self.flights.len() < BATCHES;
        let most = if may_ask { BATCH.min(CALLS - self.under_way) } else { 0 };
        while slots.len() < most {
            let Some(slot) = self.windows.pop_queued() else {
                break;
            };
            self.meet(slot);
            let Some(ledger) = self.windows.get(slot) else {
                continue;
            };
            let circumstances = self.circumstances(ledger.window_ms, now_ns);
            let Some(ledger) = self.windows.get_mut(slot) else {
                continue;
            };
            if ledger.may_ask() {
                let ask = ledger.ask(&circumstances);
                slots.push((slot, ask.sequence));
                batch.asks.push((ledger.name.clone(), ask));
            }
        }
        if !look && slots.is_empty() {
            return None;
        }
        self.counts.asks += slots.len() as u64;
        self.under_way += slots.len();
        self.next_flight += 1;
        let flight = Flight {
            sent_ns: now_ns,
            generation: self.members.generation(),
            slots,
            has_hello: look,
            is_goodbye: self.members.left && batch.hello.is_some(),
        };
        self.flights.insert(self.next_flight, flight);
        Some((self.next_flight, batch))
    }

    /// What came of a batch: its answer, or `None` where there was none in time, or an error.
    pub fn answered(&mut self, number: u64, answer: Option<&BatchAnswer>, now_ns: u64) {
        let Some(flight) = self.flights.remove(&number) else {
            return;
        };
        self.under_way -= flight.slots.len();
        let identity = answer.and_then(BatchAnswer::identity);
        match answer {
            Some(answer) => self.link.answered(flight.sent_ns, answer.token.is_some(), now_ns),
            None => self.link.failed(flight.sent_ns, now_ns),
        }
        if let Some(identity) = &identity
            && self.members.met(identity, flight.sent_ns, now_ns)
        {
            self.counts.identities += 1;
            (self.unmet, self.untold) = (self.windows.slots(), 0);
            self.link.hello_at_once(now_ns);
            self.meet_more(now_ns);
        }
        let is_current = identity.is_some() && identity.as_ref() == self.members.current();
        if is_current
            && flight.has_hello
            && let Some(census) = answer.and_then(|answer| answer.census.as_ref())
        {
            let news = self.members.heard(census, flight.sent_ns, now_ns);
            if news {
                self.link.hello_at_once(now_ns);
            }
            self.said_goodbye |= flight.is_goodbye;
        }
        let same = is_current && flight.generation == self.members.generation();
        for (index, (slot, sequence)) in flight.slots.iter().enumerate() {
            let answer = if same {
                answer.and_then(|answer| answer.answers.get(index).copied().flatten())
            } else {
                None
            };
            self.take_in(*slot, *sequence, answer, now_ns);
        }
        self.note_refilled(now_ns);
        let counts = |window_ms| is_current && self.members.grants_count(window_ms, now_ns);
        let all_count = self.loss.note(now_ns, counts);
        if !all_count && self.members.current().is_some() && !self.link.is_down() {
            self.link.hello_soon(now_ns);
        }
    }

    /// The longest window there is.
    pub fn longest_window_ms(&self) -> u64 {
        self.settings.longest_window_ms
    }

    /// Whether the gate has left and nothing is left to be told.
    pub fn has_left(&self) -> bool {
        self.leaving && self.have_all_met() && self.windows.none_queued() && (self.said_goodbye || self.link.is_down())
    }

    /// The gate ends in good order: reports what is held everywhere, and says so last. To be called until
    /// [`Coordinator::unacked`] is 0 and nothing is left to send.
    pub fn leave(&mut self, now_ns: u64) {
        for slot in self.windows.slots() {
            self.meet(slot);
            if let Some(ledger) = self.windows.get_mut(slot) {
                ledger.give_up();
            }
            self.windows.enqueue(slot);
        }
        self.leaving = true;
        self.link.hello_at_once(now_ns);
    }

    fn may_say_hello(&self) -> bool {
        self.flights.values().filter(|flight| flight.has_hello).count() < HELLOS
    }

    /// What is to be said of this gate, to a store whose content has a name or is to get one.
    fn hello(&mut self, now_ns: u64) -> Option<Hello> {
        if self.members.current().is_none() && !self.link.is_nameless() {
            return None;
        }
        let grants_count = |window_ms| self.members.grants_count(window_ms, now_ns);
        let is_settled = self.members.current().is_some() && self.loss.windows().all(grants_count);
        let whole_list = !is_settled || self.link.is_list_due(now_ns);
        if whole_list {
            self.link.list_goes(now_ns);
        }
        // The others take one that left for one that has told everything.
        self.members.left = self.leaving && self.members.is_refilled();
        Some(self.members.hello(now_ns, whole_list))
    }

    fn take_in(&mut self, slot: u32, sequence: u64, answer: Option<Answer>, now_ns: u64) {
        self.meet(slot);
        let Some(ledger) = self.windows.get(slot) else {
            return;
        };
        let window_ms = ledger.window_ms;
        let circumstances = self.circumstances(window_ms, now_ns);
        let generation = self.members.generation();
        let keep_ms = self.keep_ms();
        let Some(ledger) = self.windows.get_mut(slot) else {
            return;
        };
        let was_told = ledger.generation == generation;
        let heard = ledger.answered(sequence, answer, circumstances.grants_count, &circumstances);
        self.counts.lost += u64::from(answer.is_none());
        self.counts.granted += heard.granted;
        self.counts.denied += u64::from(heard.is_denied);
        let again = heard.ask_again;
        let is_told = ledger.generation == generation;
        let due_ns = ledger.due_ns(keep_ms);
        if is_told && !was_told {
            self.untold -= 1;
        }
        if (!is_told || (again && circumstances.grants_count)) && !self.link.is_down() {
            self.windows.enqueue(slot);
        } else if again || !is_told {
            self.windows.watch(slot, now_ns + HELLO_SOON_NS);
        } else {
            self.windows.watch(slot, due_ns.max(now_ns + MS));
        }
    }

    /// Under a new identity every window is told again. Where there are many, a part of them now, the rest at the next ticks;
    /// until then each that is touched meets it first, and no grant counts.
    fn meet_more(&mut self, now_ns: u64) {
        if self.have_all_met() {
            return;
        }
        for _ in 0..MET_AT_ONCE {
            let Some(slot) = self.unmet.next() else { break };
            self.meet(slot);
        }
        self.note_refilled(now_ns);
    }

    fn have_all_met(&self) -> bool {
        self.unmet.is_empty()
    }

    /// The window is told to the current identity, unless it was, or that is under way.
    fn meet(&mut self, slot: u32) {
        let generation = self.members.generation();
        let Some(ledger) = self.windows.get_mut(slot) else {
            return;
        };
        if ledger.met == generation {
            return;
        }
        ledger.met = generation;
        ledger.believe_none();
        if ledger.has_something_to_tell() {
            self.untold += 1;
            self.windows.enqueue(slot);
        } else {
            ledger.generation = generation;
        }
    }

    fn note_refilled(&mut self, now_ns: u64) {
        let is_told = self.have_all_met() && self.untold == 0;
        if is_told && self.members.current().is_some() && !self.members.is_refilled() {
            self.members.set_refilled();
            self.link.hello_at_once(now_ns);
        }
    }

    /// The store is lost: what the policy says.
    fn fall_back(&mut self, slot: u32, now_ns: u64) {
        let Some(ledger) = self.windows.get(slot) else {
            return;
        };
        let window_ms = ledger.window_ms;
        let circumstances = self.circumstances(window_ms, now_ns);
        let gates = self.members.count(window_ms, now_ns);
        let Some(ledger) = self.windows.get_mut(slot) else {
            return;
        };
        let gave = match self.settings.on_loss {
            OnLoss::Closed => false,
            OnLoss::Share => {
                let given = ledger.give_share(gates, &circumstances);
                if given > 0 {
                    let taken = Counts {
                        shared: u64::from(given),
                        fewest_gates: circumstances.gates,
                        ..Counts::default()
                    };
                    self.counts.add(&taken);
                }
                given > 0 || ledger.reservation.left() > 0
            }
            OnLoss::Local => {
                ledger.reservation.count_alone(true);
                true
            }
        };
        let again_ns = now_ns + 50 * MS;
        if gave {
            ledger.wanted = self.settings.on_loss == OnLoss::Local;
        } else {
            // Refused at once, rather than after a wait that is of no use.
            ledger.reservation.nothing_until(again_ns);
        }
        self.windows.watch(slot, again_ns);
    }

    fn circumstances(&self, window_ms: u64, now_ns: u64) -> Circumstances {
        Circumstances {
            now_ns,
            generation: self.members.generation(),
            grants_count: self.members.grants_count(window_ms, now_ns),
            gates: self.members.count(window_ms, now_ns).unwrap_or(1),
            round_trip_ns: self.link.round_trip_ns(),
            answer_within_ns: self.link.answer_within_ns(),
            slack_ms: self.members.slack_ms(window_ms, now_ns),
            keep_ms: self.keep_ms(),
        }
    }

    fn keep_ms(&self) -> u64 {
        self.settings.max_clock_skew.as_millis() as u64
    }
}
