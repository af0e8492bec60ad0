//! The sliding window: one key's permits in one tier, exact, lock-free, in 168 to 552 bytes.
//!
//! # What it promises
//! For a limit of L permits in any window of length W, for any number of threads and any clock readings:
//! 1. In no interval of length W are more than L permits given.
//! 2. A request is refused only if L permits were given in the last W·(1 + 1/60).
//! 3. A refusal's `retry_after_s` is the smallest whole number of seconds after which a lone client surely succeeds.
//! 4. A clock that jumps back refunds nothing, one that jumps forward no more than a real wait as long would.
//! 5. No locks, and no allocation in [`take`](SlidingWindow::take) and [`peek`](SlidingWindow::peek).
//!
//! A permit's time is the later of its clock reading and the start of the sub-bucket it is counted in. Where the
//! clocks of threads differ by S, (1) holds for W − S.
//!
//! A reading far in the future, were the clock to give one, moves the window there for good, and its permits come
//! back only as the clock arrives: it refuses too much, never too little. Clocks here are monotonic and do not do
//! that; a bound on one step would harm every window that really rested that long. Where counts come from a file,
//! they are never placed later than the clock ([`import`](SlidingWindow::import)).
//!
//! # The state
//! W is cut into K sub-buckets; `head` is the one being counted in, and `K + 1` sub-buckets count against the limit:
//! head and the K before it. They span W at least, whatever the position within head, and W·(1 + 1/K) at most.
//!
//! | word | content |
//! |---|---|
//! | `head` | `[epoch e:33 \| permits given in e:31]`, or closed |
//! | `prior` | `[epoch:33 \| sum of the K sub-buckets before that epoch:31]`, of use while its epoch is head's |
//! | `ring` | the counts of closed sub-buckets, each with its epoch, in K + 1 slots; an absent epoch has count 0 |
//! | `until` | the first tick after prior's sub-bucket, where that is head's |
//! | `leaves` | a hint: the tick from which the oldest sub-bucket with a permit in it no longer counts |
//!
//! Windows of small limits keep 2, 3 or 5 slots in one word (`limit.rs`): the whole is 552 bytes for up to
//! 2,147,483,647 permits, 312 for up to 32,767, 232 for up to 1,023, 168 for up to 63; in windows of an hour and longer,
//! 312 for up to 524,287, 232 for up to 8,191, 168 for up to 255. All but the ring lies together, so
//! a permit touches one cache line while head stays in its sub-bucket, and one also where the window has rested for
//! longer than it is long; any other advance, and a refusal, touch the ring.
//!
//! # The protocol
//! - **Take** (1): load prior, until and head, until after prior. If the clock is before until (a late clock is, too), the epochs
//!   agree and prior + count + cost ≤ L: compare-and-swap head to count + cost.
//! - **Advance** (2) from e to n: s = the sum of sub-buckets n−K to n−1. Record head's count in e's slot (3), then
//!   compare-and-swap head to `[n | cost]`, or to `[n | 0]` where s + cost > L, then raise until to the end of n and prior to
//!   `[n | s]` (4).
//!   Where n is more than K later and gets a permit, (3) is left out: no sum from n on asks for e, and what is closed or
//!   exported with a permit in n is placed at n or later, where e does not count. The ring is not touched then.
//! - **Mend** (5): where prior's epoch is not head's, the winner of an advance has not finished (4). Any thread
//!   sums the ring itself, raises until and prior and goes on, so a stalled thread stops nobody.
//! - **Refuse** (6): walk the slots, oldest first, until enough would have left; head must still be in its epoch.
//! - **Close** (7): record head's count as in (3), then compare-and-swap head to closed, for ever.
//!
//! # Why it is right
//! *Head only grows* as a word: the count within an epoch, then the epoch, then closed. So a compare-and-swap that
//! succeeds proves that head never had another value since it was loaded; there is no ABA.
//!
//! *A slot is final once head has left its epoch.* It is recorded before the compare-and-swap that leaves, by the
//! thread that wins it, with the very count the swap expects. A thread that lost records a smaller count, or comes when
//! the slot has a later epoch: `record` raises, and never lowers. *Nothing of head's window is overwritten while head
//! stays*: head's own slot replaces that of e − K − 1 only. (With K slots it would replace e − K, which an advance
//! has yet to subtract.)
//!
//! *What was read was right if head did not move.* Every use of prior or ring ends in a compare-and-swap on head, or
//! in a second look at it. A slot overwritten too early is one that a thread with a later head wrote; so is a prior too
//! low, which only a sum over such a slot yields. Those writes are releases and our reads of them acquires, so
//! that later head happens before our compare-and-swap (or second look), which then cannot find the old one.
//! With relaxed accesses there we could read from the future and still find head unmoved.
//!
//! *Until is the end of head's sub-bucket* where prior's epoch is head's: no less, as it is only raised, and was before prior
//! was, and whoever acquires prior sees that; no more if head did not move, as for a prior or a slot from the future.
//! It says nothing that head's epoch does not, and is there for the take, which would otherwise multiply between a load
//! and the swap.
//!
//! *What head promises is there to see.* (3) is a release and is followed by a release on head; a thread that acquires
//! head sees all slots before it, since every swap of head also acquires and so hands on what came before.
//!
//! *Progress*: a loop runs again only because another thread moved head or raised prior, that is, got further.
//! Prior is never ahead of head, as it is raised only for an epoch that head has had; one behind is mended.

mod counts;
mod ring;

pub use counts::WindowCounts;
pub(super) use ring::Rings;

use super::limit::{
    CLOSED, Grid, LANES, LAST_EPOCH, Limit, capacity, count_of, epoch_of, pack, seconds_until, ticks_at,
};
use super::sync::{AtomicU64, Ordering};

/// The sliding window as the gate uses it, with sub-buckets of a sixtieth.
pub type Window = SlidingWindow<60>;

/// A sliding window of `K` sub-buckets, with a memory of its own. [`Window`] is the one to use; a model checker wants
/// shorter rings.
///
/// The common path stays within 40 bytes of it, which fit into one cache line; whoever keeps several places each in a line
/// of its own, so that threads with different keys do not disturb each other.
#[repr(C)]
pub struct SlidingWindow<const K: u64> {
    words: Words,
    shape: Shape,
    rings: Rings,
}

/// What changes with every permit.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Words {
    head: AtomicU64,
    prior: AtomicU64,
    until: AtomicU64,
    leaves: AtomicU64,
}

/// What a window is made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(super) struct Shape {
    /// Its length.
    pub window_ms: u32,
    /// The largest limit that its counts can grow to.
    pub most: u32,
}

/// A window, wherever its words and its ring lie. Where the ring does is not said beside the words and may be far off in
/// memory, so it is looked up only when it is used.
#[derive(Clone, Copy)]
pub(super) struct WindowRef<'a, const K: u64> {
    words: &'a Words,
    shape: Shape,
    rings: &'a Rings,
    /// That of the window's ring among them.
    index: usize,
}

/// A permit, or several taken at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    /// How many more the limit leaves at this moment.
    pub remaining: u32,
    /// Whole seconds, rounded up, until the oldest counted permit leaves the window.
    pub reset_s: u32,
}

/// Why no permit was given. Nothing was spent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// The limit is reached.
    Limited {
        /// Whole seconds after which a lone client surely succeeds; a second less would not do. `u32::MAX` at the end
        /// of the epochs, from which there is no way on.
        retry_after_s: u32,
        /// Whole seconds, rounded up, until the oldest counted permit leaves the window.
        reset_s: u32,
    },
    /// The cost is larger than the limit: waiting is of no use.
    NeverFits,
    /// The window was closed. Look the key's window up again, or make a new one.
    Retired,
    /// The window's length differs from the limit's, or its counts cannot grow as far as the limit. Replace it:
    /// [`SlidingWindow::close_and_export`], then [`SlidingWindow::import`].
    Outgrown,
}

impl<const K: u64> SlidingWindow<K> {
    /// A window in which nothing was taken yet, as compact as the limit allows. Allocates once.
    pub fn new(limit: Limit, now_ns: u64) -> Self {
        Self::at(window_ms(limit), limit.permits(), epoch_at::<K>(limit, now_ns))
    }

    /// Takes `cost` permits, all or none, at the clock reading `now_ns` (`clock::Now::elapsed_ns`).
    ///
    /// The limit is that of the moment: a changed one applies at once to what is already counted.
    /// Lock-free, allocates nothing. A cost of 0 is granted whenever the limit is not exceeded, and counts nothing.
    ///
    /// # Errors
    /// See [`Refused`]; nothing was taken then.
    #[inline]
    pub fn take(&self, limit: Limit, cost: u32, now_ns: u64) -> Result<Taken, Refused> {
        match self.by_ref().take_at_once(limit, cost, now_ns) {
            Some(taken) => Ok(taken),
            None => self.take_otherwise(limit, cost, now_ns),
        }
    }

    /// Apart, and by the reference that the caller has anyway, so that the common path keeps nothing for it.
    #[inline(never)]
    fn take_otherwise(&self, limit: Limit, cost: u32, now_ns: u64) -> Result<Taken, Refused> {
        self.by_ref().take_otherwise(limit, cost, now_ns)
    }

    /// Whether `cost` permits could be taken now. Spends nothing.
    ///
    /// # Errors
    /// As [`SlidingWindow::take`] would.
    pub fn peek(&self, limit: Limit, cost: u32, now_ns: u64) -> Result<(), Refused> {
        self.by_ref().peek(limit, cost, now_ns)
    }

    /// How many permits count against a limit now; those of a closed window have gone elsewhere, so 0.
    pub fn used(&self, now_ns: u64) -> u32 {
        self.by_ref().used(now_ns)
    }

    /// Closes the window if no permit in it counts any more, so that it can be given back. Returns whether the window
    /// is closed now; then [`SlidingWindow::take`] answers [`Refused::Retired`] for ever.
    pub fn retire_if_idle(&self, now_ns: u64) -> bool {
        self.by_ref().retire_if_idle(now_ns)
    }

    /// Whether the window is closed.
    pub fn is_retired(&self) -> bool {
        self.words.head.load(Ordering::Acquire) == CLOSED
    }

    /// The window's length in milliseconds.
    pub fn window_ms(&self) -> u64 {
        u64::from(self.shape.window_ms)
    }

    /// The memory that the window takes, in bytes: its own and its ring's.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(self.by_ref().ring())
    }

    /// The words of the ring of a window of such a limit.
    pub(super) fn ring_len(limit: Limit) -> usize {
        ring_len::<K>(lanes_for::<K>(window_ms(limit), limit.permits()))
    }

    #[inline]
    pub(super) fn by_ref(&self) -> WindowRef<'_, K> {
        WindowRef {
            words: &self.words,
            shape: self.shape,
            rings: &self.rings,
            index: 0,
        }
    }

    /// A window at an epoch, for counts up to `most`.
    fn at(window_ms: u32, most: u32, epoch: u64) -> Self {
        let lanes = lanes_for::<K>(window_ms, most);
        SlidingWindow {
            words: Words::at(Grid::<K>::new(window_ms), epoch),
            shape: Shape::new(window_ms, lanes),
            rings: Rings::new(1, ring_len::<K>(lanes)),
        }
    }
}

impl Words {
    /// Those of a window that is closed.
    pub fn closed() -> Self {
        Words {
            head: AtomicU64::new(CLOSED),
            prior: AtomicU64::new(CLOSED),
            until: AtomicU64::new(0),
            leaves: AtomicU64::new(0),
        }
    }

    fn at<const K: u64>(grid: Grid<K>, epoch: u64) -> Self {
        Words {
            head: AtomicU64::new(pack(epoch, 0)),
            prior: AtomicU64::new(pack(epoch, 0)),
            until: AtomicU64::new(grid.start_of(epoch + 1)),
            leaves: AtomicU64::new(0),
        }
    }
}

impl Shape {
    /// That of windows of the limit's length whose ring is so long.
    pub fn of_ring<const K: u64>(limit: Limit, ring_len: usize) -> Self {
        Self::new(window_ms(limit), lanes_of::<K>(ring_len))
    }

    fn new(window_ms: u32, lanes: u64) -> Self {
        Shape {
            window_ms,
            most: capacity(lanes, window_ms),
        }
    }
}

impl<'a, const K: u64> WindowRef<'a, K> {
    /// The window of these words and the ring with the index, which are its own.
    #[inline(always)]
    pub fn new(words: &'a Words, shape: Shape, rings: &'a Rings, index: usize) -> Self {
        WindowRef {
            words,
            shape,
            rings,
            index,
        }
    }

    /// Makes it one in which nothing was taken yet. Nobody else has it: whoever hands it over synchronises.
    pub fn begin(self, limit: Limit, now_ns: u64) {
        let new = Words::at(Grid::<K>::new(window_ms(limit)), epoch_at::<K>(limit, now_ns));
        let copy = |to: &AtomicU64, from: AtomicU64| to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        copy(&self.words.head, new.head);
        copy(&self.words.prior, new.prior);
        copy(&self.words.until, new.until);
        copy(&self.words.leaves, new.leaves);
        self.ring().iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// What nearly all takes come to: nothing changes but head's count. `None`: nothing was taken, and
    /// [`WindowRef::take`] is to be asked.
    ///
    /// The swap is a locked operation, which waits until all before it is done, what was put on the stack included. So the rest
    /// is kept short: no multiplication after a load, one comparison for what hangs on head, which is there last, and
    /// few values that are needed before the swap and after.
    #[inline(always)]
    fn take_at_once(self, limit: Limit, cost: u32, now_ns: u64) -> Option<Taken> {
        let now = ticks_at(now_ns);
        let prior = self.words.prior.load(Ordering::Acquire); // (1)
        let until = self.words.until.load(Ordering::Acquire); // (1), after prior
        if now >= until || !self.can_serve(limit) {
            return None;
        }
        let head = self.words.head.load(Ordering::Acquire); // (1)
        let leaves = self.words.leaves.load(Ordering::Acquire);
        // A hint that holds is of a permit that counts, so something does.
        if leaves < until {
            return None;
        }
        let room = u64::from(limit.permits()).checked_sub(u64::from(count_of(prior)) + u64::from(cost))?;
        // Head's count, or more than there can be room for where head is not in prior's epoch.
        let count = head.wrapping_sub(pack(epoch_of(prior), 0));
        let remaining = room.checked_sub(count)? as u32;
        self.swap_in(head, cost).then(|| Taken {
            remaining,
            reset_s: seconds_until(leaves, now),
        })
    }

    /// [`SlidingWindow::take`].
    #[inline(always)]
    pub fn take(self, limit: Limit, cost: u32, now_ns: u64) -> Result<Taken, Refused> {
        match self.take_at_once(limit, cost, now_ns) {
            Some(taken) => Ok(taken),
            None => self.take_otherwise(limit, cost, now_ns),
        }
    }

    /// A take that the common path did not finish, or lost to another thread.
    #[inline(never)]
    fn take_otherwise(self, limit: Limit, cost: u32, now_ns: u64) -> Result<Taken, Refused> {
        let grid = self.grid_for(limit, cost)?;
        let now = ticks_at(now_ns);
        loop {
            if let Some(answer) = self.take_once(limit, cost, grid, now) {
                return answer;
            }
        }
    }

    /// [`SlidingWindow::peek`].
    pub fn peek(self, limit: Limit, cost: u32, now_ns: u64) -> Result<(), Refused> {
        let grid = self.grid_for(limit, cost)?;
        let now = ticks_at(now_ns);
        loop {
            let head = self.words.head.load(Ordering::Acquire);
            if head == CLOSED {
                return Err(Refused::Retired);
            }
            let (epoch, next) = (epoch_of(head), grid.epoch_at(now).max(epoch_of(head)));
            if next > LAST_EPOCH {
                return Err(END_OF_EPOCHS);
            }
            let prior = self.words.prior.load(Ordering::Acquire);
            let sum = self.sum_before(next, head, prior);
            let counted = sum_of(sum, count_at(next, head), cost);
            if counted > u64::from(limit.permits()) {
                // The walk for the wait wants head in the present. Moving it there is what any refusal does.
                if next > epoch {
                    self.advance(head, next, sum, 0, grid);
                } else if let Some(refused) = self.refusal(epoch, counted, limit, grid, now) {
                    return Err(refused);
                }
            } else if self.still_in(epoch) {
                return Ok(());
            }
        }
    }

    /// [`SlidingWindow::used`].
    pub fn used(self, now_ns: u64) -> u32 {
        let grid = Grid::<K>::new(self.shape.window_ms);
        loop {
            let head = self.words.head.load(Ordering::Acquire);
            if head == CLOSED {
                return 0;
            }
            let next = grid.epoch_at(ticks_at(now_ns)).max(epoch_of(head));
            let prior = self.words.prior.load(Ordering::Acquire);
            let counted = sum_of(self.sum_before(next, head, prior), count_at(next, head), 0);
            if self.still_in(epoch_of(head)) {
                return counted as u32;
            }
        }
    }

    /// [`SlidingWindow::retire_if_idle`].
    pub fn retire_if_idle(self, now_ns: u64) -> bool {
        let grid = Grid::<K>::new(self.shape.window_ms);
        loop {
            let head = self.words.head.load(Ordering::Acquire);
            if head == CLOSED {
                return true;
            }
            let next = grid.epoch_at(ticks_at(now_ns)).max(epoch_of(head));
            let prior = self.words.prior.load(Ordering::Acquire);
            if sum_of(self.sum_before(next, head, prior), count_at(next, head), 0) > 0 {
                // Whatever moved meanwhile took a permit or advanced: not idle, or to be seen next time.
                return false;
            }
            if self.close(head) {
                return true;
            }
        }
    }

    /// The window's length in milliseconds.
    pub fn window_ms(self) -> u64 {
        u64::from(self.shape.window_ms)
    }

    fn ring(self) -> &'a [AtomicU64] {
        self.rings.get(self.index)
    }

    /// How many counts share a word of the ring.
    fn lanes(self) -> u64 {
        lanes_of::<K>(self.rings.len())
    }

    /// Whether the window is of the limit's length, and its counts can grow as far as the limit.
    #[inline]
    fn can_serve(self, limit: Limit) -> bool {
        window_ms(limit) == self.shape.window_ms && limit.permits() <= self.shape.most
    }

    /// The grid, if the window can serve the limit and the limit the cost.
    fn grid_for(self, limit: Limit, cost: u32) -> Result<Grid<K>, Refused> {
        if cost > limit.permits() {
            return Err(Refused::NeverFits);
        }
        if !self.can_serve(limit) {
            return Err(Refused::Outgrown);
        }
        Ok(Grid::new(self.shape.window_ms))
    }

    /// (1) Takes from head as it was loaded. The cost fits into the count's bits, as the limit does.
    #[inline]
    fn swap_in(self, head: u64, cost: u32) -> bool {
        let more = head + u64::from(cost);
        self.words
            .head
            .compare_exchange(head, more, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// One attempt at a take, in full: takes, refuses, mends prior on the way, or advances. `None`: look again.
    fn take_once(self, limit: Limit, cost: u32, grid: Grid<K>, now: u64) -> Option<Result<Taken, Refused>> {
        let head = self.words.head.load(Ordering::Acquire); // (1)
        if head == CLOSED {
            return Some(Err(Refused::Retired));
        }
        let prior = self.words.prior.load(Ordering::Acquire);
        let epoch = epoch_of(head);
        let next = if now < grid.start_of(epoch + 1) {
            epoch
        } else {
            grid.epoch_at(now)
        };
        if next > LAST_EPOCH {
            return Some(Err(END_OF_EPOCHS));
        }
        let sum = self.sum_before(next, head, prior);
        let counted = sum_of(sum, count_at(next, head), cost);
        let fits = counted <= u64::from(limit.permits());
        if next == epoch {
            if epoch_of(prior) != epoch {
                self.raise_prior(epoch, sum, grid); // (5)
            }
            if !fits {
                return self.refusal(epoch, counted, limit, grid, now).map(Err);
            }
        }
        let hint = self.words.leaves.load(Ordering::Acquire);
        let oldest = match Self::oldest_by(hint, next, grid) {
            Some(oldest) => oldest,
            None if sum == 0 => next,
            // What no slot has yet is head's own count, about to become one.
            None => self.first_counted(next.saturating_sub(K), epoch).unwrap_or(epoch),
        };
        let moved = if next == epoch {
            self.swap_in(head, cost)
        } else {
            self.advance(head, next, sum, if fits { cost } else { 0 }, grid)
        };
        if !moved || !fits {
            return None;
        }
        if cost > 0 {
            self.note_oldest(oldest, hint, grid);
        }
        Some(Ok(taken(limit, counted, oldest, grid, now)))
    }

    /// (2) Moves head to `next`, before which `sum` permits count, with `first` permits in it. Whether it did.
    fn advance(self, head: u64, next: u64, sum: u32, first: u32, grid: Grid<K>) -> bool {
        if next - epoch_of(head) <= K || first == 0 {
            self.record(epoch_of(head), count_of(head)); // (3)
        }
        let moved = self
            .words
            .head
            .compare_exchange(head, pack(next, first), Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        if moved {
            self.raise_prior(next, sum, grid); // (4)
        }
        moved
    }

    /// Raises until, then prior, to an epoch that head was seen in.
    fn raise_prior(self, epoch: u64, sum: u32, grid: Grid<K>) {
        self.words.until.fetch_max(grid.start_of(epoch + 1), Ordering::Release);
        self.words.prior.fetch_max(pack(epoch, sum), Ordering::Release);
    }

    /// (7) Whether it was this call that closed the window.
    fn close(self, head: u64) -> bool {
        self.record(epoch_of(head), count_of(head)); // (3)
        self.words
            .head
            .compare_exchange(head, CLOSED, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// The permits in the K sub-buckets before `next`, which is head's epoch or later. Right if head does not move.
    fn sum_before(self, next: u64, head: u64, prior: u64) -> u32 {
        let (epoch, count) = (epoch_of(head), count_of(head));
        let steps = next - epoch;
        if steps > K {
            return 0;
        }
        let (oldest, first) = (epoch.saturating_sub(K), next.saturating_sub(K));
        if epoch_of(prior) == epoch && steps <= K / 2 {
            // Where a slot was overwritten meanwhile, or prior is of a mend that came too late, head has moved on and
            // the sum is for nobody; it must not underflow for that.
            let own = if steps > 0 { count } else { 0 };
            (count_of(prior) + own).saturating_sub(self.sum_of_slots(oldest, first))
        } else {
            let own = if steps > 0 { count } else { 0 };
            self.sum_of_slots(first, epoch) + own
        }
    }

    /// (6) The refusal of a request for which `counted` permits, its own included, would count. `None`: head left
    /// `epoch`, so look again.
    #[inline(never)]
    fn refusal(self, epoch: u64, counted: u64, limit: Limit, grid: Grid<K>, now: u64) -> Option<Refused> {
        let excess = counted - u64::from(limit.permits());
        let hint = self.words.leaves.load(Ordering::Acquire);
        let from = Self::oldest_by(hint, epoch, grid).unwrap_or(epoch.saturating_sub(K));
        // What the slots do not free, head's own count does: the cost alone is within the limit.
        let (mut oldest, mut last, mut freed) = (epoch, epoch, 0);
        self.walk(from, epoch, |slot, count| {
            if freed == 0 {
                oldest = slot;
            }
            freed += u64::from(count);
            let enough = freed >= excess;
            if enough {
                last = slot;
            }
            !enough
        });
        if !self.still_in(epoch) {
            return None;
        }
        self.note_oldest(oldest, hint, grid);
        Some(Refused::Limited {
            retry_after_s: seconds_until(grid.leaves_at(last), now),
            reset_s: seconds_until(grid.leaves_at(oldest), now),
        })
    }

    /// The second look at head: whether what was read of prior and ring since head was in `epoch` was right.
    #[inline]
    fn still_in(self, epoch: u64) -> bool {
        epoch_of(self.words.head.load(Ordering::Acquire)) == epoch
    }

    /// The oldest counted epoch by the hint, where it still counts under a head at `epoch`.
    ///
    /// A hint is noted only when head was seen unmoved, so it was the oldest with a permit then; permits before it were
    /// none, none can come, and it is the oldest for as long as it counts.
    fn oldest_by(leaves: u64, epoch: u64, grid: Grid<K>) -> Option<u64> {
        // Of the difference, because small quotients are had soonest.
        let left = leaves.checked_sub(grid.start_of(epoch)).filter(|left| *left > 0)?;
        Some(epoch + grid.epoch_at(left) - (K + 1))
    }

    /// Notes the oldest epoch with a permit in it, after head was seen unmoved, unless the hint says so. Release, as every use
    /// of it ends in a look at head, too.
    fn note_oldest(self, oldest: u64, hint: u64, grid: Grid<K>) {
        let leaves = grid.leaves_at(oldest);
        if leaves != hint {
            self.words.leaves.store(leaves, Ordering::Release);
        }
    }
}

impl<const K: u64> std::fmt::Debug for SlidingWindow<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = self.words.head.load(Ordering::Acquire);
        let mut out = f.debug_struct("Window");
        out.field("shape", &self.shape);
        if head == CLOSED {
            out.field("closed", &true)
        } else {
            out.field("epoch", &epoch_of(head))
        }
        .finish()
    }
}

/// The answer from the end of the epochs on: no instant can be counted in, and none ever leaves.
const END_OF_EPOCHS: Refused = Refused::Limited {
    retry_after_s: u32::MAX,
    reset_s: u32::MAX,
};

/// A limit's window length, which has 32 bits.
#[inline]
fn window_ms(limit: Limit) -> u32 {
    limit.window_ms() as u32
}

/// The epoch of a clock reading in windows of the limit's length.
fn epoch_at<const K: u64>(limit: Limit, now_ns: u64) -> u64 {
    let grid = Grid::<K>::new(window_ms(limit));
    grid.epoch_at(ticks_at(now_ns)).min(LAST_EPOCH)
}

/// How many counts can share a word of the ring where the largest of them is `most`.
fn lanes_for<const K: u64>(window_ms: u32, most: u32) -> u64 {
    let fits = |lanes: &u64| K.is_multiple_of(*lanes) && most <= capacity(*lanes, window_ms);
    LANES.into_iter().find(fits).unwrap_or(1)
}

/// The words of a ring with so many counts to each.
fn ring_len<const K: u64>(lanes: u64) -> usize {
    (K / lanes + 1) as usize
}

/// How many counts share a word of a ring that is so long.
fn lanes_of<const K: u64>(ring_len: usize) -> u64 {
    let is_so_long = |lanes: &u64| self::ring_len::<K>(*lanes) == ring_len;
    LANES.into_iter().find(is_so_long).unwrap_or(1)
}

/// Head's own count where head is at `next`.
fn count_at(next: u64, head: u64) -> u32 {
    if epoch_of(head) == next { count_of(head) } else { 0 }
}

#[inline]
fn sum_of(prior: u32, count: u32, cost: u32) -> u64 {
    u64::from(prior) + u64::from(count) + u64::from(cost)
}

/// The answer to a take by which `counted` permits count, the oldest of them in `oldest`.
#[inline]
fn taken<const K: u64>(limit: Limit, counted: u64, oldest: u64, grid: Grid<K>, now: u64) -> Taken {
    let reset_s = if counted == 0 {
        0
    } else {
        seconds_until(grid.leaves_at(oldest), now)
    };
    Taken {
        remaining: limit.permits() - counted as u32,
        reset_s,
    }
}
