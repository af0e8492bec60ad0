//! The windows of one key: one per tier it has been used in, made at the first use and given back when idle.
//!
//! They belong to the key, not to its record: a refresh, a rotation or a changed limit finds the same windows.
//!
//! # Protocol
//! The first tier's window lies in the key's [`Place`] (`places.rs`), so that a key used in one tier costs one cache miss;
//! further ones, and replacements, are pushed on `more`, newest first. For one tier the newest window counts;
//! older ones are closed and give no permits.
//! - **Replace** (another window length, or a limit that the packed form cannot hold): close the newest window of
//!   the tier, make a successor from its counts, and push it by compare-and-swap on the head that was searched. A
//!   thread that loses searches again and finds the winner's. Closing is final and the counts of a closed window
//!   no longer change, so every would-be successor holds all of them.
//! - **Give back**: close every window if all are idle, then swap the head of `more` to a sentinel. Only if that
//!   succeeds, after which nothing can be pushed, does the key's slot forget the place. A
//!   request that meets the sentinel looks the slot up again. If a push came first, the closed windows are
//!   replaced on demand like any other.
//! - **Reserve**: where the limit is shared with other gates, a [`Reservation`] for the tier is pushed on `more` like a
//!   window. It decides; the window then only records what was given, for the journal.
//! - **Enter**: where a plan limits the requests under way, their count is pushed on `more`, too, once for all tiers.

use super::limit::Limit;
use super::reservation::{Reservation, Spend};
use super::scope::{NameId, NameSet};
use super::slots::{NONE, SlotId};
use super::window::{Refused, Rings, Shape, Taken, Window, WindowCounts, WindowRef, Words};
use arc_swap::ArcSwapOption;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU16, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Where a key's windows lie: one cache line, which no other key's share.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Place {
    words: Words,
    /// That of the first window: `[length in ms:32 | largest limit:32]`.
    shape: AtomicU64,
    undrained: Undrained,
    more: ArcSwapOption<Node>,
    /// The key's slot, once it has the place's number; before that [`NONE`], at the end [`LEFT`].
    owner: AtomicU32,
    first_tier: AtomicU16,
}

/// No slot's number, as there are not so many.
const LEFT: SlotId = NONE - 1;

/// The windows of one key, in a place that is theirs for as long as what they were found by is held.
#[derive(Clone, Copy)]
pub(super) struct KeyWindows<'a> {
    place: &'a Place,
    rings: &'a Rings,
    index: usize,
}

#[derive(Debug)]
struct TierWindow {
    window: Window,
    undrained: Undrained,
}

/// A tier's window, in the place or in a node.
#[derive(Clone, Copy)]
struct TierRef<'a> {
    window: WindowRef<'a, 60>,
    undrained: &'a Undrained,
}

#[derive(Debug)]
struct Node {
    tier: NameId,
    held: Held,
    next: Option<Arc<Node>>,
}

#[derive(Debug)]
enum Held {
    Window(TierWindow),
    Reservation(Arc<Reservation>),
    /// Requests under way, counted only where a plan limits them, in all tiers together; a count of its own, because requests
    /// may outlive the place. Relaxed: it guards no other memory.
    InFlight(Arc<AtomicU32>),
    /// The sentinel that says these windows are given back.
    Nothing,
}

impl Node {
    fn window(&self) -> Option<TierRef<'_>> {
        match &self.held {
            Held::Window(own) => Some(own.by_ref()),
            _ => None,
        }
    }

    fn is_sentinel(&self) -> bool {
        matches!(self.held, Held::Nothing)
    }
}

/// `[refusals:28 | permits:36]` that the meter has not drained yet. It comes every second; 2^36 permits of one key are
/// 19 hours at a million a second. Relaxed: nothing is read on the strength of it.
#[derive(Debug, Default)]
struct Undrained(AtomicU64);

impl Undrained {
    const PERMITS: u32 = 36;

    /// Counts a permit. Whether there was nothing before it.
    #[inline]
    fn add_permit(&self) -> bool {
        self.0.fetch_add(1, Relaxed) == 0
    }

    fn add_refusal(&self) {
        self.0.fetch_add(1 << Self::PERMITS, Relaxed);
    }

    /// Takes permits and refusals.
    fn take(&self) -> (u64, u64) {
        let counts = self.0.swap(0, Relaxed);
        (counts & ((1 << Self::PERMITS) - 1), counts >> Self::PERMITS)
    }
}

/// The windows were given back: look the key's slot up again.
#[derive(Debug)]
pub(super) struct GivenBack;

/// How taking a permit ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Taken {
        taken: Taken,
        /// The meter had drained everything before this permit: the key is to be marked for it.
        newly_active: bool,
    },
    Limited {
        retry_after_s: u32,
        reset_s: u32,
    },
}

/// How taking a permit of a shared limit ended.
#[derive(Debug)]
pub(super) enum SharedOutcome {
    /// A permit was spent. It is yet to be recorded ([`KeyWindows::record`]).
    Spent { remaining: u32, reset_s: u32 },
    /// The window's own count decided.
    Alone(Outcome),
    /// The limit is reached.
    Limited { retry_after_s: u32 },
    /// Nothing is reserved, and more may be had.
    Dry,
}

impl Place {
    /// One that is free.
    pub fn empty() -> Self {
        Place {
            words: Words::closed(),
            shape: AtomicU64::new(0),
            undrained: Undrained::default(),
            more: ArcSwapOption::empty(),
            owner: AtomicU32::new(NONE),
            first_tier: AtomicU16::new(u16::MAX),
        }
    }
}

impl<'a> KeyWindows<'a> {
    /// Those of this place, and of the ring with the index, which goes with it.
    #[inline(always)]
    pub fn new(place: &'a Place, rings: &'a Rings, index: usize) -> Self {
        KeyWindows { place, rings, index }
    }

    /// Begins windows of a key that is first used in this tier now. Nobody else has the place.
    pub fn begin(self, tier: NameId, limit: Limit, now_ns: u64) {
        let place = self.place;
        let shape = Shape::of_ring::<60>(limit, self.rings.len());
        let shape = u64::from(shape.window_ms) << 32 | u64::from(shape.most);
        place.shape.store(shape, Relaxed);
        place.first_tier.store(tier.0, Relaxed);
        self.first().window.begin(limit, now_ns);
    }

    /// Whether they are those of the key in slot `owner`.
    #[inline(always)]
    pub fn are_of(self, owner: SlotId) -> bool {
        self.place.owner.load(Acquire) == owner
    }

    /// Says whose they are, for those whom a hint leads here; unless they were given back meanwhile. Release: whoever finds
    /// the owner finds them begun.
    pub fn set_owner(self, owner: SlotId) {
        let _ = self.place.owner.compare_exchange(NONE, owner, Release, Relaxed);
    }

    /// Says that they were given back: no hint leads to them from now on.
    pub fn leave(self) {
        self.place.owner.store(LEFT, Release);
    }

    /// Makes the place as good as new. Nobody is in it, and the meter has been told of everything.
    pub fn clear(self) {
        let place = self.place;
        if place.more.load().is_some() {
            place.more.store(None);
        }
        place.owner.store(NONE, Relaxed);
    }

    #[inline(always)]
    fn first(self) -> TierRef<'a> {
        let shape = self.place.shape.load(Relaxed);
        let shape = Shape {
            window_ms: (shape >> 32) as u32,
            most: shape as u32,
        };
        TierRef {
            window: WindowRef::new(&self.place.words, shape, self.rings, self.index),
            undrained: &self.place.undrained,
        }
    }

    #[inline(always)]
    fn first_tier(self) -> NameId {
        NameId(self.place.first_tier.load(Relaxed))
    }

    /// One permit from the tier's window. Allocates only at the first use of a further tier and at a replacement.
    #[inline(always)]
    pub fn take(self, tier: NameId, limit: Limit, now_ns: u64) -> Result<Outcome, GivenBack> {
        // What `on_window` begins with, here for the compiler's sake: it is what nearly all decisions come to.
        if self.first_tier() == tier
            && let Ok(outcome) = self.first().take(limit, now_ns)
        {
            return Ok(outcome);
        }
        self.on_later_window(tier, limit, now_ns, |own| own.take(limit, now_ns))
    }

    /// One permit of a limit that is shared with other gates, from `reservation`. Allocates nothing. `tell`: somebody has
    /// to be told that more is wanted.
    pub fn take_shared(
        self,
        reservation: &Reservation,
        tier: NameId,
        limit: Limit,
        now_ns: u64,
        tell: &mut bool,
    ) -> Result<SharedOutcome, GivenBack> {
        Ok(match reservation.spend(limit.permits(), 1, now_ns) {
            Spend::Spent { ask } => {
                *tell = ask;
                SharedOutcome::Spent {
                    remaining: reservation.remaining(),
                    reset_s: reservation.reset_s(now_ns),
                }
            }
            Spend::Dry { ask } => {
                *tell = ask;
                SharedOutcome::Dry
            }
            Spend::Nothing => {
                self.add_refusal(tier, limit, now_ns)?;
                SharedOutcome::Limited {
                    retry_after_s: reservation.reset_s(now_ns),
                }
            }
            Spend::Alone => {
                let outcome = self.take(tier, limit, now_ns)?;
                if matches!(outcome, Outcome::Taken { .. }) {
                    reservation.spent_alone(1);
                }
                SharedOutcome::Alone(outcome)
            }
        })
    }

    /// Records a permit that a reservation gave: in the window, as far as it holds it, and for the meter. Whether the key
    /// is newly active.
    pub fn record(self, tier: NameId, limit: Limit, now_ns: u64) -> Result<bool, GivenBack> {
        self.on_window(tier, limit, now_ns, |own| match own.window.take(limit, 1, now_ns) {
            Err(Refused::Retired | Refused::Outgrown) => Err(Replace),
            // The shared count is the one that matters, and it is a little finer than the window's.
            Ok(_) | Err(_) => Ok(own.undrained.add_permit()),
        })
    }

    /// Counts a refusal.
    pub fn add_refusal(self, tier: NameId, limit: Limit, now_ns: u64) -> Result<(), GivenBack> {
        self.on_window(tier, limit, now_ns, |own| {
            own.undrained.add_refusal();
            Ok(())
        })
    }

    /// The tier's reservation for windows of the limit's length, made if there is none.
    pub fn reservation(
        self,
        tier: NameId,
        limit: Limit,
        make: impl Fn() -> Reservation,
    ) -> Result<Arc<Reservation>, GivenBack> {
        loop {
            let head = self.place.more.load();
            let mut next = head.as_ref();
            while let Some(node) = next {
                match &node.held {
                    Held::Nothing => return Err(GivenBack),
                    Held::Reservation(own) if node.tier == tier && own.window_ms() == limit.window_ms() => {
                        return Ok(own.clone());
                    }
                    _ => next = node.next.as_ref(),
                }
            }
            let node = Node {
                tier,
                held: Held::Reservation(Arc::new(make())),
                next: head.clone(),
            };
            self.place.more.compare_and_swap(&head, Some(Arc::new(node)));
        }
    }

    /// Whether a permit could be had now; spends nothing. `Ok(None)`: it could.
    pub fn peek(self, tier: NameId, limit: Limit, now_ns: u64) -> Result<Option<Outcome>, GivenBack> {
        self.on_window(tier, limit, now_ns, |own| match own.window.peek(limit, 1, now_ns) {
            Ok(()) => Ok(None),
            Err(refused) => limited(refused).map(Some),
        })
    }

    /// Runs `act` on the newest window of the tier, made or replaced first where need be.
    #[inline]
    fn on_window<R>(
        self,
        tier: NameId,
        limit: Limit,
        now_ns: u64,
        act: impl Fn(TierRef<'_>) -> Result<R, Replace>,
    ) -> Result<R, GivenBack> {
        // A window is closed before it has a successor and before it is given back, so one that serves is the newest,
        // and `more` need not be looked at.
        if self.first_tier() == tier
            && let Ok(result) = act(self.first())
        {
            return Ok(result);
        }
        self.on_later_window(tier, limit, now_ns, act)
    }

    /// [`KeyWindows::on_window`] where the first one does not serve.
    #[inline(never)]
    fn on_later_window<R>(
        self,
        tier: NameId,
        limit: Limit,
        now_ns: u64,
        act: impl Fn(TierRef<'_>) -> Result<R, Replace>,
    ) -> Result<R, GivenBack> {
        loop {
            let head = self.place.more.load();
            if head.as_ref().is_some_and(|node| node.is_sentinel()) {
                return Err(GivenBack);
            }
            let found = newest(head.as_ref(), tier).or_else(|| (self.first_tier() == tier).then(|| self.first()));
            if let Some(own) = found
                && let Ok(result) = act(own)
            {
                return Ok(result);
            }
            let window = match found {
                Some(own) => Window::import(limit, &own.window.close_and_export(), now_ns),
                None => Window::new(limit, now_ns),
            };
            let node = Node {
                tier,
                held: Held::Window(TierWindow::new(window)),
                next: head.clone(),
            };
            // Failing means that another thread pushed first: search again, and drop ours.
            self.place.more.compare_and_swap(&head, Some(Arc::new(node)));
        }
    }

    /// A place under the concurrency cap; `None` where all are taken. Allocates at the first use.
    pub fn enter(self, max_in_flight: u32) -> Result<Option<InFlight>, GivenBack> {
        loop {
            let head = self.place.more.load();
            if head.as_ref().is_some_and(|node| node.is_sentinel()) {
                return Err(GivenBack);
            }
            if let Some(count) = in_flight(head.as_ref()) {
                let before = count.fetch_add(1, Relaxed);
                let entered = InFlight(count.clone());
                return Ok((before < max_in_flight).then_some(entered));
            }
            let node = Node {
                tier: self.first_tier(),
                held: Held::InFlight(Arc::default()),
                next: head.clone(),
            };
            self.place.more.compare_and_swap(&head, Some(Arc::new(node)));
        }
    }

    /// Takes the counts of permits and refusals since the last call.
    pub fn drain(self, mut each: impl FnMut(NameId, u64, u64)) {
        self.for_each(|tier, own| {
            let (permits, refused) = own.undrained.take();
            if (permits, refused) != (0, 0) {
                each(tier, permits, refused);
            }
        });
    }

    /// The counts of every tier's newest window, each in `counts`, which is used again.
    pub fn export(self, now_ns: u64, counts: &mut WindowCounts, mut each: impl FnMut(NameId, u64, &WindowCounts)) {
        let mut seen = NameSet::default();
        self.for_each(|tier, own| {
            if !seen.contains(tier) {
                seen.insert(tier);
                own.window.export_into(now_ns, counts);
                each(tier, own.window.window_ms(), counts);
            }
        });
    }

    /// Puts counts of an earlier process into a tier's window, beside what it holds.
    pub fn restore(self, tier: NameId, limit: Limit, counts: &WindowCounts, now_ns: u64) -> Result<(), GivenBack> {
        loop {
            let head = self.place.more.load();
            if head.as_ref().is_some_and(|node| node.is_sentinel()) {
                return Err(GivenBack);
            }
            let found = newest(head.as_ref(), tier).or_else(|| (self.first_tier() == tier).then(|| self.first()));
            let mut all = counts.clone();
            if let Some(own) = found {
                all.merge(&own.window.close_and_export());
            }
            let window = Window::import(limit, &all, now_ns);
            let node = Node {
                tier,
                held: Held::Window(TierWindow::new(window)),
                next: head.clone(),
            };
            let before = self.place.more.compare_and_swap(&head, Some(Arc::new(node)));
            if same(before.as_ref(), head.as_ref()) {
                return Ok(());
            }
        }
    }

    /// Gives all windows back if none has counted anything within its length and no request is under way.
    /// `true`: nothing can be taken from them any more, and the slot must forget them.
    pub fn give_back_if_idle(self, now_ns: u64) -> bool {
        let head = self.place.more.load_full();
        if in_flight(head.as_ref()).is_some_and(|count| count.load(Relaxed) != 0) {
            return false;
        }
        let mut all_idle = true;
        self.for_each(|_, own| all_idle = all_idle && own.window.retire_if_idle(now_ns));
        if !all_idle {
            return false;
        }
        let closed = Arc::new(Node {
            tier: self.first_tier(),
            held: Held::Nothing,
            next: head.clone(),
        });
        let before = self.place.more.compare_and_swap(&head, Some(closed));
        same(before.as_ref(), head.as_ref())
    }

    fn for_each(self, mut each: impl FnMut(NameId, TierRef<'_>)) {
        let head = self.place.more.load();
        let mut next = head.as_ref();
        while let Some(node) = next {
            if let Some(own) = node.window() {
                each(node.tier, own);
            }
            next = node.next.as_ref();
        }
        each(self.first_tier(), self.first());
    }
}

/// The window must be replaced before it can be used.
struct Replace;

fn limited(refused: Refused) -> Result<Outcome, Replace> {
    match refused {
        Refused::Limited { retry_after_s, reset_s } => Ok(Outcome::Limited { retry_after_s, reset_s }),
        // A cost of one always fits: limits start at one.
        Refused::NeverFits => Ok(Outcome::Limited {
            retry_after_s: u32::MAX,
            reset_s: 0,
        }),
        Refused::Retired | Refused::Outgrown => Err(Replace),
    }
}

fn newest(head: Option<&Arc<Node>>, tier: NameId) -> Option<TierRef<'_>> {
    let mut next = head;
    while let Some(node) = next {
        if node.tier == tier
            && let Some(own) = node.window()
        {
            return Some(own);
        }
        next = node.next.as_ref();
    }
    None
}

/// The count of requests under way.
fn in_flight(head: Option<&Arc<Node>>) -> Option<&Arc<AtomicU32>> {
    let mut next = head;
    while let Some(node) = next {
        if let Held::InFlight(count) = &node.held {
            return Some(count);
        }
        next = node.next.as_ref();
    }
    None
}

fn same(one: Option<&Arc<Node>>, other: Option<&Arc<Node>>) -> bool {
    match (one, other) {
        (None, None) => true,
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        _ => false,
    }
}

impl TierWindow {
    fn new(window: Window) -> Self {
        TierWindow {
            window,
            undrained: Undrained::default(),
        }
    }

    fn by_ref(&self) -> TierRef<'_> {
        TierRef {
            window: self.window.by_ref(),
            undrained: &self.undrained,
        }
    }
}

impl TierRef<'_> {
    #[inline(always)]
    fn take(self, limit: Limit, now_ns: u64) -> Result<Outcome, Replace> {
        match self.window.take(limit, 1, now_ns) {
            Ok(taken) => Ok(Outcome::Taken {
                taken,
                newly_active: self.undrained.add_permit(),
            }),
            Err(refused) => {
                let limited = limited(refused)?;
                self.undrained.add_refusal();
                Ok(limited)
            }
        }
    }
}

/// A request's part of the count of those under way, given back when dropped.
#[derive(Debug)]
pub(super) struct InFlight(Arc<AtomicU32>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_permit_touches_is_one_cache_line() {
        assert_eq!((size_of::<Place>(), align_of::<Place>()), (64, 64));
    }

    #[test]
    fn permits_and_refusals_are_drained_once() {
        let undrained = Undrained::default();
        assert!(undrained.add_permit());
        assert!(!undrained.add_permit());
        undrained.add_refusal();
        assert_eq!(undrained.take(), (2, 1));
        assert_eq!(undrained.take(), (0, 0));
        assert!(undrained.add_permit());
    }
}
