//! The memory of the keys' windows: places of one cache line each, in cells that never move, named by a number.
//!
//! A decision among many keys waits for memory, and waits are dear one after the other only. The page that leads from a
//! secret to its slot therefore says also where the key's windows are (`pages.rs`), so that both are asked for at once.
//! That takes places which can be found without a pointer in the slot, and reached without a count of references: they
//! are held by what is in force, which a decision has in its hands anyway.
//!
//! A number has 16 bits and counts among the slots of one chunk (`slots.rs`). The truth lies there: a slot has the number of
//! its key's place. What a page says is a hint, so a place says whose it is, and is asked.
//!
//! # The life of a place
//! 1. *Claimed*: a bit of its cell is set by whoever wants it. It is theirs alone; they begin the window in it and try to put
//!    its number into the slot. Whoever comes second there makes their place free again at once: nobody has seen it.
//! 2. *In use*: the slot has its number, and then it has the slot's, so that hints are believed.
//! 3. *Given back*: its windows are closed, the slot forgets the number, then the place its owner, and then something is put
//!    in force. A reader from before may still be in it, and finds it closed; one who comes after finds neither number
//!    nor owner, whatever hint it follows.
//! 4. *Free*: when the last such reader has left (`retired.rs`), the bit is cleared.
//!
//! So a place that a reader found to be of its key is not another key's before that reader leaves: if the place said so,
//! because the reader came before it was given back; if the slot said so, because it did after the reader had come.
//! In the second case the reader's table must have the place's cell, and does if it is still in force when the number was
//! read: a cell is put in force before any of its places is claimed, and stays for as long as one is.
//!
//! Tables of cells are never changed but replaced, as all that is in force: by one with another cell where none is free,
//! and without the cells of which no place is in use, whose memory goes when the last reader of the old table has left.
//! Before a cell is left out all of its places are claimed, so that nobody begins anything in it.

use super::limit::Limit;
use super::quota::{KeyWindows, Place};
use super::scope::NameId;
use super::slots::{self, SlotId};
use super::window::{Rings, Window};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// The number of a place among those of a chunk of slots.
pub(super) type PlaceId = u16;
/// No place.
pub(super) const NO_PLACE: PlaceId = PlaceId::MAX;

/// With what a cell has to say besides, they fill 16 KiB.
const PLACES: usize = 254;
/// As many as have numbers: twice what the slots of a chunk need, of which the other half may be on their way to be free.
const CELLS: usize = NO_PLACE as usize / PLACES;

/// The cells in force, by the chunks of slots that they are for.
#[derive(Clone, Default)]
pub(super) struct Places(Arc<[Cells]>);

/// Those of one chunk. The index is a part of the places' numbers, so one that is left out leaves a gap.
type Cells = Arc<[Option<Arc<Cell>>]>;

/// Places for windows with rings of one length.
struct Cell {
    places: [Place; PLACES],
    /// A bit for each place that is not free.
    used: [AtomicU64; PLACES.div_ceil(64)],
    rings: Rings,
}

/// A place, and a hold on its memory.
pub(super) struct HeldPlace {
    cell: Arc<Cell>,
    index: usize,
}

impl Places {
    /// The windows of the key in slot `owner`, if they are in the place with this number.
    #[inline(always)]
    pub fn hinted(&self, owner: SlotId, number: PlaceId) -> Option<KeyWindows<'_>> {
        self.at(owner, number).filter(|windows| windows.are_of(owner))
    }

    /// The windows in a place, which the slot `owner` was seen to have while this was in force.
    #[inline(always)]
    pub fn at(&self, owner: SlotId, number: PlaceId) -> Option<KeyWindows<'_>> {
        Some(self.cell(owner, number)?.windows(usize::from(number) % PLACES))
    }

    /// That place, held.
    pub fn hold(&self, owner: SlotId, number: PlaceId) -> Option<HeldPlace> {
        Some(HeldPlace {
            cell: self.cell(owner, number)?.clone(),
            index: usize::from(number) % PLACES,
        })
    }

    /// A place for windows of the key in slot `owner`, which nobody else has, begun with one of the tier; if one is free.
    pub fn claim(&self, owner: SlotId, tier: NameId, limit: Limit, now_ns: u64) -> Option<(PlaceId, KeyWindows<'_>)> {
        let ring_len = Window::ring_len(limit);
        let cells = self.0.get(slots::chunk_of(owner))?.iter().enumerate();
        let mut fitting =
            cells.filter_map(|(at, cell)| Some((at, cell.as_deref().filter(|cell| cell.rings.len() == ring_len)?)));
        let (at, cell, index) = fitting.find_map(|(at, cell)| Some((at, cell, cell.claim()?)))?;
        let windows = cell.windows(index);
        windows.begin(tier, limit, now_ns);
        Some(((at * PLACES + index) as PlaceId, windows))
    }

    /// Makes a place free, which nobody can be in.
    pub fn free(&self, owner: SlotId, number: PlaceId) {
        if let Some(cell) = self.cell(owner, number) {
            cell.free(usize::from(number) % PLACES);
        }
    }

    /// These, with a place free for windows of such a limit of the key in slot `owner`.
    pub fn with_room(&self, owner: SlotId, limit: Limit) -> Places {
        let (chunk, ring_len) = (slots::chunk_of(owner), Window::ring_len(limit));
        let mut chunks = self.0.to_vec();
        chunks.resize_with(chunks.len().max(chunk + 1), Cells::default);
        let has_room = |cell: &Arc<Cell>| cell.rings.len() == ring_len && cell.has_room();
        if !chunks[chunk].iter().flatten().any(has_room) {
            let mut cells = chunks[chunk].to_vec();
            let made = Some(Arc::new(Cell::new(ring_len)));
            match cells.iter().position(Option::is_none) {
                Some(gap) => cells[gap] = made,
                None if cells.len() < CELLS => cells.push(made),
                None => {}
            }
            chunks[chunk] = cells.into();
        }
        Places(chunks.into())
    }

    /// Whether there are cells without a place in use.
    pub fn has_empty_cells(&self) -> bool {
        self.0
            .iter()
            .any(|cells| cells.iter().flatten().any(|cell| cell.is_empty()))
    }

    /// These, without the cells of which no place is in use.
    pub fn without_empty_cells(&self) -> Places {
        let living = |cell: &Option<Arc<Cell>>| cell.as_ref().filter(|cell| !cell.close()).cloned();
        let chunks = self.0.iter().map(|cells| cells.iter().map(living).collect());
        Places(chunks.collect())
    }

    #[inline(always)]
    fn cell(&self, owner: SlotId, number: PlaceId) -> Option<&Arc<Cell>> {
        let cells = self.0.get(slots::chunk_of(owner))?;
        cells.get(usize::from(number) / PLACES)?.as_ref()
    }
}

impl HeldPlace {
    /// The windows in it.
    pub fn windows(&self) -> KeyWindows<'_> {
        self.cell.windows(self.index)
    }

    /// Makes the place free, which nobody can be in.
    pub fn free(&self) {
        self.cell.free(self.index);
    }
}

impl Cell {
    fn new(ring_len: usize) -> Self {
        let cell = Cell {
            places: std::array::from_fn(|_| Place::empty()),
            used: Default::default(),
            rings: Rings::new(PLACES, ring_len),
        };
        // What the last word has no places for is not free.
        cell.used[PLACES / 64].store(u64::MAX << (PLACES % 64), Relaxed);
        cell
    }

    #[inline(always)]
    fn windows(&self, index: usize) -> KeyWindows<'_> {
        KeyWindows::new(&self.places[index], &self.rings, index)
    }

    /// Claims a place. Acquire: whoever made it free has left it.
    fn claim(&self) -> Option<usize> {
        self.used.iter().enumerate().find_map(|(at, word)| {
            let take = |used: u64| (used != u64::MAX).then(|| used | (used + 1));
            let before = word.fetch_update(Acquire, Relaxed, take).ok()?;
            Some(at * 64 + before.trailing_ones() as usize)
        })
    }

    fn free(&self, index: usize) {
        self.windows(index).clear();
        self.used[index / 64].fetch_and(!(1 << (index % 64)), Release);
    }

    fn has_room(&self) -> bool {
        self.used.iter().any(|word| word.load(Relaxed) != u64::MAX)
    }

    fn is_empty(&self) -> bool {
        let none_used = |(at, word): (usize, &AtomicU64)| word.load(Relaxed) == Self::none_used(at);
        self.used.iter().enumerate().all(none_used)
    }

    /// Claims all places for good, if none is in use. Whether it did.
    fn close(&self) -> bool {
        let claim_all = |(at, word): &(usize, &AtomicU64)| {
            let all = word.compare_exchange(Self::none_used(*at), u64::MAX, Acquire, Relaxed);
            all.is_ok()
        };
        let claimed = self.used.iter().enumerate().take_while(claim_all).count();
        let is_closed = claimed == self.used.len();
        if !is_closed {
            for (at, word) in self.used.iter().enumerate().take(claimed) {
                word.store(Self::none_used(at), Release);
            }
        }
        is_closed
    }

    /// A word of `used` when no place is in use.
    const fn none_used(at: usize) -> u64 {
        if at == PLACES / 64 {
            u64::MAX << (PLACES % 64)
        } else {
            0
        }
    }
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Places").field("chunks", &self.0.len()).finish()
    }
}

impl fmt::Debug for HeldPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldPlace")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIER: NameId = NameId(3);

    fn limit(permits: u32) -> Limit {
        Limit::new(permits, 3_600_000).unwrap()
    }

    #[test]
    fn a_cell_with_its_counts_of_references_is_16_kib() {
        assert_eq!(size_of::<Cell>() + align_of::<Cell>(), 16 * 1024);
    }

    #[test]
    fn places_are_claimed_once_and_again_when_they_are_free() {
        let none = Places::default();
        assert!(none.claim(0, TIER, limit(5), 0).is_none());
        let places = none.with_room(40_000, limit(5));
        assert!(places.claim(0, TIER, limit(5), 0).is_none(), "another chunk");
        assert!(places.claim(40_000, TIER, limit(5_000), 0).is_none(), "another ring");
        let claim = |owner| {
            let (number, windows) = places.claim(owner, TIER, limit(5), 0).unwrap();
            assert!(places.hinted(owner, number).is_none(), "not yet");
            windows.set_owner(owner);
            number
        };
        let numbers: Vec<PlaceId> = (40_000..40_000 + PLACES as SlotId).map(claim).collect();
        assert_eq!(numbers, (0..PLACES as PlaceId).collect::<Vec<_>>());
        assert!(places.claim(40_000, TIER, limit(5), 0).is_none(), "none is free");
        assert!(places.hinted(40_007, 7).is_some() && places.hinted(40_007, 8).is_none());

        let more = places.with_room(40_000, limit(5));
        assert!(more.hinted(40_007, 7).is_some());
        let (number, _) = more.claim(50_000, TIER, limit(5), 0).unwrap();
        assert_eq!(number, PLACES as PlaceId);
        let left = more.at(40_007, 7).unwrap();
        left.leave();
        left.set_owner(40_007);
        assert!(more.hinted(40_007, 7).is_none(), "it does not come back");
        more.free(40_007, 7);
        let (number, _) = more.claim(50_001, TIER, limit(5), 0).unwrap();
        assert_eq!(number, 7);
    }

    #[test]
    fn a_cell_is_left_out_when_none_of_its_places_is_in_use() {
        let places = Places::default().with_room(0, limit(5)).with_room(0, limit(5_000));
        let (number, _) = places.claim(9, TIER, limit(5_000), 0).unwrap();
        assert_eq!(number, PLACES as PlaceId);
        assert!(places.has_empty_cells());
        let fewer = places.without_empty_cells();
        assert!(!fewer.has_empty_cells() && fewer.at(9, number).is_some());
        assert!(fewer.claim(9, TIER, limit(5), 0).is_none());
        assert!(
            places.claim(9, TIER, limit(5), 0).is_none(),
            "nobody begins anything in what is left out"
        );
        let again = fewer.with_room(0, limit(5));
        assert_eq!(again.claim(9, TIER, limit(5), 0).unwrap().0, 0);
    }
}
